"""`EmbeddingStore`: rows of embeddings with ids and metadata on disk, raw, immutable, memory-mapped.

The disk format is defined in docs/store-format.md.
"""

from __future__ import annotations

import json
import math
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args, overload

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

from msae.base.errors import StoreError, nearest, nearest_beside
from msae.base.files import atomic_path, read_json, write_json
from msae.base.notices import notice
from msae.base.records import to_record
from msae.base.results import import_pandas
from msae.data.arrays import (
    Rows,
    ShardedRows,
    fingerprint,
    first_bad_row,
    hash_files,
    is_sampled_fingerprint,
    open_arrays,
    open_shards,
    zero_rows,
)
from msae.data.tables import CAPTION_COLUMNS, IMAGE_PATH_COLUMNS, Metadata, conform, text_column, unique_ids

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]
    import pyarrow as pa

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

PATH_COLUMNS = ("image_path", "path")
_WRITTEN_NAN = ("nan", "<na>")
"""What a missing value becomes when it is written as text, in lower case."""
MAX_SHOWN = 100
"""Characters of a value in the repr of a row."""

SCHEMA_VERSION = 1
PARTIAL = ".partial"
"""The folder inside a store in which `msae embed` works until the store is finished."""

_ROWS_DESCRIBED = 4096
"""Rows described at once while a store is iterated over."""
_ID_COLUMNS = ("id", "key", "image_path")


class Skipped(NamedTuple):
    """One input that was not embedded."""

    id: str
    reason: str


