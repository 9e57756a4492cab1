"""`embed`: images and captions become an `EmbeddingStore`, whatever interrupts it.

The work goes in chunks of source positions, each committed to `STORE/.partial/` as one file; what a killed
process leaves is whole chunks, and the next run goes on after them. All of them are at last cut into shards.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shlex
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from msae.base.errors import ConfigError, EmbedderError, Interrupted, SourceError, StoreError, first_line
from msae.base.files import atomic_path, locked, read_json, remove_leftovers, write_json
from msae.base.progress import progress
from msae.base.records import of_record, to_record
from msae.data.arrays import first_bad_row, open_safetensors
from msae.data.embedder import Embedder, Precision, find_folder, full_name, is_folder, revision_of
from msae.data.images import quiet_about_size, read_picture
from msae.data.layout import MODALITIES, PARTIAL, Modality, path_of
from msae.data.sources import Source, open_source
from msae.data.sources.members import SourceItem
from msae.data.store import EmbeddingStore, Skipped, StorePart, write_store
from msae.data.tables import array_of, common_schema, conform, unique_ids

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
) -> EmbeddingStore:
    """Embed the images and captions of a source into a store.

    An input that cannot be embedded, such as an unreadable image or an empty caption, is left out, counted, and
    listed with its reason in store.json. After an interruption the same command continues where it stopped, and the
    store is the same to the byte. A finished store of the same source and encoder is returned as it is.

    Args:
        source: A folder of images, with captions in .txt or .json files of the same names; a .txt of captions, one a
            line; a table (.csv, .tsv, .jsonl, .json, .parquet) of captions or image paths; webdataset .tar files; a
            folder that save_to_disk of datasets wrote; or a Hugging Face dataset as hf://OWNER/NAME.
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
        workers: Threads that read images ahead; without it one for each CPU core, at most 8.

    Raises:
        ConfigError: A number is below 1.
        SourceError: There is nothing to embed.
        EmbedderError: The encoder cannot be loaded.
        StoreError: `out` cannot be written, holds something else, or is being written by another process.
        Interrupted: Ctrl-C; the message says how to go on.
    """
    _check_positive(batch_size=batch_size, shard_rows=shard_rows, workers=1 if workers is None else workers)
    out = path_of(out)
    opened = source if isinstance(source, Source) else open_source(source)
    asked = _Asked.of(opened, encoder, out, dtype, revision, shard_rows, batch_size)
    if (out / "store.json").exists():
        return _finished(out, asked)
    _check_out(out)
    state = _read_state(out)
    embedder = encoder if isinstance(encoder, Embedder) else None
    if embedder is None:
        began_with = state.get("precision", "auto") if dtype == "auto" else dtype
        embedder = Embedder.load(asked.encoder, device=device, dtype=began_with, revision=revision)
    with _locked(out):
        if (out / "store.json").exists():  # another process has just finished it
            return _finished(out, asked)
        state = _begin(out, asked, embedder, batch_size * BATCHES_PER_CHUNK)
        try:
            _embed_chunks(opened, embedder, out, state["chunk_items"], batch_size, workers)
            return _finish(out, state, opened.notes)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what is done is kept in {out}; to go on, type: {asked.command}") from None


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
    command: str

    @classmethod
    def of(
        cls,
        source: Source,
        encoder: str | Path | Embedder,
        out: Path,
        dtype: Precision,
        revision: str | None,
        shard_rows: int,
        batch_size: int,
    ) -> _Asked:
        id = encoder.id if isinstance(encoder, Embedder) else full_name(encoder)
        known = encoder.revision if isinstance(encoder, Embedder) else _folder_revision(id)
        precision = encoder.dtype if isinstance(encoder, Embedder) else dtype
        given = {"dtype": (precision, "auto"), "revision": (revision, None), "batch_size": (batch_size, 64)}
        options = {name: value for name, (value, default) in given.items() if value != default}
        if source.is_reopenable and shard_rows == _SHARD_ROWS:
            words = ["msae", "embed", source.name, "--encoder", id, "--out", str(out)]
            for name, value in options.items():
                words += [f"--{name.replace('_', '-')}", str(value)]
            command = shlex.join(words)
        else:  # what the command line cannot say
            options |= {"shard_rows": shard_rows} if shard_rows != _SHARD_ROWS else {}
            keywords = {"encoder": id, "out": str(out), **options}
            said = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
            command = f"msae.embed({repr(source.name) if source.is_reopenable else 'SOURCE'}, {said})"
        return cls(source.name, source.signature, id, known, revision, precision, shard_rows, command)

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


def _begin(out: Path, asked: _Asked, embedder: Embedder, chunk_items: int) -> dict[str, Any]:
    """What is being made, from the run that began it or written down now."""
    for folder in (out, out / PARTIAL, out / PARTIAL / "chunks"):
        remove_leftovers(folder)
    settled = {
        "encoder_revision": embedder.revision,
        "precision": embedder.dtype,
        "pixel_backend": embedder.pixel_backend,
    }
    state = _read_state(out)
    if not state:
        record = {**vars(asked), **settled, "chunk_items": chunk_items}
        write_json(out / PARTIAL / "state.json", record, schema_version=_STATE_VERSION)
        return _read_state(out)
    difference = asked.difference(state)
    if asked.encoder_revision is not None:  # a folder's is compared already, by the kind of hash that it was begun with
        settled["encoder_revision"] = state["encoder_revision"]
    for key, value in settled.items():
        if difference is None and state.get(key) != value:
            difference = f"{key.replace('_', ' ')} {state.get(key)}"
    if difference:
        raise StoreError(
            f"{out} was begun with {difference}; to go on, type: {state['command']}; to start anew, delete {out}"
        )
    return state


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Only this process writes `out`; a folder without any finished chunk is taken away at an error."""
    work, was_there = out / PARTIAL, out.exists()
    with locked(work, error=StoreError):
        (work / "chunks").mkdir(exist_ok=True)
        try:
            yield
        except BaseException:
            if not any((work / "chunks").glob("*.safetensors")):
                shutil.rmtree(work if was_there else out, ignore_errors=True)
            raise


