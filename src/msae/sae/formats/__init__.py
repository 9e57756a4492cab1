"""SAEs of other libraries: `import_sae` reads them; `write_folder` writes them for `msae.export`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from msae.base.errors import MsaeError, RunError
from msae.base.records import of_record, to_record
from msae.base.results import Result
from msae.sae.formats.folded import Folded, fold, unfold
from msae.sae.formats.layouts import LAYOUTS, read_prisma
from msae.sae.formats.reading import checked, read_config, read_pickle, read_safetensors, tensors_of
from msae.sae.model import CONFIG_FILE, SAE, Inference, SAEConfig
from msae.sae.standardize import Modality, Standardizer, Statistics

OURS = "msae.safetensors"
"""Beside the files of another library: what of our SAE these cannot hold, so that it comes back as it was."""


class Found(NamedTuple):
    """An SAE in files of another library."""

    sae: SAE
    format: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Imported(Result):
    """An SAE of another library, now a run."""

    run: str
    format: str
    sae: SAE = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_text(self) -> str:
        lines = [f"{self.run}: from {self.format}: {self.sae!r}", *(f"  note: {note}" for note in self.notes)]
        return "\n".join([*lines, f"next: msae evaluate {self.run} --on STORE"])

    def records(self) -> list[dict[str, Any]]:
        return [self.to_json()]

    def to_json(self) -> dict[str, Any]:
        config = {key: value for key, value in to_record(self.sae.config).items() if value is not None}
        return {"run": self.run, "format": self.format, **config, "notes": list(self.notes)}


def import_sae(
    file: str | Path,
    *,
    out: str | Path,
    modality: Modality = "image",
    encoder: str | None = None,
    soft_cap: float | None = None,
) -> Imported:
    """An SAE of another library as a run; in Python it is called import_sae.

    It reads the .pth of the MSAE authors and of SEM, and the folders of SAELens, sparsify, dictionary_learning and
    ViT-Prisma. Of a pickle only tensors, numbers and texts are read; nothing in it is run.

    Args:
        file: The .pth or .pt file, or the folder with the config and the weights.
        out: The run folder to make.
        modality: What the embeddings are that the mean and the scale of an authors' file belong to.
        encoder: The model that made the embeddings, such as openai/clip-vit-base-patch32; files do not say it.
        soft_cap: Of an authors' file with a soft cap, which it does not say; its name does.

    Raises:
        RunError: There is no SAE that msae can read, or `out` has a run already.
    """
    out = Path(out)
    if (out / CONFIG_FILE).exists():
        raise RunError(f"{out} has an SAE already; give another --out")
    found = read_file(Path(file), modality=modality, encoder=encoder, soft_cap=soft_cap)
    found.sae.save(out)
    return Imported(str(out), found.format, found.sae, found.notes)


def read_file(
    path: Path, *, modality: Modality = "image", encoder: str | None = None, soft_cap: float | None = None
) -> Found:
    """The SAE in a file or a folder of another library; raises `RunError`."""
    if not path.exists():
        raise RunError(f"{path} does not exist; give a .pth file, or a folder of SAELens, sparsify and so on")
    if path.is_dir():
        return read_folder(path, encoder=encoder)
    folder, names = path.parent, {layout.weights for layout in LAYOUTS.values()} | {"cfg.json", "config.json"}
    if path.name in names:
        return read_folder(folder, encoder=encoder)
    if path.suffix not in (".pth", ".pt"):
        raise RunError(f"{path} is neither a .pth nor a .pt file; give one, or the folder that a library wrote")
    data = read_pickle(folder, path.name)
    if isinstance(data, dict) and "model" in data:
        return _authors(data, path, modality, encoder, soft_cap)
    if isinstance(data, dict) and "bpre" in data:
        return _sem(data, path, encoder)
    if isinstance(data, dict) and (folder / "config.json").exists():
        return _prisma(folder, path.name, encoder)
    raise RunError(
        f"{path} has none of the tensors of the MSAE authors' files ('model') and of SEM's ('bpre'); "
        "give one of those, or a folder with a config.json"
    )


def read_folder(folder: Path, *, encoder: str | None = None) -> Found:
    """The SAE in a folder that another library, or `msae.export`, wrote; raises `RunError`."""
    if (folder / CONFIG_FILE).exists():
        raise RunError(f"{folder} is a run of msae already; use it as it is")
    for name, layout in LAYOUTS.items():
        if not ((folder / layout.weights).exists() and (folder / layout.config).exists()):
            continue
        where = folder / layout.weights
        if layout.read is None:
            raise RunError(f"{where} is of {name}, whose decoder is its encoder transposed; msae has no such SAE")
        config = read_config(folder, layout.config)
        if layout.weights.endswith(".pt"):
            tensors = tensors_of(read_pickle(folder, layout.weights), where)
        else:
            tensors = read_safetensors(folder, layout.weights)[0]
        folded = _made(functools.partial(layout.read, config, tensors), where)
        ours, note = _ours(folder, folded)
        return Found(ours or unfold(folded, encoder=encoder), name, note)
    weights = [file.name for file in sorted(folder.glob("*.pt"))]
    if (folder / "config.json").exists() and len(weights) == 1:
        return _prisma(folder, weights[0], encoder)
    raise RunError(
        f"{folder} has neither cfg.json with sae_weights.safetensors or sae.safetensors, nor config.json with ae.pt or "
        "one .pt file; give the folder of one SAE"
    )


def write_folder(
    sae: SAE, to: str, folder: Path, modality: Modality, *, inference: Inference = "trained", k: int | None = None
) -> Folded:
    """Write the SAE of one modality for another library into an empty folder.

    Raises:
        ConfigError: That library has no such SAE.
    """
    folded = fold(sae, modality, inference=inference, k=k)
    known = sae.standardizer.statistics[modality]
    about: dict[str, Any] = {
        "made_by": "msae",
        "modality": modality,
        "encoder": sae.config.encoder,
        "scale": known.scale,
        "mean": known.mean.tolist(),
    }
    LAYOUTS[to].write(folded, folder, about)
    if LAYOUTS[to].read is not None:
        same = [name for name in ("W_enc", "W_dec") if torch.equal(getattr(folded, name), getattr(sae, name))]
        kept = {name: tensor for name, tensor in sae.to_tensors().items() if name not in same}
        settings = {"modality": modality, "inference": inference, "k": k, "config": to_record(sae.config)}
        save_file(kept, folder / OURS, metadata={"msae": json.dumps(settings)})
    return folded


def _ours(folder: Path, folded: Folded) -> tuple[SAE | None, tuple[str, ...]]:
    """The SAE that was exported, where the folder still holds it; a note where it has been changed since."""
    if not (folder / OURS).exists():
        return None, ()
    tensors, metadata = read_safetensors(folder, OURS)
    where = str(folder / OURS)
    try:
        settings: Mapping[str, Any] = json.loads(metadata.get("msae", ""))
        data, modality = settings["config"], settings["modality"]
        config = of_record(SAEConfig, data, where=where, error=RunError, remedy="delete it to go without")
        weights = {"W_enc": folded.W_enc, "W_dec": folded.W_dec}
        sae = SAE.of_tensors(config, {**weights, **tensors}, where=where)
        same = fold(sae, modality, inference=settings["inference"], k=settings["k"]).is_close(folded)
    except (KeyError, TypeError, ValueError, MsaeError) as err:
        raise RunError(f"{where} is damaged ({err}); delete it to import the SAE without it") from err
    if same:
        return sae, ()
    return None, (f"{OURS} is of other weights and was ignored: the SAE was changed after its export",)


def _made(make: Callable[[], Folded], where: Path) -> Folded:
    """What `make` makes of foreign tensors, checked; raises `RunError`."""
    try:
        return checked(make(), where)
    except KeyError as err:
        raise RunError(f"{where} has no {err.args[0]}, which an SAE of its kind has; restore it") from err
    except RunError as err:
        message = str(err)
        raise RunError(message if str(where) in message else f"{where} cannot be read: {message}") from err
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as err:
        raise RunError(f"{where} has tensors that do not go together ({err}); restore it") from err


def _authors(data: Any, path: Path, modality: Modality, encoder: str | None, soft_cap: float | None) -> Found:
    tensors = tensors_of(data["model"], path)

    def make() -> Folded:
        decoder = tensors.get("decoder", tensors["encoder"].T)
        return Folded(tensors["encoder"], decoder, tensors["latent_bias"], tensors["pre_bias"])

    folded = _made(make, path)
    mean = tensors_of({"mean": data.get("mean_center")}, path).get("mean")
    standardizer, notes = None, []
    try:
        scale = float(data.get("scaling_factor", 1.0))
    except (TypeError, ValueError) as err:
        raise RunError(f"{path} has a scaling_factor that is no number; restore it") from err
    if not 0 < scale < float("inf"):
        raise RunError(f"{path} has the scaling_factor {scale}, which is not positive; restore it")
    if mean is not None:
        if tuple(mean.shape) != (folded.d_in,) or not bool(mean.isfinite().all()):
            raise RunError(f"{path} has a mean_center of shape {tuple(mean.shape)}, not {(folded.d_in,)}; restore it")
        standardizer = Standardizer({modality: Statistics(mean.float(), scale)})
    else:
        notes.append("the file has no mean_center, so its embeddings are taken as they are")
    if soft_cap is None:
        notes.append("the file does not say whether it has a soft cap; where its name does, give --soft-cap")
    sae = unfold(folded, standardizer=standardizer, encoder=encoder, soft_cap=soft_cap)
    return Found(sae, "the MSAE authors' .pth", (*notes, *_norms(sae)))


def _sem(data: Any, path: Path, encoder: str | None) -> Found:
    tensors = tensors_of(data, path)

    def make() -> Folded:
        W_enc, W_dec = tensors["encoder.weight"].T, tensors["decoder.weight"].T
        return Folded(W_enc, W_dec, tensors["encoder.bias"], tensors["bpre"])

    sae = unfold(_made(make, path), encoder=encoder, unnormalised=True)
    note = "it was trained on embeddings that were not scaled to norm 1: give it a store of such embeddings"
    return Found(sae, "SEM's .pth", (note, *_norms(sae)))


def _prisma(folder: Path, name: str, encoder: str | None) -> Found:
    config, data = read_config(folder, "config.json"), read_pickle(folder, name)
    tensors = tensors_of(data.get("state_dict", data) if isinstance(data, dict) else data, folder / name)
    folded = _made(lambda: read_prisma(config, tensors), folder / name)
    note = "it reads a layer's hidden states, not the embeddings at the end of the encoder"
    return Found(unfold(folded, encoder=encoder, unnormalised=True), "ViT-Prisma", (note,))


def _norms(sae: SAE) -> tuple[str, ...]:
    """A note where decoder rows are not of norm 1, as ours are."""
    norms = sae.W_dec.detach().norm(dim=1)
    low, high = float(norms.min()), float(norms.max())
    if 0.99 < low <= high < 1.01:
        return ()
    return (f"its decoder rows have norms from {low:.2f} to {high:.2f}: activations of two latents do not compare",)


__all__ = ["OURS", "Found", "Imported", "import_sae", "read_file", "read_folder", "write_folder"]
