"""The audit as HTML: the ranked table, and for the strongest concepts density, boxes, groups and sweep.

`section` is what a larger report includes; `write_html` makes a page of it that opens offline.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msae.auditing import Audit, ConceptAudit
from msae.files import atomic_path
from msae.reporting.figures import COLOURS, as_svg, legend, new_figure, plain

N_PLOTTED = 8
MAX_CLASSES = len(COLOURS)
"""More classes than these are left out of the plots; the table and the JSON have them."""
STYLE = """
.audit { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1220px; margin: 2rem auto; padding: 0 1rem }
.audit table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; font-size: 12.5px;
  display: block; overflow-x: auto }
.audit th, .audit td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
.audit th:first-child, .audit td:first-child { text-align: left }
.audit .reported td:first-child { font-weight: 600 }
.audit .note { color: #666 }
.audit svg { max-width: 100%; height: auto }
"""


def write_html(audit: Audit, path: str | Path) -> None:
    """Write the audit as one page without scripts or links to anywhere.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    title = html.escape(f"Audit of {audit.target or 'a classifier'} on {audit.on}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{section(audit)}</body></html>\n"
    )
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def section(audit: Audit, *, n_plotted: int = N_PLOTTED) -> str:
    """The audit as a piece of HTML; its style is `STYLE`."""
    plotted = [concept for concept in audit.concepts if concept.main or concept.remove][:n_plotted]
    pieces = [_head(audit), _table(audit)]
    if audit.sample is not None:
        pieces += [_concept(audit, concept) for concept in plotted]
    return f'<section class="audit">{"".join(pieces)}</section>'


def _head(audit: Audit) -> str:
    classifier = audit.classifier
    facts = [
        f"{audit.n:,} rows of {audit.on}",
        f"classes {', '.join(audit.classes)}",
        f"classifier: {classifier['source']}",
    ]
    if classifier.get("accuracy") is not None:
        facts.append(f"accuracy {classifier['accuracy']:.3f}")
    if audit.n_left_out:
        facts.append(f"{audit.n_left_out:,} rows without a known label left out")
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in audit.notes)
    return f"<h2>What the classifier relies on</h2><p>{html.escape('; '.join(facts))}.</p>{notes}"


def _table(audit: Audit) -> str:
    head = (
        "concept", "latents", "class", "effect", "remove", "set to p50", "set to p99", "controls to",
        "beats controls", "flips", "Cliff's delta", "p", "q", "q of errors",
        "worst group", "once levelled", "overall", "once levelled",
    )  # fmt: skip
    rows = []
    for concept in audit.concepts:
        main = concept.main
        kind = ' class="reported"' if main is not None and main.q < 0.05 else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(concept))
        rows.append(f"<tr{kind}>{cells}</tr>")
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


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
        concept.name + (" (target)" if concept.is_target else ""),
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


def _concept(audit: Audit, concept: ConceptAudit) -> str:
    note = f'<p class="note">{html.escape(concept.note)}</p>' if concept.note else ""
    return f"<h3>{html.escape(concept.name)}</h3>{note}{concept_svg(audit, concept)}"


def concept_svg(audit: Audit, concept: ConceptAudit) -> str:
    """Density and boxes of the concept's strength by class, accuracy by group, and the sweep of one sample, as SVG."""
    assert audit.sample is not None
    strengths = audit.sample.strengths[:, audit.concepts.index(concept)]
    figure = new_figure(13, 2.9)
    density, boxes, groups, sweep = figure.subplots(1, 4)
    classes = audit.classes[:MAX_CLASSES]
    by_predicted = [strengths[audit.sample.predicted == k] for k in range(len(classes))]
    truth = audit.sample.truth
    by_true = None if truth is None else [strengths[truth == k] for k in range(len(classes))]
    _draw_density(density, by_predicted, classes)
    _draw_boxes(boxes, by_predicted, by_true, classes)
    _draw_groups(groups, concept)
    _draw_sweep(sweep, concept)
    return as_svg(figure, f"Strength, accuracy and sweep of {concept.name}")


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
                    boxprops={"facecolor": COLOURS[place] if shift < 0 else "white", "edgecolor": COLOURS[place]},
                )  # fmt: skip
    axes.set(title="strength by predicted (filled) and true class", xlim=(-0.6, len(classes) - 0.4))
    axes.set_xticks(range(len(classes)), [plain(name) for name in classes])


def _draw_groups(axes: Any, concept: ConceptAudit) -> None:
    axes.set(title="accuracy, and (red) once levelled", ylim=(0, 1.02))
    known = [group for group in (concept.debiasing.groups if concept.debiasing else ()) if group.accuracy is not None]
    for place, group in enumerate(known):
        axes.bar(place, group.accuracy, 0.7, color="#4477aa", alpha=0.5)
        axes.plot([place - 0.35, place + 0.35], [group.accuracy_levelled] * 2, color="#ee6677", linewidth=2)
    labels = [plain(f"{group.class_}\n{'with' if group.present else 'without'}\nn={group.n}") for group in known]
    axes.set_xticks(range(len(known)), labels, fontsize=7)
    if not known:
        axes.text(0.5, 0.5, "no true classes", ha="center", transform=axes.transAxes)


def _draw_sweep(axes: Any, concept: ConceptAudit) -> None:
    sweep = concept.sweep
    if sweep is None:
        axes.set_axis_off()
        return
    axes.plot(sweep.strengths, sweep.probabilities, color="#000000")
    axes.axvspan(0, sweep.natural_p99, color="#228833", alpha=0.12, label="natural, up to p99")
    axes.axvline(sweep.own, color="#ee6677", linestyle=":", label="the sample's own")
    title = plain(f"P({concept.class_}) of sample {sweep.id}")
    axes.set(title=title, xlabel="strength", ylim=(-0.02, 1.02))
    legend(axes)