@dataclass(frozen=True)
class _Batch:
    """Samples, decoded."""

    n_items: int
    items: list[SourceItem] = field(default_factory=list)
    """Those that can be embedded."""
    pixels: list[dict[str, torch.Tensor]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)


def _embed_chunks(
    source: Source, embedder: Embedder, out: Path, chunk_items: int, batch_size: int, workers: int | None
) -> None:
    """Commit every chunk that is not there yet."""
    folder = out / PARTIAL / "chunks"
    n_chunks = len(list_chunks(folder))
    start = n_chunks * chunk_items
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), thread_name_prefix="decode")
    bar = progress("embedding", total=source.total, unit="rows", start=start)
    with quiet_about_size() if source.has_images else contextlib.nullcontext(), bar as advance:
        try:
            cut = _cut(source.items(start), chunk_items, batch_size)
            batches = _joined(_decoded_ahead(pool, source, embedder, cut))
            for number in itertools.count(n_chunks):
                chunk = _embedded(source, embedder, _chunk_of(batches, chunk_items), advance)
                if chunk.report.items == 0:
                    break
                write_chunk(chunk_path(folder, number), chunk)
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
                picture = read_picture(item.image)
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
    paths = [_utf8(str(item.image.absolute())) if isinstance(item.image, Path) else None for item in items]
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
        known = source.schema is not None and source.schema.field(name).type
        columns[name] = pa.array(values, known) if known else array_of(values)
    return pa.table(columns)


