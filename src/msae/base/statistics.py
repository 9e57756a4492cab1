"""The package's statistics: AUROC, Cliff's delta, intervals, permutation p-values, q-values.

Cliff's delta and its permutation test rest on one matrix, the *net wins*: for each row and column, the rows of its
stratum that are smaller less those that are larger. Summed over the rows of a class they are Cliff's delta times the
number of pairs, so that a permutation of hundreds of columns is one matrix product. docs/audit.md says what is tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from numpy.typing import ArrayLike, NDArray

Z_95 = NormalDist().inv_cdf(0.975)
"""Half-width of a two-sided 95 % interval, in standard errors."""
FEW_ROWS = 1024
"""With fewer, permutations are drawn from all that there are; with more, from a group that is quick to go through."""
N_BLOCKS, SMALLEST_BLOCK = 4, 8
"""Blocks of a stratum that are shifted by themselves, and the fewest rows of one."""
COPIED = 32
"""Columns that are copied at once."""
CACHED = 1 << 15
"""Numbers that are gone through at once: few enough to stay in a CPU's cache."""
FIRST, MOST = 1024, 8192
"""Permutations that are drawn first, and at most at once: each time as many as before."""
ENTRIES = 1 << 22
"""Sums held at once, 32 MB of them."""
STOP_AFTER = 100
"""A column that relabelled data have beaten so often is done: its p-value is known to a tenth of itself."""

SUMMED_ROWS = 4096
"""Rows summed at once."""

CLEAR_AFTER, CLEAR_Q = 2000, 0.005
"""Draws after which an undefeated column is done too, if its q-value is below this already."""


class Interval(NamedTuple):
    """Ends of 95 % intervals."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]


# --- Shares and means


def wilson(successes: ArrayLike, trials: ArrayLike) -> Interval:
    """95 % score intervals of shares, which hold at 0 and 1 too.

    scipy has the same for one share at a time; this takes a hundred thousand.

    Source: Wilson 1927, Journal of the American Statistical Association 22.
    """
    n = np.maximum(np.asarray(trials, dtype=np.float64), 1.0)
    p = np.asarray(successes, dtype=np.float64) / n
    centre = p + Z_95**2 / (2 * n)
    spread = Z_95 * np.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    scale = 1 + Z_95**2 / n
    return Interval(np.maximum((centre - spread) / scale, 0.0), np.minimum((centre + spread) / scale, 1.0))


def mean_interval(mean: float, variance: float, n: int, *, bounds: tuple[float, float]) -> tuple[float, float]:
    """95 % t interval of the mean of `n` values that lie within `bounds`; one value alone says nothing.

    Args:
        variance: Of the values about their mean, divided by `n`.
    """
    from scipy.special import stdtrit

    low, high = bounds
    if n < 2:
        return low, high
    half = float(stdtrit(n - 1, 0.975)) * (variance / (n - 1)) ** 0.5
    return max(low, mean - half), min(high, mean + half)


# --- AUROC


def aurocs(
    values: Float[np.ndarray, "n columns"], rows_with: Sequence[Sequence[int]]
) -> Float[np.ndarray, "columns groups"]:
    """For each column and group of rows: how probably a row of the group has more than another; ties count half.

    Args:
        rows_with: The rows of each group; neither none nor all of them.
    """
    from scipy.sparse import csr_array
    from scipy.stats import rankdata

    n_with = np.array([len(rows) for rows in rows_with])
    columns = np.concatenate([np.asarray(rows) for rows in rows_with])
    ends = np.concatenate([[0], n_with.cumsum()])
    contains = csr_array((np.ones(len(columns)), columns, ends), shape=(len(rows_with), len(values)))
    sums = np.asarray(contains @ rankdata(values, axis=0)).T
    return np.asarray((sums - n_with * (n_with + 1) / 2) / (n_with * (len(values) - n_with)))


def auroc_interval(
    value: ArrayLike,
    n_with: ArrayLike,
    n_without: ArrayLike,
    *,
    untied: ArrayLike = 1.0,
    standard_error: ArrayLike = 0.0,
) -> Interval:
    """95 % score intervals of AUROCs, which stay inside 0 to 1 and have a width even at 1.

    Args:
        untied: Share of the variance of ranks that equal values leave, in 0 to 1; 1 where all values differ.
        standard_error: Of `value`, estimated from the rows. Newcombe's own assumes that both classes are spread alike;
            where this one is larger, the interval is as much wider.

    Source: Newcombe 2006, doi:10.1002/sim.2324, method 5.
    """
    value, n_with, n_without = (np.asarray(one, dtype=np.float64) for one in (value, n_with, n_without))
    assumed = _newcombe_error(value, n_with, n_without)
    ratio = np.divide(standard_error, assumed, out=np.zeros_like(assumed), where=assumed > 0)
    reach = Z_95 * np.maximum(np.sqrt(untied), ratio)

    def end(outer: float) -> NDArray[np.float64]:
        inner, limit = value, np.full_like(assumed, outer)
        for _ in range(50):  # bisection: the distance in standard errors grows from `value` outwards
            middle = (inner + limit) / 2
            is_inside = np.abs(value - middle) <= reach * _newcombe_error(middle, n_with, n_without)
            inner, limit = np.where(is_inside, middle, inner), np.where(is_inside, limit, middle)
        return limit

    return Interval(end(0.0), end(1.0))


def _newcombe_error(value: NDArray[Any], n_with: NDArray[Any], n_without: NDArray[Any]) -> NDArray[np.float64]:
    """Hanley and McNeil's standard error, with both counts replaced by their mean where the shape is concerned."""
    extra = (n_with + n_without) / 2 - 1
    spread = 1 + extra * ((1 - value) / (2 - value) + value / (1 + value))
    return np.asarray(np.sqrt(value * (1 - value) * spread / (n_with * n_without)))


