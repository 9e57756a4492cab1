"""The end of a training step in one pass: radial gradient, clipping, AdamW and unit rows.

Taken one by one these read and write all parameters some ten times, which costs half as much as the loss and its
gradients. The state is torch's own (`step`, `exp_avg`, `exp_avg_sq`): checkpoints do not show who made the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from msae.sae.kernels.loading import load


@torch.no_grad()
def adamw_step_(optimizer: torch.optim.AdamW, *, unit_rows: nn.Parameter, max_grad_norm: float) -> Tensor:
    """Update the parameters of `optimizer` from their gradients; the norm of the gradient before it was clipped.

    In this order: remove from the gradient of `unit_rows` its part along each row, for Adam must not spend its step on
    the length of rows; clip the norm of all gradients together; AdamW; give `unit_rows` rows of norm one.
    Whether the gradients in the parameters are clipped afterwards is left open.

    Args:
        unit_rows: A parameter of `optimizer` whose rows have norm one.
    """
    implementation = load("cpu") if _fits(optimizer, unit_rows) else None
    if implementation is None:
        return _one_by_one(optimizer, unit_rows, max_grad_norm)
    return _fused(implementation, optimizer, unit_rows, max_grad_norm)


def _one_by_one(optimizer: torch.optim.AdamW, unit_rows: nn.Parameter, max_grad_norm: float) -> Tensor:
    assert unit_rows.grad is not None
    unit_rows.grad -= (unit_rows.grad * unit_rows).sum(1, keepdim=True) * unit_rows
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    unit_rows.div_(unit_rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(unit_rows.dtype).tiny))
    return norm


def _fits(optimizer: torch.optim.AdamW, unit_rows: nn.Parameter) -> bool:
    """Whether everything is plain float32 on the CPU, each gradient laid out as its parameter."""
    groups = optimizer.param_groups
    if type(optimizer) is not torch.optim.AdamW or any(group["amsgrad"] or group["maximize"] for group in groups):
        return False
    return unit_rows.is_contiguous() and all(
        p.grad is not None
        and p.device.type == p.grad.device.type == "cpu"
        and p.dtype == p.grad.dtype == torch.float32
        and p.stride() == p.grad.stride()
        and (p.is_contiguous() or p.T.is_contiguous())
        for group in groups
        for p in group["params"]
    )


def _fused(implementation: Any, optimizer: torch.optim.AdamW, unit_rows: nn.Parameter, max_grad_norm: float) -> Tensor:
    share, loops = implementation.share, implementation.loops
    share(loops.remove_radial_rows, len(unit_rows), _rows(unit_rows), _rows(unit_rows.grad))
    total = 0.0
    for _, parameter in _parameters(optimizer):
        grad = _rows(parameter.grad)
        squares = np.empty(len(grad), np.float32)
        share(loops.square_rows, len(grad), grad, squares)
        total += float(squares.sum(dtype=np.float64))
    norm = math.sqrt(total)
    scale = np.float32(min(1.0, max_grad_norm / (norm + 1e-6)))  # as torch's clip_grad_norm_
    for group, parameter in _parameters(optimizer):
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for name in ("exp_avg", "exp_avg_sq"):  # a state that was loaded is laid out as its file was
            if state[name].stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(state[name])
        state["step"] += 1
        step, lr, (beta1, beta2) = float(state["step"]), float(group["lr"]), group["betas"]
        W = _rows(parameter)
        share(
            loops.adamw_rows, len(W), W, _rows(parameter.grad), _rows(state["exp_avg"]), _rows(state["exp_avg_sq"]),
            scale, np.float32(lr / (1 - beta1**step)), np.float32(1 - lr * group["weight_decay"]),
            (np.float32(beta1), np.float32(beta2)), np.float32(group["eps"]),
            np.float32((1 - beta2**step) ** -0.5), parameter is unit_rows,
        )  # fmt: skip
    return torch.tensor(norm, dtype=torch.float64)


def _parameters(optimizer: torch.optim.AdamW) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def _rows(tensor: Tensor | None) -> Any:
    """The tensor's memory as a contiguous matrix: a transposed one transposed back, a vector as one row."""
    assert tensor is not None
    array = tensor.detach().numpy()
    if array.ndim == 1:
        return array[None]
    return array if tensor.is_contiguous() else array.T
