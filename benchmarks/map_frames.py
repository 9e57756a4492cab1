"""Frame times of the explorer's map with many latents, in headless Chromium: pan, zoom, and the pointer moving.

    python benchmarks/map_frames.py [--latents 25000] [--frames 120]

The SAE is untrained and its rows random: only their number matters here. Where there is no GPU, Chromium draws WebGL in
software, on the cores that the browser needs too, so a person's machine is faster. Writes a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from playwright.sync_api import Page, sync_playwright

from msae.sae.model import SAE, SAEConfig
from results import write_section

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.explorer_world import served

D_IN, ROWS, K = 32, 4_000, 64
MOVES = {
    "pan": "camera.setState({ x: 0.5 + 0.2 * Math.sin(i / 9), y: 0.5 + 0.2 * Math.cos(i / 9) })",
    "zoom": "camera.setState({ ratio: Math.exp(-2.5 * (1 - Math.cos(i / 15))) })",
}
FRAMES = """async (frames) => {{
  const camera = latentMap.sigma.getCamera(), times = [];
  await new Promise((done) => requestAnimationFrame(done));
  let last = performance.now();
  for (let i = 0; i < frames; i++) {{
    {move};
    await new Promise((done) => requestAnimationFrame(done));
    const now = performance.now();
    times.push(now - last);
    last = now;
  }}
  return times;
}}"""
POINTER = """async (frames) => {
  const plane = document.querySelector("#plane canvas:last-of-type"), box = plane.getBoundingClientRect(), times = [];
  let last = performance.now();
  for (let i = 0; i < frames; i++) {
    const clientX = box.x + box.width * (0.5 + 0.3 * Math.sin(i / 7));
    const clientY = box.y + box.height * (0.5 + 0.3 * Math.cos(i / 5));
    plane.dispatchEvent(new MouseEvent("mousemove", { bubbles: true, clientX, clientY }));
    await new Promise((done) => requestAnimationFrame(done));
    const now = performance.now();
    times.push(now - last);
    last = now;
  }
  return times;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=25_000)
    parser.add_argument("--frames", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.latents)
        with served([folder / "run"], folder / "x.npy", folder) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(300_000)
            page.goto(f"{url}/?page=map")
            page.wait_for_selector("#plane:not([aria-busy]) canvas")
            n = page.evaluate("latentMap.found.latents.length")
            by_kind = {kind: page.evaluate(FRAMES.format(move=move), options.frames) for kind, move in MOVES.items()}
            by_kind["pointer"] = page.evaluate(POINTER, options.frames)
            refilter = filtered(page)
            renderer = page.evaluate(
                "(() => { const gl = document.createElement('canvas').getContext('webgl');"
                " const known = gl.getExtension('WEBGL_debug_renderer_info');"
                " return gl.getParameter(known ? known.UNMASKED_RENDERER_WEBGL : gl.RENDERER) })()"
            )
            browser.close()
    lines = [
        f"{n:,} points, {options.frames} frames each, 1,280 x 900 pixels, renderer {renderer}; a frame that needs less "
        "than 16.7 ms is shown at 60 a second.",
        "",
        "| what moves | median ms | p95 ms | longest ms |",
        "|---|---:|---:|---:|",
    ]
    for kind, times in by_kind.items():
        lines.append(f"| {kind} | {np.median(times):.1f} | {np.quantile(times, 0.95):.1f} | {max(times):.1f} |")
    lines += ["", f"Another colour or filter, all points drawn anew: {refilter:.0f} ms."]
    write_section("map-frames", "The map: frame times", "\n".join(lines))
    sys.stdout.write("\n".join(lines) + "\n")


def make(folder: Path, n: int) -> None:
    """A run of `n` latents, and rows on which nearly all of them fire."""
    sae = SAE(SAEConfig(d_in=D_IN, d_sae=n, kind="topk", k=K))
    rows = torch.nn.functional.normalize(torch.randn(n, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
    sae.save(folder / "run")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(ROWS, D_IN)).astype(np.float32))


def filtered(page: Page) -> float:
    """Milliseconds from a change of the colours to the drawn frame."""
    began = time.perf_counter()
    page.evaluate("() => { latentMap.redraw(); return new Promise((done) => requestAnimationFrame(done)); }")
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
