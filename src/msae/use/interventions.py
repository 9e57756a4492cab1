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

    The strength of a group is the length of what its latents add, measured along the direction that they have in
    common, and it is raised in the proportions that they have on average; with one latent it is the activation.
    """

    owner: Int[Tensor, " l"]
    """The concept of each latent, ascending."""
    rows: Float[Tensor, "l d"]
    """What one unit of each latent adds to the classifier's features."""
    pattern: Float[Tensor, " l"]
    """Activations at strength one."""
    reader: Float[Tensor, " l"]
    """What each activation adds to the strength."""
    weight: Float[Tensor, "k d"]
    """The classifier's readout."""

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

    def strengths(self, z: Float[Tensor, "n l"]) -> Float[Tensor, "n c"]:
        """How much of each concept there is."""
        if self.n == len(self.owner):
            return z
        return z.new_zeros(len(z), self.n).index_add_(1, self.owner, z * self.reader)

    def removal(self, u: Float[Tensor, "n d"], z: Float[Tensor, "n l"]) -> Push:
        """The push that takes `z` away from the latents of each concept; its own `z` removes it."""
        logit = torch.stack([self.sum(z * column) for column in self._to_classes.T])
        return Push(-logit, -self.sum(z * (u @ self.rows.T)), self.sum(z * (z @ self._gram)))

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
        return self._members.T @ (self.pattern[:, None] * self.rows)

    def raising(self, u: Float[Tensor, "n d"], strength: Float[Tensor, " c"]) -> Push:
        """The push that gives each concept this strength where it has none."""
        r = strength[:, None] * self.direction
        return Push((self.weight @ r.T)[:, None], u @ r.T, r.square().sum(1)[None])


def make_concepts(
    groups: Sequence[Sequence[int]],
    W_dec: Float[Tensor, "d_sae d_in"],
    mean_activation: Float[Tensor, " d_sae"],
    to_features: Float[Tensor, " d_in"],
    weight: Float[Tensor, "k d_in"],
) -> Concepts:
    """The concepts whose latents are `groups`.

    Args:
        mean_activation: Of every latent on real rows: the proportions in which a group is raised.
        to_features: What the classifier multiplies a change of the standardised embedding with.
    """
    latents = torch.tensor([latent for group in groups for latent in group])
    owner = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    unscaled, mean = W_dec[latents].double(), mean_activation[latents].double()
    n = len(groups)
    common = torch.zeros(n, W_dec.shape[1], dtype=torch.float64).index_add_(0, owner, mean[:, None] * unscaled)
    length = common.norm(dim=1).clamp_min(1e-30)
    reader = (unscaled * (common / length[:, None])[owner]).sum(1)
    pattern = mean / length[owner]
    single = torch.bincount(owner, minlength=n)[owner] == 1
    reader[single], pattern[single] = 1.0, 1.0  # decoder rows have unit norm; exactly so, whatever the rounding
    return Concepts(owner, (unscaled * to_features).float(), pattern.float(), reader.float(), weight)


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
