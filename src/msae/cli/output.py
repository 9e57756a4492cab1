"""What every verb does with its result: text for people, JSON for programs."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

from msae.base.files import atomic_path


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


def check_target(target: str | None) -> None:
    """Refuse a place for --json that cannot be one, before the work and not after it.

    Raises:
        NotADirectoryError: The file would lie in another file.
        IsADirectoryError: It is a folder.
    """
    if target is None or target == "-":
        return
    if Path(target).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    folder = Path(os.path.realpath(target)).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _as_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
