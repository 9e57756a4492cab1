"""Contact sheets: the gallery of one latent as a picture, or as a page that opens offline."""

from __future__ import annotations

import base64
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from msae.base.errors import ConfigError
from msae.base.files import atomic_path
from msae.concepts.gallery import Gallery, Sample
from msae.data.thumbnails import thumbnail
from msae.web import page
from msae.web.overlay import as_svg, draw_on

if TYPE_CHECKING:
    from PIL import Image

SIDE = 128  # pixels of a thumbnail
MARGIN = 12
LINE = 15  # pixels from one line of text to the next
FONT_SIZE = 12
CAPTION_LINES = 3
TEXT_WIDTH = 400  # pixels of the column of texts
COLUMNS = 4
INK, PALE, PAPER = "#1a1a1a", "#6a6a6a", "#ffffff"


def write_sheet(gallery: Gallery, path: Path) -> None:
    """Write the gallery to `path`, a `.png` or an `.html`; atomically.

    Pictures are read from the paths in the store; one that is not there, or is no picture, is a grey field.

    Raises:
        ConfigError: `path` has another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".html"):
        raise ConfigError(f"{path} cannot be a contact sheet; give --sheet a name that ends in .png or .html")
    if suffix == ".html":
        page.write_page(as_html(gallery), path)
        return
    sheet = draw_sheet(gallery)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def draw_sheet(gallery: Gallery, *, columns: int = COLUMNS) -> Image.Image:
    """Images with their activations and captions on the left, texts on the right, the strongest first."""
    from PIL import Image, ImageDraw, ImageFont

    font, large = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE + 6)
    cell = SIDE + MARGIN, SIDE + (1 + CAPTION_LINES) * LINE + MARGIN
    n_rows = -(-len(gallery.images) // columns)
    top = 62
    texts = [_wrap(f"{text.activation:.2f}  {text.words}", 58, 2) for text in gallery.texts]
    height = top + max(n_rows * cell[1], sum(len(lines) for lines in texts) * LINE + 4 * len(texts) + LINE) + MARGIN
    left = columns * cell[0] + MARGIN if gallery.images else 0
    sheet = Image.new("RGB", (MARGIN + left + (TEXT_WIDTH if texts else 0), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), _title(gallery), fill=INK, font=large)
    pen.text((MARGIN, MARGIN + 26), _subtitle(gallery), fill=PALE, font=font)
    for i, sample in enumerate(gallery.images):
        x, y = MARGIN + i % columns * cell[0], top + i // columns * cell[1]
        sheet.paste(_thumbnail(gallery, sample, regions=True), (x, y))
        place = f" · {sample.region.words}" if sample.region else ""
        lines = [f"{sample.activation:.2f}{place}", *_wrap(sample.words, 20, CAPTION_LINES)]
        for j, line in enumerate(lines):
            pen.text((x, y + SIDE + 2 + j * LINE), line, fill=PALE if j else INK, font=font)
    y = top
    for lines in texts:
        for line in lines:
            pen.text((MARGIN + left, y), line, fill=INK, font=font)
            y += LINE
        y += 4
    return sheet


def as_html(gallery: Gallery) -> str:
    """One page with everything in it; whatever comes from the store is escaped."""
    images = [(sample, _inline(_thumbnail(gallery, sample)), as_svg(sample.region)) for sample in gallery.images]
    return page.render("report/sheet.html", gallery=gallery, title=_title(gallery), subtitle=_subtitle(gallery),
                       images=images, side=SIDE)  # fmt: skip


def _inline(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _thumbnail(gallery: Gallery, sample: Sample, *, regions: bool = False) -> Image.Image:
    """The picture on a square; a grey one where there is none to read."""
    from PIL import Image, ImageOps

    picture = thumbnail(sample.path, gallery.roots, SIDE)
    if picture is not None and regions and sample.region is not None:
        picture = draw_on(picture, sample.region)
    return (
        Image.new("RGB", (SIDE, SIDE), "#d8d8d8")
        if picture is None
        else ImageOps.pad(picture, (SIDE, SIDE), color=PAPER)
    )


def _title(gallery: Gallery) -> str:
    return f"{gallery.shown or gallery.name or 'unnamed'}  (latent {gallery.latent})"


def _subtitle(gallery: Gallery) -> str:
    return "; ".join(
        f"{modality}s: fires in {known['firing_rate']:.1%}, median {known['p50']:.2f}, p99 {known['p99']:.2f}"
        for modality, known in gallery.statistics.items()
    )


def _wrap(text: str, width: int, n_lines: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, max_lines=n_lines, placeholder=" …") or [""]
