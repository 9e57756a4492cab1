"""`embed`: images and captions become an `EmbeddingStore`, whatever interrupts it.

The work goes in chunks of source positions, each committed to `STORE/.partial/` as one file; what a killed
process leaves is whole chunks, and the next run goes on after them. All of them are at last cut into shards.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray

from msae.base.errors import ConfigError, EmbedderError, Interrupted, SourceError, StoreError
from msae.base.files import locked, read_json, remove_leftovers, write_json
from msae.base.progress import progress
from msae.data.arrays import first_bad_row
from msae.data.chunks import Chunk, Report, chunk_numbers, chunk_path, gaps, list_chunks, read_chunk, write_chunk
from msae.data.embedder import Embedder, Precision, find_folder, full_name, is_folder, revision_of
from msae.data.images import quiet_about_size, read_picture
from msae.data.layout import PARTIAL, Modality, path_of
from msae.data.sources import Source, counted, open_source
from msae.data.sources.members import SourceItem
from msae.data.sources.remote import FarFile, fetched
from msae.data.store import EmbeddingStore, Skipped, StorePart, write_store
from msae.data.tables import UniqueIds, array_of, common_schema, conform, hashes_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Embedder", "embed"]

BATCHES_PER_CHUNK = 4
_SHARD_ROWS = 65_536
MAX_LISTED = 10_000
"""Skipped inputs that store.json lists; all are counted."""
_PIECE = 64
"""Samples that a thread decodes at once."""
_N_AHEAD = 10
"""Pieces that are decoded ahead: enough for eight threads; 40 MB each at 224 pixels."""
_BYTES_AHEAD = 1 << 29
"""Bytes of pictures, as they are stored, that wait to be decoded; one piece is read whatever it holds."""
_WAIT = 30.0
"""Seconds to wait for the workers of a cluster, which end a little later than what drove them."""
_STATE_VERSION = 1
_RECORDED = (
    "encoder",
    "encoder_revision",
    "asked_revision",
    "precision",
    "pixel_backend",
    "source",
    "source_signature",
    "shard_rows",
)
"""What store.json keeps of the state."""


class EmbeddedPart(NamedTuple):
    """What a command with `part` has done."""

    part: str
    samples: int
    """Samples of the part, embedded or skipped."""
    new: int
    """Those of this command; the others were done before."""
    next: str
    """What to type when all parts are done."""


class EmbedOptions(TypedDict, total=False):
    """What every way of embedding takes besides `encoder` and `out`; `embed` says what each is."""

    batch_size: int
    device: str
    dtype: Precision
    revision: str | None
    shard_rows: int
    workers: int | None


@overload
def embed(
    source: str | Path | Source,
    *,
    encoder: str | Path | Embedder,
    out: str | Path,
    part: str,
    **options: Unpack[EmbedOptions],
) -> EmbeddedPart: ...
@overload
def embed(
    source: str | Path | Source,
    *,
    encoder: str | Path | Embedder,
    out: str | Path,
    ray: str | None = None,
    finish: bool = False,
    **options: Unpack[EmbedOptions],
) -> EmbeddingStore: ...
def embed(
    source: str | Path | Source,
    *,
    encoder: str | Path | Embedder,
    out: str | Path,
    batch_size: int = 64,
    device: str = "auto",
    dtype: Precision = "auto",
    revision: str | None = None,
    shard_rows: int = _SHARD_ROWS,
    workers: int | None = None,
    ray: str | None = None,
    part: str | None = None,
    finish: bool = False,
) -> EmbeddingStore | EmbeddedPart:
    """Embed the images and captions of a source into a store.

    An input that cannot be embedded, such as an unreadable image or an empty caption, is left out, counted, and
    listed with its reason in store.json. After an interruption the same command continues where it stopped, and the
    store is the same to the byte. A finished store of the same source and encoder is returned as it is.

    Args:
        source: A folder of images, with captions in .txt or .json files of the same names; a .txt of captions, one a
            line; a table (.csv, .tsv, .jsonl, .json, .parquet) of captions or image paths; webdataset .tar files; a
            folder that save_to_disk of datasets wrote; or a Hugging Face dataset as hf://OWNER/NAME. All but the last
            two may lie elsewhere: s3://…, gs://… or https://….
        encoder: A CLIP, SigLIP or SigLIP 2 model: its folder, its Hugging Face id, or `demo` for the small one inside
            msae.
        out: Folder of the store to make.
        batch_size: Images or captions in one pass through the encoder. It may change when an interrupted command is
            continued.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.
        dtype: Number format in which the encoder computes; `auto` is bfloat16 where the processor is fast with it, else
            float32.
        revision: Branch, tag or commit of the encoder on Hugging Face.
        shard_rows: Rows in each file of the store.
        workers: Threads that read images ahead; without it one for each CPU core, at most 8. With `ray`: CPU cores of
            each worker.
        ray: Embed on all nodes of a Ray cluster: its address, or `auto` (or no address) for the one that RAY_ADDRESS
            names or that runs here, else one that is started on this machine, as `local` always is. The nodes must
            share the folders of the source and of `out`.
        part: Embed only a part of the source, such as `3/64`: for the jobs of a scheduler, in any order, on machines
            that share the folder `out`. When all are done, add `finish` in place of `part`.
        finish: Make the store of parts that are all embedded.

    Raises:
        ConfigError: A number is below 1, or no cluster answers.
        SourceError: There is nothing to embed.
        EmbedderError: The encoder cannot be loaded.
        StoreError: `out` cannot be written, holds something else, or is being written by another process; or parts
            are missing.
        Interrupted: Ctrl-C; the message says how to go on.
    """
    _check_positive(batch_size=batch_size, shard_rows=shard_rows, workers=1 if workers is None else workers)
    if (part is not None) + (ray is not None) + finish > 1:
        raise ConfigError("--part, --finish and --ray are three ways; give one")
    share = Share.of(part) if part is not None else None
    out = path_of(out)
    opened = source if isinstance(source, Source) else open_source(source)
    asked = _Asked.of(opened, encoder, dtype, revision, shard_rows)
    job = Job(opened, encoder, asked, out, batch_size, device, workers, ray, share, finish)
    if (out / "store.json").exists():
        store = _finished(out, asked)
        return store if share is None else EmbeddedPart(str(share), 0, 0, job.command)
    _check_out(out)
    try:
        if share is not None:
            return job.embed_part(share)
        if ray is not None:
            from msae.data.cluster import embed_on_ray

            embed_on_ray(job, ray)
        return job.finish() if finish or ray is not None else job.embed_all()
    except KeyboardInterrupt:
        again = job.command if share is None else job.command_of(share)
        raise Interrupted(f"interrupted; what is done is kept in {out}; to go on, type: {again}") from None


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; wanted at least 1")


@dataclass(frozen=True)
class _Asked:
    """What makes one store different from another."""

    source: str
    source_signature: str
    encoder: str
    encoder_revision: str | None
    """Of a folder; that of a hub id is known when it is loaded."""
    asked_revision: str | None
    precision: Precision
    shard_rows: int

    @classmethod
    def of(
        cls,
        source: Source,
        encoder: str | Path | Embedder,
        dtype: Precision,
        revision: str | None,
        shard_rows: int,
    ) -> _Asked:
        id = encoder.id if isinstance(encoder, Embedder) else full_name(encoder)
        known = encoder.revision if isinstance(encoder, Embedder) else _folder_revision(id)
        precision = encoder.dtype if isinstance(encoder, Embedder) else dtype
        return cls(source.name, source.signature, id, known, revision, precision, shard_rows)

    def difference(self, record: Mapping[str, Any]) -> str | None:
        """What `record` was made of instead, in words; None where it is the same."""
        if record.get("source_signature") != self.source_signature:
            if record.get("source") == self.source:
                return f"an earlier state of {self.source}"
            return f"the source {record.get('source')}"
        found: dict[str, object] = {"encoder": self.encoder, "shard_rows": self.shard_rows}
        if self.encoder_revision is not None:
            known = record.get("encoder_revision")
            same_kind = _folder_revision(self.encoder, like=known) if known and len(known) == 32 else None
            found["encoder_revision"] = same_kind or self.encoder_revision
        elif self.asked_revision != record.get("encoder_revision"):  # a branch or tag, or none
            found["asked_revision"] = self.asked_revision
        if self.precision != "auto":
            found["precision"] = self.precision
        recorded = dict(record)
        if isinstance(record.get("encoder"), str):  # earlier versions recorded a folder as it was typed
            recorded["encoder"] = full_name(record["encoder"])
        for key, value in found.items():
            if recorded.get(key) != value:
                return f"{key.replace('_', ' ')} {record.get(key)}"
        return None


def _folder_revision(encoder: str, *, like: str | None = None) -> str | None:
    return revision_of(find_folder(encoder), like=like) if is_folder(encoder) else None


def _finished(out: Path, asked: _Asked) -> EmbeddingStore:
    """The finished store, if it is the one asked for."""
    store = EmbeddingStore.open(out)
    difference = asked.difference(store.record)
    if difference:
        raise StoreError(f"{out} is already there, made of {difference}; give another --out or delete it")
    shutil.rmtree(out / PARTIAL, ignore_errors=True)  # left by a process that was killed at the very end
    return store


def _check_out(out: Path) -> None:
    """Refuse, before any work, a folder that cannot be written or that holds something else."""
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; give a folder as --out")
    if out.exists() and not (out / PARTIAL).exists() and any(out.iterdir()):
        raise StoreError(f"{out} is not empty and no store that embed began; give another --out")
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise StoreError(f"{out} cannot be written: no permission in {existing}; give another --out")


def _read_state(out: Path) -> dict[str, Any]:
    path = out / PARTIAL / "state.json"
    return read_json(path, schema_version=_STATE_VERSION, error=StoreError) if path.exists() else {}


@contextlib.contextmanager
def _locked(out: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Only this process writes `out`; what it began and has no finished chunk of is taken away at an error."""
    work, was_there = out / PARTIAL, out.exists()
    was_begun = (work / "state.json").exists()
    with locked(work, error=StoreError, wait=wait):
        for folder in (out, work, work / "chunks"):
            remove_leftovers(folder)
        try:
            yield
        except BaseException:
            if not was_begun and not list_chunks(work / "chunks"):
                shutil.rmtree(work if was_there else out, ignore_errors=True)
            raise


