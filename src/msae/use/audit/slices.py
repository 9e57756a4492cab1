"""Groups that nobody labelled: concepts that wrong predictions of a class have in common and right ones lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from msae.base import statistics

LEVEL = 0.05
MOST = 10
"""Candidates that are shown of one class."""
FEWEST = 10
"""Wrong predictions of a class, and right ones, below which nothing is learnt from their difference."""


@dataclass(frozen=True)
class Slice:
    """Rows of one true class that have a concept and that the classifier often gets wrong."""

    class_: str
    name: str
    latents: tuple[int, ...]
    n: int
    """Rows of the class in which the concept is clearly present."""
    n_wrong: int
    n_wrong_in_class: int
    """Wrong predictions of the class, in all of its rows."""
    error: float
    """Share of them that are predicted wrongly."""
    error_elsewhere: float
    """The same of the other rows of the class."""
    effect_size: float
    """Cliff's delta of the strength, wrong against right rows of the class."""
    p: float
    """Of a two-sided permutation test within the class."""
    q: float
    """`p` adjusted for all concepts and classes."""
    ids: tuple[str, ...]
    """Of the rows."""

    @property
    def overlap(self) -> float:
        """F1 of its rows and the wrong rows of the class."""
        return 2 * self.n_wrong / max(1, self.n + self.n_wrong_in_class)


class Candidates(NamedTuple):
    """The tests of some concepts."""

    class_: Int64[np.ndarray, " m"]
    concept: Int64[np.ndarray, " m"]
    effect_size: Float64[np.ndarray, " m"]
    p: Float64[np.ndarray, " m"]


def otsu_border(strength: Float64[np.ndarray, " n"]) -> float:
    """The strength that best divides weak from strong rows: it leaves the least variance within the two sides.

    Source: Otsu 1979, doi:10.1109/TSMC.1979.4310076.
    """
    if len(strength) < 2:
        return np.inf
    ordered = np.sort(strength)
    below = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)[:-1]
    means = sums / below, (ordered.sum() - sums) / (len(ordered) - below)
    place = int((below * (len(ordered) - below) * np.square(means[1] - means[0])).argmax())
    return float(ordered[place] + ordered[place + 1]) / 2


def compare_errors(
    strengths: Float32[np.ndarray, "n c"],
    truth: Int64[np.ndarray, " n"],
    is_wrong: Bool[np.ndarray, " n"],
    *,
    n_permutations: int,
    rng: np.random.Generator,
) -> Candidates:
    """Whether the wrong predictions of each class have more of a concept than the right ones, or less."""
    found: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64),) * 2 + (np.empty(0),) * 2]
    for k in np.unique(truth):
        own = truth == k
        wrong = is_wrong[own]
        if min(wrong.sum(), (~wrong).sum()) < FEWEST:
            continue
        ranked = statistics.Ranked(strengths[own])
        columns, one = ranked.varying, np.zeros(len(wrong), np.int64)
        tested = statistics.permutation_test(
            statistics.NetWins(ranked, one, columns), wrong[None].astype(np.float64), one,
            n_permutations=n_permutations, rng=rng,
        )  # fmt: skip
        size, p = tested.sums[0] / statistics.n_pairs(wrong, one), tested.p
        found.append((np.full(len(columns), k), columns, size, p))
    return Candidates(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def slice_of(
    strength: Float32[np.ndarray, " n"],
    own: Bool[np.ndarray, " n"],
    is_wrong: Bool[np.ndarray, " n"],
    ids: Sequence[str],
    candidate: tuple[str, str, tuple[int, ...], float, float],
) -> Slice:
    """The rows of a candidate: those of the class in which the concept is clearly present.

    Args:
        own: Rows of the class.
        ids: Of all rows.
        candidate: Class, name, latents, effect size and p; q is not filled in.
    """
    class_, name, latents, size, p = candidate
    has = own & (strength > otsu_border(strength[own].astype(np.float64)))
    error, elsewhere = [float(is_wrong[rows].mean()) if rows.any() else 0.0 for rows in (has, own & ~has)]
    theirs = tuple(ids[row] for row in np.flatnonzero(has).tolist())
    n_wrong = int(is_wrong[has].sum())
    return Slice(
        class_, name, latents, len(theirs), n_wrong, int(is_wrong[own].sum()), error, elsewhere, size, p, 1.0, theirs
    )  # fmt: skip


def chosen_slices(tested: Sequence[Slice]) -> list[Slice]:
    """The candidates of each class, at most `MOST`: concepts with q < .05 that the wrong predictions have more of.

    Those first whose rows and the errors of the class have most in common (F1).
    """
    q = statistics.q_values(np.array([one.p for one in tested]))
    known = [replace(one, q=float(value)) for one, value in zip(tested, q, strict=True)]
    found: list[Slice] = []
    for class_ in dict.fromkeys(one.class_ for one in known):
        own = [one for one in known if one.class_ == class_ and one.effect_size > 0 and one.q < LEVEL]
        found += sorted(own, key=lambda one: -one.overlap)[:MOST]
    return found
