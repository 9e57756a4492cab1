"""Slow and obvious versions of what names rest on. Sources: docs/naming.md and the docstrings of `base.statistics`."""

import itertools

import numpy as np
from scipy.optimize import brentq


def cosine(a, b):
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def poster_columns(decoder, words):
    """The counts of the poster's rule and the valid latents, by loops: Zaigrajew et al. 2025, arXiv:2502.20578."""
    best, ratio_ok, near, own = [], [], [], []
    for row in decoder:
        cosines = [cosine(row, word) for word in words]
        order = sorted(range(len(words)), key=lambda i: -cosines[i])
        first, second = cosines[order[0]], cosines[order[1]]
        best.append(order[0])
        near.append(first > 0.42)
        ratio_ok.append(second <= 0 or first / second > 2.0)
    own = [best.count(word) == 1 for word in best]
    valid = [i for i in range(len(decoder)) if near[i] and ratio_ok[i] and own[i]]
    both = sum(a and b for a, b in zip(near, ratio_ok, strict=True))
    counts = {"cosine": sum(near), "ratio": sum(ratio_ok), "cosine_and_ratio": both, "unique": sum(own)}
    return {**counts, "valid": len(valid)}, {i: best[i] for i in valid}


def auroc(activations, rows_with):
    """Every pair of a row with and a row without the word, counted: Mann and Whitney 1947."""
    others = set(range(len(activations))) - set(rows_with)
    won = [
        1.0 if activations[a] > activations[b] else 0.5 if activations[a] == activations[b] else 0.0
        for a, b in itertools.product(rows_with, others)
    ]
    return sum(won) / len(won)


def newcombe_interval(value, n_with, n_without):
    """Where |value - t| equals 1.96 standard errors at t: Newcombe 2006, method 5, solved by a root finder."""

    def excess(t):
        extra = (n_with + n_without) / 2 - 1
        variance = t * (1 - t) * (1 + extra * (1 - t) / (2 - t) + extra * t / (1 + t)) / (n_with * n_without)
        return abs(value - t) - 1.959963984540054 * np.sqrt(variance)

    tiny = 1e-12
    low = brentq(excess, tiny, value - tiny) if value > 0.01 else 0.0
    high = brentq(excess, value + tiny, 1 - tiny) if value < 0.99 else 1.0
    return low, high


def benjamini_hochberg(p):
    """min over larger p-values of n p / rank: Benjamini and Hochberg 1995."""
    n = len(p)
    order = sorted(range(n), key=lambda i: p[i])
    return [min(n * p[j] / (order.index(j) + 1) for j in order if p[j] >= p[i]) for i in range(n)]
