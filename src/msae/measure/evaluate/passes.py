"""The passes over rows: reconstruction and probe figures, CKNNA, dead latents on the training store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from msae.base.errors import ConfigError, RunError, StoreError
from msae.base.progress import progress
from msae.data.rows import labelled_rows
from msae.data.sampled import sample_rows
from msae.data.store import EmbeddingStore, as_store
from msae.measure import metrics
from msae.measure.evaluate.record import RecoveryPoint, json_number
from msae.measure.probe import Probe, fit_probe, hold_out
from msae.sae import activations
from msae.sae.model import Inference, check_fit
from msae.sae.run import NoTrainingStoreError, Run, RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

StoreLike = EmbeddingStore | str | Path


@dataclass(frozen=True)
class Options:
    modality: Modality
    inference: Inference
    k: int | None
    labels: str | None
    recovery: bool
    batch_size: int | None
    device: str
    seed: int
    max_rows: int | None = None

    def drawn(self, store: EmbeddingStore) -> EmbeddingStore:
        """The rows of a store that are read."""
        return sample_rows(store, self.max_rows, seed=self.seed)

    def __post_init__(self) -> None:
        if self.inference not in get_args(Inference):
            raise ConfigError(f"inference {self.inference!r} is unknown; give relu, trained, topk or threshold")
        if self.inference == "topk" and (self.k is None or self.k < 1):
            raise ConfigError(f"inference topk with k {self.k}; give a positive --k, for example --k 64")
        if self.inference != "topk" and self.k is not None:
            raise ConfigError(f"--k {self.k} has no meaning for inference {self.inference}; add --inference topk")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size} is not positive; give for example 4096")


def open_view(sae: RunLike, store: EmbeddingStore, options: Options) -> View:
    """The rows of the evaluation store through an SAE, on the device."""
    run = Run.open(sae)
    run.check_fit(store)
    d_sae = run.sae.d_sae
    if options.k is not None and options.k > d_sae:
        raise ConfigError(f"--k {options.k} is above the {d_sae} latents of {run.name}; give a smaller --k")
    rows_at_once = options.batch_size or max(64, min(8192, 2**24 // d_sae))
    return View(
        run, store, options.modality, inference=options.inference, k=options.k, block_rows=rows_at_once,
        device=options.device,
    )  # fmt: skip


class ProbeTest(NamedTuple):
    """A probe, and the rows on which it is evaluated."""

    probe: Probe
    targets: Int[Tensor, " n"]
    """The class of each row of the evaluation store; -1 for rows that are left out."""
    train: EmbeddingStore
    """What the probe was trained on."""
    train_rows: Int64[np.ndarray, " m"]
    """The rows of `train` that it was trained on."""
    train_targets: Int[Tensor, " m"]
    """Their classes."""
    notes: tuple[str, ...]
    """Which rows are left out."""


class Probes:
    """The probe of each run; runs that share training rows and standardisation share it."""

    def __init__(self, options: Options, store: EmbeddingStore | None, on: EmbeddingStore) -> None:
        """`store` is where the probe is trained; None takes each run's training store. `on` is evaluated."""
        assert options.labels is not None
        self._options, self._store, self._on, self._column = options, store, on, options.labels
        self._truth = on.labels(options.labels, option="--labels")
        self._known: dict[tuple[Any, ...], ProbeTest] = {}

    def of(self, view: View) -> ProbeTest:
        options, store = self._options, self.store_of(view)
        statistics = view.standardizer.statistics[options.modality]
        key = (store.path, store.fingerprint, statistics.mean.cpu().numpy().tobytes(), statistics.scale)
        if key not in self._known:
            self._known[key] = self._made(view, store)
        return self._known[key]

    def _made(self, view: View, store: EmbeddingStore) -> ProbeTest:
        options = self._options
        labels = store.labels(self._column, option="--labels")
        held = hold_out(
            store, self._on, options.modality,
            train_rows=labelled_rows(labels), on_rows=labelled_rows(self._truth), seed=options.seed,
        )  # fmt: skip

        def rows(numbers: Int[np.ndarray, " m"]) -> Float[Tensor, "m d_in"]:
            raw = torch.from_numpy(store.take(held.train[numbers], options.modality))
            return view.standardize(raw.to(view.device))

        known = [labels[row] for row in held.train]
        with torch.enable_grad():
            probe = fit_probe(rows, known, seed=options.seed).to(options.device)
        targets = torch.full((len(self._truth),), -1)
        targets[torch.from_numpy(held.on)] = probe.encode([self._truth[row] for row in held.on])
        if not bool((targets >= 0).any()):
            raise StoreError(
                f"no row of {self._on.address} has a {self._column} that occurs where the probe is trained "
                f"({', '.join(probe.classes[:3])} …); give --probe-train a store with the same classes"
            )
        notes = [self._without_label(self._on, self._truth)]
        if store.path != self._on.path:
            notes.append(self._without_label(store, labels))
        unknown = int((targets[torch.from_numpy(held.on)] < 0).sum())
        if unknown:
            notes.append(f"{unknown:,} rows have a {self._column} that the probe was not trained on; they are left out")
        train_targets = probe.encode(known)
        return ProbeTest(probe, targets, store, held.train, train_targets, tuple(filter(None, [held.note, *notes])))

    def _without_label(self, store: EmbeddingStore, labels: list[str | None]) -> str | None:
        n = labels.count(None)
        return (
            f"{n:,} of {len(labels):,} rows of {store.address} have no {self._column} and are left out" if n else None
        )

    def store_of(self, view: View) -> EmbeddingStore:
        """The store that the probe of a run is trained on."""
        if self._store is not None:
            check_fit(view.sae, self._store, run=view.run.given)
            return self._options.drawn(self._store)
        wanted = f"--labels {self._column} needs original embeddings to train the probe on"
        try:
            store = view.run.training_store(self._options.modality)
        except NoTrainingStoreError as err:
            raise ConfigError(f"{wanted}, but {err}; give --probe-train STORE") from err
        if self._column not in store.columns or self._options.modality not in store.modalities:
            raise ConfigError(
                f"{wanted}, but the training store {store.address} has no such column of "
                f"{self._options.modality} rows; give --probe-train STORE"
            )
        return self._options.drawn(store)


