"""How the cost of a Matryoshka step grows with batch, sizes, number of levels and share of active latents.

    python benchmarks/scaling.py [--threads 1] [--rounds 7]

One thing is varied at a time. Beside the milliseconds stands the exponent: what power of the varied quantity the CPU
seconds grow with, from the neighbouring line to this one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from typing import Any

from results import write_section
from train_step import Worker, measure

BASE = {"kind": "matryoshka", "d_in": 512, "d_sae": 4096, "batch": 1024, "density": 0.22, "n_levels": 7}
VARIED = {
    "batch": (256, 512, 1024, 2048, 4096),
    "d_sae": (1024, 2048, 4096, 8192, 16384),
    "d_in": (128, 256, 512, 768, 1024),
    "n_levels": (1, 3, 7, 12),
    "density": (0.05, 0.11, 0.22, 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    pieces = [f"CPU milliseconds of a step on {options.threads} thread; the rest is {BASE}."]
    for name, values in VARIED.items():
        # One process per line, so that the lines take turns and other work on the machine meets them alike.
        cases = {str(value): ("msae", {**BASE, name: value}) for value in values}
        workers = {label: Worker("msae", sys.executable, options.threads) for label in cases}
        seconds = measure(workers, cases, options.rounds)
        for worker in workers.values():
            worker.process.kill()
        pieces.append("\n".join(lines_of(name, values, seconds)))
        print(pieces[-1], flush=True)
    write_section("scaling", "How the cost of a step grows", "\n\n".join(pieces))


def lines_of(name: str, values: tuple[float, ...], seconds: dict[str, Any]) -> list[str]:
    """The table of one varied quantity."""
    lines = [f"| {name} | CPU ms (quartiles) | exponent |", "|---:|---:|---:|"]
    before: tuple[float, float] | None = None
    for value in values:
        low, cpu, high = statistics.quantiles([1e3 * step["cpu"] for step in seconds[str(value)]], n=4)
        exponent = f"{math.log(cpu / before[1]) / math.log(value / before[0]):.2f}" if before else ""
        before = value, cpu
        lines.append(f"| {value} | {cpu:.1f} ({low:.1f}-{high:.1f}) | {exponent} |")
    return lines


if __name__ == "__main__":
    main()
