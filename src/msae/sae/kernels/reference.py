"""The loss as its formula reads, in plain torch and differentiated by autograd: the oracle of the other kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from msae.sae import activations, losses
from msae.sae.kernels.selection import Objective, Parameters, SAELoss, Selection


def evaluate(x: Tensor, parameters: Parameters, objective: Objective) -> SAELoss:
    """The loss of one batch, differentiable with respect to `parameters`."""
    W_enc, b_enc, W_dec, b_dec, threshold = parameters
    h = torch.addmm(b_enc, x - b_dec, W_enc)
    z = activate(h, threshold, objective)
    total = x.new_zeros(())
    errors = []
    for weight, mask in zip(objective.weights, nested_masks(h, objective.selection), strict=True):
        x_hat = torch.addmm(b_dec, z * mask, W_dec)
        errors.append(losses.reconstruction_loss(x, x_hat))
        total = total + weight * errors[-1]
    z = z * mask
    charged = x.new_zeros(())
    if objective.l1:
        charged = losses.l1_penalty(x, z)
        total = total + objective.l1 * charged
    if objective.l0:
        bandwidth, target = objective.selection.bandwidth, objective.l0_target
        assert threshold is not None and bandwidth is not None and target is not None
        count = activations.count_above(h, threshold, bandwidth=bandwidth)
        total = total + objective.l0 * losses.l0_target_penalty(count, target)
    active = z.detach() > 0
    kept = h.detach()[active]
    return SAELoss(
        total=total,
        errors=torch.stack(errors).detach(),
        residual=(x - x_hat).detach(),
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
        z = activations.jumprelu(h, threshold, bandwidth=selection.bandwidth)
    elif selection.batch_k is not None:
        z = activations.batchtopk(h, selection.batch_k)
    else:
        z = activations.relu(h)
    return z if objective.soft_cap is None else activations.soft_cap(z, objective.soft_cap)


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
