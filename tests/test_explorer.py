"""The explorer without a browser: pages are functions of an address, and its server gives nothing else away."""

import html
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from urllib.parse import unquote, urlencode, urlsplit

import numpy as np
import pytest

from msae import compare, find, search
from msae.base.errors import ConfigError, RunError, SourceError, StoreError
from msae.cli import main
from msae.use.audit import Audit
from tests.explorer_world import HOSTILE, make_world, served

pytest.importorskip("faiss", reason="faiss is not installed")

from msae.web.explorer import audit as audit_page
from msae.web.explorer import concept as concept_page
from msae.web.explorer import offline, standing
from msae.web.explorer import search as search_page
from msae.web.explorer.address import Address
from msae.web.explorer.app import MAX_UPLOAD, Explorer
from msae.web.explorer.catalogue import Catalogue
from msae.web.explorer.find import Picked
from msae.web.explorer.session import open_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def world(folder):
    return open_world([folder / "runs/named", folder / "runs/plain"], folder / "scenes.store")


@pytest.fixture(scope="module")
def explorer(world):
    return Explorer(world)


def show(explorer, part="", **values):
    return explorer.show(urlencode(values, doseq=True), part)


# --- Regions


def test_a_concept_page_shows_regions_when_its_address_says_so(explorer, world):
    latent = int(world.first.catalogue.select("", "", "-evidence")[0])
    plain = show(explorer, "image", page="concept", latent=latent)
    assert 'class="region"' not in plain and 'name="where"' in plain and "checked" not in plain
    found = show(explorer, "image", page="concept", latent=latent, where=1)
    n_pictures = found.count('<div class="looked"><img src=')
    assert n_pictures >= 10 and found.count('<svg class="region"') == n_pictures and "checked" in found
    assert found.count('aria-label="what makes it fire: ') == n_pictures == found.count('<small class="place">')
    assert "style=" not in found, "the pages' policy forbids styles in markup"
    whole = show(explorer, page="concept", latent=latent, where=1)  # shown at once, the regions follow
    assert 'id="part-image" data-load="image"' in whole and 'class="region"' not in whole


def test_regions_that_were_computed_are_kept(explorer, world, monkeypatch):
    latent = int(world.first.catalogue.select("", "", "-evidence")[0])
    first = show(explorer, "image", page="concept", latent=latent, where=1)
    monkeypatch.setattr(type(world.embedder()), "contributions", lambda *_: pytest.fail("computed again"))
    assert show(explorer, "image", page="concept", latent=latent, where=1) == first


@pytest.mark.parametrize("record,why", [({}, "neither the store nor the run says which encoder"),
                                        ({"encoder": "nobody/nothing-b32", "encoder_revision": "0" * 40},
                                         "encoder &#39;nobody/nothing-b32&#39; is no folder here")])  # fmt: skip
def test_a_page_without_the_encoder_says_in_one_line_why_there_are_no_regions(folder, tmp_path, record, why):
    import pyarrow as pa

    from msae.data.store import EmbeddingStore, StorePart, write_store
    from msae.sae.model import SAE, SAEConfig

    made = EmbeddingStore.open(folder / "scenes.store")
    parts = {"image": made.take(np.arange(20), "image")}
    pictures = [str(folder / "scenes" / path) for path in made.metadata.column("image_path").to_pylist()[20:40]]
    table = pa.table({"id": list(map(str, range(20))), "image_path": pictures})
    store = write_store(tmp_path / "a.store", [StorePart(parts, table)], record=record)
    trained = SAE.load(folder / "runs/named")
    sae = SAE(SAEConfig(d_in=128, d_sae=4, levels=(4,)), trained.standardizer)
    sae.save(tmp_path / "run")
    explorer = Explorer(open_world([tmp_path / "run"], store))
    found = show(explorer, "image", page="concept", latent=0, where=1)
    (line,) = [line for line in found.splitlines() if "Regions cannot be shown" in line]
    assert why in line and 'class="region"' not in found and found.count("<img src=") >= 4


