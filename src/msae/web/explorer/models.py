"""The page Models: the runs side by side: facts, the poster's table, recovery and training curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from msae.base.errors import MsaeError
from msae.measure.evaluate import Evaluation, table_rows
from msae.measure.evaluate.table import meanings_of
from msae.web.explorer.address import Address
from msae.web.explorer.html import empty, fill, join, no_store, note, problem, section, table
from msae.web.explorer.session import LoadedRun, World
from msae.web.report import figures
from msae.web.report.figures import RecoveryMeasure, TrainingMeasure

RECOVERY: tuple[RecoveryMeasure, ...] = ("fvu_per_sample", "cosine", "cknna")
TRAINING: tuple[TrainingMeasure, ...] = ("fvu", "l0", "dead")


def page(world: World, run: LoadedRun, address: Address) -> Markup:
    """The whole page."""
    n = len(world.runs)
    said = "side by side: what they are, how well they reconstruct, and how their training went."
    head = fill("<h1>Models</h1><p>{} {}, {}</p>", n, "runs" if n > 1 else "run", said)
    return fill(
        "{}{}{}{}", head, section("What they are", _facts(world)), _evaluations(world, run, address), _training(world)
    )


def _facts(world: World) -> Markup:
    rows = []
    for run in world.runs.values():
        sae, config = run.sae.config, run.config
        train = config.get("train", {})
        levels = f"levels {' '.join(map(str, sae.levels))}" if sae.levels else f"l1 {train.get('l1', '-')}"
        shape = f"k {sae.k}" if sae.k else levels
        named = f"{len(run.names):,}" if run.names else "-"
        rows.append((
            run.label, sae.kind, train.get("weighting") if sae.levels else "-", shape, f"{sae.d_in:,} → {sae.d_sae:,}",
            str(train.get("epochs", "-")), named, Path(str(config.get("store", "-"))).name,
        ))  # fmt: skip
    head = ("run", "kind", "weighting", "sparsity", "size", "epochs", "named", "trained on")
    return table(head, rows, caption="What the runs are", numeric=[5, 6])


def _evaluations(world: World, run: LoadedRun, address: Address) -> Markup:
    try:
        known = world.evaluations()
    except MsaeError as err:
        return problem(err)
    if known:
        return _shown(known)
    if world.store is None:
        return no_store(world, run)
    if address.one("evaluate"):
        return fill(
            '<div id="part-evaluated" data-load="evaluated" aria-live="polite"><p class="note">Evaluating {} on {} '
            "rows: seconds to minutes …</p></div>", f"{len(world.runs)} runs", f"{len(world.store):,}",
        )  # fmt: skip
    folders = " ".join(str(one.folder) for one in world.runs.values())
    return fill(
        '{}<p class="actions"><a class="button" href="{}">Evaluate now</a></p>',
        empty("These runs have not been evaluated yet", "Evaluate them here or in a terminal:",
              f"msae evaluate {folders} --on {world.store.path} --recovery"),
        address.but(evaluate="1"),
    )  # fmt: skip


def evaluated(world: World, _run: LoadedRun, _address: Address) -> Markup:
    """The evaluation, made now and kept in the run folders."""
    try:
        return _shown(world.evaluate_now())
    except MsaeError as err:
        return problem(err)


def _shown(evaluations: Sequence[Evaluation]) -> Markup:
    rows = table_rows(evaluations)
    cells = [[fill("<b>{}</b>" if cell.is_best else "{}", cell.text) for cell in row.values()] for row in rows]
    numeric = list(range(1, len(rows[0])))
    meanings = join(fill("<dt>{}</dt><dd>{}</dd>", term, meaning) for term, meaning in meanings_of(rows[0]).items())
    on = ", ".join(dict.fromkeys(f"{e.n:,} {e.modality} rows of {Path(e.on).name}" for e in evaluations))
    notes = join(note(text) for text in dict.fromkeys(text for e in evaluations for text in e.notes))
    body = fill(
        '{}<p class="note">{}; the best of each column is bold.</p>{}<details><summary>What the columns mean</summary>'
        "<dl>{}</dl></details>",
        table(list(rows[0]), cells, caption="The poster's table", numeric=numeric), on, notes, meanings,
    )  # fmt: skip
    curves = {
        row["model"].text: [dataclasses.asdict(point) for point in e.recovery]
        for row, e in zip(rows, evaluations, strict=True)
        if e.recovery
    }
    drawn = fill("")
    if curves:
        pieces = [figures.recovery_curves(curves, measure) for measure in RECOVERY]
        hint = "Only the k strongest latents of each row are kept: how soon does the reconstruction come back?"
        drawn = section("Recovery", _figures(pieces), hint=hint)
    return fill("{}{}", section("The poster's table", body), drawn)


def _training(world: World) -> Markup:
    try:
        by_run = {run.label: rows for run in world.runs.values() if (rows := run.opened.metrics)}
        if not by_run:
            return section("Training", note("These runs have no metrics.jsonl: they were not trained here."))
        drawn = [figures.training_curves(by_run, measure) for measure in TRAINING]
    except MsaeError as err:
        return section("Training", problem(err))
    return section("Training", _figures(drawn))


def _figures(drawn: Sequence[str]) -> Markup:
    return fill('<div class="figures">{}</div>', join(fill("<figure>{}</figure>", Markup(svg)) for svg in drawn))  # noqa: S704 - escaped


PARTS = {"": page, "evaluated": evaluated}
