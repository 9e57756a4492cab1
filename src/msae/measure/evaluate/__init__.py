"""`evaluate`: SAEs and a store of embeddings become the poster's figures, streamed batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack, overload

import torch

from msae.base.devices import as_device
from msae.base.errors import ConfigError
from msae.data.store import EmbeddingStore, as_store
from msae.measure import metrics
from msae.measure.evaluate.kept import Kept, current_evaluations, keep, kept_evaluations
from msae.measure.evaluate.passes import (
    Options,
    Probes,
    Scores,
    StoreLike,
    cknna_over_batches,
    class_f1,
    dead_in_training,
    open_view,
)
from msae.measure.evaluate.record import (
    Cell,
    Evaluation,
    Evaluations,
    RecoveryPoint,
    json_number,
    poster_table,
    table_rows,
)
from msae.sae.model import SAE, Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

__all__ = [
    "Cell",
    "Evaluation",
    "Evaluations",
    "Kept",
    "RecoveryPoint",
    "current_evaluations",
    "evaluate",
    "kept_evaluations",
    "poster_table",
    "table_rows",
]


class EvaluateOptions(TypedDict, total=False):
    """The keywords of `evaluate`."""

    modality: Modality
    inference: Inference
    k: int | None
    labels: str | None
    probe_train: StoreLike | None
    recovery: bool
    train_store: StoreLike | None
    batch_size: int | None
    device: str
    seed: int


@overload  # the first: a str is a sequence of str, but one run here
def evaluate(sae: RunLike, on: StoreLike, **options: Unpack[EvaluateOptions]) -> Evaluation: ...  # type: ignore[overload-overlap]
@overload
def evaluate(sae: Sequence[RunLike], on: StoreLike, **options: Unpack[EvaluateOptions]) -> Evaluations: ...
def evaluate(
    sae: RunLike | Sequence[RunLike],
    on: StoreLike,
    *,
    modality: Modality = "image",
    inference: Inference = "trained",
    k: int | None = None,
    labels: str | None = None,
    probe_train: StoreLike | None = None,
    recovery: bool = False,
    train_store: StoreLike | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Evaluation | Evaluations:
    """Measure how well SAEs reconstruct the embeddings of a store, and how sparse they are.

    Several runs make one table, in which the best values are marked. The figures of a run are also kept in the folder
    eval/ of the run.

    Args:
        sae: One or several run folders, or Hugging Face repositories that hold an SAE.
        on: The store to evaluate on.
        modality: Which embeddings of the store.
        inference: How activations are made: `trained` uses the activation function of the SAE; `relu` keeps every
            positive one, as in the paper's table; `threshold` keeps those above the thresholds fitted after training;
            `topk` keeps the `k` strongest.
        k: With `topk`: how many latents of each row are kept.
        labels: The column of the store's metadata that holds classes. Adds how well a linear classifier of the original
            embeddings works on the reconstructions, and how well single latents say a class.
        probe_train: The store whose original embeddings train that classifier. Without it, the store that the run was
            trained on. Of the embeddings that are also in `on`, half train it and the other half are evaluated.
        recovery: Also measure the reconstruction from only the k strongest latents of each row, for k = 1, 2, 4 and so
            on.
        train_store: Where `dead_train` is counted; without it, the run's training store.
        batch_size: Rows at a time; None takes some 64 MB of activations.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.
        seed: Random seed of the batches over which CKNNA is averaged, and of the classifier.

    Raises:
        ConfigError: Options that contradict each other, or a probe that has nothing to learn from.
        StoreError: A store is missing or damaged, or lacks the modality or the column.
        RunError: A run is missing or damaged, or does not fit the store.
    """
    options = Options(modality, inference, k, labels, recovery, batch_size, as_device(device), seed)
    store = as_store(on, modality)
    every = [sae] if isinstance(sae, Run | SAE | str | Path) else list(sae)
    if not every:
        raise ConfigError("there is no run to evaluate; give at least one")
    views = [open_view(one, store, options) for one in every]
    probes = None
    if labels is not None:
        probes = Probes(options, None if probe_train is None else as_store(probe_train, modality), store)
    if train_store is not None:  # a wrong one is said now, not after the passes
        train_store = as_store(train_store)
        for view in views:
            view.run.check_fit(train_store)
    results = Evaluations()
    for view in views:
        found = _evaluate(view, store, probes, train_store, options)
        results.append(keep(found, view, labels, None if probes is None else probes.store_of(view)))
    return results[0] if isinstance(sae, Run | SAE | str | Path) else results


@torch.no_grad()
def _evaluate(
    view: View,
    store: EmbeddingStore,
    probes: Probes | None,
    train_store: StoreLike | None,
    options: Options,
) -> Evaluation:
    sae = view.sae
    test = None if probes is None else probes.of(view)
    scores = Scores(view, None if test is None else test.probe, options)
    start = 0
    for raw in view.raw(title=f"evaluating {view.run.name}"):
        scores.update(raw, None if test is None else test.targets[start : start + len(raw)])
        start += len(raw)
    cknna = cknna_over_batches(view, store, options)
    dead_train, note = dead_in_training(view, store, train_store, scores.use.dead(), options)
    return Evaluation(
        run=view.run.given,
        kind=sae.config.kind,
        inference=options.inference,
        k=options.k,
        modality=options.modality,
        on=str(store.path),
        standardized_by="run" if view.standardized_by == "run" else "evaluation store",
        n=len(store),
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        cknna=json_number(cknna.value.mean),
        cknna_std=json_number(cknna.value.std),
        cknna_batches=cknna.value.n,
        decoder_orthogonality=metrics.decoder_orthogonality(sae.W_dec),
        max_decoder_cosine=metrics.max_decoder_cosine(sae.W_dec),
        dead_train=dead_train,
        recovery=scores.recovery_points(cknna.at),
        notes=tuple(filter(None, [note, cknna.note, *(test.notes if test is not None else ())])),
        class_f1=None if test is None else json_number(class_f1(view, test, scores)),
        **scores.figures(),
    )
