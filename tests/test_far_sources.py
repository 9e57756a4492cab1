"""Sources at addresses: embedded to the bytes of the same files on a disk, whatever happens on the way."""

from __future__ import annotations

import gc
import gzip
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msae.base.errors import MissingDependencyError, MsaeError, SourceError, StoreError
from msae.data.embed import embed
from msae.data.sources import counted, open_source, remote
from msae.data.sources.remote import FarFile, fetched, files_at, files_below
from tests.test_embedding import files, photos, png
from tests.test_embedding_parts import OPTIONS, tars
from tests.test_far import Server, cli

N = 23


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSAE_STORES", str(tmp_path / "cache"))
    monkeypatch.setattr("msae.data.far._PAUSES", ())
    monkeypatch.setattr("msae.data.sources._SAMPLED", 3)  # so that not every shard is looked at beforehand
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A source of each kind."""
    web = tmp_path_factory.mktemp("kept") / "web"
    web.mkdir()
    tars(web / "shards", (13, 9, 0, 25, 3))
    tars(web / "damaged", (4, 5))
    cut = web / "damaged/000.tar"
    cut.with_name("cut x.tar").write_bytes(cut.read_bytes()[:-9000])
    (web / "damaged/z.tar.gz").write_bytes(gzip.compress(cut.read_bytes(), mtime=0)[:-400])
    pictures = web / "photos of cats"
    for number in range(N):
        file = pictures / f"{'b' if number % 2 else 'a'}/{number:02} é.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"broken" if number == 5 else png(number))
        if number != 4:
            file.with_suffix(".txt").write_text(f"a red cat {number}")
        file.with_suffix(".json").write_text(json.dumps({"size": number}))
    (pictures / "notes.md").write_text("no image")
    (pictures / ".hidden.png").write_bytes(png(0))
    photos(web / "tables/below", N)
    rows = [
        {
            "image_path": f"below\\{n:03}.png" if n % 2 else f"./below/{n:03}.png",
            "caption": f"a cat {n}",
            "label": n % 3,
        }
        for n in range(N)
    ]
    rows += [{"image_path": name, "caption": "x", "label": 1} for name in ("below/gone.png", "../photos of cats/x.png")]
    pq.write_table(pa.Table.from_pylist(rows), web / "tables/t.parquet", row_group_size=4)
    lines = [f"{row['image_path']},{row['caption']},{row['label']}" for row in rows]
    (web / "tables/t.csv").write_text("\n".join(["image_path,caption,label", *lines]))
    (web / "tables/t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (web / "c.txt").write_text("\n".join(f"a caption {n}" for n in range(N)))
    (web / "parts").mkdir()
    for part in range(3):
        table = pa.table({"jpg": [png(n) for n in range(part, N, 3)], "caption": [f"c {n}" for n in range(part, N, 3)]})
        pq.write_table(table, web / f"parts/{part:05}.parquet", row_group_size=3)
    return web


@pytest.fixture
def server(kept):
    with Server(kept) as server:
        yield server


@pytest.fixture
def memory(kept):
    """The same files in fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    system.put(str(kept), "/bucket", recursive=True)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def contents(store: Path) -> tuple[dict[str, bytes], dict[str, object]]:
    """All that a store holds but where its source and pictures lie."""
    found = files(store)
    record = json.loads(found.pop("store.json"))
    for key in ("source", "source_signature", "files"):
        del record[key]
    for name in [name for name in found if name.endswith(".parquet")]:
        table = pq.read_table(store / name)
        if "image_path" in table.column_names:
            found[name] = str(table.drop_columns("image_path").to_pylist()).encode()
    return found, record


KINDS = {
    "shards": 43,
    "shards/{000..004}.tar": 43,
    "shards/003.tar": 21,
    "damaged": 12,
    "photos of cats": N - 2,  # one broken, one without a caption
    "tables/t.parquet": N,
    "tables/t.csv": N,
    "tables/t.jsonl": N,
    "parts": N,
    "parts/00001.parquet": 8,
    "c.txt": N,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["http", "memory"])
