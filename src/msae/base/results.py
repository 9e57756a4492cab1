"""What every result of a verb can do: text for a terminal, JSON, a table for pandas, and how a notebook shows it."""

from __future__ import annotations

import html
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from msae.base.errors import MissingDependencyError


class Result:
    """Base of the results of verbs. A subclass has `to_text`, `to_dict` and `records`."""

    def to_text(self) -> str:
        """What the command prints."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as `--json` writes them."""
        raise NotImplementedError

    def records(self) -> Sequence[Mapping[str, Any]]:
        """One flat record for each row of the result's table."""
        raise NotImplementedError

    def to_json(self) -> str:
        """The text that `--json` writes."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` of `records`.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            pd = importlib.import_module("pandas")
        except ModuleNotFoundError as err:
            raise MissingDependencyError(
                "pandas is not installed but is needed here; type: pip install pandas"
            ) from err
        return pd.DataFrame([dict(row) for row in self.records()])

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.to_text())}</pre>"


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