def test_real_pictures_without_weights_say_why_they_have_no_regions(real_vectors, tmp_path):
    """Skips where the real vectors are not."""
    from msae.sae.model import SAE, SAEConfig
    from msae.sae.standardize import Standardizer, Statistics

    fashion = real_vectors.parent / "fashion-b32" / "image.npy"
    if not fashion.exists():
        pytest.skip(f"the pictures of clothes are not at {fashion}")
    import torch

    sae = SAE(SAEConfig(d_in=512, d_sae=8, levels=(8,)), Standardizer({"image": Statistics(torch.zeros(512), 20.0)}))
    sae.save(tmp_path / "run")
    explorer = Explorer(open_world([tmp_path / "run"], fashion))
    found = show(explorer, "image", page="concept", latent=0, where=1)
    assert found.count("Regions cannot be shown: neither the store nor the run says which encoder") == 1


def test_the_row_of_an_audit_shows_where_its_concept_is(explorer, world):
    found = show(explorer, "result", page="audit", target="background")
    assert 'class="row"' in found and ('<svg class="region"' in found or "is not in this picture" in found)


# --- Addresses


def test_a_link_and_its_parsing_are_inverse():
    address = Address.parse("?page=search&run=a%26b&set=red%3D2&set=%231%3D0&row=%3Cx%3E")
    assert Address.parse(address.but()) == address
    assert address.many("set") == ("red=2", "#1=0") and address.one("run") == "a&b"
    assert Address.parse(address.but(set=None, row="y")).values == {"page": ("search",), "run": ("a&b",), "row": ("y",)}


@pytest.mark.parametrize(
    "text", ["", "?page=../etc", "?page", "?latent=-1&latent=1e9", "?%ff%00=%", "?" + "a=b&" * 20_000]
)
def test_any_address_shows_a_page(explorer, text):
    assert "<h1>" in explorer.show(text)


@pytest.mark.parametrize("page", ["concepts", "concept", "map", "search", "find", "compare", "audit", "models"])
@pytest.mark.parametrize("bad", [{"run": "../../etc"}, {"row": HOSTILE + "x"}, {"set": "red"}, {"set": "red=p99"},
                                 {"vector": "!!"}, {"latent": HOSTILE}, {"target": HOSTILE}, {"sort": HOSTILE},
                                 {"words": HOSTILE}, {"only": HOSTILE}, {"add": HOSTILE},
                                 {"from": HOSTILE}, {"like": HOSTILE + "x"}, {"column": HOSTILE},
                                 {"value": HOSTILE}, {"a": HOSTILE, "b": HOSTILE}, {"within": HOSTILE}])  # fmt: skip
def test_nothing_from_an_address_becomes_markup(explorer, page, bad):
    found = show(explorer, page=page, **bad)
    assert "<h1>" in found and HOSTILE not in found and "<img src=x" not in found


# --- Concepts


def latents_in(html):
    return [int(piece.split("&")[0].split('"')[0]) for piece in html.split("latent=")[1:]]


def test_the_table_has_every_latent_once(explorer, world):
    seen = [latent for first in (0, 40, 80) for latent in latents_in(show(explorer, "table", **{"from": first}))]
    assert sorted(seen) == list(range(world.first.sae.d_sae))


def test_sorting_is_by_the_column(explorer, world):
    samples = world.first.samples["image"]
    falling = latents_in(show(explorer, "table", sort="-rate"))
    rates = samples.firing_rate[falling]
    assert (np.diff(rates) <= 0).all() and rates[0] == samples.firing_rate.max()
    assert latents_in(show(explorer, "table", sort="latent")) == list(range(40))


def test_filters_divide_the_latents(world):
    catalogue = world.first.catalogue
    everything = set(range(world.first.sae.d_sae))
    named, unnamed = (set(catalogue.select("", only, "latent").tolist()) for only in ("named", "unnamed"))
    assert named | unnamed == everything and not named & unnamed
    assert named == {concept.latent for concept in world.first.names}
    kinds = [set(catalogue.select("", only, "latent").tolist()) for only in ("coarse", "fine", "dead")]
    assert set().union(*kinds) == everything and sum(map(len, kinds)) == len(everything)


