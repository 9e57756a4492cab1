"""Laws of `hold_out`: no embedding trains a classifier and is evaluated with it, whatever its id and file."""

import numpy as np
import pytest

from msae.base.errors import StoreError
from msae.data.store import EmbeddingStore
from msae.measure.evaluate import evaluate
from msae.measure.probe import hold_out
from msae.use.audit import audit
from msae.use.audit.subjects import refused_columns, target_columns
from tests.test_evaluation import make_sae, save_run

N, D_IN = 400, 12


def write(path, x, labels=None, ids=None):
    np.save(path, x)
    lines = ["id,label"] + [
        f"{f'r{i}' if ids is None else ids[i]},{'' if labels is None else labels[i]}" for i in range(len(x))
    ]
    path.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    return EmbeddingStore.open(path)


def noise(n=N, seed=0, d=D_IN):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def random_labels(n=N, seed=1, n_classes=2):
    return [f"class {k}" for k in np.random.default_rng(seed).integers(n_classes, size=n)]


def held(train, on, seed=0):
    return hold_out(train, on, "image", train_rows=np.arange(len(train)), on_rows=np.arange(len(on)), seed=seed)


def test_stores_without_a_common_row_stay_whole(tmp_path):
    train, on = write(tmp_path / "a.npy", noise(seed=0)), write(tmp_path / "b.npy", noise(90, seed=2))
    found = held(train, on)
    assert found.train.tolist() == list(range(N)) and found.on.tolist() == list(range(90)) and found.note is None


def test_a_store_with_itself_is_cut_into_two_halves_by_the_seed(tmp_path):
    store = write(tmp_path / "a.npy", noise())
    found, again, other = held(store, store), held(store, store), held(store, store, seed=1)
    assert sorted([*found.train, *found.on]) == list(range(N)) and len(found.train) == N // 2
    assert np.array_equal(found.train, again.train) and not np.array_equal(found.train, other.train)
    assert "400 of the 400 rows" in found.note and "200 and 200 rows" in found.note and "\n" not in found.note


def test_rows_are_the_same_by_their_embedding_and_not_by_their_id_order_or_precision(tmp_path):
    x = noise()
    train = write(tmp_path / "a.npy", x)
    subset = np.random.default_rng(5).permutation(N)[:100]
    on = write(tmp_path / "b.npy", np.concatenate([x[subset], noise(20, seed=9)]).astype(np.float16), ids=range(120))
    found = held(train, on)
    assert (len(found.train), len(found.on)) == (N - 50, 20 + 50)
    assert not {*found.train.tolist()} & {*subset[found.on[found.on < 100]].tolist()}


def test_same_ids_of_other_rows_are_no_common_rows(tmp_path):
    train, on = write(tmp_path / "a.npy", noise(seed=0)), write(tmp_path / "b.npy", noise(seed=3))
    assert list(train.ids) == list(on.ids) and held(train, on).note is None


