"""`Searcher`: everything a search needs, opened once; `msae.search` makes one for a single search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from msae.base.errors import ConfigError
from msae.concepts.concept import BLOCK_ROWS, ConceptSet, Natural, natural_of
from msae.concepts.names import ConceptNames, as_names, names_of
from msae.concepts.strength import Readers, readers
from msae.data.rows import names_to_show
from msae.data.store import EmbeddingStore, as_store
from msae.sae.model import SAE
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View, placed
from msae.use.edits import Change, Edit, parse_change
from msae.use.filters import Filter
from msae.use.neighbours import WANTED, IndexKind, Neighbourhood, Neighbours, open_index
from msae.use.search.query import Ask, EditedQuery, Query, edit_query, read_query
from msae.use.search.results import Hit, SearchResult, Shared, Space

SHARED = 5
"""Concepts that are named with a hit."""
USUAL_ROWS = 2000
"""Rows, evenly spread over the store, that tell how strong a concept usually is."""
LITTLE = 0.25
"""An edit that brings a smaller share of new rows changed little."""
STRONGER = ("p99", "2xp99", "4xp99")
"""Strengths that are tried, to say what would change more."""
TINY = 1e-9
COMMON = 0.5
"""A concept that fires in more than this share of the rows says nothing of two rows that share it."""


@dataclass(frozen=True)
class How:
    """The options of a search, checked."""

    edits: Sequence[tuple[str, Change]]
    n: int
    space: Space
    keep_residual: bool
    exclusive: bool
    strict: bool
    filter: Filter | None
    show: str | Sequence[str] = ()
    """Columns to see beside the captions."""
    recall: float = WANTED
    """Share of the nearest rows that an index of cells has to find."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"n is {self.n}; give --n of at least 1, for example --n 20")
        if self.space not in ("embedding", "latent"):
            raise ConfigError(f"space {self.space!r} is unknown; give embedding or latent")
        if not 0 < self.recall <= 1:
            raise ConfigError(f"recall {self.recall} is not a share; give --recall above 0 and at most 1, such as .98")


