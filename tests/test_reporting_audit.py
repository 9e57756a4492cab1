"""The audit's page opens offline, shows names as text whatever they are, and is the same bytes for the same audit."""

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from markupsafe import Markup

from msae.cli import main, verb_options
from msae.data.thumbnails import Album
from msae.use.audit import audit
from msae.web.report.audit import cases, concept_svgs, section, write_html
from tests.test_auditing import N, make_sae, make_store, world

pytest.importorskip("matplotlib")
EVIL = "<script>alert('$x$ & \"y\"')</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from msae.sae.standardize import Standardizer, fit_statistics

    path = tmp_path_factory.mktemp("page")
    store = make_store(path / "on.store", *world(seed=1, classes=("<b>a", "$b")))
    x = torch.from_numpy(store.take(np.arange(N), "image"))
    sae = make_sae()
    sae.standardizer = Standardizer().with_statistics("image", fit_statistics(lambda: [x]))
    sae.save(path / "run")
    return path


@pytest.fixture(scope="module")
def found(folder):
    names = {EVIL: [1], "own": [0], "silent": [5]}
    return audit(folder / "run", folder / "on.store", "y", names=names, n_permutations=50)


def test_names_are_text_and_nothing_is_fetched(found, tmp_path):
    write_html(found, tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>a" not in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:image)""", page)  # links inside the page alone
    assert "@import" not in page and "url(http" not in page
    assert "rows: 1 (silent)" in section(found, n_plotted=0)


def test_plots_are_well_formed_and_the_same_every_time(found):
    drawings = concept_svgs(found, found[EVIL])
    assert len(drawings) == 4 and all(ElementTree.fromstring(one).tag.endswith("svg") for one in drawings)
    assert drawings == concept_svgs(found, found[EVIL])


def test_the_page_begins_with_the_verdict_and_has_every_concept_once(found):
    page = section(found)
    assert page.index(str(Markup.escape(found.verdict))) < page.index("<table")
    n_tables = page.count("<table")
    assert page.count("<tr") == n_tables + len(found.concepts)
    ranked, rest = len(found.ranked), len(found.concepts) - len(found.ranked)
    assert n_tables == (ranked > 0) + (rest > 0) and page.count("<h3>") == ranked


def test_the_strongest_cases_are_shown_as_pictures_by_what_is_predicted(folder, tmp_path):
    from PIL import Image

    x, labels = world(seed=1)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (300, 200), colour).save(tmp_path / f"{name}.png")
    on = make_store(tmp_path / "on.store", x, labels, image_path=[f"{label}.png" for label in labels])
    audited = audit(folder / "run", on, "y", names={"own": [0], "other": [4]}, n_permutations=100)
    own = audited["own"]
    (first, of_class), (second, of_others) = cases(audited, own, on, Album(on.picture_roots, 32))
    assert first == f"most of it, predicted {own.class_}" and second == "most of it, predicted otherwise"
    assert 0 < len(of_class) <= 6 and 0 < len(of_others) <= 6
    assert all(uri.startswith("data:image/jpeg;base64,") for uri, *_ in of_class)
    assert "data:image/jpeg" in section(audited, store=on) or not audited.ranked


def test_the_command_writes_table_json_and_page(folder, capsys):
    arguments = [
        "audit",
        str(folder / "run"),
        "--on",
        str(folder / "on.store"),
        "--target",
        "y",
        "--permutations",
        "20",
    ]
    with pytest.raises(SystemExit) as left:
        main(
            [
                *arguments,
                "--concept",
                "#0",
                "--concept",
                "#1",
                "--html",
                str(folder / "a.html"),
                "--json",
                str(folder / "a.json"),
            ]
        )
    assert left.value.code == 0
    assert "The classifier is right in" in capsys.readouterr().out
    assert (folder / "a.json").stat().st_mtime_ns < (folder / "a.html").stat().st_mtime_ns  # no page without its data
    assert (folder / "a.html").stat().st_size > 10_000 and '"flip_rate"' in (folder / "a.json").read_text()


def test_the_command_says_what_is_missing_in_one_line(folder, capsys):
    for options, message in (
        (["--target", "z"], "has no column 'z'"),
        (["--target", "y"], "names.json does not exist"),
        (["--target", "y", "--all-latents", "--class-texts", "man"], "is not CLASS=TEXT"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["audit", str(folder / "run"), "--on", str(folder / "on.store"), *options])
        error = capsys.readouterr().err
        assert left.value.code == 1 and message in error and error.count("\n") == 1


def test_the_recipes_use_options_that_exist():
    recipes = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    commands = [shlex.split(line)[1:] for line in recipes.splitlines() if line.strip().startswith("msae audit ")]
    assert len(commands) >= 5
    known = set(verb_options("audit"))
    for command in commands:
        options = {word[2:].replace("-", "_") for word in command if word.startswith("--")}
        assert options <= known and {"on", "target"} <= options
