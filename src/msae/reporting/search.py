"""The answer of a search as one HTML page: what was found before the edits and after them, side by side.

The page opens offline: pictures are inlined. Only pictures that the store itself lists are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msae.errors import MissingDependencyError
from msae.files import atomic_path
from msae.reporting.pictures import data_uri
from msae.retrieval import Hit, SearchResult

SIDE = 160
"""Pixels of a thumbnail's longer side."""

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ result.value }}</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-bottom: .3rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 2rem; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
figure { margin: 0; overflow-wrap: anywhere; } figcaption { font-size: .8rem; color: #6a6a6a; }
img { max-width: 100%; border-radius: 3px; display: block; } b { color: #1a1a1a; }
.none { height: 6rem; background: #e4e4e4; border-radius: 3px; }
.new b { color: #8a2be2; } .warning { color: #a33c00; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
</style>
</head>
<body>
<h1>Nearest {{ result.modality }} rows to {{ result.kind }} “{{ result.value }}”</h1>
{% if query %}<img src="{{ query }}" alt="the query">{% endif %}
{% if result.edits %}
<table>
<tr><th>concept</th><th>edit</th><th>strength</th><th>natural p50, p90, p99</th><th>rivals set to 0</th></tr>
{% for edit in result.edits %}
<tr><td>{{ edit.concept }}</td><td>{{ edit.value }}</td>
<td>{{ "%.3g" | format(edit.before) }} → {{ "%.3g" | format(edit.after) }}</td>
<td>{% for key in ("p50", "p90", "p99") %}{{ "%.3g" | format(edit.natural[key]) }} {% endfor %}</td>
<td>{{ edit.rivals | join(", ") }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% for warning in result.warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
<div class="sides">
{% for title, hits in sides %}
<section>
<h2>{{ title }}</h2>
<div class="hits">
{% for hit, picture, place, note, is_new in hits %}
<figure{% if is_new %} class="new"{% endif %}>
{% if picture %}<img src="{{ picture }}" alt="{{ hit.id }}">{% else %}<div class="none"></div>{% endif %}
<figcaption><b>{{ place }}</b> {{ note }}<br>{{ hit.caption or hit.id }}
{% if hit.shared %}<br>shares {{ hit.shared | map(attribute="concept") | join(", ") }}{% endif %}
</figcaption>
</figure>
{% endfor %}
</div>
</section>
{% endfor %}
</div>
</body>
</html>
"""


def write_page(result: SearchResult, path: str | Path) -> None:
    """Write the page of a search to `path`, atomically.

    Raises:
        MissingDependencyError: jinja2 or pillow is not installed.
    """
    page = render(result)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(result: SearchResult) -> str:
    """The page; whatever comes from the store or the command line is escaped."""
    try:
        import jinja2
    except ImportError as err:
        raise MissingDependencyError.of("jinja2", extra="report") from err
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    after = [(hit, data_uri(hit.path, result.roots, SIDE), *_after(hit, bool(result.edits))) for hit in result.hits]
    sides: list[tuple[str, list[Any]]] = [("Found", after)]
    if result.before:
        n = len(result.before)
        before = [(hit, data_uri(hit.path, result.roots, SIDE), *_before(hit, n)) for hit in result.before]
        sides = [("Before", before), ("After", after)]
    return environment.from_string(TEMPLATE).render(result=result, sides=sides, query=_query_picture(result))


def _after(hit: Hit, is_edited: bool) -> tuple[int, str, bool]:
    if not is_edited:
        return hit.rank, f"{hit.score:.3f}", False
    return hit.rank, f"was {hit.rank_before:,} · {hit.score_before:.3f} → {hit.score:.3f}", hit.rank_before > hit.rank


def _before(hit: Hit, n: int) -> tuple[int, str, bool]:
    gone = "falls" if hit.rank > n else "now"
    return hit.rank_before, f"{hit.score_before:.3f} · {gone} {hit.rank:,}", False


def _query_picture(result: SearchResult) -> str | None:
    if result.kind == "image":
        return data_uri(str(Path(result.value).absolute()), (), SIDE)
    return data_uri(result.query_path, result.roots, SIDE)
