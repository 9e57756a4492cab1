"""Peak memory and time of mining top samples, and that the answer is the brute-force one.

    python benchmarks/gallery_memory.py [--rows 200000] [--d-in 512] [--d-sae 4096] [--n 16] [--check 20000]

Rows are random unit vectors around a few hundred centres, written to a temporary folder; nothing real is needed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from msae.concepts.samples import top_samples
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from msae.sae.view import View


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 200_000), ("d-in", 512), ("d-sae", 4096), ("n", 16), ("check", 20_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = write_rows(Path(folder) / "rows.npy", options.rows, options.d_in)
        sae = make_sae(store, options.d_sae)
        before = peak_gb()
        start = time.perf_counter()
        samples = top_samples(sae, store, n=options.n)
        seconds = time.perf_counter() - start
        peak = peak_gb()  # before the check, which holds everything
        result = {
            "rows": options.rows,
            "d_in": options.d_in,
            "d_sae": options.d_sae,
            "n": options.n,
            "seconds": round(seconds, 1),
            "microseconds_per_row": round(seconds / options.rows * 1e6, 1),
            "firing_rate": round(float(samples.firing_rate.mean()), 3),
            "peak_gb_before": round(before, 2),
            "peak_gb": round(peak, 2),
        }
        if options.check:
            head = write_rows(Path(folder) / "head.npy", options.check, options.d_in)
            result["identical_on_rows"] = options.check
            result["identical"] = is_brute_force(sae, head, options.n)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def write_rows(path: Path, n_rows: int, d_in: int) -> EmbeddingStore:
    """Random unit rows in clusters, as float16."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(300, d_in)).astype(np.float32)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n_rows, d_in))
    for first in range(0, n_rows, 10_000):
        size = min(10_000, n_rows - first)
        x = centres[rng.integers(300, size=size)] + rng.normal(size=(size, d_in)).astype(np.float32)
        out[first : first + size] = x / np.linalg.norm(x, axis=1, keepdims=True)
    out.flush()
    del out
    return EmbeddingStore.open(path, modality="image")


def make_sae(store: EmbeddingStore, d_sae: int) -> SAE:
    """An untrained SAE whose bias lets about a fifth of the latents fire, as a trained Matryoshka one does."""
    statistics = fit_statistics(lambda: (torch.from_numpy(x) for x in store.batches("image", 8192)))
    config = SAEConfig(store.d_in, d_sae, kind="matryoshka", levels=(64, 128, 256, 512, 1024, 2048, d_sae))
    sae = SAE(config, Standardizer({"image": statistics}))
    with torch.no_grad():
        sae.b_enc.fill_(-0.085)  # pre-activations have a standard deviation of 0.1
    return sae.eval()


def is_brute_force(sae: SAE, store: EmbeddingStore, n: int) -> bool:
    """Whether the streamed answer is that of a stable sort of all activations held at once."""
    z = torch.cat(list(View(sae, store, "image").activations())).numpy()
    samples = top_samples(sae, store, n=n)
    for latent in range(sae.d_sae):
        order = np.argsort(-z[:, latent], kind="stable")[:n]
        order = order[z[order, latent] > 0]
        found = samples.rows[latent]
        if found[found >= 0].tolist() != order.tolist():
            return False
        if samples.activations[latent, : len(order)].tolist() != z[order, latent].tolist():
            return False
    return bool(np.array_equal(samples.fired, (z > 0).sum(0)))


def peak_gb() -> float:
    """The largest resident memory of this process so far, in GB of 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
