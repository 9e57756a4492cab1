"""Rows of numbers in files, memory-mapped: `.npy` and `.safetensors`, and many files read as one array."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

from msae.base.errors import MsaeError, first_line
from msae.base.files import remembered
from msae.base.progress import progress

_DIGEST = 20  # bytes of a fingerprint; the one of before, of 256 rows, had 16
_HASH_BYTES = 1 << 24  # read at once to be hashed

_SAFETENSORS_DTYPES = {
    "F16": ("float16", "<f2"),
    "F32": ("float32", "<f4"),
    "F64": ("float64", "<f8"),
    "BF16": ("bfloat16", "<u2"),
    "U8": ("uint8", "|u1"),
}
NPY_ERRORS = (OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, OverflowError, tokenize.TokenError)
"""What numpy raises on a damaged header, which it reads as a piece of Python."""
_NPZ_ERRORS = (*NPY_ERRORS, zipfile.BadZipFile, zlib.error, RuntimeError)
"""What numpy and zipfile raise on damaged, encrypted and pickled archives, and on ways of packing that it lacks."""
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format

Error = Callable[[str], MsaeError]
Refuse = Callable[[int], MsaeError]
ModalityT = TypeVar("ModalityT", bound=str)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one file, read as float32 on demand."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], NDArray[Any]] = field(repr=False)
    """What `values` are, called once."""

    @classmethod
    def of(cls, path: Path, values: NDArray[Any], dtype: str) -> Rows:
        return cls(path, tuple(values.shape), dtype, lambda: values)

    @cached_property
    def values(self) -> NDArray[Any]:
        """Usually a memory map; bfloat16 is held as its 16 bits."""
        return self.load()

    def floats(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """The chosen rows as float32: a number that float32 cannot hold becomes infinite."""
        chosen = self.values[rows]
        if self.dtype == "bfloat16":  # the upper half of a float32
            return (np.asarray(chosen, dtype=np.uint32) << np.uint32(16)).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.array(chosen, dtype=np.float32, order="C")

    def raw(self, rows: slice) -> memoryview:
        """The chosen rows as they are stored, little-endian and row after row."""
        chosen = np.ascontiguousarray(self.values[rows])
        return chosen.astype(chosen.dtype.newbyteorder("<"), copy=False).data


@dataclass(frozen=True, eq=False)
class ShardedRows:
    """The rows of several files as one array."""

    shards: tuple[Rows, ...]

    @cached_property
    def offsets(self) -> list[int]:
        """Number of the first row of each shard, then the number of all rows."""
        return [0, *np.cumsum([shard.shape[0] for shard in self.shards]).tolist()]

    @property
    def d_in(self) -> int:
        return self.shards[0].shape[1]

    @property
    def dtype(self) -> str:
        return self.shards[0].dtype

    @property
    def n_bytes(self) -> int:
        """Size as it is stored."""
        itemsize = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return len(self) * self.d_in * itemsize

    def __len__(self) -> int:
        return self.offsets[-1]

    def take(self, rows: Int64[np.ndarray, " n"], refuse: Refuse) -> Float32[np.ndarray, "n d_in"]:
        """The given rows in the given order, with one sorted read of each shard touched.

        Raises:
            MsaeError: Made by `refuse` of the number of the first row that holds a NaN or an infinity.
        """
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        out = np.empty((len(rows), self.d_in), dtype=np.float32)
        cuts = np.searchsorted(ascending, self.offsets)
        for number, shard in enumerate(self.shards):
            first, last = cuts[number], cuts[number + 1]
            if first < last:
                out[order[first:last]] = shard.floats(ascending[first:last] - self.offsets[number])
        bad = first_bad_row(out)
        if bad is not None:
            raise refuse(int(rows[bad]))
        return out

    def between(self, start: int, stop: int, refuse: Refuse) -> Float32[np.ndarray, "n d_in"]:
        """The rows from `start` up to `stop`, read contiguously; raises as `take` does."""
        begin, stop = start, min(stop, len(self))
        pieces = []
        number = bisect.bisect_right(self.offsets, start) - 1
        while start < stop:
            first, last = self.offsets[number], min(stop, self.offsets[number + 1])
            pieces.append(self.shards[number].floats(slice(start - first, last - first)))
            start, number = last, number + 1
        x = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        bad = first_bad_row(x)
        if bad is not None:
            raise refuse(begin + bad)
        return x


def first_bad_row(x: Float32[np.ndarray, "n d_in"]) -> int | None:
    """Position of the first row that holds a NaN or an infinity, if any."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(x.sum()):  # one pass without a temporary; a sum that overflows is looked at closely
            return None
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    return int(bad[0]) if len(bad) else None


