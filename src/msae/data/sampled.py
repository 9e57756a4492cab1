"""`--max-rows`: a random sample of a store's rows, which every command reads as it reads a store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int64

from msae.base.errors import ConfigError, StoreError
from msae.data.arrays import Refuse, ShardedRows
from msae.data.contents import Embeddings
from msae.data.layout import Modality
from msae.data.rows import Row
from msae.data.store import ID_COLUMNS, EmbeddingStore, RowIds
from msae.data.tables import Metadata


@dataclass(frozen=True, eq=False)
class SampledRows(ShardedRows):
    """Some rows of an array, read as if there were no others."""

    chosen: Int64[np.ndarray, " n"]
    """Their numbers, ascending."""

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: Int64[np.ndarray, " n"], refuse: Refuse) -> Float32[np.ndarray, "n d_in"]:
        return super().take(self.chosen[rows], refuse)

    def between(self, start: int, stop: int, refuse: Refuse) -> Float32[np.ndarray, "n d_in"]:
        return super().take(self.chosen[start:stop], refuse)


@dataclass(frozen=True, eq=False, repr=False)
class SampledStore(EmbeddingStore):
    """A random sample of the rows of a store. Rows keep their ids, and `describe_rows` gives their own numbers."""

    of: EmbeddingStore
    chosen: Int64[np.ndarray, " n"]
    """Numbers of the rows in `of`, ascending."""
    seed: int

    def __repr__(self) -> str:
        return f"SampledStore({self.note} of {self.of!r})"

    @property
    def note(self) -> str:
        return f"a random sample of {len(self):,} of {len(self.of):,} rows (seed {self.seed})"

    @property
    def said(self) -> str:
        return f"{self.note} of {self.address}, of which a larger --max-rows reads more,"

    @cached_property
    def ids(self) -> RowIds:
        import pyarrow as pa

        if any(name in self.columns for name in ID_COLUMNS):
            return super().ids
        return RowIds(self, Metadata.of(pa.table({"id": pa.array(map(str, self.chosen.tolist()), pa.string())})))

    @cached_property
    def fingerprint(self) -> str:
        """That of the store, with which rows were drawn."""
        drawn = self.of.fingerprint.encode() + self.chosen.astype("<i8").tobytes()
        return hashlib.blake2b(drawn, digest_size=20).hexdigest()

    def describe_rows(
        self, rows: Int64[np.ndarray, " n"] | Sequence[int], *, show: str | Sequence[str] = ()
    ) -> list[Row]:
        found = super().describe_rows(rows, show=show)
        return [replace(row, row=int(self.chosen[row.row])) for row in found]

    def _not_finite(self, modality: Modality, row: int) -> StoreError:
        return self.of._not_finite(modality, row)


def sample_rows(store: EmbeddingStore, max_rows: int | None, *, seed: int = 0) -> EmbeddingStore:
    """The store, or where it has more than `max_rows`, a random sample of so many of its rows.

    Raises:
        ConfigError: `max_rows` is below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"max_rows is {max_rows}; give --max-rows at least 1, for example 100000")
    if max_rows is None or len(store) <= max_rows:
        return store
    chosen = np.sort(np.random.default_rng(seed).choice(len(store), max_rows, replace=False))
    if isinstance(store, SampledStore):  # a sample of a sample is one of the store
        chosen = store.chosen[chosen]
        store = store.of
    given = {field.name: getattr(store, field.name) for field in fields(EmbeddingStore)}
    given |= {
        "rows": Embeddings(store.address, {m: SampledRows(array.shards, chosen) for m, array in store.rows.items()}),
        "_metadata": store._metadata.at(chosen),
    }
    return SampledStore(**given, of=store, chosen=chosen, seed=seed)


def notes_on(*stores: EmbeddingStore) -> tuple[str, ...]:
    """A line about each store that is a sample."""
    return tuple(f"{store.path.name}: {store.note}" for store in stores if isinstance(store, SampledStore))


def whole(store: EmbeddingStore) -> EmbeddingStore:
    """The store that a sample was drawn from, or the store itself."""
    return store.of if isinstance(store, SampledStore) else store
