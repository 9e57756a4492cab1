"""Plain ReLU with many latents active: when dense products cost less than gathering, and the loops between them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from msae.sae.kernels.loops import INFINITY, Array, compiled
from msae.sae.kernels.selection import Selection

WORTHWHILE = 0.35
"""Share of positive pre-activations from which on dense products are cheaper, on one core of a Xeon with AVX-512."""


def is_worthwhile(h: Array, selection: Selection) -> bool:
    """Whether so many pre-activations, judged by some of the rows, take part in one plain reconstruction."""
    if selection != Selection():
        return False
    some = h[:: math.ceil(len(h) / 64)]
    return int(np.count_nonzero(some > 0)) > WORTHWHILE * some.size


@compiled
def rectify_rows(h: Array, cap: float, fired: Array, active: Array, sums: Array, start: int, stop: int) -> Any:
    """ReLU, and where `cap` is not 0 `cap * tanh(z / cap)`, in place; the smallest positive bits; False for a NaN.

    Args:
        fired: To be marked: latents that are active in some row.
        active: To be filled: active latents of each row.
        sums: To be filled: sum of the activations of each row.
    """
    smallest, largest = INFINITY, np.int32(0)
    strongest = np.zeros(h.shape[1], np.int32)
    for b in range(start, stop):
        row = h[b]
        bits = row.view(np.int32)
        n = np.int32(0)
        for j in range(bits.size):
            x = bits[j]
            largest = max(largest, x & np.int32(0x7FFFFFFF))
            smallest = min(smallest, x if x > 0 else INFINITY)
            n += np.int32(x > 0)  # a float is positive exactly when its bits are, and they are ordered as it is
        for j in range(bits.size):
            bits[j] = max(bits[j], np.int32(0))
        for j in range(bits.size):
            strongest[j] = max(strongest[j], bits[j])
        if cap > 0:
            for j in range(row.size):
                row[j] = cap * np.tanh(row[j] / cap)
        total = np.float32(0)
        for j in range(row.size):
            total += row[j]
        active[b], sums[b] = n, total
    for j in range(fired.size):
        if strongest[j] > 0:
            fired[j] = True
    return smallest, largest <= INFINITY


@compiled
def mask_rows(dz: Array, z: Array, row_pull: Array, cap: float, start: int, stop: int) -> None:
    """Turn gradients of activations into those of pre-activations, in place.

    Args:
        row_pull: Gradient of each activation of a row beside the reconstruction's (L1).
    """
    for b in range(start, stop):
        for j in range(dz.shape[1]):
            slope = np.float32(1) - (z[b, j] / cap) * (z[b, j] / cap) if cap > 0 else np.float32(1)
            dz[b, j] = (dz[b, j] + row_pull[b]) * slope if z[b, j] > 0 else np.float32(0)
