"""`embed` on a Ray cluster: workers on all nodes commit chunks of one store into a folder that they share.

Ray starts workers and says when one is lost. What is done is known from the chunks on disk alone, so a worker, a
node or the driver may be killed at any moment. Ray Data is not used: its blocks are cut by size, and a batch of other
pictures rounds otherwise, which would give other bytes than one process gives.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from msae.base.errors import ConfigError, StoreError, first_line, require
from msae.base.files import locked
from msae.base.notices import notice
from msae.base.progress import progress
from msae.data.chunks import chunk_numbers, chunk_path, gaps
from msae.data.embed import Job, Work
from msae.data.layout import PARTIAL

_MAX_RUN = 16
"""Chunks that a worker is given at once: it decodes the next one while it embeds, but a lost worker loses only one."""
_CORES = 4
"""CPU cores of a worker without a GPU, where the nodes have as many."""
_DECODING_CORES = 8
"""CPU cores at most of a worker with a GPU."""
_MAX_LOST = 3
"""Losses for each worker, without anything embedded in between, after which it is no accident."""
_LOOK = 2.0
"""Seconds after which the driver looks for nodes that came or went."""
_ANSWER = 10.0
"""Seconds in which the head of a cluster answers."""
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_SHARED = 60.0
"""Seconds in which a folder that a node has made is seen by another one."""


class _Kind(NamedTuple):
    """What a worker takes of a node."""

    cpus: int
    gpus: int

    @classmethod
    def of(cls, nodes: list[dict[str, float]], job: Job) -> _Kind:
        """One GPU each, if there are any and the device is not the CPU; else a few cores."""
        with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1] if job.device != "cpu" else []
        if with_gpus:
            cores = min(int(node.get("CPU", 0) / node["GPU"]) for node in with_gpus)
            return cls(job.workers or max(1, min(_DECODING_CORES, cores)), 1)
        cores = min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=0)
        return cls(job.workers or max(1, min(_CORES, cores)), 0)

    def fitting(self, nodes: list[dict[str, float]]) -> int:
        """How many workers the nodes have room for."""
        cpus = (int(node.get("CPU", 0) // self.cpus) for node in nodes)
        gpus = (int(node.get("GPU", 0)) if self.gpus else None for node in nodes)
        return sum(cpu if gpu is None else min(cpu, gpu) for cpu, gpu in zip(cpus, gpus, strict=True))


class _Worker:
    """A process of the cluster that holds the encoder."""

    def __init__(self, job: Job, kind: _Kind, folder: str, place: float) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)  # the paths of a source may be relative
        self.job, self.place = job, place
        self.device = job.device if kind.gpus or job.device != "auto" else "cpu"
        self.threads = kind.cpus
        self.held = contextlib.ExitStack()

    def begin(self) -> tuple[int, int]:
        """Load the encoder; the number of samples, and how many a chunk has."""
        mark, until = self.job.out / PARTIAL / "ray" / ".lock", time.monotonic() + _SHARED
        while not mark.exists():
            if time.monotonic() > until:
                raise StoreError(
                    f"a node of the cluster ({os.uname().nodename}) does not see {self.job.out}; "
                    f"give an --out in a folder that all nodes share"
                )
            time.sleep(0.2)
        job = replace(self.job, device=self.device, workers=self.threads)
        self.work: Work = self.held.enter_context(job.at_work(self.place))
        return self.work.source.total or 0, self.work.chunk_items

    def embed(self, first: int, last: int) -> None:
        """Commit the chunks from `first` to before `last` that are not there."""
        there = [number for number in range(first, last) if chunk_path(self.work.folder, number).exists()]
        self.work.embed(gaps(there, first, last), done=0, total=None)


def embed_on_ray(job: Job, address: str) -> None:
    """Commit every chunk of a store, on all nodes of a Ray cluster.

    Args:
        address: As for `embed`.

    Raises:
        ConfigError: No cluster answers, or it has no room for a worker.
        StoreError: Another process does the same, a node does not share the folder, or worker after worker is lost.
    """
    require("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # msae sends nothing
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # a cluster that is gone is seen in two minutes, not in 14
    import ray

    # the mark by which a node knows that it shares the folder; and one driver at a time
    with locked(job.out / PARTIAL / "ray", error=StoreError), _connected(ray, address):
        _Driver(ray, job).run()


class _Driver:
    """Hands out runs of chunks until all are on disk."""

    def __init__(self, ray: Any, job: Job) -> None:
        self.ray, self.out = ray, job.out
        self.kind = _Kind.of(self._nodes(), job)
        self.room = self.kind.fitting(self._nodes())
        if not self.room:
            raise ConfigError(
                f"no node of the cluster has {self.kind.cpus} CPU cores for a worker; wanted one at least"
            )
        self.actor = ray.remote(num_cpus=self.kind.cpus, num_gpus=self.kind.gpus, max_restarts=0)(_Worker)
        self.job = ray.put(replace(job, out=job.out.absolute()))
        self.busy: dict[Any, _Task] = {}
        self.idle: list[Any] = []
        self.runs: deque[range] | None = None
        """Chunks that no worker has yet; None before the samples are counted."""
        self.n_started = self.n_lost = self.n_lost_in_all = self.total = self.size = 0
        self.stack = contextlib.ExitStack()
        self.advance: Callable[[int], None] = lambda _: None

    def run(self) -> None:
        with self.stack:
            self.stack.callback(self._stop)
            while self.runs is None or self.runs or any(task.run for task in self.busy.values()):
                self._hand_out()
                for ref in self.ray.wait(list(self.busy), timeout=_LOOK)[0]:
                    task = self.busy.pop(ref)
                    try:
                        found = self.ray.get(ref)
                    except self.ray.exceptions.RayTaskError as err:
                        raise err.cause from None
                    except self.ray.exceptions.RayError as err:
                        self._lost(task, err)
                    else:
                        self._done(task, found)
                self.room = max(1, self.kind.fitting(self._nodes()))  # nodes come and go

    def _hand_out(self) -> None:
        while len(self.busy) + len(self.idle) < self.room:
            place = (self.n_started % self.room) / self.room
            worker = self.actor.remote(self.job, self.kind, str(Path.cwd()), place)
            self.busy[worker.begin.remote()] = _Task(worker)
            self.n_started += 1
        while self.idle and self.runs:
            worker, run = self.idle.pop(), _taken(self.runs, self.room)
            self.busy[worker.embed.remote(run.start, run.stop)] = _Task(worker, run)

    def _done(self, task: _Task, found: Any) -> None:
        self.idle.append(task.worker)
        if task.run:
            self.n_lost = 0
            self.advance(self._samples(task.run))
        elif self.runs is None:
            self.total, self.size = found
            there = chunk_numbers(self.out / PARTIAL / "chunks")
            self.runs = deque(range(first, last or 0) for first, last in gaps(there, 0, -(-self.total // self.size)))
            done = self.total - sum(map(self._samples, self.runs))
            title = f"embedding with {self.room} workers on {len(self._nodes())} nodes"
            self.advance = self.stack.enter_context(progress(title, total=self.total, unit="rows", start=done))

    def _lost(self, task: _Task, err: Exception) -> None:
        """Somebody else takes what a lost worker had."""
        self.ray.kill(task.worker)
        self.n_lost += 1
        if self.n_lost > _MAX_LOST * (self.room + 1):
            raise StoreError(
                f"{self.n_lost} workers were lost one after another ({first_line(err)}); see the logs of Ray on the "
                f"nodes; what is done is kept in {self.out}, and the same command goes on"
            ) from err
        self.n_lost_in_all += 1
        notice(f"workers of the cluster that were lost so far: {self.n_lost_in_all}; others take their samples")
        if task.run and self.runs is not None:
            self.runs.appendleft(task.run)

    def _stop(self) -> None:
        for worker in [*self.idle, *(task.worker for task in self.busy.values())]:
            self.ray.kill(worker)

    def _samples(self, run: range) -> int:
        return min(run.stop * self.size, self.total) - run.start * self.size

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]


class _Task(NamedTuple):
    """What a worker is doing."""

    worker: Any
    run: range | None = None
    """Numbers of the chunks; None while it begins."""


def _taken(runs: deque[range], room: int) -> range:
    """The next chunks for a worker: fewer towards the end, so that all workers end together."""
    n = max(1, min(_MAX_RUN, sum(map(len, runs)) // (2 * room)))
    run = runs.popleft()
    if len(run) > n:
        runs.appendleft(run[n:])
    return run[:n]


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connected to the cluster at `address`, or to that of this Python process, which then stays."""
    if ray.is_initialized():
        yield
        return
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit() and "//" not in host:
            socket.create_connection((host, int(port)), timeout=_ANSWER).close()  # Ray would try for minutes
        if address == "local" or not _is_found(ray, address):
            # else Ray listens on every address of the machine
            ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
            ray.init("local", include_dashboard=False, **_QUIET)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as err:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({first_line(err)}); give the HOST:PORT that ray start --head printed"
        ) from err
    try:
        yield
    finally:
        ray.shutdown()


def _is_found(ray: Any, address: str) -> bool:
    """Whether the cluster at `address` is there; for `auto` there may be none."""
    try:
        ray.init(address, **_QUIET)
    except ConnectionError:
        if address != "auto" or os.environ.get("RAY_ADDRESS"):
            raise
        return False
    return True
