"""The answer of a search as one HTML page: what was found before the edits and after them, side by side.

The page opens offline: pictures are inlined. Only pictures that the store itself lists are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msae.data.thumbnails import Album
from msae.use.search import Hit, SearchResult
from msae.web import page

SIDE = 160
"""Pixels of a thumbnail's longer side."""


def write_page(result: SearchResult, path: str | Path) -> None:
    """Write the page of a search to `path`, atomically."""
    page.write_page(render(result), Path(path))


def render(result: SearchResult) -> str:
    """The page; whatever comes from the store or the command line is escaped."""
    return page.render("report/search.html", result=result, **parts(result, Album(result.roots, SIDE)))


def parts(result: SearchResult, album: Album) -> dict[str, Any]:
    """What the template of a search shows beside the result itself."""
    after = [(hit, album.uri(hit.path), *_after(hit, bool(result.edits))) for hit in result.hits]
    sides: list[tuple[str, list[Any]]] = [("Found", after)]
    if result.before:
        before = [(hit, album.uri(hit.path), *_before(hit)) for hit in result.before]
        sides = [("Before", before), ("After", after)]
    return {"sides": sides, "query": _query_picture(result, album)}


def _after(hit: Hit, is_edited: bool) -> tuple[int, str, bool]:
    if not is_edited:
        return hit.rank, f"{hit.score:.3f}", False
    return hit.rank, f"was {hit.rank_before:,} · {hit.score_before:.3f} → {hit.score:.3f}", hit.rank_before > hit.rank


def _before(hit: Hit) -> tuple[int, str, bool]:
    return hit.rank_before, f"{hit.score_before:.3f} · now {hit.rank:,}", False


def _query_picture(result: SearchResult, album: Album) -> str | None:
    if result.kind == "image":
        return album.uri(str(Path(result.value).absolute()))
    return album.uri(result.query_path)
