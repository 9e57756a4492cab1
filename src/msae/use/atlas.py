"""Rows for embedding-atlas: one parquet with pictures, embeddings, and the concepts that fire in each row."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msae.base.errors import ConfigError
from msae.concepts.names import ConceptNames, as_names, names_of
from msae.data.store import EmbeddingStore
from msae.data.thumbnails import as_jpeg, thumbnail
from msae.sae.model import Inference
from msae.sae.run import Run
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.codes import ROW_GROUP, codes_of

SIDE = 256
"""Pixels of a picture's longer side."""
OURS = ("image", "embedding", "features")


class Rows(NamedTuple):
    """What was written."""

    modality: Modality
    n_images: int
    notes: tuple[str, ...]


def write_atlas(
    run: Run,
    on: EmbeddingStore | str | Path | None,
    folder: Path,
    modality: Modality | None,
    *,
    inference: Inference = "trained",
    k: int | None = None,
    names: ConceptNames | str | Path | None = None,
) -> Rows:
    """Write rows.parquet: the store's columns, `embedding`, `image` where there are pictures, and `features`.

    A feature is a concept's name, or a latent's number as #12, with the run as its source; the strongest come first.

    Raises:
        ConfigError: The store has a column of one of these names.
        StoreError: The store does not fit the SAE or lacks the modality.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert on is not None
    view = View(run, on, modality, inference=inference, k=k, device="auto")
    known = as_names(names) if names is not None else names_of(run)
    store, metadata = view.store, view.store.metadata
    taken = [name for name in OURS if name in metadata.column_names]
    if taken:
        raise ConfigError(f"{store.address} has a column {taken[0]!r}, which the atlas needs for itself; rename it")
    labels = [(known.shown(latent) if known else None) or f"#{latent}" for latent in range(view.sae.d_sae)]
    feature = pa.struct([("feature", pa.string()), ("source", pa.string()), ("index", pa.int32())])
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    n_images, writer = 0, None
    try:
        for part in codes_of(view, at_least=ROW_GROUP, title="writing rows"):
            numbers = np.arange(part.first, part.first + len(part.counts))
            table = metadata.slice(part.first, len(numbers))
            x = store.take(numbers, view.modality)
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
            table = table.append_column("embedding", embedding)
            features = [
                [{"feature": labels[latent], "source": run.name, "index": latent} for latent in strongest]
                for strongest in _strongest_first(part.ends, part.latents, part.values)
            ]
            table = table.append_column("features", pa.array(features, pa.list_(feature)))
            rows = store.describe_rows(numbers)
            pictures = [thumbnail(row.path, store.picture_roots, SIDE) for row in rows]
            images = [
                None if image is None else {"bytes": as_jpeg(image), "path": row.path}
                for image, row in zip(pictures, rows, strict=True)
            ]
            n_images += sum(image is not None for image in images)
            table = table.append_column("image", pa.array(images, picture))
            writer = writer or pq.ParquetWriter(folder / "rows.parquet", table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    notes = [] if n_images == len(view) else [f"{len(view) - n_images:,} of {len(view):,} rows have no picture here"]
    return Rows(view.modality, n_images, tuple(notes))


def _strongest_first(ends: np.ndarray, latents: np.ndarray, values: np.ndarray) -> list[list[int]]:
    return [
        latents[first:last][np.argsort(-values[first:last], kind="stable")].tolist()
        for first, last in itertools.pairwise(ends)
    ]