class Share(NamedTuple):
    """One of several parts of a source."""

    i: int
    """From 1."""
    n: int

    @classmethod
    def of(cls, text: str) -> Share:
        """What `3/64` says."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        share = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= share.i <= share.n:
            raise ConfigError(f"part {text!r} is none; wanted I/N with I from 1 to N, such as 3/64")
        return share

    def __str__(self) -> str:
        return f"{self.i}/{self.n}"

    def chunks(self, n_chunks: int) -> range:
        """The part's share of so many chunks; they follow each other, so that files are read from end to end."""
        return range((self.i - 1) * n_chunks // self.n, self.i * n_chunks // self.n)


@dataclass(frozen=True)
class Job:
    """One store to make, by whatever processes: all commit the same chunks, and one makes the store of them."""

    source: Source
    encoder: str | Path | Embedder
    asked: _Asked
    out: Path
    batch_size: int
    device: str
    workers: int | None
    ray: str | None
    share: Share | None
    is_finish: bool

    @property
    def command(self) -> str:
        """What goes on with the whole store."""
        if self.ray is not None:
            return self._said(ray=self.ray)
        return self._said(finish=True) if self.share is not None or self.is_finish else self._said()

    def command_of(self, share: Share) -> str:
        """What embeds one part."""
        return self._said(part=str(share))

    def _said(self, **how: object) -> str:
        asked = self.asked
        given = {"dtype": asked.precision, "revision": asked.asked_revision, "batch_size": self.batch_size}
        usual = {"dtype": "auto", "revision": None, "batch_size": 64}
        options = {name: value for name, value in given.items() if value != usual[name]}
        if self.source.is_reopenable and asked.shard_rows == _SHARD_ROWS:
            words = ["msae", "embed", asked.source, "--encoder", asked.encoder, "--out", str(self.out)]
            for name, value in {**options, **how}.items():
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
            return shlex.join(words)
        # what the command line cannot say
        options |= {"shard_rows": asked.shard_rows} if asked.shard_rows != _SHARD_ROWS else {}
        keywords = {"encoder": asked.encoder, "out": str(self.out), **options, **how}
        said = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        return f"msae.embed({repr(asked.source) if self.source.is_reopenable else 'SOURCE'}, {said})"

    def embed_all(self) -> EmbeddingStore:
        """The store, by this process alone."""
        embedder = self._load()
        with _locked(self.out):
            if (self.out / "store.json").exists():  # another process has just finished it
                return _finished(self.out, self.asked)
            chunk_items = self._begin(embedder)["chunk_items"]
            self.source.counts.keep_in(self.out / PARTIAL / "counts")
            work = Work(self, embedder, self.source, chunk_items)
            there = chunk_numbers(work.folder)
            work.embed(gaps(there, 0, None), done=len(there) * work.chunk_items, total=self.source.total)
            return _finish(self.out, _read_state(self.out), self.source.notes)

    def embed_part(self, share: Share) -> EmbeddedPart:
        """Commit the chunks of one part, beside the processes of other parts."""
        with self.at_work((share.i - 1) / share.n) as work:
            mine = share.chunks(work.n_chunks)
            missing = list(gaps(chunk_numbers(work.folder), mine.start, mine.stop))
            total = work.samples(mine.start, mine.stop)
            left = sum(work.samples(first, last or first) for first, last in missing)
            work.embed(missing, done=total - left, total=total)
        return EmbeddedPart(str(share), total, left, self.command)

    def finish(self) -> EmbeddingStore:
        """The store of chunks that other processes have committed."""
        first_part = self.command_of(Share(1, 2))
        if not _read_state(self.out):
            raise StoreError(f"{self.out} was not begun; embed every part first, for two parts: {first_part}, and 2/2")
        with _locked(self.out, wait=0.0 if self.ray is None else _WAIT):
            if (self.out / "store.json").exists():
                return _finished(self.out, self.asked)
            state = _read_state(self.out)
            _check_same(self.out, self.asked, state, {})
            source = counted(self.source, self.out / PARTIAL / "counts")
            n_chunks = -(-(source.total or 0) // state["chunk_items"])
            folder = self.out / PARTIAL / "chunks"
            missing = {n for run in gaps(chunk_numbers(folder), 0, n_chunks) for n in range(run[0], run[1] or 0)}
            if missing:
                raise StoreError(self._what_to_run(missing, n_chunks, state.get("parts")))
            return _finish(self.out, state, source.notes)

    def _what_to_run(self, missing: Set[int], n_chunks: int, n_parts: int | None) -> str:
        """Which commands embed the chunks that are missing."""
        lacks = f"{self.out} lacks {len(missing):,} of {n_chunks:,} chunks"
        if n_parts is None:
            return f"{lacks}; to embed them, type: {self._said()}"
        lacking = [Share(i, n_parts) for i in sorted({-(-(n + 1) * n_parts // n_chunks) for n in missing})]
        listed = ", ".join(map(str, lacking[:20])) + (f" and {len(lacking) - 20} more" if len(lacking) > 20 else "")
        return f"{lacks}; run part {listed}, such as: {self.command_of(lacking[0])}"

    @contextlib.contextmanager
    def at_work(self, place: float) -> Iterator[Work]:
        """What embeds chunks beside other processes.

        Args:
            place: Where among these processes this one stands, from 0 to 1.
        """
        embedder = self._load()
        with locked(self.out / PARTIAL, error=StoreError, shared=True):
            if (self.out / "store.json").exists():
                raise StoreError(f"{self.out} has just been finished by another process; nothing is left to do")
            chunk_items = self._begin(embedder)["chunk_items"]
            yield Work(self, embedder, counted(self.source, self.out / PARTIAL / "counts", place), chunk_items)

    def _load(self) -> Embedder:
        if isinstance(self.encoder, Embedder):
            return self.encoder
        asked = self.asked
        began_with = _read_state(self.out).get("precision", "auto") if asked.precision == "auto" else asked.precision
        return Embedder.load(asked.encoder, device=self.device, dtype=began_with, revision=asked.asked_revision)

    def _begin(self, embedder: Embedder) -> dict[str, Any]:
        """What is being made, from the process that began it or written down now."""
        settled = {
            "encoder_revision": embedder.revision,
            "precision": embedder.dtype,
            "pixel_backend": embedder.pixel_backend,
        }
        if not _read_state(self.out):
            record = {**vars(self.asked), **settled, "command": self.command}
            record |= {"chunk_items": self.batch_size * BATCHES_PER_CHUNK, "parts": self.share and self.share.n}
            # of processes that begin at once the first one decides
            write_json(self.out / PARTIAL / "state.json", record, schema_version=_STATE_VERSION, keep=True)
        state = _read_state(self.out)
        _check_same(self.out, self.asked, state, settled)
        return state


def _check_same(out: Path, asked: _Asked, state: Mapping[str, Any], settled: Mapping[str, Any]) -> None:
    """Refuse to go on with a store that was begun otherwise.

    Args:
        settled: What is known of the encoder once it is loaded.
    """
    difference = asked.difference(state)
    for key, value in settled.items():
        if key == "encoder_revision" and asked.encoder_revision is not None:
            continue  # a folder's is compared already, by the kind of hash that it was begun with
        if difference is None and state.get(key) != value:
            difference = f"{key.replace('_', ' ')} {state.get(key)}"
    if difference:
        raise StoreError(
            f"{out} was begun with {difference}; to go on, type: {state['command']}; to start anew, delete {out}"
        )


@dataclass(frozen=True)
class _Batch:
    """Samples, decoded."""

    n_items: int
    items: list[SourceItem] = field(default_factory=list)
    """Those that can be embedded."""
    pixels: list[dict[str, torch.Tensor]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Work:
    """A process that embeds chunks of a store."""

    job: Job
    embedder: Embedder
    source: Source
    chunk_items: int
    """Samples of every chunk but the last."""

    @property
    def folder(self) -> Path:
        """Where chunks are committed."""
        return self.job.out / PARTIAL / "chunks"

    @property
    def n_chunks(self) -> int:
        """Chunks of the whole source, whose samples are counted."""
        return -(-(self.source.total or 0) // self.chunk_items)

    def samples(self, first: int, last: int) -> int:
        """Samples in the chunks from `first` to before `last`."""
        start, end = (min(number * self.chunk_items, self.source.total or 0) for number in (first, last))
        return end - start

    def embed(self, runs: Iterable[tuple[int, int | None]], *, done: int, total: int | None) -> None:
        """Commit the chunks of these runs, the endless one up to the end of the source.

        Args:
            done, total: Samples for the progress bar.
        """
        job, size = self.job, self.chunk_items
        pool = ThreadPoolExecutor(job.workers or min(8, os.cpu_count() or 1), thread_name_prefix="decode")
        bar = progress("embedding", total=total, unit="rows", start=done)
        with quiet_about_size() if self.source.has_images else contextlib.nullcontext(), bar as advance:
            try:
                for first, last in runs:
                    items = itertools.islice(self.source.items(first * size), last and (last - first) * size)
                    cut = _cut(items, size, job.batch_size)
                    batches = _joined(_decoded_ahead(pool, self.source, self.embedder, cut))
                    for number in itertools.count(first) if last is None else range(first, last):
                        chunk_batches = _chunk_of(batches, size)
                        if chunk_path(self.folder, number).exists():  # somebody else has just made it
                            advance(sum(batch.n_items for batch in chunk_batches))
                            continue
                        chunk = _embedded(self.source, self.embedder, chunk_batches, advance)
                        if chunk.report.items == 0:
                            break
                        write_chunk(chunk_path(self.folder, number), chunk)
            finally:
                pool.shutdown(cancel_futures=True)


class _Piece(NamedTuple):
    """Some samples of a batch, not yet decoded."""

    items: list[SourceItem]
    is_last: bool
    """Whether the batch ends with them."""


def _cut(items: Iterator[SourceItem], chunk_items: int, batch_size: int) -> Iterator[_Piece]:
    """The samples in batches that end where their chunk ends: a resumed run cuts as an unbroken one does."""
    n_in_chunk = n_in_batch = 0
    room = min(_PIECE, batch_size)
    while piece := list(itertools.islice(items, room)):
        is_end = len(piece) < room
        n_in_chunk += len(piece)
        n_in_batch += len(piece)
        is_last = is_end or n_in_batch == batch_size or n_in_chunk == chunk_items
        yield _Piece(piece, is_last)
        n_in_batch = 0 if is_last else n_in_batch
        n_in_chunk = 0 if n_in_chunk == chunk_items else n_in_chunk
        room = min(_PIECE, batch_size - n_in_batch, chunk_items - n_in_chunk)
        if is_end:
            return


def _decoded_ahead(
    pool: ThreadPoolExecutor, source: Source, embedder: Embedder, pieces: Iterable[_Piece]
) -> Iterator[tuple[_Batch, bool]]:
    """The pieces in order, a few of them being decoded while the encoder works on an earlier one."""
    waiting: deque[tuple[Future[_Batch], bool, int]] = deque()
    n_bytes = 0

    def first() -> tuple[_Batch, bool]:
        nonlocal n_bytes
        future, is_last, size = waiting.popleft()
        n_bytes -= size
        return future.result(), is_last

    for items, is_last in pieces:
        size = sum(len(item.image) for item in items if isinstance(item.image, bytes))
        while waiting and n_bytes + size > _BYTES_AHEAD:
            yield first()
        waiting.append((pool.submit(_decode, source, embedder, items), is_last, size))
        n_bytes += size
        if len(waiting) > _N_AHEAD:
            yield first()
    while waiting:
        yield first()


def _joined(pieces: Iterable[tuple[_Batch, bool]]) -> Iterator[_Batch]:
    """The pieces as whole batches."""
    batch = _Batch(0)
    for piece, is_last in pieces:
        batch = _Batch(
            batch.n_items + piece.n_items,
            batch.items + piece.items,
            batch.pixels + piece.pixels,
            batch.skipped + piece.skipped,
            batch.converted + piece.converted,
        )
        if is_last:
            yield batch
            batch = _Batch(0)
    if batch.n_items:
        yield batch


def _chunk_of(batches: Iterator[_Batch], chunk_items: int) -> Iterator[_Batch]:
    """The next batches that fill a chunk; not one more is waited for before the chunk can be committed."""
    n_items = 0
    while n_items < chunk_items and (batch := next(batches, None)):
        n_items += batch.n_items
        yield batch


def _decode(source: Source, embedder: Embedder, items: Sequence[SourceItem]) -> _Batch:
    """The samples that can be embedded; of an image only the encoder's few pixels are kept."""
    batch = _Batch(len(items))
    for item in items:
        try:
            if item.damage is not None:
                raise SourceError(item.damage)
            if source.has_captions:
                _check_caption(item.caption)
            if source.has_images:
                if not item.image:
                    raise SourceError("empty file" if item.image == b"" else "no image")
                with fetched(item.image) as image:
                    picture = read_picture(image)
                batch.pixels.append(embedder.pixels([picture.image]))
                batch.converted.update(picture.conversions)
                if isinstance(item.image, bytes):  # no longer needed
                    item = replace(item, image=None)
        except SourceError as err:
            batch.skipped.append(Skipped(_utf8(item.id), str(err)))
        else:
            batch.items.append(item)
    return batch


def _check_caption(caption: str | None) -> None:
    if caption is None:
        raise SourceError("no caption")
    if not caption.strip():
        raise SourceError("empty caption")
    if _utf8(caption) != caption:
        raise SourceError("caption is not valid Unicode")


def _embedded(source: Source, embedder: Embedder, batches: Iterable[_Batch], advance: Callable[[int], None]) -> Chunk:
    empty = np.zeros((0, embedder.d_in), np.float16)
    rows: dict[Modality, list[NDArray[np.float16]]] = {}
    if source.has_images:
        rows["image"] = [empty]
    if source.has_captions:
        rows["text"] = [empty]
    items: list[SourceItem] = []
    report = Report()
    for batch in batches:
        if batch.items and source.has_images:
            pixels = {name: torch.cat([one[name] for one in batch.pixels]) for name in batch.pixels[0]}
            rows["image"].append(_checked(embedder.embed_pixels(pixels), batch, embedder))
        if batch.items and source.has_captions:
            captions = [item.caption or "" for item in batch.items]
            rows["text"].append(_checked(embedder.embed_texts(captions), batch, embedder))
            report.truncated += embedder.count_truncated(captions)
        items += batch.items
        report.add(Report(batch.n_items, batch.skipped, batch.converted))
        advance(batch.n_items)
    arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Chunk(arrays, _metadata(source, items), report)


def _checked(x: NDArray[np.float32], batch: _Batch, embedder: Embedder) -> NDArray[np.float16]:
    bad = first_bad_row(x)
    if bad is not None:
        raise EmbedderError(
            f"encoder {embedder.id} gives NaN or infinity for {batch.items[bad].id!r} in {embedder.dtype}; "
            f"its weights are damaged, or type: --dtype float32"
        )
    return x.astype(np.float16)


def _metadata(source: Source, items: Sequence[SourceItem]) -> pa.Table:
    """id, image_path and caption, then the source's other columns."""
    import pyarrow as pa

    columns: dict[str, Any] = {"id": pa.array([_utf8(item.id) for item in items], pa.string())}
    paths = [_path_of(item) for item in items]
    if any(path is not None for path in paths):
        columns["image_path"] = pa.array(paths, pa.string())
    captions = [None if item.caption is None else _utf8(item.caption) for item in items]
    if source.has_captions or any(caption is not None for caption in captions):  # some are kept, not embedded
        columns["caption"] = pa.array(captions, pa.string())
    found = dict.fromkeys(name for item in items for name in item.columns)
    names = list(found) if source.schema is None else source.schema.names
    for name in names:
        values = [item.columns.get(name) for item in items]
        values = [_utf8(value) if isinstance(value, str) else value for value in values]
        columns[name] = array_of(values, None if source.schema is None else source.schema.field(name).type)
    return pa.table(columns)


def _path_of(item: SourceItem) -> str | None:
    if isinstance(item.image, FarFile):
        return _utf8(item.image.address)
    return _utf8(str(item.image.absolute())) if isinstance(item.image, Path) else None


def _finish(out: Path, state: Mapping[str, Any], notes: Sequence[str]) -> EmbeddingStore:
    """Cut all chunks into shards and write store.json; a run killed in here does all of it again."""
    for name in ("img_emb", "text_emb", "metadata"):
        shutil.rmtree(out / name, ignore_errors=True)
    files = list_chunks(out / PARTIAL / "chunks")
    hashes = []
    schemas: list[pa.Schema] = []
    report = Report()
    n_rows = n_skipped = 0
    for file in files:
        chunk = read_chunk(file)
        hashes.append(hashes_of(chunk.metadata.column("id").to_pylist()))
        if chunk.metadata.schema not in schemas[-1:]:
            schemas.append(chunk.metadata.schema)
        n_rows += chunk.metadata.num_rows
        n_skipped += len(chunk.report.skipped)
        listed = chunk.report.skipped[: MAX_LISTED - len(report.skipped)]
        report.add(replace(chunk.report, skipped=listed))
    skipped = report.skipped
    if not n_rows:
        first = f": {skipped[0].id}: {skipped[0].reason}" if skipped else ""
        shutil.rmtree(out / PARTIAL / "chunks")  # else the next run would not look at the source again
        raise SourceError(f"none of the {report.items:,} samples of {state['source']} can be embedded{first}")
    record: dict[str, Any] = {
        **{key: state[key] for key in _RECORDED},
        "counts": {
            "inputs": report.items,
            "rows": n_rows,
            "skipped": n_skipped,
            "converted": dict(sorted(report.converted.items())),
            "truncated_captions": report.truncated,
        },
        "notes": list(notes),
        "skipped_is_complete": n_skipped <= MAX_LISTED,
        "skipped": [entry._asdict() for entry in skipped],
    }
    parts = _numbered_parts(files, common_schema(schemas), UniqueIds(hashes))
    store = write_store(out, parts, shard_rows=state["shard_rows"], record=record)
    shutil.rmtree(out / PARTIAL)
    return store


def _numbered_parts(files: Sequence[Path], schema: pa.Schema, unique: UniqueIds) -> Iterator[StorePart]:
    """The chunks with columns of one type and with ids that occur once."""
    import pyarrow as pa

    for file in files:
        chunk = read_chunk(file)
        own = pa.array(unique.of(chunk.metadata.column("id").to_pylist()), pa.string())
        table = conform(chunk.metadata, schema).set_column(0, "id", own)
        yield StorePart(chunk.rows, table)


def _utf8(text: str) -> str:
    """`text` with what UTF-8 cannot hold, such as a file name in another encoding, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
