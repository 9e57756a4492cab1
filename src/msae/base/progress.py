"""A progress bar for work over two seconds: on stderr, or in the page of a notebook; silent where there is neither."""

from __future__ import annotations

import html
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DELAY = 2.0
"""Seconds before the bar appears: short work shows none."""
_BARS: list[object] = []
"""The bar that is shown."""
REDRAWN = 0.2
"""Seconds between two pictures of the bar in a notebook."""


@contextmanager
def progress(title: str, *, total: int | None, unit: str, start: int = 0) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of units just done.

    Args:
        total: Units in all, None where that is not known.
        unit: What is counted, in the plural.
        start: Units that were done before, by an interrupted run.
    """
    if "ipykernel" in sys.modules:
        with _in_notebook(title, total, unit, start) as draw:
            yield draw
        return
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


@contextmanager
def _in_notebook(title: str, total: int | None, unit: str, start: int) -> Iterator[Callable[[int], None]]:
    """As HTML that the browser draws: needs no widgets, which not every notebook has."""
    ipython: Any = importlib.import_module("IPython.display")
    shown: Any = None
    done, drawn = start, time.monotonic() + DELAY - REDRAWN

    def advance(n: int) -> None:
        nonlocal done, shown, drawn
        done += n
        if time.monotonic() - drawn < REDRAWN:
            return
        drawn = time.monotonic()
        of = "" if total is None else f" of {total:,}"
        at = "" if total is None else f" value={done} max={total}"
        bar = ipython.HTML(f"{html.escape(title)} <progress{at}></progress> {done:,}{of} {html.escape(unit)}")
        if shown is None:
            shown = ipython.display(bar, display_id=True)
        else:
            shown.update(bar)

    try:
        yield advance
    finally:
        if shown is not None:
            shown.update(ipython.HTML(""))
