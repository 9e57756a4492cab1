"""Which implementations work here. They are imported late: numba takes its time, and may be absent."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

_logger = logging.getLogger(__name__)
_given_up: set[str] = set()


def load(name: str) -> ModuleType | None:
    """The module `name` of this package once it has passed its self-test; None where it failed, then or later."""
    return None if name in _given_up else _load(name)


@functools.cache
def _load(name: str) -> ModuleType | None:
    try:
        implementation = importlib.import_module(f"msae.sae.kernels.{name}")
        implementation.self_test()
    except Exception as err:  # noqa: BLE001 (a compiler that does not fit its Python can fail in any way)
        give_up(name, err)
        return None
    return implementation


def give_up(name: str, err: Exception) -> None:
    """Use the module `name` no longer in this process; one warning says why."""
    if name not in _given_up:
        _given_up.add(name)
        reason = f"{type(err).__name__}: {err}".splitlines()[0]
        hint = "; pip install 'msae[fast]' makes training many times faster" if name == "cpu" else ""
        _logger.warning("the %s kernel cannot be used (%s), going on in plain torch%s", name, reason, hint)
