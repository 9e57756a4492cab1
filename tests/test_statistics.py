"""Laws of the statistics: every formula against scipy, every pair counted, every relabelling tried."""

import itertools

import numpy as np
import pytest
import scipy.stats

from msae.base import statistics
from tests.oracles import naming as naming_oracle
from tests.oracles import statistics as oracle


def rows(n, c, *, seed=0, n_strata=2, n_classes=2):
    """Values of which most are 0, as activations are, with labels and strata."""
    rng = np.random.default_rng(seed)
    values = (rng.gamma(2, 1, (n, c)) * (rng.random((n, c)) < 0.4)).astype(np.float32)
    values[:, 0] = values[:, 0].round()  # ties above 0 too
    return values, rng.integers(0, n_classes, n), rng.integers(0, n_strata, n)


@pytest.mark.parametrize("n_strata", [1, 3])
def test_cliffs_delta_counts_every_pair(n_strata):
    values, labels, strata = rows(50, 3, n_strata=n_strata)
    found = statistics.cliffs_delta(statistics.net_wins(values, strata), labels == 1, strata)
    wanted = [oracle.cliffs_delta(column, labels == 1, strata) for column in values.T]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_cliffs_delta_is_one_when_every_positive_row_has_more_and_changes_sign_with_the_class():
    values = np.arange(6.0)[:, None]
    labels, strata = np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, int)
    wins = statistics.net_wins(values, strata)
    assert statistics.cliffs_delta(wins, labels == 1, strata) == 1
    assert statistics.cliffs_delta(wins, labels == 0, strata) == -1
    assert statistics.cliffs_delta(wins, labels == 2, strata) is None


@pytest.mark.parametrize("n_strata", [1, 2])
def test_permutation_p_is_the_exact_p_of_all_relabellings(n_strata):
    values, labels, strata = rows(9, 4, n_strata=n_strata, seed=3)
    wins = statistics.net_wins(values, strata)
    p = statistics.permutation_p(wins, labels, strata, n_permutations=20_000, rng=np.random.default_rng(0))
    wanted = [oracle.exact_p(column, labels == 1, strata) for column in values.T]
    # stopped at 100 defeats a p-value is known to a tenth of itself: four standard errors
    np.testing.assert_allclose(p, wanted, rtol=0.4, atol=0.005)


def test_a_class_that_is_focused_on_is_that_class_against_the_rest():
    values, labels, strata = rows(40, 3, n_classes=3)
    wins = statistics.net_wins(values, strata)
    draw = {"strata": strata, "n_permutations": 300}
    one = statistics.permutation_p(wins, labels, focus=2, rng=np.random.default_rng(0), **draw)
    other = statistics.permutation_p(wins, (labels == 2).astype(int), rng=np.random.default_rng(0), **draw)
    assert np.array_equal(one, other)


def shuffled_labels(kind, labels, strata, n_permutations):
    """The labels under the permutations that a generator of seed 7 draws, one after another."""
    order = np.argsort(strata, kind="stable")
    edges = np.flatnonzero(np.r_[True, np.diff(strata[order]) > 0, True])
    rng = np.random.default_rng(7)
    given = np.empty((0, len(labels)), np.float32), np.zeros((1, len(labels))), order, edges, rng
    shuffles = kind(statistics._Given(*given)) if kind is statistics._Shifts else None
    for n in (statistics.FIRST, n_permutations - statistics.FIRST):
        if shuffles is None:
            drawn = np.tile(np.arange(len(labels)), (n, 1))
            for start, stop in itertools.pairwise(edges.tolist()):
                drawn[:, start:stop] = rng.permuted(drawn[:, start:stop], axis=1)
            for own in drawn:
                some = np.empty_like(labels)
                some[order] = labels[order][own]
                yield some
            continue
        for shifts in rng.integers(shuffles.sizes, size=(n, len(shuffles.sizes))):
            some = np.empty_like(labels)
            for start, size, shift in zip(shuffles.starts, shuffles.sizes, shifts, strict=True):
                own = shuffles.order[start : start + size]
                some[np.roll(own, -shift)] = labels[own]
            yield some


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("n_strata", [1, 3])
@pytest.mark.parametrize(("n", "kind"), [(60, statistics._Products), (1030, statistics._Shifts)])
def test_all_permutations_at_once_give_the_p_values_of_one_after_another(n, kind, n_strata, n_classes):
    values, labels, strata = rows(n, 25, n_classes=n_classes, n_strata=n_strata, seed=4)
    values[labels == 1, 1:9] += 0.7 * (60 / n) ** 0.5
    values[:, -1] = 1.0  # nothing to rank
    shuffled = list(shuffled_labels(kind, labels, strata, 1500))
    assert all(np.array_equal(np.bincount(4 * strata + some), np.bincount(4 * strata + labels)) for some in shuffled)
    wanted = oracle.permutation_p(values, labels, strata, shuffled)
    for wins in (statistics.net_wins(values, strata), statistics.NetWins(statistics.Ranked(values), strata)):
        found = statistics.permutation_p(wins, labels, strata, n_permutations=1500, rng=np.random.default_rng(7))
        np.testing.assert_allclose(found[:-1], wanted[:-1], rtol=1e-12)
    assert found[-1] == 1
    assert {bool(one) for one in found > 100 / 1500} == {True, False}  # some stopped early, some did not


