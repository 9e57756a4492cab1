"""Make docs/explorer-*.png: the explorer's pages over a demo's world, as Chromium shows them.

python scripts/screenshots.py --demo msae-demo
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

RUNS = ("msae", "topk-16", "relu-0.03")
PAGES = {
    "concepts": "?page=concepts",
    "concept": "?page=concept&latent={latent}",
    "map": "?page=map",
    "search": "?page=search&row={row}&set=night%3D4",
    "find": "?page=find&column=background&value=night",
    "compare": "?page=compare&column=background&a=night&b=sand",
    "audit": "?page=audit&target=background",
    "models": "?page=models&evaluate=1",
}
VIEWS = (("", 1280, 860, "light"), ("-phone", 390, 760, "dark"))
BUSY = "!!document.querySelector('[aria-busy]')"
COLOURS = 128
"""Of the palette: drawings and small pictures need no more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="the folder that msae demo made")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--row", default="10006003")
    options = parser.parse_args()
    runs = [str(options.demo / "runs" / run) for run in RUNS]
    latent = json.loads((Path(runs[0]) / "names.json").read_text())["concepts"][0]["latent"]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "address.json"
        on = str(options.demo / "holdout.store")
        command = [sys.executable, "-m", "msae", "explore", *runs, "--on", on, "--port", "0", "--json", str(told)]
        process = subprocess.Popen(command)
        while not told.exists():
            assert process.poll() is None
            time.sleep(0.05)
        try:
            base = json.loads(told.read_text())["url"]
            pages = {name: base + page.format(latent=latent, row=options.row) for name, page in PAGES.items()}
            total = take(pages, options.out)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    sys.stdout.write(f"{options.out}: {total:,} bytes in all\n")


def take(pages: dict[str, str], out: Path) -> int:
    """Write every view of every page; the bytes of all files."""
    total = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for suffix, width, height, scheme in VIEWS:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            for name, address in pages.items():
                page = context.new_page()
                page.goto(address)
                page.wait_for_selector("main:not([data-opening]) h1", timeout=120_000)
                while page.evaluate(BUSY):  # the pages' policy forbids what wait_for_function does
                    page.wait_for_timeout(50)
                page.wait_for_load_state("networkidle")
                picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
                file = out / f"explorer-{name}{suffix}.png"
                picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
                total += file.stat().st_size
                page.close()
            context.close()
        browser.close()
    return total


if __name__ == "__main__":
    main()
