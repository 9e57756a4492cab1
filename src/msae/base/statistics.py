"""How strongly a number goes with a class, for many numbers at once: Cliff's delta, its interval, honest p-values.

Everything rests on one matrix, the *net wins*: for each row and column, the rows of its stratum that are smaller less
those that are larger. Summed over the rows of a class they are Cliff's delta times the number of pairs, so that a
permutation or a bootstrap of hundreds of columns is one matrix product. docs/audit.md says what is tested.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int64

CHUNK_ENTRIES = 1 << 24
"""Relabelled rows held at once, 64 MB of them."""
STOP_AFTER = 100
"""A column that relabelled data have beaten so often is done: its p-value is known to a tenth of itself."""

CLEAR_AFTER, CLEAR_Q = 2000, 0.005
"""Draws after which an undefeated column is done too, if its q-value is below this already."""


class Interval(NamedTuple):
    """Ends of a 95 % interval, one pair per column."""

    low: Float[np.ndarray, " c"]
    high: Float[np.ndarray, " c"]


def net_wins(values: Float[np.ndarray, "n c"], strata: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n c"]:
    """For each entry, the entries of its column and stratum that are smaller less those that are larger."""
    wins = np.zeros(values.shape, np.float32)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        own = np.asfortranarray(values[rows])
        for column in range(values.shape[1]):
            wins[rows, column] = 2 * midranks(own[:, column]) - (len(rows) + 1)
    return wins


def midranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The ranks from 1; equal values share the mean of theirs. Most activations are 0 and need no sorting."""
    ranks = np.empty(len(values))
    lowest = values == values.min(initial=np.inf)
    n_lowest = int(lowest.sum())
    ranks[lowest] = (n_lowest + 1) / 2
    rest = np.flatnonzero(~lowest)
    order = rest[np.argsort(values[rest])]
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(rest) else np.empty(0, np.int64)
    counts = np.diff(np.r_[starts, len(ordered)])
    ranks[order] = np.repeat(n_lowest + starts + (counts + 1) / 2, counts)
    return ranks


def n_pairs(is_positive: np.ndarray, strata: Int[np.ndarray, " n"]) -> int:
    """Pairs of a positive and another row of the same stratum."""
    size = np.bincount(strata)
    positive = np.bincount(strata, weights=is_positive).astype(np.int64)
    return int((positive * (size - positive)).sum())


def cliffs_delta(
    wins: Float32[np.ndarray, "n c"], is_positive: np.ndarray, strata: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " c"] | None:
    """Of the pairs of a positive and another row of its stratum, the share won less the share lost; in [-1, 1].

    With one stratum it is 2 AUROC - 1. None where there is no such pair.

    Source: Cliff 1993, Psychological Bulletin 114(3).
    """
    pairs = n_pairs(is_positive, strata)
    return None if pairs == 0 else wins[is_positive].sum(0, dtype=np.float64) / pairs


def bootstrap_interval(
    values: Float[np.ndarray, "n c"],
    is_positive: np.ndarray,
    strata: Int[np.ndarray, " n"],
    *,
    n_resamples: int,
    rng: np.random.Generator,
) -> Interval:
    """95 % percentile interval of Cliff's delta over rows drawn with replacement."""
    resampled = resampled_deltas(values, is_positive, strata, n_resamples=n_resamples, rng=rng)
    return percentiles(resampled)


def percentiles(resampled: Float[np.ndarray, "b c"]) -> Interval:
    """The middle 95 % of resampled effect sizes."""
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return Interval(low.clip(-1, 1), high.clip(-1, 1))