class StorePart(NamedTuple):
    """Consecutive rows of a store that is being written."""

    rows: Mapping[Modality, NDArray[Any]]
    metadata: pa.Table


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddingStore:
    """Embeddings of one or two modalities; row i is the same sample in every modality and in the metadata.

    Rows are raw, as the encoder made them: standardising belongs to the SAE.
    """

    path: Path
    kind: Literal["store", "clip-retrieval", "npy", "npz", "parquet", "safetensors"]
    rows: Mapping[Modality, ShardedRows] = field(repr=False)
    _metadata: Metadata = field(repr=False)
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What store.json says; empty for files that msae did not make."""

    @classmethod
    def open(
        cls, path: str | Path, *, modality: Modality | None = None, unnamed: Modality | None = None
    ) -> EmbeddingStore:
        """The store at `path`: msae's or clip-retrieval's folder, or a .npy, .npz, .parquet or .safetensors file.

        Folders, .npy and .safetensors are memory-mapped. The embeddings of a .parquet or .npz are held in memory:
        their compressed pages cannot be mapped.

        Args:
            modality: What the rows of a plain file with one modality are. Without it the file's name says (image,
                img, text, txt); else they are text where the metadata has captions, no image paths and no labels, and
                images otherwise. Where captions make this a guess, one line on stderr says so.
            unnamed: Instead of that guess, what rows are that neither the file nor its name says.

        Raises:
            StoreError: Nothing is there, it is damaged or unfinished, its parts do not fit each other, or it
                lacks `modality`.
        """
        path = Path(path)
        if modality is not None and modality not in MODALITIES:
            raise StoreError(f"modality {modality!r} is unknown; wanted one of {', '.join(MODALITIES)}")
        if path.is_dir():
            store = cls._open_folder(path)
        elif path.is_file():
            store = cls._open_file(path, modality, unnamed)
        else:
            raise StoreError(f"{path} does not exist{nearest_beside(path)}; msae embed makes a store")
        if modality is not None:
            store._of(modality)
        return store

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return next(iter(self.rows.values())).d_in

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return tuple(modality for modality in MODALITIES if modality in self.rows)

    @property
    def encoder(self) -> str | None:
        """Folder or hub id of the model that made the embeddings, where it is known."""
        return self.record.get("encoder")

    @property
    def encoder_revision(self) -> str | None:
        return self.record.get("encoder_revision")

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Inputs that were not embedded, and why; at most the first 10,000."""
        return tuple(Skipped(entry["id"], entry["reason"]) for entry in self.record.get("skipped", ()))

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.rows.values())))

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> list[Row]: ...
    def __getitem__(self, row: int | slice) -> Row | list[Row]:
        """What the metadata say of one row, or of several; `take` gives embeddings."""
        if isinstance(row, slice):
            return self.describe_rows(range(len(self))[row])
        return self.describe_rows([range(len(self))[row]])[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _ROWS_DESCRIBED):
            yield from self[start : start + _ROWS_DESCRIBED]

    def __repr__(self) -> str:
        dtype = next(iter(self.rows.values())).dtype
        parts = [
            f"{len(self):,} rows of {self.d_in} numbers ({dtype}) for {' and '.join(self.modalities)}",
            f"columns {', '.join(self.columns)}" if self.columns else "no metadata",
            *([f"embedded by {self.encoder}"] if self.encoder else []),
        ]
        return f"EmbeddingStore({str(self.path)!r}: {'; '.join(parts)})"

    def to_pandas(self) -> pd.DataFrame:
        """The metadata as a table; row i is row i of the embeddings.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        import_pandas()
        return self.metadata.to_pandas()

    def take(self, rows: Int64[np.ndarray, " n"], modality: Modality) -> Float32[np.ndarray, "n d_in"]:
        """The embeddings of `rows`, in their order, read with one indexed read of each shard touched.

        Raises:
            StoreError: A row is out of range or holds a NaN or an infinity, or `modality` is not there.
        """
        source = self._of(modality)
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            outside = int(rows.min() if rows.min() < 0 else rows.max())
            raise StoreError(f"row {outside} is asked of {self.path}, which has the rows 0 to {len(self) - 1}")
        x = source.take(rows)
        bad = first_bad_row(x)
        if bad is not None:
            raise self._not_finite(int(rows[bad]), modality)
        return x

    def batches(
        self, modality: Modality, batch_size: int, *, start: int = 0
    ) -> Iterator[Float32[np.ndarray, "n d_in"]]:
        """The rows from `start` on, in order, `batch_size` at a time; the last batch may be smaller.

        After all rows of a store, one line on stderr counts those that are all zeros.

        Raises:
            StoreError: A row holds a NaN or an infinity, or `modality` is not there.
        """
        source = self._of(modality)
        zeros: list[int] = []
        for first in range(start, len(self), batch_size):
            x = source.between(first, first + batch_size)
            bad, zero = first_bad_row(x), zero_rows(x)
            if bad is not None:
                raise self._not_finite(first + bad, modality)
            zeros += (first + zero).tolist()
            yield x
        if zeros and start == 0:
            notice(
                f"{self.path}: {len(zeros):,} of {len(self):,} {modality} rows are all zeros, the first is row "
                f"{zeros[0]} (id {self.ids[zeros[0]]!r}); they have no direction and pull the mean towards zero: "
                f"if they stand for inputs that failed, remove them"
            )

    @cached_property
    def ids(self) -> RowIds:
        """The id of each row: column `id`, else `key`, else `image_path`, else the row's number.

        Ids are unique: where a column repeats one, the later rows have `#2`, `#3` … after it.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        known = [name for name in _ID_COLUMNS if name in self.columns]
        if not known:
            return RowIds(self, None)
        column = text_column(self._metadata.read(known[:1]).column(known[0]))
        if column.null_count or pc.count_distinct(column).as_py() != len(column):
            values = column.to_pylist()
            named = (str(row) if value is None else value for row, value in enumerate(values))
            column = pa.chunked_array([pa.array(unique_ids(named), pa.string())])
        return RowIds(self, column)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all rows, the same for the same rows in any kind of file; docs/store-format.md.

        Raises:
            StoreError: The rows are no longer those that were embedded.
        """
        found, promised = fingerprint(self.rows), self.record.get("fingerprint")
        if promised is not None and not is_sampled_fingerprint(str(promised)) and promised != found:
            raise StoreError(
                f"{self.path} is damaged: its fingerprint is {found!r} where store.json says {promised!r}; "
                f"copy the store again or embed again"
            )
        return found

    @cached_property
    def metadata_fingerprint(self) -> str:
        """A hash of the files that hold ids, captions, labels and all other metadata."""
        return hash_files(metadata_files(self.path))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metadata's columns."""
        return self._metadata.names

    @cached_property
    def metadata(self) -> pa.Table:
        """Everything known about each row; the first column is `id`. Read when first asked for."""
        import pyarrow as pa

        table = self._metadata.read([name for name in self.columns if name != "id"])
        ids = self.ids.to_arrow()
        return table.add_column(0, "id", ids) if table.num_columns else pa.table({"id": ids})

    def column(self, name: str, *, option: str | None = None) -> list[Any]:
        """One metadata column, a value per row.

        Args:
            option: What took the name, for the message.

        Raises:
            StoreError: There is no such column; the message names the nearest one.
        """
        if name == "id":
            return list(self.ids)
        if name not in self.columns:
            raise StoreError(no_column(self.path, name, self.columns, option))
        return cast("list[Any]", self._metadata.read([name]).column(name).to_pylist())

    def labels(self, name: str, *, option: str | None = None) -> list[str | None]:
        """The classes in one metadata column, as text; None for rows without a label.

        Args:
            option: What took the name, for the message.

        Raises:
            StoreError: There is no such column, or it holds lists and not one value per row.
        """
        import pyarrow as pa

        values = self.column(name, option=option)
        if name != "id" and pa.types.is_nested(self._metadata.read([name]).column(name).type):
            raise StoreError(f"column {name!r} of {self.path} holds lists; wanted one class per row: name another")
        return class_names(values)

    def describe_rows(
        self, rows: Int64[np.ndarray, " n"] | Sequence[int], *, show: str | Sequence[str] = ()
    ) -> list[Row]:
        """What a person sees of `rows`, in their order.

        Args:
            show: Columns to see beside the caption; several in one text are divided by commas.

        Raises:
            StoreError: There is no such column.
        """
        names = names_to_show(show, self.columns, self.path)
        table = self.metadata.take(_row_numbers(rows)).to_pylist()
        return [Row.of(int(row), metadata, names) for row, metadata in zip(rows, table, strict=True)]

    @property
    def picture_roots(self) -> tuple[Path, ...]:
        """Folders that the paths of pictures may be relative to: what was embedded, beside the store, here."""
        source = self.record.get("source")
        made_from = [Path(source), Path(source).parent] if isinstance(source, str) and "://" not in source else []
        return tuple(root for root in dict.fromkeys([*made_from, self.path.parent, Path()]) if root.is_dir())

    def describe(self) -> dict[str, Any]:
        """What `msae info` shows."""
        origin = ("encoder", "encoder_revision", "pixel_backend", "precision", "source", "counts")
        return {
            "path": str(self.path),
            "kind": self.kind,
            "rows": len(self),
            "d_in": self.d_in,
            "dtype": next(iter(self.rows.values())).dtype,
            "modalities": list(self.modalities),
            "columns": list(self.columns),
            "fingerprint": self.fingerprint,
            **{key: self.record.get(key) for key in origin},
            "skipped": self.record.get("counts", {}).get("skipped", 0),
        }

    @classmethod
    def _open_folder(cls, path: Path) -> EmbeddingStore:
        """msae's or clip-retrieval's folder; its shards are memory-mapped."""
        is_ours = (path / "store.json").exists()
        if not is_ours:
            _check_is_clip_retrieval(path)
        tables = metadata_files(path)
        record = read_json(path / "store.json", schema_version=SCHEMA_VERSION, error=StoreError) if is_ours else {}
        rows = _open_shards(path)
        metadata = Metadata.open(tables, StoreError)
        _check_together(path, rows, metadata)
        for key, value in _content(rows).items() if is_ours else ():
            if record.get(key) != value:
                raise StoreError(
                    f"{path} is damaged: its {key} is {value!r} where store.json says {record.get(key)!r}; "
                    f"copy the store again or embed again"
                )
        return cls(path, "store" if is_ours else "clip-retrieval", rows, metadata, record)

    @classmethod
    def _open_file(cls, path: Path, modality: Modality | None, unnamed: Modality | None) -> EmbeddingStore:
        """A file of another tool; embeddings that it does not name are of `modality`."""
        suffix = path.suffix.lower()
        if suffix not in (".npy", ".npz", ".parquet", ".safetensors"):
            raise StoreError(
                f"{path} has the unknown suffix {suffix!r}; wanted a store folder, .npy, .npz, .parquet or .safetensors"
            )
        is_table = suffix == ".parquet"
        tables = [path] if is_table else _table_beside(path)
        arrays = {} if is_table else open_arrays(path, StoreError)
        table = Metadata.open(tables, StoreError)
        named, metadata = _in_columns(path, table) if is_table else _in_arrays(path, arrays, table)
        its_own = modality or _named_modality(path) or unnamed or _guess(path, metadata.names, is_asked=None in named)
        rows = {name or its_own: ShardedRows((array,)) for name, array in named.items()}
        _check_together(path, rows, metadata)
        kind = cast("Literal['npy', 'npz', 'parquet', 'safetensors']", suffix[1:])
        return cls(path, kind, rows, metadata)

    def _of(self, modality: Modality) -> ShardedRows:
        if modality not in self.rows:
            raise StoreError(f"{self.path} has no {modality} embeddings, only {' and '.join(self.modalities)}")
        return self.rows[modality]

    def _not_finite(self, row: int, modality: Modality) -> StoreError:
        return StoreError(
            f"row {row} (id {self.ids[row]!r}) of the {modality} embeddings in {self.path} holds NaN or "
            f"infinity; remove the row or embed again"
        )


