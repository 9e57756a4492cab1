"""A progress bar on stderr for work over two seconds; silent where stderr is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DELAY = 2.0
"""Seconds before the bar appears: short work shows none."""
_BARS: list[object] = []
"""The bar that is shown."""


@contextmanager
def progress(title: str, *, total: int | None, unit: str, start: int = 0) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of units just done.

    Args:
        total: Units in all, None where that is not known.
        unit: What is counted, in the plural.
        start: Units that were done before, by an interrupted run.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total, completed=start)
    began = time.monotonic()
    shown = False

    def advance(n: int) -> None:
        nonlocal shown
        bar.update(task, advance=n)
        if not shown and not _BARS and time.monotonic() - began > DELAY:  # a terminal shows one bar at a time
            _BARS.append(bar)
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
            _BARS.remove(bar)
