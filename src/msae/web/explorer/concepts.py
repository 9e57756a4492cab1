"""The page Concepts: every latent of a run, to be searched, sorted and filtered."""

from __future__ import annotations

from markupsafe import Markup

from msae.web.explorer.address import Address
from msae.web.explorer.catalogue import CHOICES, Catalogue
from msae.web.explorer.html import (
    SMALL,
    empty,
    fill,
    join,
    latent_link,
    no_names,
    no_store,
    note,
    number,
    picture,
    share,
)
from msae.web.explorer.session import LoadedRun, World

ROWS = 40
"""Latents on a page."""
THUMBNAILS = 4
COLUMNS = (
    ("name", "concept", "its name, or the nearest word of the vocabulary in grey"),
    ("evidence", "evidence", "cosine of the decoder row and the word; AUROC against captions"),
    ("rate", "fires in", "share of the rows in which it is not zero"),
    ("mean", "mean", "mean activation over all rows"),
    ("max", "max", "largest activation"),
    ("level", "levels", "share of its firings in which it is among the k strongest, a bar for each level"),
)


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page."""
    catalogue = run.catalogue
    n_named = int(catalogue.masks["named"].sum())
    on = f", shown on {len(world.store):,} rows of {world.store.path.name}" if world.store else ""
    facts = (
        f"{len(catalogue.names):,} latents of a {run.sae.config.kind} SAE, {n_named:,} of them named{on}. "
        "Each latent is one thing the SAE sees; open one to see what."
    )
    missing = "" if world.store else no_store(world, run)
    unnamed = "" if run.names else no_names(run)
    return fill(
        '<h1>Concepts</h1><p>{}</p>{}{}{}<div id="part-table">{}</div>',
        facts, missing, unnamed, _controls(catalogue, address), table(world, run, address),
    )  # fmt: skip


def _controls(catalogue: Catalogue, address: Address) -> Markup:
    only = address.one("only")
    chips = join(
        fill(
            '<label class="chip" title="{}"><input type="radio" name="only" value="{}"{}{}><span>{}</span></label>',
            choice.explanation, choice.key, Markup(" checked") if choice.key == only else "",
            Markup(" disabled") if choice.key and choice.key not in catalogue.masks else "", choice.label,
        )
        for choice in CHOICES
    )  # fmt: skip
    return fill(
        '<form class="controls" data-part="table"><input type="search" name="words" value="{}" '
        'placeholder="word or number" aria-label="Find a concept by word or number">'
        '<fieldset><legend class="hidden">Show</legend>{}</fieldset>'
        '<input type="hidden" name="sort" value="{}"></form>',
        address.one("words"), chips, _sort(address),
    )  # fmt: skip


def _sort(address: Address) -> str:
    return address.one("sort") or "-evidence"


def table(world: World, run: LoadedRun, address: Address) -> Markup:
    """The latents that fit, a page of them."""
    catalogue = run.catalogue
    found = catalogue.select(address.one("words"), address.one("only"), _sort(address))
    if not len(found):
        return empty("No latent fits", "Search for another word, or choose another filter.")
    first = min(address.number("from", 0), (len(found) - 1) // ROWS * ROWS)
    shown = found[first : first + ROWS].tolist()
    rows = join(_row(world, run, address, latent) for latent in shown)
    return fill(
        '<div class="scroll" tabindex="0" role="region" aria-label="Latents"><table class="concepts">'
        '<caption class="hidden">Latents of the run</caption><thead><tr>{}{}</tr></thead><tbody>{}</tbody></table>'
        "</div>{}",
        _heads(address), fill('<th scope="col">strongest samples</th>') if run.samples else "", rows,
        pager(address, first, len(found), ROWS, "table", "latents"),
    )  # fmt: skip


def _heads(address: Address) -> Markup:
    sort = _sort(address)
    pieces = []
    for key, label, hint in COLUMNS:
        is_sorted = sort.removeprefix("-") == key
        falls = sort.startswith("-")
        # Names begin with A, numbers with the largest; the second click turns the order round.
        other = (key if falls else f"-{key}") if is_sorted else key if key == "name" else f"-{key}"
        arrow = ("↓" if falls else "↑") if is_sorted else ""
        state = ("descending" if falls else "ascending") if is_sorted else "none"
        pieces.append(
            fill(
                '<th scope="col" class="{}" aria-sort="{}"><a href="{}" data-part="table" title="{}; click to sort">'
                "{} {}</a></th>",
                key, state, address.but(sort=other, **{"from": None}), hint, label, arrow,
            )
        )  # fmt: skip
    return join(pieces)


def _row(world: World, run: LoadedRun, address: Address, latent: int) -> Markup:
    catalogue = run.catalogue
    link = latent_link(address, run, latent)
    kind = catalogue.kind(latent)
    badge = fill(' <span class="badge {}">{}</span>', kind, kind) if kind else ""
    evidence = number(catalogue.cosine[latent])
    if catalogue.auroc[latent] == catalogue.auroc[latent]:
        evidence += f" · AUROC {catalogue.auroc[latent]:.2f}"
    cells = fill(
        '<th scope="row">{}{}</th><td class="evidence">{}</td><td class="rate">{}</td><td class="mean">{}</td>'
        '<td class="max">{}</td><td class="level">{}</td>',
        link, badge, evidence, share(catalogue.rate[latent]), number(catalogue.mean[latent]),
        number(catalogue.maximum[latent]), _profile(catalogue, latent),
    )  # fmt: skip
    samples = fill("<td>{}</td>", _samples(world, run, latent)) if run.samples else ""
    return fill("<tr>{}{}</tr>", cells, samples)


def _samples(world: World, run: LoadedRun, latent: int) -> Markup:
    """The strongest samples in little: pictures, or the first caption."""
    assert world.store is not None
    modality, samples = next(iter(run.samples.items()))
    top = samples.top(latent, THUMBNAILS)
    if not top:
        return note("never fires")
    rows = world.store.describe_rows([sample.row for sample in top])
    if modality == "image" and world.has_pictures:
        return fill('<div class="strip">{}</div>', join(picture(world, row, SMALL) for row in rows))
    words = ", ".join(dict.fromkeys(row.words for row in rows[:2]))
    return fill('<span class="words">{}</span>', words)


def _profile(catalogue: Catalogue, latent: int) -> Markup:
    """The level profile as bars."""
    shares = catalogue.profile[latent].tolist()
    if not shares:
        return fill("-")
    words = ", ".join(f"{part:.0%} among {k:,}" for k, part in zip(catalogue.levels, shares, strict=True))
    bars = join(
        fill('<rect x="{}" y="{}" width="6" height="{}"/>', 7 * i, 18 - round(17 * part, 1), round(17 * part, 1) + 1)
        for i, part in enumerate(shares)
    )
    return fill(
        '<svg class="spark" viewBox="0 0 {} 20" width="{}" height="20" role="img" aria-label="{}"><title>{}</title>{}'
        "</svg>",
        7 * len(shares), 7 * len(shares), words, words, bars,
    )  # fmt: skip


def pager(address: Address, first: int, total: int, size: int, part: str, unit: str, key: str = "from") -> Markup:
    """Links to the pages before and after."""
    last = min(first + size, total)
    if total <= size:
        return fill('<p class="pager" aria-live="polite"><span>{} {}</span></p>', f"{total:,}", unit)
    back = fill('<a href="{}" data-part="{}" rel="prev">← before</a>', address.but(**{key: max(0, first - size)}), part)
    on = fill('<a href="{}" data-part="{}" rel="next">next →</a>', address.but(**{key: last}), part)
    return fill(
        '<p class="pager" aria-live="polite">{}<span>{} to {} of {} {}</span>{}</p>',
        back if first else fill("<span></span>"), f"{first + 1:,}", f"{last:,}", f"{total:,}", unit,
        on if last < total else fill("<span></span>"),
    )  # fmt: skip


PARTS = {"": page, "table": table}