def test_a_far_source_gives_the_bytes_of_the_same_files_here(where, kind, kept, server, memory, clip, cache, tmp_path):
    address = f"{server.url if where == 'http' else memory}/{kind}"
    near = embed(kept / kind, encoder=clip, out=tmp_path / "near.store", **OPTIONS)
    far = embed(address, encoder=clip, out=tmp_path / "far.store", **OPTIONS)
    assert contents(far.path) == contents(near.path)
    assert len(far) == KINDS[kind] and far.record["source"] == address
    paths = [far[row].path for row in range(len(far))]
    if kind == "photos of cats":
        raw = "a/00%20%C3%A9.png" if where == "http" else "a/00 é.png"
        assert paths[0] == f"{address}/{raw}"
    elif kind.startswith("tables"):
        assert paths[:2] == [f"{address.rpartition('/')[0]}/below/{n:03}.png" for n in range(2)]
    gc.collect()
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("where", ["http", "memory"])
def test_pictures_of_a_table_may_be_given_by_full_addresses(where, kept, server, memory, clip, tmp_path):
    base = server.url if where == "http" else memory
    table = pa.table({"image": [f"{base}/tables/below/{n:03}.png" for n in (3, 1, 99)], "caption": list("abc")})
    if where == "http":  # the server where the table lies, and no other
        pq.write_table(table, kept / "addresses.parquet")
    with fsspec.filesystem("memory").open("/bucket/addresses.parquet", "wb") as file:
        pq.write_table(table, file)
    store = embed(f"{base}/addresses.parquet", encoder=clip, out=tmp_path / "x.store", **OPTIONS)
    wanted = embed(kept / "tables/below", encoder=clip, out=tmp_path / "y.store", **OPTIONS)
    assert store.take([0, 1], "image").tolist() == wanted.take([3, 1], "image").tolist()
    assert [skipped.reason for skipped in store.skipped] == ["no such file"]
    assert [store[0].path, store[1].path] == table.column("image").to_pylist()[:2]
    if where == "memory":  # pictures in object storage are fetched for a table here too
        pq.write_table(table, tmp_path / "here.parquet")
        here = embed(tmp_path / "here.parquet", encoder=clip, out=tmp_path / "z.store", **OPTIONS)
        assert here.take([0, 1], "image").tolist() == store.take([0, 1], "image").tolist()


def test_a_far_table_does_not_choose_which_web_servers_are_asked(server):
    system = fsspec.filesystem("memory")
    for names in (["https://elsewhere/1.png", f"{server.url}.elsewhere/2.png"], [f"{server.url}/3.png"]):
        rows = "".join(json.dumps({"image": name, "caption": "x"}) + "\n" for name in names)
        system.pipe_file("/b/t.jsonl", rows.encode())
        with pytest.raises(SourceError, match="holds web addresses such as"):
            open_source("memory://b/t.jsonl")
        system.pipe_file("/b/t.jsonl", (rows + json.dumps({"image": "4.png", "caption": "x"})).encode())
        *others, own = open_source("memory://b/t.jsonl").items(0)
        assert {(one.image, one.damage) for one in others} == {(None, "on another web server than its table")}
        assert str(own.image) == "memory://b/4.png"
    system.rm("/b", recursive=True)


def test_a_far_source_is_the_same_from_any_position(memory):
    for kind in KINDS:
        source = open_source(f"{memory}/{kind}")
        items = [(item.id, item.caption, item.damage, dict(item.columns)) for item in source.items(0)]
        assert source.total in (None, len(items))
        for start in (1, 9, len(items)):
            found = [(item.id, item.caption, item.damage, dict(item.columns)) for item in source.items(start)]
            assert found == items[start:]


def test_the_signature_is_of_names_and_states_and_reads_no_contents(kept, server, monkeypatch):
    for kind in ("shards", "parts", "photos of cats", "c.txt", "tables/t.parquet"):
        first = open_source(f"{server.url}/{kind}").signature
        assert open_source(f"{server.url}/{kind}").signature == first
    monkeypatch.setattr("msae.data.sources._SAMPLED", 0)
    server.asked.clear()
    files_below(f"{server.url}/shards")
    assert [path for path in server.asked if path.endswith(".tar")] == []
    system = fsspec.filesystem("memory")
    system.pipe_file("/other/a.png", png(0))
    before = open_source("memory://other").signature
    system.pipe_file("/other/a.png", png(0))  # written again: another time of change
    assert open_source("memory://other").signature != before
    system.rm("/other", recursive=True)


