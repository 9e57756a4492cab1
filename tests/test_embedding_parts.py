"""Laws of embedding in parts: whoever embeds which part, in whatever order, the store is that of one process."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from msae.base.errors import ConfigError, Interrupted, SourceError, StoreError
from msae.cli import main
from msae.data.chunks import gaps
from msae.data.embed import EmbeddedPart, Share, embed
from msae.data.sources import Source, counted, open_source
from msae.data.sources.members import SourceItem
from msae.data.store import EmbeddingStore
from msae.data.tables import UniqueIds, hashes_of
from tests.conftest import needs_posix
from tests.test_embedding import files, photos, png

OPTIONS = {"batch_size": 2, "dtype": "float32", "workers": 1}  # chunks of 8 samples


def tars(folder: Path, counts: tuple[int, ...]) -> Path:
    """Shards with so many samples; a damaged picture and a member of an unknown kind among them."""
    folder.mkdir()
    numbers = itertools.count()
    for shard, n in enumerate(counts):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for number in itertools.islice(numbers, n):
                add(tar, f"{number:06}.png", b"broken" if number % 7 == 3 else png(number))
                add(tar, f"{number:06}.txt", f"a red cat {number}".encode())
            if shard == 1:
                add(tar, "extra.bin", b"x")
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tars(tmp_path_factory.mktemp("source") / "shards", (13, 9, 0, 25, 3))


@pytest.fixture(scope="module")
def whole(shards, encoder, tmp_path_factory) -> dict[str, bytes]:
    """The files that one process makes."""
    out = tmp_path_factory.mktemp("whole") / "x.store"
    store = embed(shards, encoder=encoder, out=out, **OPTIONS)
    assert (len(store), store.record["counts"]["inputs"]) == (43, 51)
    return files(out)


def test_gaps_are_the_runs_of_what_is_missing():
    def slow(there: set[int], first: int, last: int) -> list[int]:
        return [number for number in range(first, last) if number not in there]

    for there in itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(7)):
        for first, last in itertools.combinations(range(7), 2):
            runs = list(gaps(there, first, last))
            assert [n for a, b in runs for n in range(a, b)] == slow(set(there), first, last)
            assert all(a < b for a, b in runs)
        assert list(gaps(there, 0, None))[-1] == (max(there, default=-1) + 1, None)


@pytest.mark.parametrize(("n", "n_chunks"), [(1, 7), (4, 7), (7, 7), (9, 7), (3, 0), (64, 1563)])
def test_every_chunk_is_in_one_part(n, n_chunks):
    parts = [Share(i, n).chunks(n_chunks) for i in range(1, n + 1)]
    assert [number for part in parts for number in part] == list(range(n_chunks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (4, 2, 1, 3), (3, 4, 2, 1)])
def test_parts_in_any_order_make_the_bytes_of_one_process(order, shards, encoder, whole, tmp_path):
    out = tmp_path / "x.store"
    for i in order:
        part = embed(shards, encoder=encoder, out=out, part=f"{i}/4", **OPTIONS)
        assert isinstance(part, EmbeddedPart)
        assert part.samples == part.new == len(Share(i, 4).chunks(7)) * 8 - 5 * (i == 4)  # 51 samples
    assert len(embed(shards, encoder=encoder, out=out, finish=True, **OPTIONS)) == 43
    assert files(out) == whole
    assert embed(shards, encoder=encoder, out=out, part="2/4", **OPTIONS).new == 0  # the store is finished
    assert files(out) == whole


def test_more_parts_than_chunks_and_parts_of_another_number_make_the_same_bytes(shards, encoder, whole, tmp_path):
    out = tmp_path / "x.store"
    for part in ("1/2", *(f"{i}/9" for i in range(1, 10))):
        embed(shards, encoder=encoder, out=out, part=part, **OPTIONS)
    embed(shards, encoder=encoder, out=out, finish=True, **OPTIONS)
    assert files(out) == whole


def test_one_process_goes_on_with_what_parts_have_left(shards, encoder, whole, tmp_path):
    out = tmp_path / "x.store"
    embed(shards, encoder=encoder, out=out, part="3/4", **OPTIONS)
    with pytest.raises(StoreError, match=r"unfinished: .* type: msae embed .* --finish$"):
        EmbeddingStore.open(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("chunk_*")}
    assert len(before) == 2
    stopping = _samples_of(open_source(shards), stop_at=46)
    with pytest.raises(Interrupted):
        embed(stopping, encoder=encoder, out=out, **OPTIONS)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    embed(shards, encoder=encoder, out=out, **OPTIONS)
    assert files(out) == whole


def _samples_of(source: Source, *, stop_at: int = -1, seen: Callable[[int], object] = int) -> Source:
    """`source`, with a place where it is interrupted and a note of what is read."""
    from dataclasses import replace

    def items(start: int) -> Iterator[SourceItem]:
        for number, item in enumerate(source.items(start), start):
            if number == stop_at:
                raise KeyboardInterrupt
            seen(number)
            yield item

    return replace(source, items=items)


def test_a_part_that_was_stopped_goes_on_and_embeds_nothing_twice(encoder, clip, tmp_path):
    source = open_source(photos(tmp_path / "photos", 64))
    out = tmp_path / "x.store"
    with pytest.raises(Interrupted, match=r"to go on, type: msae embed .* --part 2/2$"):
        embed(_samples_of(source, stop_at=60), encoder=encoder, out=out, part="2/2", **OPTIONS)
    n_kept = len(list(out.rglob("chunk_*")))
    assert 0 < n_kept < 4
    seen: list[int] = []
    again = embed(_samples_of(source, seen=seen.append), encoder=encoder, out=out, part="2/2", **OPTIONS)
    assert seen == list(range(32 + 8 * n_kept, 64))
    assert (again.samples, again.new) == (32, 32 - 8 * n_kept)


def kept(out: Path) -> dict[str, bytes]:
    """The files of an unfinished store, without that of the lock."""
    return {name: data for name, data in files(out).items() if not name.endswith(".lock")}


def test_finish_says_which_parts_are_missing_and_changes_nothing(shards, encoder, tmp_path):
    out = tmp_path / "x.store"
    with pytest.raises(StoreError, match=r"was not begun; embed every part first"):
        embed(shards, encoder=encoder, out=out, finish=True, **OPTIONS)
    assert not out.exists()
    for part in ("2/4", "3/4"):
        embed(shards, encoder=encoder, out=out, part=part, **OPTIONS)
    before = kept(out)
    with pytest.raises(StoreError, match=r"lacks 3 of 7 chunks; run part 1/4, 4/4, such as: msae .* --part 1/4$"):
        embed(shards, encoder=encoder, out=out, finish=True, **OPTIONS)
    assert kept(out) == before


def test_finish_before_any_chunk_leaves_what_the_parts_began(encoder, tmp_path):
    out, captions = tmp_path / "x.store", tmp_path / "few.txt"
    captions.write_text("a red circle\na blue star\n")
    embed(captions, encoder=encoder, out=out, part=f"1/{10**20}")
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"lacks 1 of 1 chunks; run part {10**20}/{10**20}, such as"):
            embed(captions, encoder=encoder, out=out, finish=True)


def test_parts_of_something_else_are_refused(shards, encoder, clip, tmp_path):
    out = tmp_path / "x.store"
    embed(shards, encoder=encoder, out=out, part="1/4", **OPTIONS)
    before = kept(out)
    other = photos(tmp_path / "photos", 9)
    for options in ({"part": "2/4"}, {"finish": True}):
        with pytest.raises(StoreError, match="was begun with the source"):
            embed(other, encoder=encoder, out=out, **options, **OPTIONS)
    assert kept(out) == before
    endless = Source("stream", True, False, "", lambda start: iter(()))
    with pytest.raises(SourceError, match="does not say how many samples it has"):
        embed(endless, encoder=clip, out=tmp_path / "y.store", part="1/4")
    for part in ("0/4", "5/4", "1/0", "2", "1/4/8", "-1/4"):
        with pytest.raises(ConfigError, match=r"is none; wanted I/N with I from 1 to N, such as 3/64"):
            embed(shards, encoder=encoder, out=out, part=part)
    with pytest.raises(ConfigError, match="three ways; give one"):
        embed(shards, encoder=encoder, out=out, part="1/4", ray="auto")


def test_samples_of_shards_are_counted_once_and_found_without_opening_the_shards_before(shards, tmp_path, monkeypatch):
    source = open_source(shards)
    wanted = list(source.items(0))
    found = counted(source, tmp_path, 0.6)
    assert found.total == len(wanted) == 51
    monkeypatch.setattr("msae.data.sources.tars.count", None)  # every count is on disk
    assert counted(source, tmp_path).total == 51
    opened: list[str] = []
    reading = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, *more: opened.append(Path(path).name) or reading(path, *more))
    for start in range(53):
        opened.clear()
        assert list(found.items(start)) == wanted[start:]
        assert ("000.tar" in opened) == (start < 13)


def test_ids_are_numbered_alike_whether_or_not_their_hashes_are_known():
    draws = np.random.default_rng(0)
    words = ["a", "a#2", "a#3", "b", "b#2", "c#", "#", "a#2#2", *(f"x{i}" for i in range(40))]
    for n in range(0, 120, 3):
        pieces = [list(draws.choice(words, n)) for _ in range(3)]
        seen: dict[str, int] = {}  # the rule, without regard to memory
        wanted = []
        for id in itertools.chain(*pieces):
            unique = id
            while unique in seen:
                seen[id] += 1
                unique = f"{id}#{seen[id]}"
            seen[unique] = 1
            wanted.append(unique)
        for hashes in (None, [hashes_of(piece) for piece in pieces]):
            ids = UniqueIds(hashes)
            assert [id for piece in pieces for id in ids.of(piece)] == wanted
        assert len(set(wanted)) == len(wanted)


@needs_posix
def test_parts_share_the_folder_and_finish_waits_for_none_of_them(shards, encoder, whole, tmp_path):
    import fcntl

    out = tmp_path / "x.store"
    embed(shards, encoder=encoder, out=out, part="1/2", **OPTIONS)
    with (out / ".partial" / ".lock").open("r") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as another part does
        embed(shards, encoder=encoder, out=out, part="2/2", **OPTIONS)
        for options in ({"finish": True}, {}):
            with pytest.raises(StoreError, match="is being written by another process"):
                embed(shards, encoder=encoder, out=out, **options, **OPTIONS)
    embed(shards, encoder=encoder, out=out, finish=True, **OPTIONS)
    assert files(out) == whole


AT_ONCE = """
import os, sys, torch
from msae.data.embed import Embedder, embed
torch.set_num_threads(1)
source, encoder, out, options, *parts = sys.argv[1:]
Embedder.load(encoder)  # its imports, once
for part in parts:
    if os.fork() == 0:
        embed(source, encoder=encoder, out=out, part=part, **eval(options))
        os._exit(0)
