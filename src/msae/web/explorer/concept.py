"""The page Concept: what one latent sees, how strongly, where it belongs, and why it has its name."""

from __future__ import annotations

import torch
from markupsafe import Markup

from msae.base.errors import MissingDependencyError
from msae.concepts.hierarchy import Edge
from msae.sae.standardize import Modality
from msae.web.explorer.address import Address
from msae.web.explorer.concepts import pager
from msae.web.explorer.html import (
    described,
    empty,
    fill,
    join,
    latent_link,
    no_names,
    no_store,
    note,
    number,
    picture,
    problem,
    section,
    share,
    table,
)
from msae.web.explorer.session import LoadedRun, World
from msae.web.report import figures

SHOWN = 12
"""Samples of a modality at once."""
LISTED = 10
"""Related latents of a kind."""
UNCOMMON = 0.05
"""Correlations below this are not worth a line."""


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page."""
    latent = _latent(run, address)
    name = run.names.name_of(latent) if run.names else None
    likely = run.catalogue.likely[latent]
    title = name or (fill('#{} <span class="maybe">perhaps “{}”</span>', latent, likely) if likely else f"#{latent}")
    kind = run.catalogue.kind(latent)
    badge = fill(' <span class="badge {}">{}</span>', kind, kind) if kind else ""
    samples = join(
        fill('<div id="part-{}">{}</div>', modality, _samples(world, run, address, modality))
        for modality in run.modalities
    )
    body = fill('<div class="sides">{}</div>', samples) if samples else no_store(world, run)
    return fill(
        '<p class="crumbs"><a href="{}">Concepts</a> / latent {} of {}</p><h1>{}{}</h1><p>{}</p>'
        "{}{}{}{}{}",
        address.to("concepts"), latent, f"{run.sae.d_sae:,}", title, badge, _summary(run, latent),
        _links(world, run, address, latent), body, _shape(run, latent), _naming(run, latent), _relations(world, run),
    )  # fmt: skip


def _latent(run: LoadedRun, address: Address) -> int:
    best = run.catalogue.select("", "", "-evidence")
    return address.number("latent", int(best[0]), high=run.sae.d_sae - 1)


def _summary(run: LoadedRun, latent: int) -> Markup:
    """Its statistics as sentences."""
    said = []
    for modality, samples in run.samples.items():
        p50, p99 = samples.quantiles((0.5, 0.99))[latent]
        rate = float(samples.firing_rate[latent])
        if rate == 0:
            said.append(f"It never fires in the {samples.n_rows:,} {modality}s: here it is dead.")
            continue
        said.append(
            f"It fires in {share(rate)} of the {samples.n_rows:,} {modality}s; there half of its activations are below "
            f"{p50:.2f}, 99 % below {p99:.2f}, and the largest is {samples.maximum[latent]:.2f}."
        )
    return fill("{}", " ".join(said) or "Its activations are not known without a store.")


def _links(world: World, run: LoadedRun, address: Address, latent: int) -> Markup:
    name = run.names.name_of(latent) if run.names else None
    search = ""
    top = next((samples.top(latent, 1) for samples in run.samples.values()), [])
    if world.store is not None and top:
        search = fill('<a class="button" href="{}">Turn it up or down in a search</a>',
                      address.to("search", row=top[0].id, add=name or f"#{latent}"))  # fmt: skip
    before, after = (latent - 1) % run.sae.d_sae, (latent + 1) % run.sae.d_sae
    return fill(
        '<p class="actions">{}<button type="button" data-copy>Copy a link to this view</button>'
        '<a href="{}" rel="prev">← #{}</a><a href="{}" rel="next">#{} →</a></p>',
        search, address.to("concept", latent=before), before, address.to("concept", latent=after), after,
    )  # fmt: skip


def _samples(world: World, run: LoadedRun, address: Address, modality: Modality) -> Markup:
    """The strongest samples of one modality, a page of them."""
    assert world.store is not None
    latent = _latent(run, address)
    top = run.samples[modality].top(latent)
    key = f"from_{modality}"
    first = min(address.number(key, 0), max(0, len(top) - 1) // SHOWN * SHOWN)
    shown = top[first : first + SHOWN]
    rows = world.store.describe_rows([sample.row for sample in shown])
    if not top:
        cells = note(f"No {modality} of this store fires it.")
    elif modality == "image":
        cells = fill('<div class="grid">{}</div>', join(
            fill('<figure>{}<figcaption><b>{}</b> {}</figcaption></figure>',
                 picture(world, row) if world.has_pictures else "", number(sample.activation), described(row))
            for sample, row in zip(shown, rows, strict=True)
        ))  # fmt: skip
    else:
        cells = fill('<ol class="texts" start="{}">{}</ol>', first + 1, join(
            fill("<li><b>{}</b> {}</li>", number(sample.activation), described(row))
            for sample, row in zip(shown, rows, strict=True)
        ))  # fmt: skip
    pages = pager(address, first, len(top), SHOWN, modality, f"strongest {modality}s", key)
    return fill("<section><h2>{} that fire it most</h2>{}{}</section>", f"{modality.capitalize()}s", cells, pages)


def images(world: World, run: LoadedRun, address: Address) -> Markup:
    return _samples(world, run, address, "image") if "image" in run.modalities else no_store(world, run)


def texts(world: World, run: LoadedRun, address: Address) -> Markup:
    return _samples(world, run, address, "text") if "text" in run.modalities else no_store(world, run)


def _shape(run: LoadedRun, latent: int) -> Markup:
    """Histograms of its activations, and its level profile."""
    if not run.samples:
        return fill("")
    try:
        drawn = [figures.activation_histogram(samples, latent) for samples in run.samples.values()]
        drawn.append(figures.level_profile(next(iter(run.samples.values())), latent))
    except MissingDependencyError as err:
        return problem(err)
    return section(
        "How strongly it fires",
        fill('<div class="figures">{}</div>', join(fill("<figure>{}</figure>", Markup(svg)) for svg in drawn)),  # noqa: S704 - figures escape
    )


def _naming(run: LoadedRun, latent: int) -> Markup:
    """The name's evidence, and the candidates."""
    if run.names is None:
        return no_names(run)
    concept = run.names.concept_of(latent)
    lines = []
    if concept is None:
        lines.append("No name: the nearest words below do not have evidence enough.")
    else:
        lines.append(
            f"Named “{concept.name}” by the rule {run.names.rule}: cosine {concept.cosine:.3f} to its decoder row."
        )
        if concept.runner_up is not None and concept.margin is not None:
            lines.append(f"The runner-up is “{concept.runner_up}”, {concept.margin:.3f} behind.")
        if concept.q is not None:
            lines.append(f"Chance would do as well in a share of {concept.q:.1e} (q-value).")
        if concept.synonyms:
            lines.append(f"Synonyms: {', '.join(concept.synonyms)}.")
        if (seen := concept.agreement) is not None:
            lines.append(
                f"Rows that contain the word fire it more than others with probability {seen.auroc:.2f} "
                f"({seen.low:.2f} to {seen.high:.2f}, {seen.n_with:,} such rows)."
            )
    near = run.names.candidates_of(latent)
    words = table(["word", "cosine"], [(word.word, number(word.cosine, 3)) for word in near],
                  caption="Nearest words", numeric=[1]) if near else ""  # fmt: skip
    return section("Why this name", fill("<p>{}</p>{}", " ".join(lines), words))


