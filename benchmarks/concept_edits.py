"""How far the neighbours of a query move when a concept of it is turned: on the demo's scenes, and on real vectors.

python benchmarks/concept_edits.py HOLDOUT.store --runs RUN … --vocabulary WORDS.store --attributes colour background
python benchmarks/concept_edits.py --demo FOLDER --sae wide --seeds 10 11 12 --attributes colour background
python benchmarks/concept_edits.py image_test.npy --runs RUN … --vocabulary vocabulary.npy --labels label

For every named value of an attribute and the same random queries: the share of the neighbours that have the value, as
the query is, with the concept at p99 and at twice that, with its rivals at 0, with only the latents that bear the name,
and after a step of the same length along the text direction; then what removing it leaves, for queries that have it.
With --demo the scenes, the words and the SAEs are made first, where FOLDER does not hold them yet.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from msae.base.errors import ConfigError
from msae.concepts.concept import BLOCK_ROWS, ConceptSet
from msae.concepts.names import ConceptNames
from msae.concepts.naming import name
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE
from msae.sae.view import View
from msae.use.edits import Edit, apply, parse_change
from msae.world.scenes import UNSEEN_SEEDS, VOCABULARY
from results import write_section

TOP = 20
FEWEST = 5
"""Rows of a class; of one with fewer than `TOP`, only that many neighbours are looked at."""
RAISED = ("as it is", "p99", "text step of p99", "p99 strict", "p99 exclusive", "2xp99", "text step of 2xp99")
REMOVED = ("as it is", "removed", "removed strict", "text removed")
FIRST_SCENE = UNSEEN_SEEDS.start + 8_000_000
SCENES = {"scenes": 6000, "holdout": 3000}
SAES: Mapping[str, Mapping[str, Any]] = {
    "wide": {"d_sae": 1024, "epochs": 10},
    "narrow": {"d_sae": 256, "levels": (8, 16, 32), "epochs": 20},
}
COMMON: Mapping[str, Any] = {"kind": "matryoshka", "weighting": "reverse", "batch_size": 64}


class Target(NamedTuple):
    """A value whose concept is turned."""

    kind: str
    value: str
    words: tuple[str, ...]
    """What it is called."""
    has: np.ndarray
    """Which rows have it."""
    others: np.ndarray
    """For each row, what else is true of it: a code that a good edit keeps."""


class Space(NamedTuple):
    """The rows that are searched, and the words as embeddings."""

    x: torch.Tensor
    unit: torch.Tensor
    words: dict[str, torch.Tensor]
    word_mean: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?")
    parser.add_argument("--runs", nargs="+", help="one run of each seed")
    parser.add_argument("--vocabulary")
    parser.add_argument("--demo", type=Path, help="instead of a store, runs and a vocabulary: a folder to make them in")
    parser.add_argument("--sae", choices=list(SAES), default="wide", help="for --demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=(10, 11, 12), help="of the SAEs, for --demo")
    parser.add_argument("--first-scene", type=int, default=FIRST_SCENE, help="for --demo")
    parser.add_argument("--attributes", nargs="*", default=(), help="of the demo's scenes")
    parser.add_argument("--labels", help="a column whose last part is a class name, instead of attributes")
    parser.add_argument("--queries", type=int, default=120)
    parser.add_argument("--section", default="concept-edits")
    parser.add_argument("--title", default="real vectors", help="what the section of RESULTS.md is called after")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.demo:
        make_demo(arguments)
    if not (arguments.store and arguments.runs and arguments.vocabulary):
        parser.error("wanted STORE with --runs and --vocabulary, or --demo FOLDER")
    store = EmbeddingStore.open(arguments.store, modality="image")
    targets = label_targets(store, arguments.labels) if arguments.labels else scene_targets(store, arguments.attributes)
    space = open_space(store, EmbeddingStore.open(arguments.vocabulary, modality="text"))
    queries = np.random.default_rng(0).choice(len(store), arguments.queries, replace=False)
    found: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    named = []
    for run in arguments.runs:
        sae = SAE.load(run)
        names = name(run, vocabulary=arguments.vocabulary)
        n_named = 0
        for target in targets:
            if measure(sae, store, names, space, target, queries, found):
                n_named += 1
        named.append(n_named)
    kinds = list(dict.fromkeys(target.kind for target in targets))
    body = report(found, kinds, named, len(targets), arguments.queries)
    if arguments.demo:
        scenes = (
            f"Scenes {arguments.first_scene:,} on, SAE seeds {', '.join(map(str, arguments.seeds))}, the demo's CLIP; "
        )
        body = "\n\n".join([scenes + str({**COMMON, **SAES[arguments.sae]}), body, bars(found, kinds)])
    write_section(arguments.section, f"Concept edits: {arguments.title}", body)
    print(body)


def make_demo(arguments: argparse.Namespace) -> None:
    """Scenes through the CLIP that ships with the package, the words of its captions, and an SAE of each seed."""
    from concept_recovery import DISTRACTORS
    from msae.data.embed import embed
    from msae.sae.train import train
    from msae.world.chain import write_scenes

    folder, first = arguments.demo, arguments.first_scene
    for part, n in SCENES.items():
        write_scenes(folder / part, range(first, first + n))
        embed(folder / part / "scenes.csv", encoder="demo", out=folder / f"{part}.store", batch_size=256)
        found = EmbeddingStore.open(folder / f"{part}.store").ids[0]
        if found != str(first):
            raise SystemExit(f"{folder / part} begins with scene {found}, wanted {first}; give another --demo")
        first += n
    ways = [way for values in VOCABULARY.values() for ways in values.values() for way in ways]
    (folder / "words.txt").write_text("\n".join(dict.fromkeys([*ways, *DISTRACTORS])) + "\n", encoding="utf-8")
    embed(folder / "words.txt", encoder="demo", out=folder / "words.store")
    arguments.store, arguments.vocabulary, arguments.runs = folder / "holdout.store", folder / "words.store", []
    for seed in arguments.seeds:
        run = folder / "runs" / f"{arguments.sae}-{seed}"
        train(folder / "scenes.store", out=run, resume=True, seed=seed, **COMMON, **SAES[arguments.sae])
        arguments.runs.append(run)


def measure(
    sae: SAE, store: EmbeddingStore, names: ConceptNames, space: Space, target: Target, queries: np.ndarray, found: dict
) -> bool:
    """Add a row of shares for each query to `found`; False where no latent bears a word of the target."""
    concept = "|".join(word for word in target.words if knows(names, word))
    if not concept:
        return False
    view = View(sae, store, "image", block_rows=BLOCK_ROWS)
    wide, strict = (ConceptSet(view, names, strict=is_strict) for is_strict in (False, True))
    group, bare = wide[concept], strict[concept]
    x, has = space.x[queries], target.has
    p99, twice = parse_change("p99"), parse_change("2xp99")
    text = space.words[next(word for word in target.words if word in space.words)] - space.word_mean
    text = text / text.norm()
    rivals = [Edit(rival, parse_change(0)) for rival in wide.rivals(group)]
    edits = {
        "as it is": [],
        "p99": [Edit(group, p99)],
        "p99 strict": [Edit(bare, p99)],
        "p99 exclusive": [*rivals, Edit(group, p99)],
        "2xp99": [Edit(group, twice)],
    }
    edited = {key: apply(sae, x, "image", value) for key, value in edits.items()}
    for key in ("p99", "2xp99"):
        edited[f"text step of {key}"] = x + (edited[key] - x).norm(dim=1, keepdim=True) * text
    kind, k = target.kind, min(TOP, int(has.sum()))
    for key in RAISED:
        rows = neighbours(space, edited[key], queries)
        found[kind, key].append(has[rows[:, :k]].mean(1))
        found[kind, f"{key}: kept"].append((target.others[rows] == target.others[queries][:, None]).mean(1))
    found[kind, "rivals"].append(np.array([len(rivals)]))
    owners = np.random.default_rng(1).permutation(np.flatnonzero(has))[: len(queries)]
    x = space.x[owners]
    centre = space.x.mean(0)
    removed = {
        "as it is": x,
        "removed": apply(sae, x, "image", [Edit(group, parse_change(0))]),
        "removed strict": apply(sae, x, "image", [Edit(bare, parse_change(0))]),
        "text removed": x - ((x - centre) @ text)[:, None] * text,
    }
    for key in REMOVED:
        found[kind, f"{key} (has it)"].append(has[neighbours(space, removed[key], owners)[:, :k]].mean(1))
    found[kind, "base rate"].append(np.array([has.mean()]))
    return True


def neighbours(space: Space, x: torch.Tensor, own: np.ndarray) -> np.ndarray:
    """The nearest rows by cosine, in float32, without the query's own row: what `msae search` returns."""
    scores = x / x.norm(dim=1, keepdim=True) @ space.unit.T
    scores[torch.arange(len(x)), torch.from_numpy(own)] = -torch.inf
    return scores.topk(TOP, dim=1).indices.numpy()


