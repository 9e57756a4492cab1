"""The audit as HTML: the verdict, what stands out with pictures and plots, the fix, and all concepts in a table.

`section` is what a larger page includes; `write_html` makes a page of it that opens offline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from markupsafe import Markup

from msae.base.errors import MsaeError
from msae.concepts.regions import Locator, Region
from msae.data.layout import far_address
from msae.data.store import EmbeddingStore, recorded_store
from msae.data.thumbnails import Album
from msae.sae.run import RunLike
from msae.sae.view import View
from msae.use.audit import Audit, ConceptAudit
from msae.use.audit.results import what_helps
from msae.web import page
from msae.web.overlay import as_svg as overlay
from msae.web.report.figures import COLOURS, as_svg, draw_sweep, legend, new_figure, plain

N_PLOTTED = 8
N_CASES, SIDE = 6, 112
"""Pictures of either side of a concept, and pixels of their longer side."""
HEAD = (
    "concept", "pushes", "effect", "largest control", "q", "rows", "worst group, best edit", "latents", "removed",
    "set to p50", "set to p99", "answers changed", "association", "p", "q of errors", "accuracy, levelled",
    "accuracy, removed",
)  # fmt: skip
BRIEF = range(7)
"""Columns of a table that fits a page."""
ALONE = (0, 4, 12, 7)
"""Columns that are known of a concept of the training rows alone."""
MEANINGS = {
    "pushes": "where more of the concept moves the model",
    "effect": "mean change of the probability of the class (or of the score) when the concept is removed, and when it "
    "is set to a typical strength where it is absent",
    "largest control": "the largest effect of random latents that fire as often and as strongly; a smaller effect is "
    "no evidence",
    "q": "the share of false findings to expect among all concepts with a q as small",
    "rows": "in how many rows the concept fires",
    "worst group, best edit": "the lowest accuracy among the groups of rows with one class, with or without the "
    "concept; then with the concept removed or levelled (at its mean), whichever is better",
    "latents": "the latents that bear the concept's name",
    "removed": "the mean change of the probability when the concept is removed, with its 95% interval",
    "set to p50": "the same when it is set to the median of the rows in which it fires",
    "set to p99": "the same when it is set to the 99th percentile of the rows in which it fires",
    "answers changed": "the share of the rows with the concept whose predicted class changes when it is removed",
    "association": "how often the concept is stronger in rows of the class than in others, less how often it is weaker "
    "(Cliff's delta; of a score, the rank correlation); 0 is none",
    "p": "chance of an association as large if concept and class had nothing to do with each other",
    "q of errors": "q where only rows of the same true class are compared: does it go with the errors?",
    "accuracy, levelled": "of all rows, with the concept at its mean in every row",
    "accuracy, removed": "of all rows, with the concept at 0 in every row",
}
TEST = (
    "A concept stands out when two things hold. First, it goes together with the model's answers more than shuffled "
    "answers would: the labels are shuffled thousands of times, and q says which share of such findings is false. "
    "Second, removing or setting it changes the answers more than the same edit of each of 20 random latents that fire "
    "as often. A random latent passes the second about once in 21 times: hence the number that chance would have."
)
MAX_GROUPS = 6
"""More groups than these have their labels upright."""
MAX_CLASSES = len(COLOURS)
"""More classes than these are left out of the plots; the table and the JSON have them."""


def write_html(audit: Audit, path: str | Path, run: RunLike | None = None) -> None:
    """Write the audit as one page without scripts or links to anywhere; pictures are inlined where the store is.

    Args:
        run: The SAE that was used, for the regions of the pictures; they need the encoder on this machine.
    """
    store = recorded_store(audit.on) if far_address(audit.on) or Path(audit.on).exists() else None
    locator, why = None, None
    if store is not None and run is not None and "image" in store.modalities:
        try:
            locator = Locator(View(run, store, "image"), local=True)
        except MsaeError as err:
            why = str(err)
    body = section(audit, store=store, locator=locator, why=why)
    page.write_page(page.render("report/audit.html", audit=audit, section=body), Path(path))


def section(
    audit: Audit,
    *,
    store: EmbeddingStore | None = None,
    locator: Locator | None = None,
    why: str | None = None,
    n_plotted: int = N_PLOTTED,
    brief: bool = False,
    faces: Mapping[str, tuple[str, Markup]] = MappingProxyType({}),
) -> Markup:
    """The audit as a piece of HTML: the verdict, then what stands out, then all the rest.

    Args:
        store: Where pictures of the strongest cases are found.
        locator: Finds where in them the concepts are.
        why: The reason for having none.
        n_plotted: Concepts that are drawn.
        brief: Leave out the table of all concepts.
        faces: Of concepts by name, what is shown instead of it, and a picture or nothing.
    """
    ranked = audit.shown
    drawn = ranked[:n_plotted] if audit.sample is not None else []
    album = None if store is None else Album(store.picture_roots, SIDE)
    alone = [] if audit.settings.get("asked") else audit.in_training_alone
    rest = [concept for concept in audit.concepts if concept not in ranked and concept not in alone]
    return page.render(
        "report/audit_section.html",
        overlay=overlay,
        verdict=audit.verdict,
        facts=_facts(audit),
        notes=audit.notes,
        head=HEAD,
        brief_head=[HEAD[i] for i in BRIEF],
        meanings=MEANINGS,
        test=TEST,
        ranked=[[_cells(concept, audit.n)[i] for i in BRIEF] for concept in ranked],
        alone=[[_cells(concept, audit.n)[i] for i in ALONE] for concept in alone],
        alone_head=[HEAD[i] for i in ALONE],
        rest=[] if brief and ranked else [_cells(concept, audit.n) for concept in rest],
        n_rest=len(rest),
        drawn=[
            (
                concept,
                sentence(audit, concept),
                cases(audit, concept, store, album, locator),
                concept_svgs(audit, concept),
            )
            for concept in drawn
        ],
        why=why,
        fix=audit.fix,
        slices=audit.slices or (),
        faces=faces,
    )


def sentence(audit: Audit, concept: ConceptAudit) -> str:
    """What was found about a concept, in words."""
    what = "the score" if audit.is_score else f"the probability of {concept.class_}"
    parts = [f"Fires in {round(concept.firing_rate * audit.n):,} of {audit.n:,} rows"]
    if concept.remove is not None:
        way = "raises" if concept.remove.change > 0 else "lowers"
        parts.append(f"removing it {way} {what} by {abs(concept.remove.change):.3f} on average")
    if concept.set_p50 is not None:
        way = "raises" if concept.set_p50.change > 0 else "lowers"
        parts.append(
            f"setting it, where it is absent, to a typical strength {way} it by {abs(concept.set_p50.change):.3f}"
        )
    if concept.control is not None and concept.control.largest is not None:
        parts.append(f"the largest of {concept.control.n} random latents changes it by {concept.control.largest:.3f}")
    return "; ".join(parts)


def cases(
    audit: Audit,
    concept: ConceptAudit,
    store: EmbeddingStore | None,
    album: Album | None,
    locator: Locator | None = None,
) -> list[tuple[str, list[tuple[str, str, Region | None]]]]:
    """The rows that have most of a concept, on two sides by what the model says of them: titles and pictures."""
    if store is None or album is None or audit.sample is None:
        return []
    strengths = audit.sample.strengths[:, audit.concepts.index(concept)]
    order = np.argsort(-strengths, kind="stable")
    if audit.is_score:
        sides = [("most of it", order[strengths[order] > 0]), ("none of it", order[::-1][strengths[order[::-1]] <= 0])]
    else:
        is_class = audit.sample.predicted[order] == audit.classes.index(str(concept.class_))
        fires = strengths[order] > 0
        sides = [
            (f"most of it, predicted {concept.class_}", order[is_class & fires]),
            ("most of it, predicted otherwise", order[~is_class & fires]),
        ]
    found = []
    for title, places in sides:
        chosen = places[:N_CASES]
        rows = store.describe_rows(audit.sample.rows[chosen])
        regions: list[Region | None] = [None] * len(rows)
        if locator is not None and len(chosen) and strengths[chosen[0]] > 0:
            regions = locator.regions([row.row for row in rows], locator.concept(concept.latents))
        known = zip(rows, regions, strict=True)
        pictures = [(uri, row.words, region) for row, region in known if (uri := album.uri(row.path)) is not None]
        found += [(title, pictures)] if pictures else []
    return found


def _facts(audit: Audit) -> list[str]:
    classifier = audit.classifier
    facts = [] if audit.target is None else [f"target: the column {audit.target}"]
    facts += [f"rows of {Path(audit.on).name}"]
    facts += [] if audit.is_score else [f"classes {', '.join(audit.classes)}"]
    facts += [f"model: {str(classifier['source']).replace(audit.on, Path(audit.on).name)}"]
    facts += [f"only rows with {audit.settings['where']}"] if audit.settings.get("where") else []
    if audit.n_left_out:
        facts.append(f"{audit.n_left_out:,} rows without a known label left out")
    return facts


def _cells(concept: ConceptAudit, n: int) -> list[str]:
    main, control, groups = concept.main, concept.control, concept.debiasing
    latents = ", ".join(f"#{latent}" for latent in concept.latents[:3]) + (" …" if len(concept.latents) > 3 else "")
    edits = [
        "-" if edit is None else f"{edit.change:+.3f} [{edit.low:+.3f}, {edit.high:+.3f}]"
        for edit in (concept.remove, concept.set_p50, concept.set_p99)
    ]
    return [
        concept.name + (" (class)" if concept.is_target else ""),
        concept.towards or "-",
        "-" if concept.remove is None and concept.set_p50 is None else _number(concept.effect),
        _number(None if control is None else control.largest),
        "-" if main is None else f"{main.q:.2g}",
        f"{round(concept.firing_rate * n):,}",
        what_helps(groups),
        latents,
        *edits,
        _number(None if concept.remove is None else concept.remove.flip_rate),
        "-" if main is None else f"{main.effect_size:+.2f} [{main.low:+.2f}, {main.high:+.2f}]",
        "-" if main is None else f"{main.p:.2g}",
        "-" if concept.given_true is None else f"{concept.given_true.q:.2g}",
        _number(None if groups is None else groups.overall_levelled),
        _number(None if groups is None else groups.overall_removed),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def concept_svgs(audit: Audit, concept: ConceptAudit) -> list[str]:
    """Density and boxes of the concept's strength by class, accuracy by group, and the sweep of one sample, as SVG."""
    assert audit.sample is not None
    strengths = audit.sample.strengths[:, audit.concepts.index(concept)]
    classes = ("all rows",) if audit.is_score else audit.classes[:MAX_CLASSES]
    by_predicted = [strengths[audit.sample.predicted == k] for k in range(len(classes))]
    truth = audit.sample.truth
    by_true = None if truth is None else [strengths[truth == k] for k in range(len(classes))]
    drawings: list[tuple[str, Callable[[Any], None]]] = [
        ("Density by predicted class", lambda axes: _draw_density(axes, by_predicted, classes)),
        ("Boxes by class", lambda axes: _draw_boxes(axes, by_predicted, by_true, classes)),
        ("Accuracy by group", lambda axes: _draw_groups(axes, concept)),
    ]
    if concept.sweep is not None:
        drawings.append(("One row, the concept at several strengths", lambda axes: _draw_sweep(axes, concept)))
    made = []
    for words, draw in drawings:
        figure = new_figure()
        draw(figure.subplots())
        made.append(as_svg(figure, f"{words}: {concept.name}"))
    return made


