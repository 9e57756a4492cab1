"""The pass over the rows: edits in closed form, tallied batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from msae.concepts.concept import quantiles_above_zero
from msae.use.audit.subjects import Subject
from msae.use.classifier import LinearClassifier
from msae.use.interventions import Concepts, Push, edited_logits

QUANTILES = {"set_p50": 0.5, "set_p90": 0.9, "set_p99": 0.99}
EDIT_ENTRIES = 1 << 20
"""Edited logits held at once: small enough to stay in a CPU's cache from one operation to the next."""


@dataclass
class Tally:
    """Sums over the rows that one kind of edit changed."""

    n: Float[Tensor, " c"]
    change: Float[Tensor, "c f"]
    change2: Float[Tensor, "c f"]
    flips: Float[Tensor, " c"]

    @classmethod
    def empty(cls, n_concepts: int, n_watched: int) -> Tally:
        sums = torch.zeros(n_concepts, n_watched, dtype=torch.float64)
        return cls(torch.zeros(n_concepts, dtype=torch.float64), sums, sums.clone(), sums[:, 0].clone())

    def add(self, own: slice, is_edited: Tensor, change: Tensor, flipped: Tensor) -> None:
        """Rows x concepts (x watched classes) of one batch, for the concepts in `own`."""
        weight = is_edited.float()
        change = change * weight[:, :, None]
        self.n[own] += weight.sum(0)
        self.change[own] += change.sum(0)
        self.change2[own] += change.square().sum(0)
        self.flips[own] += (flipped & is_edited).sum(0)


@dataclass
class Measured:
    """What the edits of all concepts did."""

    tallies: dict[str, Tally]
    n_rows: Float[Tensor, "t 2 c"]
    """Rows by true class, absence or presence of the concept, and concept."""
    correct: Float[Tensor, "t 2 c"]
    correct_removed: Float[Tensor, "t 2 c"]
    correct_levelled: Float[Tensor, "t 2 c"]
    predicted: NDArray[np.int64]
    """The predicted class of each row before any edit."""


def quantiles(strengths: Float32[np.ndarray, "n c"]) -> dict[str, Float[Tensor, " c"]]:
    """The natural quantiles of each concept's strengths above 0; 0 for a concept that never fires."""
    columns = torch.from_numpy(strengths).unbind(1)
    found = torch.stack([quantiles_above_zero(column, list(QUANTILES.values())) for column in columns], 1)
    return dict(zip(QUANTILES, found, strict=True))