def _row_numbers(rows: Int64[np.ndarray, " n"] | Sequence[int]) -> pa.Array:
    """`rows` for pyarrow. `pa.array` would import pandas where it is installed, a tenth of the time of a search."""
    import pyarrow as pa

    numbers = np.ascontiguousarray(rows, dtype=np.int64)
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])


class RowIds(Sequence[str]):
    """The ids of a store's rows, turned into strings one by one as they are asked for."""

    def __init__(self, store: EmbeddingStore, column: pa.ChunkedArray | None) -> None:
        self._store = store
        self._column = column

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[int(row)]
        return str(row) if self._column is None else str(self._column[row].as_py())

    def __iter__(self) -> Iterator[str]:
        if self._column is None:
            yield from map(str, range(len(self)))
        else:
            for chunk in self._column.iterchunks():
                yield from chunk.to_pylist()

    def to_arrow(self) -> pa.ChunkedArray | pa.Array:
        """All ids as one column of text."""
        import pyarrow as pa

        return pa.array(map(str, range(len(self))), pa.string()) if self._column is None else self._column

    def row_of(self, id: str) -> int:
        """The row that has this id.

        Raises:
            StoreError: No row has it; the message names the nearest of the first 10,000 ids.
        """
        for row, known in enumerate(self):
            if known == id:
                return row
        raise StoreError(f"{self._store.path} has no row with the id {id!r}{nearest(id, self[:10_000])}")


