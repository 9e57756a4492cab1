"""From a finding to a better classifier: several ways to take a concept out, side by side on rows that none has seen.

A fix is learnt on a third of the audited rows, chosen on another and judged on the last. Every way but the first gives
coefficients of the same form, so that whoever uses the classifier changes a file and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn import functional

from msae.base.errors import ConfigError
from msae.base.records import to_record
from msae.base.results import Result, shorten, text_table
from msae.concepts.concept import FEWEST
from msae.concepts.examples import ExampleConcept
from msae.concepts.strength import readers
from msae.measure.probe import C
from msae.sae.view import View
from msae.use.audit.slices import otsu_border
from msae.use.audit.subjects import Subject
from msae.use.classifier import LinearClassifier

MOST_LOST = 0.01
"""Overall accuracy that a recommended way may cost."""
LEVELLED = "level the concept's latents"
BALANCED_DRAWS = 10
"""Balanced samples whose classifiers are averaged, as in the paper."""


@dataclass(frozen=True)
class Way:
    """One way to take the concept out, judged on rows used for neither fitting nor choosing."""

    name: str
    worst: float
    """Accuracy of the worst group."""
    overall: float
    is_file: bool
    """It is a linear classifier again; else it needs the SAE whenever a row is classified."""


@dataclass(frozen=True, repr=False)
class Fix(Result):
    """The ways to take one concept out of a classifier, and the one that is recommended."""

    concept: str
    groups: str
    """Where the groups come from."""
    n_fit: int
    n_choose: int
    n_judge: int
    n_smallest: int
    """Rows of the smallest group among those that judge."""
    worst: float
    """Accuracy of the worst group before."""
    overall: float
    ways: tuple[Way, ...]
    """The recommended one first, then the best."""
    recommended: str | None
    """Of the ways that cost at most one point overall and raise the worst group, those within a standard error of the
    best: the one with the highest accuracy overall. None where there is none."""
    file: str | None = None

    def to_text(self) -> str:
        """The ways in a table, how they were judged, and what was written."""
        rows = [("as it is", f"{self.worst:.3f}", f"{self.overall:.3f}", "")]
        for way in self.ways:
            note = "recommended" if way.name == self.recommended else "" if way.is_file else "needs the SAE"
            rows.append((way.name, f"{way.worst:.3f}", f"{way.overall:.3f}", note))
        head = ("without " + shorten(self.concept, 20), "worst group", "all rows", "")
        closing = (
            f"{self.file} holds the recommended classifier"
            if self.file
            else "no way does better at a cost of at most one point overall, so nothing was written"
        )
        lines = [
            *text_table(head, rows, right=(1, 2)),
            f"accuracy on {self.n_judge:,} rows used for neither fitting nor choosing; groups by {self.groups}; "
            f"the smallest has {self.n_smallest} rows",
            closing,
        ]
        return "\n".join([*lines, *([self.doubt] if self.doubt else [])])

    @property
    def headline(self) -> str:
        way = self.recommended or "as it is"
        known = {one.name: one.worst for one in self.ways} | {"as it is": self.worst}
        return f"without {self.concept}: {way}, worst group {self.worst:.3f} -> {known[way]:.3f}"

    def to_json(self) -> dict[str, Any]:
        return dict(to_record(self))

    def records(self) -> list[dict[str, Any]]:
        """One record for each way."""
        return [{**to_record(way), "is_recommended": way.name == self.recommended} for way in self.ways]

    @property
    def doubt(self) -> str | None:
        """What to think of a recommendation that the rows that judge do not bear out."""
        ways = {way.name: way for way in self.ways}
        if self.recommended is None or ways[self.recommended].worst > self.worst:
            return None
        return (
            f"on these rows it does not raise the worst group ({self.worst:.3f} as it is), though it did on the rows "
            "that chose it: do not rely on it; audit more rows, or keep the classifier as it is"
        )


class TooFewRows(ConfigError):
    """A group is too small to learn, choose and judge a fix by."""


@dataclass(frozen=True)
class _Rows:
    """Some rows with all that a way may use."""

    x: Float[Tensor, "n d_in"]
    truth: Int64[np.ndarray, " n"]
    has: Bool[np.ndarray, " n"]
    """Whether a row has the concept, by its group or by the concept's firing."""
    z: Float32[np.ndarray, "n l"]
    """Of the concept's latents."""

    @property
    def group(self) -> Int64[np.ndarray, " n"]:
        found: Int64[np.ndarray, " n"] = 2 * self.truth + self.has
        return found

    def __getitem__(self, rows: Int64[np.ndarray, " m"]) -> _Rows:
        return _Rows(self.x[torch.from_numpy(rows)], self.truth[rows], self.has[rows], self.z[rows])

    def accuracies(self, logits: Float[Tensor, "n k"]) -> tuple[float, float]:
        """Of the worst group, and of all rows."""
        right = logits.argmax(1).numpy() == self.truth
        counts = np.bincount(self.group)
        shares = np.bincount(self.group, right)[counts > 0] / counts[counts > 0]
        return float(shares.min()), float(right.mean())


