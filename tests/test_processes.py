"""Training on two processes does what one process does, and one line says what went wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from msae.base.errors import ConfigError
from msae.base.processes import Processes
from msae.cli import main
from msae.sae import activations
from msae.sae.kernels.cut import batch_cut, batchtopk
from msae.sae.train import TrainSettings, train
from msae.sae.train.rows import TrainingRows
from msae.sae.train.training import Training
from tests.conftest import needs_posix
from tests.processes_worker import KINDS, LONGER, TIES, train_all

HERE = Path(__file__).parent


def start(*arguments, n=2, **options):
    """The same Python command as n processes, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    known = {**os.environ, "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    known |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "src")])}
    command = [sys.executable, *map(str, arguments)]
    return [
        subprocess.Popen(command, env={**known, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(n)
    ]


def ended(processes):
    """Exit codes and what was written to stderr, by process."""
    found = [process.communicate(timeout=120) for process in processes]
    return [process.returncode for process in processes], [err for _, err in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every kind trained by one process and by two, on 500 rows of images and texts; 61 rows do not part evenly."""
    folder = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    mixture = rng.exponential(size=(500, 32)) * (rng.random((500, 32)) < 0.1)
    images = mixture @ rng.normal(size=(32, 18)) + 0.05 * rng.normal(size=(500, 18)) + 2
    for name, rows in (("img", images), ("text", images + 0.3 * rng.normal(size=images.shape))):
        (folder / f"rows.store/{name}_emb").mkdir(parents=True)
        np.save(folder / f"rows.store/{name}_emb/{name}_emb_0.npy", rows.astype(np.float16))
    several = start(HERE / "processes_worker.py", folder)
    train_all(folder)
    assert ended(several)[0] == [0, 0]
    return folder


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_does(kind, folder):
    """Sums are rounded otherwise, by some 1e-7 of the gradients; a wrong share or statistic is far above 1e-4."""
    one, several = folder / "one" / kind, folder / "several" / kind
    weights, others = load_file(one / "sae.safetensors"), load_file(several / "sae.safetensors")
    assert weights.keys() == others.keys()
    for name in [name for name in weights if "table" not in name]:
        assert torch.allclose(weights[name], others[name], rtol=1e-4, atol=1e-5), name
    for ours, theirs in zip(lines_of(one), lines_of(several), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert weights_of(several) == weights_of(folder / "several" / f"{kind} of process 1")
    assert json.loads((several / "config.json").read_text())["processes"] == 2
    assert not list(several.rglob("*.tmp")) and not (several / ".lock").exists()


def weights_of(run):
    return (run / "sae.safetensors").read_bytes()


def test_of_equal_values_the_first_of_the_whole_batch_are_kept(folder):
    """20 of 60 values are kept: all 8 or 9 that are 4 and 3, and the first of those that are 2."""
    order = np.argsort(-TIES.flatten().numpy(), kind="stable")[:20]
    wanted = torch.zeros(60).index_copy(0, torch.from_numpy(order), TIES.flatten()[order])
    found = torch.cat([torch.load(folder / f"several/kept {rank}.pt") for rank in range(2)])
    assert torch.equal(found.flatten(), wanted)
    assert torch.equal(batchtopk(TIES, 2, Processes()).flatten(), wanted)


@pytest.mark.parametrize("k", [1, 3, 11, 40])
def test_the_cut_of_a_batch_is_its_nth_largest_value(k):
    h = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(batchtopk(h, k, Processes()), activations.batchtopk(h, k))
    positive = h[h > 0]

    def count(upper):
        bits = positive.view(torch.int32)
        if upper < 0:
            return torch.bincount(bits >> 15, minlength=1 << 16)
        return torch.bincount(bits[bits >> 15 == upper] & 0x7FFF, minlength=1 << 15)

    cut, n_ties = batch_cut(count, 50 * k)
    if 50 * k >= len(positive):
        assert (cut, n_ties) == (0, 0)
    else:
        assert torch.tensor(cut, dtype=torch.int32).view(torch.float32) == positive.sort(descending=True)[0][50 * k - 1]
        assert n_ties == 1


@needs_posix
def test_a_killed_run_goes_on_to_the_same_bytes_and_the_processes_left_say_one_line(folder, tmp_path):
    store = folder / "rows.store"
    options = {**LONGER, "checkpoint_every": 5}
    words = [str(word) for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    command = ["-m", "msae", "train", store, *words]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    killed = start(*command, "--out", tmp_path / "killed", "--resume", **quiet)
    while not list((tmp_path / "killed").glob("checkpoints/step-*")):
        assert killed[0].poll() is None
        time.sleep(0.01)
    killed[1].send_signal(signal.SIGKILL)
    codes, errors = ended(killed)
    assert codes == [1, -signal.SIGKILL] and not (tmp_path / "killed/sae.json").exists()
    assert errors[0].count("\n") == 1 and "another process of this training was lost" in errors[0]
    assert "the same command with --resume" in errors[0]
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    resumed = start(*command, "--out", tmp_path / "killed", "--resume", **quiet)
    assert ended(resumed) == ([0, 0], ["", ""])
    whole = folder / "several/longer"
    assert weights_of(tmp_path / "killed") == weights_of(whole)
    found, wanted = ([(line["step"], line["fvu"]) for line in lines_of(run)] for run in (tmp_path / "killed", whole))
    assert found == wanted
    train(store, out=tmp_path / "alone", resume=True, **options)  # one process goes on with what two began
    assert lines_of(tmp_path / "alone")[-1]["fvu"] == pytest.approx(lines_of(whole)[-1]["fvu"], rel=1e-3)


def test_a_mistake_is_said_once_and_ends_all_processes(folder, tmp_path):
    damaged = np.load(folder / "rows.store/img_emb/img_emb_0.npy")
    damaged[137, 3] = np.nan
    np.save(tmp_path / "x.npy", damaged)
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    codes, errors = ended(start("-m", "msae", "train", tmp_path / "x.npy", "--out", tmp_path / "run", **quiet))
    assert codes == [1, 1] and not (tmp_path / "run").exists()
    (said,) = filter(None, errors)
    assert said.startswith("msae train: row 137 ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3}, "a batch of 3 rows is too small for 4 processes; give a --batch-size of at least 4"),
        (
            {"batch_size": 6, "modality": "both"},
            "of 3 images and 3 texts is too small for 4 .* at least 8",
        ),
    ],
)
def test_a_batch_with_less_than_a_row_for_each_process_is_refused(settings, message, folder, tmp_path):
    rows = TrainingRows(folder / "rows.store", settings.get("modality", "image"))
    with pytest.raises(ConfigError, match=message):
        Training(tmp_path / "run", rows, TrainSettings(**settings).resolve(rows), Processes(1, 4))


def test_parts_are_all_rows_once_and_differ_by_at_most_one():
    for n in (4, 61, 4096):
        parts = [np.arange(n)[Processes(rank, 4).part(n)] for rank in range(4)]
        assert np.array_equal(np.concatenate(parts), np.arange(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_other_verbs_run_in_one_process(monkeypatch, capsys):
    for rank, said in (("0", "msae info: runs in one process, but 2 were started"), ("1", "")):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as left:
            main(["info", "nowhere"])
        assert left.value.code == 2 and capsys.readouterr().err[: len(said) or None] == said


@pytest.mark.parametrize(("rank", "size"), [("a", "2"), ("0", ""), ("2", "2"), ("-1", "2")])
def test_a_rank_that_is_no_process_is_one_line_in_every_verb(rank, size, monkeypatch, capsys):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for verb in ("info", "train"):
        with pytest.raises(SystemExit) as left:
            main([verb, "x.npy"])
        error = capsys.readouterr().err
        assert left.value.code == 1 and error.count("\n") == 1 and "name no process; start with torchrun" in error
