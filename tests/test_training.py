import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from msae.base.config import settings_from
from msae.base.errors import ConfigError, Interrupted, MissingDependencyError, RunError, StoreError, TrainingError
from msae.cli import main
from msae.data.store import as_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.run import Run
from msae.sae.train import TrainOptions, TrainSettings, learning_rate, shuffled_batches, train, train_step
from msae.sae.train.rows import TrainingRows
from msae.sae.train.training import Training
from msae.web.report.figures import training_curves
from tests.conftest import needs_posix

SMALL = {"d_sae": 64, "batch_size": 64, "epochs": 4, "lr": 1e-3, "log_every": 5, "device": "cpu"}
KINDS = {
    "matryoshka": {"levels": (4, 16, 64)},
    "topk": {"k": 8},
    "batchtopk": {"k": 8},
    "jumprelu": {"k": 8},
    "relu": {},
    "widths": {"kind": "matryoshka", "widths": (8, 16, 64), "k": 8},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """1,000 rows that are sparse mixtures of 32 directions in 16 dimensions."""
    rng = np.random.default_rng(0)
    mixture = rng.exponential(size=(1000, 32)) * (rng.random((1000, 32)) < 0.1)
    rows = (mixture @ rng.normal(size=(32, 16)) + 0.05 * rng.normal(size=(1000, 16)) + 2).astype(np.float16)
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, rows)
    return path


def weights_of(run: Path) -> bytes:
    return (run / "sae.safetensors").read_bytes()


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_training_reconstructs_better_and_keeps_unit_rows(kind, store, tmp_path):
    sae = train(store, out=tmp_path / "run", **{"kind": kind, **SMALL, **KINDS[kind]})
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["fvu"] < 0.7 * lines[0]["fvu"]
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)
    assert [line["step"] for line in lines] == [*range(5, 61, 5)]
    assert torch.equal(SAE.load(tmp_path / "run").W_enc, sae.W_enc)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        *(["checkpoints"] if (tmp_path / "run/checkpoints").exists() else []),
        "config.json", "metrics.jsonl", "sae.json", "sae.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("extra", [{"auxiliary": 0.03}, {"soft_cap": 5.0}, {"precision": "bfloat16"}])