CKNNA_ROWS = 10_000
"""Rows of one CKNNA batch, as in the paper: the value depends on it."""
CKNNA_BATCHES = 10
"""At most so many batches: between them the value differs in the third decimal."""
CKNNA_NEIGHBORS = 10
MANY_ROWS = 10_000_000
"""From here on rows are drawn without a permutation of all, which would take 8 bytes a row."""


class Scores:
    """The accumulators that one pass over the evaluation store feeds."""

    def __init__(self, view: View, probe: Probe | None, options: Options) -> None:
        sae = view.sae
        self._view, self._options, self._probe = view, options, probe
        self.firing = None if probe is None else metrics.ClassFiring(len(probe.classes), sae.d_sae)
        self._reconstruction = metrics.ReconstructionScore()
        self._fvu_authors = metrics.RunningMean()
        self.use = metrics.LatentUse(sae.d_sae)
        ks = metrics.recovery_ks(sae.d_sae)
        own = sae.scale_at(sae.active_latents(view.inference, view.k))
        scales = [sae.scale_at(float(k)) / own for k in ks]
        self._recovery = metrics.Recovery(ks, sae.W_dec, sae.b_dec, scales=scales) if options.recovery else None
        self._kl, self._agreement, self._before, self._after = (metrics.RunningMean() for _ in range(4))
        self._left_out = 0

    def update(self, raw: Float[Tensor, "n d_in"], targets: Int[Tensor, " n"] | None) -> None:
        sae, view = self._view.sae, self._view
        x = view.standardize(raw)
        z = view.activate(x)
        x_hat = sae.reconstruct(z)
        if not bool(torch.isfinite(x_hat).all()):
            raise RunError(
                f"{view.run.name} reconstructs rows of the store as NaN or infinity; train again with a lower --lr"
            )
        self.use.update(z)
        self._reconstruction.update(x, x_hat)
        raw_hat = view.standardizer.invert(x_hat, view.modality)
        self._fvu_authors.update(metrics.fvu_authors(raw, raw_hat))
        if self._recovery is not None:
            self._recovery.update(x, z)
        if targets is not None:
            self._update_probe(x, x_hat, targets)
            assert self.firing is not None
            self.firing.update(z, targets)

    def _update_probe(self, x: Tensor, x_hat: Tensor, targets: Tensor) -> None:
        assert self._probe is not None
        known = targets >= 0
        self._left_out += int((~known).sum())
        here = known.to(x.device)
        logits, logits_hat = self._probe.logits(x[here]), self._probe.logits(x_hat[here])
        labels = targets[known].to(x.device)
        self._kl.update(metrics.probe_kl(logits.log_softmax(1), logits_hat.log_softmax(1)))
        self._agreement.update(metrics.probe_agreement(logits, logits_hat).double())
        self._before.update(metrics.probe_accuracy(logits, labels).double())
        self._after.update(metrics.probe_accuracy(logits_hat, labels).double())

    def figures(self) -> dict[str, Any]:
        score, use = self._reconstruction, self.use
        sparsity, cosine, fvu_per_sample = use.sparsity(), score.cosine(), score.fvu_per_sample()
        figures: dict[str, Any] = {
            "sparsity": sparsity.mean,
            "sparsity_std": sparsity.std,
            "l0": use.l0(),
            "fvu": json_number(score.fvu()),
            "fvu_per_sample": json_number(fvu_per_sample.mean),
            "fvu_per_sample_std": json_number(fvu_per_sample.std),
            "fvu_authors": json_number(self._fvu_authors.summary().mean),
            "cosine": cosine.mean,
            "cosine_std": cosine.std,
            "mae": json_number(score.mae()),
            "dead": use.dead(),
        }
        if self._probe is not None:
            kl = self._kl.summary()
            figures |= {
                "probe_kl": kl.mean,
                "probe_kl_std": kl.std,
                "probe_agreement": self._agreement.summary().mean,
                "probe_accuracy": self._before.summary().mean,
                "probe_accuracy_reconstructed": self._after.summary().mean,
                "probe_n": kl.n,
                "probe_left_out": self._left_out,
                "probe_classes": len(self._probe.classes),
            }
        return figures

    def recovery_points(self, cknna_at: dict[int, float]) -> tuple[RecoveryPoint, ...] | None:
        if self._recovery is None:
            return None
        points = []
        for k in self._recovery.ks:
            score = self._recovery.score(k)
            points.append(
                RecoveryPoint(
                    k,
                    json_number(score.fvu()),
                    json_number(score.fvu_per_sample().mean),
                    json_number(score.cosine().mean),
                    cknna_at.get(k),
                    self._recovery.dead(k),
                )
            )
        return tuple(points)


