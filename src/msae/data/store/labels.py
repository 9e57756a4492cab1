"""Labels: which rows of a metadata column have one, and what the classes are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

_WRITTEN_NAN = ("nan", "<na>")
"""What a missing value becomes when it is written as text, in lower case."""


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
    return np.array([row for row, name in enumerate(names) if name is not None], dtype=np.int64)
