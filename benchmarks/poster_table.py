"""Train the poster's eight rows on a store, evaluate them on another, and write the table and recovery curves.

python benchmarks/poster_table.py TRAIN TEST --labels label --epochs 30 --batch-size 256 --runs FOLDER
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from msae.measure.evaluate import evaluate, poster_table
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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--labels")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders; finished ones are kept")
    parser.add_argument("--recipe", choices=["poster", "default"], default="poster")
    parser.add_argument("--expansion", type=float, default=8)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    times = ", ".join(f"{row} {train_row(arguments, row)}" for row in ROWS)
    results = evaluate(
        [arguments.runs / row for row in ROWS],
        arguments.test,
        labels=arguments.labels,
        probe_train=arguments.train if arguments.labels else None,
        inference="relu",  # as in the poster
        recovery=True,
    )
    name = f"poster-{arguments.recipe}"
    curves = FIGURES / f"{name}-recovery.svg"
    plot_recovery(results, curves)
    records = [{**r.to_json(), "run": Path(str(r.run)).name, "on": Path(arguments.test).name} for r in results]
    (FIGURES / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
    body = (
        f"{poster_table(results)}\n\nTraining, wall time: {times}.\n\n"
        f"![FVU, cosine and CKNNA when only the k strongest latents are kept](figures/{curves.name})\n"
    )
    write_section(name, f"The poster's eight rows, recipe {arguments.recipe}", body)
    print(body)


def train_row(arguments: argparse.Namespace, row: str) -> str:
    """How long training took, in words; of the first time where the run is finished already."""
    out = arguments.runs / row
    took = out / "took.txt"
    if not took.exists():
        wall, cpu = time.perf_counter(), time.process_time()
        train(
            arguments.train, out=out, resume=True, recipe=arguments.recipe, expansion=arguments.expansion,
            epochs=arguments.epochs, batch_size=arguments.batch_size, seed=arguments.seed, **ROWS[row],
        )  # fmt: skip
        took.write_text(f"{time.perf_counter() - wall:.0f} s ({time.process_time() - cpu:.0f} CPU s)")
        print(f"{row}: {took.read_text()}", flush=True)
    return took.read_text()


def plot_recovery(results: list, file: Path) -> None:
    """FVU, cosine and CKNNA against the number of latents kept."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "msae"  # the same figure gives the same bytes
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, key in zip(axes, ("fvu", "cosine", "cknna"), strict=True):
        for i, result in enumerate(results):
            points = result.to_json()["recovery"]
            style = "-" if "msae" in Path(result.run).name else "--"
            values = [point[key] for point in points]
            axis.plot([p["k"] for p in points], values, style, color=f"C{i}", label=Path(result.run).name, lw=1.6)
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
