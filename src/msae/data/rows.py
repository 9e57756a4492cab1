"""`Row`: what the metadata say of one row of a store, and what a value of them means."""

from __future__ import annotations

import math
import os.path
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from msae.base.errors import StoreError, nearest
from msae.base.records import to_record
from msae.data.tables import CAPTION_COLUMNS

PATH_COLUMNS = ("image_path", "path")
_WRITTEN_NAN = ("nan", "<na>")
"""What a missing value becomes when it is written as text, in lower case."""
MAX_SHOWN = 100
"""Characters of a value in the repr of a row."""


@dataclass(frozen=True)
class Row:
    """One row of a store: its number, id, picture, caption and other metadata."""

    row: int
    id: str
    path: str | None
    """Of the picture, as the store lists it; `find_picture` says where it lies."""
    caption: str | None
    columns: Mapping[str, Any]
    """What else the metadata says, such as labels, in values that JSON can hold."""
    show: tuple[str, ...] = field(default=(), kw_only=True)
    """Columns that a person asked to see."""

    @property
    def words(self) -> str:
        """What a person reads: the caption, else the label, else the id; then the columns of `show`."""
        label = self.columns.get("label")
        text = self.caption or ("" if is_missing(label) else str(label)) or self.id
        return f"{text} · {self.note}" if self.note else text

    @property
    def note(self) -> str:
        """The columns of `show`, as in `colour: red · size: 3`; those without a value are left out."""
        known = {"id": self.id, **dict.fromkeys(PATH_COLUMNS, self.path), **self.columns}
        return " · ".join(f"{name}: {known[name]}" for name in self.show if not is_missing(known.get(name)))

    def to_json(self) -> dict[str, Any]:
        record = dict(to_record(self))
        del record["show"]  # how to print it, not what it is
        return record

    def __repr__(self) -> str:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        more = {name: value for name, value in own.items() if name not in Row.__dataclass_fields__}
        known = {"id": self.id, "image_path": self.path, "caption": self.caption, **more, **self.columns}
        shown = [
            f"{name if name.isidentifier() else repr(name)}={_shortened(value)}"
            for name, value in known.items()
            if value is not None
        ]
        return f"{type(self).__name__}({', '.join([str(self.row), *shown])})"

    @classmethod
    def of(cls, row: int, metadata: Mapping[str, Any], show: tuple[str, ...] = ()) -> Row:
        """The row with these metadata, `id` among them. A title is its caption where it can have no other."""
        columns = {name: _plain(value) for name, value in metadata.items() if name not in ("id", *PATH_COLUMNS)}
        path = next((metadata[name] for name in PATH_COLUMNS if metadata.get(name) is not None), None)
        caption = next((columns.pop(name) for name in (*CAPTION_COLUMNS, "title") if name in columns), None)
        return cls(row, str(metadata["id"]), _text(path), _text(caption), columns, show=show)


def names_to_show(show: str | Sequence[str], columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns that `--show` names: one a word, or several divided by commas.

    Raises:
        StoreError: There is no such column.
    """
    found: list[str] = []
    for word in [show] if isinstance(show, str) else show:
        found += [word] if word in columns else [name.strip() for name in word.split(",") if name.strip()]
    unknown = next((name for name in found if name not in columns and name != "id"), None)
    if unknown is not None:
        raise StoreError(no_column(where, unknown, columns, "--show"))
    return tuple(dict.fromkeys(found))


def no_column(where: str, name: str, columns: Sequence[str], option: str | None = None) -> str:
    """The message about a column that is not there, with the option that takes one."""
    near = nearest(name, columns)
    if near or not columns:
        return f"{where} has no column {name!r}{near or '; it has no metadata'}"
    give = f": give {option} one of these" if option else ""
    return f"{where} has no column {name!r}; it has {', '.join(columns)}{give}"


def find_picture(path: str | None, roots: Iterable[Path]) -> Path | None:
    """The file of a picture that a store lists, or None where none of its folders has it.

    A relative path that climbs out of its folder is not followed: it is no picture of that store. Where there are no
    folders, no path is.
    """
    roots = tuple(roots)
    if path is None or not roots or Path(os.path.normpath(path)).parts[:1] == ("..",):
        return None
    places = [Path(path)] if Path(path).is_absolute() else [root / path for root in roots]
    return next((place for place in places if place.is_file()), None)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _text(value: Any) -> str | None:
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 2]}…{text[-1]}"


def is_missing(value: Any) -> bool:
    """Whether a row with this value has no label: null, NaN, blank text, or NaN written as text."""
    if isinstance(value, str):
        text = value.strip()
        return not text or text.casefold() in _WRITTEN_NAN
    return value is None or (isinstance(value, float) and math.isnan(value))


def class_names(values: Iterable[Any]) -> list[str | None]:
    """The name of each value's class: the value as text; None where the label is missing.

    Classes are compared by their names, so the number 1 and the text `1` are one class.
    """
    return [None if is_missing(value) else str(value) for value in values]


def labelled_rows(names: Sequence[str | None]) -> Int64[np.ndarray, " n"]:
    """The rows that have a label."""
    return np.flatnonzero(np.fromiter((name is not None for name in names), bool, len(names)))