def knows(names: ConceptNames, word: str) -> bool:
    try:
        return bool(names.latents_of(word))
    except ConfigError:
        return False


def open_space(store: EmbeddingStore, vocabulary: EmbeddingStore) -> Space:
    x = torch.from_numpy(store.take(np.arange(len(store)), "image"))
    rows = torch.from_numpy(vocabulary.take(np.arange(len(vocabulary)), "text"))
    column = next(column for column in ("caption", "text") if column in vocabulary.columns)
    words = {plain(word): row for word, row in zip(vocabulary.column(column), rows, strict=True)}
    return Space(x, x / x.norm(dim=1, keepdim=True), words, rows.mean(0))


def scene_targets(store: EmbeddingStore, attributes: Sequence[str]) -> list[Target]:
    """A scene has the colour, shape … of each of its objects; what an edit should keep is the rest of the two kinds."""
    cells = {name: column_of(store, name) for name in attributes}
    codes = {
        name: np.unique([",".join(cell) for cell in column], return_inverse=True)[1] for name, column in cells.items()
    }
    targets = []
    for attribute in attributes:
        other = next((name for name in attributes if name != attribute), attribute)
        for value, words in VOCABULARY[attribute].items():
            has = np.array([str(value) in cell for cell in cells[attribute]])
            targets.append(Target(attribute, str(value), words, has, codes[other]))
    return targets


