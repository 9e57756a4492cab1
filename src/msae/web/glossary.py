"""The glossary, docs/glossary.md, as a part of the explorer's and the report's pages."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from markupsafe import Markup

from msae.web.page import TEMPLATES

PLACES = (TEMPLATES / "glossary.md", Path(__file__).parents[3] / "docs" / "glossary.md")
"""In an installed msae, and in a checkout."""


@cache
def glossary(heading: str = "h2") -> Markup:
    """All entries as HTML without the title; the one of *Latent* has the id `word-latent`.

    Args:
        heading: What the headings of its sections are.
    """
    from markdown_it import MarkdownIt

    file = next(place for place in PLACES if place.exists())
    _, _, text = file.read_text(encoding="utf-8").partition("\n")
    page = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    page = re.sub(r"\s\(<a [^>]*>[\w-]+\.md</a>\)|</?a\b[^>]*>", "", page)  # other files of docs/ are not here
    page = re.sub(r"<(/?)h2>", rf"<\1{heading}>", page)
    return Markup(re.sub(r"<p><strong>([^<]+)</strong>", _with_id, page))  # noqa: S704 - our own text, escaped


def _with_id(found: re.Match[str]) -> str:
    word = re.sub(r"\W+", "-", found[1]).strip("-").lower()
    return f'<p id="word-{word}"><strong>{found[1]}</strong>'
