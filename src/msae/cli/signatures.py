"""What a file says of a function or dataclass in it, read without running the file: help does not wait for torch."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import docstring_parser

PACKAGE = Path(__file__).parents[1]
LIGHT = ("collections.abc", "functools", "pathlib", "typing")
"""Modules that are imported for what a type means; types of others are `Other`."""


class Argument(NamedTuple):
    """A parameter of a function, or a field of a dataclass."""

    name: str
    type: Any
    default: Any
    """`inspect.Parameter.empty` where there is none."""
    text: str
    """What the docstring says of it."""


class Other:
    """Stands for a type that only the file's own imports could tell."""

    def __class_getitem__(cls, _: Any) -> type:
        return cls


def description(place: str) -> str:
    """The docstring of the function that `place`, as MODULE:NAME, names, without its sections."""
    return _docstring(_find(place)[0]).description or ""


def parameters(place: str) -> Iterator[Argument]:
    """The parameters of a function."""
    function, file = _find(place)
    texts = {one.arg_name: one.description or "" for one in _docstring(function).params}
    given = function.args
    plain = given.posonlyargs + given.args
    defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults + given.kw_defaults
    for one, default in zip(plain + given.kwonlyargs, defaults, strict=True):
        yield file.argument(one.arg, one.annotation, default, texts.get(one.arg, ""))


def fields(place: str) -> Iterator[Argument]:
    """The fields of a dataclass, each with the docstring below it."""
    record, file = _find(place)
    for field, below in itertools.pairwise([*record.body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            yield file.argument(ast.unparse(field.target), field.annotation, field.value, str(text))


def _find(place: str) -> tuple[Any, _File]:
    """The definition that `place` names, and the file that it stands in."""
    module, name = place.split(":")
    file = _file(module)
    node = file.nodes[name]
    return _find(f"{node.module}:{name}") if isinstance(node, ast.ImportFrom) else (node, file)


def _docstring(function: ast.FunctionDef) -> docstring_parser.Docstring:
    import docstring_parser

    return docstring_parser.parse(ast.get_docstring(function, clean=False) or "")


class _File(dict[str, Any]):
    """What the names in a file of msae mean; each is found when it is looked up."""

    def __init__(self, module: str) -> None:
        super().__init__()
        path = PACKAGE.joinpath(*module.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        self.nodes: dict[str, ast.stmt] = {}
        for outer in ast.parse(path.read_text(encoding="utf-8")).body:
            for node in outer.body if isinstance(outer, ast.If) else [outer]:  # `if TYPE_CHECKING:`
                if isinstance(node, ast.Import | ast.ImportFrom):
                    self.nodes |= {alias.asname or alias.name: node for alias in node.names}
                elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                    self.nodes[node.name] = node
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    self.nodes[ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)] = node

    def __missing__(self, name: str) -> Any:
        node = self.nodes[name]  # a KeyError sends Python on to its builtins
        if isinstance(node, ast.ImportFrom):
            module = str(node.module)
            if module.startswith("msae."):
                return _file(module)[name]
            return getattr(import_module(module), name) if module in LIGHT else Other
        if isinstance(node, ast.Import):
            return import_module(name) if name in LIGHT else Other
        return self.value(node.value) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value else Other

    def value(self, node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "", "eval"), {}, self)  # noqa: S307  # our own code

    def argument(self, name: str, annotation: ast.expr | None, default: ast.expr | None, text: str) -> Argument:
        value = inspect.Parameter.empty if default is None else self.value(default)
        return Argument(name, self.value(annotation) if annotation else Other, value, " ".join(text.split()))


_file = functools.cache(_File)
