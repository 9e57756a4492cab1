"""Thresholds of latents: fitted after training, so that what fires in a row depends on that row alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from msae.base.progress import progress
from msae.sae.standardize import Modality

if TYPE_CHECKING:
    from msae.sae.model import SAE

MAX_ROWS = 65_536
"""Rows that thresholds are fitted on: all of a smaller store, a random sample of a larger one."""
SILENT = torch.finfo(torch.float32).max
"""The threshold of a latent that never fires: nothing exceeds it, and unlike infinity it is an ordinary number."""
COLUMN_ENTRIES = 2**24
"""Pre-activations of some latents and all fitted rows that are sorted at once, 64 MB."""


class ThresholdTable(NamedTuple):
    """Thresholds for several mean numbers of active latents."""

    l0: Float64[Tensor, " n"]
    """Mean number of active latents of a fitted row; increasing, from 0 to that of ReLU."""
    thresholds: Float[Tensor, "n d_sae"]
    """The first row, of l0 0, is each latent's largest pre-activation: a latent that has it at another l0 too was never
    among the strongest there."""

    @property
    def largest(self) -> float:
        """The mean number of positive latents: no threshold makes more fire."""
        return float(self.l0[-1])

    def at(self, l0: float) -> Float[Tensor, " d_sae"]:
        """Thresholds under which a row has `l0` active latents on average.

        Between two rows of the table they are linear in the logarithm of `l0`, because the number of pre-activations
        above a threshold falls about exponentially with it.
        """
        row = self.thresholds[-1]
        if l0 < self.largest:
            high = int(torch.searchsorted(self.l0, l0, right=True))
            low = high - 1
            below, above = float(self.l0[low]), float(self.l0[high])
            share = l0 / above if below == 0 else math.log(l0 / below) / math.log(above / below)
            row = torch.lerp(self.thresholds[low], self.thresholds[high], share)
        return torch.where(row >= self.thresholds[0], SILENT, row)


def fit_thresholds(
    sae: SAE, rows: Callable[[], Iterable[Float[Tensor, "n d_in"]]], n_rows: int, *, l0: int
) -> ThresholdTable:
    """Thresholds under which each latent fires as often as it is among the k strongest, for k = 1, 2, 4 … and `l0`.

    So firing rates are those of the k strongest, the mean number of active latents is exact on the fitted rows (but for
    equal pre-activations), and yet no latent depends on the others of its row. Where rows have fewer than `l0` positive
    latents the others have more. Memory does not grow with the rows.

    Args:
        rows: Gives a fresh iterator over the same standardised rows each time.
    """
    ks = sorted({2**i for i in range((sae.d_sae - 1).bit_length())} | {sae.d_sae, min(l0, sae.d_sae)})
    width = max(1, COLUMN_ENTRIES // n_rows)
    blocks = [slice(first, min(first + width, sae.d_sae)) for first in range(0, sae.d_sae, width)]
    with progress("fitting thresholds", total=n_rows * (1 + len(blocks)), unit="rows") as advance:

        def counted() -> Iterator[Tensor]:
            for x in rows():
                yield x
                advance(len(x))

        times = _with_total(_with_halves(_times_among_strongest(sae, counted(), ks)), l0 * n_rows)
        reached = times.sum(1) / n_rows
        kept = np.flatnonzero(np.diff(reached, prepend=0.0) > 0)  # beyond the positive latents nothing is added
        table = np.empty((len(kept) + 1, sae.d_sae), np.float32)
        for block in blocks:
            table[:, block] = _exceeded(_columns(sae, counted(), n_rows, block), times[kept, block])
    device = sae.W_dec.device
    l0s = torch.from_numpy(np.concatenate([[0.0], reached[kept]]))
    return ThresholdTable(l0s.to(device), torch.from_numpy(table).to(device))


class StoredRows(Protocol):
    """What can be read like a store: one, or several that are joined."""

    def __len__(self) -> int: ...
    def take(self, rows: NDArray[np.int64], modality: Modality) -> NDArray[np.float32]: ...


def fitting_rows(store: StoredRows, *, seed: int = 0) -> Int64[np.ndarray, " n"]:
    """The rows of a store that thresholds are fitted on, ascending."""
    if len(store) <= MAX_ROWS:
        return np.arange(len(store))
    return np.sort(np.random.default_rng(seed).choice(len(store), MAX_ROWS, replace=False))


def rows_at_once(d_sae: int) -> int:
    """Rows whose pre-activations take some 16 MB."""
    return max(64, 2**22 // d_sae)


def fit_on_store(sae: SAE, store: StoredRows, modality: Modality, *, l0: int) -> ThresholdTable:
    """`fit_thresholds` on the `fitting_rows` of a store."""
    chosen = fitting_rows(store)
    size = rows_at_once(sae.d_sae)

    def rows() -> Iterator[Tensor]:
        for first in range(0, len(chosen), size):
            raw = torch.from_numpy(store.take(chosen[first : first + size], modality))
            yield sae.standardizer.apply(raw.to(sae.W_dec.device), modality)

    return fit_thresholds(sae, rows, len(chosen), l0=l0)


@torch.no_grad()
def _times_among_strongest(sae: SAE, rows: Iterable[Tensor], ks: Sequence[int]) -> Int64[np.ndarray, "n d_sae"]:
    """In how many rows each latent is positive and among the k strongest, for each k."""
    times = np.zeros((len(ks), sae.d_sae), np.int64)
    for x in rows:
        h = sae.pre_activations(x)
        if h.device.type != "cpu":
            times += _times_in(h, ks).cpu().numpy()
            continue
        ranked = np.sort(h.numpy(), axis=1)  # many times as fast as torch's, which keeps the places
        for i, k in enumerate(ks):
            weakest = np.maximum(ranked[:, -k], np.nextafter(np.float32(0), np.float32(1)))
            # Sums of so few ones fit 32 bits, in which they are several times as fast as in 64.
            times[i] += np.add.reduce(h.numpy() >= weakest[:, None], axis=0, dtype=np.uint32)
    return times


def _times_in(h: Float[Tensor, "n d_sae"], ks: Sequence[int]) -> Int64[Tensor, "k d_sae"]:
    """The same of some rows, where they lie."""
    ranked = h.sort(dim=1).values
    return torch.stack([((h >= ranked[:, -k, None]) & (h > 0)).sum(0) for k in ks])


def _with_halves(times: Int64[np.ndarray, "n l"]) -> Int64[np.ndarray, "m l"]:
    """A row half-way between each two: with them `ThresholdTable.at` is within 2 % of what is asked, not 5 %."""
    between = (times[:-1] + times[1:]) // 2
    return np.insert(times, np.arange(1, len(times)), between, axis=0)


def _with_total(times: Int64[np.ndarray, "n l"], total: int) -> Int64[np.ndarray, "m l"]:
    """With a row whose sum is `total`, between its neighbours: the k strongest are fewer where k are not positive."""
    sums = times.sum(1)
    high = int(np.searchsorted(sums, total))
    if high == len(times) or sums[high] == total:
        return times
    low = times[high - 1] if high else np.zeros_like(times[0])
    exact = low + (times[high] - low) * ((total - low.sum()) / (sums[high] - low.sum()))
    row = np.floor(exact).astype(np.int64)
    row[np.argsort(row - exact, kind="stable")[: total - row.sum()]] += 1
    return np.insert(times, high, row, axis=0)


@torch.no_grad()
def _columns(sae: SAE, rows: Iterable[Tensor], n_rows: int, block: slice) -> Float32[np.ndarray, "l n"]:
    """The pre-activations of some latents in all rows, a latent a line, each ascending."""
    columns = sae.W_dec.new_empty(block.stop - block.start, n_rows)
    first = 0
    for x in rows:
        columns[:, first : first + len(x)] = torch.addmm(sae.b_enc[block], x - sae.b_dec, sae.W_enc[:, block]).T
        first += len(x)
    if columns.device.type != "cpu":
        return columns.sort(dim=1).values.cpu().numpy()
    columns.numpy().sort(axis=1)
    return columns.numpy()


def _exceeded(
    columns: Float32[np.ndarray, "l n"], times: Int64[np.ndarray, "k l"]
) -> Float32[np.ndarray, "k_and_one l"]:
    """What each line exceeds so many times: first its largest value, then half-way between two values next in rank."""
    n_rows, lines = columns.shape[1], np.arange(len(columns))
    n_positive = (columns > 0).sum(1)
    table = [np.maximum(columns[:, -1], 0)]
    for n in times:
        weakest = columns[lines, n_rows - np.maximum(n, 1)]
        next_one = np.where(n < n_rows, columns[lines, np.maximum(n_rows - n - 1, 0)], 0)
        # Half-way: a product that rounds otherwise, for other rows at once, still falls on the same side.
        halfway = np.minimum((weakest + np.maximum(next_one, 0)) / 2, np.nextafter(weakest, np.float32(-np.inf)))
        threshold = np.where(n >= n_positive, 0, np.maximum(halfway, 0))
        table.append(np.where(n == 0, table[0], threshold))
    return np.stack(table)
