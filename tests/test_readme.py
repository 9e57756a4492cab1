"""README's commands for people who have vectors run, and the files that README and ARCHITECTURE.md name exist."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msae.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## I have vectors")[1].split("\n## ")[0]
D_IN, N_CLASSES, N_WORDS = 64, 8, 24

THEIRS = {
    "caltech101/01366": "photos/7",
    "--latent 372": "--latent 1",
}
"""What the vectors below have for what README's have."""


def fenced(kind: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", SECTION, re.M | re.S)
    return [text for name, text in blocks if name == kind]


def commands() -> list[str]:
    return [line for block in fenced("") for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Vectors as README has them: rows with a label, a held-out file, and words; every direction is one word."""
    folder = tmp_path_factory.mktemp("vectors")
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(D_IN, D_IN)))[0]
    for name, n in (("photos", 1200), ("holdout", 120)):
        kinds = np.arange(n) % N_CLASSES
        x = directions[kinds] + 0.7 * directions[generator.integers(N_CLASSES, N_WORDS, n)]
        np.save(folder / f"{name}.npy", (x + 0.02 * generator.normal(size=x.shape)).astype(np.float32))
        rows = [(f"{name}/{i}", f"set{kind % 2}", f"class{kind}") for i, kind in enumerate(kinds)]
        write_table(folder / f"{name}.csv", ("id", "dataset", "label"), rows)
    np.save(folder / "words.npy", directions.astype(np.float32))
    write_table(folder / "words.csv", ("text",), [(f"word{i}",) for i in range(D_IN)])
    return folder


def write_table(path: Path, names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.fixture(scope="module")
def named(folder) -> list[str]:
    """The names that latents have once the commands as far as `msae name` have run."""
    lines = commands()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in lines[: 1 + [line.split()[1] for line in lines].index("name")]:
            run(command, ())
    concepts = json.loads((folder / "runs/photos/names.json").read_text())["concepts"]
    return list(dict.fromkeys(concept["name"] for concept in concepts))


def with_names_of_ours(text: str, names: Sequence[str]) -> str:
    for theirs, ours in [*THEIRS.items(), *zip(("flamingo", "watch", "airliner"), names, strict=False)]:
        text = text.replace(theirs, ours)
    return text


def run(command: str, names: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(shlex.split(with_names_of_ours(command, names))[1:])
    assert left.value.code == 0, command


def test_commands_for_vectors_run_from_the_files_to_a_report(folder, named, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    lines = commands()
    verbs = [line.split()[1] for line in lines]
    assert verbs == ["info", "train", "evaluate", "gallery", "name", "search", "audit", "report", "explore"]
    assert lines[-1] == "msae explore runs/photos --on photos.npy"  # it serves until Ctrl-C; tests/test_explorer*.py
    assert len({f"word{i}" for i in range(N_WORDS)} & set(named)) > N_WORDS // 2
    for command in lines[verbs.index("search") : -1]:
        run(command, named)
    printed = capsys.readouterr().out
    assert "rank  id" in printed and "worst group" in printed
    assert (folder / "runs/photos/report.html").stat().st_size > 10_000


def test_python_for_vectors_gives_what_the_commands_give(folder, named, tmp_path, monkeypatch):
    for file in (*folder.glob("*.npy"), *folder.glob("*.csv")):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = fenced("python")
    found: dict[str, Any] = {}
    exec(compile(with_names_of_ours(block, named), "README.md", "exec"), found)
    assert list(dict.fromkeys(concept.name for concept in found["names"])) == named
    assert found["z"].shape == (16, 8 * D_IN) and found["x_hat"].shape == (16, D_IN)
    assert [hit.rank for hit in found["hits"].hits] == [1, 2, 3]
    assert found["audit"].concepts and "photos/9" in found["table"].to_text()
    assert (tmp_path / "runs/photos/report.html").exists()


def test_every_named_file_of_the_package_exists():
    architecture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:base|data|sae|measure|concepts|use|web|world|cli)/[\w/]*(?:\.py)?)`", architecture + README)
    )
    assert len(named) > 30
    assert [name for name in sorted(named) if not exists(name)] == []


def test_every_named_function_is_in_its_file():
    architecture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w.]+)`(?: and `(\w+)`)? in `([\w/]+\.py)`", architecture)
    pairs = [(name.rsplit(".")[-1], file) for *names, file in named for name in names if name]
    assert len(pairs) >= 12
    for name, file in pairs:
        text = (ROOT / "src" / "msae" / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(?:def |class )?{name}\b *[(:=]", text, re.M), f"{name} is not in {file}"


def test_every_linked_page_exists():
    for page in (
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ):
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


def exists(name: str) -> bool:
    """Whether a file, a package or a module (without its ending) of this name is in the package."""
    path = ROOT / "src" / "msae" / name
    return path.exists() or path.with_suffix(".py").exists()
