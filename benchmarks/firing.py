"""Does a latent fire when the concept is there? On the demo's scenes, whose truth is known.

    python benchmarks/firing.py --out FOLDER [--first-scene N] [--seeds …] [--widths …]

For each value of each attribute the latent with the best AUROC, and the one whose firing has the best F1, are chosen on
scenes to train on and measured on others. Firing is by the thresholds stored in the SAE: none is chosen for a value.
FOLDER keeps stores and runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from concept_recovery import COMMON, World, f1, open_world, plain_methods, recover
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer
from msae.sae.train import train
from results import write_section

ACTIVE = 8
"""Mean active latents, as in the demo: a scene has some eight things to say."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first-scene", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024])
    arguments = parser.parse_args()
    world = open_world(arguments.out, arguments.first_scene)
    lines = ["| SAE | seed | mean AUROC | worst value | mean F1 of firing | active | never fires |", "|---" * 7 + "|"]
    text = plain_methods(world)["text direction"].auroc
    lines.append(f"| text direction | | {np.mean(list(text.values())):.3f} | {min(text.values()):.3f} | | | |")
    for width in arguments.widths:
        for seed in arguments.seeds:
            out = arguments.out / "runs" / f"{width}-{seed}"
            sae = train(
                world.stores["train"], out=out, resume=True, d_sae=width, seed=seed, inference_l0=ACTIVE,
                **{**COMMON, "epochs": 30},
            )  # fmt: skip
            lines.append(row(f"default, {width}", seed, sae, world))
        lines.append(row(f"untrained, {width}", arguments.seeds[0], untrained(sae, world, arguments.seeds[0]), world))
    write_section("firing", "Firing where the concept is, on the demo's scenes", "\n".join(lines))
    print("\n".join(lines))


def untrained(like: SAE, world: World, seed: int) -> SAE:
    """Random directions with thresholds for as many active latents."""
    config = SAEConfig(d_in=like.d_in, d_sae=like.d_sae, kind="relu")
    sae = SAE(config, Standardizer(like.standardizer.statistics), seed=seed)
    return sae.with_l0(ACTIVE, world.stores["train"])


def row(name: str, seed: int, sae: SAE, world: World) -> str:
    strengths, fires = (
        {key: read(sae, world, key, how) for key in ("train", "judge")} for how in ("relu", "threshold")
    )
    aurocs = recover(strengths["train"], strengths["judge"], world).auroc
    scores = []
    for target, truth in world.truth["train"].items():
        on = fires["train"] > 0
        both = (on & truth[:, None]).sum(0)
        best = int((2 * both / np.maximum(1, on.sum(0) + truth.sum())).argmax())
        scores.append(f1(fires["judge"][:, best] > 0, world.truth["judge"][target]))
    worst = min(aurocs, key=lambda target: aurocs[target])
    active = (fires["judge"] > 0).sum(1).mean()
    never = 1 - (fires["train"] > 0).any(0).mean()
    mean, lowest = np.mean(list(aurocs.values())), f"{aurocs[worst]:.3f} ({worst.attribute} {worst.value})"
    return f"| {name} | {seed} | {mean:.3f} | {lowest} | {np.mean(scores):.3f} | {active:.1f} | {never:.0%} |"


@torch.no_grad()
def read(sae: SAE, world: World, key: str, inference: str) -> np.ndarray:
    return sae.encode(world.stores[key], "image", inference=inference)  # type: ignore[call-overload,no-any-return]


if __name__ == "__main__":
    main()
