"""`Evaluation`: the figures of one SAE on one store, and their JSON keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msae.base.results import Result
from msae.measure.evaluate.table import mode_of, names_of, poster_table
from msae.sae.model import Inference
from msae.sae.standardize import Modality


@dataclass(frozen=True)
class RecoveryPoint:
    """What the k strongest activations of each row reconstruct; the fields are those of `Evaluation`."""

    k: int
    fvu: float | None
    fvu_per_sample: float | None
    cosine: float | None
    cknna: float | None
    """On the first CKNNA batch."""
    dead: int


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """Figures of one SAE on one store; definitions in `msae.measure.metrics`. None where a figure is undefined.

    `x` and `x_hat` are standardised with the modality's statistics, `std` is over rows, and all kinds of SAE are
    compared in the same mode, `inference`: `relu` removes TopK from those trained with it, as the poster does.
    """

    run: str | None
    """The run folder as it was given; None for an SAE that was given itself."""
    kind: str
    inference: Inference
    k: int | None
    """Of inference `topk`, else None."""
    modality: Modality
    on: str
    """The evaluation store."""
    standardized_by: Literal["run", "evaluation store"]
    """Whose mean and scale: the evaluation store's where the SAE was trained without this modality."""
    n: int
    """Rows of the evaluation store."""
    d_in: int
    d_sae: int
    sparsity: float
    """Share of exact zeros in z, 0 to 1."""
    sparsity_std: float
    l0: float
    """Mean count of non-zero latents of a row."""
    fvu: float | None
    """Pooled fraction of variance unexplained; None where all rows are equal."""
    fvu_per_sample: float | None
    """Mean of squared error over squared norm; the row compared with the poster."""
    fvu_per_sample_std: float | None
    fvu_authors: float | None
    """The released code's formula, on raw vectors."""
    cosine: float
    """Mean cosine of x and x_hat, -1 to 1."""
    cosine_std: float
    mae: float | None
    """Mean absolute error over mean absolute value."""
    cknna: float | None
    """Alignment of x and z, mean over batches; None with fewer than 11 rows."""
    cknna_std: float | None
    """Over batches; 0 where there is one."""
    cknna_batches: int
    decoder_orthogonality: float
    """Mean squared cosine of two decoder rows; random ones score 1/d_in."""
    max_decoder_cosine: float
    """Mean over latents of the largest absolute cosine with another."""
    dead: int
    """Latents never non-zero on the evaluation store."""
    dead_train: int | None
    """Latents never non-zero on the training store; None where that cannot be opened, see `notes`."""
    probe_kl: float | None = None
    """KL of the probe's classes before and after reconstruction, nats."""
    probe_kl_std: float | None = None
    probe_agreement: float | None = None
    """Share of rows whose predicted class is unchanged."""
    probe_accuracy: float | None = None
    """Share of rows whose class is predicted, before reconstruction."""
    probe_accuracy_reconstructed: float | None = None
    probe_n: int | None = None
    """Rows in the probe figures: those whose class the probe was trained on, and which it was not itself trained on."""
    probe_left_out: int | None = None
    """The other rows; `notes` says why they are left out."""
    probe_classes: int | None = None
    class_f1: float | None = None
    """Mean over classes of the F1, 0 to 1, with which the one latent that fits a class best on the probe's training
    rows fires on the evaluated ones."""
    recovery: tuple[RecoveryPoint, ...] | None = None
    notes: tuple[str, ...] = field(default=())
    """Why a figure is None, and which rows are left out of the probe's figures."""

    def to_json(self) -> dict[str, Any]:
        """JSON values by the contract's keys, without those of figures that were not asked for."""
        record = dataclasses.asdict(self)
        unasked = {"recovery"} if self.recovery is None else set()
        if self.probe_n is None:
            unasked |= {name for name in record if name.startswith("probe_") or name == "class_f1"}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in record.items()
            if key not in unasked
        }

    def records(self) -> list[dict[str, Any]]:
        """The figures as one record, without the recovery."""
        record = self.to_json()
        record.pop("recovery", None)
        return [record | {"notes": "; ".join(self.notes)}]

    def to_text(self) -> str:
        """Its row of the poster's table."""
        return poster_table([self])

    @property
    def headline(self) -> str:
        return f"{names_of([self])[0]} on {_measured([self])}"


class Evaluations(Result, list[Evaluation]):
    """The evaluations of several SAEs on the same rows."""

    def to_json(self) -> list[dict[str, Any]]:
        """A record for each, by the contract's keys."""
        return [one.to_json() for one in self]

    def records(self) -> list[dict[str, Any]]:
        return [record for one in self for record in one.records()]

    def to_text(self) -> str:
        """The poster's table, the best value of each column marked."""
        return poster_table(self)

    @property
    def headline(self) -> str:
        return f"{len(self)} SAEs on {_measured(self)}"


def _measured(evaluations: Sequence[Evaluation]) -> str:
    """The rows and the mode, and the figures that are read first."""
    first = evaluations[0]
    figures = ""
    if len(evaluations) == 1:
        cosine, fvu = f"cosine {first.cosine:.3f}", "" if first.fvu is None else f", FVU {first.fvu:.3f}"
        figures = f": sparsity {first.sparsity:.3f}, {cosine}{fvu}"
    return f"{first.n:,} {first.modality} rows of {first.on}, inference {mode_of(first)}{figures}"


def json_number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
