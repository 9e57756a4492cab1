"""RESULTS.md: each benchmark owns one section of it, replaced whole whenever the benchmark runs again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

FILE = Path(__file__).with_name("RESULTS.md")
FIGURES = Path(__file__).with_name("figures")


def write_section(name: str, title: str, body: str) -> None:
    """Replace the section `name` of RESULTS.md, or add it at the end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else "# Results\n"
    section = f"{begin}\n## {title}\n\n{body.strip()}\n\n{provenance()}\n{end}"
    if begin in text:
        head, rest = text.split(begin, 1)
        text = head + section + rest.split(end, 1)[1]
    else:
        text = text.rstrip() + "\n\n" + section + "\n"
    FILE.write_text(text, encoding="utf-8")


def provenance() -> str:
    """The command, the commit and the machine, for under a table."""
    commit = _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", "src") else "")
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    command = "python benchmarks/" + " ".join(_without_folders(word) for word in words)
    return (
        f"<sub>`{command}` at commit {commit}; {_processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}; "
        f"load before it began or beside it {os.getloadavg()[2]:.1f}.</sub>"
    )


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=FILE.parent, capture_output=True, text=True, check=False
    ).stdout.strip()


def _without_folders(word: str) -> str:
    """A path as its last part: where this machine keeps things is nobody's business."""
    return Path(word).name if "/" in word else word


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
