"""Chunks: what `embed` has done so far, a file for each run of source positions."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from msae.base.errors import StoreError, first_line
from msae.base.files import atomic_path
from msae.base.records import of_record, to_record
from msae.data.arrays import open_safetensors
from msae.data.layout import MODALITIES, Modality
from msae.data.store import Skipped

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class Report:
    """What became of some samples of a source."""

    items: int = 0
    """Samples, embedded or not."""
    skipped: list[Skipped] = field(default_factory=list)
    """Those that were not embedded."""
    converted: dict[str, int] = field(default_factory=dict)
    """How many images needed which conversion."""
    truncated: int = 0
    """Captions that were cut off."""

    def add(self, other: Report) -> None:
        """Count what became of other samples too."""
        self.items += other.items
        self.skipped += other.skipped
        self.converted = dict(Counter(self.converted) + Counter(other.converted))
        self.truncated += other.truncated


@dataclass(frozen=True, eq=False)
class Chunk:
    """What a run of source positions adds to a store."""

    rows: dict[Modality, NDArray[np.float16]]
    metadata: pa.Table
    report: Report


def list_chunks(folder: Path) -> list[Path]:
    """The committed chunks in their order."""
    return sorted(folder.glob("chunk_*.safetensors"))


def chunk_numbers(folder: Path) -> list[int]:
    """The numbers of the committed chunks, increasing."""
    return [int(file.stem.removeprefix("chunk_")) for file in list_chunks(folder)]


def gaps(there: Iterable[int], first: int, last: int | None) -> Iterator[tuple[int, int | None]]:
    """The runs of numbers from `first` to before `last` that are not `there`; without `last` the final run is endless.

    Args:
        there: Increasing numbers.
    """
    for number in there:
        if first < number and (last is None or first < last):
            yield first, number if last is None else min(number, last)
        first = max(first, number + 1)
    if last is None or first < last:
        yield first, last


def chunk_path(folder: Path, number: int) -> Path:
    """Where the chunk of this number belongs."""
    return folder / f"chunk_{number:08d}.safetensors"


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Commit a chunk: after this it survives a kill and a power cut."""
    import pyarrow as pa

    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, chunk.metadata.schema) as stream:
        stream.write_table(chunk.metadata)
    tensors: dict[str, NDArray[Any]] = {"metadata": np.frombuffer(buffer.getvalue(), np.uint8)}
    tensors.update((str(modality), rows) for modality, rows in chunk.rows.items())
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"report": json.dumps(to_record(chunk.report))})


def read_chunk(path: Path) -> Chunk:
    """A committed chunk; its rows are memory-mapped.

    Raises:
        StoreError: The file is damaged.
    """
    import pyarrow as pa

    tensors, strings = open_safetensors(path, StoreError)
    remedy = "delete it and all later ones"
    try:
        metadata = pa.ipc.open_stream(pa.py_buffer(tensors["metadata"].values)).read_all()
        report = json.loads(strings["report"])
    except (pa.ArrowException, KeyError, ValueError, TypeError) as err:
        raise StoreError(f"{path} is damaged ({first_line(err)}); {remedy}") from err
    rows = {name: tensors[name].values for name in MODALITIES if name in tensors}
    return Chunk(rows, metadata, of_record(Report, report, where=str(path), error=StoreError, remedy=remedy))
