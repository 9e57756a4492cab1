"""The pass over the rows: edits in closed form, tallied batch by batch; and the same with random latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from msae.base.statistics import COPIED
from msae.concepts.strength import Readers
from msae.use.audit.subjects import Subject
from msae.use.classifier import Readout
from msae.use.interventions import Concepts, Push, edited_logits

ENOUGH = 10
"""Live latents of no audited concept from which on they alone are controls."""
MARGIN = 0.2
"""A latent whose correlation with the true class is larger than the concept's by this is no control."""
QUANTILES = {"set_p50": 0.5, "set_p90": 0.9, "set_p99": 0.99}
EDIT_ENTRIES = 1 << 20
"""Edited logits held at once: small enough to stay in a CPU's cache from one operation to the next."""


@dataclass
class Tally:
    """Sums over the rows that one kind of edit changed."""

    n: Float[Tensor, " c"]
    change: Float[Tensor, "f c"]
    change2: Float[Tensor, "f c"]
    flips: Float[Tensor, " c"]

    @classmethod
    def empty(cls, n_concepts: int, n_outputs: int) -> Tally:
        sums = torch.zeros(n_outputs, n_concepts, dtype=torch.float64)
        return cls(sums[0].clone(), sums, sums.clone(), sums[0].clone())

    def add(self, own: slice, weight: Tensor, change: Tensor, flipped: Tensor | None) -> None:
        """Outputs x rows x concepts of one batch, for the concepts in `own`; a row's `weight` is 1 where it is edited.

        Args:
            flipped: Whose prediction changed; None counts neither these nor squares.
        """
        change *= weight
        self.n[own] += weight.sum(0)
        self.change[:, own] += change.sum(1)
        if flipped is not None:
            self.change2[:, own] += change.square_().sum(1)
            self.flips[own] += (flipped * weight).sum(0)


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
    found = np.zeros((len(QUANTILES), strengths.shape[1]), np.float32)
    shares = np.array(list(QUANTILES.values()))
    for first in range(0, strengths.shape[1], COPIED):
        for i, column in enumerate(np.ascontiguousarray(strengths[:, first : first + COPIED].T), first):
            above = np.sort(column[column > 0]).astype(np.float64)
            if len(above):
                place = shares * (len(above) - 1)
                low = place.astype(np.int64)
                high = np.minimum(low + 1, len(above) - 1)
                found[:, i] = above[low] + (place - low) * (above[high] - above[low])
    return dict(zip(QUANTILES, torch.from_numpy(found), strict=True))


