"""Time and peak memory of `msae name` at the size of the paper: 37,445 words, 24,576 latents, 768 dimensions.

    python benchmarks/naming_size.py [--words 37445] [--d-sae 24576] [--d-in 768] [--threads 1] [--dry]

Words are random unit vectors around some hundred topics and a common direction, one in ten nearly the same as another.
Half of the decoder rows are noisy copies of words and the encoder is its transpose, so that many latents are named and
every part of the rule has work. The peak is that of the whole process, the making of all this included.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from msae.concepts.naming import name
from msae.data.arrays import unit_rows
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from results import write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("words", 37_445), ("d-sae", 24_576), ("d-in", 768), ("threads", 1)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--dry", action="store_true", help="print, and leave RESULTS.md alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        words = make_words(rng, options.words, options.d_in)
        vocabulary = write_words(Path(scratch), words)
        sae = make_sae(rng, words, options.d_sae)
        del words
        before = peak_megabytes()
        began, cpu = time.perf_counter(), time.process_time()
        names = name(sae, vocabulary)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = peak_megabytes()
    full = options.words * options.d_sae * 4 / 1e6
    counts = ", ".join(f"{key.replace('_', ' ')} {count:,}" for key, count in names.counts.items())
    body = (
        f"{options.words:,} words x {options.d_sae:,} latents x {options.d_in} dimensions, synthetic, "
        f"{options.threads} thread(s): **{seconds:.0f} s** ({cpu:.0f} s of CPU), peak memory of the process "
        f"**{peak:,.0f} MB**, of which {before:,.0f} MB before it began; the full matrix of cosines would be "
        f"{full:,.0f} MB as float32. {counts}; random directions for the null: {names.record['null_size']:,}."
    )
    print(body)
    if not options.dry:
        write_section("naming-size", "Naming at full size: time and memory", body)


def make_words(rng: np.random.Generator, n: int, d_in: int) -> np.ndarray:
    topics = rng.standard_normal((300, d_in), dtype=np.float32)
    words = topics[rng.integers(len(topics), size=n)] + 1.5 * rng.standard_normal((n, d_in), dtype=np.float32)
    same = np.flatnonzero(rng.random(n) < 0.1)
    noise = rng.standard_normal((len(same), d_in), dtype=np.float32)
    words[same] = words[rng.integers(n, size=len(same))] + 0.5 * noise
    return unit_rows(words + 3 * rng.standard_normal(d_in, dtype=np.float32))


def write_words(folder: Path, words: np.ndarray) -> Path:
    np.save(folder / "words.npy", words.astype(np.float16))
    (folder / "words.csv").write_text("word\n" + "\n".join(f"word {i}" for i in range(len(words))) + "\n")
    return folder / "words.npy"


def make_sae(rng: np.random.Generator, words: np.ndarray, d_sae: int) -> SAE:
    d_in = words.shape[1]
    centred = unit_rows(words - words.mean(0))
    rows = unit_rows(rng.standard_normal((d_sae, d_in), dtype=np.float32))
    n_named = min(d_sae // 2, len(words))
    own = rng.permutation(len(words))[:n_named]
    rows[:n_named] = unit_rows(centred[own] + 1.5 * rows[:n_named])
    text = fit_statistics(lambda: [torch.from_numpy(words)])
    sae = SAE(SAEConfig(d_in, d_sae, kind="matryoshka", levels=(64, d_sae)), Standardizer({"text": text}))
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(rows))
        sae.W_enc.copy_(torch.from_numpy(rows.T.copy()))
    return sae.eval()


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
