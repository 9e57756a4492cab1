"""How a page shows concepts: by a name that rows have confirmed or, without one, by the row that fires it most."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from msae.concepts.strongest import StandsOut, shown_as, standing_out
from msae.data.rows import Row
from msae.sae.standardize import Modality
from msae.web.explorer.session import LoadedRun, World

SHOWN = 6
"""Concepts that are shown of some rows."""


class Face(NamedTuple):
    """What people see of a concept."""

    label: str
    """A name, the nearest word that was not confirmed, or the number of a latent."""
    picture: Row | None
    """Without a confirmed name, the row that fires it most."""


class Seen(NamedTuple):
    """A concept that stands out in some rows, as a page shows it."""

    found: StandsOut
    face: Face


def face(world: World, run: LoadedRun, concept: str, latents: Sequence[int], modality: Modality) -> Face:
    """How a concept of these latents is shown."""
    label, row = shown_as(concept, latents, run.names, run.natural(modality))
    return Face(label, None if row is None else world.rows([row])[0])


def seen_in(
    world: World, run: LoadedRun, rows: Sequence[int], modality: Modality, *, without: Collection[str] = ()
) -> list[Seen]:
    """The concepts that stand out most in some rows of the store, named or not."""
    if not rows:
        return []
    z = run.activations(rows, modality)
    found = standing_out(z, run.natural(modality), run.names, SHOWN, without=without)
    return [Seen(one, face(world, run, one.concept, [one.latent], modality)) for one in found]