def test_a_word_finds_names_and_a_number_finds_a_latent(world):
    catalogue, first = world.first.catalogue, next(iter(world.first.names))
    assert first.latent in catalogue.select(first.name.upper(), "", "latent")
    assert catalogue.select("#17", "", "latent").tolist() == [17]
    assert not len(catalogue.select("no such word", "", "latent"))


def test_a_page_of_25000_latents_is_made_at_once(world):
    """Some 10 ms on a quiet machine; the bound is a hundred times that."""
    n, rng = 25_000, np.random.default_rng(0)
    named = np.arange(n) % 2 == 0
    names = tuple(f"word {i}" if named[i] else None for i in range(n))
    facts = {key: rng.random(n) for key in ("cosine", "auroc", "rate", "mean", "maximum")}
    masks = {"named": named, "unnamed": ~named}
    catalogue = Catalogue(names, names, **facts, profile=rng.random((n, 4)), levels=(1, 2, 3, 4), masks=masks)
    began = time.process_time()
    for words, only, sort in (("", "", "-evidence"), ("word 1", "", "name"), ("17", "named", "-level")):
        found = catalogue.select(words, only, sort)
        assert len(found) == sum(words in (name or "") and (named[i] or not only) for i, name in enumerate(names))
    assert time.process_time() - began < 3


# --- Concept


def test_correlations_are_numpys(world):
    store, run = world.store, world.first
    z = run.sae.encode(__import__("torch").from_numpy(store.take(np.arange(len(store)), "image"))).numpy()
    alive = np.flatnonzero(z.std(0) > 0)
    found = concept_page.correlate(run, int(alive[0])).numpy()
    expected = np.corrcoef(z[:, alive].T)[0, 1:]
    assert found[alive[1:]] == pytest.approx(expected, abs=1e-3)
    assert found[alive[0]] == -1


def test_a_concept_shows_its_strongest_samples_page_by_page(explorer, world):
    top = world.first.samples["text"].top(3)
    pages = [show(explorer, "text", page="concept", latent=3, from_text=first) for first in (0, 12)]
    for page, samples in zip(pages, (top[:12], top[12:24]), strict=True):
        assert page.split("</ol>")[0].count("<li>") == len(samples)


def stands_out(z, samples, names, without=()):
    """Concepts by mean activation over what is natural, one latent after the other."""
    usual = samples.quantiles((0.99,))[:, 0]
    found = {}
    for latent in range(z.shape[1]):
        concept = names.name_of(latent) or f"#{latent}"
        if usual[latent] > 0 and z[:, latent].max() > 0 and concept not in without:
            found[concept] = max(found.get(concept, 0), z[:, latent].mean() / usual[latent])
    return sorted(found, key=lambda concept: -found[concept])


def test_a_concepts_pictures_show_what_else_stands_out_named_or_not_above_its_threshold(explorer, world):
    run = world.first
    latent = int(np.argsort(-run.samples["image"].fired)[0])
    rows = [sample.row for sample in run.samples["image"].top(latent, 12)]
    z = run.sae.encode(world.store.take(np.array(rows), "image"))
    own = run.names.name_of(latent) or f"#{latent}"
    seen = standing.seen_in(world, run, rows, "image", without=(own,))
    assert [one.found.concept for one in seen] == stands_out(z, run.samples["image"], run.names, (own,))[: len(seen)]
    assert len(seen) == standing.SHOWN and own not in [one.found.concept for one in seen]
    part = show(explorer, "image", page="concept", latent=latent)
    for one in seen:
        assert one.found.n_rows == int((z[:, one.found.latent] > 0).sum()) > 0
        assert f"in {one.found.n_rows} of 12" in part and one.face.label in part
        assert f"/picture/{one.face.picture.row}/96" in part  # no rows have confirmed a name of this run


