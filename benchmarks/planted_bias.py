"""Does the audit find a correlation that was planted, and only that, and does the fix that it offers help?

A classifier is to tell crosses from squares. In its training set a share of the crosses, and the rest of the squares,
have an accessory (a hat, a frame or a shadow); in the audited rows it goes with neither. The SAEs and their names come
from scenes that know nothing of the task. All scenes are embedded once; each seed draws its own rows from them. A fix
is judged by the true groups of rows that neither training nor audit has seen.

    python benchmarks/planted_bias.py --folder FOLDER --sae-seeds 30 31 32 --workers 16 [--write]
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch

from msae import train
from msae.base.statistics import wilson
from msae.concepts.names import ConceptNames
from msae.concepts.naming import name
from msae.data.embedder import Embedder
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.sae.model import SAE
from msae.sae.view import View
from msae.use.audit import Audit, audit
from msae.use.audit.fix import Fix, fix_classifier
from msae.use.audit.subjects import TEXT_LOGIT_SCALE, Subject, make_subject
from msae.use.classifier import LinearClassifier
from msae.world.drawing import render
from msae.world.scenes import ATTRIBUTES, UNSEEN_SEEDS
from results import write_section

T, R = TypeVar("T"), TypeVar("R")
SHAPES = ("square", "cross")
"""The two shapes that the demo's CLIP confuses most: where the class is easy a classifier has no use for a shortcut."""
ACCESSORIES = ("hat", "frame", "shadow")
FIRST_SCENE = UNSEEN_SEEDS.start + 16_000_000
N_POOL, N_WORLD = 12_000, 10_000
N_TRAIN, N_TEST = 400, 2000
TWIN, FIXED = 0.5, (0.9, 0.95)
STRENGTHS = (TWIN, 0.8, *FIXED)
"""Share of the crosses with the accessory, and of squares without; at .5 it goes with neither class."""
_CLASSES = ("shape", "colour", "size", "texture", "background")
WORDS = (*(str(value) for kind in _CLASSES for value in ATTRIBUTES[kind]), "hat", "frame", "shadow", "two shapes")
_KINDS = ("shape", "colour", "size", "texture")
SCHEMA = pa.schema(
    [(column, pa.string()) for column in ("id", "caption", "background", *_KINDS)]
    + [(column, pa.bool_()) for column in ACCESSORIES]
)
ALONE = "firing"
"""Groups that nobody labelled: rows in which the concept is clearly present."""


# --- Scenes, SAEs and names


