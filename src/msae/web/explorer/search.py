"""The page Search: a query, its strongest concepts as sliders, and its neighbours before and after they are moved."""

from __future__ import annotations

import base64
import binascii
import shlex
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from msae.base.errors import ConfigError, MsaeError
from msae.concepts.concept import LatentGroup
from msae.sae.standardize import Modality
from msae.use.edits import Change, parse_edit
from msae.use.search import Ask, Hit, How, SearchResult
from msae.use.search.query import Query, read_query
from msae.web.explorer.address import Address
from msae.web.explorer.html import LARGE, described, empty, fill, join, no_store, note, number, picture, problem
from msae.web.explorer.session import LoadedRun, World

SLIDERS = 8
HITS = 12
BEYOND = 1.25
"""A slider reaches this far beyond the largest natural strength."""
MAX_EDITS = 32


class Turnable(NamedTuple):
    """A concept with its place on a slider."""

    concept: str
    group: LatentGroup
    own: float
    """Its strength in the query."""
    value: float
    """What it is set to."""

    @property
    def top(self) -> float:
        """The end of the slider."""
        return max(BEYOND * self.group.natural.maximum, self.own, self.value, 1e-3)

    @property
    def is_turned(self) -> bool:
        return self.value != self.own


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page."""
    head = fill(
        "<h1>Search</h1><p>The rows of the store nearest to a query. Its strongest concepts are the sliders: "
        "move one, and see which neighbours come and go.</p>"
    )
    if world.store is None:
        return fill("{}{}", head, no_store(world, run))
    world.warm()
    try:
        query = read(world, run, address)
        turnables = sliders_of(run, address, query)
    except MsaeError as err:
        return fill("{}{}{}", head, _ask_form(world, run, address), problem(err))
    return fill(
        '{}{}<div class="search"><div>{}{}</div><div id="part-found">{}</div></div>',
        head, _ask_form(world, run, address), _query(world, query), _sliders(run, address, turnables),
        found(world, run, address),
    )  # fmt: skip


def searched(run: LoadedRun, address: Address) -> Modality:
    """The modality whose rows are searched."""
    wanted = address.one("in")
    return next((known for known in run.modalities if known == wanted), run.modalities[0])


def read(world: World, run: LoadedRun, address: Address) -> Query:
    """What the address searches for; the first row of the store where it says nothing.

    Raises:
        MsaeError: There is no such row, the vector does not fit, or there is no encoder for words.
    """
    assert world.store is not None
    own: Modality = run.modalities[0]
    if text := address.one("text").strip():
        return Query("text", text, "text", world.embed_text(text))
    if vector := address.one("vector"):
        return read_query(Ask(embedding=_vector(vector), modality="image"), world.store, run.sae, own)
    return read_query(Ask(like=address.one("row") or world.store.ids[0]), world.store, run.sae, own)


def _vector(text: str) -> np.ndarray:
    try:
        return np.frombuffer(base64.urlsafe_b64decode(text), dtype="<f4")
    except (binascii.Error, ValueError) as err:
        raise ConfigError("the picture in this link is damaged; drop the picture here again") from err


def as_vector(x: np.ndarray) -> str:
    """An embedding as it stands in a link."""
    return base64.urlsafe_b64encode(x.astype("<f4").tobytes()).decode("ascii")


def sliders_of(run: LoadedRun, address: Address, query: Query) -> list[Turnable]:
    """The query's strongest concepts, those that were added, and those that are turned.

    Raises:
        ConfigError: A concept is unknown, or an edit is written wrongly; a query that the SAE cannot read.
    """
    z = run.sae.encode(torch.from_numpy(query.x).unsqueeze(0), query.modality)
    known = run.searcher(searched(run, address)).concepts(query.modality, strict=True)
    turned = dict(edits_of(address))
    concepts = dict.fromkeys([*(c for c in address.many("add") if c.strip()), *turned, *strongest(run, query, z[0])])
    made = []
    with run.preparing:
        for concept in list(concepts)[: SLIDERS + MAX_EDITS]:
            group = known[concept]
            own = float(group.strength(z))
            change = turned.get(concept)
            made.append(Turnable(concept, group, own, change.number if change else own))
    return made


def edits_of(address: Address) -> list[tuple[str, Change]]:
    """The edits in an address, the last of each concept.

    Raises:
        ConfigError: One is written wrongly.
    """
    edits = dict(parse_edit(text) for text in address.many("set")[:MAX_EDITS])
    wrong = next((concept for concept, change in edits.items() if change.kind != "set"), None)
    if wrong is not None:
        raise ConfigError(f"the edit of {wrong!r} in this link is no strength; write for example set={wrong}=2")
    return list(edits.items())


def strongest(run: LoadedRun, query: Query, z: Tensor) -> list[str]:
    """The concepts of which the query has most for what is natural: names, or numbers where nothing is named."""
    samples = run.samples.get(query.modality) or next(iter(run.samples.values()))
    usual = torch.from_numpy(np.maximum(samples.quantiles((0.99,))[:, 0], 1e-6)).float()
    found: dict[str, None] = {}
    for latent in (z / usual).sort(descending=True).indices.tolist():
        if float(z[latent]) <= 0 or len(found) == SLIDERS:
            break
        name = run.names.name_of(latent) if run.names else None
        if name or not (run.names and len(run.names)):
            found[name or f"#{latent}"] = None
    return list(found)


def _ask_form(world: World, run: LoadedRun, address: Address) -> Markup:
    assert world.store is not None
    sides = join(
        fill('<label class="chip"><input type="radio" name="in" value="{}"{}><span>{}s</span></label>',
             modality, Markup(" checked") if modality == searched(run, address) else "", modality)
        for modality in run.modalities
    )  # fmt: skip
    where = fill("<fieldset><legend>find</legend>{}</fieldset>", sides) if len(run.modalities) > 1 else ""
    kind = "text" if address.one("text") else "vector" if address.one("vector") else "row"
    row = (address.one("row") or world.store.ids[0]) if kind == "row" else ""
    other = world.store.ids[(world.store.ids.row_of(row) + 1) % len(world.store)] if row in _known(world, row) else ""
    nothing = world.why_no_encoder()
    off = Markup(" disabled") if nothing else ""
    return fill(
        '<form class="ask" data-part=""><label>words<input type="search" name="text" value="{}"{} '
        'placeholder="such as: a red circle"></label><label class="drop">or drop a picture'
        '<input type="file" accept="image/*" data-picture{}>'
        '<input type="hidden" name="vector" value="{}"></label>'
        '<label>or the id of a row<input type="text" name="row" value="{}"></label>{}<button>Search</button>'
        '<a class="button" href="{}">next row</a></form>{}',
        address.one("text"), off, off, address.one("vector"), row, where,
        address.to("search", row=other, **{"in": address.one("in") or None}), note(nothing) if nothing else "",
    )  # fmt: skip


def _known(world: World, row: str) -> Sequence[str]:
    assert world.store is not None
    try:
        world.store.ids.row_of(row)
    except MsaeError:
        return ()
    return (row,)


def _query(world: World, query: Query) -> Markup:
    """What is searched for, to be seen."""
    assert world.store is not None
    if query.row is None:
        words = f"“{query.value}”" if query.kind == "text" else "the picture that was dropped"
        return fill('<figure class="query"><div data-preview></div><figcaption>Query: {}</figcaption></figure>', words)
    row = world.store.describe_rows([query.row])[0]
    shown = picture(world, row) if world.has_pictures else ""
    return fill('<figure class="query">{}<figcaption>Query: <b>{}</b> {}</figcaption></figure>', shown, row.id,
                row.caption or "")  # fmt: skip


def _sliders(run: LoadedRun, address: Address, turnables: Sequence[Turnable]) -> Markup:
    if not turnables:
        return empty("No concept is active in this query", "Add one below, or search for something else.")
    hidden = join(
        fill('<input type="hidden" name="{}" value="{}">', key, value)
        for key in ("text", "vector", "row", "in", "add")
        for value in address.many(key)
        if value
    )
    known = join(fill('<option value="{}">', name) for name in sorted({c.name for c in run.names or ()}))
    return fill(
        '<form class="sliders" data-part="found"><h2>Its strongest concepts</h2>{}{}'
        '<p class="legend"><span class="band"></span>natural range, up to p99; ticks at p50, p99 and the largest of '
        'real rows</p></form><form class="ask add" data-part="" data-keep><label>turn another concept'
        '<input name="add" list="names" placeholder="name or #123"></label><button>Add</button>'
        '<a class="button" href="{}">Reset all</a><datalist id="names">{}</datalist></form>',
        hidden, join(_slider(i, one) for i, one in enumerate(turnables)), address.but(set=None, add=None), known,
    )  # fmt: skip


def _slider(place: int, one: Turnable) -> Markup:
    natural = one.group.natural
    marks = {"p50": natural.quantile(50), "p99": natural.quantile(99), "max": natural.maximum}
    words = ", ".join(f"{name} {value:.2f}" for name, value in marks.items())
    ticks = join(
        fill(
            '<i class="{}" style="left:{}%" title="{}"></i>',
            name,
            f"{100 * value / one.top:.1f}",
            f"{name} {value:.2f}",
        )
        for name, value in marks.items()
    )
    return fill(
        '<div class="slider"><label for="s{}">{}</label><output for="s{}">{}</output>'
        '<button type="button" data-reset="s{}" aria-label="Reset {}">↺</button>'
        '<div class="track"><span class="band" style="width:{}%"></span>{}'
        '<input type="range" id="s{}" data-concept="{}" data-own="{}" min="0" max="{}" step="{}" value="{}" '
        'aria-describedby="n{}"{}></div>'
        '<small id="n{}">in the query {}; {}</small></div>',
        place, one.concept, place, number(one.value), place, one.concept, f"{100 * marks['p99'] / one.top:.1f}", ticks,
        place, one.concept, f"{one.own:.6g}", f"{one.top:.6g}", f"{one.top / 200:.6g}", f"{one.value:.6g}", place,
        Markup(" data-turned") if one.is_turned else "", place, number(one.own), words,
    )  # fmt: skip


def result(world: World, run: LoadedRun, address: Address) -> SearchResult:
    """The answer to an address.

    Raises:
        MsaeError: The query or an edit is wrong.
    """
    how = How(edits_of(address), HITS, "embedding", True, False, False, None)
    return run.searcher(searched(run, address)).search_for(read(world, run, address), how)


def found(world: World, run: LoadedRun, address: Address) -> Markup:
    """The neighbours before and after the edits."""
    if world.store is None:
        return no_store(world, run)
    try:
        answer = result(world, run, address)
    except MsaeError as err:
        return problem(err)
    warnings = join(note(warning, kind="warning") for warning in answer.warnings)
    command = fill("<details><summary>the same on the command line</summary><pre><code>{}</code></pre></details>",
                   _command(world, run, address))  # fmt: skip
    if not answer.before:
        said = "Nothing is turned yet: move a slider." if not answer.edits else "The edits change nothing."
        return fill(
            '<p class="note" role="status">{}</p>{}<section><h2>Nearest {}s</h2>{}</section>{}',
            said, warnings, answer.modality, _hits(world, answer.hits, "alone"), command,
        )  # fmt: skip
    n_new = sum(hit.rank_before > HITS for hit in answer.hits)
    edits = "; ".join(f"{edit.concept} {edit.before:.2f} → {edit.after:.2f}" for edit in answer.edits)
    return fill(
        '<p class="note" role="status">{}: {} of the {} nearest are new.</p>{}<div class="sides two">'
        "<section><h2>Before</h2>{}</section><section><h2>After</h2>{}</section></div>{}",
        edits, n_new, len(answer.hits), warnings, _hits(world, answer.before, "before"),
        _hits(world, answer.hits, "after"), command,
    )  # fmt: skip


def _hits(world: World, hits: Sequence[Hit], side: str) -> Markup:
    cells = []
    for hit in hits:
        shown = picture(world, hit, LARGE) if world.has_pictures else ""
        place, score = (hit.rank_before, hit.score_before) if side == "before" else (hit.rank, hit.score)
        cells.append(
            fill(
                '<figure data-row="{}">{}<figcaption><b>{}.</b> {} <small>{}</small><br>{}</figcaption></figure>',
                hit.id, shown, place, _moved(hit, side), f"{score:.3f}", described(hit),
            )
        )  # fmt: skip
    return fill('<div class="grid">{}</div>', join(cells)) if cells else note("No row is left to be found.")


def _moved(hit: Hit, side: str) -> Markup:
    """How the rank of a hit changed."""
    up = hit.rank_before - hit.rank
    if side == "alone":
        return fill("")
    if side == "before":
        if hit.rank > HITS:
            return fill('<span class="gone" title="now at place {}">leaves</span>', f"{hit.rank:,}")
        return fill("") if not up else fill('<span class="{}">now {}</span>', "up" if up > 0 else "down", hit.rank)
    if hit.rank_before > HITS:
        return fill('<span class="new" title="was at place {}">new</span>', f"{hit.rank_before:,}")
    if not up:
        return fill('<span title="unmoved">=</span>')
    return fill('<span class="{}">{} {}</span>', "up" if up > 0 else "down", "▲" if up > 0 else "▼", abs(up))


def _command(world: World, run: LoadedRun, address: Address) -> str:
    assert world.store is not None
    what = ["--like", address.one("row") or world.store.ids[0]]
    if address.one("text").strip():
        what = ["--text", address.one("text")]
    elif address.one("vector"):
        what = ["--image", "FILE"]
    sets = [word for concept, change in edits_of(address) for word in ("--set", f"{concept}={change}")]
    side = ["--modality", searched(run, address)] if len(run.modalities) > 1 else []
    words = ["msae", "search", str(run.folder), "--on", str(world.store.path), *what, *sets, *side, "--n", str(HITS)]
    return shlex.join(words)


PARTS = {"": page, "found": found}