def fix_classifier(
    subject: Subject,
    concept: str,
    latents: tuple[int, ...],
    *,
    groups: str | None,
    file: Path | None,
    seed: int,
    example: ExampleConcept | None = None,
) -> tuple[Fix, LinearClassifier]:
    """The ways side by side, and the recommended classifier; the classifier as it is where nothing helps.

    Args:
        groups: The column that says which rows have the concept; without it the concept's firing does.
        file: Where to write it.
        example: The concept from examples that it is.

    Raises:
        ConfigError: No true classes, a score, or a group with too few rows.
    """
    if subject.truth is None or subject.classifier.is_score:
        raise ConfigError("a fix needs true classes to measure by; give --target COLUMN with classes")
    rows = _rows(subject, latents, groups, example)
    rng = np.random.default_rng(seed)
    parts = _thirds(rows.group, rng)
    fit, choose, judge = (rows[part] for part in parts)
    sizes = np.array(
        [np.bincount(part.group, minlength=2 * len(subject.classifier.classes)) for part in (fit, choose, judge)]
    )
    present = sizes.sum(0) > 0
    if sizes[:, present].min() < FEWEST or present.sum() < 3:
        raise TooFewRows(
            f"the smallest group of a true class with or without {concept!r} has {int(sizes[:, present].min())} rows "
            f"in a third of the audited rows; a fix needs {FEWEST}: audit more rows, or another --concept"
        )
    before = subject.classifier
    made = {name: way(subject, latents, fit, rng) for name, way in WAYS.items()}
    outputs = {name: _logits_of(classifier) for name, classifier in made.items()}
    outputs[LEVELLED] = _levelled(subject, latents, fit)
    worst, overall = choose.accuracies(before.logits(choose.x))
    chosen = {name: choose.accuracies(logits(choose)) for name, logits in outputs.items()}
    good = {name: chosen[name] for name in made if chosen[name][0] > worst and chosen[name][1] >= overall - MOST_LOST}
    best = None
    if good:  # of those that the rows cannot tell from the best, the one that is right most often overall
        highest = max(shares[0] for shares in good.values())
        error = (highest * (1 - highest) / int(sizes[1][present].min())) ** 0.5
        best = max(good, key=lambda name: (good[name][0] >= highest - error, good[name][1], good[name][0]))
    fixed = before
    if best is not None:  # chosen, it learns from the rows that chose it too
        made[best] = WAYS[best](subject, latents, rows[np.sort(np.concatenate(parts[:2]))], rng)
        outputs[best] = _logits_of(made[best])
        fixed = replace(made[best], source=f"{before.source}, {best} ({concept})")
        if file is not None:
            fixed.save(file)
    judged = {name: judge.accuracies(logits(judge)) for name, logits in outputs.items()}
    order = sorted(judged, key=lambda name: (name != best, -judged[name][0]))
    source = f"the column {groups}" if groups else f"where {concept} is clearly present"
    found = Fix(
        concept, source, len(parts[0]), len(parts[1]), len(parts[2]), int(sizes[2][present].min()),
        *judge.accuracies(before.logits(judge.x)),
        tuple(Way(name, *judged[name], name in made) for name in order),
        best, str(file) if file is not None and best is not None else None,
    )  # fmt: skip
    return found, fixed


def _logits_of(classifier: LinearClassifier) -> Callable[[_Rows], Tensor]:
    return lambda rows: classifier.logits(rows.x)


