"""`info`: what lies at a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msae.base.errors import RunError, StoreError
from msae.data.layout import far_address


def info(path: str | Path) -> dict[str, Any]:
    """What a store or a run holds.

    Args:
        path: A run folder, or any store: what msae embed makes, a clip-retrieval folder, or a .npy, .npz, .parquet or
            .safetensors file of embeddings. A store may lie at an address such as https:// or s3://.

    Raises:
        RunError: The run is damaged, or the path is a part of a run.
        StoreError: There is neither a run nor a store.
    """
    if far_address(path) is not None:
        from msae.data.store import EmbeddingStore

        return EmbeddingStore.open(path).describe()
    path = Path(path)
    if _is_trained(path):
        from msae.sae.train import describe_run

        return describe_run(path)
    if (path / "sae.json").exists():
        from msae.sae.model import SAE

        return {"run": str(path), "state": "an SAE without the settings of its training", **_of(SAE.load(path))}
    around = next((parent for parent in path.absolute().parents[:2] if (parent / "sae.json").exists()), None)
    if around is not None and path.exists() and not (path / "store.json").exists():
        raise RunError(f"{path} is a part of the run {around}; to see the run, type: msae info {around}")
    from msae.data.store import EmbeddingStore

    try:
        return EmbeddingStore.open(path).describe()
    except StoreError as err:
        if not path.is_dir() or (path / "store.json").exists():
            raise
        raise StoreError(
            f"{path} is neither a store nor a run: it has none of store.json, img_emb/, text_emb/ and sae.json; "
            "give what msae embed --out or msae train --out made, or a file of embeddings"
        ) from err


def _is_trained(folder: Path) -> bool:
    """Whether a folder has the config.json of a training, and not that of a model of transformers."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / "config.json").exists() and (folder / "metrics.jsonl").exists()
    return isinstance(found, dict) and found.get("made_by") == "msae"


def _of(sae: Any) -> dict[str, Any]:
    from msae.base.config import to_mapping

    return {key: value for key, value in to_mapping(sae.config).items() if value is not None}
