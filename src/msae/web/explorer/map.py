"""The page Map: every latent that fires, near those with similar decoder rows; beside it the same ones as a list."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from msae.base.errors import ConfigError
from msae.web.explorer.address import Address
from msae.web.explorer.catalogue import CHOICES
from msae.web.explorer.concepts import samples_of
from msae.web.explorer.filling import Slice, draw
from msae.web.explorer.session import LoadedRun, World
from msae.web.page import share

LISTED = 20
"""Latents of the list at once."""
RATES = (0.001, 0.01, 0.05, 0.2)
"""Firing rates that divide the classes."""


class Scale(NamedTuple):
    """A way to colour the points: the class of every latent, and what each class is called."""

    key: str
    label: str
    classes: tuple[str, ...]
    of: NDArray[np.int64]


def scales(run: LoadedRun) -> list[Scale]:
    """Those that this run and this store allow."""
    catalogue = run.catalogue
    if not run.samples:
        return []
    edges = [share(rate) for rate in RATES]
    between = (f"{low} to {high}" for low, high in itertools.pairwise(edges))
    named = (f"below {edges[0]}", *between, f"{edges[-1]} or more")
    found = [Scale("rate", "firing rate", named, np.digitize(catalogue.rate, RATES))]
    levels = catalogue.levels
    if len(levels) > 1:
        first = (catalogue.profile >= 0.5).argmax(1)
        first[~(catalogue.profile >= 0.5).any(1)] = len(levels) - 1
        labels = tuple(f"within {k:,}" for k in levels)
        found.append(Scale("level", "level", labels, first))
    if {"image", "text"} <= set(catalogue.masks):
        of = np.where(catalogue.masks["image"], 0, np.where(catalogue.masks["text"], 2, 1))
        found.append(Scale("modality", "modality", ("image-only", "both", "text-only"), of))
    return found


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page; the places come from `places`, for they take a while the first time."""
    known = scales(run)
    by = next((scale for scale in known if scale.key == address.one("by")), known[0] if known else None)
    return draw("map", world, run, address, choices=CHOICES, scales=known, by=by, **_points(world, run, address, known))


def points(world: World, run: LoadedRun, address: Address) -> Markup:
    """The list of the latents that fit, a page of them."""
    return draw("points", world, run, address, **_points(world, run, address, scales(run)))


def _points(world: World, run: LoadedRun, address: Address, known: list[Scale]) -> dict[str, Any]:
    fits = run.catalogue.select(address.one("words"), address.one("only"), "-evidence")
    fits = fits[np.isin(fits, placed(run))]
    shown = Slice.of(address, len(fits), LISTED, "points", "latents")
    latents = fits[shown.first : shown.last].tolist()
    is_all = len(fits) == len(placed(run))
    return {
        "shown": shown, "latents": latents, "rows": samples_of(world, run, latents),
        "about": {latent: _about(known, latent) for latent in latents},
        "fits": "all" if is_all else " ".join(map(str, fits.tolist())),
    }  # fmt: skip


def _about(known: list[Scale], latent: int) -> str:
    """The classes of a latent in words."""
    return "; ".join(f"{scale.label} {scale.classes[scale.of[latent]]}" for scale in known)


def card(world: World, run: LoadedRun, address: Address) -> Markup:
    """What is shown of one latent beside its point."""
    latent = address.number("latent", 0, high=run.sae.d_sae - 1)
    rows = samples_of(world, run, [latent]).get(latent, [])
    return draw("card", world, run, address, latent=latent, rows=rows, about=_about(scales(run), latent))


def placed(run: LoadedRun) -> NDArray[np.int64]:
    """The latents that have a point: those that fire on the store, or all without one."""
    dead = run.catalogue.masks.get("dead")
    return np.arange(run.sae.d_sae) if dead is None else np.flatnonzero(~dead)


def places(run: LoadedRun) -> dict[str, Any]:
    """The points as the page's script draws them.

    Raises:
        ConfigError: No latent fires on this store.
    """
    latents = placed(run)
    if not len(latents):
        raise ConfigError("no latent fires on this store, so there is nothing to place; open another store with --on")
    found = run.places
    names = {latent: run.name(latent) for latent in latents.tolist() if run.catalogue.names[latent]}
    rate = np.nan_to_num(run.catalogue.rate)[latents]
    return {
        "latents": latents.tolist(),
        "x": found.xy[latents, 0].round(5).tolist(),
        "y": found.xy[latents, 1].round(5).tolist(),
        "size": (np.clip(90 / np.sqrt(len(latents)), 1.5, 5) * (1 + np.sqrt(rate))).round(2).tolist(),
        "names": names,
        "classes": {scale.key: scale.of[latents].tolist() for scale in scales(run)},
        "method": _method(run),
    }


def _method(run: LoadedRun) -> str:
    """How the points were placed, in a sentence."""
    found = run.places
    if found.method == "umap":
        return (
            "Placed by UMAP from the cosines of the decoder rows. Near points are alike; distances between groups mean "
            "little."
        )
    return (
        f"Placed by the two largest principal components of the decoder rows, which show {share(found.explained)} of "
        "their variance: near points may be unlike. With umap-learn the map keeps neighbours together; type: pip "
        "install 'msae[map]', then start msae explore again."
    )


PARTS = {"": page, "points": points, "card": card}
