"""Export a run for every library and inference, and keep what msae computes on real vectors beside each export.

Usage: python prepare.py RUN VECTORS.npy OUT FIRST [TEXTS.npy], where FIRST is the first of the rows, and TEXTS are
vectors of the other modality, for an SAE of both. Runs in msae's environment.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import msae
from msae.sae.run import Run

N = 1000
CASES = {
    "saelens": [{}, {"inference": "relu"}, {"k": 64}],
    "sparsify": [{"k": 64}],
    "dictionary-learning": [{}, {"inference": "relu"}, {"k": 64}],
    "sentence-transformers": [{"k": 64}],
    "onnx": [{}, {"inference": "relu"}, {"k": 64}],
}
"""The exports: each library with every inference that it has."""


def main() -> None:
    run, out, first = sys.argv[1], Path(sys.argv[3]), int(sys.argv[4])
    sae = Run.open(run).sae
    for modality, file in zip(sae.standardizer.modalities, [sys.argv[2], *sys.argv[5:]], strict=True):
        x = np.load(file)[first : first + N].astype(np.float32)
        assert len(x) == N, f"{file} has no {N} rows from {first} on"
        prepare(run, sae, modality, x, out, "" if modality == "image" else f"{modality}-")


def prepare(run: str, sae: msae.SAE, modality: str, rows: np.ndarray, out: Path, before: str) -> None:
    x = torch.from_numpy(rows)
    for to, cases in CASES.items():
        for case in cases:
            folder = out / to / (before + ("-".join(map(str, (*case, *case.values()))) or "trained"))
            exported = msae.export(run, to=to, out=folder, modality=modality, **case)
            z = sae.encode(x, modality, case.get("k"), inference=case.get("inference", "trained"))
            np.savez(
                folder / "expected.npz",
                x=x,
                z=z / (exported.scale or 1.0),
                x_hat=sae.decode(z, modality),
                tolerance=1e-5 if exported.scale else 1e-4,
            )
    np.savez(out / f"{modality}.npz", **{f"{modality}_emb": rows})
    case = out / "embedding-atlas" / f"{before}trained"
    msae.export(run, to="embedding-atlas", on=out / f"{modality}.npz", out=case, modality=modality)
    np.savez(case / "expected.npz", x=x, z=sae.encode(x, modality), x_hat=x, tolerance=0.0)


if __name__ == "__main__":
    main()
