"""The page Search: a query, its strongest concepts as sliders, and its neighbours before and after they are moved."""

from __future__ import annotations

import base64
import binascii
import shlex
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup

from msae.base.errors import ConfigError, MsaeError
from msae.concepts.concept import LatentGroup
from msae.concepts.strongest import standing_out
from msae.data.rows import Row
from msae.sae.standardize import Modality
from msae.use.edits import Change, parse_edit
from msae.use.search import Ask, How, SearchResult
from msae.use.search.query import Query, read_query
from msae.web.explorer.address import Address
from msae.web.explorer.filling import draw
from msae.web.explorer.find import Picked
from msae.web.explorer.session import LoadedRun, World
from msae.web.explorer.standing import face

SLIDERS = 8
CANDIDATES = 3 * SLIDERS
"""Concepts of the strongest latents that are looked at for the sliders."""
HITS = 12
BEYOND = 1.25
"""A slider reaches this far beyond the largest natural strength."""
MAX_EDITS = 32


class Slider(NamedTuple):
    """A concept with its place on a slider."""

    concept: str
    group: LatentGroup
    own: float
    """Its strength in the query."""
    value: float
    """What it is set to."""
    label: str
    """What people are shown: a name, the nearest word that was not confirmed, or the number of a latent."""
    picture: Row | None
    """Of a concept without a confirmed name, the row that fires it most."""

    @property
    def top(self) -> float:
        """The end of the slider."""
        return max(BEYOND * self.marks["max"], self.own, self.value, 1e-3)

    @property
    def marks(self) -> dict[str, float]:
        """What is natural: the median, the 99th percentile and the largest strength of real rows."""
        natural = self.group.natural
        return {"p50": natural.quantile(50), "p99": natural.quantile(99), "max": natural.maximum}

    @property
    def is_changed(self) -> bool:
        return self.value != self.own


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page."""
    values: dict[str, Any] = {"query": None, "sliders": [], "problem": None, "row": None, "next_row": None}
    values["picked"] = Picked.of(address)
    if world.store is not None:
        world.warm()
        values |= _rows(world, address) | {"searched": searched(run, address)}
        try:
            query = read(world, run, address)
            values |= {"query": query, "sliders": sliders_of(world, run, address, query), **_found(world, run, address)}
            if query.row is not None:
                values["row"] = world.rows([query.row])[0]
        except MsaeError as err:
            values["problem"] = err
    return draw("search", world, run, address, **values)


def _rows(world: World, address: Address) -> dict[str, str | None]:
    """The id in the form, and the id of the row after it."""
    assert world.store is not None
    if address.one("text") or address.one("vector"):
        return {"id": "", "next_row": None}
    id = address.one("row") or world.store.ids[0]
    try:
        return {"id": id, "next_row": world.store.ids[(world.store.ids.row_of(id) + 1) % len(world.store)]}
    except MsaeError:
        return {"id": id, "next_row": None}


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


def sliders_of(world: World, run: LoadedRun, address: Address, query: Query) -> list[Slider]:
    """The query's strongest concepts, those that were added, and those that are changed.

    Raises:
        ConfigError: A concept is unknown, or an edit is written wrongly; a query that the SAE cannot read.
    """
    z = run.sae.encode(torch.from_numpy(query.x).unsqueeze(0), query.modality)
    known = run.searcher(searched(run, address)).concepts(query.modality, strict=True)
    changed = dict(edits_of(address))
    asked = list(dict.fromkeys([*(c for c in address.many("add") if c.strip()), *changed]))[:MAX_EDITS]
    found = [one.concept for one in standing_out(z.cpu().numpy(), run.natural(query.modality), run.names, CANDIDATES)]
    made: list[Slider] = []
    with run.preparing:
        for concept in dict.fromkeys([*asked, *found]):
            if len(made) == len(asked) + SLIDERS:
                break
            group = known[concept]
            own = float(group.strength(z))
            if concept not in asked and len(group.latents) > 1 and own < group.natural.quantile(50):
                continue  # one of its latents is strong here, but not the concept
            change = changed.get(concept)
            label, picture = face(world, run, concept, group.latents, query.modality)
            made.append(Slider(concept, group, own, change.number if change else own, label, picture))
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


def result(world: World, run: LoadedRun, address: Address) -> SearchResult:
    """The answer to an address.

    Raises:
        MsaeError: The query or an edit is wrong.
    """
    how = How(edits_of(address), HITS, "embedding", True, False, False, None, world.show)
    return run.searcher(searched(run, address)).search_for(read(world, run, address), how)


def found(world: World, run: LoadedRun, address: Address) -> Markup:
    """The neighbours before and after the edits."""
    return draw("found", world, run, address, **_found(world, run, address))


def _found(world: World, run: LoadedRun, address: Address) -> dict[str, Any]:
    if world.store is None:
        return {"answer": None}
    picked = Picked.of(address)
    answer = result(world, run, address)
    sides = {"Before": answer.before, "After": answer.hits}
    if not answer.before:
        sides = {f"Nearest {answer.modality}s": answer.hits}
    return {
        "answer": answer,
        "picked": picked,
        "sides": sides.items(),
        "n_new": sum(hit.rank_before > HITS for hit in answer.hits),
        "hits": HITS,
        "command": _command(world, run, address),
    }


def _command(world: World, run: LoadedRun, address: Address) -> str:
    assert world.store is not None
    what = ["--like", address.one("row") or world.store.ids[0]]
    if address.one("text").strip():
        what = ["--text", address.one("text")]
    elif address.one("vector"):
        what = ["--image", "FILE"]
    sets = [word for concept, change in edits_of(address) for word in ("--set", f"{concept}={change}")]
    side = ["--modality", searched(run, address)] if len(run.modalities) > 1 else []
    words = ["msae", "search", str(run.folder), "--on", world.store.address, *what, *sets, *side, "--n", str(HITS)]
    return shlex.join(words)


PARTS = {"": page, "found": found}
