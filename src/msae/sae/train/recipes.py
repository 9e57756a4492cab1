"""Recipes: what `TrainSettings` leaves out, as rules of the sizes of the embeddings, the SAE and the store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from msae.sae.losses import Weighting, default_levels
from msae.sae.model import Kind

RecipeName = Literal["default", "faithful", "poster"]


def _rates(matryoshka: float, *, topk: float = 5e-4, relu: float = 5e-4) -> Mapping[Kind, float]:
    """Learning rates by kind; 5e-4 is the paper's for topk and batchtopk, and no better one is known for jumprelu."""
    return {"matryoshka": matryoshka, "topk": topk, "batchtopk": topk, "relu": relu, "jumprelu": 5e-4}


@dataclass(frozen=True)
class DefaultRecipe:
    """Concepts first: few latents say what a concept is, and few are enough for a small error."""

    lr: Mapping[Kind, float] = field(default_factory=lambda: _rates(3e-3, topk=2e-3))
    """Chosen on held-out rows of real vectors (docs/log.md, frontier): below it the error is larger at every k; at 4e-3
    it is as small, but twice as many latents are never among the 64 strongest."""
    weighting: Weighting = "rising"
    """Weights move the error between small and large k. Equal ones leave the large levels, whose errors are small, to
    the small ones; as the fourth root of k they are near TopK trained for that k up to 128."""
    level_scales: bool = True
    """A row that keeps 8 latents needs stronger ones than a row that keeps 256. With a factor for each level the error
    is smaller at every k, and few latents fall silent."""
    warmup: float = 0.05
    """Adam's first steps, before it knows the scale of the gradients, are too long at these learning rates."""

    def levels(self, d_in: int, d_sae: int) -> tuple[int, ...]:
        """From a 64th of the dimensions, doubled up to all of them: 8 to 512 for 512.

        Levels that begin at 8 halve the error at 16 kept and wake up latents that are never among the 64 strongest.
        Levels above the dimensions lower the error where more latents are kept, at the cost of the few
        (benchmarks/RESULTS.md, frontier).
        """
        last = min(d_in, d_sae)
        return default_levels(last, smallest=min(max(1, d_in // 64), last))

    def batch_size(self, n_rows: int) -> int:
        """The power of two from 64 to 4096 that comes nearest to 200 steps an epoch: 256 for 50,000 rows."""
        return max(64, min(4096, 1 << max(0, round(math.log2(max(n_rows, 1) / 200)))))

    def epochs(self, expansion: float) -> int:  # noqa: ARG002  # the poster's recipe depends on it
        """30, as in the paper."""
        return 30

    def inference_l0(self, d_in: int) -> int:
        """An eighth of the dimensions, 64 for 512: where the released TopK SAEs and the paper's comparisons are."""
        return max(1, round(d_in / 8))


@dataclass(frozen=True)
class FaithfulRecipe(DefaultRecipe):
    """Fidelity first: a small error at every number of latents kept, all latents included."""

    lr: Mapping[Kind, float] = field(default_factory=lambda: _rates(1e-3, topk=2e-3))
    """1e-3: at 2e-3 more latents than can be spared fall silent at the large levels."""
    weighting: Weighting = "steep"
    """The error of a large level is small, so equal weights would leave it to the small ones. As the square root of k
    they keep the error below the poster's recipe at every k; as k itself, not where few latents are kept
    (benchmarks/RESULTS.md, frontier)."""

    def levels(self, d_in: int, d_sae: int) -> tuple[int, ...]:
        """As the default's, but up to all latents: an error that no level asks for is not made small."""
        return default_levels(d_sae, smallest=min(max(1, d_in // 64), d_sae))


@dataclass(frozen=True)
class PosterRecipe(DefaultRecipe):
    """The paper's recipe to the letter. Source: Zaigrajew et al. 2025, arXiv:2502.20578."""

    lr: Mapping[Kind, float] = field(default_factory=lambda: _rates(1e-4, relu=5e-5))
    """The paper's."""
    weighting: Weighting = "uniform"
    """One of the paper's two; the other is `reverse`."""
    level_scales: bool = False
    """The paper has none."""
    warmup: float = 0.0
    """The paper has none."""

    def levels(self, d_in: int, d_sae: int) -> tuple[int, ...]:  # noqa: ARG002  # the paper's begin at 64 for any width
        """64, doubled up to all latents; fewer than 64 for a small SAE."""
        return default_levels(d_sae, smallest=min(64, max(1, d_sae // 8)))

    def batch_size(self, n_rows: int) -> int:  # noqa: ARG002  # whatever the store
        """4096, the paper's."""
        return 4096

    def epochs(self, expansion: float) -> int:
        """The paper's: 30, and 20 at expansion 32."""
        return 20 if expansion >= 32 else 30


RECIPES: Mapping[RecipeName, DefaultRecipe] = {
    "default": DefaultRecipe(),
    "faithful": FaithfulRecipe(),
    "poster": PosterRecipe(),
}