def as_store(
    store: EmbeddingStore | str | Path, modality: Modality | None = None, *, unnamed: Modality | None = None
) -> EmbeddingStore:
    """`store` itself, or what `EmbeddingStore.open` opens at that path; with `modality`, one that has it.

    Raises:
        StoreError: It cannot be opened, or lacks `modality`.
    """
    if not isinstance(store, EmbeddingStore):
        return EmbeddingStore.open(store, modality=modality, unnamed=unnamed)
    if modality is not None:
        store._of(modality)
    return store


def has_unit_rows(store: EmbeddingStore) -> bool:
    """Whether the first embeddings are of norm 1, within what float16 rounds off."""
    some = store.take(np.arange(min(len(store), 64)), store.modalities[0])
    return bool(np.abs(np.linalg.norm(some, axis=1) - 1).max() < 0.01)


def resume_command(path: Path) -> str:
    """The command that goes on with the interrupted embedding in the folder `path`."""
    try:
        command = json.loads((path / PARTIAL / "state.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"msae embed SOURCE --encoder ID --out {path}"
    return str(command)


def write_store(
    path: Path,
    parts: Iterable[StorePart],
    *,
    schema: pa.Schema | None = None,
    shard_rows: int = 65_536,
    record: Mapping[str, Any] | None = None,
) -> EmbeddingStore:
    """Write `parts` as one store and open it. Only when all is on disk does store.json make it a store.

    Args:
        parts: Consecutive rows, at most one shard of which is held in memory; their ids must be unique.
        schema: Columns and types of the metadata; without it, those of the first part.
        shard_rows: Rows in each file.
        record: What else store.json should say, such as `encoder`.

    Raises:
        StoreError: There are no rows.
    """
    import pyarrow.parquet as pq

    for number, (arrays, table) in enumerate(_regroup(parts, schema, shard_rows)):
        for modality, array in arrays.items():
            folder = FOLDERS[modality]
            with (
                atomic_path(path / folder / f"{folder}_{number}.npy") as temporary,
                temporary.open("wb") as file,
            ):
                np.save(file, array, allow_pickle=False)
        with atomic_path(path / "metadata" / f"metadata_{number}.parquet") as temporary:
            # combined: the bytes of the file must not depend on how the rows came in
            pq.write_table(table.combine_chunks(), temporary, compression="zstd")
    rows = _open_shards(path)
    found = {**_content(rows), "fingerprint": fingerprint(rows)}
    write_json(path / "store.json", {**(record or {}), **found}, schema_version=SCHEMA_VERSION)
    return EmbeddingStore.open(path)


def _content(rows: Mapping[Modality, ShardedRows]) -> dict[str, Any]:
    """What store.json records of the arrays, and what must still hold when they are opened."""
    first = next(iter(rows.values()))
    return {
        "modalities": [modality for modality in MODALITIES if modality in rows],
        "rows": len(first),
        "d_in": first.d_in,
        "dtype": first.dtype,
    }


def _check_is_clip_retrieval(path: Path) -> None:
    if (path / PARTIAL).is_dir():
        raise StoreError(f"{path} is unfinished: embedding was interrupted; to go on, type: {resume_command(path)}")
    if not any((path / folder).is_dir() for folder in FOLDERS.values()):
        is_run = (path / "sae.json").exists()
        hint = "it is a run: give the store to use it on" if is_run else "to make one, type: msae embed"
        raise StoreError(f"{path} is no store: neither img_emb/ nor text_emb/ is in it; {hint}")


def _regroup(
    parts: Iterable[StorePart], schema: pa.Schema | None, shard_rows: int
) -> Iterator[tuple[dict[Modality, NDArray[Any]], pa.Table]]:
    """The rows of `parts`, `shard_rows` at a time."""
    import pyarrow as pa

    waiting: list[StorePart] = []
    n_waiting = 0

    def shard() -> tuple[dict[Modality, NDArray[Any]], pa.Table]:
        arrays = {name: np.concatenate([part.rows[name] for part in waiting]) for name in waiting[0].rows}
        return arrays, pa.concat_tables([part.metadata for part in waiting])

    for part in parts:
        schema = schema or part.metadata.schema
        part = StorePart(part.rows, conform(part.metadata, schema))
        while part.metadata.num_rows:
            room = shard_rows - n_waiting
            waiting.append(StorePart({name: x[:room] for name, x in part.rows.items()}, part.metadata[:room]))
            n_waiting += waiting[-1].metadata.num_rows
            part = StorePart({name: x[room:] for name, x in part.rows.items()}, part.metadata[room:])
            if n_waiting == shard_rows:
                yield shard()
                waiting, n_waiting = [], 0
    if waiting:
        yield shard()


@dataclass(frozen=True)
class Row:
    """One row of a store: its number, id, picture, caption and other metadata."""

    row: int
    id: str
    path: str | None
    """Of the picture, as the store lists it; `find_picture` says where it lies."""
    caption: str | None
    columns: Mapping[str, Any]
    """What else the metadata says, such as labels, in values that JSON can hold."""
    show: tuple[str, ...] = field(default=(), kw_only=True)
    """Columns that a person asked to see."""

    @property
    def words(self) -> str:
        """What a person reads: the caption, else the label, else the id; then the columns of `show`."""
        label = self.columns.get("label")
        text = self.caption or ("" if is_missing(label) else str(label)) or self.id
        return f"{text} · {self.note}" if self.note else text

    @property
    def note(self) -> str:
        """The columns of `show`, as in `colour: red · size: 3`; those without a value are left out."""
        known = {"id": self.id, **dict.fromkeys(PATH_COLUMNS, self.path), **self.columns}
        return " · ".join(f"{name}: {known[name]}" for name in self.show if not is_missing(known.get(name)))

    def to_json(self) -> dict[str, Any]:
        record = dict(to_record(self))
        del record["show"]  # how to print it, not what it is
        return record

    def __repr__(self) -> str:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        more = {name: value for name, value in own.items() if name not in Row.__dataclass_fields__}
        known = {"id": self.id, "image_path": self.path, "caption": self.caption, **more, **self.columns}
        shown = [
            f"{name if name.isidentifier() else repr(name)}={_shortened(value)}"
            for name, value in known.items()
            if value is not None
        ]
        return f"{type(self).__name__}({', '.join([str(self.row), *shown])})"

    @classmethod
    def of(cls, row: int, metadata: Mapping[str, Any], show: tuple[str, ...] = ()) -> Row:
        """The row with these metadata, `id` among them. A title is its caption where it can have no other."""
        columns = {name: _plain(value) for name, value in metadata.items() if name not in ("id", *PATH_COLUMNS)}
        path = next((metadata[name] for name in PATH_COLUMNS if metadata.get(name) is not None), None)
        caption = next((columns.pop(name) for name in (*CAPTION_COLUMNS, "title") if name in columns), None)
        return cls(row, str(metadata["id"]), _text(path), _text(caption), columns, show=show)


def names_to_show(show: str | Sequence[str], columns: Sequence[str], where: Path) -> tuple[str, ...]:
    """The columns that `--show` names: one a word, or several divided by commas.

    Raises:
        StoreError: There is no such column.
    """
    found: list[str] = []
    for word in [show] if isinstance(show, str) else show:
        found += [word] if word in columns else [name.strip() for name in word.split(",") if name.strip()]
    unknown = next((name for name in found if name not in columns and name != "id"), None)
    if unknown is not None:
        raise StoreError(no_column(where, unknown, columns, "--show"))
    return tuple(dict.fromkeys(found))


def no_column(where: Path, name: str, columns: Sequence[str], option: str | None = None) -> str:
    """The message about a column that is not there, with the option that takes one."""
    near = nearest(name, columns)
    if near or not columns:
        return f"{where} has no column {name!r}{near or '; it has no metadata'}"
    give = f": give {option} one of these" if option else ""
    return f"{where} has no column {name!r}; it has {', '.join(columns)}{give}"


def find_picture(path: str | None, roots: Iterable[Path]) -> Path | None:
    """The file of a picture that a store lists, or None where none of its folders has it.

    A relative path that climbs out of its folder is not followed: it is no picture of that store.
    """
    if path is None or Path(os.path.normpath(path)).parts[:1] == ("..",):
        return None
    places = [Path(path)] if Path(path).is_absolute() else [root / path for root in roots]
    return next((place for place in places if place.is_file()), None)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _text(value: Any) -> str | None:
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 2]}…{text[-1]}"


