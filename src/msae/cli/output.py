"""What every verb does with its result: text for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from msae.files import atomic_path


def say(line: str) -> None:
    """One line on stderr."""
    sys.stderr.write(line + "\n")


def report(text: str, data: Any, target: str | None) -> None:
    """Print `text`, and write `data` where --json says; with `-` the data alone goes to stdout."""
    if target == "-":
        sys.stdout.write(_as_json(data))
        return
    if target is not None:
        with atomic_path(Path(target)) as temporary:
            temporary.write_text(_as_json(data), encoding="utf-8")
    sys.stdout.write(text + "\n")


def _as_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
