"""`TrainingRows`: the images, the texts or both of one or several stores, and which of them a step draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from msae.base.errors import StoreError
from msae.data.embedder import encoder_text, is_other_encoder
from msae.data.store import EmbeddingStore, as_store
from msae.sae.standardize import MODALITIES, Modality
from msae.sae.train.blocks import block_batches, whole

TrainedOn = Literal["image", "text", "both"]
StoreLike: TypeAlias = EmbeddingStore | str | Path
RowNumbers: TypeAlias = NDArray[np.int64]


class Joined:
    """The rows of one modality of several stores, one store after another, read like one store."""

    def __init__(self, stores: Sequence[EmbeddingStore]) -> None:
        self.stores = tuple(stores)
        self._starts = np.cumsum([0, *map(len, stores)])

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    def take(self, rows: RowNumbers, modality: Modality) -> Float32[np.ndarray, "n d_in"]:
        """The embeddings of `rows`, in their order."""
        x = np.empty((len(rows), self.stores[0].d_in), np.float32)
        for store, start in zip(self.stores, self._starts, strict=False):
            here = (rows >= start) & (rows < start + len(store))
            x[here] = store.take(rows[here] - start, modality)
        return x

    @property
    def d_in(self) -> int:
        return self.stores[0].d_in

    def between(self, start: int, stop: int, modality: Modality) -> Float32[np.ndarray, "n d_in"]:
        """The embeddings from row `start` up to `stop`, or up to the last."""
        pieces = []
        for store, begin in zip(self.stores, self._starts.tolist(), strict=False):
            first, last = max(start - begin, 0), min(stop - begin, len(store))
            if first < last:
                pieces.append(store.between(first, last, modality))
        return np.concatenate(pieces)

    def batches(self, modality: Modality, batch_size: int) -> Iterator[Float32[np.ndarray, "n d_in"]]:
        """All rows in order, at most `batch_size` at a time."""
        for store in self.stores:
            yield from store.batches(modality, batch_size)


class TrainingRows:
    """What an SAE is trained on. Statistics and thresholds are fitted for every modality that the stores hold."""

    def __init__(self, stores: StoreLike | Sequence[StoreLike], modality: TrainedOn) -> None:
        """See the class.

        Args:
            stores: Each adds its rows. For `both` it may have images, texts or both.
            modality: What is trained on.

        Raises:
            StoreError: There is no store, one cannot be opened, lacks the modality or does not fit the first, or there
                are no images or no texts for `both`.
        """
        given = [stores] if isinstance(stores, EmbeddingStore | str | Path) else list(stores)
        if not given:
            raise StoreError("there is no store to train on; give at least one")
        self.modality: TrainedOn = modality
        self.trained: tuple[Modality, ...] = MODALITIES if modality == "both" else (modality,)
        self.stores = tuple(as_store(one, None if modality == "both" else modality) for one in given)
        for store in self.stores[1:]:
            _check_same_space(self.stores[0], store)
        self.parts: dict[Modality, EmbeddingStore | Joined] = {}
        for one in MODALITIES:
            having = [store for store in self.stores if one in store.modalities]
            if having:
                self.parts[one] = having[0] if len(having) == 1 else Joined(having)
            elif modality == "both":
                paths = ", ".join(store.address for store in self.stores)
                other = "image" if one == "text" else "text"
                raise StoreError(
                    f"--modality both needs images and texts, but there are no {one} embeddings in {paths}; give "
                    f"another STORE that holds {one}s beside (a .npy does if a word of its name is {one}, such as "
                    f"my-{one}.npy), or --modality {other}"
                )
        paired = [store for store in self.stores if store.modalities == MODALITIES]
        self.pairs = Joined(paired) if paired else None
        """The rows that have an image and a text."""

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.trained) * max(len(self.parts[one]) for one in self.trained)

    @property
    def address(self) -> str:
        """Of the first store."""
        return self.stores[0].address

    @property
    def d_in(self) -> int:
        return self.stores[0].d_in

    @property
    def encoder(self) -> tuple[str | None, str | None]:
        """Id and revision of the model that made the embeddings, where a store says so."""
        known = [(store.encoder, store.encoder_revision) for store in self.stores if store.encoder]
        return known[0] if known else (None, None)

    @property
    def n_rows(self) -> int:
        """Rows that there are, each counted once."""
        return sum(len(self.parts[one]) for one in self.trained)

    def drawn(self, batch_size: int, *, seed: int, epoch: int) -> list[Mapping[Modality, RowNumbers]]:
        """Row numbers of each batch of an epoch, by modality; a function of seed and epoch alone.

        For `both`, half of each batch are images. An epoch draws every row of the modality that has more once, and as
        many of the other, whose rows come again in a new order once all were drawn.
        """
        if len(self.trained) == 1:
            batches = shuffled_batches(len(self), batch_size, seed=seed, epoch=epoch)
            return [{self.trained[0]: rows} for rows in batches]
        half, n_drawn = batch_size // 2, len(self) // 2
        by_modality = []
        for number, one in enumerate(self.trained):
            rng, n = np.random.default_rng([seed, epoch, number]), len(self.parts[one])
            order = np.concatenate([rng.permutation(n) for _ in range(math.ceil(n_drawn / n))])[:n_drawn]
            by_modality.append(_batches_of(order, half))
        return [dict(zip(self.trained, rows, strict=True)) for rows in zip(*by_modality, strict=True)]

    @property
    def n_bytes(self) -> int:
        """Size of all embeddings that are trained on, as they are stored."""
        arrays = [array for store in self.stores for one, array in store.rows.items() if one in self.trained]
        return sum(array.n_bytes for array in arrays)

    def in_blocks(
        self, batch_size: int, *, block_rows: int, seed: int, first_step: int, share: Callable[[int], slice] = whole
    ) -> Iterator[Mapping[Modality, Float32[np.ndarray, "n d_in"]]]:
        """The embeddings of each batch from a step on, without end, blocks of rows being shuffled; for a store that is
        larger than memory.

        Args:
            share: The rows of a batch, given how many there are, that this process trains on.
        """
        n_batches = len(self) // batch_size
        streams = [
            block_batches(
                self.parts[one], (one,), batch_size // len(self.trained), block_rows=block_rows, n_batches=n_batches,
                seed=[seed, number], first=first_step, share=share,
            )
            for number, one in enumerate(self.trained)
        ]  # fmt: skip
        for batch in zip(*streams, strict=True):
            yield {one: rows for one, (rows,) in zip(self.trained, batch, strict=True)}

    def pairs_in_blocks(
        self, size: int, *, block_rows: int, seed: int, first_step: int, share: Callable[[int], slice] = whole
    ) -> Iterator[list[Float32[np.ndarray, "n d_in"]]]:
        """Images and texts of at most `size` pairs for each step from `first_step` on, as `in_blocks` reads rows."""
        assert self.pairs is not None
        size = min(size, len(self.pairs))
        return block_batches(
            self.pairs, MODALITIES, size, block_rows=block_rows, n_batches=len(self.pairs) // size,
            seed=[seed, len(MODALITIES)], first=first_step, share=share,
        )  # fmt: skip

    def drawn_pairs(self, size: int, *, seed: int, step: int) -> RowNumbers:
        """Row numbers of at most `size` pairs for a step; a function of seed and step alone."""
        assert self.pairs is not None
        rng = np.random.default_rng([seed, step, len(MODALITIES)])
        return np.sort(rng.choice(len(self.pairs), min(size, len(self.pairs)), replace=False))


def shuffled_batches(n_rows: int, batch_size: int, *, seed: int, epoch: int) -> list[RowNumbers]:
    """Row numbers of each batch of an epoch, a function of seed and epoch alone; a short last batch is left out.

    Each batch is sorted, so that a memory map is read in one direction; the sum over a batch has no order.
    """
    return _batches_of(np.random.default_rng([seed, epoch]).permutation(n_rows), batch_size)


def _batches_of(order: RowNumbers, size: int) -> list[RowNumbers]:
    return list(np.sort(order[: len(order) // size * size].reshape(-1, size), axis=1))


def _check_same_space(first: EmbeddingStore, other: EmbeddingStore) -> None:
    """Refuse two stores whose embeddings are not of one model; raises `StoreError`."""
    mine, theirs = (first.encoder, first.encoder_revision), (other.encoder, other.encoder_revision)
    if other.d_in != first.d_in:
        raise StoreError(
            f"{other.path} holds {other.d_in}-dim embeddings, {first.path} {first.d_in}-dim ones; "
            "give stores of one model"
        )
    if is_other_encoder(mine, theirs):
        raise StoreError(
            f"{other.path} was embedded by {encoder_text(theirs)}, {first.path} by {encoder_text(mine)}; "
            f"give stores of one model"
        )