def _finish(out: Path, state: Mapping[str, Any], notes: Sequence[str]) -> EmbeddingStore:
    """Cut all chunks into shards and write store.json; a run killed in here does all of it again."""
    for name in ("img_emb", "text_emb", "metadata"):
        shutil.rmtree(out / name, ignore_errors=True)
    files = list_chunks(out / PARTIAL / "chunks")
    ids: list[str] = []
    schemas = []
    report = Report()
    for file in files:
        chunk = read_chunk(file)
        ids += chunk.metadata.column("id").to_pylist()
        schemas.append(chunk.metadata.schema)
        report.add(chunk.report)
    skipped = report.skipped
    if not ids:
        first = f": {skipped[0].id}: {skipped[0].reason}" if skipped else ""
        shutil.rmtree(out / PARTIAL / "chunks")  # else the next run would not look at the source again
        raise SourceError(f"none of the {report.items:,} samples of {state['source']} can be embedded{first}")
    record: dict[str, Any] = {
        **{key: state[key] for key in _RECORDED},
        "counts": {
            "inputs": report.items,
            "rows": len(ids),
            "skipped": len(skipped),
            "converted": dict(sorted(report.converted.items())),
            "truncated_captions": report.truncated,
        },
        "notes": list(notes),
        "skipped_is_complete": len(skipped) <= MAX_LISTED,
        "skipped": [entry._asdict() for entry in skipped[:MAX_LISTED]],
    }
    parts = _numbered_parts(files, common_schema(schemas), ids)
    store = write_store(out, parts, shard_rows=state["shard_rows"], record=record)
    shutil.rmtree(out / PARTIAL)
    return store


def _numbered_parts(files: Sequence[Path], schema: pa.Schema, ids: Sequence[str]) -> Iterator[StorePart]:
    """The chunks with columns of one type and with ids that occur once."""
    import pyarrow as pa

    unique = unique_ids(ids)
    for file in files:
        chunk = read_chunk(file)
        own = pa.array(list(itertools.islice(unique, chunk.metadata.num_rows)), pa.string())
        table = conform(chunk.metadata, schema).set_column(0, "id", own)
        yield StorePart(chunk.rows, table)


def _utf8(text: str) -> str:
    """`text` with what UTF-8 cannot hold, such as a file name in another encoding, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass
class Report:
    """What became of some samples of a source."""

    items: int = 0
    """Samples, embedded or not."""
    skipped: list[Skipped] = field(default_factory=list)
    """Those that were not embedded."""
    converted: dict[str, int] = field(default_factory=dict)
    """How many images needed which conversion."""
    truncated: int = 0
    """Captions that were cut off."""

    def add(self, other: Report) -> None:
        """Count what became of other samples too."""
        self.items += other.items
        self.skipped += other.skipped
        self.converted = dict(Counter(self.converted) + Counter(other.converted))
        self.truncated += other.truncated


@dataclass(frozen=True, eq=False)
class Chunk:
    """What a run of source positions adds to a store."""

    rows: dict[Modality, NDArray[np.float16]]
    metadata: pa.Table
    report: Report


def list_chunks(folder: Path) -> list[Path]:
    """The committed chunks in their order.

    Raises:
        StoreError: One is missing in between.
    """
    files = sorted(folder.glob("chunk_*.safetensors"))
    for number, file in enumerate(files):
        if file != chunk_path(folder, number):
            raise StoreError(f"{chunk_path(folder, number)} is missing; delete {folder.parent.parent} and embed again")
    return files


def chunk_path(folder: Path, number: int) -> Path:
    """Where the chunk of this number belongs."""
    return folder / f"chunk_{number:08d}.safetensors"


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Commit a chunk: after this it survives a kill and a power cut."""
    import pyarrow as pa

    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, chunk.metadata.schema) as stream:
        stream.write_table(chunk.metadata)
    tensors: dict[str, NDArray[Any]] = {"metadata": np.frombuffer(buffer.getvalue(), np.uint8)}
    tensors.update((str(modality), rows) for modality, rows in chunk.rows.items())
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"report": json.dumps(to_record(chunk.report))})


def read_chunk(path: Path) -> Chunk:
    """A committed chunk; its rows are memory-mapped.

    Raises:
        StoreError: The file is damaged.
    """
    import pyarrow as pa

    tensors, strings = open_safetensors(path, StoreError)
    remedy = "delete it and all later ones"
    try:
        metadata = pa.ipc.open_stream(pa.py_buffer(tensors["metadata"].values)).read_all()
        report = json.loads(strings["report"])
    except (pa.ArrowException, KeyError, ValueError, TypeError) as err:
        raise StoreError(f"{path} is damaged ({first_line(err)}); {remedy}") from err
    rows = {name: tensors[name].values for name in MODALITIES if name in tensors}
    return Chunk(rows, metadata, of_record(Report, report, where=str(path), error=StoreError, remedy=remedy))
