"""Samples of webdataset shards, read in memory: no member is ever written to disk or unpickled."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from msae.base.errors import MissingDependencyError, SourceError, first_line
from msae.base.files import atomic_path
from msae.data.images import SUFFIXES as IMAGE_SUFFIXES
from msae.data.sources.members import SUFFIXES, SourceItem, described
from msae.data.sources.remote import File, here

_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zlib.error)
"""What tarfile raises when it trips over damaged bytes."""
_BLOCK = 512  # bytes; a tar ends in blocks of zeros
_PIECE = 1 << 20


def expand(pattern: str) -> list[str]:
    """The paths or addresses that a pattern such as `shards/{000..012}.tar` stands for."""
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise MissingDependencyError.of("braceexpand", extra="sources") from None
    try:
        return list(braceexpand(pattern))
    except ValueError as err:
        raise SourceError(f"{pattern} is no pattern: {first_line(err)}; write one such as {{000..012}}.tar") from err


def count(file: File) -> int:
    """How many samples a shard gives: those that it holds, and the lines about what is wrong with it."""
    with here(file) as path:
        shard = _Shard(path, file.name)
        try:
            with tarfile.open(path) as tar:
                shard.read_headers(tar)
        except _DAMAGE as err:
            shard.add_damage(err)
    return len(shard.members) + len(shard.lines)


def samples(files: Sequence[File], start: int, counts: Counts) -> Iterator[SourceItem]:
    """The samples of the shards from the given position on; what is damaged is a sample that says so.

    Members of one key are one sample wherever in their shard they are. A key is the name without the ending,
    where that is known: `IMG_2024.05.01.jpg` and `IMG_2024.05.02.jpg` are two samples.

    Args:
        counts: No shard before the position whose samples are counted is opened; those that are read are counted.

    Raises:
        SourceError: A compressed shard is not sorted: it would be unpacked once for each of its members.
    """
    for number, file in enumerate(files):
        n = counts.get(number)
        if n is not None and start >= n:
            start -= n
            continue
        with here(file) as path:
            shard = _Shard(path, file.name)
            try:
                with tarfile.open(path) as tar:
                    shard.read_headers(tar)
                    # what a damaged compressed file gives depends on what was read of it before
                    n_unread = start if _is_plain(path) else 0
                    for position, key in enumerate(list(shard.members)[n_unread:], n_unread):
                        sample = shard.sample(tar, key)
                        if position >= start:
                            yield sample
            except _DAMAGE as err:
                shard.add_damage(err)
        counts.put(number, len(shard.members) + len(shard.lines))
        start = max(0, start - len(shard.members))
        yield from shard.lines[start:]
        start = max(0, start - len(shard.lines))


class Counts:
    """How many samples each shard has, by its number, as far as that is known."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._known: dict[int, int] = {}

    def keep_in(self, folder: Path) -> None:
        """Share them with other processes, those of earlier and later too."""
        self._folder = folder
        for number, n in self._known.items():
            self.put(number, n)

    def get(self, number: int) -> int | None:
        """How many samples a shard has."""
        file = self._file(number)
        if number not in self._known and file is not None and file.exists():
            self._known[number] = int(file.read_text())
        return self._known.get(number)

    def put(self, number: int, n: int) -> None:
        """Note how many samples a shard has."""
        self._known[number] = n
        file = self._file(number)
        if file is not None and not file.exists():
            with atomic_path(file) as temporary:
                temporary.write_text(str(n))

    def _file(self, number: int) -> Path | None:
        return None if self._folder is None else self._folder / f"shard_{number:08d}.txt"


@dataclass
class _Shard:
    """What a shard holds, by key in the order of their first members."""

    path: Path
    name: str
    """What a person calls it."""
    members: dict[str, dict[str, tarfile.TarInfo]] = field(default_factory=dict)
    lines: list[SourceItem] = field(default_factory=list)
    """What is to be said of it: members that are there twice or that are not read, and damage."""

    def read_headers(self, tar: tarfile.TarFile) -> None:
        """Find the members. What comes before damage is kept."""
        unknown: dict[str, str] = {}
        is_plain = _is_plain(self.path)
        try:
            while (member := tar.next()) is not None:
                name = PurePosixPath(member.name)
                if member.isdir() or name.name.startswith("."):
                    continue
                if is_plain and member.isreg() and member.offset_data + member.size > self.path.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                if name.suffix.lower() in SUFFIXES or not name.suffix:
                    self._add(name, member)
                else:
                    unknown.setdefault(str(name.with_suffix("")), name.suffix)
            if is_plain:
                self._check_end(tar.offset)
        except _DAMAGE as err:
            self.add_damage(err)
        for key, suffix in unknown.items():
            if key not in self.members and _first_part(key) not in self.members:
                self.lines.append(SourceItem(key, damage=f"not read: {suffix} is no image and no text"))
        offsets = [member.offset for files in self.members.values() for member in files.values()]
        if not is_plain and offsets != sorted(offsets):
            raise SourceError(
                f"{self.path} is compressed and its members are not in the order of their names; "
                f"unpack it into a folder and give that, or make it again with: tar --sort=name -cf"
            )

    def _add(self, name: PurePosixPath, member: tarfile.TarInfo) -> None:
        suffix = name.suffix.lower()
        key = str(name.with_suffix("")) if suffix else str(name)
        files = self.members.setdefault(key, {})
        if suffix in IMAGE_SUFFIXES and any(o in IMAGE_SUFFIXES and m.name != member.name for o, m in files.items()):
            key = str(name)  # a.jpg and a.png are two samples
            files = self.members.setdefault(key, {})
        if suffix in files:
            self.lines.append(SourceItem(key, damage=f"the member {name} is there twice; the later one is read"))
        files[suffix] = member

    def _check_end(self, offset: int) -> None:
        """tarfile takes a cut between two members, a damaged header, and where two tars meet for the end."""
        with self.path.open("rb") as file:
            file.seek(offset)
            piece = file.read(_PIECE)
            if len(piece) < _BLOCK:
                raise tarfile.ReadError("it has no end-of-archive mark")
            while piece:
                if any(piece):
                    raise tarfile.ReadError(f"what follows byte {offset:,} cannot be read as members")
                piece = file.read(_PIECE)

    def add_damage(self, err: BaseException) -> None:
        """Say what is wrong with the shard."""
        self.lines.append(
            SourceItem(self.name, damage=f"damaged shard: {first_line(err)}; the samples after this point are lost")
        )

    def sample(self, tar: tarfile.TarFile, key: str) -> SourceItem:
        """The sample of a key."""
        files = {}
        try:
            for suffix, member in self.members[key].items():
                content = tar.extractfile(member)
                if content is None:
                    return SourceItem(key, damage=f"the member {member.name} is no ordinary file")
                files[suffix] = content.read()
        except _DAMAGE as err:
            return SourceItem(key, damage=f"damaged member: {first_line(err)}")
        image = next((files[suffix] for suffix in files if suffix in IMAGE_SUFFIXES or not suffix), None)
        return described(SourceItem(key, image), files)


def _first_part(key: str) -> str:
    """What webdataset calls the key: all up to the first dot of the name."""
    path = PurePosixPath(key)
    return str(path.with_name(path.name.split(".")[0] or path.name))


def _is_plain(path: Path) -> bool:
    """Whether a tar is not compressed."""
    with path.open("rb") as file:
        return file.read(_BLOCK)[257:262] == b"ustar"
