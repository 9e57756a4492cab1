"""Association of concepts with classes: effect size, interval, permutation p-value, and q-value over all concepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int, Int64

from msae import effects
from msae.auditing.results import Association


def associate(
    strengths: Float32[np.ndarray, "n c"],
    labels: Int64[np.ndarray, " n"],
    strata: Int[np.ndarray, " n"],
    classes: Sequence[str],
    *,
    positive: int | None,
    n_permutations: int,
    n_resamples: int,
    rng: np.random.Generator,
) -> list[Association | None]:
    """For each column its association with `labels` among rows of one stratum; q-values are not filled in yet.

    None for a column without two different values, and for all where no stratum has two classes.

    Args:
        positive: The class that is compared with the others; None takes for each column the one of the largest effect,
            and the p-value is that of the largest.
    """
    n_columns = strengths.shape[1]
    found: list[Association | None] = [None] * n_columns
    varies = strengths.max(0) > strengths.min(0)
    columns = np.flatnonzero(varies)
    wins = effects.net_wins(strengths[:, columns], strata)
    watched = [positive] if positive is not None else list(range(len(classes)))
    sizes = [effects.cliffs_delta(wins, labels == k, strata) for k in watched]
    usable = [(k, size) for k, size in zip(watched, sizes, strict=True) if size is not None]
    if not len(columns) or not usable:
        return found
    table = np.stack([size for _, size in usable])
    best = np.abs(table).argmax(0)
    p = effects.permutation_p(wins, labels, strata, n_permutations=n_permutations, rng=rng, focus=positive)
    del wins
    for place, (k, size) in enumerate(usable):
        own = np.flatnonzero(best == place)
        for first in range(0, len(own), 128):  # intervals need three more tables of this size
            some = own[first : first + 128]
            chosen = strengths[:, columns[some]]
            interval = effects.bootstrap_interval(chosen, labels == k, strata, n_resamples=n_resamples, rng=rng)
            for i, low, high in zip(some, interval.low, interval.high, strict=True):
                delta = float(size[i])
                ends = (min(float(low), delta), max(float(high), delta))
                found[columns[i]] = Association(delta, *ends, (delta + 1) / 2, float(p[i]), 1.0, classes[k])
    return found


def with_q(associations: Sequence[Association | None]) -> list[Association | None]:
    """The associations with q-values over all that were tested."""
    tested = [i for i, one in enumerate(associations) if one is not None]
    q = effects.benjamini_hochberg(np.array([one.p for one in associations if one is not None]))
    found = list(associations)
    for i, value in zip(tested, q, strict=True):
        one = found[i]
        assert one is not None
        found[i] = dataclasses.replace(one, q=float(value))
    return found
