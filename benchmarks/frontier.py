"""One SAE against every budget: error, firing and class F1 of recipes when only the k strongest latents are kept.

    python benchmarks/frontier.py choose TRAIN --work FOLDER [--only NAME…]   recipes on rows held out of TRAIN
    python benchmarks/frontier.py score TRAIN TEST --work FOLDER              the chosen ones, once, on TEST
    python benchmarks/frontier.py table --work FOLDER                         what is there: RESULTS.md and figure

Each run writes one JSON file into FOLDER; what is there already is not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

import msae
from msae.measure.evaluate.untrained import untrained_like
from msae.sae.run import Run
from msae.sae.view import View
from results import write_section

FIGURE = Path(__file__).parent / "figures" / "frontier.svg"

KEPT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FIRING = (8, 16, 32, 64)
"""Latents kept when firing is asked for; the F1 of the best of these counts."""
HELD_OUT = 5_000
NMF_ROWS = 12_000
BATCH = 1024


def doubling(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... last."""
    return tuple(first * 2**i for i in range((last // first).bit_length()))


MATRYOSHKA: dict[str, Any] = {"kind": "matryoshka", "weighting": "uniform", "level_scales": False}
WEIGHTED: dict[str, Any] = {"kind": "matryoshka", "level_scales": False}
RECIPES: dict[str, dict[str, Any]] = {
    "untrained": {},
    "default": {},
    "faithful": {"recipe": "faithful"},
    "poster-reverse": {**MATRYOSHKA, "recipe": "poster", "weighting": "reverse"},
    "poster-uniform": {**MATRYOSHKA, "recipe": "poster"},
    "first-default": {**MATRYOSHKA, "recipe": "poster", "weighting": "reverse", "lr": 5e-4, "warmup": 0.05},
    "8-64": {**MATRYOSHKA, "levels": doubling(8, 64), "lr": 2e-3},
    "8-128": {**MATRYOSHKA, "levels": doubling(8, 128), "lr": 2e-3},
    "8-256": {**MATRYOSHKA, "levels": doubling(8, 256), "lr": 2e-3},
    "8-512": {**MATRYOSHKA, "levels": doubling(8, 512), "lr": 2e-3},
    "16-512": {**MATRYOSHKA, "levels": doubling(16, 512), "lr": 2e-3},
    "8-512-decay": {**MATRYOSHKA, "levels": doubling(8, 512), "lr": 2e-3, "decay": 1.0},
    "8-512-revived": {**MATRYOSHKA, "levels": doubling(8, 512), "lr": 2e-3, "auxiliary": 1 / 32, "dead_after": 20_000},
    "16-512-rising": {
        **WEIGHTED, "levels": doubling(16, 512), "weights": (1.0, 1.25, 1.5, 1.75, 2.0, 2.25), "lr": 2e-3,
    },
    "8-512-rising-decay": {
        **WEIGHTED, "levels": doubling(8, 512), "weights": (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2), "lr": 2e-3,
        "decay": 1.0,
    },
    "8-512-fast": {**MATRYOSHKA, "levels": doubling(8, 512), "lr": 4e-3},
    "8-512-rising-fast": {
        **WEIGHTED, "levels": doubling(8, 512), "weights": (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2), "lr": 4e-3,
    },
    "8-1024-rising-fast": {
        **WEIGHTED, "levels": doubling(8, 1024), "weights": (2.0, 2.0, 2.0, 2.0, 2.5, 3.0, 3.0, 3.0), "lr": 4e-3,
    },
    "8-4096-root": {
        **WEIGHTED, "levels": doubling(8, 4096), "weights": tuple(2 ** (i / 2) for i in range(10)), "lr": 1e-3,
    },
    "8-4096-linear": {
        **WEIGHTED, "levels": doubling(8, 4096), "weights": tuple(2.0**i for i in range(10)), "lr": 1e-3,
    },
    "8-4096": {**MATRYOSHKA, "levels": doubling(8, 4096), "lr": 2e-3},
    "8-4096-last": {**MATRYOSHKA, "levels": (*doubling(8, 512), 4096), "lr": 2e-3},
    **{
        f"topk-{k}-{lr:g}": {"kind": "topk", "k": k, "lr": lr}
        for k in (16, 32, 64, 128, 256) for lr in (1e-3, 2e-3, 3e-3, 4e-3, 6e-3)
    },
    **{f"batchtopk-64-{lr:g}": {"kind": "batchtopk", "k": 64, "lr": lr} for lr in (1e-3, 2e-3, 4e-3)},
    **{f"jumprelu-64-{lr:g}": {"kind": "jumprelu", "k": 64, "lr": lr} for lr in (5e-4, 1e-3, 2e-3)},
    **{
        f"widths-64-{lr:g}": {**MATRYOSHKA, "widths": (256, 512, 1024, 2048, 4096), "k": 64, "lr": lr}
        for lr in (5e-4, 1e-3, 2e-3)
    },
    "pca": {},
    "ica": {},
    "nmf": {},
    "pursuit": {},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["choose", "score", "table"])
    parser.add_argument("stores", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--labels", default="label")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--expansion", type=float, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    if arguments.what == "table":
        write_tables(arguments.work)
        return
    if arguments.what == "choose":
        fit, judged = halves(arguments.stores[0], arguments.work)
    else:
        fit, judged = arguments.stores
    for name in arguments.only:
        for seed in arguments.seeds:
            file = arguments.work / f"{arguments.what}-{name}-x{arguments.expansion:g}-e{arguments.epochs}-s{seed}.json"
            if not file.exists():
                record = measured(name, seed, str(fit), str(judged), arguments)
                file.write_text(json.dumps(record, indent=1) + "\n")
            show(json.loads(file.read_text()))


def halves(train: str, work: Path) -> tuple[Path, Path]:
    """Two stores in `work`: the rows of `train` to fit on, and those held out."""
    paths = work / "fit.npy", work / "held-out.npy"
    if not paths[1].exists():
        import pyarrow.csv

        store = msae.EmbeddingStore.open(train)
        order = np.random.default_rng(2026).permutation(len(store))
        work.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, (order[HELD_OUT:], order[:HELD_OUT]), strict=True):
            rows = np.sort(rows)
            pyarrow.csv.write_csv(store.metadata.take(rows), path.with_suffix(".csv"))
            np.save(path, store.take(rows, "image").astype(np.float16))
    return paths


def measured(name: str, seed: int, fit: str, judged: str, arguments: argparse.Namespace) -> dict[str, Any]:
    out = arguments.work / "runs" / f"{arguments.what}-{name}-x{arguments.expansion:g}-e{arguments.epochs}-s{seed}"
    began = time.process_time()
    if name == "untrained":
        return {"recipe": name, "seed": seed, "epochs": 0, "expansion": arguments.expansion, "cpu_seconds": 0.0,
                **untrained(fit, judged, arguments.labels, arguments.expansion, seed)}  # fmt: skip
    if name in FACTORS:
        return {"recipe": name, "seed": seed, "epochs": 0, "expansion": arguments.expansion,
                **FACTORS[name](fit, judged, seed, arguments), "cpu_seconds": time.process_time() - began}  # fmt: skip
    sae = msae.train(
        fit, out=out, resume=True, epochs=arguments.epochs, batch_size=arguments.batch_size,
        expansion=arguments.expansion, seed=seed, **RECIPES[name],
    )  # fmt: skip
    seconds = time.process_time() - began
    return {"recipe": name, "seed": seed, "epochs": arguments.epochs, "expansion": arguments.expansion,
            "cpu_seconds": seconds, **figures(sae, fit, judged, arguments.labels)}  # fmt: skip


def untrained(fit: str, judged: str, labels: str, expansion: float, seed: int) -> dict[str, Any]:
    """The null: random decoder rows, the encoder their transpose, scaled for the smallest error at each k."""
    known, new = (msae.EmbeddingStore.open(path, modality="image") for path in (fit, judged))
    sae = msae.SAE(msae.SAEConfig(d_in=known.d_in, d_sae=round(expansion * known.d_in), kind="relu"), seed=seed)
    sae.standardizer = View(Run.open(sae), known, "image").standardizer
    view = View(Run.open(sae), new, "image", inference="relu")
    at_64 = untrained_like(view, k=64, seed=seed).view.sae
    errors = {str(k): untrained_like(view, k=k, seed=seed).fvu_per_sample for k in KEPT if k <= sae.d_sae}
    return {**figures(at_64, fit, judged, labels), "fvu_per_sample": errors}


@torch.no_grad()
def figures(sae: msae.SAE, fit: str, judged: str, labels: str) -> dict[str, Any]:
    """FVU per sample at every k of `KEPT`, mean active latents, latents never among the 64 strongest, class F1."""
    store = msae.EmbeddingStore.open(judged, modality="image")
    errors = {k: 0.0 for k in KEPT if k <= sae.d_sae}
    strongest = np.zeros(sae.d_sae, np.int64)
    active = 0.0
    for x in standardised(sae, store):
        h = sae.pre_activations(x)
        active += float((h > 0).sum())
        values, latents = h.topk(64, dim=1)
        strongest += np.bincount(latents[values > 0].numpy(), minlength=sae.d_sae)
        length = x.square().sum(1)
        for k in errors:
            z = sae.activate(h, inference="topk", k=k) if k < sae.d_sae else sae.activate(h, inference="relu")
            errors[k] += float(((x - sae.reconstruct(z)).square().sum(1) / length).sum())
    f1 = {k: class_f1(sae, fit, judged, labels, k) for k in FIRING}
    return {
        "fvu_per_sample": {str(k): error / len(store) for k, error in errors.items()},
        "l0": active / len(store),
        "never_in_top_64": int((strongest == 0).sum()),
        "d_sae": sae.d_sae,
        "class_f1": {str(k): value for k, value in f1.items()},
        "n_judged": len(store),
    }


def standardised(sae: msae.SAE, store: msae.EmbeddingStore) -> Iterator[torch.Tensor]:
    for raw in store.batches("image", BATCH):
        yield sae.standardizer.apply(torch.from_numpy(raw), "image")


def class_f1(sae: msae.SAE, fit: str, judged: str, labels: str, k: int) -> float:
    """Mean over classes of the F1 on `judged` of the latent whose firing fits the class best on `fit`."""
    known = msae.EmbeddingStore.open(fit, modality="image")
    new = msae.EmbeddingStore.open(judged, modality="image")
    classes = {name: i for i, name in enumerate(sorted(set(known.column(labels)) & set(new.column(labels))))}
    best = f1_table(*counts(sae, known, labels, classes, k)).argmax(1)
    return float(f1_table(*counts(sae, new, labels, classes, k))[np.arange(len(classes)), best].mean())


def counts(
    sae: msae.SAE, store: msae.EmbeddingStore, labels: str, classes: dict[str, int], k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows by class and firing latent, rows by class, rows by firing latent."""
    fires = []
    for x in standardised(sae, store):
        values, latents = sae.pre_activations(x).topk(k, dim=1)
        on = (values > 0).numpy()
        rows = np.broadcast_to(np.arange(len(x))[:, None], on.shape)[on]
        fires.append(sp.csr_array((np.ones(on.sum()), (rows, latents.numpy()[on])), shape=(len(x), sae.d_sae)))
    firing = sp.vstack(fires).tocsr()
    codes = np.array([classes.get(label, -1) for label in store.column(labels)])
    rows = np.flatnonzero(codes >= 0)
    member = sp.csr_array((np.ones(len(rows)), (codes[rows], rows)), shape=(len(classes), len(store)))
    both = (member @ firing).toarray()
    return both, np.asarray(member.sum(1)).ravel(), np.asarray(firing.sum(0)).ravel()


def f1_table(both: np.ndarray, n_class: np.ndarray, n_fires: np.ndarray) -> np.ndarray:
    return 2 * both / np.maximum(n_class[:, None] + n_fires[None, :], 1)


# What is no SAE ----------------------------------------------------------------------------------------------------


def pca(fit: str, judged: str, seed: int, _: argparse.Namespace) -> dict[str, Any]:
    """Principal components; of each row the k coordinates of the largest size are kept."""
    from sklearn.decomposition import PCA

    return kept_coordinates(PCA(random_state=seed), fit, judged)


def ica(fit: str, judged: str, seed: int, _: argparse.Namespace) -> dict[str, Any]:
    """Independent components, as many as dimensions; of each row the k that contribute most are kept."""
    from sklearn.decomposition import FastICA

    return kept_coordinates(FastICA(whiten="unit-variance", max_iter=100, random_state=seed), fit, judged)


def kept_coordinates(model: Any, fit: str, judged: str) -> dict[str, Any]:
    known, new = (rows.astype(np.float64) for rows in rows_of(fit, judged))  # ICA overflows in float32
    model.fit(known)
    codes = model.transform(new)
    atoms = model.inverse_transform(np.eye(codes.shape[1])) - model.inverse_transform(np.zeros((1, codes.shape[1])))
    offset = model.inverse_transform(np.zeros((1, codes.shape[1])))
    return strongest_kept(new, codes, atoms, offset)


def nmf(fit: str, judged: str, seed: int, _: argparse.Namespace) -> dict[str, Any]:
    """Nonnegative factors, as many as dimensions, of each row's parts above and below the mean."""
    from sklearn.decomposition import NMF

    known, new = rows_of(fit, judged)
    known = known[np.random.default_rng(seed).choice(len(known), min(NMF_ROWS, len(known)), replace=False)]
    two_parts = [np.hstack([x.clip(0), (-x).clip(0)]) for x in (known, new)]
    model = NMF(known.shape[1], init="nndsvda", max_iter=60, random_state=seed)
    model.fit(two_parts[0])
    d_in = known.shape[1]
    atoms = model.components_[:, :d_in] - model.components_[:, d_in:]
    return strongest_kept(new, model.transform(two_parts[1]), atoms, np.zeros((1, d_in)))


def pursuit(fit: str, judged: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Orthogonal matching pursuit on the decoder rows of the default's SAE of the same seed, 1,000 rows."""
    from sklearn.linear_model import orthogonal_mp_gram

    run = f"{arguments.what}-default-x{arguments.expansion:g}-e{arguments.epochs}-s{seed}"
    sae = msae.SAE.load(arguments.work / "runs" / run)
    _, new = rows_of(fit, judged)
    new = new[np.random.default_rng(seed).choice(len(new), 1000, replace=False)]
    atoms = sae.W_dec.detach().numpy().astype(np.float64)
    centred = new - sae.b_dec.detach().numpy()
    gram, against = atoms @ atoms.T, atoms @ centred.T
    errors = {}
    for k in [k for k in KEPT if 8 <= k <= 128]:
        codes = orthogonal_mp_gram(gram, against, n_nonzero_coefs=k)
        errors[str(k)] = error_of(new, centred - codes.T @ atoms)
    return no_firing(errors, len(atoms), len(new))


FACTORS: dict[str, Callable[[str, str, int, argparse.Namespace], dict[str, Any]]] = {
    "pca": pca, "ica": ica, "nmf": nmf, "pursuit": pursuit,
}  # fmt: skip


def rows_of(fit: str, judged: str) -> list[np.ndarray]:
    """The two stores' image embeddings as the SAEs see them: standardised by the first."""
    known, new = (msae.EmbeddingStore.open(path, modality="image") for path in (fit, judged))
    sae = msae.SAE(msae.SAEConfig(d_in=known.d_in, d_sae=known.d_in, kind="relu"))
    sae.standardizer = View(Run.open(sae), known, "image").standardizer
    return [torch.cat(list(standardised(sae, store))).numpy() for store in (known, new)]


def strongest_kept(x: np.ndarray, codes: np.ndarray, atoms: np.ndarray, offset: np.ndarray) -> dict[str, Any]:
    """FVU with only the k codes of each row whose atoms contribute most; all codes are kept as they are."""
    size = np.abs(codes) * np.linalg.norm(atoms, axis=1)
    order = np.argsort(-size, axis=1)
    errors = {}
    for k in [k for k in KEPT if k < codes.shape[1]] + [codes.shape[1]]:
        kept = np.zeros_like(codes)
        np.put_along_axis(kept, order[:, :k], np.take_along_axis(codes, order[:, :k], axis=1), axis=1)
        errors[str(k)] = error_of(x, x - kept @ atoms - offset)
    return no_firing(errors, codes.shape[1], len(x))


def error_of(x: np.ndarray, residual: np.ndarray) -> float:
    return float((np.square(residual).sum(1) / np.square(x).sum(1)).mean())


def no_firing(errors: dict[str, float], d_sae: int, n: int) -> dict[str, Any]:
    """A record without what only latents have."""
    return {"fvu_per_sample": errors, "l0": None, "never_in_top_64": None, "d_sae": d_sae, "class_f1": None,
            "n_judged": n}  # fmt: skip


def write_tables(work: Path) -> None:
    titles = {
        "choose": "On 5,000 rows held out of the training rows; recipes were chosen here.",
        "score": "On the test rows, with the recipes that were chosen.",
    }
    parts = []
    for what, title in titles.items():
        records = [json.loads(file.read_text()) for file in sorted(work.glob(f"{what}-*.json"))]
        if records:
            parts.append(f"{title}\n\n{table(records)}")
    scored = [json.loads(file.read_text()) for file in sorted(work.glob("score-*-x8-e10-*.json"))]
    if scored:
        draw(scored)
        parts.append(f"![error against latents kept](figures/{FIGURE.name})")
    write_section("frontier", "One SAE at every number of latents kept", "\n\n".join(parts))


def draw(records: list[dict[str, Any]]) -> None:
    """Three pictures: error against latents kept, error against sparsity with all latents, class F1; spread over seeds.

    A recipe for any k is a line, an SAE trained for one k a point at that k.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "msae"  # the same figure gives the same bytes
    import matplotlib.pyplot as plt

    figure, (by_k, by_sparsity, f1) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained", width_ratios=(3, 2, 2))
    by_recipe = {name: [one for one in records if one["recipe"] == name] for name in RECIPES}
    by_recipe = {name: found for name, found in by_recipe.items() if found}
    own: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for name, found in by_recipe.items():
        kept = [k for k in KEPT if str(k) in found[0]["fvu_per_sample"]]
        errors = np.array([[one["fvu_per_sample"][str(k)] for k in kept] for one in found])
        kind, _, rest = name.partition("-")
        if kind in ("topk", "batchtopk", "jumprelu", "widths"):
            k = int(rest.split("-")[0])
            column = errors[:, kept.index(k)]
            own.setdefault((kind, k), []).append((float(column.mean()), float(np.ptp(column) / 2)))
            continue
        line = by_k.plot(kept, errors.mean(0), marker=".", label=name)[0]
        by_k.fill_between(kept, errors.min(0), errors.max(0), color=line.get_color(), alpha=0.3)
    for kind in dict.fromkeys(kind for kind, _ in own):
        best = {k: min(found) for (one, k), found in sorted(own.items()) if one == kind}
        by_k.errorbar(
            list(best), [mean for mean, _ in best.values()], yerr=[spread for _, spread in best.values()],
            fmt={"topk": "kx", "batchtopk": "k+", "jumprelu": "k1", "widths": "k2"}[kind], label=f"{kind}, for that k",
        )  # fmt: skip
    by_k.set(xscale="log", yscale="log", xlabel="latents kept in a row", ylabel="share of the variance that is lost")
    by_k.set_ylim(0.004, 1.1)  # all components together lose nothing but rounding
    by_k.set_xticks(KEPT, [str(k) for k in KEPT], rotation=45)
    firing = {name: found for name, found in by_recipe.items() if found[0]["class_f1"] is not None}
    for i, (name, found) in enumerate(firing.items()):
        sparsity = [1 - one["l0"] / one["d_sae"] for one in found]
        lost = [one["fvu_per_sample"][str(one["d_sae"])] for one in found]
        by_sparsity.plot(sparsity, lost, "o", color=f"C{i % 10}", ms=4)
        by_sparsity.annotate(
            name, (np.mean(sparsity), np.mean(lost)), fontsize=6, xytext=(3, 2), textcoords="offset points"
        )
        values = [max(one["class_f1"].values()) for one in found]
        f1.barh(name, np.mean(values), xerr=np.ptp(values) / 2, color=f"C{i % 10}")
    by_sparsity.set(
        yscale="log", xlabel="sparsity, every positive latent active", ylabel="share of the variance that is lost"
    )
    f1.set(xlabel="class F1 of the best single latent")
    f1.invert_yaxis()
    f1.tick_params(labelsize=7)
    for axes in (by_k, by_sparsity):
        axes.grid(alpha=0.3)
    by_k.legend(fontsize=8)
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)


def table(records: list[dict[str, Any]]) -> str:
    """A line for each recipe: means over its seeds, and the spread of the error at 64 kept."""
    kept = ("8", "16", "32", "64", "128", "256", "512")
    lines = [
        "FVU per sample with the k strongest latents kept; *never*: share of the latents that no row has among its 64 "
        "strongest; *F1*: of the one latent that fits a class best.",
        "",
        f"| recipe | seeds | {' | '.join(f'k {k}' for k in kept)} | all | active | never | F1 | CPU s |",
        "|---" * (len(kept) + 7) + "|",
    ]
    order = list(RECIPES)
    budgets = sorted({(r["expansion"], r["epochs"] or 10, order.index(r["recipe"])) for r in records})
    for expansion, epochs, place in budgets:
        own = [
            record for record in records
            if (record["expansion"], record["epochs"] or 10, record["recipe"]) == (expansion, epochs, order[place])
        ]  # fmt: skip
        name = order[place] + f" ({epochs} epochs)" * (epochs != 10) + f" (expansion {expansion:g})" * (expansion != 8)
        columns = (*kept, str(own[0]["d_sae"]))
        errors = [np.array([record["fvu_per_sample"].get(k, np.nan) for record in own]) for k in columns]
        cells = ["-" if np.isnan(value).any() else f"{value.mean():.4f}" for value in errors]
        if len(own) > 1:
            cells[kept.index("64")] += f" ± {errors[kept.index('64')].std(ddof=1):.4f}"
        firing = "- | - | -"
        if own[0]["class_f1"] is not None:
            active = np.mean([record["l0"] for record in own])
            never = np.mean([record["never_in_top_64"] / record["d_sae"] for record in own])
            f1 = np.mean([max(record["class_f1"].values()) for record in own])
            firing = f"{active:.0f} | {never:.1%} | {f1:.3f}"
        seconds = np.mean([record["cpu_seconds"] for record in own])
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} | {firing} | {seconds:.0f} |")
    return "\n".join(lines)


def show(record: dict[str, Any]) -> None:
    kept = "  ".join(f"{k}: {value:.4f}" for k, value in record["fvu_per_sample"].items() if int(k) >= 8)
    firing = ""
    if record["class_f1"] is not None:
        best = max(record["class_f1"].values())
        firing = f"l0 {record['l0']:.0f}  never {record['never_in_top_64']}  F1 {best:.3f}"
    print(
        f"{record['recipe']:22s} seed {record['seed']}  {kept}  {firing}  {record['cpu_seconds']:.0f} CPU s", flush=True
    )


if __name__ == "__main__":
    main()
