"""`stability`: which latents of one SAE come back in SAEs trained from other seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy.typing import NDArray

from msae.base.errors import ConfigError, RunError
from msae.base.progress import progress
from msae.base.results import Result
from msae.concepts.names import names_of
from msae.data.arrays import unit_rows
from msae.sae.model import SAE
from msae.sae.run import Run

CANDIDATES = 24
"""Nearest rows of each row, in both directions, to begin with."""
TOLERANCE = 1e-6
"""Of a cosine: the rounding of float32 products."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PRINTED_CONCEPTS = 20
SAME_START = 8
"""Latents matched to the one of the same number. Unrelated dictionaries have one of them on average (Poisson), and 8 or
more by chance once in 100,000 pairs."""
_BLOCK = 1024


class Matching(NamedTuple):
    """A one-to-one matching of two dictionaries that has the largest sum of cosines."""

    partner: Int64[np.ndarray, " d_sae"]
    """For each row of the first, its row of the second."""
    cosine: Float64[np.ndarray, " d_sae"]
    """Of each matched pair."""
    gap: float
    """How far the mean cosine can be below the best possible one: the proof's rounding, far below 1e-6."""

    @property
    def mean(self) -> float:
        return float(self.cosine.mean())

    @property
    def n_in_place(self) -> int:
        """Rows whose partner has the same number."""
        return int((self.partner == np.arange(len(self.partner))).sum())

    def quantiles(self) -> dict[str, float]:
        """The distribution of the cosines of matched pairs."""
        values = np.quantile(self.cosine, QUANTILES).tolist()
        return {f"p{round(100 * share)}": value for share, value in zip(QUANTILES, values, strict=True)}


@dataclass(frozen=True)
class Pair:
    """Two runs, matched by their decoder rows, and matched again by their encoder's."""

    a: str
    b: str
    decoder: Matching
    encoder: Matching

    @property
    def same_start(self) -> bool:
        """Whether the two began from the same initial weights, by their latents being matched number by number.

        Then they agree because neither moved far from its start, which says nothing about stability between seeds.
        """
        return max(self.decoder.n_in_place, self.encoder.n_in_place) >= SAME_START

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "same_start": self.same_start,
            "matched_in_place": self.decoder.n_in_place / len(self.decoder.partner),
            "decoder": self.decoder.mean,
            "encoder": self.encoder.mean,
            "decoder_quantiles": self.decoder.quantiles(),
            "encoder_quantiles": self.encoder.quantiles(),
            "gap": max(self.decoder.gap, self.encoder.gap),
        }


@dataclass(frozen=True)
class Consensus:
    """A concept that every run found: one latent of each, all of them near each other."""

    latents: tuple[int, ...]
    """One of each run, in the order of the runs."""
    cosine: float
    """The smallest decoder cosine among them."""
    names: tuple[str | None, ...]
    """What each run calls it; None where a run has no name for it."""

    @property
    def name(self) -> str | None:
        """The name that most runs give it, of equally many the first; None where no run names it."""
        given = [name for name in self.names if name is not None]
        return max(given, key=given.count) if given else None

    def to_json(self) -> dict[str, Any]:
        return {
            "latents": list(self.latents),
            "cosine": self.cosine,
            "name": self.name,
            "names": list(self.names),
        }