# --- Cliff's delta


class Ranked:
    """Columns whose values are sorted once, so that they can be ranked within any strata by counting.

    Only rows above a column's smallest value are sorted: an activation is 0 in most rows.
    """

    def __init__(self, *parts: Float[np.ndarray, "_ c"]) -> None:
        """`parts` are rows below one another."""
        n_columns = parts[0].shape[1]
        self.shape = (sum(map(len, parts)), n_columns)
        self._rows, self._is_larger = [], []
        for first in range(0, n_columns, COPIED):  # rows lie together in memory, and columns are read
            for column in np.concatenate([part[:, first : first + COPIED].T for part in parts], axis=1):
                rows = np.flatnonzero(column > column.min(initial=np.inf)).astype(np.int32)
                above = column[rows]
                order = np.argsort(above)
                self._rows.append(rows[order])
                self._is_larger.append(np.diff(above[order], prepend=-np.inf) > 0)

    @property
    def varying(self) -> Int64[np.ndarray, " v"]:
        """The columns with two different values."""
        return np.flatnonzero([len(rows) > 0 for rows in self._rows])

    def net_wins(
        self,
        strata: Int[np.ndarray, " n"],
        columns: Int64[np.ndarray, " k"] | None = None,
        order: Int64[np.ndarray, " n"] | None = None,
    ) -> Float32[np.ndarray, "n k"]:
        """For each entry, the entries of its column and stratum that are smaller less those that are larger.

        Args:
            columns: None takes all.
            order: Of the rows of the result; without it as they came.
        """
        strata, sizes = _numbered(strata)
        place = np.arange(len(strata))
        if order is not None:
            place[order] = np.arange(len(strata))
        columns = np.arange(self.shape[1]) if columns is None else columns
        wins = np.empty((len(columns), len(strata)), np.float32)  # a column at a time is written
        for own, column in zip(wins, columns.tolist(), strict=True):
            rows, net, lowest = self.wins_of(column, strata, sizes)
            own[place] = lowest[strata]
            own[place[rows]] = net
        return wins.T

    def wins_of(
        self, column: int, strata: Int[np.ndarray, " n"], sizes: Int64[np.ndarray, " s"]
    ) -> tuple[Int[np.ndarray, " m"], Int64[np.ndarray, " m"], Int64[np.ndarray, " s"]]:
        """The rows above the smallest value, their net wins, and those of all other rows of each stratum."""
        rows, is_larger = self._rows[column], self._is_larger[column]
        if len(sizes) == 1:
            ends = np.append(np.flatnonzero(is_larger), len(rows))
            ties = np.repeat(ends[:-1] + ends[1:], np.diff(ends))
            return rows, ties + (sizes[0] - 2 * len(rows)), np.array([-len(rows)])
        own = strata[rows]
        n_above = np.bincount(own, minlength=len(sizes))
        by_stratum = np.argsort(own, kind="stable")  # of 16 bits: a radix sort
        sorted_, value = own[by_stratum], np.cumsum(is_larger)[by_stratum]
        is_first = np.ones(len(rows), bool)
        is_first[1:] = (value[1:] != value[:-1]) | (sorted_[1:] != sorted_[:-1])
        ends = np.append(np.flatnonzero(is_first), len(rows))
        ties = (ends[:-1] + ends[1:])[np.cumsum(is_first) - 1]  # twice the middle place of the tied rows
        edges = np.append(0, np.cumsum(n_above))
        net = np.empty(len(rows), np.int64)
        net[by_stratum] = ties + (sizes - n_above - edges[:-1] - edges[1:])[sorted_]
        return rows, net, -n_above


