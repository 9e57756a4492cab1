"""The passes over rows: reconstruction and probe figures, CKNNA, dead latents on the training store."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from msae.base.errors import RunError
from msae.base.progress import progress
from msae.data.store import EmbeddingStore, as_store
from msae.measure import metrics
from msae.measure.evaluate.probes import ProbeTest
from msae.measure.evaluate.record import RecoveryPoint, json_number
from msae.measure.evaluate.subject import NoTrainingStoreError, Options, StoreLike, Subject, training_store
from msae.measure.probe import Probe
from msae.sae import activations
from msae.sae.standardize import Modality

CKNNA_ROWS = 10_000
"""Rows of one CKNNA batch, as in the paper: the value depends on it."""
CKNNA_BATCHES = 10
"""At most so many batches: between them the value differs in the third decimal."""
CKNNA_NEIGHBORS = 10


class Scores:
    """The accumulators that one pass over the evaluation store feeds."""

    def __init__(self, subject: Subject, probe: Probe | None, options: Options) -> None:
        sae = subject.sae
        self._subject, self._options, self._probe = subject, options, probe
        self.firing = None if probe is None else metrics.ClassFiring(len(probe.classes), sae.d_sae)
        self._reconstruction = metrics.ReconstructionScore()
        self._fvu_authors = metrics.RunningMean()
        self.use = metrics.LatentUse(sae.d_sae)
        ks = metrics.recovery_ks(sae.d_sae)
        self._recovery = metrics.Recovery(ks, sae.W_dec, sae.b_dec) if options.recovery else None
        self._kl, self._agreement, self._before, self._after = (metrics.RunningMean() for _ in range(4))
        self._left_out = 0

    def update(self, raw: Float[Tensor, "n d_in"], targets: Int[Tensor, " n"] | None) -> None:
        sae, view = self._subject.sae, self._subject.view
        x = view.standardize(raw)
        z = view.activate(x)
        x_hat = sae.reconstruct(z)
        if not bool(torch.isfinite(x_hat).all()):
            raise RunError(
                f"{self._subject.name} reconstructs rows of the store as NaN or infinity; train again with a lower --lr"
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


def class_f1(subject: Subject, test: ProbeTest, scores: Scores) -> float:
    """`metrics.class_f1` of the rows that the probe was trained on and those that it is evaluated on."""
    assert scores.firing is not None
    train = metrics.ClassFiring(len(test.probe.classes), subject.sae.d_sae)
    view = subject.view.on(test.train)
    start = 0
    for z in view.activations(rows=test.train_rows, title=f"classes by the latents of {subject.name}"):
        train.update(z, test.train_targets[start : start + len(z)])
        start += len(z)
    return metrics.class_f1(train, scores.firing)


class _Cknna(NamedTuple):
    value: metrics.Summary
    at: dict[int, float]
    """By number of latents kept, for recovery."""
    note: str | None


def cknna_over_batches(subject: Subject, store: EmbeddingStore, options: Options) -> _Cknna:
    """CKNNA over random batches without common rows; a remainder smaller than a batch is left out."""
    n = len(store)
    if n <= CKNNA_NEIGHBORS:
        note = f"cknna is null: {n} rows are too few for {CKNNA_NEIGHBORS} neighbours"
        return _Cknna(metrics.Summary(math.nan, math.nan, 0), {}, note)
    size = min(n, CKNNA_ROWS)
    n_batches = max(1, min(n // size, CKNNA_BATCHES))
    chosen = np.random.default_rng(options.seed).permutation(n)[: size * n_batches].reshape(n_batches, size)
    mean, at = metrics.RunningMean(), {}
    with progress(f"CKNNA of {subject.name}", total=n_batches, unit="batches") as advance:
        for number, rows in enumerate(np.sort(chosen, axis=1)):
            x, z = _encode_rows(subject, rows)
            near_x = metrics.nearest_neighbors(x, CKNNA_NEIGHBORS)
            value = metrics.cknna_of(near_x, metrics.nearest_neighbors(z, CKNNA_NEIGHBORS))
            mean.update(torch.tensor([value], dtype=torch.float64))
            if options.recovery and number == 0:
                at = _cknna_by_k(near_x, z, value)
            advance(1)
    return _Cknna(mean.summary(), at, None)


def _encode_rows(subject: Subject, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    xs = list(subject.view.rows(rows))
    return torch.cat(xs), torch.cat([subject.view.activate(x) for x in xs])


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
    subject: Subject, on: EmbeddingStore, given: StoreLike | None, dead: int, options: Options
) -> tuple[int | None, str | None]:
    """Dead latents on the training store, or why that is unknown."""
    modality: Modality = subject.view.run.settings.get("modality", options.modality)
    try:
        store = training_store(subject) if given is None else as_store(given, modality)
    except NoTrainingStoreError as err:
        return None, f"dead_train is null: {err}"
    if (store.fingerprint, modality) == (on.fingerprint, options.modality):
        return dead, None
    use = metrics.LatentUse(subject.sae.d_sae)
    for z in subject.view.on(store, modality).activations(title=f"dead latents of {subject.name} in training"):
        use.update(z)
    return use.dead(), None
