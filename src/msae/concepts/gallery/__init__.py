"""`gallery`: what activates a latent most, how strongly, and how latents nest; from one pass over any store."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msae.base.errors import ConfigError
from msae.base.results import Result, shorten
from msae.concepts.concept import latents_of
from msae.concepts.gallery.magnitudes import AllMagnitudes, Magnitudes, all_magnitudes, magnitudes
from msae.concepts.gallery.mining import check_n, top_samples
from msae.concepts.gallery.tree import ConceptTree, concept_tree
from msae.concepts.names import ConceptNames, names_of
from msae.concepts.samples import TopSamples, check_latent, describe
from msae.data.store import EmbeddingStore, Row, as_store
from msae.data.thumbnails import NOTEBOOK_SIDE, Album, figures_html
from msae.sae.model import Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality

__all__ = [
    "AllMagnitudes",
    "ConceptTree",
    "Gallery",
    "Magnitudes",
    "Sample",
    "all_magnitudes",
    "concept_tree",
    "gallery",
    "magnitudes",
    "top_samples",
]


@dataclass(frozen=True, repr=False)
class Sample(Row):
    """One sample of a gallery."""

    activation: float


@dataclass(frozen=True, repr=False)
class Gallery(Result):
    """The samples that activate one latent most, images and texts side by side."""

    latent: int
    name: str | None
    alike: tuple[int, ...]
    """Other latents with the name that was asked for."""
    images: tuple[Sample, ...]
    texts: tuple[Sample, ...]
    statistics: Mapping[Modality, Mapping[str, Any]]
    """Firing rate, mean, natural range and level profile, for each modality of the store."""
    notes: tuple[str, ...]
    """What a reader must know: statistics that were not the SAE's own."""
    roots: tuple[Path, ...] = ()
    """Folders that the paths of pictures may be relative to."""

    @property
    def firing_rate(self) -> float:
        """Share of the rows that fire the latent: of the images, or of the texts where there are no images."""
        return float(next(iter(self.statistics.values()))["firing_rate"])

    @property
    def title(self) -> str:
        return f"latent {self.latent}: {self.name or 'unnamed'}"

    def to_text(self) -> str:
        """What the command line prints: a line of statistics for each modality, then images and texts side by side."""
        others = f"  (also {', '.join(map(str, self.alike))})" if self.alike else ""
        lines = [self.title + others, *(_summary(m, known) for m, known in self.statistics.items())]
        sides = [side for side in (self.images, self.texts) if side]
        rows = itertools.zip_longest(*([_line(sample) for sample in side] for side in sides), fillvalue="")
        lines += ["  ".join(f"{cell:<{_WIDTH}}" for cell in row).rstrip() for row in rows]
        return "\n".join([*lines, *self.notes])

    def records(self) -> list[dict[str, Any]]:
        """A record for each sample, with the metadata's columns beside its activation."""
        found = []
        for modality, samples in (("image", self.images), ("text", self.texts)):
            for sample in samples:
                record = sample.to_json()
                found.append({**record.pop("columns"), **record, "modality": modality})
        return found

    def _repr_html_(self) -> str:
        """The pictures, then the texts, for a notebook."""
        album = Album(self.roots, NOTEBOOK_SIDE)
        parts = [f"<p>{html.escape(self.title)}</p>"]
        if self.images:
            parts.append(figures_html([(f"{sample.activation:.3f}", sample) for sample in self.images], album))
        parts += [f"<p>{html.escape(_line(sample).strip())}</p>" for sample in self.texts]
        return "".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "latent": self.latent,
            "name": self.name,
            "firing_rate": self.firing_rate,
            "images": [sample.to_json() for sample in self.images],
            "texts": [sample.to_json() for sample in self.texts],
            "alike": list(self.alike),
            "statistics": dict(self.statistics),
            "notes": list(self.notes),
        }


