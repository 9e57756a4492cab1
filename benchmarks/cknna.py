"""CKNNA from neighbour lists against its dense formula: value, seconds, peak memory; each in its own process.

python benchmarks/cknna.py [--rows 10000] [--d-in 512] [--d-sae 4096] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from results import write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=["dense", "lists"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {"dense": [], "lists": []}
    for _ in range(arguments.repeats):  # interleaved: what else runs on the machine meets both
        for way, results in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--child", way]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    lines = ["| way | value | wall s (each) | CPU s (median) | peak memory, MB |", "|---|---|---|---|---|"]
    for way, results in found.items():
        walls = " ".join(f"{r['wall']:.1f}" for r in results)
        cpu = statistics.median(r["cpu"] for r in results)
        lines.append(f"| {way} | {results[0]['value']:.9f} | {walls} | {cpu:.1f} | {results[0]['peak_mb']:.0f} |")
    ratios = [a["cpu"] / b["cpu"] for a, b in zip(found["dense"], found["lists"], strict=True)]
    lines.append(f"\nn = {arguments.rows:,}, d_sae {arguments.d_sae}: the neighbour lists take ")
    lines[-1] += f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) times fewer CPU seconds."
    print("\n".join(lines))
    write_section("cknna", "CKNNA against the dense formula", "\n".join(lines))


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Related spaces: embeddings in 64 directions, and activations of random latents."""
    import torch

    from msae.measure import metrics

    torch.manual_seed(0)
    x = torch.randn(arguments.rows, 64) @ torch.randn(64, arguments.d_in)
    x += 0.3 * torch.randn(arguments.rows, arguments.d_in)
    z = (x @ torch.randn(arguments.d_in, arguments.d_sae) / arguments.d_in**0.5 - 4).relu()
    start = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    value = dense_cknna(x, z) if arguments.child == "dense" else metrics.cknna(x, z)
    wall = time.monotonic() - began
    end = resource.getrusage(resource.RUSAGE_SELF)
    cpu = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    return {"value": value, "wall": wall, "cpu": cpu, "peak_mb": end.ru_maxrss / 1024}


def dense_cknna(x, z, k: int = 10) -> float:  # type: ignore[no-untyped-def]
    """The formula with dense kernels, masks and products, in float32 as is usual; Huh et al. 2024."""
    import torch

    def mask(kernel):  # type: ignore[no-untyped-def]
        near = kernel.clone().fill_diagonal_(float("-inf")).topk(k, dim=1).indices
        return torch.zeros_like(kernel).scatter_(1, near, 1.0)

    def hsic(K, L):  # type: ignore[no-untyped-def]
        m = len(K)
        totals = K.sum(dtype=torch.float64) * L.sum(dtype=torch.float64) / ((m - 1) * (m - 2))
        cross = (K @ L).sum(dtype=torch.float64)
        return float((K * L.T).sum(dtype=torch.float64) + totals - 2 * cross / (m - 2))

    K, L = x @ x.T, z @ z.T
    mask_K, mask_L = mask(K), mask(L)
    both = mask_K * mask_L
    own = hsic(mask_K * K, mask_K * K) * hsic(mask_L * L, mask_L * L)
    return hsic(both * K, both * L) / own**0.5


if __name__ == "__main__":
    main()
