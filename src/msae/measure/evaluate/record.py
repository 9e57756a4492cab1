"""`Evaluation`: the figures of one SAE on one store, their JSON keys, the tables of several, and what they say."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msae.base.errors import ConfigError
from msae.base.records import to_record
from msae.base.results import Result, text_table
from msae.measure.evaluate.pairs import Pairs, Recalls
from msae.sae.model import Inference
from msae.sae.standardize import Modality


@dataclass(frozen=True)
class RecoveryPoint:
    """What the k strongest activations of each row reconstruct; the fields are those of `Evaluation`."""

    k: int
    fvu: float | None
    fvu_per_sample: float | None
    cosine: float | None
    cknna: float | None
    """On the first CKNNA batch."""
    dead: int


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """Figures of one SAE on one store; definitions in `msae.measure.metrics`. None where a figure is undefined.

    `x` and `x_hat` are standardised with the modality's statistics, `std` is over rows, and all kinds of SAE are
    compared in the same mode, `inference`: `relu` removes TopK from those trained with it, as the poster does.
    """

    run: str | None
    """The run folder as it was given; None for an SAE that was given itself."""
    kind: str
    inference: Inference
    k: int | None
    """Of inference `topk`, else None."""
    modality: Modality
    on: str
    """The evaluation store."""
    standardized_by: Literal["run", "evaluation store"]
    """Whose mean and scale: the evaluation store's where the SAE was trained without this modality."""
    n: int
    """Rows of the evaluation store."""
    d_in: int
    d_sae: int
    sparsity: float
    """Share of exact zeros in z, 0 to 1."""
    sparsity_std: float
    l0: float
    """Mean count of non-zero latents of a row."""
    fvu: float | None
    """Pooled fraction of variance unexplained; None where all rows are equal."""
    fvu_per_sample: float | None
    """Mean of squared error over squared norm; the row compared with the poster."""
    fvu_per_sample_std: float | None
    fvu_authors: float | None
    """The released code's formula, on raw vectors."""
    cosine: float
    """Mean cosine of x and x_hat, -1 to 1."""
    cosine_std: float
    mae: float | None
    """Mean absolute error over mean absolute value."""
    cknna: float | None
    """Alignment of x and z, mean over batches; None with fewer than 11 rows."""
    cknna_std: float | None
    """Over batches; 0 where there is one."""
    cknna_batches: int
    decoder_orthogonality: float
    """Mean squared cosine of two decoder rows; random ones score 1/d_in."""
    max_decoder_cosine: float
    """Mean over latents of the largest absolute cosine with another."""
    dead: int
    """Latents never non-zero on the evaluation store."""
    dead_train: int | None
    """Latents never non-zero on the training store; None where that cannot be opened, see `notes`."""
    probe_kl: float | None = None
    """KL of the probe's classes before and after reconstruction, nats."""
    probe_kl_std: float | None = None
    probe_agreement: float | None = None
    """Share of rows whose predicted class is unchanged."""
    probe_accuracy: float | None = None
    """Share of rows whose class is predicted, before reconstruction."""
    probe_accuracy_reconstructed: float | None = None
    probe_n: int | None = None
    """Rows in the probe figures: those whose class the probe was trained on, and which it was not itself trained on."""
    probe_left_out: int | None = None
    """The other rows; `notes` says why they are left out."""
    probe_classes: int | None = None
    class_f1: float | None = None
    """Mean over classes of the F1, 0 to 1, with which the one latent that fits a class best on the probe's training
    rows fires on the evaluated ones."""
    recovery: tuple[RecoveryPoint, ...] | None = None
    pairs: Pairs | None = None
    """Both modalities of the pairs, where the store has images and texts; else None."""
    is_untrained: bool = False
    """Whether the weights are random: then no figure says anything about training."""
    untrained_fvu_per_sample: float | None = None
    """What `fvu_per_sample` is with untrained weights and as many active latents, on at most 4,096 rows; see
    `msae.measure.evaluate.untrained`."""
    notes: tuple[str, ...] = field(default=())
    """Why a figure is None, and which rows are left out of the probe's figures."""

    def to_json(self) -> dict[str, Any]:
        """JSON values by the contract's keys, without those of figures that were not asked for."""
        record = dataclasses.asdict(self)
        record["pairs"] = to_record(self.pairs)
        unasked = {name for name in ("recovery", "pairs") if record[name] is None}
        if self.probe_n is None:
            unasked |= {name for name in record if name.startswith("probe_") or name == "class_f1"}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in record.items()
            if key not in unasked
        }

    def records(self) -> list[dict[str, Any]]:
        """The figures as one record, without the recovery and the pairs."""
        record = self.to_json()
        record.pop("recovery", None)
        record.pop("pairs", None)
        return [record | {"notes": "; ".join(self.notes)}]

    def to_text(self) -> str:
        """Its figures as a table, what they mean, and a judgement."""
        return summary([self])

    @property
    def headline(self) -> str:
        return f"{names_of([self])[0]} on {_measured([self])}"


