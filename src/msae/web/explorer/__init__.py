"""`explore`: runs and a store in a browser: concepts, one concept, search, audit, models. See docs/explorer.md."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msae.data.store import EmbeddingStore
else:
    EmbeddingStore = Any  # not imported before the address answers; the command line reads the signature

__all__ = ["explore"]

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

READ_ONCE = (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("transformers.utils.hub", "_is_offline_mode"))
"""Where these libraries keep what they read from the environment when they were imported."""


def explore(
    runs: str | Path | Sequence[str | Path],
    on: EmbeddingStore | str | Path | None = None,
    port: int = 7860,
    *,
    show: str | Sequence[str] = (),
    device: str = "auto",
    say: Callable[[str], object] = lambda _: None,
    ready: Callable[[str], object] = lambda _: None,
) -> None:
    """Show runs and a store in a browser: concepts, one concept, search, audit, models. Ctrl-C ends it.

    Nothing leaves this machine: it listens on 127.0.0.1 alone and shows no other file than the pictures that the store
    lists. While it runs, the libraries of Hugging Face work offline.

    Args:
        runs: One or several run folders.
        on: The store whose pictures, texts and columns are shown. Without it, the one that the first run was trained
            on.
        port: Port on 127.0.0.1; 0 takes any that is free.
        show: Columns of the metadata to show beside the captions, such as title,colour.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.
        say: Is called with a line about what is being prepared.
        ready: Is called with the address, once it can be opened.

    Raises:
        ConfigError: The port is taken.
        RunError: A run is missing or damaged.
        StoreError: The store is missing or damaged, or does not fit a run.
    """
    from msae.web.explorer.app import serve  # and nothing heavier before the address answers

    runs = [runs] if isinstance(runs, str | Path) else list(runs)
    with offline():
        if not all(Path(run).is_dir() for run in runs):  # most likely a slip: say so before an address is printed
            from msae.sae.run import Run

            for run in runs:
                Run.open(run).sae  # noqa: B018
        if isinstance(on, str | Path) and not Path(on).exists():
            from msae.data.layout import files_of

            files_of(Path(on))
        serve(runs, on, port, show, device, say, ready)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """The libraries of the Hugging Face hub ask no other machine for anything, whether or not they are loaded yet."""
    known = {name: os.environ.get(name) for name in OFFLINE}
    before = {place: getattr(sys.modules[place[0]], place[1]) for place in _places()}
    os.environ.update(OFFLINE)
    for module, attribute in before:
        setattr(sys.modules[module], attribute, True)
    try:
        yield
    finally:
        for name, value in known.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        was_offline = (known["HF_HUB_OFFLINE"] or "").upper() in ("1", "ON", "YES", "TRUE")
        for module, attribute in _places():
            setattr(sys.modules[module], attribute, before.get((module, attribute), was_offline))


def _places() -> list[tuple[str, str]]:
    """Those of `READ_ONCE` that are loaded."""
    return [(module, attribute) for module, attribute in READ_ONCE if hasattr(sys.modules.get(module), attribute)]