def is_missing(value: Any) -> bool:
    """Whether a row with this value has no label: null, NaN, blank text, or NaN written as text."""
    if isinstance(value, str):
        text = value.strip()
        return not text or text.casefold() in _WRITTEN_NAN
    return value is None or (isinstance(value, float) and math.isnan(value))


def class_names(values: Iterable[Any]) -> list[str | None]:
    """The name of each value's class: the value as text; None where the label is missing.

    Classes are compared by their names, so the number 1 and the text `1` are one class.
    """
    return [None if is_missing(value) else str(value) for value in values]


def labelled_rows(names: Sequence[str | None]) -> Int64[np.ndarray, " n"]:
    """The rows that have a label."""
    return np.array([row for row, name in enumerate(names) if name is not None], dtype=np.int64)


def _open_shards(path: Path) -> dict[Modality, ShardedRows]:
    """The rows of a folder in clip-retrieval's layout."""
    files = {modality: _numbered(path / folder, ".npy") for modality, folder in FOLDERS.items()}
    if not any(files.values()):
        raise StoreError(f"{path} is an empty store: no .npy file in img_emb/ or text_emb/; embed again")
    return {modality: open_shards(shards, StoreError) for modality, shards in files.items() if shards}


def metadata_files(path: Path) -> list[Path]:
    """The files from which the metadata of the STORE at `path` are read."""
    if path.is_dir():
        return _numbered(path / "metadata", ".parquet")
    if path.suffix.lower() == ".parquet":
        return [path]
    return _table_beside(path) or ([path] if path.suffix.lower() == ".npz" else [])


