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
    cut, n_ties = _cut(lambda upper: count(-1 if upper is None else int(upper)), n_kept, processes)
    return int(cut), int(n_ties)


def _cut(count: Callable[[Tensor | None], Tensor], n_kept: int, processes: Processes) -> tuple[Tensor, Tensor]:
    """`batch_cut` without waiting for the device; `count` is given None instead of -1."""
    here = count(None)
    up_to = processes.total(here).cumsum(0)
    excess = up_to[-1] - n_kept
    are_all_kept = excess <= 0
    upper = torch.searchsorted(up_to, excess, right=True)  # the first bin with more than the excess
    n_above = up_to[-1] - up_to.take(upper)
    here = count(upper)
    up_to = processes.total(here).cumsum(0)
    lower = torch.searchsorted(up_to, n_above + up_to[-1] - n_kept, right=True)
    n_ties = n_kept - (n_above + up_to[-1] - up_to.take(lower))
    if processes.size > 1:
        equal = here.new_zeros(processes.size)
        equal[processes.rank] = here.take(lower)
        left = n_ties - processes.total(equal)[: processes.rank].sum()
        n_ties = torch.minimum(here.take(lower), left.clamp_min(0))
    return ((upper << LOWER) + lower).masked_fill(are_all_kept, 0), n_ties.masked_fill(are_all_kept, 0)


def batchtopk(h: Tensor, k: int, processes: Processes) -> Tensor:
    """`activations.batchtopk` of a batch whose rows several processes share."""
    bits = h.detach().float().relu().view(torch.int32).flatten().clamp_min(0)  # relu keeps -0.0, and NaN its sign

    def count(upper: Tensor | None) -> Tensor:
        is_counted = (bits > 0) & (True if upper is None else bits >> LOWER == upper)
        places = bits >> LOWER if upper is None else bits & ((1 << LOWER) - 1)
        # torch.bincount would wait for the device.
        return is_counted.new_zeros(1 << 16, dtype=torch.int64).index_add_(0, places, is_counted.long())

    cut, n_ties = _cut(count, processes.rows(len(h)) * k, processes)
    ties = bits == cut
    kept = (bits > cut) | (ties & (ties.cumsum(0) <= n_ties))
    return torch.where(kept.view_as(h), h, 0.0).relu()
