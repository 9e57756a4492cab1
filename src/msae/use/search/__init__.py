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
from msae.use.neighbours import WANTED, IndexKind
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
    show: str | Sequence[str] = (),
    modality: Modality | None = None,
    query_modality: Modality | None = None,
    where: str | None = None,
    space: Space = "embedding",
    keep_residual: bool = True,
    exclusive: bool = False,
    strict: bool = False,
    index: IndexKind = "auto",
    recall: float = WANTED,
    names: ConceptNames | str | Path | None = None,
    encoder: str | None = None,
    embedder: Embedder | None = None,
    device: str = "auto",
) -> SearchResult:
    """The rows of a store nearest to a query, before and after concepts of the query are made stronger or weaker.

    The query is one of `like`, `image`, `text` and `embedding`.

    Args:
        sae: A run folder, or a Hugging Face repository that holds an SAE.
        on: The store to search.
        like: Search for the row with this id. The row itself is left out of the answer.
        image: Search for the picture in this file.
        text: Search for these words.
        embedding: Search for the vector in this .npy file.
        set: A change of the query, as in "red=8"; may be given several times. On the left a name, a latent as #123, or
            several joined by |. On the right a strength: 8 (0 removes the concept), x2, +3, -1, p99 or 2xp99.
        n: How many rows to find.
        show: Columns of the metadata to print beside the captions, such as title,colour.
        modality: Which embeddings of the store are searched. Without it, images where the store has them.
        query_modality: What `like` or `embedding` is. Without it, the same as what is searched.
        where: Search only rows whose metadata fit, as in "split == 'test' and size in (1, 2)".
        space: What "nearest" means: by cosine of the embeddings, or by L1 distance of the activations.
        keep_residual: Keep the part of the query that the SAE does not reconstruct.
        exclusive: Also remove the concepts of the same kind as one that is raised: raise red, and blue goes.
        strict: Edit only the named latents; leave correlated latents unchanged.
        index: Compare the query with every row (`exact`), or only with rows in the cells nearest to it (`ivf`), which
            misses some. `auto` takes ivf from 3 million rows on.
        recall: The share of the 20 nearest rows that ivf has to find, as measured when its index was built.
        names: The names.json to use. Without it, the run's, if there is one.
        encoder: The model for `image` and `text`. Without it, the one that made the store.
        embedder: That model, loaded.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: An edit, filter or option is wrong, or a concept unknown.
        StoreError: The store does not fit the SAE, or has no such row or modality.
        SourceError: The picture cannot be read.
        MissingDependencyError: transformers is not installed, for `image` and `text`.
    """
    ask = Ask(like, image, text, embedding, query_modality, encoder, embedder, device)
    how = How(
        _wanted(set),
        n,
        space,
        keep_residual,
        exclusive,
        strict,
        None if where is None else Filter.parse(where),
        show,
        recall,
    )
    return Searcher.open(sae, on, modality=modality, names=names, device=device, index=index).search(ask, how)


def _wanted(edits: Mapping[str, str | float] | Sequence[str]) -> list[tuple[str, Change]]:
    if isinstance(edits, Mapping):
        return [(concept, parse_change(value)) for concept, value in edits.items()]
    return [parse_edit(edit) for edit in edits]
