"""`ConceptSet`: concepts as groups of latents, named or chosen, and how strong they are in real rows.

A concept is often several latents under one name. `LatentGroup` makes them one: a strength that can be read from
activations, and a pattern in which the latents rise together; docs/search.md says why this and not another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from msae.base.errors import ConfigError, nearest
from msae.concepts.examples import ExampleConcept, from_column
from msae.concepts.names import ConceptNames
from msae.concepts.strength import readers
from msae.sae.view import View

GRID = 1001
"""Points of a table of quantiles: one every tenth of a percent."""
PRESENT = 0.6
"""A concept is clearly present in a row from this share of its 99th percentile on; weaker activations are noise."""
FEWEST = 10
"""Rows with the concept, and rows without it, below which nothing is learnt from their difference."""
LIFT = 0.5
"""Two concepts exclude each other where they meet in less than this share of the rows that chance would give."""
SIGMAS = 3.0
"""And where that is this many standard deviations below chance."""
SAMPLE = 10_000
"""Rows, evenly spread over the store, that show how strong a concept naturally is and what is correlated with it."""
RIVAL_SAMPLE = 8_000
"""Rows that show which concepts exclude each other; every named concept is read on them."""
BLOCK_ROWS = 1024
REMEMBERED = 2**29
"""Bytes of activations that are kept from one concept to the next."""

Names = ConceptNames | Mapping[str, Sequence[int]]
"""Which latents have which name."""


# --- Concepts as they are written


def latents_of(concept: str, names: Names | None, d_sae: int) -> tuple[int, ...]:
    """The latents of a concept: a name, a latent's number `#12`, or several of these divided by `|`.

    Raises:
        ConfigError: There is no such name or latent; the message names the nearest name.
    """
    found: dict[int, None] = {}
    known = names is not None and _is_name(concept, names)  # a name may contain the sign
    for part in [concept] if known else (part.strip() for part in concept.split("|")):
        if not re.fullmatch(r"#\d+", part):
            found |= dict.fromkeys(_latents_named(part, names))
        elif int(part[1:]) < d_sae:
            found[int(part[1:])] = None
        else:
            raise ConfigError(f"there is no latent {part}; this SAE has #0 to #{d_sae - 1}")
    return tuple(found)


def is_numbers(concept: str) -> bool:
    """Whether a concept is written in numbers of latents alone, so that it needs no names."""
    return all(re.fullmatch(r"#\d+", part.strip()) for part in concept.split("|"))


def groups_of(asked: Sequence[str], names: Names | None, d_sae: int) -> dict[str, tuple[int, ...]]:
    """The latents of every concept that is asked for, or of every name where none is.

    Raises:
        ConfigError: What `latents_of` raises, or a name's latent is none of this SAE.
    """
    if isinstance(names, ConceptNames):
        names = names.by_name
    known = {name: tuple(latents) for name, latents in (names or {}).items()}
    outside = next((latent for latents in known.values() for latent in latents if not 0 <= latent < d_sae), None)
    if outside is not None:
        raise ConfigError(f"the names speak of latent {outside}, this SAE has {d_sae}; name its own latents again")
    if not asked:
        return known
    spelling = {name.casefold(): name for name in known}
    return {spelling.get(one.casefold().strip(), one): latents_of(one, known, d_sae) for one in asked}


def _is_name(concept: str, names: Names) -> bool:
    if isinstance(names, ConceptNames):
        return concept in names
    return concept.casefold().strip() in {name.casefold() for name in names}


def _latents_named(name: str, names: Names | None) -> Sequence[int]:
    if names is None:
        raise ConfigError(
            f"there is no concept {name!r}: this run has no names; "
            f"type msae name RUN first, or give a latent's number such as '#12'"
        )
    if isinstance(names, ConceptNames):
        return names[name]
    by_case = {known.casefold(): latents for known, latents in names.items()}
    found = by_case.get(name.casefold())
    if found is None:
        hint = nearest(name.casefold(), by_case) or f"; {len(by_case)} names are known"
        raise ConfigError(f"no latent is named {name!r}{hint}; #123 is latent 123")
    return found


# --- How strong a concept is


class Natural(NamedTuple):
    """How strong a concept is in real rows."""

    quantiles: Float[Tensor, " grid"]
    """Of the strengths above zero, at 0, 0.1, … 100 percent."""
    firing_rate: float
    """Share of rows with a strength above zero."""

    def quantile(self, percent: int | float) -> float:
        """The strength that this percentage of the rows where the concept fires stay below."""
        place = percent / 100 * (len(self.quantiles) - 1)
        low = min(int(place), len(self.quantiles) - 2)
        return float(torch.lerp(self.quantiles[low], self.quantiles[low + 1], place - low))

    @property
    def maximum(self) -> float:
        return float(self.quantiles[-1])


def quantiles_above_zero(strength: Float[Tensor, " n"], shares: Sequence[float] | Tensor) -> Float[Tensor, " q"]:
    """The quantiles of the strengths above zero, interpolated; all zero where there are none.

    Args:
        shares: From 0 to 1.
    """
    ordered = strength[strength > 0].double().sort().values
    grid = torch.as_tensor(shares, dtype=torch.float64)
    if not len(ordered):
        return torch.zeros(len(grid))
    place = grid * (len(ordered) - 1)  # torch.quantile refuses more than 16 million values
    low = place.long().clamp_max(max(len(ordered) - 2, 0))
    high = (low + 1).clamp_max(len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low).float()


def natural_of(strength: Float[Tensor, " n"]) -> Natural:
    """The quantiles of the strengths above zero, and how often there are any."""
    n_firing = int((strength > 0).sum())
    grid = torch.linspace(0, 1, GRID, dtype=torch.float64)
    return Natural(quantiles_above_zero(strength, grid), n_firing / len(strength) if n_firing else 0.0)


@dataclass(frozen=True, eq=False)
class LatentGroup:
    """A concept as one thing to read and to edit, be it one latent or many.

    The strength of a row is the length of what the latents add to its reconstruction, measured along the
    direction they have in common; with one latent it is the latent's activation.
    """

    name: str
    latents: tuple[int, ...]
    pattern: Float[Tensor, " g"] = field(repr=False)
    """Activations of the latents at strength one, in the proportions they have on average."""
    reader: Float[Tensor, " g"] = field(repr=False)
    """What each activation adds to the strength."""
    natural: Natural = field(repr=False)
    correlated: Float[Tensor, " d_sae"] | None = field(default=None, repr=False)
    """What every other latent gains or loses with one unit of strength; None edits these latents alone."""
    against: tuple[int, ...] = ()
    """Latents that speak against a concept from examples. An edit leaves them to `correlated`."""
    against_reader: Float[Tensor, " a"] | None = field(default=None, repr=False)
    """What each of their activations takes from the strength."""
    offset: float = 0.0
    """The strength of a row in which none of the latents fires."""
    threshold: float | None = None
    """The strength from which a concept from examples is present."""

    def strength(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, " n"]:
        """Of the concept in each row of activations."""
        found = z[:, list(self.latents)] @ self.reader.to(z)
        if self.against_reader is not None:
            found = found - z[:, list(self.against)] @ self.against_reader.to(z) + self.offset
        return found

    def is_present(self, strength: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Where the concept is clearly present, at these strengths."""
        if self.threshold is not None:
            return strength > self.threshold
        return (strength > PRESENT * self.natural.quantile(99)) & (strength > 0)


