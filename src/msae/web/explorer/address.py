"""`Address`: what a page shows, all of it, as the query string of its URL; so a link reproduces the view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode

PAGES = ("concepts", "concept", "map", "search", "find", "compare", "audit", "models")
MAX_LENGTH = 60_000
"""Characters of a query string; a vector of 1,536 numbers takes 8,192 of them."""

Value = str | int | Sequence[str] | None


@dataclass(frozen=True)
class Address:
    """The page and its settings, as they stand in the URL."""

    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address of a query string, with or without its `?`; whatever is malformed in it is left out."""
        found: dict[str, tuple[str, ...]] = {}
        for key, value in parse_qsl(text[:MAX_LENGTH].removeprefix("?"), errors="replace"):
            found[key] = (*found.get(key, ()), value)
        return cls(found)

    @property
    def page(self) -> str:
        page = self.one("page")
        return page if page in PAGES else PAGES[0]

    def one(self, key: str, default: str = "") -> str:
        return self.values.get(key, (default,))[-1]

    def many(self, key: str) -> tuple[str, ...]:
        return self.values.get(key, ())

    def number(self, key: str, default: int, *, low: int = 0, high: int = 2**31) -> int:
        """A whole number between `low` and `high`; the default where it is none."""
        text = self.one(key)
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default
        return min(max(number, low), high)

    def to(self, page: str, **values: Value) -> str:
        """A link to another page of the same run."""
        return _link({"page": (page,), **self._only("run"), **_plain(values)})

    def but(self, **values: Value) -> str:
        """A link to this page with some settings changed; None removes one."""
        return _link({"page": (self.page,), **self.values, **_plain(values)})

    def _only(self, key: str) -> dict[str, tuple[str, ...]]:
        return {key: self.values[key]} if key in self.values else {}


def _plain(values: Mapping[str, Value]) -> dict[str, tuple[str, ...]]:
    return {
        key: () if value is None else (str(value),) if isinstance(value, str | int) else tuple(value)
        for key, value in values.items()
    }


def _link(values: Mapping[str, tuple[str, ...]]) -> str:
    return "?" + urlencode([(key, value) for key, several in values.items() for value in several])
