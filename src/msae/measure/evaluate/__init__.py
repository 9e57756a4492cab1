"""`evaluate`: SAEs and a store of embeddings become the poster's figures, streamed batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack, overload

import torch

from msae.base.devices import as_device
from msae.base.errors import ConfigError
from msae.data.sampled import notes_on, sample_rows
from msae.data.store import EmbeddingStore, as_store
from msae.measure import metrics
from msae.measure.evaluate.kept import Kept, current_evaluations, keep, kept_evaluations
from msae.measure.evaluate.pairs import Pairs, RowsFigures, embedding_recalls, judge_pairs, pair_rows
from msae.measure.evaluate.passes import (
    Options,
    Probes,
    ProbeTest,
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
    summary,
    table_rows,
)
from msae.measure.evaluate.untrained import Untrained, untrained_like
from msae.sae.model import SAE, Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import MODALITIES, Modality
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
    "summary",
    "table_rows",
]


class EvaluateOptions(TypedDict, total=False):
    """The keywords of `evaluate`, but for the one that its result depends on."""

    modality: Modality | None
    inference: Inference
    k: int | None
    labels: str | None
    probe_train: StoreLike | None
    recovery: bool
    train_store: StoreLike | None
    batch_size: int | None
    max_rows: int | None
    device: str
    seed: int


@overload  # the first: a str is a sequence of str, but one run here
def evaluate(  # type: ignore[overload-overlap]
    sae: RunLike, on: StoreLike, *, untrained: Literal[False] = ..., **options: Unpack[EvaluateOptions]
) -> Evaluation: ...
@overload
def evaluate(
    sae: Sequence[RunLike], on: StoreLike, *, untrained: bool = ..., **options: Unpack[EvaluateOptions]
) -> Evaluations: ...
@overload
def evaluate(
    sae: RunLike, on: StoreLike, *, untrained: Literal[True], **options: Unpack[EvaluateOptions]
) -> Evaluations: ...
def evaluate(
    sae: RunLike | Sequence[RunLike],
    on: StoreLike,
    *,
    modality: Modality | None = None,
    inference: Inference = "trained",
    k: int | None = None,
    labels: str | None = None,
    probe_train: StoreLike | None = None,
    recovery: bool = False,
    untrained: bool = False,
    train_store: StoreLike | None = None,
    batch_size: int | None = None,
    max_rows: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Evaluation | Evaluations:
    """Measure how well SAEs reconstruct the embeddings of a store, and how sparse they are.

    Several runs make one table, in which the best values are marked. The figures of a run are also kept in the folder
    eval/ of the run. Where the store has images and texts, a second table has both, and a third says which latents
    serve both and whether an image and its text find each other by their latents.

    Args:
        sae: One or several run folders, or Hugging Face repositories that hold an SAE.
        on: The store to evaluate on.
        modality: Which embeddings of the store. Without it, images where the store has them.
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
        untrained: Add a row of the same SAE with untrained weights: with ReLU where that is the inference, else with as
            many of the strongest latents as the trained one has active. A good SAE is far from it.
        train_store: Where `dead_train` is counted; without it, the run's training store.
        batch_size: Rows at a time; None takes some 64 MB of activations.
        max_rows: Read at most so many rows of each store: of more, a random sample. Memory does not depend on it, but
            with `labels` it does.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.
        seed: Random seed of the sample, of the batches over which CKNNA is averaged, and of the classifier.

    Raises:
        ConfigError: Options that contradict each other, or a probe that has nothing to learn from.
        StoreError: A store is missing or damaged, or lacks the modality or the column.
        RunError: A run is missing or damaged, or does not fit the store.
    """
    every = [sae] if isinstance(sae, Run | SAE | str | Path) else list(sae)
    if not every:
        raise ConfigError("there is no run to evaluate; give at least one")
    store = sample_rows(as_store(on, modality, unnamed=Run.open(every[0]).modality), max_rows, seed=seed)
    modality = modality or store.modalities[0]
    options = Options(modality, inference, k, labels, recovery, batch_size, as_device(device), seed, max_rows)
    views = [open_view(one, store, options) for one in every]
    probes = None
    if labels is not None:
        probes = Probes(options, None if probe_train is None else as_store(probe_train, modality), store)
    if train_store is not None:  # a wrong one is said now, not after the passes
        train_store = as_store(train_store)
        for view in views:
            view.run.check_fit(train_store)
    results, nulls = Evaluations(), dict[tuple[object, ...], Evaluation]()
    for view in views:
        test = None if probes is None else probes.of(view)
        found = _evaluate(view, store, test, train_store, options)
        null = untrained_like(view, k=max(1, round(found.l0)), seed=seed)
        found = replace(found, untrained_fvu_per_sample=json_number(null.fvu_per_sample))
        if store.modalities == MODALITIES:
            found = replace(found, pairs=_pairs(view, found, null, options))
        results.append(keep(found, view, labels, None if probes is None else probes.store_of(view)))
        statistics = view.standardizer.statistics[modality]
        k = None if inference == "relu" else null.view.k
        same = (view.sae.d_sae, k, statistics.mean.cpu().numpy().tobytes(), statistics.scale)
        if untrained and same not in nulls:
            shown = null.view if k else untrained_like(view, k=None, seed=seed).view
            figures = _evaluate_untrained(shown, store, test, options)
            nulls[same] = replace(figures, standardized_by=found.standardized_by)
    results.extend(nulls.values())
    return results[0] if isinstance(sae, Run | SAE | str | Path) and not untrained else results


@torch.no_grad()
def _pairs(view: View, found: Evaluation, null: Untrained, options: Options) -> Pairs:
    """The figures of a store that has images and texts; those of one modality are in `found` already."""
    store, rows = view.store, pair_rows(view, seed=options.seed)
    views, nulls, figures = {view.modality: view}, {view.modality: null.view}, []
    for modality in MODALITIES:
        if modality == view.modality:
            kept = {one.name: getattr(found, one.name) for one in fields(RowsFigures)}
            figures.append(RowsFigures(**kept))
            continue
        mine = replace(options, modality=modality, recovery=False)
        other = views[modality] = open_view(view.run, store, mine)
        scores = Scores(other, None, mine)
        for raw in other.raw(title=f"evaluating {view.run.name} on {modality} rows"):
            scores.update(raw, None)
        known = scores.figures()
        untrained = untrained_like(other, k=max(1, round(known["l0"])), seed=options.seed)
        nulls[modality] = untrained.view
        known |= {
            "modality": modality,
            "cknna": json_number(cknna_over_batches(other, store, mine).value.mean),
            "untrained_fvu_per_sample": json_number(untrained.fvu_per_sample),
        }
        figures.append(RowsFigures(**{one.name: known[one.name] for one in fields(RowsFigures)}))
    codes = judge_pairs(views, rows)
    return Pairs(
        n=len(rows),
        trained_on=view.run.settings.get("modality"),
        rows=tuple(figures),
        codes=codes.codes,
        untrained=judge_pairs(nulls, rows).codes,
        standardized=embedding_recalls(views, rows, standardized=True),
        dense=embedding_recalls(views, rows, standardized=False),
        **codes.serves,
    )


def _evaluate_untrained(view: View, store: EmbeddingStore, test: ProbeTest | None, options: Options) -> Evaluation:
    """The figures of an SAE with untrained weights, which has no training rows."""
    found = _evaluate(view, store, test, None, options)
    return replace(found, is_untrained=True, dead_train=None, notes=())


@torch.no_grad()
def _evaluate(
    view: View,
    store: EmbeddingStore,
    test: ProbeTest | None,
    train_store: StoreLike | None,
    options: Options,
) -> Evaluation:
    sae = view.sae
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
        inference=view.inference,
        k=view.k,
        modality=options.modality,
        on=store.address,
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
        notes=tuple(filter(None, [*notes_on(store), note, cknna.note, *(test.notes if test is not None else ())])),
        class_f1=None if test is None else json_number(class_f1(view, test, scores)),
        **scores.figures(),
    )
