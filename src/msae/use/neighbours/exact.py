"""`ExactRows`: the nearest rows without an index, by reading every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from torch.nn.functional import normalize

from msae.base.progress import progress
from msae.data.layout import Modality
from msae.data.store import EmbeddingStore
from msae.use.neighbours.base import BUILD_ROWS, Mask, Neighbourhood, Neighbours, Numbers, Vector


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
