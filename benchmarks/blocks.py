"""Shuffling blocks of rows against shuffling single rows: FVU on other rows, over seeds.

python benchmarks/blocks.py image_train.npy image_test.npy --work FOLDER --seeds 53 54 55 --write

The store is so small that it fits into memory; blocks are made as many times smaller as it is, so that the rows mixed
in memory are the same share of the store as they are in earnest (a 12th: a store of 1.5 times the memory; a 48th: of 6
times). Sorted by class is the worst that blocks can meet: all rows of a block are of one class. `blocks16-sorted` and
`blocks4-sorted` are the first version: as many blocks in memory as a batch has rows. `more` is what training does now:
four times as many.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msae.measure.evaluate import evaluate
from msae.sae.train import blocks, train
from results import write_section


class Case(NamedTuple):
    """One way to draw the rows."""

    name: str
    is_sorted: bool
    block_rows: int
    per_row: int = blocks.BLOCKS_PER_ROW
    """Blocks in memory at once for each row of a batch; what no setting changes."""

    @property
    def shown(self) -> str:
        if self.block_rows == 1:
            return "single rows"
        return f"blocks of {self.block_rows}, {self.per_row * BATCH:,} at once"


CASES = (
    Case("rows", False, 1),
    Case("blocks16-sorted", True, 16, 1),
    Case("blocks4-sorted", True, 4, 1),
    Case("more-sorted", True, 4),
    Case("more", False, 4),
)
KEPT = (16, 64)
BATCH = 256
"""What the default recipe takes for so many rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="image_train.npy with image_train.csv beside it")
    parser.add_argument("test", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    stores = {False: arguments.train, True: sorted_by_class(arguments.train, arguments.work / "sorted-image.npy")}
    for seed in arguments.seeds:
        for case in CASES:
            file = arguments.work / f"{case.name}-{seed}.json"
            if not file.exists() and (arguments.only is None or case.name in arguments.only):
                measured = measure(case, stores[case.is_sorted], arguments, seed)
                file.write_text(json.dumps(measured))
                print(case.name, seed, measured, flush=True)
    text = report(arguments)
    print(text)
    if arguments.write:
        write_section("blocks", "Blocks of rows against single rows", text)


def sorted_by_class(path: Path, out: Path) -> Path:
    """The same rows, those of one class one after another."""
    if not out.exists():
        with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
            labels = [row["label"] for row in csv.DictReader(file)]
        np.save(out, np.load(path)[np.argsort(labels, kind="stable")])
    return out


def measure(case: Case, store: Path, arguments: argparse.Namespace, seed: int) -> dict[int, float]:
    """FVU on the test rows by the number of latents kept."""
    blocks.BLOCKS_PER_ROW = case.per_row
    run = arguments.work / f"run-{case.name}-{seed}"
    options = {"epochs": arguments.epochs, "seed": seed, "block_rows": case.block_rows, "modality": "image"}
    train(store, out=run, resume=True, **options)
    return {k: evaluate(run, arguments.test, modality="image", inference="topk", k=k).fvu for k in KEPT}


def report(arguments: argparse.Namespace) -> str:
    """A table of all runs in the folder; each case is compared with single rows of the same seeds."""
    n_rows = len(np.load(arguments.train, mmap_mode="r"))
    lines = [
        f"Real CLIP ViT-B/32 vectors, {n_rows:,} rows to train on, FVU on 6,000 others; the default recipe, expansion "
        f"8, {arguments.epochs} epochs, batch {BATCH}. The last column is the mean FVU over that of single rows "
        f"with the same seeds, less 1.",
        "",
        "| order of the store | shuffled | share of the store mixed | kept | FVU by seed | mean | against rows |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    for case in CASES:
        for k in KEPT:
            found = {seed: values[k] for seed, values in runs_of(case, arguments.work).items()}
            rows = runs_of(CASES[0], arguments.work)
            found = {seed: value for seed, value in found.items() if seed in rows}
            if found:
                mixed = 1 if case.block_rows == 1 else case.block_rows * case.per_row * BATCH / n_rows
                mean = np.mean(list(found.values()))
                change = mean / np.mean([rows[seed][k] for seed in found]) - 1
                shown = ", ".join(f"{seed}: {value:.5f}" for seed, value in found.items())
                order = "by class" if case.is_sorted else "as it is"
                lines.append(f"| {order} | {case.shown} | {mixed:.3f} | {k} | {shown} | {mean:.5f} | {change:+.2%} |")
    return "\n".join(lines)


def runs_of(case: Case, work: Path) -> dict[int, dict[int, float]]:
    """FVU by seed and number of latents kept."""
    files = sorted(work.glob(f"{case.name}-[0-9]*.json"))
    return {
        int(file.stem.rpartition("-")[2]): {int(k): value for k, value in json.loads(file.read_text()).items()}
        for file in files
    }


if __name__ == "__main__":
    main()
