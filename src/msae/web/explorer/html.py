"""Pieces of a page. `Markup.format` escapes whatever it is given, so nothing from a store becomes markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from msae.data.store import Row
from msae.web.explorer.address import Address
from msae.web.explorer.session import LoadedRun, World
from msae.web.report.page import shorten

SMALL, LARGE = 96, 320
"""Pixels of the two sizes in which pictures are served."""
CAPTION = 140
"""Characters of a caption; the rest is in its title."""


def join(pieces: Iterable[Markup]) -> Markup:
    return Markup("").join(pieces)


def fill(template: str, *values: Any, **named: Any) -> Markup:
    """The template with the values in it, escaped unless they are markup."""
    return Markup(template).format(*values, **named)  # noqa: S704 - templates are our own words


def note(text: Any, *, kind: str = "note") -> Markup:
    return fill('<p class="{}">{}</p>', kind, text)


def empty(title: str, advice: Any, command: str | None = None) -> Markup:
    """An empty state: what is missing, what to do, and the command that does it."""
    typed = fill("<pre><code>{}</code></pre>", command) if command else ""
    return fill('<div class="empty"><h2>{}</h2><p>{}</p>{}</div>', title, advice, typed)


def problem(message: Any) -> Markup:
    """An error that is the user's to mend."""
    return fill('<p class="problem" role="alert">{}</p>', message)


def section(title: str, body: Markup, *, hint: str = "") -> Markup:
    said = fill('<p class="note">{}</p>', hint) if hint else ""
    return fill("<section><h2>{}</h2>{}{}</section>", title, said, body)


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: str, numeric: Sequence[int] = ()) -> Markup:
    """A table that scrolls sideways in itself; `numeric` columns stand right."""
    kinds = [' class="n"' if i in numeric else "" for i in range(len(head))]
    titles = join(
        fill('<th scope="col"{}>{}</th>', Markup(k), title)  # noqa: S704
        for k, title in zip(kinds, head, strict=True)
    )
    body = join(
        fill("<tr>{}</tr>", join(fill("<td{}>{}</td>", Markup(k), cell) for k, cell in zip(kinds, row, strict=True)))  # noqa: S704
        for row in rows
    )
    return fill(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table><caption class="hidden">{}</caption>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>",
        caption, caption, titles, body,
    )  # fmt: skip


def picture(world: World, row: Row, side: int = LARGE) -> Markup:
    """The thumbnail of a row, or a grey field that says that it is not there."""
    if not world.is_picture(row.path):
        return fill('<div class="nopicture" role="img" aria-label="no picture of {}">no picture</div>', row.id)
    return fill(
        '<img src="/picture/{}/{}?v={}" alt="{}" loading="lazy" width="{}" height="{}">',
        row.row, side, world.version, described(row), side, side,
    )  # fmt: skip


def described(row: Row) -> str:
    """What a person sees of a row in words: its caption, its label or its id."""
    return shorten(row.words, CAPTION)


def number(value: float | None, digits: int = 2) -> str:
    """A figure for people; a dash where there is none."""
    return "-" if value is None or value != value else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """A share in percent."""
    if value is None or value != value:
        return "-"
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def latent_link(address: Address, run: LoadedRun, latent: int) -> Markup:
    """A link to the page of a latent: its name, and its number."""
    name = run.names.name_of(latent) if run.names else None
    label = fill("{} <small>#{}</small>", name, latent) if name else fill("#{}", latent)
    link = fill('<a href="{}">{}</a>', address.to("concept", latent=latent), label)
    likely = run.catalogue.likely[latent]
    if name or not likely:
        return link
    return fill('{} <span class="maybe" title="nearest word; not enough evidence for a name">{}?</span>', link, likely)


def no_store(world: World, run: LoadedRun) -> Markup:
    return empty(
        "No store is open",
        f"{world.note or ''} Pictures, captions and activations come from a store of embeddings. "
        "Stop this program with Ctrl-C and start it with one:",
        f"msae explore {run.folder} --on STORE",
    )


def no_names(run: LoadedRun) -> Markup:
    return empty(
        "The latents of this run have no names yet",
        "They are shown by their numbers. A vocabulary is any list of words that was embedded by the same encoder; "
        "name them, then reload this page's program:",
        f"msae name {run.folder} --vocabulary STORE",
    )
