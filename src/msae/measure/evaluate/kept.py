"""The records of evaluations in a run folder: one file for each store, modality and inference, for others to read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from msae.base.config import from_mapping
from msae.base.errors import ConfigError, RunError
from msae.base.files import read_json, write_json
from msae.data.store import EmbeddingStore
from msae.measure.evaluate.record import Evaluation, RecoveryPoint
from msae.measure.evaluate.subject import Options, SAELike
from msae.sae.model import SAE, weights_hash

SCHEMA_VERSION = 1
FOLDER = "eval"
"""Inside a run folder."""


class Kept(NamedTuple):
    """An evaluation from a run folder, and what it was of."""

    evaluation: Evaluation
    store_fingerprint: str
    sae: str
    """A hash of the weights that were evaluated."""
    labels: str | None
    """The column of the probe's figures."""

    @property
    def subject(self) -> tuple[str, ...]:
        """What evaluations must share to be compared."""
        e = self.evaluation
        return self.store_fingerprint, e.modality, e.inference, str(e.k)


def keep(evaluation: Evaluation, sae: SAELike, store: EmbeddingStore, options: Options) -> Evaluation:
    """Write the record into the run folder, if `sae` is one, and return it.

    Figures of an earlier evaluation that were not asked for this time stay in the file. That it cannot be written is
    said in the notes: the figures are worth more than their file.
    """
    if isinstance(sae, SAE) or not Path(sae).is_dir():
        return evaluation
    subject = (store.fingerprint, options.modality, options.inference, str(options.k))
    k = "" if options.k is None else f"-{options.k}"
    file = Path(sae) / FOLDER / f"{store.fingerprint[:16]}-{options.modality}-{options.inference}{k}.json"
    record = {
        "store_fingerprint": store.fingerprint,
        "sae": weights_hash(SAE.load(sae)),
        "labels": options.labels,
        **evaluation.to_dict(),
    }
    try:
        earlier = read_json(file, schema_version=SCHEMA_VERSION, error=RunError)
        known = _kept(earlier, file)
        if known.sae == record["sae"] and known.subject == subject:
            record = _with_earlier(record, earlier)
    except RunError:
        earlier = {}  # none, or a damaged one that is now made again
    if {key: value for key, value in earlier.items() if key not in ("schema_version", "made_by")} == record:
        return evaluation
    try:
        write_json(file, record, schema_version=SCHEMA_VERSION)
    except OSError as err:
        note = f"not kept in {file.parent} ({err.strerror})"
        return dataclasses.replace(evaluation, notes=(*evaluation.notes, note))
    return evaluation


def kept_evaluations(folder: str | Path) -> list[Kept]:
    """What `evaluate` left in a run folder, in the order of the file names.

    Raises:
        RunError: A file is damaged.
    """
    files = sorted((Path(folder) / FOLDER).glob("[!.]*.json"))
    return [_kept(read_json(file, schema_version=SCHEMA_VERSION, error=RunError), file) for file in files]


def _with_earlier(record: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The record with the recovery and the probe of an earlier one where it has none itself."""
    asked = {"recovery"} if "recovery" in record else set()
    if "probe_n" in record:
        asked |= {"labels", *(key for key in earlier if key.startswith("probe_"))}
    more = {key: value for key, value in earlier.items() if key.startswith("probe_") or key in ("labels", "recovery")}
    return {**record, **{key: value for key, value in more.items() if key not in asked}}


def _kept(record: dict[str, Any], file: Path) -> Kept:
    known = {field.name for field in dataclasses.fields(Evaluation)}
    values = {key: value for key, value in record.items() if key in known}
    try:
        recovery = values.pop("recovery", None)
        points = None if recovery is None else tuple(from_mapping(RecoveryPoint, p, where=str(file)) for p in recovery)
        evaluation = dataclasses.replace(from_mapping(Evaluation, values, where=str(file)), recovery=points)
        labels = record.get("labels")
        return Kept(evaluation, str(record["store_fingerprint"]), str(record["sae"]), labels and str(labels))
    except (KeyError, TypeError, AttributeError, ConfigError) as err:
        raise RunError(f"{file} is damaged ({type(err).__name__}: {err}); delete it and evaluate again") from err
