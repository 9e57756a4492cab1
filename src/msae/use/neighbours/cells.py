"""`CellIndex`: for many millions of rows, an inverted file (IVF) of faiss with 8 bits a number, memory-mapped.

The rows lie in cells around centroids. A query is compared with the rows in the cells that are nearest to it, so rows
in other cells are missed. How many is measured when the index is built, by rows that did not make the centroids; a
search looks into as many cells as find the wanted share. What is found there is scored in float32 from the store until
no other row of these cells can belong to the answer: with all cells the answer is exact. A search that keeps only some
rows looks into all cells.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msae.base.errors import StoreError
from msae.base.files import atomic_path, locked, writable_cache, write_json
from msae.base.notices import notice
from msae.base.progress import progress
from msae.base.records import of_record, to_record
from msae.data.arrays import unit_rows
from msae.data.layout import Modality
from msae.data.store import EmbeddingStore
from msae.use.neighbours.base import (
    BUILD_ROWS,
    SCHEMA_VERSION,
    FaissRows,
    Mask,
    Vector,
    find_index,
    header_of,
    load_faiss,
    only,
)

AT = 20
"""How many nearest rows recall is of."""
QUERIES = 512
"""Rows of each modality that measure it: half choose the number of cells, half say what that finds."""
WANTED = 0.98
"""Recall that is wanted where nobody says."""
LEFT_OUT = 64
"""A mask that leaves out no more rows, such as the query's own, is no filter."""
SEED = 0

_SAMPLE_PER_CELL = 50  # faiss warns below 39
_SAMPLE_BYTES = 1 << 29
_BLOCK_BYTES = 1 << 27  # codes that are sorted by cell at once
_MARGIN = 0.3  # of a number's range in the sample, added on both sides, so that hardly any row is cut off
_BESIDES = 1 << 28  # bytes of memory for centroids, queries and batches of rows
_FEWEST = 32  # queries that say anything
_SLACK = 1e-5  # of the sums of float32
_NO_LISTS = 12  # bytes at the end of the file of an empty index: "sprs" and how many cells are not empty


@dataclass(frozen=True)
class Curve:
    """What share of the nearest rows lies in how many of the nearest cells."""

    probes: tuple[int, ...]
    """Numbers of cells; the last is all."""
    at_least: tuple[float, ...]
    """The mean over half of the queries, less two standard errors."""
    measured: tuple[float, ...]
    """The mean over the other half."""


