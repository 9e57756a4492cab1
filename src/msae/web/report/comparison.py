"""A comparison of two sets as HTML: the verdict, the table, and pictures of both sides for the first concepts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from msae.data.rows import Row
from msae.data.store import EmbeddingStore
from msae.data.thumbnails import Album
from msae.use.compare import MEANINGS, ComparedConcept, Comparison
from msae.web import page

SIDE = 128
"""Pixels of a thumbnail's longer side."""

Pictured = tuple[ComparedConcept, list[tuple[str, list[tuple[Row, str | None]]]]]
"""A concept, and for either side its name and rows with their pictures."""


def write_html(comparison: Comparison, path: str | Path) -> None:
    """Write the comparison as one page without scripts or links to anywhere."""
    text = page.render("report/compare.html", comparison=comparison, section=section(comparison))
    page.write_page(text, Path(path))


def section(comparison: Comparison, *, n_rows: int = 20, n_pictured: int = 12) -> Markup:
    """The comparison as a part of a larger page."""
    album = Album(comparison.roots, SIDE)
    pictured: list[Pictured] = [
        (one, [(side, [(row, album.uri(row.path)) for row in rows]) for side, rows in _sides(comparison, one)])
        for one in comparison.standing_out[:n_pictured]
    ]
    return page.render(
        "report/compare_section.html", comparison=comparison, shown=comparison.standing_out[:n_rows], pictured=pictured,
        meanings=MEANINGS,
    )  # fmt: skip


def of_file(comparison: Comparison, store: EmbeddingStore | None) -> Comparison:
    """A comparison that was read from a file, with the pictures of this store alone: a file can name any picture."""
    rows = {row.row: row for one in comparison.concepts for row in (*one.rows_a, *one.rows_b)}
    known = [row for row in rows if store is not None and 0 <= row < len(store)]
    paths = {(row.row, row.id): row.path for row in store.describe_rows(known)} if store is not None else {}

    def own(rows: tuple[Row, ...]) -> tuple[Row, ...]:
        return tuple(replace(row, path=row.path if paths.get((row.row, row.id)) == row.path else None) for row in rows)

    concepts = tuple(replace(one, rows_a=own(one.rows_a), rows_b=own(one.rows_b)) for one in comparison.concepts)
    return replace(comparison, concepts=concepts, roots=() if store is None else store.picture_roots)


def n_pictures(comparison: Comparison) -> int:
    """How many rows name a picture."""
    return sum(row.path is not None for one in comparison.concepts for row in (*one.rows_a, *one.rows_b))


def _sides(comparison: Comparison, one: ComparedConcept) -> list[tuple[str, tuple[Row, ...]]]:
    return [(comparison.a, one.rows_a), (comparison.b, one.rows_b)]
