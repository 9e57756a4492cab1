"""Contact sheets: the gallery of one latent as a picture, or as a page that opens offline."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from msae.base.errors import ConfigError, MissingDependencyError
from msae.base.files import atomic_path
from msae.concepts.gallery import Gallery, Sample
from msae.data.thumbnails import thumbnail

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
        MissingDependencyError: Pillow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".html"):
        raise ConfigError(f"{path} cannot be a contact sheet; give --sheet a name that ends in .png or .html")
    if suffix == ".html":
        page = as_html(gallery)
        with atomic_path(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return
    sheet = draw_sheet(gallery)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def draw_sheet(gallery: Gallery, *, columns: int = COLUMNS) -> Image.Image:
    """Images with their activations and captions on the left, texts on the right, the strongest first."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as err:
        raise MissingDependencyError.of("pillow", extra="clip") from err
    font, large = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE + 6)
    cell = SIDE + MARGIN, SIDE + (1 + CAPTION_LINES) * LINE + MARGIN
    n_rows = -(-len(gallery.images) // columns)
    top = 62
    texts = [_wrap(f"{text.activation:.2f}  {text.caption or text.id}", 58, 2) for text in gallery.texts]
    height = top + max(n_rows * cell[1], sum(len(lines) for lines in texts) * LINE + 4 * len(texts) + LINE) + MARGIN
    left = columns * cell[0] + MARGIN if gallery.images else 0
    sheet = Image.new("RGB", (MARGIN + left + (TEXT_WIDTH if texts else 0), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), _title(gallery), fill=INK, font=large)
    pen.text((MARGIN, MARGIN + 26), _subtitle(gallery), fill=PALE, font=font)
    for i, sample in enumerate(gallery.images):
        x, y = MARGIN + i % columns * cell[0], top + i // columns * cell[1]
        sheet.paste(_thumbnail(gallery, sample), (x, y))
        lines = [f"{sample.activation:.2f}", *_wrap(sample.caption or sample.id, 20, CAPTION_LINES)]
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
    title = html.escape(_title(gallery))
    figures = "\n".join(_figure(gallery, sample) for sample in gallery.images)
    texts = "\n".join(
        f"<li><b>{text.activation:.2f}</b> {html.escape(text.caption or text.id)}</li>" for text in gallery.texts
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in gallery.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; color: {INK}; margin: 1.5rem; }}
main {{ display: flex; flex-wrap: wrap; gap: 2rem; }}
.images {{ display: grid; grid-template-columns: repeat({COLUMNS}, {SIDE}px); gap: {MARGIN}px; align-content: start; }}
figure {{ margin: 0; overflow-wrap: anywhere; }} img {{ display: block; }} p, figcaption {{ color: {PALE}; }}
</style></head><body>
<h1>{title}</h1><p>{html.escape(_subtitle(gallery))}</p>{notes}
<main><section class="images">
{figures}
</section><ol>
{texts}
</ol></main>
</body></html>
"""


def _figure(gallery: Gallery, sample: Sample) -> str:
    try:
        data = io.BytesIO()
        _thumbnail(gallery, sample).save(data, format="PNG")
    except ImportError as err:
        raise MissingDependencyError.of("pillow", extra="clip") from err
    source = base64.b64encode(data.getvalue()).decode("ascii")
    words = html.escape(sample.caption or sample.id)
    alt = html.escape(sample.id, quote=True)
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{alt}" width="{SIDE}" height="{SIDE}">'
        f"<b>{sample.activation:.2f}</b><figcaption>{words}</figcaption></figure>"
    )


def _thumbnail(gallery: Gallery, sample: Sample) -> Image.Image:
    """The picture on a square; a grey one where there is none to read."""
    from PIL import Image, ImageOps

    picture = thumbnail(sample.path, gallery.roots, SIDE)
    return (
        Image.new("RGB", (SIDE, SIDE), "#d8d8d8")
        if picture is None
        else ImageOps.pad(picture, (SIDE, SIDE), color=PAPER)
    )


def _title(gallery: Gallery) -> str:
    return f"{gallery.name or 'unnamed'}  (latent {gallery.latent})"


def _subtitle(gallery: Gallery) -> str:
    return "    ".join(
        f"{modality}s: fires on {known['firing_rate']:.1%}, median {known['p50']:.2f}, p99 {known['p99']:.2f}"
        for modality, known in gallery.statistics.items()
    )


def _wrap(text: str, width: int, n_lines: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, max_lines=n_lines, placeholder=" …") or [""]
