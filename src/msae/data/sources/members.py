"""`SourceItem`: one sample; and samples of files that share a name: a picture, a caption in .txt, a class in .cls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from msae.base.errors import first_line
from msae.data.images import SUFFIXES as IMAGE_SUFFIXES
from msae.data.sources.remote import File
from msae.data.tables import CAPTION_COLUMNS

TEXTS = (".txt", ".caption", ".text")
LABELS = (".cls",)
SUFFIXES = frozenset({*IMAGE_SUFFIXES, *TEXTS, *LABELS, ".json"})


@dataclass(frozen=True)
class SourceItem:
    """One sample, not yet decoded."""

    id: str
    """Not necessarily unique: `embed` numbers repeated ones."""
    image: File | bytes | None = None
    caption: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else is known about it."""
    damage: str | None = None
    """Why the sample cannot be used at all, where reading it has already failed."""


def described(sample: SourceItem, files: Mapping[str, bytes]) -> SourceItem:
    """`sample` with the caption, the label and the other columns that its files, by their suffix, hold.

    Of several captions the first is the caption and all are the column `captions`.
    """
    try:
        text = next((files[suffix].decode("utf-8-sig") for suffix in TEXTS if suffix in files), None)
        label = next((files[suffix].decode("utf-8").strip() for suffix in LABELS if suffix in files), None)
        record = json.loads(files[".json"]) if ".json" in files else {}
    except (ValueError, RecursionError) as err:
        return replace(sample, damage=f"damaged .txt, .cls or .json: {first_line(err)}")
    if not isinstance(record, dict):
        record = {"caption": record} if isinstance(record, str | list) else {}
    columns = {name: value for name, value in record.items() if _is_plain(value)}
    for name in ("id", "image_path"):  # the key is the id
        columns.pop(name, None)
    captions: list[str] = []
    for name in (*CAPTION_COLUMNS, "captions"):
        found = texts_of(record.get(name))
        captions = captions or found
        if isinstance(record.get(name), str):
            del columns[name]
    if len(captions) > 1:
        columns["captions"] = captions
    if label is not None:
        columns["cls" if "label" in columns else "label"] = label
    return replace(sample, caption=text if text is not None else next(iter(captions), None), columns=columns)


def texts_of(value: object) -> list[str]:
    """The captions in a value: a text, or those of a list that are not blank."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [text for text in value if isinstance(text, str) and text.strip()]
    return []


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
