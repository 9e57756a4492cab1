import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msae.base.errors import ConfigError, RunError, StoreError
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)) + 2
KINDS = {
    "matryoshka": {"levels": (4, 16, 48)},
    "topk": {"k": 5},
    "batchtopk": {"k": 5},
    "jumprelu": {"k": 5},
    "relu": {},
}


def make(kind="matryoshka", **changes):
    config = SAEConfig(**{"d_in": 12, "d_sae": 48, "kind": kind, **KINDS[kind], **changes})
    standardizer = Standardizer({m: fit_statistics(lambda s=s: [X * s]) for m, s in (("image", 1), ("text", 3))})
    sae = SAE(config, standardizer, seed=3)
    if sae.threshold is not None:
        sae.threshold.fill_(0.11)
    return sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_reloaded_sae_encodes_and_decodes_the_same_bits(kind, cap, tmp_path):
    sae = make(kind, soft_cap=cap, encoder="owner/clip", encoder_revision="abc")
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert again.config == sae.config
    for modality in ("image", "text"):
        z = sae.encode(X, modality)
        assert torch.equal(again.encode(X, modality), z)
        assert torch.equal(again.decode(z, modality), sae.decode(z, modality))
    assert torch.equal(again.encode(X, k=3), sae.encode(X, k=3))


def test_level_scales_multiply_activations_by_how_many_latents_take_part(tmp_path):
    plain, sae = make(), make(level_scales=True)
    sae.log_level_scales.data = torch.tensor([2.0, 1.0, 0.5]).log()
    assert [sae.scale_at(float(k)) for k in (1, 4, 16, 48)] == pytest.approx([2, 2, 1, 0.5])
    assert sae.scale_at(8.0) == pytest.approx(2**0.5)  # half-way between 4 and 16
    assert plain.scale_at(8.0) == 1
    h = torch.randn(9, 48)
    for k, scale in ((4, 2), (8, 2**0.5), (48, 0.5)):
        assert torch.allclose(sae.activate(h, inference="topk", k=k), scale * plain.activate(h, inference="topk", k=k))
    assert torch.allclose(sae.activate(h, inference="relu"), 0.5 * h.relu())
    fitted, unscaled = sae.with_l0(4, X), plain.with_l0(4, X)
    assert torch.allclose(fitted.encode(X), 2 * unscaled.encode(X))  # the same latents fire
    assert torch.allclose(fitted.with_l0(8).encode(X), 2**0.5 * unscaled.with_l0(8).encode(X))
    fitted.save(tmp_path)
    assert torch.equal(SAE.load(tmp_path).encode(X), fitted.encode(X))


def test_an_sae_without_levels_has_no_level_scales():
    with pytest.raises(ConfigError, match="level scales without levels"):
        make("topk", level_scales=True)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    make().save(tmp_path / "a")
    make().save(tmp_path / "b")
    assert (tmp_path / "a/sae.safetensors").read_bytes() == (tmp_path / "b/sae.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_initial_weights_follow_the_recipe():
    sae = make()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(48))
    assert torch.allclose(sae.W_enc, 0.1 * sae.W_dec.T)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert not torch.equal(sae.W_dec, SAE(sae.config, seed=4).W_dec)


def test_trained_inference_of_each_kind():
    h = torch.randn(9, 48)
    assert torch.equal(make("matryoshka").activate(h), h.relu())
    assert torch.equal(make("relu").activate(h), h.relu())
    assert int((make("topk").activate(h) > 0).sum(1).max()) <= 5
    assert torch.equal(make("batchtopk").activate(h), torch.where(h > 0.11, h, 0))
    assert torch.equal(make("jumprelu").activate(h), torch.where(h > 0.1, h, 0))
    for kind in KINDS:
        assert torch.equal(make(kind).activate(h, inference="relu"), h.relu())


def test_batchtopk_inference_does_not_depend_on_the_batch():
    sae = make("batchtopk")
    assert torch.allclose(sae.encode(X)[:7], sae.encode(X[:7]), atol=1e-6)  # the product's summation order may differ


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 0}, "at least 1"),
        ({"kind": "topk", "levels": None, "k": None}, "--k 64"),
        ({"kind": "topk", "levels": None, "k": 49}, "k 49 is not between 1 and d_sae 48"),
        ({"levels": (4, 99)}, "level 99 is above d_sae 48"),
        ({"levels": None}, "needs levels"),
        ({"soft_cap": -1.0}, "soft cap -1.0"),
    ],
)
def test_contradicting_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_wrong_width_is_refused():
    with pytest.raises(ConfigError, match="width 13, but this SAE reads width 12"):
        make().encode(torch.zeros(2, 13))


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_or_a_store_gives_the_activations_of_the_tensor_as_an_array(kind, tmp_path):
    sae = make(kind)
    np.save(tmp_path / "x.npy", X.numpy())
    wanted = sae.encode(X)
    assert isinstance(wanted, torch.Tensor)
    for given in (
        X.numpy(),
        X.double().numpy(),
        tmp_path / "x.npy",
        EmbeddingStore.open(tmp_path / "x.npy"),
    ):
        z = sae.encode(given)
        assert isinstance(z, np.ndarray) and z.dtype == np.float32
        assert np.allclose(z, wanted, atol=1e-6)  # the order of a sum may depend on where in memory its rows begin
    assert np.allclose(sae.encode(X.numpy(), k=2), sae.encode(X, k=2), atol=1e-6)
    assert np.allclose(sae.decode(wanted.numpy()), sae.decode(wanted), atol=1e-5)


