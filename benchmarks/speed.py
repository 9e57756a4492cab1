"""Every benchmark of speed and memory, one after the other; each rewrites its section of RESULTS.md.

    python benchmarks/speed.py [--peer NAME=PYTHON]... [--only train_step.py ...]

Takes about two hours on two cores that nothing else uses. Peers are those of `train_step.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPTS = {
    "train_step.py": ["--full"],
    "scaling.py": [],
    "train_memory.py": [],
    "embed.py": [],
    "evaluate.py": [],
    "cknna.py": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    options = parser.parse_args()
    peers = [word for peer in options.peer for word in ("--peer", peer)]
    for script in options.only:
        command = [sys.executable, str(Path(__file__).with_name(script)), *SCRIPTS[script]]
        print(f"--- {script}", flush=True)
        subprocess.run([*command, *(peers if script == "train_step.py" else [])], check=True)


if __name__ == "__main__":
    main()