def test_a_shard_that_does_not_arrive_is_one_line_and_the_command_goes_on_there(
    kept, server, encoder, clip, cache, tmp_path, capsys
):
    out = tmp_path / "x.store"
    command = ["embed", f"{server.url}/shards", "--encoder", str(encoder), "--out", str(out)]
    command += ["--batch-size", "2", "--dtype", "float32"]
    server.failing = {"004.tar": "cut"}
    assert cli(*command) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{server.url}/shards/004.tar did not arrive (ClientPayloadError" in line
    assert line.endswith("what is embedded is kept: type the same again")
    chunks = sorted(path.name for path in out.rglob("chunk_*"))
    assert chunks == [
        f"chunk_{number:08}.safetensors" for number in range(3)
    ]  # of 8 samples; 10 pieces are decoded ahead
    server.failing, server.asked = {}, []
    gc.collect()
    assert cli(*command) == 0
    assert [Path(path).name for path in server.asked if path.endswith(".tar")] == [
        "000.tar",  # looked at again
        "003.tar",  # has samples 23 to 47; those before were counted
        "004.tar",
    ]
    embed(kept / "shards", encoder=clip, out=tmp_path / "near.store", **OPTIONS)
    assert contents(out) == contents(tmp_path / "near.store")


def test_at_most_one_shard_is_on_this_disk_and_none_afterwards(server, clip, cache, tmp_path, monkeypatch, caplog):
    seen: list[int] = []
    fetching = remote.download

    def watched(system, path, place, entry, what) -> None:
        fetching(system, path, place, entry, what)
        seen.append(sum(file.stat().st_size for file in place.parent.iterdir()))

    monkeypatch.setattr(remote, "download", watched)
    embed(f"{server.url}/shards", encoder=clip, out=tmp_path / "x.store", **OPTIONS)
    sizes = [file.size for file in files_below(f"{server.url}/shards").values()]
    assert seen == [sizes[0], *sizes[1:]]  # the first one, looked at beforehand, was not fetched twice
    gc.collect()
    assert not cache.exists() or list(cache.iterdir()) == []
    [line] = [record.message for record in caplog.records if "pass through" in record.message]
    assert f"at most {max(sizes):,} bytes" in line and str(cache) in line


def test_what_a_killed_process_left_is_deleted(server, clip, cache, tmp_path):
    [file] = {file.passage for file in files_below(f"{server.url}/shards").values()}
    file.folder.mkdir(parents=True)
    for name in ("0123abcd.tar", ".4567cdef.tar.x1y2.tmp", ".89ab.lock"):
        (file.folder / name).write_text("left")
    embed(f"{server.url}/shards", encoder=clip, out=tmp_path / "x.store", **OPTIONS)
    del file
    gc.collect()
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def hold(url: str, reading, ended) -> None:
    with files_below(url)["000.tar"].held() as path:
        reading.set()
        ended.wait(60)
        assert path.stat().st_size > 0


def test_a_shard_that_another_process_reads_is_not_deleted_and_not_fetched_again(server, cache):
    context = multiprocessing.get_context("spawn")
    reading, ended = context.Event(), context.Event()
    other = context.Process(target=hold, args=(f"{server.url}/shards", reading, ended))
    other.start()
    assert reading.wait(60)
    found = files_below(f"{server.url}/shards")
    with found["001.tar"].held(), found["000.tar"].held():
        assert len(list(cache.rglob("*.tar"))) == 2
    with found["003.tar"].held():
        assert len(list(cache.rglob("*.tar"))) == 2  # 001 made room
    ended.set()
    other.join(60)
    assert other.exitcode == 0
    assert [path for path in server.asked if path.endswith("000.tar")] == ["/shards/000.tar"]


def test_parts_fetch_only_what_they_need_once_it_is_counted(kept, server, clip, encoder, cache, tmp_path):
    out, address = tmp_path / "x.store", f"{server.url}/shards"
    embed(address, encoder=encoder, out=out, part="4/4", **OPTIONS)  # samples 40 to 50
    server.asked.clear()
    embed(address, encoder=encoder, out=out, part="1/4", **OPTIONS)  # samples 0 to 7
    gc.collect()
    embed(address, encoder=encoder, out=out, part="2/4", **OPTIONS)  # 8 to 23
    fetched = [Path(path).name for path in server.asked if path.endswith(".tar")]
    assert fetched == ["000.tar", "000.tar", "001.tar", "003.tar"]
    embed(address, encoder=encoder, out=out, part="3/4", **OPTIONS)
    embed(address, encoder=encoder, out=out, finish=True, **OPTIONS)
    embed(kept / "shards", encoder=clip, out=tmp_path / "near.store", **OPTIONS)
    assert contents(out) == contents(tmp_path / "near.store")


def test_parts_of_parquet_files_need_only_their_ends_to_be_counted(kept, server, memory, encoder, clip, tmp_path):
    for base in (memory, server.url):
        out = tmp_path / f"{base[:4]}.store"
        server.asked.clear()
        for part in ("3/3", "1/3", "2/3"):
            embed(f"{base}/parts", encoder=encoder, out=out, part=part, **OPTIONS)
        embed(f"{base}/parts", encoder=encoder, out=out, finish=True, **OPTIONS)
        embed(kept / "parts", encoder=clip, out=tmp_path / "near.store", **OPTIONS)
        assert contents(out) == contents(tmp_path / "near.store")


def test_a_ray_of_two_workers_makes_the_bytes_of_one_process(kept, server, encoder, clip, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed; pip install 'msae[cluster]'")
    out = tmp_path / "x.store"
    embed(f"{server.url}/shards", encoder=encoder, out=out, ray="local", **OPTIONS)
    embed(kept / "shards", encoder=clip, out=tmp_path / "near.store", **OPTIONS)
    assert contents(out) == contents(tmp_path / "near.store")


@pytest.mark.parametrize("name", ["03 é.png", "03 é.txt"])
def test_a_picture_or_caption_that_breaks_off_stops_and_is_not_skipped(name, kept, server, encoder, clip, tmp_path):
    out, address = tmp_path / "x.store", f"{server.url}/photos of cats"
    server.failing = {name.replace(" é", "%20%C3%A9"): "cut"}
    with pytest.raises(StoreError, match=r"03%20%C3%A9\.\w+ did not arrive \(ClientPayloadError"):
        embed(address, encoder=encoder, out=out, **OPTIONS)
    server.failing = {}
    embed(address, encoder=encoder, out=out, **OPTIONS)
    embed(kept / "photos of cats", encoder=clip, out=tmp_path / "near.store", **OPTIONS)
    assert contents(out) == contents(tmp_path / "near.store")


@pytest.mark.parametrize(
    ("where", "how", "why"),
    [
        ("shards/000.tar", "endless", "more than its"),
        ("shards/000.tar", "missing", "it is not there"),
        ("shards/000.tar", "file:///etc/passwd", "did not arrive"),
        ("c.txt", "cut", "ClientPayloadError"),
        ("tables/t.csv", "endless", "more than its"),
        ("parts/00001.parquet", "cut", "ClientPayloadError"),
    ],
)
def test_whatever_does_not_arrive_is_one_line_and_leaves_nothing(where, how, why, server, clip, cache, tmp_path):
    server.failing = {where: how}
    with pytest.raises(StoreError) as caught:
        embed(f"{server.url}/{where}", encoder=clip, out=tmp_path / "x.store", **OPTIONS)
    assert f"{server.url}/{where} did not arrive" in str(caught.value) and why in str(caught.value)
    assert not (tmp_path / "x.store").exists()
    assert [path for path in cache.rglob("*.*") if path.stat().st_size] == []


def test_names_of_a_list_lead_nowhere_else(kept, server, memory, cache, tmp_path):
    inside, outside = tmp_path / "web/inside", tmp_path / "web/outside"
    inside.mkdir(parents=True)
    shutil.copytree(kept / "shards", outside)
    shutil.copy(kept / "shards/003.tar", inside / "a.tar")
    links = ["a.tar", "../outside/000.tar", "%2e%2e/outside/001.tar", "..%2foutside/003.tar", "/outside/004.tar"]
    links += [f"{server.url}/shards/000.tar", "file:///etc/passwd", ".hidden.tar", "?C=N;O=D", "a.tar?x", "../", "/"]
    (inside / "index.html").write_text("".join(f'<a href="{link}">x</a>' for link in links))
    with Server(tmp_path / "web") as other:
        assert list(files_below(f"{other.url}/inside")) == ["a.tar"]
        assert len(list(open_source(f"{other.url}/inside").items(0))) == 25
    system = fsspec.filesystem("memory")
    data = (kept / "shards/003.tar").read_bytes()
    for name in ("../../../escape.tar", "a/../../escape.tar", "..", "C:\\escape.tar", "x\n" + "y" * 300 + "\0.tar"):
        system.pipe_file("/hostile/x", data)
        system.store[f"/hostile/{name}"] = system.store.pop("/hostile/x")
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    found = files_below("memory://hostile")
    assert sorted(found) == ["C:\\escape.tar", "x\n" + "y" * 300 + "\0.tar"]
    for file in found.values():
        with file.held() as place:
            assert place.parent.parent == cache and place.stem.isalnum() and len(place.stem) == 24
            assert place.read_bytes() == data
    assert {path for path in tmp_path.rglob("*") if cache not in path.parents} - before <= {cache}
    system.rm("/hostile", recursive=True)


def test_lists_as_apache_writes_them_and_lists_without_end(tmp_path):
    folder = tmp_path / "web/photos"
    folder.mkdir(parents=True)
    for name in ("12:30.png", "a&b.png", "c d.png"):
        (folder / name).write_bytes(png(1))
    links = ["./12:30.png", "a&amp;b.png", "c%20d.png", "mailto:x@example.org", "javascript:x.png", "?C=N;O=D"]
    (folder / "index.html").write_text("".join(f'<a href="{link}">x</a>' for link in links))
    with Server(tmp_path / "web") as other:
        found = files_below(f"{other.url}/photos")
        assert sorted(found) == ["12:30.png", "a&b.png", "c d.png"]
        assert [file.read_bytes() for file in found.values()] == [png(1)] * 3

    class Endless:
        def ls(self, folder, detail):
            return [{"name": f"{folder}loop/", "type": "directory"}]

    with pytest.raises(SourceError, match="folders in folders without end"):
        remote._linked(Endless(), "http://host/x")


def test_a_picture_that_is_too_large_is_skipped_after_one_download(server, kept, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_MAX_PICTURE", 100)
    (kept / "large.jsonl").write_text(json.dumps({"image": "tables/below/001.png", "caption": "x"}))
    [item] = open_source(f"{server.url}/large.jsonl").items(0)
    before = len(server.asked)
    with pytest.raises(SourceError, match=r"^too large: more than 100 bytes$"), fetched(item.image):
        pass
    assert len(server.asked) - before <= 2
    (kept / "large.jsonl").unlink()


def test_where_files_cannot_be_locked_every_process_has_its_own_folder(cache, kept, memory, monkeypatch):
    file = files_at("x", [f"{memory}/shards/000.tar"])[0]
    assert file.passage.folder.parent == cache and not file.passage.folder.exists()
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(38, "no locks")))
    file = files_at("x", [f"{memory}/shards/000.tar"])[0]
    with file.held() as place:
        assert place.parent.name == str(os.getpid()) and place.parent.parent.parent == cache
        assert place.read_bytes() == (kept / "shards/000.tar").read_bytes()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/etc/passwd", "a path of another machine"),
        ("C:\\x.png", "a path of another machine"),
        ("file:///etc/passwd", "a path of another machine"),
        ("ftp://host/x.png", "a path of another machine"),
        ("../../other/x.png", "a path that leads out of where its table lies"),
    ],
)
def test_a_far_table_names_no_file_of_this_machine(text, reason, clip, tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe_file("/b/c/t.jsonl", json.dumps({"image": text, "caption": "x"}).encode())
    [item] = open_source("memory://b/c/t.jsonl").items(0)
    assert (item.image, item.damage) == (None, reason)
    system.rm("/b", recursive=True)


BAD = {
    "ftp://host/x.tar": "unknown kind ftp://; known: https, http, s3, gs, hf, memory, or a path",
    "https://me:secret@host/x.tar": "may hold no password",
    "https://host/x.tar?token=1": "may hold no password",
    "memory://bucket/nothing": "memory://bucket/nothing is no source: nothing is below it; wanted a folder of images",
    "memory://bucket/nothing.tar": "memory://bucket/nothing.tar did not arrive (it is not there); check the address",
    "memory://bucket/shards/{003..005}.tar": "shards/005.tar did not arrive (it is not there)",
    "memory://bucket/shards/{003..005.tar": "is no pattern",
    "memory://bucket/tables/below/001.png": "is no source; give the folder that it is in",
    "memory://bucket/tables": "not read",  # see below
    "memory://bucket/bad.parquet": "memory://bucket/bad.parquet is no readable parquet file",
    "memory://bucket/bad.csv": "memory://bucket/bad.csv cannot be read as csv",
    "memory://bucket/bad.txt": "memory://bucket/bad.txt is not UTF-8 (byte 0)",
    "memory://bucket/empty.tar": "memory://bucket/empty.tar holds no samples",
    "memory://bucket/saved": "was written by save_to_disk, which is read on this machine only",
}


@pytest.mark.parametrize("address", BAD)
def test_a_bad_address_is_one_line(address, memory, cache, tmp_path):
    system = fsspec.filesystem("memory")
    for name in ("bad.parquet", "bad.txt"):
        system.pipe_file(f"/bucket/{name}", b"\xff\x81")
    system.pipe_file("/bucket/bad.csv", b'text,label\n"a,1\n')
    system.pipe_file("/bucket/empty.tar", b"")
    system.pipe_file("/bucket/saved/state.json", b"{}")
    if BAD[address] == "not read":
        assert len(list(open_source(address).items(0))) == N + 3  # the pictures, and the tables as samples not read
        return
    with pytest.raises(MsaeError) as caught:
        open_source(address)
    assert BAD[address] in str(caught.value) and "\n" not in str(caught.value) and str(cache) not in str(caught.value)


def test_without_rights_or_packages_one_line_says_what_to_do(server, monkeypatch, tmp_path):
    class Forbidden(fsspec.get_filesystem_class("memory")):
        def info(self, path, **options):
            raise PermissionError("Access Denied")

    with pytest.raises(StoreError, match=r"x.tar did not arrive \(no right to read it\); sign in as its kind"):
        remote._info("s3://bucket/x.tar", Forbidden(), "/x.tar")
    for address in (f"{server.url}/shards/000.tar", f"{server.url}/shards/{{000..002}}.tar"):
        server.refused = True
        with pytest.raises(StoreError, match=r"000.tar did not arrive \(no right to read it\)"):
            open_source(address)
        server.refused = False
    with pytest.raises(StoreError, match=r"0.tar did not arrive \(ClientConnectorError: Cannot connect"):
        open_source("http://127.0.0.1:9/{0..3}.tar")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependencyError, match=r"s3fs is not installed .*pip install 'msae\[far\]'"):
        open_source("s3://bucket/x.tar")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'msae\[far\]'"):
        open_source(f"{server.url}/shards")


def test_the_cache_that_cannot_be_written_and_the_full_disk_are_one_line(server, cache, monkeypatch):
    monkeypatch.setenv("MSAE_STORES", "/proc/nothing")
    with pytest.raises(StoreError, match="cannot be written; set MSAE_STORES"):
        open_source(f"{server.url}/shards")
    monkeypatch.setenv("MSAE_STORES", str(cache))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 1, 9))
    with pytest.raises(StoreError, match=r"000.tar has [\d,]+ bytes, but only 9 are free"):
        open_source(f"{server.url}/shards")


def test_counts_are_kept_by_one_process_and_used_by_parts(server, clip, encoder, tmp_path):
    source = open_source(f"{server.url}/shards")
    assert counted(source, tmp_path).total == 51
    assert sorted(int(file.read_text()) for file in tmp_path.glob("shard_*.txt")) == [0, 3, 10, 13, 25]
    assert all(isinstance(shard, FarFile) for shard in source.shards)