print(sum(os.wait()[1] != 0 for _ in parts))
"""


@needs_posix
def test_processes_with_a_part_in_common_begin_at_once_and_make_the_same_bytes(shards, encoder, whole, tmp_path):
    out = tmp_path / "x.store"
    parts = ("1/3", "2/3", "2/3", "2/3", "3/3", "1/3")
    command = [sys.executable, "-c", AT_ONCE, str(shards), str(encoder), str(out), repr(OPTIONS), *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "0\n", done.stderr
    embed(shards, encoder=encoder, out=out, finish=True, **OPTIONS)
    assert files(out) == whole


def test_the_command_line_embeds_parts_and_says_what_is_next(shards, encoder, whole, tmp_path, capsys):
    out = tmp_path / "x.store"
    asked = [str(shards), "--encoder", str(encoder), "--out", str(out), "--batch-size", "2", "--dtype", "float32"]
    said = run(["embed", *asked, "--part", "1/2", "--json", "-"], capsys)
    assert {key: json.loads(said)[key] for key in ("part", "samples", "new")} == {
        "part": "1/2",
        "samples": 24,
        "new": 24,
    }
    said = run(["embed", *asked, "--part", "2/2"], capsys)
    assert f"part 2/2 is done (27 samples, 27 of them now); when all are, type: msae embed {shards}" in said
    assert said.rstrip().endswith("--finish")
    assert "43 rows x 16 of image and text, inputs skipped: 8" in run(["embed", *asked, "--finish"], capsys)
    assert files(out) == whole


def run(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    found = capsys.readouterr()
    assert leave.value.code == 0, found.err
    return found.out
