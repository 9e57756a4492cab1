"""What a search answers with."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msae.base.records import to_record
from msae.base.results import Result
from msae.data.rows import Row
from msae.data.thumbnails import NOTEBOOK_SIDE, Album, figures_html
from msae.sae.standardize import Modality

Space = Literal["embedding", "latent"]


class Shared(NamedTuple):
    """A concept that is active in the edited query and in a hit."""

    concept: str
    query: float
    """Its activation in the edited query, summed over its latents."""
    hit: float


@dataclass(frozen=True, repr=False)
class Hit(Row):
    """One row that was found."""

    rank: int
    """Place in the answer to the edited query; 1 is the best."""
    score: float
    """Cosine to the edited query; in latent space, minus the L1 distance of the activations."""
    rank_before: int
    """Place in the answer to the query as it was."""
    score_before: float
    shared: tuple[Shared, ...]
    """At most five, those that both have most of first."""

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "shared": [shared._asdict() for shared in self.shared]}


@dataclass(frozen=True)
class AppliedEdit:
    """What was done to one concept of the query."""

    concept: str
    value: str
    """As it was given."""
    latents: tuple[int, ...]
    before: float
    """Strength of the concept in the query."""
    after: float
    natural: Mapping[str, float]
    """p50, p90, p99 and max of its strengths above zero in the store, and the share of rows that have one."""
    rivals: tuple[str, ...] = ()
    """Concepts of the same kind that --exclusive set to 0."""
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(to_record(self))


@dataclass(frozen=True, repr=False)
class SearchResult(Result):
    """The neighbours of an edited query, and of the query as it was."""

    store: str
    kind: str
    """What the query was given as: like, image, text or embedding."""
    value: str
    query_modality: Modality
    modality: Modality
    """Of what was searched."""
    space: Space
    edits: tuple[AppliedEdit, ...]
    hits: tuple[Hit, ...]
    before: tuple[Hit, ...]
    """The answer to the query as it was, in that order; empty without edits, where it is `hits`."""
    warnings: tuple[str, ...]
    roots: tuple[Path, ...] = (Path(),)
    """Folders that the paths of pictures may be relative to."""
    query_path: str | None = None
    """Of the query's picture, where it is a row that has one."""
    index: Mapping[str, Any] = field(default_factory=lambda: {"kind": "exact"})
    """How the rows were searched: `exact`, or `ivf` with its cells, how many were searched, and the recall of that."""

    def to_json(self) -> dict[str, Any]:
        """What `msae search --json` writes."""
        query = {"kind": self.kind, "value": self.value, "modality": self.query_modality}
        return {
            "query": query,
            "edits": [edit.to_json() for edit in self.edits],
            "hits": [hit.to_json() for hit in self.hits],
            "store": self.store,
            "modality": self.modality,
            "space": self.space,
            "before": [hit.to_json() for hit in self.before],
            "warnings": list(self.warnings),
            "index": dict(self.index),
        }

    def records(self) -> list[dict[str, Any]]:
        """A record for each hit, with the metadata's columns beside what was found."""
        found = []
        for hit in self.hits:
            record = hit.to_json()
            columns = record.pop("columns")
            shares = ", ".join(shared.concept for shared in hit.shared)
            found.append({**columns, **record, "shared": shares})
        return found

    def _repr_html_(self) -> str:
        """Pictures before and after the edits, for a notebook."""
        album = Album(self.roots, NOTEBOOK_SIDE)
        parts = [f"<pre>{html.escape(chr(10).join(self._head()))}</pre>"]
        picture = album.uri(self.query_path)
        parts += [f'<img src="{picture}" alt="the query">'] if picture else []
        before = [(f"{hit.rank_before}. {hit.score_before:.3f}", hit) for hit in self.before]
        after = [(f"{hit.rank}. {hit.score:.3f}", hit) for hit in self.hits]
        for title, hits in (("Before", before), ("After", after)) if before else (("Found", after),):
            parts.append(f"<h4>{title}</h4>{figures_html(hits, album)}")
        return "".join(parts)

    def _head(self) -> list[str]:
        """What was asked for, and what became of the query."""
        lines = [f"neighbours of {self.kind} {self.value!r} among the {self.modality} rows of {self.store}"]
        for edit in self.edits:
            latents = f"{len(edit.latents)} latents" if len(edit.latents) > 1 else f"latent {edit.latents[0]}"
            lines.append(f"  {edit.concept}={edit.value} ({latents}): {edit.before:.3g} -> {edit.after:.3g}")
            if edit.rivals:
                lines.append(f"    set to 0 as its rivals: {', '.join(edit.rivals)}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.index.get("probes", 0) < self.index.get("cells", 0):
            lines.append(
                "  approximate: {probes:,} of {cells:,} cells were searched, which finds {recall:.1%} of the "
                "{recall_at} nearest rows (measured with {measured_with} rows)".format(**self.index)
            )
        return lines

    def to_text(self) -> str:
        """What `msae search` prints."""
        lines = self._head()
        width = max([2, *(len(hit.id) for hit in self.hits)])
        was = "  was    score" if self.edits else ""
        lines.append(f"{'rank':>4}  {'id':<{width}}  {'score':>8}{was}  shares")
        for hit in self.hits:
            moved = f"  {hit.rank_before:>5}  {hit.score_before:>6.3f}" if self.edits else ""
            shares = ", ".join(shared.concept for shared in hit.shared)
            text = "  ".join(part for part in (shares, hit.caption, hit.note) if part)
            lines.append(f"{hit.rank:>4}  {hit.id:<{width}}  {hit.score:>8.3f}{moved}  {text}".rstrip())
        return "\n".join(lines)
