"""Does the audit find a correlation that was planted, and only that, and does removing the concept help?

A classifier is to tell crosses from squares. In its training set a share of the crosses, and the rest of the squares,
wear hats; in the test set hats go with neither. The SAE and its names come from scenes that know nothing of the task.
All scenes are embedded once; each seed draws its own training and test rows from them.

    python benchmarks/planted_bias.py --encoder demo --folder FOLDER [--seeds 40] [--first-seed 0] [--write]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from msae import train
from msae.base.statistics import cliffs_delta, net_wins, wilson
from msae.concepts.names import ConceptNames
from msae.concepts.naming import name
from msae.data.embedder import Embedder
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.sae.model import SAE
from msae.sae.view import View
from msae.use.audit import Audit, ConceptAudit, audit
from msae.use.classifier import LinearClassifier
from msae.world.drawing import render
from msae.world.scenes import ATTRIBUTES, UNSEEN_SEEDS
from results import write_section

SHAPES = ("square", "cross")
"""The two shapes that the demo's CLIP confuses most: where the class is easy a classifier has no use for a shortcut."""
FIRST_SCENE = UNSEEN_SEEDS.start + 5_000_000  # far from the demo's own scenes
N_POOL, N_WORLD = 12_000, 10_000
N_TRAIN, N_TEST = 400, 2000
STRENGTHS = (0.5, 0.8, 0.9, 0.95)
"""Share of the crosses with hats, and of squares without; .5 is the unbiased twin."""
_TOLD = ("shape", "colour", "size", "texture", "background")
WORDS = (*(str(value) for kind in _TOLD for value in ATTRIBUTES[kind]), "hat", "frame", "shadow", "two shapes")


_KINDS = ("shape", "colour", "size", "texture")
SCHEMA = pa.schema(
    [(column, pa.string()) for column in ("id", "caption", "background", *_KINDS)]
    + [(column, pa.bool_()) for column in ("hat", "frame", "shadow")]
)


class World(NamedTuple):
    """What all trials share."""

    pool: EmbeddingStore
    """Lone squares and crosses, half of each with a hat."""
    general: EmbeddingStore
    """Scenes of every kind: the SAE's training set."""
    words: EmbeddingStore
    sae: SAE
    groups: Mapping[str, list[int]]
    """Latents by name."""
    shape: np.ndarray
    """Of the pool, the truth."""
    hat: np.ndarray


