"""The whole chain on the embedded default: scenes, embeddings, an SAE of each kind, the poster's table, names."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msae.base.errors import ConfigError, require
from msae.base.files import atomic_path
from msae.base.results import Result
from msae.concepts.names import ConceptNames
from msae.concepts.naming import name
from msae.data.embed import embed
from msae.measure.evaluate import Evaluations, evaluate, poster_table
from msae.sae.train import train
from msae.use.audit import audit
from msae.web.report import report
from msae.world.drawing import write_scenes
from msae.world.scenes import UNSEEN_SEEDS, WORDS

N_SCENES = {"scenes": 6000, "holdout": 1500}
"""Scenes to train on and to evaluate on; the CLIP has seen none of them."""
RUNS: Mapping[str, Mapping[str, Any]] = {
    "msae": {"inference_l0": 8},
    "msae-uniform": {"levels": (8, 16, 32, 64, 128, 256), "weighting": "uniform", "level_scales": False, "lr": 2e-3},
    "msae-reverse": {"levels": (8, 16, 32, 64, 128, 256), "weighting": "reverse", "level_scales": False, "lr": 2e-3},
    "topk-16": {"kind": "topk", "k": 16},
    "topk-64": {"kind": "topk", "k": 64},
    "batchtopk-16": {"kind": "batchtopk", "k": 16},
    "batchtopk-64": {"kind": "batchtopk", "k": 64},
    "relu-0.03": {"kind": "relu", "l1": 0.03},
    "relu-0.003": {"kind": "relu", "l1": 0.003},
}
"""Our default, and the poster's eight rows with every k scaled to this world's width of 128.

A scene has some eight things to say, so that many latents are to fire.
"""
COMMON: Mapping[str, Any] = {"d_sae": 256, "epochs": 30, "batch_size": 64}
"""Twice as many latents as dimensions: this world has some forty things to name, and a wider SAE splits them."""
NAMED_RUN = "msae"


@dataclass(frozen=True, repr=False)
class DemoResult(Result):
    """What the demo made."""

    folder: Path
    evaluations: Evaluations
    names: ConceptNames
    report: Path
    """The page about the named run, with an audit of a classifier of hats."""

    @property
    def runs(self) -> list[Path]:
        """Folders of the nine runs."""
        return [self.folder / "runs" / run for run in RUNS]

    @property
    def named_run(self) -> Path:
        return self.folder / "runs" / NAMED_RUN

    @property
    def holdout(self) -> Path:
        """The store of scenes that no SAE has seen."""
        return self.folder / "holdout.store"

    @property
    def headline(self) -> str:
        return f"{self.folder}: {len(self.runs)} runs, {len(self.names)} latents of {NAMED_RUN} named"

    def records(self) -> list[dict[str, Any]]:
        return self.evaluations.records()

    def to_text(self) -> str:
        """The table, where the files are, and what to type next."""
        run, holdout = self.named_run, self.holdout
        named = sorted({concept.name for concept in self.names})
        return "\n".join(
            [
                "",
                poster_table(self.evaluations),
                "",
                f"{len(self.names)} of the {self.names.d_sae} latents of {NAMED_RUN} have a name that the captions "
                "confirm:",
                textwrap.fill(", ".join(named), 100),
                "",
                f"pictures and captions  {self.folder / 'scenes'}",
                f"embeddings             {self.folder / 'scenes.store'} and {holdout}",
                f"trained SAEs           {self.folder / 'runs'}/*/sae.safetensors",
                f"names                  {run / 'names.json'}",
                "",
                f"look at one            msae gallery {run} --on {holdout} --concept red --sheet red.html",
                f"the text side          msae evaluate {run} --on {holdout} --modality text",
                f"look around            msae explore {run} --on {holdout}",
                "",
                f"all of it, to look at  {self.report}",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "evaluations": self.evaluations.to_json(),
            "names": self.names.to_json(),
            "report": str(self.report),
        }


def demo(out: str | Path = "msae-demo", *, seed: int = 0, say: Callable[[str], object] = lambda _: None) -> DemoResult:
    """Run the whole chain offline on drawn pictures: embed, train nine SAEs, evaluate, name, write a report.

    Args:
        out: Folder for everything that is made. Steps that an earlier demo finished there are not done again.
        seed: Random seed of the pictures and of the training.
        say: Is called with each line about what is being done.

    Raises:
        ConfigError: `out` holds something that is no demo.
        MissingDependencyError: transformers is not installed.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder with --out")
    require("transformers")  # said before the pictures are drawn, not after
    stores = {}
    first = UNSEEN_SEEDS.start + seed * sum(N_SCENES.values())
    for part, n in N_SCENES.items():
        say(f"rendering {n:,} scenes with captions: {folder / part}")
        write_scenes(folder / part, range(first, first + n))
        first += n
        say(f"embedding pictures and captions with the demo's own CLIP: {folder / part}.store")
        stores[part] = embed(folder / part / "scenes.csv", encoder="demo", out=folder / f"{part}.store", batch_size=256)
    with _one_thread():
        for run, options in RUNS.items():
            say(f"training {run}: {folder / 'runs' / run}")
            train(stores["scenes"], out=folder / "runs" / run, resume=True, seed=seed, **COMMON, **options)
    say(f"evaluating on {len(stores['holdout']):,} scenes that no SAE has seen")
    evaluations = evaluate(
        [folder / "runs" / run for run in RUNS],
        stores["holdout"],
        labels="background",
        probe_train=stores["scenes"],
        inference="relu",  # as in the poster
        recovery=True,
    )
    say(f"naming the latents of {NAMED_RUN} by the words of this world, checked on those scenes' captions")
    words = embed(_write_words(folder / "words.txt"), encoder="demo", out=folder / "words.store")
    named_run, holdout = folder / "runs" / NAMED_RUN, stores["holdout"]
    names = name(named_run, words, on=holdout)
    say("writing the report, with an audit of a classifier of hats")
    hats = audit(named_run, holdout, "hat") if len(names) else None
    page = report(named_run, holdout, beside=[folder / "runs" / one for one in RUNS], audit=hats).path
    return DemoResult(folder, evaluations, names, page)


@contextmanager
def _one_thread() -> Iterator[None]:
    """SAEs this small train twice as fast on one thread as on two, which spend their time waiting for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_words(file: Path) -> Path:
    """One a line."""
    with atomic_path(file) as temporary:
        temporary.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return file
