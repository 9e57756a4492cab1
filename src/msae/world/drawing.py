"""Scenes as pictures, drawn with Pillow from cached pieces so that thousands are made a second."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msae.base.errors import ConfigError
from msae.base.files import atomic_folder
from msae.base.progress import progress
from msae.world.scenes import PLACE_STREAM, Draws, Object, Scene, Value, attributes, caption, sample_scene

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

PICTURE_SIZE = 128  # pixels; the demo's CLIP looks at half of that
FINE = 4  # pieces are drawn this much larger and reduced, which smooths their edges

RADII = {"small": 0.17, "medium": 0.24, "large": 0.33}  # of the picture's side, for a lone object
COUNT_SCALES = {1: 1.0, 2: 0.62, 3: 0.52}  # objects shrink as they share the picture
JITTER = 0.05  # of the radius; the sizes stay well apart

PAINTS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "green": (46, 170, 67),
    "blue": (44, 90, 220),
    "yellow": (245, 208, 40),
    "purple": (140, 60, 180),
    "orange": (245, 130, 32),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
HAT, HAT_BAND, SHADOW = (92, 46, 16), (250, 232, 190), (8, 8, 12)
FRAME_WOOD, FRAME_GOLD = (110, 60, 10), (232, 190, 80)

# How far an object reaches above and below its centre, in radii.
REACH, HAT_REACH, SHADOW_REACH = 1.05, 1.5, 1.32

BACKGROUND_VARIANTS = 32


class Rendered(NamedTuple):
    """A scene made visible.

    Attributes:
        image: The picture, RGB, `PICTURE_SIZE` pixels square.
        caption: The scene in words: all of it, in wording that varies with the seed.
        attributes: The truth, one flat row: see `msae.world.scenes.attributes`.
        scene: What was drawn.
    """

    image: Image.Image
    caption: str
    attributes: dict[str, Value | None]
    scene: Scene


def render(seed: int, **fixed: Value) -> Rendered:
    """The picture, caption and true attributes of a seed; `fixed` as in `sample_scene`."""
    scene = sample_scene(seed, **fixed)
    return Rendered(draw(scene), caption(scene, wording=seed), attributes(scene), scene)


def write_scenes(
    folder: str | Path, seeds: Iterable[int], fixed: Callable[[int], Mapping[str, Value]] = lambda _: {}
) -> Path:
    """Draw pictures, and write `scenes.csv` with their captions and true attributes; gives this file.

    Where the folder has one already, nothing is drawn.

    Args:
        seeds: One scene each. The demo's CLIP has seen none of `UNSEEN_SEEDS`.
        fixed: The attributes set by hand for a seed, as in `sample_scene`.

    Raises:
        ConfigError: The folder holds something else.
    """
    folder = Path(folder)
    table = folder / "scenes.csv"
    if table.exists():
        return table
    if folder.exists():
        raise ConfigError(f"{folder} holds no scenes.csv, so msae did not make it; give another --out")
    seeds = list(seeds)
    with (
        atomic_folder(folder, durable=False) as temporary,
        progress("rendering", total=len(seeds), unit="scenes") as advance,
    ):
        (temporary / "images").mkdir()
        with (temporary / "scenes.csv").open("w", newline="", encoding="utf-8") as file:
            writer = None
            for seed in seeds:
                scene = render(seed, **fixed(seed))
                path = f"images/{seed}.png"
                scene.image.save(temporary / path)
                row = {"id": str(seed), "image_path": path, "caption": scene.caption, **scene.attributes}
                if writer is None:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                writer.writerow(row)
                advance(1)
    return table


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene; the same on every machine for the same version of Pillow."""
    from PIL import Image

    draws = Draws(scene.seed, PLACE_STREAM)
    variant, flip = int(draws.uniform(0, BACKGROUND_VARIANTS)), draws.chance(0.5)
    image = _background(scene.background, variant).copy()
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for thing, (x, y, radius) in zip(scene.objects, _places(scene, draws), strict=True):
        _draw_object(image, thing, x, y, radius)
    if scene.frame:
        frame = _frame()
        image.paste(frame, (0, 0), frame)
    return image


def _places(scene: Scene, draws: Draws) -> list[tuple[int, int, int]]:
    """Centre and radius of every object, in pixels."""
    count = len(scene.objects)
    scale = PICTURE_SIZE * COUNT_SCALES[count] * draws.uniform(1 - JITTER, 1 + JITTER)
    stacked = scene.relation == "above" if scene.relation else draws.chance(0.5)
    if count == 1:
        centres, drift = [(0.5, 0.5)], 0.15
    elif count == 3:
        centres, drift = [(0.26, 0.3), (0.74, 0.3), (0.5, 0.73)], 0.03
    elif stacked:
        centres, drift = [(0.5, 0.28), (0.5, 0.74)], 0.03
    else:
        centres, drift = [(0.26, 0.5), (0.74, 0.5)], 0.03
    places = []
    for thing, (x, y) in zip(scene.objects, centres, strict=True):
        wide = 0.12 if count == 2 else drift  # a pair may drift across its own axis
        shift_x = draws.uniform(-1, 1) * (wide if count == 2 and stacked else drift)
        shift_y = draws.uniform(-1, 1) * (wide if count == 2 and not stacked else drift)
        radius = round(RADII[thing.size] * scale)
        above = radius * (HAT_REACH if thing.hat else REACH)
        below = radius * (SHADOW_REACH if thing.shadow else REACH)
        places.append(
            (
                round(_inside((x + shift_x) * PICTURE_SIZE, radius * REACH, radius * REACH)),
                round(_inside((y + shift_y) * PICTURE_SIZE, above, below)),
                radius,
            )
        )
    return places


