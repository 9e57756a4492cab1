"""Shared fixtures. Real CLIP vectors lie beside the checkout where they are to be had; never in the project."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tests run beside each other

needs_posix = pytest.mark.skipif(os.name != "posix", reason="forks, makes pipes or locks files as POSIX does")

SHARED = Path(os.environ.get("MSAE_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def real_vectors() -> Path:
    """The folder of real CLIP ViT-B/32 embeddings."""
    folder = SHARED / "data" / "clip-vit-b32"
    if not folder.exists():
        pytest.skip(f"the real CLIP vectors are not at {folder}; set MSAE_SHARED to the folder that has them")
    return folder
