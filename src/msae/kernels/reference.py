"""The loss as its formula reads, in plain torch and differentiated by autograd: the oracle of the other kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from msae.kernels.selection import Objective, Parameters, SAELoss, Selection


def evaluate(x: Tensor, parameters: Parameters, objective: Objective) -> SAELoss:
    """The loss of one batch, differentiable with respect to `parameters`."""
    W_enc, b_enc, W_dec, b_dec, threshold = parameters
    h = torch.addmm(b_enc, x - b_dec, W_enc)
    z = activate(h, threshold, objective)
    total = x.new_zeros(())
    errors = []
    for weight, mask in zip(objective.weights, nested_masks(h, objective.selection), strict=True):
        residual = x - torch.addmm(b_dec, z * mask, W_dec)
        errors.append(residual.square().mean())
        total = total + weight * errors[-1]
    z = z * mask
    charged = x.new_zeros(())
    if objective.l1:
        charged = (z.sum(1) / x.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)).mean()
        total = total + objective.l1 * charged
    if objective.l0:
        assert objective.l0_target is not None
        assert threshold is not None
        excess = _count(h, threshold, objective.selection).mean() / objective.l0_target - 1
        total = total + objective.l0 * excess.square()
    active = z.detach() > 0
    kept = z.detach()[active]
    return SAELoss(
        total=total,
        errors=torch.stack(errors).detach(),
        residual=residual.detach(),
        l0=float(active.sum()) / max(len(x), 1),
        l1=float(charged.detach()),
        fired=active.any(0),
        smallest_kept=float(kept.min()) if len(kept) else 0.0,
    )


def activate(h: Tensor, threshold: Tensor | None, objective: Objective) -> Tensor:
    """Activations before they are cut into nested sets."""
    selection = objective.selection
    if selection.bandwidth is not None:
        assert threshold is not None
        # Derivative by the threshold: -threshold / bandwidth within the window: arXiv:2407.14435, eq. 11.
        z = h * (h > threshold) + _straight_through(h, threshold, selection, threshold.detach())
    elif selection.batch_k is not None and selection.batch_k < h.shape[1]:
        places = h.flatten().topk(selection.batch_k * len(h), sorted=False).indices
        z = (h.flatten() * torch.zeros_like(h).flatten().scatter(0, places, 1.0)).view_as(h).relu()
    else:
        z = h.relu()
    return z if objective.soft_cap is None else objective.soft_cap * torch.tanh(z / objective.soft_cap)


def nested_masks(h: Tensor, selection: Selection) -> Iterator[Tensor]:
    """For each level 1 where a latent belongs to its set, else 0."""
    d_sae = h.shape[1]
    if selection.widths:
        latents = torch.arange(d_sae, device=h.device)
        yield from ((latents < width).to(h.dtype).expand_as(h) for width in selection.widths)
        return
    widest = max((k for k in selection.levels if k < d_sae), default=0)
    ranked = h.detach().topk(widest, dim=1).indices  # signed: ReLU comes after
    for k in selection.levels or (d_sae,):
        yield torch.zeros_like(h).scatter(1, ranked[:, :k], 1.0) if k < d_sae else torch.ones_like(h)


def _straight_through(h: Tensor, threshold: Tensor, selection: Selection, scale: Tensor | float) -> Tensor:
    """Zeros whose derivative by the threshold is `-scale / bandwidth` within half a bandwidth of it."""
    assert selection.bandwidth is not None
    within = (h.detach() - threshold.detach()).abs() < selection.bandwidth / 2
    return within * (threshold.detach() - threshold) * (scale / selection.bandwidth)


def _count(h: Tensor, threshold: Tensor, selection: Selection) -> Tensor:
    """Active latents of each row, differentiable with respect to the threshold: arXiv:2407.14435, eq. 12."""
    above = (h.detach() > threshold.detach()).to(h.dtype)
    return (above + _straight_through(h, threshold, selection, 1.0)).sum(1)
