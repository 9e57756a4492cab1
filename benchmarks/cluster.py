"""Embedding by several processes: kills on a Ray cluster of three nodes, parts, what Ray costs, and how far it scales.

    python benchmarks/cluster.py kills --folder FOLDER
    python benchmarks/cluster.py parts --folder FOLDER
    python benchmarks/cluster.py overhead --folder FOLDER
    python benchmarks/cluster.py scaling --folder FOLDER
    python benchmarks/cluster.py results --folder FOLDER

Each of the first four leaves a JSON file in FOLDER; the last one writes the section of RESULTS.md. The encoder is the
demo's CLIP; in `scaling` it is one that only sleeps, so that 64 workers fit on a machine of two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from msae.data.embed import embed
from msae.data.embedder import Embedder
from msae.data.sources import Source, SourceItem
from msae.world.drawing import render
from results import write_section

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all listen on 127.0.0.1
SHARD = 1000
"""Samples of a tar."""
BATCH = 32
OPTIONS = ["--encoder", "demo", "--batch-size", str(BATCH), "--dtype", "float32"]
LOCAL: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 80 << 20}
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def make_tars(folder: Path, first: int, n: int) -> Path:
    """Scenes as webdataset shards, each 500th of them damaged."""
    source = folder / f"tars-{n}"
    source.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(first, first + n, SHARD)):
        path = source / f"{number:05}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".new"), "w") as tar:
            for seed in range(start, min(start + SHARD, first + n)):
                scene, buffer = render(seed), io.BytesIO()
                scene.image.save(buffer, "PNG")
                data = buffer.getvalue()
                _add(tar, f"{seed}.png", data[:60] if seed % 500 == 7 else data)
                _add(tar, f"{seed}.txt", scene.caption.encode())
        path.with_suffix(".new").rename(path)
    return source


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def hashes(store: Path) -> dict[str, str]:
    """Every file of a store."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def command(source: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "msae", "embed", str(source), "--out", str(out), *OPTIONS, *more]


def of_one_process(folder: Path, source: Path) -> dict[str, str]:
    """The store that one process makes, made once."""
    out = folder / f"whole-{source.name}.store"
    subprocess.run(command(source, out), check=True, stdout=subprocess.DEVNULL)
    return hashes(out)


class Watch(threading.Thread):
    """Looks at the chunks of a store all the time: when each came, and whether one was written again."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.folder = out / ".partial" / "chunks"
        self.first: dict[str, tuple[int, int]] = {}
        """Inode and time of each chunk when it was first seen."""
        self.rewritten: set[str] = set()
        self.is_over = False
        self.start()

    def run(self) -> None:
        while not self.is_over:
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(self.folder):
                    if entry.name.startswith("chunk_"):
                        with contextlib.suppress(FileNotFoundError):
                            now = (entry.inode(), entry.stat().st_mtime_ns)
                            if self.first.setdefault(entry.name, now) != now:
                                self.rewritten.add(entry.name)
            time.sleep(0.02)

    def rate(self) -> float:
        """Chunks a second between the first and the last one."""
        times = sorted(moment for _, moment in self.first.values())
        return (len(times) - 1) / (times[-1] - times[0]) * 1e9


def kills(folder: Path, first: int, n: int, seed: int) -> None:
    """Twenty kills at random moments of work on a cluster of three nodes with one core each."""
    from ray.cluster_utils import Cluster

    source = make_tars(folder, first, n)
    wanted = of_one_process(folder, source)
    n_chunks = -(-n // (4 * BATCH))
    draws = random.Random(seed)
    kinds = ["worker"] * 10 + ["node"] * 5 + ["driver"] * 4
    draws.shuffle(kinds)
    moments = sorted(draws.sample(range(n_chunks - 10), len(kinds)))
    plan = [*zip(moments, kinds, strict=True), (n_chunks, "driver")]  # the last one while the shards are cut
    out = folder / "killed.store"
    shutil.rmtree(out, ignore_errors=True)
    options = {
        "num_cpus": 1,
        "include_dashboard": False,
        "object_store_memory": 80 << 20,
        "node_ip_address": "127.0.0.1",
    }
    cluster = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 0})
    began = time.monotonic()
    try:
        nodes = [cluster.add_node(**options) for _ in range(3)]
        watch, seen = Watch(out), []
        driver = _driver(source, out, cluster.address)
        for moment, kind in plan:
            while len(watch.first) < moment and driver.poll() is None:
                time.sleep(0.02)
            time.sleep(draws.uniform(0, 0.5) if moment < n_chunks else 0)
            victims = _workers()
            hit = True
            if kind == "worker":
                hit = bool(victims)
                if hit:
                    draws.choice(victims).kill()
            elif kind == "node":
                cluster.remove_node(nodes.pop(draws.randrange(3)), allow_graceful=False)
                nodes.append(cluster.add_node(**options))
            else:
                hit = driver.poll() is None
                driver.send_signal(signal.SIGKILL)
                driver.wait()
                driver = _driver(source, out, cluster.address)
            seen.append({"kind": kind, "hit": hit, "chunks": len(watch.first), "workers": len(victims)})
            print(f"{time.monotonic() - began:6.1f} s", seen[-1], flush=True)
        code = driver.wait(timeout=600)
        watch.is_over = True
    finally:
        cluster.shutdown()
    found = {
        "scenes": n,
        "chunks": n_chunks,
        "seconds": round(time.monotonic() - began, 1),
        "kills": seen,
        "hits": Counter(one["kind"] for one in seen if one["hit"]),
        "exit code": code,
        "chunks seen": len(watch.first),
        "chunks written twice": len(watch.rewritten),
        "same bytes": hashes(out) == wanted,
        "left over": len(_workers()),
    }
    _keep(folder, "kills", found)


def _driver(source: Path, out: Path, address: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(source, out, "--ray", address), stdout=subprocess.DEVNULL)


def _workers() -> list[psutil.Process]:
    """Processes of Ray below this one that embed."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_Worker"):
                found.append(process)
    return found


