"""`NeighbourIndex`: every row in float16 in a file of faiss; each query is compared with all of them.

The scores of float16 are off by up to `ERROR`, so the best rows are scored again in float32 from the store: what comes
back is what a float32 search of every row would have found.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msae.base.errors import StoreError
from msae.base.files import atomic_path, writable_cache, write_json
from msae.data.arrays import unit_rows
from msae.use.neighbours.base import (
    SCHEMA_VERSION,
    FaissRows,
    Rows,
    _log,
    find_index,
    header_of,
    load_faiss,
)

ERROR = 6e-4
"""Largest error of an inner product of two unit vectors, one of them rounded to float16 (2**-11), with slack for
its numbers below the normal range of float16 and for summation."""
_VECTOR_AT = -8  # where the header has the number of bytes that follow


@dataclass(frozen=True, eq=False)
class NeighbourIndex(FaissRows):
    """All rows in float16. Its answers are exact."""

    @classmethod
    def open(
        cls,
        place: Path,
        name: str,
        *,
        fingerprint: str,
        n_rows: int,
        d_in: int,
        rows: Rows,
        batches: Callable[[], Iterable[NDArray[np.float32]]],
    ) -> NeighbourIndex:
        """The index `name` in the folder `place`, built first where it is missing, damaged or of other rows.

        Args:
            place: Where nothing can be written, a folder in the user's cache is used instead.
            fingerprint: Of the rows; an index with another one is rebuilt.
            rows: Reads raw rows by number, to score candidates exactly.
            batches: Gives all raw rows in order, to build from.

        Raises:
            MissingDependencyError: faiss is not installed.
            StoreError: The index cannot be read back; the disk is full or damaged.
        """
        faiss = load_faiss()
        wanted = {"fingerprint": fingerprint, "rows": n_rows, "d_in": d_in, "metric": "cosine", "dtype": "float16"}
        found = find_index(place, name, wanted, faiss.IO_FLAG_MMAP_IFC, dict)
        if found is None:
            file = writable_cache(place) / f"{name}.faiss"
            _build(faiss, file, wanted, batches())
            found = find_index(file.parent, name, wanted, faiss.IO_FLAG_MMAP_IFC, dict)
            if found is None:
                raise StoreError(f"{file} cannot be read back after it was written; check the disk and its free space")
        return cls(found[0], n_rows, d_in, ERROR, found[1], rows)


def _build(faiss: Any, file: Path, wanted: dict[str, Any], batches: Iterable[NDArray[np.float32]]) -> None:
    """Write the index, a batch at a time: the file of an empty one with its two counts filled in, then the rows."""
    _log.info("building %s", file)
    record = file.with_suffix(".json")
    record.unlink(missing_ok=True)
    n_rows, d_in = wanted["rows"], wanted["d_in"]
    empty = faiss.IndexScalarQuantizer(d_in, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    header = header_of(faiss, empty, n_rows)
    struct.pack_into("<Q", header, len(header) + _VECTOR_AT, 2 * n_rows * d_in)
    with atomic_path(file) as temporary, temporary.open("wb") as out:
        out.write(header)
        for x in batches:
            out.write(unit_rows(x).astype("<f2").tobytes())
        n_bytes = out.tell()
    write_json(record, {**wanted, "bytes": n_bytes}, schema_version=SCHEMA_VERSION)
