"""Images a second of `msae embed` against a plain transformers loop, and what bfloat16 costs and gains.

    python benchmarks/embed.py [--encoder ID] [--photos FOLDER] [--repeats 3]

Without an encoder it is a CLIP of ViT-B/32 size with random weights: right for the speed, a stand-in for the deviation.
The plain loop is the one in transformers' documentation: open the pictures of a batch, processor, model, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

import msae
from msae.data.embedder import Embedder
from msae.data.images import SUFFIXES, read_picture
from results import write_section

PRECISIONS = ("float32", "bfloat16")
N_IMAGES, BATCH = 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", help="a folder or hub id")
    parser.add_argument("--photos", type=Path, help="a folder of pictures")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = options.encoder or str(random_clip(folder / "clip"))
        pictures = options.photos or write_pictures(folder / "pictures")
        body = f"{speed(encoder, pictures, folder, options.repeats)}\n\n{deviation(encoder, pictures)}"
    print(body)
    write_section("embed", "Embedding: speed and precision", body)


def speed(encoder: str, pictures: Path, folder: Path, repeats: int) -> str:
    """Images a second of each way, taking turns, and ratios within a turn."""
    numbers = iter(range(10_000))

    def ours(dtype: str) -> Callable[[], object]:
        def run() -> object:
            out = folder / f"{next(numbers)}.store"
            return msae.embed(str(pictures), encoder=encoder, out=out, batch_size=BATCH, dtype=dtype)

        return run

    ways = {"transformers loop, float32": lambda: plain_loop(encoder, pictures)}
    ways |= {f"msae embed, {dtype}": ours(dtype) for dtype in PRECISIONS}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    n = sum(path.suffix.lower() in SUFFIXES for path in pictures.rglob("*"))
    for turn in range(repeats + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:  # the first only warms up
                seconds[way].append(time.perf_counter() - start)
    lines = ["| way | images/s (median) | times the plain loop (range) |", "|---|---:|---:|"]
    plain = seconds["transformers loop, float32"]
    for way, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(plain, own, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        lines.append(f"| {way} | {n / statistics.median(own):.1f} | {spread} |")
    return "\n".join(lines)


@torch.inference_mode()
def plain_loop(encoder: str, pictures: Path) -> NDArray[np.float32]:
    import transformers

    model = transformers.CLIPModel.from_pretrained(encoder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(encoder)
    paths = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in SUFFIXES)
    rows = []
    for start in range(0, len(paths), BATCH):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
        found = model.get_image_features(**processor(images=images, return_tensors="pt"))
        rows.append(getattr(found, "pooler_output", found).numpy())
    return np.concatenate(rows)


def deviation(encoder: str, pictures: Path) -> str:
    """How far bfloat16 embeddings are from float32 ones."""
    embedders = {dtype: Embedder.load(encoder, device="cpu", dtype=dtype) for dtype in PRECISIONS}
    images = [read_picture(path).image for path in sorted(pictures.rglob("*")) if path.suffix.lower() in SUFFIXES]
    pixels = embedders["float32"].pixels(images)
    batches = [{key: x[i : i + BATCH] for key, x in pixels.items()} for i in range(0, len(images), BATCH)]
    exact, rough = (np.concatenate([embedders[dtype].embed_pixels(b) for b in batches]) for dtype in PRECISIONS)
    stored = exact.astype(np.float16).astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    spread = np.linalg.norm(exact - exact.mean(0), axis=1)
    lines = ["| against float32 | 1 - cosine, mean | max | shift / distance from the mean |", "|---|---:|---:|---:|"]
    for name, x in [("bfloat16", rough), ("float32 stored as float16", stored)]:
        far = ((x - exact) ** 2).sum(1) / 2  # 1 - cosine of unit rows, without cancellation
        lines.append(f"| {name} | {far.mean():.1e} | {far.max():.1e} | {((2 * far) ** 0.5 / spread).mean():.4f} |")
    nearest = [(x @ x.T - 2 * np.eye(len(x))).argmax(1) for x in (exact, rough)]
    lines.append(f"\nThe nearest neighbour is the same for {(nearest[0] == nearest[1]).mean():.3f} of the images.")
    return "\n".join(lines)


def write_pictures(folder: Path) -> Path:
    """Smooth coloured noise at several scales, as large as small photographs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(N_IMAGES):
        coarse = rng.integers(0, 255, (4 + number % 13, 4 + number % 7, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480)).filter(ImageFilter.GaussianBlur(number % 3))
        picture.save(folder / f"{number:04}.jpg", quality=92)
    return folder


def random_clip(folder: Path) -> Path:
    """OpenAI's ViT-B/32 shape, initialised as transformers does."""
    import transformers

    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig())
    model.save_pretrained(folder)
    transformers.CLIPImageProcessorPil().save_pretrained(folder)
    tokenizer = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    transformers.CLIPTokenizer(vocab=tokenizer, merges=[]).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
