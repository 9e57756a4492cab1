"""Random latents that fire as often and as strongly as a concept: what any push of that size does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from msae.use.audit.measure import measure_edits, quantiles
from msae.use.audit.subjects import Subject

Group = tuple[int, ...]


class Sizes(NamedTuple):
    """Mean size of the change of the class's probability, for each random group; NaN where there was no row to edit."""

    remove: Float32[np.ndarray, " g"]
    set_p50: Float32[np.ndarray, " g"]
    set_p99: Float32[np.ndarray, " g"]


def control_sizes(
    subject: Subject,
    rows: Int64[np.ndarray, " m"],
    groups: Sequence[Group],
    z: Float32[np.ndarray, "m d_sae"],
    *,
    n_controls: int,
    rng: np.random.Generator,
) -> list[Sizes]:
    """For each concept the effects of its random twins, on `rows`.

    Args:
        z: Activations of all latents on `rows`.
        n_controls: Random groups per concept; fewer where the SAE has fewer live latents.
    """
    profile = profile_of(z)
    drawn = [matched_groups(group, profile, n_controls=n_controls, rng=rng) for group in groups]
    distinct = sorted({group for several in drawn for group in several})
    if not distinct:
        nothing = np.empty(0, np.float32)
        return [Sizes(nothing, nothing, nothing) for _ in groups]
    number_of = {group: number for number, group in enumerate(distinct)}
    concepts = subject.concepts(distinct, torch.from_numpy(z.mean(0)))
    own_z = z[:, [latent for group in distinct for latent in group]]
    strengths = concepts.strengths(torch.from_numpy(own_z)).numpy()
    natural = quantiles(strengths)
    amounts = {name: natural[name] for name in Sizes._fields if name in natural}
    measured = measure_edits(subject, rows, None, concepts, own_z, amounts)
    sizes = []
    for name in Sizes._fields:
        tally = measured.tallies[name]
        mean = (tally.change.abs().max(1).values / tally.n).float()  # 0 / 0 is NaN: nothing to edit
        sizes.append(mean.numpy())
    return [Sizes(*(one[[number_of[group] for group in several]] for one in sizes)) for several in drawn]


class Profile(NamedTuple):
    """How often and how strongly each latent fires."""

    n_fires: Int64[np.ndarray, " d_sae"]
    place: Float64[np.ndarray, "d_sae 2"]
    """Logarithms of rows in which it fires and of its mean activation there."""


def profile_of(z: Float32[np.ndarray, "m d_sae"]) -> Profile:
    """The profile of all latents on some rows."""
    n_fires = (z > 0).sum(0)
    magnitude = z.sum(0, dtype=np.float64) / np.maximum(n_fires, 1)
    return Profile(n_fires, np.log(np.stack([n_fires, magnitude], 1).clip(1e-9)))


def matched_groups(group: Group, profile: Profile, *, n_controls: int, rng: np.random.Generator) -> list[Group]:
    """Random groups of other latents, each matched to one of `group` in firing rate and mean activation.

    Near is near in the logarithms of both. A single latent's are its nearest; a group's are drawn from the nearest of
    each of its latents. The latents of `group` are never among them.
    """
    n_fires, place = profile
    alive = np.setdiff1d(np.flatnonzero(n_fires), np.array(group))
    members = [latent for latent in group if n_fires[latent]]
    if not len(alive) or not members:
        return []
    nearest = {
        latent: alive[np.argsort(np.square(place[alive] - place[latent]).sum(1), kind="stable")[:n_controls]]
        for latent in members
    }
    if len(members) == 1:
        return [(int(latent),) for latent in nearest[members[0]]]
    drawn = (tuple(sorted({int(rng.choice(nearest[latent])) for latent in members})) for _ in range(n_controls))
    return sorted(set(drawn))
