"""The whole chain on the embedded default: scenes, their embeddings, an SAE of each kind, the poster's table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msae.demo.drawing import render
from msae.demo.scenes import UNSEEN_SEEDS, Value
from msae.embedding import embed
from msae.errors import ConfigError
from msae.evaluation import Evaluation, evaluate, poster_table
from msae.files import atomic_folder
from msae.progress import progress
from msae.training import train

N_SCENES = {"scenes": 6000, "holdout": 1500}
"""Scenes to train on and to evaluate on; the CLIP has seen none of them."""
RUNS: Mapping[str, Mapping[str, Any]] = {
    "msae-uniform": {"kind": "matryoshka"},
    "msae-reverse": {"kind": "matryoshka", "weighting": "reverse"},
    "topk-16": {"kind": "topk", "k": 16},
    "topk-64": {"kind": "topk", "k": 64},
    "batchtopk-16": {"kind": "batchtopk", "k": 16},
    "batchtopk-64": {"kind": "batchtopk", "k": 64},
    "relu-0.03": {"kind": "relu", "l1": 0.03},
    "relu-0.003": {"kind": "relu", "l1": 0.003},
}
"""The poster's eight rows, with the k of the baselines scaled to this world's width of 128."""
COMMON: Mapping[str, Any] = {"expansion": 8, "epochs": 10, "batch_size": 64}


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    folder: Path
    evaluations: list[Evaluation]

    @property
    def closing(self) -> str:
        """The table, where the files are, and what to type next."""
        run, holdout = self.folder / "runs" / "msae-reverse", self.folder / "holdout.store"
        return "\n".join(
            [
                poster_table(self.evaluations),
                "",
                f"pictures and captions  {self.folder / 'scenes'}",
                f"embeddings             {self.folder / 'scenes.store'} and {holdout}",
                f"trained SAEs           {self.folder / 'runs'}/*/sae.safetensors",
                f"try next               msae evaluate {run} --on {holdout} --modality text",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "evaluations": [e.to_dict() for e in self.evaluations]}


def demo(out: str | Path = "msae-demo", *, seed: int = 0, say: Callable[[str], object] = lambda _: None) -> DemoResult:
    """Render scenes, embed them, train the poster's eight SAEs, and evaluate them on scenes that none has seen.

    Args:
        out: Folder for everything. What a finished or interrupted demo left there is gone on with.
        seed: Of the scenes and of the training.
        say: Is told what is being done, line by line.

    Raises:
        ConfigError: `out` holds something that is no demo.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder with --out")
    stores = {}
    first = UNSEEN_SEEDS.start + seed * sum(N_SCENES.values())
    for name, n in N_SCENES.items():
        say(f"rendering {n:,} scenes with captions: {folder / name}")
        write_scenes(folder / name, range(first, first + n))
        first += n
        say(f"embedding pictures and captions with the demo's own CLIP: {folder / name}.store")
        stores[name] = embed(folder / name / "scenes.csv", encoder="demo", out=folder / f"{name}.store", batch_size=256)
    for run, options in RUNS.items():
        say(f"training {run}: {folder / 'runs' / run}")
        train(stores["scenes"], out=folder / "runs" / run, resume=True, seed=seed, **COMMON, **options)
    say(f"evaluating on {len(stores['holdout']):,} scenes that no SAE has seen")
    evaluations = evaluate(
        [folder / "runs" / run for run in RUNS], stores["holdout"], labels="background", probe_train=stores["scenes"]
    )
    return DemoResult(folder, evaluations)


def write_scenes(
    folder: Path, seeds: Iterable[int], fixed: Callable[[int], Mapping[str, Value]] = lambda _: {}
) -> None:
    """Pictures, and `scenes.csv` with their captions and true attributes; left alone where it is there already.

    Args:
        seeds: One scene each.
        fixed: The attributes set by hand for a seed, as in `msae.demo.scenes.sample_scene`.
    """
    if (folder / "scenes.csv").exists():
        return
    if folder.exists():
        raise ConfigError(f"{folder} holds no scenes.csv, so msae did not make it; give another --out")
    seeds = list(seeds)
    with atomic_folder(folder) as temporary, progress("rendering", total=len(seeds), unit="scenes") as advance:
        (temporary / "images").mkdir()
        with (temporary / "scenes.csv").open("w", newline="", encoding="utf-8") as file:
            writer = None
            for seed in seeds:
                scene = render(seed, **fixed(seed))
                path = f"images/{seed}.png"
                scene.image.save(temporary / path)
                row = {"id": str(seed), "image_path": path, "caption": scene.caption, **scene.attributes}
                if writer is None:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                writer.writerow(row)
                advance(1)