@dataclass(frozen=True)
class Facts:
    """What was found when an index was built."""

    cells: int
    error: float
    """Largest distance of a row from its code, with slack for summation."""
    recall: Mapping[Modality, Curve]
    """For queries of each modality."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Facts:
        own = {field.name: record[field.name] for field in fields(cls)}
        return of_record(cls, own, where="the record of the index", error=StoreError, remedy="it is not used")


@dataclass(frozen=True, eq=False)
class CellIndex(FaissRows):
    """The rows in cells."""

    facts: Facts = field(repr=False)
    measured_with: str = ""
    """Modality of the queries that `probes` was chosen for."""
    probes: int = 0
    """Cells that a query is compared with."""
    recall: float = 1.0

    @classmethod
    def open(cls, place: Path, name: str, store: EmbeddingStore, modality: Modality) -> CellIndex:
        """The index `name` in the folder `place`, built first where it is missing, damaged or of other rows.

        Raises:
            MissingDependencyError: faiss is not installed.
            StoreError: The index cannot be built or read back; the disk is full or damaged.
        """
        flags, name = load_faiss().IO_FLAG_MMAP | load_faiss().IO_FLAG_READ_ONLY, f"{name}.ivf"
        wanted = {
            "fingerprint": store.fingerprint, "rows": len(store), "d_in": store.d_in, "metric": "cosine",
            "dtype": "uint8", "measured_at": AT,
        }  # fmt: skip
        found = find_index(place, name, wanted, flags, Facts.of)
        if found is None:
            file = writable_cache(place) / f"{name}.faiss"
            _build(file, wanted, store, modality)
            found = find_index(file.parent, name, wanted, flags, Facts.of)
            if found is None:
                raise StoreError(f"{file} cannot be read back after it was written; check the disk and its free space")
        path, index, facts = found
        faiss = load_faiss()
        index.parallel_mode = 1  # one query on all cores
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0  # starting threads costs more than it saves
        rows = lambda rows: store.take(rows, modality)  # noqa: E731
        return cls(path, len(store), store.d_in, facts.error, index, rows, facts).for_queries(modality, WANTED)

    def for_queries(self, modality: Modality, recall: float) -> CellIndex:
        kind = modality if modality in self.facts.recall else next(iter(self.facts.recall))
        curve = self.facts.recall[kind]
        for probes, at_least, measured in zip(curve.probes, curve.at_least, curve.measured, strict=True):
            if recall < 1 and at_least >= recall:
                return replace(self, measured_with=kind, probes=probes, recall=measured)
        return replace(self, measured_with=kind, probes=self.facts.cells, recall=1.0)

    def describe(self, keep: Mask | None = None) -> dict[str, Any]:
        probes = self._probes(keep)
        recall = self.recall if probes < self.facts.cells else 1.0
        return {
            "kind": "ivf", "cells": self.facts.cells, "probes": probes, "recall": recall, "recall_at": AT,
            "measured_with": self.measured_with,
        }  # fmt: skip

    def _probes(self, keep: Mask | None) -> int:
        return self.probes if keep is None or self.n_rows - int(keep.sum()) <= LEFT_OUT else self.facts.cells

    def _parameters(self, keep: Mask | None) -> Any:
        faiss = load_faiss()
        selector = {} if keep is None else {"sel": only(faiss, keep)}
        return faiss.SearchParametersIVF(nprobe=self._probes(keep), **selector)


def _build(file: Path, wanted: dict[str, Any], store: EmbeddingStore, modality: Modality) -> None:
    """Write the index with bounded memory: centroids from a sample, then codes block by block, then cell by cell."""
    n_rows, d_in = len(store), store.d_in
    cells = math.isqrt(n_rows)
    n_queries = min(QUERIES, n_rows // 4)
    n_sample = min(n_rows - n_queries, max(cells, min(_SAMPLE_PER_CELL * cells, _SAMPLE_BYTES // (4 * d_in))))
    n_bytes = n_rows * (d_in + 8)
    memory = 8 * n_sample * d_in + 3 * min(_BLOCK_BYTES, n_bytes) + _BESIDES
    free = shutil.disk_usage(file.parent).free
    if free < 2 * n_bytes:
        raise StoreError(
            f"an index of {n_rows:,} rows needs {_mb(2 * n_bytes)} of disk while it is built, but {file.parent} has "
            f"{_mb(free)} free; make room there"
        )
    notice(
        f"building an index of {n_rows:,} rows in {cells:,} cells: {_mb(n_bytes)} of disk, as much again "
        f"until it is done, and up to {_mb(memory)} of memory"
    )
    record = file.with_suffix(".json")
    record.unlink(missing_ok=True)
    with _workplace(file) as folder, progress("building the index", total=n_rows, unit="rows") as advance:
        drawn = np.random.default_rng(SEED).choice(n_rows, n_queries + n_sample, replace=False)
        index = _trained(store, modality, np.sort(drawn[n_queries:]), cells)
        nearest = _Nearest(store, modality, np.sort(drawn[:n_queries]))
        error, blocks, codes, n_seen = 0.0, list[_Block](), list[NDArray[np.uint8]](), 0
        for x in store.batches(modality, BUILD_ROWS):
            unit = unit_rows(x)
            codes.append(index.sa_encode(unit))
            error = max(error, float(np.linalg.norm(index.sa_decode(codes[-1]) - unit, axis=1).max()))
            nearest.look(unit, n_seen)
            n_seen += len(x)
            if len(codes) * BUILD_ROWS * d_in >= _BLOCK_BYTES or n_seen == n_rows:
                blocks.append(_Block.write(folder / f"{len(blocks)}.npy", codes, n_seen, d_in, cells))
                codes.clear()
            advance(len(x))
        with atomic_path(file) as temporary, temporary.open("wb") as out:
            _merge(out, index, blocks, n_rows)
            n_written = out.tell()
    facts = to_record(Facts(cells, error + _SLACK, nearest.curves(index)))
    write_json(record, {**wanted, **facts, "bytes": n_written}, schema_version=SCHEMA_VERSION)


@contextmanager
def _workplace(file: Path) -> Iterator[Path]:
    """A folder for blocks, which is empty before and after; only one process builds."""
    folder = file.parent / f".{file.name}.building"
    said = f"{folder} is in use by another process, which builds this index: wait for it, or give --index exact"
    with locked(folder, error=lambda _: StoreError(said)):
        try:
            _empty(folder)  # a killed process leaves blocks
            yield folder
        finally:
            _empty(folder)


def _empty(folder: Path) -> None:
    for block in folder.glob("*.npy"):
        block.unlink()


def _trained(store: EmbeddingStore, modality: Modality, rows: NDArray[np.int64], cells: int) -> Any:
    """An empty index whose centroids and ranges of numbers are those of some rows."""
    faiss = load_faiss()
    eight_bits, by_residual = faiss.ScalarQuantizer.QT_8bit, True
    centroids = faiss.IndexFlatIP(store.d_in)
    index = faiss.IndexIVFScalarQuantizer(
        centroids, store.d_in, cells, eight_bits, faiss.METRIC_INNER_PRODUCT, by_residual
    )
    index.cp.seed, index.cp.niter, index.cp.spherical, index.cp.min_points_per_centroid = SEED, 10, True, 1
    index.sq.rangestat_arg = _MARGIN
    index.train(unit_rows(store.take(rows, modality)))
    return index


class _Block(NamedTuple):
    """Consecutive rows in a file, sorted by cell."""

    rows: NDArray[np.void]
    """Memory-mapped: id and code of each."""
    starts: NDArray[np.int64]
    """Of each cell, and the end of the last."""

    @classmethod
    def write(cls, file: Path, codes: list[NDArray[np.uint8]], end: int, width: int, cells: int) -> _Block:
        """Rows up to the number `end`, of codes of this width, before which stands the number of the cell."""
        together = np.concatenate(codes)
        n_bytes = together.shape[1] - width
        cell = np.zeros(len(together), np.int64)
        for byte in range(n_bytes):
            cell += together[:, byte].astype(np.int64) << 8 * byte
        order = np.argsort(cell, kind="stable")
        rows = np.empty(len(order), [("id", "<i8"), ("code", "u1", width)])
        rows["id"], rows["code"] = end - len(order) + order, together[order, n_bytes:]
        np.save(file, rows)
        return cls(np.load(file, mmap_mode="r"), np.searchsorted(cell[order], np.arange(cells + 1)))

    def of_cell(self, cell: int) -> NDArray[np.void]:
        return self.rows[self.starts[cell] : self.starts[cell + 1]]


def _merge(out: BinaryIO, empty: Any, blocks: list[_Block], n_rows: int) -> None:
    """Faiss's own file: that of the empty index, the sizes of the cells, then of each cell the codes and the ids."""
    sizes = np.sum([np.diff(block.starts) for block in blocks], axis=0, dtype="<u8")
    out.write(header_of(load_faiss(), empty, n_rows)[:-_NO_LISTS])
    out.write(b"full" + len(sizes).to_bytes(8, "little") + sizes.tobytes())
    for cell in range(len(sizes)):
        parts = [block.of_cell(cell) for block in blocks]
        for name in ("code", "id"):
            for part in parts:
                out.write(part[name].tobytes())


