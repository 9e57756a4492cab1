"""How strong a concept is in a row of activations: the one definition, for search, audits, comparisons and pages.

Of one latent it is the activation. Of several under one name it is the length of what they add together, along the
direction that they have in common. A concept from examples has weights of its own, and a threshold below which it is
absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msae.concepts.examples import ExampleConcept


class Readers(NamedTuple):
    """How the strengths of some concepts are read from their latents, which stand concept after concept."""

    owner: Int[Tensor, " l"]
    """The concept of each latent, ascending."""
    weight: Float[Tensor, " l"]
    """What one unit of each latent's activation adds to the strength."""
    pattern: Float[Tensor, " l"]
    """Activations at strength one, in the proportions they have on average; zeros for a concept that never fires."""

    def __call__(self, z: Float[Tensor, "n l"]) -> Float[Tensor, "n c"]:
        """The strengths in rows of activations of these latents."""
        n = int(self.owner[-1]) + 1
        if n == len(self.owner):
            return z if bool((self.weight == 1).all()) else z * self.weight
        return z.new_zeros(len(z), n).index_add_(1, self.owner, z * self.weight)


def readers(
    groups: Sequence[Sequence[int]],
    mean: Float[Tensor, " l"],
    rows: Float[Tensor, "l d_in"],
    examples: Sequence[ExampleConcept | None] = (),
) -> Readers:
    """Readers of concepts whose latents are `groups`.

    Args:
        mean: Mean activation of each latent, group after group: the direction of a group is that of its mean sum.
        rows: Their decoder rows.
        examples: For each group the concept from examples that it is, or None; without them none is one. Their
            latents that speak against are not among the groups', so these strengths are before they are counted.
    """
    owner = torch.tensor([number for number, group in enumerate(groups) for _ in group], device=mean.device)
    mean, rows = mean.double(), rows.double()
    n = len(groups)
    common = torch.zeros(n, rows.shape[1], dtype=torch.float64, device=mean.device)
    common.index_add_(0, owner, mean[:, None] * rows)
    length = common.norm(dim=1).clamp_min(1e-30)
    weight = (rows * (common / length[:, None])[owner]).sum(1)
    pattern = mean / length[owner]
    single = torch.bincount(owner, minlength=n)[owner] == 1
    weight[single], pattern[single] = 1.0, 1.0  # decoder rows have unit norm; exactly so, whatever the rounding
    for number, example in enumerate(examples):
        if example is not None:
            own = owner == number
            weight[own] = torch.tensor(example.weights, dtype=torch.float64, device=mean.device)
            pattern[own] = mean[own] / (mean[own] @ weight[own]).clamp_min(1e-30)
    return Readers(owner, weight.float(), pattern.float())
