"""The sparse autoencoder: one class for every kind, with the standardisation it was trained with."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args, overload, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from msae.base.errors import ConfigError, MissingDependencyError, RunError, StoreError
from msae.base.files import atomic_path
from msae.base.notices import notice
from msae.base.records import read_record, write_record
from msae.data.embedder import encoder_text, is_other_encoder
from msae.data.store import EmbeddingStore, as_store
from msae.sae import activations
from msae.sae.standardize import MODALITIES, Modality, Standardizer, Statistics, fit_statistics
from msae.sae.thresholds import ThresholdTable, fit_on_store, fit_thresholds, rows_at_once

Kind = Literal["matryoshka", "topk", "batchtopk", "jumprelu", "relu"]
Inference = Literal["relu", "trained", "topk", "threshold"]
SCHEMA_VERSION = 3
"""Of sae.json. 2 adds `inference_l0`, 3 `level_scales`, `threshold_modalities` and `unnormalised`; older files are SAEs
without."""
THRESHOLD_BUFFERS = ("thresholds", "threshold_table", "threshold_table_l0")
WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "sae.json"


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is: its sizes, its activation function, and the embeddings that it reads."""

    d_in: int
    d_sae: int
    kind: Kind = "matryoshka"
    k: int | None = None
    """Active latents of `topk`, mean active latents of `batchtopk`, `jumprelu` and `widths`; None for the others."""
    levels: tuple[int, ...] | None = None
    """Sparsity levels of `matryoshka`; None for the others."""
    widths: tuple[int, ...] | None = None
    """Nested prefixes of the dictionary, instead of levels: the other Matryoshka SAE, by BatchTopK."""
    level_scales: bool = False
    """Whether each of the levels has a factor of its own for the activations."""
    soft_cap: float | None = None
    """Largest activation, by `c * tanh(z / c)`."""
    inference_l0: float | None = None
    """Mean active latents of a training row under the stored thresholds; None where there are none."""
    threshold_modalities: tuple[Modality, ...] = ()
    """Of which rows there are thresholds, what was trained on first. Older files do not say so: then one set of
    thresholds serves all rows."""
    encoder: str | None = None
    """The CLIP-like model that made the embeddings, where the store said so."""
    encoder_revision: str | None = None
    unnormalised: bool = False
    """Trained on embeddings as the encoder gives them, not scaled to norm 1 as those of a store mostly are."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise ConfigError(f"d_in {self.d_in} and d_sae {self.d_sae} must be at least 1; check the sizes given")
        if self.kind in ("topk", "batchtopk", "jumprelu") or self.widths:
            if self.k is None:
                what = "an SAE of widths" if self.widths else f"kind {self.kind}"
                raise ConfigError(f"{what} needs the number of active latents; give --k, for example --k 64")
            if not 1 <= self.k <= self.d_sae:
                raise ConfigError(f"k {self.k} is not between 1 and d_sae {self.d_sae}; give a smaller --k")
        if self.kind == "matryoshka" and not self.widths:
            if not self.levels:
                raise ConfigError("kind matryoshka needs levels; give --levels, for example --levels 64 128 256")
            if self.levels[-1] > self.d_sae:
                raise ConfigError(f"level {self.levels[-1]} is above d_sae {self.d_sae}; give smaller --levels")
        if self.widths and (self.kind != "matryoshka" or self.levels or self.widths[-1] > self.d_sae):
            raise ConfigError(
                f"widths {list(self.widths)} do not fit kind {self.kind}, d_sae {self.d_sae} and levels {self.levels}; "
                "give them to matryoshka, without levels and none above d_sae"
            )
        if self.level_scales and not self.levels:
            raise ConfigError("level scales without levels; give kind matryoshka with levels, or no level scales")
        if len(set(self.threshold_modalities)) < len(self.threshold_modalities):
            raise ConfigError(f"thresholds of {' and '.join(self.threshold_modalities)}; wanted each modality once")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ConfigError(f"soft cap {self.soft_cap} is not positive; give for example --soft-cap 30")


class Rule(NamedTuple):
    """Which latents of a row are active: the k largest, or those above their thresholds; all positive ones without."""

    k: int | None = None
    threshold: Tensor | None = None
    """One number, or one for each latent, in the units of the pre-activations."""
    scale: float = 1.0
    """What their activations are multiplied by: see `SAE.scale_at`."""


class SAE(nn.Module):
    """Encoder, decoder and biases of a sparse autoencoder on standardised embeddings.

    `encode` and `decode` take and give raw embeddings; `pre_activations`, `activate` and `reconstruct`
    work in the standardised space, which is where training and most metrics live.

    Source: Zaigrajew et al. 2025, arXiv:2502.20578.
    """

    W_enc: nn.Parameter  # (d_in, d_sae)
    W_dec: nn.Parameter  # (d_sae, d_in)
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    log_threshold: Float[Tensor, " d_sae"] | None
    """JumpReLU's learnt thresholds."""
    log_level_scales: Float[Tensor, " n_levels"] | None
    """Logarithm of what the activations are multiplied by at each level: fewer latents have to be stronger."""
    threshold: Float[Tensor, ""] | None
    """Running threshold of BatchTopK and of widths: makes inference independent of the batch; 0 before training."""
    thresholds: Float[Tensor, " d_sae"] | None
    """Fitted after training: a latent fires where its pre-activation exceeds its own. None in older SAEs. These are of
    the first of `threshold_modalities`; those of another have its name behind theirs, such as `thresholds_text`."""
    threshold_table: Float[Tensor, "n d_sae"] | None
    """What `with_l0` takes thresholds from: a row for each of `threshold_table_l0`."""
    threshold_table_l0: Float[Tensor, " n"] | None

    def __init__(self, config: SAEConfig, standardizer: Standardizer | None = None, *, seed: int = 0) -> None:
        """Initial weights: biases 0, encoder the transposed decoder with rows of norm 0.1, decoder rows of norm 1."""
        super().__init__()
        self.config = config
        self.standardizer = standardizer or Standardizer()
        generator = torch.Generator().manual_seed(seed)
        # Kaiming-uniform directions: only the direction survives the rescaling to norm 0.1.
        rows = torch.rand(config.d_sae, config.d_in, generator=generator, dtype=torch.float32) * 2 - 1
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        # Laid out latent by latent, like the decoder: that is how the kernels walk over both.
        self.W_enc = nn.Parameter((0.1 * rows).T)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae, dtype=torch.float32))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, dtype=torch.float32))
        self.log_threshold = None
        if config.kind == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((config.d_sae,), 0.1, dtype=torch.float32).log())
        self.log_level_scales = None
        if config.level_scales:
            self.log_level_scales = nn.Parameter(torch.zeros(len(config.levels or ()), dtype=torch.float32))
        has_threshold = config.kind == "batchtopk" or config.widths
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32) if has_threshold else None)
        for name in THRESHOLD_BUFFERS:
            for suffix in ("", *(f"_{modality}" for modality in MODALITIES)):
                self.register_buffer(name + suffix, None)

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    def pre_activations(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """`h` of standardised embeddings."""
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)

    def activate(
        self,
        h: Float[Tensor, "n d_sae"],
        *,
        inference: Inference = "trained",
        k: int | None = None,
        modality: Modality | None = None,
        latents: Sequence[int] | None = None,
    ) -> Float[Tensor, "n d_sae"]:
        """`z` of pre-activations.

        Args:
            inference: `threshold` keeps the latents above their stored thresholds: which ones depends on the row
                alone. `relu` keeps every positive latent, as in the poster's tables, for every kind. `topk` keeps the
                `k` largest. `trained` is what the SAE was saved with: the k largest for topk, the learnt thresholds
                for batchtopk, jumprelu and a matryoshka of widths; for matryoshka and relu the stored thresholds, and
                ReLU where an older SAE has none.
            k: For `topk`.
            modality: Whose stored thresholds; None takes those of what the SAE was trained on. Where there are none of
                this modality the others serve, and one line on stderr says so.
            latents: Those that `h` is of, where they do not compete; None is all.

        Raises:
            ConfigError: `inference` is `topk` without `k`, or `threshold` where none are stored.
        """
        rule = self.rule(inference, k, modality)
        threshold = rule.threshold
        if rule.k is not None:
            z = activations.topk(h, rule.k)
        elif threshold is None:
            z = h.relu()
        else:
            is_some = latents is not None and threshold.ndim > 0
            z = activations.threshold_relu(h, threshold[latents] if is_some else threshold)
        if self.config.soft_cap is not None:
            z = activations.soft_cap(z, self.config.soft_cap)
        return z if self.log_level_scales is None else z * rule.scale

    def scale_at(self, n_active: float) -> float:
        """What activations are multiplied by where `n_active` latents take part: 1 without level scales.

        Between two levels its logarithm is linear in that of the number; below the first and above the last it is
        theirs.
        """
        if self.log_level_scales is None:
            return 1.0
        assert self.config.levels is not None
        known = self.log_level_scales.detach().double().cpu().numpy()
        return float(np.exp(np.interp(np.log(n_active), np.log(self.config.levels), known)))

    def active_latents(self, inference: Inference, k: int | None = None) -> float:
        """How many latents an inference lets take part in a row: exactly, on average, or at most."""
        if inference == "topk" and k is not None:
            return float(k)
        if inference == "relu" or self.config.inference_l0 is None:
            return float(self.d_sae)
        return float(self.config.inference_l0)

    def rule(self, inference: Inference = "trained", k: int | None = None, modality: Modality | None = None) -> Rule:
        """What `activate` goes by; raises as it does."""
        self.check_inference(inference)
        return self._unscaled(inference, k, modality)._replace(scale=self.scale_at(self.active_latents(inference, k)))

    def _unscaled(self, inference: Inference, k: int | None, modality: Modality | None) -> Rule:
        if inference == "topk":
            if k is None or k < 1:
                raise ConfigError(f"inference topk with k {k}; give a positive --k, for example --k 64")
            return Rule(k=k)
        if inference == "trained":
            if self.config.kind == "topk":
                return Rule(k=self.config.k or self.d_sae)
            if self.threshold is not None:
                return Rule(threshold=self.threshold)
            if self.log_threshold is not None:
                return Rule(threshold=self.log_threshold.exp())
        if inference == "relu" or self.thresholds is None:
            return Rule()
        return Rule(threshold=getattr(self, "thresholds" + self._suffix(modality)))

    def _suffix(self, modality: Modality | None) -> str:
        """What stands behind the names of the thresholds of `modality`."""
        known = self.config.threshold_modalities
        if modality in known[1:]:
            return f"_{modality}"
        if modality is not None and known and modality not in known:
            notice(
                f"this SAE has thresholds for {known[0]} rows alone, which serve for {modality} rows too: other than "
                f"{self.config.inference_l0:.4g} latents are active in a row; to fit them: "
                f"sae.with_l0({round(self.config.inference_l0 or 1)}, STORE, {modality!r}).save(RUN)"
            )
        return ""

    def check_inference(self, inference: Inference) -> None:
        """Refuse an unknown inference, and `threshold` where no thresholds are stored; raises `ConfigError`."""
        if inference not in get_args(Inference):
            raise ConfigError(f"inference {inference!r} is unknown; give {', '.join(get_args(Inference))}")
        if inference == "threshold" and self.thresholds is None:
            raise ConfigError(
                "this SAE has no thresholds (they are fitted at the end of msae train, not by earlier versions); fit "
                "them in Python: sae.with_l0(64, STORE).save(RUN)"
            )

    def with_l0(
        self,
        l0: int,
        on: Tensor | NDArray[Any] | EmbeddingStore | str | Path | None = None,
        modality: Modality = "image",
    ) -> SAE:
        """A copy whose thresholds let `l0` latents fire in a row, on average over the rows that they are fitted on.

        Without `on` they come from the table fitted after training, and nothing is computed. With it, those of one
        modality are fitted, and its mean and scale too where the SAE has none; those of another, where there are any,
        come from their table.

        Args:
            on: Fit the thresholds anew on these rows of raw embeddings, or on those of this store: at most 65,536 of
                them, chosen at random.
            modality: What the embeddings are of.

        Raises:
            ConfigError: `l0` is below 1 or above the positive latents of a row, or no thresholds are stored.
            StoreError: The store does not fit the SAE or lacks the modality.
        """
        if not 1 <= l0 <= self.d_sae:
            raise ConfigError(f"{l0} active latents a row is not between 1 and d_sae {self.d_sae}; give another number")
        if on is not None and modality not in self.standardizer:
            return self._with_statistics(on, modality).with_l0(l0, on, modality)
        tables = self._threshold_tables()
        if on is None:
            self.check_inference("threshold")
            if any(not len(table.l0) for table in tables.values()):
                raise ConfigError(
                    "the thresholds of this SAE came with it, without a table of others; "
                    f"fit them on rows: with_l0({l0}, STORE)"
                )
        else:
            tables = tables if self.config.threshold_modalities else {}  # of unknown rows: not kept beside known ones
            tables[modality] = self.fitted_thresholds(on, modality, l0=l0)
        largest = next(iter(tables.values())).largest if on is None else tables[modality].largest
        if l0 > largest:
            raise ConfigError(
                f"only {largest:.1f} latents a row are positive on average, so no thresholds let {l0} fire; "
                f"give at most {int(largest)}"
            )
        sae = self.with_thresholds(tables, float(l0))
        if on is None:  # whatever rows they were fitted on
            sae.config = dataclasses.replace(sae.config, threshold_modalities=self.config.threshold_modalities)
        return sae

    def _with_statistics(self, on: Tensor | NDArray[Any] | EmbeddingStore | str | Path, modality: Modality) -> SAE:
        """A copy that standardises `modality` by the mean and scale of these rows."""
        if isinstance(on, EmbeddingStore | str | Path):
            store = as_store(on, modality)
            check_fit(self, store)
            statistics = fit_statistics(lambda: map(torch.from_numpy, store.batches(modality, 8192)))
        else:
            x = self._checked_rows(on if isinstance(on, Tensor) else _as_tensor(on))
            statistics = fit_statistics(lambda: [x])
        sae = copy.deepcopy(self)
        sae.standardizer = self.standardizer.with_statistics(modality, statistics)
        return sae

    def _suffixes(self) -> list[str]:
        """What stands behind the names of all stored thresholds."""
        if self.config.inference_l0 is None:
            return []
        return ["", *map(self._suffix, self.config.threshold_modalities[1:])]

    def _threshold_tables(self) -> dict[Modality, ThresholdTable]:
        """The stored tables; that of an older SAE, which does not say of which rows it is, as if of images."""
        if self.thresholds is None:
            return {}
        return {
            modality: ThresholdTable(
                getattr(self, f"threshold_table_l0{suffix}"), getattr(self, f"threshold_table{suffix}")
            )
            for modality in self.config.threshold_modalities or MODALITIES[:1]
            for suffix in [self._suffix(modality)]
        }

    def fitted_thresholds(
        self, on: Tensor | NDArray[Any] | EmbeddingStore | str | Path, modality: Modality, *, l0: int
    ) -> ThresholdTable:
        """Thresholds fitted on rows or on those of a store, exact at `l0`; raises as `with_l0` does."""
        if isinstance(on, EmbeddingStore | str | Path):
            store = as_store(on, modality)
            check_fit(self, store)
            return fit_on_store(self, store, modality, l0=l0)
        x = self._standardized(on if isinstance(on, Tensor) else _as_tensor(on), modality)
        if not len(x):
            raise ConfigError("there are no rows to fit thresholds on; give at least one")
        return fit_thresholds(self, lambda: torch.split(x, rows_at_once(self.d_sae)), len(x), l0=l0)

    def with_thresholds(self, tables: Mapping[Modality, ThresholdTable], l0: float) -> SAE:
        """A copy with thresholds for `l0` from the tables, or for all positive latents where those are fewer.

        Args:
            tables: By the rows that they were fitted on, what was trained on first.
        """
        sae = copy.deepcopy(self)
        modalities = tuple(tables)
        reached = min(float(l0), tables[modalities[0]].largest)
        sae.config = dataclasses.replace(self.config, inference_l0=reached, threshold_modalities=modalities)
        for modality, table in tables.items():
            thresholds = (table.at(min(float(l0), table.largest)), table.thresholds, table.l0)
            for name, tensor in zip(THRESHOLD_BUFFERS, thresholds, strict=True):
                setattr(sae, name + sae._suffix(modality), tensor)
        return sae

    def reconstruct(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        """`x_hat` in the standardised space."""
        return torch.addmm(self.b_dec, z, self.W_dec)

    @overload
    def encode(
        self, x: Tensor, modality: Modality = ..., k: int | None = ..., *, inference: Inference = ...
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        x: NDArray[Any] | EmbeddingStore | str | Path,
        modality: Modality = ...,
        k: int | None = ...,
        *,
        inference: Inference = ...,
    ) -> NDArray[np.float32]: ...

    @torch.no_grad()
    def encode(
        self,
        x: Tensor | NDArray[Any] | EmbeddingStore | str | Path,
        modality: Modality = "image",
        k: int | None = None,
        *,
        inference: Inference = "trained",
    ) -> Tensor | NDArray[np.float32]:
        """Activations of raw embeddings; with `k`, of only the `k` strongest latents of each row.

        Args:
            x: Rows as a tensor, which gives a tensor; as an array, or a store with all of its rows, which give an
                array. A single vector gives a single row of activations.
            modality: What the embeddings are of: it chooses the statistics that standardise them, and the rows of a
                store.

        Raises:
            ConfigError: The width differs from `d_in`, or the SAE has no statistics of `modality`.
            StoreError: The store is of another width or encoder, or has no embeddings of `modality`.
        """
        if isinstance(x, Tensor):
            rows = self._standardized(x, modality)
            how: Inference = "topk" if k is not None else inference
            z = self.activate(self.pre_activations(rows), inference=how, k=k, modality=modality)
            return z[0] if x.ndim == 1 else z
        if not isinstance(x, EmbeddingStore | str | Path):
            return self.encode(_as_tensor(x), modality, k, inference=inference).cpu().numpy()
        store = as_store(x, modality)
        check_fit(self, store)
        batches = (torch.from_numpy(batch) for batch in store.batches(modality, 8192))
        return np.concatenate([self.encode(rows, modality, k, inference=inference).cpu().numpy() for rows in batches])

    def _standardized(self, x: Tensor, modality: Modality) -> Tensor:
        """Rows of raw embeddings, or one, as this SAE reads them; raises `ConfigError` for another shape."""
        return self.standardizer.apply(self._checked_rows(x).to(self.b_dec.device), modality)

    def _checked_rows(self, x: Tensor) -> Tensor:
        """Raw embeddings, or one, as rows; raises `ConfigError` for another shape."""
        if x.ndim not in (1, 2):
            raise ConfigError(f"embeddings of shape {tuple(x.shape)}; give rows, (n, {self.d_in}), or one vector")
        if x.shape[-1] != self.d_in:
            raise ConfigError(f"embeddings of width {x.shape[-1]}, but this SAE reads width {self.d_in}; give others")
        return x.float().reshape(-1, self.d_in)

    @overload
    def decode(self, z: Tensor, modality: Modality = ...) -> Tensor: ...

    @overload
    def decode(self, z: NDArray[Any], modality: Modality = ...) -> NDArray[np.float32]: ...

    @torch.no_grad()
    def decode(self, z: Tensor | NDArray[Any], modality: Modality = "image") -> Tensor | NDArray[np.float32]:
        """Raw embeddings of activations: a tensor of a tensor, an array of an array.

        Raises:
            ConfigError: The width differs from `d_sae`, or the SAE has no statistics of `modality`.
        """
        if not isinstance(z, Tensor):
            return self.decode(_as_tensor(z), modality).cpu().numpy()
        if z.ndim not in (1, 2) or z.shape[-1] != self.d_sae:
            raise ConfigError(f"activations of shape {tuple(z.shape)}; this SAE has {self.d_sae} latents: give so many")
        rows = z.to(self.b_dec.device, self.b_dec.dtype).reshape(-1, self.d_sae)
        x = self.standardizer.invert(self.reconstruct(rows), modality)
        return x[0] if z.ndim == 1 else x

    def __repr__(self) -> str:
        """Its kind and sizes in one line."""
        config = self.config
        parts = [f"{config.kind}, {config.d_in} -> {config.d_sae}"]
        for name in ("levels", "widths", "k", "soft_cap"):
            value = getattr(config, name)
            if value is not None:
                parts.append(f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else f'{value:g}'}")
        if config.inference_l0 is not None:
            parts.append(f"{config.inference_l0:.4g} active latents a row on average")
        parts.append(f"standardises {' and '.join(self.standardizer.modalities) or 'nothing'}")
        if config.encoder:
            parts.append(f"embeddings of {encoder_text((config.encoder, config.encoder_revision))}")
        return f"SAE({', '.join(parts)})"

    def save(self, folder: str | Path) -> None:
        """Write `sae.safetensors` and `sae.json` into `folder`, each atomically.

        Raises:
            RunError: Weights are NaN or infinite; nothing is written.
        """
        folder = Path(folder)
        broken = first_not_finite(self.state_dict())
        if broken:
            raise RunError(f"{broken} has NaN or infinite values, so this SAE is not saved in {folder}; train it again")
        with atomic_path(folder / WEIGHTS_FILE) as temporary:
            save_file(self.to_tensors(), temporary)
        write_record(folder / CONFIG_FILE, self.config, schema_version=SCHEMA_VERSION)

    def to_tensors(self) -> dict[str, Tensor]:
        """What `sae.safetensors` holds: the state, and the statistics that standardise."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        for modality, known in self.standardizer.statistics.items():
            tensors[f"standardizer.{modality}.mean"] = known.mean.cpu().contiguous()
            tensors[f"standardizer.{modality}.scale"] = torch.tensor(known.scale, dtype=torch.float64)
        return tensors

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None) -> SAE:
        """The SAE saved in a folder, or in a Hugging Face hub repository `owner/name`.

        Raises:
            RunError: There is no SAE, or its files are damaged or do not belong together.
        """
        folder = Path(path)
        if not folder.exists() and looks_like_hub_id(str(path)):
            return cls.from_pretrained(str(path), revision=revision)
        folder = folder_of(folder)
        config = read_config(folder)
        return cls.of_tensors(config, read_tensors(folder / WEIGHTS_FILE), where=str(folder / WEIGHTS_FILE))

    @classmethod
    def from_pretrained(cls, repo: str, *, subfolder: str | None = None, revision: str | None = None) -> SAE:
        """The SAE in a repository of the Hugging Face hub, or in a folder of it; or in a folder on this machine.

        It may be one of ours, or what `msae.export` makes for SAELens or sparsify. Without a connection it is the copy
        that was downloaded before. No pickle is downloaded.

        Args:
            repo: As `owner/name`.
            subfolder: The folder in the repository; without it, its root.
            revision: A branch, a tag or a commit; without it, the newest.

        Raises:
            RunError: The repository cannot be reached, or holds no SAE there.
        """
        from msae.sae.formats import read_folder  # it imports this module

        here = Path(repo, subfolder or "")
        folder = here if here.is_dir() else download(repo, subfolder, revision)
        return cls.load(folder) if (folder / CONFIG_FILE).exists() else read_folder(folder).sae

    @classmethod
    def of_tensors(cls, config: SAEConfig, tensors: Mapping[str, Tensor], *, where: str) -> SAE:
        """The SAE of what `save` wrote.

        Args:
            where: The file, for messages.

        Raises:
            RunError: Tensors are missing, of another shape, NaN or infinite.
        """
        tensors = dict(tensors)
        size = tuple(tensors["W_dec"].shape) if "W_dec" in tensors else "missing"
        if size != (config.d_sae, config.d_in):  # before so much memory is asked for
            raise RunError(
                f"{where} has W_dec {size}, {CONFIG_FILE} wants {(config.d_sae, config.d_in)}; "
                "the two files do not belong together: restore both"
            )
        sae = cls(config, _pop_standardizer(tensors))
        for suffix in sae._suffixes() or ([""] if "thresholds" in tensors else []):
            n = len(tensors.get(f"threshold_table{suffix}", ()))
            for name, shape in zip(THRESHOLD_BUFFERS, ((config.d_sae,), (n, config.d_sae), (n,)), strict=True):
                dtype = torch.float64 if name == "threshold_table_l0" else torch.float32
                setattr(sae, name + suffix, torch.zeros(shape, dtype=dtype))
        wanted = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wanted != found:
            differing = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
            raise RunError(
                f"{where} has {differing} {found.get(differing, 'missing')}, {CONFIG_FILE} wants "
                f"{wanted.get(differing, 'none')}; the two files do not belong together: restore both"
            )
        broken = first_not_finite(tensors)
        if broken:
            raise RunError(f"{where} has NaN or infinite values in {broken}; restore it or train again")
        sae.load_state_dict(tensors)
        return sae.eval()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; raises `RunError` where it is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RunError(f"{file} does not exist; train again or restore it") from None
    except (SafetensorError, OSError) as err:
        raise RunError(f"{file} is damaged ({err}); train again or restore it") from err


def _as_tensor(array: Any) -> Tensor:
    """A float32 tensor of an array, or of what numpy takes for one."""
    try:
        return torch.from_numpy(np.array(array, dtype=np.float32))
    except (TypeError, ValueError) as err:
        raise ConfigError(
            f"a {type(array).__name__} cannot be read as numbers ({err}); give an array or tensor"
        ) from err


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinite value."""
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


def folder_of(path: Path) -> Path:
    """The run folder at `path`, which may also be the SAE's file in it.

    Raises:
        RunError: It is another file.
    """
    if not path.is_file():
        return path
    if path.name not in (WEIGHTS_FILE, CONFIG_FILE):
        raise RunError(f"{path} is a file, not a run; give the folder that msae train --out made")
    return path.parent


@runtime_checkable
class Embeddings(Protocol):
    """What of a store decides whether an SAE can read it."""

    @property
    def address(self) -> str: ...
    @property
    def d_in(self) -> int: ...
    @property
    def encoder(self) -> str | None: ...
    @property
    def encoder_revision(self) -> str | None: ...


def check_fit(sae: SAE, store: Embeddings, *, run: SAE | str | Path | None = None) -> None:
    """Refuse embeddings that the SAE was not made for.

    Encoders are compared as `is_other_encoder` does.

    Args:
        run: What the SAE was given as; named in the message where it is a folder.

    Raises:
        StoreError: The store is of another width or of another encoder.
    """
    known = sae.config
    name = "this SAE" if run is None or isinstance(run, SAE) else str(run)
    if store.d_in != sae.d_in:
        raise StoreError(
            f"{store.address} holds {store.d_in}-dim embeddings, but {name} reads {sae.d_in}-dim ones; "
            f"give a store embedded with --encoder {known.encoder or 'ID of its encoder'}"
        )
    mine, theirs = (known.encoder, known.encoder_revision), (store.encoder, store.encoder_revision)
    if is_other_encoder(mine, theirs):
        raise StoreError(
            f"{store.address} was embedded by {encoder_text(theirs)}, but {name} reads embeddings of "
            f"{encoder_text(mine)}; embed it again with --encoder {mine[0] or 'ID'}"
        )


def weights_hash(sae: SAE) -> str:
    """A hash of all that activations depend on: weights, statistics that standardise, activation function."""
    known = sae.config
    digest = hashlib.blake2b(repr((known.kind, known.k, known.levels, known.soft_cap)).encode(), digest_size=16)
    tensors = {name: t for name, t in sae.state_dict().items() if not name.startswith("threshold_table")}
    for modality, statistics in sae.standardizer.statistics.items():
        scale = torch.tensor([statistics.scale]).double()
        tensors[f"standardizer.{modality}"] = torch.cat([statistics.mean.cpu().double(), scale])
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_config(folder: Path) -> SAEConfig:
    """What the SAE saved in a folder is, without its weights; raises `RunError`."""
    if not folder.is_dir():
        raise RunError(f"{folder} does not exist; give the folder that msae train --out made")
    if not (folder / CONFIG_FILE).exists():
        raise RunError(f"{folder} holds no {CONFIG_FILE}; give the folder that msae train --out made")
    return read_record(
        folder / CONFIG_FILE,
        SAEConfig,
        schema_version=(1, 2, SCHEMA_VERSION),
        error=RunError,
        remedy=f"restore {CONFIG_FILE} or train again",
    )


def _pop_standardizer(tensors: dict[str, Tensor]) -> Standardizer:
    statistics = {}
    for modality in MODALITIES:
        mean = tensors.pop(f"standardizer.{modality}.mean", None)
        scale = tensors.pop(f"standardizer.{modality}.scale", None)
        if mean is not None and scale is not None:
            statistics[modality] = Statistics(mean, float(scale))
    return Standardizer(statistics)


def looks_like_hub_id(path: str) -> bool:
    """Whether it is written as `owner/name`, and not as a path."""
    owner, _, name = path.partition("/")
    return bool(owner and name) and "/" not in name and owner not in (".", "..", "runs", "~")


HUB_FILES = (CONFIG_FILE, WEIGHTS_FILE, "names.json", "cfg.json", "sae_weights.safetensors", "msae.safetensors")
"""What is downloaded of a repository: JSON and safetensors, no pickles."""


def download(repo: str, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The folder with the SAE of a hub repository, on this machine; raises `RunError`."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as err:
        raise MissingDependencyError.of("huggingface_hub", extra="clip") from err
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    # The hub counts a download by the request for the config.json in the root.
    wanted = ["config.json", *(f"{prefix}{name}" for name in HUB_FILES)]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted)) / prefix
    except RepositoryNotFoundError as err:
        raise RunError(
            f"the hub shows no repository {repo}; give owner/name, or hf auth login where it is private"
        ) from err
    except RevisionNotFoundError as err:
        raise RunError(f"{repo} has no revision {revision}; give a branch, a tag or a commit that it has") from err
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        raise RunError(
            f"{repo} is neither a folder here nor a reachable hub repository with an SAE "
            f"({type(err).__name__}); give the folder that msae train --out made"
        ) from err
    if not any((folder / name).exists() for name in (CONFIG_FILE, "cfg.json")):
        raise RunError(
            f"{repo} holds no SAE in {subfolder or 'its root'}; give the folder of the repository that has "
            f"{CONFIG_FILE} or cfg.json as subfolder"
        )
    return folder
