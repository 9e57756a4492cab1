"""`ConceptNames`: which latents have a name, with the evidence for it, in names.json.

The keys of the file and the rules behind them are in docs/naming.md.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from msae.base.errors import ConfigError, RunError, nearest
from msae.base.files import read_json, write_json
from msae.base.records import of_record, to_record
from msae.base.results import Result, shorten, text_table
from msae.concepts.examples import ExampleConcept, load_examples
from msae.data.sampled import whole
from msae.data.store import EmbeddingStore
from msae.sae.run import Run, RunLike

SCHEMA_VERSION = 1
FILE = "names.json"

Rule = Literal["evidence", "poster"]

MIN_WORDS = 20
"""Words that captions must mention, or that a vocabulary must have, to confirm a name: of fewer, a word at random comes
first in more than 5 % of cases."""
AGREEMENT_SHARE = 1 / MIN_WORDS
"""A name must be among this share of the words that occur in the rows, by AUROC: so rarely is a word at random. Of
fewer than 20 words not even the first is, so that such rows cannot confirm a name."""


HELD_AUROC = 0.65
"""A name must separate the rows that mention it at least so well: less is a latent of a small part of what it says."""


@dataclass(frozen=True)
class Agreement:
    """How well a latent's activation separates the rows whose caption or label contains its name."""

    auroc: float
    """Probability that a row with the word activates the latent more than a row without it."""
    low: float
    """Lower end of the 95 % interval of `auroc`."""
    high: float
    n_with: int
    """Rows that contain the name or one of its synonyms."""
    n_without: int
    rank: int
    """Place of the name among all words that occur in the rows, by their AUROC for this latent; 1 is the best."""
    n_words: int
    """Words, synonyms counted once, that occur often enough to be ranked."""
    fires_with: float
    """Share of the rows with the name in which the latent is active."""
    fires_without: float

    @property
    def is_tested(self) -> bool:
        """Whether the rows can confirm or refuse the name: they mention enough words to compare it with."""
        return self.n_words >= MIN_WORDS

    @property
    def holds(self) -> bool:
        """Activation and word go together, and hardly any other word goes better with the activation."""
        return self.is_tested and self.low > HELD_AUROC and self.rank <= AGREEMENT_SHARE * self.n_words


@dataclass(frozen=True)
class RowEvidence:
    """How well a latent's activation goes with the similarity of rows to its name; the rows did not choose the name."""

    store: str
    fingerprint: str
    """Of the embeddings of that store."""
    n: int
    """Rows that judged the name; as many others chose it."""
    correlation: float
    """Of the activation and the similarity of the row to the name."""
    rank: int
    """Place of the name among all words, synonyms counted once, by that correlation; 1 is the best."""
    n_words: int
    n_clear: int
    """Rows in which the latent is clearly active: at least its mean where it fires."""
    fits: float
    """Share of those to which the name is among the nearest 5 % of all words."""
    low: float
    """Lower end of the 95 % interval of `fits`."""
    fits_elsewhere: float
    """The same share of all other rows."""
    p: float
    """The chance of so many fits, were the rows that the name fits dealt out at random."""
    q: float
    """`p` adjusted for the number of latents that were judged: the share of names, among those with a q at most as
    large, that go with the activation by chance."""
    contrast: float | None = None
    """How much more similar to the name those rows are than all rows, in standard deviations; None in files that
    earlier versions wrote."""


@dataclass(frozen=True)
class Concept:
    """A latent that has a name with evidence."""

    latent: int
    name: str
    cosine: float
    """Of the decoder row and the word's embedding."""
    margin: float | None
    """`cosine` less that of the runner-up; None where there is no other word."""
    runner_up: str | None = None
    """The nearest word that is not a synonym of the name."""
    p: float | None = None
    """Share of random directions that come as near to some word; None by the poster's rule, and where the name is not
    the nearest word of the decoder row."""
    q: float | None = None
    """`p` adjusted for the number of latents: the share of latents that lie as near to some word by chance, among those
    with a q at most as large. A name may be wrong without being chance."""
    synonyms: tuple[str, ...] = ()
    """Other words with nearly the embedding of the name."""
    agreement: Agreement | None = None
    """None where no captions were given, or too few of them contain the name."""
    text_fires: bool | None = None
    """Whether the name, encoded as text, activates the latent; None by the poster's rule."""
    text_rank: int | None = None
    """Place of the name among all words by how much each, encoded as text, activates the latent; 1 is the most."""
    images_fire: bool | None = None
    """Whether images of it activate the latent more than others do; None where that is not known."""
    rows: RowEvidence | None = None
    """None where no pictures were given, or they did not confirm the name."""

    @property
    def is_confirmed(self) -> bool:
        """Whether rows confirmed the name: pictures that are like the word, or captions that contain it."""
        return self.rows is not None or (self.agreement is not None and self.agreement.holds)

    @property
    def shown(self) -> str:
        """The name as people are shown it: a word that no rows have confirmed is only the nearest word."""
        return self.name if self.is_confirmed else nearest_word(self.name)

    @property
    def is_multimodal(self) -> bool | None:
        """Both the named text and images of it activate the latent; None where that is not known."""
        if self.text_fires is None or self.images_fire is None:
            return None
        return self.text_fires and self.images_fire


