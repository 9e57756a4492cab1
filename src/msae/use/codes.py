"""Sparse codes of rows: which latents fire in each, and how strongly; as parquet, as .npz, or in Qdrant."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from msae.base.errors import ConfigError
from msae.base.files import MADE_BY, atomic_path
from msae.base.results import Result
from msae.concepts.names import ConceptNames, as_names, names_of
from msae.data.store import EmbeddingStore
from msae.sae.model import Inference
from msae.sae.run import RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.qdrant import Place, write_qdrant

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

ROW_GROUP = 8192
"""Rows of a parquet row group: what a reader takes into memory at once."""


class Codes(NamedTuple):
    """The non-zero activations of consecutive rows."""

    first: int
    """Number of the first row."""
    counts: Int64[np.ndarray, " n"]
    """How many latents fire in each row."""
    latents: Int32[np.ndarray, " m"]
    """Row after row, ascending in each."""
    values: Float32[np.ndarray, " m"]

    @property
    def ends(self) -> Int64[np.ndarray, " n_and_one"]:
        """Where each row begins in `latents`, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.counts)])


def codes_of(view: View, *, at_least: int = 1, title: str | None = None) -> Iterator[Codes]:
    """The codes of all rows, in parts of `at_least` rows; the last may have fewer."""
    first, waiting = 0, []
    for z in view.activations(title=title):
        rows, latents = z.nonzero(as_tuple=True)
        counts = np.bincount(rows.cpu().numpy(), minlength=len(z))
        waiting.append((counts, latents.int().cpu().numpy(), z[rows, latents].cpu().numpy()))
        if sum(len(counts) for counts, _, _ in waiting) >= at_least:
            part = Codes(first, *map(np.concatenate, zip(*waiting, strict=True)))
            first, waiting = first + len(part.counts), []
            yield part
    if waiting:
        yield Codes(first, *map(np.concatenate, zip(*waiting, strict=True)))


@dataclass(frozen=True, repr=False)
class Encoded(Result):
    """Where the codes of a store were written."""

    run: str
    on: str
    modality: Modality
    inference: Inference
    to: str
    n: int
    d_sae: int
    n_active: int
    """Activations above zero, of all rows together."""

    @property
    def l0(self) -> float:
        """Mean number of active latents of a row."""
        return self.n_active / self.n

    def to_text(self) -> str:
        return (
            f"{self.to}: codes of {self.n:,} {self.modality} rows of {self.on}, inference {self.inference}, "
            f"{self.l0:.1f} of {self.d_sae:,} latents active in a row on average"
        )

    def records(self) -> list[dict[str, Any]]:
        return [self.to_json()]

    def to_json(self) -> dict[str, Any]:
        fields = ("run", "on", "modality", "inference", "to", "n", "d_sae", "l0")
        return {name: getattr(self, name) for name in fields}