def _rows(
    subject: Subject, latents: tuple[int, ...], groups: str | None, example: ExampleConcept | None = None
) -> _Rows:
    view, rows, truth = subject.view, subject.rows, subject.truth
    assert truth is not None
    z = view.table(rows, list(latents))
    if groups is None:
        has = clearly_present(view, latents, z) if example is None else example.above_in(view, rows) > 0
    else:
        labels = view.store.labels(groups, option="--groups")
        known = sorted({label for row in rows if (label := labels[row]) is not None})
        if len(known) != 2:
            raise ConfigError(
                f"column {groups!r} has {len(known)} values in the audited rows; --groups takes a column of two, such "
                f"as true and false"
            )
        keep = np.array([labels[row] is not None for row in rows])
        rows, truth, z = rows[keep], truth[keep], z[keep]
        has = np.array([labels[row] == known[1] for row in rows])
    return _Rows(subject.raw(rows), truth, has, z)


def clearly_present(view: View, latents: tuple[int, ...], z: Float32[np.ndarray, "n l"]) -> Bool[np.ndarray, " n"]:
    """Where the concept is clearly present: above the strength that best divides weak from strong rows."""
    z_mean = torch.from_numpy(z).double().mean(0)
    read = readers([latents], z_mean, view.sae.W_dec.detach().cpu()[list(latents)])
    strength = read(torch.from_numpy(z))[:, 0].double().numpy()
    present: Bool[np.ndarray, " n"] = strength > otsu_border(strength)
    return present


def _thirds(group: Int64[np.ndarray, " n"], rng: np.random.Generator) -> list[Int64[np.ndarray, " m"]]:
    """Three random parts with as many rows of each group."""
    part = np.empty(len(group), np.int64)
    for number in np.unique(group):
        own = rng.permutation(np.flatnonzero(group == number))
        part[own] = np.arange(len(own)) % 3
    return [np.flatnonzero(part == number) for number in range(3)]


# --- The ways: each takes the subject, the latents, the rows to learn from and a generator, and uses what it needs
# ruff: noqa: ARG001


def _project(classifier: LinearClassifier, directions: Float[Tensor, "m d"]) -> LinearClassifier:
    """The classifier of features without these directions, counted from their mean."""
    basis = torch.linalg.qr(directions.double().T).Q
    weight = classifier.weight.double()
    return replace(classifier, weight=(weight - weight @ basis @ basis.T).float())


