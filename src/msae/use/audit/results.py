"""What an audit found; the meaning of every number is in docs/audit.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from msae.base import records
from msae.base.errors import ConfigError, nearest
from msae.base.results import Result, shorten, text_table
from msae.use.audit.fix import Fix
from msae.use.audit.slices import Slice
from msae.use.classifier import SCORE

MAX_JSON = 50_000_000
"""Characters of an audit that is read."""
OWN = 0.75
"""Share of an association that must be left beside stronger concepts: less is leakage that their strata missed."""
SAID = 5
"""Concepts of the training rows alone that the verdict names."""
LEVEL = 0.05
"""The false discovery rate up to which a concept is reported."""
TESTS = {
    "train_shift": "goes with the class in the training rows more than in the audited rows",
    "given_true": "goes with the predictions among rows of one true class",
    "by_predicted": "goes with the predictions",
}
"""The tests of which one is chosen for an audit, the first that its rows allow, and what each says of a concept."""


@dataclass(frozen=True)
class Association:
    """How strongly a concept's strength goes with a class."""

    effect_size: float
    """Cliff's delta of the strength, in [-1, 1]: positive where rows of the class have more of the concept."""
    low: float
    """Lower end of the 95 % interval of `effect_size`."""
    high: float
    auroc: float
    """Probability that a row of the class has more of the concept than another row; (effect_size + 1) / 2."""
    p: float
    """Of a two-sided permutation test."""
    q: float
    """`p` adjusted by Benjamini and Hochberg for the number of concepts that this test was made of."""
    class_: str
    """The class; with more than two classes the one of the largest effect."""


@dataclass(frozen=True)
class Effect:
    """What one edit did to the rows that it changed."""

    change: float
    """Mean change of the class's probability, in [-1, 1]."""
    low: float
    """Lower end of the 95 % interval of `change`."""
    high: float
    flip_rate: float
    """Share of the edited rows whose predicted class changed."""
    n: int
    """Rows that were edited."""
    strength: float
    """What the concept was set to."""


@dataclass(frozen=True)
class Control:
    """The same edits made with random latents that fire as often and as strongly."""

    n: int
    """Random latents, or random groups of as many latents as the concept has."""
    remove: float | None
    """Mean size of their change of the class's probability."""
    set_p50: float | None
    largest: float | None
    """The largest causal effect among them."""
    beaten: float
    """Share of them whose causal effect is smaller than the concept's."""


@dataclass(frozen=True)
class Group:
    """Rows of one true class that do or do not have the concept."""

    class_: str
    present: bool
    n: int
    accuracy: float | None
    accuracy_removed: float | None
    """Once the concept is removed from every row."""
    accuracy_levelled: float | None
    """Once the concept is at its mean in every row."""


@dataclass(frozen=True)
class Debiasing:
    """Accuracy before and after the concept is taken out as a clue.

    Two ways: removed, that is 0 in every row; or levelled, that is at its mean in every row. A classifier that has
    learnt "no hat, so a circle" says so of rows without hats, and removal makes all rows such; levelling does not.
    """

    groups: tuple[Group, ...]
    worst: float | None
    """Accuracy of the worst group that has at least ten rows."""
    worst_removed: float | None
    worst_levelled: float | None
    overall: float
    overall_removed: float
    overall_levelled: float


