"""What an evaluation leaves in the run folder: the record, once for each subject, whole or not at all."""

import csv
import json

import numpy as np
import pytest
import torch

from msae.base.errors import RunError
from msae.measure.evaluate import current_evaluations, evaluate, kept_evaluations
from msae.sae.model import SAE
from tests.test_evaluation import make_sae, save_run, world, write_store  # noqa: F401  # a fixture


def test_a_record_is_kept_as_it_was_returned(world):  # noqa: F811
    train, holdout, run = world
    found = evaluate(run, holdout, recovery=True, labels="label", probe_train=train)
    (kept,) = kept_evaluations(run)
    assert kept.evaluation == found and kept.labels == "label"
    data = json.loads(next((run / "eval").iterdir()).read_text())
    assert {key: data[key] for key in found.to_json()} == found.to_json()


def test_each_store_modality_and_inference_has_a_file_of_its_own(world):  # noqa: F811
    train, holdout, run = world
    for _ in range(2):
        evaluate(run, holdout)
        evaluate(run, holdout, inference="relu")
        evaluate(run, holdout, inference="topk", k=3)
        evaluate(run, holdout, inference="topk", k=4)
        evaluate(run, train)
    kept = kept_evaluations(run)
    assert len(kept) == len({one.subject for one in kept}) == 5


def test_figures_that_are_not_asked_for_again_stay(world):  # noqa: F811
    train, holdout, run = world
    first = evaluate(run, holdout, labels="label", probe_train=train)
    again = evaluate(run, holdout, recovery=True)
    assert again.probe_kl is None  # what is returned is what was asked for
    kept = kept_evaluations(run)[0]
    assert kept.evaluation.probe_kl == first.probe_kl and kept.evaluation.recovery == again.recovery
    assert kept.labels == "label"


def test_figures_of_other_weights_do_not_stay(world):  # noqa: F811
    train, holdout, run = world
    evaluate(run, holdout, recovery=True)
    other = make_sae(train)
    torch.nn.init.ones_(other.b_dec)
    save_run(run, other, train)
    evaluate(run, holdout)
    assert kept_evaluations(run)[0].evaluation.recovery is None


def test_the_same_figures_leave_the_file_alone(world):  # noqa: F811
    _, holdout, run = world
    times = []
    for _ in range(2):
        evaluate(run, holdout)
        times.append(next((run / "eval").iterdir()).stat().st_mtime_ns)
    assert times[0] == times[1]


def test_a_damaged_record_is_one_line_and_is_made_again(world):  # noqa: F811
    _, holdout, run = world
    evaluate(run, holdout)
    (file,) = (run / "eval").iterdir()
    whole = file.read_text()
    for text in ("{", json.dumps({**json.loads(whole), "recovery": [3]}), json.dumps({"schema_version": 2})):
        file.write_text(text)
        with pytest.raises(RunError, match=file.name):
            kept_evaluations(run)
        evaluate(run, holdout)
        assert file.read_text() == whole


def test_a_run_that_cannot_be_written_has_its_records_in_the_users_cache(world, tmp_path, monkeypatch):  # noqa: F811
    _, holdout, run = world
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (run / "eval").write_text("a file where a folder should be")
    found = evaluate(run, holdout)
    assert [kept.evaluation for kept in current_evaluations(run)] == [found]
    assert len(list((tmp_path / "cache").rglob("*-image-trained.json"))) == 1


def test_figures_are_worth_more_than_their_file(world, tmp_path, monkeypatch):  # noqa: F811
    _, holdout, run = world
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (run / "eval").write_text("a file where a folder should be")
    assert "not kept in" in evaluate(run, holdout).notes[-1]


def relabel(store, column="label", **more):
    """Shift every class of the store by one; `more` are columns to add."""
    table = store.with_suffix(".csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    for row in rows:
        row[column] = f"class {(int(row[column].split()[1]) + 1) % 3}"
        row |= more
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("changed", ["holdout", "train"])
def test_figures_of_a_probe_do_not_outlive_the_labels(world, changed):  # noqa: F811
    train, holdout, run = world
    first = evaluate(run, holdout, labels="label", probe_train=train)
    assert current_evaluations(run)[0].evaluation == first
    relabel({"holdout": holdout, "train": train}[changed])
    (kept,) = current_evaluations(run)
    assert kept.labels is None and kept.evaluation.probe_kl is None and kept.evaluation.fvu == first.fvu
    evaluate(run, holdout)  # nor are they written again
    assert kept_evaluations(run)[0].evaluation.probe_kl is None


def test_an_evaluation_does_not_outlive_one_row(world):  # noqa: F811
    _, holdout, run = world
    evaluate(run, holdout)
    x = np.load(holdout)
    x[41] += 1
    np.save(holdout, x)
    assert len(kept_evaluations(run)) == 1 and current_evaluations(run) == []
    evaluate(run, holdout)
    assert len(current_evaluations(run)) == 1


def test_probes_of_different_columns_or_training_stores_are_not_compared(world, tmp_path):  # noqa: F811
    train, holdout, _ = world
    for store in (train, holdout):
        relabel(store, other="a")
        table = store.with_suffix(".csv")
        rows = table.read_text().splitlines()
        table.write_text("\n".join([rows[0], *(f"{row[:-1]}{'ab'[i % 2]}" for i, row in enumerate(rows[1:]))]) + "\n")
    second = write_store(tmp_path / "second.npy", n=200, seed=4)
    kept = []
    for number, (labels, probe_train) in enumerate(
        [("label", train), ("label", train), ("other", train), ("label", second), (None, None)]
    ):
        folder = save_run(tmp_path / f"run{number}", make_sae(train), train)
        evaluate(folder, holdout, labels=labels, probe_train=probe_train)
        kept += current_evaluations(folder)
    first, same, other_column, other_store, none = kept
    assert same.subject == first.subject and same.compared_with(first).probe_kl is not None
    assert len({one.subject for one in kept}) == 4
    for one in (other_column, other_store, none):
        assert one.compared_with(first).probe_kl is None and first.compared_with(one).probe_kl is None
        assert one.compared_with(first).fvu == first.evaluation.fvu
    evaluate(tmp_path / "run0", holdout, inference="relu")
    assert [e for e in current_evaluations(tmp_path / "run0") if e.compared_with(same) is not None] == [first]


def test_a_record_of_an_earlier_msae_is_not_believed(world, caplog):  # noqa: F811
    _, holdout, run = world
    evaluate(run, holdout)
    (file,) = (run / "eval").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 1}))
    assert kept_evaluations(run) == [] and "was made by an earlier msae and is ignored" in caplog.text


def test_an_sae_without_a_folder_leaves_nothing(world):  # noqa: F811
    _, holdout, run = world
    evaluate(SAE.load(run), holdout)
    assert not (run / "eval").exists() and kept_evaluations(run) == []
