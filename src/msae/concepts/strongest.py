"""Which concepts stand out in some rows: by activation for what is natural of each latent, named or not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from msae.concepts.names import ConceptNames
from msae.concepts.samples import TopSamples


class StandsOut(NamedTuple):
    """A concept that stands out in some rows."""

    concept: str
    """Its name, or `#12` for a latent without one: what `latents_of` reads."""
    latent: int
    """Of its latents, the one that stands out most."""
    strength: float
    """Its activation divided by its 99th percentile where it fires; the mean over the rows."""
    n_rows: int
    """Rows in which it is active, that is above its threshold."""


def standing_out(
    z: Float[np.ndarray, "n d_sae"],
    samples: TopSamples,
    names: ConceptNames | None,
    n: int,
    *,
    without: Collection[str] = (),
) -> list[StandsOut]:
    """The `n` concepts that stand out most in the rows of `z`, each once.

    A latent that is below its threshold in all rows has no activation, and is not among them. Nor is one that never
    fires in the rows of `samples`: what is natural for it is not known.

    Args:
        samples: Of the same modality and inference as `z`; they say what is natural.
        without: Concepts that are left out.
    """
    usual = samples.quantiles((0.99,))[:, 0]
    strength = np.divide(z.mean(0), usual, out=np.zeros(len(usual)), where=usual > 0)
    found: dict[str, StandsOut] = {}
    for latent in np.argsort(-strength, kind="stable").tolist():
        if strength[latent] <= 0 or len(found) == n:
            break
        concept = (names.name_of(latent) if names else None) or f"#{latent}"
        if concept not in found and concept not in without:
            found[concept] = StandsOut(concept, latent, float(strength[latent]), int((z[:, latent] > 0).sum()))
    return list(found.values())


def shown_as(
    concept: str, latents: Sequence[int], names: ConceptNames | None, samples: TopSamples
) -> tuple[str, int | None]:
    """The label of a concept and, unless rows have confirmed its name, the row that fires it most."""
    label = names.shown_name(concept) if names else concept
    if names is not None and concept in names and label == concept:
        return label, None
    top = samples.top(max(latents, key=lambda latent: float(samples.maximum[latent])), 1)
    return label, top[0].row if top else None
