"""The model card: true, well-formed, and never over what a person wrote."""

import re
import shutil

import pytest
import torch

from msae.base.config import settings_from
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, Statistics
from msae.web.report import report
from msae.web.report.card import MARK, card, is_ours, write_card
from msae.web.report.facts import facts_of
from tests.test_reporting_report import EVIL, made, world  # noqa: F401  # fixtures

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


def front_matter(text):
    yaml = pytest.importorskip("yaml")
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


def save_sae(folder, **changes):
    config = {"d_in": 8, "d_sae": 16, "kind": "topk", "k": 4, **changes}
    sae = SAE(
        settings_from(SAEConfig, None, config, where="test"), Standardizer({"text": Statistics(torch.zeros(8), 1.0)})
    )
    sae.save(folder)
    return folder


def test_front_matter_is_yaml_with_what_the_hub_reads(world):  # noqa: F811
    data = front_matter(card(facts_of(world / "run")))
    assert data["library_name"] == "msae" and {"sparse-autoencoder", "matryoshka"} <= set(data["tags"])
    (index,) = data["model-index"]
    first = index["results"][0]
    kept = facts_of(world / "run").evaluations[0].evaluation
    values = {metric["type"]: metric["value"] for metric in first["metrics"]}
    assert values["fvu"] == kept.fvu and set(values) <= set(data["metrics"])
    assert first["dataset"]["name"] == "pairs.store" and first["task"]["type"] == "feature-extraction"


def test_a_hub_model_is_the_base_model_and_nothing_else_is(tmp_path):
    hub = save_sae(tmp_path / "a", encoder="openai/clip-vit-base-patch32")
    assert front_matter(card(facts_of(hub)))["base_model"] == "openai/clip-vit-base-patch32"
    for i, encoder in enumerate((None, "demo", "/home/me/clip", EVIL, "a/b/c")):
        folder = save_sae(tmp_path / f"other{i}", encoder=encoder)
        assert "base_model" not in front_matter(card(facts_of(folder)))


def test_the_code_in_it_runs(world, monkeypatch, capsys):  # noqa: F811
    (code,) = re.findall(r"```python\n(.*?)```", card(facts_of(world / "run")), re.DOTALL)
    monkeypatch.chdir(world)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("[") == 5


def test_the_code_of_an_sae_for_texts_runs_too(tmp_path, monkeypatch):
    save_sae(tmp_path / 'a "quoted" name', encoder=EVIL)
    (code,) = re.findall(r"```python\n(.*?)```", card(facts_of(tmp_path / 'a "quoted" name')), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert 'modality="text"' in code


def test_nothing_in_it_is_markup(world):  # noqa: F811
    text = card(facts_of(world / "run"))
    body = text.split("---\n", 2)[2]
    assert "<" not in body.replace("\\<", "") and "&lt;script" in body and "\x00" not in text
    assert len(front_matter(text)["model-index"][0]["results"]) == 2


def test_it_says_the_facts_of_the_report(world):  # noqa: F811
    report(world / "run")
    page, text = ((world / "run" / name).read_text() for name in ("report.html", "README.md"))
    for word, value in facts_of(world / "run").lines():
        assert f"**{word}**" in text and f"<dt>{word}</dt><dd>{value}" in page


def test_our_own_card_is_refreshed_and_a_persons_is_left_alone(world):  # noqa: F811
    file = world / "bare/README.md"
    assert report(world / "bare").card == file and "Not evaluated" in file.read_text()
    shutil.copytree(world / "run/eval", world / "bare/eval")  # of other weights
    from msae.measure.evaluate import evaluate

    evaluate(world / "bare", world / "pairs.store")
    assert report(world / "bare").card == file and "Not evaluated" not in file.read_text()
    ours = file.read_text()
    for theirs in ("mine\n", "", ours.replace("## Limits", "## My limits"), ours + "more\n", "\ufeff" + ours):
        file.write_text(theirs)
        found = report(world / "bare")
        assert found.card is None and file.read_text() == theirs and "left as it is" in found.to_text()
    file.write_bytes(b"\xff\xfe")
    assert report(world / "bare").card is None and file.read_bytes() == b"\xff\xfe"


def test_a_card_is_known_as_ours_after_line_ends_were_kept_only(world):  # noqa: F811
    file = write_card(facts_of(world / "run"))
    assert is_ours(file) and file.read_text().count(MARK) == 1
    assert write_card(facts_of(world / "run")) == file


def test_an_imported_sae_has_a_card(tmp_path):
    text = card(facts_of(save_sae(tmp_path / "run")))
    assert "TopK SAE, k = 4" in text and "trained on" not in text


def test_a_word_that_no_rows_confirmed_is_no_name_in_it(world):  # noqa: F811
    text = card(facts_of(world / "run"))
    assert "1 of the latents have a name that rows have confirmed" in text
    assert (
        "2 of the latents have only a nearest word" in text
        and "red" not in text.split("## Concepts")[1].split("## ")[0]
    )
