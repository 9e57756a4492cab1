"""Concepts from examples: a few latents that together fire for some rows and not for others.

One half of the rows finds the latents, the other judges them. docs/naming.md says how, and what else was tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from msae.base.errors import ConfigError, RunError
from msae.base.records import read_record, to_record, write_record
from msae.base.results import Result
from msae.data.parts import part_of, read_part
from msae.data.store import EmbeddingStore
from msae.sae.run import Origin, Run, RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

SCHEMA_VERSION = 1
FILE = "examples.json"
"""Beside names.json in the run folder."""
MIN_EXAMPLES = 6
"""Positive rows, and negative ones, that a concept needs: three find it and three judge it."""
MOST_LATENTS = 8
SCREENED = 200
"""Latents that are looked at: those that tell the two sides apart best, one by one."""
RIDGE = 0.3
"""Shrinks the weights; as a share of the rows, for latents of variance one."""
FOLDS, REPEATS, ENOUGH = 5, 4, 400
"""Folds are dealt out again, at most four times, until `ENOUGH` rows were tried."""
GAIN = 0.02
"""Of F1 over the folds; what several latents must add to be taken in place of the best one."""
MAX_ROWS, MAX_ENTRIES = 4_000, 1 << 26
"""Rows, and activations of them, that are used; of more rows a random sample."""
OTHERS = 4
"""Random rows that stand in for the negatives, for each positive, where none are given."""


@dataclass(frozen=True)
class Judged:
    """How well a concept tells the rows that did not choose it apart."""

    n_positive: int
    n_negative: int
    f1: float
    """With the positives as the wanted class."""
    precision: float
    recall: float
    f1_single: float
    """Of the best single latent, with a threshold of its own."""
    f1_always: float
    """Of what fires in every row: what no concept should be below."""


@dataclass(frozen=True, repr=False)
class ExampleConcept(Result):
    """Latents that were learnt from examples to fire together for one concept."""

    name: str
    latents: tuple[int, ...]
    """That speak for it; the first is the best by itself."""
    weights: tuple[float, ...]
    """What one unit of each latent's activation adds to the strength; 1 for the first."""
    against: tuple[int, ...]
    """Latents that speak against it."""
    against_weights: tuple[float, ...]
    """What one unit of each of these takes away."""
    threshold: float
    """The strength above which it is present."""
    examples: str
    """What the positives were: `column:value`, or how many rows were picked."""
    modality: Modality
    judged: Judged
    origin: Origin
    """The weights, and the rows and metadata, that it was learnt from."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows of the store that were not used, by reason."""

    @property
    def signed(self) -> dict[int, float]:
        """The weight of each latent, below zero for those that speak against it."""
        against = (-weight for weight in self.against_weights)
        return dict(zip((*self.latents, *self.against), (*self.weights, *against), strict=True))

    def strength(self, z: Float[np.ndarray, "n d_sae"]) -> Float[np.ndarray, " n"]:
        """Of the concept in rows of activations of all latents."""
        return np.asarray(z[:, list(self.signed)] @ np.array(list(self.signed.values())))

    def above(self, z: Float[np.ndarray, "n d_sae"]) -> Float[np.ndarray, " n"]:
        """How far the strength is above the threshold, in rows of activations of all latents; 0 where it is absent."""
        return np.asarray(np.maximum(self.strength(z) - self.threshold, 0))

    def above_in(self, view: View, rows: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, " m"]:
        """The same in some rows of a store."""
        strength = view.table(rows, list(self.signed)) @ np.array(list(self.signed.values()))
        return np.asarray(np.maximum(strength - self.threshold, 0), np.float32)

    def fires(self, z: Float[np.ndarray, "n d_sae"]) -> Bool[np.ndarray, " n"]:
        """In which rows of activations of all latents it is present."""
        return np.asarray(self.strength(z) > self.threshold)

    def to_json(self) -> dict[str, Any]:
        return dict(to_record(self))

    def records(self) -> list[dict[str, Any]]:
        return [{"concept": self.name, "latent": latent, "weight": weight} for latent, weight in self.signed.items()]

    def to_text(self) -> str:
        """What `msae name --as` prints."""
        one = self.judged
        parts = [f"#{latent}" for latent in self.latents]
        lines = [
            f"{self.name}: {' + '.join(parts)}" + "".join(f" - #{latent}" for latent in self.against),
            f"  learnt from {self.examples} of {self.origin.store}",
            f"  on the other half ({one.n_positive:,} rows with it, {one.n_negative:,} without): F1 {one.f1:.2f}, "
            f"precision {one.precision:.2f}, recall {one.recall:.2f}",
            f"  the best single latent: F1 {one.f1_single:.2f}; firing in every row: {one.f1_always:.2f}",
        ]
        lines += [f"  left out: {n:,} rows {why}" for why, n in self.left_out.items()]
        return "\n".join(lines)


