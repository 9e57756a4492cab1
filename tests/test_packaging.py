"""What is built for others: a small sdist, and a wheel made from it that holds the whole package."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

import msae

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = ROOT / ".github" / "workflows"
FROM_DOCS = {"msae/web/templates/glossary.md": ROOT / "docs" / "glossary.md"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with the sdist and with the wheel that is built from the sdist, as `python -m build` makes them."""
    for name in ("build", "hatchling"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; it comes with msae[dev]")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    package = {path.relative_to(ROOT / "src").as_posix(): path for path in (ROOT / "src" / "msae").rglob("*")}
    here = {name: path for name, path in package.items() if path.is_file() and "__pycache__" not in name} | FROM_DOCS
    with ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == set(here)
        assert [name for name in names if wheel.read(name) != here[name].read_bytes()] == []
    kinds = {Path(name).suffix for name in names}
    assert kinds >= {".py", ".html", ".css", ".js", ".txt", ".json", ".safetensors", ".typed", ".md"}


def test_the_wheel_says_what_pyproject_says(built):
    with ZipFile(next(built.glob("*.whl"))) as wheel:
        [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        said = message_from_bytes(wheel.read(metadata))
        [scripts] = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert (said["Name"], said["Version"]) == (PROJECT["name"], msae.__version__)
    assert said["Requires-Python"] == PROJECT["requires-python"]
    assert set(said.get_all("Classifier")) == set(PROJECT["classifiers"])
    assert re.search(r"^msae = msae\.cli:main$", scripts, re.M)


def test_the_sdist_is_small_and_leaves_out_benchmarks_and_pictures(built):
    file = next(built.glob("*.tar.gz"))
    with tarfile.open(file) as archive:
        sizes = {member.name.partition("/")[2]: member.size for member in archive.getmembers() if member.isfile()}
    assert file.stat().st_size < 4_000_000
    assert max(size for name, size in sizes.items() if name != "src/msae/world/clip/model.safetensors") < 400_000
    assert {name.partition("/")[0] for name in sizes} - {"PKG-INFO", ".gitignore"} == {
        "src", "tests", "docs", "ARCHITECTURE.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE",
        "README.md", "constraints.txt", "pyproject.toml",
    }  # fmt: skip
    assert {"tests/conftest.py", "tests/test_packaging.py", "docs/glossary.md"} <= set(sizes)


def test_the_version_is_the_newest_of_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest and newest.group(1) == msae.__version__


@pytest.mark.skipif(not WORKFLOWS.exists(), reason="an sdist has no workflows")
def test_workflows_test_the_versions_we_name_and_pin_every_action():
    text = (WORKFLOWS / "tests.yml").read_text(encoding="utf-8")
    tested = re.findall(r'"(3\.\d+)"', re.search(r"python-version: \[(.*)\]", text).group(1))
    assert tested == [one.rsplit(" ")[-1] for one in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", one)]
    used = [one for file in WORKFLOWS.glob("*.yml") for one in re.findall(r"uses: (.*)", file.read_text("utf-8"))]
    assert len(used) >= 8 and [one for one in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", one)] == []
