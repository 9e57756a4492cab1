"""What an evaluation leaves in the run folder: the record, once for each subject, whole or not at all."""

import json

import pytest
import torch

from msae.base.errors import RunError
from msae.measure.evaluate import evaluate, kept_evaluations
from msae.sae.model import SAE
from tests.test_evaluation import make_sae, save_run, world  # noqa: F401  # a fixture


def test_a_record_is_kept_as_it_was_returned(world):  # noqa: F811
    train, holdout, run = world
    found = evaluate(run, holdout, recovery=True, labels="label", probe_train=train)
    (kept,) = kept_evaluations(run)
    assert kept.evaluation == found and kept.labels == "label"
    data = json.loads(next((run / "eval").iterdir()).read_text())
    assert {key: data[key] for key in found.to_dict()} == found.to_dict()


def test_each_store_modality_and_inference_has_a_file_of_its_own(world):  # noqa: F811
    train, holdout, run = world
    for _ in range(2):
        evaluate(run, holdout)
        evaluate(run, holdout, inference="trained")
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
    for text in ("{", json.dumps({**json.loads(whole), "recovery": [3]}), json.dumps({"schema_version": 1})):
        file.write_text(text)
        with pytest.raises(RunError, match=file.name):
            kept_evaluations(run)
        evaluate(run, holdout)
        assert file.read_text() == whole


def test_figures_are_worth_more_than_their_file(world):  # noqa: F811
    _, holdout, run = world
    (run / "eval").write_text("a file where a folder should be")
    assert "not kept in" in evaluate(run, holdout).notes[-1]


def test_an_sae_without_a_folder_leaves_nothing(world):  # noqa: F811
    _, holdout, run = world
    evaluate(SAE.load(run), holdout)
    assert not (run / "eval").exists() and kept_evaluations(run) == []
