"""Which latents nest: parents and children from how often latents fire together.

A child fires mostly where its parent fires, and more rarely. docs/tree.md says what the rule is and what it
cannot see.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from msae.base.errors import ConfigError
from msae.base.results import Result
from msae.base.statistics import wilson
from msae.concepts.names import ConceptNames, names_of
from msae.concepts.samples import level_shares, top_samples
from msae.data.sampled import notes_on, sample_rows
from msae.data.store import EmbeddingStore, as_store
from msae.data.tables import TABLE_SUFFIXES, read_table
from msae.sae.model import SAE, Inference
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

if TYPE_CHECKING:
    from scipy.sparse import csc_array

HIERARCHY_ROWS = 20_000
"""Rows that a hierarchy is read from; more make its intervals narrower, at d_sae^2 operations each."""
MIN_SHARE = 0.5
"""Of a child's rows, that its parent must fire in; with `LEVEL` chosen on known pairs of words, docs/tree.md."""
LEVEL = 16
"""A latent counts where it is among so many strongest: at the first level that is as large, or else at the last."""
PRINTED_NODES = 200

Pairs = Collection[tuple[str, str]]
"""(narrower word, broader word)."""
SPARSE_BELOW = 0.03
"""Density under which a sparse product beats a dense one."""
_BLOCK = 512  # latents; two unpacked blocks of 20,000 rows are 80 MB


class Activity:
    """Who fires where, one bit for each row and latent."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.n_rows = 0
        self._blocks: list[NDArray[np.uint8]] = []
        self._sizes: list[int] = []

    def add(self, fires: Bool[np.ndarray, "block d_sae"]) -> None:
        """Take in the next rows."""
        self._blocks.append(np.packbits(fires, axis=0))
        self._sizes.append(len(fires))
        self.n_rows += len(fires)

    def of(self, latents: slice | NDArray[np.int64]) -> Bool[np.ndarray, "n_rows latents"]:
        """Where each of some latents fires."""
        pieces = [
            np.unpackbits(block[:, latents], axis=0, count=size)
            for block, size in zip(self._blocks, self._sizes, strict=True)
        ]
        return np.concatenate(pieces).view(np.bool_)

    def as_sparse(self) -> csc_array:
        """All of it as a sparse matrix of ones, (n_rows, d_sae)."""
        from scipy.sparse import csc_array, vstack

        parts = [
            csc_array(np.unpackbits(block, axis=0, count=size).astype(np.int32))
            for block, size in zip(self._blocks, self._sizes, strict=True)
        ]
        return csc_array(vstack(parts, format="csc"))

    @property
    def density(self) -> float:
        """Share of all latents that fire on a row, on average."""
        return float(self.fired.sum()) / max(self.n_rows * self.d_sae, 1)

    @cached_property
    def fired(self) -> Int64[np.ndarray, " d_sae"]:
        """Rows in which each latent fires; ask once all rows are in."""
        blocks = [slice(first, first + _BLOCK) for first in range(0, self.d_sae, _BLOCK)]
        return np.concatenate([self.of(block).sum(0, dtype=np.int64) for block in blocks])


@dataclass(frozen=True)
class Edge:
    """A latent that fires mostly where another one fires."""

    child: int
    parent: int
    together: int
    """Rows in which both fire."""
    share: float
    """Of the rows in which the child fires, the share in which the parent fires."""
    share_low: float
    """Lower end of its 95 % interval."""
    lift: float
    """`share` over the parent's firing rate: 1 is what two unrelated latents have."""
    lift_low: float


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Every parent of every latent, and the tree that keeps for each the most specific one."""

    n_rows: int
    fired: Int64[np.ndarray, " d_sae"]
    edges: tuple[Edge, ...]
    """Ordered by child, the most specific parent first."""

    @cached_property
    def parent(self) -> dict[int, Edge]:
        """The tree: of each child the edge to its most specific parent, the one that fires most rarely."""
        chosen: dict[int, Edge] = {}
        for edge in self.edges:
            chosen.setdefault(edge.child, edge)
        return chosen

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """Of each parent in the tree its children, the most frequent first."""
        found: dict[int, list[int]] = {}
        for edge in self.parent.values():
            found.setdefault(edge.parent, []).append(edge.child)
        return {parent: self._by_frequency(latents) for parent, latents in found.items()}

    @property
    def roots(self) -> list[int]:
        """Parents that have no parent, the most frequent first. A latent without any relation is not in the tree."""
        return self._by_frequency([latent for latent in self.children if latent not in self.parent])

    def _by_frequency(self, latents: Collection[int]) -> list[int]:
        return sorted(latents, key=lambda latent: (-int(self.fired[latent]), latent))

    def walk(self) -> Iterator[tuple[int, int]]:
        """Depth and latent of every node, each parent just before its children."""
        waiting = [(0, latent) for latent in reversed(self.roots)]
        while waiting:
            depth, latent = waiting.pop()
            yield depth, latent
            waiting += [(depth + 1, child) for child in reversed(self.children.get(latent, []))]

    def to_json(self, names: Mapping[int, str], profile: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
        """The nodes in the order of `walk`, each with its parent's edge and its children, as JSON values."""
        nodes = []
        for depth, latent in self.walk():
            edge = self.parent.get(latent)
            nodes.append(
                {
                    "latent": latent,
                    "name": names.get(latent),
                    "depth": depth,
                    "fired": int(self.fired[latent]),
                    "firing_rate": float(self.fired[latent] / self.n_rows),
                    "levels": profile.get(latent, {}),
                    "parent": None if edge is None else asdict(edge),
                    "children": self.children.get(latent, []),
                }
            )
        return {"rows": self.n_rows, "edges": len(self.edges), "roots": self.roots, "nodes": nodes}


