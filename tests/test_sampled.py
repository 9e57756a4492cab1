"""`--max-rows`: a seeded sample of a store is read as a store of those rows, keeps their ids, and says what it is."""

import json

import numpy as np
import pyarrow as pa
import pytest

import msae
from msae.base.errors import ConfigError, StoreError
from msae.cli import main
from msae.concepts.gallery import all_magnitudes
from msae.concepts.names import names_of
from msae.concepts.naming import name
from msae.concepts.tree import concept_tree
from msae.data.sampled import SampledStore, sample_rows, whole
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from msae.sae.view import View
from tests.test_retrieval import run as named_run  # noqa: F401
from tests.test_retrieval import store as named_store  # noqa: F401

N, D = 1000, 8
X = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
COLOURS = np.where(X[:, 0] > 0.5, "red", "blue")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    columns = {"id": [f"row{i}" for i in range(N)], "colour": COLOURS.tolist(), "number": list(range(N))}
    parts = [StorePart({"image": X}, pa.table(columns))]
    return write_store(tmp_path_factory.mktemp("store") / "x.store", parts, shard_rows=300)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    import torch

    torch.manual_seed(0)
    sae = SAE(SAEConfig(D, 16, levels=(4, 16)), Standardizer({"image": fit_statistics(lambda: [torch.from_numpy(X)])}))
    folder = tmp_path_factory.mktemp("run") / "run"
    sae.save(folder)
    return folder


def test_a_sample_has_the_rows_ids_and_columns_of_its_store(store):
    drawn = sample_rows(store, 100)
    rows = np.sort(np.random.default_rng(0).choice(N, 100, replace=False))
    assert len(drawn) == 100 and drawn.chosen.tolist() == rows.tolist()
    np.testing.assert_array_equal(drawn.take(np.array([99, 0, 7]), "image"), X[rows[[99, 0, 7]]])
    np.testing.assert_array_equal(np.concatenate(list(drawn.batches("image", 33))), X[rows])
    assert list(drawn.ids) == [f"row{row}" for row in rows] and drawn.ids.row_of(f"row{rows[5]}") == 5
    assert drawn.labels("colour") == COLOURS[rows].tolist() and drawn.column("number") == rows.tolist()
    assert drawn.metadata.num_rows == 100
    assert [row.row for row in drawn.describe_rows([3, 50])] == rows[[3, 50]].tolist()
    assert whole(drawn) is store and drawn.note == "a random sample of 100 of 1,000 rows (seed 0)"


def test_a_sample_of_a_sample_is_a_sample_of_the_store(store):
    half = sample_rows(store, 500)
    few = sample_rows(half, 20)
    numbers = few.column("number")
    assert len(few) == 20 and set(numbers) <= set(half.column("number")) and whole(few) is store
    np.testing.assert_array_equal(few.take(np.arange(20), "image"), X[numbers])
    assert [row.row for row in few.describe_rows(range(20))] == numbers
    assert len({few.fingerprint, half.fingerprint, sample_rows(store, 20).fingerprint}) == 3


def test_an_id_that_only_the_whole_store_has_is_said_to_be_so(store):
    drawn = sample_rows(store, 100)
    left_out = next(f"row{i}" for i in range(N) if i not in drawn.chosen)
    with pytest.raises(StoreError, match=r"a random sample of 100 .* a larger --max-rows reads more, has no row"):
        drawn.ids.row_of(left_out)


def test_more_rows_than_usual_may_be_asked_of_the_hierarchy(run, store, monkeypatch):
    monkeypatch.setattr("msae.concepts.tree.HIERARCHY_ROWS", 50)
    assert concept_tree(run, store).hierarchy.n_rows == 50
    assert concept_tree(run, store, max_rows=200).hierarchy.n_rows == 200


def test_rows_without_ids_keep_their_numbers(tmp_path):
    np.save(tmp_path / "image.npy", X)
    drawn = sample_rows(EmbeddingStore.open(tmp_path / "image.npy"), 10, seed=3)
    assert list(drawn.ids) == [str(row) for row in drawn.chosen]
    assert [row.id for row in drawn.describe_rows(range(10))] == list(drawn.ids)


