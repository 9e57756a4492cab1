"""Pictures out of files and bytes: always upright, three 8-bit channels, or a reason why not."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msae.base.errors import MissingDependencyError, SourceError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})

MAX_PIXELS = 89_478_485
"""Larger images are taken for decompression bombs; Pillow warns from the same size on (256 MB as RGB)."""

MAX_ASPECT = 200
"""Longer and thinner images are refused: scaling the short side to an encoder's 224 pixels is a bomb too."""


class Picture(NamedTuple):
    """A decoded image."""

    image: Image
    """RGB, upright."""
    conversions: tuple[str, ...]
    """What had to be done to it, such as `CMYK to RGB`; empty for an ordinary RGB image."""


def read_picture(source: Path | bytes) -> Picture:
    """The picture in a file or in its bytes.

    EXIF orientation is applied, transparency becomes white, 16-bit greys keep their upper 8 bits, and of an
    animation the first frame is taken.

    Raises:
        SourceError: With the bare reason: missing, empty, no image, truncated, or too large.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingDependencyError.of("pillow", extra="clip") from None

    if isinstance(source, Path):
        source = _read_file(source)
    if not source:
        raise SourceError("empty file")
    try:
        with Image.open(io.BytesIO(source)) as image:
            _check_size(*image.size)
            return _to_rgb(image)
    except Image.DecompressionBombError:
        raise SourceError(f"too large: more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise SourceError("not an image, or of an unknown kind") from None
    except SourceError:
        raise
    except Exception as err:  # decoders raise whatever they trip over in damaged bytes
        raise SourceError(f"damaged: {(str(err) or type(err).__name__).splitlines()[0]}") from err


@contextmanager
def quiet_about_size() -> Iterator[None]:
    """Without Pillow's warning about large images: `read_picture` refuses them with a reason."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _read_file(path: Path) -> bytes:
    if not path.exists():
        raise SourceError("no such file")
    if not path.is_file():  # reading a pipe could wait for ever
        raise SourceError("not an ordinary file")
    try:
        return path.read_bytes()
    except OSError as err:
        raise SourceError(f"unreadable: {err.strerror or err}") from err


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SourceError(f"too large: {width} x {height} is more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SourceError(f"too long and thin: {width} x {height}")


def _to_rgb(image: Image) -> Picture:
    import PIL.Image
    import PIL.ImageOps

    conversions = []
    if getattr(image, "n_frames", 1) > 1:
        conversions.append("first frame of several")
    mode = image.mode
    upright: Image = PIL.ImageOps.exif_transpose(image)
    if image.getexif().get(0x0112, 1) != 1:
        conversions.append("turned upright")
    if mode == "F":
        raise SourceError("floating-point pixels, of which white is unknown")
    if upright.mode.startswith("I"):  # 16-bit greys; convert() would clip them to white
        upright = _upper_bits(upright)
        conversions.append("16-bit to 8-bit")
    elif upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        white = PIL.Image.new("RGBA", upright.size, "white")
        upright = PIL.Image.alpha_composite(white, upright)
        conversions.append("transparency to white")
    elif mode != "RGB":
        conversions.append(f"{mode} to RGB")
    return Picture(upright.convert("RGB"), tuple(conversions))


def _upper_bits(image: Image) -> Image:
    import numpy as np
    import PIL.Image

    values = np.asarray(image).astype(np.int64)
    return PIL.Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
