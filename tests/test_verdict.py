"""Good from bad: what `msae evaluate` and `msae train` say of an SAE, beside one with untrained weights."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import msae
from msae.measure.evaluate import Evaluations, evaluate, kept_evaluations, poster_table, summary, table_rows
from msae.measure.evaluate.record import COLUMNS, POSTER_COLUMNS, headings, judgement, judgements_of, legend
from msae.measure.evaluate.untrained import SAMPLE_ROWS, sample_rows, untrained_like
from msae.sae.model import SAE
from msae.sae.standardize import Standardizer
from msae.sae.view import View
from tests.test_cli import run as command
from tests.test_evaluation import D_SAE, make_sae, record, save_run, write_store

LABELS = {
    "probe_kl": 0.2, "probe_agreement": 0.9, "probe_accuracy": 0.834, "probe_accuracy_reconstructed": 0.79,
    "probe_n": 9, "class_f1": 0.41,
}  # fmt: skip


@pytest.fixture
def world(tmp_path):
    """A training store, a holdout store, and a run trained on the first."""
    train, holdout = write_store(tmp_path / "train.npy", n=200, seed=1), write_store(tmp_path / "holdout.npy", seed=2)
    return train, holdout, save_run(tmp_path / "run", make_sae(train), train)


# --- The table and its legend


@pytest.mark.parametrize("labels", [{}, LABELS])
def test_the_legend_names_exactly_the_columns_printed(labels):
    table = summary([record(run="a", **labels), record(run="b", **labels)])
    head, line = table.splitlines()[2:4]
    starts = [match.start() for match in re.finditer("-+", line)] + [None]
    printed = [head[start:stop].strip() for start, stop in itertools.pairwise(starts)]
    explained = re.findall(r"^([A-Z]?[a-zA-Z]+(?: [a-zA-Z0-9]+)?)  +\S", table.split("\n\n")[2], re.MULTILINE)
    assert printed[0] == "model" and [title.rstrip(" ↑↓") for title in printed[1:]] == explained
    assert ("class F1" in explained) == bool(labels) and {"active", "dead", "FVU", "FVU pooled"} <= set(explained)


def test_every_column_says_what_it_is_in_one_line():
    meanings = legend(column.title for column in COLUMNS)
    assert list(meanings) == [column.title for column in COLUMNS]
    assert all(meaning and "\n" not in meaning for meaning in meanings.values())
    assert "not an accuracy" in meanings["agreement"] and "LP (Acc)" not in meanings


def test_the_glossary_has_the_words_of_the_legend():
    text = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text(encoding="utf-8")
    for column in COLUMNS:
        assert f"| {column.title} {column.arrow} | {column.meaning} |" in text


def test_a_table_fits_120_columns_and_tells_long_names_apart():
    runs = [f"runs/{'a-very-long-name-of-a-run-' * 4}{seed}" for seed in range(3)]
    table = summary([record(run=run, l0=4095.9, d_sae=32768, untrained_fvu_per_sample=0.5, **LABELS) for run in runs])
    assert max(map(len, table.splitlines())) <= 120
    names = [line.split()[0] for line in table.splitlines()[4:7]]
    assert len(set(names)) == 3 and all(name.startswith("…") for name in names)


def test_accuracy_stands_before_and_after_beside_the_agreement():
    (row,) = table_rows([record(**LABELS)])
    assert row["accuracy"].text == "0.790 (0.834)" and row["agreement"].text == "0.900"


def test_the_dead_are_a_share_in_the_mode_shown():
    (row,) = table_rows([record(dead=2, d_sae=8)])
    assert row["dead"].text == "25.0%" and row["active"].text == "4.0"


def test_an_untrained_row_is_never_the_best():
    rows = table_rows([record(), record(run="b"), record(run=None, is_untrained=True, cknna=0.99, dead=0)])
    assert not any(cell.is_best for cell in rows[2].values()) and rows[0]["CKNNA"].is_best
    assert rows[2]["model"].text == "untrained"


def test_poster_prints_the_eight_columns_of_the_paper(world, capsys):
    train, holdout, run = world
    labels = ("--labels", "label", "--probe-train", train)
    assert command("evaluate", run, run, "--on", holdout, "--poster", *labels) == 0
    head = capsys.readouterr().out.splitlines()[0]
    paper = ["sparsity ↑", "FVU ↓", "CS ↑", "LP (KL) ↓", "LP (Acc) ↑", "CKNNA ↑", "DO ↓", "NDN eval (train) ↓"]
    assert [title.strip() for title in head.strip("| ").split("|")][1:] == paper
    assert headings([column.title for column in POSTER_COLUMNS], POSTER_COLUMNS) == paper
    assert command("evaluate", run, "--on", holdout, "--latex") == 0
    assert capsys.readouterr().out.startswith("\\begin{tabular}{lrrrrrr}")


def test_recovery_is_printed_by_k(world):
    found = evaluate(world[2], world[1], recovery=True)
    lines = found.to_text().split("\n\n")[3].splitlines()
    assert lines[1].split() == ["k", "FVU", "↓", "cosine", "↑", "dead", "↓"]
    at_4 = next(point for point in found.recovery if point.k == 4)
    wanted = ["4", f"{at_4.fvu_per_sample:.3f}", f"{at_4.cosine:.3f}", f"{at_4.dead / D_SAE:.1%}"]
    assert wanted in [line.split() for line in lines]
    assert "strongest latents" not in evaluate(world[2], world[1]).to_text()


# --- The null


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Embeddings of drawn pictures by the demo's CLIP."""
    pytest.importorskip("transformers")
    from msae.world.chain import write_scenes
    from msae.world.scenes import UNSEEN_SEEDS

    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "scenes", range(UNSEEN_SEEDS.start, UNSEEN_SEEDS.start + 400))
    msae.embed(folder / "scenes" / "scenes.csv", encoder="demo", out=folder / "scenes.store")
    return folder / "scenes.store"


