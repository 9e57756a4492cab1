"""`EmbeddingStore`: rows of embeddings with ids and metadata on disk, raw, immutable, memory-mapped.

The disk format is defined in docs/store-format.md.
"""

from __future__ import annotations

import bisect
import html
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import numpy as np
from jaxtyping import Float32, Int32, Int64
from numpy.typing import NDArray

from msae.base.errors import StoreError, nearest
from msae.base.files import atomic_path, file_hash, write_json
from msae.base.notices import notice
from msae.base.results import import_pandas, shorten, table_html
from msae.data.arrays import ShardedRows, fingerprint, hash_files, is_sampled_fingerprint, open_arrays, zero_rows
from msae.data.contents import Embeddings, contents_of, summary
from msae.data.layout import (
    FOLDERS,
    MODALITIES,
    SCHEMA_VERSION,
    Kind,
    Modality,
    StoreFiles,
    far_address,
    files_of,
    path_of,
    shards_of,
    tables_of,
)
from msae.data.rows import Row, class_names, names_to_show, no_column
from msae.data.tables import (
    RECENT,
    ROWS_AT_ONCE,
    Metadata,
    UniqueIds,
    conform,
    encoded,
    records_of,
    row_numbers,
    text_column,
    values_of,
)

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]
    import pyarrow as pa