# --- Learning


def learn_concept(
    sae: RunLike,
    name: str,
    on: EmbeddingStore | str | Path,
    *,
    like: Sequence[str] = (),
    unlike: Sequence[str] = (),
    modality: Modality | None = None,
    device: str = "auto",
    seed: int = 0,
) -> ExampleConcept:
    """A concept from examples, kept in the run folder: the few latents that together fire for them.

    Half of the rows find the latents, the other half judges them. Where a single latent does as well it is taken.

    Args:
        sae: A run folder.
        name: What the concept is called from now on.
        on: The examples as `STORE:column=value`: rows with the value against rows with another; or a store, whose rows
            `like` and `unlike` pick.
        like: Ids of rows that show the concept.
        unlike: Ids of rows that do not. Without them, random other rows.
        modality: Which embeddings of the store. Without it, images where it has them.
        seed: Of the halves, and of the random rows.

    Raises:
        StoreError: No such store, row or value, or the store does not fit the SAE.
        ConfigError: Too few examples, or no name.
        RunError: There is no run folder to keep it in, or what is there is damaged.
    """
    run, name = Run.open(sae), name.strip()
    if not name or name.startswith("#") or "|" in name or "=" in name:
        raise ConfigError(f"{name!r} is no name for a concept: it must have letters, and neither # first nor | nor =")
    if run.folder is None:
        raise RunError(f"{run.name} is no folder on this machine, so the concept cannot be kept; give a run folder")
    known = load_examples(run)
    part = read_part(on)
    if (part.column is None) == (not like):
        raise ConfigError("the examples are given by --from STORE:column=value, or by --on STORE and --like ID ...")
    if part.column is not None:
        positive, negative, shown = part.rows, part.others, f"{part.column}:{part.value}"
    else:
        positive, negative = (np.array([part.store.ids.row_of(id) for id in ids], np.int64) for ids in (like, unlike))
        shown = f"{len(set(like))} rows"
    view = View(run, part.store, modality, device=device)
    found = from_rows(view, name, positive, negative, shown=shown, seed=seed)
    kept = {one.name.casefold(): one for one in (*known.values(), found)}
    write_record(run.folder / FILE, _File(tuple(kept.values())), schema_version=SCHEMA_VERSION)
    return found


def from_column(view: View, column: str, value: str, *, seed: int = 0) -> ExampleConcept:
    """The concept that rows with a value in a column have and rows with another value have not.

    Raises:
        StoreError: There is no such column, or no row has the value.
        ConfigError: Too few rows have it, or have another.
    """
    part = part_of(view.store, column, value)
    name = f"{column}:{value}"
    return from_rows(view, name, part.rows, part.others, shown=name, seed=seed)


