"""`Neighbourhood`: the rows of a store by cosine, and what its kinds have in common."""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

from msae.base.errors import MissingDependencyError, StoreError
from msae.base.files import cache_folders, read_json
from msae.data.arrays import unit_rows
from msae.data.layout import Modality

SCHEMA_VERSION = 1
AT_FIRST = 64
"""Candidates beyond those wanted in the first round."""
BLOCK = 4096
"""Candidates read at once to be scored."""
BUILD_ROWS = 8192
"""Rows read at once while an index is built, or searched without one."""

_log = logging.getLogger(__name__)
_COUNT_AT = 8  # where a faiss file has its number of rows: after the kind (4 bytes) and the width (4)

Vector: TypeAlias = NDArray[np.float32]
Numbers: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
T = TypeVar("T")
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
        """The `n` rows of the largest cosine to `query`; of equal ones the lower row first.

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

    def for_queries(self, modality: Modality, recall: float) -> Neighbourhood:  # noqa: ARG002  # all find everything
        """The same rows for queries of `modality`, of whose nearest rows a share of `recall` is to be found."""
        return self

    def describe(self, keep: Mask | None = None) -> dict[str, Any]:  # noqa: ARG002
        """How a search with this mask is made, for people and JSON."""
        return {"kind": "exact"}


@dataclass(frozen=True, eq=False)
class FaissRows(Neighbourhood):
    """A memory-mapped file of faiss whose scores are off by at most `error`.

    A search asks it for more candidates than are wanted, scores those in float32 from the store, and asks for more
    still until no row that was left out can belong to the answer.
    """

    path: Path
    n_rows: int
    d_in: int
    error: float
    _faiss: Any = field(repr=False)
    _rows: Rows = field(repr=False)

    def search(self, query: Vector, n: int, *, keep: Mask | None = None) -> Neighbours:
        unit = unit_rows(query[None])
        n_kept = self.n_rows if keep is None else int(keep.sum())
        n = min(n, n_kept)
        n_candidates = min(n + AT_FIRST, n_kept)
        parameters = self._parameters(keep)
        while n:
            coarse, candidates = self._candidates(unit, n_candidates, parameters)
            scores = self.cosines(query, candidates)
            order = np.lexsort((candidates, -scores))[:n]
            # A row that is no candidate scores at most the worst candidate's coarse score, and the error of both.
            is_all = len(candidates) < n_candidates or n_candidates == n_kept
            if is_all or scores[order[-1]] > coarse[-1] + self.error:
                return Neighbours(candidates[order], scores[order])
            n_candidates = min(4 * n_candidates, n_kept)
        return Neighbours(np.empty(0, np.int64), np.empty(0, np.float32))

    def cosines(self, query: Vector, rows: Numbers) -> Vector:
        unit = unit_rows(query[None])[0]
        blocks = (rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK))
        return np.concatenate([np.empty(0, np.float32), *(unit_rows(self._rows(block)) @ unit for block in blocks)])

    def ranks(self, query: Vector, scores: Vector, *, keep: Mask | None = None) -> Numbers:
        """Counted by the file's scores: between rows that are nearer to each other than `error` a rank may be off."""
        radius = float(scores.min()) - self.error if len(scores) else 2.0
        _, found, _ = self._faiss.range_search(unit_rows(query[None]), radius, params=self._parameters(keep))
        ascending = np.sort(found)
        ranks: NDArray[np.int64] = 1 + len(found) - np.searchsorted(ascending, scores, side="right")
        return ranks

    def _candidates(self, unit: Vector, n: int, parameters: Any) -> tuple[Vector, Numbers]:
        scores, rows = self._faiss.search(unit, n, params=parameters)
        found = rows[0] >= 0
        return scores[0][found], rows[0][found]

    def _parameters(self, keep: Mask | None) -> Any:
        """What faiss is asked with."""
        faiss = load_faiss()
        return None if keep is None else faiss.SearchParameters(sel=only(faiss, keep))


def only(faiss: Any, keep: Mask) -> Any:
    """What lets faiss find the rows of the mask alone."""
    return faiss.IDSelectorBitmap(np.packbits(keep, bitorder="little"))


def has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def load_faiss() -> Any:
    try:
        import faiss
    except ImportError as err:
        raise MissingDependencyError.of("faiss-cpu", extra="index") from err
    return faiss


def find_index(
    place: Path, name: str, wanted: dict[str, Any], flags: int, facts: Callable[[dict[str, Any]], T]
) -> tuple[Path, Any, T] | None:
    """The file of an index, the index memory-mapped, and its facts; None where there is none that is what is wanted.

    It may lie in `place` or in the user's cache folder. One line in the log says why one is not taken.

    Args:
        facts: Reads what else its record says.
    """
    for folder in cache_folders(place):
        file = folder / f"{name}.faiss"
        if not file.exists():
            continue
        try:
            record = read_json(file.with_suffix(".json"), schema_version=SCHEMA_VERSION, error=StoreError)
            if any(record.get(key) != value for key, value in wanted.items()):
                raise StoreError(f"{file} was built from other rows")
            if file.stat().st_size != record["bytes"]:
                raise StoreError(f"{file} is not as long as when it was built")
            index = load_faiss().read_index(str(file), flags)
            if (index.ntotal, index.d) != (wanted["rows"], wanted["d_in"]):
                raise StoreError(f"{file} is damaged")
            known = facts(record)
        except (StoreError, OSError, KeyError, RuntimeError) as err:
            _log.warning("%s; building the index again", " ".join(str(err).split()))
            continue
        return file, index, known
    return None


def header_of(faiss: Any, empty: Any, n_rows: int) -> bytearray:
    """The first bytes of faiss's own file of an index, with the number of rows filled in."""
    header = bytearray(faiss.serialize_index(empty).tobytes())
    header[_COUNT_AT : _COUNT_AT + 8] = n_rows.to_bytes(8, "little")
    return header
