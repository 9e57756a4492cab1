"""Peak memory of each command against the number of rows, and with --max-rows. Each in its own process.

python benchmarks/streaming.py [--rows 200000 1000000] [--width 128] [--d-sae 256] [--folder FOLDER]
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

COMMANDS = {
    "evaluate": "8, a permutation of the rows; none from 10 million rows on",
    "evaluate labels": "the labels, row numbers, hashes of the rows",
    "name": "8 below 2.5 million rows, to draw the sample",
    "find": "4 for the column, row numbers",
    "gallery": "nothing",
    "tree": "nothing",
    "audit": "4 for each concept, up to 1 GB in all, and their ranks",
    "compare": "4 for the column, row numbers",
    "compare within": "4 for each column, row numbers",
    "search": "1, and ranks",
    "search where": "1, and ranks",
    "search ivf": "a sample and blocks while it is built, up to a bound that is said before",
    "encode": "nothing",
}
"""Each with the bytes a row that are said to grow."""
SAMPLED = ("evaluate", "evaluate labels", "name", "find", "gallery", "tree", "audit", "compare", "compare within")
MAX_ROWS = 100_000
READING = """

What grows: in `find`, `compare`, `audit` and `evaluate labels` row numbers and the column as numbers, no text. In
`search` up to 16 bytes for each row that is nearer than the last one shown before or after the edit, to count ranks. In
`gallery` and `encode` nothing that is kept for a row: pages that the C library and Arrow have not returned yet.
`search ivf` trains on a sample that grows with the root of the rows, and says its bound before it begins; 20
million rows of width 256 took 609 MB (*Search in cells*). `find` takes a fifth of these 1.1 GB with its default of
20,000 rows."""
FLAT, WITHIN = 100, 60
"""Bytes a row and MB; docs/preregistered.md."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[200_000, 1_000_000])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=256)
    parser.add_argument("--seed", type=int, default=50)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS))
    parser.add_argument("--section", default="streaming")
    parser.add_argument("--folder", type=Path, help="keeps the stores and what was measured, to go on after a stop")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, command, max_rows = arguments.child
        print(json.dumps(measure(Path(folder), command, int(max_rows) or None)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        body = measure_all(arguments.folder or Path(temporary), arguments)
    few, many = arguments.rows
    write_section(arguments.section, f"Memory of each command at {few:,} and {many:,} rows", body)
    print(body)


def measure_all(folder: Path, arguments: argparse.Namespace) -> str:
    kept = folder / "found.json"
    found: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    for rows in arguments.rows:
        world = folder / str(rows)
        if not (world / "run").exists():
            write_world(world, rows, arguments)
        for command in arguments.commands:
            for max_rows in (0, MAX_ROWS) if command in SAMPLED else (0,):
                key = f"{command} {rows} {max_rows}"
                if key in found:
                    continue
                child = [sys.executable, __file__, "--child", str(world), command, str(max_rows)]
                done = subprocess.run(child, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                measured = json.loads(done.stdout.splitlines()[-1])
                found[key] = measured["mb"]
                kept.write_text(json.dumps(found))
                print(key, measured, flush=True)
    return table(found, arguments)


def table(found: dict[str, float], arguments: argparse.Namespace) -> str:
    few, many = arguments.rows
    lines = [
        f"| command | {few:,} rows | {many:,} rows | bytes a row | of these said to grow | "
        f"`--max-rows {MAX_ROWS}`: {few:,} | {many:,} |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    grows, parts = [], []
    for command in arguments.commands:
        small, large = (found[f"{command} {rows} 0"] for rows in (few, many))
        sampled = [found.get(f"{command} {rows} {MAX_ROWS}") for rows in (few, many)]
        growth = max(0.0, (large - small) * 2**20 / (many - few))
        grows += [command] if growth > FLAT else []
        parts += [command] if sampled[0] is not None and sampled[1] - sampled[0] > WITHIN else []
        cells = " | ".join("" if one is None else f"{one:.0f}" for one in sampled)
        lines.append(f"| {command} | {small:.0f} | {large:.0f} | {growth:.0f} | {COMMANDS[command]} | {cells} |")
    return (
        f"MB of memory that is no mapped file, beyond what the process had after its imports; rows of width "
        f"{arguments.width} with an id, a caption and three columns, d_sae {arguments.d_sae}, 20 names. `search` and "
        f"`search ivf` include building their index; `tree` finds the samples that `gallery` kept.\n\n"
        + "\n".join(lines)
        + f"\n\nFlat (at most {FLAT} bytes a row, what is said to grow included): all"
        + (f" but {', '.join(grows)}" if grows else "")
        + f". Within {WITHIN} MB with `--max-rows`: all"
        + (f" but {', '.join(parts)}." if parts else ".")
        + (READING if arguments.commands == list(COMMANDS) else "")
    )


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
                "group": [f"group{one // 10 % 4}" for one in kind],
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
    from msae.concepts.tree import concept_tree

    run, store = folder / "run", folder / "rows.store"
    limit = {} if max_rows is None else {"max_rows": max_rows}
    sides = f"{store}:side=left", f"{store}:side=right"
    asked = {"like": "picture-00000007", "set": {"#3": "p99"}}
    calls = {
        "evaluate": lambda: msae.evaluate(run, store, **limit),
        "evaluate labels": lambda: msae.evaluate(run, store, labels="label", probe_train=store, **limit),
        "name": lambda: name(run, folder / "words.store", on=store, out=folder / "names.json", **limit),
        "find": lambda: msae.find(run, store, "label", **limit),
        "gallery": lambda: msae.gallery(run, store, latent=3, **limit),
        "tree": lambda: concept_tree(run, store, **limit),
        "audit": lambda: msae.audit(run, store, "side", n_permutations=200, **limit),
        "compare": lambda: msae.compare(run, *sides, **limit),
        "compare within": lambda: msae.compare(run, *sides, within=["group"], **limit),
        "search": lambda: msae.search(run, store, **asked),
        "search where": lambda: msae.search(
            run, store, **asked, where="label in ('class1', 'class3') and group != 'x'"
        ),
        "search ivf": lambda: msae.search(run, store, **asked, index="ivf"),
        "encode": lambda: msae.encode(run, store, out=folder / "codes.parquet"),
    }
    small = folder / "words.store"
    msae.evaluate(run, small, modality="text")  # imports and whatever else every command needs once
    before, began = anonymous_mb(), time.monotonic()
    with Peak() as peak:
        calls[command]()
    return {"mb": peak.mb - before, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    main()
