"""Seconds and peak memory of `msae.evaluate` against the number of rows: memory must not grow. Each in its own process.

python benchmarks/evaluate.py [--rows 20000 200000] [--d-in 512] [--d-sae 4096]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--recovery", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.rows[0], arguments)))
        return
    lines = ["| rows | | seconds | peak memory of the process, MB |", "|---:|---|---:|---:|"]
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "rows.npy", rows, arguments.d_in)
            for extra in ([], ["--recovery"]):
                sizes = ["--rows", str(rows), "--d-in", str(arguments.d_in), "--d-sae", str(arguments.d_sae)]
                command = [sys.executable, __file__, *sizes, "--child", folder, *extra]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                what = "with --recovery" if extra else "the poster's metrics"
                lines.append(f"| {rows:,} | {what} | {found['seconds']:.0f} | {found['peak_mb']:.0f} |")
                print(lines[-1], flush=True)
    what = f"d_in {arguments.d_in}, d_sae {arguments.d_sae}."
    body = what + "\n\n" + "\n".join(lines)
    write_section("evaluate-memory", "Time and memory of evaluating against the number of rows", body)


def write_rows(path: Path, n_rows: int, d_in: int) -> None:
    """Random float16 rows in a few directions, written in blocks."""
    import numpy as np

    rng = np.random.default_rng(0)
    directions = rng.normal(size=(32, d_in)).astype(np.float32)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n_rows, d_in))
    for start in range(0, n_rows, 10_000):
        block = out[start : start + 10_000]
        block[:] = rng.normal(size=(len(block), 32)).astype(np.float32) @ directions + rng.normal(size=block.shape)
    out.flush()


def measure(folder: Path, n_rows: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Evaluate an untrained SAE on the rows in `folder`, in this process."""
    import msae
    from msae.sae.model import SAE, SAEConfig

    sae = SAE(SAEConfig(arguments.d_in, arguments.d_sae, levels=(64, arguments.d_sae)))
    began = time.monotonic()
    found = msae.evaluate(sae, folder / "rows.npy", recovery=arguments.recovery)
    assert found.n == n_rows
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux; mapped pages count too
    return {"seconds": time.monotonic() - began, "peak_mb": peak_kb / 1024}


if __name__ == "__main__":
    main()