@torch.no_grad()
def measure_edits(
    subject: Subject,
    rows: Int64[np.ndarray, " n"],
    truth: Int64[np.ndarray, " n"] | None,
    concepts: Concepts,
    z: Float32[np.ndarray, "n l"],
    amounts: Mapping[str, Float[Tensor, " c"]],
    present: Mapping[int, Bool[np.ndarray, " n"]] = MappingProxyType({}),
    *,
    means_alone: bool = False,
) -> Measured:
    """Remove every concept where it fires and set it to each of `amounts` where it does not.

    Args:
        z: Activations of the concepts' latents on `rows`.
        amounts: By name of the edit, the strength of each concept.
        present: In which rows a concept fires, by its number; the others do where any of their latents does.
        means_alone: Measure no more than mean changes.
    """
    readout = subject.readout
    n_classes = len(subject.classifier.classes)
    tallies = {name: Tally.empty(concepts.n, readout.n_outputs) for name in ("remove", *amounts)}
    nothing = torch.zeros(n_classes, 2, concepts.n, dtype=torch.float64)
    counts = [nothing.clone() for _ in range(4)]
    predicted = np.empty(len(rows), np.int64)
    measured = Measured(tallies, counts[0], counts[1], counts[2], counts[3], predicted)
    mean = torch.from_numpy(z.mean(0, dtype=np.float64)).float()
    blocks = _blocks(concepts, 64)
    per_row = max(len(block.concepts.owner) for block in blocks) * readout.n_outputs
    size = max(1, min(8192, EDIT_ENTRIES // per_row))
    for first in range(0, len(rows), size):
        own = slice(first, first + size)
        batch = _Batch(subject.classifier.features(subject.raw(rows[own])), readout)
        measured.predicted[own] = batch.predicted.numpy()
        labels = None if truth is None else torch.from_numpy(truth[own])
        for block in blocks:
            own_z, along = torch.from_numpy(z[own, block.latents]), block.concepts.along(batch.u)
            fires = block.concepts.sum((own_z > 0).float()) > 0
            for number in present.keys() & range(block.owns.start, block.owns.stop):
                fires[:, number - block.owns.start] = torch.from_numpy(present[number][own])

            def tally(
                name: str, edited: Tensor, where: Tensor, block: _Block = block, batch: _Batch = batch
            ) -> Tensor | None:
                """Count an edit; the predictions after it."""
                after = None if means_alone else readout.predicted(edited)
                flipped = None if after is None else after != batch.predicted[:, None]
                change = readout.outputs(edited) - batch.before
                tallies[name].add(block.owns, where.float(), change, flipped)
                return after

            removed = tally("remove", batch.edit(block.concepts.removal(along, own_z)), fires)
            if labels is not None and removed is not None:
                levelled = batch.edit(block.concepts.removal(along, own_z - mean[block.latents]))
                after = readout.predicted(levelled)
                _add_groups(measured, block.owns, labels, fires, batch.predicted, removed, after)
            for name, strength in amounts.items():
                raised = batch.edit(block.concepts.raising(along, strength[block.owns]))
                tally(name, raised, ~fires & (strength[block.owns] > 0))
    return measured


class _Batch:
    """Embeddings with what an edit leaves as it is."""

    def __init__(self, u: Tensor, readout: Readout) -> None:
        self.u, self._readout = u, readout
        self._scores, self._length2 = u @ readout.weight.T, u.square().sum(1)
        none = torch.zeros(len(u), 1)
        logits = self.edit(Push(torch.zeros(len(readout.bias), 1, 1), none, none))
        self.predicted: Int[Tensor, " n"] = readout.predicted(logits)[:, 0]
        self.before = readout.outputs(logits)

    def edit(self, push: Push) -> Float[Tensor, "k n c"]:
        """The logits after an edit."""
        own = self._readout
        return edited_logits(self._scores, self._length2, own.bias, push, unit_norm=own.unit_norm)


@dataclass(frozen=True)
class _Block:
    """Some consecutive concepts."""

    owns: slice
    latents: slice
    concepts: Concepts


def _blocks(concepts: Concepts, n: int) -> list[_Block]:
    """The concepts, some `n` latents at a time: sums over the latents of a group cost their square."""
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(concepts.owner).cumsum(0)]).tolist()
    found, first = [], 0
    while first < concepts.n:
        last = first + 1
        while last < concepts.n and edges[last + 1] - edges[first] <= n:
            last += 1
        own = slice(edges[first], edges[last])
        read = concepts.readers
        mine = Readers(read.owner[own] - first, read.weight[own], read.pattern[own])
        found.append(_Block(slice(first, last), own, Concepts(mine, concepts.rows[own], concepts.weight)))
        first = last
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


# --- Random latents


class Sizes(NamedTuple):
    """Mean size of the change of the class's probability, for each random group; NaN where there was no row to edit."""

    remove: Float32[np.ndarray, " g"]
    set_p50: Float32[np.ndarray, " g"]


