"""The commands of docs/recipes.md run: the demo's as they stand, the others with the names of the demo's world."""

from __future__ import annotations

import csv
import itertools
import re
import shlex
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msae.cli import main
from msae.concepts.names import Concept, ConceptNames
from msae.world.scenes import ATTRIBUTES
from tests.conftest import linked_copy

DOCUMENT = Path(__file__).parents[1] / "docs" / "recipes.md"
DEMO = "The form, on the demo's world"


def commands() -> dict[str, list[str]]:
    """Of each heading, its lines that begin with `msae`."""
    found: dict[str, list[str]] = {}
    for section in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        found[title] = re.findall(r"^(msae .*\S)", body, re.M)
    return found


def run(command: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(shlex.split(command)[1:])
    assert left.value.code == 0, command


@pytest.fixture(scope="module")
def world(demo_world, tmp_path_factory):
    """The working directory of every command, in which those of the demo have run."""
    folder = linked_copy(demo_world, tmp_path_factory.mktemp("recipes") / "world")
    values = [str(value) for name in ("shape", "colour", "size", "texture", "background") for value in ATTRIBUTES[name]]
    (folder / "words.txt").write_text("\n".join([*values, "hat", "frame", "shadow"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        first, *others = commands()[DEMO]
        assert first == "msae demo --out msae-demo"  # which made this world
        for command in others:
            run(command)
        yield folder


def test_every_recipe_is_run_here():
    found = commands()
    assert next(iter(found)) == DEMO
    assert all(found.values()) and len(found) == 6, "a new recipe: add its names to NAMES"
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in NAMES if name not in text] == []


def test_demo_commands_run_as_they_stand(world):
    assert len(ConceptNames.load(world / "msae-demo/runs/msae")) > 0
    assert "worst group" in (world / "audit.html").read_text(encoding="utf-8")


NAMES = {
    "openai/clip-vit-large-patch14": "demo",
    "{00000..00331}": "{00000..00001}",
    "--labels label": "--labels background",
    "celeba-train.csv": "msae-demo/scenes/scenes.csv",
    "celeba-test.csv": "msae-demo/holdout/scenes.csv",
    "waterbirds-train.csv": "msae-demo/scenes/scenes.csv",
    "waterbirds-test.csv": "msae-demo/holdout/scenes.csv",
    "--target gender": "--target background",
    "--target bird": "--target shape",
    "'female=a photo of a woman' 'male=a photo of a man'": "'sky=in the sky' 'sand=on sand'",
}
"""What the demo's world has for what a recipe names; of `hf://`, see the test."""


def test_other_recipes_run_with_the_names_of_the_demo(world):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("braceexpand")
    with (world / "msae-demo/holdout/scenes.csv").open(newline="", encoding="utf-8") as file:
        scenes = list(csv.DictReader(file))
    pictures = [str(world / "msae-demo/holdout" / scene["image_path"]) for scene in scenes]
    for name in ("cc3m", "cc3m-validation"):
        write_shards(world / name, pictures, [scene["caption"] for scene in scenes])
    columns = {"image": pictures, "background": [scene["background"] for scene in scenes]}
    parts = {"train": slice(0, None, 2), "validation": slice(1, None, 2)}
    datasets.DatasetDict(
        {
            part: datasets.Dataset.from_dict({name: values[rows] for name, values in columns.items()}).cast_column(
                "image", datasets.Image()
            )
            for part, rows in parts.items()
        }
    ).save_to_disk(world / "hf")
    classes = np.array(ATTRIBUTES["background"])
    weight = np.random.default_rng(0).normal(size=(len(classes), 128))
    np.savez(world / "coefficients.npz", weight=weight, bias=np.zeros(len(classes)), classes=classes)
    names = {**NAMES, "hf://ILSVRC/imagenet-1k": f"hf://{world / 'hf'}"}
    for title, lines in list(commands().items())[1:]:
        for command in lines:
            for theirs, ours in names.items():
                command = command.replace(theirs, ours)
            run(command)
        if title.startswith("CC3M"):
            name_by_hand(world / "runs/cc3m", ["bearded", "blondes", "glasses", "water"])
    assert (
        (world / "celeba.html").exists() and (world / "celeba.json").exists() and (world / "waterbirds.html").exists()
    )


def write_shards(folder: Path, pictures: list[str], captions: list[str]) -> None:
    """Two shards, as img2dataset writes them: a picture and a text of the same key."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, len(pictures), 2):
                text = folder / "caption.txt"
                text.write_text(captions[i], encoding="utf-8")
                tar.add(pictures[i], f"{i:05d}.png")
                tar.add(text, f"{i:05d}.txt")


def name_by_hand(run: Path, names: list[str]) -> None:
    """Thirty steps on two hundred scenes earn no latent a name, and the audits that follow need some."""
    known = ConceptNames.load(run)
    concepts = tuple(Concept(latent, name, 0.5, 0.1) for latent, name in enumerate(names))
    replace(known, concepts=concepts).save(run)


def test_no_recipe_trains_a_classifier_or_checks_names_on_what_it_evaluates():
    """Stores of a training split are never what a probe, an audit or names are evaluated on."""
    lines = [shlex.split(line) for group in commands().values() for line in group]
    trained_on = {line[2] for line in lines if line[1] == "train"} | {"msae-demo/scenes.store"}
    for line in lines:
        options = dict(itertools.pairwise(line))
        classifier_rows = {options.get("--probe-train"), options.get("--train-store")}
        assert options.get("--on") not in (classifier_rows | trained_on) - {None}, line