def _relations(world: World, run: LoadedRun) -> Markup:
    """The relatives take longer on a wide SAE: they come by themselves when the page is there."""
    wait = note("Reading which concepts fire together …" if world.store and run.modalities else "")
    return fill('<div id="part-relations" data-load="relations" aria-live="polite">{}</div>', wait)


def relations(world: World, run: LoadedRun, address: Address) -> Markup:
    """Parents and children, what fires with it, and the nearest decoder rows."""
    latent = _latent(run, address)
    pieces = [
        section("Nearest decoder rows", _nearest(run, address, latent), hint="Latents that write in like directions.")
    ]
    if world.store is not None:
        pieces.insert(0, section("In the hierarchy", _hierarchy(run, address, latent)))
        pieces.insert(1, section("Fires together with", _together(run, address, latent),
                                 hint="Correlation of the two activations over rows of the store."))  # fmt: skip
    return fill('<div class="sides three">{}</div>', join(pieces))


def _hierarchy(run: LoadedRun, address: Address, latent: int) -> Markup:
    tree = run.tree
    assert tree is not None
    found = tree.hierarchy
    path: list[Edge] = []
    above = found.parent.get(latent)
    while above is not None and len(path) < LISTED:
        path.append(above)
        above = found.parent.get(above.parent)
    children = found.children.get(latent, [])
    if not path and not children:
        return note("No other latent fires nearly everywhere this one does, nor the reverse: it stands alone.")
    pieces = [
        fill("<li>{} <small>has {} of the rows of {}</small></li>",
             latent_link(address, run, edge.parent), share(edge.share), run.name(edge.child))
        for edge in reversed(path)
    ]  # fmt: skip
    pieces.append(fill('<li aria-current="true"><b>{}</b></li>', run.name(latent)))
    below = join(
        fill("<li>{} <small>{} of its rows are here</small></li>",
             latent_link(address, run, child), share(found.parent[child].share))
        for child in children[:LISTED]
    )  # fmt: skip
    more = note(f"and {len(children) - LISTED} more") if len(children) > LISTED else ""
    return fill('<ol class="tree">{}</ol><ul class="tree below">{}</ul>{}', join(pieces), below, more)


def _together(run: LoadedRun, address: Address, latent: int) -> Markup:
    correlations = correlate(run, latent)
    best = correlations.topk(min(LISTED, len(correlations)))
    pairs = [(i, v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True) if v > UNCOMMON]
    if not pairs:
        return empty("Nothing fires with it", "No other latent rises and falls with this one.")
    rows = [(latent_link(address, run, other), number(value)) for other, value in pairs]
    return table(["concept", "correlation"], rows, caption="Concepts that fire together with this one", numeric=[1])


def correlate(run: LoadedRun, latent: int) -> torch.Tensor:
    """The correlation of a latent's activations with every other's on a sample of the store; -1 with itself."""
    modality = run.modalities[0]
    n, total, squares, products = 0, torch.zeros(1), torch.zeros(1), torch.zeros(1)
    for z in run.searcher(modality).concepts(modality).sample_activations():
        own = z[:, latent]
        n += len(z)
        total = total + z.sum(0)
        squares = squares + z.square().sum(0)
        products = products + own @ z
    mean = total / n
    deviation = (squares / n - mean.square()).clamp_min(0).sqrt()
    covariance = products / n - mean * mean[latent]
    found = torch.where(deviation > 0, covariance / (deviation * deviation[latent]).clamp_min(1e-12), 0.0)
    found[latent] = -1
    return found


def _nearest(run: LoadedRun, address: Address, latent: int) -> Markup:
    cosines = run.unit_rows @ run.unit_rows[latent]
    cosines[latent] = -1
    best = cosines.topk(min(LISTED, len(cosines) - 1))
    rows = [
        (latent_link(address, run, other), number(value))
        for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return table(["concept", "cosine"], rows, caption="Latents with the nearest decoder rows", numeric=[1])


PARTS = {"": page, "image": images, "text": texts, "relations": relations}
