"""The kinds of STORE on disk, opened: each modality's rows and their metadata, checked against each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from msae.base.errors import StoreError
from msae.data.arrays import Rows, ShardedRows, open_npy, open_safetensors, same_width
from msae.data.tables import CAPTION_COLUMNS, Metadata, read_table

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

FOLDERS: dict[Modality, str] = {"image": "img_emb", "text": "text_emb"}
_PARQUET_COLUMNS: dict[Modality | None, tuple[str, ...]] = {
    "image": ("image_embedding", "image_emb", "img_embedding", "img_emb"),
    "text": ("text_embedding", "text_emb"),
    None: ("embedding", "embeddings", "emb", "vector"),
}


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
    """The embeddings of a .npy, .parquet or .safetensors file; those of unnamed modality are of `modality`.

    Raises:
        StoreError: The file is of another kind, damaged, or does not fit its metadata.
    """
    suffix = path.suffix.lower()
    named: dict[Modality | None, Rows]
    if suffix == ".npy":
        named, metadata = {None: open_npy(path, StoreError)}, _beside(path)
    elif suffix == ".safetensors":
        named, metadata = _tensors(path), _beside(path)
    elif suffix == ".parquet":
        named, metadata = _parquet_embeddings(path)
    else:
        raise StoreError(
            f"{path} has the unknown suffix {suffix!r}; wanted a store folder, .npy, .parquet or .safetensors"
        )
    unnamed = modality or _guess_modality(metadata.names)
    rows = {name or unnamed: same_width([array], StoreError) for name, array in named.items()}
    _check_counts(path, rows, metadata)
    return Opened(rows, metadata)


def metadata_files(path: Path) -> list[Path]:
    """The files from which the metadata of the STORE at `path` are read."""
    if path.is_dir():
        return list(_numbered(path / "metadata", ".parquet").values())
    beside = [path] if path.suffix.lower() == ".parquet" else [path.with_suffix(".csv"), path.with_suffix(".parquet")]
    return [file for file in beside if file.is_file()][:1]


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


def _beside(path: Path) -> Metadata:
    """The metadata table with the stem of `path`, if there is one."""
    tables = metadata_files(path)
    if tables and tables[0].suffix == ".csv":
        return Metadata.of(read_table(tables[0], StoreError))
    return Metadata.open(tables, StoreError) if tables else Metadata.none()


def _guess_modality(columns: Sequence[str]) -> Modality:
    """Captions alone are text; a caption beside an image's path or label describes the image."""
    has_caption = any(name in columns for name in CAPTION_COLUMNS)
    has_image = any(name in columns for name in ("image_path", "path", "label"))
    return "text" if has_caption and not has_image else "image"


def _tensors(path: Path) -> dict[Modality | None, Rows]:
    """The tensors of a .safetensors file that are embeddings."""
    tensors = {name: rows for name, rows in open_safetensors(path, StoreError)[0].items() if len(rows.shape) == 2}
    named: dict[Modality | None, Rows] = {name: tensors[name] for name in MODALITIES if name in tensors}
    if not named and "embeddings" in tensors:
        named = {None: tensors["embeddings"]}
    if not named and len(tensors) == 1:
        named = {None: next(iter(tensors.values()))}
    if not named:
        raise StoreError(
            f"{path} has the two-dimensional tensors {', '.join(tensors) or 'none'}; "
            f"wanted 'embeddings', or 'image' and 'text'"
        )
    for rows in named.values():
        if not rows.dtype.startswith(("float", "bfloat")):
            raise StoreError(f"{path} holds {rows.dtype}; wanted float16, bfloat16, float32 or float64")
        if 0 in rows.shape:
            raise StoreError(f"{path} is empty: a tensor of shape {rows.shape}; wanted at least one row")
    return named


def _parquet_embeddings(path: Path) -> tuple[dict[Modality | None, Rows], Metadata]:
    """The embedding columns of a .parquet file, in memory, and its other columns."""
    everything = Metadata.open([path], StoreError)
    columns: dict[Modality | None, str] = {}
    for modality, names in _PARQUET_COLUMNS.items():
        known = [name for name in names if name in everything.names]
        if known and (modality is not None or not columns):
            columns[modality] = known[0]
    if not columns:
        vectors = everything.vectors
        if len(vectors) != 1:
            raise StoreError(
                f"{path} has {len(vectors)} columns of float lists among {', '.join(everything.names)}; "
                f"wanted one, or one named 'embedding'"
            )
        columns = {None: vectors[0]}
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
