"""Training above memory: what is drawn when blocks of rows are shuffled, and that nothing else changes."""

import itertools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from msae.base.devices import memory
from msae.base.errors import Interrupted, RunError
from msae.sae.train import train
from msae.sae.train.blocks import BLOCKS_PER_ROW, block_batches, pools, rows_of_a_block
from msae.sae.train.rows import TrainingRows
from msae.sae.train.settings import TrainSettings
from tests.conftest import needs_posix

SMALL = {"d_sae": 64, "batch_size": 60, "epochs": 3, "lr": 1e-3, "log_every": 5, "device": "cpu", "levels": (4, 64)}


class Numbers:
    """Rows that hold their own number."""

    d_in = 2

    def __init__(self, n: int) -> None:
        self.n, self.threads = n, set()

    def __len__(self) -> int:
        return self.n

    def between(self, start, stop, modality):
        self.threads.add(threading.current_thread())
        rows = np.arange(start, min(stop, self.n), dtype=np.float32)
        return np.stack([rows, rows + (modality == "text")], axis=1)


def drawn(n, n_batches, *, size=10, block_rows=4, per_epoch=None, first=0, seed=(0,), share=slice):
    stream = block_batches(
        Numbers(n), ("image",), size, block_rows=block_rows, n_batches=per_epoch or n // size, seed=seed, first=first,
        share=share,
    )  # fmt: skip
    return [batch[0][:, 0].astype(int).tolist() for batch in itertools.islice(stream, n_batches)]


def joined(batches) -> list[int]:
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("n", [40, 43, 3007])
@pytest.mark.parametrize("block_rows", [2, 4, 7, 5000])
def test_an_epoch_draws_each_row_at_most_once_and_epochs_and_seeds_differ(n, block_rows):
    per_epoch = n // 10
    batches = drawn(n, 2 * per_epoch, block_rows=block_rows)
    assert all(len(batch) == 10 for batch in batches)
    epochs = [joined(batches[:per_epoch]), joined(batches[per_epoch:])]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == per_epoch * 10 and set(epoch) <= set(range(n))
    assert epochs[0] != epochs[1]
    assert drawn(n, per_epoch, block_rows=block_rows) == batches[:per_epoch]
    assert drawn(n, per_epoch, block_rows=block_rows, seed=(1,)) != batches[:per_epoch]