def parallel(do: Callable[[T], R], jobs: Iterable[T], workers: int) -> Iterator[R]:
    """The results of independent jobs, in order."""
    if workers == 1:
        yield from map(do, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(do, jobs)


@cache
def embedder(encoder: str) -> Embedder:
    torch.set_num_threads(1)
    return Embedder.load(encoder)


class Scenes(NamedTuple):
    """Some scenes to draw."""

    encoder: str
    seeds: range
    accessory: str | None
    """Lone squares and crosses, half of each with this; None draws scenes of every kind."""


def embedded(scenes: Scenes) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The embeddings and the metadata of scenes."""
    drawn = []
    for seed in scenes.seeds:
        fixed: dict[str, Any] = {}
        if scenes.accessory is not None:
            fixed = {"count": 1, "shape": SHAPES[seed % 2], scenes.accessory: bool(seed // 2 % 2)}
        drawn.append(render(seed, **fixed))
    x = embedder(scenes.encoder).embed_images([scene.image for scene in drawn])
    rows = [
        {"id": str(seed), "caption": scene.caption, **scene.attributes}
        for seed, scene in zip(scenes.seeds, drawn, strict=True)
    ]
    return x.astype(np.float16), rows


def make_scenes(path: Path, encoder: str, seeds: range, accessory: str | None, workers: int) -> None:
    """Scenes drawn and embedded without a file for each, where they are not yet."""
    if path.exists():
        if EmbeddingStore.open(path).ids[0] != str(seeds[0]):
            raise SystemExit(f"{path} begins with another scene than {seeds[0]}; give another --folder")
        return
    jobs = [Scenes(encoder, seeds[first : first + 256], accessory) for first in range(0, len(seeds), 256)]
    parts = (
        StorePart({"image": x}, pa.Table.from_pylist(rows, schema=SCHEMA))
        for x, rows in parallel(embedded, jobs, workers)
    )
    write_store(path, parts, schema=SCHEMA, record={"encoder": embedder(encoder).id})


class Sae(NamedTuple):
    """One SAE of a folder, of the default recipe."""

    folder: Path
    expansion: float
    seed: int

    @property
    def run(self) -> Path:
        return self.folder / f"run-{self.expansion:g}-{self.seed}"


def make_sae(sae: Sae) -> None:
    """Train and name, where it is not done yet."""
    torch.set_num_threads(1)
    if not (sae.run / "names.json").exists():
        general = sae.folder / "general.store"
        train(general, out=sae.run, resume=True, expansion=sae.expansion, seed=sae.seed)
        name(sae.run, vocabulary=sae.folder / "words.store", on=general)


class World(NamedTuple):
    """What the trials of one SAE and one accessory share."""

    pool: EmbeddingStore
    words: EmbeddingStore
    sae: SAE
    groups: Mapping[str, list[int]]
    """Latents by name."""
    shape: np.ndarray
    """Of the pool, the truth."""
    has: np.ndarray


@cache
def world(sae: Sae, accessory: str) -> World:
    torch.set_num_threads(1)
    pool, words = (EmbeddingStore.open(sae.folder / f"{kind}.store") for kind in (f"pool-{accessory}", "words"))
    groups: dict[str, list[int]] = {}
    for concept in ConceptNames.load(sae.run):
        groups.setdefault(concept.name, []).append(concept.latent)
    return World(pool, words, SAE.load(sae.run), groups, *(np.array(pool.column(c)) for c in ("shape", accessory)))


# --- One trial


class Rows(NamedTuple):
    """Rows of the pool for one seed, none twice."""

    train: np.ndarray
    audited: np.ndarray
    judging: np.ndarray


def draw(world: World, strength: float, rng: np.random.Generator) -> Rows:
    """Training rows with the correlation, audited rows without it, and all others."""
    parts: list[list[np.ndarray]] = [[], [], []]
    for number, kind in enumerate(SHAPES):
        share = strength if number == 1 else 1 - strength
        n_with = int(rng.binomial(N_TRAIN // 2, share))
        for has, n in ((True, n_with), (False, N_TRAIN // 2 - n_with)):
            rows = rng.permutation(np.flatnonzero((world.shape == kind) & (world.has == has)))
            for part, some in zip(parts, np.split(rows, [n, n + N_TEST // 4]), strict=True):
                part.append(some)
            assert len(parts[1][-1]) == N_TEST // 4 and len(parts[2][-1])
    return Rows(*(np.sort(np.concatenate(part)) for part in parts))


def substore(world: World, rows: np.ndarray, path: Path) -> EmbeddingStore:
    """The rows as a store of their own."""
    table = pa.table({"id": [str(row) for row in rows], "shape": world.shape[rows], "has": world.has[rows]})
    return write_store(path, [StorePart({"image": world.pool.take(rows, "image")}, table)])


class Trial(NamedTuple):
    sae: Sae
    accessory: str
    strength: float
    seed: int


def run_trial(trial: Trial) -> dict[str, Any]:
    """The audit of one classifier, and what each way to take the planted concept out does to it."""
    this = world(trial.sae, trial.accessory)
    rows = draw(this, trial.strength, np.random.default_rng([trial.seed, int(1000 * trial.strength)]))
    with tempfile.TemporaryDirectory() as scratch:
        stores = [substore(this, some, Path(scratch) / f"{n}.store") for n, some in enumerate(rows[:2])]
        found = audit(
            this.sae, stores[1], "shape", train_store=stores[0], names=this.groups, positive=SHAPES[1], seed=trial.seed
        )
        view = View(this.sae, stores[1], "image")
        common = {"target": "shape", "class_texts": None, "seed": trial.seed}
        trained = make_subject(view, classifier=None, train_store=stores[0], **common)
        judge = Judge(this, rows.judging)
        record = {
            "expansion": trial.sae.expansion, "sae_seed": trial.sae.seed, "accessory": trial.accessory,
            "strength": trial.strength, "seed": trial.seed, "before": judge(trained.classifier),
            **summary(found, trial.accessory),
        }  # fmt: skip
        latents = tuple(this.groups.get(trial.accessory, ()))
        if trial.strength in FIXED and latents:
            record["fix"] = fixes(trained, trial, latents, judge)
        if trial.strength == TWIN and latents:
            texts = make_subject(view, classifier=zero_shot(this), train_store=None, **common)
            record["zero_shot"] = {
                "before": judge(texts.classifier),
                "fix": fixes(texts, trial, latents, judge),
            }
    return record


class Judge:
    """Accuracy of the worst of the four true groups, and of all, on the rows that judge."""

    def __init__(self, world: World, rows: np.ndarray) -> None:
        self.x = torch.from_numpy(world.pool.take(rows, "image"))
        self.shape, self.has = world.shape[rows], world.has[rows]

    def __call__(self, classifier: LinearClassifier) -> tuple[float, float]:
        right = np.array(classifier.classes)[classifier.logits(self.x).argmax(1).numpy()] == self.shape
        groups = [right[(self.shape == k) & (self.has == h)].mean() for k in SHAPES for h in (False, True)]
        return float(min(groups)), float(np.mean(groups))


def zero_shot(world: World) -> LinearClassifier:
    """CLIP's own classifier, by the words of the two shapes."""
    x = torch.from_numpy(world.words.take(np.array([WORDS.index(shape) for shape in SHAPES]), "text"))
    weight = TEXT_LOGIT_SCALE * torch.nn.functional.normalize(x, dim=1)
    nothing = torch.zeros(x.shape[1])
    return LinearClassifier(SHAPES, weight, torch.zeros(2), nothing, nothing + 1, True, "texts")


def fixes(subject: Subject, trial: Trial, latents: tuple[int, ...], judge: Judge) -> dict[str, Any]:
    """The recommended fix with known groups and with firing alone, by its true groups, and every way by the audit's."""
    record = {}
    for kind, groups in (("known", "has"), (ALONE, None)):
        fix, classifier = fix_classifier(subject, trial.accessory, latents, groups=groups, file=None, seed=trial.seed)
        record[kind] = {"recommended": fix.recommended, "after": judge(classifier), "ways": ways(fix)}
    return record


def ways(fix: Fix) -> dict[str, tuple[float, float]]:
    return {way.name: (way.worst, way.overall) for way in fix.ways}


def summary(found: Audit, planted: str) -> dict[str, Any]:
    """Ranks of the planted concept, and which concepts stand out."""
    own = set(ATTRIBUTES["shape"])
    order = [one.name for one in found.concepts]
    by_effect = [one.name for one in sorted(found.concepts, key=lambda one: -one.effect)]
    out = [one.name for one in found.reported()]
    nuisance = [one for one in out if one not in own]
    return {
        "rank": nuisance.index(planted) + 1 if planted in nuisance else None,
        "is_first_by_effect": next((one for one in order if one not in own), None) == planted,
        "rank_with_own_words": by_effect.index(planted) + 1 if planted in by_effect else None,
        "out": out,
        "others": [one for one in out if one not in own and one != planted],
        "by_q_alone": [one.name for one in found.concepts if one.main and one.main.q < 0.05],
        "accuracy": found.classifier["accuracy"],
        "first": [
            {"name": one.name, "effect": one.effect, "low": one.effect_low,
             "control": one.control and one.control.largest, "q": one.main and one.main.q}
            for one in found.concepts[:4]
        ],
    }  # fmt: skip


# --- Tables


def tell(trials: Sequence[dict[str, Any]]) -> str:
    """What was found, a line for each SAE, accessory and strength; then the fixes."""

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return one["accessory"], one["expansion"], one["sae_seed"], one["strength"]

    some = {k: list(v) for k, v in itertools.groupby(sorted(trials, key=key), key=key)}
    lines = [
        f"{N_TRAIN:,} training, {N_TEST:,} audited rows; the others judge the fixes by their true groups.",
        "",
        "| planted | expansion, SAE | strength | seeds | first of what stands out | first by effect alone | "
        "the same, the class's own words counted | stands out | "
        "others stand out, mean | any stands out, own words too | q < .05 alone, mean | accuracy | worst group |",
        "|" + "---|" * 13,
    ]
    for (accessory, expansion, seed, strength), group in some.items():
        cells = [
            str(len(group)),
            str(sum(one["rank"] == 1 for one in group)),
            str(sum(one["is_first_by_effect"] for one in group)),
            str(sum(one["rank_with_own_words"] == 1 for one in group)),
            str(sum(accessory in one["out"] for one in group)),
            f"{np.mean([len(one['others']) for one in group]):.2f}",
            str(sum(bool(one["out"]) for one in group)),
            f"{np.mean([len(one['by_q_alone']) for one in group]):.1f}",
            f"{np.mean([one['accuracy'] for one in group]):.3f}",
            f"{np.mean([one['before'][0] for one in group]):.3f}",
        ]
        lines.append(f"| {accessory} | {expansion:g}, {seed} | {strength:g} | " + " | ".join(cells) + " |")
    lines += ["", *_fix_table(some), "", *_zero_shot_table(some)]
    return "\n".join(lines)


def _fix_table(some: Mapping[tuple[Any, ...], list[dict[str, Any]]]) -> Iterator[str]:
    yield (
        "| planted | expansion, SAE | strength | groups | worst before | recommended, after | twin | gap closed | "
        "overall before | after | recommended |"
    )
    yield "|" + "---|" * 11
    for (accessory, expansion, seed, strength), group in some.items():
        fixed = [one for one in group if "fix" in one]
        twin = some.get((accessory, expansion, seed, TWIN))
        if not fixed or not twin:
            continue
        wanted = np.mean([one["before"][0] for one in twin])
        for kind in ("known", ALONE):
            before, after = (np.mean(rows, axis=0) for rows in (
                [one["before"] for one in fixed], [one["fix"][kind]["after"] for one in fixed]))  # fmt: skip
            closed = (after[0] - before[0]) / (wanted - before[0])
            yield (
                f"| {accessory} | {expansion:g}, {seed} | {strength:g} | {kind} | {before[0]:.3f} | {after[0]:.3f} | "
                f"{wanted:.3f} | {closed:+.2f} | {before[1]:.3f} | {after[1]:.3f} | "
                f"{_most(one['fix'][kind]['recommended'] for one in fixed)} |"
            )
    yield ""
    yield "Every way by itself, hats at .95, as `msae audit --fix` shows them (known groups):"
    yield ""
    yield "| way | worst group | overall |"
    yield "|---|---|---|"
    shown = [one["fix"]["known"]["ways"] for group in some.values() for one in group
             if "fix" in one and one["strength"] == max(FIXED) and one["accessory"] == "hat"]  # fmt: skip
    for way in shown[0] if shown else ():
        worst, overall = np.mean([one[way] for one in shown if way in one], axis=0)
        yield f"| {way} | {worst:.3f} | {overall:.3f} |"


def _zero_shot_table(some: Mapping[tuple[Any, ...], list[dict[str, Any]]]) -> Iterator[str]:
    yield "Zero-shot, by the words of the two shapes:"
    yield ""
    yield "| concept | expansion, SAE | groups | worst before | after | overall before | after | recommended |"
    yield "|" + "---|" * 8
    for (accessory, expansion, seed, _), group in some.items():
        known = [one["zero_shot"] for one in group if "zero_shot" in one]
        for kind in ("known", ALONE) if known else ():
            before, after = (np.mean(rows, axis=0) for rows in (
                [one["before"] for one in known], [one["fix"][kind]["after"] for one in known]))  # fmt: skip
            yield (
                f"| {accessory} | {expansion:g}, {seed} | {kind} | {before[0]:.3f} | {after[0]:.3f} | "
                f"{before[1]:.3f} | {after[1]:.3f} | {_most(one['fix'][kind]['recommended'] for one in known)} |"
            )


def _most(names: Iterable[str | None]) -> str:
    counts: dict[str, int] = {}
    for one in names:
        counts[one or "none"] = counts.get(one or "none", 0) + 1
    return ", ".join(f"{one} {n}" for one, n in sorted(counts.items(), key=lambda pair: -pair[1])[:2])


def bars(trials: Sequence[dict[str, Any]]) -> str:
    """What was to be shown for hats, SAE by SAE (docs/preregistered.md)."""
    lines = ["The bars, for hats:", ""]
    for expansion, sae_seed in sorted({(one["expansion"], one["sae_seed"]) for one in trials}):
        own = [
            one
            for one in trials
            if (one["expansion"], one["sae_seed"], one["accessory"]) == (expansion, sae_seed, "hat")
        ]
        by = {s: [one for one in own if one["strength"] == s] for s in STRENGTHS}
        strongest, twin = by[max(FIXED)], by[TWIN]
        if not strongest or not twin:
            continue
        first = sum(one["rank"] == 1 for one in strongest)
        alarms = sum(bool(one["out"]) for one in twin)
        others = float(np.mean([len(one["others"]) for one in strongest]))
        most = 0.5 if expansion <= 2 else 1.0
        wanted = np.mean([one["before"][0] for one in twin])
        parts = [
            f"first {share(first, len(strongest))}, {_met(first >= 0.975 * len(strongest))}",
            f"twin {share(alarms, len(twin))}, {_met(alarms <= 0.05 * len(twin))}",
            f"others {others:.2f}, {_met(others <= most)}",
        ]
        for strength, kind, bar in [(s, k, b) for s in FIXED for k, b in (("known", 0.95), (ALONE, 0.8))]:
            fixed = [one for one in by[strength] if "fix" in one]
            if fixed:
                before, after = (np.mean(rows, axis=0) for rows in (
                    [one["before"] for one in fixed], [one["fix"][kind]["after"] for one in fixed]))  # fmt: skip
                closed = (after[0] - before[0]) / (wanted - before[0])
                is_met = closed >= bar and after[1] >= before[1] - 0.01
                parts.append(f"gap closed at {strength:g}, {kind} {closed:+.2f}, {_met(bool(is_met))}")
        lines.append(f"- expansion {expansion:g}, SAE {sae_seed}: " + "; ".join(parts))
    return "\n".join(lines)


def _met(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def share(successes: int, trials: int) -> str:
    low, high = (float(end) for end in wilson(np.array(successes), np.array(trials)))
    return f"{successes} of {trials} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="demo")
    parser.add_argument("--folder", type=Path, required=True, help="for scenes, embeddings and SAEs; used again")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--first-seed", type=int, default=0, help="of the trials")
    parser.add_argument("--first-scene", type=int, default=FIRST_SCENE, help="seed of the first scene")
    parser.add_argument("--expansions", type=float, nargs="+", default=[2, 8])
    parser.add_argument("--sae-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--accessories", nargs="+", default=list(ACCESSORIES), choices=ACCESSORIES,
                        help="frames and shadows are planted for the first SAE alone")  # fmt: skip
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="where the trials are written; without it, trials.json in the folder")
    parser.add_argument("--section", default="planted", help="of RESULTS.md")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--from-json", type=Path, nargs="+", help="trials of earlier runs: make the tables alone")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    if arguments.from_json:
        trials = [one for file in arguments.from_json for one in json.loads(file.read_text())]
    else:
        trials = measured(arguments)
    text = f"{tell(trials)}\n\n{bars(trials)}"
    print(text)
    if arguments.write:
        write_section(arguments.section, f"A planted correlation: found, and fixed ({arguments.section})", text)


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    folder, workers, began = arguments.folder, arguments.workers, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    first = arguments.first_scene
    make_scenes(folder / "general.store", arguments.encoder, range(first, first + N_WORLD), None, workers)
    for accessory in arguments.accessories:
        start = first + N_WORLD + ACCESSORIES.index(accessory) * N_POOL
        make_scenes(
            folder / f"pool-{accessory}.store", arguments.encoder, range(start, start + N_POOL), accessory, workers
        )
    if not (folder / "words.store").exists():
        rows = {"text": embedder(arguments.encoder).embed_texts(WORDS)}
        table = pa.table({"id": list(WORDS), "caption": list(WORDS)})
        write_store(
            folder / "words.store", [StorePart(rows, table)], record={"encoder": embedder(arguments.encoder).id}
        )
    print(f"scenes: {time.monotonic() - began:.0f} s", flush=True)
    saes = [Sae(folder, expansion, seed) for expansion in arguments.expansions for seed in arguments.sae_seeds]
    list(parallel(make_sae, saes, workers))
    print(f"SAEs: {time.monotonic() - began:.0f} s", flush=True)
    jobs = [
        Trial(sae, accessory, strength, seed)
        for sae in saes
        for accessory in arguments.accessories
        if accessory == arguments.accessories[0] or sae.seed == arguments.sae_seeds[0]
        for strength in arguments.strengths
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    ]
    trials: list[dict[str, Any]] = []
    kept = arguments.json or folder / "trials.json"
    for number, one in enumerate(parallel(run_trial, jobs, workers)):
        trials.append(one)
        if number % 40 == 39 or number == len(jobs) - 1:
            kept.write_text(json.dumps(trials))
            print(f"{number + 1} of {len(jobs)} trials: {time.monotonic() - began:.0f} s", flush=True)
    return trials


if __name__ == "__main__":
    main()
