"""The loss and its gradients on the CPU: one selection, one running decode and one backward for all levels.

A naive step makes L selections and 3 L + 4 dense products. Here the positive entries of each row are ordered into
bands, the decode runs on from level to level, and each entry then meets its gradient once: work goes with the entries
that are active, whatever the number of levels. Only the encoder stays a dense product; with plain ReLU and many active
latents, where gathering costs more, all five products are. `loops` has the compiled loops, `dense` those of ReLU.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msae.base.processes import ALONE, Processes
from msae.sae.kernels import dense, loops
from msae.sae.kernels.cut import batch_cut
from msae.sae.kernels.selection import Objective, Parameters, SAELoss, Selection

_CACHE_BYTES = 2 << 20
"""Size of the second-level cache, which the rows gathered for the weight gradients are to stay in."""
_HUGE_PAGE = 2 << 20
_no_thresholds = np.empty(0, np.float32)
_lock = threading.Lock()  # of the scratch memory
_scratch_memory: dict[str, Any] = {}


def evaluate(
    x: Tensor,
    parameters: Parameters,
    objective: Objective,
    *,
    with_gradients: bool,
    processes: Processes = ALONE,
) -> tuple[SAELoss, Parameters | None]:
    """The loss of one batch of float32 rows and, if asked for, its gradients, in the layout of the parameters."""
    with _lock:
        batch = _Batch(x, parameters, objective, processes)
        if not _has_fast_onednn() and dense.is_worthwhile(batch.values, objective.selection):  # where MKL is fast
            batch = _DenseBatch(batch)
        batch.select()
        batch.decode()
        loss = batch.loss()
        return loss, batch.gradients() if with_gradients else None


def self_test() -> None:
    """Compile every loop, or find that this numba, llvmlite and Python do not go together."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 2, generator=generator)
    parameters = Parameters(W.T, torch.zeros(3), W, torch.zeros(2), None)
    objective = Objective(Selection(levels=(1, 2), batch_k=1), weights=(1.0, 1.0), soft_cap=9.0)
    x = torch.randn(4, 2, generator=generator)
    for scales in (None, torch.ones(2)):
        loss, _ = evaluate(x, parameters._replace(level_scales=scales), objective, with_gradients=True)
        if not bool(torch.isfinite(loss.total)):
            raise RuntimeError("the compiled loops do not compute")


