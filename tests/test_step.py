"""Between two looks nothing waits for the device, and a look judges every step since the one before."""

import contextlib
import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msae.base.errors import TrainingError
from msae.base.loggers import Loggers
from msae.base.processes import Processes
from msae.sae import activations
from msae.sae.kernels.cut import batchtopk
from msae.sae.model import SAE
from msae.sae.standardize import Standardizer, Statistics
from msae.sae.train import StepResult, TrainSettings
from msae.sae.train.ahead import ahead, on_device
from msae.sae.train.rows import TrainingRows
from msae.sae.train.training import Training, _State

SMALL = {"d_sae": 64, "batch_size": 60, "epochs": 4, "log_every": 7, "device": "cpu"}
KINDS = {
    "default": {},
    "faithful": {"recipe": "faithful", "soft_cap": 2.0},
    "topk": {"kind": "topk", "k": 8, "auxiliary": 0.03},
    "batchtopk": {"kind": "batchtopk", "k": 8, "auxiliary": 0.03, "soft_cap": 2.0},
    "jumprelu": {"kind": "jumprelu", "k": 8},
    "relu": {"kind": "relu"},
    "widths": {"widths": (8, 16, 64), "k": 8},
    "pairs": {"modality": "both", "align": 1.0, "auxiliary": 0.03},
    "blocks": {"modality": "both", "align": 1.0, "block_rows": 4},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rng = np.random.default_rng(0)
    mixture = rng.exponential(size=(600, 32)) * (rng.random((600, 32)) < 0.1)
    images = (mixture @ rng.normal(size=(32, 16)) + 2).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "x.npz"
    np.savez(path, image=images, text=images + np.float32(1))
    return path


def training(path, out, **options):
    settings = TrainSettings(**{**SMALL, **options})
    found = TrainingRows(path, settings.modality)
    return Training(out, found, settings.resolve(found))


class _Copies(TorchDispatchMode):
    """Counts what is copied to the device while the host waits."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            self.n += torch.device((kwargs or {}).get("device", "cpu")).type == "meta"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device_before_the_figures_are_read(kind, rows, tmp_path):
    """Tensors on the meta device have no values: what would wait for a GPU fails here. Only the batches go there."""
    run = training(rows, tmp_path / "run", **KINDS[kind])
    run.settings = dataclasses.replace(run.settings, device="meta")
    known = Standardizer({one: Statistics(torch.zeros(16), 1.0) for one in run.rows.trained})
    sae = SAE(run.sae_config, known).to("meta").train()
    optimizer = torch.optim.AdamW([{"params": list(sae.parameters()), "pace": 1.0}])
    state = _State(sae, optimizer, torch.zeros(64, dtype=torch.int64, device="meta"))
    with (
        pytest.raises(RuntimeError, match="meta tensor"),
        contextlib.closing(Loggers((), tmp_path, settings={})) as loggers,
        _Copies() as copies,
    ):
        run._loop(state, loggers)
    assert state.step == 7
    of_a_step = len(run.rows.trained) + 2 * bool(run.settings.align)
    assert copies.n == 7 * of_a_step + len(known.modalities)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_is_not_waited_for_between_two_looks_and_trains_what_a_cpu_does(kind, rows, tmp_path):
    run = training(rows, tmp_path / "gpu", device="cuda", **KINDS[kind])
    state, step = run._start(), run._step

    def strictly(*batch):
        torch.cuda.set_sync_debug_mode("error")
        return step(*batch)

    run._step = strictly
    with contextlib.closing(Loggers((), tmp_path, settings={})) as loggers:
        try:
            with pytest.raises(RuntimeError, match="synchronizing"):
                run._loop(state, loggers)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert state.step == 7
    lines = []
    for device in ("cuda", "cpu"):
        training(rows, tmp_path / device, device=device, **KINDS[kind]).train(resume=False)
        lines.append([json.loads(line) for line in (tmp_path / device / "metrics.jsonl").read_text().splitlines()])
    on_gpu, on_cpu = ([line["loss"] for line in found[:2]] for found in lines)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)  # sums are rounded otherwise


def test_a_run_that_diverges_between_two_looks_names_the_step_and_keeps_the_checkpoint_before(rows, tmp_path):
    """The rate jumps after step 24; the figures would be read at step 30, the checkpoint is due at 28."""
    run = training(rows, tmp_path / "run", kind="topk", k=8, log_every=30, checkpoint_every=14, lr=1e-3)
    step = run._step

    def jumping(state, x):
        if state.step >= 24:
            for group in state.optimizer.param_groups:
                group["lr"] = 1e3
        return step(state, x)

    run._step = jumping
    with pytest.raises(TrainingError, match=r"diverged at step 25 of 40 .*step-000014 is kept"):
        run.train(resume=False)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000014"]


@pytest.mark.parametrize(
    ("errors", "kept", "message"),
    [
        ([0.5, 0.6, 0.7], ["step-000020"], None),
        ([11.0, 0.5, 0.5], ["step-000010"], None),  # more than ten times the lowest error before: spoilt
        ([0.5, 0.5, float("nan")], ["step-000020"], "diverged at step 22 of 40"),
        ([0.5, float("inf"), 0.5], ["step-000020"], "diverged at step 21 of 40"),
        ([1e5, 0.5, 0.5], ["step-000010"], "diverged at step 20 of 40"),
    ],
)
def test_a_look_judges_the_latest_checkpoint_by_the_error_of_the_step_after_it(errors, kept, message, rows, tmp_path):
    run = training(rows, tmp_path / "run")
    for step in (10, 20):
        (tmp_path / f"run/checkpoints/step-{step:06d}").mkdir(parents=True)
    run._lowest_error = 1.0
    run._unjudged = [StepResult(*map(torch.tensor, (error, error, 8.0, False, 1.0))) for error in errors]
    state = _State(None, None, None, step=23)
    if message is None:
        run._look(state)
        assert run._lowest_error == 0.5
    else:
        with pytest.raises(TrainingError, match=message):
            run._look(state)
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == kept
    run._look(state)  # nothing is judged twice


def test_the_next_item_is_made_while_the_one_before_it_is_used_and_an_error_arrives_in_its_turn():
    begun = [threading.Event() for _ in range(4)]

    def items():
        for number, event in enumerate(begun):
            event.set()
            if number == 3:
                raise ValueError("damaged")
            yield number

    found = ahead(items())
    for number in range(3):
        assert next(found) == number and begun[number + 1].wait(10)
    with pytest.raises(ValueError, match="damaged"):
        next(found)
    assert list(ahead(iter("abc"))) == ["a", "b", "c"] and list(ahead(iter(()))) == []


def test_an_endless_reader_ends_with_the_one_who_reads():
    before = threading.active_count()
    batches = ([np.full((2, 3), number, np.float32)] for number in itertools.count())
    for device in ("cpu", "meta"):
        found = on_device(batches, device)
        (batch,) = next(found)
        assert batch.device.type == device and batch.shape == (2, 3)
        found.close()
    assert threading.active_count() == before


def test_the_cut_of_a_batch_on_several_processes_asks_no_device():
    assert batchtopk(torch.empty(10, 6, device="meta"), 2, Processes()).shape == (10, 6)


def test_the_cut_takes_minus_zero_and_numbers_that_are_none_for_zeros():
    h = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    h[3, 5], h[7, 1] = -0.0, -torch.nan
    assert torch.equal(batchtopk(h, 4, Processes()), activations.batchtopk(h.nan_to_num(0.0), 4))
