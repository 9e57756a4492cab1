"""What is read of the metadata of many rows: a piece at a time, in memory that hardly grows, with the same answers."""

import datetime
import decimal
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msae.base.devices import return_freed_memory
from msae.base.errors import ConfigError, StoreError
from msae.data import store as store_module
from msae.data import tables
from msae.data.parts import part_of, read_part
from msae.data.rows import class_names, labelled_rows
from msae.data.sampled import sample_rows
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.measure.probe import _among
from msae.use.compare import _check_apart, _strata
from msae.use.filters import Filter

PIECE = 500
FEW, MANY = 5_000, 25_000
POOLS = []  # what they hold may live longer than a test


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    for module in (store_module, tables):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", PIECE)


def columns_of(n):
    number = np.arange(n)
    return {
        "id": [f"picture-{i:08d}" for i in number],
        "caption": [f"a picture of word{i % 200} and of nothing else that matters" for i in number],
        "side": [("left", "right")[i % 2] for i in number],
        "label": [None if i % 11 == 0 else f"class{i // 2 % 10}" for i in number],
        "size": (number % 7).tolist(),
    }


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two stores that differ in their number of rows."""
    folder = tmp_path_factory.mktemp("streams")
    for n in (FEW, MANY):
        x = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float16)
        write_store(folder / f"{n}.store", [StorePart({"image": x}, pa.table(columns_of(n)))], shard_rows=PIECE)
    return [folder / f"{n}.store" for n in (FEW, MANY)]


@contextmanager
def watched():
    """The peak of what Python, numpy and pyarrow hold."""
    found, pool = [], pa.default_memory_pool()
    own = pa.proxy_memory_pool(pool)
    POOLS.append(own)
    pa.set_memory_pool(own)
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1] + own.max_memory())
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(pool)


def within(store):
    return _strata([part_of(store, "side", "left"), part_of(store, "side", "right")], ["size", "label"])


@pytest.mark.parametrize(
    ("read", "most"),
    [
        (lambda store: store.describe_rows([0, len(store) - 1, len(store) // 2]), 1),
        (lambda store: store.ids[len(store) // 3], 1),
        (lambda store: store.ids.row_of(f"picture-{len(store) - 1:08d}"), 1),
        (lambda store: sum(map(len, store.ids)), 1),
        (lambda store: [row.caption for row in sample_rows(store, 300)], 20),  # numbers of all rows are drawn from
        (lambda store: Filter.parse("label == 'class3' and size > 2 or id == 'x'").rows_of(store), 3),
        (lambda store: store.coded_labels("label"), 6),
        (lambda store: store.labels("caption"), 25),
        (lambda store: labelled_rows(store.labels("label")), 35),
        (within, 80),
    ],
)
def test_memory_hardly_grows_with_the_rows(paths, read, most, monkeypatch):
    monkeypatch.setattr(store_module, "_CHECKED_IDS", 0)  # as of large stores
    peaks = []
    for path in [paths[0], *paths]:  # the first time for what is loaded once
        store = EmbeddingStore.open(path)
        _ = store.columns
        with watched() as found:
            read(store)
        peaks += found
    assert (peaks[2] - peaks[1]) / (MANY - FEW) <= most, "bytes a row"


def test_the_watch_sees_what_python_and_pyarrow_hold(paths):
    store = EmbeddingStore.open(paths[1])
    with watched() as arrow:
        _ = store.metadata
    with watched() as python:
        store.column("caption")
    assert arrow[0] > 100 * MANY and python[0] > 100 * MANY


VALUES = {
    "text": ["b", "a", None, "", "nan", " <NA> ", "b"] * 3,
    "whole": [3, 1, None, 3] * 5,
    "real": [0.5, float("nan"), None, -0.0, 0.0, 1e300] * 4,
    "half": pa.array(np.array([0.5, 1, 0.5, np.nan], np.float16)),
    "truth": [True, None, False] * 5,
    "day": [datetime.date(2020, 1, 3), None, datetime.date(2020, 1, 1)] * 5,
    "far": pa.array([2**41, 5, None, 5], pa.timestamp("s")),
    "money": [decimal.Decimal("1.50"), None, decimal.Decimal("2.00")] * 5,
    "bytes": [b"x", None, b"\xff"] * 5,
    "nothing": [None] * 7,
    "category": pa.array(["k", "g", None, "k"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", VALUES)
def test_labels_are_those_of_the_whole_column(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(store_module, "ROWS_AT_ONCE", 3)
    column = VALUES[kind] if isinstance(VALUES[kind], pa.Array) else pa.array(VALUES[kind])
    np.save(tmp_path / "x.npy", np.ones((len(column), 2), np.float32))
    pq.write_table(pa.table({"value": column}), tmp_path / "x.parquet", row_group_size=4)
    store = EmbeddingStore.open(tmp_path / "x.npy", modality="image")
    wanted = class_names(store.column("value"))
    numbers, names = store.coded_labels("value")
    assert store.labels("value") == wanted and names == list(dict.fromkeys(one for one in wanted if one is not None))
    assert [None if number < 0 else names[number] for number in numbers] == wanted
    assert labelled_rows(wanted).tolist() == [row for row, one in enumerate(wanted) if one is not None]


def test_a_column_of_lists_has_no_labels(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 2), np.float32))
    pq.write_table(pa.table({"tags": [["a"], ["b"]]}), tmp_path / "x.parquet")
    with pytest.raises(StoreError, match="holds lists"):
        EmbeddingStore.open(tmp_path / "x.npy", modality="image").labels("tags")


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (["a", "b", "c", "d", "e", "f", "g"], ["a", "b", "c", "d", "e", "f", "g"]),
        (["a", "b", "c", "d", "e", "f", "a"], ["a", "b", "c", "d", "e", "f", "a#2"]),  # far apart
        (["a", None, "c", "d", "e", "f", "g"], ["a", "1", "c", "d", "e", "f", "g"]),
        ([10, 11, 12, 13, 14, 15, 16], ["10", "11", "12", "13", "14", "15", "16"]),
        ([10, 11, 12, 13, 14, 15, 10], ["10", "11", "12", "13", "14", "15", "10#2"]),
        ([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5], ["0.5", "1.5", "2.5", "3.5", "4.5", "5.5", "6.5"]),
    ],
)
def test_ids_are_the_same_in_whatever_pieces_they_are_read(tmp_path, monkeypatch, ids, wanted):
    monkeypatch.setattr(store_module, "ROWS_AT_ONCE", 3)
    np.save(tmp_path / "x.npy", np.ones((7, 2), np.float32))
    pq.write_table(pa.table({"key": ids, "size": range(7)}), tmp_path / "x.parquet", row_group_size=2)
    store = EmbeddingStore.open(tmp_path / "x.npy", modality="image")
    assert list(store.ids) == wanted == [store.ids[row] for row in range(7)] == store.ids.to_arrow().to_pylist()
    assert [store.ids.row_of(id) for id in wanted] == list(range(7))
    assert store.ids[2:6:2] == wanted[2:6:2] and store.ids.between(1, 6).to_pylist() == wanted[1:6]
    assert store.metadata.column("id").to_pylist() == wanted and store.metadata.column("size").to_pylist() == [
        *range(7)
    ]
    few = sample_rows(EmbeddingStore.open(tmp_path / "x.npy", modality="image"), 3)
    assert few.column("size") == few.chosen.tolist()


def test_rows_are_described_alike_before_and_after_all_metadata_are_read(paths):
    store = EmbeddingStore.open(paths[0])
    rows = [4999, 3, 3, 501, 0]
    before = store.describe_rows(rows, show="size")
    assert "metadata" not in vars(store)
    _ = store.metadata
    assert store.describe_rows(rows, show="size") == before and [row.row for row in before] == rows
    wanted = columns_of(FEW)
    assert [(row.id, row.caption, row.columns["size"]) for row in before] == [
        (wanted["id"][row], wanted["caption"][row], wanted["size"][row]) for row in rows
    ]
    for wrong in (-1, FEW):
        with pytest.raises(StoreError, match=f"row {wrong} is asked of"):
            store.describe_rows([0, wrong])


@pytest.mark.parametrize(
    "text",
    [
        "label == 'class3'", "label is null", "not label in ('class1', 'class2')", "size > 3 and side == 'left'",
        "id == 'picture-00000777'", "column('caption') != 'x' and 1 <= size <= 2", "side == label or size == 0",
    ],
)  # fmt: skip
def test_a_filter_keeps_the_rows_that_it_keeps_of_all_metadata(paths, text):
    store = EmbeddingStore.open(paths[0])
    found = Filter.parse(text).rows_of(store)
    assert "metadata" not in vars(store) and found.any()
    np.testing.assert_array_equal(found, Filter.parse(text).mask(store.metadata))


def written(folder, **columns):
    n = len(next(iter(columns.values())))
    return write_store(folder / "x.store", [StorePart({"image": np.ones((n, 2), np.float16)}, pa.table(columns))],
                       shard_rows=3)  # fmt: skip


@pytest.mark.parametrize("text", ["flag", "not flag", "flag == True", "size > 1.5", "flag and size < 3"])
def test_whether_text_is_a_truth_or_a_number_is_said_by_all_rows(tmp_path, monkeypatch, text):
    monkeypatch.setattr(store_module, "ROWS_AT_ONCE", 3)  # the first and the last piece are blank
    store = written(
        tmp_path, flag=["", None, "", "True", "", "false", "", "", ""], size=["", "", "", "1", "2", "3", "", "2", "1"]
    )
    np.testing.assert_array_equal(Filter.parse(text).rows_of(store), Filter.parse(text).mask(store.metadata))


@pytest.mark.parametrize(
    ("flags", "text", "message"),
    [
        (["True", "False", "", "maybe", "", ""], "flag", "holds string; compare it with a value"),
        (["True", "False", "", "maybe", "", ""], "flag == True", "column 'flag' holds string"),
        (["", "", "", "", None, ""], "flag", "holds string; compare it with a value"),
        (["1", "2", "", "x", "", ""], "flag > 1", "column 'flag' holds string"),
        (["a"] * 6, "flog == 'a'", "no column 'flog' to filter by; did you mean 'flag'"),
        (["a"] * 6, "zzz == 'a'", "there are id, flag: compare one of these"),
    ],
)
def test_a_filter_is_refused_as_it_is_of_all_metadata(tmp_path, monkeypatch, flags, text, message):
    monkeypatch.setattr(store_module, "ROWS_AT_ONCE", 3)
    store = written(tmp_path, flag=flags)
    for keep in (Filter.parse(text).rows_of, lambda store: Filter.parse(text).mask(store.metadata)):
        with pytest.raises(ConfigError, match=message):
            keep(store)


def slow_strata(parts, columns):
    """As compare did it before: a tuple of values for each row."""
    keys = []
    for part in parts:
        labels = [part.store.labels(column) for column in columns]
        keys.append([tuple(own[row] for own in labels) for row in part.rows])
    number = {key: i for i, key in enumerate(sorted({k for k in keys[0] if None not in k} & set(keys[1]), key=str))}
    return [[number.get(key, -1) for key in own] for own in keys]


@pytest.mark.parametrize("columns", [[], ["size"], ["label"], ["size", "label"], ["label", "size"], ["size", "size"]])
def test_strata_are_those_of_the_values_of_each_row(tmp_path, columns):
    rng = np.random.default_rng(7)
    label = [(None, "a", "b'", "b", "nan")[i] for i in rng.integers(5, size=60)]
    size = rng.integers(12, size=60).tolist()
    store = written(tmp_path, side=[("x", "y")[i] for i in rng.integers(2, size=60)], label=label, size=size)
    parts = [read_part(f"{store.path}:side={side}") for side in "xy"]
    assert [own.tolist() for own in _strata(parts, columns)] == slow_strata(parts, columns)


def test_sides_without_a_common_value_and_sides_that_share_rows_are_refused(tmp_path):
    store = written(tmp_path, side=["x", "x", "y", "y"], label=["a", "b", "c", None])
    parts = [read_part(f"{store.path}:side={side}") for side in "xy"]
    for columns in (["label"], ["label", "side"], ["side"]):
        with pytest.raises(ConfigError, match="in common; give other columns to --within"):
            _strata(parts, columns)
    with pytest.raises(ConfigError, match="share 2 rows"):
        _check_apart(parts[0], read_part(store.path))
    _check_apart(*parts)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: how much is held cannot be read")
def test_freed_memory_goes_back_to_the_system():
    def held():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    arrays = [np.ones(100_000, np.uint8) for _ in range(1000)]
    before, last = held(), arrays[-1]
    del arrays  # the last one keeps what lies below it from being returned
    return_freed_memory()
    assert held() < before - 80 and last.sum() == 100_000


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (1, 1), (1000, 300), (300, 100_000)])
def test_keys_among_others_are_those_that_numpy_finds(n, m):
    keys, known = (np.random.default_rng(n + m).integers(-500, 500, size=size) for size in (n, m))
    np.testing.assert_array_equal(_among(keys, known), np.isin(keys, known))


def folder_of(path, *parts):
    """A folder as clip-retrieval writes it, with these metadata."""
    for name in ("img_emb", "metadata"):
        (path / name).mkdir(parents=True)
    for number, part in enumerate(parts):
        np.save(path / f"img_emb/img_emb_{number}.npy", np.ones((len(part), 2), np.float32))
        pq.write_table(part, path / f"metadata/metadata_{number}.parquet", row_group_size=7)
    return path


def test_a_store_elsewhere_whose_files_differ_in_type_is_read_as_here(tmp_path, monkeypatch):
    monkeypatch.setenv("MSAE_STORES", str(tmp_path / "cache"))
    first = pa.table({"caption": list("abc"), "x": pa.nulls(3), "y": [1, 2, 3]})
    here = EmbeddingStore.open(
        folder_of(tmp_path / "here", first, pa.table({"caption": list("de"), "x": ["u", "v"], "y": [0.5, 1.5]}))
    )
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "here"), "/streams", recursive=True)
    far = EmbeddingStore.open("memory://streams")
    assert far.metadata.to_pylist() == here.metadata.to_pylist()
    assert far.labels("x") == here.labels("x") == [None, None, None, "u", "v"]
    assert far.column("y") == [1, 2, 3, 0.5, 1.5]
    system.rm("/streams", recursive=True)


def test_small_row_groups_are_read_together(tmp_path, monkeypatch):
    n, opened = 3 * PIECE + 20, []
    table = pa.table({"caption": [f"c{i}" for i in range(n)], "kind": [i % 3 for i in range(n)]})
    store = EmbeddingStore.open(folder_of(tmp_path / "x", table))
    real = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda *a, **k: opened.append(len(a[1])) or real(*a, **k))
    assert store.labels("kind") == [str(i % 3) for i in range(n)]
    assert sum(opened) == -(-n // 7) and len(opened) == 4
    assert [store[i].caption for i in (0, 6, 7, PIECE, n - 1)] == [f"c{i}" for i in (0, 6, 7, PIECE, n - 1)]


def test_ids_of_a_store_of_ours_are_unique_whatever_was_written_into_it(tmp_path):
    table = pa.table({"id": ["a", "b", "a", None]})
    store = write_store(tmp_path / "x.store", [StorePart({"image": np.ones((4, 2), np.float16)}, table)])
    again = EmbeddingStore.open(store.path)
    assert list(again.ids) == ["a", "b", "a#2", "3"] and again.ids.row_of("a#2") == 2


def test_views_of_text_are_text(tmp_path):
    table = pa.table({"caption": pa.array(list("abc"), pa.string_view()), "y": [1, 2, 3]})
    store = EmbeddingStore.open(folder_of(tmp_path / "x", table))
    assert store.labels("caption") == ["a", "b", "c"] and store[1].caption == "b"


def test_a_page_of_rows_reads_no_file_where_all_metadata_are_in_memory(paths, monkeypatch):
    store = EmbeddingStore.open(paths[1])
    rows = [24_000, 3, 12_345, 3]
    before = store.describe_rows(rows)
    assert store.metadata.num_rows == MANY
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda *_, **__: pytest.fail("a file is read"))
    assert store.describe_rows(rows) == before
    assert sum(len(piece) for piece in store.pieces(["id", "label"])) == MANY
    assert next(store.pieces(["id", "label"])).column_names == ["id", "label"]
