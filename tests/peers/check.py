"""Compare what another library computes with what msae computed. Runs in that library's own environment, without msae.

Usage: python check.py PEER FOLDER, where FOLDER is what prepare.py made. Prints one line of JSON; fails if not equal.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np


def saelens(folder, x):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    z = sae.encode(x)
    return z, sae.decode(z)


def saelens_hub(folder, x):
    """Through the hub's interface, as an unregistered repository: HF_ENDPOINT says where."""
    from sae_lens import SAE

    sae = SAE.from_pretrained("someone/an-sae", folder.name)
    z = sae.encode(x)
    return z, sae.decode(z)


def sparsify(folder, x):
    import torch
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    acts, latents, _ = coder.encode(x)
    z = torch.zeros(len(x), coder.num_latents).scatter(1, latents, acts)
    return z, coder.decode(acts, latents)


def dictionary_learning(folder, x):
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(folder), "cpu")
    z = dictionary.encode(x)
    return z, dictionary.decode(z)


def sentence_transformers(folder, x):
    import torch
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    module = SparseAutoEncoder.load(str(folder))
    with torch.inference_mode():
        return module({"sentence_embedding": x})["sentence_embedding"], None  # its decoder is tied: no reconstruction


def onnx(folder, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "encoder.onnx")
    parts = [session.run(None, {"embeddings": part.numpy()})[0] for part in x.split([1, 299, len(x) - 300])]
    return np.concatenate(parts), None


def embedding_atlas(folder, x):
    """The page that its command makes has every row with its features and its embedding: their strengths it has not."""
    import subprocess

    import pandas as pd

    page = folder / "page"
    words = [folder / "rows.parquet", "--vector", "embedding", "--features", "features", "--disable-projection"]
    command = [Path(sys.executable).with_name("embedding-atlas"), *words, "--export-application", page]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (data,) = page.rglob("*.parquet")
    options = json.loads((data.parent / "metadata.json").read_text())
    assert '"features"' in json.dumps(options), options
    table = pd.read_parquet(data)
    expected = np.load(folder / "expected.npz")["z"]
    z = np.zeros_like(expected)
    for i, features in enumerate(table["features"]):
        latents = [feature["index"] for feature in features]
        z[i, latents] = expected[i, latents] + (expected[i, latents] == 0)  # wrong wherever nothing fires
    return z, np.stack(table["embedding"].to_list())


PEERS = {
    "saelens": (saelens, "sae-lens"),
    "saelens-hub": (saelens_hub, "sae-lens"),
    "sparsify": (sparsify, "eai-sparsify"),
    "dictionary-learning": (dictionary_learning, "dictionary-learning"),
    "sentence-transformers": (sentence_transformers, "sentence-transformers"),
    "onnx": (onnx, "onnxruntime"),
    "embedding-atlas": (embedding_atlas, "embedding-atlas"),
}


def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    compute, package = PEERS[peer]
    expected = np.load(folder / "expected.npz")
    try:
        import torch

        x = torch.from_numpy(expected["x"])
        torch.set_grad_enabled(False)
    except ImportError:
        x = Rows(expected["x"])
    z, x_hat = (None if one is None else np.asarray(one) for one in compute(folder, x))
    differs = (z != 0) != (expected["z"] != 0)
    found = {
        "peer": peer,
        "version": version(package),
        "case": folder.name,
        "rows": len(z),
        "active": float((z != 0).sum(1).mean()),
        "codes_differ_in": int(differs.any(1).sum()),
        "largest_differing": float(np.abs(z - expected["z"])[differs].max(initial=0)),
        "encode_error": float(np.abs(z - expected["z"]).max()),
        "decode_error": None if x_hat is None else float(np.abs(x_hat - expected["x_hat"]).max()),
    }
    print(json.dumps(found))
    tolerance = float(expected["tolerance"])
    errors = [found["encode_error"], found["decode_error"] or 0.0]
    # Under ReLU a latent may fire on one side by less than float32 rounds off: 1e-6 of a row of norm 1.
    allowed = 1e-6 if "relu" in folder.name else 0.0
    sys.exit(found["largest_differing"] > allowed or max(errors) > tolerance)


class Rows:
    """As much of a tensor as is needed where torch is not installed."""

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def split(self, sizes):
        ends = np.cumsum(sizes)[:-1]
        return [Rows(part) for part in np.split(self.array, ends)]

    def numpy(self):
        return self.array


if __name__ == "__main__":
    main()
