"""The loss and its gradients on a GPU, in Triton: one selection for all levels, then products of masked bands.

The selection gives each entry its *band*: the first level that it belongs to. A product with one band needs no matrix
of its own: the mask is built as the operand is loaded, so the tensor cores do the work and nothing of the size
(n, d_sae) is written for each level. Products are in float32 unless `torch.set_float32_matmul_precision` allows TF32
(`high`) or bfloat16 (`medium`) with float32 sums.

Run in Triton's interpreter only (`TRITON_INTERPRET=1`), where it agrees with the reference; never yet on a GPU.
"""

# Triton compiles what is decorated and has no types to offer.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from msae.base.processes import Processes
from msae.sae.kernels.selection import Objective, Parameters, SAELoss, Selection

_BLOCK = 64  # rows, latents and columns of a tile; the inner dimension goes by half of it
_PRECISION = {"highest": "ieee", "high": "tf32", "medium": "bf16"}


@triton.jit
def _bands_of_row(h, levels, bands, d_sae, N_LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """Band of each entry of a row by its rank among the positive ones; `N_LEVELS` where it belongs to none."""
    places = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * d_sae
    values = tl.load(h + row + places, mask=places < d_sae, other=0.0)
    bits = tl.maximum(values, 0.0).to(tl.int32, bitcast=True)  # positive floats are ordered as their bits
    band = tl.full((BLOCK,), N_LEVELS, tl.int32)
    for i in tl.static_range(N_LEVELS):
        level = N_LEVELS - 1 - i
        k = tl.load(levels + level)
        cut = tl.zeros((), tl.int32)  # the k-th largest, found bit by bit: the largest cut that k entries reach
        for bit in tl.static_range(31):
            tried = cut | (1 << (30 - bit))
            cut = tl.where(tl.sum((bits >= tried).to(tl.int32)) >= k, tried, cut)
        ties = (bits == cut).to(tl.int32)
        n_ties = k - tl.sum((bits > cut).to(tl.int32))
        is_kept = (bits > cut) | ((ties > 0) & (tl.cumsum(ties) <= n_ties))
        band = tl.where(is_kept & (bits > 0), level, band)
    tl.store(bands + row + places, band.to(tl.int8), mask=places < d_sae)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), out_dtype=tl.float32)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _tile(matrix, rows, columns, n_rows, n_columns):
    """A tile of a row-major matrix, zero outside of it."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * n_columns + columns[None, :], mask=inside, other=0)


@triton.jit
def _decode(z, bands, W_dec, x, errors, n, d_sae, d_in,
            N_LEVELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`x_hat - x` of a tile at each level, by a running sum over bands; `x` is less `b_dec`."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = -_tile(x, rows, columns, n, d_in)
    inside = (rows < n)[:, None] & (columns < d_in)[None, :]
    for level in range(N_LEVELS):
        for start in range(0, d_sae, BLOCK // 2):
            latents = start + tl.arange(0, BLOCK // 2)
            member = _tile(bands, rows, latents, n, d_sae) == level
            member = member & (rows < n)[:, None] & (latents < d_sae)[None, :]
            banded = tl.where(member, _tile(z, rows, latents, n, d_sae), 0.0)
            total += _dot(banded, _tile(W_dec, latents, columns, d_sae, d_in), PRECISION)
        place = (level * n + rows).to(tl.int64)[:, None] * d_in + columns[None, :]
        tl.store(errors + place, total, mask=inside)


@triton.jit
def _activation_gradient(S, bands, W_dec, out, n, d_sae, d_in,
                         N_LEVELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of a tile of activations: each takes the product of its own band with its decoder row."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latents = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    band = _tile(bands, rows, latents, n, d_sae)
    gradient = tl.zeros((BLOCK, BLOCK), tl.float32)
    for level in range(N_LEVELS):
        product = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, d_in, BLOCK // 2):
            columns = start + tl.arange(0, BLOCK // 2)
            W = _tile(W_dec, latents, columns, d_sae, d_in)
            product += _dot(_tile(S, level * n + rows, columns, N_LEVELS * n, d_in), tl.trans(W), PRECISION)
        gradient = tl.where(band == level, product, gradient)
    inside = (rows < n)[:, None] & (latents < d_sae)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * d_sae + latents[None, :], gradient, mask=inside)


@triton.jit
def _decoder_gradient(z, bands, S, out, n, d_sae, d_in,
                      N_LEVELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of the decoder's gradient: the sum over bands of activations times what their level pulls."""
    latents = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.zeros((BLOCK, BLOCK), tl.float32)
    for level in range(N_LEVELS):
        for start in range(0, n, BLOCK // 2):
            rows = start + tl.arange(0, BLOCK // 2)
            member = _tile(bands, rows, latents, n, d_sae) == level
            banded = tl.where(member, _tile(z, rows, latents, n, d_sae), 0.0)
            pulls = _tile(S, level * n + rows, columns, N_LEVELS * n, d_in)
            gradient += _dot(tl.trans(banded), pulls, PRECISION)
    inside = (latents < d_sae)[:, None] & (columns < d_in)[None, :]
    tl.store(out + latents.to(tl.int64)[:, None] * d_in + columns[None, :], gradient, mask=inside)


def self_test() -> None:
    """Nothing to compile before the sizes are known."""
    if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        raise RuntimeError("there is no GPU")


def evaluate(
    x: Tensor,
    parameters: Parameters,
    objective: Objective,
    *,
    with_gradients: bool,
    processes: Processes,  # noqa: ARG001  # nothing that it does depends on other rows: see `_obstacle`
) -> tuple[SAELoss, Parameters | None]:
    """The loss of one batch of float32 rows and, if asked for, its gradients, in the layout of the parameters."""
    W_enc, b_enc, W_dec, b_dec, *_ = parameters
    W_dec, x_centred = W_dec.contiguous(), x - b_dec
    n, d_in = x.shape
    d_sae = len(W_dec)
    h = torch.addmm(b_enc, x_centred, W_enc)
    bands = _bands(h, objective.selection)
    is_active = bands < objective.selection.n_levels
    z = torch.where(is_active, h, 0.0)
    if objective.soft_cap is not None:
        z = objective.soft_cap * torch.tanh(z / objective.soft_cap)
    n_levels = objective.selection.n_levels
    options: dict[str, Any] = {
        "N_LEVELS": n_levels,
        "BLOCK": _BLOCK,
        "PRECISION": _PRECISION[torch.get_float32_matmul_precision()],
    }
    sizes = n, d_sae, d_in
    row_tiles, latent_tiles, column_tiles = (triton.cdiv(size, _BLOCK) for size in sizes)
    errors = torch.empty(n_levels, n, d_in, device=x.device)
    _decode[row_tiles, column_tiles](z, bands, W_dec, x_centred, errors, *sizes, **options)
    weights = torch.tensor(objective.weights, device=x.device)
    squared = errors.square().mean(dim=(1, 2))
    norms = x.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    l1 = (z.sum(1) / norms).mean() if objective.l1 else x.new_zeros(())
    total = squared @ weights + objective.l1 * l1 + 0.0 * h.sum()  # the last: NaN that no band took
    loss = _loss(total, squared, errors[-1], z, h, l1)
    if not with_gradients:
        return loss, None
    pulls = errors * (weights * (2 / (n * d_in)))[:, None, None]
    S = pulls.flip(0).cumsum(0).flip(0).contiguous()
    dz, grad_dec = torch.empty_like(h), torch.empty_like(W_dec)
    _activation_gradient[row_tiles, latent_tiles](S, bands, W_dec, dz, *sizes, **options)
    _decoder_gradient[latent_tiles, column_tiles](z, bands, S, grad_dec, *sizes, **options)
    dz = torch.where(is_active, dz + (objective.l1 / n / norms)[:, None], 0.0)
    if objective.soft_cap is not None:
        dz = dz * (1 - (z / objective.soft_cap).square())
    grad_bias = dz.sum(0)
    b_dec_gradient = S[0].sum(0) - W_enc @ grad_bias
    return loss, Parameters((dz.T @ x_centred).T, grad_bias, grad_dec, b_dec_gradient, None)


def _bands(h: Tensor, selection: Selection) -> Tensor:
    """Band of each entry, `n_levels` where it takes no part."""
    n, d_sae = h.shape
    h = h.contiguous()
    if selection.batch_k is not None and selection.batch_k < d_sae:
        places = h.flatten().topk(n * selection.batch_k, sorted=False).indices
        h = (torch.zeros_like(h).flatten().scatter(0, places, 1.0) * h.flatten()).view_as(h)
    if selection.widths:
        widths = torch.tensor(selection.widths, device=h.device)
        bands = torch.searchsorted(widths, torch.arange(d_sae, device=h.device), right=True)
        return torch.where(h > 0, bands, len(widths)).to(torch.int8)
    levels = torch.tensor(selection.levels or (d_sae,), dtype=torch.int32, device=h.device)
    bands = torch.empty(h.shape, dtype=torch.int8, device=h.device)
    block = triton.next_power_of_2(d_sae)
    _bands_of_row[(n,)](h, levels, bands, d_sae, N_LEVELS=len(levels), BLOCK=block)
    return bands


def _loss(total: Tensor, squared: Tensor, error: Tensor, z: Tensor, h: Tensor, l1: Tensor) -> SAELoss:
    active = z > 0
    kept = h[active]
    return SAELoss(
        total=total,
        errors=squared,
        residual=-error,
        l0=float(active.sum()) / len(z),
        l1=float(l1),
        fired=active.any(0),
        smallest_kept=float(kept.min()) if len(kept) else 0.0,
    )