def test_options_train_too(extra, store, tmp_path):
    train(store, out=tmp_path / "run", **SMALL, levels=(4, 64), **extra)
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["fvu"] < 0.8 * lines[0]["fvu"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("cap", [None, 0.5])
def test_batchtopk_at_inference_keeps_as_many_latents_as_were_asked_for_with_any_soft_cap(cap, store, tmp_path):
    sae = train(store, out=tmp_path / "run", kind="batchtopk", soft_cap=cap, **{**SMALL, "k": 8, "epochs": 40})
    z = sae.encode(torch.from_numpy(np.load(store)).float())
    assert float((z > 0).sum(1).float().mean()) == pytest.approx(8, rel=0.1)


def test_auxiliary_loss_revives_dead_latents_and_reconstructs_better():
    dead, error = zip(*(_train_with_half_the_latents_asleep(auxiliary) for auxiliary in (0.0, 0.03)), strict=True)
    assert dead[0] >= 15 and dead[1] <= 5
    assert error[1] < 0.9 * error[0]


def _train_with_half_the_latents_asleep(auxiliary: float) -> tuple[int, float]:
    """48 sparse directions, 48 latents of which 24 begin with a bias that keeps them out of the top k."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(48, 16, generator=generator)
    settings = TrainSettings(kind="topk", k=4, auxiliary=auxiliary)
    sae = SAE(SAEConfig(16, 48, kind="topk", k=4))
    with torch.no_grad():
        sae.b_enc[24:] = -0.2
    optimizer = torch.optim.AdamW(sae.parameters(), lr=1e-3, weight_decay=0.0)
    rows_since_fired = torch.zeros(48, dtype=torch.int64)
    for _ in range(600):
        mixture = torch.rand(128, 48, generator=generator) * (torch.rand(128, 48, generator=generator) < 0.06)
        result = train_step(sae, mixture @ directions, optimizer, settings, rows_since_fired >= 2000)
        rows_since_fired = (rows_since_fired + 128).masked_fill(result.fired, 0)
    return int((rows_since_fired >= 2000).sum()), float(result.reconstruction)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(store, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(store, out=tmp_path / name, seed=seed, **SMALL)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") != weights_of(tmp_path / "c")


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_run_equals_uninterrupted_run(kind, store, tmp_path):
    options = {"kind": kind, **SMALL, **KINDS[kind], "checkpoint_every": 7, "auxiliary": 0.03}
    train(store, out=tmp_path / "whole", **options)
    # A real SIGINT to this process once two checkpoints were made.
    stop = _interrupt_when(lambda: (tmp_path / "cut/checkpoints/step-000014").exists())
    with pytest.raises(Interrupted, match=r"interrupted at step \d+ of 60, which is saved; .* --resume"):
        train(store, out=tmp_path / "cut", **{**options, "log_every": 1})
    stop()
    assert not (tmp_path / "cut/sae.json").exists()
    train(store, out=tmp_path / "cut", resume=True, **{**options, "log_every": 1})
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert [line["step"] for line in lines_of(tmp_path / "cut")] == [*range(1, 61)]


def _interrupt_when(is_time):
    import threading

    done = threading.Event()

    def watch():
        while not done.is_set():
            if is_time():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return lambda: (done.set(), thread.join())


KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from msae.sae.train import train
store, whole, killed = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

def start(out):
    child = os.fork()  # torch is imported but has computed nothing yet, so a fork is safe and saves the imports
    if child == 0:
        train(store, out=out, resume=True, kind="batchtopk", k=8, d_sae=512, batch_size=64, epochs=10,
              lr=1e-3, checkpoint_every=3, log_every=2, device="cpu")
        os._exit(0)
    return child

assert os.waitpid(start(whole), 0)[1] == 0
names = lambda: sorted(p.name for p in killed.glob("checkpoints/*"))
rng, kills = random.Random(0), 0
while kills < 10:
    before, child = names(), start(killed)
    while names() == before and os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.03)  # at a random moment of training, logging or saving
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    print(kills, names(), flush=True)
assert not (killed / "sae.json").exists(), "the run finished before it could be killed ten times"
assert os.waitpid(start(killed), 0)[1] == 0
"""


@needs_posix
def test_killed_ten_times_and_resumed_gives_the_same_bytes(store, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, "-c", KILLER, str(store), str(whole), str(killed)], check=True, timeout=120)
    assert weights_of(killed) == weights_of(whole)
    assert [line["step"] for line in lines_of(killed)] == [line["step"] for line in lines_of(whole)]
    assert not list(killed.rglob("*.tmp")) and not list((killed / "checkpoints").iterdir())


def test_a_finished_run_resumed_is_left_as_it_is(store, tmp_path):
    train(store, out=tmp_path / "run", **SMALL)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    train(store, out=tmp_path / "run", resume=True, **SMALL)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}


def test_a_diverging_loss_names_the_step_and_keeps_the_last_checkpoint(store, tmp_path):
    with pytest.raises(TrainingError, match=r"diverged at step \d+ of .*lower --lr"):
        train(store, out=tmp_path / "run", **{**SMALL, "lr": 1e6, "checkpoint_every": 1, "epochs": 20})
    for checkpoint in (tmp_path / "run/checkpoints").glob("step-*"):
        SAE.load(checkpoint)  # refuses NaN
    assert not (tmp_path / "run/sae.json").exists()


def test_a_checkpoint_is_kept_until_the_loss_after_the_next_one_is_sound(store, tmp_path):
    """Steps 1 to 30 are sound; then the rate jumps, the update of step 31 ruins the weights and is checkpointed."""
    options = {**SMALL, "kind": "topk", "k": 8, "checkpoint_every": 1}
    settings = TrainSettings(**options).resolve(as_store(store))
    run = _JumpsAt(30, tmp_path / "run", TrainingRows(store, "image"), settings)
    with pytest.raises(TrainingError, match=r"diverged at step 31 of 60 .*step-000030 is kept; .*lower --lr") as caught:
        run.train(resume=False)
    assert "\n" not in str(caught.value)
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000030"]
    x = torch.from_numpy(np.load(store)).float()
    sae = SAE.load(tmp_path / "run/checkpoints/step-000030")
    error = (sae.decode(sae.encode(x)) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) < 1


