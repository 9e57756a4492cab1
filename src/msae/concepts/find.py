"""`find`: which latents go with the values of a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msae.base import statistics
from msae.base.errors import ConfigError
from msae.base.results import Result, shorten, text_table
from msae.concepts.names import names_of
from msae.data.parts import part_of
from msae.data.store import EmbeddingStore
from msae.sae.run import RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

MIN_ROWS = 10
"""Rows with a value, and rows with another, that a value needs."""
MAX_ENTRIES = 1 << 26
"""Activations held at once, 256 MB of them; more latents take another pass."""
MAX_VALUES = 200


class FoundLatent(NamedTuple):
    """A latent that fires more in rows with a value than in rows with another."""

    latent: int
    name: str | None
    auroc: float
    """Probability that a row with the value activates it more than a row with another."""
    low: float
    """Lower end of the 95 % interval of `auroc`; the best of many latents looks a little better than it is."""
    high: float
    fires_with: float
    """Share of the rows with the value in which it is active."""
    fires_without: float


@dataclass(frozen=True)
class FoundValue:
    """The latents that go with one value."""

    value: str
    n: int
    """Rows that have it."""
    latents: tuple[FoundLatent, ...]
    """The largest AUROC first."""


@dataclass(frozen=True, repr=False)
class Found(Result):
    """Which latents go with the values of a column."""

    store: str
    column: str
    modality: Modality
    n_rows: int
    """Rows with a value that were read."""
    values: tuple[FoundValue, ...]
    """The most frequent first."""
    too_few: int
    """Values left out because fewer than ten rows have them; none where one value was asked for."""
    of_rows: int = 0
    """Rows with a value; `n_rows` are a random sample of them where they are fewer."""

    def to_json(self) -> dict[str, Any]:
        values = [
            {"value": one.value, "n": one.n, "latents": [latent._asdict() for latent in one.latents]}
            for one in self.values
        ]
        return {
            "store": self.store, "column": self.column, "modality": self.modality, "n_rows": self.n_rows,
            "of_rows": self.of_rows, "values": values, "too_few": self.too_few,
        }  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        """One record for each value and latent."""
        return [{"value": one.value, "n": one.n, **latent._asdict()} for one in self.values for latent in one.latents]

    def to_text(self) -> str:
        """What `msae find` prints."""
        rows = [
            [
                shorten(one.value, 24) if place == 0 else "",
                f"#{latent.latent}",
                f"{latent.auroc:.2f} ({latent.low:.2f} to {latent.high:.2f})",
                f"{latent.fires_with:.0%}",
                f"{latent.fires_without:.0%}",
                shorten(latent.name or "-", 32),
            ]
            for one in self.values
            for place, latent in enumerate(one.latents)
        ]
        head = (self.column, "latent", "AUROC (95 % interval)", "fires with", "fires without", "name")
        lines = [f"latents that go with {self.column} in {self.n_rows:,} {self.modality} rows of {self.store}", ""]
        lines += text_table([shorten(head[0], 24), *head[1:]], rows, right=(3, 4))
        if self.n_rows < self.of_rows:
            lines.append(f"a random sample of {self.of_rows:,} rows; --max-rows reads more")
        if self.too_few:
            lines.append(f"left out: {self.too_few:,} values that fewer than {MIN_ROWS} rows have")
        if self.values:
            lines += ["", f"to use one at once: msae search ... --set '{self.column}:{self.values[0].value}=p99'"]
        return "\n".join(lines)


def find(
    sae: RunLike,
    on: EmbeddingStore | str | Path,
    column: str,
    *,
    value: str | None = None,
    n: int = 3,
    modality: Modality | None = None,
    max_rows: int = 20_000,
    device: str = "auto",
) -> Found:
    """The latents that fire more in rows with a value of a column than in rows with another, by AUROC.

    Args:
        sae: A run folder, or a Hugging Face repository that holds an SAE.
        on: The store whose rows are read.
        column: The column of the store's metadata.
        value: One value of it. Without it, every value that at least ten rows have.
        n: How many latents for each value.
        modality: Which embeddings of the store. Without it, images where it has them.
        max_rows: Read at most so many rows that have a value: of more, a random sample.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.

    Raises:
        StoreError: The store does not fit the SAE, or has no such column or value.
        ConfigError: No value has enough rows, n is below 1, or the column has more than 200 values.
    """
    if max_rows < 1:
        raise ConfigError(f"max_rows is {max_rows}; give --max-rows at least 1, for example 20000")
    if n < 1:
        raise ConfigError(f"n is {n}; give at least 1, for example --n 3")
    view = View(sae, on, modality, device=device)
    names = names_of(view.run, view.store)
    numbers, values = view.store.coded_labels(column, option="--column")
    if value is not None and value not in values:
        part_of(view.store, column, value)  # says which value is nearest
    known = np.flatnonzero(numbers >= 0)
    rows = np.sort(np.random.default_rng(0).permutation(known)[:max_rows])
    labels = np.array(values, dtype=object)[numbers[rows]]
    counts = Counter(labels.tolist())
    enough = [one for one, n_rows in counts.most_common() if MIN_ROWS <= n_rows <= len(rows) - MIN_ROWS]
    chosen = [one for one in enough if value in (None, one)]
    if not chosen:
        which = f"the value {value!r} of {column!r}" if value is not None else f"no value of {column!r}"
        raise ConfigError(f"{which} has not {MIN_ROWS} rows with it and {MIN_ROWS} with another; give another --column")
    if len(chosen) > MAX_VALUES:
        raise ConfigError(f"{column!r} has {len(chosen):,} values; at most {MAX_VALUES} are shown: give one --value")
    has = [np.flatnonzero(labels == one).tolist() for one in chosen]
    aurocs = np.concatenate([statistics.aurocs(z, has) for z in _tables(view, rows)])
    best = np.argsort(-aurocs, axis=0, kind="stable")[:n].T
    shown = np.unique(best)
    z = view.table(rows, shown.tolist())
    found = []
    for one, own, latents in zip(chosen, has, best, strict=True):
        columns = z[:, np.searchsorted(shown, latents)]
        is_own = np.zeros(len(rows), bool)
        is_own[own] = True
        ends = statistics.cliffs_delta_interval(columns, is_own, np.zeros(len(rows), np.int64))
        fires = columns > 0
        found.append(FoundValue(one, len(own), tuple(
            FoundLatent(
                latent=int(latent), name=names.shown(int(latent)) if names else None,
                auroc=float(aurocs[latent, chosen.index(one)]),
                low=float(ends.low[i] + 1) / 2, high=float(ends.high[i] + 1) / 2,
                fires_with=float(fires[is_own, i].mean()), fires_without=float(fires[~is_own, i].mean()),
            )
            for i, latent in enumerate(latents)
        )))  # fmt: skip
    too_few = sum(n_rows < MIN_ROWS for n_rows in counts.values()) if value is None else 0
    return Found(view.store.address, column, view.modality, len(rows), tuple(found), too_few, len(known))


def _tables(view: View, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The activations of the rows, some latents at a time."""
    width = max(1, MAX_ENTRIES // len(rows))
    for first in range(0, view.sae.d_sae, width):
        latents = range(first, min(first + width, view.sae.d_sae))
        yield view.table(rows, list(latents), title="comparing latents with the column")
