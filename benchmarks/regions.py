"""Where in the picture: how often the strongest patch lies in the right object, and what a region costs.

python benchmarks/regions.py hits --out FOLDER [--first-scene N] [--sae-seed N] [--scenes 500] [--covering]
python benchmarks/regions.py time [--pictures 16] [--concepts 8]

hits: scenes of two unlike objects that nobody has seen, drawn for this. For a value that one of the two has and the
other has not, the strongest patch of the concept must lie in that object: at most 1.1 radii from its centre or, for
hats, in a box around the hat. The SAE is the demo's default, trained and named on other scenes; FOLDER keeps it.
Beside it: covering each patch in turn, a latent drawn at random for each question, the best of the latents of an
untrained SAE for each value, and a patch drawn at random.

time: random weights of ViT-B/32's size, seconds for each picture and concept beside the plain forward pass.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from msae.base.statistics import aurocs, wilson
from msae.concepts.concept import ConceptSet
from msae.concepts.names import names_of
from msae.concepts.naming import name
from msae.concepts.regions import BATCH, Concept, OneLatent, Region, regions_in, strengths
from msae.data.embed import embed
from msae.data.embedder import Embedder
from msae.data.store import EmbeddingStore
from msae.measure.evaluate.untrained import untrained_like
from msae.sae.run import Run
from msae.sae.train import train
from msae.sae.view import View
from msae.world import drawing
from msae.world.chain import COMMON, N_SCENES, NAMED_RUN, RUNS, write_scenes
from msae.world.scenes import ATTRIBUTES, PLACE_STREAM, UNSEEN_SEEDS, VOCABULARY, Draws, Scene, sample_scene
from results import FIGURES, write_section

ASKED = ("colour", "texture", "shape", "hat")
FIRST_SCENE = UNSEEN_SEEDS.start + 500_000
JUDGED = 100_000
"""Scenes from the first one to those that judge."""
REACH = 1.1
"""Radii from an object's centre in which its patches lie."""
BARS = {"colour": 0.97, "texture": 0.90, "shape": 0.75, "hat": 0.90}


class Question(NamedTuple):
    """A value that one of the two objects of a scene has."""

    scene: int
    attribute: str
    value: str | bool
    place: tuple[int, int, int]
    """Centre and radius of the object that has it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="what", required=True)
    hits_ = parsers.add_parser("hits")
    hits_.add_argument("--out", type=Path, required=True, help="keeps scenes, stores and the run")
    hits_.add_argument("--first-scene", type=int, default=FIRST_SCENE, help="7,500 train and name, later ones judge")
    hits_.add_argument("--sae-seed", type=int, default=0)
    hits_.add_argument("--scenes", type=int, default=500)
    hits_.add_argument("--section", default="regions", help="of RESULTS.md")
    hits_.add_argument("--covering", action="store_true", help="also cover each patch in turn, which takes long")
    time_ = parsers.add_parser("time")
    time_.add_argument("--pictures", type=int, default=BATCH)
    time_.add_argument("--concepts", type=int, default=8)
    for one in (hits_, time_):
        one.add_argument("--dry", action="store_true", help="print, and leave RESULTS.md alone")
    arguments = parser.parse_args()
    if arguments.what == "hits":
        record = hits(arguments)
        section, title, body = arguments.section, "Where in the picture", table(record)
    else:
        record = seconds(arguments.pictures, arguments.concepts)
        section, title, body = "regions-time", "What a region costs", time_table(record)
    print(body)
    if not arguments.dry:
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / f"{section}.json").write_text(json.dumps(record, indent=1) + "\n")
        write_section(section, title, body)


def hits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of each way and attribute: questions and the share of them in which the strongest patch was right."""
    run, on = make_run(arguments.out, arguments.first_scene, arguments.sae_seed)
    view, embedder, names = View(run, on, "image"), Embedder.load("demo", dtype="float32"), names_of(run)
    assert names is not None
    scenes = unlike_scenes(arguments.first_scene + JUDGED, arguments.scenes)
    values = [(a, v) for a in ASKED for v in ATTRIBUTES[a] if v is not False]
    word = {(a, v): VOCABULARY[a][v][0] for a, v in values}
    known = [one for one in values if word[one] in names]
    concepts = ConceptSet(view, names)
    groups: list[Concept] = [concepts[word[one]] for one in known]
    rng = np.random.default_rng(0)
    alive = np.flatnonzero((view.table(np.arange(len(view))) > 0).any(0))
    untrained = untrained_like(view, k=None, seed=0).view
    ways: dict[str, tuple[View, list[Concept]]] = {
        "the concept": (view, groups),
        "the latent nearest to the name": (view, [OneLatent(g.latents[0]) for g in groups]),
        "a random latent": (view, [OneLatent(int(one)) for one in rng.choice(alive, len(known))]),
        "the best of an untrained SAE": (untrained, best_latents(untrained, known)),
    }
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for first in range(0, len(scenes), BATCH):
        some = scenes[first : first + BATCH]
        pictures = [drawing.draw(scene) for scene in some]
        asked = [one for i, scene in enumerate(some) for one in questions(i, scene, known)]
        for way, (seen, of) in ways.items():
            regions = regions_in(pictures, seen, embedder, of)
            for one in asked:
                region = regions[one.scene][known.index((one.attribute, one.value))]
                found[way][one.attribute].append(is_hit(region.strongest, one))
        if arguments.covering:
            for i, scene_maps in enumerate(covering(pictures, view, embedder, groups)):
                for one in (q for q in asked if q.scene == i):
                    region = Region(scene_maps[known.index((one.attribute, one.value))], (0, 0, 1, 1), pictures[0].size)
                    found["covering patches"][one.attribute].append(is_hit(region.strongest, one))
        for one in asked:
            found["a random patch"][one.attribute].append(is_hit(tuple(rng.integers(0, 8, 2) * 16 + 8.0), one))
    return {
        "scenes": len(scenes),
        "unnamed": [word[one] for one in values if one not in known],
        "ways": {
            way: {a: [len(one[a]), float(np.mean(one[a]))] for a in ASKED if one[a]} for way, one in found.items()
        },
    }


