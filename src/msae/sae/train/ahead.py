"""Batches on their way to the device: the next one is made while the one before it is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made on a thread while the one before it is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="rows") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def on_device(
    batches: Iterator[Sequence[Float32[np.ndarray, "n d"]]], device: str
) -> Iterator[list[Float[Tensor, "n d"]]]:
    """The arrays of each batch as tensors on the device; a step does not wait for them.

    A GPU copies out of pinned memory, whose place torch gives to no other tensor before the copy is made.
    """
    tensors = ([torch.from_numpy(one) for one in batch] for batch in batches)
    if device == "cpu":
        yield from tensors
        return
    is_pinned = torch.cuda.is_available()
    for batch in ahead([one.pin_memory() if is_pinned else one for one in batch] for batch in tensors):
        yield [one.to(device, non_blocking=is_pinned) for one in batch]
