"""The loops of the CPU kernel, compiled by numba. Each works on a range of rows or latents, so threads can share it.

Rows are compressed: `values[b, :P]` are the kept activations of sample b and `indices[b, :P]` their latents, ordered so
that level l is the first `ends[b, l]` of them. The entries between two ends are a *band*: latents that join at the same
level, and so have the same gradient. No loop adds into a place that another range also writes, so no result depends on
the number of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from msae.sae.kernels.lanes import WIDTH, add, axpy, fma, load, store, sub, total, zeros

TILE = 4 * WIDTH
"""Columns of the decoder that one pass works on: d_sae * TILE numbers should fit in the second-level cache."""

Array = np.ndarray[Any, np.dtype[Any]]
Function = TypeVar("Function", bound=Callable[..., Any])
INFINITY = np.int32(0x7F800000)
"""Bits of float32 infinity; whatever lies above, the sign left out, is NaN."""


def compiled(function: Function) -> Function:
    """`function` compiled at its first call, without the interpreter's lock and kept on disk for the next start."""
    # Nothing here assumes that there are no NaN: they must come through to the check of the loss.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
    out: Function
    try:
        out = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        logging.getLogger(__name__).info("numba cannot keep compiled kernels on disk; they are compiled at each start")
        out = numba.njit(**options)(function)
    return out


@compiled
def _compress(bits: Array, indices: Array) -> Any:
    """Move the positive entries of a row of float32, seen as int32, to its front, in order; their number."""
    n_kept = np.uint64(0)
    for j in range(bits.size):
        x = bits[j]
        bits[n_kept] = x  # without a branch: the place is written again unless x is kept
        indices[n_kept] = j
        n_kept += np.uint64(x > 0)  # a float is positive exactly when its bits are
    return np.int64(n_kept)


@compiled
def _compress_near(row: Array, indices: Array, threshold: Array, half_window: float) -> Any:
    """Move to the front the entries above their latent's threshold and, as zeros, those just below it."""
    n_kept = np.uint64(0)
    for j in range(row.size):
        x = row[j]
        above = x > threshold[j]
        row[n_kept] = x if above else np.float32(0)
        indices[n_kept] = j
        n_kept += np.uint64(above or abs(x - threshold[j]) < half_window)
    return np.int64(n_kept)


@compiled
def compress_rows(
    h: Array, indices: Array, counts: Array, threshold: Array, half_window: float, start: int, stop: int,
) -> Any:  # fmt: skip
    """Compress rows of pre-activations in place; False where there is a NaN.

    Args:
        threshold: Of each latent, for JumpReLU; otherwise empty.
    """
    is_sound: Any = True
    for b in range(start, stop):
        bits = h[b].view(np.int32)
        largest = np.int32(0)
        for j in range(bits.size):
            largest = max(largest, bits[j] & np.int32(0x7FFFFFFF))
        is_sound &= largest <= INFINITY
        if threshold.size:
            counts[b] = _compress_near(h[b], indices[b], threshold, half_window)
        else:
            counts[b] = _compress(bits, indices[b])
    return is_sound


@compiled
def count_bits(values: Array, counts: Array, upper: int) -> Array:
    """How many values have each upper half of bits; with `upper`, each lower half beside that upper one."""
    bins = np.zeros(1 << 16 if upper < 0 else 1 << 15, np.int64)
    for b in range(counts.size):
        bits = values[b].view(np.int32)
        for p in range(counts[b]):
            if upper < 0:
                bins[bits[p] >> 15] += 1
            elif bits[p] >> 15 == upper:
                bins[bits[p] & 0x7FFF] += 1
    return bins


@compiled
def tie_budgets(values: Array, counts: Array, cut: int, n_ties: int) -> Array:
    """How many entries equal to the cut each row keeps: first come, first served."""
    budgets = np.zeros(counts.size, np.int64)
    for b in range(counts.size):
        bits = values[b].view(np.int32)
        equal = 0
        for p in range(counts[b]):
            equal += bits[p] == cut
        budgets[b] = min(equal, n_ties)
        n_ties -= budgets[b]
    return budgets


