"""Where the files of a store lie: msae's own folder, clip-retrieval's, or a file of another tool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from msae.base.errors import MsaeError, StoreError, nearest_beside
from msae.base.files import read_json

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
Kind = Literal["store", "clip-retrieval", "npy", "npz", "parquet", "safetensors"]

FILE_SUFFIXES = (".npy", ".npz", ".parquet", ".safetensors")
FOLDERS: dict[Modality, str] = {"image": "img_emb", "text": "text_emb"}
PROTOCOLS = ("https", "http", "s3", "gs", "hf", "memory")
"""Kinds of address from which stores and sources are read, each a file system of fsspec."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.+)", re.DOTALL)
SCHEMA_VERSION = 1
"""Of store.json."""
PARTIAL = ".partial"
"""The folder inside a store in which `msae embed` works until the store is finished."""


class StoreFiles(NamedTuple):
    """The files of one store."""

    kind: Kind
    record: Mapping[str, Any]
    """What store.json says; empty for what msae did not make."""
    arrays: Mapping[str, Sequence[Path]]
    """Files of embeddings: by modality in a folder; one without a name elsewhere."""
    tables: Sequence[Path]
    """Files of metadata, each with the rows of one shard."""
    here: Callable[[Path], Path] = lambda path: path
    """Gives one of these files, after it was downloaded where the store is far away."""
    is_checked: bool = False
    """Whether every file of a far store is compared with its hash in store.json when it arrives."""

    @property
    def metadata(self) -> Sequence[Path]:
        """The files from which metadata are read: those of `tables` or, of a .npz alone, the arrays beside the rows."""
        return self.tables or (self.arrays[""] if self.kind == "npz" else ())


def files_of(path: Path) -> StoreFiles:
    """The files of the store at `path`.

    Raises:
        StoreError: Nothing is there, it is no store, embedding it was interrupted, or store.json is damaged.
    """
    if path.is_dir():
        kind: Kind = "store" if (path / "store.json").exists() else "clip-retrieval"
        if kind == "clip-retrieval":
            _check_is_clip_retrieval(path)
            record = {}
        else:
            record = read_json(path / "store.json", schema_version=SCHEMA_VERSION, error=StoreError)
        return StoreFiles(kind, record, shards_of(path), tables_of(path))
    if not path.is_file():
        raise StoreError(f"{path} does not exist{nearest_beside(path)}; msae embed makes a store")
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise StoreError(
            f"{path} has the unknown suffix {suffix!r}; wanted a store folder, .npy, .npz, .parquet or .safetensors"
        )
    if suffix == ".parquet":
        return StoreFiles("parquet", {}, {}, [path])
    beside = [file for ending in (".csv", ".parquet") if (file := path.with_suffix(ending)).is_file()]
    return StoreFiles(cast("Kind", suffix[1:]), {}, {"": [path]}, beside[:1])


def shards_of(path: Path) -> dict[str, list[Path]]:
    """The files of each modality in a folder of clip-retrieval's layout.

    Raises:
        StoreError: There are none.
    """
    files = {modality: _numbered(path / folder, ".npy") for modality, folder in FOLDERS.items()}
    if not any(files.values()):
        raise StoreError(f"{path} is an empty store: no .npy file in img_emb/ or text_emb/; embed again")
    return {modality: shards for modality, shards in files.items() if shards}


def tables_of(path: Path) -> list[Path]:
    """The files of metadata in a folder of clip-retrieval's layout."""
    return _numbered(path / "metadata", ".parquet")


def resume_command(path: Path) -> str:
    """The command that goes on with the interrupted embedding in the folder `path`."""
    try:
        command = json.loads((path / PARTIAL / "state.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"msae embed SOURCE --encoder ID --out {path}"
    return str(command)


def _check_is_clip_retrieval(path: Path) -> None:
    if (path / PARTIAL).is_dir():
        raise StoreError(f"{path} is unfinished: embedding was interrupted; to go on, type: {resume_command(path)}")
    if not any((path / folder).is_dir() for folder in FOLDERS.values()):
        is_run = (path / "sae.json").exists()
        hint = "it is a run: give the store to use it on" if is_run else "to make one, type: msae embed"
        raise StoreError(f"{path} is no store: neither img_emb/ nor text_emb/ is in it; {hint}")


def _numbered(folder: Path, suffix: str) -> list[Path]:
    """The files `NAME_NUMBER.suffix` of a folder in the order of their numbers, 10 after 9."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return [folder / name for name in in_order(names, folder.name, suffix)]


def in_order(names: Iterable[str], stem: str, suffix: str) -> list[str]:
    """Those of the names that are `STEM_NUMBER.suffix`, in the order of their numbers, 10 after 9."""
    pattern = re.compile(rf"{re.escape(stem)}_(\d{{1,18}}){re.escape(suffix)}", re.ASCII)
    found = {int(match[1]): name for name in names if (match := pattern.fullmatch(name))}
    return [found[number] for number in sorted(found)]


def far_address(store: str | Path, error: Callable[[str], MsaeError] = StoreError) -> str | None:
    """The address of a store or source that lies elsewhere, as `https://host/photos.store`; None for a path.

    Raises:
        MsaeError: Made by `error`: the address is of another kind, or holds a password or a query.
    """
    match = _ADDRESS.fullmatch(str(store))
    if match is None or (match[2] == "/" and (isinstance(store, str) or match[1].lower() not in PROTOCOLS)):
        return None  # a path; pathlib makes one slash of two
    protocol, rest = match[1].lower(), match[3].rstrip("/")
    if protocol not in PROTOCOLS:
        raise error(f"{store} is of the unknown kind {protocol}://; known: {', '.join(PROTOCOLS)}, or a path")
    host = rest.partition("/")[0]
    if "?" in rest or "#" in rest or ":" in host.rpartition("@")[0] or "::" in rest:
        raise error(
            f"an address is written into stores and runs, so it may hold no password, ?query or ::; "
            f"give the plain {protocol}:// address, and what it needs by the environment (docs/store-format.md)"
        )
    return f"{protocol}://{rest}"


def path_of(store: str | Path) -> Path:
    """A path on this machine, where something is written.

    Raises:
        StoreError: It is the address of a store elsewhere.
    """
    if far_address(store) is not None:
        raise StoreError(f"{store} is far away, and stores are only read there; give a folder here and copy it after")
    return Path(store)
