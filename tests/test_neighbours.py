import json
import logging

import numpy as np
import pytest

from msae.base.errors import ConfigError
from msae.data.store import as_store
from msae.use import neighbours
from msae.use.neighbours import NeighbourIndex
from msae.use.neighbours import open_index as open_store_index
from tests.oracles import neighbours as oracle

faiss = pytest.importorskip("faiss")
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(3000, 24)).astype(np.float32)
QUERIES = RANDOM.normal(size=(5, 24)).astype(np.float32)


def open_index(place, x=X, fingerprint="one", **changes):
    given = {
        "fingerprint": fingerprint,
        "n_rows": len(x),
        "d_in": x.shape[1],
        "rows": lambda rows: x[rows],
        "batches": lambda: iter(np.array_split(x, 7)),
    }
    return NeighbourIndex.open(place, "image", **{**given, **changes})


def unbuildable():
    raise AssertionError("the index should not be built again")


@pytest.mark.parametrize("n", [1, 20, 3000, 4000])
def test_search_is_brute_force(tmp_path, n):
    index = open_index(tmp_path)
    for query in QUERIES:
        rows, scores = oracle.nearest(X, query, n)
        found = index.search(query, n)
        assert found.rows.tolist() == rows.tolist()
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)  # float32 sums of 24 terms of at most one


def test_rows_that_float16_cannot_tell_apart_are_still_ordered_exactly(tmp_path):
    near = X[:1] + 1e-5 * RANDOM.normal(size=(500, 24)).astype(np.float32)
    x = np.concatenate([X, near])
    rows, _ = oracle.nearest(x.astype(np.float64), X[0], 200)
    found = open_index(tmp_path, x).search(X[0], 200)
    exact = oracle.cosines(x, X[0])
    # Among 500 rows at cosine 1 - 1e-10 even float32 has ties: what is found must be as near as what is wanted.
    np.testing.assert_allclose(exact[found.rows], exact[rows], atol=2e-7)
    assert (found.rows >= 3000).sum() + (found.rows == 0).sum() == 200


def test_of_equal_rows_the_lower_comes_first(tmp_path):
    x = np.repeat(X[:4], 50, axis=0)
    assert open_index(tmp_path, x).search(X[2], 10).rows.tolist() == list(range(100, 110))


@pytest.mark.parametrize("share", [0.5, 0.003, 0.0])
def test_only_kept_rows_are_found(tmp_path, share):
    keep = RANDOM.random(len(X)) < share
    rows, _ = oracle.nearest(X, QUERIES[0], 20, keep)
    assert open_index(tmp_path).search(QUERIES[0], 20, keep=keep).rows.tolist() == rows.tolist()


def test_scale_of_rows_and_query_does_not_matter(tmp_path):
    scaled = X * RANDOM.uniform(0.01, 100, size=(len(X), 1)).astype(np.float32)
    a, b = open_index(tmp_path / "a"), open_index(tmp_path / "b", scaled)
    assert a.search(QUERIES[0], 20).rows.tolist() == b.search(30 * QUERIES[0], 20).rows.tolist()


def test_a_row_of_zeros_is_found_last_or_at_cosine_zero(tmp_path):
    x = np.concatenate([np.zeros((1, 24), np.float32), X])
    found = open_index(tmp_path, x).search(QUERIES[0], len(x))
    assert found.scores[found.rows == 0] == 0 and np.isfinite(found.scores).all()


def test_ranks_count_the_rows_before(tmp_path):
    index = open_index(tmp_path)
    _, scores = oracle.nearest(X, QUERIES[1], len(X))
    places = np.array([0, 3, 50, 2999])
    # Rows nearer than the error of float16 may swap places.
    assert np.abs(index.ranks(QUERIES[1], scores[places].astype(np.float32)) - (places + 1)).max() <= 2
    keep = np.arange(len(X)) % 2 == 0
    kept = oracle.nearest(X, QUERIES[1], len(X), keep)[1]
    assert abs(index.ranks(QUERIES[1], kept[[100]].astype(np.float32), keep=keep)[0] - 101) <= 2


