"""The demo: from nothing to scenes, embeddings, trained and evaluated SAEs and names, and again for free."""

import csv

import pytest

from msae.base.errors import ConfigError
from msae.cli import main
from msae.world import chain
from msae.world.scenes import attributes, sample_scene


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """The demo with fewer scenes and epochs: the same code on less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "N_SCENES", {"scenes": 500, "holdout": 200})
        patch.setattr(chain, "COMMON", {"d_sae": 256, "epochs": 2, "batch_size": 64})
        folder = tmp_path_factory.mktemp("demo") / "out"
        said = []
        result = chain.demo(folder, say=said.append)
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
        again = chain.demo(folder)
        after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
        yield folder, result, said, again, before, after


def test_it_makes_everything_it_names(small_world):
    folder, result, said, *_ = small_world
    assert len(result.evaluations) == len(chain.RUNS) == 9  # ours and the eight of the poster
    for run in chain.RUNS:
        assert (folder / "runs" / run / "sae.safetensors").exists()
        assert any(run in line for line in said)
        assert run in result.to_text()
    assert all(e.n == 200 and 0 <= e.sparsity < 1 and e.probe_accuracy > 0.9 for e in result.evaluations)
    assert (folder / "runs" / chain.NAMED_RUN / "names.json").exists()
    assert result.report.exists() and str(result.report) == result.to_json()["report"]


def test_a_second_demo_makes_no_scene_store_or_run_again(small_world):
    _, result, _, again, before, after = small_world
    changed = {p.name for p in before if before[p] != after.get(p) and p.parent.name != "names"}
    assert changed <= {"words.txt", "names.json", "report.html", "README.md"}
    assert again.to_json()["evaluations"] == result.to_json()["evaluations"]


def test_the_command_names_the_report_last(small_world, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    folder = small_world[0]
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(folder)])
    report = folder / "runs" / chain.NAMED_RUN / "report.html"
    assert left.value.code == 0 and capsys.readouterr().out.rstrip().endswith(str(report))
    page = report.read_text(encoding="utf-8")
    assert all(run in page for run in chain.RUNS) and "data:image/jpeg" in page
    assert report.stat().st_size < 10_000_000 and report.with_name("README.md").exists()


def test_scenes_on_disk_are_the_scenes_of_their_seeds(small_world):
    with (small_world[0] / "holdout/scenes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["id"] for row in rows}) == 200
    for row in rows[:20]:
        truth = attributes(sample_scene(int(row["id"])))
        assert {key: row[key] for key in truth} == {
            key: "" if value is None else str(value) for key, value in truth.items()
        }
        assert (small_world[0] / "holdout" / row["image_path"]).exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/holiday.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds no scenes\.csv"):
        chain.demo(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["scenes", "holiday.jpg"]
