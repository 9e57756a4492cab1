"""How well latents recover the known attributes of the demo's scenes, and whether their names are right.

python benchmarks/concept_recovery.py --out FOLDER [--first-scene N] [--kinds KIND ...] [--section NAME]

Scenes whose truth is known go through the demo's CLIP. On scenes to train on, each method's best score for each
attribute is chosen; on scenes to judge by, it is measured. A third set of scenes gives the captions of `msae name
--on`, so that a name is never judged by the rows that confirmed it. FOLDER keeps stores and runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from msae.base.statistics import aurocs as all_aurocs
from msae.base.statistics import wilson
from msae.concepts import evidence
from msae.concepts.names import ConceptNames
from msae.concepts.naming import NameSettings, name, read_words
from msae.data.arrays import unit_rows
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.sae.model import SAE
from msae.sae.run import Run
from msae.sae.train import train
from msae.world.chain import NAMED_RUN, RUNS
from msae.world.scenes import ATTRIBUTES, UNSEEN_SEEDS, VOCABULARY
from names_on_pictures import null_of
from results import FIGURES, write_section

SCENES = {"train": 12_000, "captions": 3_000, "judge": 3_000}
FIRST_SCENE = UNSEEN_SEEDS.start + 1_000_000  # not the scenes of `msae demo`
SEEDS = (0, 1, 2)
WIDTHS = (256, 1024)
KINDS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "demo": RUNS[NAMED_RUN],
    "faithful": {"recipe": "faithful"},
    "TopK 16": {"kind": "topk", "k": 16},
    "BatchTopK 16": {"kind": "batchtopk", "k": 16},
    "JumpReLU 16": {"kind": "jumprelu", "k": 16},
    "ReLU .003": {"kind": "relu", "l1": 0.003},
}
DEFAULT = ("default", "demo")
"""Those with the default recipe; the demo's has thresholds for fewer active latents."""
COMMON: Mapping[str, Any] = {"epochs": 20, "batch_size": 64, "recipe": "default"}
SAME = {
    "small": ("tiny", "little"), "medium": ("medium-sized",), "large": ("big", "huge"), "dotted": ("spotted",),
    "checked": ("checkered",), "2": ("two", "pair"), "3": ("three", "group"), "above": ("over", "under", "below"),
    "left of": ("left", "right"),
}  # fmt: skip
"""Other words that the captions use for a value."""
DISTRACTORS = (
    "picture", "image", "drawing", "background", "against", "inside", "and", "the", "with", "without", "thing",
    "object", "shape", "by", "another", "wall", "wearing", "casting", "of", "on", "at", "to",
)  # fmt: skip
"""Words of the captions that are no attribute's name."""
TOP, PURE = 30, 0.8
"""A latent stands for a value when this share of the scenes that activate it most have it."""
COLOURS_AND_BACKGROUNDS = ("colour", "background")
BARS: Mapping[str, Mapping[str, float]] = {
    "pictures": {"right": 0.92, "best": 0.8},
    "captions": {"right": 0.95, "best": 0.9},
}
"""The smallest shares of right names that are wanted (docs/preregistered.md)."""
VALUES = 24
"""Values that an SAE of the default recipe shall name rightly."""


class Target(NamedTuple):
    """One value of one attribute."""

    attribute: str
    value: str


class Scores(NamedTuple):
    """What a method gives for every target."""

    auroc: dict[Target, float]
    f1: dict[Target, float]


class World(NamedTuple):
    """The stores, and what is true of their rows."""

    stores: dict[str, EmbeddingStore]
    truth: dict[str, dict[Target, np.ndarray]]
    words: dict[str, Target | None]


# --- The world


