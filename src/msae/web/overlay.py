"""Regions over pictures: all else is dimmed, the region has an outline in black and white, and words say where."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from msae.concepts.regions import Region
from msae.web.page import render

if TYPE_CHECKING:
    from PIL.Image import Image

DIM = 150
"""Of 255: how much of what lies outside is black."""


def as_svg(region: Region | None) -> Markup | None:
    """The region as a drawing that fits over its picture, for a page; a class in style.css places it."""
    if region is None:
        return None
    (width, height), (xs, ys) = region.size, region.edges
    cells = [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r, c in np.argwhere(region.inside)]
    holes = "".join(f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}Z" for left, top, right, bottom in cells)
    outline = "".join(f"M{x:.1f} {y:.1f}L{x_to:.1f} {y_to:.1f}" for x, y, x_to, y_to in outline_of(region))
    return render("region.html", words=region.words, width=width, height=height, outline=outline,
                  dimmed=f"M0 0H{width}V{height}H0Z{holes}")  # fmt: skip


def outline_of(region: Region) -> list[tuple[float, float, float, float]]:
    """The lines between what lies inside and what does not, each from a point to another, in pixels."""
    xs, ys = region.edges
    padded = np.pad(region.inside, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    return [(xs[c], ys[r], xs[c], ys[r + 1]) for r, c in upright] + [(xs[c], ys[r], xs[c + 1], ys[r]) for r, c in level]


def draw_on(picture: Image, region: Region) -> Image:
    """A picture of any scale with its region drawn over it."""
    from PIL import Image, ImageDraw

    region = replace(region, size=picture.size)  # in pixels of this picture
    xs, ys = region.edges
    dimmed = Image.new("L", picture.size, DIM)
    pen = ImageDraw.Draw(dimmed)
    for r, c in np.argwhere(region.inside):
        pen.rectangle((xs[c], ys[r], xs[c + 1], ys[r + 1]), fill=0)
    drawn = Image.composite(Image.new("RGB", picture.size), picture.convert("RGB"), dimmed)
    pen = ImageDraw.Draw(drawn)
    for width, colour in ((3, "black"), (1, "white")):
        for line in outline_of(region):
            pen.line(line, fill=colour, width=width)
    return drawn