def test_a_table_beside_the_rows_is_sampled_with_them(tmp_path):
    np.save(tmp_path / "image.npy", X)
    lines = "\n".join(f"row{i},{colour}" for i, colour in enumerate(COLOURS))
    (tmp_path / "image.csv").write_text("id,colour\n" + lines)
    drawn = sample_rows(EmbeddingStore.open(tmp_path / "image.npy"), 50)
    assert drawn.labels("colour") == COLOURS[drawn.chosen].tolist()


def test_a_store_that_is_small_enough_is_no_sample(store):
    assert sample_rows(store, 1000) is store and sample_rows(store, None) is store


def test_the_seed_chooses_the_sample_and_what_is_derived_tells_them_apart(store):
    a, same, other = (sample_rows(store, 100, seed=seed) for seed in (0, 0, 1))
    assert a.fingerprint == same.fingerprint and (a.chosen == same.chosen).all()
    assert len({store.fingerprint, a.fingerprint, other.fingerprint, sample_rows(store, 99).fingerprint}) == 4


@pytest.mark.parametrize("n", [0, -5])
def test_no_rows_are_refused(store, run, n):
    with pytest.raises(ConfigError, match=f"max_rows is {n}; give --max-rows at least 1"):
        msae.evaluate(run, store, max_rows=n)


def test_a_row_that_is_not_finite_is_named_as_in_the_store(tmp_path):
    x = X.copy()
    x[:] = np.nan
    np.save(tmp_path / "image.npy", x)
    drawn = sample_rows(EmbeddingStore.open(tmp_path / "image.npy"), 10)
    with pytest.raises(StoreError, match=f"row {drawn.chosen[0]} \\(id '{drawn.chosen[0]}'\\)"):
        next(drawn.batches("image", 4))


def sampled_file(store, rows, folder):
    """The rows of a sample as a store of their own."""
    columns = {"id": [f"row{i}" for i in rows], "colour": COLOURS[rows].tolist(), "number": rows.tolist()}
    return write_store(folder / "own.store", [StorePart({"image": X[rows]}, pa.table(columns))])


def test_evaluate_gives_what_a_store_of_these_rows_gives(store, run, tmp_path):
    rows = sample_rows(store, 200, seed=5).chosen
    own = sampled_file(store, rows, tmp_path)
    options = {"labels": "colour", "recovery": True, "seed": 5}
    wanted = msae.evaluate(run, own, probe_train=own, **options).to_json()
    found = msae.evaluate(run, store, probe_train=store, max_rows=200, **options).to_json()
    assert "x.store: a random sample of 200 of 1,000 rows (seed 5)" in found["notes"] and found["n"] == 200
    for key in ("fvu", "cosine", "dead", "cknna", "class_f1", "probe_accuracy", "recovery"):
        assert found[key] == wanted[key], key


def test_a_gallery_shows_rows_by_their_own_numbers(store, run, tmp_path):
    drawn = sample_rows(store, 200)
    found = msae.gallery(run, store, latent=3, n=5, max_rows=200)
    z = View(run, store).table(drawn.chosen, [3])[:, 0]
    best = drawn.chosen[np.argsort(-z, kind="stable")[:5]]
    assert [sample.row for sample in found.images] == best.tolist()
    assert [sample.id for sample in found.images] == [f"row{row}" for row in best]
    assert found.notes[0] == drawn.note.join(["x.store: ", ""]) and found.notes[0] in found.to_text()
    assert msae.gallery(run, store, latent=3, n=5).to_json() != found.to_json()  # kept samples are not mixed up


def test_trees_and_magnitudes_say_that_they_are_of_a_sample(store, run):
    note = "x.store: a random sample of 200 of 1,000 rows (seed 0)"
    for found in (concept_tree(run, store, max_rows=200), all_magnitudes(run, store, max_rows=200)):
        assert found.to_json()["notes"] == [note] and note in found.to_text()
    assert concept_tree(run, store, max_rows=200).hierarchy.n_rows == 200


