"""Which arrays or columns of a store's files are its embeddings, of which modality, and whether all fit together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, cast

from msae.base.errors import StoreError
from msae.base.notices import notice
from msae.data.arrays import Rows, ShardedRows
from msae.data.layout import MODALITIES, Modality, StoreFiles
from msae.data.tables import CAPTION_COLUMNS, IMAGE_PATH_COLUMNS, Metadata

_ENDINGS = ("embedding", "embeddings", "embeds", "emb", "features")
EMBEDDING_NAMES: dict[Modality | None, tuple[str, ...]] = {
    "image": (*(f"{what}_{ending}" for ending in _ENDINGS for what in ("image", "img")), "image"),
    "text": (*(f"text_{ending}" for ending in _ENDINGS), "text"),
    None: (*_ENDINGS, "vector", "vectors", "arr_0"),
}
"""Names under which a .parquet, .npz or .safetensors file may hold embeddings, the first that is there wins.

`image_embeds` and `text_embeds` are those of transformers, `arr_0` that of `numpy.savez` without names.
"""
_MODALITY_WORDS: dict[Modality, frozenset[str]] = {
    "image": frozenset(("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures")),
    "text": frozenset(("text", "texts", "txt", "txts", "caption", "captions", "word", "words")),
}
"""Words in a file's name that say what its rows are."""


class Embeddings(dict[Modality, ShardedRows]):
    """The rows of each modality of a store; one that is not there is a `StoreError`."""

    def __init__(self, path: str, rows: Mapping[Modality, ShardedRows]) -> None:
        super().__init__(rows)
        self.path = path

    def __missing__(self, modality: str) -> ShardedRows:
        raise StoreError(f"{self.path} has no {modality} embeddings, only {' and '.join(sorted(self))}")


def contents_of(
    path: str,
    files: StoreFiles,
    arrays: Mapping[str, ShardedRows],
    table: Metadata,
    *,
    modality: Modality | None,
    unnamed: Modality | None,
) -> tuple[Embeddings, Metadata]:
    """The embeddings of a store by modality, and its metadata.

    Args:
        path: What the store is called.
        arrays: All arrays of its files by name; none where they are columns of the table.
        table: All columns of its files.
        modality, unnamed: See `EmbeddingStore.open`.

    Raises:
        StoreError: There are no embeddings, the parts do not fit each other or store.json, or `modality` is not there.
    """
    if files.arrays:
        named, metadata = _in_arrays(path, files, arrays, table)
    else:
        named, metadata = _in_columns(path, files.tables[0], table)
    if None in named:
        its_own = modality or _named_modality(path) or unnamed or _guess(path, metadata.names)
        named = {name or its_own: array for name, array in named.items()}
    rows = Embeddings(path, cast("dict[Modality, ShardedRows]", named))
    _check_together(path, rows, metadata)
    for key, value in summary(rows).items() if files.record else ():
        if files.record.get(key) != value:
            raise StoreError(
                f"{path} is damaged: its {key} is {value!r} where store.json says {files.record.get(key)!r}; "
                f"copy the store again or embed again"
            )
    if modality is not None:
        _ = rows[modality]
    return rows, metadata


def summary(rows: Mapping[Modality, ShardedRows]) -> dict[str, Any]:
    """What store.json records of the arrays, and what must still hold when they are opened."""
    first = next(iter(rows.values()))
    return {
        "modalities": [modality for modality in MODALITIES if modality in rows],
        "rows": len(first),
        "d_in": first.d_in,
        "dtype": first.dtype,
    }


def _check_together(path: str, rows: Mapping[Modality, ShardedRows], metadata: Metadata) -> None:
    """Refuse modalities of different widths, and modalities and metadata that are not of the same rows."""
    if len({array.d_in for array in rows.values()}) > 1:
        widths = " and ".join(f"{array.d_in} ({modality})" for modality, array in rows.items())
        raise StoreError(f"{path} holds embeddings of different widths: {widths}; wanted one encoder: embed again")
    counts = {f"{modality} rows": [shard.shape[0] for shard in array.shards] for modality, array in rows.items()}
    if metadata.counts:
        counts["metadata rows"] = metadata.counts
    first, *others = counts.items()
    for name, found in others:
        if found != first[1]:
            where = "" if sum(found) != sum(first[1]) else ", cut into other shards"
            raise StoreError(
                f"{path} holds {sum(first[1]):,} {first[0]} but {sum(found):,} {name}{where}; "
                f"wanted one for each: make both again from one source"
            )


def _named_modality(path: str) -> Modality | None:
    """What the file's name says that its rows are."""
    words = set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", PurePath(path).stem).lower()))
    named: list[Modality] = [modality for modality, known in _MODALITY_WORDS.items() if words & known]
    return named[0] if len(named) == 1 else None


