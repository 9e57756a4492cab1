"""The tree of latents scored against known nestings: the demo's scenes, or labels of the form broad/narrow.

    python benchmarks/hierarchy.py RUN --on STORE [--column label] [--k 8] [--json FILE]
    python benchmarks/hierarchy.py RUN... --on STORE --vocabulary STORE --isa FILE --half choose|judge [--k 8 16]

What nests is known: in scenes, "red and striped" lies under "red" and under "striped"; with a label column such as
`flowers/rose`, the label lies under its first part. Each latent is called after the known concept that it matches
best (F1 on one half of the rows, .5 at least); the tree is read from the other half, and its edges between latents of
different concepts are counted right where the child's concept lies under the parent's. Beside it stands the plain
alternative: as many edges, from each child to the more frequent latent with the nearest decoder row.

With --isa, a table of the columns `child` and `ancestor`, what nests are words, such as WordNet's "poodle" under
"animal". Each word is called after the latent with the nearest decoder row, and the words of one half of the children,
drawn at random, are judged. It is said how often the tree has the general word above the special one and how often the
other way round, which share of all its relations between judged words are pairs of the table, and the same for the
words dealt to the latents anew (chance) and for as many pairs of words by the cosine of their embeddings, the more
general of two being the one that is nearer to all words. That writes a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msae.base.errors import ConfigError
from msae.concepts.tree import (
    HIERARCHY_ROWS,
    MIN_SHARE,
    Activity,
    Edge,
    Hierarchy,
    counted,
    find_hierarchy,
    score_pairs,
)
from msae.data.arrays import unit_rows
from msae.data.store import EmbeddingStore
from msae.data.tables import read_table
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
    parser.add_argument("--k", type=int, nargs="+", help="latents that count as firing in a row; default: the tree's")
    parser.add_argument("--min-share", type=float, nargs="+", default=[MIN_SHARE])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--vocabulary", type=Path, help="a store of the embeddings of words")
    parser.add_argument("--isa", type=Path, help="a table of words (child) and more general ones (ancestor)")
    parser.add_argument("--half", choices=("choose", "judge"), default="choose")
    parser.add_argument("--section", help="of RESULTS.md, with --isa")
    options = parser.parse_args()
    if options.isa:
        by_isa(options)
        return
    if len(options.runs) > 1:
        parser.error("several runs are scored with --isa only; give one")
    run = options.runs[0]
    sae, store = SAE.load(run), EmbeddingStore.open(options.on, modality="image")
    concepts, pairs = of_labels(store, options.column) if options.column else of_scenes(store)
    k = options.k[0] if options.k else counted(sae)
    rows = np.arange(len(store))
    first, second = (fires_on(sae, store, rows[half::2], k) for half in (0, 1))
    names = best_concepts(first, {concept: held[0::2] for concept, held in concepts.items()})
    found = find_hierarchy(second, min_share=options.min_share[0])
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


def by_isa(options: argparse.Namespace) -> None:
    """Each run's tree, by each k and share, against the words of one half of a table."""
    vocabulary = EmbeddingStore.open(options.vocabulary, modality="text")
    column = next(column for column in ("caption", "text") if column in vocabulary.columns)
    words, rows = words_of(
        [str(word) for word in vocabulary.column(column)], vocabulary.take(np.arange(len(vocabulary)), "text")
    )
    place = {word: i for i, word in enumerate(words)}
    table = read_table(options.isa, ConfigError)
    columns = (map(plain, table[name].to_pylist()) for name in ("child", "ancestor"))
    known = sorted({pair for pair in zip(*columns, strict=True) if set(pair) <= set(place)})
    children = sorted({child for child, _ in known})
    first = set(np.random.default_rng(0).permutation(children)[: len(children) // 2].tolist())
    pairs = [(place[c], place[a]) for c, a in known if (c in first) == (options.half == "choose")]
    judged = np.array(sorted({i for pair in pairs for i in pair}))
    truth = np.zeros((len(words), len(words)), bool)
    truth[tuple(np.array(pairs).T)] = True
    truth = truth[np.ix_(judged, judged)]
    general = (rows @ rows.T).mean(0)[judged]
    cosine = rows[judged] @ rows[judged].T
    store = EmbeddingStore.open(options.on, modality="image")
    spread = np.linspace(0, len(store) - 1, min(HIERARCHY_ROWS, len(store))).round().astype(np.int64)
    lines = [
        f"{len(known):,} of {table.num_rows:,} pairs have both words in the vocabulary; the half *{options.half}* has "
        f"{len(pairs):,}, of {len(judged):,} words; judged are pairs of different latents. *F1* is of found and "
        "precision. *Chance*: found with the words dealt anew, mean of 100.",
        "",
        "| run | k | share | edges | judged | found | reversed | precision | F1 | chance | text: found | reversed "
        "| precision | F1 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in options.runs:
        sae = SAE.load(run)
        for k in options.k or [counted(sae)]:
            activity = fires_on(sae, store, spread, k)
            decoder = unit_rows(sae.W_dec.detach().numpy())
            decoder[activity.fired < 20] = 0
            own = (rows[judged] @ decoder.T).argmax(1)
            for share in options.min_share:
                found = find_hierarchy(activity, min_share=share)
                over = ancestors(found, sae.d_sae)
                apart = own[:, None] != own[None]
                ours = related(over[np.ix_(own, own)] & apart, truth & apart)
                rng = np.random.default_rng(0)
                dealt = [rng.permutation(own) for _ in range(100)]
                chance = np.mean([related(over[np.ix_(o, o)] & apart, truth & apart).found for o in dealt])
                by_text = np.where((general[:, None] < general[None]) & apart, cosine, -np.inf)
                least = np.partition(by_text.ravel(), -max(1, ours.n))[-max(1, ours.n)]
                text = related(by_text >= least, truth & apart)
                cells = [f"{value:.3f}" for value in (*ours[:3], ours.f1, chance, *text[:3], text.f1)]
                lines.append(
                    f"| {run.name} | {k} | {share} | {len(found.edges):,} | {ours.judged} | {' | '.join(cells)} |"
                )
                print(lines[-1], flush=True)
    title = "Hierarchy against WordNet's is-a pairs, real vectors"
    write_section(options.section or f"hierarchy-isa-{options.half}", f"{title}: {options.half}", "\n".join(lines))


class Related(NamedTuple):
    """How relations between words agree with known ones."""

    found: float
    """Share of the known pairs that are related so."""
    reversed: float
    """Share of them that are related the other way round."""
    precision: float
    n: int
    judged: int

    @property
    def f1(self) -> float:
        return 2 * self.found * self.precision / max(self.found + self.precision, 1e-12)


def related(over: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Related:
    """Of relations (special, general) against the known ones."""
    right, n, judged = int((over & truth).sum()), int(over.sum()), int(truth.sum())
    return Related(right / max(judged, 1), int((over.T & truth).sum()) / max(judged, 1), right / max(n, 1), n, judged)


def ancestors(found: Hierarchy, d_sae: int) -> NDArray[np.bool_]:
    """(child, ancestor): whether edges lead from the one to the other."""
    over = np.zeros((d_sae, d_sae), bool)
    above: dict[int, list[int]] = {}
    for edge in found.edges:
        above.setdefault(edge.child, []).append(edge.parent)
    for child in sorted(above, key=lambda latent: -int(found.fired[latent])):  # a parent fires more often: it is done
        for parent in above[child]:
            over[child] |= over[parent]
            over[child, parent] = True
    return over


def words_of(texts: Sequence[str], rows: NDArray[np.float32]) -> tuple[list[str], NDArray[np.float32]]:
    """The different words and the unit mean of the embeddings of each, less the mean of all."""
    words = [plain(text) for text in texts]
    different = sorted(set(words))
    place = {word: i for i, word in enumerate(different)}
    total = np.zeros((len(different), rows.shape[1]), np.float32)
    np.add.at(total, [place[word] for word in words], rows)
    mean = total / np.bincount([place[word] for word in words])[:, None]
    return different, unit_rows(mean - mean.mean(0))


def plain(word: str) -> str:
    return " ".join(word.replace("_", " ").split()).casefold()


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
        edges.append(Edge(child, int(cosine.argmax()), 0, 0.0, 0.0, 0.0, 0.0))
    return edges


if __name__ == "__main__":
    main()