def find_hierarchy(
    activity: Activity, *, min_share: float = MIN_SHARE, min_lift: float = 1.5, min_fired: int = 20
) -> Hierarchy:
    """Parents and children among all latents, by products of blocks: no d_sae x d_sae matrix is ever held.

    Args:
        activity: Fewer than 16 million rows, so that float32 counts are exact.
        min_share: The lower end of the interval of `Edge.share` must reach this.
        min_lift: So must the lower end of the lift: a parent that fires nearly everywhere is no parent.
        min_fired: Latents that fire in fewer rows are left out.

    Raises:
        ConfigError: `min_share` is not a share.
    """
    if not 0 < min_share <= 1:
        raise ConfigError(f"min share {min_share} is not above 0 and at most 1; give for example 0.8")
    assert activity.n_rows < 2**24
    latents = np.flatnonzero(activity.fired >= max(min_fired, 1))
    products = _sparse_products if activity.density < SPARSE_BELOW else _dense_products
    edges = [
        edge
        for pairs in products(activity, latents, min_share)
        for edge in _edges(activity, pairs, min_share, min_lift)
    ]
    edges.sort(key=lambda edge: (edge.child, int(activity.fired[edge.parent]), -edge.share, edge.parent))
    return Hierarchy(activity.n_rows, activity.fired, tuple(edges))


class _Pairs(NamedTuple):
    """Latents that fire together, and in how many rows."""

    child: NDArray[np.int64]
    parent: NDArray[np.int64]
    together: NDArray[np.int64]


def _dense_products(activity: Activity, latents: NDArray[np.int64], min_share: float) -> Iterator[_Pairs]:
    """The pairs that share enough rows, from float32 products of blocks."""
    # The most frequent first: a parent then always stands before its child, and half of the products suffice.
    latents = latents[np.argsort(-activity.fired[latents], kind="stable")]
    blocks = [latents[first : first + _BLOCK] for first in range(0, len(latents), _BLOCK)]
    for j, children in enumerate(blocks):
        here = activity.of(children).astype(np.float32)
        for i, parents in enumerate(blocks[: j + 1]):
            above = here if i == j else activity.of(parents).astype(np.float32)
            together = above.T @ here
            parent, child = np.nonzero(together >= min_share * activity.fired[children])
            yield _Pairs(children[child], parents[parent], together[parent, child].astype(np.int64))