def test_a_checkpoint_of_spoilt_weights_does_not_replace_a_good_one(store, tmp_path):
    """The update of step 31 makes the error 6,205, and that of step 32 a diverged one, also after a resumption."""
    settings = TrainSettings(**{**SMALL, "kind": "topk", "k": 8, "checkpoint_every": 1}).resolve(as_store(store))
    for resume in (False, True):
        run = _JumpsAt(30, tmp_path / "run", TrainingRows(store, "image"), settings, lr=4.0)
        with pytest.raises(TrainingError, match=r"diverged at step 32 of 60 .*step-000030 is kept"):
            run.train(resume=resume)
    kept = SAE.load(tmp_path / "run/checkpoints/step-000030")
    x = torch.from_numpy(np.load(store)).float()
    assert float((kept.decode(kept.encode(x)) - x).square().sum() / (x - x.mean(0)).square().sum()) < 1


class _JumpsAt(Training):
    """A run whose learning rate is a million, or another, from one step on."""

    def __init__(self, step, *args, lr=1e6):
        super().__init__(*args)
        self.jump, self.lr = step, lr

    def _step(self, state, x):
        if state.step >= self.jump:
            for group in state.optimizer.param_groups:
                group["lr"] = self.lr
        return super()._step(state, x)


def test_a_run_that_diverges_in_its_last_step_is_an_error_and_saves_no_sae(store, tmp_path):
    settings = TrainSettings(**{**SMALL, "checkpoint_every": 7}).resolve(as_store(store))
    with pytest.raises(TrainingError, match=r"diverged at step 60 of 60 .*step-000056 is kept"):
        _JumpsAt(59, tmp_path / "run", TrainingRows(store, "image"), settings).train(resume=False)
    assert not (tmp_path / "run/sae.json").exists()


def test_a_jumprelu_that_begins_far_too_dense_is_not_taken_for_a_diverged_one(store, tmp_path):
    """Its L0 penalty begins at (300 / 1)^2, above any bound on a squared error."""
    train(store, out=tmp_path / "run", **{**SMALL, "kind": "jumprelu", "k": 1, "d_sae": 2048, "epochs": 1})
    assert (tmp_path / "run/sae.json").exists()


@needs_posix
def test_two_trainings_cannot_write_into_one_folder(store, tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom msae.base.errors import RunError\n"
        "from msae.base.files import locked\n"
        "with locked(Path(sys.argv[1]), error=RunError): print('locked', flush=True); sys.stdin.read()\n"
    )
    out = tmp_path / "deep/run"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        for resume in (False, True):
            with pytest.raises(RunError, match=r"deep/run is being written by another process; wait for it") as caught:
                train(store, out=out, resume=resume, **SMALL)
            assert "\n" not in str(caught.value)
        assert [p.name for p in out.iterdir()] == [".lock"]
        other.communicate()
    assert not (tmp_path / "deep").exists()  # nothing was made in it
    train(store, out=out, **SMALL)
    assert not (out / ".lock").exists()


def test_a_folder_that_cannot_be_written_is_one_line(store, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(RunError, match=r"cannot be written \(.*\); give another --out") as caught:
            train(store, out=out, **SMALL)
        assert "\n" not in str(caught.value)


def test_the_resume_line_is_what_must_be_typed(store, tmp_path):
    """A command that already says --resume, or that always goes on as `msae demo` does, is typed again as it is."""
    for name, resume, line in (("a", False, "the same command with --resume"), ("b", True, "the same command again$")):
        stop = _interrupt_when(lambda name=name: (tmp_path / name / "checkpoints/step-000007").exists())
        with pytest.raises(Interrupted, match=line):
            train(store, out=tmp_path / name, resume=resume, checkpoint_every=7, **SMALL)
        stop()


def test_learning_rate_rises_holds_and_falls_to_nearly_zero():
    settings = TrainSettings(lr=1.0, warmup=0.1, decay=0.2)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:80] == [1.0] * 71
    assert rates[80] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.05)
    flat = [learning_rate(TrainSettings(lr=1.0, warmup=0.0), step, 100) for step in range(100)]
    assert flat[:80] == [1.0] * 80


