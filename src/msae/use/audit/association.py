"""Association of concepts with classes: effect size, interval, permutation p-value, and q-value over all concepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int64

from msae.base import statistics
from msae.use.audit.results import Association

BLOCK = 256
"""Columns whose intervals are computed at once; they take some tables of that width."""


@dataclass(frozen=True)
class PermutationTests:
    """The tests of one audit: what its classes are, and how p-values are drawn."""

    classes: Sequence[str]
    positive: int | None
    """The class that is compared with the others; None takes for each column the one of the largest effect, and the
    p-value is that of the largest."""
    n_permutations: int
    rng: np.random.Generator

    @property
    def watched(self) -> list[int]:
        """Numbers of the classes that are compared with the others."""
        return list(range(len(self.classes))) if self.positive is None else [self.positive]

    def associate(
        self, strengths: Float32[np.ndarray, "n c"], labels: Int64[np.ndarray, " n"], strata: Int[np.ndarray, " n"]
    ) -> list[Association | None]:
        """For each column its association with `labels` among rows of one stratum; q-values are not filled in yet.

        None for a column without two different values, and for all where no stratum has two classes.
        """
        found: list[Association | None] = [None] * strengths.shape[1]
        columns = _varying(strengths)
        wins = statistics.net_wins(strengths[:, columns], strata)
        sizes = [statistics.cliffs_delta(wins, labels == k, strata) for k in self.watched]
        usable = [(k, size) for k, size in zip(self.watched, sizes, strict=True) if size is not None]
        if not len(columns) or not usable:
            return found
        best = np.abs(np.stack([size for _, size in usable])).argmax(0)
        p = statistics.permutation_p(
            wins, labels, strata, n_permutations=self.n_permutations, rng=self.rng, focus=self.positive
        )
        del wins
        for place, (k, size) in enumerate(usable):
            own = np.flatnonzero(best == place)
            for first in range(0, len(own), BLOCK):
                some = own[first : first + BLOCK]
                ends = statistics.cliffs_delta_interval(strengths[:, columns[some]], labels == k, strata)
                for i, low, high in zip(some, *ends, strict=True):
                    found[columns[i]] = _association(size[i], low, high, p[i], self.classes[k])
        return found

    def train_shift(
        self, strengths: Float32[np.ndarray, "n c"], is_training: Bool[np.ndarray, " n"], truth: Int64[np.ndarray, " n"]
    ) -> list[Association | None]:
        """For each column how much more it goes with a class in training rows than in the others.

        The effect is half of: Cliff's delta of training against other rows of the class, less the same of the other
        classes. Under the null hypothesis that training and other rows of a class have the column alike, membership
        may be shuffled within classes; whatever else tells the classes apart, in both sets of rows, is no part of it.
        """
        found: list[Association | None] = [None] * strengths.shape[1]
        columns = _varying(strengths)
        wins = statistics.net_wins(strengths[:, columns], truth)
        best: dict[int, tuple[float, float, int]] = {}
        for k in self.watched:
            sides = [truth == k, truth != k]
            pairs = [statistics.n_pairs(is_training[side], truth[side]) for side in sides]
            if not len(columns) or not all(pairs):
                continue
            weight = np.where(sides[0], 0.5 / pairs[0], -0.5 / pairs[1]).astype(np.float32)[:, None]
            sizes = (wins * weight)[is_training].sum(0, dtype=np.float64)
            p = statistics.permutation_p(
                wins * weight, is_training.astype(np.int64), truth,
                n_permutations=self.n_permutations, rng=self.rng, focus=1,
            )  # fmt: skip
            for i, (size, value) in enumerate(zip(sizes, p, strict=True)):
                if i not in best or abs(size) > abs(best[i][0]):
                    best[i] = (float(size), min(1.0, float(value) * len(self.watched)), k)
        for k in self.watched:
            own = [i for i, one in best.items() if one[2] == k]
            for first in range(0, len(own), BLOCK):
                some = own[first : first + BLOCK]
                chosen = strengths[:, columns[some]]
                of_class, of_rest = (
                    _with_interval(chosen[s], is_training[s], truth[s]) for s in (truth == k, truth != k)
                )
                ends = statistics.difference_interval(*of_class, *of_rest)
                for i, low, high in zip(some, ends.low / 2, ends.high / 2, strict=True):
                    found[columns[i]] = _association(best[i][0], low, high, best[i][1], self.classes[k])
        return found


def _varying(strengths: Float32[np.ndarray, "n c"]) -> Int64[np.ndarray, " v"]:
    """The columns with two different values."""
    return np.flatnonzero(strengths.max(0) > strengths.min(0))


def _with_interval(
    strengths: Float32[np.ndarray, "n c"], is_positive: Bool[np.ndarray, " n"], strata: Int[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " c"], statistics.Interval]:
    """Cliff's delta of each column and its interval."""
    size = statistics.cliffs_delta(statistics.net_wins(strengths, strata), is_positive, strata)
    assert size is not None
    return size, statistics.cliffs_delta_interval(strengths, is_positive, strata)


def _association(size: float, low: float, high: float, p: float, class_: str) -> Association:
    size = float(size)
    ends = (max(-1.0, min(float(low), size)), min(1.0, max(float(high), size)))
    return Association(size, *ends, (size + 1) / 2, float(p), 1.0, class_)


def with_q(associations: Sequence[Association | None]) -> list[Association | None]:
    """The associations of one test with q-values: all concepts that were tested by it are one family."""
    tested = [i for i, one in enumerate(associations) if one is not None]
    q = statistics.q_values(np.array([one.p for one in associations if one is not None]))
    found = list(associations)
    for i, value in zip(tested, q, strict=True):
        one = found[i]
        assert one is not None
        found[i] = dataclasses.replace(one, q=float(value))
    return found
