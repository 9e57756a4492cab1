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


def permutation_p(values, labels, strata, relabellings, *, stop_after=100):
    """One permutation and one column after the other, until a column is beaten `stop_after` times.

    Args:
        relabellings: Shuffled labels, each of as many rows as `labels`.

    Source: Besag & Clifford 1991, Biometrika 78(2).
    """
    classes = np.unique(labels)
    found = []
    for column in values.T:
        smaller = (column[None] < column[:, None]) & (strata[None] == strata[:, None])
        larger = (column[None] > column[:, None]) & (strata[None] == strata[:, None])
        wins = (smaller.sum(1) - larger.sum(1)).astype(np.float64)
        sd = {}
        for k in classes:
            own = [(strata == s) for s in np.unique(strata)]
            counts = [(rows.sum(), (labels[rows] == k).sum()) for rows in own]
            sd[k] = (
                sum(
                    (wins[rows] ** 2).sum() * a * (n - a) / (n * (n - 1))
                    for rows, (n, a) in zip(own, counts, strict=True)
                    if 0 < a < n
                )
                ** 0.5
            )

        def largest(some, wins=wins, sd=sd):
            return max((abs(wins[some == k].sum()) / sd[k] for k in classes if sd[k] > 0), default=0.0)

        observed, defeats, p = largest(labels), 0, None
        for n, some in enumerate(relabellings, 1):
            defeats += largest(some) >= observed * (1 - 1e-9)
            if defeats == stop_after:
                p = stop_after / n
                break
        found.append((defeats + 1) / (len(relabellings) + 1) if p is None else p)
    return np.array(found)
