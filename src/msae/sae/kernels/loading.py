"""Which implementations work here. They are imported late: numba and triton take their time, and may be absent."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

_logger = logging.getLogger(__name__)


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """The module `name` of this package once it has passed its self-test, or None and the reason."""
    try:
        implementation = importlib.import_module(f"msae.sae.kernels.{name}")
        implementation.self_test()
    except Exception as err:  # noqa: BLE001 (a compiler that does not fit its Python can fail in any way)
        reason = f"{type(err).__name__}: {err}".splitlines()[0]
        hint = "; pip install 'msae[fast]' makes training many times faster" if name == "cpu" else ""
        _logger.warning("the %s kernel cannot be used (%s), going on in plain torch%s", name, reason, hint)
        return None, reason
    return implementation, ""