class Evaluations(Result, list[Evaluation]):
    """The evaluations of several SAEs on the same rows."""

    def to_json(self) -> list[dict[str, Any]]:
        """A record for each, by the contract's keys."""
        return [one.to_json() for one in self]

    def records(self) -> list[dict[str, Any]]:
        return [record for one in self for record in one.records()]

    def to_text(self) -> str:
        """A table with the best value of each column marked, what the columns mean, and a judgement of each SAE."""
        return summary(self)

    @property
    def headline(self) -> str:
        return f"{len(self)} SAEs on {_measured(self)}"


def _measured(evaluations: Sequence[Evaluation]) -> str:
    """The rows and the mode, and the figures that are read first."""
    first = evaluations[0]
    figures = ""
    if len(evaluations) == 1:
        cosine, fvu = f"cosine {first.cosine:.3f}", "" if first.fvu is None else f", FVU {first.fvu:.3f}"
        figures = f": {first.l0:,.1f} active latents, {cosine}{fvu}"
    return f"{first.n:,} {first.modality} rows of {first.on}, inference {mode_of(first)}{figures}"


def json_number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


NOTHING = "-"
"""Printed where a figure is undefined or was not asked for."""


class Cell(NamedTuple):
    """One figure of one evaluation."""

    text: str
    is_best: bool
    """Best of its column at the printed precision, as are all that tie with it."""


class _Column(NamedTuple):
    """A column of a table."""

    title: str
    better: Literal["up", "down"]
    value: Callable[[Evaluation], float | None]
    form: str = "{:.3f}"
    """How a value is printed; values that are printed alike are equally good."""
    more: Callable[[Evaluation], str] = lambda _: ""
    """What stands behind the value and is not compared."""
    meaning: str = ""
    """What it is, its range, and how to read it: one line of the legend."""

    @property
    def arrow(self) -> str:
        return "↑" if self.better == "up" else "↓"


def _spread(std: float | None) -> str:
    return "" if std is None else f" ± {std:.3f}"


COLUMNS = (
    _Column(
        "active", "down", lambda e: e.l0, "{:.1f}",
        meaning="latents that are not 0 in a row, on average; 1 to all: fewer are easier to read, more lose less",
    ),
    _Column(
        "dead", "down", lambda e: e.dead / e.d_sae, "{:.1%}",
        meaning="share of the latents that never fire in these rows; 0 % to 100 %",
    ),
    _Column(
        "FVU", "down", lambda e: e.fvu_per_sample,
        meaning="share of the variance lost, mean over rows; 0 is perfect, 1 useless; compare this one with the paper",
    ),
    _Column(
        "FVU pooled", "down", lambda e: e.fvu,
        meaning="the same, of all rows together; compare this one with other work, which mostly calls it FVU",
    ),
    _Column(
        "cosine", "up", lambda e: e.cosine,
        meaning="of an embedding and its reconstruction; 1 is the same direction, 0 has nothing in common",
    ),
    _Column(
        "accuracy", "up", lambda e: e.probe_accuracy_reconstructed,
        more=lambda e: "" if e.probe_accuracy is None else f" ({e.probe_accuracy:.3f})",
        meaning="share of rows whose class a linear probe gets right, after reconstruction (before); 0 to 1",
    ),
    _Column(
        "agreement", "up", lambda e: e.probe_agreement,
        meaning="share of rows whose class the probe does not change, be it right or wrong; 0 to 1; not an accuracy",
    ),
    _Column(
        "class F1", "up", lambda e: e.class_f1,
        meaning="how well the one latent that fits a class best says it, mean over classes; 0 to 1",
    ),
    _Column(
        "CKNNA", "up", lambda e: e.cknna,
        meaning="whether neighbours are still neighbours by their latents; 0 is chance, 1 the same; high untrained too",
    ),
)  # fmt: skip
"""What a person reads on a terminal and on pages: every table of measures has these headings and this legend."""

