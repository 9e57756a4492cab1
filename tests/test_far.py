"""Stores at addresses: the same rows and the same SAE as from a disk, whatever happens on the way."""

import functools
import http.server
import json
import multiprocessing
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from msae.base.errors import StoreError
from msae.cli import main
from msae.data.layout import far_address
from msae.data.parts import read_part
from msae.data.rows import find_picture
from msae.data.store import EmbeddingStore, StorePart, recorded_store, write_store
from msae.sae.train import train
from msae.web.explorer.session import open_world

N, D = 700, 8
SMALL = {"d_sae": 32, "batch_size": 64, "epochs": 2, "lr": 1e-3, "log_every": 5, "device": "cpu", "levels": (4, 32)}


class Server(http.server.ThreadingHTTPServer):
    """A web server of a folder that notes what was asked for and can be made to fail."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.asked: list[str] = []
        self.failing: dict[str, str] = {}
        """By a part of the path: `missing`, `cut`, `changed`, `endless` or an address to send the reader to."""
        self.refused = False
        """Whether nobody may read anything."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def shards(self) -> list[str]:
        """Names of the files that were downloaded whole."""
        return sorted(Path(path).name for path in self.asked if "_emb_" in path or "metadata_" in path)


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        return self.send_error(403) if self.server.refused else super().do_HEAD()

    def do_GET(self):
        if self.server.refused:
            return self.send_error(403)
        self.server.asked.append(self.path)
        how = next((how for part, how in self.server.failing.items() if part in self.path), None)
        if how is None:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes() if how in ("cut", "changed", "endless") else b""
        if how == "missing":
            return self.send_error(404)
        if "://" in how:
            self.send_response(302)
            self.send_header("Location", how)
            return self.end_headers()
        self.send_response(200)
        if how != "endless":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if how == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif how == "changed":
            self.wfile.write(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            self.wfile.write(data * 3)
        return None


def cli(*words: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSAE_STORES", str(tmp_path / "cache"))
    monkeypatch.setattr("msae.data.far._PAUSES", ())
    return tmp_path / "cache"


@pytest.fixture
def local(tmp_path):
    """700 pairs in three shards."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(N, D)).astype(np.float16) for name in ("image", "text")}
    table = pa.table(
        {"id": [f"r{i}" for i in range(N)], "caption": [f"c{i}" for i in range(N)], "label": ["a", "b"] * (N // 2)}
    )
    (tmp_path / "web").mkdir()
    return write_store(tmp_path / "web/x.store", [StorePart(arrays, table)], shard_rows=300)


@pytest.fixture
def server(local):
    with Server(local.path.parent) as server:
        yield server


@pytest.fixture
def memory(local):
    """The same store in fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    system.put(str(local.path), "/bucket/x.store", recursive=True)
    yield "memory://bucket/x.store"
    system.rm("/bucket", recursive=True)


def test_store_json_has_size_and_hash_of_every_file(local):
    """As `b2sum -l 160` prints it."""
    import hashlib

    listed = json.loads((local.path / "store.json").read_text())["files"]
    found = [path for path in local.path.rglob("*_*.*") if path.is_file()]
    assert len(found) == 9
    assert listed == {
        path.relative_to(local.path).as_posix(): {
            "bytes": path.stat().st_size,
            "blake2b": hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest(),
        }
        for path in found
    }


@pytest.mark.parametrize("where", ["http", "memory"])
def test_a_far_store_is_the_local_one(where, local, server, memory):
    far = EmbeddingStore.open(f"{server.url}/x.store" if where == "http" else memory)
    rows = np.array([699, 0, 300, 299, 5])
    for modality in ("image", "text"):
        assert np.array_equal(far.take(rows, modality), local.take(rows, modality))
        assert np.array_equal(*(np.concatenate(list(one.batches(modality, 64))) for one in (far, local)))
    assert list(far.ids) == list(local.ids) and far.labels("label") == local.labels("label")
    assert far[650] == local[650] and far.columns == local.columns
    assert (far.fingerprint, far.metadata_fingerprint) == (local.fingerprint, local.metadata_fingerprint)
    assert far.address == (f"{server.url}/x.store" if where == "http" else memory)
    assert read_part(f"{far.address}:label=b").rows.tolist() == list(range(1, N, 2))


@pytest.mark.parametrize("where", ["http", "memory"])
def test_training_on_a_far_store_gives_the_same_bytes(where, local, server, memory, tmp_path):
    address = f"{server.url}/x.store" if where == "http" else memory
    for store, name in ((local.path, "near"), (address, "far")):
        train(store, out=tmp_path / name, **SMALL)
    near, far = (tmp_path / name for name in ("near", "far"))
    assert (near / "sae.safetensors").read_bytes() == (far / "sae.safetensors").read_bytes()
    configs = [json.loads((run / "config.json").read_text()) for run in (near, far)]
    assert configs[1]["store"] == address
    assert configs[0]["store_fingerprint"] == configs[1]["store_fingerprint"]


def test_only_what_is_read_is_downloaded_and_only_once(local, server):
    far = EmbeddingStore.open(f"{server.url}/x.store")
    assert server.shards() == []
    far.take(np.array([310, 400]), "image")
    assert server.shards() == ["img_emb_1.npy"]
    again = EmbeddingStore.open(f"{server.url}/x.store")
    again.take(np.array([310, 650]), "image")
    assert server.shards() == ["img_emb_1.npy", "img_emb_2.npy"]
    assert again.fingerprint == local.fingerprint and len(again.columns) == 3
    assert server.shards() == ["img_emb_1.npy", "img_emb_2.npy", "metadata_0.parquet"]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("missing", "it is not there"),
        ("cut", "ClientPayloadError"),
        ("changed", "its bytes have another hash than store.json says"),
        ("endless", "more than its "),
    ],
)
def test_a_shard_that_does_not_arrive_is_one_line_and_what_arrived_stays(
    how, why, local, server, tmp_path, capsys, cache
):
    server.failing = {"img_emb_1": how}
    command = ["train", f"{server.url}/x.store", "--out", str(tmp_path / "run"), "--epochs", "1", "--d-sae", "32"]
    assert cli(*command) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"img_emb/img_emb_1.npy of {server.url}/x.store did not arrive ({why}" in line
    assert "type the same again" in line
    assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in cache.rglob("*.npy")) == ["img_emb_0.npy"]
    assert [path for path in cache.rglob(".*") if path.name.startswith(".")] == []
    server.failing, server.asked = {}, []
    assert cli(*command) == 0
    assert server.shards()[:2] == ["img_emb_1.npy", "img_emb_2.npy"]
    train(local, out=tmp_path / "near", epochs=1, d_sae=32)
    assert (tmp_path / "near/sae.safetensors").read_bytes() == (tmp_path / "run/sae.safetensors").read_bytes()


