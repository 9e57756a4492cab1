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

from results import write_section

Case = dict[str, Any]

POSTER = "msae, poster's levels"
"""The line beside a recipe's own levels."""


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
    if case["kind"] in ("matryoshka", "default", "faithful", "topk", "relu"):
        out["naive"] = ("naive", case)
    if case["kind"] in ("default", "faithful"):
        out[POSTER] = ("msae", {**case, "kind": "matryoshka"})
    if case["kind"] == "matryoshka":
        for n_levels in (1, 3, 12):
            out[f"msae, {n_levels} levels"] = ("msae", {**case, "n_levels": n_levels})
    out |= {peer: (peer, case) for peer in peers}
    return out


def plan(full: bool) -> list[Case]:
    small, large = {"d_in": 512, "d_sae": 4096}, {"d_in": 768, "d_sae": 6144}
    dense = [
        {"kind": kind, "density": p} for kind in ("matryoshka", "default", "faithful", "relu") for p in (0.22, 0.5)
    ]
    sparse = [{"kind": kind, "k": 64} for kind in ("topk", "batchtopk", "widths")]
    sizes = [small, large] if full else [small]
    batches = (256, 1024, 4096) if full else (1024, 4096)
    cases = itertools.product(sizes, batches, [*dense, *sparse, {"kind": "jumprelu", "density": 0.22}])
    return [{**size, "batch": batch, **kind} for size, batch, kind in cases]


def cell(found: dict[str, Any], of: str, to: str) -> str:
    """The ratio of the CPU seconds of two lines, with its quartiles, or a dash where either was not measured."""
    if not isinstance(found.get(of), list) or not isinstance(found.get(to), list):
        return "-"
    middle, low, high = ratio(found[of], found[to], "cpu")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def tables(records: list[dict[str, Any]], peers: list[str]) -> str:
    """Every case against floor, naive step, reference and peers; and how the number of levels matters."""
    head = ["size", "batch", "step of", "step / floor", "naive / step", "reference / step"]
    head += [f"{peer} / step" for peer in peers]
    lines = [f"| {' | '.join(head)} |", "|---|---:|---|" + "---:|" * (len(head) - 3)]
    levels = ["| size | batch | density | 1 level / 7 | 3 / 7 | 12 / 7 |", "|---|---:|---:|---:|---:|---:|"]
    recipes = ["| size | batch | step of | step / step with the poster's levels |", "|---|---:|---|---:|"]
    for record in records:
        case, found = record["case"], record["seconds"]
        size = f"{case['d_in']}/{case['d_sae']}"
        what = f"{case['kind']}, " + (f"density {case['density']}" if "density" in case else f"k {case['k']}")
        others = [cell(found, other, "msae") for other in ("naive", "reference", *peers)]
        lines.append(f"| {size} | {case['batch']} | {what} | {cell(found, 'msae', 'floor')} | {' | '.join(others)} |")
        if case["kind"] == "matryoshka":
            counts = [cell(found, f"msae, {n} levels", "msae") for n in (1, 3, 12)]
            levels.append(f"| {size} | {case['batch']} | {case['density']} | {' | '.join(counts)} |")
        if case["kind"] in ("default", "faithful"):
            recipes.append(f"| {size} | {case['batch']} | {what} | {cell(found, 'msae', POSTER)} |")
    recipes = ["", *recipes] if len(recipes) > 2 else []
    loads = sorted(record["load"] for record in records)
    return "\n".join(
        [*lines, *recipes, "", *levels, "", f"Load of the machine meanwhile: {loads[0]:.1f} to {loads[-1]:.1f}."]
    )


def wanted(case: Case, options: argparse.Namespace) -> bool:
    return (not options.only or case["kind"] in options.only) and (not options.batch or case["batch"] in options.batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="both sizes and all batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=[], help="kinds to measure")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="batches to measure")
    parser.add_argument("--skip", nargs="+", default=[], help="lines to leave out")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer and its environment")
    parser.add_argument("--out", type=Path, help="file of the seconds; cases that are in it already are not run again")
    parser.add_argument("--section", default="train-step", help="of RESULTS.md")
    options = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in options.peer)
    records = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    workers: dict[str, Worker] = {}
    for case in plan(options.full):
        if not wanted(case, options) or any(record["case"] == case for record in records):
            continue
        lines = {k: v for k, v in candidates(case, list(peers)).items() if k not in options.skip}
        for name, (library, _) in lines.items():
            if name not in workers:
                workers[name] = Worker(library, peers.get(library, sys.executable), options.threads)
        record = {"case": case, "seconds": measure(workers, lines, options.rounds), "load": os.getloadavg()[0]}
        print(tables([record], list(peers)), flush=True)
        print({name: why for name, why in record["seconds"].items() if isinstance(why, str)}, flush=True)
        records.append(record)
        if options.out:
            options.out.write_text(json.dumps(records, indent=1))
    records.sort(key=lambda record: plan(True).index(record["case"]))
    body = (
        f"CPU seconds on {options.threads} thread, interleaved; medians (quartiles) of the ratios within each of "
        f"{options.rounds} rounds. *Step* is ours, with the optimiser.\n\n{tables(records, list(peers))}"
    )
    write_section(options.section, "One training step against its floor, a naive step and the peers", body)


if __name__ == "__main__":
    main()
