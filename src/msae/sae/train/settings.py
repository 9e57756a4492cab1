"""What to train and how, and what each recipe fills in."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal, TypedDict

from msae.base.devices import as_device, memory
from msae.base.errors import ConfigError
from msae.base.loggers import LoggerName
from msae.data.store import EmbeddingStore
from msae.sae import losses
from msae.sae.kernels import Kernel
from msae.sae.losses import Weighting
from msae.sae.model import Kind
from msae.sae.train.blocks import rows_of_a_block
from msae.sae.train.recipes import RECIPES, RecipeName
from msae.sae.train.rows import TrainedOn, TrainingRows

Arithmetic = Literal["float32", "bfloat16"]
DEFAULT_K = 64
DEFAULT_L1 = 0.003


@dataclass(frozen=True)
class TrainSettings:
    """What to train and how. What is left out is filled in by the recipe when training starts."""

    kind: Kind = "matryoshka"
    """Which SAE. matryoshka: nested levels. topk: the k strongest latents of each row. batchtopk: k a row on average.
    jumprelu: a threshold for each latent, learnt. relu: every positive latent, kept sparse by an L1 penalty."""
    weighting: Weighting | None = None
    """How much each level of a matryoshka SAE weighs. uniform: all the same. reverse: the smallest weighs most. rising:
    each weighs 1.19 times the one before it, steep: 1.41 times. Default: rising; recipe faithful: steep; poster:
    uniform."""
    levels: tuple[int, ...] | None = None
    """Latents kept at each level of a matryoshka SAE. Default: a 64th of the dimensions of the embeddings, doubled up
    to all of them; recipe faithful: up to all latents; poster: 64, doubled up to all latents."""
    widths: tuple[int, ...] | None = None
    """Train the other Matryoshka SAE instead: nested prefixes of the dictionary, each of so many latents, of which each
    row keeps k on average. The last must be all latents. Default: off."""
    weights: tuple[float, ...] | None = None
    """A weight for each of the levels or widths, instead of a weighting. Default: as the weighting says."""
    level_scales: bool = True
    """Learn for each level a factor of the activations: a row that keeps few latents needs stronger ones. The poster's
    recipe does not."""
    k: int | None = None
    """Active latents a row: exactly for topk, on average for batchtopk, jumprelu and widths. Default there: 64."""
    l1: float | None = None
    """Weight of the L1 penalty of kind relu. Default there: 0.003."""
    expansion: float = 8
    """Latents for each dimension of the embeddings."""
    d_sae: int | None = None
    """Number of latents. Default: expansion times the dimensions of the embeddings."""
    epochs: int | None = None
    """Passes over the rows. Default: 30; 20 for the poster's recipe at expansion 32 and above."""
    batch_size: int | None = None
    """Rows in a step. Default: a power of two from 64 to 4096 that gives about 200 steps an epoch; the poster's recipe:
    4096."""
    lr: float | None = None
    """Learning rate. Default: 3e-3 for matryoshka, 2e-3 for topk and batchtopk, 5e-4 for the others; recipe faithful:
    1e-3 for matryoshka; poster: 1e-4 for matryoshka, 5e-5 for relu, 5e-4 for the others."""
    seed: int = 0
    """Random seed of the initial weights and of the order of the rows."""
    modality: TrainedOn = "image"
    """Which embeddings of the stores to train on. both: images and texts, each standardised by its own mean and scale;
    half of every batch are images, half are texts."""
    align: float = 0.0
    """With both: weight of the loss that gives an image and its text the same latents, from the pairs in the stores; 1
    is strong, 0 is off."""
    recipe: RecipeName = "default"
    """Where the defaults come from. default: few latents that say what a concept is. faithful: a small error at every
    number of latents kept. poster: the paper's recipe to the letter."""
    inference_l0: int | None = None
    """Mean number of active latents of a row under the thresholds that are fitted after training. Default: k where the
    kind has one, else an eighth of the dimensions of the embeddings."""
    warmup: float | None = None
    """Share of the steps, at the start, over which the learning rate rises from 0. Default: 0.05; the poster's recipe:
    0."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    soft_cap: float | None = None
    """Largest activation c, by c * tanh(z / c). Default: no cap."""
    auxiliary: float = 0.0
    """Weight of the loss that revives dead latents; 1/32 is usual, 0 is off."""
    dead_after: int = 100_000
    """Rows without firing after which a latent counts as dead for that loss."""
    block_rows: int | None = None
    """Rows that are read together and shuffled as one, for stores larger than memory; 1 shuffles single rows. Default:
    1 where the embeddings fit into memory, else 4 to 4096 by the sizes of memory and batch."""
    precision: Arithmetic = "float32"
    """Arithmetic of products inside a step; weights, sums and the optimizer stay float32. bfloat16 is less exact."""
    kernel: Kernel = "auto"
    """What computes the loss. auto: compiled loops (cpu) on a CPU, plain torch (reference) elsewhere."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl. Losses are read then and before a checkpoint: a run that diverges ends
    there."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints. Default: one a minute."""
    loggers: tuple[LoggerName, ...] = ()
    """Where figures go beside metrics.jsonl."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1 and so on."""

    def __post_init__(self) -> None:
        positive = ("expansion", "d_sae", "epochs", "batch_size", "lr", "k", "max_grad_norm", "log_every", "dead_after")
        for name in (*positive, "checkpoint_every", "inference_l0", "block_rows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is not positive; give a positive number")
        if self.modality == "both" and (self.batch_size or 2) % 2:
            raise ConfigError(
                f"--batch-size {self.batch_size} is odd; with --modality both half of a batch are "
                "images: give an even number"
            )
        if self.align and self.modality != "both":
            raise ConfigError(f"--align {self.align:g} needs images and texts; add --modality both")
        for name in ("l1", "auxiliary", "align"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)} is negative; give 0 to turn it off")
        for name in ("decay", "warmup"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ConfigError(f"--{name} {getattr(self, name)} is a share of the steps; give a number in 0 to 1")
        if self.levels and self.widths:
            raise ConfigError("--levels and --widths are two different Matryoshka SAEs; give one of them")
        for noun, nested in (("levels", self.levels), ("widths", self.widths)):
            if nested is not None:
                losses.check_levels(nested, self.weights or (1.0,) * len(nested), noun=noun)
        if self.weights is not None and self.levels is None and self.widths is None:
            raise ConfigError("--weights without --levels; give one weight for each of the levels or widths you name")

    def resolve(self, store: EmbeddingStore | TrainingRows) -> TrainSettings:
        """A copy with everything filled in for this store.

        Raises:
            ConfigError: A setting is given that this kind does not use, or pairs are needed and there are none.
        """
        self._check_kind()
        if self.align and (not isinstance(store, TrainingRows) or store.pairs is None):
            raise ConfigError(
                f"--align {self.align:g} needs rows with an image and a text, and no store has both; leave it out"
            )
        recipe = RECIPES[self.recipe]
        d_sae = self.d_sae or round(self.expansion * store.d_in)
        is_nested, counts = self.kind == "matryoshka", self.counts_latents
        has_levels = is_nested and not self.widths
        levels = self.levels or recipe.levels(store.d_in, d_sae)
        weighting = self.weighting or (recipe.weighting if has_levels else "uniform")
        weights = self.weights or losses.level_weights(weighting, len(self.widths or levels))
        k = (self.k or DEFAULT_K) if counts else None
        if self.widths and self.widths[-1] != d_sae:
            raise ConfigError(f"the last of --widths is {self.widths[-1]}; give all latents, {d_sae}, as the last one")
        if self.inference_l0 and self.inference_l0 > d_sae:
            raise ConfigError(f"--inference-l0 {self.inference_l0} is above the {d_sae} latents; give at most {d_sae}")
        batch_size = min(self.batch_size or recipe.batch_size(len(store)), len(store))
        return dataclasses.replace(
            self,
            d_sae=d_sae,
            levels=levels if has_levels else None,
            weights=weights if is_nested else None,
            weighting="uniform" if self.weights and not self.weighting else weighting,
            level_scales=has_levels and recipe.level_scales and self.level_scales,
            k=k,
            l1=(DEFAULT_L1 if self.l1 is None else self.l1) if self.kind == "relu" else None,
            epochs=self.epochs or recipe.epochs(self.expansion),
            batch_size=batch_size,
            lr=self.lr or recipe.lr[self.kind],
            warmup=recipe.warmup if self.warmup is None else self.warmup,
            inference_l0=min(self.inference_l0 or k or recipe.inference_l0(store.d_in), d_sae),
            device=as_device(self.device),
            block_rows=self.block_rows or _block_rows(store, batch_size),
        )

    @property
    def counts_latents(self) -> bool:
        """Whether `k` says how many latents are active."""
        return self.kind in ("topk", "batchtopk", "jumprelu") or self.widths is not None

    def _check_kind(self) -> None:
        """Refuse what this kind would ignore. Not before: a file may give the levels, and the command line the kind."""
        nesting = self.levels or self.widths or self.weights or self.weighting not in (None, "uniform")
        if self.kind != "matryoshka" and nesting:
            raise ConfigError(
                f"--levels, --widths, --weights and --weighting belong to matryoshka; leave them out for {self.kind}"
            )
        # A run's own config.json has both, in agreement.
        as_weighted = losses.level_weights(self.weighting or "uniform", len(self.weights or ()))
        if self.weights and self.weighting not in (None, "uniform") and self.weights != as_weighted:
            raise ConfigError(f"--weights and --weighting {self.weighting} are both given; give one of them")
        if self.k is not None and not self.counts_latents:
            raise ConfigError(
                f"--k belongs to topk, batchtopk, jumprelu and --widths, but the kind is {self.kind}; "
                f"leave it out, or give another --kind"
            )
        if self.l1 is not None and self.kind != "relu":
            raise ConfigError(f"--l1 belongs to relu, but the kind is {self.kind}; leave it out, or give --kind relu")


def _block_rows(store: EmbeddingStore | TrainingRows, batch_size: int) -> int:
    if not isinstance(store, TrainingRows):
        return 1
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
    return rows_of_a_block(store.n_bytes, 4 * store.d_in, batch_size, memory(), n_processes=n_processes)


class TrainOptions(TypedDict, total=False):
    """The fields of `TrainSettings`, as keywords that an editor completes."""

    kind: Kind
    weighting: Weighting | None
    levels: tuple[int, ...] | None
    widths: tuple[int, ...] | None
    weights: tuple[float, ...] | None
    level_scales: bool
    k: int | None
    l1: float | None
    expansion: float
    d_sae: int | None
    epochs: int | None
    batch_size: int | None
    lr: float | None
    seed: int
    modality: TrainedOn
    align: float
    recipe: RecipeName
    inference_l0: int | None
    warmup: float | None
    decay: float
    max_grad_norm: float
    soft_cap: float | None
    auxiliary: float
    dead_after: int
    block_rows: int | None
    precision: Arithmetic
    kernel: Kernel
    log_every: int
    checkpoint_every: int | None
    loggers: tuple[LoggerName, ...]
    device: str
