"""The training of one run folder: the loop, its checkpoints, and what may go on in it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msae.base.config import to_mapping
from msae.base.devices import as_device
from msae.base.errors import ConfigError, Interrupted, RunError, StoreError, TrainingError
from msae.base.files import atomic_folder, locked, read_json, remove_leftovers, write_json
from msae.base.loggers import Loggers, check_installed
from msae.base.processes import ALONE, Processes
from msae.base.progress import progress
from msae.data.arrays import is_sampled_fingerprint
from msae.sae.model import SAE, SAEConfig, first_not_finite, read_config
from msae.sae.run import Run
from msae.sae.standardize import MODALITIES, Modality, Standardizer, fit_statistics
from msae.sae.thresholds import fit_on_store
from msae.sae.train.ahead import on_device
from msae.sae.train.rows import TrainingRows
from msae.sae.train.settings import TrainSettings
from msae.sae.train.step import StepResult, learning_rate, objective_of, train_step

Raw: TypeAlias = Float32[np.ndarray, "n d_in"]
SCHEMA_VERSION = 1
DIVERGED = 1e4
"""A squared error above this, in units of the variance of standardised embeddings (about 1), is a diverged one."""
SPOILT = 10
"""A squared error above 1 and so many times the lowest of the run: training may recover, but an earlier checkpoint is
the better one to keep."""
_RESUME = "the same command with --resume (in Python: resume=True)"
THRESHOLD_PACE = 20.0
"""Learning rate of log thresholds over that of the weights: they must travel a factor of ten or more."""


@dataclass
class _State:
    """All that changes during training: what a checkpoint holds."""

    sae: SAE
    optimizer: torch.optim.AdamW
    rows_since_fired: Tensor
    step: int = 0


class Training:
    """A run folder while it is being trained."""

    def __init__(self, folder: Path, rows: TrainingRows, settings: TrainSettings, processes: Processes = ALONE) -> None:
        assert settings.batch_size is not None and settings.epochs is not None and settings.d_sae is not None
        self.folder, self.rows, self.settings = folder, rows, settings
        self.processes = _sharing(processes, rows, settings)
        encoder, revision = rows.encoder
        self.sae_config = SAEConfig(
            d_in=rows.d_in,
            d_sae=settings.d_sae,
            kind=settings.kind,
            k=settings.k,
            levels=settings.levels,
            widths=settings.widths,
            level_scales=settings.level_scales,
            soft_cap=settings.soft_cap,
            encoder=encoder,
            encoder_revision=revision,
        )
        self.steps_per_epoch = len(rows) // settings.batch_size
        self.n_steps = self.steps_per_epoch * settings.epochs
        self._is_unproven = True
        """Whether the latest checkpoint's weights have not met a sound loss yet; an older one is kept until then."""
        self._lowest_error = math.inf
        self._unjudged: list[StepResult] = []
        """Steps since the last look."""

    def train(self, *, resume: bool) -> SAE:
        """Run every step that is still to do, and write the SAE."""
        check_installed(self.settings.loggers)
        if not self.processes.is_first:
            return self._train_beside()
        sae = self._train_first(resume=resume)
        with self.processes.folder_of_first(self.folder):
            return sae

    def _train_beside(self) -> SAE:
        """What the other processes do: the same steps from the same state as the first, but no files."""
        with self.processes.folder_of_first(None) as begin:
            state = None if begin is None else self._read_state(begin)
        if state is not None:
            with _matmul_precision(self.settings.precision):
                self._loop(state, None)
        with self.processes.folder_of_first(None) as end:
            assert end is not None
            return SAE.load(end)

    def _train_first(self, *, resume: bool) -> SAE:
        if self._is_finished():  # before the lock: a finished run may lie where nothing can be written
            self._is_begun(resume=resume)
            sae = SAE.load(self.folder)
            if sae.config.inference_l0 is not None and not self._asks_for_another_l0():
                self._share_state(None)
                return sae
        with locked(self.folder, error=RunError):
            return self._train(resume=resume)

    def _train(self, *, resume: bool) -> SAE:
        is_begun = self._is_begun(resume=resume)
        if self._is_finished():
            self._share_state(None)
            return self._with_asked_l0(SAE.load(self.folder))
        if is_begun:
            remove_leftovers(self.folder)
            remove_leftovers(self.folder / "checkpoints")
        checkpoints = self._checkpoints()
        state = self._read_state(checkpoints[-1]) if checkpoints else self._start()
        if not is_begun:  # only now: a store that cannot be trained on leaves no folder behind
            write_json(self.folder / "config.json", self._identity(), schema_version=SCHEMA_VERSION)
        self._share_state(state)
        loggers = Loggers(
            self.settings.loggers, self.folder, settings=to_mapping(self.settings), resume_step=state.step
        )
        try:
            with _matmul_precision(self.settings.precision):
                self._loop(state, loggers, how="the same command again" if resume else _RESUME)
        finally:
            loggers.close()
        sae = self._with_thresholds(state.sae)
        sae.save(self.folder)
        for checkpoint in self._checkpoints():
            _remove_folder(checkpoint)
        return sae.cpu().eval()

    def _share_state(self, state: _State | None) -> None:
        """Give the other processes what training begins with; None where there is nothing to train."""
        if self.processes.size == 1:
            return
        with tempfile.TemporaryDirectory(prefix="msae-") as folder:
            if state is not None:
                self._write_state(state, Path(folder))
            with self.processes.folder_of_first(Path(folder) if state else None):
                pass

    def _with_thresholds(self, sae: SAE) -> SAE:
        """A copy with thresholds for the asked mean number of active latents, fitted on the rows of each modality."""
        l0 = self.settings.inference_l0
        assert l0 is not None
        parts = sorted(self.rows.parts.items(), key=lambda part: part[0] not in self.rows.trained)
        tables = {modality: fit_on_store(sae, part, modality, l0=l0) for modality, part in parts}
        return sae.with_thresholds(tables, float(l0))

    def _asks_for_another_l0(self) -> bool:
        """Whether the finished run was made for another mean number of active latents."""
        theirs = read_json(self.folder / "config.json", schema_version=SCHEMA_VERSION, error=RunError)
        return bool(theirs.get("train", {}).get("inference_l0") != self.settings.inference_l0)

    def _with_asked_l0(self, sae: SAE) -> SAE:
        """The SAE of the finished run; thresholds that it lacks, or has for another number, are fitted and saved."""
        if sae.config.inference_l0 is not None and not self._asks_for_another_l0():
            return sae  # another process has just finished it
        sae = self._with_thresholds(sae.to(self.settings.device))
        sae.save(self.folder)
        config = read_json(self.folder / "config.json", schema_version=SCHEMA_VERSION, error=RunError)
        config["train"]["inference_l0"] = self.settings.inference_l0
        del config["schema_version"], config["made_by"]
        write_json(self.folder / "config.json", config, schema_version=SCHEMA_VERSION)
        return sae.cpu().eval()

    def _loop(self, state: _State, loggers: Loggers | None, *, how: str = "") -> None:
        """Every step that is still to do.

        Args:
            loggers: Of the first process, which alone shows and saves anything; the others have none.
            how: What to type to go on after Ctrl-C.
        """
        settings = self.settings
        recent: list[StepResult] = []
        standardizer = state.sae.standardizer.to(settings.device)
        saved_at = time.monotonic()
        bar = progress("training", total=self.n_steps, unit="steps", start=state.step)
        with bar if loggers else nullcontext(lambda _: None) as advance, _ctrl_c() as pressed:
            batches = on_device(self._batches(state.step), settings.device)
            for batch in itertools.islice(batches, self.n_steps - state.step):
                rows = list(map(standardizer.apply, batch, (*self.rows.trained, *MODALITIES)))
                x, pairs = torch.cat(rows[: len(self.rows.trained)]), rows[len(self.rows.trained) :]
                for group in state.optimizer.param_groups:
                    group["lr"] = group["pace"] * learning_rate(settings, state.step, self.n_steps)
                recent.append(self._step(state, x, *pairs))
                n_rows = self.processes.rows(len(x))
                state.rows_since_fired = (state.rows_since_fired + n_rows).masked_fill(recent[-1].fired, 0)
                state.step += 1
                advance(1)
                is_last = state.step == self.n_steps
                is_due = (
                    state.step % settings.checkpoint_every == 0
                    if settings.checkpoint_every
                    else time.monotonic() - saved_at > 60
                )
                if state.step % settings.log_every == 0 or is_last:
                    self._look(state)
                    if is_last:  # no step comes after it that would notice that it diverged
                        self._check_sound(state, x)
                    figures = self._figures(state, recent, x)
                    recent.clear()
                    if loggers:
                        loggers.log(state.step, figures)
                if loggers is None:  # after Ctrl-C the first process saves and ends, and with it all others
                    continue
                if (is_due or pressed()) and not is_last:
                    self._save_checkpoint(state)
                    saved_at = time.monotonic()
                if pressed() and not is_last:
                    raise Interrupted(
                        f"interrupted at step {state.step} of {self.n_steps}, which is saved; to go on, type {how}"
                    )

    def _figures(self, state: _State, recent: list[StepResult], x: Tensor) -> dict[str, float]:
        """One line of metrics.jsonl; the evaluation figures are of the current batch, in the trained mode."""
        total, mean, n = self.processes.total, self.processes.mean, len(x)
        with torch.no_grad():
            z = state.sae.activate(state.sae.pre_activations(x))
            x_hat = state.sae.reconstruct(z)
        return {
            "epoch": state.step / self.steps_per_epoch,
            "lr": float(state.optimizer.param_groups[0]["lr"]),
            "loss": statistics.fmean(_read(recent, "loss")),
            "reconstruction": statistics.fmean(_read(recent, "reconstruction")),
            "grad_norm": statistics.fmean(_read(recent, "grad_norm")),
            "l0": float(recent[-1].l0),
            "sparsity": float(mean((z == 0).float().mean(), n)),
            "fvu": float(total((x - x_hat).square().sum()) / total((x - mean(x.mean(0), n)).square().sum())),
            "dead": int((state.rows_since_fired >= len(self.rows)).sum()),
        }

    def _step(self, state: _State, x: Tensor, *pairs: Tensor) -> StepResult:
        """One step, which nothing waits for; `_look` judges it later."""
        try:
            dead = state.rows_since_fired >= self.settings.dead_after
            result = train_step(
                state.sae, x, state.optimizer, self.settings, dead, pairs=pairs, processes=self.processes
            )
        except TrainingError as err:
            self._look(state)
            raise self._diverged(state.step, str(err)) from err
        self._unjudged.append(result)
        return result

    def _look(self, state: _State) -> None:
        """Wait for the steps since the last look. The loss of each says whether the weights before it are sound, which
        may be in a checkpoint: none is written between two looks."""
        results, self._unjudged = self._unjudged, []
        if not results:
            return
        errors = zip(_read(results, "reconstruction"), _read(results, "loss"), strict=True)
        for step, (error, loss) in enumerate(errors, state.step - len(results)):
            if not (error < DIVERGED and math.isfinite(loss)):
                raise self._diverged(step, f"the squared error is {error:.3g}, the loss {loss:.3g}")
            if self._is_unproven and self.processes.is_first:
                self._is_unproven = False
                older, latest = self._checkpoints()[:-1], self._checkpoints()[-1:]
                is_spoilt = error > max(1, SPOILT * self._lowest_error)
                for checkpoint in latest if older and is_spoilt else older:
                    _remove_folder(checkpoint)
            self._lowest_error = min(self._lowest_error, error)

    @torch.no_grad()
    def _check_sound(self, state: _State, x: Tensor) -> None:
        """Refuse weights whose loss on `x` diverged."""
        try:
            error = float(objective_of(self.settings, self.processes)(state.sae, x).errors[-1])
        except TrainingError as err:
            raise self._diverged(state.step, str(err)) from err
        if not error < DIVERGED:
            raise self._diverged(state.step, f"the squared error is {error:.3g}")

    def _diverged(self, step: int, what: str) -> TrainingError:
        """The error that says so; a checkpoint of the weights after `step`, whose loss diverged, goes first."""
        if not self.processes.is_first:
            self.processes.wait_for_first_to_end()
        unsound = self._checkpoint_path(step)
        if unsound.exists():
            _remove_folder(unsound)
        kept = self._checkpoints()
        return TrainingError(
            f"training diverged at step {max(1, step)} of {self.n_steps} ({what}); "
            f"{f'{kept[-1]} is kept' if kept else 'there is no checkpoint from before'}; "
            f"start again in another --out with a lower --lr than {self.settings.lr:g}"
        )

    def _batches(self, first_step: int) -> Iterator[list[Raw]]:
        """The embeddings of each step from one on: of each trained modality, then images and texts of its pairs."""
        for batch, pairs in zip(self._rows(first_step), self._pairs(first_step), strict=False):
            yield [*batch.values(), *pairs]

    def _rows(self, first_step: int) -> Iterator[Mapping[Modality, Raw]]:
        settings = self.settings
        assert settings.batch_size is not None and settings.block_rows is not None
        if settings.block_rows > 1:
            yield from self.rows.in_blocks(settings.batch_size, **self._in_blocks(first_step))
        for epoch in itertools.count(first_step // self.steps_per_epoch):
            batches = self.rows.drawn(settings.batch_size, seed=settings.seed, epoch=epoch)
            for numbers in batches[max(0, first_step - epoch * self.steps_per_epoch) :]:
                yield {
                    one: self.rows.parts[one].take(rows[self.processes.part(len(rows))], one)
                    for one, rows in numbers.items()
                }

    def _pairs(self, first_step: int) -> Iterator[list[Raw]]:
        """Images and texts of the pairs of each step, or nothing where the settings do not ask for them."""
        settings = self.settings
        if not settings.align:
            yield from itertools.repeat([])
        assert self.rows.pairs is not None and settings.batch_size is not None and settings.block_rows is not None
        half = settings.batch_size // 2
        if settings.block_rows > 1:
            yield from self.rows.pairs_in_blocks(half, **self._in_blocks(first_step))
        for step in itertools.count(first_step):
            rows = self.rows.drawn_pairs(half, seed=settings.seed, step=step)
            rows = rows[self.processes.part(len(rows))]
            yield [self.rows.pairs.take(rows, one) for one in MODALITIES]

    def _in_blocks(self, first_step: int) -> dict[str, Any]:
        known = {"block_rows": self.settings.block_rows, "seed": self.settings.seed}
        return {**known, "first_step": first_step, "share": self.processes.part}

    def _identity(self) -> dict[str, Any]:
        """What makes this run this run: goes into config.json. `stores` is there where there are several."""
        stores = [{"store": store.full_address, "store_fingerprint": store.fingerprint} for store in self.rows.stores]
        return {
            **stores[0],
            **({"stores": stores} if len(stores) > 1 else {}),
            **({"processes": self.processes.size} if self.processes.size > 1 else {}),
            "n_rows": self.rows.n_rows,
            "d_in": self.rows.d_in,
            "modality": self.settings.modality,
            "train": to_mapping(self.settings),
        }

    def _is_begun(self, *, resume: bool) -> bool:
        """Whether the folder holds this very run; refuses a folder that holds anything else."""
        file = self.folder / "config.json"
        if not file.exists():
            if self.folder.exists() and any(p for p in self.folder.iterdir() if not p.name.startswith(".")):
                raise RunError(f"{self.folder} is not empty and holds no run; give another --out")
            return False
        if not resume:
            raise RunError(f"{self.folder} already holds a run; add --resume to go on with it, or give another --out")
        theirs = read_json(file, schema_version=SCHEMA_VERSION, error=RunError)
        _refuse_other_settings(self.folder, self._identity(), theirs)
        return True

    def _is_finished(self) -> bool:
        return (self.folder / "config.json").exists() and (self.folder / "sae.json").exists()

    def _start(self) -> _State:
        standardizer = Standardizer()
        for modality in self.rows.parts:
            standardizer = standardizer.with_statistics(modality, fit_statistics(partial(self._all_rows, modality)))
        sae = SAE(self.sae_config, standardizer, seed=self.settings.seed)
        return self._state_of(sae)

    def _all_rows(self, modality: Modality) -> Iterator[Tensor]:
        return (torch.from_numpy(batch) for batch in self.rows.parts[modality].batches(modality, 8192))

    def _state_of(self, sae: SAE) -> _State:
        sae = sae.to(self.settings.device).train()
        weights = [p for p in sae.parameters() if p is not sae.log_threshold]
        groups: list[dict[str, Any]] = [{"params": weights, "pace": 1.0}]
        if sae.log_threshold is not None:
            groups.append({"params": [sae.log_threshold], "pace": THRESHOLD_PACE})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=6.25e-10, weight_decay=0.0, fused=True)
        return _State(sae, optimizer, torch.zeros(sae.d_sae, dtype=torch.int64, device=self.settings.device))

    def _checkpoints(self) -> list[Path]:
        """Oldest first. Of two, the newer is of weights whose loss is not known yet."""
        return sorted((self.folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))

    def _checkpoint_path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def _save_checkpoint(self, state: _State) -> None:
        self._look(state)
        broken = first_not_finite(state.sae.state_dict())
        if broken:
            raise self._diverged(state.step, f"{broken} has NaN or infinite values")
        path = self._checkpoint_path(state.step)
        if path.exists():
            return
        with atomic_folder(path) as temporary:
            self._write_state(state, temporary)
        self._is_unproven = True

    def _write_state(self, state: _State, folder: Path) -> None:
        tensors = {"rows_since_fired": state.rows_since_fired}
        for name, parameter in state.sae.named_parameters():
            for key, value in state.optimizer.state[parameter].items():
                tensors[f"adamw.{name}.{key}"] = value
        state.sae.save(folder)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / "state.safetensors")
        lowest = self._lowest_error if math.isfinite(self._lowest_error) else None
        write_json(folder / "state.json", {"step": state.step, "lowest_error": lowest}, schema_version=SCHEMA_VERSION)

    def _read_state(self, path: Path) -> _State:
        state = self._state_of(SAE.load(path))
        try:
            tensors = load_file(path / "state.safetensors", device=self.settings.device)
            progress_made = read_json(path / "state.json", schema_version=SCHEMA_VERSION, error=RunError)
            step, lowest = int(progress_made["step"]), progress_made.get("lowest_error")
            self._lowest_error = math.inf if lowest is None else lowest
            for name, parameter in state.sae.named_parameters() if step else ():
                state.optimizer.state[parameter] = {
                    key: tensors[f"adamw.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }
            state.rows_since_fired = tensors["rows_since_fired"]
        except (SafetensorError, OSError, KeyError) as err:
            raise RunError(f"{path} is damaged ({err}); delete that folder and train again with --resume") from err
        state.step = step
        return state


def block_rows_of(folder: Path) -> int | None:
    """How the run that was begun in a folder shuffles; None where there is none."""
    try:
        begun = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(begun["train"].get("block_rows", 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a damaged one is refused later


def _sharing(processes: Processes, rows: TrainingRows, settings: TrainSettings) -> Processes:
    """The processes as they share the batches of this training; refuses what cannot be shared."""
    if processes.size == 1:
        return processes
    assert settings.batch_size is not None
    n_trained = len(rows.trained)
    of_each = settings.batch_size // n_trained
    if of_each < processes.size:
        what = f"{settings.batch_size} rows" if n_trained == 1 else f"{of_each} images and {of_each} texts"
        raise ConfigError(
            f"a batch of {what} is too small for {processes.size} processes; give a --batch-size of at least "
            f"{n_trained * processes.size}, or fewer processes"
        )
    if settings.device not in ("cpu", as_device("cuda" if settings.device.startswith("cuda") else "cpu")):
        raise ConfigError(f"--device {settings.device} would be the device of all processes; give --device cuda or cpu")
    known = [(len(store), store.d_in, store.record.get("fingerprint")) for store in rows.stores]
    if len(set(processes.each(zlib.crc32(repr(known).encode())))) > 1:
        raise StoreError(
            f"{rows.address} is another store for another process; give stores that all machines have alike"
        )
    return dataclasses.replace(processes, batch_size=n_trained * of_each)


def _refuse_other_settings(folder: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if theirs.get("d_in") != mine["d_in"]:
        raise RunError(
            f"{folder} was trained on {theirs.get('d_in')}-dim embeddings ({theirs.get('store')}), but {mine['store']} "
            f"holds {mine['d_in']}-dim ones; give that store, or another --out"
        )
    promised = theirs.get("store_fingerprint")
    if promised != mine["store_fingerprint"]:
        if is_sampled_fingerprint(str(promised)):
            raise RunError(
                f"{folder} was begun by an earlier msae, which did not record all rows of its store; "
                f"give another --out to train anew"
            )
        raise RunError(
            f"{folder} was trained on another store ({theirs.get('store')}); give that one, or another --out"
        )
    others = [[one.get("store_fingerprint") for one in known.get("stores", ())] for known in (mine, theirs)]
    if others[0] != others[1]:
        raise RunError(
            f"{folder} was trained on other stores beside {theirs.get('store')}; give those, in the same order, or "
            f"another --out"
        )
    before, defaults = theirs.get("train", {}), {**to_mapping(TrainSettings()), "level_scales": False, "block_rows": 1}
    for name, value in mine["train"].items():
        # How often to log and save, and where to compute, do not change what is trained, nor do the thresholds.
        if name in ("device", "loggers", "log_every", "checkpoint_every", "inference_l0"):
            continue
        if value is None and name in ("k", "l1"):  # not used by this kind; earlier versions recorded their defaults
            continue
        theirs_value = before.get(name, defaults.get(name))  # a setting that did not exist yet had its default
        if theirs_value != value:
            raise RunError(
                f"{folder} was started with {name} {theirs_value}, not {value}; give the same, or another --out"
            )


def _read(results: Sequence[StepResult], figure: str) -> list[float]:
    """One figure of each step, which waits for the device."""
    found: list[float] = torch.stack([getattr(one, figure) for one in results]).tolist()
    return found


def _remove_folder(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves a leftover, never a checkpoint without some of its files."""
    doomed = path.with_name(f".{path.name}.tmp")
    path.rename(doomed)
    remove_leftovers(path.parent)


@contextmanager
def _matmul_precision(precision: Literal["float32", "bfloat16"]) -> Iterator[None]:
    """bfloat16 lets torch and our kernels multiply in it, with float32 sums and weights, where the hardware can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _ctrl_c() -> Iterator[Any]:
    """Ctrl-C is noted and looked at between two steps, so that no step is cut in half."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event.is_set
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def describe_run(folder: str | Path) -> dict[str, Any]:
    """What a run folder holds, for `msae info`: settings, store, and how far it came."""
    run = Run.open(folder)
    config = run.settings
    if not config:
        known = {key: value for key, value in to_mapping(run.sae.config).items() if value is not None}
        return {"run": str(folder), "state": "an SAE that was not trained here", **known}
    is_finished = run.folder is not None and (run.folder / "sae.json").exists()
    active = read_config(run.folder).inference_l0 if run.folder is not None and is_finished else None
    began = run.checkpoints[-1].name if run.checkpoints else "the start"
    return {
        "run": str(folder),
        "state": "finished" if is_finished else f"interrupted at {began}",
        "store": [one["store"] for one in config["stores"]] if "stores" in config else config["store"],
        "n_rows": config["n_rows"],
        "d_in": config["d_in"],
        "mean_active_latents": active,
        **{key: value for key, value in config["train"].items() if value not in (None, [])},
    }
