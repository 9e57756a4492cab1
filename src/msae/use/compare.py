"""`compare`: which concepts set two stores, or two parts of one, apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from msae.base import statistics
from msae.base.errors import ConfigError
from msae.base.records import of_record, to_record
from msae.base.results import Result, shorten, text_table
from msae.concepts.examples import ExampleConcept
from msae.concepts.names import ConceptNames, names_of
from msae.concepts.strength import readers
from msae.data.parts import Part, read_part
from msae.data.rows import Row
from msae.data.store import EmbeddingStore
from msae.sae.model import Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

FEWEST = 10
"""Rows of both sides together in which a concept must fire to be compared."""
MAX_ENTRIES = 1 << 27
"""Activations that are read of both sides; of more rows, a random sample."""
DRAWS = 40
"""Permutations for each concept that is compared: so many that one alone can have a q-value of .025."""
ALPHA = 0.05
PICTURED = 4
"""Rows of either side that are kept to look at, of each of the first `MOST_PICTURED` concepts."""
MOST_PICTURED = 40
MEANINGS = (
    "effect: of the pairs of a row of A and one of B, the share in which A has more of it less that in which B has; "
    "0 is no difference",
    "q: of all concepts with a q at most as large, the share that differ by chance",
)
"""What the columns mean."""


@dataclass(frozen=True)
class ComparedConcept:
    """A concept in the rows of both sides."""

    latent: int
    latents: tuple[int, ...]
    name: str | None
    share_a: float
    """Share of the rows of A in which it fires; with strata each weighs as it does in the effect size."""
    share_b: float
    effect_size: float
    """Cliff's delta: of the pairs of a row of A and one of B, of one stratum, the share in which the row of A has more
    of it less the share in which that of B has."""
    low: float
    """Lower end of the 95 % interval of `effect_size`."""
    high: float
    p: float
    """Two-sided, by permutation of the sides within the strata."""
    q: float
    """`p` adjusted for the number of concepts (Benjamini and Hochberg)."""
    rows_a: tuple[Row, ...] = ()
    """The rows of A that have most of it, where the concept is among the first."""
    rows_b: tuple[Row, ...] = ()

    @property
    def stands_out(self) -> bool:
        return self.q < ALPHA

    @property
    def shown(self) -> str:
        return self.name or f"#{self.latent}"


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Which concepts set A and B apart; those that do first, by effect size."""

    run: str
    a: str
    b: str
    n_a: int
    n_b: int
    modality: Modality
    inference: Inference
    within: tuple[str, ...]
    """Columns whose values are the strata."""
    n_strata: int
    concepts: tuple[ComparedConcept, ...]
    too_rare: int
    """Concepts that fire in fewer than ten rows."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that were not used, by reason."""
    roots: tuple[Path, ...] = (Path(),)
    """Folders that the paths of pictures may be relative to."""

    @property
    def standing_out(self) -> list[ComparedConcept]:
        return [one for one in self.concepts if one.stands_out]

    @property
    def verdict(self) -> str:
        """One sentence: how many concepts set the sides apart."""
        n = len(self.standing_out)
        among = f" within {' and '.join(self.within)}" if self.within else ""
        if not n:
            return f"nothing sets {self.a} and {self.b} apart{among}: no concept of {len(self.concepts):,} has q < .05"
        more = sum(one.effect_size > 0 for one in self.standing_out)
        return (
            f"{n:,} of {len(self.concepts):,} concepts set {self.a} and {self.b} apart{among} (q < .05): "
            f"{more:,} stronger in {self.a}, {n - more:,} in {self.b}"
        )

    def to_json(self) -> dict[str, Any]:
        record = dict(to_record(self))
        record["concepts"] = [
            {**to_record(one), "rows_a": [row.to_json() for row in one.rows_a],
             "rows_b": [row.to_json() for row in one.rows_b]}
            for one in self.concepts
        ]  # fmt: skip
        return record

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Comparison:
        """The comparison in a text that `msae compare --json` wrote.

        Raises:
            ConfigError: It is no such text; the message begins with `where`.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise ConfigError(f"{where} is not what msae compare writes ({err}); make it with --json") from err
        return of_record(cls, data, where=where, error=ConfigError, remedy="make it with msae compare --json")

    def records(self) -> list[dict[str, Any]]:
        """One record for each concept."""
        return [
            {key: value for key, value in to_record(one).items() if key not in ("rows_a", "rows_b", "latents")}
            for one in self.concepts
        ]

    def to_text(self, n: int = 20) -> str:
        """The verdict, and the concepts that set the sides apart in a table of six columns."""
        lines = [self.verdict]
        lines.append(f"  {self.n_a:,} and {self.n_b:,} {self.modality} rows, {self.n_strata:,} strata" if self.within
                     else f"  {self.n_a:,} and {self.n_b:,} {self.modality} rows")  # fmt: skip
        lines += [f"  left out: {count:,} rows {why}" for why, count in self.left_out.items()]
        if self.too_rare:
            lines.append(f"  left out: {self.too_rare:,} concepts that fire in fewer than {FEWEST} rows")
        found = self.standing_out
        if found:
            head = ("concept", "stronger in", "fires in A", "fires in B", "effect (95 % interval)", "q")
            cells = [
                [
                    shorten(one.shown, 32), "A" if one.effect_size > 0 else "B", f"{one.share_a:.0%}",
                    f"{one.share_b:.0%}", f"{one.effect_size:+.2f} ({one.low:+.2f} to {one.high:+.2f})", f"{one.q:.2g}",
                ]
                for one in found[:n]
            ]  # fmt: skip
            lines += ["", f"A: {self.a}", f"B: {self.b}", "", *text_table(head, cells, right=(2, 3, 5))]
            if len(found) > n:
                lines.append(f"and {len(found) - n:,} more; --json has all")
            lines += ["", *MEANINGS]
        return "\n".join(lines)


def compare(
    sae: RunLike,
    a: EmbeddingStore | str | Path,
    b: EmbeddingStore | str | Path,
    *,
    within: Sequence[str] = (),
    modality: Modality | None = None,
    n_permutations: int | None = None,
    max_rows: int = 20_000,
    seed: int = 0,
    device: str = "auto",
) -> Comparison:
    """Which concepts set two stores, or two parts of one, apart.

    Args:
        sae: A run folder, or a Hugging Face repository that holds an SAE.
        a: A store, or a part of it as STORE:column=value.
        b: The other.
        within: Columns of both; only rows with the same values in them are compared with each other.
        modality: Which embeddings of the stores. Without it, images where they have them.
        n_permutations: How often the sides are shuffled. Without it, forty times for each concept.
        max_rows: Read at most so many rows of both sides together: of more, a random sample.
        seed: Random seed.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.

    Raises:
        StoreError: A store does not fit the SAE, or has no such column or value.
        ConfigError: The sides share rows, or no stratum has rows of both.
    """
    if n_permutations is not None and n_permutations < 1:
        raise ConfigError(f"n_permutations is {n_permutations}; give at least 1, for example --n-permutations 10000")
    if max_rows < 2:
        raise ConfigError(f"max_rows is {max_rows}; give --max-rows at least 2, for example 20000")
    run, columns = Run.open(sae), [within] if isinstance(within, str) else list(within)
    parts = (read_part(a), read_part(b))
    _check_apart(*parts)
    inference: Inference = "threshold" if run.sae.thresholds is not None else "trained"
    views = [View(run, part.store, modality, inference=inference, device=device) for part in parts]
    rng = np.random.default_rng(seed)
    chosen = _choose(views, parts, columns, max_rows, rng)
    columns_of = _columns(names_of(run, parts[0].store), run.sae.d_sae)
    strengths = _strengths(views, chosen.rows, columns_of)
    fires = strengths > 0
    often = np.flatnonzero(fires.sum(0) >= FEWEST)
    if not len(often):
        raise ConfigError(f"no concept fires in {FEWEST} rows of {parts[0].shown} and {parts[1].shown}")
    strengths, fires = strengths[:, often], fires[:, often]
    is_a = np.arange(len(strengths)) < len(chosen.rows[0])
    ranked = statistics.Ranked(strengths)
    p = statistics.permutation_p(
        statistics.NetWins(ranked, chosen.strata), is_a.astype(np.int64), chosen.strata, focus=1, rng=rng,
        n_permutations=n_permutations or max(10_000, DRAWS * len(often)),
    )  # fmt: skip
    q = statistics.q_values(p)
    effect, ends = statistics.cliffs_delta_estimate(ranked, is_a, chosen.strata)
    shares = _shares(fires, is_a, chosen.strata)
    order = np.lexsort((-np.abs(effect), np.where(q < ALPHA, 0, p), q >= ALPHA))
    pictured = [i for i in order[:MOST_PICTURED].tolist() if q[i] < ALPHA]
    rows_a = _strongest(views[0], chosen.rows[0], strengths[: len(chosen.rows[0])], pictured)
    rows_b = _strongest(views[1], chosen.rows[1], strengths[len(chosen.rows[0]) :], pictured)
    found = []
    for i in order.tolist():
        own = columns_of[often[i]]
        found.append(ComparedConcept(
            latent=own.latents[0], latents=own.latents, name=own.name,
            share_a=float(shares[0][i]), share_b=float(shares[1][i]),
            effect_size=float(effect[i]), low=float(ends.low[i]), high=float(ends.high[i]),
            p=float(p[i]), q=float(q[i]), rows_a=rows_a.get(i, ()), rows_b=rows_b.get(i, ()),
        ))  # fmt: skip
    return Comparison(
        run=run.name, a=parts[0].shown, b=parts[1].shown, n_a=len(chosen.rows[0]), n_b=len(chosen.rows[1]),
        modality=views[0].modality, inference=inference, within=tuple(columns),
        n_strata=len(np.unique(chosen.strata)), concepts=tuple(found), too_rare=len(columns_of) - len(often),
        left_out=chosen.left_out, roots=tuple(dict.fromkeys(r for part in parts for r in part.store.picture_roots)),
    )  # fmt: skip


class _Chosen(NamedTuple):
    """The rows that are compared."""

    rows: tuple[Int64[np.ndarray, " a"], Int64[np.ndarray, " b"]]
    strata: Int64[np.ndarray, " n"]
    """Of the rows of A, then of B."""
    left_out: dict[str, int]


def _check_apart(a: Part, b: Part) -> None:
    if a.store.path.resolve() != b.store.path.resolve():
        return
    is_in_a = np.zeros(len(a.store), bool)
    is_in_a[a.rows] = True
    n = np.count_nonzero(is_in_a[b.rows])
    if n:
        raise ConfigError(
            f"{a.shown} and {b.shown} share {n:,} rows; give two parts that share none, as STORE:column=value"
        )


def _choose(
    views: Sequence[View], parts: Sequence[Part], within: Sequence[str], max_rows: int, rng: np.random.Generator
) -> _Chosen:
    """Rows that have a value in every column of `within`, in strata that have rows of both sides."""
    strata = _strata(parts, within)
    kept = [np.flatnonzero(own >= 0) for own in strata]
    most = max(2, min(max_rows, MAX_ENTRIES // views[0].sae.d_sae) // 2)
    taken = [np.sort(rng.permutation(own)[:most]) for own in kept]
    left_out = {
        "without a partner of the same values": sum(len(part.rows) for part in parts) - sum(map(len, kept)),
        "beyond the number that is read": sum(map(len, kept)) - sum(map(len, taken)),
    }
    rows = (parts[0].rows[taken[0]], parts[1].rows[taken[1]])
    joined = np.concatenate([own[one] for own, one in zip(strata, taken, strict=True)])
    return _Chosen(rows, joined, {why: n for why, n in left_out.items() if n})


def _strata(parts: Sequence[Part], within: Sequence[str]) -> list[Int64[np.ndarray, " n"]]:
    """Of each side the stratum of every row, the rows of the same values in `within`; -1 where only one side has it."""
    strata = [np.zeros(len(part.rows), np.int64) for part in parts]
    keys: list[tuple[str, ...]] = [()]
    for column in within:
        coded = [part.store.coded_labels(column, option="--within") for part in parts]
        values = sorted(set(coded[0][1]) & set(coded[1][1]))
        place = {value: i for i, value in enumerate(values)}
        found = []
        for own, part, (codes, known) in zip(strata, parts, coded, strict=True):
            added = np.array([*(place.get(value, -1) for value in known), -1])[codes[part.rows]]
            own = np.where((own < 0) | (added < 0), -1, own * len(values) + added)
            found.append(np.unique(own, return_inverse=True))
        both = set(found[0][0].tolist()) & set(found[1][0].tolist()) - {-1}
        key_of = {one: (*keys[one // len(values)], values[one % len(values)]) for one in both}
        order = sorted(both, key=lambda one: str(key_of[one]))
        keys, number = [key_of[one] for one in order], {one: i for i, one in enumerate(order)}
        strata = [np.array([number.get(one, -1) for one in own.tolist()])[inverse] for own, inverse in found]
    if not keys:
        raise ConfigError(
            f"{parts[0].shown} and {parts[1].shown} have no value of {' and '.join(within)} in common; "
            f"give other columns to --within"
        )
    return strata


class _Column(NamedTuple):
    """A concept as it is compared."""

    latents: tuple[int, ...]
    name: str | None
    example: ExampleConcept | None = None


def _columns(names: ConceptNames | None, d_sae: int) -> list[_Column]:
    """Every name and concept from examples, then every latent without a name."""
    examples = names.examples if names is not None else {}
    named = {name: tuple(own) for name, own in (names.by_name if names is not None else {}).items()}
    found = [
        _Column(own, names.shown_name(name) if names else name, examples.get(name.casefold()))
        for name, own in named.items()
    ]
    taken = {latent for one in found if one.example is None for latent in one.latents}
    return found + [_Column((latent,), None) for latent in range(d_sae) if latent not in taken]


def _strengths(
    views: Sequence[View], rows: Sequence[Int64[np.ndarray, " n"]], columns: Sequence[_Column]
) -> Float32[np.ndarray, "n c"]:
    """How much of each concept is in each row, those of A and then those of B; above zero where it fires."""
    found = np.empty((sum(map(len, rows)), len(columns)), np.float32)
    first_of = np.array([column.latents[0] for column in columns])
    examples = [(i, column.example) for i, column in enumerate(columns) if column.example is not None]
    several = [i for i, column in enumerate(columns) if len(column.latents) > 1 and column.example is None]
    members = [latent for i in several for latent in columns[i].latents]
    theirs = np.empty((len(found), len(members)), np.float32)
    start = 0
    for view, own_rows in zip(views, rows, strict=True):
        for block in view.activations(rows=own_rows, title="comparing"):
            z = block.cpu().numpy()
            own = slice(start, start + len(z))
            found[own], theirs[own] = z[:, first_of], z[:, members]
            for i, example in examples:
                found[own, i] = example.above(z)
            start += len(z)
    if several:
        own_z, W_dec = torch.from_numpy(theirs), views[0].sae.W_dec.detach().cpu()[members]
        found[:, several] = readers([columns[i].latents for i in several], own_z.mean(0), W_dec)(own_z).numpy()
    return found


def _shares(
    fires: Bool[np.ndarray, "n c"], is_a: Bool[np.ndarray, " n"], strata: Int64[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray]:
    """In which share of the rows of A and of B each fires; strata weigh by their pairs, as in the effect size."""
    shares, total = np.zeros((2, fires.shape[1])), 0
    for stratum in np.unique(strata):
        sides = [fires[(strata == stratum) & (is_a == side)] for side in (True, False)]
        pairs = len(sides[0]) * len(sides[1])
        if pairs:
            shares += pairs * np.stack([side.mean(0) for side in sides])
            total += pairs
    return shares[0] / total, shares[1] / total


def _strongest(
    view: View, rows: Int64[np.ndarray, " n"], strengths: Float32[np.ndarray, "n c"], columns: Sequence[int]
) -> dict[int, tuple[Row, ...]]:
    """Of some columns, the rows that have most of it."""
    best = {i: [one for one in np.argsort(-strengths[:, i], kind="stable")[:PICTURED] if strengths[one, i] > 0]
            for i in columns}  # fmt: skip
    every = sorted({one for own in best.values() for one in own})
    known = dict(zip(every, view.store.describe_rows(rows[every].tolist()), strict=True))  # at once: files are read
    return {i: tuple(known[one] for one in own) for i, own in best.items()}