@pytest.mark.parametrize("kind", ["matryoshka", "topk", "batchtopk", "relu"])
def test_an_untrained_sae_never_beats_a_trained_one(scenes, tmp_path, kind):
    options = {"kind": kind, "d_sae": 256, "epochs": 20, "batch_size": 32, "device": "cpu", "lr": 1e-3}
    msae.train(scenes, out=tmp_path / "run", **options)
    trained, untrained = evaluate(tmp_path / "run", scenes, untrained=True)
    assert not trained.is_untrained and untrained.is_untrained and untrained.run is None
    assert untrained.inference == "topk" and untrained.k == round(trained.l0) and untrained.d_sae == 256
    assert trained.fvu_per_sample < untrained.fvu_per_sample and trained.fvu < untrained.fvu
    assert trained.cosine > untrained.cosine
    # As many rows as the sample: the sentence compares with the very row that is printed.
    assert trained.untrained_fvu_per_sample == pytest.approx(untrained.fvu_per_sample, rel=1e-4)


def test_the_null_is_random_directions_read_by_their_transpose_at_the_best_scale(world):
    _train, holdout, run = world
    null = untrained_like(View(run, holdout), k=5, seed=3)
    sae = null.view.sae
    standardizer = SAE.load(run).standardizer.statistics["image"]
    x = (np.load(holdout).astype(np.float64) - standardizer.mean.numpy()) * standardizer.scale
    W_dec, W_enc = (t.detach().double().numpy() for t in (sae.W_dec, sae.W_enc))
    assert np.allclose(np.linalg.norm(W_dec, axis=1), 1, atol=1e-6)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    scale = (W_enc.T / W_dec).mean()
    assert np.allclose(W_enc.T, scale * W_dec, rtol=1e-5)

    def lost(factor):
        h = x @ W_enc * factor
        z = np.where(h >= np.sort(h, 1)[:, [-5]], np.maximum(h, 0), 0)
        return ((x - z @ W_dec) ** 2).sum(), (((x - z @ W_dec) ** 2).sum(1) / (x**2).sum(1)).mean()

    assert lost(1)[0] < min(lost(0.98)[0], lost(1.02)[0])
    assert null.fvu_per_sample == pytest.approx(lost(1)[1], rel=1e-5)


def test_with_relu_the_null_is_one_row_of_relu(world):
    found = evaluate([world[2], world[2]], world[1], inference="relu", untrained=True)
    assert isinstance(found, Evaluations) and [one.is_untrained for one in found] == [False, False, True]
    assert found[2].inference == "relu" and found[2].k is None and found[2].notes == ()


def test_the_null_is_standardised_as_the_trained_one_is(world):
    sae = make_sae(world[0])
    sae.standardizer = Standardizer()
    trained, untrained = evaluate(sae, world[1], untrained=True)
    assert trained.standardized_by == untrained.standardized_by == "evaluation store"
    assert trained.untrained_fvu_per_sample == pytest.approx(untrained.fvu_per_sample, rel=1e-5)


def test_the_null_has_the_same_probe_and_is_not_kept(world):
    train, holdout, run = world
    trained, untrained = evaluate(run, holdout, labels="label", probe_train=train, untrained=True, recovery=True)
    assert untrained.probe_accuracy == trained.probe_accuracy and untrained.recovery is not None
    assert json.loads(json.dumps(untrained.to_json(), allow_nan=False))["is_untrained"] is True
    (kept,) = kept_evaluations(run)
    assert kept.evaluation.untrained_fvu_per_sample == trained.untrained_fvu_per_sample > 0
    assert not kept.evaluation.is_untrained