class _Nearest:
    """The rows nearest to some queries, found exactly while all rows pass by; then in which cells they are."""

    def __init__(self, store: EmbeddingStore, modality: Modality, rows: NDArray[np.int64]) -> None:
        self.store, self.modality = store, modality
        self.kinds = [modality, *(other for other in store.modalities if other != modality)]
        """The modality that is searched, then the others."""
        self.rows = rows
        self.queries = np.concatenate([unit_rows(store.take(rows, kind)) for kind in self.kinds])
        self.heap = load_faiss().ResultHeap(len(self.queries), AT + 1, keep_max=True)

    def look(self, unit: Vector, first: int) -> None:
        """At the next rows, the first of which has the number `first`."""
        faiss = load_faiss()
        n = min(AT + 1, len(unit))
        scores, rows = faiss.knn(self.queries, unit, n, metric=faiss.METRIC_INNER_PRODUCT)
        self.heap.add_result(scores, rows + first)

    def curves(self, index: Any) -> dict[Modality, Curve]:
        """Of the queries of each modality."""
        self.heap.finalize()
        found = self.heap.I.reshape(len(self.kinds), len(self.rows), AT + 1)
        queries = self.queries.reshape(len(self.kinds), len(self.rows), self.queries.shape[1])
        places = zip(self.kinds, queries, found, strict=True)
        return {kind: _curve(self._cell_ranks(index, kind, x, rows), index.nlist) for kind, x, rows in places}

    def _cell_ranks(self, index: Any, kind: Modality, x: Vector, found: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which in the order of cells, nearest first, is the one that holds the row: of each query's nearest rows."""
        ranks = []
        for own, query, rows in zip(self.rows, x, found, strict=True):
            others = rows[(rows >= 0) & (rows != own if kind == self.modality else True)][:AT]
            if not len(others) or not query.any():
                continue
            order = index.quantizer.search(query[None], index.nlist)[1][0]
            place = np.empty(index.nlist, np.int64)
            place[order] = np.arange(index.nlist)
            cells = index.quantizer.search(unit_rows(self.store.take(others, self.modality)), 1)[1][:, 0]
            ranks.append(np.resize(place[cells], AT))
        return np.array(ranks, np.int64).reshape(-1, AT)


def _curve(ranks: NDArray[np.int64], cells: int) -> Curve:
    """Of ranks of cells: half of the queries make the cautious figures, half the plain ones."""
    probes = sorted({1, *(step << power for power in range(cells.bit_length()) for step in (2, 3))})
    probes = [n for n in probes if n < cells and len(ranks) >= _FEWEST]
    shares = [(ranks < n).mean(1) for n in probes]
    at_least = [float(own[::2].mean() - 2 * own[::2].std() / math.sqrt(len(own[::2]))) for own in shares]
    measured = [float(own[1::2].mean()) for own in shares]
    return Curve((*probes, cells), (*at_least, 1.0), (*measured, 1.0))


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
