"""Stores that lie elsewhere, at `https://…` or `s3://…`: fsspec reads each file into a cache here when it is needed.

docs/store-format.md, "Stores far away", says what is kept where and what is checked.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from numpy.typing import NDArray

from msae.base.errors import MissingDependencyError, MsaeError, StoreError, first_line
from msae.base.files import alone, atomic_path, file_hash, is_writable, parse_json, user_cache
from msae.base.notices import notice
from msae.base.progress import progress
from msae.data.arrays import Rows, ShardedRows, one_array, open_arrays, open_npy, read_npy_header
from msae.data.layout import FILE_SUFFIXES, FOLDERS, SCHEMA_VERSION, Kind, StoreFiles, files_of, in_order
from msae.data.tables import Metadata

_T = TypeVar("_T")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
"""What fsspec needs for an address besides aiohttp, which the web needs."""
_PAUSES = (0.2, 1.0)
"""Seconds before a file that broke off is asked for again."""
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError)
_STALLED = 60.0
"""Seconds without a byte after which a connection is given up."""
_HEADER = 4096
"""Bytes that hold the header of a .npy."""
_METADATA = ("metadata", "metadata", ".parquet")
_CHANGES = ("ETag", "etag", "Content-MD5", "blob_id", "Last-Modified", "LastModified", "mtime", "created", "size")
"""What file systems say of a file that is different when the file is."""


class TooLong(OSError):
    """More bytes came than there are."""


class Entry(NamedTuple):
    """What is known of a file before it arrives."""

    size: int
    """Bytes."""
    hash: str | None = None


@dataclass(frozen=True)
class _Mirror:
    """A folder of the cache that fills with the files of one state of a far store."""

    address: str
    system: Any
    """fsspec's file system."""
    root: str
    """The folder in that file system."""
    folder: Path
    entries: Mapping[str, Entry]

    def __post_init__(self) -> None:
        if not is_writable(self.folder):
            raise StoreError(f"{self.folder} cannot be written; set MSAE_STORES to a folder for what is downloaded")

    def fetch(self, name: str) -> Path:
        """The file `name` of the store on this machine, downloaded if it is not here yet.

        Raises:
            StoreError: It does not arrive, or is not what the store says; what arrived before is kept.
        """
        place, entry = self.folder / name, self.entries[name]
        if not is_whole(place, entry):
            with alone(place.with_name(f".{place.name}.lock")):  # one process downloads it, the others wait
                if not is_whole(place, entry):
                    self._download(name, place, entry)
        return place

    def here(self, path: Path) -> Path:
        """The same by its path in this folder."""
        return self.fetch(path.relative_to(self.folder).as_posix())

    def _download(self, name: str, place: Path, entry: Entry) -> None:
        notice(
            f"{self.address}: its files are kept in {self.folder} as they are read; set MSAE_STORES to keep them "
            f"elsewhere, delete the folder to free its room"
        )
        what = f"{name} of {self.address}"
        with arriving(what, f"what arrived is kept in {self.folder}: type the same again"):
            download(self.system, f"{self.root}/{name}", place, entry, what)


class Found(NamedTuple):
    """A far store: where its files lie when they are here, and what they hold."""

    path: Path
    files: StoreFiles
    arrays: Mapping[str, ShardedRows]
    metadata: Metadata


def open_far(address: str) -> Found:
    """The store at an address; of a folder nothing but its description is read yet, a single file is downloaded.

    Raises:
        StoreError: It cannot be reached, is no store, or its store.json is damaged.
        MissingDependencyError: What fsspec needs for such an address is not installed.
    """
    system, root = connect(address)
    if PurePosixPath(root).suffix.lower() in FILE_SUFFIXES:
        return _open_file(address, system, root)
    with arriving(f"{address}/store.json", "check the address and the network"):
        try:
            text = system.cat_file(f"{root}/store.json")
        except FileNotFoundError:
            return _open_listed(address, system, root, {})
    record = parse_json(text, f"{address}/store.json", schema_version=SCHEMA_VERSION, error=StoreError)
    if "files" not in record:  # made by an earlier msae
        return _open_listed(address, system, root, record)
    entries = _promised(address, record)
    mirror = _Mirror(address, system, root, _place(address, text, root), entries)
    shapes = _shapes(address, record, _shards(entries))
    for name, ((n_rows, d_in), _) in shapes.items():
        if entries[name].size < 2 * n_rows * d_in:
            raise _damaged(address, f"{name} has {entries[name].size:,} bytes, too few for {n_rows:,} rows of {d_in:,}")
    return _of_folder(mirror, "store", record, shapes)


