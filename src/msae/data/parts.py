"""A part of a store, written `STORE:column=value`: the rows that have this value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msae.base.errors import StoreError, nearest
from msae.data.store import EmbeddingStore, as_store

_WRITTEN = re.compile(r"(?P<store>.+?):(?P<column>[^:=/\\]+)=(?P<value>.*)", re.DOTALL)


class Part(NamedTuple):
    """Some rows of a store."""

    store: EmbeddingStore
    column: str | None
    """None where it is the whole store."""
    value: str | None
    rows: NDArray[np.int64]
    others: NDArray[np.int64]
    """Rows with another value; those without a value are in neither."""

    @property
    def shown(self) -> str:
        name = self.store.path.name
        return name if self.column is None else f"{name}:{self.column}={self.value}"


def read_part(written: EmbeddingStore | str | Path) -> Part:
    """The rows that `STORE` or `STORE:column=value` speaks of.

    Raises:
        StoreError: There is no such store or column, or no row has the value; the message names the nearest one.
    """
    found = _WRITTEN.fullmatch(written) if isinstance(written, str) and not Path(written).exists() else None
    if found is None:
        store = as_store(written)
        return Part(store, None, None, np.arange(len(store)), np.arange(0))
    return part_of(as_store(found["store"]), found["column"], found["value"])


def part_of(store: EmbeddingStore, column: str, value: str) -> Part:
    """The rows whose `column` is `value`, written as text.

    Raises:
        StoreError: As `read_part`.
    """
    numbers, known = store.coded_labels(column)
    own = known.index(value) if value in known else -2
    rows, others = np.flatnonzero(numbers == own), np.flatnonzero((numbers >= 0) & (numbers != own))
    if not len(rows):
        known.sort()
        hint = nearest(value, known) or f"; it has {', '.join(known[:8])}"
        raise StoreError(f"no row of {store.address} has {column} = {value!r}{hint}")
    return Part(store, column, value, rows, others)