def _draw_density(axes: Any, by_class: Sequence[np.ndarray], classes: Sequence[str]) -> None:
    top = max((float(values.max(initial=0)) for values in by_class), default=0.0) or 1.0
    edges = np.linspace(0, top, 31)
    for values, name, colour in zip(by_class, classes, COLOURS, strict=False):
        firing = values[values > 0]
        share = len(firing) / max(len(values), 1)
        if len(firing):
            axes.hist(firing, edges, density=True, histtype="stepfilled", alpha=0.35, color=colour)
            axes.hist(firing, edges, density=True, histtype="step", color=colour, label=f"{name}: fires in {share:.0%}")
        else:
            axes.plot([], color=colour, label=f"{name}: never fires")
    axes.set(title="density where it fires, by predicted class", xlabel="strength")
    legend(axes)


def _draw_boxes(
    axes: Any, by_predicted: Sequence[np.ndarray], by_true: Sequence[np.ndarray] | None, classes: Sequence[str]
) -> None:
    for shift, by_class in ((-0.2, by_predicted), (0.2, by_true)):
        for place, values in enumerate(by_class or ()):
            if len(values):
                axes.boxplot(
                    values, positions=[place + shift], widths=0.3, showfliers=False, patch_artist=True,
                    whis=(5, 95), medianprops={"color": "black"},
                    boxprops={"facecolor": COLOURS[place] if shift < 0 else "none", "edgecolor": COLOURS[place]},
                )  # fmt: skip
    axes.set(title="strength by predicted (filled) and true class", xlim=(-0.6, len(classes) - 0.4))
    axes.set_xticks(range(len(classes)), [plain(name) for name in classes])


