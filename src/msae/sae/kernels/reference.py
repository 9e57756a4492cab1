"""The loss in plain torch, differentiated by autograd; its formula is `losses.nested_loss`.

Nothing in it waits for a GPU or depends on values in its memory, so a whole step can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from msae.base.processes import ALONE, Processes
from msae.sae import activations, losses
from msae.sae.kernels.cut import batchtopk
from msae.sae.kernels.selection import Objective, Parameters, SAELoss, Selection


def evaluate(x: Tensor, parameters: Parameters, objective: Objective, *, processes: Processes = ALONE) -> SAELoss:
    """The loss of one batch, differentiable with respect to `parameters`."""
    W_enc, b_enc, W_dec, b_dec, threshold, level_scales = parameters
    h = torch.addmm(b_enc, x - b_dec, W_enc)
    z = activate(h, threshold, objective, processes)
    masks = nested_masks(h, objective.selection)
    total, errors, x_hat, z = losses.nested_loss(
        x, z, masks, W_dec, b_dec, weights=objective.weights, level_scales=level_scales
    )
    charged = x.new_zeros(())
    if objective.l1:
        charged = losses.l1_penalty(x, z)
        total = total + objective.l1 * charged
    if objective.l0:
        bandwidth, target = objective.selection.bandwidth, objective.l0_target
        assert threshold is not None and bandwidth is not None and target is not None
        count = activations.count_above(h, threshold, bandwidth=bandwidth)
        total = total + objective.l0 * losses.l0_target_penalty(count, target, processes)
    active = z.detach() > 0
    smallest = h.detach().masked_fill(~active, torch.inf).min()
    return SAELoss(
        total=total,
        errors=errors,
        residual=(x - x_hat).detach(),
        l0=active.sum() / len(x),
        l1=charged.detach(),
        fired=active.any(0),
        smallest_kept=smallest.masked_fill(smallest.isinf(), 0.0),
    )


def activate(h: Tensor, threshold: Tensor | None, objective: Objective, processes: Processes) -> Tensor:
    """Activations before they are cut into nested sets."""
    selection = objective.selection
    if selection.bandwidth is not None:
        assert threshold is not None
        z = activations.jumprelu(h, threshold, bandwidth=selection.bandwidth)
    elif selection.batch_k is not None:
        alone = processes.size == 1
        z = activations.batchtopk(h, selection.batch_k) if alone else batchtopk(h, selection.batch_k, processes)
    else:
        z = activations.relu(h)
    return z if objective.soft_cap is None else activations.soft_cap(z, objective.soft_cap)


def nested_masks(h: Tensor, selection: Selection) -> Iterator[Tensor]:
    """For each nested set 1 where a latent belongs to it, else 0; one set of all latents where there is no nesting."""
    if selection.widths:
        return losses.width_masks(h, selection.widths)
    return losses.rank_masks(h, selection.levels or (h.shape[1],))