def _sparse_products(activity: Activity, latents: NDArray[np.int64], _: float) -> Iterator[_Pairs]:
    """All pairs that share a row, from sparse products: for rows on which few latents fire."""
    fires = activity.as_sparse()
    for first in range(0, len(latents), _BLOCK):
        children = latents[first : first + _BLOCK]
        found = (fires.T @ fires[:, children]).tocoo()
        yield _Pairs(children[found.col], found.row.astype(np.int64), found.data.astype(np.int64))


def _edges(activity: Activity, pairs: _Pairs, min_share: float, min_lift: float) -> list[Edge]:
    """Those of the pairs that are a child and a parent."""
    fired = activity.fired
    hopeful = (fired[pairs.child] < fired[pairs.parent]) & (pairs.together >= min_share * fired[pairs.child])
    child, parent, both = (column[hopeful] for column in pairs)
    share, low = both / fired[child], wilson(both, fired[child]).low
    rate = fired[parent] / activity.n_rows
    kept = (low >= min_share) & (low / rate >= min_lift)
    columns = (child, parent, both, share, low, share / rate, low / rate)
    return [Edge(*values) for values in zip(*(column[kept].tolist() for column in columns), strict=True)]


@dataclass(frozen=True)
class PairScore:
    """How a hierarchy of named latents agrees with known pairs of a word and a broader word."""

    predicted: int
    """Edges between latents whose different names both occur in the known pairs."""
    precision: float | None
    """Share of those that are known pairs; None without any."""
    chance: float | None
    """The same share among all ordered pairs of such latents."""
    wanted: int
    """Known pairs of which both words are names here."""
    recall: float | None
    """Share of those that some edge has; None without any."""


def score_pairs(edges: Sequence[Edge], names: Mapping[int, str], pairs: Collection[tuple[str, str]]) -> PairScore:
    """Precision and recall of `edges` against known (narrower word, broader word) `pairs`, such as WordNet's.

    The pairs are closed first: with (poodle, dog) and (dog, animal), poodle under animal is right too. An edge
    between two latents of the same name says nothing and is left out.
    """
    truth = _closure(pairs)
    words = {word for pair in truth for word in pair}
    named = {latent: name for latent, name in names.items() if name in words}
    judged = [
        (named[edge.child], named[edge.parent])
        for edge in edges
        if edge.child in named and edge.parent in named and named[edge.child] != named[edge.parent]
    ]
    present = set(named.values())
    wanted = {pair for pair in truth if pair[0] in present and pair[1] in present}
    count = Counter(named.values())
    n_pairs = len(named) ** 2 - sum(n**2 for n in count.values())
    return PairScore(
        predicted=len(judged),
        precision=_share(sum(pair in truth for pair in judged), len(judged)),
        chance=_share(sum(count[narrow] * count[broad] for narrow, broad in wanted), n_pairs),
        wanted=len(wanted),
        recall=_share(len(wanted & set(judged)), len(wanted)),
    )


