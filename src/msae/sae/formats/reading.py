"""Reading files of strangers: nothing in them is run, nothing outside of their folder is read."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msae.base.errors import RunError, first_line
from msae.base.results import shorten
from msae.sae.formats.folded import Folded
from msae.sae.model import first_not_finite

MAX_CONFIG = 2**20
"""Bytes of a config; those of an SAE have some hundred."""


def own_file(folder: Path, name: str) -> Path:
    """An ordinary file of the folder; raises `RunError` for anything else, such as a link that leaves it."""
    path = folder / name
    try:
        found, home = path.resolve(strict=True), folder.resolve(strict=True)
    except OSError as err:
        raise RunError(f"{path} cannot be read ({err.strerror}); give a whole folder") from err
    # The hub's cache has links from snapshots/COMMIT/… to blobs/.
    cache = next((parent.parent for parent in home.parents if parent.name == "snapshots"), None)
    if not (found.is_relative_to(home) or (cache is not None and found.is_relative_to(cache / "blobs"))):
        raise RunError(f"{path} is a link that leaves its folder; copy the file that you mean into the folder")
    if not found.is_file():
        raise RunError(f"{path} is no ordinary file; give the folder as its library wrote it")
    return found


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder; raises `RunError`."""
    file = own_file(folder, name)
    if file.stat().st_size > MAX_CONFIG:
        raise RunError(f"{folder / name} has {file.stat().st_size:,} bytes, which no config of an SAE has")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise RunError(f"{folder / name} is not readable JSON ({first_line(err)}); restore it") from err
    if not isinstance(data, dict):
        raise RunError(f"{folder / name} holds a JSON {type(data).__name__}, not an object; restore it")
    return data


def read_safetensors(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and what else its header says; raises `RunError`."""
    file = own_file(folder, name)
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, MemoryError) as err:
        raise RunError(f"{folder / name} is damaged ({first_line(err)}); restore it") from err


def read_pickle(folder: Path, name: str) -> Any:
    """What torch.save wrote, of tensors, numbers, texts and containers of them alone; raises `RunError`."""
    file, shown = own_file(folder, name), folder / name
    scalar: Any = np.float64(0).__reduce__()[0]
    known: list[Any] = [(scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")]
    known += [np.dtype, type(np.dtype(np.float64))]  # the authors keep one number as numpy's, of version 1 or 2
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(known):
            warnings.simplefilter("ignore")  # about the age of the pickle
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        asked = re.search(r"GLOBAL ([\w.]+)|Unsupported global[^`]*`?([\w.]+)|class ([\w.]+)", str(err))
        what = next((group for group in asked.groups() if group), None) if asked else None
        more = f"asks for {what}, more" if what else "holds more"
        raise RunError(
            f"{shown} {more} than tensors and numbers, so it was not read and nothing in it was run; "
            "ask its authors for a .safetensors file"
        ) from err
    except Exception as err:  # what a malformed pickle raises has no end
        why = shorten(first_line(err).partition(". ")[0], 120)
        raise RunError(f"{shown} is damaged or no file of torch.save ({why}); restore it") from err


def tensors_of(data: Any, where: Path) -> dict[str, Tensor]:
    """A mapping of names to tensors that lie in memory as they claim; raises `RunError`."""
    if not isinstance(data, dict):
        raise RunError(f"{where} holds a {type(data).__name__}, not the tensors of an SAE; type msae import --help")
    found = {str(name): tensor for name, tensor in data.items() if isinstance(tensor, Tensor)}
    for name, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise RunError(f"{where} has {name} as no plain tensor; ask its authors for a .safetensors file")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise RunError(f"{where} claims {tuple(tensor.shape)} for {name} but has fewer numbers; restore it")
    return found


def checked(folded: Folded, where: Path) -> Folded:
    """The weights in float32, of shapes that go together and finite; raises `RunError`."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if folded.threshold is not None else []))
    floats: dict[str, Any] = {name: _as_float(getattr(folded, name), name, where) for name in names}
    wide = replace(folded, **floats)
    shapes = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_enc": ("d_sae",), "b_dec": ("d_in",)}
    if wide.W_enc.ndim != 2 or not wide.W_enc.numel():
        raise RunError(f"{where} has an encoder of shape {tuple(wide.W_enc.shape)}, which no SAE has; restore it")
    sizes = dict(zip(shapes["W_enc"], wide.W_enc.shape, strict=True))
    tensors = {name: getattr(wide, name) for name in shapes}
    if wide.threshold is not None:
        shapes, tensors = {**shapes, "threshold": ("d_sae",)}, {**tensors, "threshold": wide.threshold}
    for name, axes in shapes.items():
        wanted = tuple(sizes[axis] for axis in axes)
        if tuple(tensors[name].shape) != wanted:
            raise RunError(
                f"{where} has {name} of shape {tuple(tensors[name].shape)}, its encoder wants {wanted}; restore it"
            )
    broken = first_not_finite(tensors)
    if broken:
        raise RunError(f"{where} has NaN or infinite values in {broken}; restore it")
    if wide.k is not None and not 1 <= wide.k <= sizes["d_sae"]:
        raise RunError(f"{where} says k {wide.k}, which is not between 1 and its {sizes['d_sae']} latents; restore it")
    return wide


def _as_float(tensor: Any, name: str, where: Path) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise RunError(f"{where} has {name} as no floating-point tensor; restore it")
    return tensor.detach().float().contiguous()
