"""The notebooks run from the first cell to the last, and are committed without what they print."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("audit_and_fix", "first_steps", "your_own_vectors")
NEEDS = {"audit_and_fix": "transformers", "first_steps": "transformers"}
runs_kernels = pytest.mark.skipif(
    os.name != "posix", reason="the event loop of Windows warns that a kernel's sockets do not suit it"
)

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="an sdist has no notebooks")


def read(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebook, folder: Path, monkeypatch) -> None:
    from nbclient import NotebookClient

    src = Path(__file__).parents[1] / "src"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(src), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()


def test_these_are_the_notebooks():
    assert sorted(file.stem for file in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source
        assert len(cell.source.splitlines()) <= 30
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_installs_msae_where_it_is_missing(name):
    first = read(name).cells[0].source
    package = '"msae[clip]"' if name in NEEDS else "msae"
    assert (
        f"try:\n    import msae\nexcept ImportError:\n    %pip install -q {package}\n" in first and "://" not in first
    )


@runs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs(name, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS.get(name, "msae"))
    notebook = read(name)
    execute(notebook, tmp_path, monkeypatch)
    folder = name.replace("_", "-")
    assert [path.name for path in tmp_path.iterdir()] == [folder], "all that a notebook writes is in its own folder"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error" or one.get("name") == "stderr"]
    pages = [one.data["text/html"] for one in outputs if "text/html" in one.get("data", {})]
    assert len(pages) >= 5 and any("<table>" in page for page in pages)
    if name in NEEDS:
        assert sum(page.count('<img src="data:image/jpeg') for page in pages) >= 12


WATCHED = """
import time
from msae.base import progress
shown, publish = [], get_ipython().display_pub.publish
get_ipython().display_pub.publish = lambda data, *more, **known: shown.append(data["text/html"])
progress.REDRAWN = 0.01
for progress.DELAY in (60, 0.01):
    with progress.progress("a < b", total=3, unit="rows", start=1) as advance:
        for _ in range(2):
            time.sleep(0.05)
            advance(1)
print("\\n".join(shown))
"""


@runs_kernels
def test_long_work_shows_a_bar_in_a_notebook_and_short_work_none(tmp_path, monkeypatch):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WATCHED)])
    execute(notebook, tmp_path, monkeypatch)
    bars = [f"a &lt; b <progress value={n} max=3></progress> {n} of 3 rows" for n in (2, 3)]
    assert [output.text for output in notebook.cells[0].outputs] == ["\n".join([*bars, "", ""])]
