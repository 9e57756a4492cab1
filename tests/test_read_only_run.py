"""A run folder that cannot be written is used as any other: what is derived goes to the user's cache folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from tests.conftest import needs_posix

pytestmark = needs_posix

X = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """A run that nobody can write, not even root, once root has given up its right to."""
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "x.csv").write_text("label\n" + "".join(f"c{i % 3}\n" for i in range(len(X))))
    statistics = {"image": fit_statistics(lambda: [torch.from_numpy(X)])}
    SAE(SAEConfig(8, 32, levels=(4, 32)), Standardizer(statistics)).save(tmp_path / "run")
    (tmp_path / "run").chmod(0o555)
    yield tmp_path
    (tmp_path / "run").chmod(0o755)


def msae(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    as_root = os.geteuid() == 0
    if as_root and shutil.which("setpriv") is None:
        pytest.skip("root can write every folder here; install util-linux for setpriv")
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if as_root else []
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*prefix, sys.executable, "-m", "msae", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_gallery_evaluate_and_report_take_a_run_that_cannot_be_written(folder):
    files = sorted((folder / "run").rglob("*"))
    shown = [msae(folder, "gallery", "run", "--on", "x.npy", "--latent", "3") for _ in range(2)]
    assert [one.returncode for one in shown] == [0, 0] and shown[0].stdout == shown[1].stdout
    assert len(list((folder / "cache").rglob("*-image-trained.safetensors"))) == 1

    evaluated = msae(folder, "evaluate", "run", "--on", "x.npy")
    assert evaluated.returncode == 0 and "not kept" not in evaluated.stdout + evaluated.stderr
    kept = [file for file in (folder / "cache").rglob("*-image-trained.json") if '"fvu"' in file.read_text()]
    assert len(kept) == 1

    written = msae(folder, "report", "run", "--on", "x.npy", "--out", "page.html")
    assert written.returncode == 0 and "model card: run cannot be written (Permission denied)" in written.stdout
    page = (folder / "page.html").read_text()
    assert "CKNNA" in page  # the evaluation that was kept elsewhere
    assert sorted((folder / "run").rglob("*")) == files


def test_a_report_into_a_run_that_cannot_be_written_asks_for_another_place(folder):
    found = msae(folder, "report", "run", "--on", "x.npy")
    assert found.returncode == 1 and "run cannot be written" in found.stderr and "--out report.html" in found.stderr
    assert found.stderr.count("\n") == 1


def test_names_for_a_run_that_cannot_be_written_ask_for_another_place_before_the_work(folder):
    np.save(folder / "words.npy", X[:3])
    (folder / "words.csv").write_text("text\nred\ngreen\nblue\n")
    found = msae(folder, "name", "run", "--vocabulary", "words.npy")
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert "names.json cannot be written; give another place with --out names.json" in found.stderr
