"""`gallery`: what activates a latent most, and how strongly; from one pass over any store."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msae.base.errors import ConfigError
from msae.base.results import Result, shorten
from msae.concepts.concept import latents_of
from msae.concepts.names import ConceptNames, names_of
from msae.concepts.regions import Locator, OneLatent, Region
from msae.concepts.samples import (
    BINS_PER_OCTAVE,
    N_BINS,
    TopSamples,
    bin_edges,
    check_latent,
    check_n,
    describe,
    histogram_quantiles,
    top_samples,
)
from msae.data.rows import Row
from msae.data.sampled import notes_on, sample_rows, whole
from msae.data.store import EmbeddingStore, as_store
from msae.data.thumbnails import NOTEBOOK_SIDE, Album, figures_html
from msae.sae.model import Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View


@dataclass(frozen=True, repr=False)
class Sample(Row):
    """One sample of a gallery."""

    activation: float
    region: Region | None = None
    """Of an image: where in it the latent finds what makes it fire, if that was asked for and it can be read."""

    def to_json(self) -> dict[str, Any]:
        record = super(Sample, replace(self, region=None)).to_json()
        del record["region"]
        return record if self.region is None else {**record, "region": self.region.to_json()}


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
    roots: tuple[Path, ...] = (Path(),)
    """Folders that the paths of pictures may be relative to."""
    shown: str | None = None
    """The name as people are shown it: `nearest word: …` where no rows have confirmed it."""

    @property
    def firing_rate(self) -> float:
        """Share of the rows that fire the latent: of the images, or of the texts where there are no images."""
        return float(next(iter(self.statistics.values()))["firing_rate"])

    @property
    def title(self) -> str:
        return f"latent {self.latent}: {self.shown or self.name or 'unnamed'}"

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
        places = [f" · {one.region.words}" if one.region else "" for one in self.images]
        figures = [(f"{one.activation:.3f}{place}", one) for one, place in zip(self.images, places, strict=True)]
        facts = [_summary(modality, known) for modality, known in self.statistics.items()]
        texts = [f"{sample.activation:.3f}  {shorten(' '.join(sample.words.split()), 140)}" for sample in self.texts]
        lines = [*facts, *texts, *self.notes]
        head, pictures = html.escape(self.title), figures_html(figures, album) if figures else ""
        return f"<p><b>{head}</b></p>{pictures}<pre>{html.escape(chr(10).join(lines))}</pre>"

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
    regions: bool = False,
    show: str | Sequence[str] = (),
    inference: Inference = "trained",
    max_rows: int | None = None,
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
        regions: Also find where in each image the latent sees what makes it fire. That needs the pictures and the
            encoder that made the store.
        show: Columns of the metadata to print beside the captions, such as title,colour.
        inference: How activations are made: `trained` uses the activation function of the SAE, `threshold` keeps those
            above the thresholds fitted after training, `relu` keeps every positive one.
        max_rows: Read at most so many rows: of more, a random sample. Memory and time do not grow beyond it.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: No such latent or concept, n below 1, or not exactly one of `latent` and `concept`.
        StoreError: The store does not fit the SAE.
        EmbedderError: `regions` without the encoder that made the store.
    """
    if (latent is None) == (concept is None):
        raise ConfigError("a gallery is of one latent; give either --latent I or --concept NAME")
    check_n(n)
    run = Run.open(sae)
    store = sample_rows(as_store(on, unnamed=run.modality), max_rows)
    run.check_fit(store)
    d_sae = run.sae.d_sae
    names = names_of(run, store)
    alike: tuple[int, ...] = ()
    if concept is not None:
        latent, *others = _nearest_first(latents_of(concept, names, d_sae), names)
        alike = tuple(others)
    assert latent is not None
    check_latent(latent, d_sae)
    locator = Locator(View(run, whole(store), "image", inference=inference, device=device)) if regions else None
    found = {m: top_samples(run, store, modality=m, n=n, inference=inference, device=device) for m in store.modalities}
    images = _samples(store, found["image"], latent, n, show) if "image" in found else ()
    if locator is not None:
        places = locator.regions([image.row for image in images], OneLatent(latent))
        images = tuple(replace(image, region=region) for image, region in zip(images, places, strict=True))
    notes = [*notes_on(store)]
    notes += [note for samples in found.values() for note in _notes(samples)]
    n_unread = sum(image.region is None for image in images) if regions else 0
    if n_unread:
        notes.append(f"{n_unread} of the {len(images)} pictures cannot be read, so they have no regions")
    return Gallery(
        latent=latent,
        name=None if names is None else names.name_of(latent),
        alike=alike,
        images=images,
        texts=_samples(store, found["text"], latent, n, show) if "text" in found else (),
        statistics={modality: describe(samples, latent) for modality, samples in found.items()},
        notes=tuple(notes),
        roots=store.picture_roots,
        shown=None if names is None else names.shown(latent),
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
    note = f" · {sample.note}" if sample.note else ""  # what a person asked to see is never cut
    words = " ".join(sample.words.removesuffix(note).split())
    tail = f"{note} · {sample.region.words}" if sample.region else note
    line = f"{sample.activation:7.3f}  {sample.id}  {'' if words == sample.id else words}".rstrip()
    return shorten(line, max(_WIDTH - len(tail), _WIDTH // 2)) + tail


def _summary(modality: Modality, known: Mapping[str, Any]) -> str:
    levels = ", ".join(f"the {k} strongest in {share:.0%}" for k, share in list(known["levels"].items())[:2])
    return (
        f"{modality}s: fires on {known['firing_rate']:.2%}, there among {levels}; "
        f"median {known['p50']:.2f}, p99 {known['p99']:.2f}, largest {known['max']:.2f}"
    )


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
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        notes = {"notes": list(self.notes)} if self.notes else {}
        return {**{modality: found.to_json() for modality, found in self.by_modality.items()}, **notes}

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
        return "\n".join([*lines, *self.notes])


def all_magnitudes(
    sae: RunLike,
    on: EmbeddingStore | str | Path,
    *,
    inference: Inference = "trained",
    max_rows: int | None = None,
    device: str = "auto",
) -> AllMagnitudes:
    """The magnitudes of an SAE's activations on every modality of a store; what was mined before is used again."""
    run = Run.open(sae)
    store = sample_rows(as_store(on, unnamed=run.modality), max_rows)
    found = {m: top_samples(run, store, modality=m, inference=inference, device=device) for m in store.modalities}
    return AllMagnitudes({m: magnitudes(samples) for m, samples in found.items()}, notes_on(store))