def open_world(folder: Path, first_scene: int = FIRST_SCENE) -> World:
    """The scenes of the benchmark, rendered and embedded where that is not done yet."""
    words = vocabulary_words()
    if not (folder / "words.store").exists():
        make_world(folder, list(words), first_scene)
    stores = {key: EmbeddingStore.open(folder / f"{key}.store") for key in (*SCENES, "words")}
    if (found := stores["train"].ids[0]) != str(first_scene):
        raise SystemExit(f"{folder} begins with scene {found}, wanted {first_scene}; give another --out")
    return World(stores, {key: truth_of(stores[key]) for key in SCENES}, words)


def make_world(folder: Path, words: list[str], first: int) -> None:
    from msae.data.embed import embed
    from msae.world.chain import write_scenes

    for key, n in SCENES.items():
        write_scenes(folder / key, range(first, first + n))
        first += n
        embed(folder / key / "scenes.csv", encoder="demo", out=folder / f"{key}.store", batch_size=256)
    (folder / "words.txt").write_text("\n".join(words) + "\n")
    embed(folder / "words.txt", encoder="demo", out=folder / "words.store")


def vocabulary_words() -> dict[str, Target | None]:
    """The plainest word of every value, what the captions also call it, and words that name nothing."""
    words: dict[str, Target | None] = {}
    for attribute, values in VOCABULARY.items():
        for value, ways in values.items():
            for word in (ways[0], *SAME.get(str(value), ())):
                words[word] = Target(attribute, str(value))
    return {**words, **dict.fromkeys(DISTRACTORS)}


def truth_of(store: EmbeddingStore) -> dict[Target, np.ndarray]:
    """Which rows have each value; a scene has the colour, shape … of each of its objects."""
    truth = {}
    for attribute, values in ATTRIBUTES.items():
        plural = f"{attribute}s"
        listed = plural in store.columns
        cells = [str(cell) for cell in store.column(plural if listed else attribute)]
        for value in values:
            rows = [str(value) in (cell.split(", ") if listed else [cell]) for cell in cells]
            truth[Target(attribute, str(value))] = np.array(rows)
    return truth


# --- What a method's scores are worth


def recover(train_scores: np.ndarray, judge_scores: np.ndarray, world: World, *, both_signs: bool = False) -> Scores:
    """For each target the column that separates best on the scenes to train on, measured on those to judge by."""
    chosen = best_columns(train_scores, world.truth["train"], both_signs=both_signs)
    aurocs, f1s = {}, {}
    for target, (column, sign) in chosen.items():
        judged = sign * judge_scores[:, column]
        aurocs[target] = auroc(judged, world.truth["judge"][target])
        threshold = best_threshold(sign * train_scores[:, column], world.truth["train"][target])
        f1s[target] = f1(judged > threshold, world.truth["judge"][target])
    return Scores(aurocs, f1s)


def best_columns(
    scores: np.ndarray, truth: Mapping[Target, np.ndarray], *, both_signs: bool
) -> dict[Target, tuple[int, int]]:
    values = all_aurocs(scores, [np.flatnonzero(rows) for rows in truth.values()])
    chosen = {}
    for i, target in enumerate(truth):
        high, low = int(values[:, i].argmax()), int(values[:, i].argmin())
        flip = both_signs and 1 - values[low, i] > values[high, i]
        chosen[target] = (low, -1) if flip else (high, 1)
    return chosen


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    return float(all_aurocs(scores[:, None], [np.flatnonzero(truth)])[0, 0])


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The threshold with the best F1."""
    order = np.argsort(-scores, kind="stable")
    hits = truth[order].cumsum()
    f1s = 2 * hits / (np.arange(1, len(hits) + 1) + truth.sum())
    last = int(f1s.argmax())
    return float(scores[order[last + 1]]) if last + 1 < len(order) else -np.inf


def f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (predicted & truth).sum() / max(1, predicted.sum() + truth.sum()))


def pure_latents(z: np.ndarray, truth: Mapping[Target, np.ndarray]) -> int:
    """Latents whose most active scenes share a value that at most half of all scenes have."""
    share = np.stack([found for target, found in shares_in_top(z, truth).items() if truth[target].mean() <= 0.5])
    return int(((share.max(0) >= PURE) & (np.sort(z, axis=0)[-TOP] > 0)).sum())


# --- Names


def true_targets(z: np.ndarray, truth: Mapping[Target, np.ndarray]) -> list[Target]:
    """What each latent stands for: the value that its activation separates best."""
    values = all_aurocs(z, [np.flatnonzero(rows) for rows in truth.values()])
    targets = list(truth)
    return [targets[int(i)] for i in values.argmax(1)]


def shares_in_top(z: np.ndarray, truth: Mapping[Target, np.ndarray]) -> dict[Target, np.ndarray]:
    """For each value, the share of each latent's most active scenes that have it."""
    top = np.argsort(-z, axis=0, kind="stable")[:TOP]
    return {target: rows[top].mean(0) for target, rows in truth.items()}