POSTER_COLUMNS = (
    _Column("sparsity", "up", lambda e: e.sparsity),
    _Column("FVU", "down", lambda e: e.fvu_per_sample, more=lambda e: _spread(e.fvu_per_sample_std)),
    _Column("CS", "up", lambda e: e.cosine, more=lambda e: _spread(e.cosine_std)),
    _Column("LP (KL)", "down", lambda e: e.probe_kl, "{:.4f}"),
    _Column("LP (Acc)", "up", lambda e: e.probe_agreement),
    _Column("CKNNA", "up", lambda e: e.cknna),
    _Column("DO", "down", lambda e: e.decoder_orthogonality, "{:.4f}"),
    _Column(
        "NDN eval (train)", "down", lambda e: e.dead, "{:.0f}",
        more=lambda e: f" ({NOTHING if e.dead_train is None else e.dead_train})",
    ),
)  # fmt: skip
"""The poster's, with `fvu_per_sample` as FVU, nats as KL, and NDN compared on the evaluation store."""

MODEL = "model"
"""Title of the first column: which SAE."""


def table_rows(evaluations: Sequence[Evaluation], columns: Sequence[_Column] = COLUMNS) -> list[dict[str, Cell]]:
    """A table as data: for each evaluation, its name under `model` and a cell under each column's title.

    Columns in which no evaluation has a value are left out. Of one trained SAE alone nothing is marked, and untrained
    ones do not compete.
    """
    rows = [{MODEL: Cell(name, False)} for name in names_of(evaluations)]
    trained = [not e.is_untrained for e in evaluations]
    for column in columns:
        values = [column.value(e) for e in evaluations]
        printed = [None if value is None else column.form.format(value) for value in values]
        if not any(printed):
            continue
        competing = [value for value, competes in zip(values, trained, strict=True) if competes and value is not None]
        best = column.form.format((max if column.better == "up" else min)(competing)) if competing else None
        for row, evaluation, text in zip(rows, evaluations, printed, strict=True):
            is_best = text is not None and text == best and not evaluation.is_untrained and sum(trained) > 1
            row[column.title] = Cell(NOTHING if text is None else text + column.more(evaluation), is_best)
    return rows


def headings(titles: Iterable[str], columns: Sequence[_Column] = COLUMNS) -> list[str]:
    """The titles of a table's columns with the direction that is better."""
    arrows = {column.title: f" {column.arrow}" for column in columns}
    return [title + arrows.get(title, "") for title in titles]


def legend(titles: Iterable[str]) -> dict[str, str]:
    """What the columns of a table mean, in their order; each is one line."""
    meanings = {column.title: column.meaning for column in COLUMNS}
    return {title: meanings[title] for title in titles if title in meanings}


WIDTH = 120
"""Columns of a terminal that a table fits."""


def summary(evaluations: Sequence[Evaluation]) -> str:
    """The evaluations for a terminal: a table, what its columns mean, the recovery, and a judgement of each SAE.

    Raises:
        ConfigError: There are no evaluations.
    """
    if not evaluations:
        raise ConfigError("a table of no evaluations; give at least one run")
    first, rows = evaluations[0], table_rows(evaluations)
    marked = any(cell.is_best for row in rows for cell in row.values())
    cells = [[cell.text + ("*" if cell.is_best else " " * marked) for cell in row.values()] for row in rows]
    others = sum(2 + max(map(len, column)) for column in list(zip(headings(rows[0]), *cells, strict=True))[1:])
    for row in cells:
        row[0] = _tail(row[0], WIDTH - others)
    lines = [*_wrapped(f"{first.n:,} {first.modality} rows of {first.on}; {_mode_line(evaluations)}"), ""]
    lines += text_table(headings(rows[0]), cells, right=range(1, len(rows[0])))
    lines += ["* the best of its column"] if marked else []
    known = legend(rows[0])
    lines += ["", *(f"{title:<{max(map(len, known))}}  {meaning}" for title, meaning in known.items())]
    for name, one in zip(names_of(evaluations), evaluations, strict=True):
        if one.recovery:
            lines += ["", f"{name}: what the k strongest latents of each row reconstruct", *_recovery(one)]
    lines += _pairs_lines(evaluations)
    for sentence in judgements_of(evaluations):
        lines += ["", *_wrapped(sentence)]
    return "\n".join(lines)


