"""Where in a picture a concept is: against a slow oracle, on pictures whose truth is known, and where it cannot be."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import msae
from msae.base.errors import ConfigError, EmbedderError, StoreError
from msae.concepts.regions import Locator, OneLatent, Region, regions_in, strengths
from msae.data import embedder as embedders
from msae.data.embedder import Embedder
from msae.data.store import StorePart, write_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from msae.sae.view import View
from msae.web.overlay import as_svg, draw_on, outline_of
from msae.world import drawing
from msae.world.scenes import PLACE_STREAM, UNSEEN_SEEDS, Draws, sample_scene
from tests.oracles import regions as oracle
from tests.tiny_clip import make_encoder

KINDS = ("clip", "siglip", "siglip2")


class Group:
    """Some latents with weights."""

    def __init__(self, latents, reader):
        self.latents, self.reader = tuple(latents), torch.tensor(reader)


def pictures(n, *, sizes=((40, 32), (32, 48), (64, 64)), seed=0):
    rng = np.random.default_rng(seed)
    shapes = [sizes[i % len(sizes)] for i in range(n)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in shapes]


@pytest.fixture(scope="module", params=KINDS)
def loaded(request, tmp_path_factory):
    return Embedder.load(
        make_encoder(tmp_path_factory.mktemp(request.param), request.param), device="cpu", dtype="float32"
    )


def view_of(embedder, folder, *, d_sae=6, **config):
    """An SAE with random weights on the embeddings of a few pictures, which it standardises."""
    folder.mkdir(exist_ok=True)
    names = []
    for i, picture in enumerate(pictures(8, seed=1)):
        names.append(f"{i}.png")
        picture.save(folder / names[-1])
    x = embedder.embed_images(pictures(8, seed=1))
    table = pa.table({"id": list(map(str, range(8))), "image_path": names})
    record = {"encoder": embedder.id, "encoder_revision": embedder.revision}
    store = write_store(folder / "a.store", [StorePart({"image": x}, table)], record=record)
    known = fit_statistics(lambda: [torch.from_numpy(x)])
    sae = SAE(
        SAEConfig(d_in=embedder.d_in, d_sae=d_sae, **{"levels": (d_sae,), **config}), Standardizer({"image": known})
    )
    with torch.no_grad():
        sae.b_enc.uniform_(-0.1, 0.1)
        sae.b_dec.uniform_(-0.5, 0.5)
    return View(sae, store, "image", inference="relu")


def test_contributions_are_those_of_the_whole_tower_with_all_layers(loaded, tmp_path):
    view = view_of(loaded, tmp_path)
    shown, latents = pictures(3), [OneLatent(0), OneLatent(4)]
    found = regions_in(shown, view, loaded, latents)
    first = 1 if loaded._model.config.model_type == "clip" else 0
    for picture, regions in zip(shown, found, strict=True):
        inputs = loaded.pixels([picture])
        for concept, region in zip(latents, regions, strict=True):

            def value(x, latent=concept.latent):
                s = view.sae.standardizer.statistics["image"]
                return ((x - s.mean) * s.scale - view.sae.b_dec) @ view.sae.W_enc[:, latent] + view.sae.b_enc[latent]

            wanted = oracle.contributions(
                loaded._model, inputs, value, layer=-embedders.DEPTH, steps=embedders.STEPS, first=first,
                n_patches=region.patches.size,
            )  # fmt: skip
            scale = np.abs(wanted).max()
            assert scale > 1e-3
            assert np.allclose(region.patches.ravel() / scale, np.array(wanted) / scale, atol=1e-4)  # float32


def test_contributions_sum_to_what_the_patches_change(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(embedders, "STEPS", 200)
    view, shown = view_of(loaded, tmp_path), pictures(2)
    (one, other), first = regions_in(shown, view, loaded, [OneLatent(2)]), 0 if loaded._is_siglip else 1
    for picture, (region,) in zip(shown, (one, other), strict=True):
        inputs, n = loaded.pixels([picture]), region.patches.size

        def to_mean(hidden, n=n):
            hidden = hidden.clone()
            hidden[0, first : first + n] = hidden[0, first : first + n].mean(0)
            return hidden

        with torch.no_grad():
            x, _ = oracle.features_with(loaded._model, inputs, -embedders.DEPTH, lambda hidden: hidden)
            bare, _ = oracle.features_with(loaded._model, inputs, -embedders.DEPTH, to_mean)
            change = view.sae.pre_activations(view.standardize(x)) - view.sae.pre_activations(view.standardize(bare))
        assert region.patches.sum() == pytest.approx(float(change[0, 2]), rel=0.02)  # the midpoint rule's error


def test_a_picture_alone_has_the_region_that_it_has_among_others(loaded, tmp_path):
    view, shown = view_of(loaded, tmp_path), pictures(3)
    together = regions_in(shown, view, loaded, [OneLatent(1)])
    for picture, (region,) in zip(shown, together, strict=True):
        ((alone,),) = regions_in([picture], view, loaded, [OneLatent(1)])
        assert alone.size == picture.size and np.allclose(alone.patches, region.patches, atol=1e-4)


def test_nothing_of_the_first_blocks_is_kept_for_gradients(loaded, tmp_path):
    view, seen = view_of(loaded, tmp_path), []
    block = loaded._model.vision_model.encoder.layers[0]
    for module in (loaded._model.vision_model.embeddings, *block.modules()):
        module.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    embedders_depth = embedders.DEPTH
    try:
        embedders.DEPTH = 1  # the tiny towers have two blocks
        regions_in(pictures(1), view, loaded, [OneLatent(1)])
    finally:
        embedders.DEPTH = embedders_depth
    assert seen and not any(seen)


def test_a_group_is_the_weighted_sum_of_its_latents_that_fire(loaded, tmp_path):
    view, shown = view_of(loaded, tmp_path), pictures(1)
    z = view.activate(view.standardize(torch.from_numpy(loaded.embed_images(shown))))[0]
    fires = [int(i) for i in (z > 0).nonzero()[:2, 0]]
    silent = int((z == 0).nonzero()[0, 0])
    ((one, other, quiet, all_, none),) = regions_in(
        shown, view, loaded,
        [*map(OneLatent, [*fires, silent]), Group([*fires, silent], [0.5, 2.0, 7.0]), Group([silent], [7.0])],
    )  # fmt: skip
    assert np.allclose(all_.patches, 0.5 * one.patches + 2 * other.patches, atol=1e-4)
    assert np.allclose(none.patches, 7 * quiet.patches, atol=1e-3)


def test_strengths_read_standardised_embeddings_of_unit_length(loaded, tmp_path):
    view = view_of(loaded, tmp_path)
    x = torch.from_numpy(view.store.take(np.arange(3), "image"))
    h = view.sae.pre_activations(view.standardize(x))
    assert torch.allclose(strengths(view, x, [OneLatent(3), OneLatent(0)])(x), h[:, [3, 0]], atol=1e-5)


def test_strengths_have_the_scale_of_the_activations(loaded, tmp_path):
    view = view_of(loaded, tmp_path, level_scales=True)
    view.sae.log_level_scales.data.fill_(0.7)
    x = torch.from_numpy(view.store.take(np.arange(8), "image"))
    z = view.activate(view.standardize(x))[:, 3]
    assert (z > 0).any()
    assert torch.allclose(strengths(view, x, [OneLatent(3)])(x)[z > 0, 0], z[z > 0], atol=1e-5)


def test_a_topk_latent_that_loses_against_others_still_has_a_region(tmp_path):
    embedder = Embedder.load(make_encoder(tmp_path / "clip"), device="cpu", dtype="float32")
    view = View(
        view_of(embedder, tmp_path / "s", kind="topk", k=1, levels=None).run, tmp_path / "s" / "a.store", "image"
    )
    ((*regions,),) = regions_in(pictures(1), view, embedder, [OneLatent(i) for i in range(6)])
    assert all(np.abs(region.patches).max() > 0 for region in regions)


# --- What a region says


def region(patches, *, seen=(0, 0, 1, 1), size=(90, 60)):
    return Region(np.array(patches, dtype=np.float32), seen, size)


def test_the_region_is_the_fewest_patches_with_half_of_what_speaks_for_the_concept():
    one = np.zeros((5, 5))
    one[2, 2] = 16
    found = region(one)
    assert found.smooth[1:4, 1:4].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]] and found.smooth.sum() == 16
    assert np.argwhere(found.inside).tolist() == [[1, 2], [2, 1], [2, 2]]  # 4 + 2 + 2 of 16
    assert not region([[-1, -2, 0]]).inside.any() and region([[-1, -2, 0]]).words == "nowhere"


@pytest.mark.parametrize(
    "row,column,words", [(0, 0, "upper left"), (1, 1, "middle"), (2, 1, "bottom"), (1, 2, "right")]
)
def test_words_say_in_which_ninth_of_the_picture_the_region_is(row, column, words):
    patches = np.zeros((3, 3))
    patches[row, column] = 1
    assert region(patches).words == words
    assert region(np.ones((3, 3))).words == "all over the picture"


def test_patches_lie_where_the_model_looked():
    cropped = region([[0, 1], [0, 0]], seen=(0.25, 0, 0.75, 1), size=(80, 40))
    assert [edges.tolist() for edges in cropped.edges] == [[20, 40, 60], [0, 20, 40]]
    assert cropped.strongest == (50, 10)


@pytest.mark.parametrize(
    "kind,seen", [("clip", (0.25, 0, 0.75, 1)), ("siglip", (0, 0, 1, 1)), ("siglip2", (0, 0, 1, 1))]
)
def test_each_encoder_says_which_part_of_a_picture_it_looks_at(tmp_path, kind, seen):
    loaded = Embedder.load(make_encoder(tmp_path / kind, kind), device="cpu", dtype="float32")
    assert loaded.seen(64, 32) == pytest.approx(seen)
    assert loaded.seen(32, 32) == pytest.approx((0, 0, 1, 1))


def test_the_outline_goes_around_the_region():
    one = region(np.zeros((2, 3)), size=(30, 20))
    vars(one)["inside"] = np.array([[False, False, False], [False, True, False]])
    assert sorted(outline_of(one)) == [(10, 10, 10, 20), (10, 10, 20, 10), (10, 20, 20, 20), (20, 10, 20, 20)]
    both = region(np.zeros((2, 3)), size=(30, 20))
    vars(both)["inside"] = np.array([[True, True, False], [False, False, False]])
    assert len(outline_of(both)) == 6, "no line between two patches inside"


def test_the_drawing_dims_what_is_outside_and_leaves_the_inside():
    one = region([[0, 0], [0, 1]], size=(40, 40))
    drawn = np.asarray(draw_on(Image.new("RGB", (40, 40), (200, 100, 50)), one))
    assert drawn[30, 30].tolist() == [200, 100, 50] and drawn[5, 5].max() < 100
    svg = as_svg(one)
    assert 'aria-label="what makes it fire: lower right"' in svg and 'viewBox="0 0 40 40"' in svg and "style" not in svg
    assert as_svg(None) is None


# --- The demo's world, whose truth is known


@pytest.fixture(scope="module")
def red(tmp_path_factory):
    """An SAE of one latent that reads red, the difference of two means, and a store of scenes."""
    folder = tmp_path_factory.mktemp("red")
    (folder / "images").mkdir()
    embedder = Embedder.load("demo", device="cpu", dtype="float32")
    scenes = [sample_scene(UNSEEN_SEEDS.start + 900_000 + i, count=2, relation="left of") for i in range(240)]
    shown = [drawing.draw(scene) for scene in scenes]
    x = embedder.embed_images(shown)
    is_red = np.array([any(thing.colour == "red" for thing in scene.objects) for scene in scenes])
    names = [f"images/{i}.png" for i in range(len(scenes))]
    for name, picture in zip(names, shown, strict=True):
        picture.save(folder / name)
    labels = ["red" if one else "other" for one in is_red]
    table = pa.table({"id": [str(scene.seed) for scene in scenes], "image_path": names, "label": labels})
    record = {"encoder": "demo", "encoder_revision": embedder.revision}
    store = write_store(folder / "scenes.store", [StorePart({"image": x}, table)], record=record)
    known = fit_statistics(lambda: [torch.from_numpy(x)])
    sae = SAE(SAEConfig(d_in=128, d_sae=2, levels=(2,), encoder="demo"), Standardizer({"image": known}))
    with torch.no_grad():
        direction = torch.from_numpy(x[is_red].mean(0) - x[~is_red].mean(0))
        sae.W_enc[:, 0] = direction / direction.norm()
        sae.W_dec[0] = direction / direction.norm()
    sae.save(folder / "run")
    return folder, store, scenes


def test_red_is_found_in_the_red_object(red):
    folder, store, scenes = red
    both = [len({thing.colour for thing in scene.objects}) == 2 for scene in scenes]
    rows = [i for i, scene in enumerate(scenes) if both[i] and any(thing.colour == "red" for thing in scene.objects)]
    regions = Locator(View(folder / "run", store, "image")).regions(rows, OneLatent(0))
    hits = []
    for row, found in zip(rows, regions, strict=True):
        draws = Draws(scenes[row].seed, PLACE_STREAM)
        draws.uniform(0, 1), draws.chance(0.5)  # of the background
        places = drawing._places(scenes[row], draws)
        (x, y, radius) = next(p for p, thing in zip(places, scenes[row].objects, strict=True) if thing.colour == "red")
        hits.append(np.hypot(found.strongest[0] - x, found.strongest[1] - y) <= 1.1 * radius)
    assert len(hits) > 30 and np.mean(hits) > 0.9  # a patch drawn at random: .09


def test_a_gallery_says_where(red, tmp_path):
    from msae.web.report.sheet import write_sheet

    folder, store, _ = red
    shown = msae.gallery(folder / "run", store, latent=0, n=4, regions=True)
    assert all(image.region.patches.shape == (8, 8) for image in shown.images)
    assert f"· {shown.images[0].region.words}" in shown.to_text()
    record = json.loads(json.dumps(shown.to_json()))["images"][0]["region"]
    assert record["where"] == shown.images[0].region.words and np.shape(record["patches"]) == (8, 8)
    assert "region" not in msae.gallery(folder / "run", store, latent=0, n=1).to_json()["images"][0]
    write_sheet(shown, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count('<svg class="region"') == 4 and page.count('type="checkbox" checked') == 1
    write_sheet(shown, tmp_path / "a.png")
    write_sheet(msae.gallery(folder / "run", store, latent=0, n=4), tmp_path / "b.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).mean() < np.asarray(Image.open(tmp_path / "b.png")).mean()


def test_a_report_shows_regions_that_a_box_switches_off_without_a_script(red):
    folder, store, _ = red
    made = msae.report(folder / "run", store)
    page = made.path.read_text()
    assert page.count('<svg class="region"') == page.count('<small class="place">') > 0 and "<script" not in page
    assert page.count('<label class="switch"><input type="checkbox" checked>') == 1
    assert "regions" not in {missing.section for missing in made.missing}


def test_the_strongest_cases_of_an_audit_have_regions(red, tmp_path):
    from msae.data.thumbnails import Album
    from msae.web.report.audit import cases, section, write_html

    folder, store, _ = red
    audited = msae.audit(folder / "run", store, "label", names={"red": [0]}, n_permutations=50)
    locator = Locator(View(folder / "run", store, "image"))
    shown = [
        one
        for _, side in cases(audited, audited["red"], store, Album(store.picture_roots, 64), locator)
        for one in side
    ]
    assert shown and all(region.patches.shape == (8, 8) for _, _, region in shown)
    write_html(audited, tmp_path / "a.html", folder / "run")
    page = (tmp_path / "a.html").read_text()
    n = page.count('<svg class="region"')
    assert n == page.count('<small class="place">') and (n > 0) == ('class="cases"' in page) == bool(audited.shown)
    if audited.shown:
        assert "Regions of the pictures cannot be shown: gone." in section(audited, store=store, why="gone")


def test_a_picture_that_is_gone_is_counted(red, tmp_path):
    folder, _, _ = red
    other = shutil.copytree(folder, tmp_path / "moved")
    first = msae.gallery(other / "run", other / "scenes.store", latent=0, n=3)
    (other / first.images[1].path).unlink()
    shown = msae.gallery(other / "run", other / "scenes.store", latent=0, n=3, regions=True)
    assert [image.region is None for image in shown.images] == [False, True, False]
    assert "1 of the 3 pictures cannot be read, so they have no regions" in shown.notes


def test_why_there_is_no_region_is_one_line(red, tmp_path):
    folder, store, _ = red
    x = store.take(np.arange(8), "image")
    bare = write_store(tmp_path / "bare.store", [StorePart({"image": x}, pa.table({"id": list("abcdefgh")}))])
    with pytest.raises(ConfigError, match=r"bare\.store lists no pictures") as err:
        msae.gallery(folder / "run", bare, latent=0, regions=True)
    assert "\n" not in str(err.value)
    table = pa.table({"id": list("abcdefgh"), "image_path": [f"{i}.jpg" for i in range(8)]})
    gone = {"encoder": str(tmp_path / "gone"), "encoder_revision": "0" * 64}
    real = write_store(tmp_path / "real.store", [StorePart({"image": x}, table)], record=gone)
    sae = SAE.load(folder / "run")
    plain = SAE(SAEConfig(d_in=128, d_sae=2, levels=(2,)), sae.standardizer)
    with pytest.raises((EmbedderError, StoreError), match="encoder") as err:
        msae.gallery(plain, real, latent=0, regions=True)
    assert "\n" not in str(err.value)
