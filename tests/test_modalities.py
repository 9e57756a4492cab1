"""Laws of training on images and texts together, and of the figures on pairs."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msae.base.errors import ConfigError, Interrupted, RunError, StoreError
from msae.base.notices import notice
from msae.cli import main
from msae.measure import metrics
from msae.measure.evaluate import evaluate
from msae.measure.evaluate.pairs import latents_by_modality
from msae.sae import losses
from msae.sae.model import SAE, SAEConfig
from msae.sae.train import TrainSettings, train
from msae.sae.train.rows import TrainingRows
from msae.sae.train.training import Training
from msae.sae.view import View
from msae.web.report.facts import facts_of

D_IN, N, N_TEXTS = 16, 600, 250
SMALL = {"d_sae": 64, "levels": (4, 16), "batch_size": 50, "epochs": 4, "lr": 2e-3, "log_every": 5, "device": "cpu"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sparse mixtures of 32 directions; a text is its image's mixture with noise, elsewhere and at another scale."""
    rng = np.random.default_rng(0)
    mixture = rng.exponential(size=(N, 32)) * (rng.random((N, 32)) < 0.1)
    images = mixture @ rng.normal(size=(32, D_IN)) + 2 + 0.05 * rng.normal(size=(N, D_IN))
    texts = 0.3 * (images - 2) - 1 + 0.1 * rng.normal(size=(N, D_IN))
    folder = tmp_path_factory.mktemp("data")
    images, texts = images.astype(np.float16), texts.astype(np.float16)
    np.save(folder / "images.npy", images)
    np.save(folder / "texts.npy", texts[:N_TEXTS])
    np.savez(folder / "pairs.npz", image_embeds=images[:N_TEXTS], text_embeds=texts[:N_TEXTS])
    np.save(folder / "images_rest.npy", images[N_TEXTS:])
    return folder