@compiled
def filter_rows(values: Array, indices: Array, counts: Array, cut: int, budgets: Array, start: int, stop: int) -> None:
    """Keep the entries above the cut, and of those equal to it as many as the row's budget allows."""
    for b in range(start, stop):
        bits = values[b].view(np.int32)
        budget = budgets[b]
        n_kept = np.uint64(0)
        for p in range(counts[b]):
            x = bits[p]
            tie = x == cut and budget > 0
            budget -= tie
            bits[n_kept] = x
            indices[b, n_kept] = indices[b, p]
            n_kept += np.uint64(x > cut or tie)
        counts[b] = np.int64(n_kept)


@compiled
def _partition(bits: Array, indices: Array, n: int, k: int, low: Any, spare_bits: Array, spare_indices: Array) -> Any:
    """Move the `k` largest of the first `n` values to the front, of equal values the first ones; a bound below them.

    By bisection on the value, so it takes at most 31 passes of counting whatever the values are.

    Args:
        low: A bound below all of the values.
    """
    high = np.int32(0)
    for p in range(n):
        high = max(high, bits[p])
    high, n_ties = high + np.int32(1), 0  # invariant: more than k are >= low, fewer than k are >= high
    while high - low > 1:
        middle = np.int32((low + high) >> 1)
        count = 0
        for p in range(n):
            count += bits[p] >= middle
        if count == k:
            low = middle - np.int32(1)
            break
        if count > k:
            low = middle
        else:
            high = middle
    else:
        n_ties = k
        for p in range(n):
            n_ties -= bits[p] > low
    front, back = np.uint64(0), np.uint64(0)
    for p in range(n):
        x, j = bits[p], indices[p]
        tie = (x == low) & (n_ties > 0)
        n_ties -= tie
        is_kept = np.uint64((x > low) | tie)
        bits[front], indices[front] = x, j
        spare_bits[back], spare_indices[back] = x, j
        front += is_kept
        back += np.uint64(1) - is_kept
    bits[k:n] = spare_bits[: n - k]
    indices[k:n] = spare_indices[: n - k]
    return low


