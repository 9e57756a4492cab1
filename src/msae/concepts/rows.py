"""What rows without captions say of names: does a latent's activation go with the likeness of the rows to its word?

One half of the rows chooses each latent's word, the other decides whether the word holds; docs/naming.md has the rule
and what else was tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from msae.base import statistics
from msae.concepts.names import MIN_WORDS, RowEvidence
from msae.data.sampled import whole
from msae.sae.view import View

NEAR_SHARE = 0.05
"""A word fits a row when it is among this share of all words by its similarity to the row."""
N_NEAREST = 10
"""A latent's word is one of so many that are nearest to its rows: what correlates best may be something that the rows
do not look like, as *labrador retriever* does among beige shirts."""
HELD_SHARE = 0.5
"""A name holds where it fits more than this share of the rows in which the latent is clearly active,"""
HELD_CORRELATION = 0.3
"""and activation and similarity correlate more than this, which a latent of few rows cannot reach,"""
HELD_CONTRAST = 1.75
"""or those rows are more similar to the word than all rows by more than this many standard deviations;"""
AGREED_CORRELATION = 0.4
"""or where the decoder's direction proposes the same word, and they correlate more than this."""
MIN_CLEAR = 5
"""Rows in which a latent is clearly active that a half needs."""
ENTRIES = 1 << 24
"""Correlations, or similarities, held at once: 64 MB of them."""


class Chosen(NamedTuple):
    """For some latents the word that one half of the rows chose, with what the other half says of it."""

    latents: Int64[np.ndarray, " c"]
    words: Int64[np.ndarray, " c"]
    evidence: list[RowEvidence]
    is_held: Bool[np.ndarray, " c"]


def choose(
    view: View,
    rows: Int64[np.ndarray, " n"],
    words: Float[np.ndarray, "m d_in"],
    groups: Int64[np.ndarray, " m"],
    *,
    by_decoder: Mapping[int, int],
    false_names: float,
    rng: np.random.Generator,
) -> Chosen:
    """The best word of each latent on one half of the rows, judged on the other, where it fires in enough of them.

    Rows are read in blocks: what is held grows with the width of the SAE and the number of words only.

    Args:
        words: Unit rows in the space of the decoder.
        groups: The synonym group of each word.
        by_decoder: The words that the directions of some latents propose.
    """
    order = rng.permutation(rows)
    first, second = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    directions = torch.from_numpy(words).to(view.device)
    chooser = _sums(view, first)
    latents = np.flatnonzero(chooser.n_active.cpu().numpy() >= MIN_CLEAR)
    best = _best_words(chooser, directions, latents)
    decider = _sums(view, second, latents)
    correlation, rank = _ranks(decider, directions, best, groups)
    fits = _fits(view, second, latents, best, directions, chooser.usual[torch.from_numpy(latents).to(view.device)])
    n_clear, n_fit, p = fits.n_clear, fits.n_fit, fits.p_values()
    is_tested = n_clear >= MIN_CLEAR
    q = np.ones(len(latents))
    q[is_tested] = statistics.q_values(p[is_tested])
    low = statistics.wilson(n_fit, n_clear).low
    n_words = int(groups.max()) + 1
    proposed = [by_decoder.get(latent, -1) for latent in latents.tolist()]
    is_agreed = np.array(
        [other >= 0 and groups[other] == groups[own] for other, own in zip(proposed, best, strict=True)]
    )
    inside = n_fit / np.maximum(1, n_clear)
    elsewhere = (fits.n_near - n_fit) / np.maximum(1, len(second) - n_clear)
    mean, spread = decider.similarity(directions[torch.from_numpy(best).to(view.device)])
    contrast = (fits.similarity / np.maximum(1, n_clear) - mean) / np.maximum(spread, 1e-12)
    is_held = (inside > HELD_SHARE) & ((correlation > HELD_CORRELATION) | (contrast > HELD_CONTRAST))
    is_held |= is_agreed.astype(bool) & (correlation > AGREED_CORRELATION)
    is_held &= (
        (n_words >= MIN_WORDS)
        & is_tested
        & (q <= false_names)
        & (correlation > 0)
        & (rank <= max(1, int(NEAR_SHARE * n_words)))
    )
    found = [
        RowEvidence(
            store=view.store.address,
            fingerprint=whole(view.store).fingerprint,
            n=len(second),
            correlation=_round(correlation[i]),
            rank=int(rank[i]),
            n_words=n_words,
            n_clear=int(n_clear[i]),
            fits=_round(inside[i]),
            low=_round(low[i]),
            fits_elsewhere=_round(elsewhere[i]),
            p=float(p[i]),
            q=float(q[i]),
            contrast=_round(contrast[i]),
        )
        for i in range(len(latents))
    ]
    tested = np.flatnonzero(is_tested)
    return Chosen(latents[tested], best[tested], [found[i] for i in tested], is_held[tested])