def test_a_sample_is_all_of_few_rows_and_seeded():
    assert sample_rows(7, seed=0).tolist() == list(range(7))
    some = sample_rows(SAMPLE_ROWS + 9, seed=0)
    assert len(set(some.tolist())) == SAMPLE_ROWS and np.array_equal(some, np.sort(some))
    assert np.array_equal(some, sample_rows(SAMPLE_ROWS + 9, seed=0))
    assert not np.array_equal(some, sample_rows(SAMPLE_ROWS + 9, seed=1))


# --- The judgement


@pytest.mark.parametrize(
    ("fvu", "untrained", "says"),
    [
        (0.1, 0.5, "5.0 times less is lost"),
        (0.8, 0.95, "4.0 times more is kept"),  # few latents active: all lose much
        (0.4, 0.5, "hardly better than untrained"),
        (0.5, 0.5, "no better than untrained weights, so do not use it"),
        (1.2, 0.5, "no better than the mean of all rows, so do not use it"),
        (1.2, 1.5, "no better than the mean of all rows"),
        (0.9, 1.5, "something is learnt"),
        (0.0, 0.5, "nothing is lost"),
    ],
)
def test_the_sentence_says_good_from_bad(fvu, untrained, says):
    sentence = judgement("a", record(fvu_per_sample=fvu, untrained_fvu_per_sample=untrained))
    assert says in sentence and sentence.startswith("a: FVU ") and sentence.endswith(".") and "\n" not in sentence


def test_the_sentence_says_when_most_latents_are_dead():
    sentences = [judgement("a", record(untrained_fvu_per_sample=0.5, d_sae=8, dead=dead)) for dead in (4, 6)]
    assert ["75% of its latents never fire here" in sentence for sentence in sentences] == [False, True]


def test_untrained_weights_are_not_called_good(world):
    sae = make_sae(world[0])
    with torch.no_grad():
        sae.W_enc.copy_(untrained_like(View(sae, world[1]), k=4, seed=5).view.sae.W_enc)
        sae.W_dec.copy_(untrained_like(View(sae, world[1]), k=4, seed=5).view.sae.W_dec)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    assert re.search("hardly better|no better", evaluate(sae, world[1], inference="topk", k=4).to_text())


def test_top_k_judged_by_relu_is_told_how_it_was_trained(world):
    sae = make_sae(world[0], "topk", k=4)
    assert "--inference trained shows it as trained" in evaluate(sae, world[1], inference="relu").to_text()
    assert "--inference trained" not in evaluate(sae, world[1]).to_text()
    assert "--inference trained" not in evaluate(make_sae(world[0]), world[1], inference="relu").to_text()


def test_nothing_is_said_without_a_null():
    assert judgements_of([record(), record(untrained_fvu_per_sample=0.5, is_untrained=True)]) == []
    assert poster_table([record()]) == poster_table([record(untrained_fvu_per_sample=0.5)])


# --- Training and the card


def test_train_ends_with_the_figures_that_evaluate_finds(world, tmp_path, capsys):
    train = world[0]
    options = ("--d-sae", 32, "--levels", 4, 8, "--epochs", 3, "--batch-size", 20, "--device", "cpu")
    assert command("train", train, "--out", tmp_path / "new", *options, "--json", tmp_path / "t.json") == 0
    out = capsys.readouterr().out
    sample = json.loads((tmp_path / "t.json").read_text())["training_sample"]
    found = evaluate(tmp_path / "new", train, device="cpu")
    for key in ("n", "l0", "dead", "d_sae", "fvu_per_sample", "untrained_fvu_per_sample"):
        assert sample[key] == pytest.approx(getattr(found, key), rel=1e-5), key
    assert (
        "200 of its 200 training rows (unseen rows lose more), inference trained" in out
        and f"{found.fvu_per_sample:.3f}" in out
    )
    assert f"active latents  {found.l0:.1f} of 32" in out and f"{found.dead / 32:.1%} of the latents never" in out
    assert out.rstrip().endswith(f"msae evaluate {tmp_path / 'new'} --on STORE")


def test_a_card_says_how_many_latents_are_active(world, tmp_path):
    pytest.importorskip("jinja2")
    from msae.web.report.card import card
    from msae.web.report.facts import facts_of

    msae.train(world[0], out=tmp_path / "new", d_sae=32, levels=(4, 8), epochs=1, batch_size=20, inference_l0=6)
    text = card(facts_of(tmp_path / "new"))
    assert "as 6 (on average) of 32 latents" in text and "a few of" not in text
    found = evaluate(tmp_path / "new", world[1])
    text = card(facts_of(tmp_path / "new"))
    assert f"as {found.l0:.0f} (on average) of 32 latents" in text
    assert "- image rows of holdout.npy, inference trained: FVU " in text and "- **FVU pooled**: " in text
