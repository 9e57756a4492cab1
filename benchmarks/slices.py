"""Does `msae audit --errors` name a slice of errors that nobody labelled, and better than k-means on embeddings?

A classifier of squares and crosses is trained on crosses without hats and squares of which half have one: crosses with
hats, one in five of the audited crosses, are then its hidden slice. The audit names at most ten concepts of the class,
k-means makes ten clusters of it, or the best of all clusters for k = 2 to 10; a slice is recalled where a candidate
holds its rows with an F1 of at least .8. Uses the scenes, SAEs and names of
`planted_bias.py`, in the same folder.

    python benchmarks/slices.py --folder FOLDER --sae-seeds 30 31 32 [--first-seed 0] [--workers N] [--write]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msae.use.audit import audit
from planted_bias import N_TRAIN, SHAPES, Sae, Trial, World, parallel, share, substore, world
from results import write_section

N_CANDIDATES, RECALLED = 10, 0.8
N_AUDITED = {"square": (500, 500), "cross": (800, 200)}
"""Audited rows without and with a hat."""
KINDS = ("concepts", "k-means", "any k")


def draw(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Training rows in which no cross has a hat, and other rows of which some have one."""
    train, audited = [], []
    for number, kind in enumerate(SHAPES):
        for has in (False, True):
            n = N_TRAIN // 4 if number == 0 else (N_TRAIN // 2 if not has else 0)
            rows = rng.permutation(np.flatnonzero((world.shape == kind) & (world.has == has)))
            train.append(rows[:n])
            audited.append(rows[n : n + N_AUDITED[kind][has]])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(audited))


def f1(found: Iterable[int], wanted: set[int]) -> float:
    found = set(found)
    return 2 * len(found & wanted) / max(1, len(found) + len(wanted))


def run_trial(trial: Trial) -> dict[str, Any]:
    """The best F1 among ten candidates of either kind."""
    from sklearn.cluster import KMeans

    this = world(trial.sae, trial.accessory)
    train, audited = draw(this, np.random.default_rng(trial.seed))
    with tempfile.TemporaryDirectory() as scratch:
        stores = [substore(this, some, Path(scratch) / f"{n}.store") for n, some in enumerate((train, audited))]
        found = audit(
            this.sae, stores[1], "shape", train_store=stores[0], names=this.groups, seed=trial.seed, errors=True
        )
    is_cross = this.shape[audited] == SHAPES[1]
    crosses = audited[is_cross]
    wanted = set(crosses[this.has[crosses]].tolist())
    named = [one for one in found.slices or () if one.class_ == SHAPES[1]][:N_CANDIDATES]
    x = this.pool.take(crosses, "image")
    clustered = [KMeans(k, n_init=4, random_state=trial.seed).fit_predict(x) for k in range(2, N_CANDIDATES + 1)]
    best = [max(f1(crosses[labels == k].tolist(), wanted) for k in np.unique(labels)) for labels in clustered]
    return {
        "expansion": trial.sae.expansion, "sae_seed": trial.sae.seed, "seed": trial.seed,
        "accuracy": found.classifier["accuracy"], "n_candidates": len(named),
        "first": named[0].name if named else None,
        "concepts": max((f1(map(int, one.ids), wanted) for one in named), default=0.0),
        "k-means": best[-1], "any k": max(best),
    }  # fmt: skip


def tell(trials: list[dict[str, Any]]) -> str:
    lines = [
        "| expansion, SAE | seeds | slice recalled by concepts | best F1 | hat is the first candidate | candidates | "
        "recalled by k-means, k = 10 | best F1 | by the best cluster of k = 2 to 10 | best F1 |",
        "|" + "---|" * 10,
    ]
    for (expansion, seed), group in itertools.groupby(trials, lambda one: (one["expansion"], one["sae_seed"])):
        some = list(group)
        cells = [str(len(some))]
        for kind in KINDS:
            best = [one[kind] for one in some]
            cells += [share(sum(one >= RECALLED for one in best), len(best)), f"{np.mean(best):.2f}"]
            if kind == "concepts":
                cells += [
                    str(sum(one["first"] == "hat" for one in some)),
                    f"{np.mean([one['n_candidates'] for one in some]):.1f}",
                ]
        lines.append(f"| {expansion:g}, {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where planted_bias.py made scenes and SAEs")
    parser.add_argument("--expansions", type=float, nargs="+", default=[2, 8])
    parser.add_argument("--sae-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--from-json", type=Path, help="trials of an earlier run")
    parser.add_argument("--section", default="slices", help="of RESULTS.md")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    jobs = [
        Trial(Sae(arguments.folder, expansion, sae_seed), "hat", 1.0, seed)
        for expansion in arguments.expansions
        for sae_seed in arguments.sae_seeds
        for seed in seeds
    ]
    if arguments.from_json:
        trials = json.loads(arguments.from_json.read_text())
    else:
        trials = list(parallel(run_trial, jobs, arguments.workers))
    if arguments.json:
        arguments.json.write_text(json.dumps(trials))
    text = tell(trials)
    print(text)
    if arguments.write:
        write_section(arguments.section, "Slices of errors that nobody labelled", text)


if __name__ == "__main__":
    main()
