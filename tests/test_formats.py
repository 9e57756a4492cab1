"""SAEs of other libraries: what is written means the same there, what is read runs nothing, both ways give it back."""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import msae
from msae.base.errors import ConfigError, MsaeError, RunError
from msae.cli import main
from msae.sae.formats import OURS, read_file, read_folder
from msae.sae.formats.folded import fold, unfold
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, Statistics
from msae.sae.thresholds import SILENT
from tests.conftest import needs_posix

D_IN, D_SAE, N = 12, 40, 64


def make_sae(kind="matryoshka", *, seed=0, modalities=("image",), **config) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    if kind == "matryoshka":
        config = {"levels": (4, 16), **config}
    statistics = {
        modality: Statistics(torch.randn(D_IN, generator=generator), 3.7 + i) for i, modality in enumerate(modalities)
    }
    sae = SAE(SAEConfig(D_IN, D_SAE, kind=kind, **config), Standardizer(statistics), seed=seed)
    for name in ("b_enc", "b_dec"):
        getattr(sae, name).data = 0.1 * torch.randn(getattr(sae, name).shape, generator=generator)
    sae.W_enc.data = torch.randn(D_IN, D_SAE, generator=generator)
    if sae.threshold is not None:
        sae.threshold.fill_(0.4)
    if sae.log_level_scales is not None:
        sae.log_level_scales.data = torch.tensor([0.4, 0.1])
    return sae.eval()


def rows(seed=1):
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def run(tmp_path):
    make_sae().with_l0(6, rows()).save(tmp_path / "run")
    return tmp_path / "run"