class NetWins:
    """The net wins of some columns within strata, a column at a time."""

    def __init__(
        self,
        ranked: Ranked,
        strata: Int[np.ndarray, " n"],
        columns: Int64[np.ndarray, " k"] | None = None,
        weight: Float[np.ndarray, " n"] | None = None,
    ) -> None:
        """`weight` multiplies the rows; `columns` are all where none are given."""
        self._ranked, self._weight = ranked, weight
        self._strata, self._sizes = _numbered(strata)
        self._columns = np.arange(ranked.shape[1]) if columns is None else columns
        self._known: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, i: int) -> Float[np.ndarray, " n"]:
        if i not in self._known:
            rows, net, lowest = self._ranked.wins_of(int(self._columns[i]), self._strata, self._sizes)
            self._known[i] = rows, net.astype(np.int32), lowest
        rows, net, lowest = self._known[i]
        own: Float[np.ndarray, " n"] = lowest.astype(np.float64)[self._strata]
        own[rows] = net
        return own if self._weight is None else own * self._weight

    def __iter__(self) -> Iterator[Float[np.ndarray, " n"]]:
        return (self[i] for i in range(len(self)))


def _numbered(strata: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int64[np.ndarray, " s"]]:
    """The strata as small numbers from 0, and how many rows each has."""
    _, numbers, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    return numbers.astype(np.uint16 if len(sizes) < 1 << 16 else np.int64), sizes


