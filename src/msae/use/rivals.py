"""Which concepts are of one kind, read off where they occur: a scene has one background, a car one colour."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PRESENT = 0.5
"""A concept is present in a row from this share of its 99th percentile on; weaker activations are noise."""
LIFT = 0.5
"""Two concepts exclude each other where they meet in less than this share of the rows that chance would give."""
SIGMAS = 3.0
"""And where that is this many standard deviations below chance."""


def is_present(strength: Float[Tensor, "n c"]) -> Bool[Tensor, "n c"]:
    """Where each concept is clearly present."""
    threshold = torch.stack([_p99(column) for column in strength.unbind(1)])
    return (strength > PRESENT * threshold) & (strength > 0)


def excluded_by(mine: Bool[Tensor, " n"], theirs: Bool[Tensor, "n c"]) -> Bool[Tensor, " c"]:
    """Which concepts are missing where mine is present, by far more than chance allows.

    The number of rows in which two independent concepts meet is hypergeometric; its mean and variance decide.
    """
    n = len(mine)
    a, b = mine.double().sum(), theirs.double().sum(0)
    both = (theirs & mine.unsqueeze(1)).double().sum(0)
    mean = a * b / n
    deviation = (mean * (1 - a / n) * (1 - b / n)).sqrt()
    return (both < LIFT * mean) & (both < mean - SIGMAS * deviation)


def _p99(strength: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    firing = strength[strength > 0]
    return firing.quantile(0.99) if len(firing) else strength.new_tensor(torch.inf)
