"""Qdrant's answers to "images with A and without B" against brute force, on real vectors and named concepts.

python benchmarks/sparse_search.py RUN image_train.npy vocabulary.npy [--first 0] [--rows 20000]
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
from qdrant_client import QdrantClient, models

import msae
from msae.sae.model import SAE
from results import write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first of the rows")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--section")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(arguments.run, folder / "run", ignore=shutil.ignore_patterns("names.json"))
        names = msae.name(folder / "run", vocabulary=arguments.vocabulary)
        names.save(folder / "run")
        vectors = np.load(arguments.vectors, mmap_mode="r")
        np.save(folder / "rows.npy", vectors[arguments.first : arguments.first + arguments.rows])
        client = QdrantClient(":memory:")
        encoded = msae.encode(folder / "run", folder / "rows.npy", modality="image", to="rows", client=client)
        z = SAE.load(folder / "run").encode(folder / "rows.npy")
        msae.encode(folder / "run", folder / "rows.npy", modality="image", out=folder / "codes.npz")
        assert np.array_equal(_dense(folder / "codes.npz"), z), "the .npz differs from the activations"
        lines = ["| images with | and without | rows by brute force | rows by Qdrant | the same, in the same order |"]
        lines.append("|---|---|---:|---:|---|")
        n_wrong = 0
        for with_, without in queries(names, z, arguments.queries):
            expected = brute_force(z, names[with_], names[without])
            found = by_qdrant(client, names[with_], with_, without, arguments.rows)
            # Of equal scores either may come first: only the order of different ones is compared.
            score = z[:, names[with_]].sum(1, dtype=np.float64)
            is_same = set(found) == set(expected) and bool((np.diff(score[found]) < 1e-4).all())
            n_wrong += not is_same
            lines.append(f"| {with_} | {without} | {len(expected):,} | {len(found):,} | {'yes' if is_same else 'NO'} |")
            print(lines[-1], flush=True)
    body = (
        f"{encoded.n:,} real rows of {arguments.vectors.name}, {encoded.l0:.1f} of {encoded.d_sae:,} latents active in "
        f"a row; {len(names.by_name):,} names by the vocabulary alone. {n_wrong} of {arguments.queries} answers "
        "differ.\n\n"
    )
    print(body)
    if arguments.section:
        write_section(
            arguments.section, "Images with one concept and without another, in Qdrant", body + "\n".join(lines)
        )


def queries(names: msae.ConceptNames, z: np.ndarray, n: int) -> list[tuple[str, str]]:
    """The pairs of the most frequent names that occur together in at least 20 rows, each name first once."""
    fires = {name: (z[:, latents] > 0).any(1) for name, latents in names.by_name.items()}
    order = sorted(fires, key=lambda name: -int(fires[name].sum()))
    pairs = (
        next((a, b) for b in order if b != a and (fires[a] & fires[b]).sum() >= 20 and (fires[a] & ~fires[b]).any())
        for a in order
    )
    return list(itertools.islice(pairs, n))


def brute_force(z: np.ndarray, with_: list[int], without: list[int]) -> list[int]:
    rows = np.flatnonzero((z[:, with_] > 0).any(1) & ~(z[:, without] > 0).any(1))
    return rows.tolist()


def by_qdrant(client: QdrantClient, latents: list[int], with_: str, without: str, limit: int) -> list[int]:
    """The query of docs/formats.md."""
    has = {
        name: models.FieldCondition(key="concepts", match=models.MatchValue(value=name)) for name in (with_, without)
    }
    found = client.query_points(
        "rows",
        query=models.SparseVector(indices=latents, values=[1.0] * len(latents)),
        using="concepts",
        query_filter=models.Filter(must=[has[with_]], must_not=[has[without]]),
        limit=limit,
        with_payload=False,
    )
    return [int(point.id) for point in found.points]


def _dense(path: Path) -> np.ndarray:
    from scipy import sparse

    return sparse.load_npz(path).toarray()


if __name__ == "__main__":
    main()