def net_wins(values: Float[np.ndarray, "n c"], strata: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n c"]:
    """For each entry, the entries of its column and stratum that are smaller less those that are larger."""
    return Ranked(values).net_wins(strata)


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
    return None if pairs == 0 else sum_over(wins, is_positive) / pairs


def sum_over(wins: Float32[np.ndarray, "n c"], chosen: np.ndarray) -> Float[np.ndarray, " c"]:
    """The sums of the chosen rows, in float64 and without a copy of them all."""
    total = np.zeros(wins.shape[1])
    for first in range(0, len(wins), SUMMED_ROWS):
        own = slice(first, first + SUMMED_ROWS)
        total += wins[own][chosen[own]].sum(0, dtype=np.float64)
    return total


def cliffs_delta_interval(
    values: Float[np.ndarray, "n c"] | Ranked,
    is_positive: np.ndarray,
    strata: Int[np.ndarray, " n"],
    columns: Sequence[int] | Int[np.ndarray, " k"] | None = None,
) -> Interval:
    """95 % interval of Cliff's delta, which has a width even where every positive row has more than every other.

    In each stratum Newcombe's interval for the AUROC, corrected for ties and at least as wide as DeLong's standard
    error makes it. Where the classes are separated no spread can be estimated, and Feng and Cliff's bound holds:
    Wilson's for as many rows as the smaller class has. Over strata the distances from the ends are added in squares,
    weighted by pairs. There must be a pair.

    Args:
        columns: Of `values`; None takes all.

    Source: Newcombe 2006, doi:10.1002/sim.2324; DeLong et al. 1988, doi:10.2307/2531595; Feng & Cliff 2004,
    Journal of Modern Applied Statistical Methods 3(2); for the sum, Zou & Donner 2008, doi:10.1002/sim.3095.
    """
    return cliffs_delta_estimate(values, is_positive, strata, columns)[1]


def cliffs_delta_estimate(
    values: Float[np.ndarray, "n c"] | Ranked,
    is_positive: np.ndarray,
    strata: Int[np.ndarray, " n"],
    columns: Sequence[int] | Int[np.ndarray, " k"] | None = None,
) -> tuple[Float[np.ndarray, " k"], Interval]:
    """Cliff's delta and its interval (`cliffs_delta_interval`)."""
    ranked = values if isinstance(values, Ranked) else Ranked(values)
    strata, sizes = _numbered(strata)
    sides = 2 * strata.astype(np.int64) + np.asarray(is_positive, bool)
    sides, n_of = sides.astype(strata.dtype), np.bincount(sides, minlength=2 * len(sizes))
    columns = range(ranked.shape[1]) if columns is None else columns
    # Of each row its net wins over the other side of its stratum: sums and sums of squares, by side.
    total, squares, tied = (np.zeros((len(columns), len(n_of))) for _ in range(3))
    for place, column in enumerate(columns):
        rows, net, lowest = ranked.wins_of(column, strata, sizes)
        _, within, lowest_within = ranked.wins_of(column, sides, n_of)
        side = sides[rows]
        against, lowest_against = net - within, np.repeat(lowest, 2) - lowest_within
        n_lowest = n_of - np.bincount(side, minlength=len(n_of))
        for sums, above, others in (
            (total, against, lowest_against),
            (squares, np.square(against), np.square(lowest_against)),
            (tied, np.square(net), np.square(np.repeat(lowest, 2))),
        ):
            sums[place] = np.bincount(side, above, minlength=len(n_of)) + n_lowest * others
    delta, below, above = (np.zeros(len(columns)) for _ in range(3))
    pairs = (n_of[::2] * n_of[1::2]).sum()
    for stratum, size in enumerate(sizes.tolist()):
        without, with_ = 2 * stratum, 2 * stratum + 1
        n_without, n_with = int(n_of[without]), int(n_of[with_])
        few = min(n_with, n_without)
        if few == 0:
            continue
        # As in Mann and Whitney's test with ties; but that values are tied in few rows does not show that all are.
        untied = 3 * (tied[:, without] + tied[:, with_]) / (size**3 - size)
        untied = wilson(untied * few, few).high
        variance = np.zeros(len(columns))
        for side_, n, n_other in ((with_, n_with, n_without), (without, n_without, n_with)):
            if n > 1:
                spread = (squares[:, side_] - np.square(total[:, side_]) / n).clip(0) / (n - 1)
                variance += spread / n_other**2 / n
        here = total[:, with_] / (n_with * n_without)
        value = (here + 1) / 2
        ends = auroc_interval(value, n_with, n_without, untied=untied, standard_error=np.sqrt(variance) / 2)
        low, high = np.where(np.abs(here) == 1, wilson(few * value, few), ends)
        weight = n_with * n_without / pairs
        delta += weight * here
        below += np.square(weight * 2 * (value - low))
        above += np.square(weight * 2 * (high - value))
    return delta, Interval((delta - np.sqrt(below)).clip(-1), (delta + np.sqrt(above)).clip(max=1))


def difference_interval(
    first: NDArray[np.float64], of_first: Interval, second: NDArray[np.float64], of_second: Interval
) -> Interval:
    """95 % interval of `first - second`, two independent estimates with intervals of their own.

    Source: Zou & Donner 2008, doi:10.1002/sim.3095.
    """
    below = np.hypot(first - of_first.low, of_second.high - second)
    above = np.hypot(of_first.high - first, second - of_second.low)
    return Interval(first - second - below, first - second + above)


# --- p-values and q-values


def tail_p_values(values: Float[np.ndarray, " n"], null: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
    """The share of `null` that is at least as large as each value, never zero: (1 + count) / (1 + m).

    Source: Phipson and Smyth 2010, doi:10.2202/1544-6115.1585.
    """
    above = len(null) - np.searchsorted(np.sort(null), values, side="left")
    return (1.0 + above) / (1.0 + len(null))


def q_values(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Benjamini and Hochberg's q-values of one family of tests: the false discovery rate at which each is reported."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p)) if len(p) else p


class Permuted(NamedTuple):
    """What `permutation_test` finds."""

    sums: Float[np.ndarray, "k c"]
    """Of the columns over the rows of each class that is tested."""
    p: Float[np.ndarray, " c"]


def permutation_p(
    wins: Float[np.ndarray, "n c"] | NetWins,
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
    classes = [int(k) for k in np.unique(labels)] if focus is None else [focus]
    classes = classes[1:] if focus is None and len(classes) == 2 else classes  # the two are mirror images
    weights = np.stack([labels == k for k in classes]).astype(np.float64)
    return permutation_test(wins, weights, strata, n_permutations=n_permutations, rng=rng).p


def permutation_test(
    wins: Float[np.ndarray, "n c"] | NetWins,
    weights: Float[np.ndarray, "k n"],
    strata: Int[np.ndarray, " n"],
    *,
    n_permutations: int,
    rng: np.random.Generator,
) -> Permuted:
    """The sums of each column, weighed by each of `weights`, and how often weights shuffled within strata do as well.

    The statistic is the largest |z| of the `k` sums; the mean of a column over a stratum must be 0.
    """
    columns = wins.T if isinstance(wins, np.ndarray) else wins
    order = np.argsort(strata, kind="stable")
    ordered = strata[order]
    edges = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True])
    weights = weights[:, order]
    size = np.diff(edges)
    spare = np.add.reduceat(np.square(weights), edges[:-1], axis=1)
    spare -= np.square(np.add.reduceat(weights, edges[:-1], axis=1)) / size  # squares about the mean of the stratum
    sums, spread = np.empty((2, len(weights), len(columns)))
    for i, column in enumerate(columns):
        own = column[order].astype(np.float64)
        sums[:, i] = weights @ own
        squares = np.add.reduceat(np.square(own), edges[:-1])
        spread[:, i] = np.sqrt(spare @ (squares / np.maximum(size - 1, 1)))
    # A stratum of one weight adds 0 to every sum, however it is shuffled.
    low, high = (found.reduceat(weights, edges[:-1], axis=1) for found in (np.minimum, np.maximum))
    is_mixed = (high > low).any(0)
    kept = np.repeat(is_mixed, size)
    order, weights, edges = order[kept], weights[:, kept], np.append(0, np.cumsum(size[is_mixed]))
    make = _Products if len(order) < FEW_ROWS else _Shifts
    return Permuted(
        sums, _sequential_p(sums, spread, make(_Given(columns, weights, order, edges, rng)), n_permutations)
    )


def correlation_p(
    wins: Float[np.ndarray, "n c"] | NetWins,
    scores: Float[np.ndarray, " n"],
    *,
    n_permutations: int,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Spearman's correlation of each column with the scores, and its two-sided p-value by shuffling the scores.

    Args:
        wins: Net wins of one stratum.

    Source: Besag & Clifford 1991, Biometrika 78(2), for the stopping.
    """
    one = np.zeros(len(scores), np.int64)
    own = net_wins(scores[:, None], one).T.astype(np.float64)
    found = permutation_test(wins, own, one, n_permutations=n_permutations, rng=rng)
    columns = wins.T if isinstance(wins, np.ndarray) else wins
    squares = np.array([float(np.square(column, dtype=np.float64).sum()) for column in columns])
    length = np.sqrt(squares * np.square(own).sum())
    return np.divide(found.sums[0], length, out=np.zeros(len(length)), where=length > 0), found.p


def _sequential_p(
    sums: Float[np.ndarray, "k c"], spread: Float[np.ndarray, "k c"], shuffled: _Products | _Shifts, n_permutations: int
) -> Float[np.ndarray, " c"]:
    """p-values of the largest |z| of the sums over the k classes."""
    observed = _largest_z(sums, spread) * (1 - 1e-9)  # rounding: ties are ties
    n_classes, n_columns = sums.shape
    p, defeats = np.ones(n_columns), np.zeros(n_columns, np.int64)
    is_open = np.flatnonzero(spread.max(0, initial=0.0) > 0)
    n_drawn = 0
    while len(is_open) and n_drawn < n_permutations:
        n = min(max(n_drawn, FIRST), MOST, shuffled.most, n_permutations - n_drawn)
        shuffled.draw(n)
        for some in np.array_split(is_open, -(-len(is_open) * n_classes * n // ENTRIES)):
            reached = _largest_z(shuffled.sums(some), spread[:, some, None])
            running = defeats[some, None] + np.cumsum(reached >= observed[some, None], axis=1)
            draws = n_drawn + 1 + (running >= STOP_AFTER).argmax(1)
            defeats[some] = running[:, -1]
            p[some] = np.where(defeats[some] >= STOP_AFTER, STOP_AFTER / draws, (defeats[some] + 1) / (n_drawn + n + 1))
        n_drawn += n
        known = defeats[is_open]
        is_open = is_open[(known < STOP_AFTER) & ~_is_clear(known, n_drawn, n_columns)]
    return p


def _most_at_once(n_numbers: int) -> int:
    """Permutations that are held together, each of so many numbers."""
    return max(1, 4 * ENTRIES // max(1, n_numbers))


class _Given(NamedTuple):
    """What is shuffled, and how."""

    columns: Sequence[np.ndarray] | NetWins | np.ndarray
    weights: Float[np.ndarray, "k n"]
    """In the order of `order`."""
    order: Int64[np.ndarray, " n"]
    """The rows, stratum by stratum."""
    edges: Int64[np.ndarray, " s"]
    """Where each stratum begins in that order, and its end."""
    rng: np.random.Generator


class _Products:
    """Sums of few rows under permutations: products of matrices, many permutations and all columns at once."""

    def __init__(self, given: _Given) -> None:
        self.table = np.stack([column[given.order] for column in given.columns]).astype(np.float64)
        self.weights, self.edges, self.rng = given.weights, given.edges, given.rng
        self.most = _most_at_once(self.weights.size)

    def draw(self, n: int) -> None:
        """Shuffle the weights of each stratum `n` times."""
        order = np.tile(np.arange(self.weights.shape[1]), (n, 1))
        for start, stop in itertools.pairwise(self.edges.tolist()):
            order[:, start:stop] = self.rng.permuted(order[:, start:stop], axis=1)
        self.shuffled = [own[order].T for own in self.weights]

    def sums(self, columns: Int64[np.ndarray, " o"]) -> Float[np.ndarray, "k o p"]:
        """Of some columns, with the weights as they were drawn."""
        return np.stack([self.table[columns] @ own for own in self.shuffled])


class _Shifts:
    """Sums of many rows under permutations that a Fourier transform gives all at once.

    The rows of each stratum are put into one random order and divided into blocks; a permutation shifts each block in a
    circle. These are a group of so many elements that hardly any is drawn twice, and a permutation test is exact for
    any group of permutations. A column's sums at every shift of a block are its circular correlation with the weights;
    the sum at a permutation is one of these for each block.

    Source: Hemerik & Goeman 2018, doi:10.1007/s11749-017-0571-1.
    """

    def __init__(self, given: _Given) -> None:
        from scipy.fft import rfft

        self.columns, self.rng = given.columns, given.rng
        shuffled = np.concatenate([
            start + given.rng.permutation(stop - start) for start, stop in itertools.pairwise(given.edges.tolist())
        ])  # fmt: skip
        self.order = given.order[shuffled]
        self.sizes = np.concatenate([_block_sizes(int(size)) for size in np.diff(given.edges)])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.most = _most_at_once(len(self.sizes))
        n_runs = np.flatnonzero(np.r_[True, np.diff(self.sizes) != 0, True])
        self.runs = [  # blocks of one size beside each other are transformed together
            (slice(int(self.starts[first]), int(self.starts[last - 1] + self.sizes[last - 1])), int(self.sizes[first]))
            for first, last in itertools.pairwise(n_runs.tolist())
        ]
        own = given.weights[:, shuffled]
        self.weights = [np.conj(rfft(own[:, rows].reshape(len(own), -1, size))) for rows, size in self.runs]

    def draw(self, n: int) -> None:
        """Shift every block of the weights `n` times at random."""
        self.places = (self.starts + self.rng.integers(self.sizes, size=(n, len(self.sizes)))).T

    def sums(self, columns: Int64[np.ndarray, " o"]) -> Float[np.ndarray, "k o p"]:
        """Of some columns, with the weights as they were drawn."""
        from scipy.fft import irfft, rfft

        n_classes = len(self.weights[0])
        found = np.zeros((n_classes, len(columns), self.places.shape[1]))

        def add(some: slice) -> None:
            own = np.stack([self.columns[i][self.order] for i in columns[some].tolist()]).astype(np.float64)
            at = np.empty((n_classes, *own.shape))
            for (rows, size), theirs in zip(self.runs, self.weights, strict=True):
                product = rfft(own[:, rows].reshape(len(own), -1, size)) * theirs[:, None]
                at[..., rows] = irfft(product, size).reshape(n_classes, len(own), -1)
            for places in self.places:
                found[:, some] += at[..., places]

        size = max(1, CACHED // len(self.order))
        n_threads = max(1, min(torch.get_num_threads(), 4 * ENTRIES // (n_classes * max(CACHED, len(self.order)))))
        with ThreadPoolExecutor(n_threads) as pool:  # NumPy and SciPy let other threads run
            list(pool.map(add, (slice(first, first + size) for first in range(0, len(columns), size))))
        return found


def _block_sizes(size: int) -> list[int]:
    """Of the blocks that a stratum is divided into: `N_BLOCKS` alike and what is left, or one if it is small."""
    from scipy.fft import prev_fast_len

    if size < N_BLOCKS * SMALLEST_BLOCK:
        return [size]
    own = int(prev_fast_len(size // N_BLOCKS, real=True))
    left = size - N_BLOCKS * own
    return [own] * N_BLOCKS + ([left] if left else [])


def _is_clear(defeats: Int64[np.ndarray, " o"], n_drawn: int, n_columns: int) -> np.ndarray:
    """Which columns are undefeated so often that their q-value is small whatever is drawn yet.

    Their p-value 1 / (n_drawn + 1) is what it would be had no more been asked for, so it stays honest.
    """
    undefeated = defeats == 0
    q = n_columns / max(1, int(undefeated.sum())) / (n_drawn + 1)
    clear: np.ndarray = undefeated & (n_drawn >= CLEAR_AFTER and q < CLEAR_Q)
    return clear


def _largest_z(sums: Float[np.ndarray, "k ..."], spread: Float[np.ndarray, "k ..."]) -> np.ndarray:
    per_unit = np.divide(1, spread, out=np.zeros(spread.shape), where=spread > 0)
    largest: np.ndarray = (np.abs(sums) * per_unit).max(0)
    return largest
