"""The poster's magnitude analysis: how large the activations of one model are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msae.base.results import Result
from msae.concepts.gallery.mining import top_samples
from msae.concepts.samples import BINS_PER_OCTAVE, N_BINS, TopSamples, bin_edges, histogram_quantiles
from msae.data.store import EmbeddingStore, as_store
from msae.sae.model import Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality

_SHARES = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Magnitudes(NamedTuple):
    """How large activations are: the poster's two histograms of one model."""

    edges: NDArray[np.float64]
    nonzero: NDArray[np.int64]
    """Of all non-zero activations."""
    row_maxima: NDArray[np.int64]
    """Of each row's largest activation."""
    quantiles: Mapping[str, Mapping[str, float]]
    """p1, p10, p50, p90, p99 and max of both."""

    def to_json(self) -> dict[str, Any]:
        return {
            "edges": self.edges.tolist(),
            "nonzero": self.nonzero.tolist(),
            "row_maxima": self.row_maxima.tolist(),
            "quantiles": dict(self.quantiles),
        }


def magnitudes(samples: TopSamples, *, bins_per_octave: int = 4) -> Magnitudes:
    """Histograms of the non-zero activations and of each row's largest, over all latents.

    Args:
        bins_per_octave: 1, 2, 4, 8 or 16.
    """
    together = BINS_PER_OCTAVE // bins_per_octave
    both = np.stack([samples.histogram.sum(0), samples.row_maxima])
    largest = np.full(2, samples.maximum.max(), dtype=np.float32)
    values = histogram_quantiles(both, list(_SHARES.values()), largest)
    nonzero, row_maxima = both.reshape(2, N_BINS // together, together).sum(2)
    named = {
        name: dict(zip(_SHARES, row.tolist(), strict=True))
        for name, row in zip(("nonzero", "row_maxima"), values, strict=True)
    }
    return Magnitudes(bin_edges()[::together], nonzero, row_maxima, named)


@dataclass(frozen=True, repr=False)
class AllMagnitudes(Result):
    """The magnitudes of one model on the images and on the texts of a store."""

    by_modality: Mapping[Modality, Magnitudes]

    def to_json(self) -> dict[str, Any]:
        return {modality: found.to_json() for modality, found in self.by_modality.items()}

    @property
    def headline(self) -> str:
        medians = (f"{found.quantiles['nonzero']['p50']:.3f} of {m}s" for m, found in self.by_modality.items())
        return f"median activation {', '.join(medians)}"

    def records(self) -> list[dict[str, Any]]:
        """A record of quantiles for each modality and histogram."""
        return [
            {"modality": modality, "of": of, **quantiles}
            for modality, found in self.by_modality.items()
            for of, quantiles in found.quantiles.items()
        ]

    def to_text(self) -> str:
        """A table of the quantiles, with a line for each modality and histogram."""
        lines = [f"{'activations':<28}" + "".join(f"{share:>9}" for share in _SHARES)]
        for modality, found in self.by_modality.items():
            for name, title in (("nonzero", "non-zero"), ("row_maxima", "largest of each row")):
                values = found.quantiles[name].values()
                lines.append(f"{f'{modality}: {title}':<28}" + "".join(f"{value:9.3f}" for value in values))
        return "\n".join(lines)


def all_magnitudes(
    sae: RunLike, on: EmbeddingStore | str | Path, *, inference: Inference = "trained", device: str = "auto"
) -> AllMagnitudes:
    """The magnitudes of an SAE's activations on every modality of a store; what was mined before is used again."""
    run, store = Run.open(sae), as_store(on)
    found = {m: top_samples(run, store, modality=m, inference=inference, device=device) for m in store.modalities}
    return AllMagnitudes({modality: magnitudes(samples) for modality, samples in found.items()})
