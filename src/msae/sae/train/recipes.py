"""Recipes: what `TrainSettings` leaves out, as rules of the sizes of the embeddings, the SAE and the store."""

from __future__ import annotations

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

    lr: Mapping[Kind, float] = field(default_factory=lambda: _rates(2e-3, topk=2e-3))
    """Chosen on held-out rows of real vectors (benchmarks/RESULTS.md, frontier): at 4e-3 the error at 16 and 64 kept is
    3 to 8 % larger, and half of the latents are never among the 64 strongest."""
    weighting: Weighting = "uniform"
    """Weights move the error between small and large k; equal ones are near TopK trained for that k at all of them."""
    warmup: float = 0.05
    """Adam's first steps, before it knows the scale of the gradients, are too long at these learning rates."""

    def levels(self, d_in: int, d_sae: int) -> tuple[int, ...]:
        """From a 64th of the dimensions, doubled up to half of them: 8 to 256 for 512.

        Levels that begin at 8 halve the error at 16 kept and wake up latents that are never among the 64 strongest.
        Levels above half of the dimensions lower the error where many latents are kept, at the cost of the few
        (benchmarks/RESULTS.md, frontier).
        """
        last = min(max(1, d_in // 2), d_sae)
        return default_levels(last, smallest=min(max(1, d_in // 64), last))

    def batch_size(self, n_rows: int) -> int:
        """The largest power of two up to 4096 that still gives an epoch about 200 steps, and at least 64."""
        return max(64, min(4096, 1 << max(0, (n_rows // 200).bit_length() - 1)))

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
    weighting: Weighting = "rising"
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
