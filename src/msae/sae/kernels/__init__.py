"""One training loss for every kind of sparse autoencoder, computed by whichever kernel is fastest here.

`reference` is the formula in plain torch, for GPUs too; `cpu` (numba) gives the same numbers and gradients for about
the price of a plain SAE's step, whatever the number of levels. A kernel that fails on the way is left for the
reference, with one warning.

Both are ordinary torch operations: the gradients arrive in the parameters through `backward`, so any optimiser works on
them. On several processes what is not a mean over rows (BatchTopK's cut, the L0 penalty) is computed over all of them
inside the loss, which DistributedDataParallel would not do; the gradients are then averaged in place, one exchange for
each parameter.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from msae.base.errors import ConfigError, MissingDependencyError, MsaeError, TrainingError
from msae.base.processes import ALONE, Processes
from msae.sae.kernels import reference
from msae.sae.kernels.adamw import adamw_step_
from msae.sae.kernels.loading import give_up, load
from msae.sae.kernels.selection import Objective, Parameters, SAELoss, Selection

__all__ = ["Kernel", "SAELoss", "Selection", "adamw_step_", "sae_loss"]

Kernel = Literal["auto", "reference", "cpu"]


def sae_loss(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    *,
    selection: Selection,
    weights: Sequence[float] = (1.0,),
    l1: float = 0.0,
    l0: float = 0.0,
    l0_target: int | None = None,
    soft_cap: float | None = None,
    threshold: Float[Tensor, " d_sae"] | None = None,
    level_scales: Float[Tensor, " n_levels"] | None = None,
    kernel: Kernel = "auto",
    processes: Processes = ALONE,
) -> SAELoss:
    """The training loss of a sparse autoencoder on a batch: encode, select, decode and compare, at every level at once.

    The loss is the weighted mean over levels of the mean squared error per element, plus
    `l1` times the mean over rows of the sum of activations divided by the norm of the row, plus
    `l0` times `(mean active latents / l0_target - 1)^2`.

    Args:
        x: Standardised embeddings; no gradient flows into them.
        selection: Which latents take part, and the nested sets that they form.
        weights: One non-negative weight per level; only their ratios matter.
        soft_cap: Largest activation, by `c * tanh(z / c)`.
        threshold: JumpReLU's thresholds, all positive; differentiable by a straight-through estimate.
        level_scales: What the activations are multiplied by at each level; differentiable.
        kernel: Which implementation; `auto` takes `cpu` on a CPU where that works, else the reference.
        processes: Of several, each gives its rows of the batch. Figures are then those of the whole batch; gradients
            are of the rows here, and their mean over all rows, `processes.average_gradients_`, is that of the batch.

    Raises:
        ConfigError: The settings or shapes contradict one another, or `kernel` does not do this.
        MissingDependencyError: Numba, which `cpu` needs, is not installed.
        TrainingError: The loss is not finite. On a GPU nothing waits for the loss here: look at it now and then.

    Source: Zaigrajew et al. 2025, arXiv:2502.20578 (levels); 2404.16014 (L1), 2406.04093 (TopK), 2407.14435 (JumpReLU),
        2412.06410 (BatchTopK), 2503.17547 (widths).
    """
    objective = Objective(selection, tuple(weights), l1=l1, l0=l0, l0_target=l0_target, soft_cap=soft_cap)
    parameters = Parameters(W_enc, b_enc, W_dec, b_dec, threshold, level_scales)
    x = _check(x, parameters, objective)
    implementation = _choose(kernel, x, objective)
    can_autocast = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if can_autocast else nullcontext():
        loss = None if implementation is reference else _fused(implementation, x, parameters, objective, processes)
        if loss is None:
            loss = reference.evaluate(x, parameters, objective, processes=processes)
    if processes.size > 1:
        loss = _of_all(loss, len(x), processes)
    if x.device.type == "cpu" and not math.isfinite(value := float(loss.total.detach())):
        raise TrainingError(
            f"the loss is {value}: the weights or the embeddings hold NaN or infinite values, or training "
            "diverged; check the embeddings, or train with a smaller learning rate"
        )
    return loss


def _of_all(loss: SAELoss, n: int, processes: Processes) -> SAELoss:
    """The loss of the whole batch, of which `n` rows are here: all figures in one exchange."""
    figures = loss.total.detach()[None], loss.errors, loss.l0[None], loss.l1[None], loss.fired
    means = torch.cat([one.double() for one in figures]) * (n / processes.batch_size)
    smallest = means.new_zeros(processes.size)
    smallest[processes.rank] = loss.smallest_kept
    found = processes.total(torch.cat([means, smallest]))
    total, errors, l0, l1, fired, smallest = torch.split(found, [*map(len, figures), processes.size])
    kept = smallest.masked_fill(smallest == 0, torch.inf).min()
    return loss._replace(
        total=loss.total + (total[0].to(loss.total.dtype) - loss.total.detach()),
        errors=errors.to(loss.errors.dtype),
        l0=l0[0],
        l1=l1[0],
        fired=fired > 0,
        smallest_kept=kept.masked_fill(kept.isinf(), 0.0),
    )


def _fused(
    implementation: ModuleType, x: Tensor, parameters: Parameters, objective: Objective, processes: Processes
) -> SAELoss | None:
    """The loss by an implementation that brings its gradients; None where it fails to compile or to launch."""
    wanted = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
    constants = parameters._replace(**{k: p.detach() for k, p in parameters._asdict().items() if p is not None})
    loss: SAELoss
    gradients: Parameters | None
    try:
        loss, gradients = implementation.evaluate(x, constants, objective, with_gradients=wanted, processes=processes)
    except (MsaeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as err:  # noqa: BLE001 (a compiler can fail in any way)
        give_up(implementation.__name__.rpartition(".")[2], err)
        return None
    if gradients is None:
        return loss
    total = _WithGradients.apply(loss.total, gradients, *parameters)  # type: ignore[no-untyped-call]
    return loss._replace(total=total)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients came with it: backward only hands them out."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: Parameters, *_parameters: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss was differentiated before and kept no graph; evaluate it again")
        # Not held any longer, so that a parameter can take over the memory instead of copying it.
        gradients, ctx.gradients = ctx.gradients, None
        if grad.device.type != "cpu" or float(grad) != 1.0:
            gradients = [None if g is None else g.mul_(grad) for g in gradients]
        return None, None, *gradients


def _check(x: Tensor, parameters: Parameters, objective: Objective) -> Tensor:
    """`x` in the precision of the parameters; refuses shapes and precisions that do not fit."""
    W_enc, b_enc, W_dec, b_dec, threshold, level_scales = parameters
    d_sae, d_in = W_dec.shape
    wanted = {"x": (len(x), d_in), "W_enc": (d_in, d_sae), "b_enc": (d_sae,), "b_dec": (d_in,)}
    found = {"x": x, "W_enc": W_enc, "b_enc": b_enc, "b_dec": b_dec}
    if objective.selection.bandwidth is not None:
        if threshold is None:
            raise ConfigError("a selection with a bandwidth needs the thresholds; give threshold")
        wanted["threshold"], found["threshold"] = (d_sae,), threshold
    elif threshold is not None:
        raise ConfigError("thresholds without a bandwidth; give Selection(bandwidth=...), or leave them out")
    if level_scales is not None:
        wanted["level_scales"], found["level_scales"] = (objective.selection.n_levels,), level_scales
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise ConfigError(f"{name} is {tuple(found[name].shape)}, wanted {shape} beside W_dec {(d_sae, d_in)}")
    if not len(x):
        raise ConfigError("the batch is empty; give at least one row")
    kinds = {p.dtype for p in parameters if p is not None}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ConfigError(f"parameters in {names}; the loss is computed in float32 (or float64): convert them")
    return x.detach().to(W_dec.dtype)


def _choose(kernel: Kernel, x: Tensor, objective: Objective) -> ModuleType:
    if kernel not in ("auto", "reference", "cpu"):
        raise ConfigError(f"kernel {kernel!r} is not known; give auto, reference or cpu")
    obstacle = _obstacle(x, objective)
    if kernel == "reference" or (kernel == "auto" and obstacle):
        return reference
    if obstacle:
        raise ConfigError(f"kernel cpu does not do {obstacle}; give kernel auto or reference")
    if kernel == "cpu" and importlib.util.find_spec("numba") is None:
        raise MissingDependencyError("kernel cpu needs numba, which is not installed; give kernel auto")
    return load("cpu") or reference


def _obstacle(x: Tensor, objective: Objective) -> str:
    """What the compiled loops leave to the reference, or the empty string."""
    if x.dtype != torch.float32:
        return str(x.dtype).removeprefix("torch.")
    if x.device.type != "cpu":
        return f"tensors on {x.device.type}"
    if objective.selection.bandwidth is not None and objective.soft_cap is not None:
        return "JumpReLU with a soft cap"  # it hides by how much an activation exceeds its threshold
    return ""
