"""The tree of latents scored against known nestings: the demo's scenes, or labels of the form broad/narrow.

    python benchmarks/hierarchy.py RUN --on STORE [--column label] [--k 8] [--json FILE]
    python benchmarks/hierarchy.py RUN RUN --on STORE --vocabulary STORE [--k 64]

What nests is known: in scenes, "red and striped" lies under "red" and under "striped"; with a label column such as
`flowers/rose`, the label lies under its first part. Each latent is called after the known concept that it matches
best (F1 on one half of the rows, .5 at least); the tree is read from the other half, and its edges between latents of
different concepts are counted right where the child's concept lies under the parent's. Beside it stands the plain
alternative: as many edges, from each child to the more frequent latent with the nearest decoder row.

With --vocabulary latents have the names of `msae name`, and what nests are words that nest by name: "electric guitar"
lies under "guitar" where both are words of the vocabulary. That writes a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msae.concepts.naming import name
from msae.concepts.tree import Activity, Edge, Hierarchy, concept_tree, find_hierarchy, score_pairs
from msae.data.arrays import unit_rows
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE
from msae.sae.view import View
from results import write_section

Concepts = dict[str, NDArray[np.bool_]]
Pairs = set[tuple[str, str]]
SHARED = ("shape", "colour", "size", "texture", "background", "hat", "frame", "shadow")
"""Columns of a scene; the first four have what all of its objects share, and a plural column with all values."""
MIN_F1 = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--on", type=Path, required=True)
    parser.add_argument("--column", help="a column of broad/narrow labels, where the store is not of scenes")
    parser.add_argument("--k", type=int, help="latents that count as firing in a row; default: the smallest level")
    parser.add_argument("--min-share", type=float, default=0.8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--vocabulary", type=Path, help="name the latents by it; names.json of each RUN is replaced")
    options = parser.parse_args()
    if options.vocabulary:
        by_words(options)
        return
    if len(options.runs) > 1:
        parser.error("several runs are scored with --vocabulary only; give one")
    run = options.runs[0]
    sae, store = SAE.load(run), EmbeddingStore.open(options.on, modality="image")
    concepts, pairs = of_labels(store, options.column) if options.column else of_scenes(store)
    k = options.k or (sae.config.levels or (None,))[0]
    rows = np.arange(len(store))
    first, second = (fires_on(sae, store, rows[half::2], k) for half in (0, 1))
    names = best_concepts(first, {concept: held[0::2] for concept, held in concepts.items()})
    found = find_hierarchy(second, min_share=options.min_share)
    by_cosine = nearest_more_frequent(sae, found)
    record: dict[str, Any] = {
        "run": str(run),
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


def by_words(options: argparse.Namespace) -> None:
    """The tree of each run, its latents named by a vocabulary, against the words of it that nest by name."""
    vocabulary = EmbeddingStore.open(options.vocabulary, modality="text")
    column = next(column for column in ("caption", "text") if column in vocabulary.columns)
    pairs = nested_words([str(word) for word in vocabulary.column(column)])
    store = EmbeddingStore.open(options.on, modality="image")
    lines = [
        f"{len(pairs):,} pairs of words of the vocabulary of which the last word of one is the other, such as "
        f"{', '.join(f'{child} / {parent}' for child, parent in sorted(pairs)[:: max(1, len(pairs) // 3)][:3])}; what "
        "nests by name need not nest in pictures. Up to 20,000 rows; judged are edges between latents of different "
        "such names; *plain* is the precision of the plain alternative.",
        "",
        "| run | named | counted | edges | judged | precision | random pair | known pairs | found | plain |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in options.runs:
        names = name(run, vocabulary=options.vocabulary)
        tree = concept_tree(run, store, k=options.k, pairs=pairs)
        called = {c.latent: " ".join(c.name.replace("_", " ").split()).casefold() for c in names}
        plain = score_pairs(nearest_more_frequent(SAE.load(run), tree.hierarchy), called, pairs)
        score = tree.score
        assert score is not None
        shares = [score.precision, score.chance, score.recall, plain.precision]
        told = ["-" if share is None else f"{share:.3f}" for share in shares]
        counted = f"the {tree.k} strongest" if tree.k else "all that fire"
        lines.append(
            f"| {run.name} | {len(names)} | {counted} | {len(tree.hierarchy.edges)} | {score.predicted} | {told[0]} "
            f"| {told[1]} | {score.wanted} | {told[2]} | {told[3]} of {plain.predicted} |"
        )
        print(lines[-1], flush=True)
    write_section("hierarchy-words", "Hierarchy against words that nest by name, real vectors", "\n".join(lines))


def nested_words(words: Sequence[str]) -> Pairs:
    """(narrower, broader) for each word whose last word is another one of `words`."""
    known = {" ".join(word.replace("_", " ").split()).casefold() for word in words}
    return {(word, last) for word in known if (last := word.split()[-1:][0]) != word and last in known}


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
    for z in View(sae, store, "image", k=k).activations(rows=rows):
        activity.add((z > 0).numpy())
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
