"""Laws of threshold inference: each latent fires as often as among the strongest, whatever else is in the row."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msae.base.errors import ConfigError, RunError
from msae.sae import thresholds as fitting
from msae.sae.model import SAE, SAEConfig, weights_hash
from msae.sae.standardize import Standardizer, fit_statistics
from msae.sae.thresholds import SILENT
from msae.sae.train import train
from msae.sae.view import View
from tests.test_sae import KINDS as KINDS_OF_SAE

D_IN, D_SAE, N = 12, 48, 700
KINDS = {**KINDS_OF_SAE, "widths": {"kind": "matryoshka", "widths": (16, 48), "k": 5}}
X = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(0)) + 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, X.numpy())
    return path


def make(kind="matryoshka", **changes):
    config = SAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, "kind": kind, **KINDS[kind], **changes})
    sae = SAE(config, Standardizer({"image": fit_statistics(lambda: [X])}), seed=3)
    with torch.no_grad():  # latents of unlike rates: some nearly always among the strongest, some never
        sae.b_enc.copy_(torch.linspace(-0.25, 0.3, D_SAE))
    return sae


def pre_activations(sae, x=X):
    with torch.no_grad():
        return sae.pre_activations(sae.standardizer.apply(x, "image"))


def rates_among_strongest(h, k):
    """By hand: in which share of rows each latent is positive and one of the k largest."""
    fires = np.zeros(h.shape)
    for i, row in enumerate(h.numpy()):
        kept = np.argsort(-row, kind="stable")[:k]
        fires[i, kept] = row[kept] > 0
    return fires.mean(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("l0", [1, 6, 10])
def test_each_latent_fires_as_often_as_it_is_among_the_strongest(kind, l0, store):
    sae = make(kind).with_l0(l0, store)
    fires = sae.activate(pre_activations(sae), inference="threshold") > 0
    wanted = rates_among_strongest(pre_activations(sae), l0)
    assert int((pre_activations(sae) > 0).sum(1).min()) >= l0
    assert np.array_equal(fires.double().mean(0).numpy(), wanted)
    assert fires.sum() == N * l0 and sae.config.inference_l0 == l0
    assert not fires[:, wanted == 0].any() and (wanted == 0).any()


def test_firing_is_counted_on_a_gpu_as_on_a_cpu():
    h, ks = pre_activations(make()), [1, 6, D_SAE]
    wanted = np.stack([rates_among_strongest(h, k) * N for k in ks])
    assert np.allclose(fitting._times_in(h, ks), wanted)
    x = make().standardizer.apply(X, "image")
    assert np.array_equal(fitting._times_among_strongest(make(), [x], ks), fitting._times_in(h, ks))


@pytest.mark.parametrize("l0", [20, 23])
def test_the_mean_is_exact_even_where_some_rows_have_too_few_positive_latents(l0, store):
    sae = make().with_l0(l0, store)
    h = pre_activations(sae)
    assert int((h > 0).sum(1).min()) < l0 and (sae.activate(h) > 0).sum() == N * l0


def test_rows_can_be_given_instead_of_a_store(store):
    wanted = make().with_l0(6, store).thresholds
    for rows in (X, X.numpy(), X.double().numpy()):
        assert torch.allclose(make().with_l0(6, rows).thresholds, wanted, atol=1e-6)
    with pytest.raises(ConfigError, match="width 11, but this SAE reads width 12"):
        make().with_l0(6, X[:, 1:])
    with pytest.raises(ConfigError, match="no rows to fit thresholds on"):
        make().with_l0(6, X[:0])


def test_a_latent_that_is_never_among_the_strongest_stays_silent_in_rows_it_was_not_fitted_on(store):
    sae = make().with_l0(4, store)
    h = torch.full((1, D_SAE), 1e6)
    silent = torch.from_numpy(rates_among_strongest(pre_activations(sae), 4) == 0)
    assert torch.equal(sae.activate(h) == 0, silent[None]) and bool((sae.thresholds[silent] == SILENT).all())


def test_thresholds_for_all_latents_are_relu(store):
    sae = make()
    h = pre_activations(sae)
    n_positive = int((h > 0).sum()) // N
    assert torch.equal(make().with_l0(n_positive, store).threshold_table[-1], torch.zeros(D_SAE))
    with pytest.raises(ConfigError, match=rf"only {(h > 0).sum() / N:.1f} latents a row .* give at most {n_positive}$"):
        sae.with_l0(n_positive + 1, store)


@pytest.mark.parametrize("l0", [2, 3, 5, 6, 11, 13, 22])
def test_another_number_from_the_table_is_reached_within_five_percent(l0, store):
    fitted = make().with_l0(8, store)
    fires = fitted.with_l0(l0).activate(pre_activations(fitted)) > 0
    assert fires.sum() / N == pytest.approx(l0, rel=0.05)


def test_the_table_leaves_the_sae_it_was_asked_of_as_it_was(store):
    sae = make().with_l0(8, store)
    before = sae.thresholds.clone()
    other = sae.with_l0(3)
    assert torch.equal(sae.thresholds, before) and sae.config.inference_l0 == 8 and other.config.inference_l0 == 3
    assert torch.equal(other.with_l0(8).thresholds, before)


def test_what_fires_depends_on_the_row_alone(store):
    sae = make().with_l0(8, store)
    h = pre_activations(sae)
    together = sae.activate(h, inference="threshold")
    assert all(torch.equal(sae.activate(h[i : i + 1], inference="threshold")[0], together[i]) for i in range(0, N, 50))
    for i in range(0, N, 50):  # a product of one row may sum in another order, so its last bits differ
        alone, clear = sae.encode(X[i]), (h[i] - sae.thresholds).abs() > 1e-5
        assert torch.allclose(alone[clear], together[i][clear], atol=1e-6)
        assert torch.equal(alone[clear] > 0, together[i][clear] > 0)


def test_a_threshold_lies_half_way_so_that_rounding_of_a_product_changes_nothing(store):
    sae = make().with_l0(8, store)
    in_float64 = make().with_l0(8, store).double()
    x = sae.standardizer.apply(X, "image")
    with torch.no_grad():
        fires = sae.activate(sae.pre_activations(x)) > 0
        assert torch.equal(in_float64.activate(in_float64.pre_activations(x.double())) > 0, fires)


def test_the_soft_cap_comes_after_the_threshold(store):
    plain, capped = make().with_l0(8, store), make(soft_cap=0.05).with_l0(8, store)
    h = pre_activations(plain)
    assert torch.equal(capped.activate(h) > 0, plain.activate(h) > 0)
    assert torch.equal(capped.activate(h), 0.05 * torch.tanh(plain.activate(h) / 0.05))


@pytest.mark.parametrize("kind", KINDS)
def test_trained_is_the_stored_thresholds_unless_the_kind_has_its_own_activation(kind, store):
    bare = make(kind)
    sae, h = bare.with_l0(8, store), pre_activations(bare)
    before, now = bare.activate(h), sae.activate(h)
    has_own = kind in ("topk", "batchtopk", "jumprelu", "widths")
    assert torch.equal(now, before if has_own else sae.activate(h, inference="threshold"))
    assert torch.equal(sae.activate(h, inference="relu"), h.relu())
    assert torch.equal(sae.activate(h, inference="topk", k=3), bare.activate(h, inference="topk", k=3))


@pytest.mark.parametrize("latents", [None, [9, 40, 2]])
def test_a_view_gives_the_activations_of_encode(latents, store):
    sae = make("topk").with_l0(8, store)
    z = torch.cat(list(View(sae, store, inference="threshold").activations(latents)))
    wanted = sae.encode(X, inference="threshold")
    assert torch.allclose(z, wanted if latents is None else wanted[:, latents], atol=1e-6)
    assert bool((z > 0).any())


def test_blocks_of_rows_and_of_latents_change_nothing(store, monkeypatch):
    whole = make().with_l0(8, store)
    monkeypatch.setattr(fitting, "COLUMN_ENTRIES", 5 * N)
    assert torch.allclose(make().with_l0(8, store).threshold_table, whole.threshold_table, atol=1e-6)


def test_a_large_store_is_fitted_on_a_fixed_sample_of_its_rows(store, monkeypatch):
    monkeypatch.setattr(fitting, "MAX_ROWS", 500)
    sae = make().with_l0(8, store)
    again = make().with_l0(8, store)
    assert torch.equal(sae.threshold_table, again.threshold_table)
    rows = fitting.fitting_rows(View(sae, store).store)
    assert len(np.unique(rows)) == 500 and bool((np.diff(rows) > 0).all())
    h = pre_activations(sae)
    assert (sae.activate(h[rows]) > 0).sum() == 500 * 8
    assert (sae.activate(h) > 0).sum() / N == pytest.approx(8, rel=0.03)


# --- On disk


def test_thresholds_survive_saving_and_loading(store, tmp_path):
    sae = make().with_l0(8, store)
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert again.config == sae.config and torch.equal(again.encode(X), sae.encode(X))
    assert torch.equal(again.with_l0(5).thresholds, sae.with_l0(5).thresholds)
    assert weights_hash(again) == weights_hash(sae) != weights_hash(sae.with_l0(5))
    assert tuple(load_file(tmp_path / "sae.safetensors")["thresholds"].shape) == (D_SAE,)
    assert "8 active latents a row on average" in repr(again)


def make_older(folder):
    """The files as an msae without thresholds wrote them."""
    data = json.loads((folder / "sae.json").read_text())
    del data["inference_l0"]
    (folder / "sae.json").write_text(json.dumps({**data, "schema_version": 1}))
    tensors = load_file(folder / "sae.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("threshold")}, folder / "sae.safetensors")
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        del config["train"]["inference_l0"]
        (folder / "config.json").write_text(json.dumps(config))


def test_an_older_sae_loads_and_says_how_to_get_thresholds(store, tmp_path):
    make().with_l0(8, store).save(tmp_path)
    make_older(tmp_path)
    sae = SAE.load(tmp_path)
    assert torch.equal(sae.encode(X), pre_activations(sae).relu()) and weights_hash(sae) == weights_hash(make())
    for ask in (
        lambda: sae.encode(X, inference="threshold"),
        lambda: View(sae, store, inference="threshold"),
        lambda: sae.with_l0(8),
    ):
        with pytest.raises(ConfigError, match=r"no thresholds .*sae\.with_l0\(64, STORE\)\.save\(RUN\)") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert sae.with_l0(8, store).config.inference_l0 == 8


@pytest.mark.parametrize("name", ["thresholds", "threshold_table", "threshold_table_l0"])
def test_files_that_do_not_belong_together_are_refused(name, store, tmp_path):
    make().with_l0(8, store).save(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    save_file({**tensors, name: torch.zeros(3)}, tmp_path / "sae.safetensors")
    with pytest.raises(RunError, match="do not belong together"):
        SAE.load(tmp_path)
    del tensors[name]
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(RunError, match="do not belong together"):
        SAE.load(tmp_path)


@pytest.mark.parametrize("l0", [0, -3, D_SAE + 1])
def test_a_number_out_of_range_is_one_line(l0, store):
    with pytest.raises(ConfigError, match=f"^{l0} active latents a row is not between 1 and d_sae 48"):
        make().with_l0(l0, store)


# --- After training

SMALL = {"d_sae": 48, "batch_size": 100, "epochs": 2, "lr": 1e-3, "log_every": 5, "device": "cpu"}


@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_with_thresholds(kind, store, tmp_path):
    sae = train(store, out=tmp_path / "run", **{"kind": kind, **SMALL, **KINDS[kind]})
    wanted = KINDS[kind].get("k", 2)  # an eighth of 12 dimensions
    fires = sae.activate(pre_activations(sae), inference="threshold") > 0
    assert sae.config.inference_l0 == wanted and fires.sum() == wanted * N
    assert torch.equal(SAE.load(tmp_path / "run").thresholds, sae.thresholds)


def test_a_finished_run_gets_other_thresholds_without_training(store, tmp_path):
    first = train(store, out=tmp_path / "run", **SMALL)
    other = train(store, out=tmp_path / "run", resume=True, inference_l0=5, **SMALL)
    assert torch.equal(first.W_dec, other.W_dec) and other.config.inference_l0 == 5
    assert (other.activate(pre_activations(other)) > 0).sum() == 5 * N
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["inference_l0"] == 5
    files = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").glob("*.*")}
    again = train(store, out=tmp_path / "run", resume=True, inference_l0=5, **SMALL)
    assert torch.equal(again.thresholds, other.thresholds)
    assert files == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").glob("*.*")}


def test_a_finished_run_of_an_earlier_version_gets_thresholds_when_resumed(store, tmp_path):
    first = train(store, out=tmp_path / "run", **SMALL)
    make_older(tmp_path / "run")
    again = train(store, out=tmp_path / "run", resume=True, **SMALL)
    assert torch.equal(again.thresholds, first.thresholds) and torch.equal(again.W_enc, first.W_enc)


def test_on_real_vectors_thresholds_are_as_good_as_the_strongest(real_vectors, tmp_path):
    for part, n in (("train", 6000), ("test", 1500)):
        np.save(tmp_path / f"{part}.npy", np.load(real_vectors / f"image_{part}.npy", mmap_mode="r")[::4][:n])
    sae = train(tmp_path / "train.npy", out=tmp_path / "run", d_sae=1024, epochs=2, batch_size=128, device="cpu")
    x = sae.standardizer.apply(torch.from_numpy(np.load(tmp_path / "test.npy").astype(np.float32)), "image")

    def fvu(**how):
        with torch.no_grad():
            x_hat = sae.reconstruct(sae.activate(sae.pre_activations(x), **how))
        return float(((x - x_hat).square().sum(1) / x.square().sum(1)).mean())

    assert sae.config.inference_l0 == 64
    assert fvu(inference="threshold") <= 1.05 * fvu(inference="topk", k=64)
    for l0 in (21, 45, 64, 90, 180):
        z = np.concatenate([z.count_nonzero(1) for z in View(sae.with_l0(l0), tmp_path / "train.npy").activations()])
        assert z.mean() == pytest.approx(l0, rel=0.02)


def test_an_unknown_inference_is_refused_and_not_taken_for_another(store, tmp_path):
    """In another process: here the types of arguments are checked before the function runs."""
    make().with_l0(8, store).save(tmp_path / "run")
    code = "import sys, msae; msae.activations(sys.argv[1], sys.argv[2], inference='ReLU')"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run", store], capture_output=True, text=True)
    assert "ConfigError: inference 'ReLU' is unknown; give relu, trained, topk, threshold" in done.stderr


def test_more_active_latents_than_there_are_is_refused_before_training(store, tmp_path):
    with pytest.raises(ConfigError, match="--inference-l0 33 is above the 32 latents; give at most 32"):
        train(store, out=tmp_path / "run", d_sae=32, inference_l0=33, device="cpu")
    assert not (tmp_path / "run").exists()
