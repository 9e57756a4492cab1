"""`Evaluation`: the figures of one SAE on one store, their JSON keys, and the table of several."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msae.base.errors import ConfigError
from msae.base.results import Result
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
    notes: tuple[str, ...] = field(default=())
    """Why a figure is None, and which rows are left out of the probe's figures."""

    def to_json(self) -> dict[str, Any]:
        """JSON values by the contract's keys, without those of figures that were not asked for."""
        record = dataclasses.asdict(self)
        unasked = {"recovery"} if self.recovery is None else set()
        if self.probe_n is None:
            unasked |= {name for name in record if name.startswith("probe_") or name == "class_f1"}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in record.items()
            if key not in unasked
        }

    def records(self) -> list[dict[str, Any]]:
        """The figures as one record, without the recovery."""
        record = self.to_json()
        record.pop("recovery", None)
        return [record | {"notes": "; ".join(self.notes)}]

    def to_text(self) -> str:
        """Its row of the poster's table."""
        return poster_table([self])

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
        """The poster's table, the best value of each column marked."""
        return poster_table(self)

    @property
    def headline(self) -> str:
        return f"{len(self)} SAEs on {_measured(self)}"


def _measured(evaluations: Sequence[Evaluation]) -> str:
    """The rows and the mode, and the figures that are read first."""
    first = evaluations[0]
    figures = ""
    if len(evaluations) == 1:
        cosine, fvu = f"cosine {first.cosine:.3f}", "" if first.fvu is None else f", FVU {first.fvu:.3f}"
        figures = f": sparsity {first.sparsity:.3f}, {cosine}{fvu}"
    return f"{first.n:,} {first.modality} rows of {first.on}, inference {mode_of(first)}{figures}"


def json_number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


NOTHING = "-"
"""Printed where a figure is undefined or was not asked for."""

MEANINGS: Mapping[str, str] = {
    "sparsity": "share of latents that are zero in a row: more is easier to read",
    "FVU": "share of the variance that is lost",
    "CS": "cosine of an embedding and its reconstruction: 1 is the same direction",
    "LP": "whether a classifier says the same of the reconstruction: how far its probabilities move (KL), and in which "
    "share of rows its answer stays (Acc)",
    "CKNNA": "whether rows that were neighbours still are, in their latents",
    "DO": "how much the directions of latents overlap",
    "NDN": "latents that never fire, here and (in brackets) in training",
}
"""What the columns of the table mean, for people."""


class Cell(NamedTuple):
    """One figure of one evaluation."""

    text: str
    is_best: bool
    """Best of its column at the printed precision, as are all that tie with it."""


class _Column(NamedTuple):
    """A column of the poster's table."""

    title: str
    better: Literal["up", "down"]
    value: Callable[[Evaluation], float | None]
    digits: int = 3
    more: Callable[[Evaluation], str] = lambda _: ""
    """What stands behind the value and is not compared."""


def _spread(std: float | None) -> str:
    return "" if std is None else f" ± {std:.3f}"


COLUMNS = (
    _Column("sparsity", "up", lambda e: e.sparsity),
    _Column("FVU", "down", lambda e: e.fvu_per_sample, more=lambda e: _spread(e.fvu_per_sample_std)),
    _Column("CS", "up", lambda e: e.cosine, more=lambda e: _spread(e.cosine_std)),
    _Column("LP (KL)", "down", lambda e: e.probe_kl, digits=4),
    _Column("LP (Acc)", "up", lambda e: e.probe_agreement),
    _Column("CKNNA", "up", lambda e: e.cknna),
    _Column("DO", "down", lambda e: e.decoder_orthogonality, digits=4),
    _Column(
        "NDN eval (train)",
        "down",
        lambda e: e.dead,
        digits=0,
        more=lambda e: f" ({NOTHING if e.dead_train is None else e.dead_train})",
    ),
)
"""As in the poster, with `fvu_per_sample` as FVU, nats as KL, and NDN compared on the evaluation store."""


def table_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, Cell]]:
    """The poster's table as data: for each evaluation, its name under `model` and a cell under each column's title.

    Columns in which no evaluation has a value are left out. Of one evaluation alone nothing is marked.
    """
    rows = [{"model": Cell(name, False)} for name in names_of(evaluations)]
    for column in COLUMNS:
        values = [column.value(e) for e in evaluations]
        printed = [None if value is None else f"{value:.{column.digits}f}" for value in values]
        known = [float(text) for text in printed if text is not None]
        if not known:
            continue
        best = max(known) if column.better == "up" else min(known)
        for row, evaluation, text in zip(rows, evaluations, printed, strict=True):
            is_best = text is not None and len(evaluations) > 1 and float(text) == best
            row[column.title] = Cell(NOTHING if text is None else text + column.more(evaluation), is_best)
    return rows


def poster_table(evaluations: Sequence[Evaluation], style: Literal["markdown", "latex"] = "markdown") -> str:
    """The poster's table of several evaluations as text, best values in bold, and how activations were made.

    Raises:
        ConfigError: The style is unknown, or there are no evaluations.
    """
    if style not in ("markdown", "latex"):
        raise ConfigError(f"table style {style!r} is unknown; give markdown or latex")
    if not evaluations:
        raise ConfigError("a table of no evaluations; give at least one run")
    rows = table_rows(evaluations)
    table = _markdown(rows) if style == "markdown" else _latex(rows)
    return f"{table}\n\n{_mode_line(evaluations)}" if style == "markdown" else f"{table}\n% {_mode_line(evaluations)}"


def mode_of(evaluation: Evaluation) -> str:
    """The inference in words."""
    words = {
        "relu": "every positive latent kept",
        "trained": "the activation function of the SAE",
        "threshold": "latents above their thresholds kept",
    }
    return f"{evaluation.inference} ({words.get(evaluation.inference, f'the {evaluation.k} strongest latents kept')})"


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
    short = [e.kind if e.run is None else Path(e.run).name or e.run for e in evaluations]
    shared = {name for name, times in Counter(short).items() if times > 1}
    return [e.run if name in shared and e.run else name for name, e in zip(short, evaluations, strict=True)]


def _arrows() -> dict[str, str]:
    return {column.title: {"up": "↑", "down": "↓"}[column.better] for column in COLUMNS}


def _markdown(rows: list[dict[str, Cell]]) -> str:
    arrows = _arrows()
    lines = [[f"{title} {arrows[title]}" if title in arrows else title for title in rows[0]]]
    for row in rows:
        texts = [cell.text.replace("|", "\\|") for cell in row.values()]
        lines.append([f"**{text}**" if cell.is_best else text for text, cell in zip(texts, row.values(), strict=True)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _latex(rows: list[dict[str, Cell]]) -> str:
    """A tabular for the booktabs package."""
    arrows = {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    titles = [f"{title} {arrows[_arrows()[title]]}" if title in _arrows() else title for title in rows[0]]
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


def meanings_of(titles: Iterable[str]) -> dict[str, str]:
    """The meanings of the columns with these titles."""
    known = list(titles)
    return {term: meaning for term, meaning in MEANINGS.items() if any(title.startswith(term) for title in known)}
