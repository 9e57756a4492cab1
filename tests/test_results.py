"""What every result can do: JSON, a table, a short repr, and HTML that shows names as text."""

import inspect
import json
import shutil
import sys

import pytest

import msae
from msae.base.errors import ConfigError, MissingDependencyError
from msae.base.results import Result, shorten, text_html, text_table
from msae.concepts.gallery import all_magnitudes
from tests.test_reporting_report import EVIL, made  # noqa: F401


class Two(Result):
    def to_text(self):
        return "a < b"

    def to_json(self):
        return {"rows": self.records()}

    def records(self):
        return [{"name": "a", "x": 1.0}, {"name": "b", "x": None}]


def test_the_table_is_that_of_the_records():
    pandas = pytest.importorskip("pandas")
    pandas.testing.assert_frame_equal(Two().to_pandas(), pandas.DataFrame({"name": ["a", "b"], "x": [1.0, None]}))


def test_without_pandas_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)  # what an import of a package that is not installed does
    with pytest.raises(MissingDependencyError, match="pandas is not installed but is needed here; type: pip install"):
        Two().to_pandas()


def test_a_notebook_shows_the_text_and_names_are_no_html():
    assert repr(Two()) == "<Two: a < b>" and Two()._repr_html_() == "<pre>a &lt; b</pre>"


def test_columns_of_a_text_table_line_up():
    assert text_table(["name", "n"], [["a", "10"], ["longer", "2"]], right=[1]) == [
        "name     n",
        "------  --",
        "a       10",
        "longer   2",
    ]
    assert shorten("x" * 50, 10) == "x" * 9 + "…" and shorten("short") == "short"


def test_a_notebook_shows_a_table_as_a_table_and_the_lines_around_it_as_they_are():
    table = text_table(["<name>", "n", ""], [["a  b", "10", "x"], ["longer", "2", ""]], right=[1])
    page = text_html("\n".join(["one: a < b", "", *table, "n     how many", "", *table]))
    rows = (
        '<tr><th style="text-align:left">&lt;name&gt;</th><th style="text-align:right">n</th>'
        '<th style="text-align:left"></th></tr>'
        '<tr><td style="text-align:left">a  b</td><td style="text-align:right">10</td>'
        '<td style="text-align:left">x</td></tr>'
        '<tr><td style="text-align:left">longer</td><td style="text-align:right">2</td>'
        '<td style="text-align:left"></td></tr>'
    )
    assert text_html("\n".join(text_table(["a", "b"], []))).count("<tr>") == 1
    assert page == f"<pre>one: a &lt; b</pre><table>{rows}</table><pre>n: how many</pre><table>{rows}</table>"


# --- The results of the verbs

VERBS = {
    "evaluate": lambda run, store: msae.evaluate(run, store),
    "evaluate several": lambda run, store: msae.evaluate([run, run.parent / "beside"], store),
    "names": lambda run, store: msae.ConceptNames.load(run),
    "gallery": lambda run, store: msae.gallery(run, store, latent=0, n=40, inference="relu"),
    "top_samples": lambda run, store: msae.top_samples(run, store),
    "magnitudes": lambda run, store: all_magnitudes(run, store),
    "tree": lambda run, store: msae.concept_tree(run, store),
    "activations": lambda run, store: msae.activations(run, store),
    "search": lambda run, store: msae.search(run, store, like=f"{EVIL} 4", set={"red": 0}, n=40),
    "audit": lambda run, store: msae.audit(run, store, "label"),
    "audit of a concept": lambda run, store: msae.audit(run, store, "label")["red"],
    "stability": lambda run, store: msae.stability([run, run.parent / "beside"], threshold=-1),
    "report": lambda run, store: msae.report(run, store, out=run.parent / "other.html"),
}


@pytest.fixture(scope="module", params=VERBS)
def result(request, made):  # noqa: F811
    return VERBS[request.param](made / "run", made / "pairs.store")


def test_every_result_has_one_grammar(result):
    pandas = pytest.importorskip("pandas")
    assert isinstance(result, Result) and isinstance(result.to_text(), str) and result.to_text().strip()
    data = result.to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data, "JSON has no tuples, paths, arrays or NaN"
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == len(result.records())
    assert not hasattr(result, "to_dict")


def test_the_repr_of_a_result_is_short_and_says_what_it_is(result):
    assert len(repr(result)) < 400 and "\n" not in repr(result)
    assert repr(result).startswith(f"<{type(result).__name__}: ") and "object at" not in repr(result)


def test_what_a_notebook_shows_of_a_result_has_no_foreign_html(result):
    page = result._repr_html_()
    assert "<script" not in page and "onerror=alert" not in page.replace("&lt;img src=x onerror=alert", "")


def test_a_gallery_and_a_search_show_their_pictures(made):  # noqa: F811
    run, store = made / "run", made / "pairs.store"
    for found in (VERBS["gallery"](run, store), VERBS["search"](run, store)):
        page = found._repr_html_()
        assert page.count('<img src="data:image/jpeg;base64,') >= 5 and "&lt;script&gt;" in page
        assert "example.org" not in page.replace("&", "") and 'src="http' not in page


# --- The verbs themselves

COMPUTING = {
    "evaluate": lambda run, store, **o: msae.evaluate(run, store, **o),
    "gallery": lambda run, store, **o: msae.gallery(run, store, latent=0, inference="relu", **o),
    "top_samples": lambda run, store, **o: msae.top_samples(run, store, inference="relu", **o),
    "concept_tree": lambda run, store, **o: msae.concept_tree(run, store, **o),
    "search": lambda run, store, **o: msae.search(run, store, like=f"{EVIL} 4", set={"#5": 0}, **o),
    "search of latents": lambda run, store, **o: msae.search(run, store, like=f"{EVIL} 4", space="latent", **o),
    "audit": lambda run, store, **o: msae.audit(run, store, "label", **o),
    "activations": lambda run, store, **o: msae.activations(run, store, **o),
    "report": lambda run, store, **o: msae.report(run, store, out=run.parent / "on-a-device.html", **o),
}


@pytest.mark.parametrize("verb", COMPUTING)
def test_every_verb_computes_on_the_device_that_is_named(made, verb, tmp_path):  # noqa: F811
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "samples", ignore_errors=True)
    # A meta tensor has a device and no values: all is well until values are asked for, and nothing mixes devices.
    with pytest.raises(RuntimeError, match=r"Cannot copy out of meta tensor|cannot be called on meta tensors"):
        COMPUTING[verb](tmp_path / "run", made / "pairs.store", device="meta")


@pytest.mark.parametrize("verb", COMPUTING)
def test_a_device_that_is_not_there_is_one_line(made, verb):  # noqa: F811
    with pytest.raises(ConfigError, match=r"device nowhere cannot be used here .* give --device cpu"):
        COMPUTING[verb](made / "run", made / "pairs.store", device="nowhere")


def test_parameters_are_the_same_in_every_verb():
    verbs = [msae.evaluate, msae.name, msae.gallery, msae.top_samples, msae.concept_tree, msae.search, msae.audit,
             msae.activations, msae.report, msae.stability, msae.train, msae.embed, msae.explore]  # fmt: skip
    for verb in verbs:
        for name, parameter in inspect.signature(verb).parameters.items():
            assert parameter.annotation != "Any", f"{verb.__name__}({name}) tells an editor nothing"
            if name == "inference":
                assert parameter.default == "trained", verb
            if name == "device":
                assert parameter.default == "auto", verb
