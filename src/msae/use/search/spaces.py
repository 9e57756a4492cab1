"""The two spaces to search in: embeddings by cosine, and activations by L1 distance."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from msae.base.progress import progress
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.neighbours import NeighbourIndex, Neighbours
from msae.use.search.editing import EditedQuery
from msae.use.search.exact import ExactRows

BUILD_ROWS = 8192
"""Rows read at once while an index is built."""


class Ranked(NamedTuple):
    """The answer to one state of a query, and where the other state of it has the same rows."""

    rows: Int64[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    other_scores: Float32[np.ndarray, " n"]
    other_ranks: Int64[np.ndarray, " n"]


class Both(NamedTuple):
    """The answers to a query before and after its edits."""

    before: Ranked
    after: Ranked


def search_embeddings(
    index: NeighbourIndex | ExactRows, edited: EditedQuery, n: int, keep: NDArray[np.bool_] | None
) -> Both:
    """The rows of the largest cosine, exact in float32."""
    before = index.search(edited.x, n, keep=keep)
    if not edited.is_changed:
        return _unmoved(before)
    after = index.search(edited.x_edited, n, keep=keep)
    return Both(
        _ranked_by(index, before, edited.x_edited, after, keep), _ranked_by(index, after, edited.x, before, keep)
    )


def search_latents(
    sae: SAE,
    store: EmbeddingStore,
    modality: Modality,
    edited: EditedQuery,
    n: int,
    keep: NDArray[np.bool_] | None,
    *,
    device: str | None = None,
) -> Both:
    """The rows whose activations are nearest in L1, from one pass in blocks; scores are minus the distance."""
    assert edited.z is not None and edited.z_edited is not None
    scores = -l1_distances(sae, store, modality, torch.stack([edited.z, edited.z_edited]), device=device)
    allowed = np.arange(len(store)) if keep is None else np.flatnonzero(keep)
    orders = [allowed[np.lexsort((allowed, -score[allowed]))] for score in scores]
    answers = []
    for mine, other in ((0, 1), (1, 0)):
        rows = orders[mine][:n]
        places = np.empty(len(store), np.int64)
        places[orders[other]] = np.arange(1, len(allowed) + 1)
        answers.append(Ranked(rows, scores[mine][rows], scores[other][rows], places[rows]))
    return Both(*answers)


def check_modality(sae: SAE, *modalities: Modality) -> None:
    """Refuse modalities that the SAE has no statistics of.

    Raises:
        ConfigError: It has none of one of them.
    """
    for modality in modalities:
        sae.standardizer.apply(torch.zeros(1, sae.d_in), modality)


def open_index(store: EmbeddingStore, modality: Modality) -> NeighbourIndex | ExactRows:
    """The index of a store, built beside it when first asked for; without faiss, the rows themselves.

    Raises:
        StoreError: The store has no rows of `modality`, or they hold NaN.
    """
    if importlib.util.find_spec("faiss") is None:
        return ExactRows(store, modality)
    place = store.path / "index" if store.path.is_dir() else store.path.with_name(f"{store.path.name}.msae-index")
    return NeighbourIndex.open(
        place,
        modality,
        fingerprint=store.fingerprint,
        n_rows=len(store),
        d_in=store.d_in,
        rows=lambda rows: store.take(rows, modality),
        batches=lambda: _watched(store, modality),
    )


def l1_distances(
    sae: SAE, store: EmbeddingStore, modality: Modality, z: Float[Tensor, "q d_sae"], *, device: str | None = None
) -> NDArray[np.float32]:
    """Of each query's activations to those of every row; no more than a block of rows is encoded at once.

    Activations are not negative, so the sum of |a - b| is the sum of a, plus that of b, less twice that of the
    smaller of both; the last needs only the latents that are active in the query.
    """
    view = View(sae, store, modality, device=device)
    active = (z != 0).any(0).nonzero()[:, 0]
    own, active = z[:, active].to(view.device), active.to(view.device)
    distances = np.empty((len(z), len(store)), np.float32)
    first = 0
    for theirs in view.activations(title="encoding"):
        total, active_ones = theirs.sum(1), theirs[:, active]
        for i, query in enumerate(own):
            overlap = torch.minimum(active_ones, query).sum(1)
            distances[i, first : first + len(theirs)] = (total + query.sum() - 2 * overlap).cpu().numpy()
        first += len(theirs)
    return distances


def _unmoved(found: Neighbours) -> Both:
    ranked = Ranked(found.rows, found.scores, found.scores, np.arange(1, len(found.rows) + 1))
    return Both(ranked, ranked)


def _ranked_by(
    index: NeighbourIndex | ExactRows,
    found: Neighbours,
    other: NDArray[np.float32],
    other_found: Neighbours,
    keep: NDArray[np.bool_] | None,
) -> Ranked:
    """The rows of one answer with their scores and ranks in the other, exact for those that are in both."""
    scores = index.cosines(other, found.rows)
    ranks = np.maximum(index.ranks(other, scores, keep=keep), len(other_found.rows) + 1)
    exact = {row: rank for rank, row in enumerate(other_found.rows.tolist(), 1)}
    ranks = np.array([exact.get(row, rank) for row, rank in zip(found.rows.tolist(), ranks.tolist(), strict=True)])
    return Ranked(found.rows, found.scores, scores, ranks.astype(np.int64))


def _watched(store: EmbeddingStore, modality: Modality) -> Iterator[NDArray[np.float32]]:
    with progress("building the index", total=len(store), unit="rows") as advance:
        for batch in store.batches(modality, BUILD_ROWS):
            yield batch
            advance(len(batch))
