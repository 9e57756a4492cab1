"""Pictures out of files and bytes: always upright, three 8-bit channels, or a reason why not."""

from __future__ import annotations

import importlib
import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msae.base.errors import MissingDependencyError, SourceError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
    | {".heif", ".hif", ".jp2", ".j2k", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"}
)
"""Endings by which names of pictures are known; what a file is, its content says."""

MAX_PIXELS = 89_478_485
"""Larger images are taken for decompression bombs; Pillow warns from the same size on (256 MB as RGB)."""

MAX_ASPECT = 200
"""Longer and thinner images are refused: scaling the short side to an encoder's 224 pixels is a bomb too."""


_PNG = b"\x89PNG\r\n\x1a\n"
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_HEADER = 512  # bytes that tell what kind a file is


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

    _register_plugins()
    if isinstance(source, Path):
        source = _read_file(source)
    if not source:
        raise SourceError("empty file")
    if source[4:8] == b"ftyp" and source[8:12] in _HEIC and not _register_plugins():
        raise SourceError("a HEIC picture; to read such, type: pip install pillow-heif")
    if source.startswith(_PNG):
        source = _without_text(source)
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
        raise SourceError(f"damaged: {first_line(err)}") from err


@contextmanager
def quiet_about_size() -> Iterator[None]:
    """Without Pillow's warning about large images: `read_picture` refuses them with a reason."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@cache
def _register_plugins() -> bool:
    """Whether Pillow reads HEIC; where packages that teach Pillow more kinds are installed, they do so from now on."""
    for name in ("pillow_avif", "pillow_jxl"):  # importing them is enough
        with suppress(ImportError):
            importlib.import_module(name)
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
        return True
    return False


def _without_text(data: bytes) -> bytes:
    """A PNG without its text chunks: Pillow refuses a picture for a long text, which says nothing of its pixels."""
    kept, start = [data[: len(_PNG)]], len(_PNG)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[start:end])
        start = end
    return b"".join([*kept, data[start:]])


def _read_file(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe could wait for ever
            raise SourceError("not an ordinary file")
        with path.open("rb") as file:
            start = file.read(_HEADER)
            if _is_archive(start):  # possibly of many gigabytes
                raise SourceError("an archive, not an image; give it as a source of its own")
            if path.suffix.lower() not in SUFFIXES and not _is_known(path):  # such as a long film
                raise SourceError("not an image, or of an unknown kind")
            return start + file.read()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a null byte
        raise SourceError("no such file") from None
    except OSError as err:
        raise SourceError(f"unreadable: {err.strerror or err}") from err


def _is_known(path: Path) -> bool:
    """Whether Pillow, from the first bytes, takes a file for a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # noqa: BLE001 - a picture with something wrong, which reading it names
        return True


def _is_archive(start: bytes) -> bool:
    """Whether a file that begins so is a tar, zip, gzip, 7z or zstd file."""
    magics = (b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd")
    return start[257:262] == b"ustar" or start.startswith(magics)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SourceError(f"too large: {width} x {height} is more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SourceError(f"too long and thin: {width} x {height}")


def _to_rgb(image: Image) -> Picture:
    import PIL.Image

    conversions = []
    if getattr(image, "n_frames", 1) > 1:
        conversions.append("first frame of several")
    mode = image.mode
    upright = image
    if (turn := _turn(image)) is not None:
        upright = image.transpose(turn)
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


def _turn(image: Image) -> Transpose | None:
    """What shows the image upright. Only the orientation is read: other tags of the EXIF data may be damaged."""
    from PIL.Image import Transpose

    turns = (
        None,
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF data fails in many ways, and the pixels are whole
        return None
    return turns[orientation - 1] if isinstance(orientation, int) and 1 <= orientation <= 8 else None


def _upper_bits(image: Image) -> Image:
    import numpy as np
    import PIL.Image

    values = np.asarray(image).astype(np.int64)
    return PIL.Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
