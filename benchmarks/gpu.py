"""What a GPU makes of a training step: exactness, and milliseconds against the floor. One command, under eight minutes.

    python benchmarks/gpu.py [--sizes 512x4096 …] [--batches 256 …] [--seconds 420]

Exactness: the loss and gradients in float32 against float64, for every kind. Time: a whole step (loss, gradients,
AdamW, unit rows) of the default, faithful and poster recipes and of TopK 64, as plain torch, compiled by torch.compile,
and captured as a CUDA graph, beside the products that no step can do without, in float32, TF32 and bfloat16.
Without a GPU it is a dry run at a small size on the CPU: everything but the graph runs, and RESULTS.md stays as it is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from msae.sae.kernels import Selection, sae_loss
from msae.sae.losses import default_levels, level_weights
from results import write_section

Step = Callable[[], None]

EXACT = 3e-6
"""Largest relative error of a gradient in float32 that counts as exact."""
PRECISIONS = {"float32": "highest", "TF32": "high", "bfloat16": "medium"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["512x4096", "768x6144", "1024x16384"], metavar="D_INxD_SAE")
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=420, help="no new case is begun after so many")
    arguments = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        arguments.sizes, arguments.batches = ["32x128"], [16]
    lines = exactness(device)
    lines += [
        "",
        "| size | batch | recipe | precision | floor, ms | plain torch | torch.compile | CUDA graph | graph / floor |",
    ]
    lines += ["|---|---:|---|---|---:|---:|---:|---:|---:|"]
    left_out = []
    for size in arguments.sizes:
        d_in, d_sae = map(int, size.split("x"))
        for batch in arguments.batches:
            for recipe, settings in recipes(d_in, d_sae).items():
                for precision in PRECISIONS:
                    case = f"{size}, batch {batch}, {recipe}, {precision}"
                    if time.monotonic() - began > arguments.seconds:
                        left_out.append(case)
                        continue
                    lines.append(timed(device, d_in, d_sae, batch, recipe, settings, precision))
                    print(lines[-1], flush=True)
    if left_out:
        lines += ["", f"Not measured for want of time: {'; '.join(left_out)}."]
    body = "\n".join(lines)
    print(body)
    if device.type == "cuda":
        write_section("gpu", f"Training steps on {torch.cuda.get_device_name()}", body)


def recipes(d_in: int, d_sae: int) -> dict[str, dict[str, Any]]:
    """What the recipes ask of the loss at these sizes."""
    few, all_of_them = levels_to(d_in, d_in), levels_to(d_in, d_sae)
    poster = default_levels(d_sae)
    return {
        "default": {"selection": Selection(levels=few), "weights": level_weights("rising", len(few)), "scaled": True},
        "faithful": {
            "selection": Selection(levels=all_of_them), "weights": level_weights("steep", len(all_of_them)),
            "scaled": True,
        },
        "poster": {"selection": Selection(levels=poster), "weights": level_weights("uniform", len(poster))},
        "TopK 64": {"selection": Selection(levels=(min(64, d_sae),))},
    }  # fmt: skip


def levels_to(d_in: int, last: int) -> tuple[int, ...]:
    """Doubling from d_in / 64, as the recipes."""
    return default_levels(last, smallest=max(1, d_in // 64))


def parameters(d_in: int, d_sae: int, n_levels: int | None, device: torch.device) -> list[torch.nn.Parameter]:
    """W_enc, b_enc, W_dec, b_dec and, where the levels have them, their scales."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(d_sae, d_in, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    tensors = [0.3 * rows.T, torch.zeros(d_sae), rows, torch.zeros(d_in)]
    tensors += [torch.ones(n_levels)] if n_levels else []
    return [torch.nn.Parameter(tensor.clone().to(device)) for tensor in tensors]


def loss_of(x: torch.Tensor, weights: list[torch.nn.Parameter], settings: dict[str, Any]) -> torch.Tensor:
    others = {name: value for name, value in settings.items() if name != "scaled"}
    scales = weights[4] if settings.get("scaled") else None
    return sae_loss(x, *weights[:4], level_scales=scales, kernel="reference", **others).total


# Exactness ---------------------------------------------------------------------------------------------------------