def test_the_row_of_a_sweep_shows_what_stands_out_in_it_and_unconfirmed_names_their_pictures(explorer, world):
    run = world.first
    page = show(explorer, "sweep", page="audit", target="background", row=world.store.ids[9])
    z = run.sae.encode(world.store.take(np.array([9]), "image"))
    for concept in stands_out(z, run.samples["image"], run.names)[: standing.SHOWN]:
        assert run.names.shown_name(concept) in page
    silent = [latent for latent in range(run.sae.d_sae) if z[0, latent] <= 0]
    assert not any(f"latent={latent}&" in page or f'latent={latent}"' in page for latent in silent)
    found = run.audit("background").concepts[0]
    picture = run.samples["image"].top(max(found.latents, key=lambda i: run.samples["image"].maximum[i]), 1)[0].row
    table = show(explorer, "result", page="audit", target="background").split("<tbody>")[-1]
    assert f"/picture/{picture}/96" in table and html.escape(f"nearest word: {found.name}") in table


# --- Search


def test_sliders_are_what_is_strongest_for_its_natural_range_named_or_not(world):
    """Nothing below its threshold; a concept without a confirmed name has a picture of the row that fires it most."""
    run, n_unnamed = world.first, 0
    for row in (3, 7, 11, 20):
        address = Address.parse("?" + urlencode({"row": world.store.ids[row]}))
        query = search_page.read(world, run, address)
        z = run.sae.encode(query.x[None], query.modality)[0]
        made = search_page.sliders_of(world, run, address, query)
        assert 0 < len(made) <= search_page.SLIDERS
        usual = np.maximum(run.samples[query.modality].quantiles((0.99,))[:, 0], 1e-6)
        single = [float((z / usual)[list(one.group.latents)].max()) for one in made]
        assert single == sorted(single, reverse=True) and min(single) > 0
        for one in made:
            assert one.own > 0 and any(z[latent] > 0 for latent in one.group.latents)
            n_unnamed += one.concept.startswith("#")
            assert one.label == (one.concept if one.concept.startswith("#") else f"nearest word: {one.concept}")
            tops = [run.samples[query.modality].top(latent, 1)[0].row for latent in one.group.latents]
            assert one.picture.row in tops
    assert n_unnamed > 0


def test_the_page_finds_what_search_finds(world, folder):
    row = world.store.ids[7]
    name = next(iter(world.first.names)).name
    address = Address.parse("?" + urlencode({"row": row, "set": f"{name}=3"}))
    found = search_page.result(world, world.first, address)
    expected = search(folder / "runs/named", world.store, like=row, set={name: 3.0}, n=search_page.HITS)
    assert found.to_json()["hits"] == expected.to_json()["hits"]


def test_columns_that_are_asked_for_stand_beside_each_caption(folder, world):
    shown = open_world([folder / "runs/named"], world.store, ["background,count"])
    row = world.store.ids[7]
    first = search_page.result(shown, shown.first, Address.parse(f"?row={row}")).hits[0]
    words = f" · background: {first.columns['background']} · count: {first.columns['count']}"
    assert first.words.endswith(words) and html.escape(first.words) in show(Explorer(shown), page="search", row=row)
    assert "background:" not in show(Explorer(world), page="search", row=row)
    with pytest.raises(StoreError, match="no column 'nothing'"):
        open_world([folder / "runs/named"], world.store, ["nothing"])


def test_a_dropped_picture_is_searched_for_as_msae_search_does(world, explorer, folder):
    picture = next((folder / "scenes/images").iterdir())
    vector = explorer.embed(picture.read_bytes())
    found = search_page.result(world, world.first, Address.parse("?" + urlencode({"vector": vector})))
    expected = search(folder / "runs/named", world.store, image=picture, n=search_page.HITS)
    assert [hit.id for hit in found.hits] == [hit.id for hit in expected.hits]
    for wrong in (b"", b"!", b"no picture", picture.read_bytes()[:200]):
        with pytest.raises(SourceError, match="cannot be searched for"):
            explorer.embed(wrong)