def test_an_epoch_visits_rows_at_most_once_and_epochs_differ():
    first, again, second = (shuffled_batches(1000, 64, seed=3, epoch=e) for e in (0, 0, 1))
    rows = np.concatenate(first)
    assert len(first) == 15 and len(np.unique(rows)) == len(rows) == 960
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(np.concatenate(second), rows)


def test_the_poster_recipe_is_the_papers():
    class Rows:
        d_in = 768

        def __len__(self):
            return 2_905_936

    rates = {"matryoshka": 1e-4, "topk": 5e-4, "batchtopk": 5e-4, "relu": 5e-5}
    for kind, rate in rates.items():
        settings = TrainSettings(kind=kind, recipe="poster").resolve(Rows())
        assert (settings.lr, settings.batch_size, settings.epochs, settings.d_sae) == (rate, 4096, 30, 6144)
        assert (settings.warmup, settings.decay, settings.auxiliary, settings.max_grad_norm) == (0, 0.2, 0, 1)
    nested = TrainSettings(recipe="poster", weighting="reverse").resolve(Rows())
    assert nested.levels == (64, 128, 256, 512, 1024, 2048, 4096, 6144) and nested.weights == tuple(range(8, 0, -1))
    assert TrainSettings(recipe="poster", expansion=32).resolve(Rows()).epochs == 20


def sized(d_in, n_rows=50_000):
    """What settings must know of a store."""

    class Rows:
        def __len__(self):
            return n_rows

    Rows.d_in = d_in
    return Rows()


def test_default_levels_double_up_to_the_dimensions():
    wide = TrainSettings().resolve(sized(512))
    assert wide.levels == (8, 16, 32, 64, 128, 256, 512) and wide.level_scales is True
    assert wide.weights == pytest.approx([(k / 8) ** 0.25 for k in wide.levels])
    assert (wide.lr, wide.inference_l0, wide.d_sae, wide.batch_size) == (3e-3, 64, 4096, 256)
    demo = TrainSettings().resolve(sized(128))
    assert demo.levels == (2, 4, 8, 16, 32, 64, 128) and demo.inference_l0 == 16
    assert TrainSettings().resolve(sized(768)).levels == (12, 24, 48, 96, 192, 384, 768)
    assert TrainSettings(d_sae=40).resolve(sized(128)).levels == (2, 4, 8, 16, 32, 40)
    assert TrainSettings(d_sae=1).resolve(sized(7)).levels == (1,)
    reverse = TrainSettings(weighting="reverse").resolve(sized(512))
    assert reverse.levels == wide.levels and reverse.weights == tuple(range(7, 0, -1))


def test_the_faithful_recipe_has_levels_up_to_all_latents():
    settings = TrainSettings(recipe="faithful").resolve(sized(512))
    assert settings.levels == (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) and settings.lr == 1e-3
    assert settings.weights == pytest.approx([(k / 8) ** 0.5 for k in settings.levels])
    assert TrainSettings(recipe="faithful", kind="topk").resolve(sized(512)).lr == 2e-3


