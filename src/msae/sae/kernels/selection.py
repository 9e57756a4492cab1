"""What the training loss of a sparse autoencoder is made of, whatever computes it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from msae.base.errors import ConfigError


@dataclass(frozen=True)
class Selection:
    """Which latents take part in the reconstruction of each row, and the nested sets that they form.

    Only positive pre-activations ever take part. `Selection()` keeps all of them: plain ReLU.
    `Selection(levels=(64,))` is TopK.
    """

    levels: tuple[int, ...] = ()
    """Nested sets by rank: the k largest of each row, for each k; strictly increasing."""
    widths: tuple[int, ...] = ()
    """Nested sets by position: the first so many latents of the dictionary; strictly increasing."""
    batch_k: int | None = None
    """BatchTopK: of the whole batch only the `n * batch_k` largest take part."""
    bandwidth: float | None = None
    """JumpReLU: only latents above their threshold take part; the width of the straight-through estimate."""

    def __post_init__(self) -> None:
        if self.levels and self.widths:
            raise ConfigError("levels and widths are two different Matryoshka SAEs; give one of them")
        for noun, sizes in (("levels", self.levels), ("widths", self.widths)):
            if any(b <= a for a, b in itertools.pairwise((0, *sizes))):
                raise ConfigError(f"{noun} {list(sizes)} do not strictly increase from at least 1; sort them")
        if self.batch_k is not None and self.batch_k < 1:
            raise ConfigError(f"batch_k {self.batch_k} is not positive; give for example 64")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ConfigError(f"bandwidth {self.bandwidth} is not positive; give for example 0.03")
        if self.bandwidth is not None and (self.levels or self.batch_k is not None):
            raise ConfigError("thresholds (bandwidth) already choose the latents; leave out levels and batch_k")

    @property
    def n_levels(self) -> int:
        return max(1, len(self.levels or self.widths))


@dataclass(frozen=True)
class Objective:
    """A selection and what is charged for it; `weights` sum to one."""

    selection: Selection
    weights: tuple[float, ...]
    l1: float = 0.0
    l0: float = 0.0
    l0_target: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        n_levels = self.selection.n_levels
        if len(self.weights) != n_levels:
            raise ConfigError(f"{n_levels} levels with {len(self.weights)} weights; give one weight for each level")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ConfigError(f"weights {list(self.weights)} must be non-negative and not all zero; give 1 for each")
        object.__setattr__(self, "weights", tuple(weight / sum(self.weights) for weight in self.weights))
        if self.l0 and (self.l0_target is None or self.l0_target < 1 or self.selection.bandwidth is None):
            raise ConfigError("the l0 penalty is JumpReLU's: give bandwidth and a positive l0_target with it")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ConfigError(f"soft cap {self.soft_cap} is not positive; give for example 30")


class Parameters(NamedTuple):
    """The tensors that the loss is differentiated by."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"] | None
    """JumpReLU's thresholds, all positive."""
    level_scales: Float[Tensor, " n_levels"] | None = None
    """What the activations are multiplied by at each level."""


class SAELoss(NamedTuple):
    """The loss of one batch; only `total` carries a gradient."""

    total: Float[Tensor, ""]
    """What is to be minimised: the weighted mean over levels of the squared error, and the penalties."""
    errors: Float[Tensor, " n_levels"]
    """Squared error per element at each level, in the squared units of the embeddings."""
    residual: Float[Tensor, "n d_in"]
    """`x - x_hat` at the last, finest level."""
    l0: Float[Tensor, ""]
    """Active latents of a row, mean."""
    l1: Float[Tensor, ""]
    """Sum of a row's activations divided by the norm of the embedding, mean; 0 where it is not charged for."""
    fired: Bool[Tensor, " d_sae"]
    """Latents that were active in some row."""
    smallest_kept: Float[Tensor, ""]
    """Smallest pre-activation that took part, 0 where none did: BatchTopK's threshold; no soft cap changes it."""
