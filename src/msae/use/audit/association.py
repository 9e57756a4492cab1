"""Association of concepts with classes: effect size, interval, permutation p-value, and q-value over all concepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from msae.base import statistics as effects
from msae.use.audit.results import Association


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
        for first in range(0, len(own), 256):  # intervals need three more tables of this size
            some = own[first : first + 256]
            chosen = strengths[:, columns[some]]
            interval = effects.bootstrap_interval(chosen, labels == k, strata, n_resamples=n_resamples, rng=rng)
            for i, low, high in zip(some, interval.low, interval.high, strict=True):
                delta = float(size[i])
                ends = (min(float(low), delta), max(float(high), delta))
                found[columns[i]] = Association(delta, *ends, (delta + 1) / 2, float(p[i]), 1.0, classes[k])
    return found


def taught(
    strengths: Float32[np.ndarray, "n c"],
    is_training: Bool[np.ndarray, " n"],
    truth: Int64[np.ndarray, " n"],
    classes: Sequence[str],
    *,
    positive: int | None,
    n_permutations: int,
    n_resamples: int,
    rng: np.random.Generator,
) -> list[Association | None]:
    """For each column how much more it goes with a class in training rows than in the others.

    The effect is half of: Cliff's delta of training against other rows of the class, less the same of the other
    classes. Under the null hypothesis that training and other rows of a class have the column alike, membership may be
    shuffled within classes; whatever else tells the classes apart, in both sets of rows, is no part of it.
    """
    found: list[Association | None] = [None] * strengths.shape[1]
    columns = np.flatnonzero(strengths.max(0) > strengths.min(0))
    watched = [positive] if positive is not None else list(range(len(classes)))
    wins = effects.net_wins(strengths[:, columns], truth)
    best: dict[int, tuple[float, float, int]] = {}
    for k in watched:
        sides = [truth == k, truth != k]
        pairs = [effects.n_pairs(is_training[side], truth[side]) for side in sides]
        if not len(columns) or not all(pairs):
            continue
        weight = np.where(sides[0], 0.5 / pairs[0], -0.5 / pairs[1]).astype(np.float32)[:, None]
        sizes = (wins * weight)[is_training].sum(0, dtype=np.float64)
        p = effects.permutation_p(
            wins * weight, is_training.astype(np.int64), truth, n_permutations=n_permutations, rng=rng, focus=1
        )
        for i, (size, value) in enumerate(zip(sizes, p, strict=True)):
            if i not in best or abs(size) > abs(best[i][0]):
                best[i] = (float(size), min(1.0, float(value) * len(watched)), k)
    for k in watched:
        own = [i for i, one in best.items() if one[2] == k]
        for first in range(0, len(own), 256):
            some = own[first : first + 256]
            chosen, ends = strengths[:, columns[some]], []
            for side in (truth == k, truth != k):
                own_side = (chosen[side], is_training[side], truth[side])
                ends.append(effects.resampled_deltas(*own_side, n_resamples=n_resamples, rng=rng))
            interval = effects.percentiles((ends[0] - ends[1]) / 2)
            for i, low, high in zip(some, interval.low, interval.high, strict=True):
                size, p_value, _ = best[i]
                low, high = min(float(low), size), max(float(high), size)
                found[columns[i]] = Association(size, low, high, (size + 1) / 2, p_value, 1.0, classes[k])
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
