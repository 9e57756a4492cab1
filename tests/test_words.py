"""The words that come with msae, or one's own: embedded once, by the run's encoder, as the mean of their prompts."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from msae.base.errors import ConfigError, EmbedderError, MsaeError, StoreError
from msae.concepts import words as module
from msae.concepts.naming import name
from msae.concepts.words import PROMPTS, SHIPPED, embedded_words, shipped_words, words_in
from msae.data.embedder import Embedder
from msae.sae.model import SAE, SAEConfig
from msae.sae.run import Run
from msae.sae.standardize import Standardizer, fit_statistics
from tests.tiny_clip import make_encoder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "msae" / "words"


def sae_of(encoder, d_in, revision=None):
    torch.manual_seed(0)
    rows = torch.randn(64, d_in)
    config = SAEConfig(d_in, 32, kind="relu", encoder=str(encoder), encoder_revision=revision)
    return SAE(config, Standardizer().with_statistics("image", fit_statistics(lambda: [rows])))


@pytest.fixture
def tiny(tmp_path):
    return make_encoder(tmp_path / "clip")


def test_the_words_that_come_with_msae_are_some_ten_thousand_and_say_where_they_are_from():
    words = shipped_words()
    assert 9_000 <= len(words) <= 12_000
    assert len({word.casefold() for word in words}) == len(words)
    assert all(word == " ".join(word.split()) for word in words)
    wanted = {
        "T-shirt", "giraffe", "coffee mug", "white", "printed", "striped", "wooden", "furry", "round", "kitchen",
        "running", "watercolor", "gloomy", "pink", "denim", "woman", "orchid", "lagoon",
    }  # fmt: skip
    assert wanted - set(words) == set()
    file = module.files("msae.concepts").joinpath("words.txt").read_text(encoding="utf-8")
    assert "Open English WordNet" in file[:400] and "CC BY 4.0" in file[:400] and len(file) < 300_000


def test_a_word_is_the_mean_of_its_prompts(tiny, tmp_path):
    (tmp_path / "own.txt").write_text("red cat\nblue dog\n\nRed  Cat\ntwo\n")
    store = embedded_words(Run.open(sae_of(tiny, 16)), tmp_path / "own.txt")
    assert list(store.column("word")) == ["red cat", "blue dog", "two"]
    embedder = Embedder.load(tiny)
    used = [prompt for prompt in PROMPTS if embedder.is_known([prompt.format("")])[0]]
    assert used == ["{}", "a photo of {}"]  # the tiny tokenizer knows no "picture" and no "image"
    by_hand = np.mean([embedder.embed_texts([prompt.format("blue dog")])[0] for prompt in used], axis=0)
    # float16 on disk
    assert store.take(np.array([1]), "text")[0] == pytest.approx(by_hand / np.linalg.norm(by_hand), abs=1e-3)


def test_words_are_embedded_once_for_an_encoder_and_never_into_a_store(tiny, tmp_path, cache, monkeypatch):
    (tmp_path / "own.txt").write_text("red cat\nblue dog\n")
    revision = Embedder.load(tiny).revision
    run = Run.open(sae_of(tiny, 16, revision))
    first = embedded_words(run, tmp_path / "own.txt")
    assert [path.name for path in cache.iterdir()] == [first.path.name]
    monkeypatch.setattr(module, "embedder_for", lambda *_, **__: pytest.fail("the encoder was loaded again"))
    assert embedded_words(run, tmp_path / "own.txt").fingerprint == first.fingerprint
    monkeypatch.undo()


def test_other_words_and_another_encoder_are_embedded_anew(tiny, tmp_path):
    (tmp_path / "own.txt").write_text("red cat\nblue dog\n")
    first = embedded_words(Run.open(sae_of(tiny, 16)), tmp_path / "own.txt")
    other = embedded_words(Run.open(sae_of(make_encoder(tmp_path / "b", seed=1), 16)), tmp_path / "own.txt")
    (tmp_path / "own.txt").write_text("red cat\nblue cat\n")
    third = embedded_words(Run.open(sae_of(tiny, 16)), tmp_path / "own.txt")
    assert len({store.fingerprint for store in (first, other, third)}) == 3


def test_words_that_the_encoder_does_not_know_are_left_out_and_counted(tiny, tmp_path):
    (tmp_path / "own.txt").write_text("red\ngiraffe\nblue\ncat\n")
    names = name(sae_of(tiny, 16), words=tmp_path / "own.txt")
    assert names.record["n_words"] == 3 and names.record["n_unknown_words"] == 1
    assert any("1 of 4 words" in line for line in names.summary())


def test_a_run_is_named_without_any_words_given():
    names = name(sae_of("demo", 128))
    assert names.record["vocabulary"] == SHIPPED
    assert {near.word for latent in names.nearest_words for near in latent} <= set(shipped_words())
    assert names.record["n_words"] > 20
    assert names.record["n_words"] + names.record["n_unknown_words"] == len(shipped_words())


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
def test_own_words_are_read_from_lines_and_from_tables(tmp_path, suffix):
    file = tmp_path / f"words{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"word": ["red", "blue"], "n": [1, 2]}), file)
    else:
        file.write_text("red\nblue\n" if suffix == ".txt" else "n,word\n1,red\n2,blue\n")
    assert words_in(file) == ["red", "blue"]


def test_lists_without_words_are_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("n,m\n1,2\n")
    with pytest.raises(ConfigError, match=r"a.csv has no column word, text, name, caption \(it has n, m\)"):
        words_in(tmp_path / "a.csv")
    (tmp_path / "b.txt").write_text("red\n\nRED\n")
    with pytest.raises(ConfigError, match=r"b.txt holds 1 words; a name needs at least two"):
        words_in(tmp_path / "b.txt")
    with pytest.raises(ConfigError, match=r"none.txt cannot be read as a list of words"):
        words_in(tmp_path / "none.txt")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"c.txt cannot be read as a list of words"):
        words_in(tmp_path / "c.txt")


def test_where_the_encoder_cannot_be_loaded_a_line_says_what_to_give_instead(tmp_path):
    for sae, error, found in (
        (sae_of(tmp_path / "gone", 16), EmbedderError, "gone"),
        (SAE(SAEConfig(16, 32, kind="relu"), sae_of("demo", 16).standardizer), ConfigError, "which encoder made"),
    ):
        with pytest.raises(error, match=found) as caught:
            name(sae)
        assert "or give words that are embedded already with --vocabulary STORE" in str(caught.value)


def test_another_width_and_two_lists_are_one_line(tiny, tmp_path):
    (tmp_path / "own.txt").write_text("red\nblue\n")
    with pytest.raises(StoreError, match="makes embeddings of 16 numbers, but the relu SAE reads 24"):
        name(sae_of(tiny, 24), words=tmp_path / "own.txt")
    with pytest.raises(MsaeError, match="--words and --vocabulary both give the words"):
        name(sae_of(tiny, 16), "words.store", words=tmp_path / "own.txt")