def test_without_an_encoder_rows_are_searched_and_words_say_why_not(tmp_path, world, folder):
    import shutil

    np.save(tmp_path / "x.npy", world.store.take(np.arange(100), "image"))
    shutil.copytree(folder / "runs/plain", tmp_path / "run")
    record = json.loads((tmp_path / "run/sae.json").read_text())
    (tmp_path / "run/sae.json").write_text(json.dumps({k: v for k, v in record.items() if not k.startswith("encoder")}))
    explorer = Explorer(open_world([tmp_path / "run"], tmp_path / "x.npy"))
    assert "which encoder made" in show(explorer, page="search", text="red")
    found = show(explorer, page="search", row="5")
    assert 'data-row="5"' not in found and found.count("data-row=") == search_page.HITS and "range" in found


def test_several_latents_are_one_slider(explorer):
    assert show(explorer, page="search", add="#1|#2", set="#1|#2=1.5").count('data-concept="#1|#2"') == 1


def test_many_at_once_get_what_one_gets(explorer, world):
    name = next(iter(world.first.names)).name
    asked = [{"page": "search", "row": world.store.ids[i % 5], "set": f"{name}={i % 4}"} for i in range(40)]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda values: show(explorer, "found", **values), asked))
    assert together == [show(explorer, "found", **values) for values in asked]
    assert len(set(together)) == 20


# --- Audit and models


def test_an_audit_is_read_back_as_it_was_written(world):
    found = world.first.audit("count")
    again = Audit.from_json(json.dumps(found.to_json()), where="x.json")
    assert again.to_json() == json.loads(json.dumps(found.to_json()))
    assert "<table" in audit_page.loaded(json.dumps(found.to_json()))


def test_every_column_can_be_audited_or_the_page_says_why_not(explorer, world):
    assert set(world.targets) | set(world.left_out) == set(world.store.columns) and world.targets
    page = show(explorer, page="audit")
    assert all(f'<option value="{name}">' in page for name in world.targets)
    assert all(f"<dt>{name}</dt><dd>{html.escape(why)}</dd>" in page for name, why in world.left_out.items())
    assert world.left_out["caption"] == "names or describes single rows"


def test_an_audit_takes_only_the_rows_that_fit(explorer, world):
    sizes = world.store.column("size")
    kept = next(size for size in set(sizes) if sizes.count(size) > 60)
    asked = {"page": "audit", "target": "background", "rows": f" size == '{kept}' "}
    page = show(explorer, "result", **asked)
    found = world.first.audit("background", asked["rows"].strip())
    assert found.settings["where"] == f"size == '{kept}'" and found.n + found.classifier["n_train"] == sizes.count(kept)
    assert html.escape(found.verdict) in page
    assert f"only rows with size == &#39;{kept}&#39;" in page
    assert world.first.audit("background").n > found.n
    assert f'name="rows" value=" size == &#39;{kept}&#39; "' in show(explorer, **asked)
    wrong = show(explorer, "result", **(asked | {"rows": "sizes == 1"}))
    assert "the filter &#39;sizes == 1&#39; cannot be read" in wrong


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"concepts": [1]}', "[" * 5000, HOSTILE, '{"target": {}}'])
def test_what_is_no_audit_is_said_to_be_none(text):
    with pytest.raises(ConfigError, match=r"x\.json is not what msae audit writes"):
        Audit.from_json(text, where="x.json")
    assert "This file is no audit" in audit_page.loaded(text) and HOSTILE not in audit_page.loaded(text)


def test_a_sweep_is_the_audits_own_sweep_for_the_audits_own_row(world):
    found = world.first.audit("count")
    concept = next(one for one in found.concepts if one.sweep)
    again = world.first.sweeper("count").of(concept, concept.sweep.id)
    assert again.probabilities == pytest.approx(concept.sweep.probabilities, abs=1e-5)


