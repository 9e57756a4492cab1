"""How long an audit takes, and how much memory: synthetic rows, a random SAE, 500 concepts.

python benchmarks/audit_speed.py [--rows 200000] [--concepts 500] [--threads 2] [--write]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from msae.use.audit import audit
from results import write_section


def make_store(path: Path, n_rows: int, d_in: int, seed: int) -> EmbeddingStore:
    """Rows of which the class moves one direction in ten."""

    def parts() -> Iterator[StorePart]:
        rng = np.random.default_rng(seed)
        for first in range(0, n_rows, 20_000):
            n = min(20_000, n_rows - first)
            truth = rng.integers(0, 2, n)
            x = rng.standard_normal((n, d_in), dtype=np.float32)
            x[:, : d_in // 10] += 0.3 * truth[:, None]
            table = pa.table({"id": [str(first + i) for i in range(n)], "label": list(map(str, truth))})
            yield StorePart({"image": x.astype(np.float16)}, table)

    return write_store(path, parts())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--train-rows", type=int, default=50_000)
    parser.add_argument("--concepts", type=int, default=500)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        store = make_store(Path(scratch) / "on.store", options.rows, options.d_in, seed=0)
        train = make_store(Path(scratch) / "train.store", options.train_rows, options.d_in, seed=1)
        sample = torch.from_numpy(store.take(np.arange(5000), "image"))
        standardizer = Standardizer().with_statistics("image", fit_statistics(lambda: [sample]))
        sae = SAE(SAEConfig(options.d_in, options.d_sae, kind="relu"), standardizer)
        with torch.no_grad():
            sae.W_enc.copy_(sae.W_dec.T)
            sae.b_enc.fill_(-0.85)  # a random direction of standardised rows: about a fifth fire
        names = {f"concept {i}": [i] for i in range(options.concepts)}
        began = time.perf_counter()
        found = audit(sae, store, "label", train_store=train, names=names)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = np.mean([concept.firing_rate for concept in found.concepts])
    text = (
        f"{options.rows:,} rows of width {options.d_in} and {options.train_rows:,} training rows, "
        f"d_sae {options.d_sae:,}, {options.concepts} concepts that fire in {rate:.0%} of rows, "
        f"{options.threads} threads: "
        f"**{seconds / 60:.1f} minutes**, peak memory {peak:.1f} GiB; training of the classifier included; "
        f"four tests of at most {found.settings['n_permutations']:,} permutations."
    )
    print(text)
    if options.write:
        write_section("audit-speed", "Time of an audit", text)


if __name__ == "__main__":
    main()