def test_a_download_that_broke_off_once_is_asked_for_again(local, server, monkeypatch):
    monkeypatch.setattr("msae.data.far._PAUSES", (0.3,))
    server.failing = {"img_emb_0": "cut"}
    far = EmbeddingStore.open(f"{server.url}/x.store")
    threading.Timer(0.15, server.failing.clear).start()
    assert np.array_equal(far.take(np.arange(9), "image"), local.take(np.arange(9), "image"))
    assert server.shards() == ["img_emb_0.npy"] * 2


def test_a_server_that_cannot_be_reached_is_one_line(local, server, capsys):
    url = f"{server.url}/x.store"
    server.shutdown()
    server.server_close()
    assert cli("info", url) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"msae: {url}/store.json did not arrive (ClientConnectorError: ") or url in line
    assert "\n" not in line and "check the address and the network" in line


def test_a_file_that_was_cut_in_the_cache_is_downloaded_again(local, server, cache):
    far = EmbeddingStore.open(f"{server.url}/x.store")
    far.take(np.arange(3), "image")
    [file] = cache.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-7])
    far = EmbeddingStore.open(f"{server.url}/x.store")
    assert np.array_equal(far.take(np.arange(3), "image"), local.take(np.arange(3), "image"))


def test_a_store_that_was_made_again_is_read_again(local, memory):
    before = EmbeddingStore.open(memory)
    before.take(np.arange(3), "image")
    rng = np.random.default_rng(1)
    shutil.rmtree(local.path)
    new = write_store(
        local.path,
        [StorePart({"image": rng.normal(size=(9, D)).astype(np.float16)}, pa.table({"id": list("abcdefghi")}))],
    )
    system = fsspec.filesystem("memory")
    system.rm("/bucket", recursive=True)
    system.put(str(local.path), "/bucket/x.store", recursive=True)
    after = EmbeddingStore.open(memory)
    assert np.array_equal(after.take(np.arange(9), "image"), new.take(np.arange(9), "image"))
    assert after.fingerprint == new.fingerprint != before.fingerprint


