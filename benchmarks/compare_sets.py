"""Does a comparison find the attribute that was shifted, first and alone, and nothing in two random halves?

Lone objects of the demo's world. Each seed draws a thousand rows a side: in A a quarter have the planted value, in B
half, all else alike; then two random thousands. What a latent reads is judged on rows that the trials never see.

    python benchmarks/compare_sets.py --folder FOLDER [--fashion STORE --run RUN] [--write]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from msae import compare, train
from msae.base.statistics import aurocs, wilson
from msae.data.embedder import Embedder
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.sae.view import View
from msae.world.scenes import ATTRIBUTES
from results import write_section
from scene_stores import embedded_scenes

KINDS = ("shape", "colour", "size", "texture", "background", "hat", "frame", "shadow")
VALUES = [(kind, str(value)) for kind in KINDS for value in ATTRIBUTES[kind] if value is not False]
N_SIDE, SHARES = 1000, (0.25, 0.5)


def truth_of(view: View) -> list[tuple[str, str]]:
    """Of each latent the value of an attribute that it tells apart best."""
    z = view.table(np.arange(len(view)))
    labels = {kind: np.array(view.store.labels(kind)) for kind in KINDS}
    rows = [np.flatnonzero(labels[kind] == value).tolist() for kind, value in VALUES]
    best = np.abs(aurocs(z, rows) - 0.5).argmax(1)
    return [VALUES[i] for i in best]


def drawn(has: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Places of `N_SIDE` rows of which that share has the value."""
    n = round(N_SIDE * share)
    sides = (rng.permutation(np.flatnonzero(has))[:n], rng.permutation(np.flatnonzero(~has))[: N_SIDE - n])
    return np.concatenate(sides)


def substore(pool: EmbeddingStore, rows: np.ndarray, path: Path) -> EmbeddingStore:
    return write_store(path, [StorePart({"image": pool.take(rows, "image")}, pa.table({"id": [str(r) for r in rows]}))])


def trial(run: Path, pool: EmbeddingStore, truth: list[tuple[str, str]], seed: int) -> dict[str, Any]:
    """The planted shift of one value, and two halves that differ in nothing."""
    rng = np.random.default_rng(seed)
    kind, value = VALUES[seed % len(VALUES)]
    has = np.array(pool.labels(kind)) == value
    a = drawn(has, SHARES[0], rng)
    others = np.setdiff1d(np.arange(len(pool)), a)
    b = others[drawn(has[others], SHARES[1], rng)]
    halves = rng.permutation(len(pool))[: 2 * N_SIDE]
    with tempfile.TemporaryDirectory() as scratch:
        stores = [
            substore(pool, np.sort(rows), Path(scratch) / f"{i}.store")
            for i, rows in enumerate((a, b, halves[:N_SIDE], halves[N_SIDE:]))
        ]
        planted = compare(run, stores[0], stores[1], seed=seed)
        nothing = compare(run, stores[2], stores[3], seed=seed)
    first = planted.concepts[0]
    return {
        "kind": kind, "value": value,
        "first": first.stands_out and truth[first.latent][0] == kind,
        "first_value": first.stands_out and truth[first.latent] == (kind, value),
        "effect": abs(first.effect_size), "reported": len(planted.standing_out),
        "others": sum(truth[one.latent][0] != kind for one in planted.standing_out),
        "null": len(nothing.standing_out),
    }  # fmt: skip


def share(successes: int, trials: int) -> str:
    low, high = (float(end) for end in wilson(successes, trials))
    return f"{successes} of {trials} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for embeddings and SAEs; used again")
    parser.add_argument("--first-scene", type=int, default=29_100_000)
    parser.add_argument("--sae-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--expansions", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--fashion", help="the pictures of clothes")
    parser.add_argument("--run", type=Path, help="an SAE that reads them")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    embedder, first, folder = Embedder.load("demo"), arguments.first_scene, arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    general = embedded_scenes(folder / "train.store", embedder, range(first, first + 8000), lambda _: {})
    pool = embedded_scenes(folder / "pool.store", embedder, range(first + 16000, first + 24000), lambda _: {"count": 1})
    judge = embedded_scenes(
        folder / "judge.store", embedder, range(first + 24000, first + 26000), lambda _: {"count": 1}
    )
    lines = [
        f"{arguments.seeds} seeds, {N_SIDE:,} rows a side; {len(VALUES)} values in turn go from 25 to 50 %.",
        "",
        "| d_sae | first is of the planted attribute | first is the planted value | latents reported | "
        "of other attributes | effect of the first | random halves without a report | bars (38 of 40) |",
        "|---" * 8 + "|",
    ]
    for expansion in arguments.expansions:
        run = folder / f"run-{expansion}-{arguments.sae_seed}"
        options = {"expansion": expansion, "epochs": 10, "batch_size": 64, "seed": arguments.sae_seed}
        train(general, out=run, resume=True, recipe="default", **options)
        truth = truth_of(View(run, judge))
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        trials = []
        for seed in seeds:
            trials.append(trial(run, pool, truth, seed))
            print(expansion, seed, trials[-1], flush=True)
        n, found, quiet = len(trials), sum(one["first"] for one in trials), sum(one["null"] == 0 for one in trials)
        is_met = "met" if min(found, quiet) >= 0.95 * n else "missed"
        missed = [f"{one['value']} ({one['kind']})" for one in trials if not one["first"]]
        lines.append(
            f"| {expansion * general.d_in} | {share(found, n)} | {sum(one['first_value'] for one in trials)} of {n} | "
            + " | ".join(f"{np.mean([one[key] for one in trials]):.1f}" for key in ("reported", "others"))
            + f" | {np.mean([one['effect'] for one in trials]):.2f} | {share(quiet, n)} | {is_met}"
            + (f"; not first: {', '.join(missed)}" if missed else "") + " |"
        )  # fmt: skip
    if arguments.fashion:
        parts = (f"{arguments.fashion}:gender=Men", f"{arguments.fashion}:gender=Women")
        for within in (["source"], ["source", "articleType"]):
            found = compare(arguments.run, *parts, within=within)
            lines += [
                "",
                f"Clothes, within {' and '.join(within)}: {found.verdict}.",
                "",
                "```",
                found.to_text(12),
                "```",
            ]
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        write_section("compare-sets", "Two sets compared: a planted shift, and none", text)


if __name__ == "__main__":
    main()
