"""The documentation: every command and snippet of docs/ runs, page by page, and the site builds without a warning.

How a page says what its blocks are:

- ```` ```sh ````, and indented blocks of `msae …`: commands, run in their order in one folder with the demo's world.
- ```` ```python ````: run too, in one namespace a page.
- `<!-- not run: REASON -->` in the line above: only parsed, commands against the options that they have today.
- ```` ```text ````: what a command prints. A title makes a block a file for the commands below it.

`NAMES` has what the demo's world has for the names in a page's commands.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import msae
from msae.cli import VERBS, _parse, main, verb_options
from msae.cli.options import flag
from msae.world.scenes import attributes, sample_scene
from tests.conftest import linked_copy

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
RECORDS = ("log.md", "preregistered.md")
"""What was measured when: its commands are those of their day."""
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?"
    r'(?:```(?P<kind>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$|(?P<indented>(?<=\n\n)(?: {4}[^\n]*\n+)+))',
    re.M | re.S,
)


def ids(background: str) -> str:
    """Eight scenes of the tests' demo with this background."""
    found = (
        seed for seed in range(10_001_000, 10_001_500) if attributes(sample_scene(seed))["background"] == background
    )
    return " ".join(map(str, itertools.islice(found, 8)))


class Block(NamedTuple):
    kind: str
    text: str
    reason: str | None
    title: str | None


def blocks(page: str) -> Iterator[Block]:
    for found in BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        indented = found["indented"]
        if indented is None:
            yield Block(found["kind"], found["text"], found["reason"], found["title"])
        elif re.search(r"\bmsae \w+ ", indented) and not indented.lstrip().startswith(
            "msae embed:"
        ):  # as it is printed
            lines = [re.sub(r"(\S) {3,}.*", r"\1", line[4:]) for line in indented.splitlines()]
            yield Block("sh", "\n".join(lines), found["reason"], None)


EVERYWHERE = {"10006003": "10001003"}
"""The demo of the tests has fewer scenes."""
PEOPLES = {"RUN": "runs/msae", "STORE": "holdout.store", "runs/photos": "runs/msae", "photos.store": "holdout.store"}
NAMES = {
    "audit.md": {
        **PEOPLES,
        "test.store": "holdout.store",
        "train.store": "scenes.store",
        "--target label": "--target shadow",
        "--concept hat": "--concept 'a hat'",
        "[--groups has_hat]": "--groups hat",
        "runs/clip": "runs/msae",
        "image_test.npy": "holdout.store",
        "names.json": "runs/msae/names.json",
    },
    "compare.md": {
        "STORE-A": "scenes.store",
        "STORE-B": "holdout.store",
        **PEOPLES,
        "gender=Men": "background=night",
        "gender=Women": "background=sand",
        "source articleType": "shape",
    },
    "examples.md": {
        "ID ID … --unlike ID ID …": f"{ids('sand')} --unlike {ids('night')}",
        **PEOPLES,
        "--like ID": "--like 10006003",
        "baseColour": "colour",
        "Red": "red",
    },
    "formats.md": {
        "import FILE --out RUN": "import exported --out imported",
        "saelens": "saelens --modality image",
        **PEOPLES,
        "DIR": "exported",
        "qdrant://localhost:6333/photos": "qdrant://HERE/qdrant/photos",
        'QdrantClient("localhost")': "QdrantClient(path='qdrant')",
        "query=embedding": "query=[1.0] * 128",
        "beach": "red",
        "people": "star",
    },
    "naming.md": {**PEOPLES, "--words mine.txt": "--words words.txt --encoder demo"},
    "pictures.md": {
        "openai/clip-vit-large-patch14": "demo",
        "beach": "red",
        "a dog": "a red star",
        "dog.jpg": "10001003.png",
    },
}
"""What the demo's world has for names in a page's commands, page by page."""


def prepare(page: str) -> None:
    """Make what a page takes for granted."""
    if page in ("audit.md", "compare.md", "examples.md", "formats.md", "naming.md"):
        os.chdir("msae-demo")
    if page == "audit.md":
        np.savez("aesthetic.npz", weight=np.random.default_rng(0).normal(size=(1, 128)))
    if page == "pictures.md":
        shutil.copytree("msae-demo/holdout/images", "photos")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (*RECORDS, "recipes.md")])
def test_every_command_and_snippet_of_a_page_runs(page, demo_world, cache, tmp_path, monkeypatch):
    found = list(blocks(page))
    if not any(block.kind in ("sh", "python") for block in found):
        return
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.chdir(linked_copy(demo_world, tmp_path / "world"))
    prepare(page)
    namespace: dict[str, Any] = {"msae": msae}
    for block in found:
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            code = compile(with_ours(page, block.text), page, "exec")
            if block.reason is None:
                exec(code, namespace)
        elif block.kind == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                if block.reason is None:
                    run(with_ours(page, line), page)
                else:
                    parsed(line)
    if "client" in namespace:
        namespace["client"].close()


