"""`World`: what the explorer shows: runs and a store, opened once, read-only, and nothing of any one user."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msae.base.devices import as_device
from msae.base.errors import ConfigError, MsaeError, RunError, SourceError
from msae.concepts.names import ConceptNames, names_of
from msae.concepts.places import Places, places_of
from msae.concepts.regions import Locator, Region, check_pictures
from msae.concepts.samples import TopSamples, top_samples
from msae.concepts.tree import ConceptTree, concept_tree
from msae.data.embedder import Embedder, embedder_for
from msae.data.images import read_picture
from msae.data.rows import PATH_COLUMNS, Row, find_picture, names_to_show
from msae.data.store import EmbeddingStore, as_store, recorded_store
from msae.data.thumbnails import as_jpeg, thumbnail
from msae.measure.evaluate import Evaluation, current_evaluations, evaluate
from msae.sae.run import Run
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.audit import Audit, Sweeper, audit
from msae.use.audit.subjects import refused_columns, target_columns
from msae.use.compare import Comparison, compare
from msae.use.search import Searcher
from msae.web.explorer.catalogue import Catalogue
from msae.web.report.facts import read_trained

KEPT_SAMPLES = 48
"""Of each latent and modality: four pages of twelve."""
KEPT_TEXTS = 256
KEPT_PICTURES = 4096
"""Thumbnails held in memory, some 10 kB each."""

UNKNOWN_ENCODER = "neither the store nor the run says which encoder made the embeddings; a store of msae embed does"
NO_PICTURES = "none of its pictures is where the store says, so there is nothing to show regions in"
NO_ENCODER = (
    "Neither the store nor the run says which encoder made the embeddings, so words and pictures cannot be searched "
    "for; rows can. A store made by msae embed says it."
)


class LoadedRun:
    """One run with what was learnt of it on the store; made when first asked for, then kept."""

    def __init__(self, folder: Path, label: str, store: EmbeddingStore | None, device: str = "auto") -> None:
        self.folder, self.label, self.store, self.device = folder, label, store, device
        self.opened = Run.open(folder)
        self.sae = self.opened.sae
        self.names: ConceptNames | None = names_of(self.opened, store)
        if store is not None:
            self.opened.check_fit(store)
        self.slow, self.preparing, self.placing = threading.RLock(), threading.RLock(), threading.Lock()
        self._searchers: dict[Modality, Searcher] = {}
        self._views: dict[Modality, View] = {}
        self._audits: dict[tuple[str, str], Audit] = {}
        self._comparisons: dict[tuple[str, str, tuple[str, ...]], Comparison] = {}
        self._sweepers: dict[tuple[str, str], Sweeper] = {}
        self._locator: Locator | None = None

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return self.store.modalities if self.store is not None else ()

    @property
    def config(self) -> dict[str, Any]:
        """The run's config.json; empty for an SAE that was imported."""
        return read_trained(self.opened)

    @cached_property
    def samples(self) -> dict[Modality, TopSamples]:
        """The strongest samples of every latent; read from the run folder where they were mined before."""
        with self.slow:
            if self.store is None:
                return {}
            return {
                m: top_samples(self.opened, self.store, modality=m, n=KEPT_SAMPLES, device=self.device)
                for m in self.modalities
            }

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue.of(self.sae, self.names, self.samples)

    @cached_property
    def places(self) -> Places:
        """Where the latents lie on the map; takes up to a minute the first time."""
        with self.placing:
            return places_of(self.opened)

    def natural(self, modality: Modality) -> TopSamples:
        """The samples that say what is natural for rows of `modality`; those of another where the store has none."""
        return self.samples.get(modality) or next(iter(self.samples.values()))

    def activations(self, rows: Sequence[int], modality: Modality) -> NDArray[np.float32]:
        """The activations of some rows of the store."""
        assert self.store is not None
        with self.preparing:
            if modality not in self._views:
                self._views[modality] = View(self.opened, self.store, modality, device=self.device)
        return self._views[modality].table(np.asarray(rows, dtype=np.int64))

    @cached_property
    def tree(self) -> ConceptTree | None:
        """How the latents nest on the store; takes seconds for a wide SAE."""
        with self.slow:
            return None if self.store is None else concept_tree(self.opened, self.store, device=self.device)

    @cached_property
    def known_names(self) -> list[str]:
        """Every name of a latent, once."""
        return sorted({concept.name for concept in self.names or ()})

    @cached_property
    def unit_rows(self) -> torch.Tensor:
        """The decoder's rows at length one."""
        return torch.nn.functional.normalize(self.sae.W_dec.detach(), dim=1)

    def searcher(self, modality: Modality) -> Searcher:
        """What searches the rows of `modality`; prepared when first asked for."""
        assert self.store is not None
        with self.preparing:
            if modality not in self._searchers:
                searcher = Searcher(self.opened, self.store, modality, self.names, remember=True, device=self.device)
                _ = searcher.index  # built here, once
                self._searchers[modality] = searcher
            return self._searchers[modality]

    def audit(self, target: str, where: str = "") -> Audit:
        """The audit of a column in the rows that fit, made once; raises what `msae.audit` raises."""
        found: Audit = self._once(self._audits, target, where, partial(audit, self.folder))
        return found

    def locator(self, embedder: Callable[[], Embedder]) -> Locator:
        """What finds regions in the store's pictures; raises what `Locator` and `embedder` raise."""
        assert self.store is not None
        with self.preparing:
            if self._locator is None:
                check_pictures(self.store)
                self._locator = Locator(View(self.opened, self.store, "image", device=self.device), embedder())
            return self._locator

    def compared(self, a: str, b: str, within: tuple[str, ...]) -> Comparison:
        """The comparison of two parts, made once; raises what `msae.compare` raises."""
        with self.slow:
            if (a, b, within) not in self._comparisons:
                found = compare(self.opened, a, b, within=within, modality=self.modalities[0], device=self.device)
                self._comparisons[a, b, within] = found
            return self._comparisons[a, b, within]

    def sweeper(self, target: str, where: str = "") -> Sweeper:
        """What sweeps samples under the classifier of that audit."""
        found: Sweeper = self._once(self._sweepers, target, where, partial(Sweeper, self.opened))
        return found

    def _once(self, made: dict[tuple[str, str], Any], target: str, where: str, make: Callable[..., Any]) -> Any:
        assert self.store is not None
        with self.slow:
            if (target, where) not in made:
                made[target, where] = make(
                    self.store, target, where=where or None, modality=self.modalities[0], device=self.device
                )
            return made[target, where]

    def name(self, latent: int) -> str:
        """What is shown for a latent: its name, the nearest word that was not confirmed, or its number."""
        return (self.names.shown(latent) if self.names else None) or f"#{latent}"