@dataclass(frozen=True, repr=False)
class Stability(Result):
    """How far SAEs from different seeds agree."""

    runs: tuple[str, ...]
    d_sae: int
    threshold: float
    pairs: tuple[Pair, ...]
    consensus: tuple[Consensus, ...]
    """The nearest first."""

    def to_text(self) -> str:
        """What the command line prints: a line for each pair of runs, then the nearest consensus concepts."""
        lines = [f"{'mean cosine of matched rows':<52} decoder  (p5 to p95)      encoder"]
        for pair in self.pairs:
            spread = pair.decoder.quantiles()
            title = f"{pair.a} and {pair.b}"
            lines.append(
                f"{title:<52} {pair.decoder.mean:7.3f}  ({spread['p5']:.3f} to {spread['p95']:.3f})"
                f"  {pair.encoder.mean:7.3f}"
            )
        lines += [
            f"NOT A MEASURE OF STABILITY: {pair.a} and {pair.b} began from the same weights "
            f"({pair.decoder.n_in_place:,} of {self.d_sae:,} latents are matched to the same number); "
            f"train one of them with another --seed"
            for pair in self.pairs
            if pair.same_start
        ]
        lines.append(self.headline)
        for concept in self.consensus[:PRINTED_CONCEPTS]:
            latents = ", ".join(map(str, concept.latents))
            lines.append(f"  {concept.cosine:.3f}  {concept.name or 'unnamed'}  [{latents}]")
        n_more = len(self.consensus) - PRINTED_CONCEPTS
        return "\n".join([*lines, *([f"  … and {n_more:,} more; --json FILE has all"] if n_more > 0 else [])])

    @property
    def headline(self) -> str:
        return (
            f"{len(self.consensus):,} of {self.d_sae:,} latents come back in all {len(self.runs)} runs "
            f"(decoder cosine at least {self.threshold:g})"
        )

    def records(self) -> list[dict[str, Any]]:
        """A record for each concept that comes back, with its latent in each run."""
        return [
            {"name": concept.name, "cosine": concept.cosine, **dict(zip(self.runs, concept.latents, strict=True))}
            for concept in self.consensus
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": list(self.runs),
            "d_sae": self.d_sae,
            "threshold": self.threshold,
            "pairs": [pair.to_json() for pair in self.pairs],
            "consensus": [concept.to_json() for concept in self.consensus],
        }


def stability(runs: Sequence[SAE | str | Path], *, threshold: float = 0.7) -> Stability:
    """Match the latents of runs from several seeds, and list the concepts that come back in all of them.

    Each pair of runs gets the mean cosine of its matched decoder rows, which is the paper's figure, and of its matched
    encoder columns. Runs that began from the same weights, as those of one seed do, agree for that reason alone: such
    pairs are marked. Memory grows with d_sae, not with its square.

    Args:
        runs: At least two run folders of one size.
        threshold: A concept comes back where any two of its latents have at least this cosine.

    Raises:
        ConfigError: Fewer than two runs, or a threshold that is no cosine.
        RunError: The runs differ in d_in or d_sae.

    Source: Zaigrajew et al. 2025, arXiv:2502.20578, appendix, for the two means.
    """
    if isinstance(runs, SAE | str | Path) or len(runs) < 2:
        raise ConfigError("stability compares seeds and only one run was given; give at least two runs")
    if not -1 <= threshold <= 1:
        raise ConfigError(f"threshold {threshold} is no cosine; give --threshold between -1 and 1, for example 0.7")
    titles = tuple(f"run {i}" if isinstance(run, SAE) else str(run) for i, run in enumerate(runs))
    opened = [Run.open(run) for run in runs]
    saes = [run.sae for run in opened]
    for title, sae in zip(titles, saes, strict=True):
        if (sae.d_in, sae.d_sae) != (saes[0].d_in, saes[0].d_sae):
            raise RunError(
                f"{title} is an SAE {sae.d_in} -> {sae.d_sae}, but {titles[0]} is one {saes[0].d_in} -> "
                f"{saes[0].d_sae}; only runs of one size can be matched: leave one of them out"
            )
    decoders = [unit_rows(sae.W_dec.detach().cpu().float().numpy()) for sae in saes]
    encoders = [unit_rows(sae.W_enc.detach().cpu().float().T.contiguous().numpy()) for sae in saes]
    chosen = list(itertools.combinations(range(len(saes)), 2))
    pairs = []
    with progress("matching", total=2 * len(chosen), unit="pairs") as advance:
        for i, j in chosen:
            decoder = match(decoders[i], decoders[j])
            advance(1)
            encoder = match(encoders[i], encoders[j])
            advance(1)
            pairs.append(Pair(titles[i], titles[j], decoder, encoder))
    from_first = [pair.decoder for (i, _), pair in zip(chosen, pairs, strict=True) if i == 0]
    known = [names_of(run) for run in opened]
    names = [(lambda _: None) if one is None else one.name_of for one in known]
    consensus = _consensus(decoders, from_first, names, threshold)
    return Stability(titles, saes[0].d_sae, threshold, tuple(pairs), tuple(consensus))


