"""A progress bar on stderr for work that takes more than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_DELAY = 2.0  # seconds; quicker work shows nothing


@contextmanager
def progress(
    label: str, *, total: int | None = None, unit: str = "rows", done: int = 0
) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of units just done; silent where stderr is no terminal.

    Args:
        label: What is going on, such as `embedding`.
        total: Units in all, if it is known.
        done: Units that an earlier run did.
    """
    started = time.monotonic()
    n_done = done
    bar: Any = None
    task: Any = None

    def advance(n: int = 1) -> None:
        nonlocal n_done, bar, task
        n_done += n
        if bar is None and sys.stderr.isatty() and time.monotonic() - started > _DELAY:
            bar = _bar(unit)
            bar.start()
            task = bar.add_task(label, total=total)
        if bar is not None:
            bar.update(task, completed=n_done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _bar(unit: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
