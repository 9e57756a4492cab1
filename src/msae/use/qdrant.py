"""Codes as points of a Qdrant collection: sparse vectors, and the names of what fires as a payload to filter by."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from msae.base.errors import ConfigError, StoreError, first_line, require
from msae.concepts.names import ConceptNames
from msae.sae.view import View

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

    from msae.use.codes import Codes

SPARSE, DENSE = "concepts", "embedding"
"""Names of the two vectors of a point; the names of what fires lie under the first in the payload too."""
POINTS_AT_ONCE = 256


@dataclass(frozen=True)
class Place:
    """A collection, and the client that reaches it."""

    client: QdrantClient
    collection: str

    @classmethod
    def of(cls, to: str, client: QdrantClient | None = None) -> Place:
        """What `qdrant://HOST:PORT/COLLECTION` or `qdrant:///FOLDER/COLLECTION` names.

        Args:
            client: Then `to` is the name of a collection alone.

        Raises:
            ConfigError: It is written otherwise.
        """
        if client is not None:
            return cls(client, to)
        wanted = f"--to {to}; give qdrant://HOST:6333/COLLECTION or qdrant:///FOLDER/COLLECTION"
        try:
            parts = urlsplit(to)
            port = parts.port or 6333
        except ValueError as err:
            raise ConfigError(wanted) from err
        folder, _, collection = parts.path.rpartition("/")
        if parts.scheme not in ("qdrant", "qdrants") or not collection or bool(parts.netloc) == bool(folder):
            raise ConfigError(wanted)
        require("qdrant_client")
        from qdrant_client import QdrantClient as Client

        if folder:
            if Path(folder).exists() and any(Path(folder).iterdir()):
                raise ConfigError(
                    f"--to {to}: {folder} is not empty, and Qdrant unpickles what is in it; give another folder"
                )
            return cls(Client(path=folder), collection)
        scheme = "https" if parts.scheme == "qdrants" else "http"
        key = os.environ.get("QDRANT_API_KEY")
        url = f"{scheme}://{parts.hostname}:{port}"
        return cls(Client(url=url, api_key=key, check_compatibility=False), collection)  # else a thread that warns


def write_qdrant(view: View, parts: Iterable[Codes], place: Place, names: ConceptNames | None) -> int:
    """Write every row as a point, numbered as in the store; gives the number of activations.

    Raises:
        StoreError: The collection exists already, or the server cannot be reached.
    """
    from qdrant_client import models
    from qdrant_client.http.exceptions import ApiException

    client, collection = place.client, place.collection
    named = {} if names is None else {concept.latent: (concept.name, *concept.synonyms) for concept in names}
    n_active = 0
    try:
        if client.collection_exists(collection):
            raise StoreError(f"Qdrant has a collection {collection!r} already; give another name, or delete it there")
        client.create_collection(
            collection,
            vectors_config={DENSE: models.VectorParams(size=view.sae.d_in, distance=models.Distance.COSINE)},
            sparse_vectors_config={SPARSE: models.SparseVectorParams()},
        )
        for part in parts:
            for first in range(0, len(part.counts), POINTS_AT_ONCE):
                rows = np.arange(first, min(first + POINTS_AT_ONCE, len(part.counts)))
                client.upsert(collection, points=_points(view, part, rows, named))
            n_active += len(part.values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # without a server there is no index: nothing is lost
            client.create_payload_index(collection, SPARSE, field_schema=models.PayloadSchemaType.KEYWORD)
    except (ApiException, OSError) as err:
        raise StoreError(
            f"the Qdrant server does not take {collection!r} ({first_line(err)}); check its address and key"
        ) from err
    return n_active


def _points(view: View, part: Codes, rows: np.ndarray, named: dict[int, tuple[str, ...]]) -> list[Any]:
    from qdrant_client import models

    numbers, ends = part.first + rows, part.ends
    dense = view.store.take(numbers, view.modality)
    points = []
    for i, row in enumerate(view.store.describe_rows(numbers)):
        here = slice(ends[rows[i]], ends[rows[i] + 1])
        latents = part.latents[here].tolist()
        sparse = models.SparseVector(indices=latents, values=part.values[here].tolist())
        payload = {
            "id": row.id,
            "image_path": row.path,
            "caption": row.caption,
            SPARSE: sorted({word for latent in latents for word in named.get(latent, ())}),
        }
        points.append(
            models.PointStruct(id=row.row, vector={SPARSE: sparse, DENSE: dense[i].tolist()}, payload=payload)
        )
    return points
