"""An index of cells against an exact one: memory and time to build, time to open, time of a query, recall at 20.

python benchmarks/ivf.py --rows 20000000 --width 256 --folder FOLDER --only rows     # writes the rows
python benchmarks/ivf.py --rows 20000000 --width 256 --folder FOLDER --only build    # builds the index of cells
python benchmarks/ivf.py --rows 20000000 --width 256 --folder FOLDER --only flat     # builds the exact index
python benchmarks/ivf.py --rows 20000000 --width 256 --folder FOLDER --only exact    # finds the true neighbours
python benchmarks/ivf.py --rows 20000000 --width 256 --folder FOLDER --only cells    # times it
python benchmarks/ivf.py --rows 20000000 --width 256 --folder FOLDER --only exact-time
python benchmarks/ivf.py --rows 20000000 --width 256 --folder FOLDER --only search   # writes RESULTS.md
python benchmarks/ivf.py --real image_train.npy --sae RUN
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from msae.concepts.concept import ConceptSet
from msae.data.store import EmbeddingStore
from msae.sae.view import View
from msae.use.edits import Edit, apply, parse_change
from msae.use.neighbours import Neighbourhood, open_index
from results import write_section
from search import Peak, anonymous_mb

N = 20
CENTRES = 5000
BLOCK = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seed", type=int, default=47_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", choices=("rows", "build", "flat", "exact", "cells", "exact-time", "search"))
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--exact-queries", type=int, default=5)
    parser.add_argument("--real", type=Path, help="a store of real vectors instead")
    parser.add_argument("--sae", type=Path, help="with --real: a run, to edit queries with")
    parser.add_argument("--texts", type=Path, help="with --real: text vectors of the same space, to search with")
    parser.add_argument("--section", default="ivf")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.real:
        write_section(f"{arguments.section}-real", "Search in cells: recall on real vectors", real(arguments))
        return
    rows = arguments.folder / f"{arguments.rows}x{arguments.width}.npy"
    if arguments.only in (None, "rows"):
        make_rows(rows, arguments)
    if arguments.only in (None, "build"):
        build(rows, arguments.folder)
    if arguments.only in (None, "flat"):
        open_index(EmbeddingStore.open(rows, modality="image"), "image", arguments.folder, "exact")
    if arguments.only in (None, "exact"):
        answer_exactly(rows, arguments)
    if arguments.only in (None, "cells"):
        time_cells(rows, arguments)
    if arguments.only in (None, "exact-time"):
        time_exact(rows, arguments)
    if arguments.only in (None, "search"):
        body = compare(rows)
        write_section(arguments.section, "Search in cells: memory, time and recall", body)
        print(body)


def make_rows(path: Path, arguments: argparse.Namespace) -> None:
    """Unit rows around a common mean: 5,000 unequal centres in 400 groups, and noise, as real embeddings lie."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random, width, n_rows = np.random.default_rng(arguments.seed), arguments.width, arguments.rows
    mean = random.normal(size=width).astype(np.float32)
    groups = random.normal(size=(400, width)).astype(np.float32)
    centres = groups[random.integers(400, size=CENTRES)] + random.normal(size=(CENTRES, width)).astype(np.float32)
    share = random.pareto(1.5, CENTRES) + 0.1
    share /= share.sum()
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n_rows, width))
    for first in range(0, n_rows, BLOCK):
        n = min(BLOCK, n_rows - first)
        x = random.standard_normal((n, width), dtype=np.float32)
        x += mean + centres[random.choice(CENTRES, size=n, p=share)]
        rows[first : first + n] = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows.flush()


def build(path: Path, folder: Path) -> None:
    """With time and memory, kept beside the rows."""
    store = EmbeddingStore.open(path, modality="image")
    _ = store.fingerprint  # of all rows; remembered
    before, began, cpu = anonymous_mb(), time.perf_counter(), time.process_time()
    with Peak() as peak:
        open_index(store, "image", folder, "ivf")
    found = {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "mb": peak.mb - before,
        "disk_mb": sum(file.stat().st_size for file in (folder / "index").glob("*.ivf.faiss")) / 1e6,
    }
    (folder / "build.json").write_text(json.dumps(found))
    print(found, flush=True)


