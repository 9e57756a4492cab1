"""Memory of training on a store and on one ten times larger: own memory must not grow, only the page cache.

python benchmarks/train_memory.py
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
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    lines = ["| rows | file | peak own memory | peak mapped file pages |", "|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        for n_rows in (arguments.rows, 10 * arguments.rows):
            path = Path(folder) / f"{n_rows}.npy"
            write_rows(path, n_rows)
            command = [sys.executable, __file__, "--child", str(path)]
            peak = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            size = path.stat().st_size / 1e6
            lines.append(f"| {n_rows:,} | {size:.0f} MB | {peak['RssAnon']:.0f} MB | {peak['RssFile']:.0f} MB |")
            print(lines[-1], flush=True)
            path.unlink()
    text = f"Matryoshka at d_sae 1024, batch {BATCH}, at least {STEPS - 10} steps, one process each.\n\n"
    write_section("train-memory", "Memory of training against the size of the store", text + "\n".join(lines))


def write_rows(path: Path, n_rows: int) -> None:
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n_rows, D_IN))
    rng = np.random.default_rng(0)
    for start in range(0, n_rows, 10_000):
        rows[start : start + 10_000] = rng.normal(size=(min(10_000, n_rows - start), D_IN))


def measure(path: Path) -> dict[str, float]:
    """Peak megabytes of this process by kind while it trains, looked at every 20 ms."""
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
        train(path, out=Path(folder) / "run", d_sae=1024, epochs=epochs, batch_size=BATCH, checkpoint_every=10**9)
    return peak


if __name__ == "__main__":
    main()