@compiled
def split_rows(
    values: Array, indices: Array, counts: Array, levels: Array, widths: Array, ends: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """Order the entries of each row into bands, by rank (`levels`) or by latent (`widths`), and set their `ends`."""
    spare_bits = np.empty(values.shape[1] + 1, np.int32)
    spare_indices = np.empty(values.shape[1] + 1, indices.dtype)
    n_levels = ends.shape[1]
    for b in range(start, stop):
        if widths.size:
            p = 0
            for level in range(n_levels):
                while p < counts[b] and indices[b, p] < widths[level]:
                    p += 1
                ends[b, level] = p
            continue
        n = counts[b]
        bits, low = values[b].view(np.int32), np.int32(0)
        for level in range(n_levels - 1, -1, -1):  # from the widest down: each works on what the last one kept
            if levels[level] < n:
                low = _partition(bits, indices[b], n, levels[level], low, spare_bits, spare_indices)
                n = levels[level]
            ends[b, level] = n


@compiled
def summarize_rows(
    values: Array, indices: Array, ends: Array, fired: Array, active: Array, start: int, stop: int,
) -> Any:  # fmt: skip
    """Mark the latents that are active, count them per row; the smallest of their values, before any soft cap."""
    smallest = np.float32(np.inf)
    for b in range(start, stop):
        n = 0
        for p in range(ends[b, -1]):
            if values[b, p] > 0:  # JumpReLU also lists zeros
                fired[indices[b, p]] = True
                smallest = min(smallest, values[b, p])
                n += 1
        active[b] = n
    return smallest


@compiled
def cap_rows(values: Array, ends: Array, cap: float, start: int, stop: int) -> None:
    """Soft cap: `cap * tanh(z / cap)`."""
    for b in range(start, stop):
        for p in range(ends[b, -1]):
            values[b, p] = cap * np.tanh(values[b, p] / cap)


@compiled
def _gather(tile: Array, indices: Array, values: Array, p: Any, stop: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    """Add `values[p] * row indices[p]` of a tile of the decoder for all p up to `stop`."""
    # A short sum of its own for each 128 entries: rounding grows with the length of a sum.
    for begin in range(p, stop, 128):
        s0, s1, s2, s3 = zeros(), zeros(), zeros(), zeros()
        for q in range(begin, min(begin + 128, stop)):
            row, z = np.int64(indices[q]) * TILE, values[q]
            s0, s1 = axpy(s0, z, load(tile, row)), axpy(s1, z, load(tile, row + WIDTH))
            s2, s3 = axpy(s2, z, load(tile, row + 2 * WIDTH)), axpy(s3, z, load(tile, row + 3 * WIDTH))
        a0, a1, a2, a3 = add(a0, s0), add(a1, s1), add(a2, s2), add(a3, s3)
    return a0, a1, a2, a3


@compiled
def _store_tile(flat: Array, place: int, a0: Any, a1: Any, a2: Any, a3: Any) -> None:
    store(flat, place, a0)
    store(flat, place + WIDTH, a1)
    store(flat, place + 2 * WIDTH, a2)
    store(flat, place + 3 * WIDTH, a3)


@compiled
def decode_rows(
    tiles: Array, x: Array, pull: Array, indices: Array, values: Array, ends: Array, S: Array, squared: Array,
    residual: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """One running decode per row, from level to level, and the gradient of the loss for the latents of each band.

    Args:
        tiles: The decoder as (tiles, d_sae, TILE): the rows that a pass gathers lie close together.
        x: Rows less `b_dec`.
        pull: Gradient of the loss with respect to half the squared error of each level.
        S: To be filled, (row, level, d_in): sum over levels i >= level of `pull[i] * (x_hat_i - x)`.
        squared: To be filled: squared error of each row and level.
        residual: To be filled: `x - x_hat` at the finest level.
    """
    n_levels, width = pull.size, x.shape[1]
    x_flat, S_flat, residual_flat = x.reshape(-1), S.reshape(-1), residual.reshape(-1)
    squared[start:stop] = 0
    for tile in range(tiles.shape[0]):
        tile_flat = tiles[tile].reshape(-1)
        for b in range(start, stop):
            place = b * width + tile * TILE
            a0, a1 = sub(zeros(), load(x_flat, place)), sub(zeros(), load(x_flat, place + WIDTH))
            a2, a3 = sub(zeros(), load(x_flat, place + 2 * WIDTH)), sub(zeros(), load(x_flat, place + 3 * WIDTH))
            first = b * n_levels * width + tile * TILE
            p = 0
            level = 0
            while True:
                a0, a1, a2, a3 = _gather(tile_flat, indices[b], values[b], p, ends[b, level], a0, a1, a2, a3)
                p = ends[b, level]
                squared[b, level] += total(fma(fma(fma(fma(zeros(), a0, a0), a1, a1), a2, a2), a3, a3))
                if p == ends[b, n_levels - 1]:
                    break
                _store_tile(S_flat, first + level * width, a0, a1, a2, a3)
                level += 1
            rest = np.float32(0)  # the levels from here on coincide
            for i in range(level, n_levels):
                rest += pull[i]
                squared[b, i] = squared[b, level]
            z = zeros()
            _store_tile(residual_flat, place, sub(z, a0), sub(z, a1), sub(z, a2), sub(z, a3))
            a0, a1, a2, a3 = axpy(z, rest, a0), axpy(z, rest, a1), axpy(z, rest, a2), axpy(z, rest, a3)
            _store_tile(S_flat, first + level * width, a0, a1, a2, a3)
            for i in range(level - 1, -1, -1):
                place = first + i * width
                a0, a1 = axpy(a0, pull[i], load(S_flat, place)), axpy(a1, pull[i], load(S_flat, place + WIDTH))
                a2 = axpy(a2, pull[i], load(S_flat, place + 2 * WIDTH))
                a3 = axpy(a3, pull[i], load(S_flat, place + 3 * WIDTH))
                _store_tile(S_flat, place, a0, a1, a2, a3)


@compiled
def decode_scaled_rows(
    tiles: Array, x: Array, pull: Array, indices: Array, values: Array, ends: Array, scales: Array, S: Array,
    squared: Array, residual: Array, error_pull: Array, scale_pull: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """`decode_rows` where the activations of each level are multiplied by its scale.

    Args:
        scales: Of each level.
        S: To be filled, (row, level, d_in): sum over levels i >= level of `pull[i] * scales[i] * (x_hat_i - x)`.
        error_pull: To be filled, (row, d_in): sum over all levels of `pull[i] * (x_hat_i - x)`.
        scale_pull: To be filled, (row, level): gradient of the loss with respect to the scale; begins at 0.
    """
    n_levels, width = pull.size, x.shape[1]
    x_flat, S_flat = x.reshape(-1), S.reshape(-1)
    residual_flat, error_flat = residual.reshape(-1), error_pull.reshape(-1)
    squared[start:stop] = 0
    for tile in range(tiles.shape[0]):
        tile_flat = tiles[tile].reshape(-1)
        for b in range(start, stop):
            place = b * width + tile * TILE
            x0, x1 = sub(zeros(), load(x_flat, place)), sub(zeros(), load(x_flat, place + WIDTH))
            x2, x3 = sub(zeros(), load(x_flat, place + 2 * WIDTH)), sub(zeros(), load(x_flat, place + 3 * WIDTH))
            first = b * n_levels * width + tile * TILE
            a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()  # what the latents so far decode to
            g0, g1, g2, g3 = zeros(), zeros(), zeros(), zeros()
            e0, e1, e2, e3 = x0, x1, x2, x3
            p = 0
            for level in range(n_levels):
                a0, a1, a2, a3 = _gather(tile_flat, indices[b], values[b], p, ends[b, level], a0, a1, a2, a3)
                p = ends[b, level]
                s = scales[level]
                e0, e1, e2, e3 = axpy(x0, s, a0), axpy(x1, s, a1), axpy(x2, s, a2), axpy(x3, s, a3)
                squared[b, level] += total(fma(fma(fma(fma(zeros(), e0, e0), e1, e1), e2, e2), e3, e3))
                along = total(fma(fma(fma(fma(zeros(), e0, a0), e1, a1), e2, a2), e3, a3))
                scale_pull[b, level] += pull[level] * along
                g0, g1 = axpy(g0, pull[level], e0), axpy(g1, pull[level], e1)
                g2, g3 = axpy(g2, pull[level], e2), axpy(g3, pull[level], e3)
                _store_tile(S_flat, first + level * width, e0, e1, e2, e3)
            _store_tile(error_flat, place, g0, g1, g2, g3)
            z = zeros()
            _store_tile(residual_flat, place, sub(z, e0), sub(z, e1), sub(z, e2), sub(z, e3))
            a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
            for i in range(n_levels - 1, -1, -1):
                place, weight = first + i * width, pull[i] * scales[i]
                a0, a1 = axpy(a0, weight, load(S_flat, place)), axpy(a1, weight, load(S_flat, place + WIDTH))
                a2 = axpy(a2, weight, load(S_flat, place + 2 * WIDTH))
                a3 = axpy(a3, weight, load(S_flat, place + 3 * WIDTH))
                _store_tile(S_flat, place, a0, a1, a2, a3)


@compiled
def sort_block(
    indices: Array, values: Array, ends: Array, begin: int, first_row: int, last_row: int, pointers: Array,
    entries: Array, values_of_entries: Array,
) -> None:  # fmt: skip
    """List the entries of a block of rows by latent, from place `begin` on.

    Args:
        pointers: To be filled: latent j's entries are `pointers[j] : pointers[j + 1]`.
        entries: To be filled, of each entry: its row, its row of `S`, its activation.
        values_of_entries: The same memory, as float32.
    """
    n_levels = ends.shape[1]
    pointers[:] = 0
    for b in range(first_row, last_row):
        for p in range(ends[b, n_levels - 1]):
            pointers[indices[b, p]] += 1
    place = begin
    for j in range(pointers.size):
        count = pointers[j]
        pointers[j] = place
        place += count
    for b in range(first_row, last_row):
        p = 0
        for level in range(n_levels):
            while p < ends[b, level]:
                j = indices[b, p]
                q = np.uint64(pointers[j])
                pointers[j] += 1
                entries[q, 0], entries[q, 1], values_of_entries[q, 2] = b, b * n_levels + level, values[b, p]
                p += 1
    for j in range(pointers.size - 1, 0, -1):  # each now points behind its entries: shift by one latent
        pointers[j] = pointers[j - 1]
    pointers[0] = begin


@compiled
def _through_activation(dz: Any, z: Any, cap: Any, threshold: Any, half_window: Any) -> Any:
    """Gradient of a pre-activation from that of its activation; and if it is within JumpReLU's window, dz and 1."""
    if cap > 0:
        return dz * (np.float32(1) - (z / cap) * (z / cap)), np.float32(0), np.float32(0)
    if half_window > 0 and z < threshold + half_window:
        return (dz if z > 0 else np.float32(0)), dz, np.float32(1)
    return dz, np.float32(0), np.float32(0)


@compiled
def _places(entries: Array, q0: int, q1: int, q2: int, q3: int, column: int, width: int) -> Any:
    """Where the rows that four entries name begin."""
    a, b = np.int64(entries[q0, column]), np.int64(entries[q1, column])
    c, d = np.int64(entries[q2, column]), np.int64(entries[q3, column])
    return a * width, b * width, c * width, d * width


@compiled
def weight_gradients(
    W_dec: Array, S: Array, x: Array, pointers: Array, entries: Array, values: Array, row_pull: Array, cap: float,
    threshold: Array, half_window: float, grad_dec: Array, grad_enc: Array, grad_bias: Array, near: Array, start: int,
    stop: int,
) -> None:  # fmt: skip
    """Gradients of the weights of a range of latents: each entry is touched once, four at a time.

    Args:
        pointers: Of each block of rows; block by block, so that the gathered rows stay in the cache.
        row_pull: Gradient of the loss with respect to each activation of a row, beside the reconstruction's (L1).
        near: To be filled for JumpReLU: sum of the gradients, and number, of the entries within the window.
    """
    width = W_dec.shape[1]
    W, S, x, dec, enc = W_dec.reshape(-1), S.reshape(-1), x.reshape(-1), grad_dec.reshape(-1), grad_enc.reshape(-1)
    dec[start * width : stop * width] = 0
    enc[start * width : stop * width] = 0
    grad_bias[start:stop] = 0
    near[start:stop] = 0
    for block in range(pointers.shape[0]):
        for j in range(start, stop):
            row, last = j * width, pointers[block, j + 1] - 1
            cut = threshold[j] if threshold.size else np.float32(0)
            for q in range(pointers[block, j], last + 1, 4):
                # A group that reaches past the last entry repeats it with weight zero.
                q1, q2, q3 = min(q + 1, last), min(q + 2, last), min(q + 3, last)
                is1, is2, is3 = np.float32(q + 1 <= last), np.float32(q + 2 <= last), np.float32(q + 3 <= last)
                z0, z1, z2, z3 = values[q, 2], values[q1, 2] * is1, values[q2, 2] * is2, values[q3, 2] * is3
                s0, s1, s2, s3 = _places(entries, q, q1, q2, q3, 1, width)
                a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
                for k in range(0, width, WIDTH):  # the rows of S are read once, for both: the cache sets the pace
                    w, g = load(W, row + k), load(dec, row + k)
                    v0, v1, v2, v3 = load(S, s0 + k), load(S, s1 + k), load(S, s2 + k), load(S, s3 + k)
                    a0, a1, a2, a3 = fma(a0, w, v0), fma(a1, w, v1), fma(a2, w, v2), fma(a3, w, v3)
                    store(dec, row + k, axpy(axpy(axpy(axpy(g, z0, v0), z1, v1), z2, v2), z3, v3))
                x0, x1, x2, x3 = _places(entries, q, q1, q2, q3, 0, 1)
                d0, n0, c0 = _through_activation(total(a0) + row_pull[x0], z0, cap, cut, half_window)
                d1, n1, c1 = _through_activation(total(a1) + row_pull[x1], z1, cap, cut, half_window)
                d2, n2, c2 = _through_activation(total(a2) + row_pull[x2], z2, cap, cut, half_window)
                d3, n3, c3 = _through_activation(total(a3) + row_pull[x3], z3, cap, cut, half_window)
                d1, d2, d3 = d1 * is1, d2 * is2, d3 * is3
                x0, x1, x2, x3 = x0 * width, x1 * width, x2 * width, x3 * width
                for k in range(0, width, WIDTH):
                    g = axpy(axpy(load(enc, row + k), d0, load(x, x0 + k)), d1, load(x, x1 + k))
                    store(enc, row + k, axpy(axpy(g, d2, load(x, x2 + k)), d3, load(x, x3 + k)))
                grad_bias[j] += (d0 + d1) + (d2 + d3)
                near[j, 0] += (n0 + n1 * is1) + (n2 * is2 + n3 * is3)
                near[j, 1] += (c0 + c1 * is1) + (c2 * is2 + c3 * is3)


@compiled
def remove_radial_rows(W: Array, grad: Array, start: int, stop: int) -> None:
    """Subtract from the gradient of each unit row its part along the row."""
    for j in range(start, stop):
        along = np.float32(0)
        for k in range(W.shape[1]):
            along += W[j, k] * grad[j, k]
        for k in range(W.shape[1]):
            grad[j, k] -= along * W[j, k]


@compiled
def square_rows(grad: Array, squares: Array, start: int, stop: int) -> None:
    """Sum of squares of each row."""
    for j in range(start, stop):
        square = np.float32(0)
        for k in range(grad.shape[1]):
            square += grad[j, k] * grad[j, k]
        squares[j] = square


@compiled
def adamw_rows(
    W: Array, grad: Array, mean: Array, square: Array, scale: Any, rate: Any, decay: Any, betas: Any, eps: Any,
    correction: Any, unit: bool, start: int, stop: int,
) -> None:  # fmt: skip
    """AdamW on a range of rows, in the order of operations of torch's; `unit`: rows end with norm one.

    Args:
        scale: Factor of the gradient, to clip it.
        rate: Learning rate over the bias correction of the mean.
        decay: Factor of the weights.
        correction: Inverse root of the bias correction of the square.
    """
    one = np.float32(1)
    beta1, beta2 = betas
    for j in range(start, stop):
        norm = np.float32(0)
        for k in range(W.shape[1]):
            g = grad[j, k] * scale
            m = mean[j, k] + (one - beta1) * (g - mean[j, k])
            v = beta2 * square[j, k] + (one - beta2) * g * g
            w = W[j, k] * decay - rate * m / (np.sqrt(v) * correction + eps)
            mean[j, k], square[j, k], W[j, k] = m, v, w
            norm += w * w
        if unit:
            shrink = one / max(np.sqrt(norm), np.float32(1.1754944e-38))
            for k in range(W.shape[1]):
                W[j, k] *= shrink
