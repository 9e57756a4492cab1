"""What one of several processes does in test_processes.py: trainings of every kind, in one group of processes.

python processes_worker.py FOLDER    (with what torchrun gives: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from msae.base.processes import joined
from msae.sae.kernels.cut import batchtopk
from msae.sae.train import train

COMMON = {"d_sae": 64, "batch_size": 61, "epochs": 1, "lr": 1e-3, "log_every": 2, "device": "cpu"}
KINDS = {
    "default": {},
    "topk": {"kind": "topk", "k": 2, "auxiliary": 0.1, "dead_after": 100},
    "batchtopk": {"kind": "batchtopk", "k": 8, "soft_cap": 2.0},
    "batchtopk-reference": {"kind": "batchtopk", "k": 8, "kernel": "reference"},
    "jumprelu": {"kind": "jumprelu", "k": 8},
    "jumprelu-reference": {"kind": "jumprelu", "k": 8, "kernel": "reference"},
    "relu": {"kind": "relu"},
    "widths": {"widths": (8, 16, 64), "k": 8},
    "both": {"modality": "both", "align": 1.0, "batch_size": 62},
    "blocks": {"modality": "both", "align": 1.0, "batch_size": 62, "block_rows": 16},
}
LONGER = {"kind": "batchtopk", "k": 8, "d_sae": 64, "batch_size": 61, "epochs": 40, "device": "cpu"}
"""What another test kills on its way."""
TIES = torch.arange(60).remainder(7).reshape(10, 6).float() - 2


def train_all(folder: Path) -> None:
    """Every kind on the rows in `folder`, into `one` or, on several processes, `several`."""
    with joined() as processes:
        out = folder / ("one" if processes.size == 1 else "several")
        for name, options in KINDS.items():
            sae = train(folder / "rows.store", out=out / name, **{**COMMON, **options})
            if not processes.is_first:
                sae.save(out / f"{name} of process {processes.rank}")
        if processes.size > 1:
            train(folder / "rows.store", out=out / "longer", **LONGER)
            kept = batchtopk(TIES[processes.part(10)], 2, replace(processes, batch_size=10))
            torch.save(kept, out / f"kept {processes.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_all(Path(sys.argv[1]))