def _pairs_lines(evaluations: Sequence[Evaluation]) -> list[str]:
    """The lines on pairs: both modalities of each SAE, which latents serve both, and whether pairs are found."""
    known = [(name, e.pairs) for name, e in zip(names_of(evaluations), evaluations, strict=True) if e.pairs is not None]
    if not known:
        return []
    rows = []
    for name, pairs in known:
        for one in pairs.rows:
            label = f"{name} (trained on {pairs.trained_on or 'unknown rows'})" if one is pairs.rows[0] else ""
            fvu = f"{_figure(one.fvu_per_sample)} ({_figure(one.untrained_fvu_per_sample)})"
            rows.append([label, one.modality, f"{one.l0:.1f}", fvu, f"{one.cosine:.3f}", _figure(one.cknna)])
    lines = ["", "images and texts of the pairs; in brackets with untrained weights and as many active latents"]
    lines += text_table(["model", "rows", "active", "FVU (untrained)", "cosine", "CKNNA"], rows, right=range(2, 6))
    pairs, rows = known[0][1], []
    nulls = {one.untrained: "untrained" if len(known) == 1 else f"untrained like {name}" for name, one in known}
    for label, codes in [
        *((name, one.codes) for name, one in known),
        *((label, null) for null, label in nulls.items()),
    ]:
        both = NOTHING if codes.share_both is None else f"{codes.share_both:.1%}"
        common = f"{codes.in_common:.3f} ({codes.in_common_with_others:.3f})"
        rows.append([label, both, common, *_recall_cells(codes.retrieval)])
    rows.append(["standardised embeddings", NOTHING, NOTHING, *_recall_cells(pairs.standardized)])
    rows.append(["raw embeddings", NOTHING, NOTHING, *_recall_cells(pairs.dense)])
    lines += [
        "",
        f"whether a pair shares latents and finds its other half among {pairs.n:,}: image to text / text to image",
    ]
    lines += text_table(["model", "serve both", "in common (others)", "R@1", "R@5"], rows, right=range(1, 5))
    return [
        *lines,
        "",
        "serve both  share of the latents that fire whose rate in images and in texts differs at most five times",
        "in common   active latents that image and text share, of those of either (image and text of other pairs)",
        "R@1, R@5    share of the pairs whose other half is the nearest, or among the five nearest, by cosine",
    ]