def class_f1(view: View, test: ProbeTest, scores: Scores) -> float:
    """`metrics.class_f1` of the rows that the probe was trained on and those that it is evaluated on."""
    assert scores.firing is not None
    train = metrics.ClassFiring(len(test.probe.classes), view.sae.d_sae)
    start = 0
    for z in view.on(test.train).activations(rows=test.train_rows, title=f"classes by the latents of {view.run.name}"):
        train.update(z, test.train_targets[start : start + len(z)])
        start += len(z)
    return metrics.class_f1(train, scores.firing)


class _Cknna(NamedTuple):
    value: metrics.Summary
    at: dict[int, float]
    """By number of latents kept, for recovery."""
    note: str | None


def cknna_over_batches(view: View, store: EmbeddingStore, options: Options) -> _Cknna:
    """CKNNA over random batches without common rows; a remainder smaller than a batch is left out."""
    n = len(store)
    if n <= CKNNA_NEIGHBORS:
        note = f"CKNNA needs more than {CKNNA_NEIGHBORS} rows, and there are {n}"
        return _Cknna(metrics.Summary(math.nan, math.nan, 0), {}, note)
    size = min(n, CKNNA_ROWS)
    n_batches = max(1, min(n // size, CKNNA_BATCHES))
    rng, n_drawn = np.random.default_rng(options.seed), size * n_batches
    drawn = rng.permutation(n)[:n_drawn] if n < MANY_ROWS else rng.choice(n, n_drawn, replace=False)
    chosen = drawn.reshape(n_batches, size)
    mean, at = metrics.RunningMean(), {}
    with progress(f"CKNNA of {view.run.name}", total=n_batches, unit="batches") as advance:
        for number, rows in enumerate(np.sort(chosen, axis=1)):
            x, z = _encode_rows(view, rows)
            near_x = metrics.nearest_neighbors(x, CKNNA_NEIGHBORS)
            value = metrics.cknna_of(near_x, metrics.nearest_neighbors(z, CKNNA_NEIGHBORS))
            mean.update(torch.tensor([value], dtype=torch.float64))
            if options.recovery and number == 0:
                at = _cknna_by_k(near_x, z, value)
            advance(1)
    return _Cknna(mean.summary(), at, None)


def _encode_rows(view: View, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    xs = list(view.rows(rows))
    return torch.cat(xs), torch.cat([view.activate(x) for x in xs])


def _cknna_by_k(near_x: metrics.Neighbors, z: Tensor, value: float) -> dict[int, float]:
    most_active = int(metrics.l0(z).max())
    found = {}
    for k in metrics.recovery_ks(z.shape[1]):
        if k >= most_active:  # nothing is cut off any more
            found[k] = value
        else:
            near_z = metrics.nearest_neighbors(activations.topk(z, k), CKNNA_NEIGHBORS)
            found[k] = metrics.cknna_of(near_x, near_z)
    return found


def dead_in_training(
    view: View, on: EmbeddingStore, given: StoreLike | None, dead: int, options: Options
) -> tuple[int | None, str | None]:
    """Dead latents on the training store, or why that is unknown."""
    trained_on = view.run.settings.get("modality", options.modality)
    modality: Modality = options.modality if trained_on == "both" else trained_on
    try:
        stores = view.run.training_stores() if given is None else [as_store(given, modality)]
    except NoTrainingStoreError as err:
        return None, f"dead latents are not counted on training rows: {err}"
    stores = [options.drawn(store) for store in stores if modality in store.modalities]
    if [(store.fingerprint, modality) for store in stores] == [(on.fingerprint, options.modality)]:
        return dead, None
    use = metrics.LatentUse(view.sae.d_sae)
    for store in stores:
        for z in view.on(store, modality).activations(title=f"dead latents of {view.run.name} in training"):
            use.update(z)
    return use.dead(), None
