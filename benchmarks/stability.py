"""Seed stability: how far SAEs that differ only in their seed agree, beside the poster's appendix.

    python benchmarks/stability.py STORE [--d-sae 2048] [--epochs 10] [--seeds 2] [--out runs/stability] [--json FILE]
    python benchmarks/stability.py STORE --runs "default=FOLDER/default-*" "topk-64=FOLDER/topk-64-*"
    python benchmarks/stability.py --size 24576 [--d-in 768]

Trains what is not there yet and writes a section of RESULTS.md; with --runs, of runs that were trained before.
With --size nothing is trained: two random decoders of
that many rows, half of whose rows are noisy copies of each other in another order, are matched, and it is measured in
how much time and memory; and two of 4,096 rows against scipy's answer on the whole matrix.
 The poster's figures are of ViT-L/14 at d_sae 6144 on 2.9 million rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from msae.concepts.stability import Stability, match, stability
from msae.data.arrays import unit_rows
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE, SAEConfig
from msae.sae.train import train
from results import write_section

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
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--size", type=int, help="match random decoders of this many rows instead")
    parser.add_argument("--d-in", type=int, default=768, help="for --size")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--recipe", default="default", choices=("default", "poster"))
    parser.add_argument("--threshold", type=float, default=0.7)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--runs", nargs="+", help="NAME=PATTERN of the folders of runs that differ only in their seed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.size:
        measure_size(options.size, options.d_in)
        return
    if options.store is None:
        parser.error("wanted a STORE to train on, or --size")
    if options.runs:
        measure_trained(options.runs, options.threshold)
        return
    records = [measure(name, options) for name in options.kinds]
    columns = ("kind", "decoder", "p5", "p50", "p95", "encoder", "consensus", "chance", "published")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for record in records:
        cells = [f"{record[c]:.3f}" if isinstance(record[c], float) else str(record[c]) for c in columns]
        lines.append("| " + " | ".join(cells) + " |")
    n_rows = len(EmbeddingStore.open(options.store, modality="image"))
    steps = options.epochs * (n_rows // options.batch_size)
    told = (
        f"{options.seeds} seeds, d_sae {options.d_sae:,}, {n_rows:,} rows, {options.epochs} epochs, {steps:,} steps of "
        f"{options.batch_size} rows; recipe {options.recipe}. *decoder*, *encoder*: mean cosine of matched rows, with "
        f"quantiles; *consensus*: latents whose decoder rows have a cosine of {options.threshold} at least in all "
        "seeds; *chance* matches random rows with the decoder's own covariance; *published* is of ViT-L/14, d_sae "
        "6,144, 2.9 million rows, 30 epochs, 21,000 steps."
    )
    body = f"{told}\n\n" + "\n".join(lines)
    sys.stdout.write(body + "\n")
    write_section("stability", "Seed stability on real vectors", body)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


def measure_trained(patterns: list[str], threshold: float) -> None:
    """The same of runs that are there."""
    lines = ["| kind | seeds | d_sae | decoder | p50 | p95 | encoder | consensus | chance |", "|---" * 9 + "|"]
    for pattern in patterns:
        name, _, folders = pattern.partition("=")
        runs = sorted(Path(folders).parent.glob(Path(folders).name))
        found, sae = stability(runs, threshold=threshold), SAE.load(runs[0])
        quantiles = [pair.decoder.quantiles() for pair in found.pairs]
        figures = [
            np.mean([pair.decoder.mean for pair in found.pairs]),
            *(np.mean([shares[which] for shares in quantiles]) for which in ("p50", "p95")),
            np.mean([pair.encoder.mean for pair in found.pairs]),
        ]
        cells = [name, str(len(runs)), str(sae.d_sae), *(f"{x:.3f}" for x in figures), str(len(found.consensus))]
        lines.append("| " + " | ".join([*cells, f"{chance(sae):.3f}"]) + " |")
        print(lines[-1], flush=True)
    told = (
        "Mean over pairs of seeds of the cosine of matched rows of the decoder, with quantiles, and of the encoder; "
        f"*consensus*: latents whose decoder rows have a cosine of {threshold} at least in all seeds; "
        "*chance* matches random rows with the "
        "decoder's own covariance."
    )
    write_section("stability-trained", "Seed stability of the default recipe", told + "\n\n" + "\n".join(lines))


def measure_size(n: int, d_in: int) -> None:
    """Time, peak memory and proof of a matching of planted decoders; the dense answer at 4,096."""
    small = planted(4096, d_in)
    found = match(small.one, small.other)
    missing = scipy_total(small.one, small.other) - float(found.cosine.sum())
    large = planted(n, d_in)
    saes = [as_sae(rows) for rows in (large.one, large.other)]
    before = peak_megabytes()
    began, cpu = time.perf_counter(), time.process_time()
    pair = stability(saes).pairs[0]
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    share = float((pair.decoder.partner[large.copied] == large.place[large.copied]).mean())
    body = (
        f"Two SAEs {d_in} -> {n:,} whose decoder rows are random; half of the rows of one are noisy copies (cosine "
        "about .9) of rows of the other, in another order; the encoders are the decoders transposed. `msae stability`, "
        f"which matches both, one thread: **{seconds:.0f} s** ({cpu:.0f} s of CPU), peak memory of the process "
        f"**{peak_megabytes():,.0f} MB**, of which {before:,.0f} MB before it began; a full matrix for scipy is "
        f"{n * n * 8 / 1e6:,.0f} MB. Mean cosine "
        f"{pair.decoder.mean:.4f}, planted pairs found {share:.4f}, and the mean is proven to be within "
        f"{max(pair.decoder.gap, pair.encoder.gap):.1e} of the best possible.\n\n"
        f"At 4,096 rows of the same kind the total of scipy's answer on the full matrix less ours is {missing:.1e} "
        f"(of {found.cosine.sum():.1f})."
    )
    sys.stdout.write(body + "\n")
    write_section("stability-size", "Matching of dictionaries: time and memory", body)


def as_sae(rows: np.ndarray) -> SAE:
    sae = SAE(SAEConfig(rows.shape[1], len(rows), kind="relu"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(rows))
        sae.W_enc.copy_(torch.from_numpy(rows.T.copy()))
    return sae


class Planted(NamedTuple):
    """Two decoders, and which row of the first is a copy of which of the other."""

    one: np.ndarray
    other: np.ndarray
    copied: np.ndarray
    place: np.ndarray


def planted(n: int, d_in: int, *, seed: int = 0) -> Planted:
    rng = np.random.default_rng(seed)
    one = unit_rows(rng.standard_normal((n, d_in), dtype=np.float32))
    other = unit_rows(rng.standard_normal((n, d_in), dtype=np.float32))
    copied, place = rng.random(n) < 0.5, rng.permutation(n)
    noise = unit_rows(rng.standard_normal((n, d_in), dtype=np.float32))
    other[place[copied]] = unit_rows(one[copied] + 0.48 * noise[copied])
    return Planted(one, other, copied, place)


def scipy_total(one: np.ndarray, other: np.ndarray) -> float:
    """The largest sum of cosines, from the whole matrix."""
    from scipy.optimize import linear_sum_assignment

    cosine = (one @ other.T).astype(np.float64)
    return float(cosine[linear_sum_assignment(cosine, maximize=True)].sum())


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
