"""The probes of an evaluation: trained once for all runs that share training rows and standardisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from msae.base.errors import ConfigError, StoreError
from msae.data.store import EmbeddingStore
from msae.data.store.labels import labelled_rows
from msae.measure.evaluate.subject import NoTrainingStoreError, Options, Subject, training_store
from msae.measure.holdout import hold_out
from msae.measure.probe import Probe, fit_probe
from msae.sae.model import check_fit


class ProbeTest(NamedTuple):
    """A probe, and the rows on which it is evaluated."""

    probe: Probe
    targets: Int[Tensor, " n"]
    """The class of each row of the evaluation store; -1 for rows that are left out."""
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

    def of(self, subject: Subject) -> ProbeTest:
        options, store = self._options, self.store_of(subject)
        statistics = subject.standardizer.statistics[options.modality]
        key = (store.path, store.fingerprint, statistics.mean.cpu().numpy().tobytes(), statistics.scale)
        if key not in self._known:
            self._known[key] = self._made(subject, store)
        return self._known[key]

    def _made(self, subject: Subject, store: EmbeddingStore) -> ProbeTest:
        options = self._options
        labels = store.labels(self._column, option="--labels")
        held = hold_out(
            store, self._on, options.modality,
            train_rows=labelled_rows(labels), on_rows=labelled_rows(self._truth), seed=options.seed,
        )  # fmt: skip

        def rows(numbers: Int[np.ndarray, " m"]) -> Float[Tensor, "m d_in"]:
            return subject.standardize(store.take(held.train[numbers], options.modality), options.modality)

        with torch.enable_grad():
            probe = fit_probe(rows, [labels[row] for row in held.train], seed=options.seed).to(options.device)
        targets = torch.full((len(self._truth),), -1)
        targets[torch.from_numpy(held.on)] = probe.encode([self._truth[row] for row in held.on])
        if not bool((targets >= 0).any()):
            raise StoreError(
                f"no row of {self._on.path} has a {self._column} that occurs where the probe is trained "
                f"({', '.join(probe.classes[:3])} …); give --probe-train a store with the same classes"
            )
        notes = [self._without_label(self._on, self._truth)]
        if store.path != self._on.path:
            notes.append(self._without_label(store, labels))
        unknown = int((targets[torch.from_numpy(held.on)] < 0).sum())
        if unknown:
            notes.append(f"{unknown:,} rows have a {self._column} that the probe was not trained on; they are left out")
        return ProbeTest(probe, targets, tuple(filter(None, [held.note, *notes])))

    def _without_label(self, store: EmbeddingStore, labels: list[str | None]) -> str | None:
        n = labels.count(None)
        return f"{n:,} of {len(labels):,} rows of {store.path} have no {self._column} and are left out" if n else None

    def store_of(self, subject: Subject) -> EmbeddingStore:
        """The store that the probe of a run is trained on."""
        if self._store is not None:
            check_fit(subject.sae, self._store, run=subject.run)
            return self._store
        wanted = f"--labels {self._column} needs original embeddings to train the probe on"
        try:
            store = training_store(subject)
        except NoTrainingStoreError as err:
            raise ConfigError(f"{wanted}, but {err}; give --probe-train STORE") from err
        if self._column not in store.columns or self._options.modality not in store.modalities:
            raise ConfigError(
                f"{wanted}, but the training store {store.path} has no such column of {self._options.modality} rows; "
                f"give --probe-train STORE"
            )
        return store