def is_known(address: str) -> bool:
    """Whether this far store was opened on this machine before."""
    return place_of(address).is_dir()


def connect(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and what the address is called there."""
    protocol = address.partition(":")[0]
    options: dict[str, Any] = {}
    try:
        import fsspec

        if protocol in ("http", "https"):
            import aiohttp

            stalled = aiohttp.ClientTimeout(total=None, sock_connect=_STALLED, sock_read=_STALLED)
            options = {"client_kwargs": {"timeout": stalled}}  # aiohttp's own limit is 5 minutes a file
        with arriving(address, "check the address and the network"):
            system = fsspec.filesystem(protocol, **options)
    except ImportError:
        raise MissingDependencyError.of(_PACKAGES.get(protocol, "aiohttp"), extra="far") from None
    system.invalidate_cache()
    return system, str(system._strip_protocol(address)).rstrip("/")


def download(system: Any, path: str, place: Path, entry: Entry, what: str) -> None:
    """Put a file from elsewhere at `place` when it is whole; a download that breaks off is asked for again.

    Args:
        path: What the file system calls it.
        what: What a person calls it.

    Raises:
        StoreError: The disk has no room for it.
        Exception: Whatever the file system raises; `arriving` makes one line of it.
    """
    free = shutil.disk_usage(place.parent).free
    if free < entry.size:
        raise StoreError(
            f"{what} has {entry.size:,} bytes, but only {free:,} are free in {place.parent}; "
            f"set MSAE_STORES to a folder with more room"
        )
    with progress(f"downloading {PurePosixPath(path).name}", total=entry.size, unit="bytes") as advance:

        def get() -> None:
            with atomic_path(place) as temporary:
                system.get_file(path, str(temporary), callback=limited(entry.size, advance))
                _check(temporary, entry)

        insist(get)


def insist(ask: Callable[[], _T]) -> _T:
    """What `ask` gives, asked twice more where the way there fails and not what was asked for."""
    pauses = iter(_PAUSES)
    while True:
        try:
            return ask()
        except Exception as caught:  # noqa: BLE001 - file systems raise almost anything
            err, cause = caught, caught.__cause__
            is_of_way = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
            if isinstance(err, FileNotFoundError) and isinstance(cause, Exception) and is_of_way:
                # fsspec calls all failures a missing file
                err = err if getattr(cause, "status", None) == 404 else cause
            pause = next(pauses, None)
            if pause is None or isinstance(err, _FINAL):
                raise err from None
            time.sleep(pause)


@contextmanager
def arriving(what: str, remedy: str) -> Iterator[None]:
    """Whatever a file system raises, and they raise almost anything, becomes one line."""
    try:
        yield
    except (MsaeError, ImportError):
        raise
    except Exception as err:
        why = first_line(err) if type(err) in (OSError, TooLong) else f"{type(err).__name__}: {first_line(err)}"
        why = "it is not there" if isinstance(err, FileNotFoundError) else why
        if isinstance(err, PermissionError) or getattr(err, "status", None) in (401, 403):
            why, remedy = "no right to read it", "sign in as its kind of address needs it (docs/store-format.md)"
        raise StoreError(f"{what} did not arrive ({why}); {remedy}") from err


def place_of(address: str) -> Path:
    """The folder of the cache for all states of one far store, or for a source."""
    cache = Path(os.environ.get("MSAE_STORES") or user_cache() / "stores")
    return cache / hashlib.blake2b(address.encode(), digest_size=12).hexdigest()


def _place(address: str, state: bytes, root: str) -> Path:
    """The folder for one state of a far store; its name is the store's."""
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(root).name).strip(".") or "store"
    return place_of(address) / hashlib.blake2b(state, digest_size=12).hexdigest() / name