def make_group(
    name: str, latents: Sequence[int], z: Float[Tensor, "n g"], W_dec: Float[Tensor, "d_sae d_in"]
) -> LatentGroup:
    """The group of a concept, learnt from the activations `z` of its latents on real rows.

    Latents that share a concept divide it among them: each fires in some of its contexts. Setting every one to
    its own 99th percentile would therefore go far beyond anything natural. The pattern is the mean activations,
    so that the latents rise as they do on average, and the strength is measured on their sum.

    Raises:
        ConfigError: None of the latents ever fires, or their sum cancels.
    """
    rows = W_dec[list(latents)].detach().to(z.device)
    mean = z.double().mean(0)
    if not float((mean @ rows.double()).norm()) > 0:
        numbers = ", ".join(f"#{latent}" for latent in latents[:4])
        raise ConfigError(f"the concept {name!r} (latents {numbers}) never fires on these rows; it cannot be edited")
    read = readers([latents], mean, rows)
    return LatentGroup(name, tuple(latents), read.pattern, read.weight, natural_of(read(z)[:, 0]))


def make_example_group(example: ExampleConcept, z: Float[Tensor, "n d_sae"]) -> LatentGroup:
    """The group of a concept from examples, with what is natural in the activations `z` of all latents on real rows.

    The weights are those that tell the examples apart. Its latents are raised as they rise on average.

    Raises:
        ConfigError: None of the latents ever fires.
    """
    own = z[:, list(example.latents)].double().mean(0)
    read = readers([example.latents], own, torch.zeros(len(own), 1, device=z.device), [example])
    if not float(own @ read.weight.double()) > 0:
        raise ConfigError(f"the concept {example.name!r} never fires on these rows; it cannot be edited")
    group = LatentGroup(
        example.name, example.latents, read.pattern, read.weight, natural_of(torch.zeros(0)),
        against=example.against, against_reader=torch.tensor(example.against_weights),
        offset=max(0.0, -example.threshold), threshold=max(0.0, example.threshold),
    )  # fmt: skip
    return replace(group, natural=natural_of(group.strength(z)))


