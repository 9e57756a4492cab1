"""Galleries: the streamed answer is the brute-force one, whatever the store, its batches and its order."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from msae.base.errors import ConfigError, MsaeError, RunError, StoreError
from msae.cli import main
from msae.concepts.gallery import gallery, magnitudes
from msae.concepts.names import Concept, ConceptNames
from msae.concepts.samples import Origin, SampleMiner, TopSamples, bin_edges, top_samples
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE, SAEConfig
from msae.sae.run import Run
from msae.sae.standardize import Standardizer, Statistics, fit_statistics
from msae.sae.view import View
from tests.oracles import galleries as oracle

ORIGIN = Origin("somewhere", "f" * 40, "e" * 40, "a" * 32, "image", "trained", "run")
LEVELS = (4, 8, 32)


def mine(z, n, block=37):
    miner = SampleMiner(z.shape[1], n=n, levels=LEVELS)
    for first in range(0, len(z), block):
        miner.add(z[first : first + block])
    return miner.finish(ORIGIN, [f"row-{row}" for row in range(len(z))])


def sparse(n_rows, d_sae, seed=0, *, steps=None):
    """Activations, a tenth of them positive; with `steps`, of so few values that many are equal."""
    h = np.random.default_rng(seed).normal(-1.28, 1, (n_rows, d_sae)).astype(np.float32)
    z = np.maximum(h, 0) * np.float32(3)
    return z if steps is None else np.ceil(z * steps).astype(np.float32) / steps


@pytest.fixture
def store(tmp_path):
    """A store of both modalities with captions and labels."""
    rng = np.random.default_rng(1)
    import pyarrow as pa

    from msae.data.store import StorePart, write_store

    n = 120
    table = pa.table(
        {
            "id": [f"id-{i}" for i in range(n)],
            "image_path": [f"pictures/{i}.png" for i in range(n)],
            "caption": [f"picture {i}" for i in range(n)],
            "label": [float("nan") if i % 7 == 0 else float(i) for i in range(n)],
        }
    )
    rows = {m: rng.normal(shift, 1, (n, 8)).astype(np.float16) for m, shift in (("image", 1.0), ("text", -2.0))}
    return write_store(tmp_path / "pairs.store", [StorePart(rows, table)], shard_rows=50)


def make_sae(store, *modalities, d_sae=32, seed=3, kind="matryoshka", **options):
    standardizer = Standardizer()
    for m in modalities:
        known = fit_statistics(lambda m=m: (torch.from_numpy(x) for x in store.batches(m, 64)))
        standardizer = standardizer.with_statistics(m, known)
    if kind == "matryoshka":
        options = {"levels": LEVELS, **options}
    return SAE(SAEConfig(8, d_sae, kind=kind, **options), standardizer, seed=seed).eval()


@pytest.fixture
def run(tmp_path, store):
    make_sae(store, "image", "text").save(tmp_path / "run")
    return tmp_path / "run"


# the mining pass against the oracle


@pytest.mark.parametrize("steps", [None, 2], ids=["distinct", "ties"])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_streamed_top_samples_equal_the_brute_force_ones(n, steps):
    z = sparse(300, 32, steps=steps)
    samples = mine(z, n)
    rows = oracle.top_rows(z, n)
    np.testing.assert_array_equal(samples.rows, rows)
    np.testing.assert_array_equal(samples.activations, np.where(rows >= 0, z[rows, np.arange(32)[:, None]], 0))
    assert samples.ids == {row: f"row-{row}" for row in rows[rows >= 0].tolist()}


def test_statistics_equal_those_of_all_activations_at_once():
    z = sparse(300, 32)
    samples = mine(z, 4)
    np.testing.assert_array_equal(samples.firing_rate, (z > 0).mean(0))
    np.testing.assert_allclose(samples.mean, z.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_array_equal(samples.maximum, z.max(0))
    np.testing.assert_allclose(samples.level_profile, oracle.level_profile(z, LEVELS), rtol=1e-12)
    edges = bin_edges()
    np.testing.assert_array_equal(samples.histogram, [oracle.histogram(column, edges) for column in z.T])
    np.testing.assert_array_equal(samples.row_maxima, oracle.histogram(z.max(1), edges))


@pytest.mark.parametrize("block", [1, 64, 1000])
def test_size_of_blocks_changes_nothing(block):
    z = sparse(300, 32, steps=4)
    one, other = mine(z, 6), mine(z, 6, block)
    for field in dataclasses.fields(TopSamples):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_order_of_rows_changes_only_their_numbers():
    z = sparse(300, 32)  # no ties
    order = np.random.default_rng(5).permutation(300)
    one, other = mine(z, 6), mine(z[order], 6)
    np.testing.assert_array_equal(one.activations, other.activations)
    np.testing.assert_array_equal(one.rows[one.rows >= 0], order[other.rows][one.rows >= 0])
    np.testing.assert_array_equal(one.histogram, other.histogram)


def test_every_row_stronger_than_the_last_is_the_worst_case_and_still_right():
    z = np.linspace(0.1, 5, 400, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    assert mine(z, 3).rows.tolist() == [[399, 398, 397]] * 3


def test_latent_that_never_fires_has_no_samples_and_zero_statistics():
    z = sparse(100, 8)
    z[:, 2] = 0
    samples = mine(z, 3)
    assert samples.top(2) == []
    assert samples.firing_rate[2] == samples.mean_nonzero[2] == samples.quantiles()[2].sum() == 0
    assert samples.level_profile[2].tolist() == [0, 0, 0]


def test_rank_within_the_row_gives_the_level_profile():
    z = np.zeros((2, 32), np.float32)
    z[0, :6] = [6, 5, 4, 3, 2, 1]
    z[1, :2] = [1, 2]
    profile = mine(z, 1).level_profile
    assert profile[0].tolist() == [1, 1, 1] and profile[5].tolist() == [0, 1, 1]


def test_quantiles_are_within_a_sixteenth_of_the_exact_ones():
    z = sparse(5000, 6)
    found = mine(z, 2, block=512).quantiles((0.1, 0.5, 0.9, 0.99, 1.0))
    exact = [np.quantile(c[c > 0], (0.1, 0.5, 0.9, 0.99, 1.0), method="inverted_cdf") for c in z.T]
    np.testing.assert_allclose(found, exact, rtol=1 / 16)


def test_bins_are_a_sixteenth_of_an_octave_and_the_outer_ones_are_open():
    edges = bin_edges()
    assert edges[0] == 2**-8 and edges[-1] == 2**7 and edges[16] == 2**-7 and edges[24] == 1.5 * 2**-7
    samples = mine(np.array([[1e-6, 1e6]], np.float32), 1)
    assert samples.histogram[0, 0] == samples.histogram[1, -1] == 1
    assert samples.quantiles((1.0,))[:, 0] == pytest.approx([1e-6, 1e6])


# whole stores


@pytest.mark.parametrize("kind", ["matryoshka", "topk", "relu"])
def test_gallery_equals_encoding_the_store_and_sorting(store, kind):
    sae = make_sae(store, "image", "text", kind=kind, **({"k": 5} if kind == "topk" else {}))
    for modality in ("image", "text"):
        z = sae.encode(torch.from_numpy(store.take(np.arange(len(store)), modality)), modality).numpy()
        samples = top_samples(sae, store, modality=modality, n=4)
        np.testing.assert_array_equal(samples.rows, oracle.top_rows(z, 4))
        found = gallery(sae, store, latent=7, n=4)
        rows = [row for row in oracle.top_rows(z, 4)[7] if row >= 0]
        side = found.images if modality == "image" else found.texts
        assert [sample.id for sample in side] == [f"id-{row}" for row in rows]
        assert [sample.path for sample in side] == [f"pictures/{row}.png" for row in rows]
        assert [sample.caption for sample in side] == [f"picture {row}" for row in rows]
        assert [sample.activation for sample in side] == [z[row, 7] for row in rows]


def test_second_gallery_is_read_from_the_run_and_a_retrained_sae_is_mined_again(store, run, monkeypatch):
    first = gallery(run, store, latent=3, n=6)
    mined = []
    monkeypatch.setattr("msae.concepts.samples.SampleMiner", lambda *a, **k: (mined.append(1), SampleMiner(*a, **k))[1])
    assert gallery(run, store, latent=3, n=6) == first
    assert gallery(run, store, latent=3, n=2).images == first.images[:2]
    assert not mined
    gallery(run, store, latent=3, n=7)  # more than was kept
    assert len(mined) == 2
    make_sae(store, "image", "text", seed=9).save(run)
    gallery(run, store, latent=3, n=7)
    assert len(mined) == 4


def with_changed_row(store, row=60):
    """The store after one row was overwritten in place."""
    for file in sorted((store.path / "img_emb").iterdir()):
        x = np.load(file)
        if row < len(x):
            x[row] *= -1
            np.save(file, x)
            break
        row -= len(x)
    (store.path / "store.json").unlink()  # else the store is refused as damaged
    return EmbeddingStore.open(store.path)


def test_a_changed_row_is_mined_again(store, run):
    before = top_samples(run, store)
    after = top_samples(run, with_changed_row(store))
    np.testing.assert_array_equal(
        after.rows, top_samples(SAE.load(run), after_store := EmbeddingStore.open(store.path)).rows
    )
    assert not np.array_equal(before.rows, after.rows) and after.origin.fingerprint == after_store.fingerprint


def test_changed_ids_are_seen_without_mining_again(store, run, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = gallery(run, store, latent=3)
    for file in (store.path / "metadata").iterdir():
        table = pq.read_table(file)
        named = pa.array([f"new {id}" for id in table["id"].to_pylist()])
        pq.write_table(table.set_column(0, "id", named), file)
    changed = EmbeddingStore.open(store.path)
    monkeypatch.delattr("msae.concepts.samples.SampleMiner")
    for _ in range(2):
        again = gallery(run, changed, latent=3)
        assert [sample.id for sample in again.images] == [f"new {sample.id}" for sample in first.images]
        assert top_samples(run, changed).ids[again.images[0].row] == again.images[0].id


def test_a_run_that_cannot_be_written_has_its_samples_in_the_users_cache(store, run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (run / "samples").write_text("a file where a folder should be")
    first = gallery(run, store, latent=3)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    monkeypatch.delattr("msae.concepts.samples.SampleMiner")  # nothing is mined
    assert gallery(run, store, latent=3) == first


def test_where_nothing_can_be_written_a_gallery_is_made_each_time(store, run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in (tmp_path / "cache", run / "samples"):
        place.write_text("a file where a folder should be")
    assert gallery(run, store, latent=3) == gallery(run, store, latent=3)


def test_damaged_cache_is_mined_again(store, run):
    first = gallery(run, store, latent=3)
    for file in (run / "samples").iterdir():
        file.write_bytes(b"{}")
    assert gallery(run, store, latent=3) == first


def test_top_samples_survive_their_files(tmp_path):
    samples = mine(sparse(100, 16), 3)
    samples.save(tmp_path)
    (file,) = tmp_path.glob("*.json")
    loaded = TopSamples.load(file)
    for field in dataclasses.fields(TopSamples):
        np.testing.assert_array_equal(getattr(samples, field.name), getattr(loaded, field.name))
    assert json.loads(file.read_text())["schema_version"] == 2


def test_files_of_two_minings_are_refused(tmp_path):
    for folder, d_sae in (("a", 16), ("b", 8)):
        mine(sparse(100, d_sae), 3).save(tmp_path / folder)
    (file,) = (tmp_path / "a").glob("*.safetensors")
    file.write_bytes(next((tmp_path / "b").glob("*.safetensors")).read_bytes())
    with pytest.raises(RunError, match="do not belong together"):
        TopSamples.load(file.with_suffix(".json"))


def test_unknown_modality_is_standardised_by_the_store_and_says_so(store):
    known = make_sae(store, "image", "text")
    image_only = SAE(known.config, Standardizer({"image": known.standardizer.statistics["image"]}), seed=3).eval()
    found = gallery(image_only, store, latent=3)
    assert found.texts == gallery(known, store, latent=3).texts
    assert len(found.notes) == 1 and "no text statistics" in found.notes[0]
    assert "text" not in image_only.standardizer


def test_result_is_json_with_the_promised_keys(store, run):
    data = json.loads(json.dumps(gallery(run, store, latent=3).to_json(), allow_nan=False))
    assert {"latent", "name", "firing_rate", "images", "texts"} <= set(data)
    assert {"id", "activation"} <= set(data["images"][0])
    assert data["name"] is None and data["latent"] == 3


def test_store_without_metadata_answers_with_row_numbers(tmp_path, store):
    np.save(tmp_path / "plain.npy", store.take(np.arange(50), "image"))
    found = gallery(make_sae(store, "image"), tmp_path / "plain.npy", latent=1)
    assert found.texts == () and [s.id for s in found.images] == [str(s.row) for s in found.images]


def test_captions_with_newlines_and_repeated_ids_stay_with_their_rows(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "caption"], *([str(i // 2), f"line\n{i}"] for i in range(30))])
    store = EmbeddingStore.open(tmp_path / "x.npy")
    found = gallery(make_sae(store, "text"), store, latent=0)
    assert all(sample.caption == f"line\n{sample.row}" and sample.id == store.ids[sample.row] for sample in found.texts)


def test_magnitudes_are_the_histograms_of_all_latents_together(store):
    sae = make_sae(store, "image")
    z = torch.cat(list(View(sae, store, "image").activations())).numpy()
    found = magnitudes(top_samples(sae, store))
    np.testing.assert_array_equal(found.nonzero, oracle.histogram(z, found.edges))
    np.testing.assert_array_equal(found.row_maxima, oracle.histogram(z.max(1), found.edges))
    assert found.quantiles["nonzero"]["max"] == pytest.approx(z.max())


# names and the command line


@pytest.fixture
def named_run(run):
    found = [Concept(3, "poodle", 0.5, 0.1), Concept(5, "dog", 0.4, 0.1), Concept(9, "dog", 0.6, 0.1)]
    ConceptNames("evidence", 32, tuple(found)).save(run)
    return run


def test_concept_is_its_nearest_latent_and_the_others_are_told(store, named_run):
    found = gallery(named_run, store, concept="Dog")
    assert (found.latent, found.name, found.alike) == (9, "dog", (5,))
    assert found.images == gallery(named_run, store, latent=9).images
    assert gallery(named_run, store, latent=0).name is None


def test_names_of_other_weights_are_refused(store, run):
    other = make_sae(store, "image", "text", seed=9)
    record = {"sae": Run.open(run).weights}
    ConceptNames("evidence", 32, (Concept(3, "poodle", 0.5, 0.1),), record=record).save(run)
    assert gallery(run, store, latent=3).name == "poodle"
    other.save(run)
    with pytest.raises(RunError, match=r"names the latents of other weights .* type: msae name"):
        gallery(run, store, latent=3)


def test_unknown_concept_names_the_nearest(store, named_run):
    with pytest.raises(ConfigError, match="no latent is named 'poodel'; did you mean 'poodle'"):
        gallery(named_run, store, concept="poodel")


def msae(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return left.value.code, out.out, out.err


def test_command_line_prints_the_gallery_and_writes_json_and_sheets(tmp_path, store, named_run, capsys):
    sheets = [tmp_path / "sheet.png", tmp_path / "sheet.html"]
    for sheet in sheets:
        options = ("--concept", "dog", "--n", 3, "--sheet", sheet, "--json", tmp_path / "g.json")
        code, out, _ = msae(capsys, "gallery", named_run, "--on", store.path, *options)
        assert code == 0 and "latent 9: nearest word: dog  (also 5)" in out and "texts: fires on" in out
        assert sheet.stat().st_size > 1000
    data = json.loads((tmp_path / "g.json").read_text())
    assert len(data["images"]) == 3 and data["name"] == "dog" and data["images"][0]["id"] in out


def test_command_line_has_the_tree_and_the_magnitudes_as_text_and_json(store, named_run, capsys):
    code, out, _ = msae(capsys, "gallery", named_run, "--on", store.path, "--tree", "--k", 12)
    assert code == 0 and "counting the 12 strongest of each" in out
    code, out, _ = msae(capsys, "gallery", named_run, "--on", store.path, "--tree", "--json", "-")
    assert code == 0 and {"roots", "nodes", "k"} <= set(json.loads(out))
    code, out, _ = msae(capsys, "gallery", named_run, "--on", store.path, "--magnitudes")
    assert code == 0 and "image: non-zero" in out and "text: largest of each row" in out
    code, out, _ = msae(capsys, "gallery", named_run, "--on", store.path, "--magnitudes", "--json", "-")
    assert sum(json.loads(out)["image"]["row_maxima"]) <= len(store)


def test_command_line_says_in_one_line_what_is_wrong(store, run, capsys):
    code, out, err = msae(capsys, "gallery", run, "--on", store.path, "--latent", 99)
    assert code == 1 and out == "" and err.count("\n") == 1 and "latents 0 to 31" in err


# errors, one line each


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"latent": 32}, ConfigError, "no latent 32: this SAE has the latents 0 to 31"),
        ({"latent": -1}, ConfigError, "no latent -1"),
        ({"latent": 1, "n": 0}, ConfigError, "n is 0"),
        ({}, ConfigError, "either --latent I or --concept NAME"),
        ({"latent": 1, "concept": "dog"}, ConfigError, "either --latent I or --concept NAME"),
        ({"concept": "dog"}, ConfigError, "msae name .* first"),
    ],
)
def test_wrong_question_is_one_line(store, run, options, error, words):
    with pytest.raises(error, match=words) as caught:
        gallery(run, store, **options)
    assert "\n" not in str(caught.value)


def test_store_of_another_width_or_encoder_or_modality_is_refused(tmp_path, store, run):
    np.save(tmp_path / "wide.npy", np.ones((4, 9), np.float32))
    with pytest.raises(StoreError, match=r"holds 9-dim embeddings, but .* reads 8-dim"):
        gallery(run, tmp_path / "wide.npy", latent=0)
    np.save(tmp_path / "images.npy", store.take(np.arange(50), "image"))
    images = EmbeddingStore.open(tmp_path / "images.npy", modality="image")
    with pytest.raises(StoreError, match="has no text embeddings"):
        top_samples(run, images, modality="text")
    other = make_sae(store, "image", encoder="openai/other")
    with pytest.raises(StoreError, match=r"embedded by mine, but .* openai/other"):
        gallery(other, dataclasses.replace(images, record={"encoder": "mine"}), latent=0)


def test_names_of_another_sae_are_refused(tmp_path, store, run):
    shutil.copytree(run, tmp_path / "copy")
    file = tmp_path / "copy" / "names.json"
    ConceptNames("evidence", 5, (), {}, ((),) * 5).save(file)
    with pytest.raises(RunError, match=r"names 5 latents, but the SAE has .*; type: msae name"):
        gallery(tmp_path / "copy", store, latent=0)


def test_rows_that_are_all_the_same_need_the_sae_s_own_statistics(tmp_path, store):
    np.save(tmp_path / "same.npy", np.ones((4, 8), np.float32))
    with pytest.raises(MsaeError, match="the same vector"):
        gallery(SAE(SAEConfig(8, 32, kind="relu")), tmp_path / "same.npy", latent=0)
    sae = SAE(SAEConfig(8, 32, kind="relu"), Standardizer({"image": Statistics(torch.zeros(8), 1.0)}))
    assert gallery(sae, tmp_path / "same.npy", latent=0).notes == ()
