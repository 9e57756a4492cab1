"""The pairs of a store through an SAE: which latents serve images, texts or both, and whether a pair finds itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from msae.measure import metrics
from msae.sae.standardize import MODALITIES, Modality
from msae.sae.view import View

MAX_PAIRS = 4096
"""Pairs that latents and retrieval are judged on: all of a smaller store, random ones of a larger."""
MAX_ENTRIES = 2**26
"""Activations of these pairs that are held at once, 256 MB; of a very wide SAE there are fewer pairs."""
SERVES = 0.2
"""A latent serves both modalities where the one it fires in less often has at least this share of the other's rate."""


@dataclass(frozen=True)
class RowsFigures:
    """The figures of one modality's rows; the fields are those of `Evaluation`."""

    modality: Modality
    sparsity: float
    l0: float
    fvu: float | None
    fvu_per_sample: float | None
    cosine: float
    cknna: float | None
    dead: int
    untrained_fvu_per_sample: float | None


@dataclass(frozen=True)
class Recalls:
    """Share of the pairs whose other half is the nearest, or among the five nearest, by cosine."""

    image_to_text_r1: float
    image_to_text_r5: float
    text_to_image_r1: float
    text_to_image_r5: float


@dataclass(frozen=True)
class PairFigures:
    """What the activations of an SAE say of pairs."""

    share_both: float | None
    """Of the latents that fire, the share that serves images and texts alike; see `SERVES`."""
    in_common: float
    """Mean over pairs of the share of latents active in the image or in the text that are active in both."""
    in_common_with_others: float
    """The same of an image and the text of another pair: what chance gives."""
    retrieval: Recalls
    """By the cosine of activations."""


@dataclass(frozen=True)
class Pairs:
    """The figures of one SAE on the pairs of a store."""

    n: int
    """Pairs that `codes` and everything below it are measured on."""
    trained_on: str | None
    """image, text or both; None where the run does not say so."""
    rows: tuple[RowsFigures, ...]
    codes: PairFigures
    untrained: PairFigures
    """Of untrained weights, with as many active latents in either modality."""
    standardized: Recalls
    """By the cosine of standardised embeddings, which is what the SAE reads."""
    dense: Recalls
    """By the cosine of the raw embeddings, which is how they are usually searched."""
    image: tuple[int, ...]
    """Latents that fire for images, and for texts less than a fifth as often."""
    text: tuple[int, ...]
    both: tuple[int, ...]


class Judged(NamedTuple):
    codes: PairFigures
    serves: dict[str, tuple[int, ...]]
    """The latents of `image`, `text` and `both`."""


def pair_rows(view: View, *, seed: int) -> NDArray[np.int64]:
    """The pairs that are judged, ascending."""
    n = max(1, min(MAX_PAIRS, MAX_ENTRIES // view.sae.d_sae))
    if len(view) <= n:
        return np.arange(len(view))
    return np.sort(np.random.default_rng(seed).choice(len(view), n, replace=False))


@torch.no_grad()
def judge_pairs(views: dict[Modality, View], rows: NDArray[np.int64]) -> Judged:
    """What the activations of the views say of the pairs in `rows`."""
    images, texts = (torch.cat(list(views[modality].activations(rows=rows))) for modality in MODALITIES)
    serves = latents_by_modality((images != 0).double().mean(0), (texts != 0).double().mean(0))
    n_firing = sum(map(len, serves.values()))
    own, others = metrics.jaccard_of_pairs(images, texts)
    codes = PairFigures(len(serves["both"]) / n_firing if n_firing else None, own, others, recalls(images, texts))
    return Judged(codes, serves)


def latents_by_modality(
    image_rate: Float[Tensor, " d_sae"], text_rate: Float[Tensor, " d_sae"]
) -> dict[str, tuple[int, ...]]:
    """The latents that serve images, texts or both, by the share of rows in which they fire; see `SERVES`."""
    rarer, higher = torch.minimum(image_rate, text_rate), torch.maximum(image_rate, text_rate)
    is_both = (higher > 0) & (rarer >= SERVES * higher)
    masks = {"image": ~is_both & (image_rate > text_rate), "text": ~is_both & (text_rate > image_rate), "both": is_both}
    return {which: tuple(mask.nonzero()[:, 0].tolist()) for which, mask in masks.items()}


@torch.no_grad()
def embedding_recalls(views: dict[Modality, View], rows: NDArray[np.int64], *, standardized: bool) -> Recalls:
    """The retrieval by embeddings, standardised or as they are."""
    images, texts = (
        torch.cat(list(views[one].rows(rows) if standardized else views[one].raw(rows))) for one in MODALITIES
    )
    return recalls(images, texts)


def recalls(images: Float[Tensor, "n d"], texts: Float[Tensor, "n d"]) -> Recalls:
    """Share of the pairs that find their other half, by cosine, both ways."""
    images, texts = functional.normalize(images), functional.normalize(texts)
    ranks = [metrics.pair_ranks(images, texts), metrics.pair_ranks(texts, images)]
    return Recalls(*(float((rank < k).double().mean()) for rank in ranks for k in (1, 5)))