@torch.no_grad()
def with_correlated(group: LatentGroup, batches: Iterable[Float[Tensor, "_ d_sae"]]) -> LatentGroup:
    """The group that also moves, with its own latents, all others as they differ where the concept is present.

    The latents that have a name read the concept well, but of what a row gains with the concept they write only
    part: the rest is in latents without a name, and in what other concepts lose. Each other latent's share is its
    mean where the concept is present less its mean where it is not, over the same difference of the strength.
    docs/search.md has what else was tried.

    Args:
        batches: Activations of all latents on real rows; at least one batch.
    """
    count, strength, total = torch.zeros(3, 2, 1, dtype=torch.float64)
    for batch in batches:
        z = batch.double()
        a = group.strength(z)
        present = group.is_present(a)
        sides = torch.stack([~present, present]).double()
        count = count + sides.sum(1, keepdim=True)
        strength = strength + (sides @ a).unsqueeze(1)
        total = total + sides @ z  # sums of the rows on either side: no copies of them are made
    if float(count.min()) < FEWEST:
        return replace(group, correlated=torch.zeros(total.shape[1]))
    correlated = (total / count).diff(dim=0)[0] / (strength / count).diff(dim=0)[0]
    correlated[list(group.latents)] = 0
    return replace(group, correlated=correlated.float())


def excluded_by(mine: Bool[Tensor, " n"], theirs: Bool[Tensor, "n c"]) -> Bool[Tensor, " c"]:
    """Which concepts are missing where mine is present, by far more than chance allows.

    The number of rows in which two independent concepts meet is hypergeometric; its mean and variance decide.
    """
    n = len(mine)
    a, b = mine.double().sum(), theirs.double().sum(0)
    both = (theirs & mine.unsqueeze(1)).double().sum(0)
    mean = a * b / n
    deviation = (mean * (1 - a / n) * (1 - b / n)).sqrt()
    return (both < LIFT * mean) & (both < mean - SIGMAS * deviation)


# --- The concepts of an SAE on a store


