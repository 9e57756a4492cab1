"""`activations`: how strongly latents fire in some rows of a store, as a table with names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from msae.base.errors import ConfigError, StoreError
from msae.base.results import Result, shorten, text_table
from msae.concepts.concept import latents_of
from msae.concepts.names import ConceptNames, as_names, names_of
from msae.data.rows import Row
from msae.data.store import EmbeddingStore
from msae.sae.model import Inference
from msae.sae.run import RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

FIRST_ROWS = 10
"""Rows that are read where none are asked for."""
PRINTED = 4
"""Latents beside the id and the words: a terminal shows six columns."""


@dataclass(frozen=True, eq=False, repr=False)
class Activations(Result):
    """The activations of some latents in some rows of a store."""

    store: str
    modality: Modality
    inference: Inference
    rows: tuple[Row, ...]
    latents: tuple[int, ...]
    names: tuple[str | None, ...]
    """Of the latents; None for those without a name."""
    values: Float32[np.ndarray, "rows latents"]
    shown: tuple[str | None, ...] = ()
    """The names as people are shown them, as `Concept.shown` says."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What the columns are called: `red #12`, or `#12` where the latent has no name."""
        return _labels(self.names, self.latents)

    @property
    def headline(self) -> str:
        return (
            f"activations of {len(self.latents):,} latents in {len(self.rows):,} {self.modality} rows of {self.store}, "
            f"inference {self.inference}"
        )

    def records(self) -> list[dict[str, Any]]:
        """A record for each row: its number, its id, and a column for each latent."""
        return [
            {"row": row.row, "id": row.id, **dict(zip(self.labels, values, strict=True))}
            for row, values in zip(self.rows, self.values.tolist(), strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "store": self.store,
            "modality": self.modality,
            "inference": self.inference,
            "latents": [{"latent": i, "name": name} for i, name in zip(self.latents, self.names, strict=True)],
            "rows": [
                {"row": row.row, "id": row.id, "activations": values}
                for row, values in zip(self.rows, self.values.tolist(), strict=True)
            ],
        }

    def to_text(self) -> str:
        """A table of the first latents, and how many more there are."""
        head = [
            "id",
            *(shorten(label, 32) for label in _labels(self.shown or self.names, self.latents)[:PRINTED]),
            "words",
        ]
        cells = [
            [
                shorten(row.id),
                *(f"{value:.3f}" for value in values[:PRINTED]),
                row.words.removeprefix(row.id).removeprefix(" · "),
            ]
            for row, values in zip(self.rows, self.values.tolist(), strict=True)
        ]
        lines = [self.headline, "", *text_table(head, [[*row[:-1], shorten(row[-1], 60)] for row in cells],
                                                right=range(1, len(head) - 1))]  # fmt: skip
        n_more = len(self.latents) - PRINTED
        return "\n".join([*lines, *([f"{n_more:,} more latents; to_pandas() has all"] if n_more > 0 else [])])


def _labels(names: Sequence[str | None], latents: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{name} #{i}" if name else f"#{i}" for name, i in zip(names, latents, strict=True))


def activations(
    sae: RunLike,
    on: EmbeddingStore | str | Path,
    *,
    rows: Iterable[int | str] | None = None,
    concept: str | Sequence[str] = (),
    n: int = 10,
    modality: Modality | None = None,
    inference: Inference = "trained",
    names: ConceptNames | str | Path | None = None,
    show: str | Sequence[str] = (),
    device: str = "auto",
) -> Activations:
    """How strongly latents fire in some rows of a store, as a table with names.

    Args:
        sae: A run folder, or a Hugging Face repository that holds an SAE.
        on: The store that has the rows.
        rows: Their numbers or ids. Without it, the first ten.
        concept: Names, latents as #12, or several joined by |; each latent is a column. Without it, the `n` latents
            that fire most strongly in these rows.
        n: How many latents where no `concept` is given; those that fire in none of the rows are left out.
        modality: Which embeddings of the store. Without it, images where it has them.
        inference: How activations are made: `trained` uses the activation function of the SAE, `threshold` keeps those
            above the thresholds fitted after training, `relu` keeps every positive one.
        names: The names.json to use. Without it, the run's, if there is one.
        show: Columns of the metadata to print beside the captions.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: No such concept, or n below 1.
        StoreError: The store does not fit the SAE, or has no such row or modality.
    """
    if n < 1:
        raise ConfigError(f"n is {n}; give at least 1, for example n=10")
    view = View(sae, on, modality, inference=inference, device=device)
    store, d_sae = view.store, view.sae.d_sae
    known = as_names(names) if names is not None else names_of(view.run, store)
    numbers = _numbers(store, range(min(FIRST_ROWS, len(store))) if rows is None else rows)
    asked = [concept] if isinstance(concept, str) else list(concept)
    if asked:
        latents = list(dict.fromkeys(latent for one in asked for latent in latents_of(one, known, d_sae)))
        values = view.table(numbers, latents)
    else:
        every = view.table(numbers)
        total = every.sum(0, dtype=np.float64)
        latents = [latent for latent in np.argsort(-total, kind="stable")[:n].tolist() if total[latent] > 0]
        values = every[:, latents]
    return Activations(
        store=store.address,
        modality=view.modality,
        inference=inference,
        rows=tuple(store.describe_rows(numbers, show=show)),
        latents=tuple(latents),
        names=tuple(None if known is None else known.name_of(latent) for latent in latents),
        shown=tuple(None if known is None else known.shown(latent) for latent in latents),
        values=values,
    )


def _numbers(store: EmbeddingStore, rows: Iterable[int | str]) -> NDArray[np.int64]:
    """The numbers of rows that are given by number, counted from the end where negative, or by id."""
    found = []
    for row in [rows] if isinstance(rows, int | str) else rows:
        if isinstance(row, str):
            found.append(store.ids.row_of(row))
        elif isinstance(row, bool | np.bool_) or not isinstance(row, int | np.integer):
            raise ConfigError(f"row {row!r} is neither a number nor an id; give for example rows=range(10)")
        elif -len(store) <= row < len(store):
            found.append(row % len(store))
        else:
            raise StoreError(f"there is no row {row}: {store.address} has the rows 0 to {len(store) - 1}")
    return np.array(found, dtype=np.int64)