def resampled_deltas(
    values: Float[np.ndarray, "n c"],
    is_positive: np.ndarray,
    strata: Int[np.ndarray, " n"],
    *,
    n_resamples: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "b c"]:
    """Cliff's deltas of rows drawn with replacement.

    They are computed to first order in the rows' multiplicities (Poisson, mean 1): re-ranking hundreds of
    columns a thousand times would take hours and moves the ends by the order of 1 / n.

    Source: Efron & Tibshirani 1993, ch. 13; the first-order part is that of DeLong et al. 1988.
    """
    pairs = n_pairs(is_positive, strata)
    against = net_wins(values, strata) - net_wins(values, 2 * strata + is_positive)  # opponents alone
    sign = np.where(is_positive, 1.0, -1.0)[:, None]
    delta = (against[is_positive].sum(0, dtype=np.float64)) / pairs
    size = np.bincount(strata)
    positive = np.bincount(strata, weights=is_positive)
    n_opponents = np.where(is_positive, (size - positive)[strata], positive[strata])[:, None]
    influence = ((sign * against - delta * n_opponents) / pairs).astype(np.float32)
    resampled = np.empty((n_resamples, values.shape[1]))
    # Poisson numbers from a table of 65,536: five times faster than drawing them, and all of this is drawing them.
    shares = np.cumsum(np.exp(-1.0) / np.cumprod(np.r_[1.0, np.arange(1.0, 12)]))
    extra_copies = np.searchsorted(shares, (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32) - 1
    step = max(1, CHUNK_ENTRIES // len(values))
    for first in range(0, n_resamples, step):
        shape = (min(step, n_resamples - first), len(values))
        extra = extra_copies[rng.integers(0, len(extra_copies), shape, dtype=np.uint16)]
        resampled[first : first + step] = delta + extra @ influence
    return resampled


def permutation_p(
    wins: Float32[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    strata: Int[np.ndarray, " n"],
    *,
    n_permutations: int,
    rng: np.random.Generator,
    focus: int | None = None,
) -> Float[np.ndarray, " c"]:
    """Two-sided p-value of each column: how often labels shuffled within their strata do as well as the real ones.

    The statistic is |z| of the rank sum of class `focus`, or without it the largest over the classes. A column stops at
    its hundredth defeat, which keeps its p-value exact; the smallest is 1 / (n_permutations + 1).

    Source: Besag & Clifford 1991, Biometrika 78(2), for the stopping; Phipson & Smyth 2010 for the +1.
    """
    order = np.argsort(strata, kind="stable")
    wins, labels, strata = wins[order], labels[order], strata[order]
    classes = [int(k) for k in np.unique(labels)] if focus is None else [focus]
    classes = classes[1:] if focus is None and len(classes) == 2 else classes  # the two are mirror images
    spread = np.stack([_permutation_sd(wins, labels == k, strata) for k in classes])
    observed = _largest_z([wins[labels == k].sum(0, dtype=np.float64) for k in classes], spread)
    p = np.ones(wins.shape[1])
    open_ = np.flatnonzero(spread.max(0, initial=0.0) > 0)
    defeats = np.zeros(len(open_), np.int64)
    edges = np.flatnonzero(np.r_[True, strata[1:] != strata[:-1], True])
    step = max(1, min(1024, CHUNK_ENTRIES // len(labels)))
    table = np.ascontiguousarray(wins[:, open_])
    for first in range(0, n_permutations, step):
        if not len(open_):
            break
        shuffled = _shuffled(labels, classes, edges, min(step, n_permutations - first), rng)
        reached = _largest_z([one @ table for one in shuffled], spread[:, None, open_])
        running = defeats + np.cumsum(reached >= observed[open_] * (1 - 1e-5), axis=0)  # float32 sums: ties are ties
        is_done = running[-1] >= STOP_AFTER
        draws = first + 1 + (running >= STOP_AFTER).argmax(0)
        p[open_] = np.where(is_done, STOP_AFTER / draws, (running[-1] + 1) / (first + len(running) + 1))
        is_done |= _is_clear(running[-1], first + len(running), wins.shape[1])
        if is_done.any():
            table, open_, running = table[:, ~is_done], open_[~is_done], running[:, ~is_done]
        defeats = running[-1]
    return p


def benjamini_hochberg(p: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """q-values: the smallest false discovery rate at which each is reported.

    Source: Benjamini & Hochberg 1995, J. R. Statist. Soc. B 57(1).
    """
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1.0)
    return q


def _permutation_sd(wins: np.ndarray, is_positive: np.ndarray, strata: np.ndarray) -> Float[np.ndarray, " c"]:
    """Standard deviation of the rank sum over all relabellings within strata; exact, ties included."""
    variance = np.zeros(wins.shape[1])
    for stratum in np.unique(strata):
        own = strata == stratum
        size, positive = int(own.sum()), int(is_positive[own].sum())
        if 0 < positive < size:
            squares = np.einsum("nc,nc->c", wins[own], wins[own], dtype=np.float64)
            variance += squares * positive * (size - positive) / (size * (size - 1))
    return np.sqrt(variance)


def _is_clear(defeats: Int64[np.ndarray, " o"], n_drawn: int, n_columns: int) -> np.ndarray:
    """Which columns are undefeated so often that their q-value is small whatever is drawn yet.

    Their p-value 1 / (n_drawn + 1) is what it would be had no more been asked for, so it stays honest.
    """
    undefeated = defeats == 0
    q = n_columns / max(1, int(undefeated.sum())) / (n_drawn + 1)
    clear: np.ndarray = undefeated & (n_drawn >= CLEAR_AFTER and q < CLEAR_Q)
    return clear


def _largest_z(sums: list[np.ndarray], spread: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.abs(np.stack(sums)) / spread
    largest: np.ndarray = np.nan_to_num(z, nan=0.0, posinf=0.0).max(0)
    return largest


def _shuffled(
    labels: Int[np.ndarray, " n"], classes: list[int], edges: Int64[np.ndarray, " s"], n: int, rng: np.random.Generator
) -> list[Float32[np.ndarray, "p n"]]:
    """For each class, `n` rows of ones where shuffled labels are of that class."""
    if len(classes) == 1:
        drawn = np.empty((n, len(labels)), np.float32)
        for start, stop in itertools.pairwise(edges):
            drawn[:, start:stop] = _subsets(stop - start, int((labels[start:stop] == classes[0]).sum()), n, rng)
        return [drawn]
    codes = np.tile(labels, (n, 1))
    for start, stop in itertools.pairwise(edges):
        codes[:, start:stop] = rng.permuted(codes[:, start:stop], axis=1)
    return [(codes == k).astype(np.float32) for k in classes]


def _subsets(size: int, wanted: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` uniform subsets of `wanted` among `size`, as ones.

    Independent coins, then the few too many or too few are set right at random: by symmetry exactly uniform, and
    five times faster than shuffling.
    """
    drawn = rng.random((n, size), dtype=np.float32) < wanted / size
    for row, surplus in zip(drawn, drawn.sum(1) - wanted, strict=True):
        if surplus:
            candidates = np.flatnonzero(row if surplus > 0 else ~row)
            row[rng.choice(candidates, abs(int(surplus)), replace=False, shuffle=False)] = surplus < 0
    return drawn
