"""`search`: the nearest neighbours of an embedding in which concepts were raised or lowered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from msae.concepts.names import ConceptNames
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE
from msae.sae.standardize import Modality
from msae.use.edits import Change, parse_change, parse_edit
from msae.use.filters import Filter
from msae.use.search.query import Ask
from msae.use.search.results import AppliedEdit, Hit, SearchResult, Shared, Space
from msae.use.search.searcher import How, Searcher

if TYPE_CHECKING:
    from msae.data.embedder import Embedder

__all__ = ["AppliedEdit", "Ask", "Hit", "How", "SearchResult", "Searcher", "Shared", "search"]


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
    """The rows of a store nearest to a query, before and after concepts of the query were raised or lowered.

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
        where: A filter on the metadata, such as `split == 'test'`; see `msae.use.filters`.
        space: `embedding` is by cosine; `latent` by the L1 distance of activations.
        keep_residual: Add back what the SAE does not reconstruct of the query.
        exclusive: Also set to 0 the concepts of the same kind as one that is raised.
        strict: Edit only the named latents; leave correlated latents unchanged.
        names: Names of the latents; None takes the run folder's, if there are any.
        encoder: The model for `image` and `text`; None is the one that made the store.
        embedder: That model, loaded.

    Raises:
        ConfigError: An edit, filter or option is wrong, or a concept unknown.
        StoreError: The store does not fit the SAE, or has no such row or modality.
        SourceError: The picture cannot be read.
        MissingDependencyError: transformers is not installed, for `image` and `text`.
    """
    ask = Ask(like, image, text, embedding, query_modality, encoder, embedder)
    how = How(_wanted(set), n, space, keep_residual, exclusive, strict, None if where is None else Filter.parse(where))
    return Searcher.open(sae, on, modality=modality, names=names).search(ask, how)


def _wanted(edits: Mapping[str, str | float] | Sequence[str]) -> list[tuple[str, Change]]:
    if isinstance(edits, Mapping):
        return [(concept, parse_change(value)) for concept, value in edits.items()]
    return [parse_edit(edit) for edit in edits]
