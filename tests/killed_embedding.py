"""Kills `embed` with SIGKILL at random moments, starts it again, prints what was seen as a JSON line a trial.

A program of its own: each run is a fork of a process that has imported all, on one thread, since ten
runs of a new interpreter would take a minute.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from msae.base.errors import StoreError
from msae.data.embed import Embedder, embed
from msae.data.store import EmbeddingStore

torch.set_num_threads(1)


def run(work: Callable[[], object], *, kill: Callable[[], bool] = bool) -> int:
    """The signal that ended a fork doing `work`, 0 if none did; it is killed once `kill()` is true."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as err:  # noqa: BLE001  a fork must not run the parent's code
            print(repr(err), file=sys.stderr, flush=True)
            os._exit(1)
    ended, status = 0, 0
    while not ended:
        if kill():
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def files_in(folder: Path) -> int:
    """Files below a folder in which folders come and go: `rglob` raises when one is gone before it is read."""
    return sum(len(files) for _, _, files in os.walk(folder))


def main() -> None:
    source, encoder, folder, n_trials = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])

    def work_on(out: Path) -> Callable[[], object]:
        return lambda: embed(source, encoder=encoder, out=out, batch_size=1, shard_rows=7, dtype="float32")

    Embedder.load(encoder)  # its imports, once
    n_files = 0
    whole = folder / "whole.store"

    def count_files() -> bool:
        nonlocal n_files
        n_files = max(n_files, files_in(whole))
        return False

    run(work_on(whole), kill=count_files)
    moments = random.Random(0)
    for number in range(n_trials):
        out = folder / f"killed-{number}.store"
        # a moment is told by the files that are there: time passes mostly before the first one
        n_wanted, delay = moments.randrange(n_files), moments.uniform(0, 0.005)

        def is_moment(out: Path = out, n_wanted: int = n_wanted, delay: float = delay) -> bool:
            there = files_in(out) >= n_wanted
            time.sleep(delay * there)
            return there

        killed = run(work_on(out), kill=is_moment) == signal.SIGKILL
        n_chunks = len(list(out.glob(".partial/chunks/chunk_*")))
        n_shards = len(list(out.glob("*_emb/*.npy")))
        try:
            was_open = bool(EmbeddingStore.open(out))
            error = ""
        except StoreError as err:
            was_open, error = False, str(err)
        run(work_on(out))
        seen = {"out": str(out), "killed": killed, "chunks": n_chunks, "shards": n_shards, "opened": was_open}
        print(json.dumps({**seen, "error": error}), flush=True)


if __name__ == "__main__":
    main()