def test_the_file_is_the_one_that_faiss_writes(tmp_path):
    index = open_index(tmp_path)
    own = faiss.IndexScalarQuantizer(24, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    own.add(X / np.linalg.norm(X, axis=1, keepdims=True))
    ours, theirs = index.path.read_bytes(), faiss.serialize_index(own).tobytes()
    n_header = len(theirs) - X.size * 2
    assert ours[:n_header] == theirs[:n_header] and len(ours) == len(theirs)
    # numpy rounds halves to even, faiss upwards: the last of the 11 bits may differ.
    a, b = (np.frombuffer(file[n_header:], np.float16).astype(np.float32) for file in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=2**-10, atol=2**-24)
    assert not list(tmp_path.glob(".*"))


def test_an_index_is_built_once(tmp_path):
    open_index(tmp_path)
    again = open_index(tmp_path, batches=unbuildable)
    assert again.search(QUERIES[0], 3).rows.tolist() == oracle.nearest(X, QUERIES[0], 3)[0].tolist()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def lose_record(file):
    file.with_suffix(".json").unlink()


def break_record(file):
    file.with_suffix(".json").write_text("{")


def break_header(file):
    file.write_bytes(b"XXXX" + file.read_bytes()[4:])


def age_record(file):
    record = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**record, "schema_version": 0}))


@pytest.mark.parametrize("harm", [truncate, lose_record, break_record, break_header, age_record])
def test_a_damaged_index_is_built_again_with_a_line_in_the_log(tmp_path, harm, caplog):
    harm(open_index(tmp_path).path)
    with caplog.at_level(logging.WARNING):
        found = open_index(tmp_path).search(QUERIES[0], 20)
    assert found.rows.tolist() == oracle.nearest(X, QUERIES[0], 20)[0].tolist()
    assert len(caplog.records) == 1 and "building the index again" in caplog.text


def test_an_index_of_other_rows_is_built_again(tmp_path, caplog):
    open_index(tmp_path)
    found = open_index(tmp_path, -X, fingerprint="two").search(QUERIES[0], 5)
    assert found.rows.tolist() == oracle.nearest(-X, QUERIES[0], 5)[0].tolist()
    assert "built from other rows" in caplog.text


def test_a_row_that_was_overwritten_is_found(tmp_path):
    x = np.random.default_rng(5).normal(size=(3000, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    wanted = np.eye(8, dtype=np.float32)[0]
    before = open_store_index(as_store(tmp_path / "x.npy"), "image", tmp_path).search(wanted, 1)
    x[1230] = 3 * wanted
    np.save(tmp_path / "x.npy", x)
    found = open_store_index(as_store(tmp_path / "x.npy"), "image", tmp_path).search(wanted, 1)
    assert before.rows.tolist() != [1230]
    assert found.rows.tolist() == [1230] and found.scores[0] == pytest.approx(1)


def test_where_nothing_can_be_written_the_users_cache_is_used(tmp_path, monkeypatch):
    place = tmp_path / "file" / "index"
    place.parent.write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = open_index(place)
    assert (tmp_path / "cache") in index.path.parents
    assert open_index(place, batches=unbuildable).path == index.path


def test_without_a_run_folder_the_index_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "x.npy", X if folder == "a" else -X)
    a, b = (open_store_index(as_store(tmp_path / folder / "x.npy"), "image") for folder in ("a", "b"))
    assert a.path != b.path and a.path.parent == b.path.parent == tmp_path / "cache" / "msae" / "index"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.npy"]


def test_a_build_that_is_killed_leaves_no_index(tmp_path):
    def dies():
        yield X[:100]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_index(tmp_path, batches=dies)
    assert not list(tmp_path.iterdir())


def test_rows_are_never_held_all_at_once(tmp_path):
    """However many candidates are scored, at most a block of raw rows is read."""
    x = np.repeat(X[:1], 3 * neighbours.BLOCK, axis=0)
    sizes = []
    index = open_index(tmp_path, x, rows=lambda rows: sizes.append(len(rows)) or x[rows])
    index.search(X[0], 5)
    assert max(sizes) == neighbours.BLOCK


def test_an_unknown_kind_of_index_is_one_line(tmp_path):
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(ConfigError, match="index 'hnsw' is unknown; give auto, exact or ivf"):
        open_store_index(as_store(tmp_path / "x.npy", "image"), "image", kind="hnsw")
