"""Sources in object storage or on the web: which files they have, and each of them here while it is read.

docs/store-format.md, "Sources far away", says what is downloaded when.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from posixpath import normpath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from msae.base.errors import MsaeError, SourceError, StoreError
from msae.base.files import alone, is_writable
from msae.base.notices import notice
from msae.data.far import (
    Entry,
    TooLong,
    arriving,
    check_size,
    connect,
    download,
    insist,
    is_whole,
    limited,
    place_of,
    size_of,
    state_of,
)
from msae.data.images import SUFFIXES as IMAGE_SUFFIXES

STORAGE = ("s3://", "gs://", "memory://")
"""Beginnings of addresses in object storage."""
WEB = ("http://", "https://")
_REQUESTS = 16
"""Small files and headers that are asked for at once."""
_MAX_PICTURE = 1 << 28
"""Bytes of a picture; a larger file is not read as one."""
_DEEPEST = 32
"""Folders in folders of a web server's lists: a link there may lead back to where it lies."""
_CHECK = "check the address and the network"
_AGAIN = "what is embedded is kept: type the same again"
_A = TypeVar("_A")
_B = TypeVar("_B")


class _Passage:
    """The folder of the cache through which files of one source pass; emptied when the source is not used."""

    largest = 0
    """Bytes of the largest file that may pass."""

    def __init__(self, address: str) -> None:
        self.address = address

    @cached_property
    def folder(self) -> Path:
        """Where it is on this machine; where files cannot be locked, every process has its own."""
        folder = place_of(f"source {self.address}")
        folder = folder if _can_lock(folder) else folder / str(os.getpid())
        weakref.finalize(self, _leave, folder)
        return folder