def error_of(call) -> str:
    with pytest.raises(MsaeError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text
    return text


# --- Written: the formulas of the other libraries, in numpy, on raw embeddings


def codes_elsewhere(weights, x, *, pre_bias=True, k=None, threshold=None):
    """What each library does with its tensors, from its own code; W_enc (d_in, d_sae)."""
    W_enc, W_dec, b_enc, b_dec = (np.asarray(one, np.float64) for one in weights)
    h = (x - b_dec if pre_bias else x) @ W_enc + b_enc
    if threshold is not None:
        z = np.where(h > np.asarray(threshold, np.float64), h, 0)
    elif k is not None:
        z = np.zeros_like(h)
        top = np.argsort(-h, axis=1)[:, :k]
        np.put_along_axis(z, top, np.take_along_axis(h, top, 1), 1)
    else:
        z = h
    z = np.maximum(z, 0)
    return z, z @ W_dec + b_dec


CASES = [("trained", None), ("relu", None), ("topk", 5)]


@pytest.mark.parametrize(("inference", "k"), CASES)
@pytest.mark.parametrize("to", ["saelens", "sparsify", "dictionary-learning", "sentence-transformers"])
def test_the_other_library_computes_the_same_from_raw_embeddings(run, tmp_path, to, inference, k):
    out = tmp_path / "out"
    if k is None and to in ("sparsify", "sentence-transformers"):
        assert "--k 64" in error_of(lambda: msae.export(run, to=to, out=out, inference=inference))
        assert not out.exists()
        return
    given = {"k": k} if k else {"inference": inference}
    exported = msae.export(run, to=to, out=out, **given)
    sae, x = SAE.load(run), rows(2)
    z = sae.encode(x, k=k, inference=inference).numpy()
    if to == "saelens":
        config, t = json.loads((out / "cfg.json").read_text()), load_file(out / "sae_weights.safetensors")
        assert config["architecture"] == {"trained": "jumprelu", "relu": "standard", "topk": "topk"}[inference]
        assert set(t) == {"W_enc", "W_dec", "b_enc", "b_dec"} | ({"threshold"} if inference == "trained" else set())
        weights, pre_bias, threshold = [t[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec")], True, t.get("threshold")
    elif to == "sparsify":
        t, threshold, pre_bias = load_file(out / "sae.safetensors"), None, True
        weights = [t["encoder.weight"].T, t["W_dec"], t["encoder.bias"], t["b_dec"]]
    elif to == "sentence-transformers":
        t, threshold, pre_bias = load_file(out / "model.safetensors"), None, True
        weights = [t["encoder.weight"].T, t["encoder.weight"], t["latent_bias"], t["pre_bias"]]
    else:
        t = torch.load(out / "ae.pt", weights_only=True)
        threshold, pre_bias = (t["threshold"], False) if inference == "trained" else (None, True)
        if inference == "trained":
            weights = [t[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec")]
        else:
            bias = t["bias"] if inference == "relu" else t["b_dec"]
            weights = [t["encoder.weight"].T, t["decoder.weight"].T, t["encoder.bias"], bias]
    theirs, x_hat = codes_elsewhere(weights, x.double().numpy(), pre_bias=pre_bias, k=k, threshold=threshold)
    assert ((theirs > 0) == (z > 0)).all()
    np.testing.assert_allclose(theirs, z / exported.scale, atol=2e-6)  # float32 sums of 12 numbers
    if to != "sentence-transformers":
        np.testing.assert_allclose(x_hat, sae.decode(torch.from_numpy(z)).numpy(), atol=5e-6)


@pytest.mark.parametrize("how", [{}, {"inference": "relu"}, {"k": 5}])
def test_the_factor_of_a_level_is_folded_in(tmp_path, how):
    sae, x = make_sae(level_scales=True).with_l0(6, rows()), rows(3)
    k, inference = how.get("k"), how.get("inference", "trained")
    again, z = unfold(fold(sae, "image", inference="topk" if k else inference, k=k)), sae.encode(x, **how)
    assert sae.rule("relu").scale == pytest.approx(np.exp(0.1))
    assert sae.rule("topk", 4).scale == pytest.approx(np.exp(0.4))
    assert torch.equal(again.encode(x) > 0, z > 0)
    torch.testing.assert_close(again.encode(x), z / 3.7, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(again.decode(again.encode(x)), sae.decode(z), atol=1e-5, rtol=1e-5)
    sae.save(tmp_path / "run")
    msae.export(tmp_path / "run", to="saelens", out=tmp_path / "out", **how)
    msae.import_sae(tmp_path / "out", out=tmp_path / "again")
    assert (tmp_path / "again/sae.safetensors").read_bytes() == (tmp_path / "run/sae.safetensors").read_bytes()


def test_a_silent_latent_stays_silent_and_its_threshold_a_number():
    sae = make_sae().with_l0(6, rows())
    sae.thresholds[3] = SILENT
    statistics = Statistics(torch.zeros(D_IN), 0.01)  # embeddings of large norm: thresholds grow a hundredfold
    sae.standardizer = Standardizer({"image": statistics})
    folded = fold(sae, "image")
    assert bool(folded.threshold.isfinite().all()) and folded.threshold[3] == SILENT


def test_k_above_the_latents_is_all_of_them():
    assert fold(make_sae(), "image", inference="topk", k=10**6).k == D_SAE


def test_thresholds_are_those_of_the_modality(tmp_path):
    sae = make_sae(modalities=("image", "text")).with_l0(6, rows(), "image").with_l0(6, rows(2), "text")
    for modality in ("image", "text"):
        again = unfold(fold(sae, modality))
        assert torch.equal(again.encode(rows(5)) > 0, sae.encode(rows(5), modality) > 0)
    assert not torch.equal(fold(sae, "image").threshold, fold(sae, "text").threshold)


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "topk", "relu"])
def test_every_kind_folds_to_the_same_codes(kind):
    sae, x = make_sae(kind, **({} if kind == "relu" else {"k": 4})), rows(3)
    again = unfold(fold(sae, "image"))
    z = sae.encode(x)
    assert torch.equal(again.encode(x) > 0, z > 0) and int((z > 0).sum())
    torch.testing.assert_close(again.encode(x), z / 3.7, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(again.decode(again.encode(x)), sae.decode(z), atol=1e-5, rtol=1e-5)


def test_each_modality_is_exported_with_its_own_statistics(tmp_path):
    sae = make_sae(modalities=("image", "text"))
    sae.save(tmp_path / "run")
    out = tmp_path / "out"
    assert "--modality image" in error_of(lambda: msae.export(tmp_path / "run", to="saelens", out=out))
    scale = msae.export(tmp_path / "run", to="saelens", out=out, modality="text").scale
    t = load_file(out / "sae_weights.safetensors")
    weights = [t[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec")]
    z, _ = codes_elsewhere(weights, rows().double().numpy())
    np.testing.assert_allclose(z * scale, sae.encode(rows(), "text").numpy(), atol=1e-5)
    meta = json.loads((out / "cfg.json").read_text())["metadata"]
    assert meta["scale"] == scale == 4.7 and meta["mean"] == sae.standardizer.statistics["text"].mean.tolist()


def test_a_soft_cap_is_refused_in_one_line_and_nothing_is_left(tmp_path):
    make_sae(soft_cap=5.0).save(tmp_path / "run")
    for to in ("saelens", "sparsify", "dictionary-learning", "sentence-transformers"):
        text = error_of(lambda to=to: msae.export(tmp_path / "run", to=to, out=tmp_path / "out", k=4))
        assert "soft cap of 5" in text and "onnx" in text
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_there_is_never_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists already" in error_of(lambda: msae.export(run, to="saelens", out=tmp_path / "out"))
    msae.export(run, to="saelens", out=tmp_path / "new")
    before = (run / "sae.safetensors").read_bytes()
    assert "has an SAE already" in error_of(lambda: msae.import_sae(tmp_path / "new", out=run))
    assert (run / "sae.safetensors").read_bytes() == before


# --- There and back


@pytest.mark.parametrize("to", ["saelens", "sparsify", "dictionary-learning"])
@pytest.mark.parametrize("kind", ["matryoshka", "batchtopk", "jumprelu"])
def test_export_and_import_give_the_same_bytes(tmp_path, to, kind):
    config = {} if kind == "matryoshka" else {"k": 4}
    make_sae(kind, encoder="openai/clip-vit-base-patch32", **config).with_l0(6, rows()).save(tmp_path / "run")
    msae.export(tmp_path / "run", to=to, out=tmp_path / "out", k=5 if to == "sparsify" else None)
    msae.import_sae(tmp_path / "out", out=tmp_path / "again")
    for name in ("sae.safetensors", "sae.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize("to", ["saelens", "sparsify", "dictionary-learning"])
def test_without_our_file_the_weights_come_back_and_the_biases_stay_folded(run, tmp_path, to):
    msae.export(run, to=to, out=tmp_path / "out", k=5 if to == "sparsify" else None)
    (tmp_path / "out" / OURS).unlink()
    found, sae = read_folder(tmp_path / "out").sae, SAE.load(run)
    assert torch.equal(found.W_enc, sae.W_enc) and torch.equal(found.W_dec, sae.W_dec)
    k, x = (5 if to == "sparsify" else None), rows(4)
    z = sae.encode(x, k=k)
    assert torch.equal(found.encode(x) > 0, z > 0)
    torch.testing.assert_close(found.encode(x), z / 3.7, atol=2e-6, rtol=1e-5)
    # And a foreign folder that is imported and exported again is the same to the byte.
    found.save(tmp_path / "foreign")
    for name in ("one", "two"):
        msae.export(tmp_path / "foreign", to=to, out=tmp_path / name, modality="image")
    weights = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors"}.get(to)
    if weights:
        assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_a_file_that_was_changed_after_its_export_is_read_as_it_is_now(run, tmp_path):
    msae.export(run, to="saelens", out=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "sae_weights.safetensors")
    tensors["b_enc"] += 1
    save_file(tensors, tmp_path / "out" / "sae_weights.safetensors")
    found = read_folder(tmp_path / "out")
    assert torch.equal(found.sae.b_enc, tensors["b_enc"]) and "changed after its export" in found.notes[0]


# --- Files of others


def authors_file(path: Path, **changes):
    sae = make_sae("relu", seed=5)
    data = {
        "model": {
            "encoder": sae.W_enc.data,
            "decoder": sae.W_dec.data,
            "pre_bias": sae.b_dec.data,
            "latent_bias": sae.b_enc.data,
            "latents_activation_frequency": torch.zeros(D_SAE, dtype=torch.int64),
        },
        "mean_center": sae.standardizer.statistics["image"].mean,
        "scaling_factor": 3.7,
        "target_norm": np.float64(27.7),
        **changes,
    }
    torch.save(data, path)
    return sae


def test_the_authors_file_is_the_same_sae(tmp_path):
    sae = authors_file(tmp_path / "6144_768_TopKReLU_64_False_False_0.0.pth")
    found = msae.import_sae(tmp_path / "6144_768_TopKReLU_64_False_False_0.0.pth", out=tmp_path / "run")
    again = SAE.load(tmp_path / "run")
    assert torch.equal(again.encode(rows()), sae.encode(rows())) and again.standardizer.modalities == ("image",)
    assert again.d_sae == D_SAE  # read from the tensors, not from the name
    assert any("soft cap" in note for note in found.notes)
    capped = read_file(tmp_path / "6144_768_TopKReLU_64_False_False_0.0.pth", soft_cap=2.0, modality="text").sae
    assert float(capped.encode(rows(), "text").max()) <= 2.0


def test_a_numpy_scalar_of_numpy_1_is_read_too(tmp_path):
    """numpy 1 pickles under another module name; the files of the authors have it."""
    authors_file(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_file(tmp_path / "b.pth").sae.d_in == D_IN


def sem_file(path: Path):
    sae = make_sae("relu", seed=6)
    torch.save(
        {
            "bpre": sae.b_dec.data,
            "encoder.weight": sae.W_enc.data.T.contiguous(),
            "encoder.bias": sae.b_enc.data,
            "decoder.weight": sae.W_dec.data.T.contiguous(),
        },
        path,
    )
    return sae


def test_sems_file_reads_raw_embeddings_and_warns_beside_unit_rows(tmp_path, caplog):
    sae = sem_file(tmp_path / "sem.pth")
    msae.import_sae(tmp_path / "sem.pth", out=tmp_path / "run")
    found = SAE.load(tmp_path / "run")
    x = rows()
    torch.testing.assert_close(found.encode(x), sae.pre_activations(x).relu(), atol=1e-6, rtol=1e-6)
    assert found.config.unnormalised
    np.save(tmp_path / "long.npy", x.numpy())
    np.save(tmp_path / "unit.npy", (x / x.norm(dim=1, keepdim=True)).numpy())
    msae.sae.view.View(tmp_path / "run", tmp_path / "long.npy", "image")
    assert not caplog.messages
    msae.sae.view.View(tmp_path / "run", tmp_path / "unit.npy", "image")
    (line,) = caplog.messages
    assert "unit.npy" in line and "norm 1" in line


def write_folder_of(path: Path, config_name, config, weights_name, tensors):
    path.mkdir()
    (path / config_name).write_text(json.dumps(config))
    if weights_name.endswith(".pt"):
        torch.save(tensors, path / weights_name)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / weights_name)
    return path


def plain(sae):
    return {name: getattr(sae, name).detach().clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def test_saelens_with_rescaled_topk_and_without_the_pre_bias_is_read(tmp_path):
    sae, x = make_sae("relu", seed=7), rows()
    tensors = plain(sae)
    tensors["W_dec"] *= torch.linspace(0.5, 2, D_SAE)[:, None]
    config = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True, "metadata": {}}
    folder = write_folder_of(tmp_path / "topk", "cfg.json", config, "sae_weights.safetensors", tensors)
    norms = tensors["W_dec"].norm(dim=1)
    h = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms  # SAELens ranks by this, and divides by the norm to decode
    z = torch.zeros_like(h).scatter(1, h.topk(4).indices, h.topk(4).values.relu())
    found = read_folder(folder).sae
    torch.testing.assert_close(found.encode(x), z)
    torch.testing.assert_close(found.decode(z), (z / norms) @ tensors["W_dec"] + sae.b_dec)
    config = {"architecture": "standard", "apply_b_dec_to_input": False}
    folder = write_folder_of(tmp_path / "plain", "cfg.json", config, "sae_weights.safetensors", plain(sae))
    expected = (x @ sae.W_enc + sae.b_enc).relu()
    torch.testing.assert_close(read_folder(folder).sae.encode(x), expected, atol=1e-5, rtol=1e-5)


def test_the_dictionaries_of_dictionary_learning_are_read(tmp_path):
    sae, x = make_sae("relu", seed=8), rows()
    weights = {
        "encoder.weight": sae.W_enc.data.T.contiguous(),
        "encoder.bias": sae.b_enc.data,
        "decoder.weight": sae.W_dec.data.T.contiguous(),
        "b_dec": sae.b_dec.data,
        "k": torch.tensor(4),
        "threshold": torch.tensor(0.3),
    }
    config = {"trainer": {"dict_class": "BatchTopKSAE", "k": 4}}
    found = read_folder(write_folder_of(tmp_path / "batch", "config.json", config, "ae.pt", weights)).sae
    h = sae.pre_activations(x)
    torch.testing.assert_close(found.encode(x), torch.where(h > 0.3, h, 0.0))
    config = {"trainer": {"dict_class": "GatedAutoEncoder"}}
    folder = write_folder_of(tmp_path / "gated", "config.json", config, "ae.pt", weights)
    assert "GatedAutoEncoder" in error_of(lambda: read_folder(folder))


def test_vit_prisma_is_read_where_it_does_not_normalise(tmp_path):
    sae, x = make_sae("relu", seed=9), rows()
    config = {"architecture": "standard", "activation_fn_str": "relu", "normalize_activations": None, "d_in": D_IN}
    folder = write_folder_of(tmp_path / "a", "config.json", config, "weights.pt", {"state_dict": plain(sae)})
    found = read_folder(folder)
    torch.testing.assert_close(found.sae.encode(x), sae.pre_activations(x).relu(), atol=1e-6, rtol=1e-6)
    assert "hidden states" in found.notes[0]
    config["normalize_activations"] = "layer_norm"
    folder = write_folder_of(tmp_path / "b", "config.json", config, "weights.pt", plain(sae))
    assert "layer_norm" in error_of(lambda: read_folder(folder))


def test_half_precision_is_widened(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in plain(make_sae("relu")).items()}
    config = {"architecture": "standard", "dtype": "bfloat16"}
    folder = write_folder_of(tmp_path / "half", "cfg.json", config, "sae_weights.safetensors", tensors)
    assert torch.equal(read_folder(folder).sae.W_enc, tensors["W_enc"].float())


# --- Hostile files: nothing runs, nothing outside is read or written, one line each


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def zipped(path: Path, data: bytes, *more: tuple[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("archive/data.pkl", data), ("archive/version", b"3\n"), *more):
            archive.writestr(name, content)


def saelens_folder(folder: Path, **changes) -> Path:
    tensors = {name: tensor.contiguous() for name, tensor in {**plain(make_sae("relu")), **changes}.items()}
    return write_folder_of(folder, "cfg.json", {"architecture": "standard"}, "sae_weights.safetensors", tensors)


def bare_pickle(at, mark):
    (at / "evil.pth").write_bytes(pickle.dumps({"model": Runs(mark)}))
    return at / "evil.pth"


def pickle_in_an_archive(at, mark):
    zipped(at / "evil.pth", pickle.dumps({"model": Runs(mark)}, protocol=2))
    return at / "evil.pth"


def pickle_as_weights_of_a_folder(at, mark):
    folder = write_folder_of(at / "ae", "config.json", {"trainer": {"dict_class": "AutoEncoder"}}, "ae.pt", {})
    (folder / "ae.pt").write_bytes(pickle.dumps(Runs(mark)))
    return folder


def pickle_as_safetensors(at, mark):
    folder = saelens_folder(at / "sae")
    (folder / "sae_weights.safetensors").write_bytes(pickle.dumps(Runs(mark)))
    return folder


def archive_with_paths_out_of_the_folder(at, mark):
    authors_file(at / "good.pth")
    with zipfile.ZipFile(at / "good.pth") as good, zipfile.ZipFile(at / "evil.pth", "w") as evil:
        for name in good.namelist():
            evil.writestr(name.replace("good/data/", "good/../../data/"), good.read(name))
        evil.writestr(f"good/../../../{mark.name}", b"written")
        evil.writestr(str(mark), b"written")
    (at / "good.pth").unlink()
    return at / "evil.pth"


def tar_with_paths_out_of_the_folder(at, mark):
    with tarfile.open(at / "evil.pth", "w") as archive:
        for name in (f"../{mark.name}", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
    return at / "evil.pth"


def wrong_shapes(at, mark):
    return saelens_folder(at / "sae", W_dec=torch.zeros(D_SAE, D_IN + 1))


def more_than_the_file_holds(at, mark):
    tensor = torch.zeros(1).expand(2**20, 2**20)
    torch.save(
        {"model": {"encoder": tensor, "decoder": tensor, "pre_bias": tensor, "latent_bias": tensor}}, at / "e.pth"
    )
    return at / "e.pth"


def not_a_number(at, mark):
    return saelens_folder(at / "sae", b_enc=torch.full((D_SAE,), float("nan")))


def huge_header(at, mark):
    folder = saelens_folder(at / "sae")
    (folder / "sae_weights.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    return folder


def header_that_points_outside(at, mark):
    folder = saelens_folder(at / "sae")
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**62]}}).encode()
    (folder / "sae_weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def huge_config(at, mark):
    folder = saelens_folder(at / "sae")
    with (folder / "cfg.json").open("wb") as file:
        file.truncate(2**33)
    return folder


def nested_config(at, mark):
    folder = saelens_folder(at / "sae")
    (folder / "cfg.json").write_text("[" * 200_000)
    return folder


def link_out_of_the_folder(at, mark):
    folder = saelens_folder(at / "sae")
    secret = at / "secret.safetensors"
    (folder / "sae_weights.safetensors").rename(secret)
    (folder / "sae_weights.safetensors").symlink_to(secret)
    return folder


def link_to_a_device(at, mark):
    folder = saelens_folder(at / "sae")
    (folder / "cfg.json").unlink()
    (folder / "cfg.json").symlink_to("/dev/zero")
    return folder


def another_size_in_our_file(at, mark):
    make_sae().save(at / "run")
    msae.export(at / "run", to="saelens", out=at / "out")
    tensors = load_file(at / "out" / OURS)
    config = {"d_in": D_IN, "d_sae": 10**12, "kind": "relu"}
    settings = {"modality": "image", "inference": "relu", "k": None, "config": config}
    save_file(tensors, at / "out" / OURS, metadata={"msae": json.dumps(settings)})
    return at / "out"


def named_pipe(at, mark):
    folder = saelens_folder(at / "sae")
    (folder / "cfg.json").unlink()
    os.mkfifo(folder / "cfg.json")
    return folder


HOSTILE = [
    bare_pickle,
    pickle_in_an_archive,
    pickle_as_weights_of_a_folder,
    pickle_as_safetensors,
    archive_with_paths_out_of_the_folder,
    tar_with_paths_out_of_the_folder,
    wrong_shapes,
    more_than_the_file_holds,
    not_a_number,
    huge_header,
    header_that_points_outside,
    huge_config,
    nested_config,
    link_out_of_the_folder,
    pytest.param(link_to_a_device, marks=needs_posix),
    pytest.param(named_pipe, marks=needs_posix),
    another_size_in_our_file,
]


def refused(path: Path, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`msae import` ends in one line, writes nothing, and has run nothing."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as left:
        main(["import", str(path), "--out", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    assert left.value.code == 1 and out == "", err
    assert err.count("\n") == 1 and "unexpected" not in err and len(err) < 600, err
    assert set(tmp_path.rglob("*")) == before and not mark.exists()


@pytest.mark.parametrize("make", HOSTILE)
def test_a_hostile_file_runs_nothing_and_ends_in_one_line(make, tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "deep").mkdir()
    mark = tmp_path / "inner" / "it-ran"
    path = make(tmp_path / "inner" / "deep", mark)
    refused(path, mark, tmp_path, capsys)


# --- Ten kinds of hostile file, against every importer


def foreign(kind: str, at: Path) -> tuple[Path, Path]:
    """An SAE as each importer reads it: what is given to `msae import`, and the file of weights."""
    if kind in ("authors", "sem"):
        path = at / f"{kind}.pth"
        (authors_file if kind == "authors" else sem_file)(path)
        return path, path
    if kind == "prisma":
        config = {"architecture": "standard", "activation_fn_str": "relu"}
        folder = write_folder_of(
            at / "sae", "config.json", config, "weights.pt", {"state_dict": plain(make_sae("relu"))}
        )
        return folder, folder / "weights.pt"
    make_sae("relu").save(at / "run")
    folder = at / "sae"
    msae.export(at / "run", to=kind.removesuffix(" of ours"), out=folder, k=4 if kind == "sparsify" else None)
    shutil.rmtree(at / "run")
    if kind.endswith(" of ours"):
        return folder, folder / OURS
    (folder / OURS).unlink()
    return folder, next(file for file in folder.iterdir() if file.suffix != ".json")


IMPORTERS = ("saelens", "saelens of ours", "sparsify", "dictionary-learning", "prisma", "authors", "sem")


def with_tensors(weights: Path, change) -> None:
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights, metadata)
        return
    data = torch.load(weights, weights_only=False)
    change(data.get("model", data.get("state_dict", data)))
    torch.save(data, weights)


def largest_of(tensors) -> str:
    return max(tensors, key=lambda name: tensors[name].numel())


def cut(tensors) -> None:
    name = largest_of(tensors)
    tensors[name] = tensors[name][..., :-1].contiguous()


def spoil(tensors) -> None:
    tensors[largest_of(tensors)].view(-1)[3] = float("inf")


def round_off(tensors) -> None:
    name = largest_of(tensors)
    tensors[name] = tensors[name].long()


def bytes_of_a_pickle(weights, mark):
    weights.write_bytes(pickle.dumps({"model": Runs(mark)}))


def bytes_of_an_archive(weights, mark):
    zipped(weights, pickle.dumps({"model": Runs(mark)}, protocol=2))


def bytes_of_a_tar(weights, mark):
    path = tar_with_paths_out_of_the_folder(weights.parent, mark)
    path.replace(weights)


def a_member_outside(weights, mark):
    """Of an archive; a file that is none is replaced by one."""
    old = zipfile.ZipFile(weights) if zipfile.is_zipfile(weights) else None
    members = {name: old.read(name) for name in old.namelist()} if old else {"archive/data.pkl": b"."}
    with zipfile.ZipFile(weights, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("/data/", "/../../data/"), data)
        archive.writestr(f"../../{mark.name}", b"written")
        archive.writestr(str(mark), b"written")


def a_huge_header(weights, mark):
    weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def a_half(weights, mark):
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def a_link_outside(weights, mark):
    outside = mark.with_name("outside")
    weights.replace(outside)
    weights.symlink_to(outside)


def a_pipe(weights, mark):
    weights.unlink()
    os.mkfifo(weights)


KINDS = {
    "pickle": bytes_of_a_pickle,
    "pickle in an archive": bytes_of_an_archive,
    "tar that leaves the folder": bytes_of_a_tar,
    "archive that leaves the folder": a_member_outside,
    "huge header": a_huge_header,
    "half a file": a_half,
    "link that leaves the folder": a_link_outside,
    "pipe": a_pipe,
    "wrong shapes": lambda weights, mark: with_tensors(weights, cut),
    "not finite": lambda weights, mark: with_tensors(weights, spoil),
    "whole numbers": lambda weights, mark: with_tensors(weights, round_off),
}


@pytest.mark.parametrize("kind", [k if k != "pipe" else pytest.param(k, marks=needs_posix) for k in KINDS])
@pytest.mark.parametrize("importer", IMPORTERS)
def test_every_importer_refuses_every_kind(importer, kind, tmp_path, capsys):
    home = tmp_path / "inner" / "deep"
    home.mkdir(parents=True)
    mark = tmp_path / "inner" / "it-ran"
    path, weights = foreign(importer, home)
    KINDS[kind](weights, mark)
    if (importer, kind) == ("saelens of ours", "whole numbers"):
        assert "was ignored" in msae.import_sae(path, out=tmp_path / "run").notes[0]  # what SAELens wrote is whole
        return
    refused(path, mark, tmp_path, capsys)


def test_without_the_hostile_change_every_importer_reads(tmp_path):
    for importer in IMPORTERS:
        (tmp_path / importer).mkdir()
        assert read_file(foreign(importer, tmp_path / importer)[0]).sae.d_sae == D_SAE


def test_a_pickle_says_what_it_asked_for(tmp_path):
    path = pickle_in_an_archive(tmp_path, tmp_path / "mark")
    text = error_of(lambda: read_file(path))
    assert "system" in text and "nothing in it was run" in text


def test_what_is_no_sae_is_refused_in_one_line(tmp_path):
    make_sae().save(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.pth")
    (tmp_path / "x.txt").write_text("x")
    for name, word in (
        ("run", "already"),
        ("empty", "cfg.json"),
        ("x.pth", "'bpre'"),
        ("x.txt", ".pth"),
        ("none", "does not exist"),
    ):
        assert word in error_of(lambda name=name: read_file(tmp_path / name)), name


def test_thresholds_that_came_with_an_sae_cannot_be_changed_without_rows(run, tmp_path):
    msae.export(run, to="saelens", out=tmp_path / "out")
    (tmp_path / "out" / OURS).unlink()
    msae.import_sae(tmp_path / "out", out=tmp_path / "again")
    found = SAE.load(tmp_path / "again")
    assert found.config.inference_l0 is None and found.thresholds is not None
    with pytest.raises(ConfigError, match="fit them on rows"):
        found.with_l0(3)
    assert found.with_l0(3, rows()).config.inference_l0 == pytest.approx(3)
    with pytest.raises(RunError):
        SAE.load(tmp_path / "out")