def is_whole(place: Path, entry: Entry) -> bool:
    """Whether all bytes of a file are at `place`."""
    try:
        return place.stat().st_size == entry.size
    except OSError:
        return False


def check_size(found: int, wanted: int) -> None:
    """Refuse a file of which not all came, or more."""
    if found != wanted:
        raise OSError(f"{found:,} bytes came of {wanted:,}")


def _check(file: Path, entry: Entry) -> None:
    found = file.stat().st_size
    check_size(found, entry.size)
    if entry.hash is not None and file_hash(file) != entry.hash:
        raise OSError("its bytes have another hash than store.json says")


def _promised(address: str, record: Mapping[str, Any]) -> dict[str, Entry]:
    """The files that a store.json lists. Their names are checked, so that none leads out of the cache."""
    try:
        entries = {name: Entry(int(one["bytes"]), str(one["blake2b"])) for name, one in record["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as err:
        raise _damaged(address, f"its files are listed in another way ({first_line(err)})") from err
    known = {name for names in _shards(entries).values() for name in names}
    strange = next((name for name, one in entries.items() if name not in known or one.size < 0), None)
    if strange is not None:
        raise _damaged(address, f"it lists the file {strange!r}, which no store has")
    return entries


def _shards(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of each modality, and of the `metadata`, in order."""
    found = {}
    for key, folder, suffix in (*((key, name, ".npy") for key, name in FOLDERS.items()), _METADATA):
        found[key] = in_order(names, f"{folder}/{folder}", suffix)
    return {key: shards for key, shards in found.items() if shards}


def _shapes(
    address: str, record: Mapping[str, Any], shards: Mapping[str, list[str]]
) -> dict[str, tuple[tuple[int, int], str]]:
    """Shape and dtype of each file of embeddings, from what store.json says of all."""
    try:
        n_rows, size, d_in = (int(record[key]) for key in ("rows", "shard_rows", "d_in"))
        n_shards = -(-n_rows // size)
    except (KeyError, TypeError, ValueError, ArithmeticError) as err:
        raise _damaged(address, f"it does not say how its rows are cut ({first_line(err)})") from err
    wrong = next((key for key, names in shards.items() if len(names) != n_shards), None)
    if min(n_rows, size, d_in) < 1 or wrong is not None or not set(FOLDERS) & set(shards):
        raise _damaged(address, f"{n_rows:,} rows are {n_shards:,} files, and it lists others")
    cut = [(min(size, n_rows - number * size), d_in) for number in range(n_shards)]
    return {
        name: (shape, str(record.get("dtype")))
        for key, names in shards.items() if key in FOLDERS for name, shape in zip(names, cut, strict=True)
    }  # fmt: skip


def _damaged(address: str, why: str) -> StoreError:
    return StoreError(f"{address}/store.json is damaged: {why}; copy the store there again")


def _of_folder(
    mirror: _Mirror, kind: Kind, record: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], str]]
) -> Found:
    """The store in a folder, each file of which is downloaded when it is first read."""
    shards = _shards(mirror.entries)
    tables = shards.pop("metadata", [])
    arrays = {key: one_array([_later(mirror, name, *shapes[name]) for name in names], StoreError)
              for key, names in shards.items()}  # fmt: skip
    counts = [shard.shape[0] for shard in next(iter(arrays.values())).shards]
    metadata = Metadata.open([], StoreError)
    if tables:
        metadata = Metadata.later(counts, [partial(mirror.fetch, name) for name in tables], StoreError)
    paths = {key: [mirror.folder / name for name in names] for key, names in shards.items()}
    is_checked = all(entry.hash is not None for entry in mirror.entries.values())
    files = StoreFiles(kind, record, paths, [mirror.folder / name for name in tables], mirror.here, is_checked)
    return Found(mirror.folder, files, arrays, metadata)


def _later(mirror: _Mirror, name: str, shape: tuple[int, ...], dtype: str) -> Rows:
    def load() -> NDArray[Any]:
        rows = open_npy(mirror.fetch(name), StoreError)
        if (rows.shape, rows.dtype) != (shape, dtype):
            raise _damaged(mirror.address, f"{name} is {rows.shape} {rows.dtype} where {shape} {dtype} is promised")
        return rows.values

    return Rows(mirror.folder / name, shape, dtype, load)


def _open_listed(address: str, system: Any, root: str, record: Mapping[str, Any]) -> Found:
    """A folder that does not say which files it has: they are listed, and each one's header is read."""
    names: list[str] = []
    infos: dict[str, Any] = {}
    heads: dict[str, tuple[tuple[int, ...], str]] = {}
    with arriving(f"the list of files of {address}", "check the address and the network"):
        for folder, suffix in (*((name, ".npy") for name in FOLDERS.values()), _METADATA[1:]):
            try:
                listed = system.ls(f"{root}/{folder}", detail=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            bare = in_order((str(one).rstrip("/").rpartition("/")[2] for one in listed), folder, suffix)
            names += [f"{folder}/{name}" for name in bare]
        for name in names:
            infos[name] = system.info(f"{root}/{name}")
        if not any(name.endswith(".npy") for name in names):
            raise StoreError(
                f"{address} is no store: it has neither store.json nor a list of files in img_emb/ or text_emb/; "
                f"check the address"
            )
        entries = {name: Entry(size_of(address, name, info)) for name, info in infos.items()}
        for name in names:
            if name.endswith(".npy"):
                with system.open(f"{root}/{name}", "rb", block_size=1 << 16) as file:
                    head = io.BytesIO(file.read(_HEADER))
                shape, dtype = read_npy_header(head, Path(name), entries[name].size, StoreError)
                heads[name] = (shape, dtype.newbyteorder("=").name)
    state = json.dumps([record, {name: state_of(info) for name, info in infos.items()}], default=str).encode()
    mirror = _Mirror(address, system, root, _place(address, state, root), entries)
    return _of_folder(mirror, "store" if record else "clip-retrieval", record, heads)


def _open_file(address: str, system: Any, root: str) -> Found:
    """A single file, and the table beside it, downloaded."""
    folder, _, name = root.rpartition("/")
    infos = {}
    with arriving(address, "check the address and the network"):
        infos[name] = insist(lambda: system.info(root))
        for ending in (".csv", ".parquet"):
            beside = f"{PurePosixPath(name).stem}{ending}"
            if len(infos) == 1 and beside != name:
                try:
                    infos[beside] = system.info(f"{folder}/{beside}")
                except FileNotFoundError:
                    continue
    entries = {one: Entry(size_of(address, one, info)) for one, info in infos.items()}
    state = json.dumps({name: state_of(info) for name, info in infos.items()}, default=str).encode()
    mirror = _Mirror(address, system, folder, _place(address, state, root).parent, entries)
    for one in entries:
        mirror.fetch(one)
    files = files_of(mirror.folder / name)
    return Found(
        mirror.folder / name, files, open_arrays(files.arrays, StoreError), Metadata.open(files.tables, StoreError)
    )


def state_of(info: Mapping[str, Any]) -> list[Any]:
    """What changes when a file does, of what its file system says of it."""
    return [info.get(key) for key in _CHANGES]


def size_of(address: str, name: str, info: Mapping[str, Any]) -> int:
    """The bytes of a file; raises StoreError where its file system does not say."""
    size = info.get("size")
    if not isinstance(size, int):
        raise StoreError(f"{address}: the server does not say how large {name} is; put the file on another one")
    return size


def limited(size: int, advance: Callable[[int], None]) -> Any:
    """A callback for fsspec: shows progress, and stops a download that is longer than it should be."""
    from fsspec.callbacks import Callback

    class Counted(Callback):  # type: ignore[misc]  # fsspec has no types
        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            if self.value > size:
                raise TooLong(f"more than its {size:,} bytes came")
            advance(inc)

    return Counted()