@dataclass
class _Sums:
    """What correlations of activations and similarities need of some rows."""

    n: int
    x: Tensor
    xx: Tensor
    z: Tensor
    zz: Tensor
    zx: Tensor
    n_active: Tensor

    @property
    def usual(self) -> Tensor:
        """Mean activation where a latent fires: from there on it is clearly active."""
        return self.z / self.n_active.clamp_min(1)

    def correlations(self, directions: Tensor, which: Tensor | slice) -> Tensor:
        """Of the latents `which` with the similarity of the rows to every word; 0 where either never varies."""
        covariance = self.zx[which] / self.n - torch.outer(self.z[which] / self.n, self.x / self.n)
        variance = (self.zz[which] / self.n - (self.z[which] / self.n).square()).clamp_min(0)
        scale = torch.outer(variance.sqrt(), self._spread(directions.double()))
        return torch.where(scale > 1e-12, (covariance @ directions.double().T) / scale.clamp_min(1e-12), 0.0)

    def similarity(self, directions: Tensor) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        """Mean and standard deviation of the similarity of the rows to each word."""
        words = directions.double()
        return (words @ (self.x / self.n)).cpu().numpy(), self._spread(words).cpu().numpy()

    def _spread(self, words: Tensor) -> Tensor:
        mean = self.x / self.n
        covariance = self.xx / self.n - torch.outer(mean, mean)
        return ((words @ covariance) * words).sum(1).clamp_min(0).sqrt()


def _sums(view: View, rows: Int64[np.ndarray, " n"], latents: Int64[np.ndarray, " c"] | None = None) -> _Sums:
    d, n_latents = view.sae.d_in, view.sae.d_sae if latents is None else len(latents)
    shapes = ((d,), (d, d), (n_latents,), (n_latents,), (n_latents, d), (n_latents,))
    found = _Sums(0, *(torch.zeros(shape, dtype=torch.float64, device=view.device) for shape in shapes))
    for x in view.rows(rows, title="comparing rows with words"):
        z = view.activate(x) if latents is None else view.activate(x)[:, latents]
        found.n += len(x)
        found.x += x.sum(0, dtype=torch.float64)
        found.xx += x.T @ x
        found.z += z.sum(0, dtype=torch.float64)
        found.zz += z.square().sum(0, dtype=torch.float64)
        found.zx += z.T @ x
        found.n_active += (z > 0).sum(0)
    return found


def _best_words(sums: _Sums, directions: Tensor, latents: Int64[np.ndarray, " c"]) -> Int64[np.ndarray, " c"]:
    """Of the words nearest to the rows of each latent, weighted by its activation, the one that correlates most."""
    best = np.empty(len(latents), np.int64)
    size = max(1, ENTRIES // len(directions))
    for first in range(0, len(latents), size):
        part = torch.from_numpy(latents[first : first + size]).to(directions.device)
        near = (sums.zx[part] @ directions.double().T).topk(min(N_NEAREST, len(directions)), dim=1).indices
        among = sums.correlations(directions, part).gather(1, near).argmax(1, keepdim=True)
        best[first : first + size] = near.gather(1, among)[:, 0].cpu().numpy()
    return best


def _ranks(
    sums: _Sums, directions: Tensor, own: Int64[np.ndarray, " c"], groups: Int64[np.ndarray, " m"]
) -> tuple[np.ndarray, Int64[np.ndarray, " c"]]:
    """The correlation of each latent with its word, and the word's place among the synonym groups."""
    value, rank = np.empty(len(own)), np.empty(len(own), np.int64)
    size = max(1, ENTRIES // len(directions))
    for first in range(0, len(own), size):
        part = slice(first, first + size)
        all_words = sums.correlations(directions, part).cpu().numpy()
        value[part] = all_words[np.arange(len(all_words)), own[part]]
        better = all_words > value[part, None]
        better &= groups[None, :] != groups[own[part], None]
        rank[part] = [1 + len(np.unique(groups[row])) for row in better]
    return value, rank


@dataclass
class _Fits:
    """How often each latent's word fits, where the latent is clearly active and over all rows."""

    n: int
    n_clear: Int64[np.ndarray, " c"]
    n_fit: Int64[np.ndarray, " c"]
    n_near: Int64[np.ndarray, " c"]
    similarity: Float[np.ndarray, " c"]
    """Sum over the rows in which the latent is clearly active."""

    def p_values(self) -> np.ndarray:
        """The chance of so many fits, were the rows that the word fits dealt out at random."""
        from scipy.stats import hypergeom

        p: np.ndarray = hypergeom.sf(self.n_fit - 1, self.n, self.n_near, self.n_clear)
        return p.clip(0, 1)


def _fits(
    view: View,
    rows: Int64[np.ndarray, " n"],
    latents: Int64[np.ndarray, " c"],
    own: Int64[np.ndarray, " c"],
    directions: Tensor,
    usual: Tensor,
) -> _Fits:
    n_clear, n_fit, n_near = (torch.zeros(len(latents), dtype=torch.int64, device=view.device) for _ in range(3))
    total = torch.zeros(len(latents), dtype=torch.float64, device=view.device)
    words = torch.from_numpy(own).to(view.device)
    n_near_words = max(1, int(NEAR_SHARE * len(directions)))
    size = max(1, ENTRIES // len(directions))
    for block in view.rows(rows, title="judging names on rows"):
        for first in range(0, len(block), size):
            x = block[first : first + size]
            similarity = x @ directions.T
            least = similarity.topk(n_near_words, dim=1).values[:, -1:]
            own_similarity = similarity[:, words]
            is_near = own_similarity >= least
            clear = view.activate(x)[:, latents] >= usual.float()
            n_clear += clear.sum(0)
            n_fit += (clear & is_near).sum(0)
            n_near += is_near.sum(0)
            total += torch.where(clear, own_similarity, 0).sum(0, dtype=torch.float64)
    return _Fits(len(rows), *(one.cpu().numpy() for one in (n_clear, n_fit, n_near, total)))


def _round(value: float | np.floating) -> float:
    return round(float(value), 6)