class World:
    """The runs, in their order, and the store that all of them are shown on."""

    def __init__(
        self, runs: Sequence[LoadedRun], store: EmbeddingStore | None, note: str | None, show: tuple[str, ...] = ()
    ) -> None:
        self.runs = {run.label: run for run in runs}
        self.store = store
        self.note = note
        """Why there is no store, where there is none."""
        self.show = show
        """Columns to show beside the captions."""
        self.picture: Callable[[int, int], bytes | None] = lru_cache(KEPT_PICTURES)(self._picture)
        self._warmed = False
        self._encoder_lock, self._evaluating = threading.Lock(), threading.Lock()
        self._embed_text = lru_cache(KEPT_TEXTS)(lambda text: self.embedder().embed_texts([text])[0])

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """What a page shows of these rows of the store."""
        assert self.store is not None
        return self.store.describe_rows(numbers, show=self.show)

    @property
    def first(self) -> LoadedRun:
        return next(iter(self.runs.values()))

    def prepare(self) -> None:
        """Do what the first page waits for: top samples, catalogue, metadata."""
        _ = self.first.catalogue
        if self.store is not None:
            _ = self.store.metadata

    def prepare_search(self) -> None:
        """Do what the first search waits for."""
        for modality in self.first.modalities:
            self.first.searcher(modality)

    @cached_property
    def has_pictures(self) -> bool:
        return self.store is not None and any(name in self.store.columns for name in PATH_COLUMNS)

    @cached_property
    def targets(self) -> dict[str, int]:
        """Columns that can be audited, with their numbers of classes."""
        return {} if self.store is None else target_columns(self.store)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Columns that cannot be audited, with the reasons."""
        return {} if self.store is None else refused_columns(self.store)

    def evaluations(self) -> list[Evaluation]:
        """What `msae evaluate` left of the runs and is still true, as far as it can be compared.

        That is on one store, with one modality and inference: those of most runs, then this store's, then any with
        recovery. Figures of probes are shown where they are of one column and one training store.

        Raises:
            RunError: A record is damaged.
        """
        known = [(label, kept) for label, run in self.runs.items() for kept in current_evaluations(run.opened)]
        shown = self.store.fingerprint if self.store else None
        tables = []
        for _, reference in known:
            compared = {label: one for label, kept in known if (one := kept.compared_with(reference)) is not None}
            worth = (
                len(compared),
                reference.origin.fingerprint == shown,
                any(one.recovery for one in compared.values()),
                sum(one.probe_n is not None for one in compared.values()),
            )
            tables.append((worth, compared))
        if not tables:
            return []
        _, best = max(tables, key=lambda table: table[0])
        return [replace(one, run=label) for label, one in best.items()]

    def evaluate_now(self) -> list[Evaluation]:
        """All runs on the store with recovery; raises what `msae.evaluate` raises."""
        assert self.store is not None
        with self._evaluating:
            folders = [run.folder for run in self.runs.values()]
            found = evaluate(
                folders, self.store, modality=self.store.modalities[0], recovery=True, device=self.first.device
            )
        return [replace(one, run=label) for label, one in zip(self.runs, found, strict=True)]

    @cached_property
    def version(self) -> str:
        """Changes with the store: a browser must not show another store's pictures out of its cache."""
        known = (
            ""
            if self.store is None
            else f"{self.store.path.resolve()} {self.store.fingerprint} {self.store.metadata_fingerprint}"
        )
        return hashlib.blake2b(known.encode(), digest_size=6).hexdigest()

    def is_picture(self, path: str | None) -> bool:
        """Whether the picture that a row lists is there."""
        return self.store is not None and find_picture(path, self.store.picture_roots) is not None

    def _picture(self, row: int, side: int) -> bytes | None:
        """The JPEG of a row's picture, its longer side at most `side` pixels; None where there is none."""
        if self.store is None or not self.has_pictures or not 0 <= row < len(self.store):
            return None
        picture = thumbnail(self.store.describe_rows([row])[0].path, self.store.picture_roots, side)
        return None if picture is None else as_jpeg(picture)

    def locator(self, run: LoadedRun) -> tuple[Locator | None, str | None]:
        """What finds regions in the store's pictures, or why nothing does."""
        if self.why_no_encoder():
            return None, UNKNOWN_ENCODER
        try:
            return run.locator(self.embedder), None
        except MsaeError as err:
            return None, str(err)

    def regions(
        self, run: LoadedRun, rows: Sequence[int], latents: Sequence[int]
    ) -> tuple[list[Region | None], str | None]:
        """Where in the pictures of some rows a concept finds what makes it fire, or why that cannot be shown."""
        locator, why = self.locator(run)
        if locator is None:
            return [None] * len(rows), why
        found = locator.regions(rows, locator.concept(latents))
        return found, None if any(found) or not found else NO_PICTURES

    def embed_text(self, text: str) -> NDArray[np.float32]:
        """The embedding of some words; raises what `embedder` raises."""
        found: NDArray[np.float32] = self._embed_text(text)
        return found

    def embed_picture(self, data: bytes) -> NDArray[np.float32]:
        """The embedding of a picture file's bytes.

        Raises:
            MsaeError: What `embedder` raises, or the bytes are no picture.
        """
        try:
            picture = read_picture(data).image
        except SourceError as err:
            raise SourceError(f"this file cannot be searched for: {err}; drop another picture") from err
        found: NDArray[np.float32] = self.embedder().embed_images([picture])[0]
        return found

    def why_no_encoder(self) -> str | None:
        """Why words and pictures cannot be searched for; None where the encoder is known."""
        known = (self.store.encoder if self.store else None) or self.first.sae.config.encoder
        return None if known else NO_ENCODER

    def warm(self) -> None:
        """Begin to load the encoder, for whoever opens the search page is about to type words."""
        if not self._warmed and self.store is not None and self.why_no_encoder() is None:
            self._warmed = True
            threading.Thread(target=self._load_quietly, name="encoder", daemon=True).start()

    def _load_quietly(self) -> None:
        with contextlib.suppress(MsaeError):  # said when it is asked for
            self.embedder()

    def embedder(self) -> Embedder:
        """The model that made the store's embeddings, from this machine's disk alone.

        Raises:
            MsaeError: Neither store nor SAE says which it is, it is not here, or its weights are others now.
        """
        with self._encoder_lock:
            return self._embedder

    @cached_property
    def _embedder(self) -> Embedder:
        if self.why_no_encoder():
            raise ConfigError(NO_ENCODER)
        return embedder_for(self.store, self.first.sae.config, need="this page", device=self.first.device, local=True)