def make_run(folder: Path, first: int, seed: int) -> tuple[Run, EmbeddingStore]:
    """The demo's default SAE on scenes of its own, with names that the captions of others confirm; and its scenes."""
    stores = {}
    for part, n in N_SCENES.items():
        write_scenes(folder / part, range(first, first + n))
        stores[part] = embed(folder / part / "scenes.csv", encoder="demo", out=folder / f"{part}.store", batch_size=256)
        first += n
    run = folder / "run"
    train(stores["scenes"], out=run, resume=True, seed=seed, **COMMON, **RUNS[NAMED_RUN])
    words = folder / "words.txt"
    words.write_text(
        "\n".join(w[0] for v in VOCABULARY.values() for value, w in v.items() if value is not False) + "\n"
    )
    name(run, embed(words, encoder="demo", out=folder / "words.store"), on=stores["holdout"])
    return Run.open(run), stores["scenes"]


def unlike_scenes(first: int, n: int) -> list[Scene]:
    """The first `n` scenes of two objects that were drawn apart."""
    found: list[Scene] = []
    while len(found) < n:
        scene = sample_scene(first, count=2)
        first += 1
        if scene.relation is not None:
            found.append(scene)
    return found


def questions(number: int, scene: Scene, known: Sequence[tuple[str, str | bool]]) -> list[Question]:
    """What may be asked of a scene: each value that one of the two objects has, and not the other."""
    draws = Draws(scene.seed, PLACE_STREAM)
    draws.uniform(0, 1), draws.chance(0.5)  # of the background
    places = drawing._places(scene, draws)
    return [
        Question(number, attribute, getattr(thing, attribute), place)
        for attribute in ASKED
        if len({getattr(thing, attribute) for thing in scene.objects}) == 2
        for thing, place in zip(scene.objects, places, strict=True)
        if (attribute, getattr(thing, attribute)) in known
    ]


def is_hit(strongest: tuple[float, float], asked: Question) -> bool:
    """Whether a patch with this middle lies in the object; for a hat, in its box or in the object that wears it."""
    x, y, radius = asked.place
    across, up = strongest[0] - x, y - strongest[1]
    is_in_box = asked.attribute == "hat" and abs(across) <= REACH * radius and 0 <= up <= 1.6 * radius
    return bool(np.hypot(across, up) <= REACH * radius or is_in_box)


