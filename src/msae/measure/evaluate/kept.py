"""The records of evaluations of a run: one file for each store, modality and inference, for others to read."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msae.base.errors import ConfigError, RunError
from msae.base.files import read_json, write_json
from msae.base.records import of_record
from msae.data.store import EmbeddingStore
from msae.measure.evaluate.record import Evaluation
from msae.sae.run import Origin, Run, RunLike
from msae.sae.view import View

SCHEMA_VERSION = 2
FOLDER = "eval"
"""The kind of derived files that records are; see `Run.caches`."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """An evaluation from a run folder, and what it was derived from."""

    evaluation: Evaluation
    origin: Origin
    """The evaluation store and the weights."""
    labels: str | None
    """The column of the probe's figures; None where there are none."""
    probe_origin: Origin | None
    """The store that the probe was trained on."""

    @property
    def rows(self) -> tuple[str, ...]:
        """What evaluations must share for their figures without a probe to be compared."""
        e = self.evaluation
        return self.origin.fingerprint, e.modality, e.inference, str(e.k)

    @property
    def probe(self) -> tuple[str, ...]:
        """What evaluations must share for the figures of their probes to be compared; empty where there are none."""
        if self.labels is None or self.probe_origin is None:
            return ()
        trained_on = self.probe_origin
        return self.labels, self.origin.metadata, trained_on.fingerprint, trained_on.metadata

    @property
    def subject(self) -> tuple[str, ...]:
        """What evaluations must share for all their figures to be compared."""
        return (*self.rows, *self.probe)

    def compared_with(self, other: Kept) -> Evaluation | None:
        """The figures of this evaluation that may stand in one table with those of `other`.

        None where the rows or the inference differ. Figures of a probe of another column, of changed labels or of
        another training store are left out.
        """
        if self.rows != other.rows:
            return None
        return self.evaluation if self.probe == other.probe else self.without_probe().evaluation

    def without_probe(self) -> Kept:
        """The figures for which no labels are needed."""
        nothing: dict[str, Any] = dict.fromkeys(_PROBE_FIGURES)
        evaluation = dataclasses.replace(self.evaluation, **nothing)
        return Kept(evaluation, self.origin, None, None)


_PROBE_FIGURES = tuple(
    field.name
    for field in dataclasses.fields(Evaluation)
    if field.name.startswith("probe_") or field.name == "class_f1"
)


def keep(evaluation: Evaluation, view: View, labels: str | None, probe_store: EmbeddingStore | None) -> Evaluation:
    """Write the record beside the run, if it has a folder, and return it.

    Figures of an earlier evaluation that were not asked for this time stay in the file while they are still true.
    That it cannot be written is said in the notes: the figures are worth more than their file.

    Args:
        view: What was evaluated.
        probe_store: What the probe was trained on, where there was one.
    """
    run, store = view.run, view.store
    folder = run.writable_cache(FOLDER)
    if folder is None:
        return evaluation
    origin = run.origin(store)
    probe_origin = None if probe_store is None else run.origin(probe_store)
    kept = Kept(evaluation, origin, labels, probe_origin)
    same_rows = (
        one for one in _readable(run) if one.rows == kept.rows and run.holds(one.origin, store, metadata=False)
    )
    earlier = next(same_rows, None)
    if earlier is not None:
        kept = _with_earlier(kept, _still_true(earlier, run, store))
    k = "" if view.k is None else f"-{view.k}"
    file = folder / f"{origin.fingerprint[:16]}-{view.modality}-{view.inference}{k}.json"
    if kept == earlier and file.exists():
        return evaluation
    try:
        write_json(file, _record(kept), schema_version=SCHEMA_VERSION)
    except OSError as err:
        note = f"not kept in {file.parent} ({err.strerror})"
        return dataclasses.replace(evaluation, notes=(*evaluation.notes, note))
    return evaluation


def kept_evaluations(run: RunLike) -> list[Kept]:
    """What `evaluate` left of a run, in the order of the file names; `current_evaluations` has what is still true.

    Raises:
        RunError: A file is damaged.
    """
    return [kept for file in Run.open(run).cached_files(FOLDER) if (kept := _read(file)) is not None]


def current_evaluations(run: RunLike) -> list[Kept]:
    """What `evaluate` left of a run and is still true of its weights, and of the store as it lies there now.

    Figures of a probe are left out where labels have changed since.

    Raises:
        RunError: A file is damaged.
    """
    run = Run.open(run)
    found = {kept.rows: kept for kept in reversed(kept_evaluations(run)) if run.holds(kept.origin, metadata=False)}
    return [_still_true(kept, run) for kept in reversed(found.values())]


def _still_true(kept: Kept, run: Run, store: EmbeddingStore | None = None) -> Kept:
    """Without the figures of the probe where its labels or its training rows have changed."""
    if kept.probe_origin is None or (run.holds(kept.origin, store) and run.holds(kept.probe_origin)):
        return kept
    return kept.without_probe()


def _with_earlier(kept: Kept, earlier: Kept) -> Kept:
    """With the recovery and the probe of an earlier record of the same rows where it has none itself."""
    more: dict[str, Any] = {}
    if kept.evaluation.recovery is None:
        more["recovery"] = earlier.evaluation.recovery
    if kept.labels is not None:
        return dataclasses.replace(kept, evaluation=dataclasses.replace(kept.evaluation, **more))
    more |= {name: getattr(earlier.evaluation, name) for name in _PROBE_FIGURES}
    evaluation = dataclasses.replace(kept.evaluation, **more)
    return Kept(evaluation, kept.origin, earlier.labels, earlier.probe_origin)


def _readable(run: Run) -> list[Kept]:
    """The records that can be read; a damaged one is made again."""
    found = []
    for file in run.cached_files(FOLDER):
        try:
            found.append(_read(file))
        except RunError:
            continue
    return [kept for kept in found if kept is not None]


def _record(kept: Kept) -> dict[str, Any]:
    origin, probe = kept.origin, kept.probe_origin
    return {
        "store_fingerprint": origin.fingerprint,
        "store_metadata": origin.metadata,
        "sae": origin.sae,
        "labels": kept.labels,
        "probe_train": probe and {"store": probe.store, "fingerprint": probe.fingerprint, "metadata": probe.metadata},
        **kept.evaluation.to_json(),
    }


def _read(file: Path) -> Kept | None:
    """The record in a file; None for one that an earlier msae made, which did not say enough of what it was made."""
    record = read_json(file, schema_version=(1, SCHEMA_VERSION), error=RunError)
    if record["schema_version"] == 1:
        _log.warning("%s was made by an earlier msae and is ignored; evaluate again", file)
        return None
    known = {field.name for field in dataclasses.fields(Evaluation)}
    values = {key: value for key, value in record.items() if key in known}
    try:
        evaluation = of_record(
            Evaluation, values, where=str(file), error=RunError, remedy="delete it and evaluate again"
        )
        sae, labels, probe = str(record["sae"]), record["labels"], record["probe_train"]
        origin = Origin(evaluation.on, str(record["store_fingerprint"]), str(record["store_metadata"]), sae)
        trained_on = probe and Origin(str(probe["store"]), str(probe["fingerprint"]), str(probe["metadata"]), sae)
        return Kept(evaluation, origin, labels and str(labels), trained_on)
    except (KeyError, TypeError, AttributeError, ConfigError) as err:
        raise RunError(f"{file} is damaged ({type(err).__name__}: {err}); delete it and evaluate again") from err
