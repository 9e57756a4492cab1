"""Laws of embedding on a Ray cluster: the bytes of one process, whatever is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque

import pytest

from msae.base.errors import ConfigError, MissingDependencyError
from msae.cli import main
from msae.data.cluster import _Kind, _taken
from msae.data.embed import Job, embed
from tests.conftest import needs_posix
from tests.test_embedding import files, photos
from tests.tiny_clip import make_encoder


def job(**options: object) -> Job:
    """A job of which only what a worker takes of a node matters."""
    nothing = dict.fromkeys(("source", "encoder", "asked", "out", "share"))
    return Job(
        **{**nothing, "batch_size": 64, "device": "auto", "workers": None, "ray": "auto", **options}, is_finish=False
    )


@pytest.mark.parametrize(
    ("nodes", "options", "kind", "n"),
    [
        ([{"CPU": 2.0}], {}, (2, 0), 1),
        ([{"CPU": 16.0}, {"CPU": 6.0}], {}, (4, 0), 5),
        ([{"CPU": 16.0}, {"CPU": 6.0}], {"workers": 3}, (3, 0), 7),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}, {"CPU": 32.0}], {}, (8, 1), 16),
        ([{"CPU": 12.0, "GPU": 4.0}], {}, (3, 1), 4),
        ([{"CPU": 12.0, "GPU": 4.0}], {"workers": 6}, (6, 1), 2),
        ([{"CPU": 12.0, "GPU": 4.0}], {"device": "cpu"}, (4, 0), 3),
        ([{"memory": 1e9}], {}, (1, 0), 0),
    ],
)
def test_workers_are_one_for_a_gpu_or_one_for_a_few_cores(nodes, options, kind, n):
    found = _Kind.of(nodes, job(**options))
    assert found == kind
    assert found.fitting(nodes) == n


@pytest.mark.parametrize("room", [1, 3, 64])
def test_runs_are_handed_out_in_order_once_each_and_short_at_the_end(room):
    runs = deque([range(3, 40), range(41, 42), range(50, 700)])
    wanted = [number for run in runs for number in run]
    taken = []
    while runs:
        taken.append(_taken(runs, room))
    assert [number for run in taken for number in run] == wanted
    assert max(map(len, taken)) <= 16
    assert {len(run) for run in taken[-room:]} == {1}


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"ray is not installed .*pip install 'msae\[cluster\]'"):
        embed(photos(tmp_path / "photos", 2), encoder="demo", out=tmp_path / "x.store", ray="auto")


KILLED = """
import json, os, psutil, sys, threading, time
from pathlib import Path
import ray
from msae.base.errors import EmbedderError
from msae.data.cluster import _connected
from msae.data.embed import embed

def kill_one():
    while len(list(Path(sys.argv[3]).rglob("chunk_*"))) < 12:
        time.sleep(0.01)
    below = psutil.Process().children(recursive=True)
    pids = {os.getpid(), *(process.pid for process in below)}
    found["listening"] = sorted({one.laddr.ip.removeprefix("::ffff:") for one in psutil.net_connections()
                                 if one.pid in pids and one.status == "LISTEN"})
    for process in below:
        if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_Worker"):
            process.kill()
            found["killed"] = True
            return

found = {}
killer = threading.Thread(target=kill_one, daemon=True)
killer.start()
cores = max(1, os.cpu_count() // 2)  # of each of two workers
with _connected(ray, "local"):
    store = embed(sys.argv[1], encoder=sys.argv[2], out=sys.argv[3], batch_size=2, dtype="float32", ray="auto",
                  workers=cores)
    killer.join(timeout=10)
    found["workers"] = int(ray.cluster_resources()["CPU"]) // cores
    try:
        embed(sys.argv[1], encoder=sys.argv[4], out=sys.argv[3] + ".bad", ray="auto", workers=cores)
    except EmbedderError as err:
        found["error"] = str(err)
found |= {"rows": len(store), "skipped": len(store.skipped), "left": os.path.exists(sys.argv[3] + ".bad")}
print(json.dumps(found))
"""


@needs_posix
def test_a_ray_of_two_workers_makes_the_bytes_of_one_process_though_one_is_killed(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed; pip install 'msae[cluster]'")
    pytest.importorskip("psutil", reason="psutil, which finds the workers of Ray, is not installed")
    encoder = make_encoder(tmp_path / "clip", "clip")
    source = photos(tmp_path / "photos", 300)
    (source / "030broken.png").write_bytes(b"broken")
    embed(source, encoder=encoder, out=tmp_path / "whole.store", batch_size=2, dtype="float32")
    bad = make_encoder(tmp_path / "bad", "clip")
    (bad / "tokenizer.json").unlink()
    out = tmp_path / "x.store"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(encoder), str(out), str(bad)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "has no tokenizer" in found.pop("error")
    assert found.pop("workers") >= 2
    assert found == {
        "rows": 300,
        "skipped": 1,
        "killed": True,
        "left": False,
        "listening": ["127.0.0.1"],
    }
    assert "workers of the cluster that were lost so far: 1" in done.stderr
    assert files(out) == files(tmp_path / "whole.store")


def test_an_address_where_no_cluster_answers_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed; pip install 'msae[cluster]'")
    source = photos(tmp_path / "photos", 2)
    with pytest.raises(
        ConfigError, match=r"no Ray cluster answers at 127.0.0.1:1 .*; give the HOST:PORT that"
    ) as caught:
        embed(source, encoder="demo", out=tmp_path / "x.store", ray="127.0.0.1:1")
    assert not (tmp_path / "x.store").exists()
    assert "\n" not in str(caught.value)


def test_ray_may_stand_without_an_address(tmp_path, monkeypatch, capsys):
    asked: list[str] = []
    monkeypatch.setattr("msae.data.cluster.embed_on_ray", lambda job, address: asked.append(address))
    source = str(photos(tmp_path / "photos", 2))
    for words in (["--ray"], ["--ray", "127.0.0.1:6379"], ["--ray=auto"], ["--ray", "--batch-size", "2"]):
        with pytest.raises(SystemExit):
            main(["embed", source, "--encoder", "demo", "--out", str(tmp_path / "x.store"), *words])
    assert asked == ["auto", "127.0.0.1:6379", "auto", "auto"]
