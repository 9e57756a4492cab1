"""A verb's options, read off the signature and the docstring of its Python function, so that each is written once."""

from __future__ import annotations

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Required, TypedDict, Union

from msae.cli import signatures

if TYPE_CHECKING:
    from msae.cli.verbs import Verb

JSON_HELP = "Also write the result as JSON to this file; - writes it to stdout instead of the text."
METAVARS = {
    "as_": "NAME", "audit": "FILE", "beside": "RUN", "class_texts": "CLASS=TEXT", "classifier": "FILE",
    "column": "COLUMN", "concept": "CONCEPT", "config": "FILE.toml", "device": "DEVICE", "embedding": "FILE.npy",
    "encoder": "MODEL", "fix": "FILE", "from_": "STORE:COLUMN=VALUE", "groups": "COLUMN", "html": "FILE.html",
    "image": "FILE", "json": "FILE", "labels": "COLUMN", "language": "CODE", "like": "ID", "names": "FILE.json",
    "on": "STORE", "out": "PATH", "pairs": "FILE", "part": "I/N", "positive": "CLASS", "probe_train": "STORE",
    "ray": "ADDRESS", "revision": "COMMIT", "set": "CONCEPT=VALUE", "sheet": "FILE", "show": "COLUMN", "sweep_id": "ID",
    "target": "COLUMN", "text": "WORDS", "train_store": "STORE", "unlike": "ID", "value": "VALUE",
    "vocabulary": "STORE", "where": "CONDITION", "within": "COLUMN", "words": "FILE",
}  # fmt: skip
"""What help shows for a value whose name says more than its type."""
APPENDED = ("concept", "set")
"""Options that are given once for each value."""


class Option(NamedTuple):
    """One option or argument of a verb."""

    name: str
    hint: Any
    """A type that a word of the command line can be."""
    default: Any
    """`inspect.Parameter.empty` where the option must be given."""
    help: str


def options_of(verb: Verb) -> dict[str, Option]:
    """The options of a verb, by name, in the order of the function's parameters."""
    found = [one for one in signatures.parameters(verb.function) if one.name not in verb.hidden]
    if verb.settings is not None:
        found += signatures.fields(verb.settings)
    finish = signatures.parameters(f"{verb.finish.__module__}:{verb.finish.__name__}")
    found += [one for one in finish if one.name not in ("call", "json")]
    words = [(one, _from_words(one.type)) for one in found]
    options = [Option(one.name, hint, one.default, one.text) for one, hint in words if hint is not None]
    return {option.name: option for option in [*options, Option("json", str, None, JSON_HELP)]}


def parse(
    verb: str, description: str, options: Mapping[str, Option], positional: Mapping[str, str], arguments: Sequence[str]
) -> dict[str, Any]:
    """The options that are given in `arguments`, and only those; a flag is always among them.

    Args:
        positional: The arguments that need no option, with what help calls them.
    """
    import tyro

    shown = {name: flag(name) for name in options} | dict(positional)

    fields: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for option in options.values():
        is_positional = option.name in positional
        markers: list[Any] = [tyro.conf.Positional] if is_positional else []
        hint = option.hint
        if hint is bool:
            defaults[option.name] = option.default
        elif option.name in APPENDED and typing.get_origin(hint) is tuple:
            defaults[option.name] = ()
            markers.append(tyro.conf.UseAppendAction)
        about = tyro.conf.arg(
            name=flag(option.name).removeprefix("--"),
            metavar=positional[option.name] if is_positional else None if hint is bool else metavar(option),
            help=help_text(option, shown),
            help_behavior_hint=default_text(option),
        )
        hint = Annotated[(hint, *markers, about)]
        fields[option.name] = Required[hint] if option.default is inspect.Parameter.empty else hint
    record: Any = TypedDict(verb, fields, total=False)  # type: ignore[misc]  # made at run time
    record.__doc__ = _plain(description, shown)
    config = (tyro.conf.FlagCreatePairsOff,)
    given = tyro.cli(record, prog=f"msae {verb}", args=arguments, default=defaults, config=config)
    return {name: value for name, value in given.items() if name in options}


def _from_words(hint: Any) -> Any:
    """The part of a type that words of a command line can be; None where there is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _from_words(arguments[0])
    if hint in (str, int, float, bool, Path) or origin is Literal:
        return hint
    if origin in (Union, types.UnionType):
        parts = [part for part in map(_from_words, arguments) if part is not None]
        # Of several runs or one run it is several; a path is given as its text.
        several = next((part for part in parts if typing.get_origin(part) is tuple), None)
        text = str if str in parts else None
        return several or text or (parts[0] if parts else None)
    if origin in (tuple, list, collections.abc.Sequence):
        inner = _from_words(arguments[0])
        return None if inner is None else tuple[inner, ...]  # type: ignore[valid-type]
    return None


def flag(name: str) -> str:
    """How a parameter is written on the command line; Python's `as_` is `--as`."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def metavar(option: Option) -> str:
    hint, several = option.hint, ""
    if typing.get_origin(hint) is tuple:
        hint, several = typing.get_args(hint)[0], "" if option.name in APPENDED else "..."
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}" + several
    return METAVARS.get(option.name, {int: "INT", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")) + several


def default_text(option: Option) -> str:
    """What help says after the text of an option."""
    if option.default is inspect.Parameter.empty:
        return "(required)"
    if option.default is None or isinstance(option.default, bool) or option.default == ():
        return ""
    return f"(default: {option.default})"


def help_text(option: Option, shown: Mapping[str, str]) -> str:
    text = _plain(option.help, shown)
    return f"Do not {text[:1].lower()}{text[1:]}" if option.hint is bool and option.default is True else text


def _plain(text: str, shown: Mapping[str, str]) -> str:
    """A docstring's text for a terminal: a parameter in backticks becomes its option, other backticks go."""
    return re.sub(r"`([^`]*)`", lambda found: shown.get(found.group(1), found.group(1)), text)
