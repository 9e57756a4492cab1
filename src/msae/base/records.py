"""Dataclasses and the JSON they are kept in: each value is checked against its field's type, by msgspec."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from msae.base.errors import ConfigError, MsaeError, nearest
from msae.base.files import read_json, write_json

T = TypeVar("T")


def to_record(value: Any) -> Any:
    """A dataclass, or a container of them, as what JSON knows: tuples are lists and paths are text."""
    # Not by msgspec.to_builtins: it leaves out fields at their defaults of what msgspec.convert made.
    if dataclasses.is_dataclass(value):
        return {field.name: to_record(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_record(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_record(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def of_record(cls: type[T], data: Any, *, where: str, error: Callable[[str], MsaeError], remedy: str) -> T:
    """What `to_record` made `data` of.

    Args:
        where: The file, for the message.
        remedy: What to type, for the message.

    Raises:
        MsaeError: Made by `error`: a field is missing or unknown, a value is not of its field's type, or
            `cls` refuses it.
    """
    try:
        value = msgspec.convert(data, cls, dec_hook=_of_text)
    except (msgspec.ValidationError, ConfigError) as err:
        raise error(f"{where} is damaged ({_plain(err)}); {remedy}") from err
    unknown = _unknown(data, to_record(value))
    if unknown:
        raise error(f"{where} is damaged ({unknown}); {remedy}")
    return value


def _unknown(data: Any, record: Any) -> str:
    """Refuse a key of `data` that the record does not have; msgspec would drop it silently."""
    if isinstance(record, dict):
        for key, value in data.items():
            if key not in record:
                return f"unknown setting {key!r}{nearest(str(key), map(str, record))}"
            found = _unknown(value, record[key])
            if found:
                return found
    elif isinstance(record, list):
        return next(filter(None, map(_unknown, data, record)), "")
    return ""


def write_record(path: Path, value: Any, *, schema_version: int) -> None:
    """Write a dataclass with its schema version, atomically; floats that are not finite are refused."""
    write_json(path, to_record(value), schema_version=schema_version)


def read_record(
    path: Path,
    cls: type[T],
    *,
    schema_version: int | tuple[int, ...],
    error: Callable[[str], MsaeError],
    remedy: str,
) -> T:
    """Read what `write_record` wrote.

    Raises:
        MsaeError: Made by `error`: the file is missing, damaged, or has another schema version.
    """
    data = read_json(path, schema_version=schema_version, error=error)
    data = {key: known for key, known in data.items() if key not in ("schema_version", "made_by")}
    return of_record(cls, data, where=str(path), error=error, remedy=remedy)


def checked(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, lists as tuples and text as paths.

    Raises:
        TypeError: It is of another type; the message says what was expected.
    """
    try:
        return msgspec.convert(value, hint, dec_hook=_of_text)
    except msgspec.ValidationError as err:
        raise TypeError(_plain(err)) from err


def _of_text(hint: type, value: Any) -> Any:
    if issubclass(hint, Path) and isinstance(value, str | Path):
        return Path(value)
    raise TypeError(f"expected {'str' if issubclass(hint, Path) else hint.__name__}, got {type(value).__name__}")


def _plain(err: Exception) -> str:
    """msgspec's message in our words: the field first, then what was expected."""
    text, _, place = str(err).partition(" - at ")
    text = text.replace("`", "")
    field = place.strip("`").removeprefix("$").removeprefix(".")
    text = f"{text[:1].lower()}{text[1:]}"
    return f"{field}: {text}" if field else text
