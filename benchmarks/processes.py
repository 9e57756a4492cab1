"""Training on 2 and 4 processes beside one: loss curves, weights, held-out FVU; and what a kill leaves.

    python benchmarks/processes.py TRAIN.npy TEST.npy [--rows 4096] [--epochs 4] [--seed 50]
        [--kinds default topk] [--folder FOLDER]

With a folder a run that was cut off goes on where it was.

Null: one process that adds up each batch in the reverse order. It differs from one process by rounding alone. What
several processes differ by is to be of that size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from msae.base.processes import joined
from msae.sae.model import SAE
from msae.sae.train import TrainSettings
from msae.sae.train.rows import TrainingRows
from msae.sae.train.training import Training
from results import write_section

KINDS = {
    "default": {},
    "faithful": {"recipe": "faithful"},
    "poster": {"recipe": "poster", "batch_size": 256},
    "topk": {"kind": "topk"},
    "jumprelu": {"kind": "jumprelu"},
    "relu": {"kind": "relu"},
    "widths": {"widths": (256, 512, 1024, 2048)},
    "batchtopk": {"kind": "batchtopk", "auxiliary": 1 / 32, "dead_after": 5_000},
}
RUNS = ("null", "2 processes", "4 processes")


class Reversed(Training):
    """One process that adds up each batch from its last row to its first."""

    def _batches(self, first_step):
        for batch in super()._batches(first_step):
            yield {modality: rows[::-1].copy() for modality, rows in batch.items()}


def train(kind: str, out: Path, options: argparse.Namespace, training: type[Training] = Training) -> None:
    """One run, as `msae train` makes it."""
    with joined() as processes:
        rows = TrainingRows(options.work / "train.npy", "image")
        given = {"d_sae": 2048, "epochs": options.epochs, "batch_size": 256, "log_every": 1, "device": "cpu"}
        settings = TrainSettings(**{**given, **KINDS[kind]}, seed=options.seed, checkpoint_every=10).resolve(rows)
        training(out, rows, settings, processes).train(resume=True)


def worker(options: argparse.Namespace) -> None:
    """What each process does: all kinds, one after another."""
    torch.set_num_threads(1)
    with joined() as processes:
        for kind in options.kinds:
            if processes.size == 1:
                train(kind, options.work / "one" / kind, options)
                train(kind, options.work / "null" / kind, options, Reversed)
            else:
                train(kind, options.work / f"{processes.size} processes" / options.into / kind, options)


def start(n: int, options: argparse.Namespace, kinds: list[str], into: str = ".") -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(n)}
    given = ["--work", options.work, "--epochs", options.epochs, "--seed", options.seed, "--into", into]
    command = [sys.executable, __file__, *map(str, given), "--kinds", *kinds]
    return [subprocess.Popen(command, env={**os.environ, **place, "RANK": str(rank)}) for rank in range(n)]


def kill_and_resume(n: int, options: argparse.Namespace, kind: str, kills: int) -> str:
    """Kill one process of a run at a random moment, several times; whether it ends with the bytes of the whole run."""
    rng, whole = random.Random(n), options.work / f"{n} processes"
    killed, done = whole / "killed" / kind, 0
    while done < kills:
        known = sorted(killed.glob("checkpoints/step-*"))
        processes = start(n, options, [kind], "killed")
        while sorted(killed.glob("checkpoints/step-*")) == known and processes[0].poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        if all(process.poll() is None for process in processes):
            processes[rng.randrange(n)].send_signal(signal.SIGKILL)
            done += 1
        for process in processes:
            process.wait()
        if (killed / "sae.json").exists():
            break
    for process in start(n, options, [kind], "killed"):
        process.wait()
    same = (killed / "sae.safetensors").read_bytes() == (whole / kind / "sae.safetensors").read_bytes()
    found = "the same bytes" if same else "OTHER BYTES"
    return f"{n} processes, {kind}: killed {done} times, then {found} as the whole run"


def lines_of(kind: str, options: argparse.Namespace, x: np.ndarray) -> list[str]:
    """The rows of the table for one kind."""
    one = options.work / "one" / kind
    weights, curve, error = load_file(one / "sae.safetensors"), curve_of(one), fvu(one, x)
    lines = [f"| {kind} | one | | | | {error:.5f} | |"]
    for label in RUNS:
        run = options.work / label / kind
        others = load_file(run / "sae.safetensors")
        apart = torch.cat(
            [(weights[key] - others[key]).abs().flatten() for key in ("W_enc", "W_dec", "b_enc", "b_dec")]
        )
        curves = np.abs(curve_of(run) / curve - 1)
        theirs = fvu(run, x)
        lines.append(
            f"| | {label} | {curves[:10].max():.0e} | {curves.max():.0e} | {apart.max():.0e}, {apart.mean():.0e} "
            f"| {theirs:.5f} | {theirs - error:+.6f} |"
        )
    return lines


def curve_of(run: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])


def fvu(run: Path, x: np.ndarray) -> float:
    """Of rows that were not trained on, in the trained mode."""
    sae = SAE.load(run)
    x_hat = sae.decode(sae.encode(x))
    return float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, nargs="?")
    parser.add_argument("test", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=50)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", default=".", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        worker(options)
        return
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        np.save(options.work / "train.npy", np.load(options.train, mmap_mode="r")[: options.rows])
        x = np.load(options.test).astype(np.float32)
        for n in (1, 2, 4):
            if any(process.wait() for process in start(n, options, options.kinds)):
                raise SystemExit(f"a run of {n} processes failed")
        kept = [f"- {kill_and_resume(n, options, options.kinds[-1], options.kills)}" for n in (2, 4)]
        table = [
            "| kind | run | loss, first 10 steps | loss, all steps | weights: largest, mean | FVU of held-out rows | |",
            "|---|---|---:|---:|---:|---:|---:|",
            *(line for kind in options.kinds for line in lines_of(kind, options, x)),
        ]
    n_steps = options.rows // 256 * options.epochs
    body = (
        f"Real CLIP ViT-B/32 vectors, {options.rows:,} rows to train on, {len(x):,} others to score on, 2,048 latents, "
        f"batch 256, {n_steps} steps, seed {options.seed}, processes of the CPU (gloo). Differences from one process: "
        f"of the loss of a step the largest relative one, of the weights absolute ones. The null is one process that "
        f"adds up each batch in the reverse order.\n\n" + "\n".join(table) + "\n\nKilled and resumed (one process by "
        "SIGKILL at a random moment):\n\n" + "\n".join(kept)
    )
    print(body)
    write_section("processes", "Training on several processes beside one", body)


if __name__ == "__main__":
    main()