def _guess(path: str, columns: Sequence[str]) -> Modality:
    """What rows are by the columns beside them: captions alone are text, beside an image's path or label they describe
    the image. Where captions are all that there is to judge by, the guess is said.
    """
    has_path = any(name in columns for name in IMAGE_PATH_COLUMNS)
    caption = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if has_path or caption is None:
        return "image"
    guess: Modality = "image" if "label" in columns else "text"
    why = f"column {caption!r}" + (" and column 'label'" if guess == "image" else ", no image paths, no labels")
    other = "text" if guess == "image" else "image"
    notice(
        f"{path}: its rows are taken for {guess} embeddings ({why}); "
        f"if they are not, give --modality {other} or write {other!r} into the file's name"
    )
    return guess


def _chosen(path: str, candidates: Sequence[str], what: str) -> dict[Modality | None, str]:
    """The name of each modality's embeddings: a known one, else the only candidate.

    Args:
        candidates: Names of what may be embeddings.
        what: How these are called in errors, in the plural.
    """
    found: dict[Modality | None, str] = {}
    for modality, names in EMBEDDING_NAMES.items():
        known = next((name for name in names if name in candidates), None)
        if known is not None and (modality is not None or not found):
            found[modality] = known
    if not found and len(candidates) == 1:
        found = {None: candidates[0]}
    if not found:
        listed = f"{len(candidates)} {what}" + (f": {', '.join(candidates)}" if candidates else "")
        raise StoreError(f"{path} has {listed}; wanted 'embeddings', or 'image' and 'text', or one alone")
    return found


def _in_arrays(
    path: str, files: StoreFiles, arrays: Mapping[str, ShardedRows], beside: Metadata
) -> tuple[dict[Modality | None, ShardedRows], Metadata]:
    """The arrays that are embeddings, and the table beside them.

    Without a table, the one-dimensional arrays of a .npz that have a value for each row are its metadata.
    """
    candidates = [name for name, array in arrays.items() if len(array.shards[0].shape) == 2]
    if files.kind == "npz":
        candidates = [name for name in candidates if arrays[name].shards[0].values.dtype.kind == "f"] or candidates
    what = "two-dimensional tensors" if files.kind == "safetensors" else "two-dimensional arrays"
    named = {modality: _checked(arrays[name]) for modality, name in _chosen(path, candidates, what).items()}
    if files.kind == "npz" and not beside.names:
        return named, _columns_of(path, arrays, len(next(iter(named.values()))))
    return named, beside


def _columns_of(path: str, arrays: Mapping[str, ShardedRows], n_rows: int) -> Metadata:
    import pyarrow as pa

    columns = {}
    for name, array in arrays.items():
        values = array.shards[0].values
        if values.shape == (n_rows,):
            try:
                columns[name] = pa.array(values.tolist())
            except (pa.ArrowException, OverflowError) as err:
                raise StoreError(
                    f"{path} has an array {name!r} of {values.dtype} that is no column; remove it"
                ) from err
    return Metadata.of(pa.table(columns)) if columns else Metadata.open([], StoreError)


def _checked(array: ShardedRows) -> ShardedRows:
    """`array`, if its numbers are of a kind that embeddings have, and not none."""
    rows = array.shards[0]
    if rows.dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise StoreError(f"{rows.path} holds {rows.dtype}; wanted float16, bfloat16, float32 or float64")
    if 0 in rows.shape:
        raise StoreError(f"{rows.path} is empty: an array of shape {rows.shape}; wanted at least one row")
    return array


def _in_columns(path: str, file: Path, table: Metadata) -> tuple[dict[Modality | None, ShardedRows], Metadata]:
    """The embedding columns of a .parquet file, in memory, and its other columns."""
    candidates = table.vectors or [name for name in table.names if name.endswith(_ENDINGS)][:1]
    columns = _chosen(path, candidates, "columns of float lists")
    rows = {modality: ShardedRows((_vectors(path, file, name, table),)) for modality, name in columns.items()}
    return rows, table.without(columns.values())


def _vectors(path: str, file: Path, name: str, table: Metadata) -> Rows:
    """A column of equally long float lists as one array."""
    import pyarrow as pa

    column = table.read([name]).column(name).combine_chunks()
    if not len(column):
        raise StoreError(f"{path} is empty: column {name!r} has no rows; wanted at least one")
    if name not in table.vectors or column.null_count:
        raise StoreError(
            f"column {name!r} of {path} is {column.type} with {column.null_count} rows missing; "
            f"wanted a list of floats in every row"
        )
    values = column.flatten()
    is_fixed = pa.types.is_fixed_size_list(column.type)
    if values.null_count or not len(values) or not (is_fixed or len(column.value_lengths().unique()) == 1):
        raise StoreError(f"column {name!r} of {path} has rows of different lengths; wanted one width: embed again")
    array = values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return Rows.of(file, array, array.dtype.name)