def queries_of(store: EmbeddingStore, arguments: argparse.Namespace) -> np.ndarray:
    """Rows moved by noise, half as long as they are, so that none is its own answer."""
    random = np.random.default_rng(arguments.seed + 1)
    x = store.take(np.sort(random.choice(len(store), arguments.queries, replace=False)), "image")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    noise = random.standard_normal(x.shape, dtype=np.float32)
    return x + 0.5 * noise / np.linalg.norm(noise, axis=1, keepdims=True)


def answer_exactly(path: Path, arguments: argparse.Namespace) -> None:
    """The true nearest rows of all queries, from one pass over the store in float32."""
    store = EmbeddingStore.open(path, modality="image")
    queries = queries_of(store, arguments)
    np.save(path.parent / "nearest.npy", nearest(store.batches("image", 8192), queries))


def nearest(batches: Iterable[np.ndarray], queries: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """Plain numpy: shares no code with the index. `own` is the row that each query may not find."""
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    scores, rows, first = np.full((len(queries), N), -2, np.float32), np.zeros((len(queries), N), np.int64), 0
    for x in batches:
        mine = queries @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
        if own is not None:  # all rows are one block
            mine[np.flatnonzero(own >= 0), own[own >= 0]] = -2
        for i in np.flatnonzero((mine > scores[:, -1:]).any(1)):
            better = np.flatnonzero(mine[i] > scores[i, -1])
            both, mine_too = np.concatenate([scores[i], mine[i, better]]), np.concatenate([rows[i], first + better])
            order = np.argsort(-both, kind="stable")[:N]
            scores[i], rows[i] = both[order], mine_too[order]
        first += len(x)
    return rows


def time_cells(path: Path, arguments: argparse.Namespace) -> None:
    """Opening, queries, recall and a filter with the index of cells, kept beside the rows."""
    store, folder = EmbeddingStore.open(path, modality="image"), path.parent
    queries, truth = queries_of(store, arguments), np.load(path.parent / "nearest.npy")
    _ = store.fingerprint
    began = time.perf_counter()
    index = open_index(store, "image", folder, "ivf")
    opening = time.perf_counter() - began
    cold = timed(index, queries)
    seconds = timed(index, queries)
    found = np.array([index.search(query, N).rows for query in queries])
    keep = np.random.default_rng(1).random(len(store)) < 0.001
    began = time.perf_counter()
    few = index.search(queries[0], N, keep=keep)
    filtered = time.perf_counter() - began
    kept = np.flatnonzero(keep)
    x = store.take(kept, "image")
    order = np.lexsort((kept, -(x @ queries[0]) / np.linalg.norm(x, axis=1)))[:N]
    known = {
        "used": index.describe(), "opening": opening, "cold": cold.tolist(), "seconds": seconds.tolist(),
        "recall": recall(found, truth), "filtered": filtered, "kept": len(kept),
        "is_same": few.rows.tolist() == kept[order].tolist(),
    }  # fmt: skip
    (folder / "cells.json").write_text(json.dumps(known))
    print(known["used"], known["recall"], opening, np.median(cold), np.median(seconds), known["is_same"], flush=True)


def time_exact(path: Path, arguments: argparse.Namespace) -> None:
    """Queries with the exact index, one after another, so that all but the first find its pages in memory."""
    store = EmbeddingStore.open(path, modality="image")
    index = open_index(store, "image", path.parent, "exact")
    seconds: list[float] = []
    for query in queries_of(store, arguments)[: arguments.exact_queries]:
        seconds += timed(index, query[None]).tolist()
        (path.parent / "exact.json").write_text(json.dumps(seconds))
        print(seconds, flush=True)


def compare(path: Path) -> str:
    names = ("build", "cells", "exact")
    built, found, exact = (json.loads((path.parent / f"{name}.json").read_text()) for name in names)
    store = EmbeddingStore.open(path, modality="image")
    used, warm, cold = found["used"], np.array(found["seconds"]), np.array(found["cold"])
    return (
        f"{len(store):,} rows x {store.d_in} float16 ({CENTRES:,} centres of unequal size and noise), one thread. "
        f"Building took {built['seconds']:.0f} s ({built['cpu']:.0f} s of CPU, beside other work) and "
        f"{built['mb']:.0f} MB of memory beside mapped files; the index has {built['disk_mb']:,.0f} MB. Opening it "
        f"took {1000 * found['opening']:.0f} ms. It searches {used['probes']} of {used['cells']:,} cells, measured "
        f"when it was built to find {used['recall']:.4f}. On {len(warm)} other queries it found "
        f"**{found['recall']:.4f}** of the {N} nearest. One query: median {ms(warm)}, 95th percentile "
        f"{1000 * np.percentile(warm, 95):.0f} ms; the first time {ms(cold)}, 95th percentile "
        f"{1000 * np.percentile(cold, 95):.0f} ms. The exact index takes {ms(np.array(exact))} (median of "
        f"{len(exact)}, fastest {1000 * min(exact):.0f} ms): **{np.median(exact) / np.median(warm):.0f} times "
        f"faster**; it has {store.rows['image'].n_bytes / 1e6:,.0f} MB, and waits for the disk where these are not in "
        f"memory. A filter that keeps {found['kept']:,} rows: {1000 * found['filtered']:.0f} ms, "
        f"{'the same' if found['is_same'] else 'OTHER'} rows as brute force."
    )


def real(arguments: argparse.Namespace) -> str:
    """Recall for rows, edited rows, texts and random numbers, each with the number of cells that was chosen."""
    store = EmbeddingStore.open(arguments.real, modality="image")
    folder = arguments.folder or Path("ivf-real")
    index = open_index(store, "image", folder, "ivf")
    x = store.take(np.arange(len(store)), "image")
    random = np.random.default_rng(arguments.seed)
    rows = np.sort(random.choice(len(store), arguments.queries, replace=False))
    numbers = random.standard_normal((arguments.queries, store.d_in), dtype=np.float32)
    kinds = {"rows": x[rows], "random numbers (the null)": numbers}
    if arguments.sae:
        kinds["rows with a concept at p99"] = edited(arguments.sae, store, rows, random)
    if arguments.texts:
        texts = EmbeddingStore.open(arguments.texts, modality="text")
        kinds["words"] = texts.take(np.sort(random.choice(len(texts), arguments.queries, replace=False)), "text")
    used = index.describe()
    lines = ["| queries | recall at 20 | ms | cells that would reach .98 |", "|---|---:|---:|---:|"]
    for kind, queries in kinds.items():
        own = rows if kind == "rows" else np.full(len(queries), -1)
        truth = nearest([x], queries, own)
        keeps = [None if row < 0 else np.arange(len(x)) != row for row in own]
        seconds = timed(index, queries)
        enough = used["cells"]
        for probes in sorted({used["probes"], *index.facts.recall["image"].probes}, reverse=True):
            asked = replace(index, probes=probes)
            found = [asked.search(query, N, keep=keep).rows for query, keep in zip(queries, keeps, strict=True)]
            share = recall(np.array(found), truth)
            enough = probes if share >= 0.98 else enough
            if probes == used["probes"]:
                lines.append(f"| {kind} | {share:.4f} | {ms(seconds)[:-3]} | ")
        lines[-1] += f"{enough} |"
        print(lines[-1], flush=True)
    return (
        f"{len(store):,} rows x {store.d_in}; {used['probes']} of {used['cells']} cells, measured when the index was "
        f"built to find {used['recall']:.4f}; {arguments.queries} queries of each kind.\n\n" + "\n".join(lines)
    )


def edited(run: Path, store: EmbeddingStore, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each row with one of its five strongest latents at its 99th percentile, as a search edits it."""
    view = View(run, store, "image")
    concepts = ConceptSet(view, None)
    found = []
    for x, z in zip(store.take(rows, "image"), view.table(rows), strict=True):
        latent = int(np.argsort(-z)[random.integers(5)])
        edit = Edit(concepts[f"#{latent}"], parse_change("p99"))
        found.append(apply(view.sae, torch.from_numpy(x)[None], "image", [edit], keep_residual=True)[0].numpy())
    return np.array(found)


def timed(index: Neighbourhood, queries: np.ndarray) -> np.ndarray:
    """Seconds of each query."""
    seconds = []
    for query in queries:
        began = time.perf_counter()
        index.search(query, N)
        seconds.append(time.perf_counter() - began)
    return np.array(seconds)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / N for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def ms(seconds: np.ndarray) -> str:
    return f"{1000 * np.median(seconds):.1f} ms"


if __name__ == "__main__":
    main()
