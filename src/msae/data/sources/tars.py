"""Samples of webdataset shards, read in memory: no member is ever written to disk or unpickled."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msae.base.errors import MissingDependencyError
from msae.data.tables import CAPTION_COLUMNS

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
_TEXTS = ("txt", "caption", "text")
_DAMAGE = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    zlib.error,
)
"""What tarfile and webdataset raise when they trip over damaged bytes."""


@dataclass(frozen=True)
class TarSample:
    """The members of one key."""

    key: str
    image: bytes | None = None
    caption: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    damage: str | None = None


def expand(pattern: str) -> list[Path]:
    """The paths that a pattern such as `shards/{000..012}.tar` stands for."""
    try:
        from braceexpand import braceexpand  # comes with webdataset
    except ImportError:
        raise MissingDependencyError.of("webdataset", extra="sources") from None
    return [Path(path) for path in braceexpand(pattern)]


def samples(paths: Sequence[Path]) -> Iterator[TarSample]:
    """The samples of the shards in order; a damaged shard gives one that says so, then the next follows."""
    try:
        from webdataset import tariterators
    except ImportError:
        raise MissingDependencyError.of("webdataset", extra="sources") from None

    for path in paths:
        try:
            with path.open("rb") as stream:  # opened here: webdataset would run a path like `pipe:command`
                shard = {"url": str(path), "stream": stream}
                files = tariterators.tar_file_expander([shard], select_files=_is_wanted)
                for members in tariterators.group_by_keys(files):
                    yield _sample(members)
            if not _has_end(path):  # tarfile takes a cut between two members for the end
                raise tarfile.ReadError("it has no end-of-archive mark")
        except _DAMAGE as err:
            reason = (str(err.args[0]) if err.args else type(err).__name__).split(" @ ")[0].splitlines()[0]
            yield TarSample(path.name, damage=f"damaged shard: {reason}; the samples after this point are lost")


def _has_end(path: Path) -> bool:
    """Whether a tar ends in its two blocks of zeros; a compressed one is checked as it is unpacked."""
    with path.open("rb") as file:
        is_plain = file.read(512)[257:262] == b"ustar"
        file.seek(max(0, path.stat().st_size - 1024))
        return not is_plain or not any(file.read())


def _is_wanted(name: str) -> bool:
    return name.lower().endswith((*_IMAGES, *_TEXTS, "json"))


def _sample(members: Mapping[str, Any]) -> TarSample:
    key = str(members["__key__"])
    image = next((members[suffix] for suffix in _IMAGES if suffix in members), None)
    try:
        text = next((members[suffix].decode("utf-8") for suffix in _TEXTS if suffix in members), None)
        record = json.loads(members["json"]) if "json" in members else {}
    except ValueError as err:
        return TarSample(key, damage=f"damaged .txt or .json: {err}")
    columns = {name: value for name, value in record.items() if _is_plain(value)} if isinstance(record, dict) else {}
    for name in ("id", "image_path"):  # the key is the id
        columns.pop(name, None)
    found = [columns.pop(name) for name in CAPTION_COLUMNS if isinstance(columns.get(name), str)]
    return TarSample(key, image, text if text is not None else next(iter(found), None), columns)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
