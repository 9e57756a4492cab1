"""Every page is made here: jinja2 templates in `templates/`, which escape whatever is no markup, and one style."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from msae.base.files import atomic_path

TEMPLATES = Path(__file__).parent / "templates"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LONGEST = 240
"""Characters of a caption or name that a page shows."""


def render(template: str, **values: Any) -> Markup:
    """A template with `values`, of which whatever is no `Markup` is escaped; in a `.md` the filter `md` escapes."""
    return Markup(_environment().get_template(template).render(**values))  # noqa: S704 - escaped by the template


def write_page(page: str, path: Path) -> None:
    """Write a page to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def shorten(value: object, length: int = LONGEST) -> str:
    """Text on one line, cut where it is long, for captions and names can hold anything."""
    text = " ".join(_CONTROL.sub(" ", str(value)).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def one_line(value: object) -> str:
    """Text of printable characters on one line."""
    return "".join(character if character.isprintable() else " " for character in shorten(value))


def markdown(value: object) -> str:
    """Text that Markdown and HTML show as it is."""
    text = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", one_line(value))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float | None, digits: int = 2) -> str:
    """A figure for people; a dash where there is none."""
    return "-" if value is None or value != value else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """A share in percent; a dash where there is none."""
    if value is None or value != value:
        return "-"
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def _nearest_word(word: str) -> str:
    from msae.concepts.names import nearest_word  # loads numpy, and the server answers before

    return nearest_word(word)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(default=True, disabled_extensions=("md",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "short": shorten, "number": number, "share": share, "count": lambda n: f"{n:,}",
        "line": one_line, "nearest_word": _nearest_word, "md": markdown,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
    }  # fmt: skip
    return environment
