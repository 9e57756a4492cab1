"""The encoder of a store and an SAE: the recorded weights, or one line that says why not."""

import json
import shutil
import socket

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import msae
from msae.base.errors import ConfigError, EmbedderError, StoreError
from msae.data.embedder import Embedder, embedder_for, revision_of
from msae.data.store import StorePart, write_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from msae.web.explorer import offline
from msae.web.explorer.session import LoadedRun, World
from tests.tiny_clip import make_encoder

WORDS = ["a red cat", "two blue dog", "photo of the green dog"]
TEXTS = {"cat": "a red cat", "dog": "two blue dog"}


def load(folder):
    return Embedder.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {seed: make_encoder(folder / str(seed), seed=seed) for seed in (0, 1)}


@pytest.fixture
def encoder(encoders, tmp_path):
    """A folder of its own, for its weights are replaced."""
    return shutil.copytree(encoders[0], tmp_path / "clip")


def make_store(folder, embedder, **record):
    x = embedder.embed_texts(WORDS)
    made_by = {"encoder": embedder.id, "encoder_revision": embedder.revision, **record}
    table = pa.table({"id": ["a", "b", "c"], "caption": WORDS, "label": ["cat", "dog", "dog"]})
    return write_store(folder, [StorePart({"image": x, "text": x}, table)], record=made_by)


def make_run(folder, store, **config):
    known = {
        m: fit_statistics(lambda: [torch.from_numpy(store.take(np.arange(3), "image"))]) for m in ("image", "text")
    }
    SAE(SAEConfig(d_in=store.d_in, d_sae=4, levels=(4,), **config), Standardizer(known)).save(folder)
    return folder


def ways(run, store):
    """Everything that embeds words for a store and a run."""
    world = World([LoadedRun(run, "run", store)], store, None)
    classes = {"class_texts": TEXTS, "all_latents": True, "modality": "text", "n_permutations": 50}
    return {
        "search": lambda: msae.search(run, store, text=WORDS[0], modality="text", n=1).hits[0].score,
        "explorer": lambda: float(world.embed_text(WORDS[0]) @ store.take(np.array([0]), "text")[0]),
        "audit": lambda: msae.audit(run, store, "label", **classes).to_json()["classifier"]["accuracy"],
    }


@pytest.mark.parametrize("verb", ["search", "explorer", "audit"])
def test_replaced_weights_are_refused_by_everything_that_embeds(encoders, encoder, tmp_path, verb):
    store = make_store(tmp_path / "a.store", load(encoder))
    run = make_run(tmp_path / "run", store, encoder=str(encoder), encoder_revision=store.encoder_revision)
    assert ways(run, store)[verb]() == pytest.approx(1, abs=1e-3)
    shutil.copytree(encoders[1], encoder, dirs_exist_ok=True)
    with pytest.raises(
        StoreError, match=r"would be embedded by .*clip at \w{12}, but .*a\.store was embedded by"
    ) as err:
        ways(run, store)[verb]()
    assert "\n" not in str(err.value)


def test_replaced_weights_are_refused_where_the_sae_alone_says_its_encoder(encoders, encoder, tmp_path):
    made = make_store(tmp_path / "a.store", load(encoder))
    run = make_run(tmp_path / "run", made, encoder=str(encoder), encoder_revision=made.encoder_revision)
    store = write_store(tmp_path / "b.store", [StorePart({"text": made.take(np.arange(3), "text")}, made.metadata)])
    assert ways(run, store)["explorer"]() == pytest.approx(1, abs=1e-3)
    shutil.copytree(encoders[1], encoder, dirs_exist_ok=True)
    for verb in ("search", "explorer", "audit"):
        with pytest.raises(StoreError, match="but the SAE reads embeddings of"):
            ways(run, store)[verb]()


def test_words_are_embedded_on_the_device_that_is_named(encoder, tmp_path):
    store = make_store(tmp_path / "a.store", load(encoder))
    run = make_run(tmp_path / "run", store, encoder=str(encoder), encoder_revision=store.encoder_revision)
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):  # which have no values to read
        msae.search(run, store, text=WORDS[0], modality="text", device="meta")


