"""`export`: an SAE, or rows with their concepts, in the format of another library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msae.base.errors import ConfigError
from msae.base.files import atomic_folder
from msae.base.results import Result
from msae.concepts.names import ConceptNames
from msae.data.store import EmbeddingStore
from msae.sae.formats import write_folder
from msae.sae.formats.as_onnx import write_onnx
from msae.sae.formats.folded import modality_of
from msae.sae.model import Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality
from msae.use.atlas import write_atlas

Format = Literal["saelens", "sparsify", "dictionary-learning", "sentence-transformers", "embedding-atlas", "onnx"]
HOW: dict[Format, str] = {
    "saelens": 'from sae_lens import SAE; SAE.load_from_disk("{out}")',
    "sparsify": 'from sparsify import SparseCoder; SparseCoder.load_from_disk("{out}")',
    "dictionary-learning": 'from dictionary_learning.utils import load_dictionary; load_dictionary("{out}", "cpu")',
    "sentence-transformers": (
        'from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder; SparseAutoEncoder.load("{out}")'
    ),
    "embedding-atlas": "embedding-atlas {out}/rows.parquet --vector embedding --features features{image}",
    "onnx": 'import onnxruntime; onnxruntime.InferenceSession("{out}/encoder.onnx")',
}


@dataclass(frozen=True, repr=False)
class Exported(Result):
    """What was written, and how the other library reads it."""

    run: str
    to: Format
    out: str
    modality: Modality
    files: tuple[str, ...]
    scale: float | None
    """The activations of the other library are those of msae divided by this; None where they are the same."""
    how: str
    notes: tuple[str, ...] = ()

    def to_text(self) -> str:
        lines = [f"{self.out}: {self.run} for {self.to}, {self.modality} embeddings: {', '.join(self.files)}"]
        if self.scale is not None:
            lines.append(f"  it reads raw embeddings; its activations are those of msae divided by {self.scale:.6g}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes), f"read it by: {self.how}"])

    def records(self) -> list[dict[str, Any]]:
        return [self.to_json()]

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "to": self.to,
            "out": self.out,
            "modality": self.modality,
            "files": list(self.files),
            "scale": self.scale,
            "how": self.how,
            "notes": list(self.notes),
        }


def export(
    run: RunLike,
    *,
    to: Format,
    out: str | Path,
    modality: Modality | None = None,
    inference: Inference = "trained",
    k: int | None = None,
    on: EmbeddingStore | str | Path | None = None,
    names: ConceptNames | str | Path | None = None,
) -> Exported:
    """An SAE in the format of another library, or rows with their concepts for embedding-atlas.

    Standardisation and thresholds are folded into the weights, so that the other library reads raw embeddings and has
    the same latents active in each row.

    Args:
        run: A run folder, or a Hugging Face repository that holds an SAE.
        to: The library or the format.
        out: The folder to make.
        modality: Whose mean and scale are folded in; without it, the only one that the SAE has.
        inference: Which latents are active: `trained` as the SAE was saved, `relu` every positive one, `threshold`
            those above the thresholds fitted after training.
        k: Only the `k` strongest of each row; sparsify and sentence-transformers know nothing else.
        on: For embedding-atlas: the store of the rows.
        names: For embedding-atlas: the names.json to use. Without it, the run's, if there is one.

    Raises:
        ConfigError: The format cannot hold such an SAE.
        RunError: There is no such run.
    """
    if to not in HOW:
        raise ConfigError(f"there is no format {to!r}; give {', '.join(HOW)}")
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out} exists already; give another --out")
    opened = Run.open(run)
    sae, scale, image, notes = opened.sae, None, "", []
    if (on is None) != (to != "embedding-atlas"):
        wanted = "embedding-atlas shows rows; give them by --on STORE"
        raise ConfigError(wanted if on is None else f"{to} holds no rows; leave --on out")
    if to == "embedding-atlas":
        with atomic_folder(out) as folder:
            written = write_atlas(opened, on, folder, modality, inference=inference, k=k, names=names)
        modality, image, notes = written.modality, " --image image" if written.n_images else "", list(written.notes)
    else:
        modality = modality_of(sae, modality)
        asked: Inference = inference if k is None else "topk"
        with atomic_folder(out) as folder:
            if to == "onnx":
                write_onnx(sae, folder / "encoder.onnx", modality, inference=asked, k=k)
            else:
                write_folder(sae, to, folder, modality, inference=asked, k=k)
                scale = sae.standardizer.statistics[modality].scale
    if to == "sentence-transformers":
        notes.append("the active latents are exact; its decoder is the encoder transposed, so reconstructions are not")
    return Exported(
        run=opened.name,
        to=to,
        out=str(out),
        modality=modality,
        files=tuple(sorted(file.name for file in out.iterdir())),
        scale=scale,
        how=HOW[to].format(out=out, image=image),
        notes=tuple(notes),
    )
