"""Edits of concepts: raise or lower one in an embedding and leave the rest of it as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from msae.base.errors import ConfigError
from msae.concepts.concept import LatentGroup
from msae.sae.model import SAE
from msae.sae.standardize import Modality

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


class Edit(NamedTuple):
    """One concept and what is done to it."""

    group: LatentGroup
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


def target(edit: Edit, strength: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The strength that an edit asks for in rows that have `strength` now."""
    change = edit.change
    match change.kind:
        case "set":
            return torch.full_like(strength, change.number)
        case "times":
            return strength * change.number
        case "add":
            return (strength + change.number).clamp_min(0)
        case "quantile":
            return torch.full_like(strength, change.factor * edit.group.natural.quantile(change.number))


def edit_activations(z: Float[Tensor, "n d_sae"], edits: Sequence[Edit]) -> Float[Tensor, "n d_sae"]:
    """A copy of the activations with the edits made.

    A strength is raised by adding the group's pattern and lowered by shrinking what is there, so a row that
    has the strength already is left alone, and at strength 0 every latent of the concept is exactly 0.
    Correlated latents move by their share of the change of strength, not below 0; the latents of an edit never
    move with another edit.
    """
    edited, moved = z.clone(), z
    for edit in edits:
        latents = list(edit.group.latents)
        own, now = edited[:, latents], edit.group.strength(edited)
        wanted = target(edit, now)
        edited[:, latents] = _edited(own, now, wanted, edit)
        if edit.group.correlated is not None:
            moved = moved + (wanted - now).unsqueeze(1) * edit.group.correlated.to(z)
    if moved is z:
        return edited
    chosen = sorted({latent for edit in edits for latent in edit.group.latents})
    result = moved.clamp_min(0)
    result[:, chosen] = edited[:, chosen]
    return result


def _edited(
    own: Float[Tensor, "n g"], now: Float[Tensor, " n"], wanted: Float[Tensor, " n"], edit: Edit
) -> Float[Tensor, "n g"]:
    """The activations of a group's latents at the wanted strength."""
    if edit.change.kind == "times":
        return own * edit.change.number
    raised = own + (wanted - now).unsqueeze(1) * edit.group.pattern.to(own)
    shrunk = own * (wanted / now.clamp_min(torch.finfo(now.dtype).tiny)).unsqueeze(1)
    found = torch.where((wanted < now).unsqueeze(1), shrunk, raised)
    # Where nothing is asked for, nothing is left: a sum that cancels must not keep its parts.
    return torch.where((wanted == 0).unsqueeze(1), 0.0, found)


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
    natural = edit.group.natural
    now = edit.group.strength(z)
    wanted = target(edit, now)
    highest = float(wanted.max())
    if not bool((wanted > now).any()) or highest <= natural.maximum:
        return None
    return (
        f"{edit.group.name}={edit.change} sets the strength {highest:.3g}, beyond the natural range: the largest of "
        f"real rows is {natural.maximum:.3g}, p99 is {natural.quantile(99):.3g}"
    )