@dataclass(frozen=True)
class Sweep:
    """One sample's class probability while its concept goes from 0 to twice its natural p99."""

    id: str
    own: float
    """The sample's own strength."""
    natural_p99: float
    strengths: tuple[float, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class ConceptAudit(Result):
    """Everything about one concept. A None is explained in `note`."""

    name: str
    latents: tuple[int, ...]
    is_target: bool
    """The concept bears the name of a class, so that its effect is expected."""
    firing_rate: float
    """Share of the audited rows in which any of its latents fires."""
    class_: str | None = None
    """The class whose probability the edits are about: with more than two, the one that they move most."""
    effect: float = 0.0
    """The causal effect: the mean size of `remove` and `set_p50`, of rows with the concept
    and of rows without it at a strength that is typical. By `set_p99` the concepts with a long tail would come first.
    """
    by_predicted: Association | None = None
    by_true: Association | None = None
    given_true: Association | None = None
    """By predicted class among rows of the same true class: what the truth does not explain."""
    train_shift: Association | None = None
    """By true class, in the training rows beyond the audited ones; where a training store was given."""
    test: str | None = None
    """Which of `TESTS` the audit reports, the same for all of its concepts; None where nothing could be tested."""
    remove: Effect | None = None
    set_p50: Effect | None = None
    set_p90: Effect | None = None
    set_p99: Effect | None = None
    control: Control | None = None
    debiasing: Debiasing | None = None
    sweep: Sweep | None = None
    beside_stronger: Association | None = None
    """By the audit's test, among rows alike in the stronger concepts that stand out; None for the first of them, and
    for those that would not stand out anyway."""
    note: str | None = None

    @property
    def latent(self) -> int:
        """The first of its latents."""
        return self.latents[0]

    @property
    def effect_low(self) -> float:
        """Lower end of the 95 % interval of `effect`."""
        edits = [edit for edit in (self.remove, self.set_p50) if edit is not None]
        ends = [max(0.0, edit.low if edit.change > 0 else -edit.high) for edit in edits]
        return sum(ends) / len(ends) if ends else 0.0

    @property
    def pull(self) -> float:
        """Its effect times the size of its association: how far it can set the answers for the classes apart. One that
        moves answers much but hardly goes with the classes moves them for all classes alike. Of a score, which has no
        classes, it is the effect."""
        if self.class_ == SCORE:
            return self.effect
        return 0.0 if self.main is None else self.effect * abs(self.main.effect_size)

    @property
    def is_beyond_controls(self) -> bool:
        """Its effect, at the lower end of its interval, is larger than that of every random latent like it."""
        largest = None if self.control is None else self.control.largest
        return largest is not None and self.effect_low > largest

    @property
    def stands_out(self) -> bool:
        """It goes with the classes (q < .05 by the audit's one test), its effect is beyond its controls', and its
        association is its own: at least three quarters are left among rows alike in stronger concepts, with p < .05."""
        main, beside = self.main, self.beside_stronger
        if main is None or main.q >= LEVEL or not self.is_beyond_controls:
            return False
        return beside is None or (beside.p < LEVEL and abs(beside.effect_size) >= OWN * abs(main.effect_size))

    @property
    def is_in_training_alone(self) -> bool:
        """It goes with a class in the training rows (q < .05) and fires in none of the audited rows, so that no effect
        can be measured here."""
        return self.firing_rate == 0 and self.main is not None and self.main.q < LEVEL

    @property
    def main(self) -> Association | None:
        """The association that the audit reports, by its one `test`."""
        found: Association | None = None if self.test is None else getattr(self, self.test)
        return found

    @property
    def towards(self) -> str | None:
        """Where more of the concept moves the model: `towards CLASS`, `away from CLASS`; a score `up` or `down`."""
        change = self.set_p50.change if self.set_p50 else -self.remove.change if self.remove else 0.0
        if change == 0 or self.class_ is None:
            return None
        if self.class_ == SCORE:
            return "up" if change > 0 else "down"
        return f"{'towards' if change > 0 else 'away from'} {self.class_}"

    def to_json(self) -> dict[str, Any]:
        """JSON values by the contract's keys."""
        main = self.main
        first = {
            "latent": self.latent,
            "name": self.name,
            "effect_size": main and main.effect_size,
            "p": main and main.p,
            "q": main and main.q,
            "pull": self.pull,
            "flip_rate": self.remove and self.remove.flip_rate,
        }
        rest: dict[str, Any] = _plain(self)
        return first | rest

    def records(self) -> list[dict[str, Any]]:
        """The concept's row of the audit's table."""
        main, groups = self.main, self.debiasing
        return [
            {
                "name": self.name,
                "latents": ", ".join(f"#{latent}" for latent in self.latents),
                "is_target": self.is_target,
                "towards": self.towards,
                "effect": self.effect,
                "pull": self.pull,
                "largest_control": self.control and self.control.largest,
                "effect_size": main and main.effect_size,
                "low": main and main.low,
                "high": main and main.high,
                "p": main and main.p,
                "q": main and main.q,
                "firing_rate": self.firing_rate,
                "flip_rate": self.remove and self.remove.flip_rate,
                "worst": groups and groups.worst,
                "worst_removed": groups and groups.worst_removed,
                "worst_levelled": groups and groups.worst_levelled,
                "note": self.note,
            }
        ]

    def to_text(self) -> str:
        """Every figure of the concept that is no table of its own, one a line."""
        values = {key: value for key, value in self.records()[0].items() if value is not None}
        width = max(map(len, values))
        return "\n".join(
            f"{key:<{width}}  {f'{value:.3g}' if isinstance(value, float) else value}" for key, value in values.items()
        )


@dataclass(frozen=True, eq=False)
class Sample:
    """Some of the audited rows, kept for plots."""

    rows: Int64[np.ndarray, " m"]
    predicted: Int64[np.ndarray, " m"]
    truth: Int64[np.ndarray, " m"] | None
    strengths: Float32[np.ndarray, "m c"]
    """In the order of `Audit.concepts`."""


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """What a classifier relies on, concept by concept, the strongest causal effect first.

    Concepts that bear the name of a class come last: a classifier of squares should react to squares.
    """

    target: str | None
    on: str
    classes: tuple[str, ...]
    n: int
    """Rows audited."""
    n_left_out: int
    """Rows without a label, or with one that the classifier does not know."""
    classifier: dict[str, Any]
    settings: dict[str, Any]
    concepts: tuple[ConceptAudit, ...]
    notes: tuple[str, ...] = ()
    fix: Fix | None = None
    """How one concept is best taken out of the classifier; where that was asked for."""
    slices: tuple[Slice, ...] | None = None
    """Candidate slices of errors, class by class; where they were asked for."""
    sample: Sample | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, name: str | int) -> ConceptAudit:
        """The audit of one concept, by its name in any letter case, or by the number of an unnamed latent.

        Raises:
            ConfigError: No such concept was audited; the message names the nearest.
        """
        known = {concept.name.casefold(): concept for concept in self.concepts}
        name = f"#{name}" if isinstance(name, int) else name
        found = known.get(name.casefold().strip())
        if found is None:
            names = [concept.name for concept in self.concepts]
            hint = nearest(name, names) or f"; {len(names)} were, such as {', '.join(map(repr, names[:3]))}"
            raise ConfigError(f"no concept {name!r} was audited{hint}")
        return found

    def reported(self) -> list[ConceptAudit]:
        """The concepts that stand out: they go with the classes, and do more than every random latent like them.

        Then those that go with the classes in the training rows alone, whose effect cannot be measured here.
        """
        return self.standing_out + self.in_training_alone

    @property
    def standing_out(self) -> list[ConceptAudit]:
        """The concepts that stand out, those of the largest pull first.

        Those that bear the name of a class come last: a classifier of squares should react to squares.
        """
        found = [one for one in self.concepts if one.stands_out]
        return sorted(found, key=lambda one: (one.is_target, -one.pull))

    @property
    def in_training_alone(self) -> list[ConceptAudit]:
        """The concepts that go with the classes in the training rows and fire in none of the audited rows."""
        return [concept for concept in self.concepts if concept.is_in_training_alone]

    def to_json(self) -> dict[str, Any]:
        """JSON values by the contract's keys."""
        kept = ("target", "on", "classes", "n", "n_left_out", "classifier", "settings", "notes", "fix", "slices")
        record: dict[str, Any] = {name: _plain(getattr(self, name)) for name in kept}
        return record | {"verdict": self.verdict, "concepts": [concept.to_json() for concept in self.concepts]}

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Audit:
        """The audit in a text that `msae audit --json` wrote, without the sample of rows that plots need.

        Raises:
            ConfigError: It is no such text; the message begins with `where`.
        """
        if len(text) > MAX_JSON:
            raise ConfigError(f"{where} has {len(text):,} characters, more than any audit; make it with --json")
        try:
            found: Audit = records.checked(json.loads(text, object_hook=_as_fields), cls)
        except (ValueError, TypeError, RecursionError) as err:
            raise ConfigError(
                f"{where} is not what msae audit writes ({type(err).__name__}: {err}); make it with --json"
            ) from err
        unknown = next((one.test for one in found.concepts if one.test not in (None, *TESTS)), None)
        if unknown is not None:
            raise ConfigError(f"{where} reports the test {unknown!r} of another version of msae; audit again")
        return found

    def records(self) -> list[dict[str, Any]]:
        """One record for each concept, in the order of `concepts`."""
        return [row for concept in self.concepts for row in concept.records()]

    @property
    def is_score(self) -> bool:
        """The model gives a number and no classes."""
        return bool(self.classifier.get("is_score"))

    @property
    def n_by_chance(self) -> float:
        """How many concepts would stand out if all were random latents: of as many, each has the largest effect of 21
        (of itself and its controls) as often as any other."""
        n_tested = sum(one.main is not None and one.main.q < LEVEL and one.firing_rate > 0 for one in self.concepts)
        return n_tested / (1 + int(self.settings.get("n_controls", 20)))

    @property
    def ranked(self) -> list[ConceptAudit]:
        """Those that stand out; none where hardly more do than chance would have, that is, not even one standard
        deviation more."""
        found = self.standing_out
        return found if len(found) > self.n_by_chance + self.n_by_chance**0.5 else []

    @property
    def shown(self) -> list[ConceptAudit]:
        """What the table and the page begin with: the concepts that were asked for, or else those that are ranked."""
        return list(self.concepts) if self.settings.get("asked") else self.ranked

    @property
    def verdict(self) -> str:
        """What the audit found, in a few sentences."""
        alone = self.in_training_alone
        if not alone:
            return self._measured
        some = ", ".join(f"{one.name} (q {one.main.q:.2g})" for one in alone[:SAID] if one.main)
        some += f" and {len(alone) - SAID:,} more" if len(alone) > SAID else ""
        goes, they = ("goes", "it fires") if len(alone) == 1 else ("go", "they fire")
        return (
            f"{self._measured} In the training rows {some} {goes} with the classes, but {they} in none of the audited "
            f"rows, so the effect cannot be measured here; audit rows that have it."
        )

    @property
    def _measured(self) -> str:
        """What the effects in the audited rows say."""
        n_out, chance = sum(one.stands_out for one in self.concepts), self.n_by_chance
        if self.is_score:
            head = f"The score of {self.n:,} rows is {self.classifier['mean']:.3g} on average (standard deviation "
            head += f"{self.classifier['sd']:.2g})"
            known = self.classifier.get("correlation")
            head += "" if known is None else f" and goes with the true numbers at a rank correlation of {known:.2f}"
        else:
            accuracy = self.classifier.get("accuracy")
            head = (
                f"The classifier is right in {accuracy:.1%} of" if accuracy is not None else "The classifier has seen"
            )
            head += f" {self.n:,} rows of {len(self.classes)} classes"
        if self.settings.get("asked"):
            if len(self.concepts) == 1:
                verb = "stands out" if n_out else "does not stand out"
                return f"{head}; {self.concepts[0].name} {verb} beyond its controls."
            which = f"{n_out} of the {len(self.concepts):,} concepts asked for"
            return f"{head}; {which} {'stands' if n_out == 1 else 'stand'} out beyond their controls."
        of = f"of {len(self.concepts):,} concepts"
        if not self.ranked:
            few = f"{n_out} {of} do more than every one of {self.settings.get('n_controls')} random latents like them"
            return f"{head}. Nothing stands out: {few}, where chance would have {chance:.1f}."
        out = "stands out beyond its controls" if n_out == 1 else "stand out beyond their controls"
        return f"{head}; {n_out} {of} {out}, where chance would have {chance:.1f}."

    def to_text(self, n: int = 20) -> str:
        """The verdict, the concepts that stand out in a table of six columns, and what the columns mean."""
        facts = [str(self.classifier.get("source", "")), self.on]
        facts += [f"{self.n_left_out:,} rows without a known label left out"] if self.n_left_out else []
        lines = [self.verdict, "; ".join(fact for fact in facts if fact)]
        ranked = self.shown
        if ranked:
            head = ("concept", "pushes", "by", "q", "rows", "what helps")
            lines += ["", *text_table(head, [_cells(concept, self.n) for concept in ranked[:n]], right=(2, 3, 4))]
            lines += [f"{len(ranked) - n} more; --json FILE writes all"] if len(ranked) > n else []
            lines += ["", *self._legend(ranked)]
        lines += ["", self.fix.to_text()] if self.fix else []
        lines += ["", *_slice_lines(self.slices)] if self.slices is not None else []
        return "\n".join([*lines, "", *(f"note: {note}" for note in self.notes)]).rstrip()

    def _legend(self, ranked: Sequence[ConceptAudit]) -> list[str]:
        test = next((concept.test for concept in ranked if concept.test), None)
        moved = "score" if self.is_score else "probability of the class"
        lines = [
            "pushes: where more of the concept moves the model; (class) marks a class's own name, which is no news",
            f"by: mean change of the {moved} when the concept is removed or set; in brackets the largest of "
            f"{self.settings.get('n_controls')} random latents",
            "rows: in how many rows the concept fires",
        ]
        if not self.is_score and not self.settings.get("asked") and len(ranked) > 1:
            lines.append("first comes what both moves the answers and goes with the classes: by, times the association")
        if test is not None:
            lines.insert(
                2, f"q: the smallest false discovery rate at which one may say: it {TESTS[test]} (test {test})"
            )
        if any(concept.debiasing for concept in ranked):
            lines.append(
                "what helps: accuracy of the worst group now, and with the concept removed or levelled (at its mean); "
                "--fix FILE writes a better classifier"
            )
        n_others = len(self.concepts) - len({one.name for one in (*ranked, *self.in_training_alone)})
        if not n_others:
            return lines
        return [*lines, f"{n_others:,} concepts do no more than random latents and are not ranked; --json has them"]


