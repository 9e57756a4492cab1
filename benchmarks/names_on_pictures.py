"""Do the names that are shown for a picture fit it?

python benchmarks/names_on_pictures.py RUN [RUN ...] --vocabulary STORE --on STORE [STORE ...]

Names are made and checked on one half of each store, without its captions and labels, and judged on the other: of the
five concepts shown for a picture (the largest activations for each latent's natural 99th percentile), the share of the
named ones that fit, that is, whose name is among the best 5 % of all words by the similarity of the word to that
picture; by chance .05. Beside it: the decoder's nearest words, the same names shuffled among their latents, and the
rule with activations that were shuffled over the rows, which must name next to nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from msae.concepts import rows
from msae.concepts.names import ConceptNames
from msae.concepts.naming import NameSettings, Words, name, read_words
from msae.data.store import EmbeddingStore, as_store
from msae.sae.run import Run
from msae.sae.view import View
from results import FIGURES, write_section

SHOWN, FIT_SHARE, SEED = 5, 0.05, 0


class Half(NamedTuple):
    """The rows that judge: what is shown for each, and which words fit it."""

    top: np.ndarray
    """(rows, 5): the latents shown."""
    fires: np.ndarray
    fits: np.ndarray
    """(rows, words)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--on", required=True, nargs="+", help="stores of images that no run was trained on")
    parser.add_argument("--section", default="names-on-pictures", help="of RESULTS.md")
    parser.add_argument("--dry", action="store_true", help="print, and leave RESULTS.md alone")
    arguments = parser.parse_args()
    vocabulary, records = as_store(arguments.vocabulary, "text"), []
    for run in map(Run.open, arguments.runs):
        words = read_words(run.sae, vocabulary, NameSettings())
        records += [measure(run, vocabulary, words, as_store(on, "image")) for on in arguments.on]
    body = table(records)
    print(body)
    if not arguments.dry:
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / f"{arguments.section}.json").write_text(json.dumps(records, indent=1) + "\n")
        write_section(arguments.section, "Do the names that are shown for a picture fit it?", body)


def measure(run: Run, vocabulary: EmbeddingStore, words: Words, store: EmbeddingStore) -> dict[str, Any]:
    """Every way of naming on one store."""
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(store))
    first, second = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    half = judge_of(View(run, store, "image"), first, second, words)
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "half.npy"
        np.save(bare, store.take(first, "image"))  # no captions, no labels
        found = name(run, vocabulary, on=bare, out=Path(folder) / "on.json")
        decoder = name(run, vocabulary, out=Path(folder) / "decoder.json")
        null = null_of(run, words, bare, rng)
    by_rows, by_decoder = as_words(found, words), as_words(decoder, words)
    latents = list(by_rows)
    shuffled = dict(zip(latents, rng.permutation([by_rows[latent] for latent in latents]).tolist(), strict=True))
    ways = {
        "decoder alone": by_decoder,
        "decoder, shuffled": dict(zip(by_decoder, rng.permutation(list(by_decoder.values())).tolist(), strict=True)),
        "rows decide": by_rows,
        "rows decide, shuffled": shuffled,
    }
    return {
        "run": Path(run.name).name,
        "most_of_a_word": max(Counter(by_rows.values()).values(), default=0),
        "store": f"{store.path.parent.name}/{store.path.name}",
        "rows": len(second),
        "counts": dict(found.counts),
        "null_named": null,
        "ways": {way: share_that_fits(half, names) for way, names in ways.items()},
    }


def judge_of(view: View, first: np.ndarray, second: np.ndarray, words: Words) -> Half:
    """What is shown for the second half, by natural ranges of the first."""
    natural = np.array([np.quantile(z[z > 0], 0.99) if (z > 0).any() else np.inf for z in view.table(first).T])
    strength = view.table(second) / natural
    top = np.argsort(-strength, axis=1, kind="stable")[:, :SHOWN]
    similarity = torch.cat(list(view.rows(second))).numpy() @ words.directions.T
    fits = similarity >= np.quantile(similarity, 1 - FIT_SHARE, axis=1)[:, None]
    return Half(top, np.take_along_axis(strength, top, 1) > 0, fits)


def as_words(names: ConceptNames, words: Words) -> dict[int, int]:
    number = {text: i for i, text in enumerate(words.texts)}
    return {concept.latent: number[concept.name] for concept in names}


def share_that_fits(half: Half, names: Mapping[int, int]) -> dict[str, float]:
    word = np.vectorize(lambda latent: names.get(int(latent), -1), otypes=[np.int64])(half.top)
    is_named = (word >= 0) & half.fires
    fits = np.take_along_axis(half.fits, np.maximum(word, 0), 1)[is_named]
    return {
        "named": len(names),
        "fit": float(fits.mean()) if len(fits) else float("nan"),
        "named_of_five": float(is_named.sum(1).mean()),
        "without_any": float((~is_named.any(1)).mean()),
    }


def null_of(run: Run, words: Words, bare: Path, rng: np.random.Generator, n_latents: int | None = None) -> float:
    """The share of latents whose word holds where activations belong to other rows than similarities do.

    Of those that are tested, or of `n_latents`.
    """
    view = _Shuffled(run, bare, "image")
    found = rows.choose(
        view, np.arange(len(view)), words.directions, words.groups, by_decoder={}, false_names=0.05, rng=rng
    )
    return float(found.is_held.sum() / max(1, n_latents or len(found.latents)))


class _Shuffled(View):
    """A view whose activations belong to other rows of the same block."""

    def activate(self, x: torch.Tensor, latents: Any = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(x))
        return super().activate(x, latents)[torch.randperm(len(x), generator=generator)]


def table(records: list[dict[str, Any]]) -> str:
    head = ("run", "store, rows that judge", "names from", "named latents", "fit", "named of five", "with none", "null")
    lines = [
        "Of the five concepts shown for a picture, the share of the named ones that fit (its name among the best 5 % "
        "of all words by similarity to that picture; by chance .05). Names were made and checked on one half of each "
        "store, without captions or labels, and judged on the other. *With none*: pictures without a named concept. "
        "*Null*: of the latents tested, the share whose word holds when activations are shuffled over the rows.",
        "",
        f"| {' | '.join(head)} |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        for way, found in record["ways"].items():
            null = f"{record['null_named']:.3f}" if way == "rows decide" else ""
            lines.append(
                f"| {record['run']} | {record['store']}, {record['rows']:,} | {way} | {found['named']:,} | "
                f"{found['fit']:.3f} | {found['named_of_five']:.2f} | {found['without_any']:.2f} | {null} |"
            )
    most = ", ".join(f"{one['most_of_a_word']} ({one['run']}, {one['store']})" for one in records)
    return "\n".join([*lines, "", f"Latents with the most frequent name: {most}."])


if __name__ == "__main__":
    main()
