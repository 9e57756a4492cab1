"""The audit of one classifier, step by step: measure, associate, control, debias, sweep, rank."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from msae.base import statistics
from msae.base.errors import ConfigError
from msae.base.progress import progress
from msae.base.statistics import mean_interval
from msae.concepts.examples import ExampleConcept
from msae.concepts.names import names_of
from msae.concepts.strength import readers
from msae.data.store import EmbeddingStore
from msae.sae.model import Inference
from msae.sae.run import RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.audit.measure import Measured, Sizes, Tally, control_sizes, measure_edits, quantiles
from msae.use.audit.results import TESTS, Association, ConceptAudit, Control, Debiasing, Effect, Group, Sample, Sweep
from msae.use.audit.slices import Slice, chosen_slices, compare_errors, otsu_border, slice_of
from msae.use.audit.subjects import Subject, make_subject
from msae.use.interventions import Concepts

N_CONTROLS = 20
SAMPLE_ROWS = 2048
"""Rows of controls and plots: the mean change of a probability is then known to about .01."""
ACTIVATION_ENTRIES = 1 << 28
"""Activations of the audited latents held at once, 1 GB of them; more latents take another pass."""
FEWEST_ROWS = 10
"""The accuracy of a group of fewer says nothing. A concept that fires in fewer is left out; of few rows, in 1 %."""
RANKED_BY = ("remove", "set_p50")
ASSOCIATIONS = ("by_predicted", "by_true", "given_true", "train_shift")


class _Part(NamedTuple):
    """What a pass over some concepts leaves."""

    names: list[str]
    groups: list[tuple[int, ...]]
    measured: Measured
    amounts: Mapping[str, Tensor]
    associations: dict[str, list[Association | None]]
    sweeps: list[Sweep | None]
    sample: Float32[np.ndarray, "m c"]
    slices: list[Slice]


class Auditor:
    """Audits the concepts `groups` of a subject. Random numbers are drawn from `rng` in a fixed order.

    Args:
        examples: Those of the concepts that were learnt from examples, which have weights and a threshold.
        keep_rare: Audit concepts that hardly ever fire too.
        errors: Look for slices of errors.
    """

    def __init__(
        self,
        subject: Subject,
        groups: Mapping[str, tuple[int, ...]],
        n_permutations: int,
        sweep_id: str | None,
        rng: np.random.Generator,
        *,
        examples: Mapping[str, ExampleConcept] = MappingProxyType({}),
        keep_rare: bool = False,
        errors: bool = False,
    ) -> None:
        self.subject, self.view = subject, subject.view
        self.groups, self.examples = groups, examples
        self.tests = PermutationTests(subject.classifier.classes, subject.positive, n_permutations, rng)
        self.rng = rng
        self.fewest = 0 if keep_rare else min(FEWEST_ROWS, max(1, len(subject.rows) // 100))
        self.sweep_row = None if sweep_id is None else self.view.store.ids.row_of(sweep_id)
        self.sample_places = np.sort(
            rng.choice(len(self.subject.rows), min(SAMPLE_ROWS, len(self.subject.rows)), replace=False)
        )
        self.errors = errors
        self.slices: list[Slice] = []
        """Candidate slices, those with most of the class's errors first."""
        self.notes: list[str] = []
        self.rare: list[str] = []
        """Names of the concepts that were left out because they fire in too few rows."""
        self.test: str | None = None
        """The one test that the audit reports, chosen by what the rows allow, before any p-value is looked at."""
        self.predicted: Int64[np.ndarray, " n"] = np.zeros(len(subject.rows), np.int64)

    def run(self) -> tuple[list[ConceptAudit], Sample]:
        """Every concept, strongest causal effect first and the class's own words last, and the rows for plots."""
        parts = []
        with progress("auditing", total=len(self.groups), unit="concepts") as advance:
            for some in self._passes():
                parts.append(self._measure(some))
                advance(len(some))
        self._note_predictions()
        groups = [group for part in parts for group in part.groups]
        if not groups:
            raise ConfigError(
                f"none of the {len(self.groups)} concepts fires in {self.fewest} of the {len(self.subject.rows):,} "
                f"audited rows; give more rows, or other concepts with --concept"
            )
        truth = None if self.subject.truth is None else self.subject.truth[self.sample_places]
        controls = control_sizes(
            self.subject, self._sample_rows, groups, self._sample_activations, truth,
            n_controls=N_CONTROLS, rng=self.rng,
        )  # fmt: skip
        associations = {name: with_q([one for part in parts for one in part.associations[name]])
                        for name in ASSOCIATIONS}  # fmt: skip
        self.slices = chosen_slices([one for part in parts for one in part.slices])
        self.test = next((name for name in TESTS if any(associations[name])), None)
        audits: list[ConceptAudit] = []
        for part in parts:
            for column in range(len(part.names)):
                theirs = {name: associations[name][len(audits)] for name in ASSOCIATIONS}
                audits.append(self._concept(part, column, controls[len(audits)], theirs))
        audits = self._beside_stronger(audits)
        order = sorted(range(len(audits)), key=lambda i: (audits[i].is_target, -audits[i].effect))
        strengths = np.concatenate([part.sample for part in parts], axis=1)[:, order]
        sample = Sample(self._sample_rows, self.predicted[self.sample_places], truth, strengths)
        return [audits[i] for i in order], sample

    def _beside_stronger(self, audits: list[ConceptAudit]) -> list[ConceptAudit]:
        """The audits, those that would stand out tested again among rows alike in the stronger ones that do.

        A latent that fires a little more under hats goes with the classes where hats do: beside hats it does not.
        """
        subject, training = self.subject, self.subject.training
        found = list(audits)
        strata = np.zeros(len(subject.rows) + (0 if training is None else len(training.rows)), np.int64)
        if subject.truth is not None:
            strata += np.concatenate([subject.truth, *([] if training is None else [training.truth])])
        truth, is_first = strata.copy(), True
        for i in sorted(range(len(audits)), key=lambda i: (audits[i].is_target, -audits[i].pull)):
            if not audits[i].stands_out or subject.classifier.is_score:
                continue
            strength = self._strength(audits[i])
            if not is_first:
                again = self._test_again(strength, truth, strata) or _association(0.0, -1.0, 1.0, 1.0, "")
                found[i] = dataclasses.replace(audits[i], beside_stronger=again)
            if found[i].stands_out:
                strata = 2 * strata + (strength > otsu_border(strength.astype(np.float64)))
                strata = np.unique(strata, return_inverse=True)[1]  # small numbers: they are counted by bincount
                is_first = False
        return found

    def _strength(self, concept: ConceptAudit) -> Float32[np.ndarray, " n"]:
        """Of one concept in the audited rows, then in the training rows."""
        parts = [(self.view, self.subject.rows)]
        parts += [] if self.subject.training is None else [(self.subject.training.view, self.subject.training.rows)]
        example = self.examples.get(concept.name)
        if example is not None:
            return np.concatenate([example.above_in(*part) for part in parts])
        group = list(concept.latents)
        z = [torch.from_numpy(view.table(rows, group)) for view, rows in parts]
        read = readers([group], z[0].mean(0), self.view.sae.W_dec.detach().cpu()[group])
        return read(torch.cat(z)).numpy()[:, 0]

    def _test_again(
        self, strength: Float32[np.ndarray, " n"], truth: Int64[np.ndarray, " n"], strata: Int64[np.ndarray, " n"]
    ) -> Association | None:
        """The audit's test of one concept within `strata`, parts of the true classes."""
        n = len(self.subject.rows)
        if self.test == "train_shift":
            return self.tests.train_shift(strength[:, None], np.arange(len(strength)) >= n, truth, strata)[0]
        return self.tests.associate(strength[:n, None], self.predicted, strata[:n])[0]

    def describe_classifier(self) -> dict[str, Any]:
        """What the JSON says of the classifier."""
        classifier, truth = self.subject.classifier, self.subject.truth
        record: dict[str, Any] = {"source": classifier.source, "n_train": self.subject.n_train, "is_score": False}
        if classifier.is_score:
            numbers, scores = self.subject.numbers, self._scores
            record |= {"is_score": True, "mean": float(scores.mean()), "sd": float(scores.std())}
            if numbers is not None:
                from scipy.stats import spearmanr

                record["correlation"] = float(spearmanr(scores, numbers).statistic)
            return record | {"classes": [], "accuracy": None, "predicted": {}}
        counts = np.bincount(self.predicted, minlength=len(classifier.classes))
        return record | {
            "classes": list(classifier.classes),
            "accuracy": None if truth is None else float((self.predicted == truth).mean()),
            "predicted": dict(zip(classifier.classes, counts.tolist(), strict=True)),
        }

    def _passes(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """The concepts, as many at a time as there is memory for."""
        most = max(1, ACTIVATION_ENTRIES // len(self.subject.rows))
        some: dict[str, tuple[int, ...]] = {}
        for name, group in self.groups.items():
            if some and sum(map(len, some.values())) + len(group) > most:
                yield some
                some = {}
            some[name] = group
        yield some

    def _measure(self, asked: dict[str, tuple[int, ...]]) -> _Part:
        rows, truth, training = self.subject.rows, self.subject.truth, self.subject.training
        every = [latent for group in asked.values() for latent in group]
        z = self.view.table(rows, every)
        theirs = None if training is None else training.view.table(training.rows, every)
        above = [self._examples_in(self.view, rows, asked)]
        counts = [_rows_with(z, asked, above[0])]
        if training is not None and theirs is not None:
            above.append(self._examples_in(training.view, training.rows, asked))
            counts.append(_rows_with(theirs, asked, above[1]))
        is_rare = np.max(counts, axis=0) < self.fewest
        self.rare += [name for name, rare in zip(asked, is_rare, strict=True) if rare]
        if is_rare.any():
            kept = ~np.repeat(is_rare, [len(group) for group in asked.values()])
            z, theirs = z[:, kept], None if theirs is None else theirs[:, kept]
        known = {name: group for (name, group), rare in zip(asked.items(), is_rare, strict=True) if not rare}
        names, groups = list(known), list(known.values())
        if not groups:
            nothing: dict[str, list[Association | None]] = {name: [] for name in ASSOCIATIONS}
            zero = torch.zeros(0, 2, 0)
            empty = Measured({}, zero, zero, zero, zero, self.predicted)
            return _Part([], [], empty, {}, nothing, [], np.empty((len(self.sample_places), 0), np.float32), [])
        latents = [latent for group in groups for latent in group]
        mean = torch.zeros(self.view.sae.d_sae)
        mean[latents] = torch.from_numpy(z.mean(0))
        concepts = self.subject.concepts(groups, mean, [self.examples.get(name) for name in names])
        strengths = _strengths(concepts, z, names, above[0])
        amounts = quantiles(strengths)
        present = {}
        for column, name in enumerate(names):
            if name in above[0]:
                present[column] = above[0][name] > 0
                for amount in amounts.values():  # they are above the threshold
                    amount[column] += max(self.examples[name].threshold, 0) * (amount[column] > 0)
        measured = measure_edits(self.subject, rows, truth, concepts, z, amounts, present)
        self.predicted = measured.predicted
        sample = strengths[self.sample_places].astype(np.float32)
        sweeps = [
            self._sweep(group, concepts, column, measured, amounts, sample) for column, group in enumerate(groups)
        ]
        del z
        associations = self._associations(strengths)
        if theirs is not None and truth is not None and training is not None:
            their_strengths = _strengths(concepts, theirs, names, above[1])
            ranked = statistics.Ranked(their_strengths, strengths)
            del their_strengths
            is_training = np.arange(ranked.shape[0]) < len(theirs)
            both = np.concatenate([training.truth, truth])
            associations["train_shift"] = self.tests.train_shift(ranked, is_training, both)
        slices = self._candidates(strengths, names, groups) if self.errors else []
        return _Part(names, groups, measured, amounts, associations, sweeps, sample, slices)

    def _examples_in(
        self, view: View, rows: Int64[np.ndarray, " m"], names: Collection[str]
    ) -> dict[str, Float32[np.ndarray, " m"]]:
        """The strengths of those concepts that were learnt from examples."""
        return {name: self.examples[name].above_in(view, rows) for name in names if name in self.examples}

    def _candidates(
        self, strengths: Float32[np.ndarray, "n c"], names: Sequence[str], groups: Sequence[tuple[int, ...]]
    ) -> list[Slice]:
        """The slices of the concepts that wrong predictions of a class have more of; q-values are not filled in."""
        truth = self.subject.truth
        assert truth is not None
        is_wrong = self.predicted != truth
        tested = compare_errors(strengths, truth, is_wrong, n_permutations=self.tests.n_permutations, rng=self.rng)
        ids = [str(self.view.store.ids[int(row)]) for row in self.subject.rows]
        classes = self.subject.classifier.classes
        return [
            slice_of(strengths[:, concept], truth == k, is_wrong, ids,
                     (classes[k], names[concept], groups[concept], float(size), float(p)))
            for k, concept, size, p in zip(*tested, strict=True)
        ]  # fmt: skip

    def _associations(self, strengths: Float32[np.ndarray, "n c"]) -> dict[str, list[Association | None]]:
        nothing: list[Association | None] = [None] * strengths.shape[1]
        found = dict.fromkeys(ASSOCIATIONS, nothing)
        ranked = statistics.Ranked(strengths)
        if self.subject.classifier.is_score:
            found["by_predicted"] = self.tests.correlate(ranked, self._scores)
            if self.subject.numbers is not None:
                found["by_true"] = self.tests.correlate(ranked, self.subject.numbers)
            return found
        one_stratum = np.zeros(len(strengths), np.int64)
        truth, predicted = self.subject.truth, self.predicted
        found["by_predicted"] = self.tests.associate(ranked, predicted, one_stratum)
        if truth is not None:
            found["by_true"] = self.tests.associate(ranked, truth, one_stratum)
            found["given_true"] = self.tests.associate(ranked, predicted, truth)
        return found

    @cached_property
    def _scores(self) -> Float32[np.ndarray, " n"]:
        """What a model of one number says of the audited rows."""
        subject, size = self.subject, 8192
        parts = [subject.classifier.logits(subject.raw(subject.rows[first : first + size]))[:, 0].numpy()
                 for first in range(0, len(subject.rows), size)]  # fmt: skip
        return np.concatenate(parts)

    def _concept(
        self, part: _Part, column: int, sizes: Sizes, associations: dict[str, Association | None]
    ) -> ConceptAudit:
        name, group = part.names[column], part.groups[column]
        classes = self.subject.classifier.classes
        fires = float(part.measured.tallies["remove"].n[column]) / len(self.subject.rows)
        is_target = name.casefold() in {one.casefold() for one in classes}
        if fires == 0:
            never = f"never fires on {self.view.store.address}"
            shift = associations["train_shift"]  # it may fire in the training rows
            return ConceptAudit(name, group, is_target, 0.0, train_shift=shift, test=self.test, note=never)
        place = _moved_most(part.measured, column)
        edits = {
            kind: _effect(
                tally, column, place, 0.0 if kind == "remove" else float(part.amounts[kind][column]), self._bounds
            )
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
        if self.sweep_row is not None:
            return sweep_row(self.subject, concepts, column, group, self.sweep_row, this, p99)
        order = self._sample_order[:, this]  # by the probability, so that the one in the middle is ordinary
        without = order[sample[order, column] <= 0]
        candidates = without if len(without) else order
        place = int(candidates[len(candidates) // 2])
        z = self._sample_activations[place, list(group)]
        return sweep_row(self.subject, concepts, column, group, int(self._sample_rows[place]), this, p99, z)

    @property
    def _bounds(self) -> tuple[float, float]:
        """Between which a change lies: of a probability, or of a score."""
        return (-np.inf, np.inf) if self.subject.classifier.is_score else (-1.0, 1.0)

    @cached_property
    def _sample_rows(self) -> Int64[np.ndarray, " m"]:
        return self.subject.rows[self.sample_places]

    @cached_property
    def _sample_activations(self) -> Float32[np.ndarray, "m d_sae"]:
        return self.view.table(self._sample_rows)

    @cached_property
    def _sample_probabilities(self) -> Float32[np.ndarray, "m k"]:
        logits = self.subject.classifier.logits(self.subject.raw(self._sample_rows))
        return (logits if self.subject.classifier.is_score else logits.softmax(1)).numpy()

    @cached_property
    def _sample_order(self) -> Int64[np.ndarray, "m k"]:
        return np.argsort(self._sample_probabilities, axis=0, kind="stable")

    def _note_predictions(self) -> None:
        seen = np.unique(self.predicted)
        if self.rare:
            few = ", ".join(self.rare[:3]) + (" ..." if len(self.rare) > 3 else "")
            self.notes.append(
                f"concepts left out because they fire in fewer than {self.fewest} rows: {len(self.rare):,} ({few})"
            )
        if len(seen) == 1 and not self.subject.classifier.is_score:
            only = self.subject.classifier.classes[int(seen[0])]
            self.notes.append(f"the classifier predicts {only!r} for every row, so there is no association to test")


def _rows_with(
    z: Float32[np.ndarray, "n l"], groups: Mapping[str, tuple[int, ...]], above: Mapping[str, np.ndarray]
) -> Int64[np.ndarray, " c"]:
    """In how many rows each concept fires; the columns of `z` are the groups' latents."""
    ends = np.cumsum([0, *map(len, groups.values())]).tolist()
    known = zip(groups, itertools.pairwise(ends), strict=True)
    return np.array([
        np.count_nonzero(above[name] if name in above else (z[:, first:last] > 0).any(1))
        for name, (first, last) in known
    ])  # fmt: skip


def _strengths(
    concepts: Concepts, z: Float32[np.ndarray, "n l"], names: Sequence[str], above: Mapping[str, np.ndarray]
) -> Float32[np.ndarray, "n c"]:
    """The strength of every concept in rows of activations; of those in `above` it is known already."""
    found: Float32[np.ndarray, "n c"] = concepts.readers(torch.from_numpy(z)).numpy()
    if above:
        found = found.copy()  # of single latents it is z
        for column, name in enumerate(names):
            found[:, column] = above.get(name, found[:, column])
    return found


def _moved_most(measured: Measured, column: int) -> int:
    """Place among the outputs of the one that is moved most."""
    tallies = [measured.tallies[kind] for kind in RANKED_BY]
    moved = [(tally.change[:, column] / tally.n[column].clamp_min(1)).abs() for tally in tallies]
    return int((moved[0] + moved[1]).argmax())


def _effect(tally: Tally, column: int, place: int, strength: float, bounds: tuple[float, float]) -> Effect | None:
    n = int(tally.n[column])
    if n == 0:
        return None
    mean = float(tally.change[place, column]) / n
    variance = max(0.0, float(tally.change2[place, column]) / n - mean**2)
    low, high = mean_interval(mean, variance, n, bounds=bounds)
    if not np.isfinite([low, high]).all():  # one row alone
        low = high = mean
    return Effect(mean, low, high, float(tally.flips[column]) / n, n, strength)


def _control(sizes: Sizes, effect: float) -> Control | None:
    if not len(sizes.remove):
        return None
    effects = np.stack([getattr(sizes, kind) for kind in RANKED_BY])
    known = ~np.isnan(effects)
    theirs = np.where(known, effects, 0).sum(0) / known.sum(0).clip(1)
    means = [float(one[~np.isnan(one)].mean()) if not np.isnan(one).all() else None for one in sizes]
    return Control(len(theirs), means[0], means[1], float(theirs.max()), float((theirs < effect).mean()))


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
    shares = (correct / n)[:, n >= FEWEST_ROWS]
    worst = [float(kind.min()) if shares.shape[1] else None for kind in shares]
    overall = (correct.sum((1, 2)) / n.sum()).tolist()
    return Debiasing(tuple(groups), worst[0], worst[1], worst[2], overall[0], overall[1], overall[2])


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
        self,
        strengths: Float32[np.ndarray, "n c"] | statistics.Ranked,
        labels: Int64[np.ndarray, " n"],
        strata: Int[np.ndarray, " n"],
    ) -> list[Association | None]:
        """For each column its association with `labels` among rows of one stratum; q-values are not filled in yet.

        None for a column without two different values, and for all where no stratum has two classes.
        """
        ranked = strengths if isinstance(strengths, statistics.Ranked) else statistics.Ranked(strengths)
        found: list[Association | None] = [None] * ranked.shape[1]
        columns = ranked.varying
        pairs = {k: n for k in self.watched if (n := statistics.n_pairs(labels == k, strata))}
        if not len(columns) or not pairs:
            return found
        tested = statistics.permutation_test(
            statistics.NetWins(ranked, strata, columns), np.stack([labels == k for k in pairs]).astype(np.float64),
            strata, n_permutations=self.n_permutations, rng=self.rng,
        )  # fmt: skip
        sizes = tested.sums / np.array(list(pairs.values()))[:, None]
        best = np.abs(sizes).argmax(0)
        for place, k in enumerate(pairs):
            own = np.flatnonzero(best == place)
            ends = statistics.cliffs_delta_interval(ranked, labels == k, strata, columns[own])
            for i, low, high in zip(own, *ends, strict=True):
                found[columns[i]] = _association(sizes[place, i], low, high, tested.p[i], self.classes[k])
        return found

    def correlate(self, ranked: statistics.Ranked, numbers: Float[np.ndarray, " n"]) -> list[Association | None]:
        """For each column Spearman's correlation with `numbers`, with Fisher's interval; q-values are not filled in."""
        found: list[Association | None] = [None] * ranked.shape[1]
        columns = ranked.varying
        if not len(columns) or np.ptp(numbers) == 0:
            return found
        wins = statistics.NetWins(ranked, np.zeros(len(numbers), np.int64), columns)
        rho, p = statistics.correlation_p(wins, numbers, n_permutations=self.n_permutations, rng=self.rng)
        half = statistics.Z_95 * np.sqrt((1 + rho**2 / 2) / max(len(numbers) - 3, 1))  # Bonett & Wright 2000
        ends = np.tanh(np.arctanh(rho.clip(-0.999999, 0.999999)) + half * np.array([[-1.0], [1.0]]))
        for i, size, low, high, value in zip(columns, rho, *ends, p, strict=True):
            found[i] = _association(size, low, high, value, self.classes[0])
        return found

    def train_shift(
        self,
        strengths: Float32[np.ndarray, "n c"] | statistics.Ranked,
        is_training: Bool[np.ndarray, " n"],
        truth: Int64[np.ndarray, " n"],
        strata: Int64[np.ndarray, " n"] | None = None,
    ) -> list[Association | None]:
        """For each column how much more it goes with a class in training rows than in the others.

        The effect is half of: Cliff's delta of training against other rows of the class, less the same of the other
        classes. Under the null hypothesis that training and other rows of a class have the column alike, membership
        may be shuffled within classes; whatever else separates the classes, in both sets of rows, does not count.

        Args:
            strata: Parts of the classes within which rows are compared and shuffled; None takes the classes.
        """
        strata = truth if strata is None else strata
        ranked = strengths if isinstance(strengths, statistics.Ranked) else statistics.Ranked(strengths)
        found: list[Association | None] = [None] * ranked.shape[1]
        columns = ranked.varying
        best: dict[int, tuple[float, float, int]] = {}
        for k in self.watched:
            sides = [truth == k, truth != k]
            pairs = [statistics.n_pairs(is_training[side], strata[side]) for side in sides]
            if not len(columns) or not all(pairs):
                continue
            weight = np.where(sides[0], 0.5 / pairs[0], -0.5 / pairs[1])
            tested = statistics.permutation_test(
                statistics.NetWins(ranked, strata, columns, weight), is_training[None].astype(np.float64),
                strata, n_permutations=self.n_permutations, rng=self.rng,
            )  # fmt: skip
            for i, (size, value) in enumerate(zip(tested.sums[0], tested.p, strict=True)):
                if i not in best or abs(size) > abs(best[i][0]):
                    best[i] = (float(size), min(1.0, float(value) * len(self.watched)), k)
        for k in self.watched:
            own = [i for i, one in best.items() if one[2] == k]
            if not own:
                continue
            is_class = truth == k
            of_class, of_rest = (
                statistics.cliffs_delta_estimate(ranked, is_training & side, np.where(side, strata, -1), columns[own])
                for side in (is_class, ~is_class)
            )
            ends = statistics.difference_interval(*of_class, *of_rest)
            for i, low, high in zip(own, ends.low / 2, ends.high / 2, strict=True):
                found[columns[i]] = _association(best[i][0], low, high, best[i][1], self.classes[k])
        return found


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
    subject: Subject,
    concepts: Concepts,
    column: int,
    group: Sequence[int],
    row: int,
    class_: int,
    p99: float,
    activations: Float32[np.ndarray, " g"] | None = None,
) -> Sweep:
    """The sweep of the concept `column` of `concepts`, whose latents are `group`, in a row of the store.

    Args:
        class_: Whose probability is computed.
        p99: Of the concept's natural strengths.
        activations: Of the group in that row, where they are known.
    """
    own = np.array([row], dtype=np.int64)
    members = concepts.owner == column
    z = torch.from_numpy(subject.view.table(own, group) if activations is None else activations[None])
    strengths = torch.linspace(0, 2 * p99, SWEEP_POINTS)
    classifier = subject.classifier
    u = classifier.features(subject.raw(own))
    move = strengths[:, None] * concepts.readers.pattern[members] - z
    edited = u + move @ concepts.rows[members]
    if classifier.unit_norm:
        edited = torch.nn.functional.normalize(edited, dim=1)
    readout = classifier.readout([class_])
    found = readout.outputs((edited @ readout.weight.T + readout.bias).T[:, :, None])[0, :, 0]
    strength = float((z[0] * concepts.readers.weight[members]).sum())
    return Sweep(str(subject.view.store.ids[row]), strength, p99, tuple(strengths.tolist()), tuple(found.tolist()))


class Sweeper:
    """Sweeps of any sample under the classifier of an audit that trained it on half of a store."""

    def __init__(
        self,
        sae: RunLike,
        on: EmbeddingStore | str | Path,
        target: str,
        *,
        where: str | None = None,
        modality: Modality | None = None,
        inference: Inference = "trained",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        """The arguments are those of `msae.audit`, and so is what is raised."""
        view = View(sae, on, modality, inference=inference, device=device)
        self.subject = make_subject(
            view, target=target, classifier=None, class_texts=None, train_store=None, seed=seed, where=where
        )
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
        made = self._concepts(concept.name, concept.latents)
        p99 = concept.sweep.natural_p99
        return sweep_row(self.subject, made, 0, concept.latents, row, classes.index(concept.class_), p99)

    def _made(self, name: str, group: tuple[int, ...]) -> Concepts:
        names = names_of(self.subject.view.run)
        example = None if names is None else names.example(name)
        example = example if example is not None and example.latents == group else None
        mean = torch.zeros(self.subject.view.sae.d_sae)
        z = self.subject.view.table(self.subject.rows, group)
        mean[list(group)] = torch.from_numpy(z.mean(0))
        return self.subject.concepts([group], mean, [example])
