"""Peak memory of each command against the number of rows, and with --max-rows. Each in its own process.

python benchmarks/streaming.py [--rows 200000 1000000] [--width 128] [--d-sae 256]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import write_section
from search import Peak, anonymous_mb

COMMANDS = ("evaluate", "evaluate labels", "name", "find", "gallery", "audit", "compare", "search", "search ivf")
SAMPLED = ("evaluate", "evaluate labels", "name", "find", "gallery", "audit", "compare")
MAX_ROWS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[200_000, 1_000_000])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=256)
    parser.add_argument("--seed", type=int, default=50)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS))
    parser.add_argument("--section", default="streaming")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, command, max_rows = arguments.child
        print(json.dumps(measure(Path(folder), command, int(max_rows) or None)))
        return
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_world(Path(folder), rows, arguments)
            for command in arguments.commands:
                for max_rows in (0, MAX_ROWS) if command in SAMPLED else (0,):
                    child = [sys.executable, __file__, "--child", folder, command, str(max_rows)]
                    done = subprocess.run(child, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    found[command, rows, max_rows] = json.loads(done.stdout.splitlines()[-1])
                    print(command, rows, max_rows, found[command, rows, max_rows], flush=True)
    few, many = arguments.rows
    lines = [
        f"| command | {few:,} rows | {many:,} rows | bytes a row | `--max-rows {MAX_ROWS}`: {few:,} | {many:,} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for command in arguments.commands:
        small, large = (found[command, rows, 0]["mb"] for rows in (few, many))
        sampled = [found.get((command, rows, MAX_ROWS), {}).get("mb") for rows in (few, many)]
        cells = ["" if one is None else f"{one:.0f}" for one in sampled]
        growth = max(0.0, (large - small) * 1e6 / (many - few))
        lines.append(f"| {command} | {small:.0f} | {large:.0f} | {growth:.0f} | {' | '.join(cells)} |")
    body = (
        f"MB of memory that is no mapped file, beyond what the process had after its imports; rows of width "
        f"{arguments.width} with an id, a caption and two columns, d_sae {arguments.d_sae}. `search` includes building "
        f"its index.\n\n" + "\n".join(lines)
    )
    write_section(arguments.section, "Memory of each command against the number of rows", body)
    print(body)


def write_world(folder: Path, n_rows: int, arguments: argparse.Namespace) -> None:
    """A store, its vocabulary and an untrained run whose latents have names."""
    import numpy as np
    import pyarrow as pa
    import torch

    from msae.concepts.names import Concept, ConceptNames
    from msae.data.store import StorePart, write_store
    from msae.sae.model import SAE, SAEConfig
    from msae.sae.standardize import Standardizer, fit_statistics

    rng = np.random.default_rng(arguments.seed)
    torch.manual_seed(arguments.seed)
    directions = rng.normal(size=(200, arguments.width)).astype(np.float32)
    first = None

    def parts():
        nonlocal first
        for start in range(0, n_rows, 50_000):
            n = min(50_000, n_rows - start)
            kind = rng.integers(200, size=n)
            x = directions[kind] + rng.standard_normal((n, arguments.width), dtype=np.float32)
            first = x if first is None else first
            columns = {
                "id": [f"picture-{start + i:08d}" for i in range(n)],
                "caption": [f"a picture of word{one} and of nothing else" for one in kind],
                "side": [("left", "right")[one % 2] for one in kind],
                "label": [f"class{one % 10}" for one in kind],
            }
            yield StorePart({"image": x.astype(np.float16)}, pa.table(columns))

    write_store(folder / "rows.store", parts())
    words = pa.table({"word": [f"word{i}" for i in range(200)]})
    write_store(folder / "words.store", [StorePart({"text": directions.astype(np.float16)}, words)])
    both = {modality: fit_statistics(lambda: [torch.from_numpy(first)]) for modality in ("image", "text")}
    sae = SAE(SAEConfig(arguments.width, arguments.d_sae, levels=(8, arguments.d_sae)), Standardizer(both))
    sae.save(folder / "run")
    named = tuple(Concept(i, f"word{i}", 0.9, 0.5) for i in range(20))
    ConceptNames("evidence", arguments.d_sae, named).save(folder / "run")


def measure(folder: Path, command: str, max_rows: int | None) -> dict[str, float]:
    import msae
    from msae.concepts.naming import name

    run, store = folder / "run", folder / "rows.store"
    limit = {} if max_rows is None else {"max_rows": max_rows}
    calls = {
        "evaluate": lambda: msae.evaluate(run, store, **limit),
        "evaluate labels": lambda: msae.evaluate(run, store, labels="label", probe_train=store, **limit),
        "name": lambda: name(run, folder / "words.store", on=store, out=folder / "names.json", **limit),
        "find": lambda: msae.find(run, store, "label", **limit),
        "gallery": lambda: msae.gallery(run, store, latent=3, **limit),
        "audit": lambda: msae.audit(run, store, "side", n_permutations=200, **limit),
        "compare": lambda: msae.compare(run, f"{store}:side=left", f"{store}:side=right", **limit),
        "search": lambda: msae.search(run, store, like="picture-00000007", set={"#3": "p99"}),
        "search ivf": lambda: msae.search(run, store, like="picture-00000007", set={"#3": "p99"}, index="ivf"),
    }
    small = folder / "words.store"
    msae.evaluate(run, small, modality="text")  # imports and whatever else every command needs once
    before, began = anonymous_mb(), time.monotonic()
    with Peak() as peak:
        calls[command]()
    return {"mb": peak.mb - before, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    main()