def nearest_word(word: str) -> str:
    """How a word is shown that lies near a latent and that no rows have confirmed."""
    return f"nearest word: {word}"


@dataclass(frozen=True)
class Candidate:
    """A word near a latent's decoder row, whether or not the latent has earned a name."""

    word: str
    cosine: float


@dataclass(frozen=True, repr=False)
class ConceptNames(Result):
    """The named latents of one SAE, in the order of the latents, and what the names rest on."""

    rule: Rule
    d_sae: int
    concepts: tuple[Concept, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    """Latents that pass each part of the rule, as in docs/naming.md."""
    nearest_words: tuple[tuple[Candidate, ...], ...] = field(default=(), repr=False)
    """For every latent, named or not, its nearest words; empty where they were not kept."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Settings, vocabulary and encoder, and a hash of the weights, `sae`."""
    examples: Mapping[str, ExampleConcept] = field(default_factory=dict, repr=False)
    """Concepts from examples, by their names in lower case. They lie in a file of their own."""

    def __len__(self) -> int:
        """Number of named latents."""
        return len(self.concepts)

    def __iter__(self) -> Iterator[Concept]:
        return iter(self.concepts)

    def __getitem__(self, name: str) -> list[int]:
        """The latents of that name; see `latents_of`."""
        return self.latents_of(name)

    def __contains__(self, name: object) -> bool:
        """Whether a latent has that name, or a synonym of it, or it is a concept from examples."""
        return isinstance(name, str) and (name.casefold().strip() in self._by_name or self.example(name) is not None)

    def example(self, name: str) -> ExampleConcept | None:
        """The concept from examples of that name, in any letter case; it goes before a latent's own name."""
        return self.examples.get(name.casefold().strip())

    @property
    def by_name(self) -> dict[str, list[int]]:
        """The latents of each name, synonyms apart, in the order of the names."""
        found: dict[str, list[int]] = {}
        for concept in sorted(self.concepts, key=lambda one: one.name):
            if self.example(concept.name) is None:
                found.setdefault(concept.name, []).append(concept.latent)
        return found | {one.name: list(one.latents) for one in self.examples.values()}

    def concept_of(self, latent: int) -> Concept | None:
        """The concept of a latent, or None where the latent is unnamed.

        Raises:
            ConfigError: There is no such latent.
        """
        self._check(latent)
        return self._by_latent.get(latent)

    def name_of(self, latent: int) -> str | None:
        """The name of a latent, or None where it is unnamed.

        Raises:
            ConfigError: There is no such latent.
        """
        concept = self.concept_of(latent)
        return concept.name if concept else None

    def shown(self, latent: int) -> str | None:
        """The text that people are shown for a latent, as in `Concept.shown`; None where it is unnamed.

        Raises:
            ConfigError: There is no such latent.
        """
        concept = self.concept_of(latent)
        return concept.shown if concept else None

    def shown_name(self, name: str) -> str:
        """The text that people are shown for a name, or for anything else that a concept is written as.

        A name of several latents is confirmed where that of one of them is.
        """
        latents = self.latents_of(name) if name in self and self.example(name) is None else []
        if not latents or any(self._by_latent[latent].is_confirmed for latent in latents):
            return name
        return nearest_word(name)

    @property
    def confirmed(self) -> list[Concept]:
        """The concepts whose names rows have confirmed."""
        return [concept for concept in self.concepts if concept.is_confirmed]

    def summary(self) -> list[str]:
        """How many names were tested on which rows, and how many held: a sentence for each kind of evidence."""
        on, counts = Path(str(self.record.get("on", ""))).name, self.counts
        lines = []
        if (shown := self.record.get("shown_on")) is not None:
            lines.append(
                f"no name was tested on {Path(shown).name}, so each is only the nearest word here; to test them, type: "
                f"msae name RUN --on {shown}"
            )
        if "rows_tested" in counts:
            n, modality = self.record["on_rows"], self.record["on_modality"]
            lines.append(
                f"{counts['rows_tested']:,} names were tested on {n:,} {modality}s of {on}, chosen on one half and "
                f"judged on the other: {counts['rows_held']:,} held"
            )
        if "tested" in counts:
            lines.append(f"{counts['tested']:,} names were tested on captions of {on}: {counts['agree']:,} held")
        if not lines:
            lines.append(
                "no name was tested on any rows: each is the word nearest to a decoder row and may be wrong; to test "
                "them, type: msae name RUN --on STORE"
            )
        if n_unknown := self.record.get("n_unknown_words"):
            n = self.record["n_words"] + n_unknown
            lines.append(f"{n_unknown:,} of {n:,} words were left out: the encoder does not know them")
        return lines

    def elsewhere(self, store: EmbeddingStore) -> ConceptNames:
        """The same names for rows that did not test them: each is only the nearest word there."""
        concepts = tuple(dataclasses.replace(one, rows=None, agreement=None) for one in self.concepts)
        return dataclasses.replace(self, concepts=concepts, record={**self.record, "shown_on": store.address})

    def latents_of(self, name: str) -> list[int]:
        """Every latent that bears the name or a synonym of it, in any letter case; wide SAEs have several.

        Raises:
            ConfigError: No latent bears it; the message names the nearest name that one bears.
        """
        example = self.example(name)
        if example is not None:
            return list(example.latents)
        found = self._by_name.get(name.casefold().strip())
        if found is None:
            known = [*(one.name for one in self.concepts), *(one.name for one in self.examples.values())]
            hint = nearest(name.casefold(), known) or f"; {len(set(known))} names are known, such as {known[:3]}"
            raise ConfigError(f"no latent is named {name!r}{hint if known else '; no latent of this SAE is named'}")
        return list(found)

    def candidates_of(self, latent: int) -> tuple[Candidate, ...]:
        """The words nearest to a latent, named or not, the nearest first.

        Raises:
            ConfigError: There is no such latent.
        """
        self._check(latent)
        return self.nearest_words[latent] if self.nearest_words else ()

    def to_json(self) -> dict[str, Any]:
        """What names.json holds and `msae name --json` writes, but for the candidates of every latent."""
        concepts = [{**to_record(concept), "is_multimodal": concept.is_multimodal} for concept in self.concepts]
        return {
            "rule": self.rule,
            "d_sae": self.d_sae,
            "counts": dict(self.counts),
            **self.record,
            "concepts": concepts,
        }

    def records(self) -> list[dict[str, Any]]:
        """One record for each named latent, with the figures of its agreement."""
        found = []
        for concept in self.concepts:
            record = {**dataclasses.asdict(concept), "is_multimodal": concept.is_multimodal}
            record["synonyms"] = ", ".join(concept.synonyms)
            rows = {f"rows_{key}": value for key, value in (record.pop("rows") or {}).items()}
            found.append(record | (record.pop("agreement") or {}) | rows)
        return found

    def to_text(self, n: int = 20) -> str:
        """What `msae name` prints: what was tested, the counts of the rule, and the `n` surest concepts."""
        share = len(self) / self.d_sae
        counts = ", ".join(f"{key.replace('_', ' ')} {count:,}" for key, count in self.counts.items())
        lines = [f"{len(self):,} of {self.d_sae:,} latents are named ({share:.1%}) by the rule {self.rule}"]
        lines += [f"  {line}" for line in (counts, *self.summary())] + [""]
        if self.concepts:
            surest = sorted(self, key=lambda concept: (-_surety(concept), -concept.cosine))[:n]
            head = ("latent", "cosine", "margin", "fits", "elsewhere", "AUROC (95 % interval)", "name")
            lines += text_table(head, [_cells(concept) for concept in surest], right=(0, 1, 2, 3, 4))
        if len(self) > n:
            lines.append(f"and {len(self) - n:,} more in {FILE}")
        if any(concept.rows for concept in self):
            lines += [
                "",
                "fits: of the rows in which the latent is clearly active, the share to which the name is among the "
                "nearest 5 % of all words;",
                "   elsewhere: the same of the other rows",
            ]
        if (level := self.record.get("false_names")) is not None:
            lines += [
                "",
                f"q (in {FILE}): of the latents beyond chance, at most {level:.0%} of them, on average, are chance: as "
                "near to a word as random directions are;",
                "   that is not how many names are wrong: the nearest word may be another than the right one",
            ]
        if "rows_held" in self.counts and (n := self.record["n_synonym_groups"]) < MIN_WORDS:
            lines.append(
                f"note: the pictures confirm nothing: the vocabulary has {n} words, and {MIN_WORDS} are needed; "
                f"give a larger one"
            )
        if (words := self.record.get("on_words", MIN_WORDS)) < MIN_WORDS:
            lines.append(
                f"note: the captions confirm nothing: they mention {words} of the words, and {MIN_WORDS} are needed to "
                f"confirm a name; --untested named keeps the names that they do not contradict"
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write names.json, into the folder `path` or as that file."""
        # One string a latent, not a list: 24,576 latents must not become half a million lines of JSON.
        near = ["\t".join(f"{c.word}\t{c.cosine}" for c in words) for words in self.nearest_words]
        write_json(_file(path), {**self.to_json(), "nearest_words": near}, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, path: str | Path) -> ConceptNames:
        """The names in a run folder, or in a file that `save` wrote.

        Raises:
            RunError: There are none, or the file is damaged.
        """
        file = _file(path)
        if not file.exists():
            raise RunError(f"{file} does not exist; to name the latents, type: msae name RUN")
        data = read_json(file, schema_version=SCHEMA_VERSION, error=RunError)
        try:
            concepts = tuple(_concept(entry, where=str(file)) for entry in data.pop("concepts"))
            near = tuple(_candidates(line) for line in data.pop("nearest_words"))
            rule, d_sae, counts = data.pop("rule"), int(data.pop("d_sae")), data.pop("counts")
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as err:
            raise RunError(f"{file} is damaged ({type(err).__name__}: {err}); name the latents again") from err
        record = {key: value for key, value in data.items() if key not in ("schema_version", "made_by")}
        return cls(rule, d_sae, concepts, counts, near, record)

    def _check(self, latent: int) -> None:
        if not 0 <= latent < self.d_sae:
            raise ConfigError(f"there is no latent {latent}; this SAE has the latents 0 to {self.d_sae - 1}")

    @cached_property
    def _by_latent(self) -> dict[int, Concept]:
        return {concept.latent: concept for concept in self.concepts}

    @cached_property
    def _by_name(self) -> dict[str, Sequence[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for concept in self.concepts:
            for word in {word.casefold() for word in (concept.name, *concept.synonyms)}:
                found[word].append(concept.latent)
        return dict(found)


def as_names(names: ConceptNames | str | Path) -> ConceptNames:
    """`names` themselves, or those saved in that run folder or file."""
    return names if isinstance(names, ConceptNames) else ConceptNames.load(names)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / FILE


def names_of(run: RunLike, on: EmbeddingStore | None = None) -> ConceptNames | None:
    """The names and the concepts from examples in a run folder, if they belong to the weights that are there now.

    A file that does not say of which weights it is (made by hand or by msae 0.1) is only compared by its size.

    Args:
        on: The rows that are shown. Names that were tested on them come first, whatever was named since; names that
            were tested on other rows are only nearest words here.

    Raises:
        RunError: The file is damaged, or of another SAE.
    """
    run = Run.open(run)
    examples = load_examples(run)
    if on is not None and (file := run.names_file_on(whole(on).fingerprint)) and file.exists():
        names = ConceptNames.load(file)
        if names.record.get("sae") == run.weights:
            return dataclasses.replace(names, examples=examples)
    if run.names_file is None or not run.names_file.exists():
        return ConceptNames("evidence", run.sae.d_sae, (), examples=examples) if examples else None
    names, d_sae = ConceptNames.load(run.names_file), run.sae.d_sae
    if names.d_sae != d_sae:
        raise RunError(
            f"{run.names_file} names {names.d_sae:,} latents, but the SAE has {d_sae:,}; type: msae name {run.folder}"
        )
    if names.record.get("sae", run.weights) != run.weights:
        raise RunError(
            f"{run.names_file} names the latents of other weights or thresholds than {run.folder} has now; "
            f"type: msae name {run.folder}"
        )
    names = dataclasses.replace(names, examples=examples)
    tested = names.record.get("on_fingerprint")
    return names if on is None or tested in (None, whole(on).fingerprint) else names.elsewhere(on)


def _surety(concept: Concept) -> float:
    """The lower end of the interval of the surest evidence that rows give for a name."""
    by_captions = concept.agreement.low if concept.agreement and concept.agreement.holds else 0.0
    return max(by_captions, concept.rows.low if concept.rows else 0.0)


def _cells(concept: Concept) -> list[str]:
    found, rows = concept.agreement, concept.rows
    return [
        str(concept.latent),
        f"{concept.cosine:.3f}",
        "-" if concept.margin is None else f"{concept.margin:.3f}",
        f"{rows.fits:.0%}" if rows else "-",
        f"{rows.fits_elsewhere:.0%}" if rows else "-",
        f"{found.auroc:.2f} ({found.low:.2f} to {found.high:.2f})" if found else "-",
        shorten(concept.shown) + (f" ({', '.join(concept.synonyms)})" if concept.synonyms else ""),
    ]


def _concept(entry: Mapping[str, Any], *, where: str) -> Concept:
    values = {key: value for key, value in entry.items() if key != "is_multimodal"}
    return of_record(Concept, values, where=where, error=RunError, remedy="name the latents again")


def _candidates(line: str) -> tuple[Candidate, ...]:
    parts = line.split("\t") if line else []
    return tuple(Candidate(word, float(cosine)) for word, cosine in zip(parts[::2], parts[1::2], strict=True))
