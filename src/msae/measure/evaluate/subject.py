"""What is evaluated, and how: options, and the rows of the evaluation store through an SAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from msae.base.errors import ConfigError
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE, Inference
from msae.sae.run import NoTrainingStoreError, Run, RunLike
from msae.sae.standardize import Modality, Standardizer
from msae.sae.view import View

__all__ = ["NoTrainingStoreError", "Options", "StoreLike", "Subject", "open_subject", "training_store"]

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
        if self.inference not in get_args(Inference):
            raise ConfigError(f"inference {self.inference!r} is unknown; give relu, trained, topk or threshold")
        if self.inference == "topk" and (self.k is None or self.k < 1):
            raise ConfigError(f"inference topk with k {self.k}; give a positive --k, for example --k 64")
        if self.inference != "topk" and self.k is not None:
            raise ConfigError(f"--k {self.k} has no meaning for inference {self.inference}; add --inference topk")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size} is not positive; give for example 4096")

    def rows_at_once(self, d_sae: int) -> int:
        return self.batch_size or max(64, min(8192, 2**24 // d_sae))


class Subject(NamedTuple):
    """A run under evaluation: the evaluation store's rows through its SAE, on the device."""

    view: View

    @property
    def sae(self) -> SAE:
        return self.view.sae

    @property
    def run(self) -> str | None:
        """The run as it was given; None for an SAE."""
        return self.view.run.given

    @property
    def name(self) -> str:
        return self.view.run.name

    @property
    def standardizer(self) -> Standardizer:
        """The SAE's, with the statistics of the evaluation store where it has none."""
        return self.view.standardizer

    @property
    def standardized_by(self) -> Literal["run", "evaluation store"]:
        return "run" if self.view.standardized_by == "run" else "evaluation store"

    def standardize(self, raw: np.ndarray, modality: Modality) -> Float[Tensor, "n d_in"]:
        return self.standardizer.apply(torch.from_numpy(raw).to(self.view.device), modality)


def open_subject(sae: RunLike, store: EmbeddingStore, options: Options) -> Subject:
    run = Run.open(sae)
    run.check_fit(store)
    d_sae = run.sae.d_sae
    if options.k is not None and options.k > d_sae:
        raise ConfigError(f"--k {options.k} is above the {d_sae} latents of {run.name}; give a smaller --k")
    view = View(
        run,
        store,
        options.modality,
        inference=options.inference,
        k=options.k,
        block_rows=options.rows_at_once(d_sae),
        device=options.device,
    )
    return Subject(view)


def training_store(subject: Subject) -> EmbeddingStore:
    """The run's training store; raises `NoTrainingStoreError`."""
    return subject.view.run.training_store()
