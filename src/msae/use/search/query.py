"""What is searched for: a row, a picture, a text or a vector, before and after its concepts are edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy.typing import NDArray
from torch import Tensor

from msae.base.errors import ConfigError, MsaeError, SourceError, StoreError, first_line
from msae.concepts.concept import ConceptSet
from msae.data.arrays import NPY_ERRORS
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE
from msae.sae.standardize import Modality
from msae.use.edits import Edit, apply, edit_activations, parse_change, target, warn
from msae.use.search.results import AppliedEdit

if TYPE_CHECKING:
    from msae.data.embedder import Embedder


@dataclass(frozen=True)
class Ask:
    """What the caller gave: exactly one of the first four."""

    like: str | None = None
    image: str | Path | None = None
    text: str | None = None
    embedding: str | Path | NDArray[Any] | None = None
    modality: Modality | None = None
    """Of the row or vector; None takes that which is searched."""
    encoder: str | None = None
    """Folder or hub id, where neither store nor SAE says it."""
    embedder: Embedder | None = None
    """A loaded one, to save the loading."""
    device: str = "auto"
    """Where it is loaded."""

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("like", "image", "text", "embedding") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) + " are" if given else "nothing is"
            raise ConfigError(f"{found} given to search for; give one of --like, --image, --text and --embedding")


@dataclass(frozen=True, eq=False)
class Query:
    """One raw embedding to search for, and where it is from."""

    kind: str
    """like, image, text or embedding."""
    value: str
    """The id, the file or the text."""
    modality: Modality
    x: Float32[np.ndarray, " d_in"] = field(repr=False)
    row: int | None = None
    """Its number, where it is a row of the store."""


def read_query(ask: Ask, store: EmbeddingStore, sae: SAE, searched: Modality) -> Query:
    """The embedding of what is asked for.

    Raises:
        ConfigError: The encoder is unknown, or the vector does not fit.
        StoreError: No row has the id, or the encoder is not the one that made the store.
        SourceError: The picture cannot be read.
    """
    if ask.like is not None:
        row = _row_of(store, ask.like)
        modality = ask.modality or searched
        query = Query("like", ask.like, modality, store.take(np.array([row]), modality)[0], row)
    elif ask.image is not None:
        x = _embed_image(Path(ask.image), _embedder(ask, store, sae, "image"))
        query = Query("image", str(ask.image), "image", x)
    elif ask.text is not None:
        if not ask.text.strip():
            raise ConfigError("the text to search for is empty; give --text some words")
        x = _embedder(ask, store, sae, "text").embed_texts([ask.text])[0]
        query = Query("text", ask.text, "text", x)
    else:
        assert ask.embedding is not None
        is_file = isinstance(ask.embedding, str | Path)
        name = str(ask.embedding) if is_file else "the vector"
        x = _read_vector(Path(ask.embedding)) if is_file else np.asarray(ask.embedding)  # type: ignore[arg-type]
        query = Query("embedding", name, ask.modality or searched, _one_row(x, name))
    _check(query, store)
    return query


def _row_of(store: EmbeddingStore, id: str) -> int:
    try:
        return store.ids.row_of(id)
    except StoreError as err:
        hint = "; it is a file: to search for that picture, type --image" if Path(id).is_file() else ""
        raise StoreError(f"{err}{hint}") from None


def _embedder(ask: Ask, store: EmbeddingStore, sae: SAE, kind: str) -> Embedder:
    from msae.data.embedder import embedder_for

    return embedder_for(
        store,
        sae.config,
        need=f"--{kind}",
        option="--encoder",
        encoder=ask.encoder,
        embedder=ask.embedder,
        device=ask.device,
    )


def _embed_image(path: Path, embedder: Embedder) -> NDArray[np.float32]:
    from msae.data.images import read_picture

    try:
        picture = read_picture(path)
    except SourceError as err:
        raise SourceError(f"{path} cannot be searched for: {err}; give --image a readable picture") from err
    x: NDArray[np.float32] = embedder.embed_images([picture.image])[0]
    return x


def _read_vector(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            x: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist; give --embedding a .npy file with one vector") from None
    except NPY_ERRORS as err:
        raise StoreError(f"{path} cannot be read as .npy ({first_line(err)}); give --embedding a .npy file") from err
    return x


def _one_row(x: NDArray[Any], name: str) -> NDArray[np.float32]:
    if x.dtype.kind not in "fiu" or x.ndim not in (1, 2) or (x.ndim == 2 and len(x) != 1):
        raise ConfigError(f"{name} has the shape {x.shape} of {x.dtype}; wanted one vector of numbers")
    row: NDArray[np.float32] = x.reshape(-1).astype(np.float32)
    return row


def _check(query: Query, store: EmbeddingStore) -> None:
    error: type[MsaeError] = StoreError if query.kind == "like" else ConfigError
    if len(query.x) != store.d_in:
        raise error(
            f"{query.value!r} is {len(query.x)} wide but {store.address} holds {store.d_in}-dim embeddings; "
            f"give one of the same encoder"
        )
    if not np.isfinite(query.x).all() or not query.x.any():
        raise error(f"{query.value!r} is all zero or not finite and has no neighbours; give another")


class EditedQuery(NamedTuple):
    """Both states of a query, as an embedding and as activations."""

    x: Float32[np.ndarray, " d_in"]
    x_edited: Float32[np.ndarray, " d_in"]
    z: Float[Tensor, " d_sae"] | None
    """None where the SAE cannot read the query's modality."""
    z_edited: Float[Tensor, " d_sae"] | None
    edits: tuple[AppliedEdit, ...]
    warnings: tuple[str, ...]

    @property
    def is_changed(self) -> bool:
        return not np.array_equal(self.x, self.x_edited)


