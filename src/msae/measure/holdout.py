"""Rows to train a classifier on and rows to evaluate it on, with no embedding in both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from msae.data.store import EmbeddingStore, Modality

ROWS_AT_ONCE = 8192


class HoldOut(NamedTuple):
    """Rows of two stores that share no embedding."""

    train: Int64[np.ndarray, " n"]
    """Rows of the training store, ascending."""
    on: Int64[np.ndarray, " m"]
    """Rows of the evaluated store, ascending."""
    note: str | None
    """What was held out; None where the stores shared nothing."""


def hold_out(
    train: EmbeddingStore,
    on: EmbeddingStore,
    modality: Modality,
    *,
    train_rows: Int64[np.ndarray, " n"],
    on_rows: Int64[np.ndarray, " m"],
    seed: int,
) -> HoldOut:
    """`train_rows` and `on_rows` without what both contain: a random half of that trains, the other half is evaluated.

    Rows are the same where their embeddings are equal, whatever their ids: a classifier has seen the embedding, not
    the id. Where one store holds float16, both are compared as float16.
    """
    dtypes = {store.rows[modality].dtype for store in (train, on)}
    dtype = np.float16 if "float16" in dtypes else np.float32
    theirs = _keys(train, modality, train_rows, dtype)
    mine = theirs
    if train is not on or not np.array_equal(train_rows, on_rows):
        mine = _keys(on, modality, on_rows, dtype)
    is_trained_on = np.isin(mine, theirs)
    if not is_trained_on.any():
        return HoldOut(train_rows, on_rows, None)
    shared, first = np.unique(mine[is_trained_on], return_index=True)
    shuffled = np.random.default_rng(seed).permutation(shared[np.argsort(first)])  # equal rows stay together
    kept = train_rows[~np.isin(theirs, shuffled[1::2])], on_rows[~np.isin(mine, shuffled[::2])]
    note = (
        f"{int(is_trained_on.sum()):,} of the {len(on_rows):,} rows to evaluate in {on.path} are also training rows of "
        f"the classifier in {train.path}: a random half of them (seed {seed}) is used for training alone, the other "
        f"for evaluation alone, which leaves {len(kept[0]):,} and {len(kept[1]):,} rows"
    )
    return HoldOut(*kept, note)


def _keys(
    store: EmbeddingStore, modality: Modality, rows: Int64[np.ndarray, " n"], dtype: type[np.floating]
) -> Int64[np.ndarray, " n"]:
    """A hash of each row; equal rows have equal ones."""
    found = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        x = store.take(rows[start : start + ROWS_AT_ONCE], modality)
        with np.errstate(over="ignore"):
            x = x.astype(dtype) + dtype(0)  # -0 becomes 0
        found[start : start + len(x)] = [hash(row.tobytes()) for row in x]
    return found
