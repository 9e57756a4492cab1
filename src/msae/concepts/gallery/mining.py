"""The pass over a store from which galleries are made."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from msae.base.errors import ConfigError
from msae.concepts.samples import Origin, SampleMiner, TopSamples
from msae.data.store import EmbeddingStore
from msae.sae.losses import default_levels
from msae.sae.model import SAE, Inference
from msae.sae.run import RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

SAMPLES_FOLDER = "samples"
"""The kind of derived files that mined samples are; see `Run.caches`."""

_log = logging.getLogger(__name__)


def top_samples(
    sae: RunLike,
    on: EmbeddingStore | str | Path,
    *,
    modality: Modality = "image",
    n: int = 16,
    inference: Inference = "trained",
    device: str = "auto",
) -> TopSamples:
    """The strongest samples of every latent and the distribution of its activations, in one pass over a store.

    With a run folder they are kept in it or, where it cannot be written, in the user's cache folder. They are used
    again for the same rows, SAE, inference and at most as large an n.

    Raises:
        ConfigError: n is below 1.
        StoreError: The store does not fit the SAE or has no rows of `modality`.
    """
    check_n(n)
    view = View(sae, on, modality, inference=inference, device=device)
    run, store = view.run, view.store
    origin = Origin(
        **asdict(run.origin(store)), modality=modality, inference=inference, standardized_by=view.standardized_by
    )
    known = TopSamples.cached(run.caches(SAMPLES_FOLDER), origin, n=n)
    if known is not None and known.origin == origin:
        return known
    if known is not None:
        samples = known.with_origin(origin, store.ids)
    else:
        miner = SampleMiner(view.sae.d_sae, n=n, levels=levels_of(view.sae))
        for z in view.activations(title=f"mining {modality} rows"):
            miner.add(z.cpu().numpy())
        samples = miner.finish(origin, store.ids)
    place = run.writable_cache(SAMPLES_FOLDER)
    if place is not None:
        try:
            samples.save(place)
        except OSError as err:
            _log.warning("samples are not kept in %s: %s", place, err)
    return samples


def levels_of(sae: SAE) -> tuple[int, ...]:
    """The SAE's levels; for kinds without any, those that a Matryoshka SAE of its width would have."""
    return sae.config.levels or default_levels(sae.d_sae)


def check_n(n: int) -> None:
    """Refuse a number of samples below 1."""
    if n < 1:
        raise ConfigError(f"n is {n}; give --n of at least 1, for example --n 16")
