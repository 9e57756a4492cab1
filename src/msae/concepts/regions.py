"""`Region`: where in a picture a latent or a concept finds what makes it fire.

docs/regions.md says how it is computed, what else was tried, and how often it is right.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from numpy.typing import NDArray
from torch import Tensor

from msae.base.errors import ConfigError, SourceError
from msae.concepts.concept import ConceptSet
from msae.data.embedder import Embedder, ValuesOf, embedder_for
from msae.data.images import read_picture
from msae.data.rows import PATH_COLUMNS, Row, find_picture
from msae.data.store import EmbeddingStore
from msae.sae.view import View

if TYPE_CHECKING:
    from PIL.Image import Image

SHARE = 0.5
"""The region is the fewest patches that hold this share of what counts for the concept."""
NEIGHBOURS = np.outer([1, 2, 1], [1, 2, 1]) / 16
"""What a patch and those around it count for its place."""
WIDE = 0.35
"""A region of more of the patches than this is nowhere in particular."""
BATCH = 16
"""Pictures that go through the encoder at once."""
REMEMBERED = 10_000
"""Regions that a `Locator` keeps."""
_PLACES = (("upper left", "top", "upper right"), ("left", "middle", "right"), ("lower left", "bottom", "lower right"))


class Concept(Protocol):
    """Latents and what each adds to their strength; a `LatentGroup` is one."""

    @property
    def latents(self) -> tuple[int, ...]: ...
    @property
    def reader(self) -> Float[Tensor, " g"]: ...


class OneLatent(NamedTuple):
    """A latent alone."""

    latent: int

    @property
    def latents(self) -> tuple[int, ...]:
        return (self.latent,)

    @property
    def reader(self) -> Float[Tensor, " 1"]:
        return torch.ones(1)


@dataclass(frozen=True, eq=False)
class Region:
    """Where in one picture a concept finds what makes it fire."""

    patches: Float32[np.ndarray, "rows columns"]
    """What each patch adds to the strength, in its units, to first order; what is below zero speaks against it."""
    seen: tuple[float, float, float, float]
    """The part of the picture that the patches cover: left, top, right and bottom, as shares of its sides."""
    size: tuple[int, int]
    """Width and height of the picture."""

    @cached_property
    def smooth(self) -> Float[np.ndarray, "rows columns"]:
        """Means of each patch and its neighbours, which count a half, at the corners a quarter: one alone is noisy."""
        from scipy.ndimage import convolve

        found: Float[np.ndarray, "rows columns"] = convolve(self.patches, NEIGHBOURS, mode="nearest")
        return found

    @cached_property
    def inside(self) -> Bool[np.ndarray, "rows columns"]:
        """The fewest patches that hold half of what speaks for the concept."""
        positive = np.maximum(self.smooth, 0).ravel()
        order = np.argsort(-positive, kind="stable")
        held = np.cumsum(positive[order]) - positive[order]  # before each patch is counted
        inside = np.zeros(positive.size, bool)
        inside[order[held < SHARE * positive.sum()]] = True
        return inside.reshape(self.patches.shape)

    @property
    def strongest(self) -> tuple[float, float]:
        """The middle of the strongest patch, in pixels from the upper left corner."""
        row, column = np.unravel_index(int(self.smooth.argmax()), self.patches.shape)
        xs, ys = self.edges
        return float(xs[column : column + 2].mean()), float(ys[row : row + 2].mean())

    @property
    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where columns and rows of patches begin and end, in pixels."""
        (left, top, right, bottom), (width, height) = self.seen, self.size
        rows, columns = self.patches.shape
        return np.linspace(left, right, columns + 1) * width, np.linspace(top, bottom, rows + 1) * height

    @property
    def words(self) -> str:
        """Where the region is, for people: `upper left`, for example."""
        share = self.inside.mean()
        if not share:
            return "nowhere"
        if share > WIDE:
            return "all over the picture"
        thirds = [
            np.clip(3 * (edges[:-1] + edges[1:]) / 2 / side, 0, 2).astype(int)
            for edges, side in zip(self.edges, self.size, strict=True)
        ]
        held = np.zeros((3, 3))
        np.add.at(held, np.ix_(thirds[1], thirds[0]), self.smooth * self.inside)
        down, across = np.unravel_index(int(held.argmax()), held.shape)
        return _PLACES[down][across]

    def to_json(self) -> dict[str, Any]:
        return {"where": self.words, "patches": self.patches.tolist(), "seen": list(self.seen)}


