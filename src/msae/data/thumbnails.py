"""Thumbnails of a store's pictures: small, upright, and nothing but pixels, whatever the file held."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from msae.base.errors import SourceError
from msae.data.images import read_picture
from msae.data.store import find_picture

if TYPE_CHECKING:
    from PIL.Image import Image


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
