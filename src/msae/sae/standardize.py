"""Standardisation: one mean and one scale per modality, so that images and texts meet at one origin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from msae.base.errors import ConfigError, StoreError

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)


@dataclass(frozen=True)
class Statistics:
    """What standardises one modality: `(x - mean) * scale`."""

    mean: Float[Tensor, " d_in"]
    scale: float
    """Makes the mean norm of the centred rows sqrt(d_in); in one over the units of `x`."""


@dataclass(frozen=True)
class Standardizer:
    """Statistics by modality. Saved inside the SAE that was trained on what it gave."""

    statistics: Mapping[Modality, Statistics] = field(default_factory=dict)

    def __contains__(self, modality: Modality) -> bool:
        return modality in self.statistics

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return tuple(self.statistics)

    def apply(self, x: Float[Tensor, "n d_in"], modality: Modality) -> Float[Tensor, "n d_in"]:
        """Standardised rows of raw embeddings."""
        known = self._of(modality)
        return (x - known.mean.to(x.device)) * known.scale

    def invert(self, x: Float[Tensor, "n d_in"], modality: Modality) -> Float[Tensor, "n d_in"]:
        """Raw embeddings of standardised rows."""
        known = self._of(modality)
        return x / known.scale + known.mean.to(x.device)

    def with_statistics(self, modality: Modality, statistics: Statistics) -> Standardizer:
        """A copy that also knows `modality`."""
        return Standardizer({**self.statistics, modality: statistics})

    def to(self, device: str | torch.device) -> Standardizer:
        """A copy with its means on the device."""
        known = self.statistics.items()
        return Standardizer({one: Statistics(its.mean.to(device), its.scale) for one, its in known})

    def _of(self, modality: Modality) -> Statistics:
        if modality not in self.statistics:
            known = " and ".join(self.statistics) or "none"
            raise ConfigError(
                f"no {modality} statistics here (known: {known}); train on a store that holds {modality} "
                f"embeddings, or pass --modality {next(iter(self.statistics), 'image')}"
            )
        return self.statistics[modality]


def fit_statistics(batches: Callable[[], Iterable[Float[Tensor, "n d_in"]]]) -> Statistics:
    """Mean of all rows, and the scale that makes the mean norm of the centred rows sqrt(d_in).

    Args:
        batches: Gives a fresh iterator over the rows each time; it is read twice, summed in float64.

    Raises:
        StoreError: There are no rows, or all rows are equal.

    Source: Zaigrajew et al. 2025; the released code forgets the square root in the scale.
    """
    n_rows = 0
    total: Tensor | None = None
    for x in batches():
        rows = x.double().sum(0)
        total = rows if total is None else total + rows
        n_rows += len(x)
    if total is None or n_rows == 0:
        raise StoreError("there are no rows to take a mean of; give a store with at least two different rows")
    mean = total / n_rows
    norms = sum(float((x.double() - mean).norm(dim=1).sum()) for x in batches()) / n_rows
    if norms < 1e-12:
        raise StoreError(f"all {n_rows} rows are the same vector; give a store with at least two different rows")
    return Statistics(mean.float(), math.sqrt(len(mean)) / norms)