def test_every_byte_of_the_weights_counts(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = np.zeros(3 << 20, np.uint8)
    weights.tofile(tmp_path / "model.safetensors")
    before = revision_of(tmp_path)
    weights[len(weights) // 2] = 1  # neither in the first nor in the last MB
    weights.tofile(tmp_path / "model.safetensors")
    assert revision_of(tmp_path) != before
    weights[len(weights) // 2] = 0
    weights.tofile(tmp_path / "model.safetensors")
    assert revision_of(tmp_path) == before


def test_a_store_that_an_earlier_version_made_is_searched_and_checked(encoders, encoder, tmp_path):
    embedder = load(encoder)
    earlier = revision_of(encoder, like="0" * 32)
    assert len(earlier) == 32 and len(embedder.revision) == 64
    store = make_store(tmp_path / "a.store", embedder, encoder_revision=earlier)
    run = make_run(tmp_path / "run", store, encoder=str(encoder), encoder_revision=earlier)
    assert ways(run, store)["search"]() == pytest.approx(1, abs=1e-3)
    shutil.copytree(encoders[1], encoder, dirs_exist_ok=True)
    with pytest.raises(StoreError, match="would be embedded by"):
        ways(run, store)["search"]()


def test_a_finished_store_of_an_earlier_version_is_recognised(encoder, tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n")
    monkeypatch.chdir(tmp_path)
    options = {"encoder": "clip", "out": tmp_path / "words.store", "device": "cpu", "dtype": "float32"}
    msae.embed("words.txt", **options)
    file = tmp_path / "words.store" / "store.json"
    record = {
        **json.loads(file.read_text()),
        "encoder": "clip",
        "encoder_revision": revision_of(encoder, like="0" * 32),
    }
    file.write_text(json.dumps(record))
    assert len(msae.embed("words.txt", **options)) == 3
    make_encoder(encoder, seed=1)
    with pytest.raises(StoreError, match="is already there, made of encoder revision"):
        msae.embed("words.txt", **options)


@pytest.fixture
def hub(encoders, tmp_path, monkeypatch):
    """The hub's cache with acme/clip: `main` has moved on from the commit aaaa to bbbb; there is no network."""
    import huggingface_hub

    folder = tmp_path / "hub"
    repo = folder / "models--acme--clip"
    for seed, commit in ((0, "a" * 40), (1, "b" * 40)):
        shutil.copytree(encoders[seed], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("b" * 40)
    (repo / "refs/v1").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repo


@pytest.mark.parametrize("verb", ["search", "explorer", "audit"])
def test_a_hub_model_is_loaded_at_the_recorded_commit(hub, tmp_path, verb):
    embedder = Embedder.load("acme/clip", device="cpu", dtype="float32", revision="v1")
    assert (embedder.id, embedder.revision) == ("acme/clip", "a" * 40)
    store = make_store(tmp_path / "a.store", embedder)
    run = make_run(tmp_path / "run", store, encoder="acme/clip", encoder_revision="a" * 40)
    assert ways(run, store)[verb]() == pytest.approx(1, abs=1e-3)
    shutil.rmtree(hub / "snapshots" / ("a" * 40))
    with pytest.raises(EmbedderError, match=r"'acme/clip' .* does not give it at aaaaaaaaaaaa"):
        ways(run, store)[verb]()


def test_a_relative_encoder_is_found_from_another_folder(encoder, tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = msae.embed("words.txt", encoder="clip", out=tmp_path / "words.store", device="cpu", dtype="float32")
    assert store.encoder == str(encoder) and Embedder.load("clip").id == str(encoder)
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = make_run(tmp_path / "run", make_store(tmp_path / "a.store", load(encoder)))
    assert msae.search(run, store, text=WORDS[1], n=1).hits[0].caption == WORDS[1]
    again = msae.embed(tmp_path / "words.txt", encoder="../clip", out=tmp_path / "words.store", dtype="float32")
    assert len(again) == 3  # the finished store, not an error


def test_a_folder_that_is_gone_is_named_and_not_asked_of_the_hub(encoder, tmp_path, monkeypatch):
    store = make_store(tmp_path / "a.store", load(encoder), encoder="clip")  # as earlier versions recorded it
    monkeypatch.chdir(tmp_path / "a.store")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(EmbedderError, match=r"encoder clip is not here, which --text needs; give --encoder"):
        msae.search(make_run(tmp_path / "run", store), store, text="a cat")


def test_nothing_that_names_an_encoder_is_an_error():
    with pytest.raises(ConfigError, match="says which encoder made the embeddings, which words needs"):
        embedder_for(None, SAEConfig(d_in=4, d_sae=4, levels=(4,)), need="words")


def without_pad_token(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    return folder


def test_a_clip_tokenizer_without_a_pad_token_embeds_as_one_with_it(encoders, encoder):
    wanted, found = load(encoders[0]), load(without_pad_token(encoder))
    assert found.d_in == 16
    np.testing.assert_allclose(found.embed_texts(WORDS), wanted.embed_texts(WORDS), atol=1e-6)
    assert found.count_truncated(WORDS) == 0


def test_a_siglip_tokenizer_without_a_pad_token_embeds_pictures(tmp_path):
    make_encoder(tmp_path / "siglip", kind="siglip")
    pictures = [Image.new("RGB", (32, 32), "red")]
    wanted = load(tmp_path / "siglip").embed_images(pictures)
    found = load(without_pad_token(tmp_path / "siglip"))
    assert found.d_in == 16 and np.array_equal(found.embed_images(pictures), wanted)
    with pytest.raises(EmbedderError, match="has no pad token, so no text can be embedded"):
        found.embed_texts(WORDS)


def test_the_explorer_asks_no_other_machine_whatever_was_imported_before(encoder, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def no_network(*where, **_):
        asked.append(where)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    store = make_store(tmp_path / "a.store", load(encoder), encoder="acme/clip", encoder_revision="a" * 40)
    world = World([LoadedRun(make_run(tmp_path / "run", store), "run", store)], store, None)
    with pytest.raises(EmbedderError, match="'acme/clip'"):
        world.embed_text("a cat")
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with offline():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        with pytest.raises(EmbedderError, match="'acme/clip'"):
            Embedder.load("acme/clip")
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE and asked == []
