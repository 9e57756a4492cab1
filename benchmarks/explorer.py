"""The explorer end to end: first page, slider to new neighbours, many users at once, through its real server.

python benchmarks/explorer.py --run RUN --on STORE --write
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import numpy as np
from playwright.sync_api import Page, sync_playwright

from msae.concepts.names import ConceptNames
from msae.data.store import EmbeddingStore
from results import write_section

USERS = 20
MOVES_OF_A_USER = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a named run")
    parser.add_argument("--on", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--moves", type=int, default=12, help="of sliders, for each query")
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    arguments = parser.parse_args()
    store = EmbeddingStore.open(arguments.on)
    picked = random.Random(0).sample(range(len(store)), arguments.queries)
    rows = [store.ids[row] for row in picked]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with served(arguments.run, arguments.on):
            pass  # fills the caches: what is measured is every start but the first
        starts, firsts, pages = [], [], []
        for _ in range(3):
            page = browser.new_page()
            began = time.perf_counter()
            with served(arguments.run, arguments.on) as base:
                starts.append(time.perf_counter() - began)
                page.goto(base)
                page.wait_for_selector("main tbody tr")
                firsts.append(time.perf_counter() - began)
                began = time.perf_counter()
                page.goto(base)
                page.wait_for_selector("main tbody tr")
                pages.append(time.perf_counter() - began)
                page.close()
        with served(arguments.run, arguments.on) as base:
            first, later = sliders(browser.new_page(), base, rows, arguments.moves)
            together, n_wrong = crowd(base, arguments.run, rows)
        browser.close()
    names = ConceptNames.load(arguments.run)
    body = "\n".join(
        [
            f"{len(store):,} rows of width {store.d_in}, a run with {len(names):,} named latents of {names.d_sae:,}; "
            "Chromium and server share the machine. "
            "A slider's time is from the key press until the new neighbours stand in the page.",
            "",
            "| what | n | median, s | 95th percentile, s | longest, s |",
            "| --- | ---: | ---: | ---: | ---: |",
            line("slider to new neighbours", [*first, *later]),
            line("… of those, the first move of a concept", first),
            line("first page, from opening the address", pages),
            line("from typing the command to an address that answers", starts),
            line("from typing the command to the first full page", firsts),
            line(f"a move where {USERS} users move sliders at once", together),
            "",
            f"Errors among the {len(together)} answers to {USERS} users at once: {n_wrong}.",
        ]
    )
    print(body)
    if arguments.write:
        write_section("explorer", "The explorer: slider, first page, many users", body)


def line(what: str, seconds: list[float]) -> str:
    p50, p95 = np.percentile(seconds, [50, 95])
    return f"| {what} | {len(seconds)} | {p50:.2f} | {p95:.2f} | {max(seconds):.2f} |"


@contextmanager
def served(run: Path, on: Path) -> Iterator[str]:
    """The address of `msae explore` once it answers."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "address.json"
        command = [
            sys.executable,
            "-m",
            "msae",
            "explore",
            str(run),
            "--on",
            str(on),
            "--port",
            "0",
            "--json",
            str(told),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not told.exists():
            assert process.poll() is None
            time.sleep(0.005)
        base = json.loads(told.read_text())["url"].rstrip("/")
        get(base, "/")
        yield base
        process.send_signal(signal.SIGINT)
        process.wait(30)


def get(base: str, path: str) -> bytes:
    where = urlsplit(base)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
    connection.request("GET", path)
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status == 200, (answer.status, data[:200])
    return data


def sliders(page: Page, base: str, rows: list[str], moves: int) -> tuple[list[float], list[float]]:
    """Seconds of each concept's first move, and of the others."""
    first, later, seen = [], [], set()
    for row in rows:
        page.goto(f"{base}/?{urlencode({'page': 'search', 'row': row})}")
        page.wait_for_selector("#part-found figure")
        for move in range(moves):
            around, place = divmod(move, page.locator("input[type=range]").count())
            slider = page.locator("input[type=range]").nth(place)
            concept = slider.get_attribute("data-concept")
            before = page.inner_text("#part-found [role=status]")
            slider.focus()
            began = time.perf_counter()
            page.keyboard.press("Home" if around % 2 else "End")
            while not page.evaluate(
                "was => { const now = document.querySelector('#part-found [role=status]'); "
                "return now && now.innerText !== was && !document.querySelector('#part-found[aria-busy]') }",
                before,
            ):
                time.sleep(0.002)
            (later if concept in seen else first).append(time.perf_counter() - began)
            seen.add(concept)
    return first, later


def crowd(base: str, run: Path, rows: list[str]) -> tuple[list[float], int]:
    """Seconds of each answer where many ask at once, and how many of the answers were wrong."""
    names = [concept.name for concept in ConceptNames.load(run)][:USERS]

    def user(number: int) -> list[tuple[float, bool]]:
        found = []
        for move in range(MOVES_OF_A_USER):
            address = urlencode(
                {"page": "search", "row": rows[number % len(rows)], "set": f"{names[number % len(names)]}={move + 1}"}
            )
            began = time.perf_counter()
            try:
                html = get(base, f"/part/found?{address}").decode()
            except (AssertionError, OSError):
                html = ""
            found.append((time.perf_counter() - began, "After" in html and 'role="alert"' not in html))
        return found

    with ThreadPoolExecutor(USERS) as pool:
        answers = [answer for found in pool.map(user, range(USERS)) for answer in found]
    return [seconds for seconds, _ in answers], sum(not right for _, right in answers)


if __name__ == "__main__":
    main()