def match(a: Float32[np.ndarray, "d_sae d_in"], b: Float32[np.ndarray, "d_sae d_in"]) -> Matching:
    """The one-to-one matching of two sets of unit rows with the largest sum of cosines.

    Only candidate pairs are matched, at first each row's nearest. The best matching among them puts prices on the
    rows of `b`, and those bound what any matching of all pairs can reach; pairs that break the bound join the
    candidates until none does. So the answer is that of all pairs, proven up to `gap`, without d_sae^2 memory.

    Source: Kuhn 1955 for the problem, linear programming duality for the proof; docs/stability.md.
    """
    n, n_nearest = len(a), min(CANDIDATES, len(a))
    candidates = _nearest(a, b, n_nearest)
    while (partner := _match_sparse(candidates, n)) is None:  # rows compete for too few others: more for everyone
        n_nearest = min(2 * n_nearest, n)
        candidates = _nearest(a, b, n_nearest)
    while True:
        prices = _prices(candidates, partner, n)
        cosine = candidates.values[np.searchsorted(candidates.codes, np.arange(n) * n + partner)]
        broken, bound = _broken(a, b, cosine - prices[partner], prices)
        if not len(broken.codes):
            return Matching(partner, cosine, max(0.0, bound - float(cosine.sum())) / n)
        candidates = _together([candidates, broken])
        improved = _match_sparse(candidates, n)
        assert improved is not None  # more pairs cannot make a full matching impossible
        partner = improved


class _Candidates(NamedTuple):
    """Pairs of a row of the first and a row of the second dictionary, in their order."""

    codes: NDArray[np.int64]
    """Row times d_sae plus partner, ascending."""
    values: NDArray[np.float64]
    """Cosines."""


def _together(parts: Sequence[_Candidates]) -> _Candidates:
    codes, first = np.unique(np.concatenate([part.codes for part in parts]), return_index=True)
    return _Candidates(codes, np.concatenate([part.values for part in parts])[first])


