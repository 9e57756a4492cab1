import os
import time

import pytest

from msae.base.errors import RunError
from msae.base.files import (
    atomic_folder,
    atomic_path,
    cache_folders,
    read_json,
    remembered,
    remove_leftovers,
    writable_cache,
    write_json,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


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


def test_a_remembered_value_is_computed_again_when_a_file_changes_size_or_time(tmp_path):
    file = tmp_path / "x"
    file.write_text("one")
    long_ago = time.time_ns() - 10**12
    os.utime(file, ns=(long_ago, long_ago))
    calls = []

    def compute():
        calls.append(file.read_text())
        return calls[-1]

    assert [remembered("text", [file], compute) for _ in range(3)] == ["one"] * 3 and len(calls) == 1
    file.write_text("two")  # as long as before, another time
    os.utime(file, ns=(long_ago + 1, long_ago + 1))
    assert [remembered("text", [file], compute) for _ in range(2)] == ["two"] * 2 and len(calls) == 2
    file.write_text("three")  # another length at the same time
    os.utime(file, ns=(long_ago + 1, long_ago + 1))
    assert remembered("text", [file], compute) == "three"
    assert remembered("other", [file], lambda: "else") == "else"


def test_a_file_that_has_just_changed_is_not_trusted_to_show_its_next_change(tmp_path):
    file = tmp_path / "x"
    for text in ("one", "two"):
        file.write_text(text)
        os.utime(file)
        moment = file.stat().st_mtime_ns // 10**9 * 10**9  # as coarse a clock as some disks have
        os.utime(file, ns=(moment, moment))
        assert remembered("text", [file], file.read_text) == text


def test_a_value_is_computed_where_nothing_can_be_remembered(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "x"
    file.write_text("one")
    os.utime(file, ns=(10**18, 10**18))
    assert remembered("text", [file], file.read_text) == "one"


def test_a_cache_that_cannot_lie_in_its_place_lies_in_the_users_cache_folder(tmp_path, own_cache):
    (tmp_path / "run").write_text("a file where a folder should be")
    for place in (tmp_path / "run" / "samples", tmp_path / "other" / "samples"):
        own, spare = cache_folders(place)
        assert own == place and own_cache in spare.parents
    assert writable_cache(tmp_path / "run" / "samples") == cache_folders(tmp_path / "run" / "samples")[1]
    assert writable_cache(tmp_path / "other" / "samples") == tmp_path / "other" / "samples"
    assert cache_folders(tmp_path / "a" / "samples")[1] != cache_folders(tmp_path / "b" / "samples")[1]