def encode(
    sae: RunLike,
    on: EmbeddingStore | str | Path,
    *,
    out: str | Path | None = None,
    to: str | None = None,
    modality: Modality | None = None,
    inference: Inference = "trained",
    k: int | None = None,
    names: ConceptNames | str | Path | None = None,
    device: str = "auto",
    client: QdrantClient | None = None,
) -> Encoded:
    """The rows of a store as sparse codes: the latents that fire in each, in a file or in a Qdrant collection.

    Args:
        sae: A run folder, or a Hugging Face repository that holds an SAE.
        on: The store that has the rows.
        out: A .parquet with id, indices and values; or a .npz that scipy.sparse.load_npz reads, with the ids in it too.
        to: Instead of a file: qdrant://HOST:PORT/COLLECTION, qdrants:// with TLS, or qdrant:///FOLDER/COLLECTION
            without a server. The collection is made, with the sparse vector `concepts`, the dense vector `embedding`,
            and the names of what fires in the payload. A key is taken from QDRANT_API_KEY.
        modality: Which embeddings of the store. Without it, images where it has them.
        inference: How activations are made: `trained` uses the activation function of the SAE, `threshold` keeps those
            above the thresholds fitted after training, `relu` keeps every positive one.
        k: Only the `k` strongest of each row.
        names: For Qdrant: the names.json to use. Without it, the run's, if there is one.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.
        client: A client of Qdrant instead of that in `to`, which then is the name of the collection alone.

    Raises:
        ConfigError: Neither a file nor a collection is given, or it cannot be one.
        StoreError: The store does not fit the SAE or lacks the modality.
    """
    if (out is None) == (to is None):
        raise ConfigError("give either --out FILE.parquet or FILE.npz, or --to qdrant://HOST:6333/COLLECTION")
    view = View(sae, on, modality, inference=inference, k=k, device=device)
    if to is not None:
        known = as_names(names) if names is not None else names_of(view.run)
        place = Place.of(to, client)
        parts = codes_of(view, title=f"writing to {place.collection}")
        n_active, shown = write_qdrant(view, parts, place, known), to
    else:
        file = Path(str(out))
        if file.suffix not in (".parquet", ".npz"):
            raise ConfigError(f"{file} has the suffix {file.suffix!r}; give a .parquet or a .npz")
        with atomic_path(file) as temporary:
            n_active = (_write_parquet if file.suffix == ".parquet" else _write_npz)(view, temporary)
        shown = str(file)
    return Encoded(
        run=view.run.name,
        on=view.store.address,
        modality=view.modality,
        inference=view.inference,
        to=shown,
        n=len(view),
        d_sae=view.sae.d_sae,
        n_active=n_active,
    )


def _about(view: View) -> dict[str, Any]:
    return {
        "made_by": MADE_BY,
        "sae": view.run.weights,
        "rows": view.store.fingerprint,
        "d_sae": view.sae.d_sae,
        "modality": view.modality,
        "inference": view.inference,
        "k": view.k,
    }


def _write_parquet(view: View, file: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [("id", pa.string()), ("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float32()))],
        metadata={"msae": json.dumps(_about(view))},
    )
    n_active = 0
    with pq.ParquetWriter(file, schema) as writer:
        for part in codes_of(view, at_least=ROW_GROUP, title="encoding"):
            ends = pa.array(part.ends, pa.int32())
            columns = [
                view.store.ids.between(part.first, part.first + len(part.counts)),
                pa.ListArray.from_arrays(ends, pa.array(part.latents)),
                pa.ListArray.from_arrays(ends, pa.array(part.values)),
            ]
            writer.write_table(pa.table(columns, schema=schema))
            n_active += len(part.values)
    return n_active


def _write_npz(view: View, file: Path) -> int:
    """As scipy.sparse.save_npz writes it, but part after part: memory does not grow with the rows."""
    ends: list[np.ndarray] = [np.zeros(1, np.int64)]
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        raw = {name: Path(folder) / name for name in ("indices", "data")}
        with raw["indices"].open("wb") as indices, raw["data"].open("wb") as data:
            for part in codes_of(view, at_least=ROW_GROUP, title="encoding"):
                indices.write(part.latents.tobytes())
                data.write(part.values.tobytes())
                ends.append(ends[-1][-1] + part.ends[1:])
        indptr = np.concatenate(ends)
        small = {
            "format": np.array(b"csr"),
            "shape": np.array([len(view), view.sae.d_sae]),
            "indptr": indptr,
            "ids": np.array(list(view.store.ids)),
            "about": np.array(json.dumps(_about(view))),
        }
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            for name, kind in (("indices", np.dtype(np.int32)), ("data", np.dtype(np.float32))):
                header = {"descr": kind.str, "fortran_order": False, "shape": (int(indptr[-1]),)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member, raw[name].open("rb") as source:
                    np.lib.format.write_array_header_1_0(member, header)
                    shutil.copyfileobj(source, member)
    return int(indptr[-1])