@dataclass(frozen=True, eq=False)
class FarFile:
    """A file of a source that lies elsewhere."""

    address: str
    system: Any
    """fsspec's file system."""
    path: str
    """What the file system calls it."""
    passage: _Passage | None = None
    """None for a picture that a table lists."""
    size: int | None = None
    """Bytes, where it was listed."""
    state: str = ""
    """Changes when the file does."""

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """Its name without a folder."""
        return _plain(self.address.rpartition("/")[2], self.address)

    @property
    def suffix(self) -> str:
        """The ending of its name."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> str:
        """The address of its folder."""
        return self.address.rpartition("/")[0]

    @contextmanager
    def held(self) -> Iterator[Path]:
        """The file on this machine while the block runs; what was read before it is deleted when it is downloaded.

        Raises:
            StoreError: It does not arrive.
        """
        assert self.passage is not None and self.size is not None
        folder, entry = self.passage.folder, Entry(self.size)
        stem = hashlib.blake2b(f"{self.path}\0{self.state}".encode(), digest_size=12).hexdigest()
        ending = self.suffix.lower()
        place = folder / (stem + (ending if re.fullmatch(r"\.[a-z]+", ending) else ""))  # no name of a stranger
        lock = folder / f".{stem}.lock"
        while True:
            self._fetch(place, entry, lock)
            with alone(lock, shared=True):
                if is_whole(place, entry):  # nobody has deleted it meanwhile
                    try:
                        yield place
                    except MsaeError as err:
                        raise type(err)(str(err).replace(str(place), self.address)) from err
                    return

    def _fetch(self, place: Path, entry: Entry, lock: Path) -> None:
        assert self.passage is not None
        folder = place.parent
        if is_whole(place, entry):
            return
        if not is_writable(folder):
            raise StoreError(f"{folder} cannot be written; set MSAE_STORES to a folder for what is downloaded")
        _remove_unread(folder)
        notice(
            f"{self.passage.address}: its files pass through {folder}, where each is deleted after it was read; a "
            f"process has at most {self.passage.largest:,} bytes there; set MSAE_STORES for another place"
        )
        with alone(lock), arriving(self.address, _AGAIN):  # one process downloads it, the others wait
            if not is_whole(place, entry):
                download(self.system, self.path, place, entry, self.address)

    @contextmanager
    def picture(self) -> Iterator[Path]:
        """A picture on this machine while the block runs.

        Raises:
            SourceError: With the bare reason: it is not there, or too large.
            StoreError: It does not arrive.
        """
        if (self.size or 0) > _MAX_PICTURE:
            raise SourceError(f"too large: {self.size:,} bytes")
        with TemporaryDirectory(prefix="msae-") as folder:
            place = Path(folder) / f"picture{self.suffix if self.suffix.lower() in IMAGE_SUFFIXES else ''}"
            with arriving(self.address, _AGAIN):
                try:
                    self._get(place)
                except FileNotFoundError:
                    raise SourceError("no such file") from None
                except TooLong:
                    if self.size is not None:
                        raise
                    raise SourceError(f"too large: more than {_MAX_PICTURE:,} bytes") from None
            yield place

    def read_bytes(self) -> bytes:
        """All of a small file."""
        with TemporaryDirectory(prefix="msae-") as folder, arriving(self.address, _AGAIN):
            self._get(Path(folder) / "file")
            return (Path(folder) / "file").read_bytes()

    def _get(self, place: Path) -> None:
        def get() -> None:
            self.system.get_file(self.path, str(place), callback=limited(self.size or _MAX_PICTURE, lambda _: None))
            if self.size is not None:
                check_size(place.stat().st_size, self.size)

        insist(get)

    def end(self, n: int) -> bytes:
        """The last `n` bytes, or all of fewer."""
        assert self.size is not None
        n = min(n, self.size)
        start = self.size - n

        def get() -> bytes:
            data = bytes(self.system.cat_file(self.path, start=start or None))
            if len(data) != self.size:  # a web server may send all of a file
                check_size(len(data), n)
            return data[len(data) - n :]

        with arriving(self.address, _AGAIN):
            return insist(get)


File = Path | FarFile
"""A file of a source."""


def here(file: File) -> AbstractContextManager[Path]:
    """A file of a source on this machine, while the block runs."""
    return nullcontext(file) if isinstance(file, Path) else file.held()


def fetched(image: File | bytes) -> AbstractContextManager[Path | bytes]:
    """A picture, or its bytes, on this machine while the block runs."""
    return image.picture() if isinstance(image, FarFile) else nullcontext(image)


def files_at(source: str, addresses: Sequence[str]) -> list[FarFile]:
    """The files at the addresses of one source.

    Raises:
        StoreError: One is not there, or cannot be reached.
    """
    passage = _Passage(source)

    def find(address: str) -> FarFile:
        system, path = connect(address)
        return _known(address, system, path, passage, _info(address, system, path))

    return list(map_ahead(find, addresses))


def files_below(address: str) -> dict[str, FarFile]:
    """The files in a folder elsewhere and in its subfolders, by their names there, without hidden ones.

    Raises:
        SourceError: There are none.
        StoreError: They cannot be listed.
    """
    system, root = connect(address)
    is_web = address.startswith(WEB)
    passage = _Passage(address)
    with arriving(f"the list of files of {address}", _CHECK):
        infos = _linked(system, root) if is_web else insist(lambda: system.find(root, detail=True))
    found = {name: path for path, info in infos.items() if info.get("type") == "file" and (name := _inside(path, root))}
    if not found:
        raise SourceError(
            f"{address} is no source: nothing is below it; wanted a folder of images, or an address that ends in .txt, "
            f".csv, .jsonl, .parquet or .tar"
        )

    def one(name: str) -> FarFile:
        path = found[name]
        own = f"{address}{path.removeprefix(root)}"
        return _known(own, system, path, passage, _info(own, system, path) if is_web else infos[path])

    names = sorted(found)
    return dict(zip(names, (map_ahead if is_web else map)(one, names), strict=True))


def far_picture(folder: Path | str, text: str) -> FarFile:
    """The picture that a row of a table names by its address, or by a path relative to the table's place elsewhere.

    Args:
        folder: Where the table lies.

    Raises:
        SourceError: It lies elsewhere than pictures are fetched from.
    """
    protocol, _, rest = text.partition("://")
    is_own = isinstance(folder, str) and text.startswith(server_of(folder))
    if text.lower().startswith(WEB) and not is_own:
        raise SourceError("on another web server than its table")  # a stranger's table would choose whom we ask
    if is_own or text.lower().startswith(STORAGE):
        address = f"{protocol.lower()}://{rest}"
    elif re.match(r"file:|[A-Za-z]:[/\\]|[/\\]|[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise SourceError("a path of another machine")
    else:
        protocol, _, place = str(folder).partition("://")
        name = text.replace("\\", "/")
        rest = normpath(f"{place}/{quote(name) if protocol.startswith('http') else name}")
        if rest.split("/")[0] != place.split("/")[0]:
            raise SourceError("a path that leads out of where its table lies")
        address = f"{protocol}://{rest}"
    return FarFile(address, *connect(address))


def server_of(address: str) -> str:
    """What the addresses of everything on the same server, or in the same bucket, begin with."""
    return "/".join(address.split("/")[:3]) + "/"


def map_ahead(f: Callable[[_A], _B], values: Iterable[_A]) -> Iterator[_B]:
    """`map`, with some calls ahead in threads: for requests that mostly wait."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        waiting: deque[Future[_B]] = deque()
        for value in values:
            waiting.append(pool.submit(f, value))
            if len(waiting) > 2 * _REQUESTS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _known(address: str, system: Any, path: str, passage: _Passage, info: Mapping[str, Any]) -> FarFile:
    if info.get("type") == "directory":
        raise SourceError(f"{address} is a folder, but is called like a file; rename it")
    size = size_of(address, path.rpartition("/")[2], info)
    file = FarFile(address, system, path, passage, size, json.dumps(state_of(info), default=str))
    if file.suffix.lower() not in IMAGE_SUFFIXES:
        passage.largest = max(passage.largest, size)
    return file


