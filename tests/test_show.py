"""A person's own columns: a title stands for a caption, and --show puts columns beside it, everywhere, as text."""

import csv
import json

import numpy as np
import pytest

import msae
from msae.base.errors import ConfigError, StoreError
from msae.cli import main
from msae.data.rows import Row, names_to_show
from msae.data.store import EmbeddingStore
from msae.web.report.search import render
from msae.web.report.sheet import as_html

EVIL = "<script>alert(1)</script>"
N = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run on vectors with a table of titles, colours and sizes, and no captions."""
    folder = tmp_path_factory.mktemp("show")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(1, 1, (N, 8)).astype(np.float32))
    with (folder / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "colour", "size"])
        writer.writerows([f"i{i}", f"title {i}", EVIL if i % 2 else "red", "" if i == 3 else i] for i in range(N))
    options = {"d_sae": 16, "levels": (4, 16), "epochs": 1, "batch_size": 20, "device": "cpu"}
    msae.train(folder / "x.npy", out=folder / "run", **options)
    return folder / "run", folder / "x.npy"


def test_the_repr_of_a_row_of_a_result_is_short_and_has_its_figures(world):
    hit, sample = VERBS["search"](*world).hits[0], VERBS["gallery"](*world).images[0]
    assert repr(hit).startswith(f"Hit({hit.row}, id='{hit.id}', caption='title ") and "score=0." in repr(hit)
    assert repr(sample).startswith("Sample(") and f"activation={sample.activation!r}" in repr(sample)
    assert "show=" not in repr(hit) and len(repr(hit)) < 400 and "\n" not in repr(hit)


def test_a_title_is_the_caption_where_there_is_no_other(world):
    row = EmbeddingStore.open(world[1])[3]
    assert row.caption == row.words == "title 3" and "title" not in row.columns
    both = Row.of(0, {"id": "a", "caption": "a cat", "title": "Cat"})
    assert both.caption == "a cat" and both.columns == {"title": "Cat"}


def test_shown_columns_stand_beside_the_caption_and_missing_values_are_left_out():
    metadata = {"id": "a", "caption": "a cat", "colour": "red", "size": None, "image_path": "a.png"}
    assert Row.of(0, metadata, ("colour", "size", "image_path")).words == "a cat · colour: red · image_path: a.png"
    assert Row.of(0, metadata).words == "a cat" and Row.of(0, metadata, ("size",)).words == "a cat"
    assert "show" not in Row.of(0, metadata, ("size",)).to_json()


@pytest.mark.parametrize("show", ["a,b", "a, b,", ["a", "b"], ["a,b"], ("a", "b", "a")])
def test_columns_are_given_with_commas_or_as_a_list(show, tmp_path):
    assert names_to_show(show, ["id", "a", "b"], tmp_path) == ("a", "b")


def test_a_column_with_a_comma_in_its_name_is_one_column(tmp_path):
    assert names_to_show(["x, y"], ["x, y", "x"], tmp_path) == ("x, y",)


VERBS = {
    "search": lambda run, store, **o: msae.search(run, store, like="i3", n=40, **o),
    "gallery": lambda run, store, **o: msae.gallery(run, store, latent=0, n=40, inference="relu", **o),
    "activations": lambda run, store, **o: msae.activations(run, store, **o),
    "report": lambda run, store, **o: msae.report(run, store, out=run.parent / "r.html", **o),
}


@pytest.mark.parametrize("verb", ["search", "gallery", "activations"])
def test_a_verb_shows_the_columns_that_are_asked_for_as_text(world, verb):
    found = VERBS[verb](*world, show="colour,size")
    assert "colour: red · size: " in found.to_text() and "colour: " not in VERBS[verb](*world).to_text()
    assert "<script" not in found._repr_html_() and "colour: &lt;script&gt;" in found._repr_html_()
    assert found.to_json() == VERBS[verb](*world).to_json(), "how it is printed is no data"


def test_pages_show_the_columns_as_text(world):
    run, store = world
    pages = [
        render(VERBS["search"](run, store, show=["colour"])),
        as_html(VERBS["gallery"](run, store, show=["colour"])),
        VERBS["report"](run, store, show=["colour"]).path.read_text(),
    ]
    for page in pages:
        assert "colour: red" in page and "colour: &lt;script&gt;" in page and EVIL not in page


@pytest.mark.parametrize("verb", VERBS)
def test_a_column_that_is_not_there_is_one_line_with_the_option(world, verb):
    with pytest.raises(StoreError, match="no column 'hue'; it has id, title, colour, size: give --show one of these"):
        VERBS[verb](*world, show="hue")
    with pytest.raises(StoreError, match="no column 'color'; did you mean 'colour'"):
        VERBS[verb](*world, show=("size", "color"))


def test_a_report_without_a_store_has_no_columns_to_show(world, tmp_path):
    run, _ = world
    with pytest.raises(ConfigError, match=r"--show takes columns of a store, .*; add --on STORE"):
        msae.SAE.load(run).save(tmp_path / "bare")
        msae.report(tmp_path / "bare", show="colour")


def test_show_is_an_option_of_the_command_line(world, capsys, tmp_path):
    run, store = map(str, world)
    for words in (["search", run, "--like", "i3"], ["gallery", run, "--latent", "0", "--inference", "relu"]):
        with pytest.raises(SystemExit) as left:
            main([*words, "--on", store, "--show", "colour,size", "--json", str(tmp_path / "out.json")])
        assert left.value.code == 0 and "colour: red · size: " in capsys.readouterr().out
        json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize(
    ("options", "option"), [({"labels": "hue", "probe_train": True}, "--labels"), ({"target": "hue"}, "--target")]
)
def test_an_error_that_lists_columns_says_which_option_takes_one(world, options, option):
    run, store = world
    with pytest.raises(StoreError, match=f"it has id, title, colour, size: give {option} one of these"):
        if "target" in options:
            msae.audit(run, store, all_latents=True, **options)
        else:
            msae.evaluate(run, store, labels="hue")