def _closure(pairs: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """All (narrower, broader) pairs that follow from chains of the given ones."""
    broader: dict[str, set[str]] = {}
    for narrow, broad in pairs:
        broader.setdefault(narrow, set()).add(broad)
    closed = set()
    for word in broader:
        waiting, seen = list(broader[word]), set()
        while waiting:
            above = waiting.pop()
            if above not in seen and above != word:
                seen.add(above)
                waiting += broader.get(above, ())
        closed |= {(word, above) for above in seen}
    return closed


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# --- The tree of a run


@dataclass(frozen=True, eq=False, repr=False)
class ConceptTree(Result):
    """A hierarchy of latents with what is known about each: its name and its level profile."""

    hierarchy: Hierarchy
    k: int | None
    """A latent counted as firing where it was among the `k` strongest of its row; None: wherever it was not zero."""
    names: Mapping[int, str]
    levels: Mapping[int, Mapping[str, float]]
    """Of each latent in the tree, the share of its rows in which it is among the 64, 128, … strongest."""
    score: PairScore | None = None
    """All edges against known pairs of words; None where none were given."""
    shown: Mapping[int, str] = field(default_factory=dict)
    """The names as people are shown them, as `Concept.shown` says."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        score = None if self.score is None else asdict(self.score)
        notes = {"notes": list(self.notes)} if self.notes else {}
        return {"k": self.k, "score": score, **notes, **self.hierarchy.to_json(self.names, self.levels)}

    def records(self) -> list[dict[str, Any]]:
        """A record for each latent in the tree, in the order of the text."""
        nodes = self.to_json()["nodes"]
        kept = ("latent", "name", "depth", "fired", "firing_rate")
        edges = [node["parent"] or {} for node in nodes]
        return [
            {**{key: node[key] for key in kept}, **{key: edge.get(key) for key in ("parent", "share", "lift")}}
            for node, edge in zip(nodes, edges, strict=True)
        ]

    def to_text(self) -> str:
        """The tree with a line for each node, indented under its parent."""
        found = self.hierarchy
        lines = [
            f"{len(found.parent):,} latents lie under {len(found.children):,} others, on {found.n_rows:,} rows"
            f"{f', counting the {self.k} strongest of each' if self.k else ''}; {len(found.edges):,} edges in all",
            *([] if self.score is None else [_score_line(self.score)]),
            *self.notes,
        ]
        for depth, latent in itertools.islice(found.walk(), PRINTED_NODES):
            edge = found.parent.get(latent)
            under = (
                f"  in {edge.share:.0%} of its rows, lift {edge.lift:.1f} (at least {edge.lift_low:.1f})"
                if edge
                else ""
            )
            first = next(iter(self.levels.get(latent, {}).items()), None)
            coarse = f"  {first[1]:.0%} within {first[0]}" if first else ""
            rate = found.fired[latent] / found.n_rows
            name = self.shown.get(latent, self.names.get(latent, "?"))
            lines.append(f"{'  ' * depth}{name} [{latent}]  fires {rate:.1%}{coarse}{under}")
        n_more = len(found.parent) + len(found.roots) - PRINTED_NODES
        return "\n".join([*lines, *([f"… and {n_more:,} more; --json FILE has all"] if n_more > 0 else [])])


def concept_tree(
    sae: RunLike,
    on: EmbeddingStore | str | Path,
    *,
    modality: Modality | None = None,
    k: int | None = None,
    max_rows: int | None = None,
    min_share: float = MIN_SHARE,
    inference: Inference = "trained",
    pairs: Pairs | str | Path | None = None,
    device: str = "auto",
) -> ConceptTree:
    """Parents and children among the latents, from which of them fire together on a store.

    Args:
        sae: A run folder, or an SAE.
        on: Any store.
        modality: Which rows; None takes images where there are any.
        k: Count a latent as firing only where it is among the k strongest of its row. None takes the first level of a
            Matryoshka SAE from 16 on, and every non-zero activation of any other.
        max_rows: Read at most so many rows: of more, a random sample. Memory and time do not grow beyond it.
        min_share: A child's rows must be its parent's too in this share, at the lower end of a 95 % interval.
        pairs: Known pairs of a word and a broader one, or a table of them with columns `child` and `parent`, to score
            the edges against.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: `k` or `max_rows` is below 1, the pairs cannot be read, or there are no names to compare with them.
        StoreError: The store does not fit the SAE.
    """
    run = Run.open(sae)
    store = sample_rows(as_store(on, modality, unnamed=run.modality), max_rows)
    model, folder = run.sae, run.folder
    if k is not None and k < 1:
        raise ConfigError(f"k is {k}; give --k at least 1")
    names = names_of(run, store)
    known = None if pairs is None else _known_pairs(pairs, names, folder)
    if k is None:
        k = counted(model)
    chosen = np.linspace(0, len(store) - 1, min(max_rows or HIERARCHY_ROWS, len(store))).round().astype(np.int64)
    activity = Activity(model.d_sae)
    view = View(run, store, modality, inference=inference, k=k, device=device)
    for z in view.activations(rows=chosen, title="reading which latents fire"):
        activity.add((z > 0).cpu().numpy())
    found = find_hierarchy(activity, min_share=min_share)
    samples = top_samples(run, store, modality=view.modality, inference=inference, device=device)
    nodes = [latent for _, latent in found.walk()]
    return ConceptTree(
        hierarchy=found,
        k=k,
        names={} if names is None else {concept.latent: concept.name for concept in names},
        shown={} if names is None else {concept.latent: concept.shown for concept in names},
        levels={latent: level_shares(samples, latent) for latent in nodes},
        score=None if known is None or names is None else score_pairs(found.edges, _words_in(known, names), known),
        notes=notes_on(store),
    )


def counted(sae: SAE) -> int | None:
    """Of how many strongest latents of a row a tree is made; None for all that are not zero."""
    levels = [level for level in sae.config.levels or () if level < sae.d_sae]
    return next((level for level in levels if level >= LEVEL), levels[-1] if levels else None)


def read_pairs(path: str | Path) -> Pairs:
    """The (child, parent) words of a table, .csv, .jsonl or .parquet; rows without one of them are left out.

    Raises:
        ConfigError: It cannot be read, lacks a column, or has no pair.
    """
    if Path(path).suffix.lower() not in TABLE_SUFFIXES:
        raise ConfigError(f"{path} is no table; give --pairs a file ending in {', '.join(TABLE_SUFFIXES)}")
    table = read_table(Path(path), ConfigError)
    missing = [name for name in ("child", "parent") if name not in table.column_names]
    if missing:
        found = ", ".join(table.column_names)
        raise ConfigError(f"{path} has the columns {found}, but no {missing[0]}; give a table with child and parent")
    columns = (table[name].to_pylist() for name in ("child", "parent"))
    pairs = [(str(child), str(parent)) for child, parent in zip(*columns, strict=True) if child and parent]
    if not pairs:
        raise ConfigError(f"{path} has no row with both a child and a parent; give a table with some")
    return pairs


def _known_pairs(pairs: Pairs | str | Path, names: ConceptNames | None, folder: Path | None) -> set[tuple[str, str]]:
    """The pairs in plain letter case."""
    if names is None:
        raise ConfigError(
            f"{folder or 'this SAE'} has no names.json, so no edge can be compared with the pairs; "
            f"type msae name {folder or 'RUN'} first"
        )
    given = read_pairs(pairs) if isinstance(pairs, str | Path) else pairs
    return {(_plain(child), _plain(parent)) for child, parent in given}


def _words_in(pairs: Pairs, names: ConceptNames) -> dict[int, str]:
    """What the pairs call each named latent: its name, or the first of its synonyms that they know."""
    known = {word for pair in pairs for word in pair}
    words = {concept.latent: map(_plain, (concept.name, *concept.synonyms)) for concept in names}
    called = {latent: next((word for word in own if word in known), None) for latent, own in words.items()}
    return {latent: word for latent, word in called.items() if word is not None}


def _plain(word: str) -> str:
    return " ".join(word.replace("_", " ").split()).casefold()


def _score_line(score: PairScore) -> str:
    """The score as a line."""
    if score.precision is None:
        return f"no edge joins two latents that the pairs name; {score.wanted:,} of the pairs have both words as names"
    chance, recall = score.chance or 0.0, score.recall or 0.0
    return (
        f"{score.predicted:,} edges join two latents that the pairs name: {score.precision:.1%} of them are known "
        f"pairs, {chance:.1%} would be by chance; {recall:.1%} of {score.wanted:,} known pairs are found"
    )