def read_all(url: str, queue) -> None:
    store = EmbeddingStore.open(url)
    queue.put(np.concatenate(list(store.batches("image", 50))).tobytes())


def test_processes_that_share_a_cache_download_each_file_once(local, server):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    readers = [context.Process(target=read_all, args=(f"{server.url}/x.store", queue)) for _ in range(2)]
    for reader in readers:
        reader.start()
    found = [queue.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert found == [np.concatenate(list(local.batches("image", 50))).tobytes()] * 2
    assert server.shards() == ["img_emb_0.npy", "img_emb_1.npy", "img_emb_2.npy"]


@pytest.mark.parametrize("where", ["http", "memory"])
def test_a_folder_of_clip_retrieval_is_listed(where, local, server, memory):
    (local.path / "store.json").unlink()
    fsspec.filesystem("memory").rm("/bucket/x.store/store.json")
    far = EmbeddingStore.open(f"{server.url}/x.store" if where == "http" else memory)
    near = EmbeddingStore.open(local.path)
    assert far.kind == near.kind == "clip-retrieval" and len(far) == N
    assert np.array_equal(far.take(np.array([0, 650]), "text"), local.take(np.array([0, 650]), "text"))
    assert far[3] == near[3]
    assert (far.fingerprint, far.metadata_fingerprint) == (near.fingerprint, near.metadata_fingerprint)


@pytest.mark.parametrize("ending", ["npy", "npz", "parquet", "safetensors"])
def test_a_single_file_is_read_with_the_table_beside_it(ending, server, tmp_path):
    from safetensors.numpy import save_file

    x = np.random.default_rng(0).normal(size=(20, D)).astype(np.float32)
    file, table = tmp_path / f"web/photos.{ending}", pa.table({"label": ["a", "b"] * 10})
    if ending == "npy":
        np.save(file, x)
    elif ending == "npz":
        np.savez(file, embeddings=x)
    elif ending == "safetensors":
        save_file({"embeddings": x}, file)
    else:
        pa.parquet.write_table(table.append_column("embeddings", pa.array(list(x))), file)
    if ending != "parquet":
        file.with_suffix(".csv").write_text("label\n" + "a\nb\n" * 10)
    far = EmbeddingStore.open(f"{server.url}/photos.{ending}")
    assert np.array_equal(far.take(np.arange(20), "image"), x)
    assert far.labels("label") == ["a", "b"] * 10
    assert far.fingerprint == EmbeddingStore.open(file).fingerprint


@pytest.mark.parametrize(
    "name", ["../../escape_0.npy", "/etc/img_emb_0.npy", "img_emb/../img_emb_0.npy", "img_emb/img_emb_0.npy\n"]
)
def test_a_store_json_cannot_name_files_outside(name, local, server, cache, tmp_path):
    file = local.path / "store.json"
    record = json.loads(file.read_text())
    record["files"][name] = record["files"]["img_emb/img_emb_0.npy"]
    file.write_text(json.dumps(record))
    with pytest.raises(StoreError, match=r"lists the file .* which no store has"):
        EmbeddingStore.open(f"{server.url}/x.store")
    assert list(tmp_path.rglob("escape*")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": [1]}, "listed in another way"),
        ({"files": {"img_emb/img_emb_0.npy": {"bytes": "x", "blake2b": ""}}}, "listed in another way"),
        ({"rows": 10**12}, "it lists others"),
        ({"shard_rows": 0}, "how its rows are cut"),
        ({"rows": None}, "how its rows are cut"),
        ({"files": {}}, "it lists others"),
        ({"files": {"img_emb/img_emb_0.npy": {"bytes": float("inf"), "blake2b": ""}}}, "listed in another way"),
        ({"rows": float("inf")}, "how its rows are cut"),
        ({"rows": 10**400}, "it lists others"),
        ({"d_in": 10**30}, "too few for"),
    ],
)
def test_a_damaged_description_is_one_line(change, message, local, server):
    file = local.path / "store.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(StoreError, match=message):
        EmbeddingStore.open(f"{server.url}/x.store")


