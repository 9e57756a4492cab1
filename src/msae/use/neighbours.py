"""The rows of a store by cosine: `NeighbourIndex`, a memory-mapped faiss file, and `ExactRows`, which reads every row.

The index is built once and lies beside the run or in the user's cache folder, never in the store. It holds unit rows
in float16, so its scores are off by up to `ERROR`. A search therefore asks it for more candidates than are wanted,
scores those in float32 from the store, and asks for more still until no row that was left out can belong to the answer:
what comes back is what a float32 search of every row would have found. Without faiss, as in a bare install, every row
is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch.nn.functional import normalize

from msae.base.errors import MissingDependencyError, StoreError
from msae.base.files import atomic_path, cache_folders, read_json, user_cache, writable_cache, write_json
from msae.base.progress import progress
from msae.data.arrays import unit_rows
from msae.data.layout import Modality
from msae.data.store import EmbeddingStore

SCHEMA_VERSION = 1
ERROR = 6e-4
"""Largest error of an inner product of two unit vectors, one of them rounded to float16 (2**-11), with slack for
its numbers below the normal range of float16 and for summation."""
AT_FIRST = 64
"""Candidates beyond those wanted in the first round."""

BLOCK = 4096
"""Candidates read at once to be scored."""
BUILD_ROWS = 8192
"""Rows read at once while an index is built, or searched without one."""

_log = logging.getLogger(__name__)
_COUNT_AT = 8  # where a faiss file has its number of rows: after the kind (4 bytes) and the width (4)
_VECTOR_AT = -8  # and the number of bytes that follow

Vector: TypeAlias = NDArray[np.float32]
Numbers: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Rows = Callable[[Numbers], Vector]
"""Reads raw rows by their numbers."""


class Neighbours(NamedTuple):
    """Rows by falling cosine to a query."""

    rows: Int64[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    """Cosines in float32."""


class Neighbourhood(ABC):
    """The rows of one modality of one store, ready for many queries."""

    @abstractmethod
    def search(self, query: Vector, n: int, *, keep: Mask | None = None) -> Neighbours:
        """The `n` rows of the largest cosine to `query`, exactly; of equal ones the lower row first.

        Args:
            query: Any raw vector but zero.
            keep: Which rows may be found; all without it.
        """

    @abstractmethod
    def cosines(self, query: Vector, rows: Numbers) -> Vector:
        """Of the query and some rows, in float32."""

    @abstractmethod
    def ranks(self, query: Vector, scores: Vector, *, keep: Mask | None = None) -> Numbers:
        """How many rows have a larger cosine to `query` than each of `scores`, plus one."""


@dataclass(frozen=True, eq=False)
class NeighbourIndex(Neighbourhood):
    """A memory-mapped file of faiss."""

    path: Path
    n_rows: int
    d_in: int
    _faiss: Any = field(repr=False)
    _rows: Rows = field(repr=False)

    @classmethod
    def open(
        cls,
        place: Path,
        name: str,
        *,
        fingerprint: str,
        n_rows: int,
        d_in: int,
        rows: Rows,
        batches: Callable[[], Iterable[NDArray[np.float32]]],
    ) -> NeighbourIndex:
        """The index `name` in the folder `place`, built first where it is missing, damaged or of other rows.

        Args:
            place: Where nothing can be written, a folder in the user's cache is used instead.
            fingerprint: Of the rows; an index with another one is rebuilt.
            rows: Reads raw rows by number, to score candidates exactly.
            batches: Gives all raw rows in order, to build from.

        Raises:
            MissingDependencyError: faiss is not installed.
            StoreError: The index cannot be read back; the disk is full or damaged.
        """
        faiss = _load_faiss()
        wanted = {"fingerprint": fingerprint, "rows": n_rows, "d_in": d_in, "metric": "cosine", "dtype": "float16"}
        for folder in cache_folders(place):
            index = _read(faiss, folder / f"{name}.faiss", wanted)
            if index is not None:
                return cls(folder / f"{name}.faiss", n_rows, d_in, index, rows)
        file = writable_cache(place) / f"{name}.faiss"
        _build(faiss, file, wanted, batches())
        index = _read(faiss, file, wanted)
        if index is None:
            raise StoreError(f"{file} cannot be read back after it was written; check the disk and its free space")
        return cls(file, n_rows, d_in, index, rows)

    def search(self, query: Vector, n: int, *, keep: Mask | None = None) -> Neighbours:
        unit = unit_rows(query[None])
        n_kept = self.n_rows if keep is None else int(keep.sum())
        n = min(n, n_kept)
        n_candidates = min(n + AT_FIRST, n_kept)
        while n:
            coarse, candidates = self._candidates(unit, n_candidates, keep)
            scores = self.cosines(query, candidates)
            order = np.lexsort((candidates, -scores))[:n]
            # A row that is no candidate scores at most the worst candidate's coarse score, and the error of both.
            if len(candidates) == n_kept or scores[order[-1]] > coarse[-1] + ERROR:
                return Neighbours(candidates[order], scores[order])
            n_candidates = min(4 * n_candidates, n_kept)
        return Neighbours(np.empty(0, np.int64), np.empty(0, np.float32))

    def cosines(self, query: Vector, rows: Numbers) -> Vector:
        unit = unit_rows(query[None])[0]
        blocks = (rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK))
        return np.concatenate([np.empty(0, np.float32), *(unit_rows(self._rows(block)) @ unit for block in blocks)])

    def ranks(self, query: Vector, scores: Vector, *, keep: Mask | None = None) -> Numbers:
        """Counted in float16: between rows that are nearer to each other than `ERROR` a rank may be off."""
        radius = float(scores.min()) - ERROR if len(scores) else 2.0
        parameters = self._parameters(keep)
        _, found, _ = self._faiss.range_search(unit_rows(query[None]), radius, params=parameters)
        ascending = np.sort(found)
        ranks: NDArray[np.int64] = 1 + len(found) - np.searchsorted(ascending, scores, side="right")
        return ranks

    def _candidates(self, unit: NDArray[np.float32], n: int, keep: Mask | None) -> tuple[Vector, Numbers]:
        scores, rows = self._faiss.search(unit, n, params=self._parameters(keep))
        found = rows[0] >= 0
        return scores[0][found], rows[0][found]

    def _parameters(self, keep: Mask | None) -> Any:
        faiss = _load_faiss()
        if keep is None:
            return None
        return faiss.SearchParameters(sel=faiss.IDSelectorBitmap(np.packbits(keep, bitorder="little")))


def _load_faiss() -> Any:
    try:
        import faiss
    except ImportError as err:
        raise MissingDependencyError.of("faiss-cpu", extra="index") from err
    return faiss


def _read(faiss: Any, file: Path, wanted: dict[str, Any]) -> Any:
    """The index in `file`, memory-mapped, or None where there is none that is what is wanted."""
    if not file.exists():
        return None
    try:
        record = read_json(file.with_suffix(".json"), schema_version=SCHEMA_VERSION, error=StoreError)
        if any(record.get(key) != value for key, value in wanted.items()):
            raise StoreError(f"{file} was built from other rows")
        if file.stat().st_size != record["bytes"]:
            raise StoreError(f"{file} is not as long as when it was built")
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except (StoreError, OSError, KeyError, RuntimeError) as err:
        _log.warning("%s; building the index again", " ".join(str(err).split()))
        return None
    return index


def _build(faiss: Any, file: Path, wanted: dict[str, Any], batches: Iterable[NDArray[np.float32]]) -> None:
    """Write the index, a batch at a time: the file of an empty one with its two counts filled in, then the rows."""
    _log.info("building %s", file)
    record = file.with_suffix(".json")
    record.unlink(missing_ok=True)
    with atomic_path(file) as temporary, temporary.open("wb") as out:
        out.write(_header(faiss, wanted["d_in"], wanted["rows"]))
        for x in batches:
            out.write(unit_rows(x).astype("<f2").tobytes())
        n_bytes = out.tell()
    write_json(record, {**wanted, "bytes": n_bytes}, schema_version=SCHEMA_VERSION)


def _header(faiss: Any, d_in: int, n_rows: int) -> bytes:
    """The first bytes of faiss's own file of `n_rows` rows in float16."""
    kind = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexScalarQuantizer(d_in, kind, faiss.METRIC_INNER_PRODUCT)
    header = bytearray(faiss.serialize_index(index).tobytes())
    struct.pack_into("<q", header, _COUNT_AT, n_rows)
    struct.pack_into("<Q", header, len(header) + _VECTOR_AT, 2 * n_rows * d_in)
    return bytes(header)