def from_rows(
    view: View,
    name: str,
    positive: Int64[np.ndarray, " p"],
    negative: Int64[np.ndarray, " q"],
    *,
    shown: str,
    seed: int = 0,
) -> ExampleConcept:
    """The concept that the rows `positive` have and the rows `negative` have not; random others where there are none.

    Raises:
        ConfigError: Fewer than six rows of a kind, or one row is of both.
    """
    rng = np.random.default_rng(seed)
    positive, negative = np.unique(positive), np.unique(negative)
    both = np.intersect1d(positive, negative)
    if len(both):
        raise ConfigError(f"row {view.store.ids[int(both[0])]!r} is given both as like and as unlike; leave out one")
    others = np.setdiff1d(np.arange(len(view)), np.concatenate([positive, negative]))
    if not len(negative):
        negative = np.sort(rng.permutation(others)[: OTHERS * max(MIN_EXAMPLES, len(positive))])
        others, shown = others[:0], f"{shown} against {len(negative):,} random others"
    for rows, kind in ((positive, "with it"), (negative, "without it")):
        if len(rows) < MIN_EXAMPLES:
            raise ConfigError(f"{name!r} has {len(rows)} rows {kind}; give at least {MIN_EXAMPLES}, better 50")
    most = min(MAX_ROWS, MAX_ENTRIES // view.sae.d_sae) // 2
    sides = [rng.permutation(rows)[:most] for rows in (positive, negative)]
    left_out = {
        "beyond the number that is read": len(positive) + len(negative) - sum(map(len, sides)),
        "of neither kind": len(others),
    }
    finds, judges = (np.concatenate([side[half::2] for side in sides]) for half in (0, 1))
    is_positive = [np.isin(rows, positive) for rows in (finds, judges)]
    z = view.table(finds)
    found, single = learn(z, is_positive[0], seed=seed), best_single(z, is_positive[0])
    z = view.table(judges)
    scores = [f1(one.fires(z), is_positive[1]) for one in (found, single)]
    if scores[1] >= scores[0]:
        found, scores = single, [scores[1], scores[1]]
    fires = found.fires(z)
    n_right = int((fires & is_positive[1]).sum())
    speaks_for = found.weights > 0
    for_it, against = found.latents[speaks_for].tolist(), found.latents[~speaks_for].tolist()
    return ExampleConcept(
        name=name,
        latents=tuple(for_it),
        weights=tuple(found.weights[speaks_for].tolist()),
        against=tuple(against),
        against_weights=tuple((-found.weights[~speaks_for]).tolist()),
        threshold=found.threshold,
        examples=shown,
        modality=view.modality,
        judged=Judged(
            n_positive=int(is_positive[1].sum()),
            n_negative=int((~is_positive[1]).sum()),
            f1=scores[0],
            precision=n_right / max(1, int(fires.sum())),
            recall=n_right / int(is_positive[1].sum()),
            f1_single=scores[1],
            f1_always=f1(np.ones(len(z), bool), is_positive[1]),
        ),
        origin=view.run.origin(view.store),
        left_out={why: n for why, n in left_out.items() if n},
    )


@dataclass(frozen=True)
class _File:
    """What examples.json holds."""

    concepts: tuple[ExampleConcept, ...]


def load_examples(run: RunLike) -> dict[str, ExampleConcept]:
    """The concepts from examples in a run folder, by their names in lower case; none where there are none.

    Raises:
        RunError: The file is damaged, or a concept is of other weights than the run has now.
    """
    run = Run.open(run)
    if run.folder is None or not (file := run.folder / FILE).exists():
        return {}
    remedy = f"delete {file} and learn the concepts again with msae name RUN --as NAME"
    found = read_record(file, _File, schema_version=SCHEMA_VERSION, error=RunError, remedy=remedy).concepts
    for one in found:
        if one.origin.sae != run.weights:
            raise RunError(f"{one.name!r} in {file} was learnt from other weights than {run.folder} has now; {remedy}")
    return {one.name.casefold(): one for one in found}


class Weighted(NamedTuple):
    """A weighted sum of latents, and from which strength on it fires."""

    latents: Int64[np.ndarray, " l"]
    weights: Float[np.ndarray, " l"]
    threshold: float

    def fires(self, z: Float[np.ndarray, "n d_sae"]) -> Bool[np.ndarray, " n"]:
        return np.asarray(z[:, self.latents] @ self.weights > self.threshold)


def learn(z: Float32[np.ndarray, "n d_sae"], is_positive: Bool[np.ndarray, " n"], *, seed: int = 0) -> Weighted:
    """The best single latent by F1, or a weighted sum of at most eight where folds of the rows show that it is better.

    Latents join one by one: each time that with which the ridge regression of the two sides on the activations, both
    sides counting alike, leaves the smallest error. A latent of negative weight speaks against the concept.
    """
    rng, repeats = np.random.default_rng(seed), max(1, min(REPEATS, ENOUGH // len(z)))
    fires = np.zeros((repeats, MOST_LATENTS, len(z)), bool)
    for repeat in range(repeats):
        folds = np.empty(len(z), np.int64)
        for side in (is_positive, ~is_positive):
            folds[side] = rng.permutation(int(side.sum())) % FOLDS
        for fold in range(FOLDS):
            own, other = folds != fold, folds == fold
            found = _path(z[own], is_positive[own])
            for step in range(MOST_LATENTS):
                fires[repeat, step, other] = found[min(step, len(found) - 1)].fires(z[other])
    scores = np.mean([[f1(one, is_positive) for one in repeat] for repeat in fires], axis=0)
    path = _path(z, is_positive)
    best = min(int(scores.argmax()), len(path) - 1)
    always = f1(np.ones(len(z), bool), is_positive)  # a sum that fires in every row knows nothing
    return path[best] if scores[best] > max(scores[0], always) + GAIN else path[0]


def best_single(z: Float32[np.ndarray, "n d_sae"], is_positive: Bool[np.ndarray, " n"]) -> Weighted:
    """The latent, and the threshold for it, with the largest F1."""
    f1s, thresholds = best_thresholds(z, is_positive)
    first = int(f1s.argmax())
    return Weighted(np.array([first]), np.ones(1), float(thresholds[first]))


def _path(z: Float32[np.ndarray, "n d_sae"], is_positive: Bool[np.ndarray, " n"]) -> list[Weighted]:
    """The best single latent, then sums of more and more latents."""
    path = [best_single(z, is_positive)]
    first = int(path[0].latents[0])
    share = np.where(is_positive, 0.5 / is_positive.sum(), 0.5 / max(1, (~is_positive).sum()))
    side = np.where(is_positive, 1.0, -1.0)
    centred = z - share @ z
    spread = np.sqrt(share @ np.square(centred))
    apart = np.abs((share * side) @ centred) / np.maximum(spread, 1e-12)
    screened = np.argsort(-np.where(spread > 1e-6, apart, -1), kind="stable")[:SCREENED]
    screened = screened[spread[screened] > 1e-6]
    if first not in screened:
        screened = np.append(screened, first)
    x = centred[:, screened] / spread[screened]
    gram, with_side = (x * share[:, None]).T @ x, (x * share[:, None]).T @ side
    gram[np.diag_indices_from(gram)] += RIDGE / np.sqrt(len(z))
    chosen = [int(np.flatnonzero(screened == first)[0])]
    while len(chosen) < min(MOST_LATENTS, len(screened)):
        rest = np.setdiff1d(np.arange(len(screened)), chosen)
        tried = np.column_stack([np.tile(chosen, (len(rest), 1)), rest])
        solved = np.linalg.solve(gram[tried[:, :, None], tried[:, None, :]], with_side[tried][:, :, None])[:, :, 0]
        best = int((solved * with_side[tried]).sum(1).argmax())  # explained: the error is 1 less this
        chosen = tried[best].tolist()
        weights = solved[best] / spread[screened[chosen]]
        if weights[0] <= 0:
            break  # the first latent is the unit of the strength
        weights = weights / weights[0]
        strength = z[:, screened[chosen]] @ weights
        path.append(Weighted(screened[chosen], weights, float(best_thresholds(strength[:, None], is_positive)[1][0])))
    return path


def best_thresholds(
    scores: Float[np.ndarray, "n c"], is_positive: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Of each column the largest F1 that a threshold gives it, and that threshold, half-way between two scores."""
    order = np.argsort(-scores, axis=0, kind="stable")
    ordered = np.take_along_axis(scores, order, 0)
    n_true = np.cumsum(is_positive[order], axis=0)
    f1s = 2 * n_true / (np.arange(1, len(scores) + 1)[:, None] + is_positive.sum())
    f1s = np.where(ordered[:-1] > ordered[1:], f1s[:-1], 0)  # rows of equal score are all in or all out
    best, columns = f1s.argmax(0), np.arange(scores.shape[1])
    return f1s[best, columns], (ordered[best, columns] + ordered[best + 1, columns]) / 2


def f1(fires: Bool[np.ndarray, " n"], is_positive: Bool[np.ndarray, " n"]) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is found."""
    total = int(fires.sum()) + int(is_positive.sum())
    return 2 * int((fires & is_positive).sum()) / total if total else 0.0