class Searcher:
    """A store, an SAE and its names, ready for many searches: what one search prepared the next one uses.

    May be used from several threads; it holds nothing of a query but the concepts that were edited.
    """

    def __init__(
        self,
        run: Run,
        store: EmbeddingStore,
        searched: Modality,
        names: ConceptNames | None,
        *,
        remember: bool = False,
        device: str = "cpu",
        index: IndexKind = "auto",
    ) -> None:
        self.device = device
        """Where the rows of the store pass through the SAE; a query is edited on the CPU."""
        self.sae = placed(run.sae, "cpu")
        self._folder, self._kind = run.folder, index
        self.store, self.searched, self.names = store, searched, names
        self._remember = remember
        self._concepts: dict[tuple[Modality, bool], ConceptSet] = {}

    @classmethod
    def open(
        cls,
        sae: RunLike,
        on: EmbeddingStore | str | Path,
        *,
        modality: Modality | None = None,
        names: ConceptNames | str | Path | None = None,
        remember: bool = False,
        device: str = "auto",
        index: IndexKind = "auto",
    ) -> Searcher:
        """For the arguments of `msae.search`.

        Args:
            remember: Keep the activations of some rows between searches, where they take at most half a GB.

        Raises:
            StoreError: The store does not fit the SAE, or lacks the modality.
            RunError: The run or its names are missing or damaged.
        """
        run = Run.open(sae)
        store = as_store(on, modality, unnamed=run.modality)
        known = as_names(names) if names is not None else names_of(run, store)
        run.check_fit(store)
        return cls(run, store, modality or store.modalities[0], known, remember=remember, device=device, index=index)

    @cached_property
    def index(self) -> Neighbourhood:
        """Of the rows that are searched; built when first asked for."""
        return open_index(self.store, self.searched, self._folder, self._kind)

    def concepts(self, modality: Modality, *, strict: bool = False) -> ConceptSet:
        """The concepts that can be edited in queries of `modality`.

        What is natural in a caption is not what is natural in a picture: they are learnt from rows of the query's
        modality, where the store has them.
        """
        key = (modality, strict)
        if key not in self._concepts:
            natural = modality if modality in self.store.modalities else self.store.modalities[0]
            view = View(self.sae, self.store, natural, block_rows=BLOCK_ROWS, device=self.device)
            self._concepts[key] = ConceptSet(view, self.names, strict=strict, remember=self._remember)
        return self._concepts[key]

    def search(self, ask: Ask, how: How) -> SearchResult:
        """The nearest rows before and after the edits; raises what `msae.search` raises."""
        return self.search_for(read_query(ask, self.store, self.sae, self.searched), how)

    def search_for(self, query: Query, how: How) -> SearchResult:
        """The same of a query that was read before."""
        sae, store = self.sae, self.store
        names_to_show(how.show, store.columns, store.address)  # a wrong one is said before the work
        keep = _kept(store, how.filter, query)
        concepts = self.concepts(query.modality, strict=how.strict)
        edits = [Edit(concepts[concept], change) for concept, change in how.edits]
        if how.space == "latent":
            for modality in (query.modality, self.searched):  # says what is missing where there are no statistics
                sae.standardizer.apply(torch.zeros(1, sae.d_in), modality)
        edited = edit_query(sae, query, edits, concepts, exclusive=how.exclusive, keep_residual=how.keep_residual)
        if how.space == "latent":
            found = search_latents(sae, store, self.searched, edited, how.n, keep, device=self.device)
            used, little = {"kind": "exact"}, []
        else:
            index = self.index.for_queries(query.modality, how.recall)
            found = search_embeddings(index, edited, how.n, keep)
            used = index.describe(keep)
            little = self._changed_little(query, how, edits, edited, found, index, keep)
        sharing = _Sharing(self.concepts(self.searched, strict=True).view, query.modality, self.names, edited.z_edited)
        describe = partial(_hits, store, how.show, sharing)
        return SearchResult(
            store=store.address,
            kind=query.kind,
            value=query.value,
            query_modality=query.modality,
            modality=self.searched,
            space=how.space,
            edits=edited.edits,
            hits=describe(found.after, flipped=False),
            before=describe(found.before, flipped=True) if edited.is_changed else (),
            warnings=(*edited.warnings, *little),
            index=used,
            roots=store.picture_roots,
            query_path=None if query.row is None else store.describe_rows([query.row])[0].path,
        )

    def _changed_little(
        self,
        query: Query,
        how: How,
        edits: Sequence[Edit],
        edited: EditedQuery,
        found: Both,
        index: Neighbourhood,
        keep: NDArray[np.bool_] | None,
    ) -> list[str]:
        """A line where an edit brought hardly any new row: how many, and what would bring more."""  # fmt: skip
        n = len(found.after.rows)
        n_new = _n_new(found)
        if not edits or n_new >= LITTLE * n:
            return []
        said = f"the edit brought {n_new} new of {n} rows"
        raised = {one.concept for one in edited.edits if one.after > one.before}
        if not raised:
            absent = [one.concept for one in edited.edits if one.before <= 0]
            why = (
                f"the query has no {' and no '.join(absent)}" if absent else "the query has little of what was lessened"
            )
            return [f"{said}: {why}; to raise a concept instead, give for example p99"]
        for value in STRONGER:
            change = parse_change(value)
            stronger = [Edit(one.group, change) if one.group.name in raised else one for one in edits]
            more = edit_query(
                self.sae, query, stronger, self.concepts(query.modality, strict=how.strict),
                exclusive=how.exclusive, keep_residual=how.keep_residual,
            )  # fmt: skip
            went_up = all(new.after > old.after for new, old in zip(more.edits, edited.edits, strict=True)
                          if old.concept in raised)  # fmt: skip
            n_more = _n_new(search_embeddings(index, more, how.n, keep)) if went_up else 0
            if n_more >= LITTLE * n:
                sets = " ".join(f"--set '{concept}={value}'" for concept in sorted(raised))
                return [f"{said}; {sets} would bring {n_more}"]
        return [f"{said}, and four times its 99th percentile hardly more: these rows are near in all else"]


def _n_new(found: Both) -> int:
    """Rows of the answer that are not among as many before the edits."""
    return int((found.after.other_ranks > len(found.after.rows)).sum())


def _kept(store: EmbeddingStore, filter: Filter | None, query: Query) -> NDArray[np.bool_] | None:
    """The rows that may be found: those of the filter, without the query's own; None where all may."""
    if filter is None and query.row is None:
        return None
    keep = np.ones(len(store), bool) if filter is None else filter.rows_of(store)
    if query.row is not None:
        keep[query.row] = False
    return keep


