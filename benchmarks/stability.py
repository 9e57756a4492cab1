"""Seed stability: how far SAEs that differ only in their seed agree, beside the poster's appendix.

    python benchmarks/stability.py STORE [--d-sae 2048] [--epochs 10] [--seeds 2] [--out runs/stability] [--json FILE]

Trains what is not there yet. The poster's figures are of ViT-L/14 at d_sae 6144 on 2.9 million rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msae.alignment import Stability, match, stability, unit_rows
from msae.sae import SAE
from msae.training import train

KINDS: dict[str, dict[str, Any]] = {
    "topk-64": {"kind": "topk", "k": 64},
    "msae-reverse": {"kind": "matryoshka", "weighting": "reverse"},
    "msae-uniform": {"kind": "matryoshka"},
    "relu-0.003": {"kind": "relu", "l1": 0.003},
}
PUBLISHED = {"topk-64": 0.688, "msae-reverse": 0.437, "msae-uniform": 0.366, "relu-0.003": 0.334}
"""Mean cosine of matched decoder rows, Zaigrajew et al. 2025, appendix."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--recipe", default="default", choices=("default", "poster"))
    parser.add_argument("--threshold", type=float, default=0.7)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = [measure(name, options) for name in options.kinds]
    columns = ("kind", "decoder", "p5", "p50", "p95", "encoder", "consensus", "chance", "published")
    sys.stdout.write("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n")
    for record in records:
        cells = [f"{record[c]:.3f}" if isinstance(record[c], float) else str(record[c]) for c in columns]
        sys.stdout.write("| " + " | ".join(cells) + " |\n")
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train the seeds of one kind, and match them."""
    folders = []
    for seed in range(options.seeds):
        folder = options.out / f"{name}-{seed}"
        train(
            options.store, out=folder, resume=True, seed=seed, d_sae=options.d_sae, epochs=options.epochs,
            batch_size=options.batch_size, recipe=options.recipe, **KINDS[name],
        )  # fmt: skip
        folders.append(folder)
    start = time.perf_counter()
    found: Stability = stability(folders, threshold=options.threshold)
    seconds = time.perf_counter() - start
    quantiles = [pair.decoder.quantiles() for pair in found.pairs]
    return {
        "kind": name,
        "d_sae": options.d_sae,
        "epochs": options.epochs,
        "recipe": options.recipe,
        "decoder": float(np.mean([pair.decoder.mean for pair in found.pairs])),
        "encoder": float(np.mean([pair.encoder.mean for pair in found.pairs])),
        **{share: float(np.mean([q[share] for q in quantiles])) for share in ("p5", "p50", "p95")},
        "consensus": len(found.consensus),
        "chance": chance(SAE.load(folders[0])),
        "published": PUBLISHED[name],
        "gap": max(pair.decoder.gap for pair in found.pairs),
        "seconds": round(seconds, 1),
    }


def chance(sae: SAE, *, seed: int = 0) -> float:
    """What two dictionaries of random rows with the covariance of this decoder score when they are matched."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.linalg.cholesky(sae.W_dec.detach().T @ sae.W_dec.detach() + 1e-4 * torch.eye(sae.d_in))
    draws = [torch.randn(sae.d_sae, sae.d_in, generator=generator) @ factor.T for _ in range(2)]
    one, other = (unit_rows(draw.numpy()) for draw in draws)
    return match(one, other).mean


if __name__ == "__main__":
    main()
