"""Edits of concepts: turn one up or down in an embedding and leave the rest of it as it is.

A concept is often several latents under one name. `Handle` makes them one: a strength that can be read from
activations, and a pattern in which the latents rise together; docs/search.md tells why this and not another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from msae.base.errors import ConfigError
from msae.sae.model import SAE
from msae.sae.standardize import Modality

GRID = 1001
"""Points of a table of quantiles: one every tenth of a percent."""
PRESENT = 0.6
"""A concept is clearly present in a row from this share of its 99th percentile on."""
FEWEST = 10
"""Rows with the concept, and rows without it, below which nothing is learnt from their difference."""

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_WRITTEN = re.compile(
    rf"(?:(?P<factor>{_NUMBER})?\s*[x*]\s*)?p(?P<percent>{_NUMBER})|(?P<op>[x*+-])?\s*(?P<n>{_NUMBER})"
)
_HELP = "wanted a number, x2, +3, -1, p99 or 2xp99"


@dataclass(frozen=True)
class Change:
    """What an edit does to the strength of a concept."""

    kind: Literal["set", "times", "add", "quantile"]
    number: float
    """The strength to set, the factor, what to add, or the percentile of the natural strengths to set."""
    factor: float = 1.0
    """Of a quantile: `2xp99` is twice the 99th percentile."""

    def __str__(self) -> str:
        if self.kind == "quantile":
            return f"p{self.number:g}" if self.factor == 1 else f"{self.factor:g}xp{self.number:g}"
        return {"set": f"{self.number:g}", "times": f"x{self.number:g}", "add": f"{self.number:+g}"}[self.kind]


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


@dataclass(frozen=True, eq=False)
class Handle:
    """A concept as one thing to turn, be it one latent or many.

    The strength of a row is the length of what the latents add to its reconstruction, measured along the
    direction they have in common; with one latent it is the latent's activation.
    """

    name: str
    latents: tuple[int, ...]
    pattern: Float[Tensor, " g"]
    """Activations of the latents at strength one, in the proportions they have on average."""
    reader: Float[Tensor, " g"]
    """What each activation adds to the strength."""
    natural: Natural | None = None
    companions: Float[Tensor, " d_sae"] | None = None
    """What every other latent gains or loses with one unit of strength; None turns the latents alone."""

    def strength(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, " n"]:
        """Of the concept in each row of activations."""
        return z[:, list(self.latents)] @ self.reader.to(z)


class Edit(NamedTuple):
    """One concept and what is done to it."""

    handle: Handle
    change: Change


def parse_change(value: str | int | float) -> Change:
    """The change written as a number, `x2`, `+3`, `-1`, `p99` or `2xp99`; a plain number is the strength to set.

    Raises:
        ConfigError: It is written otherwise, or is a negative strength.
    """
    if not isinstance(value, str):
        if not 0 <= value < float("inf"):  # also refuses NaN
            raise ConfigError(f"a concept cannot be set to {value:g}; {_HELP} (0 removes it, '-1' lessens it by one)")
        return Change("set", float(value))
    match = _WRITTEN.fullmatch(value.strip())
    if match is None:
        raise ConfigError(f"a concept cannot be set to {value!r}; {_HELP}")
    if match["percent"] is not None:
        percent = float(match["percent"])
        if percent > 100:
            raise ConfigError(f"{value!r} asks for a percentile above 100; write for example 2xp99 to go further")
        return Change("quantile", percent, float(match["factor"] or 1))
    number = float(match["n"])
    match match["op"]:
        case None:
            return Change("set", number)
        case "+":
            return Change("add", number)
        case "-":
            return Change("add", -number)
        case _:
            return Change("times", number)


def parse_edit(text: str) -> tuple[str, Change]:
    """The concept and the change of `CONCEPT=VALUE`; the last `=` divides them.

    Raises:
        ConfigError: There is no `=`, no concept, or the value is written otherwise than `parse_change` reads.
    """
    concept, equals, value = text.rpartition("=")
    if not equals or not concept.strip():
        raise ConfigError(f"the edit {text!r} is not CONCEPT=VALUE; write for example --set beach=x2")
    return concept.strip(), parse_change(value)


def latents_of(concept: str, find: Callable[[str], Sequence[int]], d_sae: int) -> tuple[int, ...]:
    """The latents of a concept: a name, a latent's number `#123`, or several of these divided by `|`.

    Args:
        find: Gives the latents that bear a name, and raises for a name that none bears.

    Raises:
        ConfigError: There is no such latent, or what `find` raises.
    """
    found: dict[int, None] = {}
    for part in (part.strip() for part in concept.split("|")):
        if not re.fullmatch(r"#\d+", part):
            found |= dict.fromkeys(find(part))
        elif int(part[1:]) < d_sae:
            found[int(part[1:])] = None
        else:
            raise ConfigError(f"there is no latent {part}: this SAE has the latents #0 to #{d_sae - 1}")
    return tuple(found)


@torch.no_grad()
def activations_of(
    sae: SAE, batches: Iterable[Float[Tensor, "_ d_in"]], modality: Modality, latents: Sequence[int]
) -> Float[Tensor, "n g"]:
    """The activations of some latents on raw rows; memory grows with rows times `latents` alone."""
    chosen = list(latents)
    found = []
    for x in batches:
        if sae.config.kind == "topk":  # what fires depends on every other latent
            found.append(sae.encode(x, modality)[:, chosen])
            continue
        standard = sae.standardizer.apply(x.float(), modality)
        h = standard.new_full((len(x), sae.d_sae), -torch.inf)
        h[:, chosen] = torch.addmm(sae.b_enc[chosen], standard - sae.b_dec, sae.W_enc[:, chosen])
        found.append(sae.activate(h)[:, chosen])
    return torch.cat(found)


def make_handle(
    name: str, latents: Sequence[int], z: Float[Tensor, "n g"], W_dec: Float[Tensor, "d_sae d_in"]
) -> Handle:
    """The handle of a concept, learnt from the activations `z` of its latents on real rows.

    Latents that share a concept divide it among them: each fires in some of its contexts. Setting every one to
    its own 99th percentile would therefore go far beyond anything natural. The pattern is the mean activations,
    so that the latents rise as they do on average, and the strength is measured on their sum.

    Raises:
        ConfigError: None of the latents ever fires, or their sum cancels.
    """
    mean = z.double().mean(0)
    rows = W_dec[list(latents)].detach().double().to(z.device)
    common = mean @ rows
    length = common.norm()
    if not float(length) > 0:
        numbers = ", ".join(f"#{latent}" for latent in latents[:4])
        raise ConfigError(f"the concept {name!r} (latents {numbers}) never fires on these rows; it cannot be turned")
    handle = Handle(name, tuple(latents), (mean / length).float(), (rows @ (common / length)).float())
    return replace(handle, natural=natural_of(z @ handle.reader))


@torch.no_grad()
def with_companions(handle: Handle, batches: Iterable[Float[Tensor, "_ d_sae"]]) -> Handle:
    """The handle that also moves, with its own latents, all others as they differ where the concept is present.

    The latents that bear a name read the concept well, but of what a row gains with the concept they write only
    part: the rest is in latents without a name, and in what other concepts lose. Each other latent's share is its
    mean where the concept is present less its mean where it is not, over the same difference of the strength.
    docs/search.md has what else was tried.

    Args:
        batches: Activations of all latents on real rows; at least one batch.
    """
    assert handle.natural is not None
    threshold = PRESENT * handle.natural.quantile(99)
    count, strength, total = torch.zeros(3, 2, 1, dtype=torch.float64)
    for batch in batches:
        z = batch.double()
        a = handle.strength(z)
        sides = torch.stack([a <= threshold, a > threshold]).double()
        count = count + sides.sum(1, keepdim=True)
        strength = strength + (sides @ a).unsqueeze(1)
        total = total + sides @ z  # sums of the rows on either side: no copies of them are made
    if float(count.min()) < FEWEST:
        return replace(handle, companions=torch.zeros(total.shape[1]))
    companions = (total / count).diff(dim=0)[0] / (strength / count).diff(dim=0)[0]
    companions[list(handle.latents)] = 0
    return replace(handle, companions=companions.float())


def natural_of(strength: Float[Tensor, " n"]) -> Natural:
    """The quantiles of the strengths above zero; all zero where there are none."""
    firing = strength[strength > 0].double()
    grid = torch.linspace(0, 1, GRID, dtype=torch.float64)
    if not len(firing):
        return Natural(torch.zeros(GRID), 0.0)
    ordered = firing.sort().values
    place = grid * (len(ordered) - 1)  # torch.quantile refuses more than 16 million values
    low = place.long().clamp_max(max(len(ordered) - 2, 0))
    high = (low + 1).clamp_max(len(ordered) - 1)
    return Natural(torch.lerp(ordered[low], ordered[high], place - low).float(), len(firing) / len(strength))


def target(edit: Edit, strength: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The strength that an edit asks for in rows that have `strength` now.

    Raises:
        ConfigError: A percentile is asked for and the handle knows no natural strengths.
    """
    change = edit.change
    match change.kind:
        case "set":
            return torch.full_like(strength, change.number)
        case "times":
            return strength * change.number
        case "add":
            return (strength + change.number).clamp_min(0)
        case "quantile":
            if edit.handle.natural is None:
                raise ConfigError(f"{edit.handle.name}={change}: no natural strengths are known; give a number")
            return torch.full_like(strength, change.factor * edit.handle.natural.quantile(change.number))


