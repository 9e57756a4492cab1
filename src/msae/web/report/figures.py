"""Drawings as SVG text: for light and dark pages, for screen readers, and the same bytes for the same numbers.

Ink is the page's own text colour, the ground is the page's. Words stay words, which matplotlib escapes. The functions
may be called from several threads at once.
"""

from __future__ import annotations

import html
import io
import re
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from msae.concepts.gallery import Magnitudes
from msae.concepts.samples import BINS_PER_OCTAVE, N_BINS, TopSamples, bin_edges

if TYPE_CHECKING:
    from msae.use.audit import Sweep

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
"""Paul Tol's bright scheme, which the colour-blind can tell apart; black becomes the page's ink."""
MAX_INSIDE = 3
"""Lines of a legend that stands inside a drawing."""
DASHES = ("-", "--", ":", "-.")
SIZE = 4.6, 2.9
"""Inches of a drawing: as wide as a phone, so that its words stay readable there."""

T = TypeVar("T")
RecoveryMeasure = Literal["fvu", "fvu_per_sample", "cosine", "cknna", "dead"]
TrainingMeasure = Literal["fvu", "sparsity", "l0", "loss", "reconstruction", "grad_norm", "lr", "dead"]
TITLES: Mapping[str, str] = {
    "fvu": "variance left unexplained (FVU)",
    "fvu_per_sample": "FVU per sample",
    "cosine": "cosine of embedding and reconstruction",
    "cknna": "alignment of neighbours (CKNNA)",
    "dead": "latents that never fire",
    "sparsity": "share of latents at zero (sparsity)",
    "l0": "active latents of a row (L0)",
    "loss": "loss",
    "reconstruction": "reconstruction loss",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")
"""What no XML may hold."""
_LOG_Y = {"fvu", "fvu_per_sample", "loss", "reconstruction", "grad_norm"}
_COUNTS = {"l0", "dead"}
_ONE_AT_A_TIME = threading.Lock()
"""matplotlib reads how to write an SVG from settings of the whole process."""


def recovery_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], measure: RecoveryMeasure = "fvu") -> str:
    """One measure against the k strongest latents kept, a line for each run; `curves` has each run's `recovery`."""
    figure = new_figure(height=_height(curves))
    axes = figure.subplots()
    every = sorted({int(point["k"]) for points in curves.values() for point in points})
    for (name, points), style in zip(curves.items(), _styles(len(curves)), strict=True):
        known = [(point["k"], point[measure]) for point in points if point.get(measure) is not None]
        axes.plot([k for k, _ in known], [value for _, value in known], label=shorten(name), marker=".", **style)
    axes.set_xscale("log", base=2)
    ticks = every[:: max(1, -(-len(every) // 8))]
    axes.set_xticks(ticks, [f"{k:,}" for k in ticks], minor=False)
    axes.minorticks_off()
    _set_scale(axes, measure, [point.get(measure) for points in curves.values() for point in points])
    axes.set(title=TITLES[measure], xlabel="strongest latents kept (k)")
    legend(axes)
    return as_svg(figure, f"{TITLES[measure]} when only the k strongest latents are kept, for {_list(curves)}")


def training_curves(by_run: Mapping[str, Sequence[Mapping[str, Any]]], measure: TrainingMeasure = "fvu") -> str:
    """One measure against the training step, a line for each run; `by_run` has the rows of each metrics.jsonl."""
    figure = new_figure(height=_height(by_run))
    axes = figure.subplots()
    for (name, rows), style in zip(by_run.items(), _styles(len(by_run)), strict=True):
        known = [(row["step"], row[measure]) for row in _thinned(rows) if row.get(measure) is not None]
        axes.plot([step for step, _ in known], [value for _, value in known], label=shorten(name), **style)
    _set_scale(axes, measure, [row.get(measure) for rows in by_run.values() for row in rows])
    axes.set(title=TITLES[measure], xlabel="training step")
    legend(axes)
    return as_svg(figure, f"{TITLES[measure]} during training, for {_list(by_run)}")


def activation_histogram(samples: TopSamples, latent: int) -> str:
    """How strongly a latent fires where it fires, with its median and 99th percentile; strengths on a log scale."""
    together = BINS_PER_OCTAVE // 4
    counts = samples.histogram[latent].reshape(N_BINS // together, together).sum(1)
    figure = new_figure(SIZE[0], 2.1)
    axes = figure.subplots()
    what = f"{samples.origin.modality} rows"
    _draw_histogram(axes, bin_edges()[::together], counts, colour=COLOURS[0])
    if counts.any():
        for value, name in zip(samples.quantiles((0.5, 0.99))[latent], ("median", "p99"), strict=True):
            axes.axvline(
                value, color=COLOURS[1], linestyle="-" if name == "median" else ":", label=f"{name} {value:.2f}"
            )
        legend(axes)
    rate = samples.firing_rate[latent]
    axes.set(title=f"fires in {rate:.1%} of {samples.n_rows:,} {what}", xlabel="strength", ylabel="rows")
    return as_svg(figure, f"Histogram of the strengths of latent {latent}, which fires in {rate:.1%} of the {what}")


def magnitude_histograms(by_modality: Mapping[str, Magnitudes]) -> str:
    """How large activations are: all that are not zero, and each row's largest; a curve for each modality."""
    figure = new_figure(SIZE[0], 3.6)
    every, largest = figure.subplots(2, 1, sharex=True)
    for (modality, found), colour in zip(by_modality.items(), COLOURS, strict=False):
        for axes, counts in ((every, found.nonzero), (largest, found.row_maxima)):
            shares = counts / max(1, int(counts.sum()))
            _draw_histogram(axes, found.edges, shares, colour=colour, label=f"{modality}s")
    every.set(title="all activations that are not zero", ylabel="share")
    largest.set(title="the largest of each row", xlabel="strength", ylabel="share")
    for axes in (every, largest):
        legend(axes)
    return as_svg(figure, f"Histograms of the sizes of activations, for {_list(f'{name}s' for name in by_modality)}")


def level_profile(samples: TopSamples, latent: int) -> str:
    """Of the rows in which a latent fires, the share in which it is among the k strongest, a bar for each level k."""
    shares = samples.level_profile[latent]
    figure = new_figure(SIZE[0], 1.9)
    axes = figure.subplots()
    axes.bar(range(len(shares)), shares, 0.7, color=COLOURS[0])
    axes.set_xticks(range(len(shares)), [f"{k:,}" for k in samples.levels])
    axes.set(title="share of its rows in which it is among the k strongest", ylim=(0, 1.02), xlabel="k")
    words = ", ".join(f"{share:.0%} for {k}" for k, share in zip(samples.levels, shares, strict=True))
    return as_svg(figure, f"Level profile of latent {latent}: {words}")


def draw_sweep(axes: Any, sweep: Sweep) -> None:
    """The probability of a class against the strength of a concept in one row, with what is natural shaded."""
    axes.plot(sweep.strengths, sweep.probabilities, color="#000000")
    axes.axvspan(0, sweep.natural_p99, color=COLOURS[2], alpha=0.15, label="natural, up to p99")
    axes.axvline(sweep.own, color=COLOURS[1], linestyle=":", label="in the row itself")
    axes.set(ylim=(-0.02, 1.02))
    legend(axes)


def new_figure(width: float = SIZE[0], height: float = SIZE[1]) -> Any:
    """An empty matplotlib figure that no other part of the process sees."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend(axes: Any) -> None:
    """The legend of what has a label, under the drawing where it is long; nothing where nothing has."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    if len(labels) > MAX_INSIDE:
        made = axes.figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=_columns(labels))
    else:
        made = axes.legend(fontsize=8, frameon=False)
    for text in made.get_texts():
        text.set_parse_math(False)


def plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def shorten(text: str, length: int = 24) -> str:
    """Text on one line that leaves room for the drawing, its end kept: names of runs differ there."""
    text = " ".join(text.split())
    # A label that begins with an underscore is no label to matplotlib.
    return "…" + text[1 - length :] if len(text) > length else "\u200b" * text.startswith("_") + text


def as_svg(figure: Any, label: str) -> str:
    """The figure as an `<svg>` to put into a page; `label` is what a screen reader says of it."""
    import matplotlib as mpl

    for axes in figure.axes:
        axes.title.set_fontsize(10)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
        axes.tick_params(labelsize=8, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # A fixed salt makes the same figure the same bytes.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "msae"}
    with _ONE_AT_A_TIME, mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw the words, not matplotlib's
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return _for_a_page(buffer.getvalue(), label)


def _for_a_page(text: str, label: str) -> str:
    """matplotlib's file as part of a page: black is the page's ink, and no id or style reaches beyond the drawing."""
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<\w[^<>]*?) style="([^"]*)"', lambda tag: tag[1] + _attributes(tag[2]), text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = _CONTROL.sub("", text)
    words = html.escape(_CONTROL.sub("", label))
    start, rest = text.split(">", 1)
    return f'{start} role="img" aria-label="{words}" fill="currentColor">\n <title>{words}</title>{rest.strip()}\n'


def _attributes(style: str) -> str:
    """A style as attributes: a page whose security policy forbids styles inside tags shows these all the same."""
    pairs = [part.split(": ", 1) for part in style.split("; ")]
    known = {key: value.replace("#000000", "currentColor") for key, value in pairs}
    if "font-family" in known:
        known["font-family"] = "system-ui, sans-serif"
    return "".join(f' {key}="{value}"' for key, value in known.items())


def _styles(n: int) -> list[dict[str, Any]]:
    """A colour and a dash for each of n lines, no two alike up to 32."""
    turns = [DASHES[(i // 4 + i // 8) % 4] for i in range(n)]  # the second four are dashed, for those who see no colour
    return [{"color": COLOURS[i % len(COLOURS)], "linestyle": turns[i], "linewidth": 1.5} for i in range(n)]


def _columns(labels: Collection[str]) -> int:
    """Of a legend under a drawing: as many as its labels leave room for."""
    return 3 if max(map(len, labels)) <= 14 else 2


def _height(names: Collection[str]) -> float:
    """Inches, with room for a legend under the drawing."""
    n = len(names)
    return SIZE[1] + (0.19 * -(-n // _columns(names)) if n > MAX_INSIDE else 0)


def _thinned(rows: Sequence[T], n: int = 500) -> Sequence[T]:
    """About n of the rows, evenly, the last among them: more are not to be seen."""
    step = -(-len(rows) // n) or 1
    return rows[(len(rows) - 1) % step :: step] if rows else rows


def _set_scale(axes: Any, measure: str, values: Iterable[float | None]) -> None:
    """A log scale for what shrinks by factors and is never zero, one from zero for counts; plain numbers on either."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = [value for value in values if value is not None]
    if measure in _COUNTS:
        axes.set_ylim(0, 1.08 * max(known, default=1) or 1)
    if measure in _LOG_Y and known and min(known) > 0:
        axes.set_yscale("log")
        if max(known) < 1000 * min(known):
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_histogram(axes: Any, edges: Any, counts: Any, *, colour: str, label: str | None = None) -> None:
    """Counts between edges on a log scale, cut to where there is something."""
    from matplotlib.ticker import FuncFormatter

    filled_bins = np.flatnonzero(counts)
    if not len(filled_bins):
        axes.text(0.5, 0.5, "nothing fires", ha="center", transform=axes.transAxes)
        return
    first, last = int(filled_bins[0]), int(filled_bins[-1]) + 1
    edges, counts = edges[first : last + 1], counts[first:last]
    axes.stairs(counts, edges, fill=True, color=colour, alpha=0.3)
    axes.stairs(counts, edges, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.minorticks_off()


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