class _Batch:
    """One evaluation: the arrays that its stages hand on."""

    def __init__(self, x: Tensor, parameters: Parameters, objective: Objective, processes: Processes) -> None:
        self.x, self.parameters, self.objective, self.processes = x, parameters, objective, processes
        self.n, self.d_in = x.shape
        self.d_sae = len(parameters.W_dec)
        self.width = math.ceil(self.d_in / loops.TILE) * loops.TILE  # rows are padded with zeros to whole tiles
        self.n_levels = objective.selection.n_levels
        threshold = parameters.threshold
        self.threshold = _no_thresholds if threshold is None else threshold.contiguous().numpy()
        self.half_window = np.float32((objective.selection.bandwidth or 0.0) / 2)
        self.cap = np.float32(objective.soft_cap or 0.0)
        self.x_centred = _scratch("x", (self.n, self.width))
        self.x_centred[:, self.d_in :] = 0
        centred = torch.from_numpy(self.x_centred)[:, : self.d_in]
        torch.sub(self.x, self.parameters.b_dec, out=centred)
        self.values = _scratch("values", (self.n, self.d_sae))  # pre-activations until they are compressed
        _linear(centred, self.parameters.W_enc, self.parameters.b_enc, out=torch.from_numpy(self.values))

    def select(self) -> None:
        selection = self.objective.selection
        self.indices = _scratch("indices", self.values.shape, np.uint16 if self.d_sae <= 1 << 16 else np.uint32)
        counts = np.empty(self.n, np.int64)
        is_sound = share(
            loops.compress_rows, self.n, self.values, self.indices, counts, self.threshold, self.half_window
        )
        self.is_sound = all(is_sound)
        if selection.batch_k is not None:
            cut, n_ties = batch_cut(
                lambda upper: torch.from_numpy(loops.count_bits(self.values, counts, upper)),
                self.processes.rows(self.n) * selection.batch_k,
                self.processes,
            )
            if cut:
                budgets = loops.tie_budgets(self.values, counts, cut, n_ties)
                share(loops.filter_rows, self.n, self.values, self.indices, counts, cut, budgets)
        levels = np.array(selection.levels or (self.d_sae,), np.int64)
        widths = np.array(selection.widths, np.int64)
        self.ends = np.empty((self.n, self.n_levels), np.int64)
        share(loops.split_rows, self.n, self.values, self.indices, counts, levels, widths, self.ends)
        self.fired = np.zeros(self.d_sae, np.bool_)
        self.active = np.empty(self.n, np.int64)
        smallest = share(loops.summarize_rows, self.n, self.values, self.indices, self.ends, self.fired, self.active)
        self.smallest_kept = min(smallest) if self.fired.any() else 0.0
        if self.cap:  # after the smallest was found: a threshold is compared with what no cap has touched
            share(loops.cap_rows, self.n, self.values, self.ends, self.cap)

    def decode(self) -> None:
        W_dec = self.parameters.W_dec.contiguous()
        if self.width > self.d_in:
            W_dec = torch.nn.functional.pad(W_dec, (0, self.width - self.d_in))
        self.W_dec = W_dec.numpy()
        tiles = _scratch("tiles", (self.width // loops.TILE, self.d_sae, loops.TILE))
        torch.from_numpy(tiles).copy_(W_dec.view(self.d_sae, -1, loops.TILE).transpose(0, 1))
        self.S = _scratch("S", (self.n * self.n_levels, self.width))
        self.squared = np.empty((self.n, self.n_levels), np.float32)
        self.residual = np.empty((self.n, self.width), np.float32)
        pull = (np.array(self.objective.weights) * (2 / (self.n * self.d_in))).astype(np.float32)
        ordered = tiles, self.x_centred, pull, self.indices, self.values, self.ends
        filled = self.S, self.squared, self.residual
        if self.parameters.level_scales is None:
            share(loops.decode_rows, self.n, *ordered, *filled)
            return
        self.error_pull = _scratch("error_pull", (self.n, self.width))
        self.scale_pull = np.zeros((self.n, self.n_levels), np.float32)
        scales = self.parameters.level_scales.contiguous().numpy()
        share(loops.decode_scaled_rows, self.n, *ordered, scales, *filled, self.error_pull, self.scale_pull)

    def loss(self) -> SAELoss:
        objective = self.objective
        errors = self.squared.mean(0, dtype=np.float64) / self.d_in
        total = float(errors @ np.array(objective.weights)) if self.is_sound else math.nan
        l0 = float(self.active.mean())
        if objective.l0:  # not linear in the rows
            l0 = float(self.processes.mean(torch.tensor(l0, dtype=torch.float64), self.n))
        self.l0 = l0
        l1 = 0.0
        self.row_pull = np.zeros(self.n, np.float32)
        if objective.l1:
            norms = self.x.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).numpy()
            l1 = float((self.sums() / norms).mean())
            self.row_pull = (objective.l1 / self.n / norms).astype(np.float32)
            total += objective.l1 * l1
        if objective.l0 and objective.l0_target:
            total += objective.l0 * (l0 / objective.l0_target - 1) ** 2
        return SAELoss(
            total=torch.tensor(total, dtype=torch.float32),
            errors=torch.from_numpy(errors).float(),
            residual=torch.from_numpy(self.residual)[:, : self.d_in],
            l0=torch.tensor(l0),
            l1=torch.tensor(l1),
            fired=torch.from_numpy(self.fired),
            smallest_kept=torch.tensor(float(self.smallest_kept)),
        )

    def sums(self) -> Any:
        """Sum of the activations of each row."""
        return np.array([row[:end].sum() for row, end in zip(self.values, self.ends[:, -1], strict=True)])

    def gradients(self) -> Parameters:
        pointers, entries, values = self._sorted_entries()
        shape = (self.d_sae, self.width)
        grad_dec, grad_enc = _empty(shape), _empty(shape)
        grad_bias, near = np.empty(self.d_sae, np.float32), np.empty((self.d_sae, 2), np.float32)
        share(
            loops.weight_gradients, self.d_sae, self.W_dec, self.S, self.x_centred, pointers, entries, values,
            self.row_pull, self.cap, self.threshold, self.half_window, grad_dec, grad_enc, grad_bias, near,
        )  # fmt: skip
        b_enc = torch.from_numpy(grad_bias)
        # b_dec is added after the decoder and subtracted before the encoder.
        is_scaled = self.parameters.level_scales is not None
        pulls = self.error_pull if is_scaled else self.S.reshape(self.n, self.n_levels, self.width)[:, 0]
        first = torch.from_numpy(pulls[:, : self.d_in])
        b_dec = first.sum(0, dtype=torch.float64).float() - self.parameters.W_enc @ b_enc
        return Parameters(
            W_enc=torch.from_numpy(grad_enc)[:, : self.d_in].T,
            b_enc=b_enc,
            W_dec=torch.from_numpy(grad_dec)[:, : self.d_in],
            b_dec=b_dec,
            threshold=self._threshold_gradient(torch.from_numpy(near)),
            level_scales=torch.from_numpy(self.scale_pull.sum(0, dtype=np.float64)).float() if is_scaled else None,
        )

    def _sorted_entries(self) -> tuple[Any, Any, Any]:
        """The active entries by latent, in blocks of rows whose S and x fit in the cache."""
        n_rows = max(32, _CACHE_BYTES // ((self.n_levels + 1) * self.width * 4))
        n_blocks = math.ceil(self.n / n_rows)
        pointers = np.empty((n_blocks, self.d_sae + 1), np.int64)
        begins = np.zeros(n_blocks + 1, np.int64)
        np.cumsum(np.add.reduceat(self.ends[:, -1], np.arange(0, self.n, n_rows)), out=begins[1:])
        entries = _scratch("entries", (int(begins[-1]), 3), np.uint32)
        values = entries.view(np.float32)

        def sort(start: int, stop: int) -> None:
            for block in range(start, stop):
                rows = block * n_rows, min(self.n, (block + 1) * n_rows)
                loops.sort_block(
                    self.indices, self.values, self.ends, begins[block], *rows, pointers[block], entries, values
                )

        share(sort, n_blocks)
        return pointers, entries, values

    def _threshold_gradient(self, near: Tensor) -> Tensor | None:
        """Straight-through: `-threshold / bandwidth` of what passes within the window, and the L0 penalty's share."""
        objective, threshold = self.objective, self.parameters.threshold
        if threshold is None or objective.selection.bandwidth is None:
            return None
        gradient = -threshold * near[:, 0]
        if objective.l0 and objective.l0_target:
            slope = 2 * objective.l0 * (self.l0 / objective.l0_target - 1) / objective.l0_target
            gradient -= slope / self.n * near[:, 1]
        return gradient / objective.selection.bandwidth


class _DenseBatch(_Batch):
    """Plain ReLU by dense products: `values` are activations, zeros among them."""

    def __init__(self, batch: _Batch) -> None:
        self.__dict__ = batch.__dict__  # encoded already
        self.centred = torch.from_numpy(self.x_centred)[:, : self.d_in]

    def select(self) -> None:
        self.fired = np.zeros(self.d_sae, np.bool_)
        self.active, self.row_sums = np.empty(self.n, np.int64), np.empty(self.n, np.float32)
        found = share(dense.rectify_rows, self.n, self.values, self.cap, self.fired, self.active, self.row_sums)
        smallest, is_sound = zip(*found, strict=True)
        self.is_sound = all(is_sound)
        self.smallest_kept = float(np.int32(min(smallest)).view(np.float32)) if self.fired.any() else 0.0

    def decode(self) -> None:
        self.error = torch.addmm(self.centred, torch.from_numpy(self.values), self.parameters.W_dec, beta=-1)
        self.squared = self.error.square().sum(1, keepdim=True).numpy()
        self.residual = self.error.neg().numpy()

    def sums(self) -> Any:
        return self.row_sums

    def gradients(self) -> Parameters:
        W_enc, _, W_dec, *_ = self.parameters
        pull = self.error.mul_(2 / (self.n * self.d_in))
        dh = torch.from_numpy(_scratch("dh", (self.n, self.d_sae)))
        torch.mm(pull, W_dec.T, out=dh)
        share(dense.mask_rows, self.n, dh.numpy(), self.values, self.row_pull, self.cap)
        grad_dec, grad_enc = (torch.from_numpy(_empty((self.d_sae, self.d_in))) for _ in range(2))
        torch.mm(torch.from_numpy(self.values).T, pull, out=grad_dec)
        torch.mm(dh.T, self.centred, out=grad_enc)
        b_enc = dh.sum(0)
        b_dec = pull.sum(0, dtype=torch.float64).float() - W_enc @ b_enc
        return Parameters(W_enc=grad_enc.T, b_enc=b_enc, W_dec=grad_dec, b_dec=b_dec, threshold=None)


def _empty(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """Uninitialised memory that begins on a huge page.

    numpy begins 16 bytes past a page, so every vector of 64 bytes would lie across two cache lines: a quarter slower.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(n_bytes + _HUGE_PAGE, np.uint8)  # numpy asks the system for huge pages where it can
    start = -raw.ctypes.data % _HUGE_PAGE
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def _scratch(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """Uninitialised memory that the next call gets again: fresh pages would cost more than some of the loops."""
    size = math.prod(shape)
    known = _scratch_memory.get(name)
    if known is None or known.size < size or known.dtype != dtype:
        _scratch_memory[name] = known = _empty((size,), dtype)
    return known[:size].reshape(shape)


def share(loop: Callable[..., Any], n: int, *args: Any) -> list[Any]:
    """What `loop(*args, start, stop)` gives for ranges that make up `range(n)`, on as many threads as torch uses."""
    n_threads = min(torch.get_num_threads(), n)
    if n_threads <= 1:
        return [loop(*args, 0, n)]
    # Two ranges per thread, so that one that is done early takes from another; each reads the decoder anew.
    n_ranges = min(n, 2 * n_threads)
    bounds = [n * i // n_ranges for i in range(n_ranges + 1)]
    return list(_threads(n_threads).map(lambda i: loop(*args, bounds[i], bounds[i + 1]), range(n_ranges)))


@functools.cache
def _threads(n: int) -> ThreadPoolExecutor:
    """Plain threads, for the loops run without the interpreter's lock; numba's own pool would fight with torch's."""
    return ThreadPoolExecutor(n, thread_name_prefix="msae")


def _forget_threads() -> None:
    global _lock
    _threads.cache_clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # a forked process has none of its parent's threads


def _linear(x: Tensor, W: Tensor, b: Tensor, *, out: Tensor) -> None:
    """`x W + b`."""
    if _has_fast_onednn() and x.is_contiguous() and W.T.is_contiguous():
        out.copy_(torch.ops.mkldnn._linear_pointwise(x, W.T, b, "none", [], ""))
    else:
        torch.addmm(b, x, W, out=out)


@functools.cache
def _has_fast_onednn() -> bool:
    """On AMD, MKL holds back and oneDNN is up to four times faster; elsewhere both are equal. A private operator."""
    try:
        if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
            return False
        x, W, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], ""), torch.full((2, 4), 4.0))
    except (OSError, AttributeError, RuntimeError, TypeError):
        return False
