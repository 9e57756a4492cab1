"""The probes of an evaluation: trained once for all runs that share training rows and standardisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from msae.base.errors import ConfigError, StoreError
from msae.data.store import EmbeddingStore
from msae.measure.evaluate.subject import NoTrainingStoreError, Options, Subject, training_store
from msae.measure.probe import Probe, fit_probe
from msae.sae.model import check_fit


class Probes:
    """The probe of each run; runs that share training rows and standardisation share it."""

    def __init__(self, options: Options, store: EmbeddingStore | None) -> None:
        self._options, self._store = options, store
        self._known: dict[tuple[Any, ...], Probe] = {}

    def of(self, subject: Subject) -> Probe:
        options = self._options
        assert options.labels is not None
        store = self.store_of(subject)
        labels = store.column(options.labels)
        statistics = subject.standardizer.statistics[options.modality]
        key = (store.path, store.fingerprint, statistics.mean.cpu().numpy().tobytes(), statistics.scale)
        if key not in self._known:

            def rows(numbers: Int[np.ndarray, " m"]) -> Float[Tensor, "m d_in"]:
                return subject.standardize(store.take(numbers, options.modality), options.modality)

            with torch.enable_grad():
                probe = fit_probe(rows, labels, seed=options.seed)
            self._known[key] = probe.to(options.device)
        return self._known[key]

    def store_of(self, subject: Subject) -> EmbeddingStore:
        """The store that the probe of a run is trained on."""
        if self._store is not None:
            check_fit(subject.sae, self._store, run=subject.run)
            return self._store
        wanted = f"--labels {self._options.labels} needs original embeddings to train the probe on"
        try:
            store = training_store(subject)
        except NoTrainingStoreError as err:
            raise ConfigError(f"{wanted}, but {err}; give --probe-train STORE") from err
        if self._options.labels not in store.columns or self._options.modality not in store.modalities:
            raise ConfigError(
                f"{wanted}, but the training store {store.path} has no such column of {self._options.modality} rows; "
                f"give --probe-train STORE"
            )
        return store


def targets_of(probe: Probe, truth: list[Any], store: EmbeddingStore, options: Options) -> Int[Tensor, " n"]:
    targets = probe.encode(truth)
    if not bool((targets >= 0).any()):
        raise StoreError(
            f"no row of {store.path} has a {options.labels} that occurs where the probe is trained "
            f"({', '.join(probe.classes[:3])} …); give --probe-train a store with the same classes"
        )
    return targets
