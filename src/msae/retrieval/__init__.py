"""`search`: the nearest neighbours of an embedding in which concepts were turned up or down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msae.concepts import FILE as NAMES_FILE
from msae.concepts import ConceptNames, as_names
from msae.edits import Change, Edit, parse_change, parse_edit
from msae.errors import ConfigError
from msae.filters import Filter
from msae.retrieval.handles import Handles
from msae.retrieval.query import Ask, Query, read_query
from msae.retrieval.results import AppliedEdit, Hit, SearchResult, Shared, Space
from msae.retrieval.spaces import Ranked, check_modality, search_embeddings, search_latents
from msae.retrieval.turning import turn
from msae.sae import SAE, as_sae, check_fit
from msae.standardize import Modality
from msae.store import EmbeddingStore, as_store

if TYPE_CHECKING:
    from msae.embedder import Embedder

__all__ = ["AppliedEdit", "Hit", "SearchResult", "Shared", "search"]

SHARED = 5
"""Concepts that are named with a hit."""


def search(
    sae: SAE | str | Path,
    on: EmbeddingStore | str | Path,
    *,
    like: str | None = None,
    image: str | Path | None = None,
    text: str | None = None,
    embedding: str | Path | NDArray[Any] | None = None,
    set: Mapping[str, str | float] | Sequence[str] = (),
    n: int = 20,
    modality: Modality | None = None,
    query_modality: Modality | None = None,
    where: str | None = None,
    space: Space = "embedding",
    keep_residual: bool = True,
    exclusive: bool = False,
    strict: bool = False,
    names: ConceptNames | str | Path | None = None,
    encoder: str | None = None,
    embedder: Embedder | None = None,
) -> SearchResult:
    """The rows of a store nearest to a query, before and after concepts of the query were turned up or down.

    Args:
        sae: A run folder, or an SAE.
        on: The store to search.
        like: Id of a row of the store; the row itself is left out of the answer.
        image: A picture file.
        text: Words.
        embedding: A raw vector, or a .npy file of one.
        set: Concepts and what to do to them: a number, `x2`, `+3`, `-1`, `p99` or `2xp99`; as a mapping or as
            `CONCEPT=VALUE`. A concept is a name, `#123`, or several of these divided by `|`.
        n: Rows to find.
        modality: What is searched; None is images where the store has them.
        query_modality: Of the row or vector that is searched for; None is `modality`.
        where: A filter on the metadata, such as `split == 'test'`; see `msae.filters`.
        space: `embedding` is by cosine; `latent` by the L1 distance of activations.
        keep_residual: Add back what the SAE does not reconstruct of the query.
        exclusive: Also set to 0 the concepts of the same kind as one that is raised.
        strict: Turn the latents that bear a name alone, and not what moves with them.
        names: Names of the latents; None takes the run folder's, if there are any.
        encoder: The model for `image` and `text`; None is the one that made the store.
        embedder: That model, loaded.

    Raises:
        ConfigError: An edit, filter or option is wrong, or a concept unknown.
        StoreError: The store does not fit the SAE, or has no such row or modality.
        SourceError: The picture cannot be read.
        MissingDependencyError: faiss is not installed.
    """
    ask = Ask(like, image, text, embedding, query_modality, encoder, embedder)
    how = _How(_wanted(set), n, space, keep_residual, exclusive, strict, None if where is None else Filter.parse(where))
    store, known = as_store(on, modality), as_names(names) if names is not None else _names_of(sae)
    model = as_sae(sae)
    check_fit(model, store, run=sae)
    return _search(model, store, modality or store.modalities[0], known, ask, how)


@dataclass(frozen=True)
class _How:
    """The options of a search, checked."""

    edits: Sequence[tuple[str, Change]]
    n: int
    space: Space
    keep_residual: bool
    exclusive: bool
    strict: bool
    filter: Filter | None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"n is {self.n}; give --n of at least 1, for example --n 20")
        if self.space not in ("embedding", "latent"):
            raise ConfigError(f"space {self.space!r} is unknown; give embedding or latent")


def _search(
    sae: SAE, store: EmbeddingStore, searched: Modality, names: ConceptNames | None, ask: Ask, how: _How
) -> SearchResult:
    query = read_query(ask, store, sae, searched)
    keep = _kept(store, how.filter, query)
    handles = Handles(sae, store, query.modality, names, strict=how.strict)
    edits = [Edit(handles.of(concept), change) for concept, change in how.edits]
    if how.space == "latent":
        check_modality(sae, query.modality, searched)
    turned = turn(sae, query, edits, handles, exclusive=how.exclusive, keep_residual=how.keep_residual)
    if how.space == "latent":
        found = search_latents(sae, store, searched, turned, how.n, keep)
    else:
        found = search_embeddings(store, searched, turned, how.n, keep)
    describe = partial(_hits, store, _Sharing(sae, store, searched, names, turned.z_edited))
    return SearchResult(
        store=str(store.path),
        kind=query.kind,
        value=query.value,
        query_modality=query.modality,
        modality=searched,
        space=how.space,
        edits=turned.edits,
        hits=describe(found.after, flipped=False),
        before=describe(found.before, flipped=True) if turned.is_changed else (),
        warnings=turned.warnings,
        roots=store.picture_roots,
        query_path=None if query.row is None else store.describe_rows([query.row])[0].path,
    )


def _wanted(edits: Mapping[str, str | float] | Sequence[str]) -> list[tuple[str, Change]]:
    if isinstance(edits, Mapping):
        return [(concept, parse_change(value)) for concept, value in edits.items()]
    return [parse_edit(edit) for edit in edits]


def _names_of(run: SAE | str | Path) -> ConceptNames | None:
    """The names that `msae name` left in the run folder, if it did."""
    if isinstance(run, SAE) or not (Path(run) / NAMES_FILE).exists():
        return None
    return ConceptNames.load(run)


def _kept(store: EmbeddingStore, filter: Filter | None, query: Query) -> NDArray[np.bool_] | None:
    """The rows that may be found: those of the filter, without the query's own; None where all may."""
    if filter is None and query.row is None:
        return None
    keep = np.ones(len(store), bool) if filter is None else filter.mask(store.metadata)
    if query.row is not None:
        keep = keep.copy()
        keep[query.row] = False
    return keep


