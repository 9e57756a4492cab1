"""How long an audit takes and how much memory, in pairs with an earlier version, which runs in a worktree of its own.

python benchmarks/audit_speed.py --before 4fc7eba [--pairs 3] [--write]                    500 concepts, 200,000 rows
python benchmarks/audit_speed.py --before 4fc7eba --run RUN --on STORE --target COLUMN     a real store and its names
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from msae.use.audit import audit

ROOT = Path(__file__).parents[1]


def make_store(path: Path, n_rows: int, d_in: int, seed: int) -> None:
    """Rows of which the class moves one direction in ten; made once."""
    if path.exists():
        return

    def parts() -> Iterator[StorePart]:
        rng = np.random.default_rng(seed)
        for first in range(0, n_rows, 20_000):
            n = min(20_000, n_rows - first)
            truth = rng.integers(0, 2, n)
            x = rng.standard_normal((n, d_in), dtype=np.float32)
            x[:, : d_in // 10] += 0.3 * truth[:, None]
            table = pa.table({"id": [str(first + i) for i in range(n)], "label": list(map(str, truth))})
            yield StorePart({"image": x.astype(np.float16)}, table)

    write_store(path, parts())


def once(options: argparse.Namespace) -> dict[str, Any]:
    """One audit in this process."""
    torch.set_num_threads(options.threads)
    arguments: dict[str, Any]
    if options.run is not None:
        sae: Any = options.run
        arguments = {"on": options.on, "target": options.target}
    else:
        folder = options.folder
        on = EmbeddingStore.open(folder / f"on-{options.rows}-{options.d_in}.store")
        sample = torch.from_numpy(on.take(np.arange(min(5000, options.rows)), "image"))
        standardizer = Standardizer().with_statistics("image", fit_statistics(lambda: [sample]))
        sae = SAE(SAEConfig(options.d_in, options.d_sae, kind="relu"), standardizer)
        with torch.no_grad():
            sae.W_enc.copy_(sae.W_dec.T)
            sae.b_enc.fill_(-0.85)  # a random direction of standardised rows: about a fifth fire
        names = {f"concept {i}": [i] for i in range(options.concepts)}
        train = folder / f"train-{options.train_rows}-{options.d_in}.store"
        arguments = {"on": on, "target": "label", "train_store": train, "names": names}
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    found = audit(sae, **arguments)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "gib": after.ru_maxrss / 2**20,
        "n": found.n,
        "concepts": len(found.concepts),
    }


def child(source: Path, words: list[str]) -> dict[str, Any]:
    """One audit in a fresh process, by the code in `source`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(ROOT / "benchmarks")])}
    command = [sys.executable, __file__, *words, "--once"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--train-rows", type=int, default=50_000)
    parser.add_argument("--concepts", type=int, default=500)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--run", type=Path, help="a run with names, instead of random rows")
    parser.add_argument("--on", type=Path)
    parser.add_argument("--target")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "audit-speed", help="for stores")
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="one audit in this process, its figures as JSON")
    parser.add_argument("--section", default="audit-speed", help="of RESULTS.md")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options)))
        return
    if options.run is None:
        options.folder.mkdir(parents=True, exist_ok=True)
        for kind, n, seed in (("on", options.rows, 0), ("train", options.train_rows, 1)):
            make_store(options.folder / f"{kind}-{n}-{options.d_in}.store", n, options.d_in, seed)
    words = [word for word in sys.argv[1:] if word != "--write"]
    sources = {"now": ROOT / "src"}
    with tempfile.TemporaryDirectory() as scratch:
        if options.before:
            tree = Path(scratch) / "before"
            subprocess.run(["git", "worktree", "add", "-q", tree, options.before], cwd=ROOT, check=True)
            sources = {f"at {options.before}": tree / "src", **sources}
        try:
            runs = [{name: child(source, words) for name, source in sources.items()} for _ in range(options.pairs)]
        finally:
            if options.before:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    what = f"{runs[0]['now']['n']:,} audited rows, {runs[0]['now']['concepts']} concepts, {options.threads} threads"
    lines = [f"{what}; medians of {options.pairs} pairs, one after the other.", "",
             "| version | seconds | processor seconds | peak GiB |", "|---|---|---|---|"]  # fmt: skip
    for name in sources:
        cells = [np.median([run[name][key] for run in runs]) for key in ("seconds", "cpu", "gib")]
        lines.append(f"| {name} | {cells[0]:.1f} | {cells[1]:.1f} | {cells[2]:.2f} |")
    if options.before:
        ratios = [run["now"]["seconds"] / run[f"at {options.before}"]["seconds"] for run in runs]
        lines += ["", f"Time of now over time before, pair by pair: {', '.join(f'{ratio:.3f}' for ratio in ratios)}."]
    text = "\n".join(lines)
    print(text)
    if options.write:
        from results import write_section

        write_section(options.section, f"Time of an audit ({options.section})", text)


if __name__ == "__main__":
    main()
