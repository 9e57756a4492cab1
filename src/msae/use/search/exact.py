"""`ExactRows`: the rows of a store by cosine without an index, by reading every row: what a bare install does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch.nn.functional import normalize

from msae.base.progress import progress
from msae.data.store import EmbeddingStore, Modality
from msae.use.neighbours import Neighbours

BLOCK = 8192
"""Rows read at once."""


@dataclass(frozen=True, eq=False)
class ExactRows:
    """The rows of one modality of one store; answers as `NeighbourIndex` does."""

    store: EmbeddingStore
    modality: Modality

    def search(
        self, query: Float32[np.ndarray, " d_in"], n: int, *, keep: NDArray[np.bool_] | None = None
    ) -> Neighbours:
        """The `n` rows of the largest cosine to `query`; of equal ones the lower row first.

        Args:
            query: Any raw vector but zero.
            keep: Which rows may be found; all without it.
        """
        rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
        for some, theirs in self._scored(query, keep):  # the best so far, and those of the next block
            rows, scores = np.concatenate([rows, some]), np.concatenate([scores, theirs])
            order = np.lexsort((rows, -scores))[:n]
            rows, scores = rows[order], scores[order]
        return Neighbours(rows, scores)

    def cosines(self, query: Float32[np.ndarray, " d_in"], rows: Int64[np.ndarray, " m"]) -> NDArray[np.float32]:
        """Of the query and some rows."""
        return self._cosines(query, self.store.take(rows, self.modality))

    def ranks(
        self,
        query: Float32[np.ndarray, " d_in"],
        scores: Float32[np.ndarray, " m"],
        *,
        keep: NDArray[np.bool_] | None = None,
    ) -> Int64[np.ndarray, " m"]:
        """How many rows have a larger cosine to `query` than each of `scores`, plus one."""
        ranks = np.ones(len(scores), np.int64)
        for _, theirs in self._scored(query, keep):
            ranks += len(theirs) - np.searchsorted(np.sort(theirs), scores, side="right")
        return ranks

    def _scored(
        self, query: Float32[np.ndarray, " d_in"], keep: NDArray[np.bool_] | None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """The rows that may be found and their cosines, block by block."""
        first = 0
        with progress("comparing", total=len(self.store), unit="rows") as advance:
            for x in self.store.batches(self.modality, BLOCK):
                scores = self._cosines(query, x)
                own = np.arange(len(x)) if keep is None else np.flatnonzero(keep[first : first + len(x)])
                yield first + own, scores[own]
                first += len(x)
                advance(len(x))

    @staticmethod
    def _cosines(query: Float32[np.ndarray, " d_in"], x: Float32[np.ndarray, "n d_in"]) -> NDArray[np.float32]:
        """Each row by itself, so that a row has the same cosine to the last bit in whatever block it is read."""
        unit = normalize(torch.from_numpy(query), dim=0, eps=1e-38)
        cosines: NDArray[np.float32] = (normalize(torch.from_numpy(x), dim=1, eps=1e-38) * unit).sum(1).numpy()
        return cosines
