"""What a person sees of a row: its id, its picture, its caption, and what else the metadata says."""

from __future__ import annotations

import math
import os.path
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH_COLUMNS = ("image_path", "path")
CAPTION_COLUMNS = ("caption", "text")


@dataclass(frozen=True)
class Row:
    """One row of a store."""

    row: int
    id: str
    path: str | None
    """Of the picture, as the store lists it; `find_picture` says where it lies."""
    caption: str | None
    columns: Mapping[str, Any]
    """What else the metadata says, such as labels, in values that JSON can hold."""

    @property
    def words(self) -> str:
        """What a person reads: the caption, else the label, else the id."""
        return self.caption or str(self.columns.get("label") or "") or self.id

    @classmethod
    def of(cls, row: int, metadata: Mapping[str, Any]) -> Row:
        """The row with these metadata, `id` among them."""
        columns = {name: _plain(value) for name, value in metadata.items() if name not in ("id", *PATH_COLUMNS)}
        path = next((metadata[name] for name in PATH_COLUMNS if metadata.get(name) is not None), None)
        caption = next((columns.pop(name) for name in CAPTION_COLUMNS if name in columns), None)
        return cls(row, str(metadata["id"]), _text(path), _text(caption), columns)


def find_picture(path: str | None, roots: Iterable[Path]) -> Path | None:
    """The file of a picture that a store lists, or None where none of its folders has it.

    A relative path that climbs out of its folder is not followed: it is no picture of that store.
    """
    if path is None or Path(os.path.normpath(path)).parts[:1] == ("..",):
        return None
    places = [Path(path)] if Path(path).is_absolute() else [root / path for root in roots]
    return next((place for place in places if place.is_file()), None)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
