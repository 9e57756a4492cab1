"""Where the latents lie on a map: decoder rows that are alike are near each other."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from msae.base.files import atomic_path
from msae.sae.run import Run, RunLike

FOLDER = "map"
"""The kind of derived files that places are; see `Run.caches`."""
FILE = "places.safetensors"
SCHEMA_VERSION = "1"
NEIGHBOURS, NEAREST = 6, 0.05
"""UMAP's `n_neighbors` and `min_dist`, which of four settings kept most of the nearest real decoder rows near."""
MIN_FOR_UMAP = 60
"""Latents below which UMAP has nothing to arrange."""

Method = Literal["umap", "pca"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Places:
    """A place on a plane for every latent."""

    method: Method
    """`umap`, or `pca` where umap-learn is not installed."""
    xy: Float32[np.ndarray, "d_sae 2"]
    """From 0 to 1 along the longer side."""
    explained: float
    """For `pca`, the share of the variance of the decoder rows that the plane shows; 1 for `umap`."""


def places_of(sae: RunLike) -> Places:
    """The places of the latents of a run, computed once and kept beside it with a hash of the weights.

    The same weights give the same places. What was made by `pca` is made again once umap-learn is installed.
    """
    run = Run.open(sae)
    wanted = method_for(run.sae.d_sae)
    for folder in run.caches(FOLDER):
        found = _load(folder / FILE, run.weights)
        if found is not None and found.method in ("umap", wanted):
            return found
    made = place(run.sae.W_dec.detach().cpu().numpy(), wanted)
    folder_now = run.writable_cache(FOLDER)
    if folder_now is not None:
        try:
            _save(made, folder_now / FILE, run.weights)
        except OSError as err:
            _log.warning("places are not kept in %s: %s", folder_now, err)
    return made


def method_for(n: int) -> Method:
    """How `n` latents are placed here."""
    return "umap" if n >= MIN_FOR_UMAP and importlib.util.find_spec("umap") is not None else "pca"


def place(rows: Float[np.ndarray, "n d_in"], method: Method) -> Places:
    """Places of decoder rows. UMAP: McInnes, Healy, Melville 2018, arXiv:1802.03426, by the cosine of the rows."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    if method == "umap":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # of a part of it that needs TensorFlow
            from umap import UMAP

        fitted = UMAP(
            n_neighbors=NEIGHBOURS, min_dist=NEAREST, metric="cosine", init="pca", random_state=0, n_jobs=1
        )  # fmt: skip
        return Places("umap", _scaled(fitted.fit_transform(unit)), 1.0)
    centred = unit - unit.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])  # either sign is right: one for all machines
    return Places("pca", _scaled(centred @ axes), float(values[-2:].sum() / max(values.sum(), 1e-12)))


def _scaled(xy: Float[np.ndarray, "n 2"]) -> Float32[np.ndarray, "n 2"]:
    low = xy.min(0)
    scaled: Float32[np.ndarray, "n 2"] = ((xy - low) / max(float((xy.max(0) - low).max()), 1e-12)).astype(np.float32)
    return scaled


def _save(places: Places, file: Path, weights: str) -> None:
    about = {
        "schema_version": SCHEMA_VERSION, "sae": weights, "method": places.method, "explained": str(places.explained)
    }  # fmt: skip
    with atomic_path(file) as temporary:
        save_file({"xy": places.xy}, temporary, metadata=about)


def _load(file: Path, weights: str) -> Places | None:
    """The places in a file; None where there are none of these weights. A damaged one is made again."""
    try:
        with safe_open(file, framework="numpy") as opened:
            about = opened.metadata() or {}
            if about.get("schema_version") != SCHEMA_VERSION or about.get("sae") != weights:
                return None
            method: Method = "umap" if about["method"] == "umap" else "pca"
            return Places(method, opened.get_tensor("xy"), float(about["explained"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
