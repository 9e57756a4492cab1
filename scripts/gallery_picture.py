"""Draw docs/gallery.png: contact sheets of named concepts of the demo's world.

    python scripts/gallery_picture.py --work FOLDER [--encoder demo] [--concepts red star sky striped]

Renders scenes, embeds them and the vocabulary, trains a small Matryoshka SAE, names it, and puts the sheets of the
concepts under each other. What is already in FOLDER is used again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

import msae
from msae.concepts.gallery import gallery
from msae.web.report.sheet import PAPER, draw_sheet
from msae.world.chain import write_scenes
from msae.world.scenes import UNSEEN_SEEDS, VOCABULARY

N_SCENES = {"scenes": 6000, "holdout": 1500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--encoder", default="demo")
    parser.add_argument("--concepts", nargs="+", default=["red", "night", "brick"])
    parser.add_argument("--out", type=Path, default=Path("docs/gallery.png"))
    options = parser.parse_args()
    run = prepare(options.work, options.encoder)
    sheets = []
    for concept in options.concepts:
        found = gallery(run, options.work / "holdout.store", concept=concept, n=12)
        sys.stdout.write(found.to_text() + "\n\n")
        sheets.append(draw_sheet(found, columns=6))
    picture = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        picture.paste(sheet, (0, top))
        top += sheet.height
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(96, dither=Image.Dither.NONE).save(options.out, optimize=True)
    sys.stdout.write(f"{options.out}: {picture.size}, {options.out.stat().st_size:,} bytes\n")


def prepare(work: Path, encoder: str) -> Path:
    """The run folder of a small named SAE of the demo's world, made in `work` where it is not there yet."""
    first = UNSEEN_SEEDS.start
    for name, n in N_SCENES.items():
        write_scenes(work / name, range(first, first + n))
        first += n
        msae.embed(work / name / "scenes.csv", encoder=encoder, out=work / f"{name}.store", batch_size=256)
    words = work / "words.csv"
    plain = dict.fromkeys(ways[0] for values in VOCABULARY.values() for ways in values.values())
    words.write_text("caption\n" + "\n".join(plain) + "\n", encoding="utf-8")
    vocabulary = msae.embed(words, encoder=encoder, out=work / "words.store")
    run = work / "run"
    msae.train(
        work / "scenes.store", out=run, resume=True, weighting="reverse", d_sae=256, levels=(8, 16, 32, 256),
        epochs=30, batch_size=128,
    )  # fmt: skip
    if not (run / "names.json").exists():
        msae.name(run, vocabulary)
    return run


if __name__ == "__main__":
    main()