def make_world(folder: Path, encoder: str, options: Mapping[str, Any], run: str, start: int = FIRST_SCENE) -> World:
    """Render, embed, train and name, each where it is not done yet."""

    def fixed(seed: int) -> dict[str, Any]:
        return {"count": 1, "shape": SHAPES[seed % 2], "hat": bool(seed // 2 % 2)}

    embedder = Embedder.load(encoder)
    first = start + N_POOL
    stores = [
        embedded_scenes(folder / "pool.store", embedder, range(start, first), fixed),
        embedded_scenes(folder / "general.store", embedder, range(first, first + N_WORLD), lambda _: {}),
    ]
    if not (folder / "words.store").exists():
        rows = {"text": embedder.embed_texts(WORDS)}
        table = pa.table({"id": list(WORDS), "caption": list(WORDS)})
        write_store(folder / "words.store", [StorePart(rows, table)], record={"encoder": embedder.id})
    stores.append(EmbeddingStore.open(folder / "words.store"))
    sae = train(stores[1], out=folder / run, resume=True, **options)
    return world_of(*stores, sae, name(folder / run, vocabulary=stores[2], on=stores[1]))


def embedded_scenes(
    path: Path, embedder: Embedder, seeds: range, fixed: Callable[[int], Mapping[str, Any]]
) -> EmbeddingStore:
    """Scenes drawn and embedded without a file for each."""
    if path.exists():
        store = EmbeddingStore.open(path)
        if store.ids[0] != str(seeds[0]):
            raise SystemExit(f"{path} begins with scene {store.ids[0]}, wanted {seeds[0]}; give another --folder")
        return store

    def parts() -> Iterator[StorePart]:
        for first in range(0, len(seeds), 256):
            own = seeds[first : first + 256]
            scenes = [render(seed, **fixed(seed)) for seed in own]
            x = embedder.embed_images([scene.image for scene in scenes])
            told = zip(own, scenes, strict=True)
            rows = [{"id": str(seed), "caption": scene.caption, **scene.attributes} for seed, scene in told]
            yield StorePart({"image": x.astype(np.float16)}, pa.Table.from_pylist(rows, schema=SCHEMA))

    return write_store(path, parts(), schema=SCHEMA, record={"encoder": embedder.id})


def world_of(
    pool: EmbeddingStore, general: EmbeddingStore, words: EmbeddingStore, sae: SAE, names: ConceptNames
) -> World:
    """The world with its latents grouped by name."""
    groups: dict[str, list[int]] = {}
    for concept in names:
        groups.setdefault(concept.name, []).append(concept.latent)
    return World(pool, general, words, sae, groups, np.array(pool.column("shape")), np.array(pool.column("hat")))


class Draw(NamedTuple):
    """Rows of the pool for one seed."""

    train: np.ndarray
    test: np.ndarray


def draw(world: World, strength: float, rng: np.random.Generator) -> Draw:
    """Training rows with the correlation, and test rows, none of them among the former, without it."""
    train_rows, test_rows = [], []
    for number, kind in enumerate(SHAPES):
        share = strength if number == 1 else 1 - strength
        with_hat = int(rng.binomial(N_TRAIN // 2, share))
        for has, n in ((True, with_hat), (False, N_TRAIN // 2 - with_hat)):
            rows = rng.permutation(np.flatnonzero((world.shape == kind) & (world.hat == has)))
            train_rows.append(rows[:n])
            test_rows.append(rows[n : n + N_TEST // 4])
            assert len(test_rows[-1]) == N_TEST // 4
    return Draw(np.sort(np.concatenate(train_rows)), np.sort(np.concatenate(test_rows)))


def substore(world: World, rows: np.ndarray, path: Path) -> EmbeddingStore:
    """The rows as a store of their own."""
    table = pa.table({"id": [str(row) for row in rows], "shape": world.shape[rows], "hat": world.hat[rows]})
    return write_store(path, [StorePart({"image": world.pool.take(rows, "image")}, table)])


# --- Ways to remove a concept


Remover = Callable[[torch.Tensor], torch.Tensor]


def removers(world: World, concept: str) -> dict[str, Remover]:
    """Edits of raw embeddings. The baselines learn from the general scenes' true hats, which the SAE never saw."""
    x = torch.from_numpy(world.general.take(np.arange(len(world.general)), "image"))
    has = torch.tensor([bool(value) for value in world.general.column(concept)])
    mean, sae = x.mean(0), world.sae
    difference = x[has].mean(0) - x[~has].mean(0)
    texts = torch.from_numpy(world.words.take(np.arange(len(world.words)), "text"))
    text = texts[WORDS.index(concept)] - texts.mean(0)
    wins = np.abs(cliffs_delta(net_wins(x.numpy(), np.zeros(len(x), int)), has.numpy(), np.zeros(len(x), int)))
    coordinates = np.argsort(-wins)
    latents = world.groups.get(concept, [])

    def project(direction: torch.Tensor) -> Remover:
        unit = direction / direction.norm()
        return lambda rows: rows - ((rows - mean) @ unit)[:, None] * unit

    def ablate(n: int) -> Remover:
        def remove(rows: torch.Tensor) -> torch.Tensor:
            edited = rows.clone()
            edited[:, coordinates[:n].copy()] = mean[coordinates[:n].copy()]
            return edited

        return remove

    def with_latents_at(level: torch.Tensor | float) -> Remover:
        scale = sae.standardizer.statistics["image"].scale
        return lambda rows: rows + (level - sae.encode(rows)[:, latents]) @ sae.W_dec.detach()[latents] / scale

    pool = torch.from_numpy(world.pool.take(np.arange(len(world.pool)), "image"))
    mean_level = sae.encode(pool)[:, latents].mean(0)  # the audit takes that of the audited rows

    return {
        "SAE concept, levelled": with_latents_at(mean_level),
        "SAE concept, set to 0": with_latents_at(0.0),
        "1 raw coordinate": ablate(1),
        "8 raw coordinates": ablate(8),
        "mean difference, projected out": project(difference),
        "text direction, projected out": project(text),
    }


def group_accuracy(
    classifier: LinearClassifier, x: torch.Tensor, shape: np.ndarray, hat: np.ndarray
) -> tuple[float, float]:
    """Accuracy of the worst of the four true groups, and of all."""
    right = np.array(classifier.classes)[classifier.logits(x).argmax(1).numpy()] == shape
    return min(float(right[(shape == k) & (hat == h)].mean()) for k in SHAPES for h in (False, True)), float(
        right.mean()
    )


# --- One seed


def trial(world: World, strength: float, seed: int, planted: str, edits: Mapping[str, Remover]) -> dict[str, Any]:
    """The audit of one classifier, and what each way of removing the planted concept does to it."""
    from msae.use.audit.subjects import make_subject

    rng = np.random.default_rng([seed, int(1000 * strength)])
    rows = draw(world, strength, rng)
    with tempfile.TemporaryDirectory() as scratch:
        stores = [substore(world, some, Path(scratch) / f"{n}.store") for n, some in enumerate(rows)]
        found = audit(
            world.sae, stores[1], "shape", train_store=stores[0], names=world.groups, positive=SHAPES[1], seed=seed
        )
        subject = make_subject(
            View(world.sae, stores[1], "image"),
            target="shape", classifier=None, class_texts=None, train_store=stores[0], seed=seed,
        )  # fmt: skip
    shape, hat = world.shape[rows.test], world.hat[rows.test]
    x = torch.from_numpy(world.pool.take(rows.test, "image"))
    return {
        "strength": strength, "seed": seed, **summary(found, planted),
        "unedited": group_accuracy(subject.classifier, x, shape, hat),
        "edited": {kind: group_accuracy(subject.classifier, edit(x), shape, hat) for kind, edit in edits.items()},
    }  # fmt: skip


def summary(found: Audit, planted: str) -> dict[str, Any]:
    """Ranks of the planted concept, and which concepts are reported."""
    order = [one.name for one in found.concepts]
    nuisance = [one for one in order if one not in ATTRIBUTES["shape"]]
    alarms = {
        test: [
            one.name for one in found.concepts if one.name in nuisance and (a := getattr(one, test)) and a.q < 0.05
        ]
        for test in ("train_shift", "given_true", "by_predicted", "by_true")
    }  # fmt: skip
    rank = order.index(planted) + 1 if planted in order else None
    by_effect = [one.name for one in sorted(found.concepts, key=lambda one: -one.effect)]
    return {
        "rank": rank,
        "rank_with_own_words": by_effect.index(planted) + 1 if planted in order else None,
        "first": order[:4],
        "effects": [round(one.effect, 3) for one in found.concepts[:4]],
        "alarms": alarms,
        "accuracy": found.classifier["accuracy"],
        "concepts": {one.name: detail(one) for one in found.concepts},
    }


def detail(one: ConceptAudit) -> dict[str, float | None]:
    """What rankings other than the audit's could be made of."""
    edits = {kind: getattr(one, kind) for kind in ("remove", "set_p50", "set_p90", "set_p99")}
    shares = {"fires": one.firing_rate, "beaten": one.control and one.control.beaten, "q": one.main and one.main.q}
    return {**{kind: edit and round(edit.change, 5) for kind, edit in edits.items()}, **shares}


def qs(one: Mapping[str, Any]) -> list[float | None]:
    """Of every concept of a trial, the class's own words too, the q-value of its main test."""
    return [known["q"] for known in one["concepts"].values()]


def tell(world: World, trials: list[dict[str, Any]], planted: str) -> str:
    """The tables."""
    strengths = sorted({one["strength"] for one in trials})
    by = {s: [one for one in trials if one["strength"] == s] for s in strengths}
    lines = [
        f"{len(by[strengths[0]])} seeds; {N_TRAIN:,} training and {N_TEST:,} test rows; {len(world.groups)} named "
        f"concepts ({sum(map(len, world.groups.values()))} latents of {world.sae.d_sae}; "
        f"{planted!r}: {world.groups.get(planted)}).",
        "",
        "| hats on crosses | planted concept first | first, the class's own words counted | planted reported | "
        "another nuisance reported | how many | the same by `given_true` | any concept, the class's own words too | "
        "accuracy | worst group |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s, some in by.items():
        alarms = [one["alarms"]["train_shift"] for one in some]
        cells = [
            np.mean([one["rank"] == 1 for one in some]),
            np.mean([one["rank_with_own_words"] == 1 for one in some]),
            np.mean([planted in names for names in alarms]),
            np.mean([any(other != planted for other in names) for names in alarms]),
            np.mean([sum(other != planted for other in names) for names in alarms]),
            np.mean([any(other != planted for other in one["alarms"]["given_true"]) for one in some]),
            np.mean([any(q is not None and q < 0.05 for q in qs(one)) for one in some]),
            np.mean([one["unedited"][1] for one in some]),
            np.mean([one["unedited"][0] for one in some]),
        ]
        lines.append(f"| {s:g} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    lines += ["", "| removal | " + " | ".join(f"worst group, {s:g} | gap closed | all" for s in strengths[1:]) + " |"]
    lines.append("|---|" + "---|" * 3 * len(strengths[1:]))
    twin = np.mean([one["unedited"][0] for one in by[strengths[0]]])
    for kind in trials[0]["edited"]:
        cells = []
        for s in strengths[1:]:
            before = np.mean([one["unedited"][0] for one in by[s]])
            after = np.mean([one["edited"][kind][0] for one in by[s]])
            everything = np.mean([one["edited"][kind][1] for one in by[s]])
            cells += [f"{after:.3f}", f"{(after - before) / (twin - before):+.2f}", f"{everything:.3f}"]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *bars(by)])


def bars(by: Mapping[float, list[dict[str, Any]]]) -> list[str]:
    """What was to be shown, with Wilson's 95 % intervals of the shares of seeds."""
    strongest, twin = by[max(by)], by[0.5]
    first = sum(one["rank"] == 1 for one in strongest)
    alarms = sum(any(q is not None and q < 0.05 for q in qs(one)) for one in twin)
    before, wanted = (np.mean([one["unedited"][0] for one in some]) for some in (strongest, twin))
    closed = {
        kind: (np.mean([one["edited"][kind][0] for one in strongest]) - before) / (wanted - before)
        for kind in ("SAE concept, levelled", "SAE concept, set to 0")
    }

    def line(what: str, found: str, is_met: bool) -> str:
        return f"- {what}: {found}; {'met' if is_met else 'missed'}"

    return [
        f"The bars, at {max(by):g}:",
        "",
        line("planted first in 95 % of seeds", share(first, len(strongest)), first >= 0.95 * len(strongest)),
        line("any concept on the twin in at most 5 %", share(alarms, len(twin)), alarms <= 0.05 * len(twin)),
        *(line(f"half of the gap closed, {kind}", f"{part:+.2f}", bool(part >= 0.5)) for kind, part in closed.items()),
    ]


def share(successes: int, trials: int) -> str:
    low, high = (float(end) for end in wilson(np.array(successes), np.array(trials)))
    return f"{successes} of {trials}, {successes / trials:.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="demo")
    parser.add_argument("--folder", type=Path, required=True, help="for scenes, embeddings and the SAE; used again")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--expansion", type=float, default=2)
    parser.add_argument("--weighting", default="reverse")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--kind", default="matryoshka")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--planted", default="hat")
    parser.add_argument("--first-seed", type=int, default=0, help="of the trials")
    parser.add_argument("--first-scene", type=int, default=FIRST_SCENE, help="seed of the first scene of the pool")
    parser.add_argument("--sae-seed", type=int, default=0)
    parser.add_argument("--section", default="planted-bias", help="of RESULTS.md")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options: dict[str, Any] = {"kind": arguments.kind, "expansion": arguments.expansion, "epochs": arguments.epochs}
    options |= {"weighting": arguments.weighting} if arguments.kind == "matryoshka" else {"k": arguments.k}
    options |= {"seed": arguments.sae_seed} if arguments.sae_seed else {}
    run = "-".join(str(value) for value in options.values())
    world = make_world(arguments.folder, arguments.encoder, options | {"batch_size": 64}, run, arguments.first_scene)
    edits = removers(world, arguments.planted)
    trials = []
    began = time.monotonic()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        trials += [trial(world, strength, seed, arguments.planted, edits) for strength in arguments.strengths]
        (arguments.folder / f"trials-{run}.json").write_text(json.dumps(trials, indent=1))
        print(f"seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    text = tell(world, trials, arguments.planted)
    print(text)
    if arguments.write:
        title = "A planted correlation: found, and nothing else"
        write_section(
            arguments.section, title if arguments.section == "planted-bias" else f"{title}: {arguments.section}", text
        )


if __name__ == "__main__":
    main()
