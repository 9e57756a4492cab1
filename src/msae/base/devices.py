"""Where tensors live: the device that a person named, checked."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

from msae.base.errors import ConfigError, first_line
from msae.base.processes import started


def return_freed_memory() -> None:
    """Give back to the system what was freed; glibc keeps it where it lies between pieces in use.

    Arrays of several sizes, made and freed block after block, would leave more and more of it.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less where a limit is set for it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [16 << 30]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            found.append(int(Path(file).read_text()))
    if sys.platform != "win32":
        import resource

        limits = [resource.getrlimit(one)[0] for one in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        found += [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return min(found)


def as_device(name: str, *, allow_mps: bool = False) -> str:
    """The device called `name`; `auto` is a CUDA GPU where there is one, else Apple's if allowed, else the CPU.

    Of several processes that torchrun started each gets its own GPU of its machine.

    Args:
        allow_mps: Whether `auto` may take Apple's GPU, which knows no float64.

    Raises:
        ConfigError: It cannot be used here.
    """
    import torch

    if started()[1] > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # each process of a machine has its own
    if name == "auto":
        mps = allow_mps and torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(0, device=name)
        if started()[1] > 1 and name.startswith("cuda"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(f"device {name} cannot be used here ({first_line(err)}); give --device cpu") from err
    return name
