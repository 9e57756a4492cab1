"""What to train and how, and what each recipe fills in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from msae.base.devices import as_device
from msae.base.errors import ConfigError
from msae.base.loggers import LoggerName
from msae.data.store import EmbeddingStore
from msae.sae import losses
from msae.sae.losses import Weighting
from msae.sae.model import Kind
from msae.sae.standardize import Modality

Recipe = Literal["default", "poster"]
LEARNING_RATES: Mapping[Recipe, Mapping[Kind, float]] = {
    "poster": {"matryoshka": 1e-4, "topk": 5e-4, "batchtopk": 5e-4, "relu": 5e-5, "jumprelu": 5e-4},
    "default": {"matryoshka": 5e-4, "topk": 5e-4, "batchtopk": 5e-4, "relu": 5e-4, "jumprelu": 5e-4},
}


@dataclass(frozen=True)
class TrainSettings:
    """What to train and how. A None is filled in by the recipe when training starts."""

    kind: Kind = "matryoshka"
    """What the SAE is trained to be. `matryoshka` reconstructs at several sparsity levels at once."""
    weighting: Weighting = "uniform"
    """Weights of the levels of a matryoshka SAE; with `reverse` the smallest level weighs most."""
    levels: tuple[int, ...] | None = None
    """Of a matryoshka SAE: latents kept at each level. Without it, 64, 128, 256 and so on up to all latents."""
    weights: tuple[float, ...] | None = None
    """One weight for each of `levels`, instead of `weighting`."""
    k: int = 64
    """Active latents of each row for topk; their mean for batchtopk and jumprelu."""
    l1: float = 0.003
    """Weight of the L1 penalty on activations, for relu alone."""
    expansion: float = 8
    """Number of latents, in multiples of the width of the embeddings."""
    d_sae: int | None = None
    """Number of latents, instead of `expansion`."""
    epochs: int | None = None
    """Passes over the store. Without it, the recipe's: 30 (poster: 20 from an `expansion` of 32 on)."""
    batch_size: int | None = None
    """Rows in one step. Without it, the recipe's: some 200 steps an epoch, between 64 and 4096 (poster: 4096)."""
    lr: float | None = None
    """Learning rate. Without it, the recipe's: 5e-4 (poster: 1e-4 for matryoshka, 5e-5 for relu, else 5e-4)."""
    seed: int = 0
    """Random seed of the initial weights and of the order of rows."""
    modality: Modality = "image"
    """Which embeddings of the store."""
    recipe: Recipe = "default"
    """What fills in the settings that are not given; `poster` is that of the paper, Zaigrajew et al. 2025."""
    warmup: float | None = None
    """Share of the steps over which the learning rate rises from 0. Without it, the recipe's: 0.05 (poster: 0)."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this norm."""
    soft_cap: float | None = None
    """Soft upper limit c of an activation z, by c * tanh(z / c). Without it there is no limit."""
    auxiliary: float = 0.0
    """Weight of the loss that revives dead latents; 1/32 is usual, 0 is off."""
    dead_after: int = 100_000
    """A latent is dead once it has not been active for this many rows; `auxiliary` acts on those."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the matrix products in a step. bfloat16 is faster and less exact."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints. Without it, one checkpoint every minute."""
    loggers: tuple[LoggerName, ...] = ()
    """Where training figures also go, besides metrics.jsonl."""
    device: str = "auto"
    """Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one."""

    def __post_init__(self) -> None:
        positive = ("expansion", "d_sae", "epochs", "batch_size", "lr", "k", "max_grad_norm", "log_every", "dead_after")
        for name in (*positive, "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is not positive; give a positive number")
        for name in ("l1", "auxiliary"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)} is negative; give 0 to turn it off")
        for name in ("decay", "warmup"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ConfigError(f"--{name} {getattr(self, name)} is a share of the steps; give a number in 0 to 1")
        if self.levels is not None:
            losses.check_levels(self.levels, self.weights or (1.0,) * len(self.levels))
        if self.weights is not None and self.levels is None:
            raise ConfigError("--weights without --levels; give one weight for each of the levels you name")
        if self.kind != "matryoshka" and (self.levels or self.weights or self.weighting != "uniform"):
            raise ConfigError(
                f"--levels, --weights and --weighting belong to matryoshka; leave them out for {self.kind}"
            )

    def resolve(self, store: EmbeddingStore) -> TrainSettings:
        """A copy with every None filled in for this store."""
        poster = self.recipe == "poster"
        d_sae = self.d_sae or round(self.expansion * store.d_in)
        levels = self.levels or losses.default_levels(d_sae, smallest=min(64, max(1, d_sae // 8)))
        weights = self.weights or losses.level_weights(self.weighting, len(levels))
        nested = self.kind == "matryoshka"
        return dataclasses.replace(
            self,
            d_sae=d_sae,
            levels=levels if nested else None,
            weights=weights if nested else None,
            epochs=self.epochs or (20 if poster and self.expansion >= 32 else 30),
            batch_size=min(self.batch_size or (4096 if poster else _batch_size_for(len(store))), len(store)),
            lr=self.lr or LEARNING_RATES[self.recipe][self.kind],
            warmup=self.warmup if self.warmup is not None else (0.0 if poster else 0.05),
            device=as_device(self.device),
        )


def _batch_size_for(n_rows: int) -> int:
    """The largest power of two up to 4096 that still gives an epoch about 200 steps, and at least 64."""
    return max(64, min(4096, 1 << max(0, (n_rows // 200).bit_length() - 1)))
