"""`info`: what lies at a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def info(path: str | Path) -> dict[str, Any]:
    """What a store or a run holds.

    Args:
        path: A run folder, or anything that a STORE may be: a store, a clip-retrieval folder, or a .npy, .npz, .parquet
            or .safetensors file of embeddings.

    Raises:
        RunError: The run is damaged.
        StoreError: There is no store.
    """
    path = Path(path)
    if (path / "sae.json").exists() or (path / "config.json").exists():
        from msae.sae.train import describe_run

        return describe_run(path)
    from msae.data.store import EmbeddingStore

    return EmbeddingStore.open(path).describe()
