import pytest

from msae.base.errors import RunError
from msae.base.files import atomic_folder, atomic_path, read_json, remove_leftovers, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "x") as temporary:
        (temporary / "f").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".x.123.tmp").mkdir()
    (tmp_path / ".y.456.tmp").write_text("")
    (tmp_path / "kept.tmp").write_text("")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.tmp"]


def test_json_round_trip_carries_schema_and_maker(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1.5, "name": "blåbær"}, schema_version=2)
    data = read_json(tmp_path / "a.json", schema_version=2, error=RunError)
    assert data == {"schema_version": 2, "made_by": "msae", "x": 1.5, "name": "blåbær"}


def test_nan_never_reaches_a_json_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")}, schema_version=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "a JSON list, not an object"), ("{", "not readable JSON"), ('{"a": 1}', "schema version None")],
)
def test_unreadable_json_is_one_clear_line(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RunError, match=message):
        read_json(tmp_path / "a.json", schema_version=1, error=RunError)