@torch.no_grad()
def measure_edits(
    subject: Subject,
    rows: Int64[np.ndarray, " n"],
    truth: Int64[np.ndarray, " n"] | None,
    concepts: Concepts,
    z: Float32[np.ndarray, "n l"],
    amounts: Mapping[str, Float[Tensor, " c"]],
) -> Measured:
    """Remove every concept where it fires and set it to each of `amounts` where it does not.

    Args:
        z: Activations of the concepts' latents on `rows`.
        amounts: By name of the edit, the strength of each concept.
    """
    classifier = subject.classifier
    n_classes = len(classifier.classes)
    tallies = {name: Tally.empty(concepts.n, len(subject.watched)) for name in ("remove", *amounts)}
    nothing = torch.zeros(n_classes, 2, concepts.n, dtype=torch.float64)
    counts = [nothing.clone() for _ in range(4)]
    predicted = np.empty(len(rows), np.int64)
    measured = Measured(tallies, counts[0], counts[1], counts[2], counts[3], predicted)
    mean = torch.from_numpy(z.mean(0, dtype=np.float64)).float()
    blocks = _blocks(concepts, 128)
    per_row = max(len(block.concepts.owner) for block in blocks) * n_classes
    size = max(1, min(8192, EDIT_ENTRIES // per_row))
    for first in range(0, len(rows), size):
        own = slice(first, first + size)
        u = classifier.features(subject.raw(rows[own]))
        batch = _Batch(u, classifier, subject.watched)
        measured.predicted[own] = batch.predicted.numpy()
        labels = None if truth is None else torch.from_numpy(truth[own])
        for block in blocks:
            own_z = torch.from_numpy(z[own, block.latents])
            fires = block.concepts.sum((own_z > 0).float()) > 0
            edited = batch.edit(block.concepts.removal(u, own_z))
            tallies["remove"].add(block.owns, fires, edited.change, edited.flipped)
            if labels is not None:
                levelled = batch.edit(block.concepts.removal(u, own_z - mean[block.latents]))
                _add_groups(measured, block.owns, labels, fires, batch.predicted, edited.predicted, levelled.predicted)
            for name, strength in amounts.items():
                edited = batch.edit(block.concepts.raising(u, strength[block.owns]))
                tallies[name].add(block.owns, ~fires & (strength[block.owns] > 0), edited.change, edited.flipped)
    return measured


@dataclass(frozen=True)
class _Edited:
    change: Float[Tensor, "n c f"]
    predicted: Int[Tensor, "n c"]
    flipped: Bool[Tensor, "n c"]


class _Batch:
    """Embeddings with what an edit leaves as it is."""

    def __init__(self, u: Tensor, classifier: LinearClassifier, watched: list[int]) -> None:
        self._scores, self._length2 = u @ classifier.weight.T, u.square().sum(1)
        self._classifier, self._watched = classifier, watched
        none = torch.zeros(len(u), 1)
        logits = self._logits(Push(torch.zeros(1, 1, len(classifier.bias)), none, none))
        self.predicted: Int[Tensor, " n"] = logits[:, 0].argmax(1)
        self._before = probabilities(logits, watched)

    def _logits(self, push: Push) -> Float[Tensor, "n c k"]:
        own = self._classifier
        return edited_logits(self._scores, self._length2, own.bias, push, unit_norm=own.unit_norm)

    def edit(self, push: Push) -> _Edited:
        logits = self._logits(push)
        change = probabilities(logits, self._watched) - self._before
        # argmax over two classes by hand: an order of magnitude faster
        predicted = (logits[..., 1] > logits[..., 0]).long() if logits.shape[2] == 2 else logits.argmax(2)
        return _Edited(change, predicted, predicted != self.predicted[:, None])


def probabilities(logits: Float[Tensor, "*n k"], watched: list[int]) -> Float[Tensor, "*n f"]:
    """Softmax over the classes, of the watched ones."""
    if logits.shape[-1] == 2 and len(watched) == 1:
        this = watched[0]
        return torch.sigmoid(logits[..., this] - logits[..., 1 - this])[..., None]
    return logits.softmax(-1)[..., watched]


@dataclass(frozen=True)
class _Block:
    """Some consecutive concepts."""

    owns: slice
    latents: slice
    concepts: Concepts


def _blocks(concepts: Concepts, n: int) -> list[_Block]:
    """The concepts, `n` at a time."""
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(concepts.owner).cumsum(0)]).tolist()
    found = []
    for first in range(0, concepts.n, n):
        owns = slice(first, min(first + n, concepts.n))
        own = slice(edges[owns.start], edges[owns.stop])
        parts = (concepts.rows[own], concepts.pattern[own], concepts.reader[own], concepts.weight)
        found.append(_Block(owns, own, Concepts(concepts.owner[own] - first, *parts)))
    return found


def _add_groups(
    measured: Measured,
    owns: slice,
    labels: Tensor,
    fires: Tensor,
    predicted: Tensor,
    removed: Tensor,
    levelled: Tensor,
) -> None:
    """Count rows, and correct ones before and after, by true class and presence."""
    n_classes = measured.n_rows.shape[0]
    one_hot = torch.nn.functional.one_hot(labels, n_classes).float().T
    right = (predicted == labels)[:, None]
    for present, has in enumerate((~fires, fires)):
        measured.n_rows[:, present, owns] += one_hot @ has.float()
        measured.correct[:, present, owns] += one_hot @ (has & right).float()
        after = (removed == labels[:, None]) if present else right
        measured.correct_removed[:, present, owns] += one_hot @ (has & after).float()
        measured.correct_levelled[:, present, owns] += one_hot @ (has & (levelled == labels[:, None])).float()