def edit_query(
    sae: SAE, query: Query, edits: Sequence[Edit], concepts: ConceptSet, *, exclusive: bool, keep_residual: bool
) -> EditedQuery:
    """The query with all edits made; `exclusive` adds the removal of rivals to every edit that raises a concept.

    Raises:
        ConfigError: The SAE has no statistics of the query's modality, or --exclusive has no names to work with.
    """
    x = torch.from_numpy(query.x).unsqueeze(0)
    if query.modality not in sae.standardizer and not edits and keep_residual:
        note = f"no shared concepts are shown: the SAE has no statistics of {query.modality} embeddings"
        return EditedQuery(query.x, query.x, None, None, (), (note,))
    z = sae.encode(x, query.modality)
    everything: list[Edit] = []
    applied, warnings = [], []
    chosen = {latent for edit in edits for latent in edit.group.latents}
    for edit in edits:
        now = edit.group.strength(z)
        wanted = float(target(edit, now))
        rivals = concepts.rivals(edit.group) if exclusive and wanted > float(now) else []
        removals = [Edit(rival, parse_change(0)) for rival in rivals if not chosen & set(rival.latents)]
        everything += [*removals, edit]
        applied.append(_describe(edit, float(now), wanted, removals, warn(edit, z)))
    warnings += [edit.warning for edit in applied if edit.warning]
    if edits and concepts.view.modality != query.modality:
        warnings.append(
            f"the store has no {query.modality} rows: natural strengths are those of its {concepts.view.modality} rows"
        )
    x_edited = apply(sae, x, query.modality, everything, keep_residual=keep_residual)[0].numpy()
    if not np.isfinite(x_edited).all() or not x_edited.any():
        raise ConfigError("the edited query is all zero or not finite and has no neighbours; edit it less")
    return EditedQuery(query.x, x_edited, z[0], edit_activations(z, everything)[0], tuple(applied), tuple(warnings))


def _describe(edit: Edit, before: float, after: float, rivals: Sequence[Edit], warning: str | None) -> AppliedEdit:
    natural = edit.group.natural
    strengths = {f"p{percent}": natural.quantile(percent) for percent in (50, 90, 99)}
    return AppliedEdit(
        concept=edit.group.name,
        value=str(edit.change),
        latents=edit.group.latents,
        before=before,
        after=after,
        natural={**strengths, "max": natural.maximum, "firing_rate": natural.firing_rate},
        rivals=tuple(rival.group.name for rival in rivals),
        warning=warning,
    )
