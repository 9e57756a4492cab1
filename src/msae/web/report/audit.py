"""The audit as HTML: the ranked table, and for the strongest concepts density, boxes, groups and sweep.

`section` is what a larger page includes; `write_html` makes a page of it that opens offline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from markupsafe import Markup

from msae.use.audit import Audit, ConceptAudit
from msae.web import page
from msae.web.report.figures import COLOURS, as_svg, draw_sweep, legend, new_figure, plain

N_PLOTTED = 8
HEAD = (
    "concept", "latents", "class", "effect", "removed", "set to p50", "set to p99", "largest control",
    "controls beaten", "answers changed", "Cliff's delta", "p", "q", "q of errors",
    "worst group", "worst group, levelled", "accuracy", "accuracy, levelled",
)  # fmt: skip
BRIEF = (0, 2, 3, 4, 6, 7, 9, 12)
"""Columns of a table that fits a page."""
MEANINGS = {
    "latents": "the latents that bear the concept's name",
    "class": "the class whose probability is watched",
    "effect": "the largest change of the probability of the class when the concept is removed or set to a typical "
    "strength",
    "removed": "the mean change of the probability when the concept is removed, with its 95% interval",
    "set to p50": "the same when it is set to the median of the rows in which it fires",
    "set to p99": "the same when it is set to the 99th percentile of the rows in which it fires",
    "largest control": "the largest effect of random latents that fire as often; a smaller effect is no evidence",
    "controls beaten": "the share of those random latents whose effect is smaller",
    "answers changed": "the share of the rows with the concept whose predicted class changes when it is removed",
    "Cliff's delta": "how often the concept is stronger in rows of the class than in others, less how often it is "
    "weaker; 0 is no difference",
    "p": "chance of a difference as large if concept and class had nothing to do with each other",
    "q": "p corrected for the number of tests; concepts below 0.05 are bold",
    "q of errors": "the same, where only rows of the same true class are compared: does it go with the errors?",
    "worst group": "the lowest accuracy among the groups of rows with one class, with or without the concept",
    "worst group, levelled": "the same with the concept at its mean in every row; if it rises, the classifier "
    "relied on the concept",
    "accuracy": "of all rows",
    "accuracy, levelled": "of all rows, with the concept at its mean in every row",
}
MAX_GROUPS = 6
"""More groups than these have their labels upright."""
MAX_CLASSES = len(COLOURS)
"""More classes than these are left out of the plots; the table and the JSON have them."""


def write_html(audit: Audit, path: str | Path) -> None:
    """Write the audit as one page without scripts or links to anywhere."""
    page.write_page(page.render("report/audit.html", audit=audit, section=section(audit)), Path(path))


def section(
    audit: Audit,
    *,
    n_plotted: int = N_PLOTTED,
    n_rows: int | None = None,
    brief: bool = False,
    faces: Mapping[str, tuple[str, Markup]] = MappingProxyType({}),
) -> Markup:
    """The audit as a piece of HTML.

    Args:
        n_plotted: Concepts that are drawn.
        n_rows: Concepts in the table; None has all.
        brief: Only the columns that a first look needs.
        faces: Of concepts by name, what is shown instead of it, and a picture or nothing.
    """
    plotted = [concept for concept in audit.concepts if concept.main or concept.remove][:n_plotted]
    chosen = BRIEF if brief else range(len(HEAD))
    return page.render(
        "report/audit_section.html",
        facts=_facts(audit),
        notes=audit.notes,
        head=[HEAD[i] for i in chosen],
        meanings={HEAD[i]: MEANINGS[HEAD[i]] for i in chosen if HEAD[i] in MEANINGS},
        rows=[
            (concept, concept.main is not None and concept.main.q < 0.05, [_cells(concept)[i] for i in chosen[1:]])
            for concept in audit.concepts[:n_rows]
        ],
        faces=faces,
        n_more=len(audit.concepts) - len(audit.concepts[:n_rows]),
        drawn=[] if audit.sample is None else [(concept, concept_svgs(audit, concept)) for concept in plotted],
    )


def _facts(audit: Audit) -> list[str]:
    classifier = audit.classifier
    facts = [] if audit.target is None else [f"target: the column {audit.target}"]
    facts += [
        f"{audit.n:,} rows of {Path(audit.on).name}",
        f"classes {', '.join(audit.classes)}",
        f"classifier: {str(classifier['source']).replace(audit.on, Path(audit.on).name)}",
    ]
    if classifier.get("accuracy") is not None:
        facts.append(f"accuracy {classifier['accuracy']:.3f}")
    if audit.n_left_out:
        facts.append(f"{audit.n_left_out:,} rows without a known label left out")
    return facts


def _cells(concept: ConceptAudit) -> list[str]:
    main, control, groups = concept.main, concept.control, concept.debiasing
    latents = ", ".join(f"#{latent}" for latent in concept.latents[:3]) + (" …" if len(concept.latents) > 3 else "")
    edits = [
        "-" if edit is None else f"{edit.change:+.3f} [{edit.low:+.3f}, {edit.high:+.3f}]"
        for edit in (concept.remove, concept.set_p50, concept.set_p99)
    ]
    accuracies = [None] * 4 if groups is None else [
        groups.worst, groups.worst_levelled, groups.overall, groups.overall_levelled
    ]  # fmt: skip
    return [
        concept.name,
        latents,
        concept.class_ or "-",
        _number(concept.effect),
        *edits,
        _number(None if control is None else control.largest),
        "-" if control is None else f"{control.beaten:.0%}",
        _number(None if concept.remove is None else concept.remove.flip_rate),
        "-" if main is None else f"{main.effect_size:+.2f} [{main.low:+.2f}, {main.high:+.2f}]",
        "-" if main is None else f"{main.p:.2g}",
        "-" if main is None else f"{main.q:.2g}",
        "-" if concept.given_true is None else f"{concept.given_true.q:.2g}",
        *(_number(share) for share in accuracies),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def concept_svgs(audit: Audit, concept: ConceptAudit) -> list[str]:
    """Density and boxes of the concept's strength by class, accuracy by group, and the sweep of one sample, as SVG."""
    assert audit.sample is not None
    strengths = audit.sample.strengths[:, audit.concepts.index(concept)]
    classes = audit.classes[:MAX_CLASSES]
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