def test_an_audit_of_a_sample_says_so(store, run):
    found = msae.audit(run, store, "colour", all_latents=True, max_rows=300, n_permutations=100)
    assert found.notes[0] == "x.store: a random sample of 300 of 1,000 rows (seed 0)"
    assert found.notes[0] in found.to_text() and found.notes[0] in found.to_json()["notes"]
    assert found.n + found.n_left_out <= 300
    assert set(found.sample.rows.tolist()) <= set(sample_rows(store, 300).chosen.tolist())
    assert max(found.sample.rows) > 300


def test_find_and_compare_draw_from_the_rows_that_they_need(store, run):
    found = msae.find(run, store, "colour", max_rows=200)
    assert (found.n_rows, found.of_rows) == (200, 1000) and found.to_json()["of_rows"] == 1000
    assert "a random sample of 1,000 rows; --max-rows reads more" in found.to_text()
    assert msae.find(run, store, "colour").n_rows == 1000
    sides = (f"{store.path}:colour=red", f"{store.path}:colour=blue")
    compared = msae.compare(run, *sides, max_rows=200)
    assert (compared.n_a, compared.n_b) == (100, 100)
    assert compared.left_out == {"beyond the number that is read": 800}


def test_names_tested_on_a_sample_are_those_of_the_store(named_run, named_store, tmp_path):  # noqa: F811
    texts = named_store.take(np.arange(40), "text")
    words = pa.table({"word": [f"word{i}" for i in range(40)]})
    vocabulary = write_store(tmp_path / "words.store", [StorePart({"text": texts}, words)])
    found = name(named_run, vocabulary, on=named_store, max_rows=300, out=tmp_path / "names.json")
    assert found.record["on_rows"] == 300 and found.record["on_fingerprint"] == named_store.fingerprint
    assert all(one.rows is None or one.rows.fingerprint == named_store.fingerprint for one in found)


def test_names_hold_on_a_sample_of_the_rows_that_tested_them(named_run, named_store):  # noqa: F811
    names = names_of(named_run, named_store)
    drawn = names_of(named_run, sample_rows(named_store, 100))
    assert drawn.record == names.record and list(drawn) == list(names)


def test_an_audit_samples_its_training_store_too(store, run, tmp_path):
    theirs = write_store(
        tmp_path / "y.store", [StorePart({"image": X[::-1].copy()}, pa.table({"colour": COLOURS[::-1].tolist()}))]
    )
    found = msae.audit(run, store, "colour", all_latents=True, train_store=theirs, max_rows=300, n_permutations=100)
    assert "y.store: a random sample of 300 of 1,000 rows (seed 0)" in found.notes


def test_coded_labels_are_the_labels(tmp_path):
    values = {"text": ["a", " ", None, "b", "a", "nan"], "number": [1.0, None, float("nan"), 2.5, 1.0, 3.0]}
    np.save(tmp_path / "image.npy", X[:6])
    import pyarrow.parquet as pq

    pq.write_table(pa.table(values), tmp_path / "image.parquet")
    opened = EmbeddingStore.open(tmp_path / "image.npy")
    for column in ("text", "number", "id"):
        numbers, classes = opened.coded_labels(column)
        assert [None if i < 0 else classes[i] for i in numbers] == opened.labels(column)
    with pytest.raises(StoreError, match="has no column 'colour'"):
        opened.coded_labels("colour")


def test_the_command_takes_the_option(store, run, capsys):
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(run), "--on", str(store.path), "--max-rows", "150", "--json", "-"])
    assert not left.value.code
    assert json.loads(capsys.readouterr().out)[0]["n"] == 150


def test_a_sample_is_shown_as_one(store):
    drawn = sample_rows(store, 10)
    assert isinstance(drawn, SampledStore) and repr(drawn).startswith("SampledStore(a random sample of 10 of 1,000")