def edit_activations(z: Float[Tensor, "n d_sae"], edits: Sequence[Edit]) -> Float[Tensor, "n d_sae"]:
    """A copy of the activations with the edits made.

    A strength is raised by adding the handle's pattern and lowered by shrinking what is there, so a row that
    has the strength already is left alone, and at strength 0 every latent of the concept is exactly 0.
    Companions move by their share of the change of strength, not below 0; the latents of an edit are nobody's
    companions.
    """
    edited, moved = z.clone(), z
    for edit in edits:
        latents = list(edit.handle.latents)
        own, now = edited[:, latents], edit.handle.strength(edited)
        wanted = target(edit, now)
        edited[:, latents] = _turn(own, now, wanted, edit)
        if edit.handle.companions is not None:
            moved = moved + (wanted - now).unsqueeze(1) * edit.handle.companions.to(z)
    if moved is z:
        return edited
    turned = sorted({latent for edit in edits for latent in edit.handle.latents})
    result = moved.clamp_min(0)
    result[:, turned] = edited[:, turned]
    return result


def _turn(
    own: Float[Tensor, "n g"], now: Float[Tensor, " n"], wanted: Float[Tensor, " n"], edit: Edit
) -> Float[Tensor, "n g"]:
    """The activations of a handle's latents at the wanted strength."""
    if edit.change.kind == "times":
        return own * edit.change.number
    raised = own + (wanted - now).unsqueeze(1) * edit.handle.pattern.to(own)
    shrunk = own * (wanted / now.clamp_min(torch.finfo(now.dtype).tiny)).unsqueeze(1)
    turned = torch.where((wanted < now).unsqueeze(1), shrunk, raised)
    # Where nothing is asked for, nothing is left: a sum that cancels must not keep its parts.
    return torch.where((wanted == 0).unsqueeze(1), 0.0, turned)


