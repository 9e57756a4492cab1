"""One-line notices about what was found or assumed; by default they go to stderr."""

from __future__ import annotations

import logging
from functools import lru_cache

_LOGGER = logging.getLogger("msae")


@lru_cache(maxsize=1024)
def notice(line: str) -> None:
    """Log `line` as a warning, the first time only.

    Where logging is not set up, Python writes it to stderr as it is; the logger `msae` is where to silence it.
    """
    _LOGGER.warning(line)
