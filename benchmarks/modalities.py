"""The training-modality table: SAEs trained on images, on texts and on both, on halves of pairs held out of training.

    python benchmarks/modalities.py IMAGES.npy WORDS.npy --pairs STORE... --work FOLDER --section NAME
    python benchmarks/modalities.py --pairs STORE --work FOLDER --section NAME --d-sae 512 --epochs 100

One half of each store of pairs is trained on with IMAGES and WORDS, the other half is judged. *both* draws a batch of
images and one of texts a step; the others draw one batch, for as many steps. *aligned* is *both* with --align. Without
IMAGES and WORDS the halves are all there is. Runs that are there are not made again; writes a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import msae
from results import write_section

SPLIT_SEED = 30
TRAINED = ("image", "text", "both", "aligned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("others", nargs="*", type=Path, help="a store of images, and one of texts")
    parser.add_argument("--pairs", nargs="+", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--section", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[30, 31, 32])
    parser.add_argument("--aligned-seeds", type=int, nargs="+", help="of aligned, where it is trained with fewer")
    parser.add_argument("--every", type=int, default=1, help="take only every so many of IMAGES")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=10, help="of images")
    parser.add_argument("--batch-size", type=int, default=256, help="of one modality")
    parser.add_argument("--align", type=float, default=0.01)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.every > 1:
        options.others[0] = thinned(options.others[0], options.every, options.work)
    halves = [split(store, options.work) for store in options.pairs]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in options.seeds:
        wanted = TRAINED if seed in (options.aligned_seeds or options.seeds) else TRAINED[:-1]
        runs = {how: trained(how, seed, [fit for fit, _ in halves], options) for how in wanted}
        for _, judged in halves:
            for how, found in zip(wanted, msae.evaluate(list(runs.values()), judged, seed=seed), strict=True):
                rows.setdefault((judged.stem, how), []).append(figures(found))
    body = table(rows, options)
    print(body)
    write_section(options.section, f"Trained on images, on texts and on both: {options.section}", body)


def thinned(images: Path, every: int, work: Path) -> Path:
    """A file in `work` of some of the images, evenly over the store."""
    store = msae.EmbeddingStore.open(images, modality="image")
    file = work / "image_thinned.npy"
    np.save(file, store.take(np.arange(0, len(store), every), "image").astype(np.float16))
    return file


def split(path: Path, work: Path) -> tuple[Path, Path]:
    """Two files in `work`: the half of the pairs to train on, and the other."""
    store = msae.EmbeddingStore.open(path)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(store))
    half = (len(store) + 1) // 2
    paths = work / f"{path.stem}-fit.npz", work / f"{path.stem}.npz"
    for file, rows in zip(paths, (np.sort(order[:half]), np.sort(order[half:])), strict=True):
        np.savez(file, image_embeds=store.take(rows, "image"), text_embeds=store.take(rows, "text"))
    return paths


def trained(how: str, seed: int, fit: list[Path], options: argparse.Namespace) -> Path:
    """A run on one modality or on both; each takes as many steps as the images need for their epochs."""
    modality: Any = "both" if how == "aligned" else how
    images, texts = (options.others[:1], options.others[1:]) if options.others else ([], [])
    stores = {"image": [*images, *fit], "text": [*texts, *fit], "both": [*images, *texts, *fit]}
    n_images, n_texts = (rows_of(stores[one], one) for one in ("image", "text"))
    epochs = round(options.epochs * n_images / n_texts) if how == "text" else options.epochs
    batch = min(options.batch_size, n_images, n_texts)
    out: Path = options.work / "runs" / f"{how}-d{options.d_sae}-s{seed}"
    msae.train(
        stores[modality], out=out, resume=True, modality=modality, seed=seed, d_sae=options.d_sae, epochs=epochs,
        batch_size=2 * batch if modality == "both" else batch, align=options.align if how == "aligned" else 0.0,
    )  # fmt: skip
    return out


def rows_of(stores: list[Path], modality: Any) -> int:
    return sum(len(msae.EmbeddingStore.open(store, modality=modality)) for store in stores)


def figures(found: msae.Evaluation) -> dict[str, Any]:
    pairs = found.pairs
    assert pairs is not None
    image, text = pairs.rows
    named = {"codes": pairs.codes, "untrained": pairs.untrained}
    return {
        "n": pairs.n,
        **{f"{one.modality} {name}": getattr(one, name) for one in (image, text)
           for name in ("l0", "sparsity", "fvu_per_sample", "untrained_fvu_per_sample", "cosine", "cknna")},
        **{f"{name} {key}": value for name, codes in named.items() for key, value in vars(codes).items()
           if key != "retrieval"},
        **{f"{name} r{k}": means(recalls, k) for name, recalls in
           {**{name: codes.retrieval for name, codes in named.items()}, "standardized": pairs.standardized,
            "dense": pairs.dense}.items() for k in (1, 5)},
    }  # fmt: skip


def means(recalls: Any, k: int) -> float:
    """Of both ways."""
    return (getattr(recalls, f"image_to_text_r{k}") + getattr(recalls, f"text_to_image_r{k}")) / 2


def table(rows: dict[tuple[str, str], list[dict[str, Any]]], options: argparse.Namespace) -> str:
    lines = []
    titles = (
        "pairs", "trained on", "image: active", "FVU (untrained)", "cosine", "CKNNA", "text: active", "FVU (untrained)",
        "cosine", "CKNNA", "serve both", "in common (others)", "R@1", "R@5",
    )  # fmt: skip
    lines += ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    for (judged, how), seeds in rows.items():
        fewer = "" if len(seeds) == len(options.seeds) else f" ({len(seeds)} of {len(options.seeds)} seeds)"
        cells = [f"{judged}, {seeds[0]['n']}", how + fewer]
        for one in ("image", "text"):
            cells += [
                shown(seeds, f"{one} l0", "{:.0f}"),
                f"{shown(seeds, f'{one} fvu_per_sample')} ({shown(seeds, f'{one} untrained_fvu_per_sample')})",
                shown(seeds, f"{one} cosine"),
                shown(seeds, f"{one} cknna"),
            ]
        lines.append("| " + " | ".join([*cells, *code_cells(seeds, "codes")]) + " |")
        if how == TRAINED[-1]:
            null = [one for other in TRAINED for one in rows[judged, other]]
            blank = ["-"] * 8
            untrained = code_cells(null, "untrained")
            lines.append("| " + " | ".join([f"{judged}", "untrained (all four)", *blank, *untrained]) + " |")
            for name, label in (("standardized", "standardised embeddings"), ("dense", "raw embeddings")):
                found = [shown(seeds, f"{name} r{k}") for k in (1, 5)]
                lines.append("| " + " | ".join([judged, label, *blank, "-", "-", *found]) + " |")
    told = (
        f"d_sae {options.d_sae:,}, default recipe, seeds {', '.join(map(str, options.seeds))} (mean ± standard "
        f"deviation), inference as trained (thresholds of each modality), judged on the half of the pairs "
        f"that nothing was trained on. R@1, R@5: mean of image to text and text to image, by cosine of the "
        f"activations; chance is 1 and 5 over "
        f"the pairs. *in common*: active latents that a pair shares, of those of either (of unlike pairs). *serve "
        f"both*: of the latents that fire, those whose rates differ at most five times. *aligned*: both, with "
        f"`--align {options.align:g}`."
    )
    return told + "\n\n" + "\n".join(lines)


def code_cells(seeds: list[dict[str, Any]], name: str) -> list[str]:
    common = f"{shown(seeds, f'{name} in_common')} ({shown(seeds, f'{name} in_common_with_others')})"
    recalls = [shown(seeds, f"{name} r{k}") for k in (1, 5)]
    return [shown(seeds, f"{name} share_both", "{:.2f}"), common, *recalls]


def shown(seeds: list[dict[str, Any]], key: str, form: str = "{:.3f}") -> str:
    values = [one[key] for one in seeds]
    if any(value is None for value in values):
        return "-"
    spread = f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 and np.std(values) > 0 else ""
    return form.format(np.mean(values)) + spread


if __name__ == "__main__":
    main()
