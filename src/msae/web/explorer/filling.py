"""What the templates of the explorer's pages are given: the world, the run, the address, and the values of a page."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import Markup

from msae.web.explorer.address import Address
from msae.web.explorer.session import LoadedRun, World
from msae.web.page import render


class Slice(NamedTuple):
    """The part of a long list that a page shows, for the links to the parts before and after it."""

    first: int
    size: int
    total: int
    part: str
    """Of the page, which is made again when a link is followed."""
    unit: str
    key: str = "from"
    """In the address."""

    @classmethod
    def of(cls, address: Address, total: int, size: int, part: str, unit: str, key: str = "from") -> Slice:
        """The part that an address asks for, or else the last."""
        first = min(address.number(key, 0), max(0, total - 1) // size * size)
        return cls(first, size, total, part, unit, key)

    @property
    def last(self) -> int:
        return min(self.first + self.size, self.total)


def draw(template: str, world: World, run: LoadedRun, address: Address, **values: Any) -> Markup:
    """A page or a part of one."""
    return render(f"explorer/{template}.html", world=world, run=run, address=address, **values)