def judge_names(names: ConceptNames, z: np.ndarray, world: World) -> dict[str, Any]:
    """How many names are right, in two senses.

    `right`: at least `PURE` of the scenes that activate the latent most have the named value (and not half of all
    scenes do). `best`: the latent's AUROC is higher for the named value than for any other value of any attribute;
    that is stricter than it looks, as a lone object also shows its colour most clearly, so that count competes.
    """
    truth = world.truth["judge"]
    meant, shares = true_targets(z, truth), shares_in_top(z, truth)
    right, best, wrong = [], [], []
    for concept in names:
        named = {world.words[word] for word in (concept.name, *concept.synonyms)} - {None}
        held = [t for t in named if t and shares[t][concept.latent] >= PURE and truth[t].mean() <= 0.5]
        best += [meant[concept.latent]] if meant[concept.latent] in named else []
        right += held[:1]
        if not held:
            wrong.append((concept.latent, concept.name, meant[concept.latent].value))
    return {
        "named": len(names),
        "right": len(right),
        "precision": len(right) / len(names) if len(names) else None,
        "best": len(best),
        "values": len(set(right)),
        "of_14": sum(target.attribute in COLOURS_AND_BACKGROUNDS for target in set(right)),
        "wrong": wrong,
    }


def name_and_judge(sae: SAE, run: Path, world: World) -> dict[str, dict[str, Any]]:
    z = activations(sae, world.stores["judge"])
    words, captions = world.stores["words"], world.stores["captions"]
    rules: dict[str, dict[str, Any]] = {
        "poster": {"rule": "poster"},
        "nearest word": {},
        "pictures": {"on": without_captions(captions, run.parent)},
        "captions": {"on": captions},
    }
    return {
        key: judge_names(name(sae, words, out=run / f"{key.replace(', ', '-')}.json", **options), z, world)
        for key, options in rules.items()
    }


def without_captions(store: EmbeddingStore, folder: Path) -> Path:
    """The images of a store as bare vectors."""
    path = folder / "bare.npy"
    if not path.exists():
        np.save(path, store.take(np.arange(len(store)), "image"))
    return path


def nulls(sae: SAE, world: World, folder: Path) -> dict[str, float]:
    """The share of latents named where there is nothing to name; at most .05 is wanted."""
    words, captions = world.stores["words"], world.stores["captions"]
    texts = words.column("caption")
    rows = words.take(np.arange(len(words)), "text")
    shares: dict[str, list[float]] = {
        "random decoder": [], "random words": [], "shuffled rows, pictures": [], "permuted words, captions": []
    }  # fmt: skip
    known = read_words(sae, words, NameSettings())
    bare = without_captions(captions, folder / "runs")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        random = SAE(sae.config, sae.standardizer, seed=seed).eval()
        shares["random decoder"].append(len(name(random, words, out=folder / "n.json")) / sae.d_sae)
        mean = rows.mean(0)
        like = evidence.random_like(rows - mean, len(rows), rng) * np.linalg.norm(rows - mean, axis=1).mean() + mean
        fake = as_words(folder / "random.store", like, texts, words)
        shares["random words"].append(len(name(sae, fake, out=folder / "n.json")) / sae.d_sae)
        shuffled = null_of(Run.open(sae), known, bare, rng, n_latents=sae.d_sae)
        shares["shuffled rows, pictures"].append(shuffled)
        mixed = as_words(folder / "permuted.store", rows, list(rng.permutation(texts)), words)
        found = name(sae, mixed, on=captions, out=folder / "n.json")
        shares["permuted words, captions"].append(len(found) / sae.d_sae)
    return {key: float(np.mean(values)) for key, values in shares.items()}


