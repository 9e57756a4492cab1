"""The page Compare: which concepts set the rows of one value of a column apart from those of another."""

from __future__ import annotations

import shlex
from typing import Any

from markupsafe import Markup

from msae.use.compare import MEANINGS, Comparison
from msae.web.explorer.address import Address
from msae.web.explorer.filling import draw
from msae.web.explorer.session import LoadedRun, World

SHOWN, PICTURED = 40, 12


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page; the comparison is loaded after it."""
    column = address.one("column")
    values: list[str] = []
    if world.store is not None and column in world.targets:
        values = sorted(world.store.coded_labels(column)[1])
    is_asked = bool(address.one("a") and address.one("b"))
    return draw("compare", world, run, address, column=column, values=values, is_asked=is_asked)


def compared(world: World, run: LoadedRun, address: Address) -> Markup:
    """The comparison.

    Raises:
        MsaeError: There is no such column or value, or the sides share rows.
    """
    assert world.store is not None
    column, within = address.one("column"), tuple(one for one in address.many("within") if one)
    parts = [f"{world.store.address}:{column}={address.one(side)}" for side in ("a", "b")]
    found: Comparison = run.compared(parts[0], parts[1], within)
    command = ["msae", "compare", str(run.folder), *parts, *(["--within", *within] * bool(within))]
    values: dict[str, Any] = {
        "found": found, "shown": found.standing_out[:SHOWN], "pictured": found.standing_out[:PICTURED],
        "meanings": MEANINGS, "command": shlex.join(command),
    }  # fmt: skip
    return draw("compared", world, run, address, **values)


PARTS = {"": page, "compared": compared}
