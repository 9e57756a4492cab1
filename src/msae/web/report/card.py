"""The model card: README.md in the run folder, from the same facts as the report, never over what a person wrote."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from msae.base.errors import RunError
from msae.base.files import atomic_path
from msae.measure.evaluate import Evaluation, Kept
from msae.web.page import shorten
from msae.web.report.facts import Facts

FILE = "README.md"
MARK = "<!-- made by msae report; edit above this line and it will be left alone; sha256 "
METRICS = {
    "sparsity": "share of latents at zero",
    "fvu_per_sample": "variance unexplained (FVU), per sample",
    "fvu": "variance unexplained (FVU), pooled",
    "cosine": "cosine of embedding and reconstruction",
    "cknna": "alignment of neighbours (CKNNA)",
    "dead": "latents that never fire",
}
SNIPPET = """\
import torch

import msae

sae = msae.SAE.load({name})  # this folder, or its name on the hub
x = torch.randn(4, sae.d_in)  # in their place: raw embeddings{encoder}, one a row
z = sae.encode(x, modality="{modality}")  # how strongly each of the {d_sae} latents fires
x_hat = sae.decode(z, modality="{modality}")  # raw embeddings again
print(z.topk(5).indices)  # the strongest latents of each row
"""


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


def card(facts: Facts) -> str:
    """The card as Markdown with front matter."""
    config, name = facts.config, facts.name
    encoder = facts.encoder
    about = f"embeddings of {_text(encoder)}" if encoder else f"{config.d_in}-dimensional embeddings"
    modality = next(iter(facts.sae.standardizer.statistics), "image")
    snippet = SNIPPET.format(
        name=json.dumps(_line(name)),
        encoder=f" of {_line(encoder)}" if encoder else "",
        modality=modality,
        d_sae=f"{config.d_sae:,}",
    )
    pieces = [
        _front_matter(facts),
        f"# {_text(name)}\n",
        f"A sparse autoencoder for {about}: it writes an embedding as a few of {config.d_sae:,} latents, many of which "
        "stand for one thing that a person can name, and turns them back into an embedding. Made with msae, after "
        "*Interpreting CLIP with Hierarchical Sparse Autoencoders* (arXiv:2502.20578).\n",
        "## Facts\n",
        *[f"- **{word}**: {_text(value)}" for word, value in facts.lines()],
        "\n## Use\n",
        f"```python\n{snippet}```\n",
        "## Figures\n",
        *(_figures(facts.evaluations) or ["Not evaluated yet.\n"]),
        *_names(facts),
        "## Limits\n",
        f"It reads {about} and no others, raw, as the model gives them: it standardises them itself. A name says what "
        "the evidence supports on the data it was tested on, and an unnamed latent may still mean something.\n",
    ]
    return "\n".join(pieces) + "\n"


def _front_matter(facts: Facts) -> str:
    """YAML, of which JSON values are a part."""
    config = facts.config
    data: dict[str, Any] = {
        "library_name": "msae",
        "tags": ["msae", "sparse-autoencoder", "interpretability", "clip", config.kind],
    }
    if config.encoder and re.fullmatch(r"[\w.-]+/[\w.-]+", config.encoder) and not Path(config.encoder).exists():
        data["base_model"] = config.encoder
    if facts.dataset:
        data["datasets"] = [_line(facts.dataset)]
    data["metrics"] = list(METRICS)
    results = [_result(kept.evaluation) for kept in facts.evaluations]
    if results:
        data["model-index"] = [{"name": _line(facts.name), "results": results}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()]
    return "\n".join(["---", *lines, "---\n"])


def _result(e: Evaluation) -> dict[str, Any]:
    store = _line(Path(e.on).name)
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


def _figures(evaluations: tuple[Kept, ...]) -> list[str]:
    if not evaluations:
        return []
    lines = [
        "| rows | inference | sparsity ↑ | FVU ↓ | cosine ↑ | CKNNA ↑ | never fire ↓ |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for e in (kept.evaluation for kept in evaluations):
        values = [_number(value) for value in (e.sparsity, e.fvu_per_sample, e.cosine, e.cknna)]
        rows = f"{e.n:,} {e.modality} rows of {_text(Path(e.on).name)}"
        mode = f"topk, k = {e.k}" if e.k else e.inference
        lines.append(f"| {rows} | {mode} | {' | '.join(values)} | {e.dead:,} |")
    return [*lines, "\nFVU is the share of variance that the reconstruction loses, the mean over rows.\n"]


def _names(facts: Facts) -> list[str]:
    names = facts.names
    if names is None or not len(names):
        return []
    known = sorted({concept.name for concept in names})
    words = ", ".join(_text(name) for name in known[:60])
    more = f" and {len(known) - 60:,} more in names.json" if len(known) > 60 else ""
    return ["## Concepts\n", f"{len(names):,} latents have a name with evidence: {words}{more}.\n"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _line(value: object) -> str:
    """Text of printable characters on one line."""
    return "".join(character if character.isprintable() else " " for character in shorten(value))


def _text(value: object) -> str:
    """Text that Markdown and HTML show as it is."""
    text = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", _line(value))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
