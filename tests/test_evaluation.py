import csv
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch

from msae.base.errors import ConfigError, MsaeError, RunError, StoreError
from msae.base.files import write_json
from msae.data.store import EmbeddingStore
from msae.measure import metrics
from msae.measure.evaluate import Evaluation, evaluate, poster_table, table_rows
from msae.measure.evaluate.record import POSTER_COLUMNS
from msae.measure.probe import hold_out
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from tests.oracles import metrics as oracle

D_IN, D_SAE = 12, 40
CONTRACT = [
    *("run", "kind", "inference", "modality", "n", "d_in", "d_sae", "sparsity", "sparsity_std", "l0", "fvu"),
    *("fvu_per_sample", "fvu_per_sample_std", "fvu_authors", "cosine", "cosine_std", "mae", "cknna", "cknna_std"),
    *("decoder_orthogonality", "max_decoder_cosine", "dead", "dead_train"),
]
PROBE = [
    *("probe_kl", "probe_kl_std", "probe_agreement", "probe_accuracy", "probe_accuracy_reconstructed", "class_f1"),
]


def write_store(path, *, n=90, d_in=D_IN, seed=0, labels=True):
    """A .npy of rows around three centres in a narrow cone, and a .csv with their class, some of it missing."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(3, d_in))
    classes = rng.integers(3, size=n)
    x = 1.5 + centres[classes] + 0.5 * rng.normal(size=(n, d_in))
    np.save(path, x.astype(np.float32))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label"] if labels else ["id", "image_path"])
        writer.writerows([f"row {seed} {i}", f"class {c}" if labels else f"{i}.png"] for i, c in enumerate(classes))
    return path


def make_sae(store, kind="matryoshka", **changes):
    config = {"d_in": D_IN, "d_sae": D_SAE, "kind": kind, **({"levels": (4, D_SAE)} if kind == "matryoshka" else {})}
    x = torch.from_numpy(np.load(store))
    standardizer = Standardizer({"image": fit_statistics(lambda: [x])})
    sae = SAE(SAEConfig(**{**config, **changes}), standardizer, seed=1)
    with torch.no_grad():
        # Untrained weights reconstruct little; these do so well enough for figures to differ from their extremes.
        sae.W_enc.copy_(0.5 * sae.W_dec.T)
        sae.b_enc.copy_(torch.linspace(-3, 0.3, sae.d_sae))
        sae.b_dec.fill_(0.1)
    return sae


def save_run(folder, sae, train):
    sae.save(folder)
    store = EmbeddingStore.open(train, modality="image")
    config = {"store": str(train), "store_fingerprint": store.fingerprint, "modality": "image", "train": {}}
    write_json(folder / "config.json", config, schema_version=1)
    return folder


@pytest.fixture
def world(tmp_path):
    """A training store, a holdout store, and a run trained on the first."""
    train = write_store(tmp_path / "train.npy", n=200, seed=1)
    holdout = write_store(tmp_path / "holdout.npy", n=90, seed=2)
    return train, holdout, save_run(tmp_path / "run", make_sae(train), train)


def in_float64(sae, path):
    """x, x_hat and z of a store as the formulas read, and the raw rows with their reconstruction."""
    raw = np.load(path).astype(np.float64)
    mean, scale = sae.standardizer.statistics["image"].mean.double().numpy(), sae.standardizer.statistics["image"].scale
    W_enc, W_dec, b_enc, b_dec = (t.detach().double().numpy() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    x = (raw - mean) * scale
    z = np.maximum((x - b_dec) @ W_enc + b_enc, 0)
    x_hat = z @ W_dec + b_dec
    return x, x_hat, z, raw, x_hat / scale + mean


# --- Figures


def test_every_figure_equals_its_formula(world):
    train, holdout, run = world
    found = evaluate(run, holdout, recovery=True)
    sae = SAE.load(run)
    x, x_hat, z, raw, raw_hat = in_float64(sae, holdout)
    per_sample, cosine, sparsity = oracle.fvu_per_sample(x, x_hat), oracle.cosine(x, x_hat), oracle.sparsity(z)
    W_dec = sae.W_dec.detach().double().numpy()
    wanted = {
        "sparsity": sparsity.mean(),
        "sparsity_std": sparsity.std(),
        "l0": (z != 0).sum(1).mean(),
        "fvu": oracle.fvu(x, x_hat),
        "fvu_per_sample": per_sample.mean(),
        "fvu_per_sample_std": per_sample.std(),
        "fvu_authors": oracle.fvu_authors(raw, raw_hat).mean(),
        "cosine": cosine.mean(),
        "cosine_std": cosine.std(),
        "mae": oracle.mae(x, x_hat),
        "cknna": oracle.cknna(x, z),
        "cknna_std": 0,
        "decoder_orthogonality": oracle.decoder_orthogonality(W_dec),
        "max_decoder_cosine": oracle.max_decoder_cosine(W_dec),
        "dead": oracle.dead(z),
        "dead_train": oracle.dead(in_float64(sae, train)[2]),
    }
    for name, value in wanted.items():  # the forward pass is float32
        assert getattr(found, name) == pytest.approx(value, rel=2e-5, abs=1e-9), name
    assert 0 < found.dead < D_SAE and 0 < found.dead_train <= found.dead and 0.1 < found.fvu < 0.9
    for point in found.recovery:
        z_k = oracle.keep_strongest(z, point.k)
        x_hat_k = z_k @ W_dec + sae.b_dec.detach().double().numpy()
        assert point.fvu == pytest.approx(oracle.fvu(x, x_hat_k), rel=2e-5)
        assert point.fvu_per_sample == pytest.approx(oracle.fvu_per_sample(x, x_hat_k).mean(), rel=2e-5)
        assert point.cosine == pytest.approx(oracle.cosine(x, x_hat_k).mean(), rel=2e-5)
        assert point.dead == oracle.dead(z_k)
        assert point.cknna == pytest.approx(oracle.cknna(x, z_k), rel=2e-5)


@pytest.mark.parametrize("mode", [{"inference": "relu"}, {"inference": "topk", "k": 3}])
def test_recovery_ends_at_the_figures_of_the_whole_sae(world, mode):
    found = evaluate(world[2], world[1], recovery=True, **mode)
    last = found.recovery[-1]
    assert [point.k for point in found.recovery] == [1, 2, 4, 8, 16, 32, D_SAE]
    assert last.cknna == found.cknna and last.dead == found.dead
    for name in ("fvu", "fvu_per_sample", "cosine"):  # float32 sums over bands, not over latents
        assert getattr(last, name) == pytest.approx(getattr(found, name), rel=1e-5)


def test_recovery_at_k_is_inference_with_topk(world):
    whole = {point.k: point for point in evaluate(world[2], world[1], recovery=True).recovery}
    for k in (2, 8):
        alone = evaluate(world[2], world[1], inference="topk", k=k)
        assert alone.dead == whole[k].dead and alone.l0 <= k
        assert alone.fvu == pytest.approx(whole[k].fvu, rel=1e-5)
        assert alone.cknna == pytest.approx(whole[k].cknna, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 17, 1000])
def test_the_batch_size_changes_no_figure(world, batch_size):
    one = evaluate(world[2], world[1], labels="label", recovery=True).to_json()
    other = evaluate(world[2], world[1], labels="label", recovery=True, batch_size=batch_size).to_json()
    recovery, other_recovery = one.pop("recovery"), other.pop("recovery")
    for a, b in [(one, other), *zip(recovery, other_recovery, strict=True)]:
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, rel=2e-5) if isinstance(value, float) else value), key


def test_topk_is_removed_from_those_trained_with_it(tmp_path):
    train = write_store(tmp_path / "train.npy")
    sae = make_sae(train, "topk", k=3)
    removed, trained, given = (
        evaluate(sae, train, inference=mode, k=3 if mode == "topk" else None) for mode in ("relu", "trained", "topk")
    )  # fmt: skip
    assert removed.l0 > 3 >= trained.l0
    assert {**trained.to_json(), "inference": "topk", "k": 3} == given.to_json()
    assert evaluate(sae, train) == trained, "one default everywhere"


def test_cknna_is_averaged_over_batches_chosen_by_the_seed(world, monkeypatch):
    monkeypatch.setattr("msae.measure.evaluate.passes.CKNNA_ROWS", 40)
    first, again, other = (evaluate(world[2], world[1], seed=seed) for seed in (0, 0, 1))
    assert first.cknna_batches == 2 and first.cknna_std > 0
    assert first == again and first.cknna != other.cknna
    monkeypatch.setattr("msae.measure.evaluate.passes.CKNNA_BATCHES", 1)
    assert evaluate(world[2], world[1]).cknna_batches == 1


def test_dead_train_of_the_evaluation_store_itself_is_dead(world):
    train, _, run = world
    found = evaluate(run, train)
    assert found.dead_train == found.dead
    assert evaluate(SAE.load(run), train, train_store=train).dead_train == found.dead


def test_unknown_statistics_are_fitted_on_the_evaluation_store(world):
    _, holdout, run = world
    sae = SAE.load(run)
    found = evaluate(SAE(sae.config, Standardizer({"text": sae.standardizer.statistics["image"]})), holdout)
    assert found.standardized_by == "evaluation store"
    assert evaluate(run, holdout).standardized_by == "run"
    x = torch.from_numpy(np.load(holdout))
    same = SAE(sae.config, Standardizer({"image": fit_statistics(lambda: [x])}))
    assert found.fvu == evaluate(same, holdout).fvu


def test_the_given_sae_is_left_as_it_was(world):
    sae = SAE.load(world[2])
    sae.standardizer = Standardizer()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    evaluate(sae.train(), world[1])
    assert not sae.standardizer.modalities and sae.training
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())


# --- Probe


def test_the_probe_figures_are_those_of_scikit_learn(world):
    from sklearn.linear_model import LogisticRegression

    train, holdout, run = world
    sae = SAE.load(run)
    labels = [EmbeddingStore.open(path).column("label") for path in (train, holdout)]

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    x, x_hat, *_ = in_float64(sae, holdout)
    model = LogisticRegression(C=100, max_iter=1000).fit(unit(in_float64(sae, train)[0]), labels[0])
    logits, logits_hat = model.decision_function(unit(x)), model.decision_function(unit(x_hat))
    kl = oracle.probe_kl(logits, logits_hat)
    found = evaluate(run, holdout, labels="label")
    assert (found.probe_n, found.probe_left_out, found.probe_classes) == (90, 0, 3)
    # float32 logits of long weights
    assert (found.probe_kl, found.probe_kl_std) == pytest.approx((kl.mean(), kl.std()), rel=1e-3)
    assert found.probe_agreement == (logits.argmax(1) == logits_hat.argmax(1)).mean()
    assert found.probe_accuracy == (model.predict(unit(x)) == labels[1]).mean()
    assert found.probe_accuracy_reconstructed == (model.predict(unit(x_hat)) == labels[1]).mean()
    assert found == evaluate(run, holdout, labels="label", probe_train=train)


@pytest.mark.parametrize("mode", [{"inference": "relu"}, {"inference": "topk", "k": 3}, {"inference": "threshold"}])
def test_class_f1_is_that_of_the_inference_on_the_rows_of_the_probe(world, mode):
    train, holdout, run = world
    SAE.load(run).with_l0(4, train).save(run)
    sae = SAE.load(run)
    rows = [np.load(path) for path in (train, holdout)]
    # Ten evaluated rows are also training rows: half of them train, half are evaluated.
    np.save(holdout, np.concatenate([rows[1][:80], rows[0][:10]]))
    labels = [EmbeddingStore.open(path).column("label") for path in (train, holdout)]
    with holdout.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "label"], *enumerate([*labels[1][:80], *labels[0][:10]])])
    stores = [EmbeddingStore.open(path) for path in (train, holdout)]
    every = [np.arange(len(store)) for store in stores]
    held = hold_out(*stores, "image", train_rows=every[0], on_rows=every[1], seed=0)
    assert (len(held.train), len(held.on)) == (195, 85)
    sides = []
    for store, chosen in zip(stores, (held.train, held.on), strict=True):
        z = sae.encode(store.take(chosen, "image"), inference=mode["inference"], k=mode.get("k"))
        sides += [z, [store.column("label")[row] for row in chosen]]
    found = evaluate(run, holdout, labels="label", **mode)
    assert found.class_f1 == pytest.approx(oracle.class_f1(*sides), abs=1e-6) and 0.4 < found.class_f1 < 1


def test_rows_without_a_known_label_are_left_out_of_the_probe_and_counted(world):
    _, holdout, run = world
    with holdout.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.reader(file))
    for row in rows[1:11]:
        row[1] = "seen nowhere else"
    with holdout.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = evaluate(run, holdout, labels="label")
    assert (found.n, found.probe_n, found.probe_left_out) == (90, 80, 10)


def test_a_perfect_reconstruction_agrees_with_itself(world):
    train, holdout, _ = world
    sae = make_sae(train, d_sae=2 * D_IN, levels=(4, 2 * D_IN))
    with torch.no_grad():  # each direction and its opposite: x = relu(x) - relu(-x)
        sae.W_dec.copy_(torch.cat([torch.eye(D_IN), -torch.eye(D_IN)]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    found = evaluate(sae, holdout, labels="label", probe_train=train)
    assert found.probe_agreement == 1 and found.probe_kl == pytest.approx(0, abs=1e-6)
    assert found.probe_accuracy == found.probe_accuracy_reconstructed > 0.9
    assert found.fvu < 1e-12 and found.cosine == pytest.approx(1, abs=1e-6)


def test_runs_with_the_same_training_share_one_probe(world, tmp_path, monkeypatch):
    fitted = []
    real = __import__("msae.measure.probe", fromlist=["fit_probe"]).fit_probe
    monkeypatch.setattr("msae.measure.evaluate.passes.fit_probe", lambda *a, **k: fitted.append(1) or real(*a, **k))
    train, holdout, run = world
    other = save_run(tmp_path / "other", make_sae(train, "relu"), train)
    pair = evaluate([run, other], holdout, labels="label")
    assert len(fitted) == 1
    assert pair == [evaluate(run, holdout, labels="label"), evaluate(other, holdout, labels="label")]


# --- Records and the table


def test_a_record_has_the_keys_of_the_contract(world):
    plain = evaluate(world[2], world[1]).to_json()
    assert set(CONTRACT) <= set(plain) and not {*PROBE, "recovery"} & set(plain)
    full = evaluate(world[2], world[1], labels="label", recovery=True).to_json()
    assert {*CONTRACT, *PROBE, "recovery"} <= set(full)
    assert set(full["recovery"][0]) == {"k", "fvu", "fvu_per_sample", "cosine", "cknna", "dead"}
    assert json.loads(json.dumps(full, allow_nan=False)) == full
    assert plain["run"] == str(world[2])


def test_what_is_undefined_is_null_with_a_reason(tmp_path):
    tiny = write_store(tmp_path / "tiny.npy", n=5)
    record = evaluate(make_sae(tiny), tiny).to_json()
    assert record["cknna"] is record["cknna_std"] is record["dead_train"] is record["run"] is None
    assert record["cknna_batches"] == 0
    assert [note.split(" ")[0] for note in record["notes"]] == ["dead", "CKNNA"]
    assert not any(key in note for note in record["notes"] for key in ("null", "dead_train", "None"))
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("change", ["gone", "another"])
def test_a_training_store_that_is_gone_or_another_gives_null(world, change):
    train, holdout, run = world
    if change == "gone":
        train.unlink()
    else:
        write_store(train, n=200, seed=7)
    found = evaluate(run, holdout)
    assert found.dead_train is None and ("cannot be opened" if change == "gone" else "no longer") in found.notes[0]


def record(**changes):
    values = {
        "run": "runs/a", "kind": "relu", "inference": "relu", "k": None, "modality": "image", "on": "store",
        "standardized_by": "run", "n": 9, "d_in": 4, "d_sae": 8, "sparsity": 0.5, "sparsity_std": 0.1, "l0": 4.0,
        "fvu": 0.1, "fvu_per_sample": 0.12, "fvu_per_sample_std": 0.02, "fvu_authors": 0.01, "cosine": 0.9,
        "cosine_std": 0.01, "mae": 0.3, "cknna": 0.7, "cknna_std": 0.0, "cknna_batches": 1,
        "decoder_orthogonality": 0.002, "max_decoder_cosine": 0.3, "dead": 1, "dead_train": 3,
    }  # fmt: skip
    return Evaluation(**{**values, **changes})


def test_the_best_value_of_each_column_is_marked_by_its_direction():
    rows = table_rows([
        record(run="a", sparsity=0.9, cosine=0.8, decoder_orthogonality=0.001, dead=0),
        record(run="b", sparsity=0.8, cosine=0.9, decoder_orthogonality=0.002, dead=5, fvu_per_sample=0.05),
    ], POSTER_COLUMNS)  # fmt: skip
    best = [{title for title, cell in row.items() if cell.is_best} for row in rows]
    assert best == [{"sparsity", "DO", "NDN eval (train)", "CKNNA"}, {"FVU", "CS", "CKNNA"}]
    assert rows[0]["NDN eval (train)"].text == "0 (3)" and rows[1]["FVU"].text == "0.050 ± 0.020"


def test_values_that_tie_as_printed_are_all_marked():
    rows = table_rows([record(sparsity=s, run=str(s)) for s in (0.80004, 0.79996, 0.7994)], POSTER_COLUMNS)
    assert [row["sparsity"].is_best for row in rows] == [True, True, False]


def test_columns_without_values_are_left_out_and_gaps_are_dashes():
    assert "LP (KL)" not in table_rows([record(), record(run="b")], POSTER_COLUMNS)[0]
    pair = [record(probe_kl=0.5, probe_agreement=0.9), record(run="b", dead_train=None, cknna=None)]
    rows = table_rows(pair, POSTER_COLUMNS)
    assert rows[1]["LP (KL)"] == ("-", False) and rows[0]["LP (KL)"] == ("0.5000", True)
    assert rows[1]["NDN eval (train)"].text == "1 (-)" and rows[0]["CKNNA"].is_best
    assert not any(cell.is_best for cell in table_rows([record()])[0].values())


def test_the_table_in_markdown_and_latex():
    pair = [record(run="runs/with_k|2", sparsity=0.9), record(run="runs/b")]
    head, line, first, _, _, mode = poster_table(pair).splitlines()
    assert mode == "inference: relu (every positive latent kept)"
    assert head.startswith("| model ") and "sparsity ↑" in head and "FVU ↓" in head
    assert set(line) <= set("|-: ") and "with_k\\|2" in first and "**0.900**" in first
    latex = poster_table(pair, style="latex")
    assert latex.endswith("\\end{tabular}\n% inference: relu (every positive latent kept)")
    assert latex.startswith("\\begin{tabular}{lrrrrrr}") and r"with\_k|2 & \textbf{0.900}" in latex
    assert r"$\pm$" in latex and r"sparsity $\uparrow$" in latex and "±" not in latex


def test_a_table_of_several_modes_says_which_run_has_which():
    runs = [
        record(run="a"),
        record(run="b", inference="trained"),
        record(run="c"),
        record(run="d", inference="topk", k=3),
    ]
    assert poster_table(runs).splitlines()[-1] == (
        "inference: relu (every positive latent kept) for a, c; trained (the activation function of the SAE) for b; "
        "topk (the 3 strongest latents kept) for d"
    )


def test_runs_of_the_same_name_are_told_apart():
    names = [row["model"].text for row in table_rows([record(run="x/a"), record(run="y/a"), record(run=None)])]
    assert names == ["x/a", "y/a", "relu"]


# --- Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inference": "relux"}, ConfigError, "relux"),
        ({"inference": "topk"}, ConfigError, "give a positive --k"),
        ({"inference": "topk", "k": 0}, ConfigError, "give a positive --k"),
        ({"inference": "topk", "k": D_SAE + 1}, ConfigError, f"above the {D_SAE} latents"),
        ({"k": 3}, ConfigError, "add --inference topk"),
        ({"batch_size": 0}, ConfigError, "batch size"),
        ({"device": "nonsense"}, ConfigError, "--device cpu"),
        ({"modality": "audio"}, StoreError, "audio"),
        ({"labels": "lable"}, StoreError, "did you mean 'label'"),
        ({"train_store": "missing.npy"}, StoreError, "missing.npy"),
        ({"labels": "label", "probe_train": "missing.npy"}, StoreError, "missing.npy"),
        ({"labels": "id"}, ConfigError, "occurs once"),
    ],
)
def test_wrong_options_are_refused_in_one_line(world, options, error, message):
    with pytest.raises(error, match=message) as caught:
        evaluate(world[2], world[1], **options)
    assert "\n" not in str(caught.value)


def test_without_a_modality_rows_are_what_the_store_or_else_the_run_says(world, tmp_path):
    """A store of texts alone is evaluated as texts; a file that does not say what it holds, as what was trained on."""
    _, holdout, run = world
    texts = tmp_path / "texts.npy"
    shutil.copy(holdout, texts)
    assert evaluate(run, texts).modality == "text"
    assert evaluate(run, holdout) == evaluate(run, holdout, modality="image")
    captioned = tmp_path / "captioned.npy"
    shutil.copy(holdout, captioned)
    rows = len(np.load(captioned))
    captioned.with_suffix(".csv").write_text("id,caption\n" + "".join(f"{i},a cat\n" for i in range(rows)))
    assert evaluate(run, captioned).modality == "image" and evaluate(SAE.load(run), captioned).modality == "text"


def test_another_width_names_both(world, tmp_path):
    wide = write_store(tmp_path / "wide.npy", d_in=D_IN + 1)
    with pytest.raises(StoreError, match=rf"{D_IN + 1}-dim.* {D_IN}-dim"):
        evaluate(world[2], wide)
    with pytest.raises(StoreError, match=rf"{D_IN + 1}-dim.* {D_IN}-dim"):
        evaluate(world[2], world[1], labels="label", probe_train=wide)


def test_a_probe_without_training_rows_asks_for_them(world, tmp_path):
    train, holdout, _ = world
    with pytest.raises(ConfigError, match=r"does not say what it was trained on; give --probe-train STORE"):
        evaluate(make_sae(train), holdout, labels="label")
    bare = write_store(tmp_path / "bare.npy", labels=False)
    run = save_run(tmp_path / "unlabelled", make_sae(bare), bare)
    with pytest.raises(ConfigError, match=r"no such column .*; give --probe-train STORE"):
        evaluate(run, holdout, labels="label")


def test_labels_that_the_probe_never_saw_are_refused(world, tmp_path):
    _, holdout, run = world
    text = holdout.with_suffix(".csv").read_text().replace("class ", "kind ")
    holdout.with_suffix(".csv").write_text(text)
    with pytest.raises(StoreError, match="same classes"):
        evaluate(run, holdout, labels="label")


def test_a_missing_run_and_an_empty_table_are_refused(world):
    with pytest.raises(RunError, match="does not exist"):
        evaluate("runs/nowhere", world[1])
    with pytest.raises(ConfigError, match="at least one run"):
        poster_table([])
    with pytest.raises(MsaeError, match="html"):
        poster_table([record()], style="html")


def test_a_reconstruction_that_is_not_finite_is_refused(world):
    sae = SAE.load(world[2])
    with torch.no_grad():
        sae.W_dec.fill_(1e38)
        sae.b_enc.fill_(1e6)
    with pytest.raises(RunError, match="NaN or infinity"):
        evaluate(sae, world[1])


# --- Real vectors


def test_figures_of_real_vectors_are_in_order(real_vectors, tmp_path):
    raw = np.load(real_vectors / "image_test.npy", mmap_mode="r")[::6]
    np.save(tmp_path / "real.npy", raw)
    x = torch.from_numpy(raw.astype(np.float32))
    sae = SAE(SAEConfig(512, 1024, levels=(64, 1024)), Standardizer({"image": fit_statistics(lambda: [x])}))
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_dec.T * 0.45)
    found = evaluate(sae, tmp_path / "real.npy", recovery=True)
    assert 0.3 < found.sparsity < 0.7 and 0 < found.fvu < 1 and 0.5 < found.cknna < 1
    # In the cone that raw vectors lie in, the released code's formula flatters.
    assert found.fvu_authors < 0.7 * found.fvu_per_sample
    assert found.decoder_orthogonality == pytest.approx(1 / 512, rel=0.05)
    curve = [point.fvu for point in found.recovery]
    assert all(after < before + 1e-5 for before, after in itertools.pairwise(curve))
    assert math.isclose(curve[-1], found.fvu, rel_tol=1e-5)
    assert [point.dead for point in found.recovery] == sorted((p.dead for p in found.recovery), reverse=True)
    assert metrics.recovery_ks(1024) == tuple(point.k for point in found.recovery)