def _info(address: str, system: Any, path: str) -> Mapping[str, Any]:
    with arriving(address, _CHECK):
        return dict(insist(lambda: system.info(path)))


def _linked(system: Any, root: str) -> dict[str, Mapping[str, Any]]:
    """What a web server's list of a folder links to, with the lists below it; links out of it are not followed."""
    waiting, found = [root], {}
    while waiting:
        folder = waiting.pop()
        if folder.count("/") > root.count("/") + _DEEPEST:
            raise SourceError(f"{root} has folders in folders without end, such as {folder}; give a folder inside it")
        for info in insist(partial(system.ls, f"{folder}/", detail=True)):
            name = html.unescape(str(info["name"])).rstrip("/").removeprefix(f"{folder}/")
            path = f"{folder}/{name.removeprefix('./')}"  # Apache writes ./ before a name with a colon
            is_name = not re.search(r"[?#]|^[A-Za-z][A-Za-z0-9+.-]*:", name)
            if is_name and path not in found and _inside(path, root):
                found[path] = info
                waiting += [path] if info["type"] == "directory" else []
    return found


def _inside(path: str, root: str) -> str:
    """The name of a file in the folder `root`; empty for a hidden one and for what lies elsewhere."""
    name = _plain(path[len(root) + 1 :], root) if path.startswith(f"{root}/") else ""
    return "" if any(part.startswith(".") for part in name.split("/")) else name


def _plain(name: str, address: str) -> str:
    """A name of the web without escapes such as %20."""
    return unquote(name) if address.startswith(WEB) else name


def _can_lock(folder: Path) -> bool:
    """Whether one process can keep others from a file there; some shared file systems, and Windows, cannot."""
    try:
        with alone(folder / ".try.lock"), alone(folder / ".try.lock", wait=0.0):
            return False
    except OSError:  # BlockingIOError; or it cannot be written, which is said where something is to be downloaded
        return True
    finally:
        with suppress(OSError):  # it is in use
            folder.rmdir()


def _remove_unread(folder: Path) -> None:
    """Delete the files that passed and that no process reads; those that a killed process left too."""
    for stem in {file.name.lstrip(".").split(".")[0] for file in folder.glob("*")}:
        with suppress(OSError), alone(folder / f".{stem}.lock", wait=0.0):  # BlockingIOError: it is being read
            for file in (*folder.glob(f"{stem}*"), *folder.glob(f".{stem}*.tmp")):
                file.unlink()


def _leave(folder: Path) -> None:
    _remove_unread(folder)
    with suppress(OSError):  # others read there, or it was never made
        folder.rmdir()