def control_sizes(
    subject: Subject,
    rows: Int64[np.ndarray, " m"],
    groups: Sequence[tuple[int, ...]],
    z: Float32[np.ndarray, "m d_sae"],
    truth: Int64[np.ndarray, " m"] | None,
    *,
    n_controls: int,
    rng: np.random.Generator,
) -> list[Sizes]:
    """For each concept the effects of its random latents, on `rows`.

    Latents of audited concepts are none, as long as enough others fire: they may carry what is looked for.

    Args:
        z: Activations of all latents on `rows`.
        truth: Classes of `rows`.
        n_controls: Random groups per concept; fewer where the SAE has fewer live latents.
    """
    profile = profile_of(z, truth)
    audited = sorted({latent for group in groups for latent in group})
    if np.count_nonzero(np.delete(profile.n_fires, audited)) >= ENOUGH:
        is_audited = np.isin(np.arange(z.shape[1]), audited)
        profile = profile._replace(n_fires=np.where(is_audited, -profile.n_fires, profile.n_fires))
    drawn = [matched_groups(group, profile, n_controls=n_controls, rng=rng) for group in groups]
    distinct = sorted({group for several in drawn for group in several})
    if not distinct:
        nothing = np.empty(0, np.float32)
        return [Sizes(nothing, nothing) for _ in groups]
    number_of = {group: number for number, group in enumerate(distinct)}
    concepts = subject.concepts(distinct, torch.from_numpy(z.mean(0)))
    own_z = z[:, [latent for group in distinct for latent in group]]
    strengths = concepts.readers(torch.from_numpy(own_z)).numpy()
    natural = quantiles(strengths)
    amounts = {name: natural[name] for name in Sizes._fields if name in natural}
    measured = measure_edits(subject, rows, None, concepts, own_z, amounts, means_alone=True)
    sizes = []
    for name in Sizes._fields:
        tally = measured.tallies[name]
        mean = (tally.change.abs().max(0).values / tally.n).float()  # 0 / 0 is NaN: nothing to edit
        sizes.append(mean.numpy())
    return [Sizes(*(one[[number_of[group] for group in several]] for one in sizes)) for several in drawn]


class Profile(NamedTuple):
    """How often and how strongly each latent fires."""

    n_fires: Int64[np.ndarray, " d_sae"]
    """Rows; below 0 for a latent that is no control."""
    place: Float64[np.ndarray, "d_sae 2"]
    """Logarithms of rows in which it fires and of its mean activation there."""
    of_class: Float64[np.ndarray, " d_sae"]
    """The size of its correlation with the true class; 0 where that is not known."""


def profile_of(z: Float32[np.ndarray, "m d_sae"], truth: Int64[np.ndarray, " m"] | None = None) -> Profile:
    """The profile of all latents on some rows."""
    n_fires = (z > 0).sum(0)
    magnitude = z.sum(0, dtype=np.float64) / np.maximum(n_fires, 1)
    return Profile(n_fires, np.log(np.stack([n_fires, magnitude], 1).clip(1e-9)), _goes_with(z, truth))


def _goes_with(z: Float32[np.ndarray, "m d_sae"], truth: Int64[np.ndarray, " m"] | None) -> Float64[np.ndarray, " d"]:
    """The largest correlation of each latent with a class, by size."""
    if truth is None:
        return np.zeros(z.shape[1])
    is_class = (truth[:, None] == np.unique(truth)).astype(np.float32)
    is_class -= is_class.mean(0)
    spread = np.sqrt(np.square(is_class).sum(0)[:, None] * (z.var(0, dtype=np.float64) * len(z)))
    size = np.divide(np.abs(is_class.T @ z), spread, out=np.zeros(spread.shape), where=spread > 0)
    largest: Float64[np.ndarray, " d"] = size.max(0)
    return largest


def matched_groups(
    group: tuple[int, ...], profile: Profile, *, n_controls: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Random groups of other latents, each matched to one of `group` in firing rate and mean activation.

    Near is near in the logarithms of both. A single latent's are its nearest; a group's are drawn from the nearest of
    each of its latents. The latents of `group` are never among them.
    """
    n_fires, place, of_class = profile
    is_alive = (n_fires > 0) & (of_class < of_class[list(group)].max() + MARGIN)
    alive = np.setdiff1d(np.flatnonzero(is_alive), np.array(group))
    members = [latent for latent in group if n_fires[latent]]
    if not len(alive) or not members:
        return []
    nearest = {}
    for latent in members:
        distance = np.square(place[alive] - place[latent]).sum(1)
        near = np.argpartition(distance, min(n_controls, len(alive)) - 1)[:n_controls]
        nearest[latent] = alive[near[np.argsort(distance[near], kind="stable")]]
    if len(members) == 1:
        return [(int(latent),) for latent in nearest[members[0]]]
    picked = rng.integers(min(n_controls, len(alive)), size=(n_controls, len(members)))
    drawn = (
        tuple(sorted({int(nearest[latent][one]) for latent, one in zip(members, own, strict=True)})) for own in picked
    )
    return sorted(set(drawn))