def best_latents(view: View, values: Sequence[tuple[str, str | bool]]) -> list[Concept]:
    """For each value the latent with the largest AUROC between rows that have it and rows that have not."""
    metadata = view.store.metadata
    rows = []
    for attribute, value in values:
        column = metadata.column("hat" if attribute == "hat" else f"{attribute}s").to_pylist()
        is_with = [bool(v) and v != "False" if attribute == "hat" else value in str(v).split(", ") for v in column]
        rows.append(np.flatnonzero(is_with).tolist())
    found = aurocs(view.table(np.arange(len(view))), rows)
    return [OneLatent(int(latent)) for latent in found.argmax(0)]


@torch.no_grad()
def covering(
    pictures: Sequence[Image.Image], view: View, embedder: Embedder, concepts: Sequence[Concept]
) -> list[np.ndarray]:
    """How far the strength falls when a patch and half of its neighbours take the picture's mean colour."""
    maps = []
    for picture in pictures:
        pixels = np.asarray(picture)
        ground = Image.new("RGB", (32, 32), tuple(int(part) for part in pixels.mean((0, 1))))
        covered = [picture]
        for y in range(8):
            for x in range(8):
                other = picture.copy()
                other.paste(ground, (x * 16 - 8, y * 16 - 8))
                covered.append(other)
        x = torch.from_numpy(embedder.embed_images(covered))
        values = strengths(view, x[:1].expand_as(x), concepts)(x)
        maps.append((values[0] - values[1:]).T.reshape(-1, 8, 8).numpy())
    return maps


def table(record: dict[str, Any]) -> str:
    lines = [
        f"{record['scenes']} scenes of two unlike objects; share of questions in which the strongest of "
        "8 x 8 patches lies in the right object, with 95 % interval (number of questions). "
        f"Values without a name, not asked: {', '.join(record['unnamed']) or 'none'}.",
        "",
        "| | " + " | ".join(f"{a} (bar {BARS[a]:.2f})" for a in ASKED) + " |",
        "|---|" + "---|" * len(ASKED),
    ]
    for way, found in record["ways"].items():
        cells = []
        for attribute in ASKED:
            n, share = found.get(attribute, (0, np.nan))
            low, high = wilson(round(share * n), n) if n else (np.nan, np.nan)
            cells.append(f"{share:.3f} [{low:.3f}, {high:.3f}] ({n})" if n else "")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds(n_pictures: int, n_concepts: int) -> dict[str, Any]:
    """Of a model of ViT-B/32's size with random weights: the plain pass, and regions for one and for more concepts."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from msae.sae.model import SAE, SAEConfig
    from msae.sae.standardize import Standardizer, Statistics

    config = CLIPConfig()  # its own sizes are those of ViT-B/32
    model = CLIPModel(config).eval().requires_grad_(False)
    embedder = Embedder("random", None, config.projection_dim, "cpu", "float32", "pil", 77, model, None,
                        CLIPImageProcessorPil())  # fmt: skip
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)) for _ in range(n_pictures)]
    pixels = embedder.pixels(pictures)
    d_in = config.projection_dim
    sae = SAE(SAEConfig(d_in=d_in, d_sae=8 * d_in, levels=(64,)),
              Standardizer({"image": Statistics(torch.zeros(d_in), d_in**0.5)}))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "rows.npy", embedder.embed_pixels(pixels))
        view = View(sae, Path(folder) / "rows.npy", "image")

        def regions(n: int) -> None:
            embedder.contributions(pixels, lambda x: strengths(view, x, [OneLatent(i) for i in range(n)]))

        calls = {"plain": lambda: embedder.embed_pixels(pixels), "1": lambda: regions(1)}
        calls[str(n_concepts)] = lambda: regions(n_concepts)
        best = {}
        for name, call in calls.items():
            call()
            best[name] = min(_timed(call) for _ in range(5)) / n_pictures
    return {"pictures": n_pictures, "concepts": n_concepts, "threads": torch.get_num_threads(), "seconds": best}


def _timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_table(record: dict[str, Any]) -> str:
    plain, *others = record["seconds"].values()
    lines = [
        f"Random weights of ViT-B/32's size, {record['pictures']} pictures at once, float32, "
        f"{record['threads']} threads, best of five; without reading and scaling the pictures.",
        "",
        "| | ms a picture | ms a picture and concept | against the plain pass |",
        "|---|---:|---:|---:|",
        f"| plain forward pass | {1e3 * plain:.1f} | | 1 |",
    ]
    for n, value in zip((1, record["concepts"]), others, strict=True):
        lines.append(f"| regions of {n} | {1e3 * value:.1f} | {1e3 * value / n:.1f} | {value / plain:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
