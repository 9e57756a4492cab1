"""What the documentation site has beside docs/: a hook of mkdocs. Nothing that it makes is kept in the repository.

- The page *Commands*: every command with its options, from the signatures and docstrings that `msae --help` reads.
- Pages whose source lies elsewhere: results, architecture, changelog, contributing, the notebooks.
- Links from docs/ to such files, which are right in the repository, lead to these pages.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File

from msae.cli import VERBS, verb_options
from msae.cli.options import default_text, flag, help_text, metavar

ROOT = Path(__file__).parents[1]
PAGES = {
    "benchmarks/RESULTS.md": "results.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages of the site by their files in the repository; those of docs/ keep their names."""
FOLDERS = {"benchmarks/figures/": "figures/", "notebooks/": "notebooks/", "docs/": ""}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and figures that do not lie in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for figure in sorted((ROOT / "benchmarks/figures").glob("*.svg")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    for notebook in notebooks():
        files.append(File.generated(config, f"notebooks/{notebook.name}", abs_src_path=str(notebook)))
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=notebook_page(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the lists that are made here, and turn links to files of the repository into links to pages."""
    name = page.file.src_uri
    if name == "commands.md":
        markdown += "".join(map(command, VERBS))
    if name == "notebooks.md":
        found = [f"- [{title(one)}](notebooks/{one.stem}.md) ([file](notebooks/{one.name}))" for one in notebooks()]
        markdown += "\n".join(found) + "\n"
    if name == "results.md":  # the section of a benchmark keeps its address when its title changes
        markdown = re.sub(r"<!-- ([\w-]+): begin -->", r'<a id="\1"></a>\n', markdown)
    if name == "glossary.md":
        markdown = re.sub(
            r"^\*\*([^*]+)\*\*", lambda word: f'<a id="{anchor(word[1])}"></a>{word[0]}', markdown, flags=re.M
        )
    source = source_of(name)
    return re.sub(r"\]\(([^)\s]+)\)", lambda link: f"]({target(source, name, link[1])})", markdown)


def target(source: str, page: str, link: str) -> str:
    """Where a link of the file `source` leads from its page."""
    path, hash_, fragment = link.partition("#")
    if not path or ":" in path:
        return link
    file = normpath(PurePosixPath(source).parent / path)
    here = PAGES.get(file) or next(
        (to + file.removeprefix(of) for of, to in FOLDERS.items() if file.startswith(of)), ""
    )
    return relpath(here, PurePosixPath(page).parent) + hash_ + fragment if here else link


def source_of(page: str) -> str:
    """The file in the repository that a page is made of."""
    elsewhere = {to: of for of, to in PAGES.items()}
    return page if page.startswith("notebooks/") else elsewhere.get(page, f"docs/{page}")


def anchor(word: str) -> str:
    """The id of a word of the glossary, as on the explorer's page."""
    return "word-" + re.sub(r"\W+", "-", word).strip("-").lower()


def command(name: str) -> str:
    """The section of one command: what it does, how it is written, and a table of its options."""
    verb, options = VERBS[name], verb_options(name)
    shown = {one: flag(one) for one in options} | verb.places
    places = [options[one] for one in verb.places if one in options]
    others = [one for one in options.values() if one not in places]
    required = [f"{flag(one.name)} {metavar(one)}" for one in others if one.default is inspect.Parameter.empty]
    usage = " ".join(["msae", name, *filter(None, verb.places.values()), *required, "[options]"])
    function = "import_sae" if name == "import" else name
    lines = [f"\n\n## msae {name}\n", f"{verb.summary[0].upper()}{verb.summary[1:]}.\n", f"```text\n{usage}\n```\n"]
    lines += [f"In Python: [`msae.{function}`][msae.{function}].\n", "| option | meaning |", "|---|---|"]
    for one in [*places, *others]:
        is_flag = one.hint is bool
        written = verb.places.get(one.name) or f"{flag(one.name)}{'' if is_flag else ' ' + metavar(one)}"
        if is_flag and one.default is True:
            written = written.replace("--", "--no-", 1)
        text = " ".join([help_text(one, shown), default_text(one)]).strip()
        lines.append(f"| `{cell(written)}` | {cell(text)} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("<", "&lt;").replace("*", "&#42;").replace("_", "&#95;")


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def title(notebook: Path) -> str:
    """The first heading of a notebook."""
    return notebook_page(notebook).partition("\n")[0].removeprefix("# ")


def notebook_page(notebook: Path) -> str:
    """A notebook's texts and code, its title first."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    cells.sort(key=lambda one: not "".join(one["source"]).startswith("# ") or one["cell_type"] == "code")
    texts = (("".join(one["source"]), one["cell_type"]) for one in cells)
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for text, kind in texts)
