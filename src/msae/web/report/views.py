"""What a report shows of a run on a store: concepts with samples and evidence, the tree, a search before and after."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from msae.concepts import strongest
from msae.concepts.gallery import Magnitudes, magnitudes
from msae.concepts.names import Concept, ConceptNames
from msae.concepts.regions import Locator, OneLatent, Region
from msae.concepts.samples import TopSamples, top_samples
from msae.concepts.tree import ConceptTree, concept_tree
from msae.data.store import EmbeddingStore
from msae.data.thumbnails import Album
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.search import SearchResult, search
from msae.web.overlay import as_svg
from msae.web.report import figures
from msae.web.report.facts import Facts

N_CONCEPTS = 12
N_PICTURES = 8
N_TEXTS = 5
N_OTHERS = 6
N_HITS = 6
ENOUGH_CHILDREN = 8
"""Of a tree; one with fewer is tried again at the next level."""
MAX_NODES, MAX_UNDER_ROOT, MAX_DEPTH = 120, 16, 4
"""Of a tree that is shown."""
SIDE = 144
"""Pixels of a thumbnail's longer side."""


class Shown(NamedTuple):
    """One sample of a concept."""

    activation: float
    words: str
    """Its caption, or else its id, and the columns that were asked for."""
    picture: str | None
    region: Region | None = None
    """Where in the picture the latent finds what makes it fire."""

    @property
    def drawn(self) -> Markup | None:
        """The region over the picture."""
        return as_svg(self.region)


class Other(NamedTuple):
    """A concept that stands out in the samples of another one."""

    label: str
    picture: str | None
    """Without a confirmed name, the picture that fires it most."""
    n: int
    """Of the samples, those in which it is above its threshold."""


class ConceptView(NamedTuple):
    """One latent as a report shows it."""

    latent: int
    concept: Concept | None
    images: list[Shown]
    texts: list[Shown]
    histogram: str
    others: list[Other]
    """What else stands out in its samples of the first modality."""
    n: int
    """Of those samples."""

    @property
    def name(self) -> str:
        return self.concept.shown if self.concept else "unnamed"

    @property
    def n_regions(self) -> int:
        """Pictures with a region."""
        return sum(shown.region is not None for shown in self.images)


@dataclass
class Node:
    """A latent of the tree."""

    latent: int
    name: str | None
    firing_rate: float
    share: float | None
    """Of its rows, in which its parent fires too."""
    children: list[Node] = field(default_factory=list)
    n_hidden: int = 0
    """Of a root: latents under it that are not shown."""
    n_shown: int = 1
    """Of a root: itself and what is shown under it."""
    has_name: bool = False
    """Of a root: whether any latent of its tree has a name."""


@dataclass(frozen=True, eq=False)
class Looked:
    """A store seen through the SAE, once for each of its modalities."""

    store: EmbeddingStore
    samples: Mapping[Modality, TopSamples]
    show: tuple[str, ...] = ()
    """Columns to show beside the captions."""
    device: str = "auto"
    locator: Locator | None = None
    """Finds regions in pictures, where the encoder is here."""

    @classmethod
    def at(cls, facts: Facts, store: EmbeddingStore, device: str) -> Looked:
        found = {m: top_samples(facts.folder, store, modality=m, device=device) for m in store.modalities}
        return cls(store, found, device=device)

    @property
    def first(self) -> TopSamples:
        """Of images, where there are any."""
        return next(iter(self.samples.values()))

    def magnitudes(self) -> dict[str, Magnitudes]:
        return {modality: magnitudes(found) for modality, found in self.samples.items()}

    def concept(self, facts: Facts, latent: int, album: Album) -> ConceptView:
        concept = facts.names.concept_of(latent) if facts.names is not None else None
        shown = {m: self._shown(m, latent, album) for m in self.samples}
        histogram = figures.activation_histogram(self.first, latent)
        rows = np.array([sample.row for sample in self.first.top(latent, N_PICTURES)], dtype=np.int64)
        others = self._others(facts, rows, concept.name if concept else f"#{latent}", album)
        return ConceptView(latent, concept, shown.get("image", []), shown.get("text", []), histogram, others, len(rows))

    def _others(self, facts: Facts, rows: NDArray[np.int64], own: str, album: Album) -> list[Other]:
        if not len(rows):
            return []
        z = View(facts.run, self.store, next(iter(self.samples)), device=self.device).table(rows)
        found = strongest.standing_out(z, self.first, facts.names, N_OTHERS, without=(own,))
        return [Other(*self.face(facts, one.concept, [one.latent], album), one.n_rows) for one in found]

    def face(self, facts: Facts, concept: str, latents: Sequence[int], album: Album) -> tuple[str, str | None]:
        """The label of a concept and, without a confirmed name, the picture that fires it most."""
        label, row = strongest.shown_as(concept, latents, facts.names, self.first)
        return label, None if row is None else album.uri(self.store.describe_rows([row])[0].path)

    def _shown(self, modality: Modality, latent: int, album: Album) -> list[Shown]:
        top = self.samples[modality].top(latent, N_PICTURES if modality == "image" else N_TEXTS)
        numbers = [sample.row for sample in top]
        rows = self.store.describe_rows(numbers, show=self.show)
        if modality != "image":
            return [Shown(sample.activation, row.words, None) for sample, row in zip(top, rows, strict=True)]
        regions = self.locator.regions(numbers, OneLatent(latent)) if self.locator else [None] * len(rows)
        return [
            Shown(sample.activation, row.words, album.uri(row.path), region)
            for sample, row, region in zip(top, rows, regions, strict=True)
        ]


