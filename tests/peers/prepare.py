"""Export a run for every library and inference, and keep what msae computes on real vectors beside each export.

Usage: python prepare.py RUN VECTORS.npy OUT [MODALITY]. Runs in msae's environment.
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
    run, vectors, out, modality = sys.argv[1], sys.argv[2], Path(sys.argv[3]), (*sys.argv[4:], "image")[0]
    x = torch.from_numpy(np.load(vectors)[:N].astype(np.float32))
    for to, cases in CASES.items():
        for case in cases:
            folder = out / to / ("-".join(map(str, (*case, *case.values()))) or "trained")
            exported = msae.export(run, to=to, out=folder, modality=modality, **case)
            sae = Run.open(run).sae
            z = sae.encode(x, modality, case.get("k"), inference=case.get("inference", "trained"))
            np.savez(
                folder / "expected.npz",
                x=x,
                z=z / (exported.scale or 1.0),
                x_hat=sae.decode(z, modality),
                tolerance=1e-5 if exported.scale else 1e-4,
            )
            print(folder)


if __name__ == "__main__":
    main()
