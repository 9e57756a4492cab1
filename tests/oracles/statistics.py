"""Slow, obvious effect sizes and p-values: every pair counted, every relabelling tried.

Source: Cliff 1993, Psychological Bulletin 114(3); Fisher 1935, The Design of Experiments, for the exact test.
"""

import itertools

import numpy as np


def cliffs_delta(values, is_positive, strata):
    """Pairs of one stratum won by the positive row less those lost, over all of them."""
    won = n = 0
    for i, j in itertools.product(range(len(values)), repeat=2):
        if is_positive[i] and not is_positive[j] and strata[i] == strata[j]:
            won += np.sign(values[i] - values[j])
            n += 1
    return won / n


def exact_p(values, is_positive, strata):
    """Share of all relabellings within strata whose |delta| is at least the observed one."""
    observed = abs(cliffs_delta(values, is_positive, strata))
    ways = []
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        ways.append([set(some) for some in itertools.combinations(rows, int(is_positive[rows].sum()))])
    reached = []
    for chosen in itertools.product(*ways):
        labels = np.array([any(row in some for some in chosen) for row in range(len(values))])
        reached.append(abs(cliffs_delta(values, labels, strata)) >= observed - 1e-12)
    return float(np.mean(reached))


def bootstrap_interval(values, is_positive, strata, *, n_resamples, seed):
    """Percentiles of delta over rows drawn with replacement, each resample ranked anew."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_resamples):
        rows = rng.integers(0, len(values), len(values))
        v, pos, s = values[rows], is_positive[rows], strata[rows]
        pair = (pos[:, None] & ~pos[None]) & (s[:, None] == s[None])
        found.append((np.sign(v[:, None] - v[None]) * pair).sum() / pair.sum())
    return np.quantile(found, [0.025, 0.975])