def weights_of(run):
    tensors = load_file(run / "sae.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("W_", "b_", "standardizer"))}


def msae(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- Which rows are drawn


def test_both_modalities_are_drawn_equally_often(files):
    rows = TrainingRows([files / "images.npy", files / "texts.npy"], "both")
    assert (len(rows), rows.n_rows) == (2 * N, N + N_TEXTS)
    batches = rows.drawn(50, seed=3, epoch=1)
    assert len(batches) == 2 * N // 50 and all(len(b["image"]) == len(b["text"]) == 25 for b in batches)
    assert sorted(np.concatenate([b["image"] for b in batches])) == list(range(N))
    times = np.bincount(np.concatenate([b["text"] for b in batches]), minlength=N_TEXTS)
    assert times.sum() == N and set(times) == {2, 3}
    again, other = rows.drawn(50, seed=3, epoch=1), rows.drawn(50, seed=3, epoch=2)
    assert all(np.array_equal(a["text"], b["text"]) for a, b in zip(batches, again, strict=True))
    assert not all(np.array_equal(a["text"], b["text"]) for a, b in zip(batches, other, strict=True))


def test_one_modality_is_drawn_as_ever(files):
    """By hand: a permutation by seed and epoch, cut into sorted batches, the short last one left out."""
    wanted = np.sort(np.random.default_rng([5, 2]).permutation(N)[: N // 64 * 64].reshape(-1, 64), axis=1)
    found = TrainingRows(files / "images.npy", "image").drawn(64, seed=5, epoch=2)
    assert np.array_equal(np.stack([batch["image"] for batch in found]), wanted)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_several_stores_train_as_their_rows_in_one_file(modality, files, tmp_path):
    """Bit for bit; that the store of pairs has texts too changes no image."""
    stores = {"image": [files / "pairs.npz", files / "images_rest.npy"], "text": files / "pairs.npz"}[modality]
    joined = {"image": files / "images.npy", "text": files / "texts.npy"}[modality]
    train(stores, out=tmp_path / "several", modality=modality, **SMALL)
    train(joined, out=tmp_path / "one", modality=modality, **SMALL)
    several, one = weights_of(tmp_path / "several"), weights_of(tmp_path / "one")
    assert same({name: several[name] for name in one}, one)


def test_both_in_one_store_train_as_both_in_two(files, tmp_path):
    np.save(tmp_path / "images.npy", np.load(files / "pairs.npz")["image_embeds"])
    train(files / "pairs.npz", out=tmp_path / "one", modality="both", **SMALL)
    train([tmp_path / "images.npy", files / "texts.npy"], out=tmp_path / "two", modality="both", **SMALL)
    assert same(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"))


# --- What is learnt


def test_each_modality_is_standardised_by_its_own_rows_and_both_are_reconstructed(files, tmp_path):
    sae = train([files / "images.npy", files / "texts.npy"], out=tmp_path / "both", modality="both", **SMALL)
    images = train(files / "images.npy", out=tmp_path / "images", **SMALL)
    for modality, file in (("image", "images.npy"), ("text", "texts.npy")):
        x = np.load(files / file).astype(np.float64)
        known = sae.standardizer.statistics[modality]
        assert np.allclose(known.mean, x.mean(0), atol=1e-5)
        assert known.scale == pytest.approx(4 / np.linalg.norm(x - x.mean(0), axis=1).mean(), rel=1e-5)
    errors = {}
    for name, one in (("both", sae), ("images", images)):
        view = View(one, files / "texts.npy", "text", k=16)
        x = torch.cat(list(view.rows()))
        with torch.no_grad():
            errors[name] = float((x - one.reconstruct(view.activate(x))).square().sum() / x.square().sum())
    assert errors["both"] < 0.8 * errors["images"]
    config = json.loads((tmp_path / "both/config.json").read_text())
    assert config["modality"] == "both" and config["n_rows"] == N + N_TEXTS
    assert [one["store"] for one in config["stores"]] == [str(files / "images.npy"), str(files / "texts.npy")]
    assert "stores" not in json.loads((tmp_path / "images/config.json").read_text())


def test_aligned_training_lowers_the_alignment_loss_and_pays_in_reconstruction(files, tmp_path):
    found, errors = [], []
    for align in (0.0, 1.0):
        sae = train(files / "pairs.npz", out=tmp_path / f"{align}", modality="both", align=align, **SMALL)
        images, texts = (torch.from_numpy(sae.encode(files / "pairs.npz", one, 4)) for one in ("image", "text"))
        found.append(float(losses.alignment_loss(images, texts)))
        errors.append(json.loads((tmp_path / f"{align}/metrics.jsonl").read_text().splitlines()[-1])["reconstruction"])
    assert found[1] < 0.9 * found[0] < np.log(N_TEXTS) and errors[1] > errors[0]


def test_alignment_loss_is_the_mean_cross_entropy_of_both_ways():
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 7)), rng.random((5, 7))
    logits = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T / 0.1
    terms = [np.log(np.exp(rows).sum()) - rows[i] for m in (logits, logits.T) for i, rows in enumerate(m)]
    found = losses.alignment_loss(torch.from_numpy(a), torch.from_numpy(b))
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-9)
    alike = torch.ones(5, 7)
    assert float(losses.alignment_loss(alike, alike)) == pytest.approx(np.log(5), rel=1e-5)
    assert float(losses.alignment_loss(torch.eye(5), torch.eye(5))) < 1e-3


# --- Resuming


class _StopsAt(Training):
    """A run that ends before step 31, long after its checkpoint of step 28."""

    def _step(self, state, *batch):
        if state.step == 31:
            raise Interrupted("stopped")
        return super()._step(state, *batch)


@pytest.mark.parametrize("align", [0.0, 0.5])
def test_interrupted_and_resumed_run_equals_uninterrupted_run(align, files, tmp_path):
    stores = [files / "pairs.npz", files / "images_rest.npy"]
    options = {**SMALL, "modality": "both", "align": align, "checkpoint_every": 7}
    train(stores, out=tmp_path / "whole", **options)
    rows = TrainingRows(stores, "both")
    with pytest.raises(Interrupted):
        _StopsAt(tmp_path / "cut", rows, TrainSettings(**options).resolve(rows)).train(resume=False)
    train(stores, out=tmp_path / "cut", resume=True, **options)
    whole, cut = ((tmp_path / name / "sae.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    with pytest.raises(RunError, match=r"trained on other stores beside .*give those, in the same order"):
        train(stores[0], out=tmp_path / "cut", resume=True, **options)


# --- Thresholds of each modality


@pytest.mark.parametrize(("modality", "first"), [("image", "image"), ("text", "text"), ("both", "image")])
def test_both_modalities_have_as_many_active_latents_as_were_asked_for(modality, first, files, tmp_path):
    train(files / "pairs.npz", out=tmp_path, modality=modality, inference_l0=5, **SMALL)
    sae = SAE.load(tmp_path)
    assert sae.config.threshold_modalities[0] == first and len(sae.config.threshold_modalities) == 2
    for one in ("image", "text"):
        fires = torch.cat(list(View(sae, files / "pairs.npz", one).activations())) > 0
        assert fires.sum() == 5 * N_TEXTS
        assert torch.equal(fires, torch.from_numpy(sae.encode(files / "pairs.npz", one)) > 0)
        fewer = torch.cat(list(View(sae.with_l0(3), files / "pairs.npz", one).activations())) > 0
        assert fewer.sum() / N_TEXTS == pytest.approx(3, rel=0.05)


def test_thresholds_of_one_modality_serve_the_other_and_that_is_said_once(files, tmp_path, caplog):
    sae = train(files / "images.npy", out=tmp_path, **SMALL)
    assert sae.config.threshold_modalities == ("image",)
    h = torch.linspace(-1, 3, 64).repeat(3, 1)
    notice.cache_clear()
    with caplog.at_level(logging.WARNING, logger="msae"):
        assert torch.equal(sae.activate(h, modality="image"), sae.activate(h)) and not caplog.records
        assert torch.equal(sae.activate(h, modality="text"), sae.activate(h))
        sae.activate(h, modality="text")
    assert [record.message for record in caplog.records] == [
        "this SAE has thresholds for image rows alone, which serve for text rows too: other than 2 latents are active "
        "in a row; to fit them: sae.with_l0(2, STORE, 'text').save(RUN)"
    ]


def test_texts_get_thresholds_later_and_those_of_images_stay(files, tmp_path):
    sae = train(files / "pairs.npz", out=tmp_path / "a", inference_l0=5, **SMALL)
    again = sae.with_l0(5, files / "images.npy").with_l0(5, files / "pairs.npz", "text")
    assert torch.equal(again.thresholds_text, sae.thresholds_text)
    again.save(tmp_path / "b")
    assert torch.equal(SAE.load(tmp_path / "b").thresholds, again.thresholds)


@pytest.mark.parametrize("as_rows", [False, True])
def test_an_sae_of_images_alone_learns_how_to_read_texts(as_rows, files, tmp_path):
    sae = train(files / "images.npy", out=tmp_path, **SMALL)
    texts = np.load(files / "texts.npy").astype(np.float32)
    again = sae.with_l0(5, texts if as_rows else files / "texts.npy", "text")
    assert np.allclose(again.standardizer.statistics["text"].mean, texts.mean(0), atol=1e-5)
    assert (again.encode(texts, "text") > 0).sum() == 5 * N_TEXTS
    assert again.config.threshold_modalities == ("image", "text") and "text" not in sae.standardizer


def test_a_file_that_does_not_say_of_which_rows_its_thresholds_are_loads(files, tmp_path):
    """As the version before wrote it: one set of thresholds, for all rows, and no word about it."""
    sae = train(files / "pairs.npz", out=tmp_path, inference_l0=5, **SMALL)
    data = json.loads((tmp_path / "sae.json").read_text())
    del data["threshold_modalities"]
    (tmp_path / "sae.json").write_text(json.dumps({**data, "schema_version": 2}))
    tensors = load_file(tmp_path / "sae.safetensors")
    kept = {n: t for n, t in tensors.items() if not (n.startswith("threshold") and n.endswith("_text"))}
    save_file(kept, tmp_path / "sae.safetensors")
    older = SAE.load(tmp_path)
    h = torch.linspace(-1, 3, 64).repeat(3, 1)
    assert torch.equal(older.activate(h, modality="text"), sae.activate(h, modality="image"))
    assert older.with_l0(3).config.threshold_modalities == ()
    assert older.with_l0(3, files / "pairs.npz", "text").config.threshold_modalities == ("text",)


# --- The figures on pairs


def test_pair_ranks_count_what_is_at_least_as_near():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, (40, 4)).astype(np.float32), rng.integers(0, 3, (40, 4)).astype(np.float32)
    wanted = [sum(a[i] @ b[j] >= a[i] @ b[i] for j in range(40) if j != i) for i in range(40)]
    assert metrics.pair_ranks(torch.from_numpy(a), torch.from_numpy(b), block=7).tolist() == wanted
    assert metrics.pair_ranks(torch.zeros(6, 2), torch.zeros(6, 2)).tolist() == [5] * 6


def test_jaccard_of_pairs_is_that_of_sets():
    rng = np.random.default_rng(0)
    a, b = (rng.random((30, 12)) * (rng.random((30, 12)) < 0.2) for _ in range(2))
    sets = [[set(np.flatnonzero(row)) for row in rows] for rows in (a, b)]
    share = np.array([[len(p & q) / len(p | q) if p | q else 0 for q in sets[1]] for p in sets[0]])
    own, others = metrics.jaccard_of_pairs(torch.from_numpy(a), torch.from_numpy(b), block=7)
    assert own == pytest.approx(np.diag(share).mean())
    assert others == pytest.approx(share[~np.eye(30, dtype=bool)].mean())


def test_a_latent_serves_both_where_its_rates_differ_at_most_five_times():
    images = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.1, 0.02])
    texts = torch.tensor([0.1, 0.09, 0.3, 0.0, 0.1, 0.5])
    assert latents_by_modality(images, texts) == {"image": (1,), "text": (2, 5), "both": (0, 4)}


def test_evaluate_measures_the_pairs_of_a_store_with_images_and_texts(files, tmp_path):
    stores = [files / "images.npy", files / "texts.npy"]
    for modality in ("image", "both"):
        train(stores if modality == "both" else stores[0], out=tmp_path / modality, modality=modality, **SMALL)
    one, both = evaluate([tmp_path / "image", tmp_path / "both"], files / "pairs.npz")
    assert (one.pairs.trained_on, both.pairs.trained_on, both.pairs.n) == ("image", "both", N_TEXTS)
    image_rows, text_rows = both.pairs.rows
    assert image_rows.fvu_per_sample == both.fvu_per_sample and image_rows.cknna == both.cknna
    alone = evaluate(tmp_path / "both", files / "pairs.npz", modality="text")
    assert text_rows.fvu_per_sample == alone.fvu_per_sample and text_rows.l0 == alone.l0
    assert alone.pairs.rows[1].untrained_fvu_per_sample == text_rows.untrained_fvu_per_sample
    assert text_rows.fvu_per_sample < one.pairs.rows[1].fvu_per_sample
    # The codes, by hand.
    view = {
        m: torch.cat(list(View(tmp_path / "both", files / "pairs.npz", m).activations())) for m in ("image", "text")
    }
    cosine = torch.nn.functional.normalize(view["image"]) @ torch.nn.functional.normalize(view["text"]).T
    first = ((cosine >= cosine.diagonal()[:, None]).sum(1) == 1).double().mean()
    found = both.pairs.codes
    assert found.retrieval.image_to_text_r1 == pytest.approx(float(first), abs=2 / N_TEXTS)
    assert found.in_common > 2 * found.in_common_with_others
    assert both.pairs.dense.image_to_text_r5 >= both.pairs.dense.image_to_text_r1 > 1 / N_TEXTS
    n_firing = int(((view["image"] > 0).any(0) | (view["text"] > 0).any(0)).sum())
    served = (both.pairs.image, both.pairs.text, both.pairs.both)
    assert sum(map(len, served)) == n_firing and found.share_both == len(both.pairs.both) / n_firing


def test_the_report_says_what_it_was_trained_on(files, tmp_path):
    train([files / "images.npy", files / "texts.npy"], out=tmp_path / "both", modality="both", **SMALL)
    train(files / "pairs.npz", out=tmp_path / "pairs", modality="both", **SMALL)
    assert dict(facts_of(tmp_path / "both").lines())["trained on"] == (
        "850 image and text rows of images.npy and 1 other store"
    )
    assert dict(facts_of(tmp_path / "pairs").lines())["trained on"] == "500 image and text rows of pairs.npz"


def test_dead_latents_are_counted_on_the_rows_of_all_training_stores(files, tmp_path):
    stores = [files / "texts.npy", files / "pairs.npz", files / "images_rest.npy"]
    sae = train(stores, out=tmp_path / "run", modality="both", **SMALL)
    found = evaluate(tmp_path / "run", files / "pairs.npz").dead_train
    assert found == int((~(torch.from_numpy(sae.encode(files / "images.npy")) > 0).any(0)).sum())


def test_the_command_trains_on_two_stores_and_prints_the_pairs(files, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--d-sae", "64", "--levels", "4", "16", "--epochs", "2", "--device", "cpu", "--modality", "both"]
    msae("train", str(files / "images.npy"), str(files / "texts.npy"), "--out", str(run), *options)
    text = capsys.readouterr().out
    assert "600 of images.npy's 600 image training rows" in text
    assert "250 of texts.npy's 250 text training rows" in text
    msae("evaluate", str(run), "--on", str(files / "pairs.npz"), "--json", str(tmp_path / "x.json"))
    text = capsys.readouterr().out
    for words in ("run (trained on both)", "serve both", "raw embeddings", "standardised embeddings", "untrained"):
        assert words in text
    pairs = json.loads((tmp_path / "x.json").read_text())[0]["pairs"]
    assert pairs["n"] == N_TEXTS and [row["modality"] for row in pairs["rows"]] == ["image", "text"]
    msae("evaluate", str(run), "--on", str(files / "images.npy"))
    assert "serve both" not in capsys.readouterr().out
    msae("info", str(run))
    assert f"{files / 'images.npy'}, {files / 'texts.npy'}" in capsys.readouterr().out


# --- Errors


@pytest.mark.parametrize(
    ("stores", "options", "error", "message"),
    [
        (["images.npy"], {}, StoreError, "no text embeddings in .*images.npy; .* such as my-text.npy"),
        (["texts.npy"], {}, StoreError, "there are no image embeddings in .*or --modality text"),
        ([], {}, StoreError, "there is no store to train on"),
        (["pairs.npz"], {"batch_size": 51}, ConfigError, "--batch-size 51 is odd; .*give an even number"),
        (["images.npy", "texts.npy"], {"align": 1.0}, ConfigError, "--align 1 needs rows with an image and a text"),
        (["pairs.npz"], {"align": 1.0, "modality": "image"}, ConfigError, "--align 1 needs .*add --modality both"),
        (["pairs.npz"], {"align": -1.0}, ConfigError, "--align -1.0 is negative"),
        (["pairs.npz", "wide.npy"], {}, StoreError, "wide.npy holds 17-dim embeddings, .*pairs.npz 16-dim ones"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(stores, options, error, message, files, tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((3, 17)))
    paths = [tmp_path / name if name == "wide.npy" else files / name for name in stores]
    with pytest.raises(error, match=message) as caught:
        train(paths, out=tmp_path / "run", **{**SMALL, "modality": "both", **options})
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_thresholds_of_one_modality_twice_are_refused():
    with pytest.raises(ConfigError, match="wanted each modality once"):
        SAEConfig(4, 8, kind="relu", threshold_modalities=("image", "image"))