@dataclass
class _Sharing:
    """Finds the concepts that hits share with the edited query, as far as that is more than is usual in the store."""

    view: View
    """Of the rows that are searched."""
    query_modality: Modality
    names: ConceptNames | None
    z: Tensor | None
    _usual: dict[Modality, Tensor] = field(default_factory=dict)

    def of(self, rows: NDArray[np.int64]) -> list[tuple[Shared, ...]]:
        """Of each row, the concepts that the query and it both have above their usual strength in the store.

        Those first of which both have most for what is usual. What fires in most rows is left out.
        """
        if self.z is None or self.view.modality not in self.view.sae.standardizer or not len(rows):
            return [()] * len(rows)
        if not self._concepts():
            return [()] * len(rows)
        kept, usual, usual_in_query = self._unusual
        if not kept:
            return [()] * len(rows)
        hits = self._strengths(next(iter(self.view.activations(self._active, rows))).cpu())[:, kept]
        query = self._in_query[kept]
        common = torch.minimum(hits / usual, query / usual_in_query)
        names = [list(self._concepts())[i] for i in kept]
        found = []
        for row, values in zip(hits, common, strict=True):
            best = values.topk(min(SHARED, len(names))).indices.tolist()
            found.append(tuple(
                Shared(names[i], float(query[i]), float(row[i])) for i in best if float(values[i]) > 1
            ))  # fmt: skip
        return found

    @cached_property
    def _active(self) -> list[int]:
        """The query's active latents."""
        assert self.z is not None
        active: list[int] = self.z.nonzero()[:, 0].tolist()
        return active

    @cached_property
    def _unusual(self) -> tuple[list[int], Tensor, Tensor]:
        """The concepts of which the query has more than is usual, with what is usual in hits and in queries."""
        view = self.view
        own = view.on(view.store, self.query_modality) if self.query_modality in view.store.modalities else view
        in_hits = self._natural(view)
        in_query = in_hits if own.modality == view.modality else self._natural(own)
        kept = [
            i
            for i, (of_hits, of_query) in enumerate(zip(in_hits, in_query, strict=True))
            if 0 < of_hits.firing_rate <= COMMON
            and of_query.firing_rate <= COMMON
            and float(self._in_query[i]) > of_query.quantile(50)
        ]
        usual = torch.tensor([in_hits[i].quantile(50) for i in kept])
        usual_in_query = torch.tensor([max(in_query[i].quantile(50), TINY) for i in kept])
        return kept, usual, usual_in_query

    def _natural(self, view: View) -> list[Natural]:
        strengths = self._strengths(self._usual_rows(view))
        return [natural_of(column) for column in strengths.T]

    def _usual_rows(self, view: View) -> Tensor:
        """Activations of the query's active latents in rows spread over the store, which are read once."""
        known = self._usual.get(view.modality)
        if known is None:
            rows = np.linspace(0, len(view) - 1, min(USUAL_ROWS, len(view))).round().astype(np.int64)
            known = torch.cat([block.cpu() for block in view.activations(self._active, rows)])
            self._usual[view.modality] = known
        return known

    @cached_property
    def _in_query(self) -> Tensor:
        assert self.z is not None
        return self._strengths(self.z[self._active].unsqueeze(0))[0]

    def _strengths(self, z: Tensor) -> Tensor:
        """The strength of each concept in rows of activations of the query's active latents."""
        columns, read = self._readers
        return read(z[:, columns])

    @cached_property
    def _readers(self) -> tuple[list[int], Readers]:
        """Places among the active latents, concept after concept, and how they are read."""
        groups = list(self._concepts().values())
        columns = [self._active.index(latent) for group in groups for latent in group]
        rows = self.view.sae.W_dec.detach().cpu()[[self._active[column] for column in columns]]
        return columns, readers(groups, self._usual_rows(self.view)[:, columns].mean(0), rows)

    def _concepts(self) -> dict[str, list[int]]:
        """What people are shown for the query's active latents, and which latents each is."""
        found: dict[str, list[int]] = {}
        for latent in self._active:
            name = None if self.names is None else self.names.name_of(latent)
            if self.names is None or not len(self.names):
                found[f"#{latent}"] = [latent]
            elif name is not None:
                found.setdefault(self.names.shown_name(name), []).append(latent)
        return found


