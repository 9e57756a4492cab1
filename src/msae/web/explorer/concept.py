"""The page Concept: what one latent responds to, how strongly, what it is related to, and why it has its name."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from markupsafe import Markup

from msae.concepts.regions import Region
from msae.concepts.tree import Edge
from msae.sae.standardize import Modality
from msae.web.explorer.address import Address
from msae.web.explorer.filling import Slice, draw
from msae.web.explorer.session import LoadedRun, World
from msae.web.explorer.standing import seen_in
from msae.web.overlay import as_svg
from msae.web.page import number
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
    drawn = [figures.activation_histogram(samples, latent) for samples in run.samples.values()]
    if run.samples:
        drawn.append(figures.level_profile(next(iter(run.samples.values())), latent))
    top = next((samples.top(latent, 1) for samples in run.samples.values()), [])
    near = run.names.candidates_of(latent) if run.names else []
    return draw(
        "concept", world, run, address, latent=latent, facts=_facts(run, latent), figures=drawn,
        strongest=top[0].id if top else None, near=[(word.word, number(word.cosine, 3)) for word in near],
        sides=[_samples(world, run, address, modality, is_part=False) for modality in run.modalities],
    )  # fmt: skip


def _latent(run: LoadedRun, address: Address) -> int:
    best = 0 if address.one("latent") else int(run.catalogue.select("", "", "-evidence")[0])
    return address.number("latent", best, high=run.sae.d_sae - 1)


def _facts(run: LoadedRun, latent: int) -> list[tuple[Modality, int, float, float, float, float]]:
    """Of each modality: rows, firing rate, median and 99th percentile where it fires, and the largest activation."""
    facts = []
    for modality, found in run.samples.items():
        p50, p99 = found.quantiles((0.5, 0.99))[latent]
        rate, largest = found.firing_rate[latent], found.maximum[latent]
        facts.append((modality, found.n_rows, float(rate), float(p50), float(p99), float(largest)))
    return facts


def _samples(
    world: World, run: LoadedRun, address: Address, modality: Modality, *, is_part: bool = True
) -> dict[str, Any]:
    """The strongest samples of one modality, a page of them; regions take a while, so only the part has them."""
    assert world.store is not None
    latent = _latent(run, address)
    top = run.samples[modality].top(latent)
    shown = Slice.of(address, len(top), SHOWN, modality, f"strongest {modality}s", f"from_{modality}")
    samples = top[shown.first : shown.last]
    numbers = [sample.row for sample in samples]
    is_located = modality == "image" and bool(address.one("where"))
    regions: list[Region | None] = [None] * len(samples)
    why: str | None = None
    if is_located and is_part:
        regions, why = world.regions(run, numbers, [latent])
    own = (run.names.name_of(latent) if run.names else None) or f"#{latent}"
    return {"modality": modality, "shown": shown, "is_located": is_located, "why": why,
            "seen": seen_in(world, run, numbers, modality, without=(own,)),
            "samples": list(zip(samples, world.rows(numbers), regions, map(as_svg, regions), strict=True))}  # fmt: skip


def samples(modality: Modality, world: World, run: LoadedRun, address: Address) -> Markup:
    """The strongest samples of one modality."""
    side = _samples(world, run, address, modality) if modality in run.modalities else None
    return draw("samples", world, run, address, side=side)


def relations(world: World, run: LoadedRun, address: Address) -> Markup:
    """Parents and children, what fires in the same rows, and the nearest decoder rows."""
    latent = _latent(run, address)
    together = [] if world.store is None else _largest(correlate(run, latent), above=UNCOMMON)
    cosines = run.unit_rows @ run.unit_rows[latent]
    cosines[latent] = -1
    return draw(
        "relations", world, run, address, latent=latent, together=together, nearest=_largest(cosines), listed=LISTED,
        family=None if run.tree is None else _family(run, latent),
    )  # fmt: skip


def _family(run: LoadedRun, latent: int) -> dict[str, Any]:
    """The latents above, the uppermost first, and those below."""
    assert run.tree is not None
    found = run.tree.hierarchy
    above: list[Edge] = []
    edge = found.parent.get(latent)
    while edge is not None and len(above) < LISTED:
        above.insert(0, edge)
        edge = found.parent.get(edge.parent)
    return {"above": above, "below": [found.parent[child] for child in found.children.get(latent, [])]}


def _largest(values: torch.Tensor, *, above: float = -1.0) -> list[tuple[int, float]]:
    best = values.topk(min(LISTED, len(values) - 1))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(latent, value) for latent, value in pairs if value > above]


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


PARTS = {"": page, "image": partial(samples, "image"), "text": partial(samples, "text"), "relations": relations}
