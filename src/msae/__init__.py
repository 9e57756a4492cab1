"""Matryoshka sparse autoencoders for CLIP and SigLIP embeddings: train, evaluate, name, search, audit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msae.base import errors
    from msae.base.errors import MsaeError
    from msae.cli.info import info
    from msae.concepts.activations import Activations, activations
    from msae.concepts.examples import ExampleConcept, learn_concept
    from msae.concepts.find import Found, find
    from msae.concepts.gallery import Gallery, gallery
    from msae.concepts.names import ConceptNames
    from msae.concepts.naming import NameSettings, name
    from msae.concepts.samples import TopSamples, top_samples
    from msae.concepts.stability import Stability, stability
    from msae.concepts.tree import concept_tree
    from msae.data.embed import Embedder, embed
    from msae.data.store import EmbeddingStore
    from msae.measure import metrics
    from msae.measure.evaluate import Evaluation, Evaluations, evaluate, poster_table
    from msae.sae import kernels, losses
    from msae.sae.formats import import_sae
    from msae.sae.model import SAE, SAEConfig
    from msae.sae.train import TrainSettings, train
    from msae.use.audit import Audit, audit
    from msae.use.codes import encode
    from msae.use.compare import Comparison, compare
    from msae.use.export import export
    from msae.use.search import SearchResult, search
    from msae.web.explorer import explore
    from msae.web.hub import push
    from msae.web.report import Report, report
    from msae.world.chain import demo

__version__ = "0.2.0"

_HOME = {
    "MsaeError": "base.errors",
    "info": "cli.info",
    "Activations": "concepts.activations",
    "activations": "concepts.activations",
    "Audit": "use.audit",
    "Evaluations": "measure.evaluate",
    "ConceptNames": "concepts.names",
    "Embedder": "data.embed",
    "audit": "use.audit",
    "embed": "data.embed",
    "encode": "use.codes",
    "Evaluation": "measure.evaluate",
    "evaluate": "measure.evaluate",
    "poster_table": "measure.evaluate",
    "Comparison": "use.compare",
    "compare": "use.compare",
    "explore": "web.explorer",
    "export": "use.export",
    "import_sae": "sae.formats",
    "ExampleConcept": "concepts.examples",
    "learn_concept": "concepts.examples",
    "Found": "concepts.find",
    "find": "concepts.find",
    "demo": "world.chain",
    "Gallery": "concepts.gallery",
    "concept_tree": "concepts.tree",
    "gallery": "concepts.gallery",
    "top_samples": "concepts.samples",
    "NameSettings": "concepts.naming",
    "name": "concepts.naming",
    "push": "web.hub",
    "Report": "web.report",
    "report": "web.report",
    "SearchResult": "use.search",
    "search": "use.search",
    "SAE": "sae.model",
    "SAEConfig": "sae.model",
    "TopSamples": "concepts.samples",
    "Stability": "concepts.stability",
    "stability": "concepts.stability",
    "EmbeddingStore": "data.store",
    "TrainSettings": "sae.train",
    "train": "sae.train",
}
_MODULES = {"errors": "base.errors", "kernels": "sae.kernels", "losses": "sae.losses", "metrics": "measure.metrics"}


def __getattr__(name: str) -> Any:
    # Lazy, so that `msae --help` need not wait for torch, and nobody for what they do not use.
    if name in _HOME:
        return getattr(importlib.import_module(f"msae.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"msae.{_MODULES[name]}")
    raise AttributeError(f"module 'msae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "SAE",
    "Activations",
    "Audit",
    "Comparison",
    "ConceptNames",
    "Embedder",
    "EmbeddingStore",
    "Evaluation",
    "Evaluations",
    "ExampleConcept",
    "Found",
    "Gallery",
    "MsaeError",
    "NameSettings",
    "Report",
    "SAEConfig",
    "SearchResult",
    "Stability",
    "TopSamples",
    "TrainSettings",
    "activations",
    "audit",
    "compare",
    "concept_tree",
    "demo",
    "embed",
    "encode",
    "errors",
    "evaluate",
    "explore",
    "export",
    "find",
    "gallery",
    "import_sae",
    "info",
    "kernels",
    "learn_concept",
    "losses",
    "metrics",
    "name",
    "poster_table",
    "push",
    "report",
    "search",
    "stability",
    "top_samples",
    "train",
]
