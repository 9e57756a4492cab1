"""The poster's table of several evaluations: markdown or LaTeX, the best value of each column marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from msae.base.errors import ConfigError

if TYPE_CHECKING:
    from msae.measure.evaluate.record import Evaluation

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
    words = {"relu": "every positive latent kept", "trained": "the activation of training"}
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