def test_copies_of_one_row_stay_on_one_side(tmp_path):
    store = write(tmp_path / "a.npy", np.repeat(noise(20), 5, axis=0))
    found = held(store, store)
    assert len(found.train) == len(found.on) == 50
    assert not {*(found.train // 5).tolist()} & {*(found.on // 5).tolist()}


@pytest.fixture
def random_world(tmp_path):
    """Vectors and labels without any relation, and a run that was trained on them."""
    store = write(tmp_path / "noise.npy", noise(d=64), random_labels())
    sae = make_sae(store.path, d_in=64, d_sae=80, levels=(4, 80))
    return store, save_run(tmp_path / "run", sae, store.path)


def test_random_labels_are_guessed_by_chance_on_the_runs_own_training_store(random_world):
    store, run = random_world
    found = evaluate(run, store, labels="label")
    # 200 rows of two classes at random: a standard error of .035. On the same rows the accuracy would be above .7.
    assert abs(found.probe_accuracy - 0.5) < 4 * 0.035
    assert (found.n, found.probe_n, found.probe_left_out) == (N, N // 2, N // 2)
    assert len([note for note in found.notes if "400 of the 400 rows" in note]) == 1


def test_random_labels_are_guessed_by_chance_where_a_copy_is_the_probe_store(random_world, tmp_path):
    store, run = random_world
    copy = write(tmp_path / "copy.npy", np.load(store.path), random_labels(), ids=range(N))
    found = evaluate(run, store, labels="label", probe_train=copy)
    assert found.probe_n == N // 2 and abs(found.probe_accuracy - 0.5) < 4 * 0.035


def test_an_audit_with_its_own_store_as_train_store_audits_the_half_that_it_would_without(random_world):
    store, run = random_world
    own = audit(run, store, "label", train_store=store, all_latents=True, n_permutations=20)
    half = audit(run, store, "label", all_latents=True, n_permutations=20)
    assert own.n == half.n == N // 2
    assert own.classifier["accuracy"] == half.classifier["accuracy"]
    assert abs(own.classifier["accuracy"] - 0.5) < 4 * 0.035
    assert [note for note in own.notes if "400 of the 400 rows" in note] and "200 rows" in own.to_text()


def test_rows_without_a_label_are_no_class_and_are_counted(tmp_path):
    rng = np.random.default_rng(0)
    classes = rng.integers(3, size=600)
    x = (4 * np.eye(3, D_IN)[classes] + rng.normal(size=(600, D_IN)) * 0.1).astype(np.float32)
    missing = rng.random(600) < 0.4
    blanks = ["", "NaN", "  ", "nan"]
    labels = [blanks[i % 4] if missing[i] else f"class {k}" for i, k in enumerate(classes)]
    store = write(tmp_path / "x.npy", x, labels)
    sae = make_sae(store.path)
    found = evaluate(sae, store, labels="label", probe_train=store)
    n_missing = int(missing.sum())
    assert found.probe_classes == 3 and found.probe_n == pytest.approx((600 - n_missing) / 2, abs=1)
    assert found.probe_n + found.probe_left_out == 600
    assert found.probe_accuracy == 1.0
    assert f"{n_missing} of 600 rows of {store.path} have no label and are left out" in found.notes
    result = audit(sae, store, "label", all_latents=True, n_permutations=20)
    assert result.n_left_out == n_missing and result.classes == ("class 0", "class 1", "class 2")


def test_codes_that_look_like_numbers_are_classes_as_they_are_written(tmp_path):
    codes = ["001", "1", "1E5", "100000"]
    classes = np.random.default_rng(0).integers(4, size=N)
    x = (4 * np.eye(4, D_IN)[classes] + 0.1 * noise()).astype(np.float32)
    store = write(tmp_path / "codes.npy", x, [codes[k] for k in classes])
    assert set(store.labels("label")) == set(codes)
    sae = make_sae(store.path)
    found = evaluate(sae, store, labels="label", probe_train=store)
    assert (found.probe_classes, found.probe_accuracy) == (4, 1.0)
    assert audit(sae, store, "label", all_latents=True, n_permutations=20).classes == tuple(sorted(codes))


def test_a_training_store_of_another_width_is_one_line(random_world, tmp_path):
    store, run = random_world
    narrow = write(tmp_path / "narrow.npy", noise(d=7), random_labels())
    for call in (
        lambda: evaluate(run, store, train_store=narrow),
        lambda: evaluate(run, store, labels="label", probe_train=narrow),
        lambda: audit(run, store, "label", train_store=narrow, all_latents=True),
    ):
        with pytest.raises(StoreError, match=r"holds 7-dim embeddings, but .*run reads 64-dim ones") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_each_column_can_be_audited_or_has_a_reason(tmp_path):
    np.save(tmp_path / "x.npy", noise(60))
    rows = [f"r{i},{i % 3},same,{i},{'' if i else ' '}" for i in range(60)]
    (tmp_path / "x.csv").write_text("id,label,constant,number,empty\n" + "\n".join(rows) + "\n")
    store = EmbeddingStore.open(tmp_path / "x.npy")
    assert target_columns(store) == {"label": 3}
    assert refused_columns(store) == {
        "id": "names or describes single rows",
        "constant": "has the same value in every row",
        "number": "has 60 different values; an audit takes at most 50",
        "empty": "has no labels",
    }
