"""Matryoshka sparse autoencoders for CLIP and SigLIP embeddings: train, evaluate, name, search, audit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msae.alignment import Stability, stability
    from msae.auditing import Audit, audit
    from msae.concepts import ConceptNames
    from msae.embedding import Embedder, embed
    from msae.evaluation import Evaluation, evaluate, poster_table
    from msae.explorer import explore
    from msae.galleries import Gallery, concept_tree, gallery, top_samples
    from msae.naming import NameSettings, name
    from msae.reporting import Report, report
    from msae.retrieval import SearchResult, search
    from msae.sae import SAE, SAEConfig
    from msae.samples import TopSamples
    from msae.store import EmbeddingStore
    from msae.training import TrainSettings, train

__version__ = "0.1.0"

_HOME = {
    "Audit": "auditing",
    "ConceptNames": "concepts",
    "Embedder": "embedding",
    "audit": "auditing",
    "embed": "embedding",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "poster_table": "evaluation",
    "explore": "explorer",
    "Gallery": "galleries",
    "concept_tree": "galleries",
    "gallery": "galleries",
    "top_samples": "galleries",
    "NameSettings": "naming",
    "name": "naming",
    "Report": "reporting",
    "report": "reporting",
    "SearchResult": "retrieval",
    "search": "retrieval",
    "SAE": "sae",
    "SAEConfig": "sae",
    "TopSamples": "samples",
    "Stability": "alignment",
    "stability": "alignment",
    "EmbeddingStore": "store",
    "TrainSettings": "training",
    "train": "training",
}
_MODULES = ("losses", "metrics")


def __getattr__(name: str) -> Any:
    # Lazy, so that `msae --help` need not wait for torch, and nobody for what they do not use.
    if name in _HOME:
        return getattr(importlib.import_module(f"msae.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"msae.{name}")
    raise AttributeError(f"module 'msae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


__all__ = [
    "SAE",
    "Audit",
    "ConceptNames",
    "Embedder",
    "EmbeddingStore",
    "Evaluation",
    "Gallery",
    "NameSettings",
    "Report",
    "SAEConfig",
    "SearchResult",
    "Stability",
    "TopSamples",
    "TrainSettings",
    "audit",
    "concept_tree",
    "embed",
    "evaluate",
    "explore",
    "gallery",
    "name",
    "poster_table",
    "report",
    "search",
    "stability",
    "top_samples",
    "train",
]
