"""JSON that other verbs wrote, read back: evaluations, training metrics, audits."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msae.auditing import Audit
from msae.errors import ConfigError
from msae.evaluation import Evaluation, RecoveryPoint

MAX_JSON = 50_000_000
"""Characters of an audit that is loaded."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a damaged line is left out."""
    file = folder / "metrics.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_evaluations(folders: Mapping[str, Path]) -> list[Evaluation]:
    """What is in the eval folders of runs, by their labels: of each its newest record, one with recovery if any has."""
    found: dict[str, Evaluation] = {}
    by_name = {folder.resolve().name: label for label, folder in folders.items()}
    files = [file for folder in folders.values() for file in (folder / "eval").glob("*.json")]
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for record in data if isinstance(data, list) else [data]:
            read = read_evaluation(record, default=file.parent.parent.name)
            label = None if read is None or read.run is None else by_name.get(read.run.rstrip("/").split("/")[-1])
            if (
                read is not None
                and label is not None
                and (read.recovery or not (label in found and found[label].recovery))
            ):
                found[label] = dataclasses.replace(read, run=label)
    return [found[label] for label in folders if label in found]


def read_evaluation(record: Any, *, default: str) -> Evaluation | None:
    """The evaluation in a JSON record, or None where it is none; `default` is the run of one that does not say it."""
    if not isinstance(record, Mapping):
        return None
    known = {field.name for field in dataclasses.fields(Evaluation)}
    values = {key: value for key, value in record.items() if key in known}
    try:
        points = [RecoveryPoint(**point) for point in values.get("recovery") or ()]
        notes = tuple(str(text) for text in values.get("notes", ()))
        run = str(values.get("run") or default)
        return Evaluation(**{**values, "run": run, "recovery": tuple(points) or None, "notes": notes})
    except TypeError:
        return None


def read_audit(text: str) -> Audit:
    """The audit in the text of a JSON file.

    Raises:
        ConfigError: It is not what `msae audit --json` writes.
    """
    if len(text) > MAX_JSON:
        raise ConfigError(f"the file has {len(text):,} characters, more than any audit")
    try:
        data = json.loads(text)
        return typing.cast("Audit", _built(Audit, data))
    except (ValueError, TypeError, KeyError, RecursionError) as err:
        raise ConfigError(f"it cannot be read as one ({type(err).__name__}: {err})") from err


def _built(hint: Any, value: Any) -> Any:
    """JSON values as the type that `hint` says; `class_` is called `class` in JSON."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise TypeError(f"{type(value).__name__} where {hint.__name__} is wanted")
        known = typing.get_type_hints(hint)
        fields = [f for f in dataclasses.fields(hint) if f.name.rstrip("_") in value and f.name != "sample"]
        return hint(**{f.name: _built(known[f.name], value[f.name.rstrip("_")]) for f in fields})
    if origin is tuple:
        return tuple(_built(arguments[0], item) for item in value)
    if origin is dict:
        return dict(value)
    if arguments and type(None) in arguments:
        return None if value is None else _built(arguments[0], value)
    if hint is float:
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(f"{value!r:.40} where {hint.__name__} is wanted")
    return value
