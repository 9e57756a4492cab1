"""The architecture holds: imports only point down, files and functions stay small, start-up stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "msae"
LAYERS = [
    {"errors", "files", "config", "progress", "loggers", "arrays", "tables", "images", "devices"},
    {"activations", "losses", "metrics", "standardize", "kernels", "evidence", "hierarchy", "effects", "interventions"}
    | {"filters", "rivals"},
    {"store", "sources", "embedder", "sae", "probe", "concepts", "samples", "classifier", "edits", "neighbours"},
    {"embedding", "training", "evaluation", "naming", "galleries", "retrieval", "auditing", "alignment"},
    {"reporting", "interop", "distributed", "demo"},
    {"cli", "explorer"},
]
SIDEWAYS = {
    ("losses", "activations"), ("kernels", "losses"), ("kernels", "activations"), ("metrics", "activations"),
    ("files", "errors"), ("config", "errors"), ("loggers", "errors"), ("loggers", "files"), ("progress", "errors"),
    ("edits", "sae"),  # what an edit does to an SAE's activations
    ("arrays", "errors"), ("devices", "errors"), ("tables", "errors"), ("images", "errors"),
}  # fmt: skip
MODULES = sorted(SRC.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(SRC).with_suffix("").parts[0]


def layer_of(room: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if room in layer)


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "msae" else [node.module or ""]
        rooms |= {name.split(".")[1] for name in names if name.startswith("msae.")} - {"__version__"}
    return rooms


@pytest.mark.parametrize("file", [f for f in MODULES if room_of(f) not in ("__init__", "__main__")], ids=str)
def test_imports_only_point_down(file):
    room = room_of(file)
    for other in imported_rooms(file) - {room}:
        is_down = layer_of(other) < layer_of(room)
        assert is_down or (room, other) in SIDEWAYS, f"{room} (layer {layer_of(room)}) imports {other}"


@pytest.mark.parametrize("file", MODULES, ids=str)
def test_files_and_functions_stay_small(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_msae_is_light():
    heavy = ["transformers", "matplotlib", "gradio", "sklearn", "scipy", "PIL", "pyarrow", "numba", "rich", "tyro"]
    loaded = run("import msae, msae.training, msae.evaluation, sys; print(*sys.modules)").split()
    assert not set(heavy) & set(loaded)


def test_help_loads_no_torch():
    loaded = run(
        "import sys\nfrom msae.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    ).split()
    assert "torch" not in loaded and "numpy" not in loaded
