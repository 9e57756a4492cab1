"""Chunks of a store in the making: each is one file, there whole or not at all."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from msae.base.errors import StoreError
from msae.base.files import atomic_path
from msae.data.arrays import open_safetensors
from msae.data.store import MODALITIES, Modality
from msae.data.tables import first_line

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, eq=False)
class Chunk:
    """What a run of source positions adds to a store."""

    rows: dict[Modality, NDArray[np.float16]]
    metadata: pa.Table
    n_items: int
    """Samples of the source, embedded or not."""
    skipped: list[tuple[str, str]]
    """Id and reason of those that were not embedded."""
    converted: dict[str, int]
    """How many images needed which conversion."""
    n_truncated: int
    """Captions that were cut off."""


def list_chunks(folder: Path) -> list[Path]:
    """The committed chunks in their order.

    Raises:
        StoreError: One is missing in between.
    """
    files = sorted(folder.glob("chunk_*.safetensors"))
    for number, file in enumerate(files):
        if file != chunk_path(folder, number):
            raise StoreError(f"{chunk_path(folder, number)} is missing; delete {folder.parent.parent} and embed again")
    return files


def chunk_path(folder: Path, number: int) -> Path:
    """Where the chunk of this number belongs."""
    return folder / f"chunk_{number:08d}.safetensors"


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Commit a chunk: after this it survives a kill and a power cut."""
    import pyarrow as pa

    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, chunk.metadata.schema) as stream:
        stream.write_table(chunk.metadata)
    report = {
        "items": chunk.n_items,
        "skipped": chunk.skipped,
        "converted": chunk.converted,
        "truncated": chunk.n_truncated,
    }
    tensors: dict[str, NDArray[Any]] = {"metadata": np.frombuffer(buffer.getvalue(), np.uint8)}
    tensors.update((str(modality), rows) for modality, rows in chunk.rows.items())
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"report": json.dumps(report)})


def read_chunk(path: Path) -> Chunk:
    """A committed chunk; its rows are memory-mapped.

    Raises:
        StoreError: The file is damaged.
    """
    import pyarrow as pa

    tensors, strings = open_safetensors(path, StoreError)
    try:
        metadata = pa.ipc.open_stream(pa.py_buffer(tensors["metadata"].values)).read_all()
        report = json.loads(strings["report"])
        return Chunk(
            {name: tensors[name].values for name in MODALITIES if name in tensors},
            metadata,
            report["items"],
            [(id, reason) for id, reason in report["skipped"]],
            report["converted"],
            report["truncated"],
        )
    except (pa.ArrowException, KeyError, ValueError, TypeError) as err:
        raise StoreError(f"{path} is damaged ({first_line(err)}); delete it and all later ones") from err