def with_ours(page: str, text: str) -> str:
    for theirs, ours in {**NAMES.get(page, {}), **EVERYWHERE}.items():
        text = text.replace(theirs, ours)
    return text.replace("HERE", Path.cwd().as_posix())


def run(line: str, page: str) -> None:
    """Run one line of a block; `msae demo` is what the world was made by."""
    program, *words = shlex.split(line, comments=True) or [""]
    if program == "cd":
        os.chdir(words[0])
    elif (program, words) == ("msae", ["demo"]):
        parsed(line)
    elif program:
        assert program == "msae", f"{page}: nothing runs {line!r} here; say why above its block, <!-- not run: … -->"
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 0, f"{page}: {line}"


def parsed(line: str) -> None:
    """Check the options of the msae in a line without running it."""
    words = shlex.split(line, comments=True)
    if "msae" not in words:
        return
    name, *options = words[words.index("msae") + 1 :]
    _parse(name, options)


def test_blocks_say_what_they_are():
    for page in PAGES:
        assert {block.kind for block in blocks(page)} <= {"sh", "python", "text", "csv"}, page


def test_commands_in_prose_have_the_options_that_they_name():
    """Such as `msae search --set` in a sentence or in a table; of docs/, README and the other pages of the site."""
    n = 0
    for file in (*(DOCS / page for page in PAGES if page not in RECORDS), ROOT / "README.md", ROOT / "ARCHITECTURE.md"):
        for verb, rest in re.findall(r"`msae ([a-z]+)\b([^`]*)`", file.read_text(encoding="utf-8")):
            assert verb in VERBS, f"{file.name}: there is no msae {verb}"
            options = verb_options(verb)
            known = {flag(one) for one in options} | {flag(f"no_{one}") for one in options} | {"--help", "--debug"}
            assert set(re.findall(r"--[a-z][\w-]*", rest)) <= known, f"{file.name}: msae {verb}{rest}"
            n += 1
    assert n > 60


def test_every_extra_is_on_the_page_about_installing():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"^\| `(\w+)` \|", (DOCS / "install.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(extras)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site as `mkdocs build --strict` makes it."""
    if not (ROOT / "mkdocs.yml").exists():
        pytest.skip("an sdist has no mkdocs.yml")
    for name in ("material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; it comes with msae[docs]")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING -" not in done.stderr, done.stdout + done.stderr
    return out


class Page(HTMLParser):
    """The ids of a built page, what it loads, and where it leads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        has = dict(attributes)
        self.ids |= {has[key] for key in ("id", "name") if has.get(key)}
        self.loads += [has[key] for key in ("src", "srcset", "data") if has.get(key)]
        if tag == "link" and has.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(has["href"])
        if tag == "a" and has.get("href"):
            self.links.append(has["href"])


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    loads = {address for page in pages for address in Page(page).loads}
    for file in site.rglob("*.css"):
        loads |= set(re.findall(r"""(?:@import|url\()\s*["']?([^"')\s;]+)""", file.read_text(encoding="utf-8")))
    assert len(pages) > 35 and len(loads) > 10
    assert [address for address in loads if re.match(r"(https?:)?//", address)] == []


def test_every_command_and_every_public_name_has_its_place_in_the_reference(site):
    commands = Page(site / "commands/index.html").ids
    assert {f"msae-{verb}" for verb in VERBS} <= commands
    text = (site / "commands/index.html").read_text(encoding="utf-8")
    assert [option for verb in VERBS for option in verb_options(verb) if flag(option).lstrip("-") not in text] == []
    documented = set().union(*(Page(page).ids for page in site.glob("api-*/index.html")))
    assert [name for name in msae.__all__ if f"msae.{name}" not in documented] == []


def test_links_from_the_repository_lead_into_the_site(site):
    """Also their anchors; README is no page of the site, so mkdocs does not check it."""
    n = 0
    for file in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md"):
        for page, anchor in re.findall(r"\]\((?:\.\./)?docs/([\w-]+)\.md#?([^)]*)\)", (ROOT / file).read_text("utf-8")):
            built = site / ("" if page == "index" else page) / "index.html"
            assert built.exists(), f"{file}: docs/{page}.md"
            assert not anchor or anchor in Page(built).ids, f"{file}: docs/{page}.md#{anchor}"
            n += 1
    assert n > 30
