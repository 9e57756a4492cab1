"""`train`: a store of embeddings becomes an SAE in a run folder, resumable to the byte."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msae import activations, losses
from msae.config import from_mapping, read_toml, to_mapping
from msae.errors import ConfigError, Interrupted, RunError, TrainingError
from msae.files import atomic_folder, read_json, remove_leftovers, write_json
from msae.loggers import LoggerName, Loggers
from msae.losses import Weighting
from msae.progress import progress
from msae.sae import SAE, Kind, SAEConfig, normalize_rows_, remove_radial_gradient
from msae.standardize import MODALITIES, Modality, Standardizer, fit_statistics
from msae.store import EmbeddingStore, as_store

Recipe = Literal["default", "poster"]
SCHEMA_VERSION = 1
DIVERGED = 1e4
"""A loss above this, in units of the variance of standardised embeddings (about 1), is a diverged one."""
JUMPRELU_BANDWIDTH = 0.1
"""Width of the straight-through window, in units of pre-activations, which are of order 1 in this space."""
THRESHOLD_PACE = 20.0
"""Learning rate of log thresholds over that of the weights: they must travel a factor of ten or more."""
LEARNING_RATES: Mapping[Recipe, Mapping[Kind, float]] = {
    "poster": {"matryoshka": 1e-4, "topk": 5e-4, "batchtopk": 5e-4, "relu": 5e-5, "jumprelu": 5e-4},
    "default": {"matryoshka": 5e-4, "topk": 5e-4, "batchtopk": 5e-4, "relu": 5e-4, "jumprelu": 5e-4},
}


@dataclass(frozen=True)
class TrainSettings:
    """What to train and how. A None is filled in by the recipe when training starts."""

    kind: Kind = "matryoshka"
    weighting: Weighting = "uniform"
    """Of a Matryoshka SAE's levels: `reverse` makes the smallest level weigh most."""
    levels: tuple[int, ...] | None = None
    """Latents kept at each level; None doubles from 64 up to d_sae."""
    weights: tuple[float, ...] | None = None
    """One weight per level, instead of `weighting`."""
    k: int = 64
    """Active latents of topk; mean active latents of batchtopk and jumprelu."""
    l1: float = 0.003
    """Weight of the L1 penalty of kind relu."""
    expansion: float = 8
    """d_sae over d_in."""
    d_sae: int | None = None
    """Number of latents, instead of `expansion`."""
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    modality: Modality = "image"
    recipe: Recipe = "default"
    """`poster` is the paper's recipe to the letter."""
    warmup: float | None = None
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    max_grad_norm: float = 1.0
    soft_cap: float | None = None
    auxiliary: float = 0.0
    """Weight of the loss that revives dead latents; 1/32 is usual, 0 is off."""
    dead_after: int = 100_000
    """A latent is dead once it has not fired for this many rows; the auxiliary loss acts on those."""
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; None makes one every minute."""
    loggers: tuple[LoggerName, ...] = ()
    """Beside metrics.jsonl."""
    device: str = "auto"

    def __post_init__(self) -> None:
        positive = ("expansion", "d_sae", "epochs", "batch_size", "lr", "k", "max_grad_norm", "log_every", "dead_after")
        for name in (*positive, "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is not positive; give a positive number")
        for name in ("l1", "auxiliary"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)} is negative; give 0 to turn it off")
        for name in ("decay", "warmup"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ConfigError(f"--{name} {getattr(self, name)} is a share of the steps; give a number in 0 to 1")
        if self.levels is not None:
            losses.check_levels(self.levels, self.weights or (1.0,) * len(self.levels))
        if self.weights is not None and self.levels is None:
            raise ConfigError("--weights without --levels; give one weight for each of the levels you name")
        if self.kind != "matryoshka" and (self.levels or self.weights or self.weighting != "uniform"):
            raise ConfigError(
                f"--levels, --weights and --weighting belong to matryoshka; leave them out for {self.kind}"
            )

    def resolve(self, store: EmbeddingStore) -> TrainSettings:
        """A copy with every None filled in for this store."""
        poster = self.recipe == "poster"
        d_sae = self.d_sae or round(self.expansion * store.d_in)
        levels = self.levels or losses.default_levels(d_sae, smallest=min(64, max(1, d_sae // 8)))
        weights = self.weights or losses.level_weights(self.weighting, len(levels))
        nested = self.kind == "matryoshka"
        return dataclasses.replace(
            self,
            d_sae=d_sae,
            levels=levels if nested else None,
            weights=weights if nested else None,
            epochs=self.epochs or (20 if poster and self.expansion >= 32 else 30),
            batch_size=min(self.batch_size or (4096 if poster else _batch_size_for(len(store))), len(store)),
            lr=self.lr or LEARNING_RATES[self.recipe][self.kind],
            warmup=self.warmup if self.warmup is not None else (0.0 if poster else 0.05),
            device=_device(self.device),
        )


class StepResult(NamedTuple):
    """Figures of one step, still on the device so that reading them does not stall it."""

    loss: Float[Tensor, ""]
    """What was minimised, in units of the variance of standardised embeddings."""
    reconstruction: Float[Tensor, ""]
    """Mean squared error per element at the finest level."""
    l0: Float[Tensor, ""]
    """Mean count of active latents per row."""
    fired: Bool[Tensor, " d_sae"]
    """Latents that were active in at least one row."""
    grad_norm: Float[Tensor, ""]
    """Before clipping."""


class Objective(NamedTuple):
    """The loss of a batch, and what the forward pass showed on the way."""

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]


def train(
    store: EmbeddingStore | str | Path,
    *,
    out: str | Path,
    resume: bool = False,
    config: str | Path | None = None,
    settings: TrainSettings | None = None,
    **options: Any,
) -> SAE:
    """Train an SAE on the rows of a store and write it into the folder `out`.

    Args:
        resume: Go on with an interrupted run in `out`, or start one where there is none.
        config: A TOML file of settings; `options` win over it.
        settings: All settings at once, instead of `config` and `options`.
        options: Fields of `TrainSettings`.

    Raises:
        ConfigError: A setting is unknown or contradicts another.
        RunError: `out` already holds a run and `resume` is not given, or that run had other settings.
        TrainingError: The loss diverged; the last good checkpoint is kept.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    if settings is None:
        values = {**(read_toml(Path(config)) if config else {}), **options}
        settings = from_mapping(TrainSettings, values, where=str(config) if config else "train")
    store = as_store(store, settings.modality)
    return _Run(Path(out), store, settings.resolve(store)).train(resume=resume)


