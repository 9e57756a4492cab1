"""The audit of one classifier, step by step: measure, associate, control, debias, sweep, rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int, Int64
from torch import Tensor

from msae.base import statistics
from msae.base.errors import ConfigError
from msae.base.progress import progress
from msae.base.statistics import mean_interval
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE, Inference
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.audit.measure import Measured, Sizes, Tally, control_sizes, measure_edits, probabilities, quantiles
from msae.use.audit.results import TESTS, Association, ConceptAudit, Control, Debiasing, Effect, Group, Sample, Sweep
from msae.use.audit.subjects import Subject, make_subject
from msae.use.interventions import Concepts

N_CONTROLS = 20
SAMPLE_ROWS = 4096
"""Rows of controls and plots: the mean change of a probability is then known to better than .01."""
ACTIVATION_ENTRIES = 1 << 28
"""Activations of the audited latents held at once, 1 GB of them; more latents take another pass."""
WORST_GROUP_ROWS = 10
"""The accuracy of fewer rows says nothing."""
RANKED_BY = ("remove", "set_p50")
ASSOCIATIONS = ("by_predicted", "by_true", "given_true", "train_shift")


class _Part(NamedTuple):
    """What a pass over some concepts leaves."""

    measured: Measured
    amounts: Mapping[str, Tensor]
    associations: dict[str, list[Association | None]]
    sweeps: list[Sweep | None]
    sample: Float32[np.ndarray, "m c"]


class Auditor:
    """Audits the concepts `groups` of a subject. Random numbers are drawn from `rng` in a fixed order."""

    def __init__(
        self,
        subject: Subject,
        groups: Mapping[str, tuple[int, ...]],
        n_permutations: int,
        sweep_id: str | None,
        rng: np.random.Generator,
    ) -> None:
        self.subject, self.view = subject, subject.view
        self.names, self.groups = list(groups), list(groups.values())
        self.tests = PermutationTests(subject.classifier.classes, subject.positive, n_permutations, rng)
        self.rng = rng
        self.sweep_row = None if sweep_id is None else self.view.store.ids.row_of(sweep_id)
        self.sample_places = np.sort(
            rng.choice(len(self.subject.rows), min(SAMPLE_ROWS, len(self.subject.rows)), replace=False)
        )
        self.notes: list[str] = []
        self.test: str | None = None
        """The one test that the audit reports, chosen by what the rows allow, before any p-value is looked at."""
        self.predicted: Int64[np.ndarray, " n"] = np.empty(0, np.int64)

    def run(self) -> tuple[list[ConceptAudit], Sample]:
        """Every concept, strongest causal effect first and the class's own words last, and the rows for plots."""
        parts = []
        with progress("auditing", total=len(self.groups), unit="concepts") as advance:
            for some in self._passes():
                parts.append(self._measure(some))
                advance(len(some))
        self._note_predictions()
        controls = control_sizes(
            self.subject, self._sample_rows, self.groups, self._sample_activations, n_controls=N_CONTROLS, rng=self.rng
        )
        associations = {name: with_q([one for part in parts for one in part.associations[name]])
                        for name in ASSOCIATIONS}  # fmt: skip
        self.test = next((name for name in TESTS if any(associations[name])), None)
        audits = []
        number = 0
        for part in parts:
            for column in range(len(part.sweeps)):
                theirs = {name: associations[name][number] for name in ASSOCIATIONS}
                audits.append(self._concept(part, column, number, controls[number], theirs))
                number += 1
        order = sorted(range(len(audits)), key=lambda i: (audits[i].is_target, -audits[i].effect))
        truth = None if self.subject.truth is None else self.subject.truth[self.sample_places]
        strengths = np.concatenate([part.sample for part in parts], axis=1)[:, order]
        sample = Sample(self._sample_rows, self.predicted[self.sample_places], truth, strengths)
        return [audits[i] for i in order], sample

    def describe_classifier(self) -> dict[str, Any]:
        """What the JSON says of the classifier."""
        classifier, truth = self.subject.classifier, self.subject.truth
        counts = np.bincount(self.predicted, minlength=len(classifier.classes))
        return {
            "source": classifier.source,
            "classes": list(classifier.classes),
            "n_train": self.subject.n_train,
            "accuracy": None if truth is None else float((self.predicted == truth).mean()),
            "predicted": dict(zip(classifier.classes, counts.tolist(), strict=True)),
        }

    def _passes(self) -> Iterator[list[tuple[int, ...]]]:
        """The concepts, as many at a time as there is memory for."""
        most = max(1, ACTIVATION_ENTRIES // len(self.subject.rows))
        some: list[tuple[int, ...]] = []
        for group in self.groups:
            if some and sum(map(len, some)) + len(group) > most:
                yield some
                some = []
            some.append(group)
        yield some

    def _measure(self, groups: list[tuple[int, ...]]) -> _Part:
        rows, truth = self.subject.rows, self.subject.truth
        latents = [latent for group in groups for latent in group]
        z = self.view.table(rows, latents)
        mean = torch.zeros(self.view.sae.d_sae)
        mean[latents] = torch.from_numpy(z.mean(0))
        concepts = self.subject.concepts(groups, mean)
        strengths = concepts.strengths(torch.from_numpy(z)).numpy()
        amounts = quantiles(strengths)
        measured = measure_edits(self.subject, rows, truth, concepts, z, amounts)
        self.predicted = measured.predicted
        sample = strengths[self.sample_places].astype(np.float32)
        return _Part(
            measured,
            amounts,
            {**self._associations(strengths), "train_shift": self._train_shift(strengths, concepts, latents)},
            [self._sweep(group, concepts, column, measured, amounts, sample) for column, group in enumerate(groups)],
            sample,
        )

    def _associations(self, strengths: Float32[np.ndarray, "n c"]) -> dict[str, list[Association | None]]:
        one_stratum = np.zeros(len(strengths), np.int64)
        truth, predicted = self.subject.truth, self.predicted
        tests = {"by_predicted": (predicted, one_stratum)}
        if truth is not None:
            tests |= {"by_true": (truth, one_stratum), "given_true": (predicted, truth)}
        found = {name: self.tests.associate(strengths, labels, strata) for name, (labels, strata) in tests.items()}
        return {name: found.get(name, [None] * strengths.shape[1]) for name in ASSOCIATIONS}

    def _train_shift(
        self, strengths: Float32[np.ndarray, "n c"], concepts: Concepts, latents: list[int]
    ) -> list[Association | None]:
        training, truth = self.subject.training, self.subject.truth
        if training is None or truth is None:
            return [None] * strengths.shape[1]
        z = training.view.table(training.rows, latents)
        theirs = concepts.strengths(torch.from_numpy(z)).numpy()
        is_training = np.arange(len(theirs) + len(strengths)) < len(theirs)
        return self.tests.train_shift(
            np.concatenate([theirs, strengths]), is_training, np.concatenate([training.truth, truth])
        )

    def _concept(
        self, part: _Part, column: int, number: int, sizes: Sizes, associations: dict[str, Association | None]
    ) -> ConceptAudit:
        name, group = self.names[number], self.groups[number]
        classes = self.subject.classifier.classes
        fires = float(part.measured.tallies["remove"].n[column]) / len(self.subject.rows)
        is_target = name.casefold() in {one.casefold() for one in classes}
        if fires == 0:
            never = f"never fires on {self.view.store.path}"
            shift = associations["train_shift"]  # it may fire in the training rows
            return ConceptAudit(name, group, is_target, 0.0, train_shift=shift, test=self.test, note=never)
        place = _moved_most(part.measured, column)
        edits = {
            kind: _effect(tally, column, place, 0.0 if kind == "remove" else float(part.amounts[kind][column]))
            for kind, tally in part.measured.tallies.items()
        }
        effect = float(np.mean([abs(edit.change) for kind in RANKED_BY if (edit := edits[kind]) is not None]))
        note = None
        if edits["set_p99"] is None:
            note = "fires in every row, so it can be removed but not set"
        elif associations["given_true"] is None and self.subject.truth is not None:
            note = "rows of one true class are all predicted alike, so nothing is left to test given the truth"
        return ConceptAudit(
            name, group, is_target, fires, classes[self.subject.watched[place]], effect,
            associations["by_predicted"], associations["by_true"], associations["given_true"],
            associations["train_shift"], self.test,
            edits["remove"], edits["set_p50"], edits["set_p90"], edits["set_p99"], _control(sizes, effect),
            debiasing=None if self.subject.truth is None else _debiasing(part.measured, column, classes),
            sweep=part.sweeps[column], note=note,
        )  # fmt: skip

    def _sweep(
        self,
        group: tuple[int, ...],
        concepts: Concepts,
        column: int,
        measured: Measured,
        amounts: Mapping[str, Tensor],
        sample: Float32[np.ndarray, "m c"],
    ) -> Sweep | None:
        """The concept from 0 to twice its natural p99, in the row asked for or in a middling one without it."""
        p99 = float(amounts["set_p99"][column])
        if p99 <= 0:
            return None
        this = self.subject.watched[_moved_most(measured, column)]
        if self.sweep_row is None:
            without = np.flatnonzero(sample[:, column] <= 0)
            candidates = without if len(without) else np.arange(len(sample))
            ordered = candidates[np.argsort(self._sample_probabilities[candidates, this], kind="stable")]
            row = int(self._sample_rows[ordered[len(ordered) // 2]])
        else:
            row = self.sweep_row
        return sweep_row(self.subject, concepts, column, group, row, this, p99)

    @cached_property
    def _sample_rows(self) -> Int64[np.ndarray, " m"]:
        return self.subject.rows[self.sample_places]

    @cached_property
    def _sample_activations(self) -> Float32[np.ndarray, "m d_sae"]:
        return self.view.table(self._sample_rows)

    @cached_property
    def _sample_probabilities(self) -> Float32[np.ndarray, "m k"]:
        return self.subject.classifier.logits(self.subject.raw(self._sample_rows)).softmax(1).numpy()

    def _note_predictions(self) -> None:
        seen = np.unique(self.predicted)
        if len(seen) == 1:
            only = self.subject.classifier.classes[int(seen[0])]
            self.notes.append(f"the classifier predicts {only!r} for every row, so there is no association to test")


def _moved_most(measured: Measured, column: int) -> int:
    """Place among the watched classes of the one whose probability is moved most."""
    tallies = [measured.tallies[kind] for kind in RANKED_BY]
    moved = [(tally.change[column] / tally.n[column].clamp_min(1)).abs() for tally in tallies]
    return int((moved[0] + moved[1]).argmax())


def _effect(tally: Tally, column: int, place: int, strength: float) -> Effect | None:
    n = int(tally.n[column])
    if n == 0:
        return None
    mean = float(tally.change[column, place]) / n
    variance = max(0.0, float(tally.change2[column, place]) / n - mean**2)
    low, high = mean_interval(mean, variance, n, bounds=(-1.0, 1.0))
    return Effect(mean, low, high, float(tally.flips[column]) / n, n, strength)


def _control(sizes: Sizes, effect: float) -> Control | None:
    if not len(sizes.remove):
        return None
    effects = np.stack([getattr(sizes, kind) for kind in RANKED_BY])
    known = ~np.isnan(effects)
    theirs = np.where(known, effects, 0).sum(0) / known.sum(0).clip(1)
    means = [float(one[~np.isnan(one)].mean()) if not np.isnan(one).all() else None for one in sizes]
    return Control(len(theirs), means[0], means[1], means[2], float(theirs.max()), float((theirs < effect).mean()))


def _debiasing(measured: Measured, column: int, classes: tuple[str, ...]) -> Debiasing:
    n = measured.n_rows[:, :, column]
    kinds = (measured.correct, measured.correct_removed, measured.correct_levelled)
    correct = torch.stack([one[:, :, column] for one in kinds])
    groups = []
    for true, name in enumerate(classes):
        for present in (False, True):
            size = int(n[true, int(present)])
            before, removed, levelled = [
                float(hits) / size if size else None for hits in correct[:, true, int(present)]
            ]
            groups.append(Group(name, present, size, before, removed, levelled))
    shares = (correct / n)[:, n >= WORST_GROUP_ROWS]
    worst = [float(kind.min()) if shares.shape[1] else None for kind in shares]
    overall = (correct.sum((1, 2)) / n.sum()).tolist()
    return Debiasing(tuple(groups), worst[0], worst[1], worst[2], overall[0], overall[1], overall[2])


BLOCK = 256
"""Columns whose intervals are computed at once; they take some tables of that width."""


@dataclass(frozen=True)
class PermutationTests:
    """The tests of one audit: what its classes are, and how p-values are drawn."""

    classes: Sequence[str]
    positive: int | None
    """The class that is compared with the others; None takes for each column the one of the largest effect, and the
    p-value is that of the largest."""
    n_permutations: int
    rng: np.random.Generator

    @property
    def watched(self) -> list[int]:
        """Numbers of the classes that are compared with the others."""
        return list(range(len(self.classes))) if self.positive is None else [self.positive]

    def associate(
        self, strengths: Float32[np.ndarray, "n c"], labels: Int64[np.ndarray, " n"], strata: Int[np.ndarray, " n"]
    ) -> list[Association | None]:
        """For each column its association with `labels` among rows of one stratum; q-values are not filled in yet.

        None for a column without two different values, and for all where no stratum has two classes.
        """
        found: list[Association | None] = [None] * strengths.shape[1]
        columns = _varying(strengths)
        wins = statistics.net_wins(strengths[:, columns], strata)
        sizes = [statistics.cliffs_delta(wins, labels == k, strata) for k in self.watched]
        usable = [(k, size) for k, size in zip(self.watched, sizes, strict=True) if size is not None]
        if not len(columns) or not usable:
            return found
        best = np.abs(np.stack([size for _, size in usable])).argmax(0)
        p = statistics.permutation_p(
            wins, labels, strata, n_permutations=self.n_permutations, rng=self.rng, focus=self.positive
        )
        del wins
        for place, (k, size) in enumerate(usable):
            own = np.flatnonzero(best == place)
            for first in range(0, len(own), BLOCK):
                some = own[first : first + BLOCK]
                ends = statistics.cliffs_delta_interval(strengths[:, columns[some]], labels == k, strata)
                for i, low, high in zip(some, *ends, strict=True):
                    found[columns[i]] = _association(size[i], low, high, p[i], self.classes[k])
        return found

    def train_shift(
        self, strengths: Float32[np.ndarray, "n c"], is_training: Bool[np.ndarray, " n"], truth: Int64[np.ndarray, " n"]
    ) -> list[Association | None]:
        """For each column how much more it goes with a class in training rows than in the others.

        The effect is half of: Cliff's delta of training against other rows of the class, less the same of the other
        classes. Under the null hypothesis that training and other rows of a class have the column alike, membership
        may be shuffled within classes; whatever else separates the classes, in both sets of rows, does not count.
        """
        found: list[Association | None] = [None] * strengths.shape[1]
        columns = _varying(strengths)
        wins = statistics.net_wins(strengths[:, columns], truth)
        best: dict[int, tuple[float, float, int]] = {}
        for k in self.watched:
            sides = [truth == k, truth != k]
            pairs = [statistics.n_pairs(is_training[side], truth[side]) for side in sides]
            if not len(columns) or not all(pairs):
                continue
            weight = np.where(sides[0], 0.5 / pairs[0], -0.5 / pairs[1]).astype(np.float32)[:, None]
            sizes = (wins * weight)[is_training].sum(0, dtype=np.float64)
            p = statistics.permutation_p(
                wins * weight, is_training.astype(np.int64), truth,
                n_permutations=self.n_permutations, rng=self.rng, focus=1,
            )  # fmt: skip
            for i, (size, value) in enumerate(zip(sizes, p, strict=True)):
                if i not in best or abs(size) > abs(best[i][0]):
                    best[i] = (float(size), min(1.0, float(value) * len(self.watched)), k)
        for k in self.watched:
            own = [i for i, one in best.items() if one[2] == k]
            for first in range(0, len(own), BLOCK):
                some = own[first : first + BLOCK]
                chosen = strengths[:, columns[some]]
                of_class, of_rest = (
                    _with_interval(chosen[s], is_training[s], truth[s]) for s in (truth == k, truth != k)
                )
                ends = statistics.difference_interval(*of_class, *of_rest)
                for i, low, high in zip(some, ends.low / 2, ends.high / 2, strict=True):
                    found[columns[i]] = _association(best[i][0], low, high, best[i][1], self.classes[k])
        return found


def _varying(strengths: Float32[np.ndarray, "n c"]) -> Int64[np.ndarray, " v"]:
    """The columns with two different values."""
    return np.flatnonzero(strengths.max(0) > strengths.min(0))


def _with_interval(
    strengths: Float32[np.ndarray, "n c"], is_positive: Bool[np.ndarray, " n"], strata: Int[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " c"], statistics.Interval]:
    """Cliff's delta of each column and its interval."""
    size = statistics.cliffs_delta(statistics.net_wins(strengths, strata), is_positive, strata)
    assert size is not None
    return size, statistics.cliffs_delta_interval(strengths, is_positive, strata)


def _association(size: float, low: float, high: float, p: float, class_: str) -> Association:
    size = float(size)
    ends = (max(-1.0, min(float(low), size)), min(1.0, max(float(high), size)))
    return Association(size, *ends, (size + 1) / 2, float(p), 1.0, class_)


def with_q(associations: Sequence[Association | None]) -> list[Association | None]:
    """The associations of one test with q-values: all concepts that were tested by it are one family."""
    tested = [i for i, one in enumerate(associations) if one is not None]
    q = statistics.q_values(np.array([one.p for one in associations if one is not None]))
    found = list(associations)
    for i, value in zip(tested, q, strict=True):
        one = found[i]
        assert one is not None
        found[i] = dataclasses.replace(one, q=float(value))
    return found


SWEEP_POINTS = 33


def sweep_row(
    subject: Subject, concepts: Concepts, column: int, group: Sequence[int], row: int, class_: int, p99: float
) -> Sweep:
    """The sweep of the concept `column` of `concepts`, whose latents are `group`, in a row of the store.

    Args:
        class_: Whose probability is computed.
        p99: Of the concept's natural strengths.
    """
    own = np.array([row], dtype=np.int64)
    members = concepts.owner == column
    z = torch.from_numpy(subject.view.table(own, group))
    strengths = torch.linspace(0, 2 * p99, SWEEP_POINTS)
    classifier = subject.classifier
    u = classifier.features(subject.raw(own))
    move = strengths[:, None] * concepts.pattern[members] - z
    edited = u + move @ concepts.rows[members]
    if classifier.unit_norm:
        edited = torch.nn.functional.normalize(edited, dim=1)
    found = probabilities(edited @ classifier.weight.T + classifier.bias, [class_])[:, 0]
    strength = float((z[0] * concepts.reader[members]).sum())
    return Sweep(str(subject.view.store.ids[row]), strength, p99, tuple(strengths.tolist()), tuple(found.tolist()))


class Sweeper:
    """Sweeps of any sample under the classifier of an audit that trained it on half of a store."""

    def __init__(
        self,
        sae: SAE | str | Path,
        on: EmbeddingStore | str | Path,
        target: str,
        *,
        modality: Modality | None = None,
        inference: Inference = "trained",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        """The arguments are those of `msae.audit`, and so is what is raised."""
        view = View(sae, on, modality, inference=inference, device=device)
        self.subject = make_subject(view, target=target, classifier=None, class_texts=None, train_store=None, seed=seed)
        self._concepts = lru_cache(256)(self._made)

    def of(self, concept: ConceptAudit, id: str) -> Sweep | None:
        """The sweep of one audited concept in the row `id`; None where the audit could not edit the concept.

        Raises:
            ConfigError: The audit is of another classifier.
            StoreError: No row has that id.
        """
        classes = self.subject.classifier.classes
        if concept.sweep is None or concept.class_ is None:
            return None
        if concept.class_ not in classes:
            raise ConfigError(f"there is no class {concept.class_!r} here; the classes are {', '.join(classes)}")
        row = self.subject.view.store.ids.row_of(id)
        made = self._concepts(concept.latents)
        p99 = concept.sweep.natural_p99
        return sweep_row(self.subject, made, 0, concept.latents, row, classes.index(concept.class_), p99)

    def _made(self, group: tuple[int, ...]) -> Concepts:
        mean = torch.zeros(self.subject.view.sae.d_sae)
        z = self.subject.view.table(self.subject.rows, group)
        mean[list(group)] = torch.from_numpy(z.mean(0))
        return self.subject.concepts([group], mean)
