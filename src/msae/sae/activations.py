"""Activation functions of sparse autoencoders: from pre-activations `h` to activations `z >= 0`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def relu(h: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_sae"]:
    """The positive part of `h`."""
    return h.relu()


def topk(h: Float[Tensor, "n d_sae"], k: int) -> Float[Tensor, "n d_sae"]:
    """ReLU of the `k` largest entries of each row, zero elsewhere.

    The choice is made on the signed pre-activation and ReLU comes after, so a row with fewer than `k`
    positive entries keeps only those. Of equal entries at the border some are kept, so that no row has more than `k`.

    Source: Gao et al. 2024, arXiv:2406.04093.
    """
    if k >= h.shape[1]:
        return h.relu()
    values, latents = h.topk(k, dim=1, sorted=False)
    return torch.zeros_like(h).scatter(1, latents, values.relu())


def batchtopk(h: Float[Tensor, "n d_sae"], k: int) -> Float[Tensor, "n d_sae"]:
    """ReLU of the `n * k` largest entries of the whole batch, zero elsewhere.

    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    n_kept = len(h) * k
    if n_kept >= h.numel():
        return h.relu()
    values, places = h.flatten().topk(n_kept, sorted=False)
    return torch.zeros_like(h).flatten().scatter(0, places, values.relu()).view_as(h)


def threshold_relu(
    h: Float[Tensor, "n d_sae"], threshold: Float[Tensor, " d_sae"] | Float[Tensor, ""]
) -> Float[Tensor, "n d_sae"]:
    """`h` where it exceeds the threshold and zero, elsewhere zero: inference of BatchTopK and JumpReLU."""
    return torch.where(h > threshold, h, 0.0).relu()


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(h > threshold, h, 0.0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        h, threshold = ctx.saved_tensors
        inside = (h - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = -(threshold / ctx.bandwidth) * (inside * grad).sum(0)
        return grad * (h > threshold), grad_threshold, None


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        h, threshold = ctx.saved_tensors
        inside = (h - threshold).abs() < ctx.bandwidth / 2
        return None, -(1 / ctx.bandwidth) * (inside * grad).sum(0), None


def jumprelu(
    h: Float[Tensor, "n d_sae"], threshold: Float[Tensor, " d_sae"], *, bandwidth: float
) -> Float[Tensor, "n d_sae"]:
    """`h` where it exceeds its latent's threshold, zero elsewhere; differentiable in the threshold.

    The threshold's gradient is a straight-through estimate from the entries within half a bandwidth of it.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435, eq. 11.
    """
    out: Tensor = _JumpReLU.apply(h, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return out


def count_above(
    h: Float[Tensor, "n d_sae"], threshold: Float[Tensor, " d_sae"], *, bandwidth: float
) -> Float[Tensor, " n"]:
    """Number of entries of each row above their threshold; differentiable in the threshold alone.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435, eq. 12.
    """
    above: Tensor = _Heaviside.apply(h, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return above.sum(1)


def soft_cap(z: Float[Tensor, "n d_sae"], cap: float) -> Float[Tensor, "n d_sae"]:
    """`cap * tanh(z / cap)`: nearly `z` while small, never above `cap`.

    Source: Zaigrajew et al. 2025, arXiv:2502.20578.
    """
    return cap * torch.tanh(z / cap)
