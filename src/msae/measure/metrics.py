"""Metrics: one definition each, as a function of tensors or as a small accumulator that is fed batch by batch.

Sums are float64. A one-shot function is its accumulator fed once, so the two cannot differ. Unless said otherwise
`x` and `x_hat` are in the standardised space, where the training mean is the origin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vecdot
from torch.nn import functional

from msae.base.errors import ConfigError

# --- Means over rows


class Summary(NamedTuple):
    """A mean over rows."""

    mean: float
    """NaN where no row has a value."""
    std: float
    """Population standard deviation over the same rows; NaN where no row has a value."""
    n: int
    """Rows that have a value."""


class RunningMoments:
    """Mean row, and squared distance of the rows from it, of all batches seen.

    Batches are merged by Chan's formula, which does not cancel when the mean is far from the origin.

    Source: Chan, Golub and LeVeque 1983, doi:10.1080/00031305.1983.10483115.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean: Tensor | None = None
        self.scatter = 0.0
        """Sum over rows of the squared distance from the mean."""

    def update(self, rows: Float[Tensor, "n d"]) -> None:
        if not len(rows):
            return
        rows = rows.double()
        mean = rows.mean(0)
        scatter = float((rows - mean).square().sum())
        if self.mean is None:
            self.n, self.mean, self.scatter = len(rows), mean, scatter
            return
        shift = mean - self.mean
        n = self.n + len(rows)
        self.scatter += scatter + float(shift.square().sum()) * self.n * len(rows) / n
        self.mean = self.mean + shift * (len(rows) / n)
        self.n = n


class RunningMean:
    """Mean and standard deviation of one number per row; rows without a value (NaN) are left out."""

    def __init__(self) -> None:
        self._moments = RunningMoments()

    def update(self, values: Float[Tensor, " n"]) -> None:
        self._moments.update(values[~values.isnan()][:, None])

    def summary(self) -> Summary:
        known = self._moments
        if known.mean is None:
            return Summary(math.nan, math.nan, 0)
        return Summary(float(known.mean), math.sqrt(known.scatter / known.n), known.n)


# --- Reconstruction


