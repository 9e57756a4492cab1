"""The page Concepts: every latent of a run, to be searched, sorted and filtered."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import Markup

from msae.data.rows import Row
from msae.web.explorer.address import Address
from msae.web.explorer.catalogue import CHOICES
from msae.web.explorer.filling import Slice, draw
from msae.web.explorer.session import LoadedRun, World

ROWS = 40
"""Latents on a page."""
THUMBNAILS = 4


class Column(NamedTuple):
    """A column of the table."""

    key: str
    label: str
    meaning: str


COLUMNS = (
    Column("name", "concept", "The name of the latent; in grey, the nearest word, which has too little evidence."),
    Column(
        "evidence",
        "evidence",
        "Cosine between the latent's direction and the word's embedding. AUROC: how well the latent's activation "
        "separates rows whose caption has the word from rows whose caption has not; 0.5 is chance, 1 is perfect.",
    ),
    Column("rate", "fires in", "Share of the rows in which the activation is not zero."),
    Column("mean", "mean", "Mean activation over all rows."),
    Column("max", "largest", "Largest activation in any row."),
    Column(
        "level",
        "rank in a row",
        "One bar for each level k: of the rows in which the latent fires, the share in which it is among the k "
        "strongest latents. High bars on the left mark a broad concept.",
    ),
)


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page."""
    return draw("concepts", world, run, address, choices=CHOICES, **_table(world, run, address))


def table(world: World, run: LoadedRun, address: Address) -> Markup:
    """The latents that fit, a page of them."""
    return draw("table", world, run, address, **_table(world, run, address))


def _table(world: World, run: LoadedRun, address: Address) -> dict[str, Any]:
    sort = address.one("sort") or "-evidence"
    found = run.catalogue.select(address.one("words"), address.one("only"), sort)
    shown = Slice.of(address, len(found), ROWS, "table", "latents")
    latents = found[shown.first : shown.last].tolist()
    return {
        "columns": COLUMNS,
        "sort": sort,
        "shown": shown,
        "latents": latents,
        "rows": samples_of(world, run, latents),
    }


def samples_of(world: World, run: LoadedRun, latents: list[int]) -> dict[int, list[Row]]:
    """The rows that fire each latent most, of the first modality."""
    if world.store is None or not run.samples:
        return {}
    samples = next(iter(run.samples.values()))
    wanted = {latent: [one.row for one in samples.top(latent, THUMBNAILS)] for latent in latents}
    numbers = [row for rows in wanted.values() for row in rows]
    rows = iter(world.rows(numbers))
    return {latent: [next(rows) for _ in numbers] for latent, numbers in wanted.items()}


PARTS = {"": page, "table": table}
