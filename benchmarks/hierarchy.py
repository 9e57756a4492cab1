"""The tree of latents scored against known nestings: the demo's scenes, or labels of the form broad/narrow.

    python benchmarks/hierarchy.py RUN --on STORE [--column label] [--k 8] [--json FILE]

What nests is known: in scenes, "red and striped" lies under "red" and under "striped"; with a label column such as
`flowers/rose`, the label lies under its first part. Each latent is called after the known concept that it matches
best (F1 on one half of the rows, .5 at least); the tree is read from the other half, and its edges between latents of
different concepts are counted right where the child's concept lies under the parent's. Beside it stands the plain
alternative: as many edges, from each child to the more frequent latent with the nearest decoder row.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msae.alignment import unit_rows
from msae.galleries import activations
from msae.hierarchy import Activity, Edge, Hierarchy, find_hierarchy, score_pairs
from msae.sae import SAE
from msae.store import EmbeddingStore

Concepts = dict[str, NDArray[np.bool_]]
Pairs = set[tuple[str, str]]
SHARED = ("shape", "colour", "size", "texture", "background", "hat", "frame", "shadow")
"""Columns of a scene; the first four have what all of its objects share, and a plural column with all values."""
MIN_F1 = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--on", type=Path, required=True)
    parser.add_argument("--column", help="a column of broad/narrow labels, where the store is not of scenes")
    parser.add_argument("--k", type=int, help="latents that count as firing in a row; default: the smallest level")
    parser.add_argument("--min-share", type=float, default=0.8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sae, store = SAE.load(options.run), EmbeddingStore.open(options.on, modality="image")
    concepts, pairs = of_labels(store, options.column) if options.column else of_scenes(store)
    k = options.k or (sae.config.levels or (None,))[0]
    rows = np.arange(len(store))
    first, second = (fires_on(sae, store, rows[half::2], k) for half in (0, 1))
    names = best_concepts(first, {name: held[0::2] for name, held in concepts.items()})
    found = find_hierarchy(second, min_share=options.min_share)
    by_cosine = nearest_more_frequent(sae, found)
    record: dict[str, Any] = {
        "run": str(options.run),
        "k": k,
        "d_sae": sae.d_sae,
        "concepts": len(concepts),
        "latents_called": len(names),
        "of_narrow_concepts": sum(name in {narrow for narrow, _ in pairs} for name in names.values()),
        "children": len(found.parent),
        "all_edges": dataclasses.asdict(score_pairs(found.edges, names, pairs)),
        "tree": dataclasses.asdict(score_pairs(list(found.parent.values()), names, pairs)),
        "decoder_cosine": dataclasses.asdict(score_pairs(by_cosine, names, pairs)),
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    for edge in sorted(found.edges, key=lambda edge: -edge.share_low)[:400]:
        child, parent = names.get(edge.child), names.get(edge.parent)
        if child and parent and child != parent:
            mark = "+" if (child, parent) in pairs else "-"
            sys.stdout.write(f"{mark} {child} [{edge.child}] under {parent} [{edge.parent}]  {edge.share:.2f}\n")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def of_scenes(store: EmbeddingStore) -> tuple[Concepts, Pairs]:
    """Attribute values, and what two of them are together; the second lies under both."""
    atoms: Concepts = {}
    strict: dict[str, tuple[str, NDArray[np.bool_]]] = {}
    for column in SHARED:
        values = [str(value) for value in store.column(column)]
        plural = f"{column}s"
        listed = [set(str(value).split(", ")) for value in store.column(plural)] if plural in store.columns else None
        for value in sorted(set(values) - {"None", "", "False", "false"}):
            name = value if value.lower() != "true" else column
            whole = np.array([v == value for v in values])
            atoms[name] = whole if listed is None else np.array([value in every for every in listed])
            strict[name] = (column, whole)
    concepts, pairs = dict(atoms), set()
    for one, other in itertools.combinations(strict, 2):
        held = strict[one][1] & strict[other][1]
        if strict[one][0] != strict[other][0] and held.sum() >= 20:
            both = f"{one} and {other}"
            concepts[both] = held
            pairs |= {(both, one), (both, other)}
    return concepts, pairs


def of_labels(store: EmbeddingStore, column: str) -> tuple[Concepts, Pairs]:
    """Labels such as `flowers/rose`, each under its first part."""
    labels = np.array([str(value) for value in store.column(column)])
    broad = np.array([label.split("/")[0] for label in labels])
    concepts = {str(name): broad == name for name in np.unique(broad)}
    pairs = set()
    for label in map(str, np.unique(labels)):
        if "/" in label and (labels == label).sum() >= 20:
            concepts[label] = labels == label
            pairs.add((label, label.split("/")[0]))
    return concepts, pairs


def fires_on(sae: SAE, store: EmbeddingStore, rows: NDArray[np.int64], k: int | None) -> Activity:
    """Who fires on these rows."""
    activity = Activity(sae.d_sae)
    for z in activations(sae, store, "image", k=k, rows=rows):
        activity.add(z > 0)
    return activity


def best_concepts(activity: Activity, concepts: Mapping[str, NDArray[np.bool_]]) -> dict[int, str]:
    """Of each latent the concept with the largest F1, where that is at least `MIN_F1`."""
    names = list(concepts)
    truth = np.stack([concepts[name] for name in names]).astype(np.float32)
    fires = activity.of(slice(None)).astype(np.float32)
    f1 = 2 * (truth @ fires) / (truth.sum(1)[:, None] + np.maximum(fires.sum(0), 1))
    best = f1.argmax(0)
    return {i: names[c] for i, c in enumerate(best.tolist()) if f1[c, i] >= MIN_F1}


def nearest_more_frequent(sae: SAE, found: Hierarchy) -> list[Edge]:
    """As many edges as the tree has: every child under the more frequent latent with the nearest decoder row."""
    decoder = unit_rows(sae.W_dec.detach().numpy())
    edges = []
    for child in found.parent:
        cosine = np.where(found.fired > found.fired[child], decoder @ decoder[child], -np.inf)
        edges.append(Edge(child, int(cosine.argmax()), 0, 0.0, 0.0, 0.0, 0.0, 0.0))
    return edges


if __name__ == "__main__":
    main()
