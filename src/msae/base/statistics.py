"""The package's statistics: AUROC, Cliff's delta, intervals, permutation p-values, q-values.

Cliff's delta and its permutation test rest on one matrix, the *net wins*: for each row and column, the rows of its
stratum that are smaller less those that are larger. Summed over the rows of a class they are Cliff's delta times the
number of pairs, so that a permutation of hundreds of columns is one matrix product. docs/audit.md says what is tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int64
from numpy.typing import ArrayLike, NDArray

Z_95 = NormalDist().inv_cdf(0.975)
"""Half-width of a two-sided 95 % interval, in standard errors."""
CHUNK_ENTRIES = 1 << 24
"""Relabelled rows held at once, 64 MB of them."""
STOP_AFTER = 100
"""A column that relabelled data have beaten so often is done: its p-value is known to a tenth of itself."""

KEPT = 0.5
"""Columns that are done are taken out of the table once fewer than this share of it are open: until then a copy costs
more than their sums."""
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

    def __init__(self, values: Float[np.ndarray, "n c"]) -> None:
        self.shape = values.shape
        self._rows, self._is_larger = [], []
        for column in values.T:
            rows = np.flatnonzero(column > column.min(initial=np.inf)).astype(np.int32)
            rows = rows[np.argsort(column[rows])]
            self._rows.append(rows)
            self._is_larger.append(np.diff(column[rows], prepend=-np.inf) > 0)

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
    if (np.diff(strata) < 0).any():
        order = np.argsort(strata, kind="stable")
        wins, labels, strata = wins[order], labels[order], strata[order]
    classes = [int(k) for k in np.unique(labels)] if focus is None else [focus]
    classes = classes[1:] if focus is None and len(classes) == 2 else classes  # the two are mirror images
    edges = np.flatnonzero(np.r_[True, strata[1:] != strata[:-1], True])
    spread = np.stack([_permutation_sd(wins, labels == k, edges) for k in classes])
    observed = _largest_z([sum_over(wins, labels == k) for k in classes], spread)
    return _sequential_p(wins, observed, spread, relabelled(labels, classes, edges, n_permutations, rng))


def correlation_p(
    wins: Float32[np.ndarray, "n c"],
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
    own = net_wins(scores[:, None], np.zeros(len(scores), np.int64))[:, 0]
    squares = np.einsum("nc,nc->c", wins, wins, dtype=np.float64) * np.square(own, dtype=np.float64).sum()
    products = own.astype(np.float64) @ wins
    rho = np.divide(products, np.sqrt(squares), out=np.zeros(wins.shape[1]), where=squares > 0)
    spread = np.sqrt(squares / (len(scores) - 1))[None]
    step = max(1, min(1024, CHUNK_ENTRIES // len(scores)))
    shuffled = (
        [rng.permuted(np.tile(own, (min(step, n_permutations - first), 1)), axis=1)]
        for first in range(0, n_permutations, step)
    )
    return rho, _sequential_p(wins, _largest_z([products], spread), spread, shuffled)


def _sequential_p(
    wins: Float32[np.ndarray, "n c"],
    observed: Float[np.ndarray, " c"],
    spread: Float[np.ndarray, "k c"],
    blocks: Iterable[list[Float32[np.ndarray, "p n"]]],
) -> Float[np.ndarray, " c"]:
    """p-values of `observed`, the largest |z| over some sums of rows: products with `wins` of shuffled weights."""
    p = np.ones(wins.shape[1])
    table, columns = wins, np.arange(wins.shape[1])
    is_open = spread.max(0, initial=0.0) > 0
    defeats = np.zeros(len(columns), np.int64)
    n_drawn = 0
    for shuffled in blocks:
        if is_open.sum() < KEPT * len(columns) or not is_open.any():
            table, columns, defeats = table.T[is_open].T, columns[is_open], defeats[is_open]
            is_open = is_open[is_open]
        if not len(columns):
            break
        reached = _largest_z([one @ table for one in shuffled], spread[:, None, columns])
        running = defeats + np.cumsum(reached >= observed[columns] * (1 - 1e-5), axis=0)  # float32 sums: ties are ties
        is_done = running[-1] >= STOP_AFTER
        draws = n_drawn + 1 + (running >= STOP_AFTER).argmax(0)
        n_drawn += len(running)
        found = np.where(is_done, STOP_AFTER / draws, (running[-1] + 1) / (n_drawn + 1))
        p[columns[is_open]] = found[is_open]
        is_open &= ~is_done & ~_is_clear(running[-1], n_drawn, wins.shape[1])
        defeats = running[-1]
    return p


def _permutation_sd(
    wins: np.ndarray, is_positive: np.ndarray, edges: Int64[np.ndarray, " s"]
) -> Float[np.ndarray, " c"]:
    """Standard deviation of the rank sum over all relabellings within strata; exact, ties included."""
    variance = np.zeros(wins.shape[1])
    for start, stop in itertools.pairwise(edges.tolist()):
        size, positive = stop - start, int(is_positive[start:stop].sum())
        if 0 < positive < size:
            own = wins[start:stop]
            squares = np.einsum("nc,nc->c", own, own, dtype=np.float64)
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


def relabelled(
    labels: Int[np.ndarray, " n"],
    classes: Sequence[int],
    edges: Int64[np.ndarray, " s"],
    n_permutations: int,
    rng: np.random.Generator,
) -> Iterator[list[Float32[np.ndarray, "p n"]]]:
    """Shuffled labels, many permutations at a time: for each class, rows of ones where they are of that class.

    Args:
        edges: Where the strata begin and end; labels are shuffled between each two.
    """
    step = max(1, min(1024, CHUNK_ENTRIES // len(labels)))
    for first in range(0, n_permutations, step):
        n = min(step, n_permutations - first)
        if len(classes) == 1:
            drawn = np.empty((n, len(labels)), np.float32)
            for start, stop in itertools.pairwise(edges.tolist()):
                wanted = int((labels[start:stop] == classes[0]).sum())
                drawn[:, start:stop] = _subsets(stop - start, wanted, n, rng)
            yield [drawn]
        else:
            codes = np.tile(labels, (n, 1))
            for start, stop in itertools.pairwise(edges.tolist()):
                codes[:, start:stop] = rng.permuted(codes[:, start:stop], axis=1)
            yield [(codes == k).astype(np.float32) for k in classes]


def _subsets(size: int, wanted: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` uniform subsets of `wanted` among `size`, as truth values.

    Independent coins of a byte each, then the few too many or too few are set right at random places: no row is
    preferred, so each subset is as likely as any other; and it is many times faster than shuffling.
    """
    if wanted in (0, size):
        return np.full((n, size), wanted > 0)
    share = min(max(round(256 * wanted / size), 1), 255)
    has = np.frombuffer(rng.bytes(n * size), np.uint8).reshape(n, size) < share
    while (missing := wanted - np.count_nonzero(has, axis=1)).any():
        rows = np.flatnonzero(missing)
        n_flips, is_surplus = np.abs(missing[rows])[:, None], missing[rows, None] < 0
        rows = rows[:, None]
        places = rng.integers(size, size=(len(rows), 2 * int(n_flips.max()) + 8))
        is_new = np.zeros(places.shape, bool)
        is_new.flat[np.unique(rows * size + places, return_index=True)[1]] = True
        fits = is_new & (has[rows, places] == is_surplus)
        fits &= np.cumsum(fits, axis=1) <= n_flips
        has[np.broadcast_to(rows, places.shape)[fits], places[fits]] ^= True
    return has