_ROWS_DESCRIBED = 4096
"""Rows described at once while a store is iterated over."""
_CHECKED_IDS = 100_000
"""Rows of a store of ours up to which its ids are checked; of more, embedding saw to it that they are unique."""
_SHOWN = 6
"""Rows that a notebook shows."""
ID_COLUMNS = ("id", "key", "image_path")


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

    address: str
    """What it is called: its path, or the address of a store elsewhere."""
    path: Path
    """Where its files lie on this machine: of a store elsewhere, a folder of the cache."""
    files: StoreFiles = field(repr=False)
    rows: Embeddings = field(repr=False)
    _metadata: Metadata = field(repr=False)
    record: Mapping[str, Any] = field(repr=False)
    """What store.json says; empty for files that msae did not make."""

    @classmethod
    def open(
        cls, path: str | Path, *, modality: Modality | None = None, unnamed: Modality | None = None
    ) -> EmbeddingStore:
        """The store at `path`: msae's or clip-retrieval's folder, or a .npy, .npz, .parquet or .safetensors file.

        It may lie elsewhere: at https://, http://, s3://, gs://, hf:// or memory://, where it is only read.

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
        if modality is not None and modality not in MODALITIES:
            raise StoreError(f"modality {modality!r} is unknown; wanted one of {', '.join(MODALITIES)}")
        address = far_address(path)
        if address is not None:
            from msae.data.far import open_far

            path, files, arrays, table = open_far(address)
        else:
            path = Path(path)
            address, files = str(path), files_of(path)
            arrays, table = open_arrays(files.arrays, StoreError), Metadata.open(files.tables, StoreError)
        rows, metadata = contents_of(address, files, arrays, table, modality=modality, unnamed=unnamed)
        return cls(address, path, files, rows, metadata, files.record)

    @property
    def kind(self) -> Kind:
        return self.files.kind

    @property
    def is_far(self) -> bool:
        """Whether it lies elsewhere and its files are downloaded as they are read."""
        return far_address(self.address) is not None

    @property
    def full_address(self) -> str:
        """The address that is right in any working folder."""
        return self.address if self.is_far else str(self.path.resolve())

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
        return f"EmbeddingStore({self.address!r}: {'; '.join(parts)})"

    @property
    def said(self) -> str:
        """What it is called in a message."""
        return self.address

    def _repr_html_(self) -> str:
        """What it is, and its first rows, with their pictures where it has some, for a notebook."""
        from msae.data.thumbnails import NOTEBOOK_SIDE, Album, figures_html

        rows = self[:_SHOWN]
        shown = figures_html([("", row) for row in rows], Album(self.picture_roots, NOTEBOOK_SIDE))
        if "<img" not in shown:
            table = next(self.pieces(["id", *self._others])).slice(0, _SHOWN)
            cells = [[shorten(str(value)) for value in row.values()] for row in records_of(table)]
            shown = table_html([table.column_names, *cells]) if cells else ""
        return f"<p>{html.escape(repr(self))}</p>{shown}"

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
        return self.rows[modality].take(self._checked(rows), partial(self._not_finite, modality))

    def between(self, start: int, stop: int, modality: Modality) -> Float32[np.ndarray, "n d_in"]:
        """The embeddings from row `start` up to `stop`, or up to the last; raises as `take` does."""
        return self.rows[modality].between(start, stop, partial(self._not_finite, modality))

    def batches(
        self, modality: Modality, batch_size: int, *, start: int = 0
    ) -> Iterator[Float32[np.ndarray, "n d_in"]]:
        """The rows from `start` on, in order, `batch_size` at a time; the last batch may be smaller.

        After all rows of a store, one line on stderr counts those that are all zeros.

        Raises:
            StoreError: A row holds a NaN or an infinity, or `modality` is not there.
        """
        zeros: list[int] = []
        for first in range(start, len(self), batch_size):
            x = self.between(first, first + batch_size, modality)
            zeros += (first + zero_rows(x)).tolist()
            yield x
        if zeros and start == 0:
            notice(
                f"{self.address}: {len(zeros):,} of {len(self):,} {modality} rows are all zeros, the first is row "
                f"{zeros[0]} (id {self.ids[zeros[0]]!r}); they have no direction and pull the mean towards zero: "
                f"if they stand for inputs that failed, remove them"
            )

    @cached_property
    def ids(self) -> RowIds:
        """The id of each row: column `id`, else `key`, else `image_path`, else the row's number.

        Ids are unique: where a column repeats one, the later rows have `#2`, `#3` … after it.
        """
        import pyarrow as pa

        metadata = self._metadata
        name = next((name for name in ID_COLUMNS if name in self.columns), None)
        if name is None:
            return RowIds(self, None)
        is_trusted = self.record and name == "id" and len(self) > _CHECKED_IDS
        if not is_trusted and not metadata.is_unique(name):
            values = text_column(metadata.read([name]).column(name)).to_pylist()
            named = (str(row) if value is None else value for row, value in enumerate(values))
            metadata = Metadata.of(pa.table({name: pa.array(UniqueIds().of(named), pa.string())}))
        return RowIds(self, metadata, name)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all rows, the same for the same rows in any kind of file; docs/store-format.md.

        Raises:
            StoreError: The rows are no longer those that were embedded.
        """
        promised = self.record.get("fingerprint")
        is_promised = promised is not None and not is_sampled_fingerprint(str(promised))
        if is_promised and self.files.is_checked:  # each file is compared with its own hash when it arrives
            return str(promised)
        for file in itertools.chain(*self.files.arrays.values()):
            self.files.here(file)
        found = fingerprint(self.rows)
        if is_promised and promised != found:
            raise StoreError(
                f"{self.address} is damaged: its fingerprint is {found!r} where store.json says {promised!r}; "
                f"copy the store again or embed again"
            )
        return found

    @cached_property
    def metadata_fingerprint(self) -> str:
        """A hash of the files that hold ids, captions, labels and all other metadata."""
        return hash_files([self.files.here(file) for file in self.files.metadata])

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metadata's columns."""
        return self._metadata.names

    @cached_property
    def metadata(self) -> pa.Table:
        """Everything known about each row; the first column is `id`. Read when first asked for."""
        import pyarrow as pa

        table = self._metadata.read(self._others)
        ids = self.ids.to_arrow()
        return table.add_column(0, "id", ids) if table.num_columns else pa.table({"id": ids})

    @property
    def _others(self) -> list[str]:
        """The columns beside the id."""
        return [name for name in self.columns if name != "id"]

    def pieces(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of the metadata, `id` among them, of consecutive rows: never of many rows at once."""
        import pyarrow as pa

        others = [name for name in names if name != "id"]
        for start in range(0, len(self), ROWS_AT_ONCE):
            if "metadata" in vars(self):  # all are in memory already
                yield self.metadata.select(["id"] * ("id" in names) + others).slice(start, ROWS_AT_ONCE)
                continue
            rows = np.arange(start, min(start + ROWS_AT_ONCE, len(self)))
            table = self._metadata.read(others, rows)
            ids = {"id": self.ids.between(start, start + len(rows))} if "id" in names else {}
            yield pa.table({**ids, **dict(zip(others, table.columns, strict=True))})

    def column(self, name: str, *, option: str | None = None) -> list[Any]:
        """One metadata column, a value per row.

        Args:
            option: What took the name, for the message.

        Raises:
            StoreError: There is no such column; the message names the nearest one.
        """
        self._check_column(name, option)
        return list(self.ids) if name == "id" else values_of(self._metadata.read([name]).column(name))

    def labels(self, name: str, *, option: str | None = None) -> list[str | None]:
        """The classes in one metadata column, as text; None for rows without a label.

        Args:
            option: What took the name, for the message.

        Raises:
            StoreError: There is no such column, or it holds lists and not one value per row.
        """
        numbers, classes = self.coded_labels(name, option=option)
        found: list[str | None] = np.array([*classes, None], dtype=object)[numbers].tolist()  # each text once
        return found

    def coded_labels(self, name: str, *, option: str | None = None) -> tuple[Int32[np.ndarray, " n"], list[str]]:
        """The same classes as numbers, 4 bytes a row: of each row, -1 without a label, and the names of the numbers.

        Raises:
            StoreError: As `labels`.
        """
        import pyarrow as pa

        self._check_column(name, option)
        if name != "id" and pa.types.is_nested(self._metadata.schema().field(name).type):
            raise StoreError(f"column {name!r} of {self.address} holds lists; wanted one class per row: name another")
        number: dict[str, int] = {}
        found = np.empty(len(self), np.int32)
        first = 0
        for piece in self.pieces([name]):
            values, codes = encoded(piece.column(name))
            own = [-1 if one is None else number.setdefault(one, len(number)) for one in class_names(values)]
            found[first : first + len(codes)] = np.array([*own, -1], np.int32)[codes]
            first += len(codes)
        return found, list(number)

    def _check_column(self, name: str, option: str | None) -> None:
        if name != "id" and name not in self.columns:
            raise StoreError(no_column(self.address, name, self.columns, option))

    def describe_rows(
        self, rows: Int64[np.ndarray, " n"] | Sequence[int], *, show: str | Sequence[str] = ()
    ) -> list[Row]:
        """What a person sees of `rows`, in their order.

        Args:
            show: Columns to see beside the caption; several in one text are divided by commas.

        Raises:
            StoreError: There is no such column or row.
        """
        names = names_to_show(show, self.columns, self.address)
        numbers = self._checked(rows)
        if "metadata" in vars(self):  # all are in memory already
            known = records_of(self.metadata.take(row_numbers(numbers)))
        else:  # in ascending order each piece is read once
            ascending, place = np.unique(numbers, return_inverse=True)
            of_each: list[dict[str, Any]] = [{}] * len(ascending)
            if self._others:
                of_each = records_of(self._metadata.read(self._others, ascending))
            of_each = [{**one, "id": self.ids[row]} for one, row in zip(of_each, ascending.tolist(), strict=True)]
            known = [of_each[i] for i in place.tolist()]
        return [Row.of(int(row), metadata, names) for row, metadata in zip(numbers, known, strict=True)]

    def _checked(self, rows: Int64[np.ndarray, " n"] | Sequence[int]) -> Int64[np.ndarray, " n"]:
        """The numbers of rows; raises `StoreError` where there is no such row."""
        numbers = np.asarray(rows, dtype=np.int64)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(self)):
            outside = int(numbers.min() if numbers.min() < 0 else numbers.max())
            raise StoreError(f"row {outside} is asked of {self.address}, which has the rows 0 to {len(self) - 1}")
        return numbers

    @property
    def picture_roots(self) -> tuple[Path, ...]:
        """Folders that the paths of pictures may be relative to: what was embedded, beside the store, here.

        A store elsewhere has none of them: what its files call a path is of another machine.
        """
        if self.is_far:
            return ()
        source = self.record.get("source")
        made_from = [Path(source), Path(source).parent] if isinstance(source, str) and "://" not in source else []
        return tuple(root for root in dict.fromkeys([*made_from, self.path.parent, Path()]) if root.is_dir())

    def describe(self) -> dict[str, Any]:
        """What `msae info` shows."""
        origin = ("encoder", "encoder_revision", "pixel_backend", "precision", "source", "counts")
        return {
            "path": self.address,
            **({"cache": str(self.path)} if self.is_far else {}),
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

    def _not_finite(self, modality: Modality, row: int) -> StoreError:
        return StoreError(
            f"row {row} (id {self.ids[row]!r}) of the {modality} embeddings in {self.address} holds NaN or "
            f"infinity; remove the row or embed again"
        )


class RowIds(Sequence[str]):
    """The ids of a store's rows, read as they are asked for."""

    def __init__(self, store: EmbeddingStore, metadata: Metadata | None, name: str = "id") -> None:
        """Those in column `name` of `metadata`; without it, the numbers of the rows."""
        self._store, self._metadata, self._name = store, metadata, name
        self._texts = lru_cache(2 * RECENT)(self._read)  # ids are small beside captions

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[int(row)]
        if self._metadata is None:
            return str(row)
        number = bisect.bisect_right(self._starts, row) - 1
        return str(self._texts(number)[row - self._starts[number]].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self.between(start, start + ROWS_AT_ONCE).to_pylist()

    def between(self, start: int, stop: int) -> pa.ChunkedArray:
        """The ids from row `start` up to `stop`, or up to the last, as a column of text."""
        import pyarrow as pa

        stop = min(stop, len(self))
        if self._metadata is None:
            return pa.chunked_array([pa.array(map(str, range(start, stop)), pa.string())])
        found, number = [], bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            first, last = self._starts[number], min(stop, self._starts[number + 1])
            found.append(self._texts(number).slice(start - first, last - start))
            start, number = last, number + 1
        return pa.chunked_array(found, pa.string())

    def to_arrow(self) -> pa.ChunkedArray:
        """All ids as one column of text."""
        return self.between(0, len(self))

    def row_of(self, id: str) -> int:
        """The row that has this id.

        Raises:
            StoreError: No row has it; the message names the nearest of the first 10,000 ids.
        """
        for start in range(0, len(self), ROWS_AT_ONCE):
            some: list[str] = self.between(start, start + ROWS_AT_ONCE).to_pylist()
            if id in some:
                return start + some.index(id)
        raise StoreError(f"{self._store.said} has no row with the id {id!r}{nearest(id, self[:10_000])}")

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of each piece, and the end of the last."""
        assert self._metadata is not None
        return [0, *itertools.accumulate(piece.n for piece in self._metadata.pieces())]

    def _read(self, number: int) -> pa.Array:
        """The ids of a piece."""
        assert self._metadata is not None
        return text_column(self._metadata.pieces()[number].read([self._name]).column(0)).combine_chunks()


def as_store(
    store: EmbeddingStore | str | Path, modality: Modality | None = None, *, unnamed: Modality | None = None
) -> EmbeddingStore:
    """`store` itself, or what `EmbeddingStore.open` opens at that path; with `modality`, one that has it.

    Raises:
        StoreError: It cannot be opened, or lacks `modality`.
    """
    if isinstance(store, EmbeddingStore):
        if modality is not None:
            _ = store.rows[modality]
        return store
    return EmbeddingStore.open(store, modality=modality, unnamed=unnamed)


def recorded_store(address: str, modality: Modality | None = None) -> EmbeddingStore:
    """The store that a run's record names. A far one that was never read on this machine is not contacted.

    Raises:
        StoreError: It cannot be opened, lacks `modality`, or was never read here.
    """
    far = far_address(address)
    if far is not None:
        from msae.data.far import is_known

        if not is_known(far):
            raise StoreError(f"{far} was never read on this machine; to read it, type: msae info {far}")
    return EmbeddingStore.open(address, modality=modality)


def has_unit_rows(store: EmbeddingStore) -> bool:
    """Whether the first embeddings are of norm 1, within what float16 rounds off."""
    some = store.take(np.arange(min(len(store), 64)), store.modalities[0])
    return bool(np.abs(np.linalg.norm(some, axis=1) - 1).max() < 0.01)


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

    path = path_of(path)
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
    rows = cast("dict[Modality, ShardedRows]", open_arrays(shards_of(path), StoreError))
    files = [shard.path for array in rows.values() for shard in array.shards] + tables_of(path)
    listed = {
        file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "blake2b": file_hash(file)} for file in files
    }
    found = {**summary(rows), "fingerprint": fingerprint(rows), "shard_rows": shard_rows, "files": listed}
    write_json(path / "store.json", {**(record or {}), **found}, schema_version=SCHEMA_VERSION)
    return EmbeddingStore.open(path)


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