def _products(a: NDArray[np.float32], b: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Cosines of a block of rows of `a` with all of `b`, and the number of the block's first row."""
    for first in range(0, len(a), _BLOCK):
        yield first, a[first : first + _BLOCK] @ b.T


def _nearest(a: NDArray[np.float32], b: NDArray[np.float32], n_nearest: int) -> _Candidates:
    """The nearest rows of `b` of each row of `a`, and the nearest of `a` of each row of `b`."""
    n, parts = len(a), []
    best = np.full((n, n_nearest), -np.inf, dtype=np.float32)  # of each row of b, so far
    rows = np.zeros((n, n_nearest), dtype=np.int64)
    for first, cosines in _products(a, b):
        columns = np.argpartition(cosines, -n_nearest, axis=1)[:, -n_nearest:]
        here = np.arange(first, first + len(cosines))
        codes = here[:, None] * n + columns
        parts.append(_sorted(codes.ravel(), np.take_along_axis(cosines, columns, axis=1).ravel()))
        n_here = min(n_nearest, len(cosines))
        strongest = np.argpartition(cosines, -n_here, axis=0)[-n_here:].T
        both = np.concatenate([best, np.take_along_axis(cosines.T, strongest, axis=1)], axis=1)
        from_rows = np.concatenate([rows, here[strongest]], axis=1)
        kept = np.argpartition(both, -n_nearest, axis=1)[:, -n_nearest:]
        best, rows = np.take_along_axis(both, kept, axis=1), np.take_along_axis(from_rows, kept, axis=1)
    parts.append(_sorted((rows * n + np.arange(n)[:, None]).ravel(), best.ravel()))
    return _together(parts)


def _sorted(codes: NDArray[np.int64], values: NDArray[np.float32]) -> _Candidates:
    order = np.argsort(codes)
    return _Candidates(codes[order], values[order].astype(np.float64))


def _match_sparse(candidates: _Candidates, n: int) -> NDArray[np.int64] | None:
    """The best matching among the candidates, or None where they admit no full one."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    rows, columns = np.divmod(candidates.codes, n)
    starts = np.searchsorted(rows, np.arange(n + 1))
    # 2 - cosine is never 0, which scipy would take for a pair that is not there.
    graph = csr_array((2 - candidates.values, columns.astype(np.int32), starts.astype(np.int32)), shape=(n, n))
    try:
        _, partner = min_weight_full_bipartite_matching(graph)
    except ValueError as err:
        if "no full matching" not in str(err):
            raise
        return None
    return np.asarray(partner, dtype=np.int64)


def _prices(candidates: _Candidates, partner: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """A price of each row of the second: no row of the first would gain by another candidate than its partner.

    Gain is cosine less price. Since the matching is the best, raising prices until nobody gains comes to an end
    (Bellman-Ford on the residual graph).
    """
    rows, columns = np.divmod(candidates.codes, n)
    matched = candidates.values[np.searchsorted(candidates.codes, np.arange(n) * n + partner)]
    order = np.argsort(columns, kind="stable")
    gains, rivals = (candidates.values - matched[rows])[order], partner[rows[order]]
    starts = np.searchsorted(columns[order], np.arange(n))
    prices = np.zeros(n)
    for _ in range(n):
        raised = np.maximum(prices, np.maximum.reduceat(prices[rivals] + gains, starts))
        if float((raised - prices).max()) < TOLERANCE / 1000:
            break
        prices = raised
    return prices


def _broken(
    a: NDArray[np.float32], b: NDArray[np.float32], gain: NDArray[np.float64], prices: NDArray[np.float64]
) -> tuple[_Candidates, float]:
    """Pairs by which a row would gain more than by its partner, and a bound on the sum of any matching.

    By duality, the sum of every row's largest gain over all pairs, plus all prices, is such a bound.
    """
    n, bound, parts = len(a), float(prices.sum()), [_Candidates(np.empty(0, np.int64), np.empty(0))]
    for first, cosines in _products(a, b):
        own = gain[first : first + len(cosines)]
        gains = cosines - prices.astype(np.float32)
        bound += float(np.maximum(gains.max(1).astype(np.float64), own).sum())
        worse = np.flatnonzero(gains.max(1) > own + TOLERANCE)
        few = min(CANDIDATES, n)  # the worst of each row are enough: the others are looked at again
        columns = np.argpartition(gains[worse], -few, axis=1)[:, -few:]
        is_broken = np.take_along_axis(gains[worse], columns, axis=1) > own[worse, None] + TOLERANCE
        which, place = np.nonzero(is_broken)
        row, column = worse[which], columns[which, place]
        parts.append(_sorted((first + row) * n + column, cosines[row, column]))
    return _together(parts), bound


def _consensus(
    decoders: Sequence[NDArray[np.float32]],
    matchings: Sequence[Matching],
    names: Sequence[Callable[[int], str | None]],
    threshold: float,
) -> Iterator[Consensus]:
    """The latents of the first run whose partners in all others are near it, and near each other."""
    groups = np.stack([np.arange(len(decoders[0])), *(matching.partner for matching in matchings)])
    lowest = np.full(groups.shape[1], np.inf)
    for i, j in itertools.combinations(range(len(decoders)), 2):
        cosines = (decoders[i][groups[i]] * decoders[j][groups[j]]).sum(1)
        lowest = np.minimum(lowest, cosines)
    kept = np.flatnonzero(lowest >= threshold)
    for place in kept[np.argsort(-lowest[kept], kind="stable")].tolist():
        latents = tuple(groups[:, place].tolist())
        given = tuple(name(latent) for name, latent in zip(names, latents, strict=True))
        yield Consensus(latents, float(lowest[place]), given)