def open_world(
    runs: Sequence[str | Path],
    on: EmbeddingStore | str | Path | None,
    show: str | Sequence[str] = (),
    device: str = "auto",
) -> World:
    """The runs and the store, checked against each other.

    Args:
        on: Without it, the store that the first run was trained on, where it is still there.
        show: Columns of the store to show beside each caption.

    Raises:
        ConfigError: No runs.
        RunError: A run is missing or damaged.
        StoreError: The store is missing or damaged, or does not fit a run.
    """
    if not runs:
        raise ConfigError("there is nothing to explore; give at least one run: msae explore RUN --on STORE")
    as_device(device)  # one that is not here is said at once
    folders = list(dict.fromkeys(Path(run) for run in runs))
    note = None
    store = None if on is None else as_store(on)
    if store is None:
        store, note = _training_store(folders)
    short = Counter(folder.resolve().name for folder in folders)
    labels = [folder.resolve().name if short[folder.resolve().name] == 1 else str(folder) for folder in folders]
    loaded = [LoadedRun(folder, label, store, device) for folder, label in zip(folders, labels, strict=True)]
    return World(loaded, store, note, () if store is None else names_to_show(show, store.columns, store.address))


def _training_store(folders: Sequence[Path]) -> tuple[EmbeddingStore | None, str | None]:
    """The store that the first run was trained on, if all runs can be shown on it, or why not."""
    try:
        trained = LoadedRun(folders[0], "", None).config
        modality = trained.get("modality") if Path(trained["store"]).is_file() else None
        store = recorded_store(trained["store"], None if modality == "both" else modality)
    except KeyError:
        return None, "The run does not say what it was trained on."
    except RunError:
        raise
    except MsaeError as err:
        return None, f"The store that the run was trained on cannot be opened ({err})."
    return store, None
