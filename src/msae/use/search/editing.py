"""A query before and after its concepts were edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from msae.base.errors import ConfigError
from msae.concepts.concept import ConceptSet
from msae.sae.model import SAE
from msae.use.edits import Edit, apply, edit_activations, parse_change, target, warn
from msae.use.search.query import Query
from msae.use.search.results import AppliedEdit


class EditedQuery(NamedTuple):
    """Both states of a query, as an embedding and as activations."""

    x: Float32[np.ndarray, " d_in"]
    x_edited: Float32[np.ndarray, " d_in"]
    z: Float[Tensor, " d_sae"] | None
    """None where the SAE cannot read the query's modality."""
    z_edited: Float[Tensor, " d_sae"] | None
    edits: tuple[AppliedEdit, ...]
    warnings: tuple[str, ...]

    @property
    def is_changed(self) -> bool:
        return not np.array_equal(self.x, self.x_edited)


def edit_query(
    sae: SAE, query: Query, edits: Sequence[Edit], concepts: ConceptSet, *, exclusive: bool, keep_residual: bool
) -> EditedQuery:
    """The query with all edits made; `exclusive` adds the removal of rivals to every edit that raises a concept.

    Raises:
        ConfigError: The SAE has no statistics of the query's modality, or --exclusive has no names to work with.
    """
    x = torch.from_numpy(query.x).unsqueeze(0)
    if query.modality not in sae.standardizer and not edits and keep_residual:
        note = f"no shared concepts are shown: the SAE has no statistics of {query.modality} embeddings"
        return EditedQuery(query.x, query.x, None, None, (), (note,))
    z = sae.encode(x, query.modality)
    everything: list[Edit] = []
    applied, warnings = [], []
    chosen = {latent for edit in edits for latent in edit.group.latents}
    for edit in edits:
        now = edit.group.strength(z)
        wanted = float(target(edit, now))
        rivals = concepts.rivals(edit.group) if exclusive and wanted > float(now) else []
        removals = [Edit(rival, parse_change(0)) for rival in rivals if not chosen & set(rival.latents)]
        everything += [*removals, edit]
        applied.append(_describe(edit, float(now), wanted, removals, warn(edit, z)))
    warnings += [edit.warning for edit in applied if edit.warning]
    if edits and concepts.view.modality != query.modality:
        warnings.append(
            f"the store has no {query.modality} rows: natural strengths are those of its {concepts.view.modality} rows"
        )
    x_edited = apply(sae, x, query.modality, everything, keep_residual=keep_residual)[0].numpy()
    if not np.isfinite(x_edited).all() or not x_edited.any():
        raise ConfigError("the edited query is all zero or not finite and has no neighbours; edit it less")
    return EditedQuery(query.x, x_edited, z[0], edit_activations(z, everything)[0], tuple(applied), tuple(warnings))


def _describe(edit: Edit, before: float, after: float, rivals: Sequence[Edit], warning: str | None) -> AppliedEdit:
    natural = edit.group.natural
    strengths = {f"p{percent}": natural.quantile(percent) for percent in (50, 90, 99)}
    return AppliedEdit(
        concept=edit.group.name,
        value=str(edit.change),
        latents=edit.group.latents,
        before=before,
        after=after,
        natural={**strengths, "max": natural.maximum, "firing_rate": natural.firing_rate},
        rivals=tuple(rival.group.name for rival in rivals),
        warning=warning,
    )
