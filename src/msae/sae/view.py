"""`View`: the rows of a store through an SAE, in one modality and one inference, block by block."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy.typing import NDArray
from torch import Tensor

from msae.base.devices import as_device, return_freed_memory
from msae.base.errors import ConfigError
from msae.base.progress import progress
from msae.data.store import EmbeddingStore, as_store
from msae.sae.model import SAE, Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality, Standardizer, fit_statistics

BLOCK_ENTRIES = 2**22
"""Activations of a block, some 16 MB: memory grows neither with the rows nor with d_sae."""
TRIMMED = 0.5
"""Seconds after which freed memory is returned. Without that a gallery of a million rows grew by 240 bytes a row."""
FIT_ROWS = 8192
"""Rows read at once to fit statistics."""

Latents: TypeAlias = Sequence[int] | NDArray[np.int64]


def placed(sae: SAE, device: str) -> SAE:
    """The SAE itself where it is on the device, else a copy that is.

    Raises:
        ConfigError: The device cannot be used here.
    """
    there = torch.empty(0, device=as_device(device)).device
    return sae if sae.W_dec.device == there else copy.deepcopy(sae).to(there).eval()


class View:
    """The rows of a store as an SAE sees them.

    Where the SAE has no statistics of the modality, those of the store are fitted; `standardized_by` says so.
    """

    def __init__(
        self,
        run: RunLike,
        on: EmbeddingStore | str | Path,
        modality: Modality | None = None,
        *,
        inference: Inference = "trained",
        k: int | None = None,
        block_rows: int | None = None,
        device: str | None = None,
    ) -> None:
        """See the class.

        Args:
            modality: Which rows; None takes images where there are any.
            inference: How `z` is made; with `k` alone it is `topk`.
            block_rows: Rows at once; None takes some 16 MB of activations. float32 products differ in their last
                bit with the shape of a block, so one place's figures need one number.
            device: Where to compute: a torch device, `auto`, or None for where the SAE is. An SAE elsewhere is
                copied, not moved.

        Raises:
            StoreError: The store does not fit the SAE or lacks the modality.
            ConfigError: `k` or `block_rows` is below 1, or above what there is.
        """
        self.run = Run.open(run)
        self.store = as_store(on, modality, unnamed=self.run.modality)
        self.run.check_fit(self.store)
        self.modality: Modality = modality or self.store.modalities[0]
        sae = self.run.sae if device is None else placed(self.run.sae, device)
        self.sae: SAE = sae
        if k is not None and not 1 <= k <= sae.d_sae:
            raise ConfigError(
                f"k {k} is not between 1 and the {sae.d_sae} latents of {self.run.name}; give another --k"
            )
        if block_rows is not None and block_rows < 1:
            raise ConfigError(f"blocks of {block_rows} rows; give at least 1, for example 4096")
        self.inference: Inference = inference if k is None else "topk"
        sae.check_inference(self.inference)
        self.k = k
        self.block_rows = block_rows or max(64, BLOCK_ENTRIES // sae.d_sae)
        self.standardized_by: Literal["run", "store"] = "run" if self.modality in sae.standardizer else "store"
        self.standardizer = self._standardizer()

    def on(self, store: EmbeddingStore, modality: Modality | None = None) -> View:
        """The rows of another store, or of another modality, in the same way and with the same statistics.

        Raises:
            StoreError: The store does not fit the SAE or lacks the modality.
        """
        other = copy.copy(self)
        other.modality = modality or self.modality
        other.store = as_store(store, other.modality)
        self.run.check_fit(other.store)
        return other

    def __repr__(self) -> str:
        rows = f"{len(self):,} {self.modality} rows of {self.store.address}"
        return f"View({rows} through {self.run.name}, inference {self.inference})"

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.store)

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    def raw(
        self, rows: NDArray[np.int64] | None = None, *, title: str | None = None
    ) -> Iterator[Float[Tensor, "n d_in"]]:
        """The embeddings as they are stored, of all rows in order or of the given `rows`, on the device.

        Args:
            title: What a progress bar says; without it there is none.
        """
        size, store = self.block_rows, self.store
        if rows is None:
            batches = store.batches(self.modality, size)
        else:
            batches = (store.take(rows[first : first + size], self.modality) for first in range(0, len(rows), size))
        total = len(store) if rows is None else len(rows)
        with progress(title, total=total, unit="rows") if title else nullcontext(lambda _: None) as advance:
            trimmed = time.monotonic()
            for batch in batches:
                yield torch.from_numpy(batch).to(self.device)
                advance(len(batch))
                if time.monotonic() > trimmed + TRIMMED:
                    return_freed_memory()
                    trimmed = time.monotonic()

    def rows(
        self, rows: NDArray[np.int64] | None = None, *, title: str | None = None
    ) -> Iterator[Float[Tensor, "n d_in"]]:
        """The standardised embeddings `x`, block by block."""
        return (self.standardize(raw) for raw in self.raw(rows, title=title))

    def activations(
        self,
        latents: Latents | None = None,
        rows: NDArray[np.int64] | None = None,
        *,
        title: str | None = None,
    ) -> Iterator[Float[Tensor, "n l"]]:
        """The activations `z` of all latents or of some, of all rows or of some, block by block.

        Of the kinds whose latents do not compete only the given `latents` are computed.
        """
        return (self.activate(x, latents) for x in self.rows(rows, title=title))

    def table(
        self, rows: NDArray[np.int64], latents: Sequence[int] | None = None, *, title: str | None = None
    ) -> Float32[np.ndarray, "n l"]:
        """The activations of the given `rows` as one array."""
        z = np.empty((len(rows), self.sae.d_sae if latents is None else len(latents)), np.float32)
        first = 0
        for block in self.activations(latents, rows, title=title):
            z[first : first + len(block)] = block.cpu().numpy()
            first += len(block)
        return z

    @torch.no_grad()
    def standardize(self, raw: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """`x` of raw embeddings on the device."""
        return self.standardizer.apply(raw, self.modality)

    @torch.no_grad()
    def activate(self, x: Float[Tensor, "n d_in"], latents: Latents | None = None) -> Float[Tensor, "n l"]:
        """`z` of standardised embeddings, of all latents or of some."""
        sae = self.sae
        if latents is None:
            return sae.activate(sae.pre_activations(x), inference=self.inference, k=self.k, modality=self.modality)
        chosen = list(latents)
        if self.inference == "topk" or (self.inference == "trained" and sae.config.kind == "topk"):
            return self.activate(x)[:, chosen]  # what fires depends on every other latent
        h = torch.addmm(sae.b_enc[chosen], x - sae.b_dec, sae.W_enc[:, chosen])
        return sae.activate(h, inference=self.inference, modality=self.modality, latents=chosen)

    def _standardizer(self) -> Standardizer:
        """The SAE's own, with statistics of the modality fitted on the store where it has none."""
        own = self.sae.standardizer
        if self.standardized_by == "run":
            return own
        fitted = fit_statistics(lambda: map(torch.from_numpy, self.store.batches(self.modality, FIT_ROWS)))
        return own.with_statistics(self.modality, fitted)