def _draw_groups(axes: Any, concept: ConceptAudit) -> None:
    axes.set(title="accuracy; in red, with the concept at its mean", ylim=(0, 1.02))
    known = [group for group in (concept.debiasing.groups if concept.debiasing else ()) if group.accuracy is not None]
    for place, group in enumerate(known):
        axes.bar(place, group.accuracy, 0.7, color="#4477aa", alpha=0.5)
        axes.plot([place - 0.35, place + 0.35], [group.accuracy_levelled] * 2, color="#ee6677", linewidth=2)
    labels = [plain(f"{group.class_}\n{'with' if group.present else 'without'}\nn={group.n}") for group in known]
    crowded = len(known) > MAX_GROUPS
    if crowded:
        labels = [label.replace("\n", " ") for label in labels]
    axes.set_xticks(range(len(known)), labels, fontsize=6 if crowded else 7, rotation=90 if crowded else 0)
    if not known:
        axes.text(0.5, 0.5, "no true classes", ha="center", transform=axes.transAxes)


def _draw_sweep(axes: Any, concept: ConceptAudit) -> None:
    assert concept.sweep is not None
    title = plain(f"P({concept.class_}) of row {concept.sweep.id}")
    axes.set(title=title, xlabel="strength")
    draw_sweep(axes, concept.sweep)
