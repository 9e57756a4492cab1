"""What an edit of concepts does to a linear classifier, in closed form: no decoding, no second forward pass.

An edit moves an embedding by `r`, a sum of decoder rows, and leaves the rest of it, the reconstruction error included.
A linear classifier then needs three numbers of `r`: its product with each class's weights, with the embedding and with
itself; the last two only because the classifier may scale its input to unit norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from msae.concepts.examples import ExampleConcept
from msae.concepts.strength import Readers, readers


class Push(NamedTuple):
    """Moves `r` of `n` embeddings for `c` edits, as a linear classifier sees them."""

    logit: Float[Tensor, "k _ c"]
    """r . w for each row of weights."""
    along: Float[Tensor, "n c"]
    """r . u, with u the embedding."""
    length2: Float[Tensor, "#n c"]
    """r . r."""


@dataclass(frozen=True)
class Concepts:
    """Concepts, each one or several latents, in the feature space of a linear classifier.

    A concept is raised in the proportions that its latents have on average.
    """

    readers: Readers
    """How their strengths are read; `pattern` is how they are raised."""
    rows: Float[Tensor, "l d"]
    """What one unit of each latent adds to the classifier's features."""
    weight: Float[Tensor, "k d"]
    """The classifier's readout."""

    @property
    def owner(self) -> Int[Tensor, " l"]:
        """The concept of each latent, ascending."""
        return self.readers.owner

    @cached_property
    def n(self) -> int:
        return int(self.owner[-1]) + 1

    @cached_property
    def _members(self) -> Float[Tensor, "l c"]:
        """One where a latent belongs to a concept."""
        return functional.one_hot(self.owner, self.n).float()

    def sum(self, per_latent: Float[Tensor, "n l"]) -> Float[Tensor, "n c"]:
        """Sums over the latents of each concept."""
        return per_latent if self.n == len(self.owner) else per_latent @ self._members

    def along(self, u: Float[Tensor, "n d"]) -> Float[Tensor, "n l"]:
        """Products of embeddings with what one unit of each latent adds: what every edit of them needs."""
        return u @ self.rows.T

    def removal(self, along: Float[Tensor, "n l"], z: Float[Tensor, "n l"]) -> Push:
        """The push that takes `z` away from the latents of each concept; its own `z` removes it."""
        if self.n == len(self.owner):
            return Push(z * -self._to_classes.T[:, None], -z * along, z.square() * self._gram.diagonal())
        logit = (z @ self._to_logits).reshape(len(z), -1, self.n).transpose(0, 1)
        return Push(-logit, -self.sum(z * along), self.sum(z * (z @ self._gram)))

    @cached_property
    def _to_logits(self) -> Float[Tensor, "l kc"]:
        """What one unit of each latent adds to each logit of its concept."""
        return (self._to_classes[:, :, None] * self._members[:, None]).flatten(1)

    @cached_property
    def _to_classes(self) -> Float[Tensor, "l k"]:
        return self.rows @ self.weight.T

    @cached_property
    def _gram(self) -> Float[Tensor, "l l"]:
        """Products of the rows of one concept."""
        return (self.rows @ self.rows.T) * (self.owner[:, None] == self.owner)

    @cached_property
    def direction(self) -> Float[Tensor, "c d"]:
        """What one unit of strength adds to the classifier's features."""
        return self._members.T @ (self.readers.pattern[:, None] * self.rows)

    def raising(self, along: Float[Tensor, "n l"], strength: Float[Tensor, " c"]) -> Push:
        """The push that gives each concept this strength where it has none."""
        logit, length2 = self._of_direction
        return Push(
            (logit * strength)[:, None], self.sum(along * self.readers.pattern) * strength,
            (length2 * strength.square())[None],
        )  # fmt: skip

    @cached_property
    def _of_direction(self) -> tuple[Float[Tensor, "k c"], Float[Tensor, " c"]]:
        """What one unit of strength adds to the logits, and its squared length."""
        return self.weight @ self.direction.T, self.direction.square().sum(1)


def make_concepts(
    groups: Sequence[Sequence[int]],
    W_dec: Float[Tensor, "d_sae d_in"],
    mean_activation: Float[Tensor, " d_sae"],
    to_features: Float[Tensor, " d_in"],
    weight: Float[Tensor, "k d_in"],
    examples: Sequence[ExampleConcept | None] = (),
) -> Concepts:
    """The concepts whose latents are `groups`.

    Args:
        mean_activation: Of every latent on real rows: the proportions in which a group is raised.
        to_features: What the classifier multiplies a change of the standardised embedding with.
        examples: For each group the concept from examples that it is, or None; without them none is one.
    """
    latents = torch.tensor([latent for group in groups for latent in group])
    rows = W_dec[latents]
    read = readers(groups, mean_activation[latents], rows, examples)
    return Concepts(read, rows * to_features, weight)


def edited_logits(
    scores: Float[Tensor, "n k"],
    length2: Float[Tensor, " n"],
    bias: Float[Tensor, " k"],
    push: Push,
    *,
    unit_norm: bool,
) -> Float[Tensor, "k n c"]:
    """Logits of every embedding after every edit.

    Args:
        scores: u . w for each row of weights.
        length2: u . u.
        unit_norm: The classifier scales its input to unit norm.
    """
    raw = scores.T[:, :, None] + push.logit
    if unit_norm:
        raw *= (length2[:, None] + 2 * push.along + push.length2).clamp_min_(1e-24).rsqrt_()
    return raw.add_(bias[:, None, None])
