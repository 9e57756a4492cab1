"""`train`: a store of embeddings becomes an SAE in a run folder, resumable to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msae.base.config import from_mapping, read_toml
from msae.data.store import EmbeddingStore, as_store
from msae.sae.model import SAE
from msae.sae.train.settings import TrainSettings
from msae.sae.train.step import StepResult, learning_rate, objective_of, shuffled_batches, train_step
from msae.sae.train.training import Training, describe_run

__all__ = [
    "StepResult",
    "TrainSettings",
    "describe_run",
    "learning_rate",
    "objective_of",
    "shuffled_batches",
    "train",
    "train_step",
]


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
    return Training(Path(out), store, settings.resolve(store)).train(resume=resume)