def as_words(folder: Path, rows: np.ndarray, texts: list[str], like: EmbeddingStore) -> EmbeddingStore:
    import pyarrow as pa

    shutil.rmtree(folder, ignore_errors=True)
    table = pa.table({"id": [str(i) for i in range(len(texts))], "caption": [str(text) for text in texts]})
    return write_store(folder, [StorePart({"text": rows.astype(np.float32)}, table)], record=dict(like.record))


# --- The methods


def activations(sae: SAE, store: EmbeddingStore) -> np.ndarray:
    return np.concatenate([
        sae.encode(torch.from_numpy(x), "image", inference="relu").numpy() for x in store.batches("image", 1024)
    ])  # fmt: skip


def plain_methods(world: World) -> dict[str, Scores]:
    """Opponents that need no SAE, and the text direction, which needs no training at all."""
    from sklearn.decomposition import PCA

    fit, judge = (world.stores[key].take(np.arange(len(world.stores[key])), "image") for key in ("train", "judge"))
    mean = fit.mean(0)
    pca = PCA(random_state=0).fit(fit)
    dictionary = unit_rows(np.random.default_rng(0).standard_normal((1024, fit.shape[1])).astype(np.float32))
    return {
        "text direction": text_directions(fit, judge, world),
        "linear probe": linear_probes(fit - mean, judge - mean, world),
        "raw coordinates": recover(fit, judge, world, both_signs=True),
        "PCA": recover(pca.transform(fit), pca.transform(judge), world, both_signs=True),
        "random dictionary 1024": recover((fit - mean) @ dictionary.T, (judge - mean) @ dictionary.T, world),
    }


def text_directions(fit: np.ndarray, judge: np.ndarray, world: World) -> Scores:
    """The cosine of each scene with the attribute's own plainest word."""
    store = world.stores["words"]
    rows = unit_rows(store.take(np.arange(len(store)), "text"))
    own = {target: VOCABULARY[target.attribute][value][0] for target, value in targets_with_values()}
    texts = store.column("caption")
    place = np.array([texts.index(own[target]) for target in world.truth["judge"]])
    directions = rows[place] - rows.mean(0)
    aurocs, f1s = {}, {}
    for direction, (target, truth) in zip(directions, world.truth["judge"].items(), strict=True):
        aurocs[target] = auroc(judge @ direction, truth)
        threshold = best_threshold(fit @ direction, world.truth["train"][target])
        f1s[target] = f1(judge @ direction > threshold, truth)
    return Scores(aurocs, f1s)


def targets_with_values() -> list[tuple[Target, Any]]:
    return [(Target(attribute, str(value)), value) for attribute, values in ATTRIBUTES.items() for value in values]


def linear_probes(fit: np.ndarray, judge: np.ndarray, world: World) -> Scores:
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt(fit.shape[1]) / np.linalg.norm(fit, axis=1).mean()
    aurocs, f1s = {}, {}
    for target, truth in world.truth["judge"].items():
        probe = LogisticRegression(max_iter=300).fit(fit * scale, world.truth["train"][target])
        scores = probe.decision_function(judge * scale)
        aurocs[target] = auroc(scores, truth)
        threshold = best_threshold(probe.decision_function(fit * scale), world.truth["train"][target])
        f1s[target] = f1(scores > threshold, truth)
    return Scores(aurocs, f1s)


