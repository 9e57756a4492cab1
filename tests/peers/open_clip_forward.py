"""Compare an open_clip model with what msae makes of its checkpoint: pictures, captions and preprocessing.

    python -m venv peer && peer/bin/pip install torch torchvision open_clip_torch && peer/bin/pip install -e '.[clip]'
    peer/bin/python tests/peers/open_clip_forward.py [--models ViT-B-32 ViT-B-32-quickgelu ViT-B-16]

Each model gets random weights, is written as open_clip writes it for the hub, and is read again by msae. The tokenizer
is written from open_clip's own list of merges. Weights are never downloaded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from msae.data.embedder import Embedder

SIZES = ((224, 224), (320, 240), (240, 321), (640, 427), (100, 90))
CAPTIONS = ["a photo of a cat", "Two RED cars, and a dog's house!", "", "a " * 200, "naïve café: 5€"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16"])
    wanted = parser.parse_args().models
    print(f"open_clip {open_clip.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    worst = 0.0
    for name in wanted:
        torch.manual_seed(0)
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=None)
        model.eval()
        with tempfile.TemporaryDirectory() as folder:
            write(model, name, Path(folder))
            embedder = Embedder.load(folder, device="cpu", dtype="float32")
        worst = max(worst, compare(name, model, preprocess, open_clip.get_tokenizer(name), embedder))
    sys.exit(worst > 1e-5)


def write(model: torch.nn.Module, name: str, folder: Path) -> None:
    """The files that open_clip pushes to the hub, and the tokenizer's."""
    config = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {key: one.contiguous() for key, one in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    merges = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(merges.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    vocabulary = open_clip.tokenizer.SimpleTokenizer().encoder  # its last two have other names in transformers
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({names.get(word, word): one for word, one in vocabulary.items()}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )


def compare(name: str, model: torch.nn.Module, preprocess: object, tokenize: object, embedder: Embedder) -> float:
    """The largest difference of an embedding's entry, where both had the same pixels and tokens; prints all of them."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]
    theirs = torch.stack([preprocess(picture) for picture in pictures])
    ours = embedder.pixels(pictures)["pixel_values"]
    with torch.no_grad():
        images = torch.nn.functional.normalize(model.encode_image(theirs), dim=-1).numpy()
        texts = torch.nn.functional.normalize(model.encode_text(tokenize(CAPTIONS)), dim=-1).numpy()
    forward = np.abs(embedder.embed_pixels({"pixel_values": theirs}) - images).max()
    words = np.abs(embedder.embed_texts(CAPTIONS) - texts).max(1)
    print(f"{name}: image tower {forward:.1e}; captions {' '.join(f'{one:.1e}' for one in words)}")
    for size, one, other in zip(SIZES, ours, theirs, strict=True):
        print(f"  pixels of {size}: largest difference {float((one - other).abs().max()):.1e}")
    return float(max(forward, words.max()))


if __name__ == "__main__":
    main()