@pytest.mark.parametrize(
    ("given", "l0"),
    [({}, 64), ({"kind": "topk", "k": 16}, 16), ({"inference_l0": 9, "kind": "topk"}, 9), ({"d_sae": 20}, 20)],
)
def test_the_mean_number_of_active_latents_is_that_of_the_kind_or_an_eighth_of_the_dimensions(given, l0):
    assert TrainSettings(**given).resolve(sized(512)).inference_l0 == l0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inference_l0": 0}, ConfigError, "--inference-l0 0 is not positive"),
        ({"kidn": "topk"}, ConfigError, "unknown setting 'kidn'; did you mean 'kind'"),
        ({"kind": "topp"}, ConfigError, "not one of matryoshka"),
        ({"kind": "topk", "k": 65}, ConfigError, "k 65 is not between 1 and d_sae 64"),
        ({"levels": (16, 4)}, ConfigError, "do not strictly increase"),
        ({"levels": (4, 999)}, ConfigError, "level 999 is above d_sae 64"),
        ({"levels": (4, 8), "weights": (1.0,)}, ConfigError, "one weight for each"),
        ({"weights": (1.0,)}, ConfigError, "--weights without --levels"),
        ({"kind": "topk", "weighting": "reverse"}, ConfigError, "belong to matryoshka"),
        ({"kind": "topk", "widths": (4, 64)}, ConfigError, "belong to matryoshka"),
        ({"levels": (4, 64), "widths": (4, 64)}, ConfigError, "two different Matryoshka SAEs"),
        ({"widths": (4, 32)}, ConfigError, "the last of --widths is 32; give all latents, 64"),
        ({"levels": (4, 64), "weights": (1.0, 9.0), "weighting": "reverse"}, ConfigError, "give one of them"),
        ({"k": 8}, ConfigError, "--k belongs to topk, batchtopk, jumprelu and --widths, but the kind is matryoshka"),
        ({"kind": "topk", "l1": 0.1}, ConfigError, "--l1 belongs to relu, but the kind is topk"),
        ({"lr": -1.0}, ConfigError, "--lr -1.0 is not positive"),
        ({"epochs": 0}, ConfigError, "--epochs 0 is not positive"),
        ({"decay": 2.0}, ConfigError, "a share of the steps"),
        ({"l1": -1.0}, ConfigError, "--l1 -1.0 is negative"),
        ({"device": "abacus"}, ConfigError, "device abacus cannot be used here"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(options, error, message, store, tmp_path):
    with pytest.raises(error, match=message) as caught:
        train(store, out=tmp_path / "run", **{**SMALL, **options})
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_another_run_in_the_way_is_refused_and_left_alone(store, tmp_path):
    train(store, out=tmp_path / "run", **SMALL)
    before = weights_of(tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run; add --resume"):
        train(store, out=tmp_path / "run", **SMALL)
    with pytest.raises(RunError, match=r"was started with lr 0\.001, not 0\.5"):
        train(store, out=tmp_path / "run", resume=True, **{**SMALL, "lr": 0.5})
    other = tmp_path / "other.npy"
    np.save(other, np.random.default_rng(1).normal(size=(100, 16)).astype(np.float32))
    with pytest.raises(RunError, match="trained on another store"):
        train(other, out=tmp_path / "run", resume=True, **SMALL)
    config = tmp_path / "run" / "config.json"
    whole = config.read_text()
    fingerprint = json.loads(whole)["store_fingerprint"]
    config.write_text(whole.replace(fingerprint, fingerprint[:32]))
    with pytest.raises(RunError, match=r"begun by an earlier msae, which did not record all rows .* another --out"):
        train(store, out=tmp_path / "run", resume=True, **SMALL)
    config.write_text(whole)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/dog.jpg").write_bytes(b"")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        train(store, out=tmp_path / "photos", **SMALL)
    assert weights_of(tmp_path / "run") == before


def test_nan_rows_stop_training_with_their_row(tmp_path):
    rows = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    rows[137, 3] = np.nan
    np.save(tmp_path / "x.npy", rows)
    with pytest.raises(StoreError, match="137"):
        train(tmp_path / "x.npy", out=tmp_path / "run", **SMALL)


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(store, tmp_path):
    missing = next(name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None)
    with pytest.raises(MissingDependencyError, match=f"{missing} is not installed.*pip install {missing}"):
        train(store, out=tmp_path / "run", loggers=(missing,), **SMALL)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_figures_of_the_jsonl_file(store, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(store, out=tmp_path / "run", loggers=("tensorboard",), **SMALL)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    lines = lines_of(tmp_path / "run")
    assert [(e.step, e.value) for e in events.Scalars("fvu")] == [
        (line["step"], pytest.approx(line["fvu"], rel=1e-6)) for line in lines
    ]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"lr": 1e-9, "nonsense": 3}, "train: unknown setting 'nonsense'"),
        ({"lr": 1e-9, "epoch": 3}, "train: unknown setting 'epoch'; did you mean 'epochs'?"),
        ({"lr": 1e-9}, "train: settings and lr are both given; put it into the TrainSettings, or leave settings out"),
        ({"lr": 1e-9, "config": "f.toml"}, "train: settings and config, lr are both given; put them into"),
        ({"settings": {"lr": 1e-9}}, "train: settings is a dict; give a TrainSettings, or its fields"),
    ],
)
def test_settings_beside_options_are_refused_for_one_would_be_ignored(others, message, store, tmp_path):
    with pytest.raises(ConfigError) as caught:
        train(store, out=tmp_path / "run", **{"settings": TrainSettings(**SMALL), **others})
    assert message in str(caught.value) and not (tmp_path / "run").exists()


