"""Both naming rules on trained SAEs: their counts, and whether the names agree with labels.

python benchmarks/naming_rules.py RUNS --vocabulary STORE --on STORE

RUNS is a folder of run folders, such as benchmarks/poster_table.py makes. The labels take no part in choosing the
names here (`untested="named"` and every tested name counted), so that agreement is a measurement, not a filter.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msae.concepts.names import AGREEMENT_SHARE, ConceptNames
from msae.concepts.naming import INFERENCE, NameSettings, _Captions, name, read_words
from msae.data.store import as_store
from msae.sae.model import SAE
from msae.sae.run import Run
from msae.sae.view import View
from results import FIGURES, write_section

POSTER_COLUMNS = ("cosine", "ratio", "cosine_and_ratio", "unique", "valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of run folders; unfinished ones are left out")
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--on", required=True, help="store with captions or labels that no run was trained on")
    parser.add_argument("--section", default="naming-rules", help="of RESULTS.md")
    parser.add_argument("--dry", action="store_true", help="print, and leave RESULTS.md alone")
    arguments = parser.parse_args()

    runs = sorted(file.parent for file in arguments.runs.glob("*/sae.json"))
    if not runs:
        raise SystemExit(f"{arguments.runs} holds no finished run; benchmarks/poster_table.py makes them")
    scratch = arguments.runs / ".names.json"

    def names_of(run: Path, **options: Any) -> ConceptNames:
        return name(SAE.load(run), arguments.vocabulary, out=scratch, **options)

    records = [measure(run, names_of, arguments.on) for run in runs]
    pictured = [by_pictures(run, arguments.vocabulary, arguments.on, scratch.with_name(".half.npy")) for run in runs]
    likeliest = max(records, key=lambda record: record["beyond_chance"])["run"]
    centring = list(centring_effect(arguments.runs / likeliest, names_of, arguments.on))
    scratch.unlink(missing_ok=True)
    body = "\n\n".join([
        "The poster's rule, its five columns, and the evidence rule without captions:",
        counts_table(records),
        "Agreement: AUROC of a latent for the test rows whose label contains its name. *Agree* is the rule's "
        "criterion: the interval above .5, and the name among the best 5 % of the words that occur in the labels, "
        "which a name dealt out at random meets in 5 % of cases.",
        agreement_table(records),
        "The same of the names that pictures of one half gave, without labels; the labels of the other half judge:",
        pictures_table(pictured),
        f"Centring, on {likeliest} (words less their own mean or not, less b_dec or not):",
        centring_table(centring),
    ])  # fmt: skip
    print(body)
    if not arguments.dry:
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / f"{arguments.section}.json").write_text(
            json.dumps({"runs": records, "pictures": pictured, "centring": centring}, indent=1) + "\n"
        )
        write_section(arguments.section, "Naming: the poster's rule and the evidence", body)


def measure(run: Path, names_of: Callable[..., ConceptNames], on: str) -> dict[str, Any]:
    """Counts of both rules, and how the names agree with the labels."""
    poster = names_of(run, rule="poster")
    found = names_of(run, on=on, untested="named")
    print(run.name, dict(poster.counts), dict(found.counts), flush=True)
    return {
        "run": run.name,
        "d_sae": found.d_sae,
        "best_cosine": float(np.quantile([near[0].cosine for near in found.nearest_words], 0.99)),
        "null_cosine": found.record["null_cosines"]["0.99"],
        "poster": dict(poster.counts),
        "beyond_chance": found.counts["beyond_chance"],
        "fired_by_text": found.counts["fired_by_text"],
        "named": len(names_of(run)),
        "tested": found.counts["tested"],
        "agree": found.counts["agree"],
        "auroc": quartiles([c.agreement.auroc for c in found if c.agreement]),
        "multimodal": sum(bool(c.is_multimodal) for c in found),
    }


def by_pictures(run: Path, vocabulary: str, on: str, half: Path) -> dict[str, Any]:
    """Names that one half of the pictures gives, judged by the labels of the other half."""
    store, opened = as_store(on, "image"), Run.open(run)
    order = np.random.default_rng(0).permutation(len(store))
    first, second = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    np.save(half, store.take(first, "image"))
    names = name(opened, vocabulary, on=half, out=half.with_suffix(".json"))
    words = read_words(opened.sae, as_store(vocabulary, "text"), NameSettings())
    number = {text: i for i, text in enumerate(words.texts)}
    labels = _Captions(View(opened, store, "image", inference=INFERENCE), words, second, NameSettings())
    latents = np.array([concept.latent for concept in names], np.int64)
    found = labels.agreements(latents, np.array([number[concept.name] for concept in names], np.int64))
    judged = [one for one in found if one is not None]
    half.unlink()
    half.with_suffix(".json").unlink()
    return {
        "run": run.name,
        "named": len(names),
        "words": labels.n_words,
        "judged": len(judged),
        "agree": sum(one.low > 0.5 and one.rank <= AGREEMENT_SHARE * one.n_words for one in judged),
        "auroc": quartiles([one.auroc for one in judged]),
    }


def pictures_table(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in records:
        aurocs = " / ".join(f"{value:.3f}" for value in r["auroc"]) if r["auroc"] else "-"
        share = f"{r['agree'] / r['judged']:.2f}" if r["judged"] else "-"
        rows.append([r["run"], r["named"], r["judged"], r["agree"], share, aurocs])
    return table(["run", "named", "that labels mention", "agree", "share", "AUROC quartiles"], rows)


def quartiles(values: Sequence[float]) -> list[float] | None:
    return [float(value) for value in np.quantile(values, [0.25, 0.5, 0.75])] if values else None


def centring_effect(run: Path, names_of: Callable[..., ConceptNames], on: str) -> list[dict[str, Any]]:
    rows = []
    for centre, subtract in itertools.product(("vocabulary", "none"), (True, False)):
        options = {"centre": centre, "subtract_b_dec": subtract}
        found = names_of(run, on=on, untested="named", **options)
        poster = names_of(run, rule="poster", **options)
        rows.append({**options, **found.counts, "poster_cosine": poster.counts["cosine"]})
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def counts_table(records: Sequence[dict[str, Any]]) -> str:
    head = [
        "run",
        "latents",
        *POSTER_COLUMNS,
        "best cosine, 99 %",
        "the null's",
        "beyond chance",
        "fired by text",
        "named",
    ]
    rows = [
        [
            r["run"], r["d_sae"], *(r["poster"][key] for key in POSTER_COLUMNS), f"{r['best_cosine']:.2f}",
            f"{r['null_cosine']:.2f}", r["beyond_chance"], r["fired_by_text"], r["named"],
        ]
        for r in records
    ]  # fmt: skip
    return table(head, rows)


def agreement_table(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in records:
        aurocs = " / ".join(f"{value:.3f}" for value in r["auroc"]) if r["auroc"] else "-"
        share = f"{r['agree'] / r['tested']:.2f}" if r["tested"] else "-"
        rows.append([r["run"], r["tested"], r["agree"], share, aurocs, r["multimodal"]])
    return table(["run", "names that labels mention", "agree", "share", "AUROC quartiles", "both modalities"], rows)


def centring_table(rows: Sequence[dict[str, Any]]) -> str:
    head = [
        "centre",
        "less b_dec",
        "poster: cosine > .42",
        "beyond chance",
        "fired by text",
        "tested",
        "agree",
        "share",
    ]
    return table(
        head,
        [
            [
                r["centre"], "yes" if r["subtract_b_dec"] else "no", r["poster_cosine"], r["beyond_chance"],
                r["fired_by_text"], r["tested"], r["agree"], f"{r['agree'] / max(1, r['tested']):.2f}",
            ]
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