def _slice_lines(slices: Sequence[Slice]) -> list[str]:
    if not slices:
        return ["no concept is more common among the wrong predictions of a class than among the right ones (q < .05)"]
    rows = [
        (one.class_, shorten(one.name), f"{one.n:,}", f"{one.error:.1%}", f"{one.error_elsewhere:.1%}", f"{one.q:.2g}")
        for one in slices
    ]
    return [
        *text_table(("class", "concept", "rows", "wrong", "wrong elsewhere", "q"), rows, right=(2, 3, 4, 5)),
        "rows of the class in which the concept is clearly present, and how many of them, and of the others, are wrong",
    ]


def _cells(concept: ConceptAudit, n: int) -> list[str]:
    main, control = concept.main, concept.control
    largest = f" ({control.largest:.3f})" if control and control.largest is not None else ""
    return [
        shorten(concept.name) + (" (class)" if concept.is_target else ""),
        concept.towards or "-",
        f"{concept.effect:.3f}{largest}" if concept.remove or concept.set_p50 else "-",
        "-" if main is None else f"{main.q:.2g}",
        f"{round(concept.firing_rate * n):,}",
        what_helps(concept.debiasing),
    ]


def what_helps(groups: Debiasing | None) -> str:
    """The worst group's accuracy, and by which of the two ways it rises."""
    if groups is None or groups.worst is None:
        return "-"
    ways = {"levelled": groups.worst_levelled, "removed": groups.worst_removed}
    better = {way: value for way, value in ways.items() if value is not None and value > groups.worst}
    if not better:
        return f"{groups.worst:.3f}, nothing here"
    way = max(better, key=lambda way: better[way])
    return f"{groups.worst:.3f} > {better[way]:.3f} {way}"


def _plain(value: Any) -> Any:
    """JSON values; `class_` is called `class`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name.rstrip("_"): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _as_fields(keys: dict[str, Any]) -> dict[str, Any]:
    """An object of JSON with `class` called `class_` again, but for the count of a class of that name."""
    named = isinstance(keys.get("class", 0), str | None)
    return {"class_" if named and key == "class" else key: value for key, value in keys.items()}