def test_a_single_vector_gives_a_single_row_of_activations():
    sae = make()
    assert sae.encode(X[3]).shape == (48,) and sae.encode(X[3].numpy()).shape == (48,)
    assert torch.allclose(
        sae.encode(X[3]), sae.encode(X)[3], atol=1e-6
    )  # a product of one row may sum in another order
    assert sae.decode(sae.encode(X[3])).shape == (12,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 13)), "width 13, but this SAE reads width 12"),
        (np.zeros((2, 3, 12)), r"shape \(2, 3, 12\); give rows, \(n, 12\)"),
        (torch.tensor(1.0), r"shape \(\); give rows"),
        (np.array([["a"] * 12]), "cannot be read as numbers"),
    ],
)
def test_what_cannot_be_encoded_is_one_line(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make().encode(given)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_decoded_or_is_a_store_of_another_width_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"shape \(2, 12\); this SAE has 48 latents"):
        make().decode(torch.zeros(2, 12))
    np.save(tmp_path / "x.npy", np.eye(13, dtype=np.float32))
    with pytest.raises(StoreError, match="13-dim embeddings, but this SAE reads 12-dim ones"):
        make().encode(tmp_path / "x.npy")


def test_its_repr_says_what_it_is():
    assert (
        repr(make(soft_cap=2.0)) == "SAE(matryoshka, 12 -> 48, levels 4 16 48, soft_cap 2, standardises image and text)"
    )
    assert repr(make("topk", encoder="owner/clip", encoder_revision="0123456789abcdef")) == (
        "SAE(topk, 12 -> 48, k 5, standardises image and text, embeddings of owner/clip at 0123456789ab)"
    )
    assert repr(SAE(SAEConfig(4, 8, kind="relu"))) == "SAE(relu, 4 -> 8, standardises nothing)"


def damage_json(folder):
    (folder / "sae.json").write_text("{")


def damage_key(folder):
    data = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps({**data, "kidn": "topk"}))


def damage_schema(folder):
    data = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps({**data, "schema_version": 99}))


def damage_size(folder):
    data = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps({**data, "d_sae": 64}))


def truncate_weights(folder):
    file = folder / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_weights(folder):
    (folder / "sae.safetensors").write_bytes(pickle.dumps({"W_dec": [1.0]}))


def remove_weights(folder):
    (folder / "sae.safetensors").unlink()


def nan_weights(folder):
    tensors = load_file(folder / "sae.safetensors")
    tensors["W_enc"][0, 0] = float("nan")
    save_file(tensors, folder / "sae.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_json, "not readable JSON"),
        (damage_key, "unknown setting 'kidn'; did you mean 'kind'"),
        (damage_schema, "schema version 99"),
        (damage_size, "do not belong together"),
        (truncate_weights, "damaged"),
        (pickle_weights, "damaged"),
        (remove_weights, "does not exist"),
        (nan_weights, "NaN or infinite values in W_enc"),
    ],
)
def test_a_damaged_sae_is_one_clear_line(damage, message, tmp_path):
    make().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(RunError, match=message) as caught:
        SAE.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_run_says_what_to_give(tmp_path):
    with pytest.raises(RunError, match="does not exist; give the folder that msae train"):
        SAE.load(tmp_path / "nowhere/deep/run")
    with pytest.raises(RunError, match=r"holds no sae\.json"):
        SAE.load(tmp_path)


def test_weights_are_float32_whatever_the_default_type_is(tmp_path):
    SAE(SAEConfig(4, 8, kind="batchtopk", k=2)).save(tmp_path)
    SAE(SAEConfig(4, 8, kind="jumprelu", k=2)).save(tmp_path / "jump")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = [SAE.load(tmp_path), SAE.load(tmp_path / "jump")]
    finally:
        torch.set_default_dtype(before)
    assert {tensor.dtype for sae in loaded for tensor in sae.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_sae_that_is_not_finite_is_not_saved(value, tmp_path):
    make().save(tmp_path)
    before = (tmp_path / "sae.safetensors").read_bytes()
    broken = make()
    with torch.no_grad():
        broken.b_enc[3] = value
    with pytest.raises(RunError, match="b_enc has NaN or infinite values, so this SAE is not saved"):
        broken.save(tmp_path)
    assert (tmp_path / "sae.safetensors").read_bytes() == before
