"""Prove the exports in the other libraries: each is installed into its own environment and computes what msae does.

Usage, in msae's environment: python tests/peers/run.py RUN VECTORS.npy [TEXTS.npy] [--rows FIRST]
The environments stay in DIR; torch is taken as a CPU build where pip has one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

TORCH = "torch==2.13.0"
PACKAGES = {
    "saelens": [TORCH, "sae-lens==6.54.12"],
    "saelens-hub": [TORCH, "sae-lens==6.54.12"],
    "sparsify": [TORCH, "eai-sparsify==1.3.3"],
    "dictionary-learning": [TORCH, "dictionary-learning==0.1.0"],
    "sentence-transformers": [TORCH, "sentence-transformers==6.2.0"],
    "onnx": ["numpy", "onnxruntime==1.32.0"],
    "embedding-atlas": [TORCH, "embedding-atlas==0.26.0"],
}
WITHOUT = {"dictionary-learning": ["torchvision"]}
"""What a package brings that does not import beside a CPU build of torch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("vectors", nargs="+", help="1,000 rows or more of each modality of the SAE, images first")
    parser.add_argument("--rows", type=int, default=0, help="the first of the 1,000 rows")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "msae-peers")
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--json", type=Path, help="write what was found")
    parser.add_argument("--docs", type=Path, help="write the table between its marks in this file")
    arguments = parser.parse_args()
    found, failed = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [arguments.run, arguments.vectors[0], str(folder), str(arguments.rows), *arguments.vectors[1:]]
        subprocess.run([sys.executable, HERE / "prepare.py", *words], check=True)
        for peer in arguments.only:
            python = environment(arguments.environments, peer)
            for case in sorted((folder / peer.removesuffix("-hub")).iterdir()):
                env, close = serving(folder / "saelens", folder / "hub") if peer.endswith("-hub") else ({}, int)
                done = subprocess.run(
                    [python, HERE / "check.py", peer, case],
                    capture_output=True,
                    text=True,
                    env={**os.environ, **env, "PYTHONPATH": ""},
                    check=False,
                )
                close()
                line = (done.stdout.strip().splitlines() or [done.stderr[-2000:]])[-1]
                print(("ok  " if done.returncode == 0 else "FAIL"), line, flush=True)
                failed += done.returncode != 0
                found += [json.loads(line)] if line.startswith("{") else []
    text = table(found)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.docs:
        head, _, rest = arguments.docs.read_text().partition("<!-- peers: begin -->\n")
        tail = rest.partition("<!-- peers: end -->")[2]
        arguments.docs.write_text(f"{head}<!-- peers: begin -->\n{text}\n<!-- peers: end -->{tail}")
    sys.exit(failed > 0)


def environment(root: Path, peer: str) -> Path:
    """The Python of a virtual environment with the packages of a peer, made where there is none."""
    folder = root / peer.removesuffix("-hub")
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[peer]], check=True)
        if peer in WITHOUT:
            subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *WITHOUT[peer]], check=True)
    return python


def serving(folder: Path, home: Path):
    """The stand-in of the hub with the exported folders as one repository: its environment, and what ends it."""
    from tests.hub_stand_in import Hub

    hub = Hub(needs_token=False)
    files = (file for file in folder.rglob("*") if file.is_file())
    hub.repos["someone/an-sae"] = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    return hub.env(home, token=None), hub.close


def table(found: list[dict]) -> str:
    lines = [
        "| library | version | inference | active in a row | rows whose codes differ | largest activation that differs "
        "| error of activations | error of reconstructions |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        numbers = (
            "-" if one[name] is None else f"{one[name]:.1e}" if one[name] else "0"
            for name in ("largest_differing", "encode_error", "decode_error")
        )
        lines.append(
            f"| {one['peer']} | {one['version']} | {one['case']} | {one['active']:.1f} | "
            f"{one['codes_differ_in']} of {one['rows']:,} | {' | '.join(numbers)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
