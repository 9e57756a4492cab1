"""One sample's class probability while a concept goes from 0 to twice its natural p99."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from msae.base.errors import ConfigError
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE, Inference
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.audit.measure import probabilities
from msae.use.audit.results import ConceptAudit, Sweep
from msae.use.audit.subjects import Subject, make_subject
from msae.use.interventions import Concepts

SWEEP_POINTS = 33


def sweep_row(
    subject: Subject, concepts: Concepts, column: int, group: Sequence[int], row: int, class_: int, p99: float
) -> Sweep:
    """The sweep of the concept `column` of `concepts`, whose latents are `group`, in a row of the store.

    Args:
        class_: Whose probability is computed.
        p99: Of the concept's natural strengths.
    """
    own = np.array([row], dtype=np.int64)
    members = concepts.owner == column
    z = torch.from_numpy(subject.view.table(own, group))
    strengths = torch.linspace(0, 2 * p99, SWEEP_POINTS)
    classifier = subject.classifier
    u = classifier.features(subject.raw(own))
    move = strengths[:, None] * concepts.pattern[members] - z
    edited = u + move @ concepts.rows[members]
    if classifier.unit_norm:
        edited = torch.nn.functional.normalize(edited, dim=1)
    found = probabilities(edited @ classifier.weight.T + classifier.bias, [class_])[:, 0]
    strength = float((z[0] * concepts.reader[members]).sum())
    return Sweep(str(subject.view.store.ids[row]), strength, p99, tuple(strengths.tolist()), tuple(found.tolist()))


class Sweeper:
    """Sweeps of any sample under the classifier of an audit that trained it on half of a store."""

    def __init__(
        self,
        sae: SAE | str | Path,
        on: EmbeddingStore | str | Path,
        target: str,
        *,
        modality: Modality = "image",
        inference: Inference = "trained",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        """The arguments are those of `msae.audit`, and so is what is raised."""
        view = View(sae, on, modality, inference=inference, device=device)
        self.subject = make_subject(view, target=target, classifier=None, class_texts=None, train_store=None, seed=seed)
        self._concepts = lru_cache(256)(self._made)

    def of(self, concept: ConceptAudit, id: str) -> Sweep | None:
        """The sweep of one audited concept in the row `id`; None where the audit could not edit the concept.

        Raises:
            ConfigError: The audit is of another classifier.
            StoreError: No row has that id.
        """
        classes = self.subject.classifier.classes
        if concept.sweep is None or concept.class_ is None:
            return None
        if concept.class_ not in classes:
            raise ConfigError(f"there is no class {concept.class_!r} here; the classes are {', '.join(classes)}")
        row = self.subject.view.store.ids.row_of(id)
        made = self._concepts(concept.latents)
        p99 = concept.sweep.natural_p99
        return sweep_row(self.subject, made, 0, concept.latents, row, classes.index(concept.class_), p99)

    def _made(self, group: tuple[int, ...]) -> Concepts:
        mean = torch.zeros(self.subject.view.sae.d_sae)
        z = self.subject.view.table(self.subject.rows, group)
        mean[list(group)] = torch.from_numpy(z.mean(0))
        return self.subject.concepts([group], mean)
