"""The page Find: which latents go with a value of a column, or with rows that were picked and not with others."""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from msae.concepts.examples import MIN_EXAMPLES, ExampleConcept, from_column, from_rows
from msae.concepts.find import Found, FoundLatent
from msae.concepts.find import find as find_latents
from msae.data.rows import Row
from msae.sae.view import View
from msae.web.explorer.address import Address
from msae.web.explorer.filling import draw
from msae.web.explorer.session import LoadedRun, World

SHOWN, STRIP, MOST_PICKED = 24, 4, 200


class Picked(NamedTuple):
    """Rows that were picked by clicking."""

    like: tuple[str, ...]
    unlike: tuple[str, ...]

    @classmethod
    def of(cls, address: Address) -> Picked:
        return cls(*(tuple(dict.fromkeys(address.many(side)))[:MOST_PICKED] for side in ("like", "unlike")))

    def toggled(self, side: str, id: str) -> dict[str, tuple[str, ...]]:
        """The settings of an address in which the row is on that side, or on none where it was."""
        was = id in getattr(self, side)
        sides = {name: tuple(one for one in ids if one != id) for name, ids in self._asdict().items()}
        return sides if was else sides | {side: (*sides[side], id)}


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page; what takes seconds is loaded after it."""
    picked = Picked.of(address)
    return draw("find", world, run, address, picked=picked, rows=_rows(world, [*picked.like, *picked.unlike]),
                fewest=MIN_EXAMPLES,
                is_asked=len(picked.like) >= MIN_EXAMPLES or bool(address.one("value")))  # fmt: skip


def _rows(world: World, ids: list[str]) -> list[Row]:
    if world.store is None or not ids:
        return []
    return world.rows([world.store.ids.row_of(id) for id in ids])


def values(world: World, run: LoadedRun, address: Address) -> Markup:
    """The latents that go with each value of the column.

    Raises:
        MsaeError: There is no such column, or no value has enough rows.
    """
    assert world.store is not None
    found = find_latents(run.opened, world.store, address.one("column"), n=3, device=run.device)
    return draw("values", world, run, address, found=found, strips=_strips(world, run, found))


def _strips(world: World, run: LoadedRun, found: Found) -> dict[int, list[Row]]:
    """The strongest rows of each latent that is shown."""
    samples = run.samples[found.modality]
    shown: list[FoundLatent] = [latent for one in found.values for latent in one.latents]
    return {one.latent: world.rows([top.row for top in samples.top(one.latent, STRIP)]) for one in shown}


def learnt(world: World, run: LoadedRun, address: Address) -> Markup:
    """The concept that the picked rows, or the rows with the value, have in common.

    Raises:
        MsaeError: Too few rows, or no such row, column or value.
    """
    assert world.store is not None
    store, picked = world.store, Picked.of(address)
    view = View(run.opened, store, run.modalities[0], device=run.device)
    column, value = address.one("column"), address.one("value")
    command = ["msae", "name", str(run.folder), "--as", "NAME"]
    if picked.like:
        like, unlike = ([store.ids.row_of(id) for id in ids] for ids in picked)
        found = from_rows(view, "these rows", np.array(like), np.array(unlike, np.int64), shown=f"{len(like)} rows")
        command += ["--on", store.address, "--like", *picked.like, *(["--unlike", *picked.unlike] * bool(unlike))]
        concept = "|".join(f"#{latent}" for latent in found.latents)
    else:
        found = from_column(view, column, value)
        command += ["--from", f"{store.address}:{column}={value}"]
        concept = found.name
    known: dict[str, Any] = {"found": found, "concept": concept, "command": shlex.join(command), "picked": picked}
    return draw("learnt", world, run, address, rows=_strongest(world, view, found), **known)


def _strongest(world: World, view: View, found: ExampleConcept) -> list[Row]:
    """The rows in which the concept is strongest."""
    latents, weights = list(found.signed), np.array(list(found.signed.values()))
    strength = np.concatenate([block.cpu().numpy() @ weights for block in view.activations(latents)])
    return world.rows(np.argsort(-strength, kind="stable")[:SHOWN].tolist())


PARTS = {"": page, "values": values, "learnt": learnt}