# --- Without faiss


@dataclass(frozen=True, eq=False)
class ExactRows(Neighbourhood):
    """The store itself, of which every query reads all rows."""

    store: EmbeddingStore
    modality: Modality

    def search(self, query: Vector, n: int, *, keep: Mask | None = None) -> Neighbours:
        rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
        for some, theirs in self._scored(query, keep):  # the best so far, and those of the next block
            rows, scores = np.concatenate([rows, some]), np.concatenate([scores, theirs])
            order = np.lexsort((rows, -scores))[:n]
            rows, scores = rows[order], scores[order]
        return Neighbours(rows, scores)

    def cosines(self, query: Vector, rows: Numbers) -> Vector:
        return self._cosines(query, self.store.take(rows, self.modality))

    def ranks(self, query: Vector, scores: Vector, *, keep: Mask | None = None) -> Numbers:
        ranks = np.ones(len(scores), np.int64)
        for _, theirs in self._scored(query, keep):
            ranks += len(theirs) - np.searchsorted(np.sort(theirs), scores, side="right")
        return ranks

    def _scored(self, query: Vector, keep: Mask | None) -> Iterator[tuple[Numbers, Vector]]:
        """The rows that may be found and their cosines, block by block."""
        first = 0
        with progress("comparing", total=len(self.store), unit="rows") as advance:
            for x in self.store.batches(self.modality, BUILD_ROWS):
                scores = self._cosines(query, x)
                own = np.arange(len(x)) if keep is None else np.flatnonzero(keep[first : first + len(x)])
                yield first + own, scores[own]
                first += len(x)
                advance(len(x))

    @staticmethod
    def _cosines(query: Vector, x: Float32[np.ndarray, "n d_in"]) -> Vector:
        """Each row by itself, so that a row has the same cosine to the last bit in whatever block it is read."""
        unit = normalize(torch.from_numpy(query), dim=0, eps=1e-38)
        cosines: NDArray[np.float32] = (normalize(torch.from_numpy(x), dim=1, eps=1e-38) * unit).sum(1).numpy()
        return cosines


def open_index(store: EmbeddingStore, modality: Modality, folder: Path | None = None) -> Neighbourhood:
    """The index of a store, built when first asked for; without faiss, the rows themselves.

    Args:
        folder: A run folder, in whose `index/` it lies. Without one, in the user's cache folder.

    Raises:
        StoreError: The store has no rows of `modality`, or they hold NaN.
    """
    if importlib.util.find_spec("faiss") is None:
        return ExactRows(store, modality)
    path = store.path.resolve()
    own = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    return NeighbourIndex.open(
        (folder or user_cache()) / "index",
        f"{path.name}-{modality}-{own}",
        fingerprint=store.fingerprint,
        n_rows=len(store),
        d_in=store.d_in,
        rows=lambda rows: store.take(rows, modality),
        batches=lambda: _watched(store, modality),
    )


def _watched(store: EmbeddingStore, modality: Modality) -> Iterator[NDArray[np.float32]]:
    with progress("building the index", total=len(store), unit="rows") as advance:
        for batch in store.batches(modality, BUILD_ROWS):
            yield batch
            advance(len(batch))
