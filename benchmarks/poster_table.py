"""Train the poster's eight rows and ours on a store, evaluate them on another, write the table and recovery curves.

    python benchmarks/poster_table.py TRAIN TEST --labels label --epochs 30 --batch-size 256 --runs FOLDER [--rows …]

Rows that are not named stay in the table as the last run measured them.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

from msae.base.errors import ConfigError
from msae.base.records import of_record
from msae.measure.evaluate import Evaluation, evaluate, poster_table
from msae.sae.train import train
from results import FIGURES, write_section

ROWS = {
    "relu-0.03": {"kind": "relu", "l1": 0.03},
    "relu-0.003": {"kind": "relu", "l1": 0.003},
    "topk-64": {"kind": "topk", "k": 64},
    "topk-256": {"kind": "topk", "k": 256},
    "batchtopk-64": {"kind": "batchtopk", "k": 64},
    "batchtopk-256": {"kind": "batchtopk", "k": 256},
    "msae-reverse": {"kind": "matryoshka", "weighting": "reverse"},
    "msae-uniform": {"kind": "matryoshka", "weighting": "uniform"},
    "msae-default": {"recipe": "default"},
}

NAME = "poster-poster"
RECORDS = FIGURES / f"{NAME}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--labels")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders; finished ones are kept")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--expansion", type=float, default=8)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    known = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
    took = {record["run"]: record.pop("took", "") for record in known}
    took |= {row: train_row(arguments, row) for row in arguments.rows}
    new = evaluate(
        [arguments.runs / row for row in arguments.rows],
        arguments.test,
        labels=arguments.labels,
        probe_train=arguments.train if arguments.labels else None,
        inference="relu",  # as in the poster
        recovery=True,
        untrained=True,
    )
    results = [
        *new,
        *(
            of_record(Evaluation, record, where=str(RECORDS), error=ConfigError, remedy="measure all rows")
            for record in known
            if record["run"] not in (*arguments.rows, "untrained")
        ),
    ]
    order = [*ROWS, "untrained"]
    results.sort(key=lambda result: order.index(row_of(result)))
    curves = FIGURES / f"{NAME}-recovery.svg"
    plot_recovery(results, curves)
    records = [
        {
            **r.to_json(),
            "run": row_of(r),
            "on": Path(arguments.test).name,
            "notes": [re.sub(r"\S*/", "", note) for note in r.notes],  # where this machine keeps things
            "took": took.get(row_of(r), ""),
        }
        for r in results
    ]
    times = ", ".join(f"{row} {took[row]}" for row in ROWS if row in took)
    RECORDS.write_text(json.dumps(records, indent=1) + "\n")
    body = (
        f"{poster_table(results)}\n\nTraining, wall time: {times}.\n\n"
        f"![FVU, cosine and CKNNA when only the k strongest latents are kept](figures/{curves.name})\n"
    )
    write_section(NAME, "The poster's eight rows, ours and an untrained one", body)
    print(body)


def row_of(result: Evaluation) -> str:
    return "untrained" if result.is_untrained else Path(str(result.run)).name


def train_row(arguments: argparse.Namespace, row: str) -> str:
    """How long training took, in words; of the first time where the run is finished already."""
    out = arguments.runs / row
    took = out / "took.txt"
    if not took.exists():
        wall, cpu = time.perf_counter(), time.process_time()
        train(
            arguments.train, out=out, resume=True, expansion=arguments.expansion, epochs=arguments.epochs,
            batch_size=arguments.batch_size, seed=arguments.seed, **{"recipe": "poster", **ROWS[row]},
        )  # fmt: skip
        took.write_text(f"{time.perf_counter() - wall:.0f} s ({time.process_time() - cpu:.0f} CPU s)")
        print(f"{row}: {took.read_text()}", flush=True)
    return took.read_text()


def plot_recovery(results: list[Evaluation], file: Path) -> None:
    """FVU, cosine and CKNNA against the number of latents kept."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "msae"  # the same figure gives the same bytes
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, key in zip(axes, ("fvu", "cosine", "cknna"), strict=True):
        for i, result in enumerate(results):
            points = result.to_json()["recovery"]
            row = row_of(result)
            style = "-" if "msae" in row else ":" if row == "untrained" else "--"
            values = [point[key] for point in points]
            axis.plot([p["k"] for p in points], values, style, color=f"C{i}", label=row, lw=1.6)
        axis.set(
            xscale="log", xlabel="latents kept, k", title={"fvu": "FVU", "cosine": "cosine", "cknna": "CKNNA"}[key]
        )
        axis.grid(alpha=0.25)
        if key == "fvu":
            axis.set(yscale="log")
    axes[0].legend(fontsize=8, frameon=False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