def zero_rows(x: Float32[np.ndarray, "n d_in"]) -> Int64[np.ndarray, " m"]:
    """Positions of the rows that are all zeros."""
    candidates = np.flatnonzero(x[:, 0] == 0)
    return candidates[~x[candidates].any(axis=1)]


def unit_rows(x: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Rows of length 1; a row of zeros stays zero."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.maximum(norms, np.finfo(np.float32).tiny), dtype=np.float32)


def fingerprint(rows: Mapping[ModalityT, ShardedRows]) -> str:
    """A hash of all rows, the same however they are cut into files; defined in docs/store-format.md.

    It is computed once and remembered until a file changes its size or its time of change.
    """
    files = list(dict.fromkeys(shard.path for modality in sorted(rows) for shard in rows[modality].shards))
    what = "rows " + "".join(_header(modality, rows[modality]) for modality in sorted(rows))
    return remembered(what, files, lambda: _hash_rows(rows))


def is_sampled_fingerprint(fingerprint: str) -> bool:
    """Whether it was made before msae 0.2, of 256 rows only; it says nothing about the others."""
    return len(fingerprint) < 2 * _DIGEST


def hash_files(files: Sequence[Path]) -> str:
    """A hash of the bytes of files in this order, remembered like a fingerprint."""
    return remembered("bytes", files, lambda: _hash_files(files))


def _hash_rows(rows: Mapping[ModalityT, ShardedRows]) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    with progress("hashing the rows", total=sum(map(len, rows.values())), unit="rows") as advance:
        for modality in sorted(rows):
            digest.update(_header(modality, rows[modality]).encode())
            for shard in rows[modality].shards:
                n, width = shard.shape
                step = max(1, _HASH_BYTES // (width * shard.values.itemsize))
                for first in range(0, n, step):
                    digest.update(shard.raw(slice(first, first + step)))
                    advance(min(step, n - first))
    return digest.hexdigest()


def _header(modality: str, array: ShardedRows) -> str:
    return f"{modality}:{len(array)}:{array.d_in}:{array.dtype};"


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for file in files:
        digest.update(f"{file.stat().st_size};".encode())
        with file.open("rb") as source:
            while block := source.read(_HASH_BYTES):
                digest.update(block)
    return digest.hexdigest()


def open_npy(path: Path, error: Error) -> Rows:
    """The two-dimensional float array of a `.npy` file, memory-mapped; nothing is unpickled.

    Raises:
        MsaeError: Of the kind made by `error`: no header, truncated, another dtype or number of dimensions.
    """
    try:
        with path.open("rb") as file:
            _, dtype = read_npy_header(file, path, path.stat().st_size, error)
    except OSError as err:
        raise error(f"{path} cannot be read as .npy ({first_line(err)}); make it again") from err
    return Rows.of(path, np.load(path, mmap_mode="r", allow_pickle=False), dtype.newbyteorder("=").name)


def read_npy_header(file: BinaryIO, path: Path, size: int, error: Error) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype that the header of a `.npy` file of `size` bytes promises; raises as `open_npy` does."""
    try:
        _check_npy_magic(path, file.read(8), error)
        file.seek(0)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        start = file.tell()
    except NPY_ERRORS as err:
        raise error(f"{path} cannot be read as .npy ({first_line(err)}); make it again") from err
    if dtype.kind != "f" or dtype.itemsize > 8:
        reason = "object: pickled, never opened" if dtype.hasobject else str(dtype)
        raise error(f"{path} holds {reason}; wanted float16, float32 or float64: save it with .astype('float16')")
    if len(shape) != 2:
        raise error(f"{path} holds an array of shape {shape}; wanted two dimensions: (rows, d_in)")
    wanted = start + math.prod(shape) * dtype.itemsize
    if size < wanted:
        raise error(f"{path} is truncated: {size:,} bytes where its header promises {wanted:,}; make it again")
    if 0 in shape:
        raise error(f"{path} is empty: an array of shape {shape}; wanted at least one row")
    return shape, dtype


def open_npz(path: Path, error: Error) -> dict[str, NDArray[Any]]:
    """The arrays of a `.npz` file, in memory; nothing is unpickled.

    Raises:
        MsaeError: Of the kind made by `error`: it is no archive, or an array in it is damaged or pickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # numpy.load would also take a pickle or a single array for one
            n_bytes = sum(entry.file_size for entry in archive.infolist())
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except MemoryError as err:
        raise error(f"{path} holds {n_bytes:,} bytes, more than fit in memory; save its arrays as .npy") from err
    except _NPZ_ERRORS as err:
        raise error(f"{path} cannot be read as .npz ({first_line(err)}); save it again with numpy.savez") from err
    return {name: array for name, array in found.items() if isinstance(array, np.ndarray)}


def open_safetensors(path: Path, error: Error) -> tuple[dict[str, Rows], dict[str, str]]:
    """The float tensors of a `.safetensors` file, memory-mapped, and the strings of its header.

    Raises:
        MsaeError: Of the kind made by `error`: the header is damaged or the file is truncated.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise error(
                    f"{path} is truncated or no safetensors file: its {size:,} bytes hold no whole header; "
                    f"make it again"
                )
            header = json.loads(file.read(length))
        strings = header.pop("__metadata__", {})
        rows = {}
        for name, entry in header.items():
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                continue
            dtype, stored = _SAFETENSORS_DTYPES[entry["dtype"]]
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            n_bytes = math.prod(shape) * np.dtype(stored).itemsize
            if not 0 <= first <= last or last - first != n_bytes:
                raise error(f"{path} is damaged: tensor {name!r} has offsets that do not fit its shape; make it again")
            if 8 + length + last > size:
                raise error(f"{path} is truncated: tensor {name!r} ends beyond the file; copy or make it again")
            values: NDArray[Any] = np.empty(shape, stored)
            if n_bytes:
                values = np.memmap(path, dtype=stored, mode="r", offset=8 + length + first, shape=shape)
            rows[name] = Rows.of(path, values, dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise error(f"{path} is no readable safetensors file ({first_line(err)}); make it again") from err
    return rows, strings


def open_arrays(files: Mapping[str, Sequence[Path]], error: Error) -> dict[str, ShardedRows]:
    """The arrays in files: several `.npy` of one name are one array; a `.npz` or `.safetensors` names its own.

    Raises:
        MsaeError: Of the kind made by `error`: what `open_npy`, `open_npz` and `open_safetensors` raise, or the widths
            or dtypes of one array's files differ.
    """
    found: dict[str, ShardedRows] = {}
    for name, paths in files.items():
        path = paths[0]
        match path.suffix.lower():
            case ".npz":
                arrays = open_npz(path, error)
                found |= {own: ShardedRows((Rows.of(path, x, x.dtype.name),)) for own, x in arrays.items()}
            case ".safetensors":
                found |= {own: ShardedRows((x,)) for own, x in open_safetensors(path, error)[0].items()}
            case _:
                found[name] = one_array([open_npy(shard, error) for shard in paths], error)
    return found


def one_array(shards: Sequence[Rows], error: Error) -> ShardedRows:
    """Several files as one array; raises as `open_arrays` does."""
    first = shards[0]
    for shard in shards[1:]:
        if shard.shape[1] != first.shape[1] or shard.dtype != first.dtype:
            raise error(
                f"{shard.path} is {shard.shape[1]} wide ({shard.dtype}) but {first.path.name} is "
                f"{first.shape[1]} wide ({first.dtype}); wanted shards of one encoder: embed again"
            )
    return ShardedRows(tuple(shards))


def _check_npy_magic(path: Path, head: bytes, error: Error) -> None:
    if head[:6] == b"\x93NUMPY":
        return
    if not head:
        raise error(f"{path} is empty (0 bytes); copy or make it again")
    if head[:1] == b"\x80" or head[:2] == b"PK":
        kind = "a zip archive, as numpy.savez and torch.save make" if head[:2] == b"PK" else "a Python pickle"
        raise error(f"{path} is {kind}, and no .npy file; save it with numpy.save, or name an archive .npz")
    shape = _shape_in_name(path)
    raise error(
        f"{path} has no NumPy header; if it is raw float32 like the paper's released files, give it one: "
        f"numpy.save('new.npy', numpy.memmap('{path.name}', 'float32', 'r').reshape({shape}))"
    )


def _shape_in_name(path: Path) -> str:
    """`rows, width` where the name ends in two numbers that fit the file as float32, else a placeholder."""
    numbers = re.search(r"_(\d+)_(\d+)$", path.stem)
    if numbers and int(numbers[1]) * int(numbers[2]) * 4 == path.stat().st_size:
        return f"{numbers[1]}, {numbers[2]}"
    return "-1, D_IN"
