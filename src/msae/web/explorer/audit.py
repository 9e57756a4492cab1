"""The page Audit: what a linear classifier of a column relies on, and one row with a concept at several strengths."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from msae.base.errors import ConfigError
from msae.use.audit import Audit, ConceptAudit, Sweep
from msae.use.audit.subjects import MAX_CLASSES
from msae.web.explorer.address import Address
from msae.web.explorer.filling import draw
from msae.web.explorer.session import LoadedRun, World
from msae.web.explorer.standing import face, seen_in
from msae.web.overlay import as_svg
from msae.web.page import render
from msae.web.report import figures
from msae.web.report.audit import section

PLOTTED = 4
"""Concepts of an audit that are drawn."""
SWEPT = 4
"""Concepts of a loaded audit whose sweeps are drawn."""


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page; the audit itself is a part, for it takes a while."""
    chosen = {"target": address.one("target"), "rows": address.one("rows")}
    return draw("audit", world, run, address, **chosen, max_classes=MAX_CLASSES)


def result(world: World, run: LoadedRun, address: Address) -> Markup:
    """The audit of the chosen column, and the form for sweeps."""
    found = _audit(world, run, address)
    swept = _sweepable(found)
    first = swept[0].sweep if swept else None
    values: dict[str, Any] = _sweep(world, run, found, address) if swept else {}
    locator, why = world.locator(run) if world.has_pictures else (None, None)
    return draw(
        "result", world, run, address, audit=found,
        section=section(
            found, store=run.store, locator=locator, why=why, n_plotted=PLOTTED, faces=_faces(world, run, found)
        ),
        concepts=[concept.name for concept in swept], concept=address.one("concept") or (swept and swept[0].name),
        row=address.one("row") or (first and first.id), **values,
    )  # fmt: skip


def sweep(world: World, run: LoadedRun, address: Address) -> Markup:
    """The chosen row with the chosen concept at several strengths."""
    return draw("sweep", world, run, address, **_sweep(world, run, _audit(world, run, address), address))


def _audit(world: World, run: LoadedRun, address: Address) -> Audit:
    target = address.one("target")
    if target not in world.targets:
        raise ConfigError(f"{target!r} is no column that can be audited; choose another")
    return run.audit(target, address.one("rows").strip())


def _faces(world: World, run: LoadedRun, found: Audit) -> dict[str, tuple[str, Markup]]:
    """The label of each concept and, for one without a confirmed name, a picture of the row that fires it most."""
    faces = {}
    for concept in found.concepts:
        shown = face(world, run, concept.name, concept.latents, run.modalities[0])
        drawn = Markup() if shown.picture is None else render("explorer/thumb.html", world=world, row=shown.picture)
        faces[concept.name] = (shown.label, drawn)
    return faces


def _sweep(world: World, run: LoadedRun, found: Audit, address: Address) -> dict[str, Any]:
    """The drawing of a sweep, and what stands out in its row."""
    assert world.store is not None
    concepts = _sweepable(found)
    concept = next((c for c in concepts if c.name == address.one("concept")), concepts[0])
    id = address.one("row") or (concept.sweep.id if concept.sweep else "")
    drawn = run.sweeper(str(found.target), found.settings["where"] or "").of(concept, id)
    number = world.store.ids.row_of(id)
    return {
        "drawn": None if drawn is None else sweep_drawing(concept, drawn),
        "located": None if drawn is None or not world.has_pictures else _located(world, run, concept, drawn),
        "row_shown": world.rows([number])[0],
        "seen": seen_in(world, run, [number], run.modalities[0]),
    }


def _located(world: World, run: LoadedRun, concept: ConceptAudit, found: Sweep) -> dict[str, Any]:
    """The row's picture and where in it the concept is."""
    assert world.store is not None
    row = world.store.ids.row_of(found.id)
    if not found.own:
        return {"row": world.rows([row])[0], "region": None, "drawn": None, "why": None}
    regions, why = world.regions(run, [row], concept.latents)
    return {"row": world.rows([row])[0], "region": regions[0], "drawn": as_svg(regions[0]), "why": why}


def _sweepable(found: Audit) -> list[ConceptAudit]:
    """The concepts that can be swept, those with the largest effect first, whether or not they bear a class's name."""
    return sorted((c for c in found.concepts if c.sweep is not None), key=lambda c: -c.effect)


def sweep_drawing(concept: ConceptAudit, found: Sweep) -> tuple[str, str]:
    """The probability of the class against the concept's strength as an SVG, and the same in a sentence."""
    figure = figures.new_figure()
    axes = figure.subplots()
    figures.draw_sweep(axes, found)
    name, id = figures.plain(figures.shorten(concept.name)), figures.plain(figures.shorten(found.id))
    axes.set(title=f"row {id}: strength of {name} changed", xlabel=f"strength of {name}",
             ylabel=figures.plain(f"probability of {concept.class_}"))  # fmt: skip
    words = (
        f"The probability of {concept.class_} for row {found.id} goes from {found.probabilities[0]:.2f} without "
        f"{concept.name} to {found.probabilities[-1]:.2f} at twice its natural strength"
    )
    return figures.as_svg(figure, words), words


def loaded(text: str) -> Markup:
    """An audit that `msae audit --json` wrote, as a part of the page."""
    try:
        found = Audit.from_json(text, where="this file")
    except ConfigError as err:
        return render("explorer/loaded.html", problem=err)
    swept = [concept for concept in found.concepts if concept.sweep][:SWEPT]
    drawings = [sweep_drawing(concept, concept.sweep) for concept in swept if concept.sweep]
    return render("explorer/loaded.html", problem=None, section=section(found), drawings=drawings)


PARTS = {"": page, "result": result, "sweep": sweep}
