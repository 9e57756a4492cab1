"""Scenes of the demo's world, drawn and embedded without a file for each; for two benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from msae.data.embedder import Embedder
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.world.drawing import render

_KINDS = ("shape", "colour", "size", "texture")
SCHEMA = pa.schema(
    [(column, pa.string()) for column in ("id", "caption", "background", *_KINDS)]
    + [(column, pa.bool_()) for column in ("hat", "frame", "shadow")]
)


def embedded_scenes(
    path: Path, embedder: Embedder, seeds: range, fixed: Callable[[int], Mapping[str, Any]]
) -> EmbeddingStore:
    """The scenes of these seeds with what is fixed of each; read where they are there."""
    if path.exists():
        store = EmbeddingStore.open(path)
        if store.ids[0] != str(seeds[0]):
            raise SystemExit(f"{path} begins with scene {store.ids[0]}, wanted {seeds[0]}; give another --folder")
        return store

    def parts() -> Iterator[StorePart]:
        for first in range(0, len(seeds), 256):
            own = seeds[first : first + 256]
            scenes = [render(seed, **fixed(seed)) for seed in own]
            x = embedder.embed_images([scene.image for scene in scenes])
            known = zip(own, scenes, strict=True)
            rows = [{"id": str(seed), "caption": scene.caption, **scene.attributes} for seed, scene in known]
            yield StorePart({"image": x.astype(np.float16)}, pa.Table.from_pylist(rows, schema=SCHEMA))

    return write_store(path, parts(), schema=SCHEMA, record={"encoder": embedder.id})
