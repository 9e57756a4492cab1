"""Search against brute force: recall on real vectors; time and memory on a million synthetic rows.

python benchmarks/search.py --real image_train.npy
python benchmarks/search.py --rows 1000000 --width 768 --folder FOLDER
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import numpy as np
import torch

from msae.data.store import EmbeddingStore
from msae.use.neighbours import open_index
from results import write_section

N = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="a store of real vectors: recall")
    parser.add_argument("--rows", type=int, help="rows of a synthetic store: time and memory")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--folder", type=Path, default=Path("search-benchmark"), help="for the synthetic store")
    parser.add_argument("--queries", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.real:
        body = recall(arguments.real, arguments.queries)
        write_section("search-recall", "Search: recall against float32 brute force", body)
        print(body)
    if arguments.rows:
        body = speed(arguments.folder, arguments.rows, arguments.width, arguments.queries)
        write_section("search-speed", "Search: time and memory", body)
        print(body)


def recall(path: Path, n_queries: int) -> str:
    """Queries are rows moved by noise, so that none is its own answer."""
    store = EmbeddingStore.open(path)
    index = open_index(store, store.modalities[0])
    x = store.take(np.arange(len(store)), store.modalities[0])
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    random = np.random.default_rng(0)
    rows = random.choice(len(x), n_queries, replace=False)
    queries = unit[rows] + 0.3 / np.sqrt(x.shape[1]) * random.normal(size=(n_queries, x.shape[1])).astype(np.float32)
    queries = queries.astype(np.float32)
    hits, same, worst = 0, 0, 0.0
    for query in queries:
        scores = unit @ (query / np.linalg.norm(query))
        wanted = np.argsort(-scores, kind="stable")[:N]
        found = index.search(query, N)
        hits += len(set(found.rows.tolist()) & set(wanted.tolist()))
        same += int(found.rows.tolist() == wanted.tolist())
        worst = max(worst, float(np.abs(found.scores - scores[found.rows]).max()))
    return (
        f"{len(store):,} real vectors of width {store.d_in}, {n_queries} queries, the {N} nearest: recall "
        f"{hits / (N * n_queries):.5f}, same rows in the same order in {same} of {n_queries}, largest difference of a "
        f"score {worst:.1e}."
    )


def speed(folder: Path, n_rows: int, width: int, n_queries: int) -> str:
    path = folder / f"{n_rows}x{width}.npy"
    if not path.exists():
        make_rows(path, n_rows, width)
    store = EmbeddingStore.open(path, modality="image")
    before = anonymous_mb()
    with Peak() as peak:
        began = time.perf_counter()
        open_index(store, "image", folder)
        building = time.perf_counter() - began
    began = time.perf_counter()
    index = open_index(store, "image", folder)
    opening = time.perf_counter() - began
    queries = np.random.default_rng(1).normal(size=(n_queries, width)).astype(np.float32)
    queries += np.float32(10) * store.take(np.arange(n_queries) * (n_rows // n_queries), "image")
    wall, cpu = [], []
    for query in queries:
        began, began_cpu = time.perf_counter(), time.process_time()
        index.search(query, N)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    return (
        f"{n_rows:,} rows x {width} float16. Building (or finding) the index took {building:.1f} s and "
        f"{peak.mb - before:.0f} MB of memory beside the mapped files; opening it {opening * 1000:.0f} ms. One query, "
        f"the {N} nearest, exact in float32: median {1000 * np.median(wall):.0f} ms, 95th percentile "
        f"{1000 * np.percentile(wall, 95):.0f} ms, first {1000 * wall[0]:.0f} ms; CPU {1000 * np.median(cpu):.0f} ms."
    )


def make_rows(path: Path, n_rows: int, width: int) -> None:
    """Rows around a common mean and 1,000 centres, as real embeddings lie."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    centres = random.normal(size=(1000, width)).astype(np.float32)
    mean = random.normal(size=width).astype(np.float32)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n_rows, width))
    for first in range(0, n_rows, 20_000):
        n = min(20_000, n_rows - first)
        x = mean + centres[random.integers(1000, size=n)] + random.standard_normal((n, width), dtype=np.float32)
        rows[first : first + n] = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows.flush()


def anonymous_mb() -> float:
    """Memory that is no mapped file: pages of those are given back whenever others need them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


class Peak(threading.Thread):
    """The most anonymous memory while a block runs, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mb, self.is_done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.is_done.wait(0.005):
            self.mb = max(self.mb, anonymous_mb())

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_done.set()
        self.join()


if __name__ == "__main__":
    main()
