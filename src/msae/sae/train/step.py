"""One training step, and the learning rate of each. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from msae.base.processes import ALONE, Processes
from msae.sae import activations, losses
from msae.sae.kernels import SAELoss, Selection, sae_loss
from msae.sae.kernels.adamw import adamw_step_
from msae.sae.model import SAE
from msae.sae.train.settings import TrainSettings

JUMPRELU_BANDWIDTH = 0.1
"""Width of the straight-through window, in units of pre-activations, which are of order 1 in this space."""


class StepResult(NamedTuple):
    """Figures of one step, where it was computed: to read one is to wait for the device."""

    loss: Float[Tensor, ""]
    """What was minimised, in units of the variance of standardised embeddings."""
    reconstruction: Float[Tensor, ""]
    """Mean squared error per element at the finest level."""
    l0: Float[Tensor, ""]
    """Mean count of active latents per row."""
    fired: Bool[Tensor, " d_sae"]
    """Latents that were active in at least one row."""
    grad_norm: Float[Tensor, ""]
    """Before clipping."""


def objective_of(
    settings: TrainSettings, processes: Processes = ALONE
) -> Callable[[SAE, Float[Tensor, "n d_in"]], SAELoss]:
    """The loss that `settings` ask for, as a function of an SAE and a batch of standardised embeddings."""
    l1 = l0 = 0.0
    weights: Sequence[float] = (1.0,)
    match settings.kind:
        case "matryoshka":
            assert settings.weights is not None
            nested = (settings.levels or (), settings.widths or (), settings.k if settings.widths else None)
            selection, weights = Selection(*nested), settings.weights
        case "topk":
            assert settings.k is not None
            selection = Selection(levels=(settings.k,))
        case "batchtopk":
            selection = Selection(batch_k=settings.k)
        case "jumprelu":
            selection, l0 = Selection(bandwidth=JUMPRELU_BANDWIDTH), 1.0
        case "relu":
            selection, l1 = Selection(), settings.l1 or 0.0

    def objective(sae: SAE, x: Tensor) -> SAELoss:
        threshold = None if sae.log_threshold is None else sae.log_threshold.exp()
        scales = None if sae.log_level_scales is None else sae.log_level_scales.exp()
        return sae_loss(
            x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, selection=selection, weights=weights, l1=l1, l0=l0,
            l0_target=settings.k, soft_cap=settings.soft_cap, threshold=threshold, level_scales=scales,
            kernel=settings.kernel, processes=processes,
        )  # fmt: skip

    return objective


def train_step(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    optimizer: torch.optim.AdamW,
    settings: TrainSettings,
    dead: Bool[Tensor, " d_sae"],
    *,
    pairs: Sequence[Float[Tensor, "m d_in"]] = (),
    processes: Processes = ALONE,
) -> StepResult:
    """Update `sae` once. The order of these lines is part of the method.

    Args:
        pairs: Images and their texts, for the loss that makes them share latents; or nothing.
        processes: Of several, each gives its rows of the batch and of the pairs, and all make the same step.
    """
    loss = objective_of(settings, processes)(sae, x)
    total = loss.total
    if settings.auxiliary:
        h_dead, W_dead = _of_the_dead(sae, x, dead)
        aid = losses.auxiliary_loss(
            loss.residual, h_dead, W_dead, k=sae.d_in // 2, cap=settings.soft_cap, processes=processes
        )
        total = total + settings.auxiliary * aid
    if pairs:
        k = settings.inference_l0 or sae.d_sae
        images, texts = (activations.topk(sae.pre_activations(one), min(k, sae.d_sae)) for one in pairs)
        aligned = losses.alignment_loss(processes.gathered(images), processes.gathered(texts))
        total = total + settings.align * processes.alike(aligned, len(x))
    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    processes.average_gradients_(sae.parameters(), len(x))
    # The decoder's radial gradient goes, the norm is clipped, AdamW steps, and decoder rows end with unit norm.
    grad_norm = adamw_step_(optimizer, unit_rows=sae.W_dec, max_grad_norm=settings.max_grad_norm)
    if sae.threshold is not None:
        track_threshold_(sae.threshold, loss.smallest_kept)
    return StepResult(total.detach(), loss.errors[-1], loss.l0, loss.fired, grad_norm)


def _of_the_dead(
    sae: SAE, x: Float[Tensor, "n d_in"], dead: Bool[Tensor, " d_sae"]
) -> tuple[Float[Tensor, "n some"], Float[Tensor, "some d_in"]]:
    """Pre-activations and decoder rows of the dead latents; on a GPU of all, the living ones at minus infinity."""
    if x.device.type == "cpu":  # many times cheaper; a GPU would have to be asked how many are dead
        return (x - sae.b_dec) @ sae.W_enc[:, dead] + sae.b_enc[dead], sae.W_dec[dead]
    return sae.pre_activations(x).masked_fill(~dead, -torch.inf), sae.W_dec


@torch.no_grad()
def track_threshold_(threshold: Float[Tensor, ""], smallest_kept: Float[Tensor, ""]) -> None:
    """Move BatchTopK's running threshold towards the smallest pre-activation that a batch kept; 0 is none."""
    known, smallest = threshold.double(), smallest_kept.double()
    moved = torch.where(known > 0, known + 0.01 * (smallest - known), smallest)
    threshold.copy_(torch.where(smallest > 0, moved, known))


def learning_rate(settings: TrainSettings, step: int, n_steps: int) -> float:
    """The rate of step `step` (from 0): a linear rise, a plateau, a linear fall towards 0."""
    assert settings.lr is not None and settings.warmup is not None
    rise = (step + 1) / max(1.0, settings.warmup * n_steps)
    fall = (n_steps - step) / max(1.0, settings.decay * n_steps)
    return settings.lr * min(1.0, rise, fall)
