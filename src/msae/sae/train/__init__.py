"""`train`: a store of embeddings becomes an SAE in a run folder, resumable to the byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from msae.base.config import settings_from
from msae.base.processes import joined
from msae.data.layout import path_of
from msae.sae.model import SAE
from msae.sae.train.rows import StoreLike, TrainingRows, shuffled_batches
from msae.sae.train.settings import TrainOptions, TrainSettings
from msae.sae.train.step import StepResult, learning_rate, objective_of, train_step
from msae.sae.train.training import Training, block_rows_of, describe_run

__all__ = [
    "StepResult",
    "TrainOptions",
    "TrainSettings",
    "describe_run",
    "learning_rate",
    "objective_of",
    "shuffled_batches",
    "train",
    "train_step",
]


def train(
    store: StoreLike | Sequence[StoreLike],
    *,
    out: str | Path,
    resume: bool = False,
    config: str | Path | None = None,
    settings: TrainSettings | None = None,
    **options: Unpack[TrainOptions],
) -> SAE:
    """Train a sparse autoencoder on the embeddings of a store and write it into a run folder.

    Args:
        store: A store, a clip-retrieval folder, or a .npy, .npz, .parquet or .safetensors file of embeddings. Several
            are read like one; with --modality both, one may hold the images and another the texts.
        out: The run folder to make.
        resume: Continue an interrupted run in `out`; where there is none, start one.
        config: A TOML file of settings. Options that are given win over it.
        settings: All settings at once, instead of `config` and `options`.
        options: Fields of `TrainSettings`.

    Raises:
        ConfigError: A setting is unknown or contradicts another, or `settings` are given beside others.
        RunError: `out` already holds a run and `resume` is not given, that run had other settings, or another process
            writes into `out`.
        TrainingError: The loss diverged; the last good checkpoint is kept.
        Interrupted: Ctrl-C; a checkpoint was saved.
        FailedElsewhere: On several processes, as torchrun starts them: another one raised one of these.
    """
    out = path_of(out)
    with joined() as processes:
        settings = settings_from(TrainSettings, settings, options, config=config, where="train")
        rows = TrainingRows(store, settings.modality)
        if settings.block_rows is None:  # on a machine with more memory, too, a run goes on as it began
            settings = dataclasses.replace(settings, block_rows=block_rows_of(out))
        settings = settings.resolve(rows)
        assert settings.block_rows is not None
        first, *_ = processes.each(settings.block_rows)  # machines may differ in their memory
        return Training(out, rows, dataclasses.replace(settings, block_rows=int(first)), processes).train(resume=resume)
