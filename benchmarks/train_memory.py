"""Memory of training on a store and on one ten times larger: own memory must not grow, only the page cache.

python benchmarks/train_memory.py
python benchmarks/train_memory.py --limit 1.5   # stores of once and twice a limit on own memory, in GB
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from results import write_section

D_IN, STEPS, BATCH = 512, 200, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000, help="of the smaller store")
    parser.add_argument(
        "--limit", type=float, default=0, help="GB of own memory that the system allows, as by ulimit -d"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    limit = int(arguments.limit * 1e9)
    if arguments.child:
        print(json.dumps(measure(arguments.child, limit)))
        return
    sizes = [limit // (2 * D_IN), 2 * limit // (2 * D_IN)] if limit else [arguments.rows, 10 * arguments.rows]
    lines = [
        "| rows | file | rows in a block | peak own memory | peak mapped file pages |",
        "|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for n_rows in sizes:
            path = Path(folder) / f"{n_rows}.npy"
            write_rows(path, n_rows)
            command = [sys.executable, __file__, "--child", str(path), "--limit", str(arguments.limit)]
            peak = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            size = path.stat().st_size / 1e6
            lines.append(
                f"| {n_rows:,} | {size:.0f} MB | {peak['block_rows']:.0f} | {peak['RssAnon']:.0f} MB | "
                f"{peak['RssFile']:.0f} MB |"
            )
            print(lines[-1], flush=True)
            path.unlink()
    text = f"Matryoshka at d_sae 1024, batch {BATCH}, at least {STEPS - 10} steps, one process each.\n\n"
    name, title = "train-memory", "Memory of training against the size of the store"
    if limit:
        text = (
            f"The same on stores larger than memory, which the system limits to {arguments.limit:g} GB (RLIMIT_DATA; "
            f"what asks for more fails). Pages of files are the system's: it takes them back when it needs them.\n\n"
        )
        name, title = "train-memory-blocks", "Memory of training on stores larger than memory"
    write_section(name, title, text + "\n".join(lines))


def write_rows(path: Path, n_rows: int) -> None:
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n_rows, D_IN))
    rng = np.random.default_rng(0)
    for start in range(0, n_rows, 10_000):
        rows[start : start + 10_000] = rng.normal(size=(min(10_000, n_rows - start), D_IN))


def measure(path: Path, limit: int) -> dict[str, float]:
    """Peak megabytes of this process by kind while it trains, looked at every 20 ms, and the rows of a block."""
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from msae.sae.train import train

    peak = {"RssAnon": 0.0, "RssFile": 0.0}

    def watch() -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name = line.split(":")[0]
                if name in peak:
                    peak[name] = max(peak[name], int(line.split()[1]) / 1e3)
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        n_rows = np.load(path, mmap_mode="r").shape[0]
        # The same number of steps for both: of the larger store, whole epochs of it that come to no more than that.
        epochs = max(1, STEPS * BATCH // n_rows)
        out = Path(folder) / "run"
        train(path, out=out, d_sae=1024, epochs=epochs, batch_size=BATCH, checkpoint_every=10**9)
        block_rows = json.loads((out / "config.json").read_text())["train"]["block_rows"]
    return {**peak, "block_rows": block_rows}


if __name__ == "__main__":
    main()
