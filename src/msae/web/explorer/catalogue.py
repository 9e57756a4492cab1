"""`Catalogue`: every latent of a run with what is known of it, to be searched, sorted and filtered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msae.concepts.names import ConceptNames
from msae.concepts.samples import TopSamples
from msae.sae.model import SAE
from msae.sae.standardize import Modality

COARSE = 16
"""A coarse concept has half of its firings among the strongest sixteenth of the latents."""
ALMOST_NONE = 0.2
"""Below this share of its mean activation in the one modality, a latent is said to be of the other alone."""


class Choice(NamedTuple):
    """A filter that can be chosen."""

    key: str
    label: str
    explanation: str


CHOICES = (
    Choice("", "all", "every latent"),
    Choice("named", "named", "latents with a name that rows have confirmed, or with a nearest word beyond chance"),
    Choice("unnamed", "unnamed", "latents without a name"),
    Choice("coarse", "coarse", "mostly among the strongest sixteenth of the latents where they fire: broad concepts"),
    Choice("fine", "fine", "mostly weaker than that where they fire: details"),
    Choice("image", "image-only", "on average less than a fifth as strong in texts as in images"),
    Choice("text", "text-only", "on average less than a fifth as strong in images as in texts"),
    Choice("dead", "dead", "latents that never fire on this store"),
)


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Facts of all latents, each an array of d_sae values; those of a store are of its first modality."""

    names: tuple[str | None, ...]
    likely: tuple[str | None, ...]
    """The nearest word of the vocabulary, for latents that have not earned a name."""
    cosine: NDArray[np.float64]
    """Of the name, or the nearest word, and the decoder row; NaN where neither is known."""
    auroc: NDArray[np.float64]
    """How well the latent tells rows with its name from others; NaN where that was not tested."""
    rate: NDArray[np.float64]
    mean: NDArray[np.float64]
    maximum: NDArray[np.float64]
    profile: NDArray[np.float64]
    """(d_sae, levels): the share of its firings in which a latent is among the k strongest."""
    levels: tuple[int, ...]
    masks: Mapping[str, NDArray[np.bool_]]
    """Of the filters that these runs and this store allow."""

    @classmethod
    def of(cls, sae: SAE, names: ConceptNames | None, samples: Mapping[Modality, TopSamples]) -> Catalogue:
        """The catalogue of a run; without samples only what the run itself says."""
        n = sae.d_sae
        concepts = [names.concept_of(latent) if names else None for latent in range(n)]
        near = [next(iter(names.candidates_of(latent)), None) if names else None for latent in range(n)]
        named = np.array([concept is not None for concept in concepts])
        cosines = [c.cosine if c else w.cosine if w else np.nan for c, w in zip(concepts, near, strict=True)]
        masks = {"named": named, "unnamed": ~named}
        first = next(iter(samples.values()), None)
        nothing = np.full(n, np.nan)
        if first is not None:
            coarse = _is_coarse(first)
            dead = np.all([found.fired == 0 for found in samples.values()], axis=0)
            masks |= {"coarse": coarse & ~dead, "fine": ~coarse & ~dead, "dead": dead}
        if "image" in samples and "text" in samples:
            image, text = samples["image"].mean, samples["text"].mean
            masks |= {"image": text < ALMOST_NONE * image, "text": image < ALMOST_NONE * text}
        return cls(
            names=tuple(concept.name if concept else None for concept in concepts),
            likely=tuple(word.word if word else None for word in near),
            cosine=np.array(cosines, dtype=np.float64),
            auroc=np.array([c.agreement.auroc if c and c.agreement else np.nan for c in concepts], dtype=np.float64),
            rate=nothing if first is None else first.firing_rate,
            mean=nothing if first is None else first.mean,
            maximum=nothing if first is None else first.maximum.astype(np.float64),
            profile=np.zeros((n, 0)) if first is None else first.level_profile,
            levels=() if first is None else first.levels,
            masks=masks,
        )

    def select(self, words: str, only: str, sort: str) -> NDArray[np.int64]:
        """The latents that fit, in order.

        Args:
            words: Part of a name or of the nearest word, in any letter case, or a latent's number.
            only: The key of a filter.
            sort: A column, with a minus for the largest first; latents without a value come last.
        """
        keep = self.masks.get(only, np.ones(len(self.names), bool))
        wanted = words.casefold().strip()
        if wanted:
            number = wanted.removeprefix("#")
            keep = keep & np.array(
                [
                    wanted in (name or likely or "").casefold() or str(latent) == number
                    for latent, (name, likely) in enumerate(zip(self.names, self.likely, strict=True))
                ]
            )
        latents = np.flatnonzero(keep)
        return latents[self._order(latents, sort)]

    def _order(self, latents: NDArray[np.int64], sort: str) -> NDArray[np.int64]:
        column, falling = sort.removeprefix("-"), sort.startswith("-")
        if column == "name":
            ranks = sorted(range(len(latents)), key=lambda i: (self.names[latents[i]] or "").casefold())
            known = [i for i in ranks if self.names[latents[i]]]
            rest = [i for i in ranks if not self.names[latents[i]]]
            return np.array((known[::-1] if falling else known) + rest, dtype=np.int64)
        values = self._column(column)[latents]
        values = np.where(np.isnan(values), np.inf, -values if falling else values)
        return np.lexsort((latents, values))

    def _column(self, column: str) -> NDArray[np.float64]:
        named = self.masks["named"]
        known = {
            "evidence": np.where(named, self.cosine, np.nan),
            "rate": self.rate,
            "mean": self.mean,
            "max": self.maximum,
            "level": self.profile[:, : max(1, len(self.levels) - 3)].sum(1) if self.levels else self.rate,
        }
        return known.get(column, np.arange(len(self.names), dtype=np.float64))

    def kind(self, latent: int) -> str:
        """`coarse`, `fine`, `dead`, or nothing where that is not known."""
        return next(
            (kind for kind in ("dead", "coarse", "fine") if kind in self.masks and self.masks[kind][latent]), ""
        )


def _is_coarse(samples: TopSamples) -> NDArray[np.bool_]:
    wanted = samples.d_sae / COARSE
    level = max((i for i, k in enumerate(samples.levels) if k <= wanted), default=0)
    coarse: NDArray[np.bool_] = samples.level_profile[:, level] >= 0.5
    return coarse
