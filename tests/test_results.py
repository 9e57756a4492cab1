"""What every result can do: JSON, a table, a text that lines up, and HTML that shows names as text."""

import json
import sys

import pytest

from msae.base.errors import MissingDependencyError
from msae.base.results import Result, shorten, text_table


class Two(Result):
    def to_text(self):
        return "a < b"

    def to_dict(self):
        return {"rows": self.records()}

    def records(self):
        return [{"name": "a", "x": 1.0}, {"name": "b", "x": None}]


def test_json_is_that_of_the_dict_and_the_table_that_of_the_records():
    pandas = pytest.importorskip("pandas")
    assert json.loads(Two().to_json()) == Two().to_dict()
    pandas.testing.assert_frame_equal(Two().to_pandas(), pandas.DataFrame({"name": ["a", "b"], "x": [1.0, None]}))


def test_without_pandas_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)  # what an import of a package that is not installed does
    with pytest.raises(MissingDependencyError, match="pandas is not installed but is needed here; type: pip install"):
        Two().to_pandas()


def test_a_notebook_shows_the_text_and_names_are_no_html():
    assert repr(Two()) == "a < b" and Two()._repr_html_() == "<pre>a &lt; b</pre>"


def test_columns_of_a_text_table_line_up():
    assert text_table(["name", "n"], [["a", "10"], ["longer", "2"]], right=[1]) == [
        "name     n",
        "------  --",
        "a       10",
        "longer   2",
    ]
    assert shorten("x" * 50, 10) == "x" * 9 + "…" and shorten("short") == "short"