def _table_beside(path: Path) -> list[Path]:
    """The table with the stem of `path`, if there is one."""
    return [file for suffix in (".csv", ".parquet") if (file := path.with_suffix(suffix)).is_file()][:1]


def _check_together(path: Path, rows: Mapping[Modality, ShardedRows], metadata: Metadata) -> None:
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


def _numbered(folder: Path, suffix: str) -> list[Path]:
    """The files `NAME_NUMBER.suffix` of a folder in the order of their numbers, 10 after 9."""
    pattern = re.compile(rf"{re.escape(folder.name)}_(\d+){re.escape(suffix)}")
    entries = folder.iterdir() if folder.is_dir() else []
    found = {int(match[1]): entry for entry in entries if (match := pattern.fullmatch(entry.name))}
    return [found[number] for number in sorted(found)]


def _named_modality(path: Path) -> Modality | None:
    """What the file's name says that its rows are."""
    words = set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", path.stem).lower()))
    named: list[Modality] = [modality for modality, known in _MODALITY_WORDS.items() if words & known]
    return named[0] if len(named) == 1 else None


def _guess(path: Path, columns: Sequence[str], *, is_asked: bool) -> Modality:
    """What rows are by the columns beside them: captions alone are text, beside an image's path or label they describe
    the image. Where captions are all that there is to judge by, the guess is said.
    """
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


