"""One training on several processes, as torchrun starts them: which of them this is, and what all have together."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msae.base.errors import ConfigError, FailedElsewhere, RunError, first_line

if TYPE_CHECKING:
    from torch import Tensor

_GATHERING = timedelta(minutes=10)
"""For all processes to be started."""
_LONGEST_WAIT = timedelta(days=1)
"""For the first process, which alone reads a store for its statistics and fits thresholds."""
_MOMENT = 1.0
"""Seconds that a process waits before it ends without a word: torchrun ends all others when one ends."""


@dataclass(frozen=True)
class Processes:
    """The processes of one training. Each has a part of every batch, and its rows weigh by their number.

    One process alone gets back what it gives, untouched. Of several, all must call the same methods in the same order,
    with tensors of the same shape but for their rows.
    """

    rank: int = 0
    size: int = 1
    batch_size: int = 0
    """Rows of a whole batch; of no use to one process alone."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files, shows progress and prints."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """Which of `n` rows are this process's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def rows(self, n: int) -> int:
        """Rows of the whole batch of which `n` are here."""
        return n if self.size == 1 else self.batch_size

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return x
        x = x.detach().clone()
        self._add_up(x)
        return x

    def mean(self, x: Tensor, n: int) -> Tensor:
        """The mean over the rows of the batch of what is `x` on average over the `n` rows here."""
        return x if self.size == 1 else self.total(x * (n / self.batch_size))

    def whole(self, x: Tensor, n: int) -> Tensor:
        """The value of `mean`, with the gradient of this process's rows."""
        return x if self.size == 1 else x + (self.mean(x, n) - x.detach())

    def alike(self, x: Tensor, n: int) -> Tensor:
        """`x`, which has the same value in all processes and in each the gradient of its `n` rows' share in it.

        Gradients are averaged over rows in the end, but these are to be added up.
        """
        return x if self.size == 1 else x + (self.batch_size / n - 1) * (x - x.detach())

    def each(self, x: float) -> list[float]:
        """A number of each process, in their order."""
        if self.size == 1:
            return [x]
        import torch

        found = torch.zeros(self.size, dtype=torch.float64)
        found[self.rank] = x
        return [float(one) for one in self.total(found)]

    def gathered(self, x: Tensor) -> Tensor:
        """The rows of all processes, in their order; gradients flow into those of this one."""
        if self.size == 1:
            return x
        import torch

        counts = [int(n) for n in self.each(len(x))]
        start, stop = sum(counts[: self.rank]), sum(counts[: self.rank + 1])
        rows = x.new_zeros(sum(counts), *x.shape[1:])
        rows[start:stop] = x.detach()
        rows = self.total(rows)
        return torch.cat([rows[:start], x, rows[stop:]])

    def average_gradients_(self, parameters: Iterable[Tensor], n: int) -> None:
        """Make of the gradients of this process's `n` rows those of the whole batch."""
        if self.size == 1:
            return
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            gradient *= n / self.batch_size
            # The encoder's is laid out latent by latent: only transposed it is one piece of memory.
            self._add_up(gradient if gradient.is_contiguous() else gradient.T)

    def _add_up(self, x: Tensor) -> None:
        import torch.distributed as dist

        assert x.is_contiguous()
        with _peers():
            dist.all_reduce(x)

    @contextmanager
    def folder_of_first(self, folder: Path | None) -> Iterator[Path | None]:
        """A folder of the first process: there itself, for the others a copy of its files during the block.

        Args:
            folder: Of the first process; None where it has none to give. The others' is of no meaning.
        """
        if self.size == 1:
            yield folder
            return
        files = sorted(path for path in folder.glob("[!.]*") if path.is_file()) if self.is_first and folder else []
        names = json.loads(self._from_first(json.dumps(folder and [file.name for file in files]).encode()))
        if self.is_first or names is None:
            for file in files:
                self._from_first(file.read_bytes())
            yield folder if self.is_first else None
            return
        with tempfile.TemporaryDirectory(prefix="msae-") as copy:
            for name in names:
                Path(copy, name).write_bytes(self._from_first(b""))
            yield Path(copy)

    def _from_first(self, data: bytes) -> bytes:
        """The bytes that the first process gives."""
        import torch
        import torch.distributed as dist

        with _peers():
            size = torch.tensor([len(data)])
            dist.broadcast(size, src=0)
            buffer = torch.empty(int(size), dtype=torch.uint8)
            if self.is_first:
                buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else buffer
            dist.broadcast(buffer, src=0)
        return buffer.numpy().tobytes()

    def wait_for_first_to_end(self) -> None:
        """Until the first process has said what is wrong, and ended."""
        self._from_first(b"")


ALONE = Processes()


def started() -> tuple[int, int]:
    """Which process this is, and of how many, as torchrun or whoever started them says; (0, 1) for one alone.

    Raises:
        ConfigError: RANK and WORLD_SIZE are no numbers of a process.
    """
    if any(name not in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return 0, 1
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"RANK {rank!r} and WORLD_SIZE {size!r} name no process; start with torchrun, or unset them")
    return int(rank), int(size)


_joined: list[Processes] = []


@contextmanager
def joined() -> Iterator[Processes]:
    """All processes of this training, connected during the block; an error of one of them ends them all.

    The first process that fails raises its own error, all others `FailedElsewhere`: so it is said once.
    """
    rank, size = started()
    if size == 1 or _joined:
        yield _joined[0] if _joined else ALONE
        return
    import torch
    import torch.distributed as dist

    if rank:
        logging.getLogger("msae").setLevel(logging.ERROR)  # the first process gives the warnings
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, *_ = next(iter(dist.rendezvous("env://", timeout=_GATHERING)))  # type: ignore[attr-defined]
    except (RuntimeError, OSError) as err:
        raise RunError(
            f"this is process {rank} of {size} (RANK, WORLD_SIZE), and the others cannot be reached "
            f"({first_line(err)[:120]}); start all of them, as torchrun does, or unset WORLD_SIZE"
        ) from err
    store.set_timeout(_LONGEST_WAIT)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
    _joined.append(Processes(rank, size))
    try:
        yield _joined[0]
    except (Exception, KeyboardInterrupt) as err:
        if _is_first_to_fail(store):
            raise
        time.sleep(_MOMENT)
        raise FailedElsewhere("another process of this training failed, and says why") from err
    else:
        dist.destroy_process_group()
    finally:
        _joined.clear()


def _is_first_to_fail(store: Any) -> bool:
    try:
        return bool(store.add("msae/failed", 1) == 1)
    except RuntimeError:  # it lay in a process that has ended
        return False


@contextmanager
def _peers() -> Iterator[None]:
    """Turns a lost connection into one line."""
    try:
        yield
    except RuntimeError as err:
        raise RunError(
            "another process of this training was lost (killed, out of memory, or its machine went down); to go on "
            f"from the last checkpoint, type the same command with --resume ({first_line(err)[:80]})"
        ) from err