def _hits(
    store: EmbeddingStore, show: str | Sequence[str], sharing: _Sharing, found: Ranked, *, flipped: bool
) -> tuple[Hit, ...]:
    """The rows of an answer with all that is known of them; `flipped` where it is the answer before the edits."""
    own = (np.arange(1, len(found.rows) + 1), found.scores)
    after, before = (
        ((found.other_ranks, found.other_scores), own) if flipped else (own, (found.other_ranks, found.other_scores))
    )
    rows = store.describe_rows(found.rows, show=show)
    return tuple(
        Hit(
            **vars(row),
            rank=int(after[0][i]),
            score=float(after[1][i]),
            rank_before=int(before[0][i]),
            score_before=float(before[1][i]),
            shared=shared,
        )
        for i, (row, shared) in enumerate(zip(rows, sharing.of(found.rows), strict=True))
    )


class Ranked(NamedTuple):
    """The answer to one state of a query, and where the other state of it has the same rows."""

    rows: Int64[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    other_scores: Float32[np.ndarray, " n"]
    other_ranks: Int64[np.ndarray, " n"]


class Both(NamedTuple):
    """The answers to a query before and after its edits."""

    before: Ranked
    after: Ranked


def search_embeddings(index: Neighbourhood, edited: EditedQuery, n: int, keep: NDArray[np.bool_] | None) -> Both:
    """The rows of the largest cosine, exact in float32."""
    before = index.search(edited.x, n, keep=keep)
    if not edited.is_changed:
        return _unmoved(before)
    after = index.search(edited.x_edited, n, keep=keep)
    return Both(
        _ranked_by(index, before, edited.x_edited, after, keep), _ranked_by(index, after, edited.x, before, keep)
    )


def search_latents(
    sae: SAE,
    store: EmbeddingStore,
    modality: Modality,
    edited: EditedQuery,
    n: int,
    keep: NDArray[np.bool_] | None,
    *,
    device: str | None = None,
) -> Both:
    """The rows whose activations are nearest in L1, from one pass in blocks; scores are minus the distance."""
    assert edited.z is not None and edited.z_edited is not None
    scores = -l1_distances(sae, store, modality, torch.stack([edited.z, edited.z_edited]), device=device)
    allowed = np.arange(len(store)) if keep is None else np.flatnonzero(keep)
    orders = [allowed[np.lexsort((allowed, -score[allowed]))] for score in scores]
    answers = []
    for mine, other in ((0, 1), (1, 0)):
        rows = orders[mine][:n]
        places = np.empty(len(store), np.int64)
        places[orders[other]] = np.arange(1, len(allowed) + 1)
        answers.append(Ranked(rows, scores[mine][rows], scores[other][rows], places[rows]))
    return Both(*answers)


def l1_distances(
    sae: SAE, store: EmbeddingStore, modality: Modality, z: Float[Tensor, "q d_sae"], *, device: str | None = None
) -> NDArray[np.float32]:
    """Of each query's activations to those of every row; no more than a block of rows is encoded at once.

    Activations are not negative, so the sum of |a - b| is the sum of a, plus that of b, less twice that of the
    smaller of both; the last needs only the latents that are active in the query.
    """
    view = View(sae, store, modality, device=device)
    active = (z != 0).any(0).nonzero()[:, 0]
    own, active = z[:, active].to(view.device), active.to(view.device)
    distances = np.empty((len(z), len(store)), np.float32)
    first = 0
    for theirs in view.activations(title="encoding"):
        total, active_ones = theirs.sum(1), theirs[:, active]
        for i, query in enumerate(own):
            overlap = torch.minimum(active_ones, query).sum(1)
            distances[i, first : first + len(theirs)] = (total + query.sum() - 2 * overlap).cpu().numpy()
        first += len(theirs)
    return distances


def _unmoved(found: Neighbours) -> Both:
    ranked = Ranked(found.rows, found.scores, found.scores, np.arange(1, len(found.rows) + 1))
    return Both(ranked, ranked)


def _ranked_by(
    index: Neighbourhood,
    found: Neighbours,
    other: NDArray[np.float32],
    other_found: Neighbours,
    keep: NDArray[np.bool_] | None,
) -> Ranked:
    """The rows of one answer with their scores and ranks in the other, exact for those that are in both."""
    scores = index.cosines(other, found.rows)
    ranks = np.maximum(index.ranks(other, scores, keep=keep), len(other_found.rows) + 1)
    exact = {row: rank for rank, row in enumerate(other_found.rows.tolist(), 1)}
    ranks = np.array([exact.get(row, rank) for row, rank in zip(found.rows.tolist(), ranks.tolist(), strict=True)])
    return Ranked(found.rows, found.scores, scores, ranks.astype(np.int64))