@dataclass(frozen=True, eq=False)
class ConceptSet:
    """The concepts of an SAE, learnt from the rows of a store when they are asked for."""

    view: View
    """The rows; blocks of `BLOCK_ROWS` make the same bits whoever asks."""
    names: ConceptNames | None
    strict: bool = False
    """Edit only the named latents; leave correlated latents unchanged."""
    remember: bool = False
    """Keep the groups, and the activations of the sample where they take at most `REMEMBERED` bytes."""
    _made: dict[str, LatentGroup] = field(default_factory=dict, repr=False)

    def __getitem__(self, concept: str) -> LatentGroup:
        """The group of a name, a latent's number `#12`, several of these divided by `|`, or `column:value`.

        A name is a concept, and its correlated latents move with it; a number means that latent alone.

        Raises:
            ConfigError: There is no such concept, or it never fires in the store.
        """
        if concept in self._made:
            return self._made[concept]
        group = self._make(concept)
        if self.remember:
            self._made[concept] = group
        return group

    def _make(self, concept: str) -> LatentGroup:
        example = self._example(concept)
        if example is not None:
            group = make_example_group(example, torch.cat(list(self.sample_activations())))
            return group if self.strict else with_correlated(group, self.sample_activations())
        latents = latents_of(concept, self.names, self.view.sae.d_sae)
        z = torch.cat(list(self._activations(SAMPLE, latents)))
        group = make_group(concept, latents, z, self.view.sae.W_dec.cpu())
        return group if self.strict or is_numbers(concept) else with_correlated(group, self.sample_activations())

    def _example(self, concept: str) -> ExampleConcept | None:
        """The concept from examples of that name, or that of a value of a column, written `column:value`."""
        if self.names is not None and concept in self.names:
            return self.names.example(concept)
        column, colon, value = concept.partition(":")
        return from_column(self.view, column, value) if colon and column in self.view.store.columns else None

    def rivals(self, group: LatentGroup) -> list[LatentGroup]:
        """The named concepts of the same kind: where one of them is, the other is not.

        A scene has one background, a car one colour: that is read off the rows in which concepts occur.

        Raises:
            ConfigError: The run has no names.
        """
        others = [rival for rival in self._named if not set(rival.latents) & set(group.latents)]
        if not others:
            return []
        mine = group.is_present(group.strength(self._on_sample))
        theirs = torch.stack([rival.is_present(rival.strength(self._on_sample)) for rival in others], 1)
        return [rival for rival, is_rival in zip(others, excluded_by(mine, theirs).tolist(), strict=True) if is_rival]

    @cached_property
    def _named(self) -> list[LatentGroup]:
        """Every name that fires."""
        if self.names is None:
            raise ConfigError(
                "--exclusive needs the names of the rival concepts, and this run has none; type msae name RUN first"
            )
        found = []
        for name in dict.fromkeys(concept.name for concept in self.names):
            latents = self.names.latents_of(name)
            z = self._on_sample[:, latents]
            if bool((z > 0).any()):
                found.append(make_group(name, latents, z, self.view.sae.W_dec.cpu()))
        return found

    @cached_property
    def _on_sample(self) -> Tensor:
        """Activations of all latents on fewer rows."""
        return torch.cat(list(self._activations(RIVAL_SAMPLE)))

    def sample_activations(self) -> Iterable[Tensor]:
        """Activations of all latents on rows spread evenly over the store, block by block."""
        return self._kept_activations if self._is_small else self._activations(SAMPLE)

    @property
    def _is_small(self) -> bool:
        return self.remember and 4 * self.view.sae.d_sae * min(SAMPLE, len(self.view)) <= REMEMBERED

    @cached_property
    def _kept_activations(self) -> list[Tensor]:
        return list(self._activations(SAMPLE))

    def _activations(self, n: int, latents: Sequence[int] | None = None) -> Iterable[Tensor]:
        """Activations on `n` rows, block by block, on the CPU wherever they were computed."""
        return (z.cpu() for z in self.view.activations(latents, self._sample(n)))

    def _sample(self, n: int) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = np.linspace(0, len(self.view) - 1, min(n, len(self.view))).round().astype(np.int64)
        return rows