def test_the_keywords_of_train_are_the_settings():
    hints = typing.get_type_hints(TrainSettings)
    assert typing.get_type_hints(TrainOptions) == {f.name: hints[f.name] for f in dataclasses.fields(TrainSettings)}
    assert typing.get_type_hints(train)["options"] == typing.Unpack[TrainOptions]


def test_a_run_trains_again_from_its_own_settings(store, tmp_path):
    train(store, out=tmp_path / "a", **SMALL, levels=(4, 64), weighting="reverse")
    settings = settings_from(
        TrainSettings, None, json.loads((tmp_path / "a/config.json").read_text())["train"], where="a"
    )
    train(store, out=tmp_path / "b", settings=settings)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_nested_widths_make_each_prefix_of_the_dictionary_a_good_sae(store, tmp_path):
    """Beside a BatchTopK SAE of the same k, whose first eight latents are as good as any eight."""
    options = {**SMALL, "k": 8, "epochs": 20}
    nested = train(store, out=tmp_path / "nested", **options, widths=(8, 16, 64))
    plain = train(store, out=tmp_path / "plain", **options, kind="batchtopk")
    x = torch.from_numpy(np.load(store)).float()
    x = nested.standardizer.apply(x, "image")
    errors = []
    for sae in (nested, plain):
        with torch.no_grad():
            z = sae.activate(sae.pre_activations(x))
            z[:, 8:] = 0
            errors.append(float((sae.reconstruct(z) - x).square().mean()))
    assert errors[0] < 0.8 * errors[1]
    assert SAE.load(tmp_path / "nested").config.widths == (8, 16, 64)


def test_the_figures_are_json_even_where_one_is_not_a_number(tmp_path, capsys):
    """A batch of one row has no variance, so its FVU is unknown; the closing figures are of many rows."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32))
    options = {"d_sae": 16, "batch_size": 1, "epochs": 2, "log_every": 1, "device": "cpu"}
    train(tmp_path / "x.npy", out=tmp_path / "run", **options)

    def refuse(constant):
        raise AssertionError(constant)

    written = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in written]
    assert [line["fvu"] for line in lines] == [None] * 12 and all(line["loss"] > 0 for line in lines)
    assert Run.open(tmp_path / "run").metrics == lines
    assert "</svg>" in training_curves({"run": lines}, "fvu")
    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "again"), "--d-sae", "16", "--batch-size", "1"])
    assert left.value.code == 0 and re.search(r"FVU +0\.\d{3} of the variance is lost", capsys.readouterr().out)


def test_a_damaged_line_of_figures_is_one_line_at_resume(store, tmp_path):
    stop = _interrupt_when(lambda: (tmp_path / "run/checkpoints/step-000007").exists())
    with pytest.raises(Interrupted):
        train(store, out=tmp_path / "run", checkpoint_every=7, **SMALL)
    stop()
    file = tmp_path / "run/metrics.jsonl"
    file.write_text("odd\n" + file.read_text())
    with pytest.raises(RunError, match=r"metrics\.jsonl has a line that is no step of training \('odd'\)"):
        train(store, out=tmp_path / "run", checkpoint_every=7, resume=True, **SMALL)


def test_a_store_of_another_width_is_one_line_at_resume(store, tmp_path):
    train(store, out=tmp_path / "run", **SMALL)
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).normal(size=(100, 17)).astype(np.float32))
    with pytest.raises(
        RunError, match=r"run was trained on 16-dim embeddings \(.*x\.npy\), but .*wide\.npy holds 17-dim"
    ):
        train(tmp_path / "wide.npy", out=tmp_path / "run", resume=True, **SMALL)


def test_settings_file_and_options_meet(store, tmp_path):
    file = tmp_path / "f.toml"
    file.write_text('kind = "topk"\nk = 8\nd_sae = 64\nepochs = 1\nbatch-size = 64\n')
    with pytest.raises(ConfigError, match="train: unknown setting 'kk'; did you mean 'k'"):  # not in the file
        train(store, out=tmp_path / "run", config=file, kk=5)
    sae = train(store, out=tmp_path / "run", config=file, k=5)
    assert (sae.config.kind, sae.config.k, sae.d_sae) == ("topk", 5, 64)