class _Sharing(NamedTuple):
    """Finds the concepts that hits share with the edited query."""

    sae: SAE
    store: EmbeddingStore
    modality: Modality
    names: ConceptNames | None
    z: Tensor | None

    def of(self, rows: NDArray[np.int64]) -> list[tuple[Shared, ...]]:
        """Of each row, the concepts of which the query and it both have most; latents where nothing is named."""
        if self.z is None or self.modality not in self.sae.standardizer or not len(rows):
            return [()] * len(rows)
        hits = self.sae.encode(torch.from_numpy(self.store.take(rows, self.modality)), self.modality)
        concepts = self._concepts()
        if not concepts:
            return [()] * len(rows)
        query = torch.stack([self.z[latents].sum() for latents in concepts.values()])
        theirs = torch.stack([hits[:, latents].sum(1) for latents in concepts.values()], 1)
        common = torch.minimum(theirs, query)
        names = list(concepts)
        found = []
        for row, values in zip(theirs, common, strict=True):
            best = values.topk(min(SHARED, len(names))).indices.tolist()
            found.append(tuple(Shared(names[i], float(query[i]), float(row[i])) for i in best if float(values[i]) > 0))
        return found

    def _concepts(self) -> dict[str, list[int]]:
        """The names of the query's active latents, and which latents bear them."""
        assert self.z is not None
        active = self.z.nonzero()[:, 0].tolist()
        if self.names is None:
            return {f"#{latent}": [latent] for latent in active}
        found: dict[str, list[int]] = {}
        for latent in active:
            name = self.names.name_of(latent)
            if name is not None:
                found.setdefault(name, []).append(latent)
        return found


def _hits(store: EmbeddingStore, sharing: _Sharing, found: Ranked, *, flipped: bool) -> tuple[Hit, ...]:
    """The rows of an answer with all that is known of them; `flipped` where it is the answer before the edits."""
    own = (np.arange(1, len(found.rows) + 1), found.scores)
    after, before = (
        ((found.other_ranks, found.other_scores), own) if flipped else (own, (found.other_ranks, found.other_scores))
    )
    rows = store.describe_rows(found.rows)
    return tuple(
        Hit(
            rank=int(after[0][i]),
            id=row.id,
            score=float(after[1][i]),
            rank_before=int(before[0][i]),
            score_before=float(before[1][i]),
            row=row.row,
            path=row.path,
            caption=row.caption,
            shared=shared,
            columns=row.columns,
        )
        for i, (row, shared) in enumerate(zip(rows, sharing.of(found.rows), strict=True))
    )
