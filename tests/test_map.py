"""Places of latents on a plane, and the page that shows them."""

import hashlib
import importlib.util
import json
from urllib.parse import urlencode

import numpy as np
import pytest
import torch

from msae.base.errors import ConfigError
from msae.concepts import places
from msae.concepts.places import Places, method_for, place, places_of
from msae.sae.model import SAE, SAEConfig
from msae.sae.run import Run
from msae.web.explorer import map as map_page
from msae.web.explorer.app import VENDOR, Explorer
from msae.web.explorer.session import open_world

HAS_UMAP = importlib.util.find_spec("umap") is not None
VENDORED = {
    "graphology.umd.min.js": "dc337efa23903f61e064c8e7e7f93a429e6855dccfc2458802b4ed30c621c087",
    "sigma.min.js": "58e30383ab428f832068d9d16a5215c65ba12430d438ed091c5703f398de9e16",
}


def an_sae(d_in=16, d_sae=96, seed=0):
    sae = SAE(SAEConfig(d_in=d_in, d_sae=d_sae, kind="topk", k=8))
    rng = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=rng), dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
    return sae


@pytest.fixture
def run(tmp_path):
    an_sae().save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def world(run, tmp_path):
    x = np.random.default_rng(1).normal(size=(200, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return open_world([run], tmp_path / "x.npy")


def test_pca_is_scikit_learns(run):
    from sklearn.decomposition import PCA

    rows = SAE.load(run).W_dec.detach().numpy()
    found, theirs = place(rows, "pca"), PCA(2).fit(rows)
    expected = theirs.transform(rows)
    for axis in (0, 1):
        assert abs(np.corrcoef(found.xy[:, axis], expected[:, axis])[0, 1]) == pytest.approx(1, abs=1e-4)
    assert found.explained == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-4)
    assert found.xy.min() == 0 and found.xy.max() == 1


def test_places_do_not_depend_on_the_length_of_a_row():
    rows = np.random.default_rng(0).normal(size=(80, 8))
    scale = np.random.default_rng(1).uniform(0.5, 2, (80, 1))
    assert np.allclose(place(rows, "pca").xy, place(rows * scale, "pca").xy, atol=1e-5)


@pytest.mark.skipif(not HAS_UMAP, reason="umap-learn is not installed")
def test_umap_keeps_groups_of_rows_together_and_makes_the_same_bits_twice():
    rng = np.random.default_rng(0)
    group = np.arange(240) % 6
    rows = rng.normal(size=(6, 32))[group] + 0.2 * rng.normal(size=(240, 32))
    found = place(rows, "umap")
    distance = np.linalg.norm(found.xy[:, None] - found.xy[None], axis=2) + np.eye(240) * 9
    assert (group[distance.argsort(1)[:, :5]] == group[:, None]).mean() > 0.99
    assert np.array_equal(found.xy, place(rows, "umap").xy)


def test_places_are_kept_and_made_again_for_other_weights_or_from_a_damaged_file(run, monkeypatch):
    made = []
    monkeypatch.setattr(places, "method_for", lambda _: "pca")
    original = places.place
    monkeypatch.setattr(places, "place", lambda *a: made.append(1) or original(*a))
    first = places_of(run)
    again = places_of(run)
    assert len(made) == 1 and np.array_equal(first.xy, again.xy)
    assert (first.method, first.explained) == (again.method, again.explained)
    file = run / "map" / places.FILE
    file.write_bytes(file.read_bytes()[:60])
    assert np.array_equal(places_of(run).xy, first.xy) and len(made) == 2
    an_sae(seed=1).save(run)
    assert not np.array_equal(places_of(Run.open(run)).xy, first.xy) and len(made) == 3


def test_what_pca_placed_is_placed_again_once_umap_is_there_and_not_the_other_way(run, monkeypatch):
    monkeypatch.setattr(places, "method_for", lambda _: "pca")
    places_of(run)
    made = []

    def as_umap(rows, method):
        made.append(method)
        return Places("umap", np.zeros((len(rows), 2), np.float32), 1.0)

    monkeypatch.setattr(places, "place", as_umap)
    monkeypatch.setattr(places, "method_for", lambda _: "umap")
    assert places_of(run).method == "umap" and made == ["umap"]
    monkeypatch.setattr(places, "method_for", lambda _: "pca")
    assert places_of(run).method == "umap" and made == ["umap"]


def test_few_latents_are_placed_by_pca():
    assert method_for(places.MIN_FOR_UMAP - 1) == "pca" and method_for(5000) == ("umap" if HAS_UMAP else "pca")


# --- The page


def test_every_latent_that_fires_has_one_point_and_its_classes(world):
    run = world.first
    found = map_page.places(run)
    rate = run.samples["image"].firing_rate
    assert found["latents"] == np.flatnonzero(rate > 0).tolist()
    assert np.allclose(np.stack([found["x"], found["y"]], 1), run.places.xy[found["latents"]], atol=1e-5)
    for latent, rated, level in zip(found["latents"], found["classes"]["rate"], found["classes"]["level"], strict=True):
        assert rated == sum(rate[latent] >= edge for edge in map_page.RATES)
        within = run.samples["image"].level_profile[latent] >= 0.5
        assert level == list(within).index(True)
    assert "modality" not in found["classes"]
    json.dumps(found)


def test_the_list_has_the_latents_that_fit_and_says_their_classes_in_words(world):
    explorer, run = Explorer(world), world.first
    latent = map_page.places(run)["latents"][5]
    part = explorer.show(urlencode({"page": "map", "words": f"#{latent}"}), "points")
    assert f'data-fits="{latent}"' in part and part.count("data-point=") == 1
    assert f"firing rate {map_page.scales(run)[0].classes[map_page.scales(run)[0].of[latent]]}" in part
    assert 'data-fits="all"' in explorer.show("page=map", "points")
    card = explorer.show(urlencode({"page": "map", "latent": latent}), "card")
    assert f"#{latent}" in card and f"page=concept&amp;latent={latent}" in card


def test_the_page_says_how_the_points_were_placed(world):
    said = map_page.places(world.first)["method"]
    assert ("UMAP" in said) if HAS_UMAP else ("principal components" in said and "pip install 'msae[map]'" in said)


def test_a_store_on_which_nothing_fires_is_one_line(run, tmp_path):
    sae = SAE.load(run)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    sae.save(run)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32))
    with pytest.raises(ConfigError, match="no latent fires on this store"):
        map_page.places(open_world([run], tmp_path / "x.npy").first)


def test_files_of_others_are_as_their_makers_published_them_and_need_no_eval():
    assert {file.name for file in VENDOR.glob("*.js")} == set(VENDORED)
    readme = (VENDOR / "README.md").read_text()
    for name, known in VENDORED.items():
        data = (VENDOR / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == known and name in readme and len(data) < 200_000
        assert (VENDOR / f"{name.split('.')[0]}.LICENSE.txt").read_text().strip()
        assert b"new Function" not in data and b"eval(" not in data
