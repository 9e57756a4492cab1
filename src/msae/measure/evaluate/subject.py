"""What is evaluated, and how: options, an SAE with the modality's statistics, its run's training store."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from msae.base.errors import ConfigError, RunError, StoreError
from msae.base.files import read_json
from msae.data.store import EmbeddingStore, as_store
from msae.sae.model import SAE, Inference, check_fit
from msae.sae.standardize import Modality, fit_statistics

RUN_SCHEMA_VERSION = 1
"""Of a run's config.json, which training writes."""

SAELike = SAE | str | Path
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

    def __post_init__(self) -> None:
        if self.inference not in ("relu", "trained", "topk"):
            raise ConfigError(f"inference {self.inference!r} is unknown; give relu, trained or topk")
        if self.inference == "topk" and (self.k is None or self.k < 1):
            raise ConfigError(f"inference topk with k {self.k}; give a positive --k, for example --k 64")
        if self.inference != "topk" and self.k is not None:
            raise ConfigError(f"--k {self.k} has no meaning for inference {self.inference}; add --inference topk")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size} is not positive; give for example 4096")

    def rows_at_once(self, d_sae: int) -> int:
        return self.batch_size or max(64, min(8192, 2**24 // d_sae))


class Subject(NamedTuple):
    """An SAE under evaluation, on the device, with the statistics of the modality."""

    sae: SAE
    run: str | None
    trained_with: dict[str, Any]
    """The run's config.json; empty where there is none."""
    standardized_by: Literal["run", "evaluation store"]

    @property
    def name(self) -> str:
        return self.run or f"the {self.sae.config.kind} SAE"

    def standardize(self, raw: np.ndarray, modality: Modality) -> Float[Tensor, "n d_in"]:
        return self.sae.standardizer.apply(torch.from_numpy(raw).to(self.sae.W_dec.device), modality)

    def activate(self, x: Float[Tensor, "n d_in"], options: Options) -> Float[Tensor, "n d_sae"]:
        return self.sae.activate(self.sae.pre_activations(x), inference=options.inference, k=options.k)


def open_subject(sae: SAELike, store: EmbeddingStore, options: Options) -> Subject:
    run, settings = (None, {}) if isinstance(sae, SAE) else (str(sae), _run_settings(Path(sae)))
    sae = copy.deepcopy(sae) if isinstance(sae, SAE) else SAE.load(sae)  # the caller's stays as and where it is
    name = run or f"the {sae.config.kind} SAE"
    check_fit(sae, store, run=run)
    if options.k is not None and options.k > sae.d_sae:
        raise ConfigError(f"--k {options.k} is above the {sae.d_sae} latents of {name}; give a smaller --k")
    if options.modality in sae.standardizer:
        return Subject(sae.to(options.device).eval(), run, settings, "run")
    rows = options.rows_at_once(sae.d_in)
    statistics = fit_statistics(lambda: map(torch.from_numpy, store.batches(options.modality, rows)))
    sae.standardizer = sae.standardizer.with_statistics(options.modality, statistics)
    return Subject(sae.to(options.device).eval(), run, settings, "evaluation store")


def _run_settings(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():  # an SAE that was imported or downloaded has no run
        return {}
    return read_json(file, schema_version=RUN_SCHEMA_VERSION, error=RunError)


class NoTrainingStoreError(Exception):
    """Says why a run's training store is not to be had."""


def training_store(subject: Subject) -> EmbeddingStore:
    path = subject.trained_with.get("store")
    if path is None:
        raise NoTrainingStoreError(f"{subject.name} does not say what it was trained on")
    try:
        store = as_store(path, subject.trained_with.get("modality"))
    except StoreError as err:
        raise NoTrainingStoreError(f"the training store cannot be opened ({err})") from err
    if store.fingerprint != subject.trained_with.get("store_fingerprint"):
        raise NoTrainingStoreError(f"{path} is no longer what {subject.name} was trained on")
    return store


def batches_of(store: EmbeddingStore, modality: Modality, size: int) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for raw in store.batches(modality, size):
        yield start, raw
        start += len(raw)