def test_evaluations_that_were_made_are_shown(folder):
    from msae import evaluate

    runs = [folder / "runs/named", folder / "runs/plain"]
    world = open_world(runs, folder / "scenes.store")
    assert world.evaluations() == []
    made = evaluate(runs, world.store, recovery=True)
    evaluate(runs[0], world.store, modality="text")  # of one run alone: nothing to compare
    assert [(e.run, e.fvu) for e in world.evaluations()] == [
        (one, e.fvu) for one, e in zip(world.runs, made, strict=True)
    ]
    assert all(e.recovery for e in world.evaluations())
    assert "inference trained (the activation function of the SAE)" in show(Explorer(world), page="models")
    damaged = runs[0] / "eval" / "damaged.json"
    damaged.write_text("{")
    page = Explorer(world).show("?page=models")
    assert "damaged.json" in page and "Traceback" not in page
    shutil.rmtree(runs[0] / "eval")
    shutil.rmtree(runs[1] / "eval")


# --- Empty states and errors


def test_what_nobody_expected_is_said_on_the_page_and_told_in_the_terminal(explorer, monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setitem(concept_page.PARTS, "", broken)
    page = show(explorer, page="concept")
    assert "unexpected ZeroDivisionError" in page and "secret" not in page and "Traceback" not in page
    assert "secret" in caplog.text


def test_a_run_without_names_shows_the_command_that_makes_them(explorer, folder):
    found = show(explorer, page="concepts", run="plain")
    assert f"msae name {folder / 'runs/plain'} --on STORE" in found


def test_without_a_store_the_pages_say_how_to_give_one(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "runs/named", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({**config, "store": "gone.store"}))
    explorer = Explorer(open_world([tmp_path / "run"], None))
    for page in ("concepts", "concept", "map", "search", "audit", "models"):
        assert "msae explore" in show(explorer, page=page) and "--on STORE" in show(explorer, page=page)
    assert "Nearest decoder rows" in show(explorer, "relations", page="concept")


def test_the_training_store_is_taken_where_none_is_given(folder):
    assert open_world([folder / "runs/named"], None).store.path == folder / "scenes.store"


def test_what_cannot_be_explored_is_one_line(folder, tmp_path, capsys):
    np.save(tmp_path / "narrow.npy", np.ones((20, 7), np.float32))
    run, store = str(folder / "runs/named"), str(folder / "scenes.store")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = {
            "7-dim embeddings": [run, "--on", str(tmp_path / "narrow.npy"), "--port", "0"],
            "give another with --port": [run, "--on", store, "--port", port],
            "does not exist": [str(tmp_path / "none"), "--on", store, "--port", "0"],
            "none.store does not exist": [run, "--on", str(tmp_path / "none.store"), "--port", "0"],
            "port 99999 cannot be used": [run, "--on", store, "--port", "99999"],
        }
        for wanted, arguments in cases.items():
            with pytest.raises(SystemExit) as left:
                main(["explore", *arguments])
            printed = capsys.readouterr().err.strip().splitlines()
            assert left.value.code == 1 and wanted in printed[-1], printed
            assert len(printed) == 1 or "does not exist" not in wanted  # no address is printed for a slip


def test_the_server_is_there_before_torch_is_imported():
    code = (
        "import sys; from msae.web.explorer import app; import uvicorn; app.build(app.Opening(['run'], None, print)); "
        "assert 'is starting' in app.Opening(['run'], None, print).page(); "
        "print({'torch', 'numpy', 'pyarrow', 'matplotlib', 'PIL'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "set()\n"


def test_a_failure_while_loading_is_shown_on_the_page_that_waits_and_printed_in_one_line(folder, tmp_path):
    told, wrong = tmp_path / "address.json", str(folder / "words.store")
    command = [sys.executable, "-m", "msae", "explore", wrong, "--port", "0", "--json", str(told)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not told.exists():
            time.sleep(0.01)
        base = json.loads(told.read_text())["url"]
        pages = [get(base, "/")[1].decode()]
        assert "is starting" in pages[0] and 'http-equiv="refresh"' in pages[0]
        while not json.loads(get(base, "/state")[1])["done"]:
            time.sleep(0.05)
        pages.append(get(base, "/")[1].decode())
        said = process.stderr.read()
    assert process.returncode == 1 and said.count("\n") == 1 and "words.store" in said
    message = said.removeprefix("msae explore: ").strip()
    assert "could not start" in pages[1] and message in html.unescape(pages[1])
    assert "refresh" not in pages[1]


def test_libraries_are_offline_while_it_runs_and_as_before_afterwards(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with offline():
        assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    assert not constants.HF_HUB_OFFLINE and "HF_HUB_OFFLINE" not in os.environ


def test_names_of_another_sae_are_refused(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "runs/named", tmp_path / "run")
    record = json.loads((tmp_path / "run/names.json").read_text())
    (tmp_path / "run/names.json").write_text(json.dumps({**record, "d_sae": 5}))
    with pytest.raises(RunError, match="names 5 latents, but the SAE has 96"):
        open_world([tmp_path / "run"], folder / "scenes.store")


# --- What the server gives away


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def get(base, path, method="GET", body=None, **headers):
    where = urlsplit(base)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=20)
    connection.putrequest(method, path, skip_host="host" in headers)
    for key, value in headers.items():
        connection.putheader(key, value)
    if body is not None:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body)
    with connection.getresponse() as answer:
        found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    with served([folder / "runs/named"], folder / "scenes.store", tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("HEAD", "/", {}, 200),
        ("POST", "/audit", {}, 200),
        ("POST", "/audit", {"origin": "http://evil.example"}, 403),
        ("POST", "/audit", {"origin": "null"}, 403),
        ("POST", "/embed", {"origin": "http://127.0.0.1:1"}, 403),
        ("GET", "/audit", {}, 405),
        ("POST", "/", {}, 405),
        ("GET", "/", {"host": "evil.example:7860"}, 400),
        ("GET", "/", {"host": "["}, 400),
        ("GET", "/", {"host": "[::1"}, 400),
        ("GET", "/", {"origin": "http://["}, 400),
        ("GET", "/", {"host": ""}, 400),
        ("GET", "/gradio_api/file=/etc/passwd", {}, 404),
        ("GET", "/gradio_api/proxy=http://evil.example", {}, 404),
        ("POST", "/gradio_api/upload", {}, 404),
        ("POST", "/gradio_api/queue/join", {}, 404),
        ("GET", "/static/../../secret", {}, 404),
        ("GET", "/static/base.html", {}, 404),
        ("GET", "/monitoring", {}, 404),
    ],
)
def test_only_what_is_needed_is_open(base, method, path, headers, status):
    body = b"" if method == "POST" else None
    assert get(base, path, method, body, **headers)[0] == status


def test_its_own_origin_may_post_and_what_is_too_large_is_refused(base):
    status, body, _ = get(base, "/audit", "POST", b"[]", origin=base)
    assert status == 200 and b"This file is no audit" in body
    body = get(base, "/embed", "POST", bytes(MAX_UPLOAD + 1), origin=base)[1]
    assert f"larger than {MAX_UPLOAD // 1_000_000} MB" in json.loads(body)["problem"]


def test_the_security_policy_allows_no_code_or_style_inside_a_page(base, explorer):
    policy = get(base, "/")[2]["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "script-src" not in policy
    for page in ("concepts", "concept", "map", "search", "audit", "models"):
        tags = Tags(show(explorer, page=page)).tags
        assert not [tag for tag, values in tags if tag == "style" or (tag == "script" and "src" not in values)]
        assert not [key for _, values in tags for key in values if key == "style" or key.startswith("on")]


def test_the_glossary_is_a_page_that_every_page_links_to(base, explorer):
    status, body, _ = get(base, "/glossary")
    page = body.decode()
    assert status == 200 and '<p id="word-latent"><strong>Latent.</strong>' in page and "<td>FVU ↓</td>" in page
    assert "**" not in page and "](" not in page and "(naming.md)" not in page
    for name in ("concepts", "concept", "search", "audit", "models"):
        assert '<a href="/glossary">' in show(explorer, page=name)


def test_over_http_no_file_but_thumbnails_of_listed_pictures(folder, world, base):
    secret = (folder / "secret.png").read_bytes()
    status, body, headers = get(base, "/picture/5/96")
    assert status == 200 and headers["content-type"] == "image/jpeg" and body[:2] == b"\xff\xd8"
    assert "default-src 'self'" in headers["content-security-policy"]
    for path in (
        "/picture/1/96",  # the store lists ../secret.png
        "/picture/-1/96", "/picture/999999/96", "/picture/5/5000", "/picture/../secret.png/96",
        f"/picture/{'9' * 30}/96", f"/picture/{'9' * 5000}/96", f"/picture/5/{'9' * 5000}", "/picture/x/96",
        "/picture/%2e%2e%2fsecret.png/96", f"/gradio_api/file={folder}/secret.png",
        f"/gradio_api/file/{folder}/secret.png", f"/file={folder}/secret.png",
        f"/gradio_api/file={folder}/scenes/images/{world.store.ids[5]}.png", "/static/%2e%2e/%2e%2e/routes.py",
        "/assets/..%2f..%2f..%2froutes.py", "/static/..%5c..%5croutes.py", f"/static/{folder}/secret.png",
        f"/static/%2f{folder}/secret.png", "/etc/passwd", "/openapi.json", "/docs", "/gradio_api/info",
    ):  # fmt: skip
        status, body, _ = get(base, path)
        assert status in (400, 403, 404, 422), (path, status)
        assert secret not in body and b"def " not in body, path
    assert get(base, "/", host="evil.example")[0] == 400
    with pytest.raises(OSError):  # nobody listens on the machine's other addresses
        socket.create_connection(("127.0.0.2", urlsplit(base).port), timeout=2).close()


# --- Find


def test_values_of_a_column_are_shown_with_their_latents(explorer, world):
    found = show(explorer, "values", page="find", column="background")
    best = find(world.first.folder, world.store, "background", n=3).values
    assert all(one.value in found for one in best)
    assert all(f"latent={latent.latent}" in found for one in best for latent in one.latents)
    assert "no column" in show(explorer, "values", page="find", column="nothing")


def test_rows_that_are_picked_become_a_concept_that_can_be_searched_by(explorer, world):
    store = world.store
    frame = [id for id, has in zip(store.ids, store.labels("frame"), strict=True) if has == "True"]
    others = [id for id, has in zip(store.ids, store.labels("frame"), strict=True) if has == "False"]
    found = html.unescape(show(explorer, "learnt", page="find", like=frame[:30], unlike=others[:30]))
    assert "What they share" in found and "--like" in found and frame[7] in found
    concept = re.search(r"add=([^\"&]+)", found).group(1)
    assert "is active in this query" not in show(explorer, page="search", add=unquote(concept))
    few = show(explorer, page="find", like=frame[:2])
    assert "Pick 4 more rows" in few and "part-learnt" not in few


def test_a_click_puts_a_row_on_a_side_and_takes_it_off_again(explorer):
    picked = Picked(("a", "b"), ("c",))
    assert picked.toggled("like", "c") == {"like": ("a", "b", "c"), "unlike": ()}
    assert picked.toggled("like", "a") == {"like": ("b",), "unlike": ("c",)}
    page = html.unescape(show(explorer, page="search", like="10000003"))
    assert "Picked: 1 like, 0 unlike" in page and "Find what they share" in page


# --- Compare


def test_two_values_are_compared_as_in_python(explorer, world):
    found = html.unescape(show(explorer, "compared", page="compare", column="background", a="night", b="sand"))
    parts = [f"{world.store.path}:background={value}" for value in ("night", "sand")]
    wanted = compare(world.first.folder, *parts)
    assert wanted.verdict in found and wanted.standing_out
    assert all(f"#{one.latent}<" in found or f"latent={one.latent}" in found for one in wanted.standing_out[:5])
    page = show(explorer, page="compare", column="background", a="night", b="sand")
    assert 'data-load="compared"' in page and "<option selected>night</option>" in page
    assert "share" in show(explorer, "compared", page="compare", column="background", a="sand", b="sand")
