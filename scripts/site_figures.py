"""Draw docs/how-*.svg, the pictures of the page *How it works*, from a demo's world.

python scripts/site_figures.py --demo msae-demo
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image

import msae
from msae.concepts.evidence import best_cosines, random_like
from msae.sae.view import View

BLUE, ORANGE, GREY = "#3f51b5", "#e65100", "#9e9e9e"
LEVELS = (2, 4, 8, 16)
OTHERS = ("topk-16", "topk-64")


class World(NamedTuple):
    """What the figures are drawn from."""

    demo: Path
    row: str
    store: msae.EmbeddingStore
    sae: msae.SAE
    names: msae.ConceptNames
    x: torch.Tensor
    """Standardised rows."""
    h: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="the folder that msae demo made")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--row", default="10006003")
    options = parser.parse_args()
    mpl.rcParams |= {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "msae",
        "axes.titlesize": 9.5, "axes.titlelocation": "left", "legend.frameon": False,
    }  # fmt: skip
    run = options.demo / "runs" / "msae"
    store = msae.EmbeddingStore.open(options.demo / "holdout.store")
    names, sae = msae.ConceptNames.load(run), msae.SAE.load(run)
    view = View(run, store, "image")
    x = view.standardize(torch.from_numpy(store.take(np.arange(len(store)), "image")))
    h = sae.pre_activations(x).detach()
    world = World(options.demo, options.row, store, sae, names, x, h)
    for draw, file in ((levels, "levels"), (thresholds, "thresholds"), (evidence, "names")):
        figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.1), layout="constrained")
        draw(axes, world)
        figure.savefig(options.out / f"how-{file}.svg", metadata={"Date": None})
        plt.close(figure)


def levels(axes, world: World) -> None:
    """A picture's strongest latents by level; the error when only the k strongest are kept."""
    _, row_id, store, sae, names, _, h = world
    row = store.ids.row_of(row_id)
    z = sae.activate(h[row : row + 1], inference="topk", k=max(LEVELS))[0]
    order = z.argsort(descending=True)[: max(LEVELS)].tolist()
    bars, curve = axes
    bars.bar(range(len(order)), z[order].numpy(), color=BLUE, width=0.7)
    top = float(z.max())
    for level, place in zip(LEVELS, (1.32, 1.22, 1.12, 1.02), strict=True):
        bars.plot([-0.5, level - 0.5, level - 0.5], [place * top, place * top, 0], color=ORANGE, lw=1)
        bars.text(level - 0.6, place * top, f"level {level}", ha="right", va="bottom", fontsize=7.5, color=ORANGE)
    labels = [names.name_of(latent) or f"#{latent}" for latent in order]
    bars.set_xticks(range(len(order)), labels, rotation=55, ha="right", rotation_mode="anchor", fontsize=7.5)
    bars.set(ylabel="activation", ylim=(0, 1.42 * top), title="What is strongest in one picture")
    inset = bars.inset_axes((0.72, 0.24, 0.26, 0.42))
    inset.imshow(Image.open(store[row].path).resize((128, 128)))
    inset.axis("off")
    for name, colour, style in zip(("msae", *OTHERS), (BLUE, ORANGE, GREY), ("-", "--", ":"), strict=True):
        record = msae.evaluate(world.demo / "runs" / name, store, recovery=True).recovery
        kept = [point for point in record if point.k <= 64]
        curve.plot(
            [p.k for p in kept], [p.fvu_per_sample for p in kept], style, color=colour, marker="o", ms=3, label=name
        )
    curve.set_xscale("log", base=2)
    curve.xaxis.set_major_formatter("{x:g}")
    curve.set(xlabel="latents kept in each row", ylabel="share of the variance lost", ylim=0)
    curve.set_title("One SAE for every k, and one for each")
    curve.legend()


def thresholds(axes, world: World) -> None:
    """The pre-activations of one latent with its threshold; how many latents a row has."""
    _, _, store, sae, names, _, h = world
    red = max(names["red"], key=lambda latent: names.concept_of(latent).cosine)
    has_red = np.array(["red" in (colours or "").split(", ") for colours in store.column("colours")])
    z = sae.activate(h)
    active = h[:, red][z[:, red] > 0]
    values, threshold = h[:, red].numpy(), float(active.min())
    hist, count = axes
    bins = np.linspace(values.min(), values.max(), 60)
    for rows, colour, label in ((~has_red, GREY, "nothing red"), (has_red, ORANGE, "something red")):
        hist.hist(values[rows], bins, color=colour, alpha=0.8, label=label)
    hist.axvline(threshold, color="black", lw=1)
    hist.text(threshold + 0.2, hist.get_ylim()[1] * 0.4, "threshold:\nactive from here on", fontsize=8)
    hist.set(yscale="log", xlabel="pre-activation", ylabel="pictures", title=f"Latent {red}, named red")
    hist.legend(loc="upper left", fontsize=8)
    n = (z > 0).sum(1).numpy()
    count.hist(n, np.arange(n.max() + 2) - 0.5, color=BLUE, rwidth=0.85)
    count.axvline(n.mean(), color="black", lw=1)
    count.text(n.mean() + 0.2, count.get_ylim()[1] * 0.93, f"mean {n.mean():.1f}", fontsize=8)
    count.set(xlabel="active latents", ylabel="pictures", title="How many latents are active in a picture")


def evidence(axes, world: World) -> None:
    """Nearest words against chance; a word's likeness to pictures against its latent's activation."""
    demo, _, store, sae, names, x, h = world
    words = msae.EmbeddingStore.open(demo / "words.store")
    vectors = words.take(np.arange(len(words)), "text")
    vectors = unit(vectors - vectors.mean(0))
    alive = (sae.activate(h) > 0).any(0).numpy()
    rows = sae.W_dec.detach().numpy()[alive]
    near = best_cosines(unit(rows), vectors)
    chance = best_cosines(unit(random_like(rows, 20_000, np.random.default_rng(0))), vectors)
    hist, points = axes
    bins = np.linspace(min(near.min(), chance.min()), 1, 50)
    for values, colour, label in ((chance, GREY, "random directions"), (near, BLUE, "latents")):
        hist.hist(values, bins, weights=np.full(len(values), 1 / len(values)), color=colour, alpha=0.75, label=label)
    hist.set(xlabel="cosine of the nearest word", ylabel="share", title="1. Nearer than chance?")
    hist.legend()
    night = max(names["night"], key=lambda latent: names.concept_of(latent).cosine)
    z = sae.activate(h)[:, night].numpy()
    likeness = unit(x.numpy()) @ vectors[words.column("caption").index("night")]
    is_night = np.array(store.column("background")) == "night"
    for rows_, colour, label in ((~is_night, GREY, "by day"), (is_night, BLUE, "at night")):
        points.scatter(likeness[rows_], z[rows_], 4, color=colour, alpha=0.6, label=label)
    points.set(xlabel="likeness of the picture to the word night", ylabel="activation")
    points.set_title(f"3. Do pictures agree? Latent {night}")
    points.legend()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