def _features(classifier: LinearClassifier, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    u = classifier.features(x)
    return functional.normalize(u, dim=1) if classifier.unit_norm else u


def decoder_direction(
    subject: Subject, latents: tuple[int, ...], fit: _Rows, rng: np.random.Generator
) -> LinearClassifier:
    """What the concept adds to an embedding, projected out."""
    mean = torch.zeros(subject.view.sae.d_sae)
    mean[list(latents)] = torch.from_numpy(fit.z.mean(0))
    return _shifted(subject.classifier, subject.concepts([latents], mean).direction, fit)


def encoder_rows(subject: Subject, latents: tuple[int, ...], fit: _Rows, rng: np.random.Generator) -> LinearClassifier:
    """What the concept is read from, projected out. Source: arXiv:2509.10809."""
    view, classifier = subject.view, subject.classifier
    rows = view.sae.W_enc.detach().cpu()[:, list(latents)].T
    to_features = view.standardizer.statistics[view.modality].scale / classifier.scale
    return _shifted(classifier, rows * to_features, fit)


def mean_difference(
    subject: Subject, latents: tuple[int, ...], fit: _Rows, rng: np.random.Generator
) -> LinearClassifier:
    """The mean difference of rows with and without the concept, within classes, projected out."""
    x, has = _within_classes(_features(subject.classifier, fit.x), fit)
    return _shifted(subject.classifier, (x * has[:, None]).sum(0, keepdim=True), fit)


def leace(subject: Subject, latents: tuple[int, ...], fit: _Rows, rng: np.random.Generator) -> LinearClassifier:
    """The smallest change after which no linear classifier reads the concept within a class.

    Source: Belrose et al. 2023, arXiv:2306.03819, theorem 4.2, with features and concept counted from their class's
    means, so that what the class alone explains stays.
    """
    classifier = subject.classifier
    x, has = _within_classes(_features(classifier, fit.x), fit)
    x, has = x.double(), has.double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values = values.clamp_min(values.max() * 1e-6 + float(values.mean()) * RIDGE)
    root, whiten = (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
    direction = whiten @ (x.T @ has / len(x))
    direction /= direction.norm().clamp_min(1e-12)
    weight = classifier.weight.double()
    erased = weight - torch.outer(weight @ root @ direction, direction @ whiten)
    return _recentred(replace(classifier, weight=erased.float()), classifier, fit)


RIDGE = 0.1
"""Share of the mean variance below which no direction's variance is taken to be: few rows underestimate small ones."""


def _within_classes(x: Float[Tensor, "n d"], fit: _Rows) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Features and presence less their means over the rows of the same true class."""
    x, has = x.clone(), torch.from_numpy(fit.has.astype(np.float32))
    for k in np.unique(fit.truth):
        own = torch.from_numpy(fit.truth == k)
        x[own] -= x[own].mean(0)
        has[own] -= has[own].mean()
    return x, has


def _shifted(classifier: LinearClassifier, directions: Float[Tensor, "m d"], fit: _Rows) -> LinearClassifier:
    return _recentred(_project(classifier, directions), classifier, fit)


def _recentred(fixed: LinearClassifier, before: LinearClassifier, fit: _Rows) -> LinearClassifier:
    """With biases that leave the logits of the balanced mean row as they were: the concept is at its middle now."""
    u = _features(before, fit.x)
    middle = torch.stack([u[torch.from_numpy(fit.group == group)].mean(0) for group in np.unique(fit.group)]).mean(0)
    return replace(fixed, bias=before.bias + (before.weight - fixed.weight) @ middle)


def retrained(subject: Subject, latents: tuple[int, ...], fit: _Rows, rng: np.random.Generator) -> LinearClassifier:
    """The last layer learnt anew on as many rows of each group. Source: Kirichenko et al. 2023, arXiv:2204.02937."""
    groups, counts = np.unique(fit.group, return_counts=True)
    parts = []
    for _ in range(BALANCED_DRAWS):
        drawn = [rng.choice(np.flatnonzero(fit.group == group), counts.min(), replace=False) for group in groups]
        parts.append(_logistic(subject.classifier, fit[np.sort(np.concatenate(drawn))], None))
    weight, bias = (torch.stack([getattr(one, key) for one in parts]).mean(0) for key in ("weight", "bias"))
    return replace(subject.classifier, weight=weight, bias=bias)


def reweighted(subject: Subject, latents: tuple[int, ...], fit: _Rows, rng: np.random.Generator) -> LinearClassifier:
    """Learnt anew with every group weighing the same."""
    return _logistic(subject.classifier, fit, 1 / np.bincount(fit.group)[fit.group])


def _logistic(like: LinearClassifier, rows: _Rows, weights: Float[np.ndarray, " n"] | None) -> LinearClassifier:
    """Logistic regression on the features of a classifier, as `msae.measure.probe` fits it."""
    import warnings

    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=C, max_iter=1000)
    if weights is not None:
        weights = weights * len(weights) / weights.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged after 1,000 iterations: the predictions stand
        model.fit(_features(like, rows.x).double().numpy(), rows.truth, sample_weight=weights)
    weight, bias = (torch.from_numpy(value).float() for value in (model.coef_, model.intercept_))
    if len(weight) == 1:
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    full_weight, full_bias = torch.zeros_like(like.weight), torch.full_like(like.bias, -1e4)
    seen = torch.from_numpy(model.classes_)
    full_weight[seen], full_bias[seen] = weight, bias
    return replace(like, weight=full_weight, bias=full_bias)


WAYS = {
    "project out its direction": decoder_direction,
    "project out its encoder rows": encoder_rows,
    "project out the mean difference": mean_difference,
    "erase it in closed form (LEACE)": leace,
    "weigh groups alike": reweighted,
    "retrain on balanced groups": retrained,
}


def _levelled(subject: Subject, latents: tuple[int, ...], fit: _Rows) -> Callable[[_Rows], Tensor]:
    """The logits of rows in which the concept's latents are at their mean."""
    view = subject.view
    W_dec = view.sae.W_dec.detach().cpu()[list(latents)] / view.standardizer.statistics[view.modality].scale
    mean = fit.z.mean(0)
    return lambda rows: subject.classifier.logits(rows.x - torch.from_numpy(rows.z - mean) @ W_dec)