def test_rows_of_a_block_are_drawn_within_one_pool_and_mixed_with_those_of_other_blocks():
    at_once, block_rows = 16 * BLOCKS_PER_ROW, 3
    n = 4 * at_once * block_rows
    order = np.array(drawn(n, n // 16, size=16, block_rows=block_rows)).ravel()
    pool = np.empty(n, int)
    pool[order] = np.arange(n) // (at_once * block_rows)  # which pool each row was drawn in
    blocks = pool.reshape(-1, block_rows)
    assert (blocks == blocks[:, :1]).all()
    assert not np.array_equal(np.unique(blocks[:, 0], return_index=True)[1], np.arange(4) * at_once)
    of_a_batch = order[:16] // block_rows
    assert len(set(of_a_batch.tolist())) > 10  # of 64 blocks


@pytest.mark.parametrize("first", [0, 1, 52, 102, 103, 300, 301, 617])
def test_what_is_drawn_after_an_interruption_is_what_would_have_been_drawn(first):
    whole = drawn(3007, 640, block_rows=2)
    assert drawn(3007, 640 - first, block_rows=2, first=first) == whole[first:]


def test_a_pool_is_skipped_without_being_read():
    part = Numbers(10_000)
    last = next(pools(10_000, block_rows=4, at_once=40, n_drawn=10_000, seed=(0,), first=9_999))
    assert last.drawn == slice(last.n_rows - 1, last.n_rows)
    next(block_batches(part, ("image",), 10, block_rows=4, n_batches=1000, seed=(0,), first=0))
    assert part.threads and threading.main_thread() not in part.threads  # never in the step


def test_shares_of_processes_are_the_batch():
    whole = drawn(200, 30)
    shares = [drawn(200, 30, share=lambda n, r=r: slice(r, None, 3)) for r in range(3)]
    assert [sorted(joined(parts)) for parts in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]


def test_the_smaller_modality_comes_again_in_a_new_order():
    """30 rows drawn 100 times an epoch: each three times and 10 of them once more."""
    batches = drawn(30, 20, per_epoch=10)
    counts = np.bincount(joined(batches[:10]), minlength=30)
    assert sorted(counts.tolist()) == [3] * 20 + [4] * 10
    assert joined(batches[:3]) != joined(batches[3:6])


def test_pairs_are_read_together():
    stream = block_batches(Numbers(50), ("image", "text"), 10, block_rows=4, n_batches=5, seed=(0,))
    for images, texts in itertools.islice(stream, 12):
        assert np.array_equal(images[:, 1] + 1, texts[:, 1])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    mixture = rng.exponential(size=(2000, 32)) * (rng.random((2000, 32)) < 0.1)
    rows = (mixture @ rng.normal(size=(32, 16)) + 2).astype(np.float16)
    folder = tmp_path_factory.mktemp("data")
    np.save(folder / "x-image.npy", rows)
    np.save(folder / "x-text.npy", rows[:700] + np.float16(1))
    np.savez(folder / "pairs.npz", image=rows[:500], text=rows[500:1000])
    return folder


def weights(run) -> bytes:
    return (run / "sae.safetensors").read_bytes()


def test_below_memory_size_single_rows_are_shuffled_as_ever(store, tmp_path):
    train(store / "x-image.npy", out=tmp_path / "a", **SMALL)
    train(store / "x-image.npy", out=tmp_path / "b", block_rows=1, **SMALL)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert json.loads((tmp_path / "a/config.json").read_text())["train"]["block_rows"] == 1


@pytest.mark.parametrize("what", ["image", "both"])
def test_an_interrupted_run_in_blocks_ends_in_the_same_bytes(what, store, tmp_path, monkeypatch):
    files = [store / "x-image.npy", store / "x-text.npy", store / "pairs.npz"]
    stores, more = (files[0], {}) if what == "image" else (files, {"modality": "both", "align": 0.1})
    settings = {**SMALL, **more, "block_rows": 2}
    sae = train(stores, out=tmp_path / "whole", **settings)
    assert not np.isnan(sae.W_dec.detach().numpy()).any()
    n_steps = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-1])["step"]

    from msae.sae.train import training

    for stop in (1, n_steps // 3, n_steps // 2):  # steps of each attempt
        seen = itertools.count(1)
        with monkeypatch.context() as patched:
            step = training.train_step

            def interrupting(*args, step=step, seen=seen, stop=stop, **kw):
                result = step(*args, **kw)
                if next(seen) == stop:
                    raise KeyboardInterrupt
                return result

            patched.setattr(training, "train_step", interrupting)
            with pytest.raises((KeyboardInterrupt, Interrupted)):
                train(stores, out=tmp_path / "cut", resume=True, checkpoint_every=1, **settings)
    train(stores, out=tmp_path / "cut", resume=True, **{**settings, "block_rows": None})  # as it began
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    with pytest.raises(RunError, match="block_rows 2, not 4"):
        train(stores, out=tmp_path / "cut", resume=True, **{**settings, "block_rows": 4})


def test_several_stores_are_cut_into_blocks_like_one(store, tmp_path):
    x = np.load(store / "x-image.npy")
    np.save(tmp_path / "1-image.npy", x[:901])
    np.save(tmp_path / "2-image.npy", x[901:])
    train(store / "x-image.npy", out=tmp_path / "one", block_rows=4, **SMALL)
    train([tmp_path / "1-image.npy", tmp_path / "2-image.npy"], out=tmp_path / "two", block_rows=4, **SMALL)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_blocks_are_chosen_where_the_store_does_not_fit():
    gib = 1 << 30
    assert rows_of_a_block(11 * gib, 2048, 4096, 16 * gib) == 1
    assert rows_of_a_block(13 * gib, 2048, 4096, 16 * gib) == 32  # 16,384 blocks of 64 KiB: a 16th of the memory
    assert rows_of_a_block(100 * gib, 2048, 256, 16 * gib) == 512
    assert rows_of_a_block(10**15, 2048, 64, 10 * 1024 * gib) == 4096
    assert rows_of_a_block(10**9, 4096, 4096, 1 << 20) == 4
    assert rows_of_a_block(13 * gib, 2048, 4096, 16 * gib, n_processes=4) == 8


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, 1 << 40))
from msae.base.devices import memory
whole = memory()
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), 1 << 40))
print(whole > int(sys.argv[1]), memory())
"""


@needs_posix
def test_the_memory_is_the_machines_or_a_limit_that_is_set():
    assert memory() > 1 << 28
    found = subprocess.run([sys.executable, "-c", LIMITED, "123456789"], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "123456789"]


def test_a_store_beyond_the_memory_is_trained_on_in_blocks_without_being_asked(store):
    rows = TrainingRows(store / "x-image.npy", "image")
    assert rows.n_bytes == 2000 * 16 * 2
    assert TrainSettings(block_rows=32).resolve(rows).block_rows == 32
    assert TrainSettings().resolve(rows).block_rows == rows_of_a_block(rows.n_bytes, 64, 64, memory()) == 1
