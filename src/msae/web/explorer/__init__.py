"""`explore`: runs and a store in a browser: concepts, one concept, search, audit, models. See docs/explorer.md."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from msae.base.errors import MissingDependencyError
from msae.data.store import EmbeddingStore
from msae.web.explorer.session import offline, open_world

__all__ = ["explore"]


@offline()
def explore(
    runs: str | Path | Sequence[str | Path],
    on: EmbeddingStore | str | Path | None = None,
    port: int = 7860,
    *,
    say: Callable[[str], object] = lambda _: None,
    ready: Callable[[str], object] = lambda _: None,
) -> None:
    """Show runs and a store in a browser: concepts, one concept, search, audit, models. Ctrl-C ends it.

    Nothing leaves this machine: it listens on 127.0.0.1 alone and shows no other file than the pictures that the store
    lists. While it runs, libraries that would ask the Hugging Face hub are told that there is no network.

    Args:
        runs: One or several run folders.
        on: The store whose pictures, texts and columns are shown. Without it, the one that the first run was trained
            on.
        port: Port on 127.0.0.1; 0 takes any that is free.
        say: Is called with a line about what is being prepared.
        ready: Is called with the address, once it can be opened.

    Raises:
        ConfigError: The port is taken.
        RunError: A run is missing or damaged.
        StoreError: The store is missing or damaged, or does not fit a run.
        MissingDependencyError: gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingDependencyError.of("gradio", extra="explorer")
    from msae.web.explorer.app import HOST, build, listening

    with listening(port) as found:
        world = open_world([runs] if isinstance(runs, str | Path) else list(runs), on)
        if world.store is not None:
            say(f"reading {world.store.path} with {world.first.folder}; the first time takes a while, then it is kept")
            world.prepare()
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(build(world), log_level="warning", access_log=False))
        ready(f"http://{HOST}:{found.getsockname()[1]}/")  # the socket listens: who comes early waits
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[found])
