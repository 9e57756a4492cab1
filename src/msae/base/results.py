"""What every result of a verb can do: text for a terminal, JSON, a table for pandas, and how a notebook shows it."""

from __future__ import annotations

import html
import importlib
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from msae.base.errors import MissingDependencyError

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

REPR = 200
"""Characters of a result's text in its repr."""


class Result(ABC):
    """Base of the results of verbs: a subclass has `to_text`, `to_json` and `records`.

    A dataclass of this kind needs `repr=False`; its own repr would be a dump of all fields.
    """

    @abstractmethod
    def to_text(self) -> str:
        """What the command prints."""

    @abstractmethod
    def to_json(self) -> Any:
        """What `--json` writes, in values that JSON can hold."""

    @abstractmethod
    def records(self) -> Sequence[Mapping[str, Any]]:
        """One flat record for each row of the result's table."""

    def to_pandas(self) -> pd.DataFrame:
        """The result as a table, one row for each of `records`.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        table: pd.DataFrame = import_pandas().DataFrame([dict(row) for row in self.records()])
        return table

    @property
    def headline(self) -> str:
        """One line that says what it is; the first of its text."""
        return next((line for line in self.to_text().splitlines() if line.strip()), "")

    def __repr__(self) -> str:
        """What it is, in one line."""
        return f"<{type(self).__name__}: {shorten(' '.join(self.headline.split()), REPR)}>"

    def _repr_html_(self) -> str:
        return text_html(self.to_text())


def import_pandas() -> ModuleType:
    """pandas, which only who asks for its tables needs.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ImportError as err:
        raise MissingDependencyError("pandas is not installed but is needed here; type: pip install pandas") from err


def shorten(text: str, length: int = 40) -> str:
    """A cell of a table: the text, or its beginning."""
    return text if len(text) <= length else text[: length - 1] + "…"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """The lines of a table for a terminal: columns as wide as their widest cell, those in `right` set to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


_RULE = re.compile(r"-+(?:  -+)+")
"""The line under the head of a table."""


def text_html(text: str) -> str:
    """The text of a result for a notebook: what `text_table` made as tables, all else as it is, escaped."""
    lines, parts = text.splitlines(), []
    while lines:
        end = next((i for i, line in enumerate(lines) if i and _RULE.fullmatch(line)), len(lines) + 1) - 1
        # What lines up by spaces alone does not where a notebook's font is another.
        before = re.sub(r"(\S) {2,}", r"\1: ", "\n".join(lines[:end])).strip("\n")
        parts += [f"<pre>{html.escape(before)}</pre>"] if before else []
        if end == len(lines):
            break
        columns = [slice(*word.span()) for word in re.finditer("-+", lines[end + 1])]
        gaps = [slice(left.stop, right.start) for left, right in itertools.pairwise(columns)]
        after = next((i for i in range(end + 2, len(lines)) if not _is_row(lines[i], gaps)), len(lines))
        rows = [lines[end], *lines[end + 2 : after]]
        parts.append(table_html([[row[column] for column in columns] for row in rows]))
        lines = lines[after:]
    return "".join(parts)


def _is_row(line: str, gaps: Sequence[slice]) -> bool:
    return bool(line[gaps[0].stop :].strip()) and not any(line[gap].strip() for gap in gaps)


def table_html(rows: Sequence[Sequence[str]]) -> str:
    """A table of a head and rows for a notebook; columns without letters are set to the right."""
    right = [not any(map(str.isalpha, "".join(column[1:]))) for column in zip(*rows, strict=True)]
    found = []
    for tag, row in [("th", rows[0]), *(("td", row) for row in rows[1:])]:
        cells = (
            f'<{tag} style="text-align:{"right" if is_right else "left"}">{html.escape(cell.strip())}</{tag}>'
            for cell, is_right in zip(row, right, strict=True)
        )
        found.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(found)}</table>"
