"""Thumbnails of a store's pictures: small, upright, and nothing but pixels, whatever the file held."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msae.base.errors import SourceError
from msae.base.results import shorten
from msae.data.images import read_picture
from msae.data.rows import Row, find_picture

if TYPE_CHECKING:
    from PIL.Image import Image


NOTEBOOK_SIDE = 128
"""Pixels of a picture's longer side in a notebook."""


def thumbnail(path: str | None, roots: Iterable[Path], side: int) -> Image | None:
    """The picture that a store lists as `path`, its longer side at most `side` pixels; None where there is none."""
    file = find_picture(path, roots)
    if file is None:
        return None
    try:
        picture = read_picture(file).image
    except SourceError:
        return None
    picture.thumbnail((side, side))
    return picture


def as_jpeg(picture: Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=85)
    return data.getvalue()


class Album:
    """Thumbnails of one store for one page, as long as there is room for them."""

    def __init__(self, roots: Iterable[Path], side: int, *, room: int = 8_000_000) -> None:
        self.roots, self.side = tuple(roots), side
        self.room = room
        """Characters that are left."""
        self.n_left_out = 0
        """Pictures for which there was no room."""

    def uri(self, path: str | None) -> str | None:
        """The thumbnail as the `src` of an image in a page that opens offline; None where there is none."""
        picture = thumbnail(path, self.roots, self.side)
        if picture is None:
            return None
        uri = "data:image/jpeg;base64," + base64.b64encode(as_jpeg(picture)).decode("ascii")
        if len(uri) > self.room:
            self.n_left_out += 1
            return None
        self.room -= len(uri)
        return uri


def figures_html(rows: Sequence[tuple[str, Row]], album: Album) -> str:
    """Rows with a few words each as figures side by side, for a notebook; whatever comes from the store is escaped."""
    figures = []
    for words, row in rows:
        source = album.uri(row.path)
        picture = f'<img src="{source}" alt="">' if source else ""
        title = f"<b>{html.escape(words)}</b> " if words else ""
        caption = title + html.escape(shorten(row.words, 140))
        figures.append(
            f'<figure style="display:inline-block;width:{album.side}px;margin:4px;vertical-align:top">{picture}'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"<div>{''.join(figures)}</div>"