def standing_out(names: ConceptNames | None, samples: TopSamples) -> list[int]:
    """Latents by how well they tell the rows of this store apart, one for each name; those with confirmed names first.

    A latent that fires in every row, or hardly ever, tells none apart: the variance between its rows and the others,
    firing rate times the rest times the square of its mean activation, is what counts.
    """
    rate = samples.firing_rate
    tells = rate * (1 - rate) * np.square(samples.mean_nonzero)
    found: dict[str, int] = {}
    for latent in np.argsort(-tells, kind="stable").tolist():
        if tells[latent] > 0:
            found.setdefault((names.name_of(latent) if names else None) or f"#{latent}", latent)
    concepts = {latent: names.concept_of(latent) if names else None for latent in found.values()}
    return sorted(concepts, key=lambda latent: _doubt(concepts[latent]))


def _doubt(concept: Concept | None) -> int:
    return 2 if concept is None else 0 if concept.is_confirmed else 1


def tree_of(facts: Facts, looked: Looked) -> ConceptTree:
    """How latents nest, at the first level at which more than a few do."""
    best = concept_tree(facts.folder, looked.store, device=looked.device)
    for level in [level for level in facts.config.levels or () if level > (best.k or 0)][:3]:
        if len(best.hierarchy.parent) >= ENOUGH_CHILDREN:
            break
        deeper = concept_tree(facts.folder, looked.store, k=level, device=looked.device)
        best = max(best, deeper, key=lambda tree: len(tree.hierarchy.parent))
    return best


def nodes_of(tree: ConceptTree) -> list[Node]:
    """Roots, those first that have names under them, cut where they are deep, wide or many."""
    found = tree.hierarchy
    roots: list[Node] = []
    path: list[Node] = []
    for depth, latent in found.walk():
        edge = found.parent.get(latent)
        rate = float(found.fired[latent] / found.n_rows)
        node = Node(latent, tree.shown.get(latent, tree.names.get(latent)), rate, None if edge is None else edge.share)
        path[depth:] = [node]
        root = path[0]
        root.has_name |= node.name is not None
        if depth == 0:
            roots.append(node)
        elif depth > MAX_DEPTH or root.n_shown >= MAX_UNDER_ROOT:
            root.n_hidden += 1
        else:
            path[depth - 1].children.append(node)
            root.n_shown += 1
    roots.sort(key=lambda root: not root.has_name)
    so_far = itertools.accumulate(root.n_shown for root in roots)
    return [root for root, n in zip(roots, so_far, strict=True) if n <= MAX_NODES]


def example_search(facts: Facts, looked: Looked) -> SearchResult | None:
    """The strongest sample of the first concept that is shown, searched for as it is and without the concept."""
    samples = looked.first
    latents = standing_out(facts.names, samples) if facts.names else []
    fires = [concept for latent in latents if facts.names and (concept := facts.names.concept_of(latent))]
    if not fires or samples.origin.standardized_by != "run":
        return None
    row = samples.top(fires[0].latent, 1)[0]
    return search(
        facts.folder, looked.store, like=row.id, set={fires[0].name: 0.0}, n=N_HITS, show=looked.show,
        device=looked.device,
    )  # fmt: skip


def command(*words: str | Path) -> str:
    """A line to type, with whatever a shell would take apart in quotes."""
    return shlex.join(str(word) for word in words)