class Locator:
    """Finds regions in the pictures of a store, and remembers them."""

    def __init__(self, view: View, embedder: Embedder | None = None, *, local: bool = False) -> None:
        """See the class.

        Args:
            view: The SAE on the images of a store.
            embedder: The model that made the store's embeddings; without it, the one that store and SAE record.
            local: Take hub models from this machine's cache alone.

        Raises:
            ConfigError: The store lists no pictures, or neither it nor the SAE says which model made its embeddings.
            MsaeError: The model is not here, or its weights are others now.
        """
        check_pictures(view.store)
        self.view = view
        self.embedder = embedder or embedder_for(
            view.store, view.sae.config, need="a region", device=str(view.device), local=local
        )
        self._known: dict[tuple[int, tuple[int, ...]], Region | None] = {}
        self._lock = threading.Lock()

    def regions(self, rows: Sequence[int], concept: Concept) -> list[Region | None]:
        """The concept's regions in the pictures of some rows; None where a picture cannot be read."""
        with self._lock:
            if len(self._known) > REMEMBERED:
                self._known.clear()
            unknown = [row for row in dict.fromkeys(rows) if (row, concept.latents) not in self._known]
            for first in range(0, len(unknown), BATCH):
                self._find(unknown[first : first + BATCH], concept)
            return [self._known[row, concept.latents] for row in rows]

    def concept(self, latents: Sequence[int]) -> Concept:
        """Some latents as one concept, in the proportions that they have in the store."""
        if len(latents) == 1:
            return OneLatent(latents[0])
        return ConceptSet(self.view, None)["|".join(f"#{latent}" for latent in latents)]

    def _find(self, rows: Sequence[int], concept: Concept) -> None:
        store = self.view.store
        pictures = {row.row: picture for row in store.describe_rows(rows) if (picture := _picture(row, store))}
        found = regions_in(list(pictures.values()), self.view, self.embedder, [concept]) if pictures else []
        regions = dict(zip(pictures, found, strict=True))
        for row in rows:
            self._known[row, concept.latents] = regions[row][0] if row in regions else None


def check_pictures(store: EmbeddingStore) -> None:
    """Refuse a store without pictures; raises `ConfigError`."""
    if "image" not in store.modalities or not any(name in store.columns for name in PATH_COLUMNS):
        raise ConfigError(f"{store.address} lists no pictures, so there is nothing to show regions in")


def _picture(row: Row, store: EmbeddingStore) -> Image | None:
    file = find_picture(row.path, store.picture_roots)
    with suppress(SourceError):
        return None if file is None else read_picture(file).image
    return None


def regions_in(
    pictures: Sequence[Image], view: View, embedder: Embedder, concepts: Sequence[Concept]
) -> list[list[Region]]:
    """The regions of every concept in each of a few pictures, which go through the encoder together."""
    added = embedder.contributions(embedder.pixels(pictures), lambda x: strengths(view, x, concepts))
    return [
        [Region(patches, embedder.seen(*picture.size), picture.size) for patches in values]
        for picture, values in zip(pictures, added, strict=True)
    ]


def strengths(view: View, x: Float[Tensor, "n d_in"], concepts: Sequence[Concept]) -> ValuesOf:
    """The strengths of some concepts as a function of raw embeddings near `x` that has a gradient everywhere.

    Each is made of the pre-activations of those of its latents that fire in `x`, or of all where none does: of an
    activation alone there is no gradient below its threshold.
    """
    sae = view.sae
    scale = sae.scale_at(sae.active_latents(view.inference, view.k))
    chosen = sorted({latent for concept in concepts for latent in concept.latents})
    z = view.activate(view.standardize(x.to(view.device)), chosen)
    read = torch.zeros(len(x), len(chosen), len(concepts), device=view.device)
    for c, concept in enumerate(concepts):
        mine = [chosen.index(latent) for latent in concept.latents]
        fires = z[:, mine] > 0
        read[:, mine, c] = (fires | ~fires.any(1, keepdim=True)) * concept.reader.to(z)

    def values(x: Tensor) -> Tensor:
        standard = view.standardizer.apply(x.to(view.device), view.modality)
        h = torch.addmm(sae.b_enc[chosen], standard - sae.b_dec, sae.W_enc[:, chosen])
        return torch.einsum("nl,nlc->nc", h, read) * scale

    return values
