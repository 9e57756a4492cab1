"""The kinds of STORE on disk, opened: each modality's rows and their metadata, checked against each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from numpy.typing import NDArray

from msae.base.errors import StoreError
from msae.base.notices import notice
from msae.data.arrays import Rows, ShardedRows, open_npy, open_npz, open_safetensors, same_width
from msae.data.tables import CAPTION_COLUMNS, IMAGE_PATH_COLUMNS, Metadata, read_table

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

FOLDERS: dict[Modality, str] = {"image": "img_emb", "text": "text_emb"}
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


class Opened(NamedTuple):
    """What a STORE holds."""

    rows: dict[Modality, ShardedRows]
    metadata: Metadata


def open_folder(path: Path) -> Opened:
    """The shards of a folder in clip-retrieval's layout, memory-mapped.

    Raises:
        StoreError: There are none, or they do not fit each other.
    """
    rows: dict[Modality, ShardedRows] = {}
    for modality, folder in FOLDERS.items():
        files = _numbered(path / folder, ".npy")
        if files:
            rows[modality] = same_width([open_npy(file, StoreError) for file in files.values()], StoreError)
    if not rows:
        raise StoreError(f"{path} is an empty store: no .npy file in img_emb/ or text_emb/; embed again")
    if len({array.d_in for array in rows.values()}) > 1:
        widths = " and ".join(f"{array.d_in} ({modality})" for modality, array in rows.items())
        raise StoreError(f"{path} holds embeddings of different widths: {widths}; wanted one encoder: embed again")
    tables = _numbered(path / "metadata", ".parquet")
    metadata = Metadata.open(list(tables.values()), StoreError) if tables else Metadata.none()
    _check_counts(path, rows, metadata)
    return Opened(rows, metadata)


def open_file(path: Path, modality: Modality | None) -> Opened:
    """The embeddings of a .npy, .npz, .parquet or .safetensors file; those of unnamed modality are of `modality`.

    Raises:
        StoreError: The file is of another kind, damaged, or does not fit its metadata.
    """
    suffix = path.suffix.lower()
    named: dict[Modality | None, Rows]
    if suffix == ".npy":
        named, metadata = {None: open_npy(path, StoreError)}, _beside(path)
    elif suffix == ".safetensors":
        named, metadata = _tensors(path), _beside(path)
    elif suffix == ".npz":
        named, metadata = _archive(path)
    elif suffix == ".parquet":
        named, metadata = _parquet_embeddings(path)
    else:
        raise StoreError(
            f"{path} has the unknown suffix {suffix!r}; wanted a store folder, .npy, .npz, .parquet or .safetensors"
        )
    unnamed = modality or _modality_of(path, metadata.names, is_asked=None in named)
    rows = {name or unnamed: same_width([array], StoreError) for name, array in named.items()}
    if len({array.d_in for array in rows.values()}) > 1:
        widths = " and ".join(f"{array.d_in} ({modality})" for modality, array in rows.items())
        raise StoreError(f"{path} holds embeddings of different widths: {widths}; wanted one encoder: embed again")
    _check_counts(path, rows, metadata)
    return Opened(rows, metadata)


def metadata_files(path: Path) -> list[Path]:
    """The files from which the metadata of the STORE at `path` are read."""
    if path.is_dir():
        return list(_numbered(path / "metadata", ".parquet").values())
    if path.suffix.lower() == ".parquet":
        return [path]
    own = [path] if path.suffix.lower() == ".npz" else []
    return [file for file in (_table_beside(path), *own) if file is not None][:1]


def _check_counts(path: Path, rows: Mapping[Modality, ShardedRows], metadata: Metadata) -> None:
    """Refuse modalities and metadata that are not about the same rows, shard by shard."""
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


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """The files `NAME_NUMBER.suffix` of a folder in the order of their numbers, 10 after 9."""
    pattern = re.compile(rf"{re.escape(folder.name)}_(\d+){re.escape(suffix)}")
    entries = folder.iterdir() if folder.is_dir() else []
    found = {int(match[1]): entry for entry in entries if (match := pattern.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def _table_beside(path: Path) -> Path | None:
    """The table with the stem of `path`, if there is one."""
    files = [path.with_suffix(suffix) for suffix in (".csv", ".parquet")]
    return next((file for file in files if file.is_file()), None)


def _beside(path: Path) -> Metadata:
    """The metadata in the table with the stem of `path`, if there is one."""
    table = _table_beside(path)
    if table is None:
        return Metadata.none()
    return Metadata.of(read_table(table, StoreError)) if table.suffix == ".csv" else Metadata.open([table], StoreError)


def _modality_of(path: Path, columns: Sequence[str], *, is_asked: bool) -> Modality:
    """What rows of unnamed modality are: as the file's name says, else by the columns beside them.

    Captions alone are text; a caption beside an image's path or label describes the image. Where captions are all that
    there is to judge by, this is a guess and is said.
    """
    words = set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", path.stem).lower()))
    named: list[Modality] = [modality for modality, known in _MODALITY_WORDS.items() if words & known]
    if len(named) == 1:
        return named[0]
    has_path = any(name in columns for name in IMAGE_PATH_COLUMNS)
    caption = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if has_path or caption is None:
        return "image"
    guess: Modality = "image" if "label" in columns else "text"
    if is_asked:
        why = f"column {caption!r}" + (" and column 'label'" if guess == "image" else ", no image paths, no labels")
        other = "text" if guess == "image" else "image"
        notice(
            f"{path}: its rows are taken for {guess} embeddings ({why}); "
            f"if they are not, give --modality {other} or write {other!r} into the file's name"
        )
    return guess


def _chosen(path: Path, candidates: Sequence[str], what: str) -> dict[Modality | None, str]:
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


def _tensors(path: Path) -> dict[Modality | None, Rows]:
    """The tensors of a .safetensors file that are embeddings."""
    tensors = {name: rows for name, rows in open_safetensors(path, StoreError)[0].items() if len(rows.shape) == 2}
    chosen = _chosen(path, list(tensors), "two-dimensional tensors")
    return {modality: _checked(tensors[name]) for modality, name in chosen.items()}


def _archive(path: Path) -> tuple[dict[Modality | None, Rows], Metadata]:
    """The embeddings of a .npz file, in memory, and as metadata its one-dimensional arrays of as many values.

    A table beside the file takes the place of these arrays.
    """
    arrays = open_npz(path, StoreError)
    tables = [name for name, array in arrays.items() if array.ndim == 2]
    floats = [name for name in tables if arrays[name].dtype.kind == "f"]
    chosen = _chosen(path, floats or tables, "two-dimensional arrays")
    named = {modality: _checked(Rows(path, arrays[name], arrays[name].dtype.name)) for modality, name in chosen.items()}
    beside = _beside(path)
    if beside.names:
        return named, beside
    return named, _columns_of(path, arrays, len(next(iter(named.values())).values))


def _columns_of(path: Path, arrays: Mapping[str, NDArray[Any]], n_rows: int) -> Metadata:
    import pyarrow as pa

    columns = {}
    for name, array in arrays.items():
        if array.ndim == 1 and len(array) == n_rows:
            try:
                columns[name] = pa.array(array.tolist())
            except (pa.ArrowException, OverflowError) as err:
                raise StoreError(f"{path} has an array {name!r} of {array.dtype} that is no column; remove it") from err
    return Metadata.of(pa.table(columns)) if columns else Metadata.none()


def _checked(rows: Rows) -> Rows:
    """`rows`, if they are numbers of a kind that embeddings have, and not none."""
    if rows.dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise StoreError(f"{rows.path} holds {rows.dtype}; wanted float16, bfloat16, float32 or float64")
    if 0 in rows.shape:
        raise StoreError(f"{rows.path} is empty: an array of shape {rows.shape}; wanted at least one row")
    return rows


def _parquet_embeddings(path: Path) -> tuple[dict[Modality | None, Rows], Metadata]:
    """The embedding columns of a .parquet file, in memory, and its other columns."""
    everything = Metadata.open([path], StoreError)
    candidates = everything.vectors or [name for name in everything.names if name.endswith(_ENDINGS)][:1]
    columns = _chosen(path, candidates, "columns of float lists")
    rows = {modality: _vectors(path, name, everything) for modality, name in columns.items()}
    return rows, Metadata.open([path], StoreError, without=list(columns.values()))


def _vectors(path: Path, name: str, table: Metadata) -> Rows:
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
    return Rows(path, array, array.dtype.name)
