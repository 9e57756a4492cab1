"""The architecture holds: imports only point to earlier wings, without circles, and start-up stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from msae.cli.verbs import VERBS, load

SRC = Path(__file__).parents[1] / "src" / "msae"
WINGS = ("base", "data", "sae", "measure", "concepts", "use", "web", "world", "cli")
"""In the order in which data passes; a wing imports only from itself and from those before it."""

FILES = sorted(SRC.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_modules(file: Path, *, top_level_only: bool = False) -> set[str]:
    """The modules of msae that a file imports; `top_level_only` leaves out those inside functions and for types."""
    found = set()
    nodes = list(ast.parse(file.read_text()).body) if top_level_only else list(ast.walk(ast.parse(file.read_text())))
    for node in nodes:
        if top_level_only and is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {name for name in found if name in MODULES and name != "msae"}


def wing_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("msae", "msae.__main__")])
def test_imports_only_point_to_earlier_wings(module):
    for other in imported_modules(MODULES[module]):
        assert WINGS.index(wing_of(other)) <= WINGS.index(wing_of(module)), f"{module} imports {other}"


def test_every_entry_is_a_known_wing():
    entries = {path.name for path in SRC.iterdir() if path.name != "__pycache__"}
    assert entries == {*WINGS, "__init__.py", "__main__.py", "py.typed"}
    assert all(ast.get_docstring(ast.parse((SRC / wing / "__init__.py").read_text())) for wing in WINGS)


def test_no_two_files_import_each_other_in_a_circle():
    graph = {module: imported_modules(file, top_level_only=True) for module, file in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in graph[module]:
                if not (module.startswith(f"{other}.")):  # a package that gathers what its files define
                    visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


HEAVY = {"transformers", "matplotlib", "sklearn", "scipy", "PIL", "pyarrow", "numba", "rich", "tyro", "starlette"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_msae_is_light():
    loaded = run("import msae, msae.sae.train, msae.measure.evaluate, sys; print(*sys.modules)").split()
    assert not HEAVY & set(loaded)


def test_help_loads_no_torch():
    loaded = run(
        "import sys\nfrom msae.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    ).split()
    assert "torch" not in loaded and "numpy" not in loaded


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_nothing_heavy(verb):
    told = run(
        f"import sys\nfrom msae.cli import main\ntry: main([{verb!r}, '--help'])\nexcept SystemExit: pass\n"
        "print(*sys.modules)"
    )
    loaded = set(told.splitlines()[-1].split())
    assert (
        "--json" in told
        and "tyro" in loaded
        and not {"torch", "numpy", "msgspec"} & loaded
        and not HEAVY - {"tyro"} & loaded
    )


def test_dir_lists_what_is_public_and_nothing_else():
    import msae

    assert sorted(dir(msae)) == sorted(msae.__all__)
    for name in msae.__all__:
        assert getattr(msae, name) is not None
    assert not [name for name in dir(msae) if name.startswith("_")]


def test_every_verb_of_the_command_line_is_a_function_of_msae():
    import msae

    for verb in VERBS:
        assert getattr(msae, verb) is load(VERBS[verb].function)


def test_kernels_are_there_after_import_msae():
    code = "import msae; msae.kernels.sae_loss; msae.losses.level_weights; msae.metrics.fvu; msae.errors.StoreError"
    subprocess.run([sys.executable, "-c", code], check=True)