def run_of(kind: str, width: int, seed: int, folder: Path, world: World) -> tuple[SAE, Path]:
    out = folder / "runs" / f"{kind.replace(' ', '-').lower()}-{width}-{seed}"
    options = {**COMMON, **KINDS[kind], "d_sae": width, "seed": seed}
    return train(world.stores["train"], out=out, resume=True, **options), out


# --- The tables


def by_attribute(scores: list[Scores], key: str) -> dict[str, float]:
    """Mean over the values of each attribute, and over the seeds."""
    return {
        attribute: float(
            np.mean([value for s in scores for target, value in getattr(s, key).items() if target[0] == attribute])
        )
        for attribute in ATTRIBUTES
    }


def table(head: list[str], rows: list[list[Any]]) -> str:
    cells = [[f"{c:.2f}".lstrip("0") if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def recovery_table(results: Mapping[str, list[Scores]], key: str) -> str:
    rows = []
    for method, scores in results.items():
        means = by_attribute(scores, key)
        spread = np.std([np.mean(list(getattr(s, key).values())) for s in scores])
        rows.append([method, *means.values(), float(np.mean(list(means.values()))), float(spread)])
    return table(["method", *ATTRIBUTES, "mean", "std over seeds"], rows)


def bars_table(judged: Mapping[str, list[dict[str, dict[str, Any]]]], empty: Mapping[str, dict[str, float]]) -> str:
    """What was to be shown, for each rule: names of all seeds together, with Wilson's interval of the shares."""
    head = ["SAE", "rule", "right / named", "right", "best", "fewest values", "null", "bars"]
    rows: list[list[Any]] = []
    for method, seeds in judged.items():
        for rule, bar in BARS.items():
            named, right, best = (sum(seed[rule][key] for seed in seeds) for key in ("named", "right", "best"))
            fewest = min(seed[rule]["values"] for seed in seeds)
            null = max(share for kind, share in empty[method].items() if kind.endswith(rule) or "," not in kind)
            bars = {
                "right": right >= bar["right"] * named > 0,
                "best": best >= bar["best"] * named > 0,
                "values": fewest >= VALUES or not method.startswith(DEFAULT),
                "null": null <= 0.05,
            }
            missed = [bar for bar, is_met in bars.items() if not is_met]
            shares = [share_with_interval(n, named) for n in (right, best)]
            verdict = f"missed: {', '.join(missed)}" if missed else "met"
            rows.append([method, rule, f"{right} / {named}", *shares, fewest, f"{null:.3f}", verdict])
    return table(head, rows)


def share_with_interval(successes: int, trials: int) -> str:
    low, high = (float(end) for end in wilson(np.array(successes), np.array(trials)))
    return f"{successes / trials:.3f} ({low:.3f}-{high:.3f})" if trials else "-"


def names_table(judged: Mapping[str, list[dict[str, dict[str, Any]]]], pure: Mapping[str, list[int]]) -> str:
    head = ["SAE", "pure latents", "rule", "named", "right", "precision", "best", "values named rightly", "of the 14"]
    rows: list[list[Any]] = []
    for method, seeds in judged.items():
        for rule in seeds[0]:
            keys = ("named", "right", "best", "values", "of_14")
            named, right, best, values, of_14 = (float(np.mean([seed[rule][key] for seed in seeds])) for key in keys)
            precision = f"{right / named:.3f}" if named else "-"
            counts = [f"{named:.1f}", f"{right:.1f}", precision, f"{best:.1f}", f"{values:.1f}", f"{of_14:.1f}"]
            rows.append([method, f"{np.mean(pure[method]):.0f}", rule, *counts])
    return table(head, rows)


def plot(results: Mapping[str, list[Scores]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "msae"  # the same figure gives the same bytes
    import matplotlib.pyplot as plt

    grid = np.array([list(by_attribute(scores, "auroc").values()) for scores in results.values()])
    figure, axis = plt.subplots(figsize=(9, 0.36 * len(results) + 1.4), layout="constrained")
    picture = axis.imshow(grid, vmin=0.5, vmax=1, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(ATTRIBUTES)), list(ATTRIBUTES), rotation=30, ha="right")
    axis.set_yticks(range(len(results)), list(results))
    for (y, x), value in np.ndenumerate(grid):
        axis.text(x, y, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.8 else "k", fontsize=8)
    figure.colorbar(picture, label="AUROC of the best score, on scenes to judge by")
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for stores and runs; what is there is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--first-scene", type=int, default=FIRST_SCENE, help="seed of the first scene of three sets")
    parser.add_argument("--section", default="concept-recovery", help="of RESULTS.md, and its figure's name")
    parser.add_argument("--dry", action="store_true", help="print, and leave RESULTS.md alone")
    arguments = parser.parse_args()

    world = open_world(arguments.out, arguments.first_scene)
    results: dict[str, list[Scores]] = {key: [scores] for key, scores in plain_methods(world).items()}
    judged: dict[str, list[dict[str, dict[str, Any]]]] = {}
    pure: dict[str, list[int]] = {}
    empty: dict[str, dict[str, float]] = {}
    for kind in arguments.kinds:
        for width in arguments.widths:
            method = f"{kind}, {width}"
            results[method], judged[method], pure[method] = [], [], []
            for seed in arguments.seeds:
                sae, run = run_of(kind, width, seed, arguments.out, world)
                fit, judge = activations(sae, world.stores["train"]), activations(sae, world.stores["judge"])
                results[method].append(recover(fit, judge, world))
                judged[method].append(name_and_judge(sae, run, world))
                pure[method].append(pure_latents(judge, world.truth["judge"]))
                if seed == arguments.seeds[0]:
                    empty[method] = nulls(sae, world, arguments.out)
            print(method, judged[method][0], empty[method], flush=True)
    scenes = [arguments.first_scene, arguments.first_scene + sum(SCENES.values()) - 1]
    seeds = ", ".join(map(str, arguments.seeds))
    told = f"Scenes {scenes[0]:,} to {scenes[1]:,}; SAE seeds {seeds}."
    report(results, judged, pure, empty, told, section=arguments.section, dry=arguments.dry)


def report(results: Any, judged: Any, pure: Any, empty: Any, told: str, *, section: str, dry: bool) -> None:
    figure = FIGURES / f"{section}.svg"
    null_rows = [[method, *(f"{share:.3f}" for share in shares.values())] for method, shares in empty.items()]
    body = "\n\n".join([
        told,
        "The bars, on the names of all seeds together (95 % intervals, Wilson): *right* at least .92 by pictures alone "
        "and .95 with captions, *best* at least .8 and .9, by the default recipe at least 24 values named rightly in "
        "every seed, at most .05 named where there is nothing to name.",
        bars_table(judged, empty),
        "AUROC of each method's best score for an attribute, a mean over the attribute's values:",
        recovery_table(results, "auroc"),
        f"![AUROC by method and attribute](figures/{figure.name})",
        "F1 of the same scores, threshold chosen on the scenes to train on:",
        recovery_table(results, "f1"),
        f"Names. *Right*: at least {PURE:.0%} of the {TOP} scenes that activate the latent most have the named value, "
        "one that at most half of all scenes have. *Best*: no other value of any attribute has a higher AUROC.",
        names_table(judged, pure),
        "Share of latents named where there is nothing to name (five draws each; .05 is the most allowed):",
        table(["SAE", *next(iter(empty.values()))], null_rows),
    ])  # fmt: skip
    print(body)
    if not dry:
        plot(results, figure)
        (FIGURES / f"{section}.json").write_text(json.dumps({"names": judged, "nulls": empty}, indent=1) + "\n")
        title = "Concepts of the demo's scenes, whose truth is known"
        write_section(section, title if section == "concept-recovery" else f"{title}: {section}", body)


if __name__ == "__main__":
    main()
