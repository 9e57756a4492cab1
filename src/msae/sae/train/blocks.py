"""Batches from rows that are larger than memory: blocks of rows are shuffled, read ahead, and mixed in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from msae.data.layout import Modality
from msae.sae.train.ahead import ahead

BLOCKS_PER_ROW = 4
"""Blocks that are in memory at once, whose rows are mixed, for each row of a batch: neighbours in a store are alike,
and so a batch has few rows of any one block."""
FITS = 0.75
"""Of the memory: a store up to so much of it stays in the system's cache of files, and single rows are shuffled."""
_MEMORY_SHARE = 1 / 16
"""Of the memory for the rows of these blocks; they are there twice, being used and being read."""
_ROWS = (4, 4096)
"""Fewest and most rows of a block that is chosen by the memory."""


def whole(n_rows: int) -> slice:
    """All rows of a batch."""
    return slice(n_rows)


class Part(Protocol):
    """The rows of one modality or of pairs."""

    @property
    def d_in(self) -> int: ...
    def __len__(self) -> int: ...
    def between(self, start: int, stop: int, modality: Modality) -> Float32[np.ndarray, "n d_in"]: ...


class Pool(NamedTuple):
    """Blocks that are read together, whose rows are drawn in a new order."""

    starts: NDArray[np.int64]
    """First row of each block, ascending."""
    seed: tuple[int, ...]
    n_rows: int
    drawn: slice
    """Which of its rows are drawn: not those drawn before an interruption, nor those beyond the end of an epoch."""

    @property
    def order(self) -> NDArray[np.int64]:
        """Positions among the rows of the pool."""
        return np.random.default_rng(self.seed).permutation(self.n_rows)[self.drawn]


def pools(
    n_rows: int, *, block_rows: int, at_once: int, n_drawn: int, seed: Sequence[int], first: int = 0
) -> Iterator[Pool]:
    """The pools of all epochs, without end; a function of these numbers alone.

    Args:
        at_once: Blocks of a pool.
        n_drawn: Rows that an epoch draws: each once, then each again in a new order, as often as it takes.
        first: Rows that were drawn before, by an interrupted run.
    """
    n_blocks = -(-n_rows // block_rows)
    skipped = first % n_drawn
    for epoch in itertools.count(first // n_drawn):
        left = n_drawn
        for turn in itertools.count():
            blocks = np.random.default_rng([*seed, epoch, turn]).permutation(n_blocks)
            for number in range(0, n_blocks, at_once):
                starts = np.sort(blocks[number : number + at_once]) * block_rows
                size = int(np.minimum(starts + block_rows, n_rows).sum() - starts.sum())
                drawn = min(size, left)
                left -= drawn
                if skipped < drawn:
                    yield Pool(starts, (*seed, epoch, turn, 1 + number), size, slice(skipped, drawn))
                skipped -= min(skipped, drawn)
                if not left:
                    break
            if not left:
                break


def block_batches(
    part: Part,
    modalities: Sequence[Modality],
    size: int,
    *,
    block_rows: int,
    n_batches: int,
    seed: Sequence[int],
    first: int = 0,
    share: Callable[[int], slice] = whole,
) -> Iterator[list[Float32[np.ndarray, "n d_in"]]]:
    """Batches without end, each with the same rows of every modality, while the next pool is read on a thread.

    Args:
        n_batches: Batches of an epoch.
        seed: What the order of the rows depends on.
        first: Batches that were drawn before, by an interrupted run.
        share: The rows of a batch, given how many there are, that this process trains on.
    """
    at_once, n_drawn = BLOCKS_PER_ROW * size, n_batches * size
    todo = pools(len(part), block_rows=block_rows, at_once=at_once, n_drawn=n_drawn, seed=seed, first=first * size)

    def load(pool: Pool) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
        return [_read(part, pool, block_rows, one) for one in modalities], pool.order

    rest: list[NDArray[np.float32]] | None = None  # rows of a batch that ends in the next pool
    for rows, order in ahead(map(load, todo)):
        while len(order) + (0 if rest is None else len(rest[0])) >= size:
            n_taken = size if rest is None else size - len(rest[0])
            batch = _with(rest, rows, order[:n_taken])
            order, rest = order[n_taken:], None
            yield [one[share(size)] for one in batch]
        rest = _with(rest, rows, order)


def _read(part: Part, pool: Pool, block_rows: int, modality: Modality) -> NDArray[np.float32]:
    rows = np.empty((pool.n_rows, part.d_in), np.float32)
    at = 0
    for start in pool.starts.tolist():
        block = part.between(start, start + block_rows, modality)
        rows[at : at + len(block)] = block
        at += len(block)
    return rows


def _with(
    rest: list[NDArray[np.float32]] | None, rows: list[NDArray[np.float32]], taken: NDArray[np.int64]
) -> list[NDArray[np.float32]]:
    """The chosen rows of a pool after those that were left over from the one before, for each modality."""
    more = [one[taken] for one in rows]
    return more if rest is None else [np.concatenate(both) for both in zip(rest, more, strict=True)]


def rows_of_a_block(n_bytes: int, row_bytes: int, batch_size: int, memory: int, *, n_processes: int = 1) -> int:
    """Rows of a block for a store of `n_bytes`: 1, which is to shuffle single rows, where it fits into memory.

    Args:
        n_bytes: All embeddings that are trained on, as they lie on disk.
        row_bytes: A row in memory.
        memory: Bytes of this machine.
        n_processes: How many train on this machine, each with blocks of its own.
    """
    if n_bytes <= FITS * memory:
        return 1
    most = _MEMORY_SHARE * memory / n_processes / (BLOCKS_PER_ROW * batch_size) / row_bytes
    return int(min(max(2 ** int(np.log2(max(most, 1))), _ROWS[0]), _ROWS[1]))