def _inside(centre: float, before: float, after: float) -> float:
    """The centre moved so that its reach stays in the picture, or the middle where it cannot."""
    low, high = before, PICTURE_SIZE - after
    return min(max(centre, low), high) if low <= high else (low + high) / 2


def _draw_object(image: Image.Image, thing: Object, x: int, y: int, radius: int) -> None:
    if thing.shadow:
        shadow = _shadow_mask(radius)
        image.paste(SHADOW, (x - shadow.width // 2, y + round(0.92 * radius)), shadow)
    outline, inside = _masks(thing.shape, radius)
    corner = (x - outline.width // 2, y - outline.height // 2)
    image.paste(_ink(PAINTS[thing.colour]), corner, outline)
    image.paste(_cloth(thing.colour, thing.texture).crop((0, 0, *inside.size)), corner, inside)
    if thing.hat:
        hat = _hat(radius)
        image.paste(hat, (x - hat.width // 2, y - round(0.72 * radius) - hat.height), hat)


def _ink(paint: Colour) -> Colour:
    """The colour of outlines and patterns: a dark shade of a light paint, a light tint of a dark one."""
    if sum(paint) > 400:
        return (int(paint[0] * 0.35), int(paint[1] * 0.35), int(paint[2] * 0.35))
    red, green, blue = (int(part + (255 - part) * 0.75) for part in paint)
    return (red, green, blue)


@lru_cache(maxsize=512)
def _masks(shape: str, radius: int) -> tuple[Image.Image, Image.Image]:
    """The outer and the inner silhouette of a shape; what lies between them is its outline."""
    from PIL import Image, ImageDraw, ImageFilter

    side = 2 * round(1.15 * radius) + 2
    mask = Image.new("L", (side * FINE, side * FINE))
    _draw_shape(ImageDraw.Draw(mask), shape, side * FINE / 2, radius * FINE)
    outer = mask.reduce(FINE)
    return outer, outer.filter(ImageFilter.MinFilter(3))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, centre: float, radius: float) -> None:
    def box(part: float) -> tuple[float, float, float, float]:
        return (
            centre - part * radius,
            centre - part * radius,
            centre + part * radius,
            centre + part * radius,
        )

    def polygon(points: list[tuple[float, float]]) -> None:
        pen.polygon([(centre + x * radius, centre + y * radius) for x, y in points], fill=255)

    if shape == "circle":
        pen.ellipse(box(1.0), fill=255)
    elif shape == "square":
        pen.rectangle(box(0.88), fill=255)
    elif shape == "triangle":
        polygon([(0, -1.05), (1.1, 0.9), (-1.1, 0.9)])
    elif shape == "star":
        corners = [(math.pi * k / 5, 1.15 if k % 2 == 0 else 0.44) for k in range(10)]
        polygon([(reach * math.sin(angle), -reach * math.cos(angle)) for angle, reach in corners])
    elif shape == "cross":
        arm, tip = 0.34, 1.0
        polygon([(-arm, -tip), (arm, -tip), (arm, tip), (-arm, tip)])
        polygon([(-tip, -arm), (tip, -arm), (tip, arm), (-tip, arm)])
    else:
        pen.ellipse(box(1.05), fill=255)
        pen.ellipse(box(0.5), fill=0)


@lru_cache(maxsize=64)
def _cloth(colour: str, texture: str) -> Image.Image:
    """A square of paint with its pattern, large enough for any object."""
    from PIL import Image, ImageDraw

    side = PICTURE_SIZE * FINE
    cloth = Image.new("RGB", (side, side), PAINTS[colour])
    pen = ImageDraw.Draw(cloth)
    ink = _ink(PAINTS[colour])
    if texture == "striped":
        for x in range(-side, side, 14 * FINE):
            pen.line((x, 0, x + side, side), fill=ink, width=5 * FINE)
    elif texture == "dotted":
        step, dot = 12 * FINE, 6 * FINE
        for row, y in enumerate(range(0, side, step)):
            for x in range(row % 2 * step // 2, side, step):
                pen.ellipse((x, y, x + dot, y + dot), fill=ink)
    elif texture == "checked":
        step = 10 * FINE
        for row, y in enumerate(range(0, side, step)):
            for x in range(row % 2 * step, side, 2 * step):
                pen.rectangle((x, y, x + step - 1, y + step - 1), fill=ink)
    return cloth.reduce(FINE)


@lru_cache(maxsize=128)
def _shadow_mask(radius: int) -> Image.Image:
    from PIL import Image, ImageDraw

    width, height = 2 * round(1.1 * radius), round(0.4 * radius)
    mask = Image.new("L", (width * FINE, height * FINE))
    ImageDraw.Draw(mask).ellipse((0, 0, width * FINE - 1, height * FINE - 1), fill=255)
    return mask.reduce(FINE)


@lru_cache(maxsize=128)
def _hat(radius: int) -> Image.Image:
    from PIL import Image, ImageDraw

    width, height, brim = 2 * round(0.75 * radius), round(0.78 * radius), max(2, round(0.18 * radius))
    hat = Image.new("RGBA", (width * FINE, height * FINE))
    pen = ImageDraw.Draw(hat)
    left, right, base = width * FINE * 0.22, width * FINE * 0.78, (height - brim) * FINE
    pen.rectangle((left, 0, right, base), fill=HAT)
    pen.rectangle((left, base - brim * 1.4 * FINE, right, base), fill=HAT_BAND)
    pen.rectangle((0, base, width * FINE, height * FINE), fill=HAT)
    return hat.reduce(FINE)


@lru_cache(maxsize=1)
def _frame() -> Image.Image:
    from PIL import Image, ImageDraw

    frame = Image.new("RGBA", (PICTURE_SIZE, PICTURE_SIZE))
    pen = ImageDraw.Draw(frame)
    last = PICTURE_SIZE - 1
    pen.rectangle((0, 0, last, last), outline=FRAME_WOOD, width=8)
    pen.rectangle((2, 2, last - 2, last - 2), outline=FRAME_GOLD, width=4)
    return frame


@lru_cache(maxsize=256)
def _background(name: str, variant: int) -> Image.Image:
    """One of the variants of a background: the same place in another light, with other grains."""
    from PIL import Image, ImageDraw

    side = 2 * PICTURE_SIZE
    draws = Draws(variant, PLACE_STREAM)
    light = int(draws.uniform(-10, 11))
    image = Image.new("RGB", (side, side), _lit(_GROUNDS[name], light))
    paint = {
        "sky": _paint_sky,
        "sand": _paint_sand,
        "grass": _paint_grass,
        "night": _paint_night,
        "brick": _paint_brick,
    }
    if name in paint:
        paint[name](ImageDraw.Draw(image), draws, light, side)
    return image.reduce(2)


_GROUNDS: dict[str, Colour] = {
    "grey": (134, 134, 134),
    "sky": (140, 200, 245),
    "sand": (222, 196, 150),
    "grass": (88, 130, 50),
    "night": (38, 40, 96),
    "brick": (150, 75, 60),
}


def _lit(colour: Colour, light: int) -> Colour:
    return (min(255, colour[0] + light), min(255, colour[1] + light), min(255, colour[2] + light))


def _paint_sky(pen: ImageDraw.ImageDraw, draws: Draws, light: int, side: int) -> None:
    for line in range(side):
        pen.line((0, line, side, line), fill=_lit((120 + line // 4, 190 + line // 8, 245), light))
    for _ in range(4):
        x, y = draws.uniform(0, side), draws.uniform(0, side)
        for shift, size in ((-18, 9), (0, 13), (18, 10)):
            pen.ellipse((x + shift - 2 * size, y - size, x + shift + 2 * size, y + size), fill=(240, 246, 252))


def _paint_sand(pen: ImageDraw.ImageDraw, draws: Draws, light: int, side: int) -> None:
    for _ in range(90):
        x, y = draws.uniform(0, side), draws.uniform(0, side)
        pen.ellipse((x, y, x + 4, y + 4), fill=_lit((188, 158, 112), light))


def _paint_grass(pen: ImageDraw.ImageDraw, draws: Draws, light: int, side: int) -> None:
    for _ in range(110):
        x, y, lean = draws.uniform(0, side), draws.uniform(0, side), draws.uniform(-6, 6)
        pen.line((x, y, x + lean, y - 18), fill=_lit((60, 100, 30), light), width=4)


def _paint_night(pen: ImageDraw.ImageDraw, draws: Draws, light: int, side: int) -> None:
    for _ in range(30):
        x, y, size = draws.uniform(0, side), draws.uniform(0, side), draws.uniform(3, 6)
        pen.ellipse((x, y, x + size, y + size), fill=_lit((244, 244, 210), light))


def _paint_brick(pen: ImageDraw.ImageDraw, draws: Draws, light: int, side: int) -> None:
    mortar = _lit((196, 180, 166), light)
    start = int(draws.uniform(0, 56))
    for row, y in enumerate(range(0, side, 32)):
        pen.line((0, y, side, y), fill=mortar, width=4)
        for left in range(start + row % 2 * 28 - 56, side, 56):
            pen.line((left, y, left, y + 32), fill=mortar, width=4)
