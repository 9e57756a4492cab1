"""How the concepts of a run nest."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msae.base.errors import ConfigError
from msae.base.results import Result
from msae.concepts.gallery.mining import top_samples
from msae.concepts.hierarchy import Activity, Hierarchy, PairScore, find_hierarchy, score_pairs
from msae.concepts.names import ConceptNames, names_of
from msae.concepts.samples import level_shares
from msae.data.store import EmbeddingStore, as_store
from msae.data.tables import TABLE_SUFFIXES, read_table
from msae.sae.model import Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

HIERARCHY_ROWS = 20_000
"""Rows that a hierarchy is read from; more make its intervals narrower, at d_sae^2 operations each."""
PRINTED_NODES = 200

Pairs = Collection[tuple[str, str]]
"""(narrower word, broader word)."""


@dataclass(frozen=True, eq=False, repr=False)
class ConceptTree(Result):
    """A hierarchy of latents with what is known about each: its name and its level profile."""

    hierarchy: Hierarchy
    k: int | None
    """A latent counted as firing where it was among the `k` strongest of its row; None: wherever it was not zero."""
    names: Mapping[int, str]
    levels: Mapping[int, Mapping[str, float]]
    """Of each latent in the tree, the share of its rows in which it is among the 64, 128, … strongest."""
    score: PairScore | None = None
    """All edges against known pairs of words; None where none were given."""

    def to_json(self) -> dict[str, Any]:
        score = None if self.score is None else asdict(self.score)
        return {"k": self.k, "score": score, **self.hierarchy.to_json(self.names, self.levels)}

    def records(self) -> list[dict[str, Any]]:
        """A record for each latent in the tree, in the order of the text."""
        nodes = self.to_json()["nodes"]
        kept = ("latent", "name", "depth", "fired", "firing_rate")
        edges = [node["parent"] or {} for node in nodes]
        return [
            {**{key: node[key] for key in kept}, **{key: edge.get(key) for key in ("parent", "share", "lift")}}
            for node, edge in zip(nodes, edges, strict=True)
        ]

    def to_text(self) -> str:
        """The tree with a line for each node, indented under its parent."""
        found = self.hierarchy
        lines = [
            f"{len(found.parent):,} latents lie under {len(found.children):,} others, on {found.n_rows:,} rows"
            f"{f', counting the {self.k} strongest of each' if self.k else ''}; {len(found.edges):,} edges in all",
            *([] if self.score is None else [_told(self.score)]),
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
    sae: RunLike,
    on: EmbeddingStore | str | Path,
    *,
    modality: Modality | None = None,
    k: int | None = None,
    max_rows: int = HIERARCHY_ROWS,
    min_share: float = 0.8,
    inference: Inference = "trained",
    pairs: Pairs | str | Path | None = None,
    device: str = "auto",
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
        pairs: Known pairs of a word and a broader one, or a table of them with columns `child` and `parent`, to score
            the edges against.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: `k` or `max_rows` is below 1, the pairs cannot be read, or there are no names to compare with them.
        StoreError: The store does not fit the SAE.
    """
    run, store = Run.open(sae), as_store(on, modality)
    model, folder = run.sae, run.folder
    if max_rows < 1 or (k is not None and k < 1):
        raise ConfigError(f"max rows {max_rows} and k {k}; give numbers of at least 1")
    names = names_of(run)
    known = None if pairs is None else _known_pairs(pairs, names, folder)
    if k is None and model.config.levels:
        k = model.config.levels[0]
    chosen = np.linspace(0, len(store) - 1, min(max_rows, len(store))).round().astype(np.int64)
    activity = Activity(model.d_sae)
    view = View(run, store, modality, inference=inference, k=k, device=device)
    for z in view.activations(rows=chosen, title="reading which latents fire"):
        activity.add((z > 0).cpu().numpy())
    found = find_hierarchy(activity, min_share=min_share)
    samples = top_samples(run, store, modality=view.modality, inference=inference, device=device)
    nodes = [latent for _, latent in found.walk()]
    return ConceptTree(
        hierarchy=found,
        k=k,
        names={} if names is None else {concept.latent: concept.name for concept in names},
        levels={latent: level_shares(samples, latent) for latent in nodes},
        score=None if known is None or names is None else score_pairs(found.edges, _words_in(known, names), known),
    )


def read_pairs(path: str | Path) -> Pairs:
    """The (child, parent) words of a table, .csv, .jsonl or .parquet; rows without one of them are left out.

    Raises:
        ConfigError: It cannot be read, lacks a column, or has no pair.
    """
    if Path(path).suffix.lower() not in TABLE_SUFFIXES:
        raise ConfigError(f"{path} is no table; give --pairs a file ending in {', '.join(TABLE_SUFFIXES)}")
    table = read_table(Path(path), ConfigError)
    missing = [name for name in ("child", "parent") if name not in table.column_names]
    if missing:
        found = ", ".join(table.column_names)
        raise ConfigError(f"{path} has the columns {found}, but no {missing[0]}; give a table with child and parent")
    columns = (table[name].to_pylist() for name in ("child", "parent"))
    pairs = [(str(child), str(parent)) for child, parent in zip(*columns, strict=True) if child and parent]
    if not pairs:
        raise ConfigError(f"{path} has no row with both a child and a parent; give a table with some")
    return pairs


def _known_pairs(pairs: Pairs | str | Path, names: ConceptNames | None, folder: Path | None) -> set[tuple[str, str]]:
    """The pairs in plain letter case."""
    if names is None:
        raise ConfigError(
            f"{folder or 'this SAE'} has no names.json, so no edge can be compared with the pairs; "
            f"type msae name {folder or 'RUN'} --vocabulary STORE first"
        )
    given = read_pairs(pairs) if isinstance(pairs, str | Path) else pairs
    return {(_plain(child), _plain(parent)) for child, parent in given}


def _words_in(pairs: Pairs, names: ConceptNames) -> dict[int, str]:
    """What the pairs call each named latent: its name, or the first of its synonyms that they know."""
    known = {word for pair in pairs for word in pair}
    words = {concept.latent: map(_plain, (concept.name, *concept.synonyms)) for concept in names}
    called = {latent: next((word for word in own if word in known), None) for latent, own in words.items()}
    return {latent: word for latent, word in called.items() if word is not None}


def _plain(word: str) -> str:
    return " ".join(word.replace("_", " ").split()).casefold()


def _told(score: PairScore) -> str:
    """The score as a line."""
    if score.precision is None:
        return f"no edge joins two latents that the pairs name; {score.wanted:,} of the pairs have both words as names"
    chance, recall = score.chance or 0.0, score.recall or 0.0
    return (
        f"{score.predicted:,} edges join two latents that the pairs name: {score.precision:.1%} of them are known "
        f"pairs, {chance:.1%} would be by chance; {recall:.1%} of {score.wanted:,} known pairs are found"
    )
