"""The concepts of a run as things to turn, learnt from the rows of the store that is searched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from msae.base.errors import ConfigError
from msae.concepts.names import ConceptNames
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE
from msae.sae.standardize import Modality
from msae.use.edits import Edit, Handle, activations_of, latents_of, make_handle, parse_change, with_companions
from msae.use.rivals import excluded_by, is_present

SAMPLE = 10_000
"""Rows, evenly spread over the store, that tell how strong a concept naturally is and what moves with it."""
RIVAL_SAMPLE = 8_000
"""Rows that tell which concepts exclude each other; every named concept is read on them."""
BATCH = 1024
REMEMBERED = 2**29
"""Bytes of activations that are kept from one handle to the next."""


@dataclass(frozen=True, eq=False)
class Handles:
    """Makes handles of concepts for queries of one modality."""

    sae: SAE
    store: EmbeddingStore
    modality: Modality
    names: ConceptNames | None
    strict: bool = False
    """Turn the latents that bear a name alone, without what moves with them."""
    remember: bool = False
    """Keep the handles, and the activations of the sample where they take at most `REMEMBERED` bytes."""
    _made: dict[str, Handle] = field(default_factory=dict, repr=False)

    def of(self, concept: str) -> Handle:
        """The handle of a name, a latent's number `#123`, or several of these divided by `|`.

        A name is a concept and moves what moves with it; a number means that latent alone.

        Raises:
            ConfigError: There is no such concept, or it never fires in the store.
        """
        if concept in self._made:
            return self._made[concept]
        handle = self._make(concept)
        if self.remember:
            self._made[concept] = handle
        return handle

    def _make(self, concept: str) -> Handle:
        latents = latents_of(concept, self._find, self.sae.d_sae)
        z = activations_of(self.sae, self._sample(SAMPLE), self.natural_modality, latents)
        handle = make_handle(concept, latents, z, self.sae.W_dec)
        if self.strict or all(part.strip().startswith("#") for part in concept.split("|")):
            return handle
        return with_companions(handle, self.sample_activations())

    @property
    def natural_modality(self) -> Modality:
        """The query's where the store has it: what is natural in a caption is not what is natural in a picture."""
        return self.modality if self.modality in self.store.modalities else self.store.modalities[0]

    def rivals(self, handle: Handle) -> list[Handle]:
        """The named concepts of the same kind: where one of them is, the other is not; see `msae.use.rivals`."""
        others = [rival for rival in self._named if not set(rival.latents) & set(handle.latents)]
        if not others:
            return []
        mine = handle.strength(self._on_sample)
        theirs = torch.stack([rival.strength(self._on_sample) for rival in others], 1)
        excluded = excluded_by(is_present(mine.unsqueeze(1))[:, 0], is_present(theirs))
        return [rival for rival, is_rival in zip(others, excluded.tolist(), strict=True) if is_rival]

    def removals(self, edit: Edit) -> list[Edit]:
        """The edits that take away the rivals of what `edit` raises."""
        return [Edit(rival, parse_change(0)) for rival in self.rivals(edit.handle)]

    @cached_property
    def _named(self) -> list[Handle]:
        """A handle of every name, but for those that never fire."""
        if self.names is None:
            raise ConfigError(
                "--exclusive needs the names of the rival concepts, and this run has none; "
                "type msae name RUN --vocabulary STORE first"
            )
        found = []
        for name in dict.fromkeys(concept.name for concept in self.names):
            latents = self.names.latents_of(name)
            z = self._on_sample[:, latents]
            if bool((z > 0).any()):
                found.append(make_handle(name, latents, z, self.sae.W_dec))
        return found

    @cached_property
    def _on_sample(self) -> Tensor:
        """Activations of all latents on fewer rows."""
        return torch.cat(list(self._encoded(RIVAL_SAMPLE)))

    def sample_activations(self) -> Iterable[Tensor]:
        """Activations of all latents on rows spread evenly over the store, block by block."""
        return self._kept_activations if self._is_small else self._encoded(SAMPLE)

    @property
    def _is_small(self) -> bool:
        return self.remember and 4 * self.sae.d_sae * min(SAMPLE, len(self.store)) <= REMEMBERED

    @cached_property
    def _kept_activations(self) -> list[Tensor]:
        return list(self._encoded(SAMPLE))

    def _encoded(self, n: int) -> Iterator[Tensor]:
        return (self.sae.encode(x, self.natural_modality) for x in self._sample(n))

    def _sample(self, n: int) -> Iterator[Tensor]:
        n = min(n, len(self.store))
        rows = np.linspace(0, len(self.store) - 1, n).round().astype(np.int64)
        for first in range(0, n, BATCH):
            yield torch.from_numpy(self.store.take(rows[first : first + BATCH], self.natural_modality))

    def _find(self, name: str) -> list[int]:
        if self.names is None:
            raise ConfigError(
                f"there is no concept {name!r}: this run has no names; "
                f"type msae name RUN --vocabulary STORE first, or give a latent's number such as '#12'"
            )
        return self.names.latents_of(name)