def test_no_picture_of_this_machine_is_shown_for_a_store_elsewhere(local, server, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    Image.new("RGB", (8, 8)).save(private / "me.png")
    file = local.path / "store.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "source": str(private)}))
    store = EmbeddingStore.open(f"{server.url}/x.store")
    for path in ("me.png", str(private / "me.png")):
        assert find_picture(path, store.picture_roots) is None


def test_a_redirect_never_reads_a_file_of_this_machine(local, server, tmp_path):
    server.failing = {"store.json": f"file://{local.path}/store.json"}
    with pytest.raises(StoreError, match=r"store.json did not arrive"):
        EmbeddingStore.open(f"{server.url}/x.store")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("https://host/x.store/", "https://host/x.store"),
        ("HTTPS://host:80/x", "https://host:80/x"),
        (Path("s3://bucket/x.store"), "s3://bucket/x.store"),  # pathlib makes one slash of two
        ("photos.store", None),
        ("/data/s3:/x", None),
        ("C:/photos.store", None),
        ("photos:label=red", None),
    ],
)
def test_an_address_is_known_by_its_beginning(given, address):
    assert far_address(given) == address


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("file:///etc/x.store", "unknown kind file://"),
        ("simplecache::https://host/x.store", "does not exist"),
        ("https://me:secret@host/x.store", "no password"),
        ("https://host/x.store?token=1", "no password"),
        ("https://host/x::y", "no password"),
    ],
)
def test_other_addresses_are_refused(given, message):
    with pytest.raises(StoreError, match=message):
        EmbeddingStore.open(given)


def test_nothing_is_written_far_away(local, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert cli("embed", "a.txt", "--encoder", "demo", "--out", "s3://bucket/x.store") == 1
    assert "s3://bucket/x.store is far away, and stores are only read there" in capsys.readouterr().err
    assert cli("train", str(local.path), "--out", "s3://bucket/run") == 1
    assert "s3://bucket/run is far away" in capsys.readouterr().err
    with pytest.raises(StoreError, match="far away"):
        write_store("memory://x.store", [])
    assert not (tmp_path / "s3:").exists()


def test_a_run_of_somebody_else_does_not_make_us_contact_its_store(local, server):
    with pytest.raises(StoreError, match=r"was never read on this machine; to read it, type: msae info http://"):
        recorded_store(f"{server.url}/x.store")
    assert server.asked == []
    EmbeddingStore.open(f"{server.url}/x.store")
    assert recorded_store(f"{server.url}/x.store").fingerprint == local.fingerprint


def test_commands_take_addresses(local, memory, tmp_path, capsys):
    run = str(tmp_path / "run")
    for command in (
        ["train", memory, "--out", run, "--epochs", "1", "--d-sae", "32"],
        ["evaluate", run, "--on", memory, "--labels", "label"],
        ["search", run, "--on", memory, "--like", "r3"],
        ["find", run, "--on", memory, "--column", "label"],
        ["compare", run, f"{memory}:label=a", f"{memory}:label=b"],
        ["info", memory],
        ["report", run, "--on", memory, "--out", str(tmp_path / "r.html")],
    ):
        assert cli(*command) == 0, (command, capsys.readouterr().err)
    assert memory in capsys.readouterr().out
    for world in (open_world([run], on=memory), open_world([run], on=None)):
        assert world.store.address == memory and len(world.store) == N