def fvu_per_sample(x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
    """Squared error of each row over its squared norm: 0 is perfect, 1 is what predicting the mean scores.

    NaN for a row at the origin. Its mean and standard deviation are the row compared with the poster's "FVU".

    Source: Zaigrajew et al. 2025, arXiv:2502.20578, the text.
    """
    x, x_hat = x.double(), x_hat.double()
    error = x - x_hat
    return _ratio(vecdot(error, error), vecdot(x, x))


def fvu_authors(x_raw: Float[Tensor, "n d_in"], x_hat_raw: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
    """Variance over the features of each row's error, over the variance over the row's features.

    Of raw, unstandardised vectors: each row is centred by the mean of its own features, not by the mean row, so the
    common direction of the embeddings counts as explained. It flatters, and is here for comparison only. NaN for a
    row whose features are all equal.

    Source: the released code of Zaigrajew et al. 2025.
    """
    x_raw, x_hat_raw = x_raw.double(), x_hat_raw.double()
    return _ratio((x_raw - x_hat_raw).var(1, correction=0), x_raw.var(1, correction=0))


def cosine(x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
    """Cosine of each row and its reconstruction, from -1 to 1; 0 where either is the zero vector."""
    x, x_hat = x.double(), x_hat.double()
    norms = vecdot(x, x).sqrt() * vecdot(x_hat, x_hat).sqrt()
    return torch.where(norms > 0, vecdot(x, x_hat) / norms, 0.0)


class ReconstructionScore:
    """Every reconstruction metric of the standardised space, over all batches seen."""

    def __init__(self) -> None:
        self._squared_error = 0.0
        self._rows = RunningMoments()
        self._absolute_error = 0.0
        self._absolute = 0.0
        self._fvu_per_sample = RunningMean()
        self._cosine = RunningMean()

    def update(self, x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> None:
        x, x_hat = x.double(), x_hat.double()
        error = x - x_hat
        self._squared_error += float(vecdot(error, error).sum())
        self._absolute_error += float(error.abs_().sum())
        self._absolute += float(x.abs().sum())
        self._rows.update(x)
        self._fvu_per_sample.update(fvu_per_sample(x, x_hat))
        self._cosine.update(cosine(x, x_hat))

    def fvu(self) -> float:
        """Fraction of variance unexplained, pooled: summed squared error over the summed squared distance from the
        mean row. 0 is perfect, 1 is what predicting the mean scores; NaN where all rows are equal.
        """
        return self._squared_error / self._rows.scatter if self._rows.scatter > 0 else math.nan

    def mae(self) -> float:
        """Mean absolute error over mean absolute value: 0 is perfect; NaN where all rows are zero."""
        return self._absolute_error / self._absolute if self._absolute > 0 else math.nan

    def fvu_per_sample(self) -> Summary:
        """Mean and spread of `fvu_per_sample`."""
        return self._fvu_per_sample.summary()

    def cosine(self) -> Summary:
        """Mean and spread of `cosine`."""
        return self._cosine.summary()


def fvu(x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> float:
    """Pooled fraction of variance unexplained, see `ReconstructionScore.fvu`."""
    score = ReconstructionScore()
    score.update(x, x_hat)
    return score.fvu()


def mae(x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> float:
    """Relative mean absolute error, see `ReconstructionScore.mae`."""
    score = ReconstructionScore()
    score.update(x, x_hat)
    return score.mae()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, math.nan)


# --- Activations


def sparsity(z: Float[Tensor, "n d_sae"]) -> Float[Tensor, " n"]:
    """Share of exact zeros in each row of activations, from 0 to 1: what the poster prints as "L0"."""
    return 1 - l0(z).double() / z.shape[1]


def l0(z: Float[Tensor, "n d_sae"]) -> Int[Tensor, " n"]:
    """Number of non-zero activations of each row."""
    return z.count_nonzero(dim=1)


class LatentUse:
    """How many latents fire per row, and which never fire, over all batches seen."""

    def __init__(self, d_sae: int) -> None:
        self._fired = torch.zeros(d_sae, dtype=torch.bool)
        self._l0 = RunningMean()

    def update(self, z: Float[Tensor, "n d_sae"]) -> None:
        self._fired = self._fired.to(z.device) | (z != 0).any(0)
        self._l0.update(l0(z).double())

    def dead(self) -> int:
        """Number of latents that were never non-zero."""
        return int((~self._fired).sum())

    def sparsity(self) -> Summary:
        """Mean and spread of `sparsity`."""
        mean, std, n = self._l0.summary()
        return Summary(1 - mean / len(self._fired), std / len(self._fired), n)

    def l0(self) -> float:
        """Mean number of non-zero activations of a row."""
        return self._l0.summary().mean


def dead(z: Float[Tensor, "n d_sae"]) -> int:
    """Number of latents that are zero in every row."""
    use = LatentUse(z.shape[1])
    use.update(z)
    return use.dead()


# --- Recovery


def recovery_ks(d_sae: int) -> tuple[int, ...]:
    """1, 2, 4, ... below `d_sae`, and `d_sae` itself."""
    return (*(2**i for i in range((d_sae - 1).bit_length())), d_sae)


class Recovery:
    """What is reconstructed from only the k strongest activations of each row, for several k at once.

    One sort per batch: the latents of ranks k_{i-1} to k_i are a band, and x_hat is a running sum over the bands.
    """

    NARROW = 64
    """Bands up to this many ranks gather decoder rows; wider ones are a product with a mostly zero matrix."""

    def __init__(
        self,
        ks: Sequence[int],
        W_dec: Float[Tensor, "d_sae d_in"],
        b_dec: Float[Tensor, " d_in"],
        *,
        scales: Sequence[float] | None = None,
    ) -> None:
        """`scales`: for each k what the activations are multiplied by where no more are kept; 1 if left out."""
        if any(a >= b for a, b in itertools.pairwise(ks)) or not ks or not 1 <= ks[0] <= ks[-1] <= len(W_dec):
            raise ConfigError(f"recovery at k {list(ks)}; give increasing values from 1 to d_sae {len(W_dec)}")
        self.ks = tuple(ks)
        self._scales = (1.0,) * len(self.ks) if scales is None else tuple(scales)
        self._W_dec, self._b_dec = W_dec, b_dec
        self._scores = {k: ReconstructionScore() for k in ks}
        self._best_rank = torch.full((len(W_dec),), len(W_dec), dtype=torch.int64, device=W_dec.device)

    @torch.no_grad()
    def update(self, x: Float[Tensor, "n d_in"], z: Float[Tensor, "n d_sae"]) -> None:
        values, latents = z.sort(dim=1, descending=True, stable=True)
        n_active = int((values > 0).sum(1).max()) if len(z) else 0
        x, decoded = x.double(), torch.zeros_like(x)
        for low, k, scale in zip((0, *self.ks), self.ks, self._scales, strict=False):
            high = min(k, n_active)
            if low < high:
                decoded += self._decode_band(z.shape, values[:, low:high], latents[:, low:high])
            self._scores[k].update(x, self._b_dec + scale * decoded)
        self._note_ranks(values[:, :n_active], latents[:, :n_active])

    def score(self, k: int) -> ReconstructionScore:
        """Reconstruction metrics at `k`."""
        return self._scores[k]

    def dead(self, k: int) -> int:
        """Number of latents that were never non-zero among the `k` strongest of a row."""
        return int((self._best_rank >= k).sum())

    def _decode_band(self, shape: torch.Size, values: Tensor, latents: Tensor) -> Tensor:
        if values.shape[1] <= self.NARROW:
            return torch.nn.functional.embedding_bag(latents, self._W_dec, per_sample_weights=values, mode="sum")
        return values.new_zeros(shape).scatter_(1, latents, values) @ self._W_dec

    def _note_ranks(self, values: Tensor, latents: Tensor) -> None:
        never = len(self._best_rank)
        ranks = torch.arange(values.shape[1], device=values.device).expand_as(values)
        ranks = torch.where(values > 0, ranks, never)
        self._best_rank.scatter_reduce_(0, latents.flatten(), ranks.flatten(), reduce="amin")


# --- Decoder


@torch.no_grad()
def pair_ranks(queries: Float[Tensor, "n d"], keys: Float[Tensor, "n d"], *, block: int = 1024) -> Int[Tensor, " n"]:
    """How many other keys are at least as near to each query as its own, the one of the same row; 0 is best.

    Keys that are equally near count against the query: rows that are all alike find nothing.
    """
    ranks = []
    for first in range(0, len(queries), block):
        near = queries[first : first + block] @ keys.T
        rows = torch.arange(len(near), device=near.device)
        own = near[rows, first + rows]
        ranks.append((near >= own[:, None]).sum(1) - 1)
    return torch.cat(ranks)


def jaccard_of_pairs(
    a: Float[Tensor, "n d_sae"], b: Float[Tensor, "n d_sae"], *, block: int = 1024
) -> tuple[float, float]:
    """Active latents that two rows have in common, over those of either: mean over pairs, and over all other pairs.

    Row i of `a` and of `b` are a pair. Two rows without active latents have nothing in common.
    """
    fires_a, fires_b = (a != 0).to(a.dtype), (b != 0).to(b.dtype)
    own, everything = 0.0, 0.0
    for first in range(0, len(a), block):
        rows = fires_a[first : first + block]
        common = rows @ fires_b.T
        either = rows.sum(1)[:, None] + fires_b.sum(1)[None, :] - common
        share = (common / either.clamp_min(1)).double()
        numbers = torch.arange(len(rows), device=a.device)
        own += float(share[numbers, first + numbers].sum())
        everything += float(share.sum())
    n = len(a)
    return own / n, (everything - own) / (n * (n - 1)) if n > 1 else math.nan


def decoder_orthogonality(W_dec: Float[Tensor, "d_sae d_in"]) -> float:
    """Mean over all d_sae^2 pairs of the squared cosine of two different decoder rows; the diagonal counts as 0.

    Random rows score about 1/d_in. The squares of all products of rows add up to the squared Frobenius norm of the
    (d_in, d_in) Gram matrix, so no (d_sae, d_sae) matrix is made.
    """
    rows = functional.normalize(W_dec.double(), dim=1)
    total = (rows.T @ rows).square().sum()
    diagonal = rows.square().sum(1).square().sum()
    return max(float(total - diagonal), 0.0) / len(rows) ** 2  # orthogonal rows leave rounding of either sign


@torch.no_grad()
def max_decoder_cosine(W_dec: Float[Tensor, "d_sae d_in"], *, block: int = 1024) -> float:
    """Mean over latents of the largest absolute cosine with another latent's decoder row, from 0 to 1.

    1 where every latent has a twin; 0 where all are orthogonal, or there is only one.
    """
    rows = functional.normalize(W_dec.double(), dim=1).float()
    total = 0.0
    for start in range(0, len(rows), block):
        cosines = (rows[start : start + block] @ rows.T).abs_()
        cosines.diagonal(start).zero_()
        total += float(cosines.amax(1).double().sum())
    return total / len(rows)


# --- CKNNA


class Neighbors(NamedTuple):
    """The k nearest other rows of each row by inner product, in the order of `indices`: nearest first."""

    indices: Int[Tensor, "n k"]
    products: Float[Tensor, "n k"]
    """Inner products with them, float64."""


def nearest_neighbors(rows: Float[Tensor, "n d"], k: int = 10, *, block: int = 1024) -> Neighbors:
    """For each row the `k` other rows of largest inner product; of equal ones those with the smallest index.

    The choice is that of float64. Products are made in float32, one block of rows at a time and only the upper half of
    the symmetric matrix; rows whose k-th and next product are closer than float32 can tell are done again in float64.

    Raises:
        ConfigError: There are not more than `k` rows.
    """
    n = len(rows)
    if not 1 <= k < n:
        raise ConfigError(f"{k} nearest neighbours among {n} rows; give at least {k + 1} rows")
    rows = rows.float()
    width = min(k + 1, n - 1)  # one more than asked, to see how close the decision was
    best = torch.full((n, width), -math.inf, device=rows.device)
    where = torch.zeros((n, width), dtype=torch.int64, device=rows.device)

    def offer(target: slice, products: Tensor, first_index: int) -> None:
        values, indices = products.topk(min(width, products.shape[1]), dim=1)
        values = torch.cat([best[target], values], 1)
        indices = torch.cat([where[target], indices + first_index], 1)
        best[target], chosen = values.topk(width, dim=1)
        where[target] = indices.gather(1, chosen)

    for start in range(0, n, block):
        stop = min(start + block, n)
        products = rows[start:stop] @ rows[start:].T
        products.diagonal().fill_(-math.inf)
        offer(slice(start, stop), products, start)
        if stop < n:
            offer(slice(stop, n), products[:, stop - start :].T, start)

    neighbors = Neighbors(where[:, :k].contiguous(), best[:, :k].double())
    last = best[:, k - 1]
    rounding = 4 * torch.finfo(torch.float32).eps * math.sqrt(rows.shape[1])
    if bool((rows >= 0).all()):  # activations: no terms cancel, so the error is relative, and 0 is exactly 0
        _fill_with_smallest_indices_(neighbors, (last == 0).nonzero().flatten())
        error = torch.where(last > 0, rounding * last, -math.inf)
    else:
        norms = rows.norm(dim=1)
        error = rounding * norms * norms.max()
    if width > k:
        unclear = (last - best[:, -1] <= error).nonzero().flatten()
        if len(unclear):
            _decide_in_float64_(neighbors, rows, unclear, at_least=last - 2 * error)
    return neighbors


def _fill_with_smallest_indices_(neighbors: Neighbors, some: Tensor) -> None:
    """Of the many rows of product 0, give those numbered `some` the ones with the smallest indices."""
    k = neighbors.indices.shape[1]
    related = neighbors.products[some] > 0
    used = torch.cat([torch.where(related, neighbors.indices[some], -1), some[:, None]], 1)
    candidates = torch.arange(min(2 * k + 1, len(neighbors.indices)), device=some.device)
    is_used = (candidates[None, :, None] == used[:, None, :]).any(2)
    free = candidates[is_used.to(torch.int8).argsort(dim=1, stable=True)[:, :k]]
    # the related ones come first: shift the free ones behind them
    place = (torch.arange(k, device=some.device) - related.sum(1, keepdim=True)).clamp_min(0)
    neighbors.indices[some] = torch.where(related, neighbors.indices[some], free.gather(1, place))


def _decide_in_float64_(
    neighbors: Neighbors, rows: Tensor, unclear: Tensor, *, at_least: Tensor, block: int = 512
) -> None:
    """Do the neighbours of the rows numbered `unclear` again in float64, ties to the smallest index.

    Only columns whose float32 product with one of them is `at_least` as large can be neighbours.
    """
    k = neighbors.indices.shape[1]
    for some in torch.split(unclear, block):
        columns = (rows[some] @ rows.T >= at_least[some, None]).any(0).nonzero().flatten()
        left = rows[some].double()
        products = torch.cat([left @ rows[few].double().T for few in torch.split(columns, 4 * block)], 1)
        products[columns == some[:, None]] = -math.inf
        values, places = products.sort(dim=1, descending=True, stable=True)
        neighbors.indices[some] = columns[places[:, :k]]
        neighbors.products[some] = values[:, :k]


def cknna(x: Float[Tensor, "n d_in"], z: Float[Tensor, "n d_sae"], k: int = 10) -> float:
    """Alignment of the neighbourhoods in two spaces: about 0 for unrelated ones, 1 for equal ones.

    CKA with linear kernels, of which only pairs that are among the `k` nearest in both spaces are kept, with the
    unbiased HSIC. No centring or normalisation: give standardised embeddings. It depends on `n` for fixed `k`.

    Raises:
        ConfigError: There are fewer than `k + 1` or fewer than 4 rows.

    Source: Huh et al. 2024, arXiv:2405.07987, and its released code, less the 1e-6 added to the denominator there
    (it would make the value depend on the unit of `x`).
    """
    return cknna_of(nearest_neighbors(x, k), nearest_neighbors(z, k))


def cknna_of(x: Neighbors, z: Neighbors) -> float:
    """`cknna` of neighbour lists of the same rows; 0 where either space has no structure at all.

    The masked kernels have at most n * k entries, so every sum of the HSIC runs over the lists.
    """
    n = len(x.indices)
    if n < 4:
        raise ConfigError(f"CKNNA of {n} rows; the unbiased HSIC needs at least 4")
    pairs_x, pairs_z = _pairs(x.indices), _pairs(z.indices)
    values_x, values_z = x.products.flatten().cpu().numpy(), z.products.flatten().cpu().numpy()
    both, in_x, in_z = np.intersect1d(pairs_x, pairs_z, assume_unique=True, return_indices=True)
    cross = _unbiased_hsic(n, both, values_x[in_x], values_z[in_z])
    own = _unbiased_hsic(n, pairs_x, values_x, values_x) * _unbiased_hsic(n, pairs_z, values_z, values_z)
    return cross / math.sqrt(own) if own > 0 else 0.0


def _pairs(indices: Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Each (row, neighbour) as one integer, row * n + neighbour."""
    n = len(indices)
    return (indices + n * torch.arange(n, device=indices.device)[:, None]).flatten().cpu().numpy()


def _unbiased_hsic(
    n: int,
    pairs: np.ndarray[tuple[int], np.dtype[np.int64]],
    K: np.ndarray[tuple[int], np.dtype[np.float64]],
    L: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> float:
    """Unbiased HSIC of two kernels that are zero outside `pairs`, without their common factor 1 / (n (n - 3)).

    Source: Song et al. 2012, JMLR 13, eq. 5.
    """
    rows, columns = pairs // n, pairs % n
    # tr(K L): only pairs that hold in both directions count. The kernels are symmetric, the list of pairs is not.
    mutual = np.isin(columns * n + rows, pairs, assume_unique=True)
    trace = float((K * L)[mutual].sum())
    # 1' K L 1 is the product of K's column sums and L's row sums: no product of matrices.
    column_sums = np.bincount(columns, weights=K, minlength=n)
    row_sums = np.bincount(rows, weights=L, minlength=n)
    totals = float(K.sum()) * float(L.sum()) / ((n - 1) * (n - 2))
    return trace + totals - 2 * float(column_sums @ row_sums) / (n - 2)


# --- Probe


def probe_kl(log_p: Float[Tensor, "n n_classes"], log_p_hat: Float[Tensor, "n n_classes"]) -> Float[Tensor, " n"]:
    """KL(p, p_hat) of each row in nats, summed over classes, at least 0.

    Takes logarithms (from log-softmax), because a softmax that underflows has none.
    """
    log_p, log_p_hat = log_p.double(), log_p_hat.double()
    return (log_p.exp() * (log_p - log_p_hat)).sum(1)


def probe_agreement(
    logits: Float[Tensor, "n n_classes"], logits_hat: Float[Tensor, "n n_classes"]
) -> Bool[Tensor, " n"]:
    """Whether each row's most probable class is the same for both: agreement, whatever the true class."""
    return logits.argmax(1) == logits_hat.argmax(1)


def probe_accuracy(logits: Float[Tensor, "n n_classes"], labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether each row's most probable class is its label."""
    return logits.argmax(1) == labels


# --- Classes


class ClassFiring:
    """In how many rows of each class each latent fires, over all batches seen."""

    def __init__(self, n_classes: int, d_sae: int) -> None:
        self._both = torch.zeros(n_classes, d_sae, dtype=torch.int32)
        self._of_class = torch.zeros(n_classes, dtype=torch.int64)

    def update(self, z: Float[Tensor, "n d_sae"], targets: Int[Tensor, " n"]) -> None:
        """Count rows of activations; those whose class is -1 are left out."""
        known = targets >= 0
        fires = (z[known.to(z.device)] > 0).to(torch.int32)
        targets = targets[known]
        self._both = self._both.to(z.device).index_add_(0, targets.to(z.device), fires)
        self._of_class += torch.bincount(targets, minlength=len(self._of_class))

    @property
    def occurs(self) -> Bool[Tensor, " n_classes"]:
        """Classes that have a row."""
        return self._of_class > 0

    def f1(self) -> Float[Tensor, "n_classes d_sae"]:
        """F1 of each latent's firing as a detector of each class; 0 where it fires in no row of the class."""
        both = self._both.cpu()
        return 2 * both / (self._of_class[:, None] + both.sum(0)).clamp_min(1)


def class_f1(train: ClassFiring, on: ClassFiring) -> float:
    """How well one latent says a class: the mean over classes of the F1 on evaluated rows of the latent with the
    largest F1 on training rows, from 0 to 1.

    Of equal ones it is the latent of the smallest index. A class that no latent fires for in training scores 0; classes
    without rows on either side are left out, and the score is NaN where none is left.
    """
    shared = train.occurs & on.occurs
    in_training, latents = train.f1()[shared].max(1)
    found = on.f1()[shared].gather(1, latents[:, None])[:, 0]
    return float(torch.where(in_training > 0, found, 0.0).double().mean())