def test_blocks_of_shifts_hold_each_row_once_and_are_many():
    for size in (1, 2, 31, 32, 120, 127, 128, 1024, 100_003):
        sizes = statistics._block_sizes(size)
        shifts = np.prod(np.array(sizes, float))
        assert sum(sizes) == size and shifts >= (size if size < 32 else max(4096, size**3 / 1000))


@pytest.mark.parametrize("n_mixed", [30, 60, 120])
@pytest.mark.parametrize("n_constant", [0, 800, 1000, 3000])
def test_rows_that_say_nothing_do_not_hide_an_association(n_constant, n_mixed):
    """A stratum of one label is no evidence, however large it is."""
    rng = np.random.default_rng(0)
    labels = np.r_[np.zeros(n_constant, int), np.arange(n_mixed) % 2]
    strata = np.r_[np.zeros(n_constant, int), np.ones(n_mixed, int)]
    values = rng.random((len(labels), 30))
    values[:, 0] = labels + 0.1 * values[:, 0]
    p = statistics.permutation_p(
        statistics.net_wins(values, strata), labels, strata, n_permutations=8000, rng=np.random.default_rng(1)
    )
    assert p[0] < 0.001 and (p[1:] > 0.001).all()


@pytest.mark.parametrize("n_rows", [1000, 20_000])
def test_no_more_permutations_are_held_than_memory_is_meant_for(n_rows):
    import tracemalloc

    labels = np.arange(n_rows) % 16
    strata = np.arange(n_rows) // 2 if n_rows > 1024 else np.zeros(n_rows, int)
    values = np.random.default_rng(0).random((n_rows, 1))
    wins = statistics.net_wins(values, strata)
    tracemalloc.start()
    statistics.permutation_p(wins, labels, strata, n_permutations=20_000, rng=np.random.default_rng(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 900 * 2**20


@pytest.mark.parametrize("n", [400, 1500])
def test_correlations_are_scipys_and_so_are_their_p_values(n):
    values, _, _ = rows(n, 12, seed=6)
    scores = np.random.default_rng(0).normal(size=n) + 0.06 * values[:, 1]
    wins = statistics.NetWins(statistics.Ranked(values), np.zeros(n, int))
    rho, p = statistics.correlation_p(wins, scores, n_permutations=20_000, rng=np.random.default_rng(0))
    wanted = [scipy.stats.spearmanr(column, scores) for column in values.T]
    np.testing.assert_allclose(rho, [one.statistic for one in wanted], atol=1e-12)
    np.testing.assert_allclose(p, [one.pvalue for one in wanted], rtol=0.4, atol=0.005)  # four standard errors


def test_ranks_in_any_strata_are_scipys():
    values, _, strata = rows(200, 6, n_strata=4, seed=2)
    values[:, 1] -= 1  # the smallest value need not be 0
    values[:, 2] = np.random.default_rng(0).normal(size=200)
    ranked = statistics.Ranked(values)
    for some in (strata, np.zeros(200, int), strata * 100 - 7):
        wins = ranked.net_wins(some)
        for stratum in np.unique(some):
            own = some == stratum
            np.testing.assert_array_equal(wins[own], 2 * scipy.stats.rankdata(values[own], axis=0) - (own.sum() + 1))


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("n", [400, 1200])
def test_p_values_of_shuffled_labels_are_uniform(n, n_classes):
    values, labels, strata = rows(n, 500, seed=5, n_classes=n_classes)
    wins = statistics.net_wins(values, strata)
    p = statistics.permutation_p(wins, labels, strata, n_permutations=1000, rng=np.random.default_rng(1))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01  # fails for one seed in a hundred; this one passes
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.03)


def test_separated_classes_of_few_rows_have_an_interval_and_not_a_point():
    values, labels = np.arange(7.0, dtype=np.float32)[:, None], np.arange(7) >= 4
    found = statistics.cliffs_delta_interval(values, labels, np.zeros(7, int))
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    assert found.low[0] == pytest.approx((3 - z2) / (3 + z2)) == pytest.approx(-0.1230, abs=1e-4)  # Feng and Cliff 2004
    assert found.high[0] == 1.0
    # the exact test says the same: 2 of the 35 relabellings do as well, so 0 is not excluded
    assert oracle.exact_p(values[:, 0], labels, np.zeros(7, int)) == pytest.approx(2 / 35)
    mirrored = statistics.cliffs_delta_interval(-values, labels, np.zeros(7, int))
    assert (mirrored.low[0], mirrored.high[0]) == (-1.0, pytest.approx(-found.low[0], abs=1e-9))


def test_more_separated_rows_make_the_interval_narrower():
    lows = []
    for n in (2, 5, 20, 100):
        values, labels = np.arange(2.0 * n, dtype=np.float32)[:, None], np.arange(2 * n) >= n
        lows.append(statistics.cliffs_delta_interval(values, labels, np.zeros(2 * n, int)).low[0])
    assert lows == sorted(lows) and -1 < lows[0] < 0 and 0.9 < lows[-1] < 1


@pytest.mark.parametrize("n_strata", [1, 3])
def test_the_interval_of_many_rows_is_at_least_that_of_drawing_them_again(n_strata):
    values, labels, strata = rows(250, 2, n_strata=n_strata, seed=1)
    values[labels == 1, 1] += 0.5
    found = statistics.cliffs_delta_interval(values, labels == 1, strata)
    for column in range(2):
        low, high = oracle.bootstrap_interval(values[:, column], labels == 1, strata, n_resamples=1000, seed=0)
        # the ends of 1,000 resamples wander by some 4 % of the width
        assert 0.92 <= (found.high[column] - found.low[column]) / (high - low) <= 1.2
        assert found.low[column] == pytest.approx(low, abs=0.15 * (high - low))
        assert found.high[column] == pytest.approx(high, abs=0.15 * (high - low))


def test_the_interval_of_a_latent_that_rarely_fires_is_not_that_of_values_without_ties():
    rng = np.random.default_rng(0)
    values = (rng.random((1000, 1)) < 0.05) * rng.random((1000, 1))
    labels, one = rng.random(1000) < 0.3, np.zeros(1000, int)
    found = statistics.cliffs_delta_interval(values, labels, one)
    low, high = oracle.bootstrap_interval(values[:, 0], labels, one, n_resamples=400, seed=0)
    assert 1 <= (found.high[0] - found.low[0]) / (high - low) <= 1.3  # 2.6 without the correction for ties


@pytest.mark.parametrize(("n_with", "n_without"), [(3, 4), (5, 60), (15, 15), (40, 200)])
@pytest.mark.parametrize("kind", ["shifted", "rarely above 0", "much above 0", "on both sides"])
def test_the_interval_covers_the_truth_in_95_of_100_samples(kind, n_with, n_without):
    rng = np.random.default_rng(0)

    def drawn(n_columns):
        with_, without = rng.normal(size=(n_with, n_columns)), rng.normal(size=(n_without, n_columns))
        if kind == "shifted":
            with_ += 1
        elif kind == "rarely above 0":
            with_, without = np.maximum(with_, 0.5), np.maximum(without, 2.0) - 1.5
        elif kind == "much above 0":
            with_, without = (with_ > -1) * np.exp(with_), (without > 1) * np.exp(without)
        else:
            with_ = np.where(with_ > 0.5, 5.0, -5.0)
        return np.concatenate([with_, without])

    labels, one = np.arange(n_with + n_without) < n_with, np.zeros(n_with + n_without, int)
    many = drawn(4000)
    truth = statistics.cliffs_delta(statistics.net_wins(many, one), labels, one).mean()
    found = statistics.cliffs_delta_interval(drawn(1000), labels, one)
    covered = np.mean((found.low <= truth) & (found.high >= truth))
    assert covered >= 0.92  # .95 less three standard errors of 1,000 samples and what 5 against 60 rows lack


def test_the_interval_over_strata_of_one_is_that_of_the_one():
    values, labels, _ = rows(30, 3)
    alone = statistics.cliffs_delta_interval(values, labels == 1, np.zeros(30, int))
    empty = np.where(np.arange(32) < 30, 0, 1)  # a second stratum without a pair
    beside = statistics.cliffs_delta_interval(
        np.r_[values, np.ones((2, 3), np.float32)], np.r_[labels, 0, 0] == 1, empty
    )
    np.testing.assert_allclose(alone.low, beside.low)
    np.testing.assert_allclose(alone.high, beside.high)


def test_the_difference_of_two_normal_intervals_is_the_normal_interval_of_the_difference():
    first, second = (
        statistics.Interval(np.array([0.0]), np.array([6.0])),
        statistics.Interval(*np.array([[1.0], [9.0]])),
    )
    found = statistics.difference_interval(np.array([3.0]), first, np.array([5.0]), second)
    assert (found.low[0], found.high[0]) == (-7.0, 3.0)  # -2 and the root of 3² + 4²


def test_mean_interval_is_students_and_one_value_says_nothing():
    values = np.array([0.1, -0.2, 0.4, 0.3])
    low, high = statistics.mean_interval(values.mean(), values.var(), 4, bounds=(-1, 1))
    wanted = scipy.stats.t.interval(0.95, 3, values.mean(), scipy.stats.sem(values))
    assert (low, high) == pytest.approx(wanted)
    assert statistics.mean_interval(0.3, 0.0, 1, bounds=(-1, 1)) == (-1, 1)


def test_wilson_intervals_are_scipys():
    hits, trials = np.array([0, 1, 7, 20, 20, 350]), np.array([20, 20, 20, 20, 21, 400])
    found = statistics.wilson(hits, trials)
    for k, n, low, high in zip(hits, trials, *found, strict=True):
        exact = scipy.stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((exact.low, exact.high), abs=1e-12)


# --- AUROC and q-values


def test_aurocs_count_pairs_and_ties_as_half():
    rng = np.random.default_rng(1)
    z = rng.integers(0, 4, (40, 5)).astype(np.float32)  # few values: many ties
    rows = [[0], [3, 4, 5], list(range(0, 40, 2))]
    found = statistics.aurocs(z, rows)
    for latent, word in np.ndindex(found.shape):
        assert found[latent, word] == pytest.approx(naming_oracle.auroc(z[:, latent], rows[word]), abs=1e-12)


@pytest.mark.parametrize("value", [0.2, 0.5, 0.7, 0.97])
@pytest.mark.parametrize(("n_with", "n_without"), [(5, 40), (200, 3000)])
def test_auroc_interval_solves_newcombes_equation(value, n_with, n_without):
    low, high = statistics.auroc_interval(np.array([value]), np.array([n_with]), np.array([n_without]))
    assert (low[0], high[0]) == pytest.approx(naming_oracle.newcombe_interval(value, n_with, n_without), abs=1e-9)


def test_auroc_interval_has_a_width_at_one_and_stays_inside():
    low, high = statistics.auroc_interval(np.array([1.0, 0.0]), np.array([8, 8]), np.array([50, 50]))
    assert 0.5 < low[0] < 0.99 and high[0] == 1.0
    assert low[1] == 0.0 and 0.01 < high[1] < 0.5


def test_auroc_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    n_with, n_without, repeats = 30, 300, 400
    values = np.array(
        [
            oracle_free_auroc(rng.normal(1.0, 1, n_with), rng.normal(0, 1, n_without))  # true AUROC .7602
            for _ in range(repeats)
        ]
    )
    low, high = statistics.auroc_interval(values, np.full(repeats, n_with), np.full(repeats, n_without))
    covered = np.mean((low <= 0.7602) & (high >= 0.7602))
    assert 0.92 <= covered <= 0.985  # .95, three standard errors of 400 repeats either side


def oracle_free_auroc(a, b):
    return (a[:, None] > b[None, :]).mean()


def test_q_values_are_benjamini_hochbergs():
    p = np.random.default_rng(3).random(30) ** 3
    assert statistics.q_values(p) == pytest.approx(naming_oracle.benjamini_hochberg(list(p)))
    assert len(statistics.q_values(np.array([]))) == 0


def test_tail_p_values_count_the_null_and_are_never_zero():
    rng = np.random.default_rng(4)
    null, values = rng.integers(0, 9, 50).astype(np.float32), np.arange(12, dtype=np.float32)
    assert statistics.tail_p_values(values, null) == pytest.approx([(1 + sum(null >= v)) / 51 for v in values])