def _in_arrays(
    path: Path, arrays: Mapping[str, Rows], beside: Metadata
) -> tuple[dict[Modality | None, Rows], Metadata]:
    """The arrays of a file that are embeddings, and the table beside it.

    Without a table, the one-dimensional arrays of a .npz that have a value for each row are its metadata.
    """
    suffix = path.suffix.lower()
    candidates = [name for name, array in arrays.items() if len(array.shape) == 2]
    if suffix == ".npz":
        candidates = [name for name in candidates if arrays[name].values.dtype.kind == "f"] or candidates
    what = "two-dimensional tensors" if suffix == ".safetensors" else "two-dimensional arrays"
    named = {modality: _checked(arrays[name]) for modality, name in _chosen(path, candidates, what).items()}
    if suffix == ".npz" and not beside.names:
        return named, _columns_of(path, arrays, next(iter(named.values())).shape[0])
    return named, beside


def _columns_of(path: Path, arrays: Mapping[str, Rows], n_rows: int) -> Metadata:
    import pyarrow as pa

    columns = {}
    for name, array in arrays.items():
        if array.shape == (n_rows,):
            try:
                columns[name] = pa.array(array.values.tolist())
            except (pa.ArrowException, OverflowError) as err:
                raise StoreError(
                    f"{path} has an array {name!r} of {array.values.dtype} that is no column; remove it"
                ) from err
    return Metadata.of(pa.table(columns)) if columns else Metadata.open([], StoreError)


def _checked(rows: Rows) -> Rows:
    """`rows`, if they are numbers of a kind that embeddings have, and not none."""
    if rows.dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise StoreError(f"{rows.path} holds {rows.dtype}; wanted float16, bfloat16, float32 or float64")
    if 0 in rows.shape:
        raise StoreError(f"{rows.path} is empty: an array of shape {rows.shape}; wanted at least one row")
    return rows


def _in_columns(path: Path, table: Metadata) -> tuple[dict[Modality | None, Rows], Metadata]:
    """The embedding columns of a .parquet file, in memory, and its other columns."""
    candidates = table.vectors or [name for name in table.names if name.endswith(_ENDINGS)][:1]
    columns = _chosen(path, candidates, "columns of float lists")
    rows = {modality: _vectors(path, name, table) for modality, name in columns.items()}
    others = tuple(name for name in table.names if name not in columns.values())
    return rows, replace(table, names=others)


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