def objective_of(
    settings: TrainSettings, sae: SAE, x: Float[Tensor, "n d_in"], dead: Bool[Tensor, " d_sae"]
) -> Objective:
    """The loss that `settings` ask for, on a batch of standardised embeddings."""
    h = sae.pre_activations(x)
    penalty = x.new_zeros(())
    match settings.kind:
        case "matryoshka" | "relu":
            z = activations.relu(h)
        case "topk":
            z = activations.topk(h, settings.k)
        case "batchtopk":
            z = activations.batchtopk(h, settings.k)
            _track_threshold(sae, z)
        case "jumprelu":
            assert sae.log_threshold is not None
            threshold = sae.log_threshold.exp()
            z = activations.jumprelu(h.relu(), threshold, bandwidth=JUMPRELU_BANDWIDTH)
            active = activations.count_above(h, threshold, bandwidth=JUMPRELU_BANDWIDTH)
            penalty = losses.l0_target_penalty(active, settings.k)
    if settings.kind == "relu":
        penalty = settings.l1 * losses.l1_penalty(x, z)
    if settings.soft_cap is not None:
        z = activations.soft_cap(z, settings.soft_cap)
    x_hat = sae.reconstruct(z)
    if settings.kind == "matryoshka":
        assert settings.levels is not None and settings.weights is not None
        loss = losses.matryoshka_loss(
            x, h, sae.W_dec, sae.b_dec, levels=settings.levels, weights=settings.weights, soft_cap=settings.soft_cap
        )
    else:
        loss = losses.reconstruction_loss(x, x_hat) + penalty
    if settings.auxiliary:
        loss = loss + settings.auxiliary * losses.auxiliary_loss(x - x_hat, h, sae.W_dec, dead, k=sae.d_in // 2)
    active_now = z.detach() > 0
    with torch.no_grad():
        return Objective(loss, losses.reconstruction_loss(x, x_hat), active_now.sum() / len(x), active_now.any(0))


def train_step(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    dead: Bool[Tensor, " d_sae"],
) -> StepResult:
    """Update `sae` once. The order of these lines is part of the method."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        objective = objective_of(settings, sae, x, dead)
    optimizer.zero_grad(set_to_none=True)
    objective.loss.backward()  # type: ignore[no-untyped-call]
    remove_radial_gradient(sae.W_dec)  # Adam must not spend its step on row length
    grad_norm = nn.utils.clip_grad_norm_(sae.parameters(), settings.max_grad_norm)
    optimizer.step()
    normalize_rows_(sae.W_dec)  # every step ends with unit-norm decoder rows
    return StepResult(objective.loss.detach(), objective.reconstruction, objective.l0, objective.fired, grad_norm)


def learning_rate(settings: TrainSettings, step: int, n_steps: int) -> float:
    """The rate of step `step` (from 0): a linear rise, a plateau, a linear fall towards 0."""
    assert settings.lr is not None and settings.warmup is not None
    rise = (step + 1) / max(1.0, settings.warmup * n_steps)
    fall = (n_steps - step) / max(1.0, settings.decay * n_steps)
    return settings.lr * min(1.0, rise, fall)


def shuffled_batches(n_rows: int, batch_size: int, *, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Row numbers of each batch of an epoch, a function of seed and epoch alone; a short last batch is left out.

    Each batch is sorted, so that a memory map is read in one direction; the sum over a batch has no order.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n_rows)
    whole = order[: n_rows // batch_size * batch_size].reshape(-1, batch_size)
    return list(np.sort(whole, axis=1))


@dataclass
class _State:
    """All that changes during training: what a checkpoint holds."""

    sae: SAE
    optimizer: torch.optim.AdamW
    rows_since_fired: Tensor
    step: int = 0


class _Run:
    """A run folder while it is being trained."""

    def __init__(self, folder: Path, store: EmbeddingStore, settings: TrainSettings) -> None:
        assert settings.batch_size is not None and settings.epochs is not None and settings.d_sae is not None
        self.folder, self.store, self.settings = folder, store, settings
        self.sae_config = SAEConfig(
            d_in=store.d_in,
            d_sae=settings.d_sae,
            kind=settings.kind,
            k=settings.k if settings.kind in ("topk", "batchtopk", "jumprelu") else None,
            levels=settings.levels,
            soft_cap=settings.soft_cap,
            encoder=store.encoder,
            encoder_revision=store.encoder_revision,
        )
        self.steps_per_epoch = len(store) // settings.batch_size
        self.n_steps = self.steps_per_epoch * settings.epochs

    def train(self, *, resume: bool) -> SAE:
        """Run every step that is still to do, and write the SAE."""
        is_begun = self._is_begun(resume=resume)
        if (self.folder / "sae.json").exists():
            return SAE.load(self.folder)
        state = self._latest_checkpoint() or self._start()
        if not is_begun:  # only now: a store that cannot be trained on leaves no folder behind
            write_json(self.folder / "config.json", self._identity(), schema_version=SCHEMA_VERSION)
        loggers = Loggers(
            self.settings.loggers, self.folder, settings=to_mapping(self.settings), resume_step=state.step
        )
        try:
            self._loop(state, loggers)
        finally:
            loggers.close()
        state.sae.save(self.folder)
        for checkpoint in self._checkpoints():
            _remove_folder(checkpoint)
        return state.sae.cpu().eval()

    def _loop(self, state: _State, loggers: Loggers) -> None:
        settings, device = self.settings, torch.device(self.settings.device)
        recent: list[StepResult] = []
        saved_at = time.monotonic()
        with progress("training", total=self.n_steps, unit="steps", start=state.step) as advance, _ctrl_c() as pressed:
            for rows in itertools.islice(self._batches(state.step), self.n_steps - state.step):
                raw = torch.from_numpy(self.store.take(rows, settings.modality)).to(device)
                x = state.sae.standardizer.apply(raw, settings.modality)
                for group in state.optimizer.param_groups:
                    group["lr"] = group["pace"] * learning_rate(settings, state.step, self.n_steps)
                recent.append(
                    train_step(state.sae, x, state.optimizer, settings, state.rows_since_fired >= settings.dead_after)
                )
                state.rows_since_fired = (state.rows_since_fired + len(x)).masked_fill(recent[-1].fired, 0)
                state.step += 1
                advance(1)
                is_last = state.step == self.n_steps
                is_due = (
                    state.step % settings.checkpoint_every == 0
                    if settings.checkpoint_every
                    else time.monotonic() - saved_at > 60
                )
                if state.step % settings.log_every == 0 or is_last or is_due or pressed():
                    self._refuse_divergence(recent, state.step)
                if state.step % settings.log_every == 0 or is_last:
                    loggers.log(state.step, self._figures(state, recent, x))
                    recent.clear()
                if (is_due or pressed()) and not is_last:
                    self._save_checkpoint(state)
                    saved_at = time.monotonic()
                if pressed() and not is_last:
                    raise Interrupted(
                        f"interrupted at step {state.step} of {self.n_steps}, which is saved; "
                        f"to go on, type the same command with --resume"
                    )

    def _figures(self, state: _State, recent: list[StepResult], x: Tensor) -> dict[str, float]:
        """One line of metrics.jsonl; the evaluation figures are of the current batch, in the trained mode."""
        with torch.no_grad():
            z = state.sae.activate(state.sae.pre_activations(x))
            x_hat = state.sae.reconstruct(z)
        return {
            "epoch": state.step / self.steps_per_epoch,
            "lr": float(state.optimizer.param_groups[0]["lr"]),
            "loss": float(torch.stack([step.loss for step in recent]).mean()),
            "reconstruction": float(torch.stack([step.reconstruction for step in recent]).mean()),
            "grad_norm": float(torch.stack([step.grad_norm for step in recent]).mean()),
            "l0": float(recent[-1].l0),
            "sparsity": float((z == 0).float().mean()),
            "fvu": float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()),
            "dead": int((state.rows_since_fired >= len(self.store)).sum()),
        }

    def _refuse_divergence(self, recent: list[StepResult], step: int) -> None:
        if not recent:
            return
        values = torch.stack([result.loss + 0 * result.grad_norm for result in recent])
        bad = ~(values < DIVERGED)
        if bool(bad.any()):
            first = step - len(recent) + int(bad.nonzero()[0]) + 1
            kept = self._checkpoints()
            saved = f"{kept[-1]} is kept" if kept else "no checkpoint had been made"
            raise TrainingError(
                f"the loss diverged to {float(values[first - 1 - step + len(recent)]):.3g} at step {first} of "
                f"{self.n_steps} ({saved}); start again in another --out with a lower --lr than {self.settings.lr:g}"
            )

    def _batches(self, first_step: int) -> Iterator[NDArray[np.int64]]:
        assert self.settings.batch_size is not None
        for epoch in itertools.count(first_step // self.steps_per_epoch):
            batches = shuffled_batches(len(self.store), self.settings.batch_size, seed=self.settings.seed, epoch=epoch)
            yield from batches[max(0, first_step - epoch * self.steps_per_epoch) :]

    def _identity(self) -> dict[str, Any]:
        """What makes this run this run: goes into config.json."""
        return {
            "store": str(self.store.path.resolve()),
            "store_fingerprint": self.store.fingerprint,
            "n_rows": len(self.store),
            "d_in": self.store.d_in,
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
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / "checkpoints")
        return True

    def _start(self) -> _State:
        standardizer = Standardizer()
        for modality in MODALITIES:
            if modality in self.store.modalities:
                standardizer = standardizer.with_statistics(modality, fit_statistics(partial(self._rows, modality)))
        sae = SAE(self.sae_config, standardizer, seed=self.settings.seed)
        return self._state_of(sae)

    def _rows(self, modality: Modality) -> Iterator[Tensor]:
        return (torch.from_numpy(batch) for batch in self.store.batches(modality, 8192))

    def _state_of(self, sae: SAE) -> _State:
        sae = sae.to(self.settings.device).train()
        weights = [p for p in sae.parameters() if p is not sae.log_threshold]
        groups: list[dict[str, Any]] = [{"params": weights, "pace": 1.0}]
        if sae.log_threshold is not None:
            groups.append({"params": [sae.log_threshold], "pace": THRESHOLD_PACE})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=6.25e-10, weight_decay=0.0, fused=True)
        return _State(sae, optimizer, torch.zeros(sae.d_sae, dtype=torch.int64, device=self.settings.device))

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def _save_checkpoint(self, state: _State) -> None:
        older = self._checkpoints()
        tensors = {"rows_since_fired": state.rows_since_fired}
        for name, parameter in state.sae.named_parameters():
            for key, value in state.optimizer.state[parameter].items():
                tensors[f"adamw.{name}.{key}"] = value
        path = self.folder / "checkpoints" / f"step-{state.step:06d}"
        if path.exists():
            return
        with atomic_folder(path) as temporary:
            state.sae.save(temporary)
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / "state.safetensors"
            )
            write_json(temporary / "state.json", {"step": state.step}, schema_version=SCHEMA_VERSION)
        for checkpoint in older:
            _remove_folder(checkpoint)

    def _latest_checkpoint(self) -> _State | None:
        found = self._checkpoints()
        if not found:
            return None
        path = found[-1]
        state = self._state_of(SAE.load(path))
        try:
            tensors = load_file(path / "state.safetensors", device=self.settings.device)
            step = read_json(path / "state.json", schema_version=SCHEMA_VERSION, error=RunError)["step"]
            for name, parameter in state.sae.named_parameters():
                state.optimizer.state[parameter] = {
                    key: tensors[f"adamw.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }
            state.rows_since_fired = tensors["rows_since_fired"]
        except (SafetensorError, OSError, KeyError) as err:
            raise RunError(f"{path} is damaged ({err}); delete that folder and train again with --resume") from err
        state.step = int(step)
        return state


def _track_threshold(sae: SAE, z: Tensor) -> None:
    """Move BatchTopK's running threshold towards the smallest activation that this batch kept."""
    assert sae.threshold is not None
    with torch.no_grad():
        smallest = torch.where(z > 0, z, torch.inf).min()
        smallest = torch.where(smallest.isfinite(), smallest, sae.threshold).to(sae.threshold.dtype)
        sae.threshold.copy_(torch.where(sae.threshold > 0, sae.threshold.lerp(smallest, 0.01), smallest))


def _refuse_other_settings(folder: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if theirs.get("store_fingerprint") != mine["store_fingerprint"]:
        raise RunError(
            f"{folder} was trained on another store ({theirs.get('store')}); give that one, or another --out"
        )
    before = theirs.get("train", {})
    for name, value in mine["train"].items():
        # How often to log and save, and where to compute, do not change what is computed.
        if name in ("device", "loggers", "log_every", "checkpoint_every"):
            continue
        if before.get(name) != value:
            raise RunError(
                f"{folder} was started with {name} {before.get(name)}, not {value}; give the same, or another --out"
            )


def _batch_size_for(n_rows: int) -> int:
    """The largest power of two up to 4096 that still gives an epoch about 200 steps, and at least 64."""
    return max(64, min(4096, 1 << max(0, (n_rows // 200).bit_length() - 1)))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(f"device {name} cannot be used here ({str(err).splitlines()[0]}); give --device cpu") from err
    return name


def _remove_folder(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves a leftover, never a checkpoint without some of its files."""
    doomed = path.with_name(f".{path.name}.tmp")
    path.rename(doomed)
    remove_leftovers(path.parent)


@contextmanager
def _ctrl_c() -> Iterator[Any]:
    """Turns Ctrl-C into a question to ask between two steps, so that no step is cut in half."""
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
    folder = Path(folder)
    config = read_json(folder / "config.json", schema_version=SCHEMA_VERSION, error=RunError)
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    is_finished = (folder / "sae.json").exists()
    state = "finished" if is_finished else f"interrupted at {checkpoints[-1].name if checkpoints else 'the start'}"
    return {
        "run": str(folder),
        "state": state,
        "store": config["store"],
        "n_rows": config["n_rows"],
        "d_in": config["d_in"],
        **{key: value for key, value in config["train"].items() if value not in (None, [])},
    }