def column_of(store: EmbeddingStore, attribute: str) -> list[list[str]]:
    plural = f"{attribute}s"
    listed = plural in store.columns
    cells = store.column(plural if listed else attribute)
    return [str(cell).split(", ") if listed else [str(cell)] for cell in cells]


def label_targets(store: EmbeddingStore, column: str) -> list[Target]:
    """The classes of a column such as `dataset/class`, by their plain names; there is nothing else to keep."""
    labels = np.array([str(cell) for cell in store.column(column)])
    nothing = np.zeros(len(labels), dtype=np.int64)
    return [
        Target("class", str(label), (plain(str(label).rsplit("/", 1)[-1]),), labels == label, nothing)
        for label in np.unique(labels)
        if (labels == label).sum() >= FEWEST
    ]


def plain(word: str) -> str:
    return re.sub(r"[_\s]+", " ", word).strip().casefold()


def report(found: dict, kinds: Sequence[str], named: Sequence[int], n_targets: int, n_queries: int) -> str:
    """A table of means with 95 % intervals: of runs x values x queries, resampled by run and value."""
    lines = [
        f"Share of the {TOP} nearest rows with the value; {n_queries} queries; named values in each run: "
        f"{', '.join(map(str, named))} of {n_targets}. 95 % intervals by bootstrap over runs and values.",
        "",
        f"| | {' | '.join(kinds)} |",
        f"|---|{'---|' * len(kinds)}",
    ]
    rows = ["base rate", *RAISED, *(f"{key} (has it)" for key in REMOVED)]
    rows += [f"{key}: kept" for key in RAISED] + ["rivals"]
    for row in rows:
        cells = [interval(found[kind, row]) if found.get((kind, row)) else "" for kind in kinds]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bars(found: dict, kinds: Sequence[str]) -> str:
    """What was to be shown, by the means over runs and values."""
    lines = ["The bars:", ""]
    for kind in kinds:
        mean = {row: float(np.mean([sample.mean() for sample in found[kind, row]])) for of, row in found if of == kind}
        further = max(("2xp99", "p99 exclusive"), key=mean.__getitem__)
        for what, value, is_met in (
            ("p99 at least .5", mean["p99"], mean["p99"] >= 0.5),
            (f"2xp99 or exclusive at least .8 ({further})", mean[further], mean[further] >= 0.8),
            ("removal to at most .30", mean["removed (has it)"], mean["removed (has it)"] <= 0.30),
            (
                f"p99 at least the text step's {mean['text step of p99']:.3f}",
                mean["p99"],
                mean["p99"] >= mean["text step of p99"],
            ),
        ):
            lines.append(f"- {kind}, {what}: {value:.3f}; {'met' if is_met else 'missed'}")
    return "\n".join(lines)


def interval(samples: Sequence[np.ndarray]) -> str:
    means = np.array([sample.mean() for sample in samples])
    random = np.random.default_rng(0)
    draws = means[random.integers(len(means), size=(2000, len(means)))].mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{means.mean():.3f} ({low:.3f}-{high:.3f})"


if __name__ == "__main__":
    main()
