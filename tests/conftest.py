"""Shared fixtures. Real CLIP vectors lie beside the checkout where they are to be had; never in the project."""

import os
import shutil
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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The folder of a tiny CLIP with random weights."""
    from tests.tiny_clip import make_encoder

    return make_encoder(tmp_path_factory.mktemp("encoder") / "clip", "clip")


@pytest.fixture(scope="module")
def clip(encoder):
    """The same, loaded."""
    from msae.data.embedder import Embedder

    return Embedder.load(encoder, dtype="float32")


@pytest.fixture(scope="session")
def demo_world(tmp_path_factory) -> Path:
    """A folder with the msae-demo of `msae demo` on fewer scenes and with two SAEs; made once for all workers."""
    pytest.importorskip("transformers")
    from filelock import FileLock

    from msae.world import chain

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo-world"
    folder.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")), pytest.MonkeyPatch.context() as patch:
        if not (folder / "finished").exists():
            patch.chdir(folder)
            patch.setattr(chain, "N_SCENES", {"scenes": 1000, "holdout": 500})
            patch.setattr(chain, "RUNS", {run: chain.RUNS[run] for run in (chain.NAMED_RUN, "topk-16")})
            chain.demo()
            (folder / "finished").touch()
    return folder


def linked_copy(folder: Path, to: Path) -> Path:
    """A copy of a folder that shares its files; what msae writes replaces a file and leaves the other as it was."""
    return Path(shutil.copytree(folder, to, copy_function=os.link))
