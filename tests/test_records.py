"""Records survive the way to JSON and back, and a damaged one is one line that names the field."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msae.base.errors import ConfigError, RunError
from msae.base.records import of_record, read_record, to_record, write_record


@dataclass(frozen=True)
class Inner:
    n: int
    x: float | None = None
    kind: Literal["a", "b"] = "a"
    levels: tuple[int, ...] | None = None
    place: Path | None = None

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ConfigError(f"n {self.n} is negative")


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    shares: dict[str, float] = field(default_factory=dict)
    best: Inner | None = None


inners = st.builds(
    Inner,
    n=st.integers(0, 2**53),
    x=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    kind=st.sampled_from(["a", "b"]),
    levels=st.none() | st.lists(st.integers(0, 99), max_size=5).map(tuple),
    place=st.none() | st.sampled_from([Path("a/b"), Path("ä")]),
)
finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text('ab1ä"\n', max_size=5)
outers = st.builds(
    Outer, st.lists(inners, max_size=4).map(tuple), st.dictionaries(text, finite, max_size=4), st.none() | inners
)


@given(outers)
def test_there_and_back_is_the_same(value):
    data = json.loads(json.dumps(to_record(value), allow_nan=False))
    assert data == to_record(value)  # what is written is what JSON knows, lists included
    found = of_record(Outer, data, where="f", error=RunError, remedy="r")
    assert found == value and to_record(found) == data


def test_a_file_has_the_schema_and_comes_back(tmp_path):
    value = Outer((Inner(1, 2.5, levels=(1, 2)),), {"q": 1.0}, Inner(3, place=Path("x")))
    write_record(tmp_path / "f.json", value, schema_version=3)
    data = json.loads((tmp_path / "f.json").read_text())
    assert (data["schema_version"], data["made_by"], data["inner"][0]["levels"]) == (3, "msae", [1, 2])
    assert read_record(tmp_path / "f.json", Outer, schema_version=3, error=RunError, remedy="r") == value
    with pytest.raises(RunError, match="schema version 3, this msae reads 4"):
        read_record(tmp_path / "f.json", Outer, schema_version=4, error=RunError, remedy="r")


def test_what_was_read_from_defaults_is_written_in_full():
    found = of_record(Inner, {"n": 1}, where="f", error=RunError, remedy="r")
    assert to_record(found) == {"n": 1, "x": None, "kind": "a", "levels": None, "place": None}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "f.json is damaged (object missing required field inner); train again"),
        ([], "f.json is damaged (expected object, got array); train again"),
        ({"inner": 3}, "inner: expected array, got int"),
        ({"inner": [{}]}, "inner[0]: object missing required field n"),
        ({"inner": [{"n": "1"}]}, "inner[0].n: expected int, got str"),
        ({"inner": [{"n": True}]}, "inner[0].n: expected int, got bool"),
        ({"inner": [{"n": 1.5}]}, "inner[0].n: expected int, got float"),
        ({"inner": [{"n": 1, "kind": "c"}]}, "inner[0].kind: invalid enum value 'c'"),
        ({"inner": [{"n": 1, "place": 3}]}, "inner[0].place: expected"),
        ({"inner": [{"n": -1}]}, "n -1 is negative"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(data, message):
    with pytest.raises(RunError) as caught:
        of_record(Outer, data, where="f.json", error=RunError, remedy="train again")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": [{"n": 1}], "shaers": {}}, "unknown setting 'shaers'; did you mean 'shares'?"),
        ({"inner": [{"n": 1}, {"n": 1, "kidn": "b"}]}, "unknown setting 'kidn'; did you mean 'kind'?"),
    ],
)
def test_an_unknown_key_is_named_and_never_left_out(data, message):
    with pytest.raises(RunError) as caught:
        of_record(Outer, data, where="f", error=RunError, remedy="r")
    assert message in str(caught.value)
