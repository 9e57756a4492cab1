"""Settings: frozen dataclasses from TOML or JSON, with an unknown key refused by naming the nearest known one."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from msae.base import records
from msae.base.errors import ConfigError, nearest

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: The file is missing or is not TOML; the message holds the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give --config the name of a TOML file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise ConfigError(f"{path} is not readable TOML ({err}); correct that line") from err


def settings_from(
    cls: type[T], settings: T | None, options: Mapping[str, Any], *, config: str | Path | None = None, where: str
) -> T:
    """`settings`, or an instance of the dataclass `cls` from a TOML file and from `options`, which win over it.

    Raises:
        ConfigError: `settings` are given beside a file or options, so one of the two would be ignored; a key is
            unknown, or a value is not of its field's type.
    """
    chosen = _checked(cls, options, where=where)
    if settings is None:
        read = _checked(cls, read_toml(Path(config)), where=str(config)) if config is not None else {}
        return _make(cls, {**read, **chosen}, where=where)
    if not isinstance(settings, cls):
        raise ConfigError(f"{where}: settings is a {type(settings).__name__}; give a {cls.__name__}, or its fields")
    others = [*(["config"] if config is not None else []), *chosen]
    if others:
        raise ConfigError(
            f"{where}: settings and {', '.join(others)} are both given; put {'it' if len(others) == 1 else 'them'} "
            f"into the {cls.__name__}, or leave settings out"
        )
    return settings


def _checked(cls: type, values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """`values` by the names of the fields of `cls`, each converted to its field's type."""
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    checked = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{where}: unknown setting {key!r}{nearest(name, known)}")
        checked[name] = _convert(value, known[name], where=f"{where}: {key}")
    return checked


def _make(cls: type[T], checked: Mapping[str, Any], *, where: str) -> T:
    try:
        return cls(**checked)
    except TypeError as err:
        raise ConfigError(f"{where}: {err}") from err


def _convert(value: Any, hint: Any, *, where: str) -> Any:
    try:
        return records.checked(value, hint)
    except TypeError as err:
        choices = _choices(hint)
        if choices and isinstance(value, str):
            known = ", ".join(choices)
            raise ConfigError(f"{where} = {value!r} is not one of {known}{nearest(value, choices)}") from err
        raise ConfigError(f"{where} = {value!r} is {_in_words(type(value))}; give {_in_words(hint)}") from err


def _choices(hint: Any) -> list[str]:
    """The words that a type allows, also as one of several types or inside a list."""
    if typing.get_origin(hint) is Literal:
        return [str(one) for one in typing.get_args(hint)]
    return [word for inner in typing.get_args(hint) for word in _choices(inner)]


def _in_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in arguments if one is not type(None))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return f"a list, each {_in_words(arguments[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "text", list: "a list"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")


def to_mapping(settings: Any) -> dict[str, Any]:
    """The fields of a settings dataclass as JSON values."""
    return dict(records.to_record(settings))
