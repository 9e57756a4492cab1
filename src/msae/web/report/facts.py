"""What a run folder says about its SAE: the one source of the report and of the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msae.base.errors import RunError
from msae.concepts.names import ConceptNames, names_of
from msae.measure.evaluate import Kept, current_evaluations
from msae.sae.model import SAE, SAEConfig
from msae.sae.run import Run

KINDS: Mapping[str, str] = {
    "matryoshka": "Matryoshka SAE",
    "topk": "TopK SAE",
    "batchtopk": "BatchTopK SAE",
    "jumprelu": "JumpReLU SAE",
    "relu": "ReLU SAE with an L1 penalty",
}


@dataclass(frozen=True, eq=False)
class Facts:
    """One run: its SAE, how it was trained, and what was found about it so far."""

    run: Run
    folder: Path
    sae: SAE
    trained: Mapping[str, Any]
    """The run's config.json; empty for an SAE that was imported."""
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    evaluations: tuple[Kept, ...]
    """Those that are still true of the weights in the folder and of the store."""
    names: ConceptNames | None
    dataset: str | None
    """Of the hub, where the training store was made from one."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name or "run"

    @property
    def place(self) -> str:
        """A path of the folder that opens it from where the report is made."""
        folder, here = self.folder.resolve(), Path.cwd()
        return (folder.relative_to(here) if folder.is_relative_to(here) else folder).as_posix()

    @property
    def config(self) -> SAEConfig:
        return self.sae.config

    @property
    def encoder(self) -> str | None:
        """The model whose embeddings it reads, in words."""
        return "the demo's own CLIP" if self.config.encoder == "demo" else self.config.encoder

    @property
    def settings(self) -> Mapping[str, Any]:
        """How it was trained; empty where that is not known."""
        known: Mapping[str, Any] = self.trained.get("train", {})
        return known

    @property
    def modality(self) -> str | None:
        """What it was trained on."""
        return self.trained.get("modality")

    @property
    def kind(self) -> str:
        """In words, with the settings of its kind."""
        settings, config = self.settings, self.config
        more = {
            "matryoshka": (f" of widths, k = {config.k}" if config.widths else "")
            + (f", {settings['weighting']} weighting" if settings.get("weighting") else ""),
            "relu": f", {settings['l1']:g}" if settings.get("l1") else "",
        }.get(config.kind, f", k = {config.k}" if config.k else "")
        return KINDS.get(config.kind, config.kind) + more

    @property
    def active(self) -> float | None:
        """Mean number of active latents of a row, as it is used; None where that is not known."""
        known = (kept.evaluation for kept in self.evaluations if kept.evaluation.inference == "trained")
        return next((e.l0 for e in known), self.config.inference_l0 or self.config.k)

    def lines(self) -> list[tuple[str, str]]:
        """The facts as pairs of a word and what it is, for people; what is not known is left out."""
        config, settings = self.config, self.settings
        revision = f", revision {config.encoder_revision}" if config.encoder_revision else ""
        lines = [
            ("model", self.kind),
            ("embeddings of", f"{self.encoder}{revision}" if config.encoder else ""),
            ("size", f"{config.d_in:,} dimensions, {config.d_sae:,} latents ({config.d_sae / config.d_in:g} times)"),
            ("levels", ", ".join(f"{level:,}" for level in config.levels or ())),
            ("widths", ", ".join(f"{width:,}" for width in config.widths or ())),
            ("active latents", f"{self.active:,.1f} in a row, on average" if self.active else ""),
            ("standardises", " and ".join(self.sae.standardizer.statistics)),
            ("trained on", self._trained_on()),
        ]
        if settings:
            how = [
                f"{settings['epochs']} epoch{'s' if settings['epochs'] != 1 else ''}",
                f"batches of {settings['batch_size']:,}",
            ]
            how += [f"learning rate {settings['lr']:g}", f"seed {settings['seed']}", f"recipe {settings['recipe']}"]
            lines.append(("training", ", ".join(how)))
        if self.names is not None:
            share = len(self.names) / self.names.d_sae
            n_guesses = len(self.names) - len(self.names.confirmed)
            confirmed = f"{n_guesses:,} of them only by the nearest word" if n_guesses else "all confirmed by rows"
            lines.append(("named latents", f"{len(self.names):,} of {self.names.d_sae:,} ({share:.0%}); {confirmed}"))
            lines.append(("tests of names", "; ".join(self.names.summary())))
        return [(word, value) for word, value in lines if value]

    def _trained_on(self) -> str:
        if not self.trained:
            return ""
        source = self.dataset or Path(str(self.trained.get("store", ""))).name
        what = "image and text" if self.modality == "both" else self.modality
        more = len(self.trained.get("stores", ())) - 1
        others = "" if more < 1 else f" and {more} other store{'s' if more > 1 else ''}"
        return f"{self.trained['n_rows']:,} {what} rows of {source}{others}"


def facts_of(folder: Path) -> Facts:
    """The facts of a run folder.

    Raises:
        RunError: It is no run folder, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is no run folder; give one that msae train made, such as runs/photos")
    run = Run.open(folder)
    trained = read_trained(run)
    return Facts(
        run=run,
        folder=folder,
        sae=run.sae,
        trained=trained,
        metrics=run.metrics,
        evaluations=tuple(current_evaluations(run)),
        names=names_of(run),
        dataset=_dataset(trained),
    )


def read_trained(run: Run) -> dict[str, Any]:
    """A run's config.json, with everything that a report says of it; empty for an SAE that was imported.

    Raises:
        RunError: It is damaged.
    """
    trained = run.settings
    if not trained:
        return {}
    lacks = {"n_rows", "modality", "train"} - set(trained)
    settings = trained.get("train")
    if not isinstance(settings, dict):
        lacks.add("train")
    else:
        lacks |= {"epochs", "batch_size", "lr", "seed", "recipe"} - set(settings)
    if lacks:
        raise RunError(
            f"{run.folder}/config.json lacks {', '.join(sorted(lacks))}; "
            f"restore it, or delete it if this SAE was imported"
        )
    return trained


def _dataset(trained: Mapping[str, Any]) -> str | None:
    """The hub's name of what the training store was made from, while that store is still there to say so."""
    file = Path(str(trained.get("store", ""))) / "store.json"
    try:
        source = json.loads(file.read_text(encoding="utf-8")).get("source")
    except (OSError, ValueError, AttributeError):
        return None  # moved, or not one of ours: then it is not known
    is_hub = isinstance(source, str) and source.startswith("hf://") and not source.startswith("hf:///")
    return source.removeprefix("hf://").split("?")[0] if is_hub else None
