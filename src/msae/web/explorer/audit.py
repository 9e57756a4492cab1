"""The page Audit: what a linear classifier of a column relies on, and any sample swept through a concept."""

from __future__ import annotations

from markupsafe import Markup

from msae.base.errors import ConfigError, MissingDependencyError, MsaeError
from msae.use.audit import Audit, ConceptAudit, Sweep
from msae.use.audit.subjects import MAX_CLASSES
from msae.web.explorer.address import Address
from msae.web.explorer.html import empty, fill, join, no_names, no_store, note, problem
from msae.web.explorer.session import LoadedRun, World
from msae.web.report import figures
from msae.web.report.audit import section

SWEPT = 4
"""Concepts of a loaded audit whose sweeps are drawn."""


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page; the audit itself is a part, for it takes a while."""
    head = fill(
        "<h1>Audit</h1><p>A linear classifier is trained to tell the values of a column from embeddings. The audit "
        "says which concepts it relies on: how its answer changes when each is taken away or put in.</p>"
    )
    if world.store is None:
        return fill("{}{}{}", head, no_store(world, run), _load_form())
    columns = world.targets
    target = address.one("target")
    options = join(
        fill('<option value="{}"{}>{}</option>', name, Markup(" selected") if name == target else "",
             f"{name} ({count} values)")
        for name, count in columns.items()
    )  # fmt: skip
    if columns:
        form = fill(
            '<form class="ask" data-part=""><label>column<select name="target"><option value="">choose …</option>{}'
            "</select></label><button>Audit</button></form>", options,
        )  # fmt: skip
    else:
        form = note(f"{world.store.path.name} has no column of 2 to {MAX_CLASSES} different values to be a target.")
    body = fill("")
    if target and not run.names:
        body = no_names(run)
    elif target:
        body = fill(
            '<div id="part-result" data-load="result" aria-live="polite"><p class="note">Auditing {}: once, up to a '
            "minute or two on large stores …</p></div>", target,
        )  # fmt: skip
    return fill("{}{}{}{}", head, form, _load_form(), body)


def _load_form() -> Markup:
    return fill(
        '<form class="ask" data-part=""><label>or load what msae audit --json FILE wrote'
        '<input type="file" accept=".json,application/json" data-audit></label></form><div id="part-loaded"></div>'
    )


def result(world: World, run: LoadedRun, address: Address) -> Markup:
    """The audit of the chosen column, and the form for sweeps."""
    target = address.one("target")
    if world.store is None or run.names is None:
        return no_names(run)
    try:
        if target not in world.targets:
            raise ConfigError(f"{target!r} is no column that can be audited; choose another")
        found = run.audit(target)
        drawn = Markup(section(found, n_plotted=4, brief=True))  # noqa: S704 - escapes what it shows
    except MsaeError as err:
        return problem(err)
    return fill("{}<h2>What the classifier relies on</h2>{}", _sweep_form(world, found, address), drawn)


def _sweep_form(world: World, found: Audit, address: Address) -> Markup:
    assert world.store is not None
    swept = _turnable(found)
    if not swept:
        return note("No concept of this audit can be turned.")
    wanted = address.one("concept", swept[0].name)
    options = join(
        fill("<option{}>{}</option>", Markup(" selected") if concept.name == wanted else "", concept.name)
        for concept in swept
    )
    first = swept[0].sweep
    assert first is not None
    return fill(
        '<section><h2>One sample, swept</h2><p class="note">The concept goes from none to twice what is natural, in '
        'one row of the store.</p><form class="ask" data-part="sweep"><input type="hidden" name="target" value="{}">'
        '<label>concept<select name="concept">{}</select></label>'
        '<label>id of a row<input type="text" name="row" value="{}"></label><button>Sweep</button></form>'
        '<div id="part-sweep" aria-live="polite">{}</div></section>',
        found.target, options, address.one("row", first.id), _swept(world, found, address),
    )  # fmt: skip


def sweep(world: World, run: LoadedRun, address: Address) -> Markup:
    """The sweep of the chosen sample and concept."""
    try:
        if world.store is None or address.one("target") not in world.targets:
            raise ConfigError("there is no audit to sweep a sample of; choose a column first")
        return _swept(world, run.audit(address.one("target")), address, run)
    except MsaeError as err:
        return problem(err)


def _swept(world: World, found: Audit, address: Address, run: LoadedRun | None = None) -> Markup:
    turnable = _turnable(found)
    concept = next((c for c in turnable if c.name == address.one("concept")), turnable[0])
    id = address.one("row") or (concept.sweep.id if concept.sweep else "")
    try:
        if run is None:
            run = world.runs.get(address.one("run"), world.first)
        drawn = run.sweeper(str(found.target)).of(concept, id)
        return note("This concept cannot be turned.") if drawn is None else sweep_svg(concept, drawn)
    except MsaeError as err:
        return problem(err)


def _turnable(found: Audit) -> list[ConceptAudit]:
    """The concepts that can be swept, those with the largest effect first, whether or not they bear a class's name."""
    return sorted((c for c in found.concepts if c.sweep is not None), key=lambda c: -c.effect)


def sweep_svg(concept: ConceptAudit, found: Sweep) -> Markup:
    """The probability of the class against the concept's strength, with what is natural shaded."""
    figure = figures.new_figure()
    axes = figure.subplots()
    axes.plot(found.strengths, found.probabilities, color="#000000")
    axes.axvspan(0, found.natural_p99, color=figures.COLOURS[2], alpha=0.15, label="natural, up to p99")
    axes.axvline(found.own, color=figures.COLOURS[1], linestyle=":", label="the sample's own")
    name, id = figures.plain(figures.shorten(concept.name)), figures.plain(figures.shorten(found.id))
    axes.set(title=f"sample {id}: {name} turned", xlabel=f"strength of {name}", ylim=(-0.02, 1.02),
             ylabel=figures.plain(f"probability of {concept.class_}"))  # fmt: skip
    figures.legend(axes)
    words = (
        f"The probability of {concept.class_} for sample {found.id} goes from {found.probabilities[0]:.2f} without "
        f"{concept.name} to {found.probabilities[-1]:.2f} at twice its natural strength"
    )
    svg = Markup(figures.as_svg(figure, words))  # noqa: S704 - escapes what it shows
    return fill('<div class="figures"><figure>{}<figcaption>{}.</figcaption></figure></div>', svg, words)


def loaded(text: str) -> Markup:
    """An audit that `msae audit --json` wrote, as a page part."""
    try:
        found = Audit.from_json(text, where="this file")
        swept = [concept for concept in found.concepts if concept.sweep][:SWEPT]
        drawn = join(sweep_svg(concept, concept.sweep) for concept in swept if concept.sweep)
        table = Markup(section(found, brief=True))  # noqa: S704 - escapes what it shows
    except MissingDependencyError as err:
        return problem(err)
    except ConfigError as err:
        return empty("This file is no audit", f"{err}.", "msae audit RUN --on STORE --target COLUMN --json FILE")
    return fill("{}{}", table, drawn)


PARTS = {"": page, "result": result, "sweep": sweep}