def gallery(
    sae: RunLike,
    on: EmbeddingStore | str | Path,
    *,
    latent: int | None = None,
    concept: str | None = None,
    n: int = 16,
    show: str | Sequence[str] = (),
    inference: Inference = "trained",
    device: str = "auto",
) -> Gallery:
    """The images and texts of a store that activate one latent most.

    The strongest samples of all latents are kept in the run folder, so that the next latent is shown at once.

    Args:
        sae: A run folder, or a Hugging Face repository that holds an SAE.
        on: The store whose samples are shown.
        latent: Number of the latent. Give this or `concept`.
        concept: A name from the run's names.json, a latent as #12, or several joined by |; the one nearest to its name
            is shown.
        n: How many images and how many texts.
        show: Columns of the metadata to print beside the captions, such as title,colour.
        inference: How activations are made: `trained` uses the activation function of training, `relu` keeps every
            positive one.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: No such latent or concept, n below 1, or not exactly one of `latent` and `concept`.
        StoreError: The store does not fit the SAE.
    """
    if (latent is None) == (concept is None):
        raise ConfigError("a gallery is of one latent; give either --latent I or --concept NAME")
    check_n(n)
    run, store = Run.open(sae), as_store(on)
    run.check_fit(store)
    d_sae = run.sae.d_sae
    names = names_of(run)
    alike: tuple[int, ...] = ()
    if concept is not None:
        latent, *others = _nearest_first(latents_of(concept, names, d_sae), names)
        alike = tuple(others)
    assert latent is not None
    check_latent(latent, d_sae)
    found = {m: top_samples(run, store, modality=m, n=n, inference=inference, device=device) for m in store.modalities}
    return Gallery(
        latent=latent,
        name=None if names is None else names.name_of(latent),
        alike=alike,
        images=_samples(store, found["image"], latent, n, show) if "image" in found else (),
        texts=_samples(store, found["text"], latent, n, show) if "text" in found else (),
        statistics={modality: describe(samples, latent) for modality, samples in found.items()},
        notes=tuple(note for samples in found.values() for note in _notes(samples)),
        roots=store.picture_roots,
    )


def _nearest_first(latents: Sequence[int], names: ConceptNames | None) -> list[int]:
    """The latents by falling cosine to their names, then those without one in their order."""
    known = {latent: names.concept_of(latent) if names is not None else None for latent in latents}
    return sorted(latents, key=lambda latent: -(one.cosine if (one := known[latent]) else -1.0))


def _samples(
    store: EmbeddingStore, samples: TopSamples, latent: int, n: int, show: str | Sequence[str]
) -> tuple[Sample, ...]:
    top = samples.top(latent, n)
    rows = store.describe_rows([sample.row for sample in top], show=show)
    return tuple(Sample(**vars(row), activation=sample.activation) for sample, row in zip(top, rows, strict=True))


def _notes(samples: TopSamples) -> list[str]:
    origin = samples.origin
    if origin.standardized_by == "run":
        return []
    return [
        f"the SAE has no {origin.modality} statistics: {origin.modality} rows were standardised with the mean and "
        f"scale of {origin.store}"
    ]


_WIDTH = 58  # characters for a sample; two stand side by side


def _line(sample: Sample) -> str:
    tail = f" · {sample.note}" if sample.note else ""  # what a person asked to see is never cut
    words = " ".join(sample.words.removesuffix(tail).split())
    line = f"{sample.activation:7.3f}  {sample.id}  {'' if words == sample.id else words}".rstrip()
    return shorten(line, max(_WIDTH - len(tail), _WIDTH // 2)) + tail


def _summary(modality: Modality, known: Mapping[str, Any]) -> str:
    levels = ", ".join(f"the {k} strongest in {share:.0%}" for k, share in list(known["levels"].items())[:2])
    return (
        f"{modality}s: fires on {known['firing_rate']:.2%}, there among {levels}; "
        f"median {known['p50']:.2f}, p99 {known['p99']:.2f}, largest {known['max']:.2f}"
    )