def exactness(device: torch.device) -> list[str]:
    """A line for each kind: the largest relative error of a gradient in float32 against float64."""
    torch.set_float32_matmul_precision("highest")
    d_in, d_sae, n = (512, 4096, 256) if device.type == "cuda" else (32, 128, 16)
    kinds = {
        **recipes(d_in, d_sae),
        "ReLU": {"selection": Selection(), "l1": 0.003},
        "BatchTopK 64": {"selection": Selection(batch_k=d_sae // 64)},
        "nested widths": {"selection": Selection(widths=(d_sae // 4, d_sae), batch_k=8), "weights": (1.0, 1.0)},
        "a soft cap": {"selection": Selection(levels=(8, 64)), "weights": (1.0, 1.0), "soft_cap": 1.5},
    }
    lines = ["| kind | loss, relative error | gradients, largest relative error | |", "|---|---:|---:|---|"]
    for name, settings in kinds.items():
        n_levels = settings["selection"].n_levels if settings.get("scaled") else None
        weights = parameters(d_in, d_sae, n_levels, device)
        x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(1)).to(device)
        found = gradients(x, weights, settings)
        wanted = gradients(x.double(), [torch.nn.Parameter(p.detach().double()) for p in weights], settings)
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
        verdict = "exact" if max(errors) < EXACT else "NOT EXACT"
        lines.append(f"| {name} | {errors[0]:.0e} | {max(errors[1:]):.0e} | {verdict} |")
    return lines


def gradients(x: torch.Tensor, weights: list[torch.nn.Parameter], settings: dict[str, Any]) -> list[torch.Tensor]:
    """The loss and the gradient of every parameter."""
    loss = loss_of(x, weights, settings)
    return [loss.detach(), *torch.autograd.grad(loss, weights)]


# Time --------------------------------------------------------------------------------------------------------------


def timed(
    device: torch.device, d_in: int, d_sae: int, batch: int, recipe: str, settings: dict[str, Any], precision: str
) -> str:
    """A line of the table; a way that fails says why instead of a time."""
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    floor = milliseconds(floor_of(device, d_in, d_sae, batch), device)
    cells = []
    for way in (plain, compiled, graph):
        try:
            cells.append(milliseconds(way(step_of(device, d_in, d_sae, batch, settings), device), device))
        except Exception as err:  # noqa: BLE001 (a compiler fails in its own ways)
            print(f"{recipe}, {way.__name__}: {type(err).__name__}: {str(err).splitlines()[0]}", flush=True)
            cells.append(None)
        torch.compiler.reset()
    text = " | ".join("-" if cell is None else f"{cell:.3f}" for cell in cells)
    ratio = "-" if cells[2] is None else f"{cells[2] / floor:.2f}"
    return f"| {d_in}/{d_sae} | {batch} | {recipe} | {precision} | {floor:.3f} | {text} | {ratio} |"


def step_of(device: torch.device, d_in: int, d_sae: int, batch: int, settings: dict[str, Any]) -> Step:
    """A whole training step on rows that lie on the device: nothing in it waits for the device."""
    n_levels = settings["selection"].n_levels if settings.get("scaled") else None
    weights = parameters(d_in, d_sae, n_levels, device)
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(1)).to(device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        weights, lr=torch.tensor(1e-6, device=device) if on_gpu else 1e-6, weight_decay=0.0, eps=6.25e-10,
        fused=True, capturable=on_gpu,
    )  # fmt: skip
    W_dec = weights[2]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(x, weights, settings).backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
            optimizer.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def floor_of(device: torch.device, d_in: int, d_sae: int, batch: int) -> Step:
    """The five products of a plain SAE's step, and nothing else."""
    W = torch.randn(d_sae, d_in, device=device)
    x, z = torch.randn(batch, d_in, device=device), torch.randn(batch, d_sae, device=device)

    def step() -> None:
        for a, b in ((x, W.T), (z, W), (x, W.T), (z.T, x), (z.T, x)):
            torch.mm(a, b)

    return step


def plain(step: Step, device: torch.device) -> Step:  # noqa: ARG001
    return step


def compiled(step: Step, device: torch.device) -> Step:  # noqa: ARG001
    return torch.compile(step)


def graph(step: Step, device: torch.device) -> Step:
    """The step as a CUDA graph: its kernels are launched at once."""
    if device.type != "cuda":
        raise RuntimeError("there is no GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # makes the state of the optimiser and the caches of the library
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def milliseconds(step: Step, device: torch.device, *, rounds: int = 5) -> float:
    """Of one step: the median over rounds of at least 10 steps or 50 ms each."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    began = time.perf_counter()
    step()
    wait()
    n = max(10, int(0.05 / max(time.perf_counter() - began, 1e-6)))
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(n):
            step()
        wait()
        found.append((time.perf_counter() - began) / n * 1000)
    return statistics.median(found)


if __name__ == "__main__":
    main()
