"""The frame of every page: one file that opens offline, light or dark, at any width, and prints."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msae.base.errors import MissingDependencyError
from msae.base.files import atomic_path

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LONGEST = 240
"""Characters of a caption or name that a page shows."""


def render(template: str, **values: Any) -> str:
    """A template of this package with `values`, of which whatever is no `Markup` is escaped.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    return _environment().get_template(template).render(**values)


def write_page(page: str, path: Path) -> None:
    """Write a page to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def shorten(value: object, length: int = LONGEST) -> str:
    """Text on one line, cut where it is long, for captions and names can hold anything."""
    text = " ".join(_CONTROL.sub(" ", str(value)).split())
    return text if len(text) <= length else text[: length - 1] + "…"


@cache
def _environment() -> jinja2.Environment:
    try:
        import jinja2
    except ImportError as err:
        raise MissingDependencyError.of("jinja2", extra="report") from err
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = shorten
    return environment
