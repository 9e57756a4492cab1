"""The pass over a store from which galleries are made, and what it needs to know about the run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msae.base.errors import ConfigError
from msae.base.progress import progress
from msae.concepts.samples import Origin, SampleMiner, TopSamples, block_rows
from msae.data.store import EmbeddingStore, as_store
from msae.sae.losses import default_levels
from msae.sae.model import SAE, Inference, as_sae, check_fit, run_folder, weights_hash
from msae.sae.standardize import Modality, Standardizer, fit_statistics

SAMPLES_FOLDER = "samples"
"""Inside a run folder: what was mined, to be used again."""


def top_samples(
    sae: SAE | str | Path,
    on: EmbeddingStore | str | Path,
    *,
    modality: Modality = "image",
    n: int = 16,
    inference: Inference = "trained",
) -> TopSamples:
    """The strongest samples of every latent and the distribution of its activations, in one pass over a store.

    With a run folder they are kept in it, and used again for the same store, SAE, inference and at most as large an n.

    Raises:
        ConfigError: n is below 1.
        StoreError: The store does not fit the SAE or has no rows of `modality`.
    """
    check_n(n)
    folder, model, store = run_folder(sae), as_sae(sae), as_store(on, modality)
    check_fit(model, store, run=sae)
    origin = Origin(
        store=str(store.path),
        fingerprint=store.fingerprint,
        sae=weights_hash(model),
        modality=modality,
        inference=inference,
        standardized_by="run" if modality in model.standardizer else "store",
    )
    cache = None if folder is None else folder / SAMPLES_FOLDER
    known = None if cache is None else TopSamples.cached(cache, origin, n=n)
    if known is not None:
        return known
    miner = SampleMiner(model.d_sae, n=n, levels=levels_of(model))
    with progress(f"mining {modality} rows", total=len(store), unit="rows") as advance:
        for z in activations(model, store, modality, inference=inference):
            miner.add(z)
            advance(len(z))
    samples = miner.finish(origin, store.ids)
    if cache is not None:
        samples.save(cache)
    return samples


def activations(
    sae: SAE,
    store: EmbeddingStore,
    modality: Modality,
    *,
    inference: Inference = "trained",
    k: int | None = None,
    rows: NDArray[np.int64] | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Activations of all rows of a store in order, or of the given `rows`, block by block.

    The blocks are the same whoever asks, because float32 products differ in their last bit with the shape of a block.
    """
    size = block_rows(sae.d_sae)
    if rows is None:
        batches = store.batches(modality, size)
    else:
        batches = (store.take(rows[first : first + size], modality) for first in range(0, len(rows), size))
    standardizer = standardizer_for(sae, store, modality)
    mode: Inference = "topk" if k is not None else inference
    for batch in batches:
        x = torch.from_numpy(batch).to(sae.W_dec.device)
        with torch.no_grad():
            z = sae.activate(sae.pre_activations(standardizer.apply(x, modality)), inference=mode, k=k)
        yield z.cpu().numpy()


def standardizer_for(sae: SAE, store: EmbeddingStore, modality: Modality) -> Standardizer:
    """The SAE's own, with the statistics of a modality that it does not know fitted on the store."""
    if modality in sae.standardizer:
        return sae.standardizer
    return sae.standardizer.with_statistics(modality, fit_statistics(partial(_rows, store, modality)))


def _rows(store: EmbeddingStore, modality: Modality) -> Iterator[Tensor]:
    return (torch.from_numpy(batch) for batch in store.batches(modality, 8192))


def levels_of(sae: SAE) -> tuple[int, ...]:
    """The SAE's levels; for kinds without any, those that a Matryoshka SAE of its width would have."""
    return sae.config.levels or default_levels(sae.d_sae)


def check_n(n: int) -> None:
    if n < 1:
        raise ConfigError(f"n is {n}; give --n of at least 1, for example --n 16")
