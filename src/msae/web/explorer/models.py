"""The page Models: the runs side by side: settings, the table of measures, recovery and training curves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from markupsafe import Markup

from msae.base.errors import MsaeError
from msae.measure.evaluate import Evaluation, table_rows
from msae.measure.evaluate.record import headings, judgements_of, legend, mode_of
from msae.web.explorer.address import Address
from msae.web.explorer.filling import draw
from msae.web.explorer.session import LoadedRun, World
from msae.web.report import figures
from msae.web.report.figures import RecoveryMeasure, TrainingMeasure

RECOVERY: tuple[RecoveryMeasure, ...] = ("fvu_per_sample", "cosine", "cknna")
TRAINING: tuple[TrainingMeasure, ...] = ("fvu", "l0", "dead")


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page."""
    values: dict[str, Any] = {"table": None, "problem": None, "training": [], "damaged": None}
    try:
        known = world.evaluations()
        values["table"] = _table(known) if known else None
    except MsaeError as err:
        values["problem"] = err
    try:
        by_run = {run.label: rows for run in world.runs.values() if (rows := run.opened.metrics)}
        values["training"] = [figures.training_curves(by_run, measure) for measure in TRAINING] if by_run else []
    except MsaeError as err:
        values["damaged"] = err
    settings = [_settings(one) for one in world.runs.values()]
    table: list[list[str]] = [list(settings[0]), *(list(one.values()) for one in settings)]
    return draw("models", world, run, address, settings=table, **values)


def _settings(run: LoadedRun) -> dict[str, str]:
    """What a run is, a column for each setting."""
    sae, train = run.sae.config, run.config.get("train", {})
    levels = f"levels {' '.join(map(str, sae.levels))}" if sae.levels else f"l1 {train.get('l1', '-')}"
    return {
        "run": run.label,
        "kind": sae.kind,
        "weighting": str(train.get("weighting")) if sae.levels else "-",
        "sparsity": f"k {sae.k}" if sae.k else levels,
        "size": f"{sae.d_in:,} → {sae.d_sae:,}",
        "epochs": str(train.get("epochs", "-")),
        "named latents": f"{len(run.names):,}" if run.names else "-",
        "trained on": Path(str(run.config.get("store", "-"))).name,
    }


def evaluated(world: World, run: LoadedRun, address: Address) -> Markup:
    """The evaluation, made now and kept in the run folders."""
    return draw("evaluated", world, run, address, table=_table(world.evaluate_now()))


def _table(evaluations: list[Evaluation]) -> dict[str, Any]:
    """The table of measures, and the recovery curves."""
    rows = table_rows(evaluations)
    curves = {
        row["model"].text: [dataclasses.asdict(point) for point in e.recovery]
        for row, e in zip(rows, evaluations, strict=True)
        if e.recovery
    }
    return {
        "rows": rows,
        "head": headings(rows[0]),
        "meanings": legend(rows[0]),
        "judgements": judgements_of(evaluations),
        "on": list(
            dict.fromkeys(
                f"{e.n:,} {e.modality} rows of {Path(e.on).name}, inference {mode_of(e)}" for e in evaluations
            )
        ),
        "notes": list(dict.fromkeys(note for e in evaluations for note in e.notes)),
        "recovery": [figures.recovery_curves(curves, measure) for measure in RECOVERY] if curves else [],
    }


PARTS = {"": page, "evaluated": evaluated}
