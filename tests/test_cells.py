"""The index of cells: exact where all cells are searched, and honest about what it misses where they are not."""

import json
import logging
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest

from msae import search
from msae.base.errors import ConfigError, MissingDependencyError, StoreError
from msae.base.files import locked
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.use.neighbours import NeighbourIndex, cells, open_index
from tests.oracles import neighbours as oracle
from tests.test_neighbours import age_record, break_header, break_record, lose_record, truncate
from tests.test_retrieval import run, store  # noqa: F401

faiss = pytest.importorskip("faiss")
D = 24


def clustered(n, seed=0, d=D):
    """Rows around 40 centres."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(40, d))
    return (centres[random.integers(40, size=n)] + 0.7 * random.normal(size=(n, d))).astype(np.float32)


X = clustered(4000)
QUERIES = clustered(200, seed=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    place = tmp_path_factory.mktemp("rows")
    np.save(place / "image.npy", X)
    return EmbeddingStore.open(place / "image.npy")


@pytest.fixture(scope="module")
def index(rows, tmp_path_factory):
    return open_index(rows, "image", tmp_path_factory.mktemp("run"), "ivf")


def saved(folder, x, name="image.npy"):
    folder.mkdir(exist_ok=True)
    np.save(folder / name, x)
    return EmbeddingStore.open(folder / name)


def found_by(index, queries=QUERIES, n=20):
    return [index.search(query, n).rows.tolist() for query in queries]


def mean_recall(index, x, queries, n=20):
    pairs = zip(found_by(index, queries, n), queries, strict=True)
    return np.mean([len(set(found) & set(oracle.nearest(x, query, n)[0].tolist())) / n for found, query in pairs])


@pytest.mark.parametrize("n", [1, 20, 4000, 5000])
def test_with_all_cells_search_is_brute_force(index, n):
    everything = index.for_queries("image", 1.0)
    assert everything.describe()["probes"] == everything.describe()["cells"] == 63  # the root of 4,000
    for query in QUERIES[:5]:
        wanted, scores = oracle.nearest(X, query, n)
        found = everything.search(query, n)
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)
        # Rows nearer to each other than the sums of float32 tell may change places.
        np.testing.assert_allclose(oracle.cosines(X, query)[found.rows], scores, atol=2e-6)
        assert len(set(found.rows.tolist())) == min(n, 4000)
        assert n > 20 or found.rows.tolist() == wanted.tolist()


def test_recall_is_as_wanted_and_as_measured(index):
    used = index.describe()
    assert 1 <= used["probes"] < 40 and used["recall"] >= 0.98 and used["recall_at"] == 20
    assert mean_recall(index, X, QUERIES) >= 0.98
    few = index.for_queries("image", 0.5)
    assert few.probes < index.probes
    # 256 queries measured it and 200 others judge it: three standard errors of the difference, at a deviation of .25
    assert mean_recall(few, X, QUERIES) == pytest.approx(few.recall, abs=0.07)


def test_what_is_found_in_the_searched_cells_is_exact(index):
    """Scores in float32, and in the order of brute force, whatever 8 bits say."""
    one = index.for_queries("image", 0.01)
    assert one.probes == 1
    for query in QUERIES[:20]:
        found = one.search(query, 20)
        exact = oracle.cosines(X, query)
        np.testing.assert_allclose(found.scores, exact[found.rows], atol=1e-6)
        assert (np.diff(found.scores) <= 0).all()
        cell = index._faiss.quantizer.search(X / np.linalg.norm(X, axis=1, keepdims=True), 1)[1][:, 0]
        own = np.flatnonzero(cell == cell[found.rows[0]])
        assert found.rows.tolist() == own[np.argsort(-exact[own])][:20].tolist()


@pytest.mark.parametrize("share", [0.5, 0.003, 0.0])
def test_a_filtered_search_is_brute_force(index, share):
    keep = np.random.default_rng(2).random(len(X)) < share
    assert index.describe(keep)["probes"] == 63
    for query in QUERIES[:10]:
        assert index.search(query, 20, keep=keep).rows.tolist() == oracle.nearest(X, query, 20, keep)[0].tolist()


def test_to_leave_out_the_query_itself_is_no_filter(index):
    keep = np.arange(len(X)) != 7
    assert index.describe(keep) == index.describe()
    assert 7 not in index.search(X[7], 20, keep=keep).rows
    assert index.search(X[7], 1).rows.tolist() == [7]


def test_ranks_count_the_rows_of_the_searched_cells(index):
    scores = oracle.nearest(X, QUERIES[1], len(X))[1].astype(np.float32)
    places = np.array([0, 3, 50, 3999])
    exact = index.for_queries("image", 1.0).ranks(QUERIES[1], scores[places])
    assert np.abs(exact - (places + 1)).max() <= 5  # rows nearer to each other than 8 bits tell
    counted = index.ranks(QUERIES[1], scores[places])
    assert (counted <= exact).all() and abs(counted[1] - 4) <= 1
    keep = np.arange(len(X)) % 2 == 0
    kept = oracle.nearest(X, QUERIES[1], len(X), keep)[1].astype(np.float32)
    assert abs(index.ranks(QUERIES[1], kept[[1000]], keep=keep)[0] - 1001) <= 5


def test_of_equal_rows_the_lower_comes_first(tmp_path):
    index = open_index(saved(tmp_path, np.repeat(X[:40], 50, axis=0)), "image", tmp_path, "ivf")
    assert index.search(X[2], 10).rows.tolist() == list(range(100, 110))


@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_a_small_store_can_be_searched_in_all_its_cells(tmp_path, n):
    x = X[:n].copy()
    x[n // 2] = 0
    index = open_index(saved(tmp_path, x), "image", tmp_path, "ivf")
    assert index.search(QUERIES[0], 200).rows.tolist() == oracle.nearest(x, QUERIES[0], n)[0].tolist()
    assert index.describe()["recall"] == 1 or n == 100


def test_the_file_is_the_one_that_faiss_writes(index, tmp_path):
    empty = faiss.clone_index(faiss.read_index(str(index.path)))
    empty.reset()
    unit = (X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-30)).astype(np.float32)
    empty.add(unit)
    faiss.write_index(empty, str(tmp_path / "theirs.faiss"))
    assert index.path.read_bytes() == (tmp_path / "theirs.faiss").read_bytes()


def test_the_file_does_not_depend_on_the_size_of_blocks(index, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(cells, "BUILD_ROWS", 333)
    again = open_index(rows, "image", tmp_path, "ivf")
    assert again.path.read_bytes() == index.path.read_bytes() and again.facts.recall == index.facts.recall


def test_the_error_bounds_every_row(index):
    unit = (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32)
    decoded = index._faiss.sa_decode(index._faiss.sa_encode(unit))
    assert 0.5 * index.error < np.linalg.norm(decoded - unit, axis=1).max() <= index.error < 0.05


def test_queries_of_another_modality_choose_their_own_number_of_cells(tmp_path):
    random = np.random.default_rng(3)
    texts = 0.3 * X + 2 * random.normal(size=X.shape).astype(np.float32)
    import pyarrow as pa

    ids = pa.table({"id": [str(i) for i in range(len(X))]})
    both = write_store(tmp_path / "both.store", [StorePart({"image": X, "text": texts}, ids)])
    index = open_index(both, "image", tmp_path, "ivf")
    by_text = index.for_queries("text", 0.9)
    assert by_text.probes > index.for_queries("image", 0.9).probes
    assert by_text.describe()["measured_with"] == "text"
    assert mean_recall(by_text, X, texts[:100]) == pytest.approx(by_text.recall, abs=0.08)


# --- Files


def no_recall(file):
    rewrite(file, recall=None)


def other_recall(file):
    rewrite(file, recall={"image": {"probes": [63], "at_least": ["1"], "measured": [1.0]}})


def other_rows(file):
    rewrite(file, fingerprint="another")


def rewrite(file, **changes):
    record = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**record, **changes}))


def foreign(file):
    """An index of other rows where this one was, with a record that fits its length."""
    other = faiss.IndexFlatIP(D)
    other.add(X[:10])
    faiss.write_index(other, str(file))
    rewrite(file, bytes=file.stat().st_size)


HARMS = [truncate, lose_record, break_record, break_header, age_record, no_recall, other_recall, other_rows, foreign]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_index_is_built_again_with_a_line_in_the_log(rows, index, tmp_path, harm, caplog):
    own = open_index(rows, "image", tmp_path, "ivf")
    harm(own.path)
    with caplog.at_level(logging.WARNING):
        found = open_index(rows, "image", tmp_path, "ivf")
    assert found.path.read_bytes() == index.path.read_bytes()
    lines = [record.getMessage() for record in caplog.records if "building the index again" in record.getMessage()]
    assert len(lines) == 1 and "\n" not in lines[0]


def test_an_index_is_built_once_and_lies_beside_the_exact_one(rows, tmp_path):
    first = open_index(rows, "image", tmp_path, "ivf")
    changed = first.path.stat().st_mtime_ns
    assert open_index(rows, "image", tmp_path, "ivf").path.stat().st_mtime_ns == changed
    flat = open_index(rows, "image", tmp_path)
    assert isinstance(flat, NeighbourIndex) and flat.path.parent == first.path.parent != rows.path.parent


def test_memory_and_disk_are_said_before_an_index_is_built(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        open_index(saved(tmp_path, clustered(1234)), "image", tmp_path, "ivf")
    assert "building an index of 1,234 rows in 35 cells: 0 MB of disk" in caplog.text and "of memory" in caplog.text


def test_without_room_nothing_is_begun(rows, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(
        StoreError, match=r"needs 0 MB of disk while it is built, but .* has 0 MB free; make room there"
    ):
        open_index(rows, "image", tmp_path, "ivf")
    assert not list((tmp_path / "index").iterdir())


def test_an_interrupted_build_leaves_nothing_and_a_killed_one_is_cleared_away(rows, index, tmp_path):
    folder = tmp_path / "index"
    code = (
        "import os, sys; from msae.data.store import EmbeddingStore\n"
        "from msae.use.neighbours import cells, open_index\n"
        "cells._BLOCK_BYTES = 1; cells.BUILD_ROWS = 500; look = cells._Nearest.look\n"
        "def dies(self, unit, first):\n"
        "    if first == 2000: exec(sys.argv[3])\n"
        "    look(self, unit, first)\n"
        "cells._Nearest.look = dies\n"
        "from pathlib import Path\n"
        "open_index(EmbeddingStore.open(sys.argv[1]), 'image', Path(sys.argv[2]), 'ivf')"
    )
    for how, left in (("raise KeyboardInterrupt", 0), ("os._exit(9)", 1)):
        done = subprocess.run([sys.executable, "-c", code, str(rows.path), str(tmp_path), how], capture_output=True)
        assert done.returncode != 0
        assert len(list(folder.iterdir())) == left, done.stderr
    assert len(list(next(folder.iterdir()).glob("*.npy"))) == 4
    assert open_index(rows, "image", tmp_path, "ivf").path.read_bytes() == index.path.read_bytes()
    assert sorted(file.suffix for file in folder.iterdir() if file.is_file()) == [".faiss", ".json"]
    assert not list(folder.rglob("*.npy"))


def test_two_processes_do_not_build_at_once(rows, tmp_path):
    name = open_index(rows, "image", tmp_path, "ivf").path
    name.unlink()
    with (
        locked(name.parent / f".{name.name}.building", error=StoreError),
        pytest.raises(StoreError, match=r"in use by another process.*wait for it"),
    ):
        open_index(rows, "image", tmp_path, "ivf")


def test_a_row_that_is_not_finite_stops_the_build(tmp_path):
    x = X.copy()
    x[3000, 5] = np.nan
    with pytest.raises(StoreError, match=r"row 3000 .* holds NaN"):
        open_index(saved(tmp_path, x), "image", tmp_path, "ivf")
    assert not list((tmp_path / "index").iterdir())


# --- Searches


SETS = [{}, {"red": "2xp99", "sky": 0}, {"blue": 0}]


@pytest.mark.parametrize("options", [{"recall": 1.0}, {"where": "place == 'sand'"}])
@pytest.mark.parametrize("edits", SETS)
def test_edits_and_filters_find_what_an_exact_search_finds(run, store, edits, options):  # noqa: F811
    exact = search(run, store, like="row7", set=edits, index="exact", **{**options, "recall": 0.5})
    in_cells = search(run, store, like="row7", set=edits, index="ivf", **options)
    assert exact.index == {"kind": "exact"} and in_cells.index["kind"] == "ivf"
    assert in_cells.index["probes"] == in_cells.index["cells"] and in_cells.index["recall"] == 1
    for mine, theirs in ((in_cells.hits, exact.hits), (in_cells.before, exact.before)):
        assert [hit.id for hit in mine] == [hit.id for hit in theirs]
        np.testing.assert_allclose([h.score for h in mine], [h.score for h in theirs], atol=1e-6)
        # beyond the answer ranks are counted in 8 bits
        assert all(abs(a.rank_before - b.rank_before) <= 25 for a, b in zip(mine, theirs, strict=True))
    assert len(in_cells.hits) == 20 and "approximate" not in in_cells.to_text()


def test_a_search_in_cells_says_so(run, store):  # noqa: F811
    found = search(run, store, like="row7", index="ivf", recall=0.6)
    used = found.to_json()["index"]
    assert used["probes"] < used["cells"] == 34 and 0.6 <= used["recall"] <= 1 and used["measured_with"] == "image"
    assert f"approximate: {used['probes']} of 34 cells were searched, which finds" in found.to_text()
    assert "(measured with image rows)" in found.to_text()


def test_auto_goes_by_the_number_of_rows(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("msae.use.neighbours.MANY_ROWS", 4000)
    assert open_index(rows, "image", tmp_path).describe()["kind"] == "ivf"
    monkeypatch.setattr("msae.use.neighbours.MANY_ROWS", 4001)
    assert open_index(rows, "image", tmp_path).describe() == {"kind": "exact"}


@pytest.mark.parametrize("recall", [0, -1, 1.5])
def test_a_recall_that_is_no_share_is_refused(run, store, recall):  # noqa: F811
    with pytest.raises(ConfigError, match="give --recall above 0 and at most 1"):
        search(run, store, like="row7", index="ivf", recall=recall)


def test_without_faiss_cells_are_refused(run, store, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match="faiss-cpu is not installed"):
        search(run, store, like="row7", index="ivf")