@torch.no_grad()
def apply(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    modality: Modality,
    edits: Sequence[Edit],
    *,
    keep_residual: bool = True,
) -> Float[Tensor, "n d_in"]:
    """Raw embeddings with the edits made: encode, edit, decode, add the reconstruction error, undo the standardisation.

    Args:
        keep_residual: Add back what the SAE does not reconstruct, so that without edits a row is exactly itself.
            Neither poster nor paper says; without it every row also loses what the SAE never saw.

    Raises:
        ConfigError: The width differs from `d_in`, or the SAE has no statistics of `modality`.
    """
    x = x.float()
    z = sae.encode(x, modality)
    edited = edit_activations(z, edits)
    if not keep_residual:
        return sae.decode(edited, modality)
    # The error cancels out of decode(edited) + (x - decode(z)): adding the difference keeps every bit of x.
    scale = sae.standardizer.statistics[modality].scale
    return x + (edited - z) @ sae.W_dec / scale


def warn(edit: Edit, z: Float[Tensor, "n d_sae"]) -> str | None:
    """One line where an edit of these activations leaves the natural range of the concept, else None."""
    natural = edit.handle.natural
    if natural is None:
        return None
    now = edit.handle.strength(z)
    wanted = target(edit, now)
    highest = float(wanted.max())
    if not bool((wanted > now).any()) or highest <= natural.maximum:
        return None
    return (
        f"{edit.handle.name}={edit.change} sets the strength {highest:.3g}, beyond the natural range: the largest of "
        f"real rows is {natural.maximum:.3g}, p99 is {natural.quantile(99):.3g}"
    )
