"""CPU seconds of one training step: msae against the naive step, the floor and its peers, interleaved.

    python benchmarks/train_step.py [--full] [--threads 1] [--rounds 9] [--out FILE.json] [--peer NAME=PYTHON]...

A peer's name is overcomplete, dictionary-learning or sae-lens, PYTHON that of the environment that has it
(and no torchvision that does not match its torch).

A *step* is loss, gradients, radial projection, clipping, AdamW and unit rows. The *floor* is five dense products of the
same shapes by the same library and nothing else, so a whole step is compared with less than a whole step. Each library
lives in a process of its own (`step_worker.py`); in every round each makes one step, in turn, so that whatever else the
machine does meets them alike. A ratio is the median over rounds of the ratio within a round; behind it the quartiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

Case = dict[str, Any]


class Worker:
    """A process that makes steps of one library."""

    def __init__(self, library: str, python: str, threads: int) -> None:
        self.library, self.threads = library, threads
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        script = Path(__file__).with_name("step_worker.py")
        self.process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended"}

    def build(self, case: Case) -> str | None:
        """Why the library cannot do this case, or None."""
        answer: Any = self.ask({"build": {"library": self.library, "threads": self.threads, **case}})
        return answer.get("error")


def measure(workers: dict[str, Worker], cases: dict[str, tuple[str, Case]], rounds: int) -> dict[str, Any]:
    """Seconds of each candidate in each round, after two steps to warm up."""
    seconds: dict[str, Any] = {}
    for name, (library, case) in cases.items():
        error = workers[name].build(case) if name in workers else f"no {library} here"
        if error:
            seconds[name] = error
    for turn in range(-2, rounds):
        for name in cases:
            if isinstance(seconds.get(name), str):
                continue
            answer = workers[name].ask({"step": 1})
            if "error" in answer:
                seconds[name] = answer["error"]
            elif turn >= 0:
                seconds.setdefault(name, []).append(answer)
    return seconds


def ratio(of: list[dict[str, float]], to: list[dict[str, float]], clock: str) -> tuple[float, float, float]:
    """Median and quartiles of `of / to` within a round."""
    ratios = sorted(a[clock] / b[clock] for a, b in zip(of, to, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def candidates(case: Case, peers: list[str]) -> dict[str, tuple[str, Case]]:
    """Name in the table -> library and case."""
    out = {"msae": ("msae", case), "reference": ("reference", case), "floor": ("floor", case)}
    if case["kind"] in ("matryoshka", "topk", "relu"):
        out["naive"] = ("naive", case)
    if case["kind"] == "matryoshka":
        for n_levels in (1, 3, 12):
            out[f"msae, {n_levels} levels"] = ("msae", {**case, "n_levels": n_levels})
    out |= {peer: (peer, case) for peer in peers}
    return out


def plan(full: bool) -> list[Case]:
    small, large = {"d_in": 512, "d_sae": 4096}, {"d_in": 768, "d_sae": 6144}
    dense = [{"kind": kind, "density": p} for kind in ("matryoshka", "relu") for p in (0.22, 0.5)]
    sparse = [{"kind": kind, "k": 64} for kind in ("topk", "batchtopk", "widths")]
    sizes = [small, large] if full else [small]
    batches = (256, 1024, 4096) if full else (1024, 4096)
    cases = itertools.product(sizes, batches, [*dense, *sparse, {"kind": "jumprelu", "density": 0.22}])
    return [{**size, "batch": batch, **kind} for size, batch, kind in cases]


def table(case: Case, seconds: dict[str, Any]) -> str:
    title = ", ".join(f"{key} {value}" for key, value in case.items())
    lines = [f"\n### {title}\n", "| step | CPU ms (quartiles) | wall ms | / msae | / floor |", "|---|---|---|---|---|"]
    for name, found in seconds.items():
        if isinstance(found, str):
            lines.append(f"| {name} | not measured: {found} | | | |")
            continue
        low, cpu, high = (1e3 * q for q in statistics.quantiles([s["cpu"] for s in found], n=4))
        wall = 1e3 * statistics.median(s["wall"] for s in found)
        cells = []
        for other in ("msae", "floor"):
            middle, first, last = ratio(found, seconds[other], "cpu")
            cells.append(f"{middle:.2f} ({first:.2f}-{last:.2f})")
        lines.append(f"| {name} | {cpu:.1f} ({low:.1f}-{high:.1f}) | {wall:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="both sizes and all batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=[], help="kinds to measure")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="batches to measure")
    parser.add_argument("--skip", nargs="+", default=[], help="lines of the table to leave out")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer and its environment")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in options.peer)
    records = []
    print(
        f"threads {options.threads}, rounds {options.rounds}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    workers: dict[str, Worker] = {}
    for case in plan(options.full):
        if (options.only and case["kind"] not in options.only) or (
            options.batch and case["batch"] not in options.batch
        ):
            continue
        wanted = {k: v for k, v in candidates(case, list(peers)).items() if k not in options.skip}
        for name, (library, _) in wanted.items():
            if name not in workers:
                workers[name] = Worker(library, peers.get(library, sys.executable), options.threads)
        seconds = measure(workers, wanted, options.rounds)
        print(table(case, seconds), flush=True)
        records.append({"case": case, "seconds": seconds, "load": os.getloadavg()[0]})
    if options.out:
        options.out.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
