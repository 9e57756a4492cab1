"""The model card: README.md in the run folder, from the same facts as the report, never over what a person wrote."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from msae.base.errors import RunError
from msae.base.files import atomic_path
from msae.measure.evaluate import Evaluation, table_rows
from msae.measure.evaluate.record import headings, judgement, legend
from msae.web.page import markdown, one_line, render
from msae.web.report.facts import Facts

FILE = "README.md"
MARK = "<!-- made by msae report; edit above this line and it will be left alone; sha256 "
MAX_NAMES = 60
METRICS = {
    "sparsity": "share of latents at zero",
    "fvu_per_sample": "variance unexplained (FVU), per sample",
    "fvu": "variance unexplained (FVU), pooled",
    "cosine": "cosine of embedding and reconstruction",
    "cknna": "alignment of neighbours (CKNNA)",
    "dead": "latents that never fire",
}


def write_card(facts: Facts) -> Path | None:
    """Write the card into the run folder; None where a person wrote or edited the README.md that is there.

    Raises:
        RunError: README.md cannot be read.
    """
    file = facts.folder / FILE
    if file.exists() and not is_ours(file):
        return None
    text = sign(card(facts))
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def sign(text: str) -> str:
    """The card with a last line from which `is_ours` tells whether anything above it was changed."""
    return f"{text}{MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_ours(file: Path) -> bool:
    """Whether `file` is a card as it was made, unchanged."""
    try:
        text = file.read_bytes().decode("utf-8", errors="replace")
    except OSError as err:
        raise RunError(f"{file} cannot be read ({err.strerror}); move it away") from err
    above, mark, _ = text.rpartition(MARK)
    return bool(mark) and sign(above) == text


def card(facts: Facts, *, place: str | None = None, license: str | None = None) -> str:
    """The card as Markdown with front matter.

    Args:
        place: What the code in it loads: the name of a repository, or without it the folder.
        license: As the hub writes it.
    """
    encoder, names = facts.encoder, facts.names
    evaluations = [kept.evaluation for kept in facts.evaluations]
    table = [list(row.items())[1:] for row in table_rows(evaluations)]
    titles = [title for title, _ in table[0]] if table else []
    known = sorted({concept.name for concept in (names.confirmed if names else ())})
    return str(
        render(
            "report/card.md",
            facts=facts,
            front=_front_matter(facts) | ({"license": license} if license else {}),
            place=place,
            about=f"embeddings of {markdown(encoder)}" if encoder else f"{facts.config.d_in}-dimensional embeddings",
            modality=next(iter(facts.sae.standardizer.statistics), "image"),
            evaluations=[(e, [cell.text for _, cell in row]) for e, row in zip(evaluations, table, strict=True)],
            headings=headings(titles),
            legend=legend(titles),
            judgements=[said for e in evaluations if (said := judgement(_rows_of(e), e))],
            names=known[:MAX_NAMES],
            n_more=len(known[MAX_NAMES:]),
            n_unconfirmed=len(names) - len(names.confirmed) if names else 0,
        )
    )


def _front_matter(facts: Facts) -> dict[str, Any]:
    """What the hub reads; each value is written as JSON, which is a part of YAML."""
    config = facts.config
    data: dict[str, Any] = {
        "library_name": "msae",
        "pipeline_tag": "feature-extraction",
        "tags": ["msae", "sparse-autoencoder", "interpretability", "clip", config.kind],
    }
    if config.encoder and re.fullmatch(r"[\w.-]+/[\w.-]+", config.encoder) and not Path(config.encoder).exists():
        data["base_model"] = config.encoder
    if facts.dataset:
        data["datasets"] = [one_line(facts.dataset)]
    data["metrics"] = list(METRICS)
    results = [_result(kept.evaluation) for kept in facts.evaluations]
    if results:
        data["model-index"] = [{"name": one_line(facts.name), "results": results}]
    return data


def _rows_of(e: Evaluation) -> str:
    """What was evaluated, and how."""
    return f"{e.modality} rows of {one_line(Path(e.on).name)}, inference {e.inference}{f' {e.k}' if e.k else ''}"


def _result(e: Evaluation) -> dict[str, Any]:
    store = one_line(Path(e.on).name)
    known = {metric: getattr(e, metric) for metric in METRICS}
    return {
        "task": {"type": "feature-extraction", "name": f"reconstruction of {e.modality} embeddings"},
        "dataset": {"type": store, "name": store},
        "metrics": [
            {"type": metric, "name": METRICS[metric], "value": value}
            for metric, value in known.items()
            if value is not None
        ],
    }
