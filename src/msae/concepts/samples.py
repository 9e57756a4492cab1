"""`TopSamples`: for every latent its strongest samples and how its activations are distributed, on disk.

The file format is defined in docs/run-format.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from msae.base.errors import ConfigError, RunError
from msae.base.files import atomic_path, read_json, write_json
from msae.base.results import Result, shorten, text_table
from msae.data.store import EmbeddingStore
from msae.sae.losses import default_levels
from msae.sae.model import SAE, Inference
from msae.sae.run import Origin as StoreOrigin
from msae.sae.run import RunLike
from msae.sae.standardize import Modality
from msae.sae.view import View

SCHEMA_VERSION = 2
SAMPLES_FOLDER = "samples"
"""The kind of derived files that mined samples are; see `Run.caches`."""
BINS_PER_OCTAVE = 16
FIRST_OCTAVE, LAST_OCTAVE = -8, 7
N_BINS = BINS_PER_OCTAVE * (LAST_OCTAVE - FIRST_OCTAVE)
"""Of a histogram: from 2**-8 to 2**7 in steps of a 16th of each octave; the outer two bins are open."""

_MANTISSA_SHIFT = 23 - 4  # what is left of a float32's bits are its exponent and 16 steps in each octave
_FIRST_KEY = (127 + FIRST_OCTAVE) << 4
_ROW_BITS = 32
_LAST_ROW = 2**_ROW_BITS - 1

_log = logging.getLogger(__name__)


class TopSample(NamedTuple):
    """One of the samples that activate a latent most."""

    row: int
    """Position in the store."""
    id: str
    activation: float


@dataclass(frozen=True)
class Origin(StoreOrigin):
    """What top samples were mined from; those of another origin are ignored."""

    modality: Literal["image", "text"]
    inference: str
    standardized_by: Literal["run", "store"]
    """Whose mean and scale standardised the rows: the SAE's own, or the store's where the SAE has none."""


@dataclass(frozen=True, eq=False, repr=False)
class TopSamples(Result):
    """Statistics of every latent over the rows of one modality of one store."""

    origin: Origin
    n_rows: int
    levels: tuple[int, ...]
    rows: Int64[np.ndarray, "d_sae n"]
    """The strongest first, of equal ones the lower row first; -1 where fewer samples fire the latent."""
    activations: Float32[np.ndarray, "d_sae n"]
    """Of `rows`; 0 where there is none."""
    fired: Int64[np.ndarray, " d_sae"]
    """Rows in which the latent is not zero."""
    total: Float64[np.ndarray, " d_sae"]
    """Sum of its activations."""
    histogram: Int64[np.ndarray, "d_sae bins"]
    """Of its non-zero activations; `bin_edges` has the bins."""
    within: Int64[np.ndarray, "d_sae levels"]
    """Rows in which the latent fires and is among the k strongest, for each k of `levels`."""
    row_maxima: Int64[np.ndarray, " bins"]
    """Histogram of each row's largest activation; rows in which nothing fires are not in it."""
    ids: Mapping[int, str]
    """The id of each row that occurs in `rows`."""

    @property
    def d_sae(self) -> int:
        return int(self.rows.shape[0])

    @property
    def n(self) -> int:
        """Samples kept for each latent."""
        return int(self.rows.shape[1])

    @property
    def firing_rate(self) -> Float64[np.ndarray, " d_sae"]:
        """Share of the rows in which the latent is not zero."""
        return _ratio(self.fired, self.n_rows)

    @property
    def mean(self) -> Float64[np.ndarray, " d_sae"]:
        """Mean activation over all rows, zeros included."""
        return _ratio(self.total, self.n_rows)

    @property
    def mean_nonzero(self) -> Float64[np.ndarray, " d_sae"]:
        """Mean of the activations that are not zero; 0 for a latent that never fires."""
        return _ratio(self.total, np.maximum(self.fired, 1))

    @property
    def maximum(self) -> Float32[np.ndarray, " d_sae"]:
        """Largest activation."""
        return self.activations[:, 0]

    @cached_property
    def level_profile(self) -> Float64[np.ndarray, "d_sae levels"]:
        """Of the rows in which a latent fires, the share in which it is among the k strongest, for each level.

        A coarse concept has most of its share at small k. 0 for a latent that never fires.
        """
        return _ratio(self.within, np.maximum(self.fired, 1)[:, None])

    def quantiles(self, shares: Sequence[float] = (0.5, 0.9, 0.99)) -> Float64[np.ndarray, "d_sae shares"]:
        """The natural range of each latent: quantiles of its non-zero activations; 0 where it never fires.

        Read off the histogram, linearly within a bin: off by less than a 16th of the value.
        """
        return histogram_quantiles(self.histogram, shares, self.maximum)

    def top(self, latent: int, n: int | None = None) -> list[TopSample]:
        """The `n` strongest samples of a latent, strongest first; all that were kept without `n`.

        Raises:
            ConfigError: There is no such latent.
        """
        check_latent(latent, self.d_sae)
        kept = zip(self.rows[latent].tolist(), self.activations[latent].tolist(), strict=True)
        return [TopSample(row, self.ids[row], value) for row, value in list(kept)[:n] if row >= 0]

    def records(self) -> list[dict[str, Any]]:
        """A record for each latent: how often and how strongly it fires, and its strongest sample."""
        columns = {
            "fired": self.fired,
            "firing_rate": self.firing_rate,
            "mean": self.mean,
            "mean_nonzero": self.mean_nonzero,
            **dict(zip(("p50", "p90", "p99"), self.quantiles().T, strict=True)),
            "max": self.maximum,
        }
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            {"latent": latent, **dict(zip(columns, row, strict=True)), "strongest": self.ids.get(first)}
            for latent, (row, first) in enumerate(zip(values, self.rows[:, 0].tolist(), strict=True))
        ]

    def to_json(self) -> dict[str, Any]:
        """What it was mined from, and of each latent its figures and its samples."""
        latents = [
            {**record, "samples": [sample._asdict() for sample in self.top(record["latent"])]}
            for record in self.records()
        ]
        return {**asdict(self.origin), "n_rows": self.n_rows, "latents": latents}

    def to_text(self, n: int = 20) -> str:
        """The latents that can be strongest, with how often they fire."""
        strongest = np.argsort(-self.maximum, kind="stable")[:n].tolist()
        records = self.records()
        head = ("latent", "rows", "median", "p99", "largest", "strongest sample")
        cells = [
            [str(one["latent"]), f"{one['fired']:,}", *(f"{one[key]:.3f}" for key in ("p50", "p99", "max")),
             shorten(one["strongest"] or "-")]
            for one in (records[latent] for latent in strongest)
        ]  # fmt: skip
        lines = [
            f"{int((self.fired > 0).sum()):,} of {self.d_sae:,} latents fire on the {self.n_rows:,} "
            f"{self.origin.modality} rows of {self.origin.store}",
            "",
            *text_table(head, cells, right=range(5)),
        ]
        return "\n".join([*lines, *([f"{self.d_sae - n:,} more latents"] if self.d_sae > n else [])])

    def save(self, folder: Path) -> None:
        """Write both files into `folder`, each atomically; the JSON comes last and vouches for the other."""
        stem = file_stem(self.origin)
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        with atomic_path(folder / f"{stem}.safetensors") as temporary:
            save_file(tensors, temporary)
        record = {
            **{field.name: getattr(self.origin, field.name) for field in fields(Origin)},
            "n_rows": self.n_rows,
            "d_sae": self.d_sae,
            "n": self.n,
            "levels": list(self.levels),
            "ids": {str(row): id for row, id in self.ids.items()},
        }
        write_json(folder / f"{stem}.json", record, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, path: Path) -> TopSamples:
        """The top samples whose JSON file is at `path`.

        Raises:
            RunError: A file is missing or damaged, or the two do not belong together.
        """
        record = read_json(path, schema_version=SCHEMA_VERSION, error=RunError)
        weights = path.with_suffix(".safetensors")
        again = "delete both files: msae gallery makes them again"
        try:
            tensors = load_file(weights)
        except (FileNotFoundError, SafetensorError, OSError) as err:
            raise RunError(f"{weights} is missing or damaged ({err}); {again}") from err
        try:
            found = cls(
                origin=Origin(**{field.name: record[field.name] for field in fields(Origin)}),
                n_rows=int(record["n_rows"]),
                levels=tuple(record["levels"]),
                ids={int(row): str(id) for row, id in record["ids"].items()},
                **{name: tensors[name] for name in _TENSORS},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise RunError(f"{path} lacks {err}; {again}") from err
        shape, rows = (record.get("d_sae"), record.get("n")), found.rows
        if rows.shape != shape or not set(rows[rows >= 0].tolist()) <= set(found.ids):
            raise RunError(f"{path} and {weights.name} do not belong together; {again}")
        return found

    @classmethod
    def cached(cls, folders: Iterable[Path], origin: Origin, *, n: int) -> TopSamples | None:
        """What an earlier mining of the same rows left in one of `folders`, if it kept at least `n` samples.

        A damaged or outdated file counts as none: it is only a cache, and will be written again. The store may have
        moved, or its metadata have changed, since: `with_origin` reads the ids again.
        """
        for folder in folders:
            try:
                found = cls.load(folder / f"{file_stem(origin)}.json")
            except RunError:
                continue
            if found.n >= n and replace(found.origin, store=origin.store, metadata=origin.metadata) == origin:
                return found
        return None

    def with_origin(self, origin: Origin, ids: Sequence[str]) -> TopSamples:
        """The same samples of rows that now have these ids."""
        return replace(self, origin=origin, ids={row: ids[row] for row in self.ids})


_TENSORS = ("rows", "activations", "fired", "total", "histogram", "within", "row_maxima")


def _ratio(part: NDArray[Any], whole: NDArray[Any] | int) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(part, whole)
    return ratio


def file_stem(origin: Origin) -> str:
    """The name, without suffix, of the files in a run's `samples` folder; nothing is ever read out of it."""
    return f"{origin.fingerprint[:16]}-{origin.modality}-{origin.inference}"


def check_latent(latent: int, d_sae: int) -> None:
    """Refuse an index that is no latent."""
    if not 0 <= latent < d_sae:
        raise ConfigError(f"there is no latent {latent}: this SAE has the latents 0 to {d_sae - 1}; give one of those")


def bin_edges() -> Float64[np.ndarray, " edges"]:
    """The `N_BINS + 1` edges of the bins. The first bin also has what is smaller, the last what is larger."""
    bins = np.arange(N_BINS + 1)
    steps = 1 + (bins % BINS_PER_OCTAVE) / BINS_PER_OCTAVE
    edges: NDArray[np.float64] = np.ldexp(steps, bins // BINS_PER_OCTAVE + FIRST_OCTAVE)
    return edges


def histogram_quantiles(
    histogram: Int64[np.ndarray, "d_sae bins"], shares: Sequence[float], maximum: Float32[np.ndarray, " d_sae"]
) -> Float64[np.ndarray, "d_sae shares"]:
    """Quantiles of positive numbers of which only the histogram and the maximum are known; 0 where there are none."""
    edges = bin_edges()
    low = edges[:-1].copy()
    low[0] = 0.0
    above = histogram.cumsum(1)
    latents = np.arange(len(histogram))
    out = np.zeros((len(histogram), len(shares)))
    for i, share in enumerate(shares):
        wanted = share * above[:, -1]
        bins = np.minimum((above < wanted[:, None]).sum(1), N_BINS - 1)
        inside = histogram[latents, bins]
        # The largest number is known: its bin ends there, which also closes the open last bin.
        high = np.where(bins == N_BINS - 1, maximum, np.minimum(edges[bins + 1], maximum))
        part = (wanted - (above[latents, bins] - inside)) / np.maximum(inside, 1)
        out[:, i] = low[bins] + part * np.maximum(high - low[bins], 0.0)
    return np.where(above[:, -1:] > 0, out, 0.0)


class SampleMiner:
    """Sees activations block after block and keeps what `TopSamples` needs.

    Memory depends on d_sae, n and the size of a block, never on the number of rows: most entries of a block do
    not beat the latent's current n-th best, so one comparison sorts them out.
    """

    def __init__(self, d_sae: int, *, n: int, levels: Sequence[int]) -> None:
        check_n(n)
        self.n_rows = 0
        self.levels = tuple(levels)
        # A key has the activation's bits above the row's complement: larger is stronger, then the lower row.
        self._keys = np.zeros((d_sae, n), dtype=np.int64)
        self._fired = np.zeros(d_sae, dtype=np.int64)
        self._total = np.zeros(d_sae, dtype=np.float64)
        self._histogram = np.zeros(d_sae * N_BINS, dtype=np.int64)
        self._within = np.zeros((d_sae, len(self.levels)), dtype=np.int64)
        self._row_maxima = np.zeros(N_BINS, dtype=np.int64)

    def add(self, z: Float32[np.ndarray, "block d_sae"]) -> None:
        """Take in the activations of the next rows, none of them negative."""
        if self.n_rows + len(z) > _LAST_ROW:
            raise ConfigError(f"more than {_LAST_ROW:,} rows; cut the store in two")
        self._keep_strongest(z)
        self._count(z)
        self.n_rows += len(z)

    def rows(self) -> Int64[np.ndarray, "d_sae n"]:
        """The strongest rows so far, as in `TopSamples.rows`."""
        keys = np.sort(self._keys, axis=1)[:, ::-1]
        return np.where(keys > 0, _LAST_ROW - (keys & _LAST_ROW), -1)

    def finish(self, origin: Origin, ids: Sequence[str]) -> TopSamples:
        """What was found; `ids` has the id of every row that was seen."""
        rows = self.rows()
        keys = np.sort(self._keys, axis=1)[:, ::-1]
        activations = (keys >> _ROW_BITS).astype(np.int32).view(np.float32)
        return TopSamples(
            origin=origin,
            n_rows=self.n_rows,
            levels=self.levels,
            rows=rows,
            activations=activations,
            fired=self._fired,
            total=self._total,
            histogram=self._histogram.reshape(-1, N_BINS),
            within=self._within,
            row_maxima=self._row_maxima,
            ids={row: ids[row] for row in np.unique(rows[rows >= 0]).tolist()},
        )

    def _keep_strongest(self, z: NDArray[np.float32]) -> None:
        d_sae, n = self._keys.shape
        weakest = (self._keys.min(1) >> _ROW_BITS).astype(np.int32).view(np.float32)
        # Strictly stronger only: the rows come in order, and of equal ones the lower row stays.
        places = np.flatnonzero(z > weakest)
        if not len(places):
            return
        places = places[np.argsort(places % d_sae, kind="stable")]
        rows, latents = np.divmod(places, d_sae)
        bits = z.ravel()[places].view(np.int32).astype(np.int64)
        keys = (bits << _ROW_BITS) | (_LAST_ROW - (rows + self.n_rows))
        touched, first, counts = np.unique(latents, return_index=True, return_counts=True)
        rivals = np.zeros((len(touched), n + int(counts.max())), dtype=np.int64)
        rivals[:, :n] = self._keys[touched]
        owner = np.repeat(np.arange(len(touched)), counts)
        rivals[owner, n + np.arange(len(places)) - first[owner]] = keys
        self._keys[touched] = np.partition(rivals, rivals.shape[1] - n, axis=1)[:, -n:]

    def _count(self, z: NDArray[np.float32]) -> None:
        d_sae = z.shape[1]
        fired = _count_rows(z > 0)
        self._fired += fired
        self._total += z.sum(0, dtype=np.float64)
        # Zeros land in bin 0 too, and are taken out of it again: cheaper than picking the others out.
        bins = _bins(z)
        bins += np.arange(d_sae, dtype=np.int32) * np.int32(N_BINS)
        self._histogram += np.bincount(bins.ravel(), minlength=d_sae * N_BINS)
        self._histogram[::N_BINS] -= len(z) - fired
        largest = z.max(1)
        self._row_maxima += np.bincount(_bins(largest[largest > 0]), minlength=N_BINS)
        ascending = np.sort(z, axis=1)
        for i, k in enumerate(self.levels):
            if k >= d_sae:
                self._within[:, i] += fired
                continue
            # A rank is the number of stronger latents plus one, so equal ones are in or out together.
            kth = np.maximum(ascending[:, -k, None], np.float32(1e-45))
            self._within[:, i] += _count_rows(z >= kth)


def _bins(z: NDArray[np.float32]) -> NDArray[np.int32]:
    """The bin of each number, read off its bits; zero is in the first."""
    bins = np.ascontiguousarray(z).view(np.int32) >> _MANTISSA_SHIFT
    bins -= _FIRST_KEY
    return np.clip(bins, 0, N_BINS - 1, out=bins)


def _count_rows(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Trues of each column; summing bytes is ten times as fast as summing booleans."""
    counts: NDArray[np.uint32] = np.add.reduce(mask.view(np.uint8), axis=0, dtype=np.uint32)
    return counts.astype(np.int64)


def describe(samples: TopSamples, latent: int) -> dict[str, Any]:
    """Firing rate, mean, natural range and level profile of one latent, as JSON values."""
    p50, p90, p99 = samples.quantiles()[latent].tolist()
    return {
        "firing_rate": float(samples.firing_rate[latent]),
        "mean": float(samples.mean[latent]),
        "mean_nonzero": float(samples.mean_nonzero[latent]),
        "max": float(samples.maximum[latent]),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "levels": level_shares(samples, latent),
    }


def level_shares(samples: TopSamples, latent: int) -> dict[str, float]:
    """The level profile of one latent, keyed by the level."""
    shares = samples.level_profile[latent].tolist()
    return {str(k): share for k, share in zip(samples.levels, shares, strict=True)}


def top_samples(
    sae: RunLike,
    on: EmbeddingStore | str | Path,
    *,
    modality: Modality = "image",
    n: int = 16,
    inference: Inference = "trained",
    device: str = "auto",
) -> TopSamples:
    """The strongest samples of every latent and the distribution of its activations, in one pass over a store.

    With a run folder they are kept in it or, where it cannot be written, in the user's cache folder. They are used
    again for the same rows, SAE, inference and at most as large an n.

    Raises:
        ConfigError: n is below 1.
        StoreError: The store does not fit the SAE or has no rows of `modality`.
    """
    check_n(n)
    view = View(sae, on, modality, inference=inference, device=device)
    run, store = view.run, view.store
    origin = Origin(
        **asdict(run.origin(store)), modality=modality, inference=inference, standardized_by=view.standardized_by
    )
    known = TopSamples.cached(run.caches(SAMPLES_FOLDER), origin, n=n)
    if known is not None and known.origin == origin:
        return known
    if known is not None:
        samples = known.with_origin(origin, store.ids)
    else:
        miner = SampleMiner(view.sae.d_sae, n=n, levels=levels_of(view.sae))
        for z in view.activations(title=f"mining {modality} rows"):
            miner.add(z.cpu().numpy())
        samples = miner.finish(origin, store.ids)
    place = run.writable_cache(SAMPLES_FOLDER)
    if place is not None:
        try:
            samples.save(place)
        except OSError as err:
            _log.warning("samples are not kept in %s: %s", place, err)
    return samples


def levels_of(sae: SAE) -> tuple[int, ...]:
    """The SAE's levels; for kinds without any, those that a Matryoshka SAE of its width would have."""
    return sae.config.levels or default_levels(sae.d_sae)


def check_n(n: int) -> None:
    """Refuse a number of samples below 1."""
    if n < 1:
        raise ConfigError(f"n is {n}; give --n of at least 1, for example --n 16")