def _recall_cells(found: Recalls) -> list[str]:
    return [
        f"{found.image_to_text_r1:.3f} / {found.text_to_image_r1:.3f}",
        f"{found.image_to_text_r5:.3f} / {found.text_to_image_r5:.3f}",
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _tail(text: str, length: int) -> str:
    """The end of a name, which tells it from others, where it is too long."""
    return text if len(text) <= length else "…" + text[len(text) - length + 1 :]


def _recovery(evaluation: Evaluation) -> list[str]:
    """The lines of the table of what few latents reconstruct."""
    assert evaluation.recovery is not None
    rows: list[list[str]] = []
    for point in evaluation.recovery:
        share_dead = f"{point.dead / evaluation.d_sae:.1%}"
        row = [f"{point.k:,}", _figure(point.fvu_per_sample), _figure(point.cosine), share_dead]
        if not rows or row[1:] != rows[-1][1:]:  # from the first k on that keeps all, nothing changes
            rows.append(row)
    return text_table(["k", *headings(["FVU", "cosine", "dead"])], rows, right=range(4))


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


CLEAR = 2.0
"""The factor by which an SAE must lose less, or keep more, than untrained weights to be clearly better."""


def judgements_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """A sentence on each SAE of which something can be said."""
    sentences = map(judgement, names_of(evaluations), evaluations)
    return list(dict.fromkeys(filter(None, sentences)))


def judgement(name: str, e: Evaluation) -> str:
    """One sentence on whether an SAE has learnt anything, and how it was judged; empty where nothing can be said."""
    if e.is_untrained or e.fvu_per_sample is None or not e.untrained_fvu_per_sample:
        return ""
    text = (
        f"{name}: FVU {e.fvu_per_sample:.3f} with {e.l0:,.1f} of {e.d_sae:,} latents active, and "
        f"{e.untrained_fvu_per_sample:.3f} with untrained weights and as many active: "
        f"{compared_with_untrained(e.fvu_per_sample, e.untrained_fvu_per_sample)}"
    )
    if e.dead > e.d_sae / 2:
        text += f"; {e.dead / e.d_sae:.0%} of its latents never fire here"
    trained_with = {"topk": "top-k", "batchtopk": "batch top-k", "jumprelu": "learnt thresholds"}.get(e.kind)
    if e.inference == "relu" and trained_with:
        text += f" (it was trained with {trained_with}; --inference trained shows it as trained)"
    return text + "."


def compared_with_untrained(fvu: float, untrained: float) -> str:
    """What the FVU of an SAE says beside that of untrained weights with as many active latents."""
    if fvu >= min(1, untrained):
        than = "the mean of all rows" if fvu >= 1 else "untrained weights"
        return f"no better than {than}, so do not use it in this way"
    if fvu * CLEAR <= untrained:
        return f"{untrained / fvu:,.1f} times less is lost" if fvu > 0 else "nothing is lost"
    if 1 - fvu >= CLEAR * (1 - untrained):  # where few latents are active, all lose much
        return f"{(1 - fvu) / (1 - untrained):,.1f} times more is kept" if untrained < 1 else "something is learnt"
    return "hardly better than untrained"


def poster_table(evaluations: Sequence[Evaluation], style: Literal["markdown", "latex"] = "markdown") -> str:
    """The poster's table of several evaluations as text, best values in bold, and how activations were made.

    Raises:
        ConfigError: The style is unknown, or there are no evaluations.
    """
    if style not in ("markdown", "latex"):
        raise ConfigError(f"table style {style!r} is unknown; give markdown or latex")
    if not evaluations:
        raise ConfigError("a table of no evaluations; give at least one run")
    rows = table_rows(evaluations, POSTER_COLUMNS)
    table = _markdown(rows) if style == "markdown" else _latex(rows)
    return f"{table}\n\n{_mode_line(evaluations)}" if style == "markdown" else f"{table}\n% {_mode_line(evaluations)}"


def mode_of(evaluation: Evaluation) -> str:
    """The inference in words."""
    return mode_of_inference(evaluation.inference, evaluation.k)


def mode_of_inference(inference: Inference, k: int | None) -> str:
    """An inference in words."""
    words = {
        "relu": "every positive latent kept",
        "trained": "the activation function of the SAE",
        "threshold": "latents above their thresholds kept",
    }
    return f"{inference} ({words.get(inference, f'the {k} strongest latents kept')})"


def _mode_line(evaluations: Sequence[Evaluation]) -> str:
    """How activations were made; where not all are alike, of which evaluations."""
    found: dict[str, list[str]] = {}
    for name, one in zip(names_of(evaluations), evaluations, strict=True):
        found.setdefault(mode_of(one), []).append(name)
    if len(found) == 1:
        return f"inference: {next(iter(found))}"
    return "inference: " + "; ".join(f"{mode} for {', '.join(names)}" for mode, names in found.items())


def names_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """The last part of each run's path, or the whole path where that is shared; the kind where there is no run."""
    several = sum(e.is_untrained for e in evaluations) > 1
    short = [_short_name(e, several=several) for e in evaluations]
    shared = {name for name, times in Counter(short).items() if times > 1}
    return [e.run if name in shared and e.run else name for name, e in zip(short, evaluations, strict=True)]


def _short_name(e: Evaluation, *, several: bool) -> str:
    if e.is_untrained:
        return f"untrained, {e.k or 'all'} of {e.d_sae}" if several else "untrained"
    return e.kind if e.run is None else Path(e.run).name or e.run


def _markdown(rows: list[dict[str, Cell]]) -> str:
    lines = [headings(rows[0], POSTER_COLUMNS)]
    for row in rows:
        texts = [cell.text.replace("|", "\\|") for cell in row.values()]
        lines.append([f"**{text}**" if cell.is_best else text for text, cell in zip(texts, row.values(), strict=True)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _latex(rows: list[dict[str, Cell]]) -> str:
    """A tabular for the booktabs package."""
    titles = [
        title.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$") for title in headings(rows[0], POSTER_COLUMNS)
    ]
    lines = [" & ".join(titles) + r" \\", r"\midrule"]
    for row in rows:
        texts = [_latex_text(cell.text) for cell in row.values()]
        marked = [rf"\textbf{{{t}}}" if cell.is_best else t for t, cell in zip(texts, row.values(), strict=True)]
        lines.append(" & ".join(marked) + r" \\")
    columns = "l" + "r" * (len(titles) - 1)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"])


def _latex_text(text: str) -> str:
    text = text.replace("\\", r"\textbackslash ")
    for character in "_&%$#{}":
        text = text.replace(character, "\\" + character)
    return text.replace("±", r"$\pm$")
