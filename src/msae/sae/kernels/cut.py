"""BatchTopK's cut: the smallest value that is kept of a whole batch, also where several processes share its rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msae.base.processes import ALONE, Processes

LOWER = 15
"""Bits of the lower half of a positive float32, seen as an int32; positive floats are ordered as their bits are."""


def batch_cut(count: Callable[[int], Tensor], n_kept: int, processes: Processes = ALONE) -> tuple[int, int]:
    """Bits of the `n_kept`-th largest value of the batch and how many equal to it are kept here; (0, 0) where all are.

    Of equal values the first ones are kept, those of the first process before those of the second.

    Args:
        count: How many positive values here have each upper half of bits, if given -1; each lower half beside an upper
            one, if given that.
    """
    n_above, cut = 0, -1
    for half in ("upper", "lower"):
        here = count(cut)
        up_to = processes.total(here).cumsum(0)
        excess = n_above + int(up_to[-1]) - n_kept
        if half == "upper" and excess <= 0:
            return 0, 0
        place = int(torch.searchsorted(up_to, excess, right=True))  # the first bin with more than the excess
        n_above += int(up_to[-1] - up_to[place])
        cut = place if half == "upper" else (cut << LOWER) + place
    n_ties, equal = n_kept - n_above, processes.each(int(here[place]))
    return cut, min(int(here[place]), max(0, n_ties - int(sum(equal[: processes.rank]))))


def batchtopk(h: Tensor, k: int, processes: Processes) -> Tensor:
    """`activations.batchtopk` of a batch whose rows several processes share."""
    bits = h.detach().float().relu().view(torch.int32).flatten()

    def count(upper: int) -> Tensor:
        if upper < 0:
            return torch.bincount(bits[bits > 0] >> LOWER, minlength=1 << 16)
        return torch.bincount(bits[bits >> LOWER == upper] & ((1 << LOWER) - 1), minlength=1 << LOWER)

    cut, n_ties = batch_cut(count, processes.rows(len(h)) * k, processes)
    ties = bits == cut
    kept = (bits > cut) | (ties & (ties.cumsum(0) <= n_ties))
    return torch.where(kept.view_as(h), h, 0.0).relu()
