"""How the concepts of a run nest."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msae.errors import ConfigError
from msae.galleries.mining import activations, names_of, run_folder, top_samples
from msae.hierarchy import Activity, Hierarchy, find_hierarchy
from msae.progress import progress
from msae.sae import SAE, Inference, as_sae, check_fit
from msae.samples import level_shares
from msae.standardize import Modality
from msae.store import EmbeddingStore, as_store

HIERARCHY_ROWS = 20_000
"""Rows that a hierarchy is read from; more make its intervals narrower, at d_sae^2 operations each."""


PRINTED_NODES = 200


@dataclass(frozen=True, eq=False)
class ConceptTree:
    """A hierarchy of latents with what is known about each: its name and its level profile."""

    hierarchy: Hierarchy
    k: int | None
    """A latent counted as firing where it was among the `k` strongest of its row; None: wherever it was not zero."""
    names: Mapping[int, str]
    levels: Mapping[int, Mapping[str, float]]
    """Of each latent in the tree, the share of its rows in which it is among the 64, 128, … strongest."""

    def to_dict(self) -> dict[str, Any]:
        return {"k": self.k, **self.hierarchy.to_dict(self.names, self.levels)}

    def to_text(self) -> str:
        """The tree with a line for each node, indented under its parent."""
        found = self.hierarchy
        lines = [
            f"{len(found.parent):,} latents lie under {len(found.children):,} others, on {found.n_rows:,} rows"
            f"{f', counting the {self.k} strongest of each' if self.k else ''}; {len(found.edges):,} edges in all"
        ]
        for depth, latent in itertools.islice(found.walk(), PRINTED_NODES):
            edge = found.parent.get(latent)
            under = (
                f"  in {edge.share:.0%} of its rows, lift {edge.lift:.1f} (at least {edge.lift_low:.1f})"
                if edge
                else ""
            )
            first = next(iter(self.levels.get(latent, {}).items()), None)
            coarse = f"  {first[1]:.0%} within {first[0]}" if first else ""
            rate = found.fired[latent] / found.n_rows
            lines.append(f"{'  ' * depth}{self.names.get(latent, '?')} [{latent}]  fires {rate:.1%}{coarse}{under}")
        n_more = len(found.parent) + len(found.roots) - PRINTED_NODES
        return "\n".join([*lines, *([f"… and {n_more:,} more; --json FILE has all"] if n_more > 0 else [])])


def concept_tree(
    sae: SAE | str | Path,
    on: EmbeddingStore | str | Path,
    *,
    modality: Modality | None = None,
    k: int | None = None,
    max_rows: int = HIERARCHY_ROWS,
    min_share: float = 0.8,
    inference: Inference = "trained",
) -> ConceptTree:
    """Parents and children among the latents, from which of them fire together on a store.

    Args:
        sae: A run folder, or an SAE.
        on: Any store.
        modality: Which rows; None takes images where there are any.
        k: Count a latent as firing only where it is among the k strongest of its row. None takes the smallest level
            of a Matryoshka SAE, and every non-zero activation of any other.
        max_rows: Rows to read, spread evenly over the store.
        min_share: A child's rows must be its parent's too in this share, at the lower end of a 95 % interval.

    Raises:
        ConfigError: `k` or `max_rows` is below 1.
        StoreError: The store does not fit the SAE.
    """
    folder, model, store = run_folder(sae), as_sae(sae), as_store(on, modality)
    check_fit(model, store, run=sae)
    if max_rows < 1 or (k is not None and k < 1):
        raise ConfigError(f"max rows {max_rows} and k {k}; give numbers of at least 1")
    if k is None and model.config.levels:
        k = model.config.levels[0]
    chosen = np.linspace(0, len(store) - 1, min(max_rows, len(store))).round().astype(np.int64)
    activity = Activity(model.d_sae)
    modality = modality or store.modalities[0]
    with progress("reading which latents fire", total=len(chosen), unit="rows") as advance:
        for z in activations(model, store, modality, inference=inference, k=k, rows=chosen):
            activity.add(z > 0)
            advance(len(z))
    found = find_hierarchy(activity, min_share=min_share)
    samples = top_samples(sae, store, modality=modality, inference=inference)
    names, nodes = names_of(folder), [latent for _, latent in found.walk()]
    return ConceptTree(
        hierarchy=found,
        k=k,
        names={} if names is None else {concept.latent: concept.name for concept in names},
        levels={latent: level_shares(samples, latent) for latent in nodes},
    )
