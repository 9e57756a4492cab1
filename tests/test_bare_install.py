"""A bare install does everything on vectors that are there; what needs an extra ends in one line that names it."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msae.base.errors import EXTRAS, missing_dependency
from msae.cli import VERBS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITH_OTHERS = ("wandb", "trackio", "triton", "pandas", "fsspec", "ray")
"""Modules that no extra brings, or that others bring: a bare install may lack them too."""
OF_THE_PROJECT = ("dev", "docs")
"""Extras for work on msae itself."""
N, D_IN = 300, 16


def names_of(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", one).group() for one in requirements}


WORKS = [
    "train x.npy --out run --d-sae 64 --levels 8 64 --epochs 2 --batch-size 50 --device cpu",
    "train x.npy --out run2 --d-sae 64 --levels 8 64 --epochs 2 --batch-size 50 --device cpu --seed 1",
    "info x.npy",
    "info run",
    "evaluate run run2 --on x.npy --labels label --recovery",
    "name run --vocabulary words.npy --on x.npy --modality image --rule poster",
    "name run --as odd --from x.npy:label=b",
    "find run --on x.npy --column label",
    "gallery run --on x.npy --latent 3 --sheet sheet.png",
    "gallery run --on x.npy --latent 3 --sheet sheet.html",
    "gallery run --on x.npy --tree",
    "gallery run --on x.npy --magnitudes",
    "stability run run2",
    "search run --on x.npy --like r7 --set #3=2 --html search.html",
    "search run --on x.npy --like r7 --space latent",
    "compare run x.npy:label=a x.npy:label=b --html c.html --json c.json",
    "audit run --on x.npy --target label --concept #3 --concept #4 --permutations 50 --html a.html --json a.json",
    "report run --on x.npy --beside run2 --audit a.json --compare c.json",
    "encode run --on x.npy --out codes.parquet",
    "encode run --on x.npy --out codes.npz",
    "export run --to saelens --out saelens",
    "export run --to embedding-atlas --on x.npy --out atlas",
    "import saelens --out again",
    "push run me/sae --dry-run",
]
"""In their order, each on what those before it made."""
NEEDS = {
    "demo --out demo": "clip",
    "embed pictures --encoder demo --out new": "clip",
    "embed captions.txt --encoder some/model --out new": "clip",
    "embed hf://some/pictures --encoder demo --out new": "",
    "embed hf:///nowhere/saved --encoder demo --out new": "",
    "search run --on x.npy --text red --encoder demo": "clip",
    "search run --on x.npy --image pictures/0.png --encoder demo": "clip",
    "evaluate nobody/run --on x.npy": "clip",
    "encode run --on x.npy --to qdrant://localhost/rows": "formats",
    "export run --to onnx --out onnx": "formats",
    "push run me/sae": "clip",
    "train x.npy --out logged --loggers tensorboard --d-sae 64 --device cpu": "loggers",
    "train x.npy --out logged --loggers wandb --d-sae 64 --device cpu": "",
}
"""Which extra the line must name; where two may come first, or none has it, any line that says what to type."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """What each command does, by the command."""
    folder = tmp_path_factory.mktemp("bare")
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", rng.normal(size=(N, D_IN)).astype(np.float32))
    rows = "".join(f"r{i},{'ab'[i % 2]},{'red' if i % 2 else 'blue'} thing\n" for i in range(N))
    (folder / "x.csv").write_text("id,label,text\n" + rows)
    np.save(folder / "words.npy", rng.normal(size=(20, D_IN)).astype(np.float32))
    (folder / "words.csv").write_text("word\n" + "".join(f"word{i}\n" for i in range(20)))
    (folder / "captions.txt").write_text("a red star\n")
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "pictures/0.png")
    commands = [*WORKS, *NEEDS]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/bare_install.py"), "found.json", ",".join([*EXTRAS, *WITH_OTHERS])],
        input="".join(json.dumps(command.split()) + "\n" for command in commands),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads((folder / "found.json").read_text()), strict=True)), folder


@pytest.mark.parametrize("command", WORKS)
def test_a_bare_install_does_everything_on_vectors_that_are_there(bare, command):
    found = bare[0][command]
    assert found["code"] == 0 and found["out"], found["err"]


@pytest.mark.parametrize("command", NEEDS)
def test_what_needs_an_extra_ends_in_one_line_that_names_it(bare, command):
    found = bare[0][command]
    assert found["code"] == 1 and found["out"] == "", found
    assert found["err"].count("\n") == 1 and "unexpected" not in found["err"], found["err"]
    extra = NEEDS[command]
    assert f"pip install 'msae[{extra}]'" in found["err"] if extra else "pip install" in found["err"], found["err"]


def test_a_missing_extra_is_said_before_anything_is_made(bare):
    made = {path.name for path in bare[1].iterdir()}
    assert not made & {"demo", "new", "logged"}


def test_every_verb_is_tried():
    tried = {command.split()[0] for command in [*WORKS, *NEEDS]}
    assert tried | {"explore"} == set(VERBS)  # explore serves until Ctrl-C


def test_extras_bring_what_the_table_says_and_all_is_all_of_them():
    extras = PROJECT["optional-dependencies"]
    modules = importlib.metadata.packages_distributions()
    for module, extra in EXTRAS.items():
        assert extra in extras, module
        if module in modules and module not in ("tokenizers", "huggingface_hub", "llvmlite"):  # brought by another
            assert set(modules[module]) & names_of(extras[extra]), (module, extra)
    (everything,) = extras["all"]
    others = {"all", "cluster", "far", *OF_THE_PROJECT}  # large, and who has a cluster or a bucket asks for them
    assert set(everything.removeprefix("msae[").removesuffix("]").split(",")) == set(extras) - others


def imported(folder: Path) -> set[str]:
    """The top-level modules that the files of a folder import, or name in a call of import_module or find_spec."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return {name.partition(".")[0] for name in found}


def test_every_dependency_is_used_and_every_import_is_a_dependency():
    used = imported(ROOT / "src")
    modules = importlib.metadata.packages_distributions()
    of_users = set(PROJECT["optional-dependencies"]) - {"all", *OF_THE_PROJECT}
    extras = {name: PROJECT["optional-dependencies"][name] for name in of_users}
    declared = names_of(PROJECT["dependencies"]).union(*map(names_of, extras.values()))
    by_name = {name.lower(): module for module, names in modules.items() for name in names if module in used}
    silent = {"sentencepiece"}  # transformers imports it for tokenizers of SigLIP
    for name in declared - silent:
        if any(name in [one.lower() for one in names] for names in modules.values()):
            assert name in by_name, f"nothing imports {name}"


def test_the_import_behind_an_error_is_found():
    try:
        try:
            raise ModuleNotFoundError("No module named 'faiss.swig'", name="faiss.swig")
        except ImportError as err:
            raise ValueError("something else") from err
    except ValueError as err:
        assert "pip install 'msae[index]'" in str(missing_dependency(err))
    assert missing_dependency(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert missing_dependency(ValueError("faiss")) is None
