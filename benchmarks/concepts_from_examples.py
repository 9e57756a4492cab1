"""Does a concept that is learnt from 50 rows with it and 50 without beat the best single latent on other rows?

On the demo's world: texture, size and shape of lone objects, and of scenes of one to three that share it. On real
pictures of clothes: ten articles and five colours. Beside it the simpler ways to join latents, and shuffled labels.

    python benchmarks/concepts_from_examples.py --folder FOLDER [--fashion STORE --run RUN...] [--write]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msae import train
from msae.concepts.examples import best_single, best_thresholds, f1, from_rows
from msae.data.embedder import Embedder
from msae.data.store import as_store
from msae.sae.view import View
from msae.world.scenes import ATTRIBUTES
from results import write_section
from scene_stores import embedded_scenes

N_EXAMPLES, MOST_JUDGED, DRAWS = 50, 500, 5
KINDS = ("texture", "size", "shape")
Fires = Callable[[np.ndarray], np.ndarray]


def greedy(z: np.ndarray, is_positive: np.ndarray, way: str) -> Fires:
    """Latents added while F1 grows by .02: any of them fires, or their sum or their largest is above a threshold."""
    f1s, own = best_thresholds(z, is_positive)
    chosen, best, threshold = [int(f1s.argmax())], float(f1s.max()), float(own[f1s.argmax()])
    joined = z[:, chosen[0]]
    fires = joined > threshold
    while len(chosen) < 8:
        if way == "any":
            sums = fires[:, None] | (z > own)
            tried, cuts = 2 * (sums & is_positive[:, None]).sum(0) / (sums.sum(0) + is_positive.sum()), own
        else:
            sums = joined[:, None] + z if way == "sum" else np.maximum(joined[:, None], z)
            tried, cuts = best_thresholds(sums, is_positive)
        tried = tried.copy()
        tried[chosen] = 0
        new = int(tried.argmax())
        if tried[new] < best + 0.02:
            break
        best, threshold = float(tried[new]), float(cuts[new])
        chosen.append(new)
        joined, fires = sums[:, new], sums[:, new] if way == "any" else fires
    if way == "any":
        return lambda rows: (rows[:, chosen] > own[chosen]).any(1)
    join = np.sum if way == "sum" else np.max
    return lambda rows: join(rows[:, chosen], axis=1) > threshold


def study(view: View, column: str, values: Sequence[str], *, seed: int, draws: int = DRAWS) -> list[dict[str, Any]]:
    """For each value and draw the F1 on other rows, as many with the value as without."""
    labels = np.array(view.store.labels(column), dtype=object)
    z = view.table(np.arange(len(view)))
    natural = np.array([np.quantile(own[own > 0], 0.99) if (own > 0).any() else np.inf for own in z.T], np.float32)
    found = []
    for number, value in enumerate(values):
        for draw in range(draws):
            rng = np.random.default_rng([seed, number, draw])
            sides = [
                rng.permutation(np.flatnonzero(labels == value)),
                rng.permutation(np.flatnonzero((labels != value) & (labels != np.array(None)))),
            ]
            n = min(MOST_JUDGED, *(len(side) - N_EXAMPLES for side in sides))
            rows = np.concatenate([side[N_EXAMPLES : N_EXAMPLES + n] for side in sides])
            truth = np.repeat([True, False], n)
            examples = [side[:N_EXAMPLES] for side in sides]
            one: dict[str, Any] = {"column": column, "value": value, "n": n}
            for kind in ("", "null "):
                if kind:
                    mixed = rng.permutation(np.concatenate(examples))
                    examples = [mixed[:N_EXAMPLES], mixed[N_EXAMPLES:]]
                learnt = from_rows(view, value, *examples, shown="", seed=draw)
                halves = np.random.default_rng(draw)  # those of from_rows
                finds = np.concatenate([halves.permutation(np.unique(own))[0::2] for own in examples])
                is_positive = np.isin(finds, examples[0])
                one[f"{kind}set"] = f1(learnt.fires(z[rows]), truth)
                one[f"{kind}single"] = f1(best_single(z[finds], is_positive).fires(z[rows]), truth)
                one[f"{kind}size"] = len(learnt.latents) + len(learnt.against)
                one[f"{kind}judged"] = learnt.judged.f1
                for way in () if kind else ("any", "sum", "max"):
                    one[way] = f1(greedy(z[finds] / natural, is_positive, way)(z[rows] / natural), truth)
            found.append(one)
    return found


def table(studies: dict[str, list[dict[str, Any]]]) -> str:
    head = ("single", "set", "size", "judged", "any", "sum", "max", "null single", "null set", "null size")
    lines = [
        "| what | single latent | concept | gain | latents | F1 it says itself | any | sum | max | shuffled: single | "
        "shuffled: concept | shuffled: latents |",
        "|---" * 12 + "|",
    ]
    for what, trials in studies.items():
        by_value = [[one for one in trials if one["value"] == v] for v in dict.fromkeys(one["value"] for one in trials)]
        mean = {key: float(np.mean([np.mean([one[key] for one in own]) for own in by_value])) for key in head}
        cells = [mean["single"], mean["set"], mean["set"] - mean["single"], *(mean[key] for key in head[2:])]
        signs = ("{:.3f}", "{:.3f}", "{:+.3f}", "{:.1f}", *["{:.3f}"] * 6, "{:.1f}")
        lines.append(f"| {what} | " + " | ".join(s.format(c) for s, c in zip(signs, cells, strict=True)) + " |")
    return "\n".join(lines)


def values_line(trials: list[dict[str, Any]]) -> str:
    by = {v: [one for one in trials if one["value"] == v] for v in dict.fromkeys(one["value"] for one in trials)}
    return ", ".join(
        f"{value} {np.mean([one['single'] for one in own]):.2f} to {np.mean([one['set'] for one in own]):.2f}"
        for value, own in by.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for embeddings and SAEs; used again")
    parser.add_argument("--first-scene", type=int, default=29_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the SAEs")
    parser.add_argument("--expansions", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--fashion", type=Path, help="the pictures of clothes")
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="SAEs that read them")
    parser.add_argument("--articles", nargs="+", default=["Formal Shoes", "Heels", "Sandals"])
    parser.add_argument("--colours", nargs="+", default=["Grey", "Green", "Purple", "Navy Blue", "Pink"])
    parser.add_argument("--section", default="concepts-from-examples", help="of RESULTS.md")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    embedder, first, folder = Embedder.load("demo"), arguments.first_scene, arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    general = embedded_scenes(folder / "train.store", embedder, range(first, first + 8000), lambda _: {})
    parts = (("lone objects", "lone", 8000, {"count": 1}), ("scenes of one to three", "mixed", 12000, {}))
    stores = {
        name: embedded_scenes(
            folder / f"{file}.store", embedder, range(first + n, first + n + 4000), lambda _, f=fixed: f
        )
        for name, file, n, fixed in parts
    }
    studies: dict[str, list[dict[str, Any]]] = {}
    for expansion in arguments.expansions:
        for seed in arguments.seeds:
            run = folder / f"run-{expansion}-{seed}"
            train(
                general,
                out=run,
                resume=True,
                recipe="default",
                expansion=expansion,
                epochs=10,
                batch_size=64,
                seed=seed,
            )
            for name, store in stores.items():
                for kind in KINDS:
                    what = f"{name}, {kind}, d_sae {expansion * general.d_in}"
                    trials = study(View(run, store), kind, [str(v) for v in ATTRIBUTES[kind]], seed=seed)
                    studies.setdefault(what, []).extend(trials)
                    print(what, seed, flush=True)
    for run in arguments.run:
        view = View(run, as_store(arguments.fashion))
        for column, values in (("articleType", arguments.articles), ("baseColour", arguments.colours)):
            studies.setdefault(f"clothes, {column}", []).extend(study(view, column, values, seed=len(studies)))
    studies = dict(sorted(studies.items(), key=lambda one: (one[0].startswith("clothes"), one[0])))
    bars = []
    for kind in KINDS:
        own = [one for what, some in studies.items() if what.startswith(f"lone objects, {kind}") for one in some]
        gain = float(np.mean([one["set"] - one["single"] for one in own]))
        bars.append(f"- {kind} of lone objects: {gain:+.3f}; wanted +.050: {'met' if gain >= 0.05 else 'missed'}")
    text = "\n".join(
        [
            f"F1 on rows that were not examples, as many with the value as without (always firing: .667); means over "
            f"values, {DRAWS} draws and {len(arguments.seeds)} SAEs of each width (clothes: {len(arguments.run)}). "
            "Single latent, any, sum and max are found on the same half of the examples as the concept.",
            "", table(studies), "", *bars, "",
            *(f"- {what}: {values_line(some)}" for what, some in studies.items()),
        ]
    )  # fmt: skip
    print(text)
    if arguments.write:
        write_section(arguments.section, "Concepts from examples, against the best single latent", text)


if __name__ == "__main__":
    main()
