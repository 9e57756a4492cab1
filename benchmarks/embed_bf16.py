"""How far bfloat16 embeddings are from float32 ones, and how much faster: `embed_bf16.py [ENCODER [PHOTOS]]`.

Without ENCODER it is a ViT-B/32-sized CLIP with random weights: right for the speed, and a stand-in for the
deviation. What was measured is in docs/store-format.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from msae.embedder import Embedder
from msae.images import SUFFIXES, read_picture

PRECISIONS = ("float32", "bfloat16")
N_IMAGES, BATCH, REPEATS = 64, 32, 4


def main() -> None:
    """Print the speed of both precisions, and the cosines between their embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = sys.argv[1] if len(sys.argv) > 1 else random_clip(Path(folder))
        embedders = {dtype: Embedder.load(encoder, device="cpu", dtype=dtype) for dtype in PRECISIONS}
        images = photos(Path(sys.argv[2])) if len(sys.argv) > 2 else pictures()
        pixels = embedders["float32"].pixels(images)
        batches = [{key: x[i : i + BATCH] for key, x in pixels.items()} for i in range(0, len(images), BATCH)]
        rows: dict[str, NDArray[np.float32]] = {}
        seconds: dict[str, list[float]] = {dtype: [] for dtype in PRECISIONS}
        for _ in range(REPEATS):  # in turns, so that both meet the same load of the machine
            for dtype, embedder in embedders.items():
                start = time.perf_counter()
                rows[dtype] = np.concatenate([embedder.embed_pixels(batch) for batch in batches])
                seconds[dtype].append(time.perf_counter() - start)
    report(rows, {dtype: min(values) for dtype, values in seconds.items()})


def photos(folder: Path) -> list[Image.Image]:
    return [read_picture(path).image for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]


def report(rows: dict[str, NDArray[np.float32]], seconds: dict[str, float]) -> None:
    exact, rough = rows["float32"], rows["bfloat16"]
    stored = exact.astype(np.float16).astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    spread = np.linalg.norm(exact - exact.mean(0), axis=1)
    nearest = [(x @ x.T - 2 * np.eye(len(x))).argmax(1) for x in (exact, rough)]
    for dtype, value in seconds.items():
        print(f"{dtype}: {len(exact) / value:.1f} images/s on {torch.get_num_threads()} threads")
    print(f"ratio: {seconds['float32'] / seconds['bfloat16']:.2f}")
    for name, x in [("bfloat16", rough), ("float32 stored as float16", stored)]:
        deviation = ((x - exact) ** 2).sum(1) / 2  # 1 - cosine of unit rows, without cancellation
        print(f"1 - cosine, {name}: mean {deviation.mean():.1e}, max {deviation.max():.1e}")
        share = ((2 * deviation) ** 0.5 / spread).mean()
        print(f"  shift as a share of the distance from the mean embedding: {share:.4f}")
    print(f"same nearest neighbour: {(nearest[0] == nearest[1]).mean():.3f}")


def pictures() -> list[Image.Image]:
    """Smooth coloured noise at several scales."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(N_IMAGES):
        coarse = rng.integers(0, 255, (4 + number % 13, 4 + number % 7, 3), dtype=np.uint8)
        found.append(Image.fromarray(coarse).resize((256, 224)).filter(ImageFilter.GaussianBlur(number % 3)))
    return found


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
