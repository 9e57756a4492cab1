"""Search with a bare install: exact without faiss, and without what a search does not need."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from msae import search
from msae.base.errors import MissingDependencyError
from msae.data.store import EmbeddingStore
from tests.test_retrieval import run, store  # noqa: F401

QUERIES = [
    {},
    {"n": 3},
    {"n": 5000},
    {"set": {"red": "2xp99", "sky": 0}},
    {"set": {"red": "p99"}, "exclusive": True, "where": "place == 'sand'"},
    {"set": {"blue": 0}, "modality": "text"},
]


@pytest.mark.parametrize("options", QUERIES)
def test_without_faiss_the_answer_is_the_same(run, store, options, monkeypatch):  # noqa: F811
    indexed = search(run, store, like="row7", **options)
    monkeypatch.setitem(sys.modules, "faiss", None)
    bare = search(run, store, like="row7", **options)
    for mine, theirs in ((bare.hits, indexed.hits), (bare.before, indexed.before)):
        assert [hit.id for hit in mine] == [hit.id for hit in theirs]
        np.testing.assert_allclose([h.score for h in mine], [h.score for h in theirs], atol=1e-6)
        np.testing.assert_allclose([h.score_before for h in mine], [h.score_before for h in theirs], atol=1e-6)
        # the index counts ranks beyond its answer in float16
        assert max(abs(a.rank_before - b.rank_before) for a, b in zip(mine, theirs, strict=True)) <= 3 if mine else True


def test_without_faiss_ranks_are_exact(run, store, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "faiss", None)
    everything = {hit.id: hit.rank for hit in search(run, store, like="row7", n=len(store)).hits}
    found = search(run, store, like="row7", set={"green": "p99"})
    assert [hit.rank_before for hit in found.hits] == [everything[hit.id] for hit in found.hits]
    assert max(hit.rank_before for hit in found.hits) > 20


def test_of_equal_rows_the_lower_comes_first_and_zeros_have_cosine_zero(run, tmp_path, monkeypatch):  # noqa: F811
    x = np.ones((20_000, 16), np.float32)
    x[5] = 0
    x[[3, 19_000]] *= 2  # in different blocks: length does not count
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setitem(sys.modules, "faiss", None)
    every = search(run, EmbeddingStore.open(tmp_path / "x.npy"), embedding=x[0], n=20_000)
    assert [hit.row for hit in every.hits] == [row for row in range(20_000) if row != 5] + [5]
    assert every.hits[-1].score == 0


@pytest.mark.parametrize("how", ["python", "command"])
def test_a_search_for_a_row_loads_no_more_than_it_needs(run, store, how):  # noqa: F811
    ask = {
        "python": f"import msae; msae.search({str(run)!r}, {str(store.path)!r}, like='row7', set=['red=p99'])",
        "command": "from msae.cli import main\n"
        f"try: main(['search', {str(run)!r}, '--on', {str(store.path)!r}, '--like', 'row7', '--set', 'red=p99'])\n"
        "except SystemExit as left: assert left.code == 0",
    }[how]
    code = f"import sys\n{ask}\nprint('MODULES', *sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                 .stdout.split("MODULES ")[1].split())  # fmt: skip
    unwanted = {"transformers", "sklearn", "scipy", "PIL", "huggingface_hub", "matplotlib", "jinja2", "gradio"}
    assert not loaded & unwanted
    assert not {name for name in loaded if name.startswith(("msae.use.audit", "msae.web", "msae.measure"))}
    assert "msae.use.search" in loaded


def test_a_result_is_text_a_table_and_pictures(run, store, tmp_path, monkeypatch):  # noqa: F811
    result = search(run, store, like="row7", set={"green": "p99"}, n=3)
    assert result.to_text().count("\n") == 5
    table = result.to_pandas()
    assert isinstance(table, pd.DataFrame) and list(table["id"]) == [hit.id for hit in result.hits]
    assert {"rank", "score", "rank_before", "score_before", "colour", "place", "shared"} <= set(table.columns)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="pandas is not installed"):
        result.to_pandas()


def test_a_notebook_shows_pictures_and_no_markup_of_the_data(tmp_path):
    from PIL import Image

    from tests.test_reporting_search import EVIL, hit, result

    Image.new("RGB", (400, 300), "red").save(tmp_path / "a.png")
    shown = result((tmp_path,), hits=(hit(1, "a.png", EVIL), hit(2, "gone.png")), before=(hit(3),))._repr_html_()
    assert shown.count('<img src="data:image/jpeg;base64,') == 1 and shown.count("<figure") == 3
    assert "<script" not in shown and "<img src=x" not in shown and "Before" in shown and "After" in shown
