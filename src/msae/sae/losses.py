"""Training losses: functions of tensors, no state. Squared errors are per element, in the squared units of `x`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from msae.base.errors import ConfigError
from msae.base.processes import ALONE, Processes
from msae.sae import activations

Weighting = Literal["uniform", "reverse", "rising", "steep"]
ALIGNMENT_TEMPERATURE = 0.1
"""Cosines of activations are divided by it; they lie between 0 and 1."""


def default_levels(d_sae: int, *, smallest: int = 64) -> tuple[int, ...]:
    """Levels that double from `smallest`, with `d_sae` itself last."""
    levels = []
    k = smallest
    while k < d_sae:
        levels.append(k)
        k *= 2
    return (*levels, d_sae)


def level_weights(weighting: Weighting, n_levels: int) -> tuple[float, ...]:
    """One weight per level.

    `uniform`: all 1. `reverse`: L, L-1, ..., 1, so the smallest level weighs most. `rising`: 1, 1.19, 1.41, 1.68, ...,
    so levels that double weigh as the fourth root of the latents they keep. `steep`: as their square root.
    """
    if weighting == "reverse":
        return tuple(float(n_levels - i) for i in range(n_levels))
    power = {"uniform": 0.0, "rising": 1 / 4, "steep": 1 / 2}[weighting]
    return tuple(2 ** (power * i) for i in range(n_levels))


def reconstruction_loss(x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
    """Mean squared error per element."""
    return (x - x_hat).square().mean()


def matryoshka_loss(
    x: Float[Tensor, "n d_in"],
    h: Float[Tensor, "n d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    *,
    levels: Sequence[int],
    weights: Sequence[float],
    level_scales: Float[Tensor, " n_levels"] | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, ""]:
    """Weighted mean of the reconstruction error at several sparsity levels.

    The levels share one set of pre-activations, so a coarse level is always a
    subset of a fine one: that nesting is what makes the dictionary hierarchical.

    Args:
        x: Standardised embeddings.
        h: Pre-activations of `x`, before any top-k.
        levels: Latents kept at each level, strictly increasing.
        weights: One non-negative weight per level; only their ratios matter.
        level_scales: What the activations are multiplied by at each level: fewer latents have to be stronger.
        soft_cap: Largest activation, if there is to be one.

    Returns:
        Squared error per element, in the squared units of `x`.

    Raises:
        ConfigError: `levels` and `weights` differ in length, or `levels` do not increase.

    Source: Zaigrajew et al. 2025, arXiv:2502.20578.
    """
    check_levels(levels, weights)
    z = h.relu() if soft_cap is None else activations.soft_cap(h.relu(), soft_cap)
    masks = rank_masks(h, levels)
    return nested_loss(x, z, masks, W_dec, b_dec, weights=_shares(weights), level_scales=level_scales).total


def nested_widths_loss(
    x: Float[Tensor, "n d_in"],
    z: Float[Tensor, "n d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    *,
    widths: Sequence[int],
    weights: Sequence[float],
) -> Float[Tensor, ""]:
    """Weighted mean of the reconstruction error from prefixes of the dictionary: the other Matryoshka SAE.

    Args:
        z: Activations.
        widths: Number of leading latents in each prefix, strictly increasing.
        weights: One non-negative weight per prefix; only their ratios matter.

    Raises:
        ConfigError: `widths` and `weights` differ in length, or `widths` do not increase.

    Source: Bussmann et al. 2025, arXiv:2503.17547.
    """
    check_levels(widths, weights, noun="widths")
    return nested_loss(x, z, width_masks(z, widths), W_dec, b_dec, weights=_shares(weights)).total


class NestedLoss(NamedTuple):
    """The reconstruction error of nested sets of latents."""

    total: Float[Tensor, ""]
    """Weighted sum of `errors`."""
    errors: Float[Tensor, " n_sets"]
    """Squared error per element with the latents of each set, without a gradient."""
    x_hat: Float[Tensor, "n d_in"]
    """Reconstruction from the last set."""
    z: Float[Tensor, "n d_sae"]
    """Activations of the last set, before its scale."""


def nested_loss(
    x: Float[Tensor, "n d_in"],
    z: Float[Tensor, "n d_sae"],
    masks: Iterable[Float[Tensor, "n d_sae"]],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    *,
    weights: Sequence[float],
    level_scales: Float[Tensor, " n_sets"] | None = None,
) -> NestedLoss:
    """What every kind of SAE minimises: the error of each nested set of latents, weighted and added up.

    Args:
        z: Activations before they are cut into sets.
        masks: For each set 1 where a latent belongs to it, else 0.
        weights: One per set; they sum to one.
        level_scales: What the activations of each set are multiplied by; 1 if left out.
    """
    total = x.new_zeros(())
    errors = []
    scales = [None] * len(weights) if level_scales is None else level_scales.unbind()
    for weight, mask, scale in zip(weights, masks, scales, strict=True):
        taking_part = z * mask if scale is None else z * mask * scale
        x_hat = torch.addmm(b_dec, taking_part, W_dec)
        errors.append(reconstruction_loss(x, x_hat))
        total = total + weight * errors[-1]
    return NestedLoss(total, torch.stack(errors).detach(), x_hat, z * mask)


def rank_masks(h: Float[Tensor, "n d_sae"], levels: Sequence[int]) -> Iterator[Float[Tensor, "n d_sae"]]:
    """For each level the k largest pre-activations of each row, by their signed value."""
    d_sae = h.shape[1]
    widest = max([0, *(k for k in levels if k < d_sae)])
    ranked = h.detach().topk(widest, dim=1).indices
    for k in levels:
        yield torch.zeros_like(h).scatter(1, ranked[:, :k], 1.0) if k < d_sae else torch.ones_like(h)


def width_masks(z: Float[Tensor, "n d_sae"], widths: Sequence[int]) -> Iterator[Float[Tensor, "n d_sae"]]:
    """For each width the leading latents of the dictionary."""
    latents = torch.arange(z.shape[1], device=z.device)
    for width in widths:
        yield (latents < width).to(z.dtype).expand_as(z)


def l1_penalty(x: Float[Tensor, "n d_in"], z: Float[Tensor, "n d_sae"]) -> Float[Tensor, ""]:
    """Mean over rows of the sum of activations, divided by the norm of the row.

    Source: Gao et al. 2024, arXiv:2406.04093 (normalised L1), as in the poster's ReLU baselines.
    """
    norm: Tensor = x.norm(dim=1)
    return (z.sum(1) / norm.clamp_min(torch.finfo(x.dtype).tiny)).mean()


def l0_target_penalty(active: Float[Tensor, " n"], target: int, processes: Processes = ALONE) -> Float[Tensor, ""]:
    """`(l0 / target - 1)^2` for the batch's mean count of active latents: drives JumpReLU to a chosen sparsity.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435, with the quadratic target of its appendix.
    """
    excess: Tensor = processes.whole(active.mean(), len(active)) / target - 1
    return excess.square()


def auxiliary_loss(
    residual: Float[Tensor, "n d_in"],
    h_dead: Float[Tensor, "n n_dead"],
    W_dead: Float[Tensor, "n_dead d_in"],
    *,
    k: int,
    cap: float | None = None,
    processes: Processes = ALONE,
) -> Float[Tensor, ""]:
    """Error of reconstructing the residual from the `k` strongest dead latents, relative to the residual's variance.

    Gives latents that never fire a gradient again. Zero where no latent is dead.

    Args:
        residual: What the living latents leave of `x`; no gradient flows into it.
        h_dead: Pre-activations of the dead latents, or of all, with those of the living ones minus infinity.
        W_dead: The decoder rows of these latents.
        cap: The SAE's soft cap, if it has one.
        processes: Of several, each gives its rows; the value is that of all, the gradient of the rows here.

    Source: Gao et al. 2024, arXiv:2406.04093, appendix A.2.
    """
    if len(W_dead) == 0:
        return residual.new_zeros(())
    residual = residual.detach()
    z = activations.topk(h_dead, k)
    if cap is not None:
        z = activations.soft_cap(z, cap)
    n = len(residual)
    error: Tensor = processes.whole(reconstruction_loss(residual, z @ W_dead), n)
    variance = processes.mean((residual - processes.mean(residual.mean(0), n)).square().mean(), n)
    return torch.where((h_dead > -torch.inf).any(), torch.nan_to_num(error / variance), 0.0)


def alignment_loss(images: Float[Tensor, "n d_sae"], texts: Float[Tensor, "n d_sae"]) -> Float[Tensor, ""]:
    """How badly images and their texts find each other by their activations, from 0; chance is `log(n)`.

    The cross-entropy of telling the own text of an image from the others of the batch, and the reverse, by the cosine
    of the activations: it rewards latents that both of a pair have and others have not.

    Args:
        texts: Row i belongs to row i of `images`.

    Source: Radford et al. 2021, arXiv:2103.00020, on activations instead of embeddings.
    """
    logits = functional.normalize(images) @ functional.normalize(texts).T / ALIGNMENT_TEMPERATURE
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def check_levels(levels: Sequence[int], weights: Sequence[float], *, noun: str = "levels") -> None:
    """Refuse levels that do not increase from at least 1, or weights that do not match or are all zero."""
    if len(levels) != len(weights) or not levels:
        raise ConfigError(f"{len(levels)} {noun} with {len(weights)} weights; give one weight for each of the {noun}")
    if levels[0] < 1 or any(b <= a for a, b in itertools.pairwise(levels)):
        raise ConfigError(f"{noun} {list(levels)} do not strictly increase from at least 1; sort them")
    if min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError(f"weights {list(weights)} must be non-negative and not all zero; give for example 1 for each")


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(weight / sum(weights) for weight in weights)