def parts(folder: Path, first: int, n: int, seed: int) -> None:
    """Four parts in random order, each killed once on its way and repeated; then the end."""
    source = make_tars(folder, first, n)
    wanted = of_one_process(folder, source)
    draws = random.Random(seed)
    order = draws.sample(range(1, 5), 4)
    out = folder / "parts.store"
    shutil.rmtree(out, ignore_errors=True)
    watch, killed_at = Watch(out), []
    for i in order:
        before = len(watch.first)
        process = subprocess.Popen(command(source, out, "--part", f"{i}/4"), stdout=subprocess.DEVNULL)
        moment = before + draws.randrange(1, n // (4 * BATCH) // 4)
        while len(watch.first) < moment and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        killed_at.append(len(watch.first) - before)
        assert process.wait() == -signal.SIGKILL
        subprocess.run(command(source, out, "--part", f"{i}/4"), check=True, stdout=subprocess.DEVNULL)
    watch.is_over = True
    subprocess.run(command(source, out, "--finish"), check=True, stdout=subprocess.DEVNULL)
    same = hashes(out) == wanted
    found = {"scenes": n, "order": order, "killed after chunks": killed_at, "same bytes": same}
    _keep(folder, "parts", {**found, "chunks written twice": len(watch.rewritten)})


def overhead(folder: Path, first: int, n: int) -> None:
    """One process with two threads, two parts at once, and a Ray of two workers, on the same two cores."""
    source = make_tars(folder, first, n)

    def one(out: Path) -> None:
        subprocess.run(command(source, out), check=True, stdout=subprocess.DEVNULL, env={**os.environ, **threads(2)})

    def two(out: Path) -> None:
        pieces = [[*command(source, out), "--part", f"{i}/2"] for i in (1, 2)]
        running = [
            subprocess.Popen(piece, stdout=subprocess.DEVNULL, env={**os.environ, **threads(1)}) for piece in pieces
        ]
        assert [process.wait() for process in running] == [0, 0]
        subprocess.run(command(source, out, "--finish"), check=True, stdout=subprocess.DEVNULL)

    def on_ray(out: Path) -> None:
        import ray

        ray.init(num_cpus=2, **LOCAL, **QUIET)
        embed(source, encoder="demo", out=out, batch_size=BATCH, dtype="float32", ray="auto", workers=1)
        ray.shutdown()

    found: dict[str, Any] = {"scenes": n}
    stores = []
    for name, run in (("one process", one), ("two parts", two), ("ray", on_ray)):
        out = folder / f"{name.replace(' ', '-')}.store"
        shutil.rmtree(out, ignore_errors=True)
        watch, began = Watch(out), time.monotonic()
        run(out)
        watch.is_over = True
        found[name] = {"seconds": time.monotonic() - began, "scenes a second": watch.rate() * 4 * BATCH}
        print(name, found[name], flush=True)
        stores.append(hashes(out))
    found["same bytes"] = stores[0] == stores[1] == stores[2]
    _keep(folder, "overhead", found)


def threads(n: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(n), "MKL_NUM_THREADS": str(n)}


class Sleeping(Embedder):
    """An encoder that takes a second a batch without computing, and writes down when it began."""

    def embed_texts(self, texts: Any) -> Any:
        with (Path(self.id) / str(os.getpid())).open("a") as log:
            log.write(f"{time.time()}\n")
        time.sleep(COST)
        return np.full((len(texts), self.d_in), 0.5, np.float32)

    def count_truncated(self, _texts: Any) -> int:
        return 0


COST = 2.0
"""Seconds a batch."""


def scaling(folder: Path, sizes: list[int], n_chunks: int) -> None:
    """Sleeping encoders: chunks for each worker are the same at every number of workers."""
    import ray

    kept = folder / "scaling.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for n in sizes:
        log, out = folder / f"sleep-{n}", folder / f"sleep-{n}.store"
        for path in (log, out):
            shutil.rmtree(path, ignore_errors=True)
        log.mkdir(parents=True)
        total = n * n_chunks * 4
        source = Source("captions", False, True, str(total), _captions(total), total)
        encoder = Sleeping(str(log), "0" * 40, 4, "cpu", "float32", "pil", 77, None, None, None)
        ray.init(
            num_cpus=n, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=80 << 20, **QUIET
        )
        began = time.time()
        store = embed(source, encoder=encoder, out=out, batch_size=1, ray="auto", workers=1)
        ended = time.time()
        ray.shutdown()
        assert len(store) == total
        times = [[float(line) for line in path.read_text().splitlines()] for path in sorted(log.iterdir())]
        # while all work: from when the last one has begun to when the first one has nothing more to do
        start, end = max(one[0] for one in times), min(one[-1] for one in times) + COST
        asleep = sum(max(0.0, min(t + COST, end) - max(t, start)) for one in times for t in one)
        found[str(n)] = {
            "workers": len(times),
            "chunks": n * n_chunks,
            "batches": sum(map(len, times)),
            "seconds until all work": start - began,
            "window": end - start,
            "efficiency": asleep / (len(times) * (end - start)),
            "tail": max(one[-1] for one in times) + COST - end,
            "seconds after the last batch": ended - max(one[-1] for one in times) - COST,
        }
        _keep(folder, "scaling", dict(sorted(found.items(), key=lambda one: int(one[0]))))


def _captions(total: int) -> Callable[[int], Iterator[SourceItem]]:
    def items(start: int) -> Iterator[SourceItem]:
        for number in range(start, total):
            yield SourceItem(str(number), caption=f"caption {number}")

    return items


def _keep(folder: Path, name: str, found: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


def results(folder: Path) -> None:
    """Write the section of RESULTS.md, of what was run."""
    lines: list[str] = []

    def found(name: str) -> Any:
        path = folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else lines.append(f"\n*{name}* was not run.")

    def bytes_of(run: Any) -> str:
        written = run["chunks written twice"]
        return f"bytes {'equal' if run['same bytes'] else 'DIFFERENT'}, {written} chunks written a second time"

    if k := found("kills"):
        hits = ", ".join(f"{n} of a {kind}" for kind, n in k["hits"].items())
        lines.append(
            f"- {k['scenes']:,} scenes, {k['chunks']} chunks, a Ray cluster of three nodes, {len(k['kills'])} kills; "
            f"that hit: {hits}. Against one process: {bytes_of(k)}; {k['left over']} processes left over. "
            f"{k['seconds']:.0f} s with all restarts."
        )
    if p := found("parts"):
        lines.append(
            f"- Parts {', '.join(f'{i}/4' for i in p['order'])} of {p['scenes']:,} scenes, killed after "
            f"{', '.join(map(str, p['killed after chunks']))} chunks and repeated: {bytes_of(p)}."
        )
    if o := found("overhead"):
        lines += [
            "",
            f"| two cores, {o['scenes']:,} scenes | s in all | scenes a second, first to last chunk |",
            "|---|---:|---:|",
            *(
                f"| {name} | {o[name]['seconds']:.1f} | {o[name]['scenes a second']:.0f} |"
                for name in ("one process", "two parts", "ray")
            ),
            "",
            f"The three stores are {'equal' if o['same bytes'] else 'DIFFERENT'} in every byte.",
        ]
    if s := found("scaling"):
        lines += [
            "",
            "| workers that sleep | chunks | busy while all work | the last ends later, s | s until all work |",
            "|---:|---:|---:|---:|---:|",
            *(
                f"| {n} | {one['chunks']} | {one['efficiency']:.3f} | {one['tail']:.1f} "
                f"| {one['seconds until all work']:.0f} |"
                for n, one in s.items()
            ),
            "",
            f"A batch sleeps {COST:g} s, a chunk {4 * COST:g} s. Here all workers start on two cores; "
            "the nodes of a cluster start theirs beside each other.",
        ]
    write_section("cluster", "Embedding by several processes", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("kills", "parts", "overhead", "scaling", "results"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--first-scene", type=int, default=44_000_000)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--chunks", type=int, default=24, help="for each sleeping worker")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.what == "scaling":
        scaling(given.folder, given.workers, given.chunks)
    elif given.what == "results":
        results(given.folder)
    elif given.what == "overhead":
        overhead(given.folder, given.first_scene, given.scenes)
    else:
        what = kills if given.what == "kills" else parts
        what(given.folder, given.first_scene, given.scenes, given.seed)


if __name__ == "__main__":
    main()
