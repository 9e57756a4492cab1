"""The rows of a store by cosine. `open_index` gives one of three kinds.

`NeighbourIndex` (flat.py) has every row in float16 and is exact; `CellIndex` (cells.py), for many millions of rows,
compares a query only with the rows of some cells, and knows what it misses; `ExactRows` (exact.py) reads every row,
where faiss is not installed. An index is built once and lies beside the run or in the user's cache folder, never in
the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from msae.base.errors import ConfigError
from msae.base.files import user_cache
from msae.base.progress import progress
from msae.data.layout import Modality
from msae.data.store import EmbeddingStore
from msae.use.neighbours.base import BLOCK, BUILD_ROWS, Neighbourhood, Neighbours, has_faiss
from msae.use.neighbours.cells import WANTED, CellIndex
from msae.use.neighbours.exact import ExactRows
from msae.use.neighbours.flat import NeighbourIndex

__all__ = [
    "BLOCK", "WANTED", "CellIndex", "ExactRows", "IndexKind", "NeighbourIndex", "Neighbourhood", "Neighbours",
    "open_index",
]  # fmt: skip

IndexKind: TypeAlias = Literal["auto", "exact", "ivf"]
MANY_ROWS = 3_000_000
"""From here on `auto` takes cells: an exact search of this many rows takes about half a second."""


def open_index(
    store: EmbeddingStore, modality: Modality, folder: Path | None = None, kind: IndexKind = "auto"
) -> Neighbourhood:
    """The index of a store, built when first asked for; without faiss, the rows themselves.

    Args:
        folder: A run folder, in whose `index/` it lies. Without one, in the user's cache folder.
        kind: `ivf` takes cells, `exact` does not, `auto` goes by the number of rows.

    Raises:
        ConfigError: There is no such kind.
        StoreError: The store has no rows of `modality`, or they hold NaN; the disk has no room for the index.
        MissingDependencyError: faiss is not installed, for `ivf`.
    """
    if kind not in get_args(IndexKind):
        raise ConfigError(f"index {kind!r} is unknown; give auto, exact or ivf")
    if kind != "ivf" and not has_faiss():
        return ExactRows(store, modality)
    path = store.path.resolve()
    own = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    place, name = (folder or user_cache()) / "index", f"{path.name}-{modality}-{own}"
    if kind == "ivf" or (kind == "auto" and len(store) >= MANY_ROWS):
        return CellIndex.open(place, name, store, modality)
    return NeighbourIndex.open(
        place,
        name,
        fingerprint=store.fingerprint,
        n_rows=len(store),
        d_in=store.d_in,
        rows=lambda rows: store.take(rows, modality),
        batches=lambda: _watched(store, modality),
    )


def _watched(store: EmbeddingStore, modality: Modality) -> Iterator[NDArray[np.float32]]:
    with progress("building the index", total=len(store), unit="rows") as advance:
        for batch in store.batches(modality, BUILD_ROWS):
            yield batch
            advance(len(batch))
