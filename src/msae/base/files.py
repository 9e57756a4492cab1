"""Atomic writes, JSON with a schema, whether files changed, and where caches may be written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from msae.base.errors import MsaeError

MADE_BY = "msae"


@contextmanager
def atomic_path(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends without an error.

    The file is flushed to disk before the rename, so a power cut leaves either the old or the new content.

    Args:
        keep: Leave a file that is there already as it is: of several processes the first one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files; ours are ordinary ones
        if not (keep and _link(temporary, path)):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give a file a second name, which stays where it is taken; false where the file system cannot."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def atomic_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends; `path` must not exist.

    Args:
        durable: Flush each file to disk before the rename; without it a power cut, but no kill, may empty files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if durable and file.is_file():
                _flush(file)
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(
    folder: Path, *, error: Callable[[str], MsaeError], shared: bool = False, wait: float = 0.0
) -> Iterator[None]:
    """Only this process writes into `folder` during the block; made if need be, and deleted again if it stays empty.

    There is no lock on Windows, nor on a file system that has none.

    Args:
        shared: Others may write at the same time, if they share it too; what is empty afterwards stays.
        wait: Seconds to wait for the lock.

    Raises:
        MsaeError: Made by `error`: another process has the lock, or `folder` cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(file, shared=shared, until=time.monotonic() + wait)
    except BlockingIOError:
        raise error(f"{folder} is being written by another process; wait for it, or give another --out") from None
    except OSError as err:
        raise error(f"{folder} cannot be written ({err.strerror}); give another --out") from err
    try:
        yield
    finally:
        if not shared:
            with suppress(OSError):
                file.unlink()
        os.close(handle)
        with suppress(OSError):  # not empty: something was made
            for path in made if not shared else ():
                path.rmdir()


@contextmanager
def alone(file: Path, *, shared: bool = False, wait: float = math.inf) -> Iterator[None]:
    """The block runs when no other process is in a block of the same `file`, which is made and deleted again.

    Args:
        shared: Others may be in theirs, if they share it too; then `file` stays.
        wait: Seconds to wait for the others.

    Raises:
        BlockingIOError: The others took longer.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(file, shared=shared, until=time.monotonic() + wait)
    try:
        yield
    finally:
        if not shared:
            with suppress(OSError):
                file.unlink()
        os.close(handle)


def _lock(file: Path, *, shared: bool, until: float) -> int:
    """A descriptor that holds the lock on `file`; BlockingIOError where another process holds it still."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        if sys.platform == "win32":
            return handle
        import fcntl

        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
            continue
        except OSError:
            return handle  # this file system has no locks
        # Whoever held the lock before may have deleted the file since it was opened: then it locks nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that a killed process left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any], *, schema_version: int, keep: bool = False) -> None:
    """Write `data` with its schema version atomically; floats that are not finite are refused.

    Args:
        keep: Leave a file that is there already as it is.
    """
    record = {"schema_version": schema_version, "made_by": MADE_BY, **data}
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path, keep=keep) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(
    path: Path, *, schema_version: int | tuple[int, ...], error: Callable[[str], MsaeError]
) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Args:
        schema_version: The one that can be read, or several, the newest last.

    Raises:
        MsaeError: Made by `error`: the file is missing, is not a JSON object, or has another schema version.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as err:
        raise error(f"{path} is not readable JSON ({err}); restore it or make it again") from err
    return parse_json(text, str(path), schema_version=schema_version, error=error)


def parse_json(
    text: bytes, path: str, *, schema_version: int | tuple[int, ...], error: Callable[[str], MsaeError]
) -> dict[str, Any]:
    """The object in the bytes of a file that `write_json` wrote; raises as `read_json` does."""
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as err:
        raise error(f"{path} is not readable JSON ({err}); restore it or make it again") from err
    if not isinstance(data, dict):
        raise error(f"{path} holds a JSON {type(data).__name__}, not an object; restore it or make it again")
    found = data.get("schema_version")
    readable = schema_version if isinstance(schema_version, tuple) else (schema_version,)
    if found not in readable:
        raise error(
            f"{path} has schema version {found!r}, this msae reads {readable[-1]}; make it again or update msae"
        )
    return data


def file_hash(path: Path) -> str:
    """BLAKE2b of a file's bytes with a 20-byte digest, in hex."""
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


class FileState(NamedTuple):
    """What changes when a file is written: two equal states mean the same content."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change."""

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The state of a file; raises `OSError` where there is none."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns)


SETTLED = 2.0
"""Seconds after which a file's time of change is trusted: within the clock's step a second write does not show."""


def remembered(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave before, as long as no file changed in size or time of change.

    Values are kept in the user's cache folder; where that cannot be written they are computed each time.

    Args:
        what: Tells this value from others of the same files.
        files: All that the value depends on.
    """
    paths = [str(file.resolve()) for file in files]
    before = _states(files)
    key = hashlib.blake2b(json.dumps([what, paths]).encode(), digest_size=12).hexdigest()
    place = user_cache() / "hashes" / f"{key}.json"
    known = {"what": what, "files": [[path, *state] for path, state in zip(paths, before, strict=True)]}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(place.read_text(encoding="utf-8"))
        if found["schema_version"] == 1 and all(found[name] == value for name, value in known.items()):
            return str(found["value"])
    value = compute()
    newest = max((state.mtime_ns for state in before), default=0) / 1e9
    if newest < time.time() - SETTLED and _states(files) == before:
        with contextlib.suppress(OSError):
            write_json(place, {**known, "value": value}, schema_version=1)
    return value


def _states(files: Sequence[Path]) -> list[FileState]:
    return [FileState.of(file) for file in files]


def user_cache() -> Path:
    """The folder of msae in the user's cache folder; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msae"


def cache_folders(place: Path) -> tuple[Path, Path]:
    """Where files that belong into the folder `place` may lie: there, or in the user's cache folder."""
    resolved = place.resolve()
    own = hashlib.blake2b(str(resolved).encode(), digest_size=12).hexdigest()
    return place, user_cache() / resolved.name.lstrip(".") / own


def writable_cache(place: Path) -> Path:
    """The first of `cache_folders(place)` that can be written, made where it is missing; `place` where none can."""
    own, spare = cache_folders(place)
    return own if is_writable(own) or not is_writable(spare) else spare


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in `folder`, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
