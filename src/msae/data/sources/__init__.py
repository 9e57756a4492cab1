"""What there is to embed: images and captions with ids, read one after another from many kinds of places."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from msae.base.errors import MissingDependencyError, SourceError, first_line, nearest, nearest_beside
from msae.data.images import SUFFIXES as IMAGE_SUFFIXES
from msae.data.layout import far_address
from msae.data.sources import members, tars
from msae.data.sources.members import SourceItem, described, texts_of
from msae.data.sources.remote import (
    STORAGE,
    WEB,
    FarFile,
    File,
    far_picture,
    files_at,
    files_below,
    here,
    map_ahead,
    server_of,
)
from msae.data.tables import (
    CAPTION_COLUMNS,
    IMAGE_PATH_COLUMNS,
    TABLE_SUFFIXES,
    common_schema,
    conform,
    plain_key,
    read_footer,
    read_table,
    records_of,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_PIECE = 256  # rows of a table that are turned into Python objects at a time
_END = 1 << 16  # bytes that hold the footer of most .parquet files
_ENDS = 1 << 20  # bytes of each end of a file that tell whether it has changed
_SAMPLED = 1000  # samples of tars and folders that are looked at to see whether there are captions
_ID_COLUMNS = ("id", "key")
_PICTURE_COLUMNS = ("jpg", "jpeg", "png", "webp", "img", "image_bytes")
"""Columns of whole pictures, as img2dataset and others name them."""
_PATHS = (*IMAGE_PATH_COLUMNS, "file_name", "filename", "filepath", "file_path", "img_path", "image_file", "img")
"""`file_name` is Hugging Face's, `filepath` open_clip's."""
_CAPTIONS = (*CAPTION_COLUMNS, "captions", "title")
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A sequence of samples that is the same each time it is read.

    Samples made in memory are a source too: `Source("scenes", True, True, "seed 0", items)`.
    """

    name: str
    has_images: bool
    has_captions: bool
    signature: str
    """Changes when the samples or their order do."""
    items: Callable[[int], Iterator[SourceItem]]
    """The samples from the given position on."""
    total: int | None = None
    """Number of samples, where it is known beforehand."""
    schema: pa.Schema | None = None
    """Types of the other columns, where they are known beforehand."""
    notes: tuple[str, ...] = ()
    """What a person should know of how it is read: what is left out, what was taken for what."""
    is_reopenable: bool = False
    """Whether `open_source(name)` gives it again."""
    shards: tuple[File, ...] = ()
    """Files whose samples are not counted yet; see `counted`."""
    counts: tars.Counts = field(default_factory=tars.Counts)
    """Those of the shards that were read; a shard before the asked position is then not opened again."""


def open_source(source: str | Path) -> Source:
    """The source at a path: nothing but names is read yet.

    Args:
        source: A folder of images, with those of its subfolders, which are their labels, and with captions in
            .txt or .json files of the same names; a .txt of captions, one a line; a table (.csv, .tsv, .jsonl,
            .json or .parquet) of pictures or their paths (relative to its folder), captions, or both; a folder of
            .parquet files; a .tar of webdataset, a folder of them or a pattern such as `shards/{000..012}.tar`;
            any of these at an address such as `s3://bucket/photos` or `https://…`; or a dataset of Hugging Face as
            `hf://owner/name?split=train&config=NAME&streaming=1&image=COLUMN&caption=COLUMN`, or the folder that
            its `save_to_disk` wrote. docs/store-format.md says what is read of each.

    Raises:
        SourceError: There is nothing there, it is empty, or it has neither images nor captions.
    """
    return replace(_open(source), is_reopenable=True)


def _open(source: str | Path) -> Source:
    text = str(source)
    if text.startswith("hf:/"):
        return _hugging_face(text)
    address = far_address(source, SourceError)
    if "{" in text and text.endswith(_TAR_SUFFIXES):
        names = tars.expand(address or text)
        return _tars(address or text, files_at(address, names) if address else [Path(name) for name in names])
    path = Path(source)
    if address is not None:
        return _file(files_at(address, [address])[0]) if _is_file_name(path.name) else _far_folder(address)
    if path.is_dir():
        return _saved_dataset(path) if _is_saved_dataset(path) else _folder(path, *_walk(path), path.__truediv__)
    if not path.is_file():
        raise SourceError(f"{path} does not exist{nearest_beside(path)}")
    return _file(path)


def _is_file_name(name: str) -> bool:
    """Whether a name elsewhere is one of a file, by its ending."""
    return name.lower().endswith((".txt", *TABLE_SUFFIXES, *_TAR_SUFFIXES, *IMAGE_SUFFIXES))


def _file(path: File) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _captions(path)
    if suffix == ".parquet":
        return _parquet(str(path), [path], path.parent)
    if suffix in TABLE_SUFFIXES:
        return _table(path)
    if path.name.lower().endswith(_TAR_SUFFIXES):
        return _tars(str(path), [path])
    hint = "; give the folder that it is in" if suffix in IMAGE_SUFFIXES else ""
    raise SourceError(
        f"{path} is no source{hint}; wanted a folder of images, .txt, .csv, .jsonl, .parquet, .tar or hf://"
    )


def _far_folder(address: str) -> Source:
    files = files_below(address)
    if {"state.json", "dataset_dict.json"} & files.keys():
        raise SourceError(f"{address} was written by save_to_disk, which is read on this machine only; copy it here")
    return _folder(address, list(files), [], files.__getitem__)


def _folder(path: Path | str, names: list[str], notes: list[str], file: Callable[[str], File]) -> Source:
    """Every file below a folder in the order of their paths, without hidden ones; or its shards, if it has only those.

    Files beside a picture with its name, such as .txt and .json, describe it. What is no picture is a sample with
    the reason.
    """
    pictures = {name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES}
    shards = [name for name in names if name.lower().endswith(_TAR_SUFFIXES)]
    if shards and not pictures:
        others = [name for name in names if name not in shards]
        if others:
            notes.append(f"not read beside the shards: {_some(others)}")
        return _tars(str(path), [file(name) for name in shards], notes)
    keys = {str(PurePosixPath(name).with_suffix("")) for name in pictures} | pictures
    beside: dict[str, dict[str, str]] = {}
    samples = []
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        key = str(PurePosixPath(name).with_suffix("")) if suffix else name
        if suffix in members.SUFFIXES and name not in pictures and key in keys:
            beside.setdefault(key, {})[suffix] = name
        else:
            samples.append(name)
    if not any(_could_be_picture(name) for name in samples):
        tables = [name for name in names if PurePosixPath(name).suffix.lower() in TABLE_SUFFIXES]
        shards = [name for name in tables if name.lower().endswith(".parquet")]
        if shards:  # as img2dataset and `datasets` write them
            others = [name for name in names if name not in shards]
            if others:
                notes.append(f"not read beside the .parquet files: {_some(others)}")
            return _parquet(str(path), [file(name) for name in shards], path, notes)
        if tables:
            raise SourceError(f"{path} has no images in it but {_some(tables)}; give one such file, not its folder")
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(f"{path} has no images in it; wanted files ending in one of {kinds}")
    labels = _labels(pictures)
    if labels:
        notes.append(f"column label: the folder of each picture, {len(set(labels.values()))} of them")

    def sample(name: str) -> SourceItem:
        if not _could_be_picture(name):
            return SourceItem(name, damage=_why_not_picture(name))
        of_name = {**beside.get(str(PurePosixPath(name).with_suffix("")), {}), **beside.get(name, {})}
        found = described(
            SourceItem(name, file(name)), {suffix: file(other).read_bytes() for suffix, other in of_name.items()}
        )
        if name in labels and "label" not in found.columns:
            found = replace(found, columns={**found.columns, "label": labels[name]})
        return found

    def safe(name: str) -> SourceItem:
        try:
            return sample(name)
        except OSError as err:
            return SourceItem(name, damage=f"unreadable: {err.strerror or err}")

    def items(start: int) -> Iterator[SourceItem]:
        return (map if isinstance(path, Path) or not beside else map_ahead)(safe, samples[start:])

    has_captions = bool(beside) and _has_captions(items(0), notes)
    signature = _digest(f"{name}:{_state(file(name))}" for name in names)

    return Source(str(path), True, has_captions, signature, items, len(samples), notes=tuple(notes))


def _walk(path: Path) -> tuple[list[str], list[str]]:
    """The files below a folder, and notes. Links to folders are followed once all others are read, none twice."""
    names: list[str] = []
    notes: list[str] = []
    seen: set[str] = set()
    waiting = [str(path)]
    while waiting:
        top = waiting.pop(0)
        if os.path.realpath(top) in seen:
            notes.append(f"the link {os.path.relpath(top, path)} leads to a folder that is read already")
            continue
        for folder, subfolders, files in os.walk(top, onerror=_refuse):
            seen.add(os.path.realpath(folder))
            inside = sorted(name for name in subfolders if not name.startswith("."))
            links = [name for name in inside if (Path(folder) / name).is_symlink()]
            waiting += [str(Path(folder) / name) for name in links]
            subfolders[:] = [
                name for name in inside if name not in links and os.path.realpath(Path(folder) / name) not in seen
            ]
            names += [(Path(folder) / name).relative_to(path).as_posix() for name in files if not name.startswith(".")]
    return sorted(names), notes


def _labels(pictures: Iterable[str]) -> dict[str, str]:
    """The name of each picture's folder, where there are several and they are not numbered shards of a download."""
    folders = {name: PurePosixPath(name).parent.name for name in pictures}
    labels = {name: folder for name, folder in folders.items() if folder}
    distinct = set(labels.values())
    return labels if len(distinct) > 1 and not all(re.fullmatch(r"\d{5,}", name) for name in distinct) else {}


def _could_be_picture(name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    return suffix not in (*TABLE_SUFFIXES, *members.TEXTS, *members.LABELS) and not name.lower().endswith(_TAR_SUFFIXES)


def _why_not_picture(name: str) -> str:
    if name.lower().endswith(_TAR_SUFFIXES):
        return "an archive, not an image; give it as a source of its own"
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in TABLE_SUFFIXES and suffix != ".json":
        return "a table, not an image; to embed its rows, give it as the source"
    return f"no image has the name of this {suffix} file"


def _state(path: File) -> str:
    """What changes when a file is replaced."""
    if isinstance(path, FarFile):
        return path.state
    try:
        state = path.stat()
    except OSError:
        return ""
    return f"{state.st_size}:{state.st_mtime_ns}"


def _has_captions(samples: Iterable[SourceItem], notes: list[str]) -> bool:
    """Whether captions are embedded: where at least half of the images have one. A note says what else happens."""
    looked_at = [sample for sample in itertools.islice(samples, _SAMPLED) if sample.damage is None]
    n_images = sum(sample.image is not None for sample in looked_at)
    n_captions = sum(sample.caption is not None for sample in looked_at)
    n_both = sum(sample.caption is not None and sample.image is not None for sample in looked_at)
    n_more = sum("captions" in sample.columns for sample in looked_at)
    if n_more:
        notes.append("several captions an image: the first is embedded, all are in the column captions")
    if n_captions and n_images > 2 * n_both:
        notes.append(
            f"only {n_both:,} of the first {n_images:,} images have a caption: captions are a column, not embedded"
        )
        return False
    if n_captions and n_images > n_both:
        notes.append(f"{n_images - n_both:,} of the first {n_images:,} images have no caption; such are skipped")
    return n_captions > 0


def _captions(path: File) -> Source:
    """The lines of a text file; the id of a caption is the number of its line, from 0."""
    try:
        with here(path) as file:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as err:
        raise SourceError(f"{path} is not UTF-8 (byte {err.start}); save it as UTF-8") from err
    except OSError as err:
        raise SourceError(f"{path} cannot be read ({err.strerror})") from err
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise SourceError(f"{path} is empty; wanted one caption a line")

    def items(start: int) -> Iterator[SourceItem]:
        for number, line in enumerate(lines[start:], start):
            yield SourceItem(str(number), caption=line.rstrip("\r"))

    return Source(str(path), False, True, _digest(lines), items, total=len(lines))


def _table(path: File) -> Source:
    """The rows of a .csv or .jsonl file, which is held in memory."""
    notes: list[str] = []
    with here(path) as file:
        table = read_table(file, SourceError, notes)
        notes = [note.replace(str(file), str(path)) for note in notes]
    if table.num_rows == 0:
        raise SourceError(f"{path} has no rows")

    def pieces(start: int) -> Iterator[pa.Table]:
        for first in range(start, table.num_rows, _PIECE):
            yield table.slice(first, _PIECE)

    columns = _Columns.of(table.schema, str(path), notes, head=table.slice(0, _PIECE), folder=path.parent)
    signature = _signature_with_pictures([path], path.parent, columns, pieces)
    return _rows(str(path), columns, pieces, path.parent, signature, table.num_rows, notes)


def _parquet(name: str, paths: Sequence[File], folder: Path | str, notes: Sequence[str] = ()) -> Source:
    """The rows of .parquet files, one file after another, each read a row group at a time.

    Args:
        folder: Paths of pictures are relative to it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    footers = list(map_ahead(_footer, paths))
    written = [footer.schema.to_arrow_schema() for footer in footers]
    for path, own in zip(paths, written, strict=True):
        if len(set(own.names)) != len(own):
            raise SourceError(f"{path} has two columns of one name among {_list(own)}; rename one")
    schema = common_schema(written)
    total = sum(footer.num_rows for footer in footers)
    if total == 0:
        raise SourceError(f"{name} has no rows")

    def pieces(start: int) -> Iterator[pa.Table]:
        for path, footer in zip(paths, footers, strict=True):
            if start < footer.num_rows:
                yield from rows_of(path, footer, start)
            start = max(0, start - footer.num_rows)

    def rows_of(path: File, footer: pq.FileMetaData, start: int) -> Iterator[pa.Table]:
        group = 0
        while start >= footer.row_group(group).num_rows:
            start -= footer.row_group(group).num_rows
            group += 1
        groups = range(group, footer.num_row_groups)
        try:
            with here(path) as file:
                for batch in pq.ParquetFile(file).iter_batches(_PIECE, row_groups=groups):
                    if start < batch.num_rows:
                        piece = pa.Table.from_batches([batch.slice(start)])
                        yield piece if len(paths) == 1 else conform(piece, schema)
                    start = max(0, start - batch.num_rows)
        except (pa.ArrowException, OSError) as err:
            raise SourceError(f"{path} is damaged ({first_line(err)}); copy or make it again") from err

    said = list(notes)
    columns = _Columns.of(schema, name, said, head=next(pieces(0), None), folder=folder)
    signature = _signature_with_pictures(paths, folder, columns, pieces)
    return _rows(name, columns, pieces, folder, signature, total, said)


def _footer(path: File) -> pq.FileMetaData:
    if isinstance(path, Path):
        return read_footer(path, SourceError)
    end = path.end(_END)
    n = int.from_bytes(end[-8:-4], "little") + 8  # bytes of the footer, as its end says
    return read_footer(path, SourceError, io.BytesIO(end if n <= len(end) else path.end(n)))


def _hugging_face(url: str) -> Source:
    """A dataset of the `datasets` library, by its name on the hub or saved on disk."""
    from urllib.parse import parse_qsl, urlsplit

    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    known = ("split", "config", "revision", "streaming", "image", "caption")
    for option in options:
        if option not in known:
            raise SourceError(
                f"{url} has the unknown option {option!r}{nearest(option, known)}; known: {', '.join(known)}"
            )
    return _of_dataset(url, _load_dataset(url, parts.netloc + parts.path, options), options)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _saved_dataset(path: Path) -> Source:
    """A folder that `save_to_disk` of the `datasets` library wrote."""
    url = f"hf://{path.absolute()}"
    return replace(_of_dataset(url, _load_dataset(url, str(path), {}), {}), name=str(path))


def _of_dataset(url: str, dataset: Any, options: Mapping[str, str]) -> Source:
    features = dataset.features
    if features is None:
        raise SourceError(f"{url} does not say what its columns are; load it without streaming")
    is_streamed = not hasattr(dataset, "__len__")
    total = None if is_streamed else len(dataset)
    if total == 0:
        raise SourceError(f"{url} has no rows")
    tables = dataset.with_format("arrow")
    notes: list[str] = []
    head = None if is_streamed else tables[:_PIECE]
    columns = _Columns.of(
        features.arrow_schema, url, notes, image=options.get("image"), caption=options.get("caption"), head=head
    )
    names = {name: kind.names for name, kind in features.items() if type(kind).__name__ == "ClassLabel"}

    def pieces(start: int) -> Iterator[pa.Table]:
        if is_streamed:
            yield from tables.skip(start).iter(_PIECE)
        else:
            for first in range(start, len(dataset), _PIECE):
                yield tables[first : first + _PIECE]

    signature = _digest([url, str(total), "" if is_streamed else str(dataset._fingerprint)])
    return _rows(url, columns, pieces, Path(), signature, total, notes, names)


def _load_dataset(url: str, name: str, options: Mapping[str, str]) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError.of("datasets", extra="sources") from None

    path = Path(name)
    streaming = options.get("streaming", "").lower() in ("1", "true", "yes")
    try:
        if _is_saved_dataset(path):
            dataset = datasets.load_from_disk(name)
        elif path.is_absolute() and not path.exists():
            raise SourceError(f"{path} does not exist; wanted a dataset saved on disk")
        else:
            dataset = datasets.load_dataset(
                name,
                options.get("config"),
                split=options.get("split"),
                revision=options.get("revision"),
                streaming=streaming,
            )
    except SourceError:
        raise
    except Exception as err:  # the library raises almost anything for what it cannot find or reach
        raise SourceError(f"{url} cannot be loaded ({first_line(err)}); check its name and the network") from err
    if isinstance(dataset, dict):
        splits = list(dataset)
        split = options.get("split", splits[0] if len(splits) == 1 else "")
        if split not in splits:
            start = url if url.startswith("hf:") else f"hf://{url}"
            asked = f"{start}{'&' if '?' in start else '?'}split={splits[0]}"
            raise SourceError(f"{url} has the splits {', '.join(splits)}; give one, such as {asked}")
        dataset = dataset[split]
    return dataset


@dataclass(frozen=True)
class _Columns:
    """Which columns of a table are the image, the caption and the id, and which others are kept."""

    image: str | None
    caption: str | None
    id: str | None
    others: pa.Schema

    @classmethod
    def of(
        cls,
        schema: pa.Schema,
        name: str,
        notes: list[str],
        *,
        image: str | None = None,
        caption: str | None = None,
        head: pa.Table | None = None,
        folder: Path | str | None = None,
    ) -> _Columns:
        """The columns by their names, the images' also by the first rows `head`; notes say what is not kept."""
        for asked in (image, caption):
            if asked is not None and asked not in schema.names:
                raise SourceError(
                    f"{name} has no column {asked!r}{nearest(asked, schema.names)}; it has {_list(schema)}"
                )
        by_key: dict[str, str] = {}
        for column in schema.names:
            by_key.setdefault(plain_key(column), column)
        known = [by_key[key] for key in (*_PATHS, *_PICTURE_COLUMNS) if key in by_key]
        image = image or next((column for column in known if _is_bytes(schema, column)), None)
        image = image or next((column for column in known if _is_text(schema, column)), None)
        image = image or _by_content(schema, name, head)
        texts = [by_key[key] for key in _CAPTIONS if key in by_key and by_key[key] != image]
        caption = caption or next((column for column in texts if _is_text(schema, column)), None)
        caption = caption or next((column for column in texts if _is_texts(schema, column)), None)
        if image is None and caption is None:
            wanted = ", ".join(dict.fromkeys((*_PATHS, *_CAPTIONS)))
            close = next((hint for column in by_key if (hint := nearest(column, (*_PATHS, *_CAPTIONS)))), "")
            raise SourceError(f"{name} has the columns {_list(schema)}; wanted one of {wanted}{close}")
        if image is not None:
            _refuse_addresses(name, image, head, folder)
        id = next((by_key[key] for key in _ID_COLUMNS if key in by_key), None)
        taken = [column for column in (image, caption, by_key.get("id")) if column is not None]
        return cls(image, caption, id, _kept(schema, taken, caption, notes))


def _by_content(schema: pa.Schema, name: str, head: pa.Table | None) -> str | None:
    """The only column of pictures, or the only one in which at least half of the first values name image files."""
    found = [column for column in schema.names if _is_bytes(schema, column, whole=True)]
    if not found and head is not None:
        others = [column for column in schema.names if plain_key(column) not in _CAPTIONS]
        found = [column for column in others if _is_text(schema, column) and _names_images(head, column)]
    if len(found) > 1:
        raise SourceError(f"{name} has several columns of images: {', '.join(found)}; name one of them image_path")
    return found[0] if found else None


def _names_images(head: pa.Table, column: str) -> bool:
    values = [value for value in head.column(column).to_pylist() if value]
    names = [PurePosixPath(re.split(r"[?#]", value)[0].replace("\\", "/")) for value in values]
    n = sum(path.suffix.lower() in IMAGE_SUFFIXES and len(path.name) < 256 for path in names)
    return bool(values) and 2 * n >= len(values)


def _refuse_addresses(name: str, image: str, head: pa.Table | None, folder: Path | str | None) -> None:
    """One line instead of a row each where the pictures are still all over the web."""
    values = [] if head is None else [value for value in head.column(image).to_pylist() if isinstance(value, str)]
    if isinstance(folder, str):
        are_elsewhere = [value.startswith(WEB) and not value.startswith(server_of(folder)) for value in values]
    else:
        are_elsewhere = [bool(_ADDRESS.match(value)) and not value.startswith(("file:", *STORAGE)) for value in values]
    if values and all(are_elsewhere):
        raise SourceError(
            f"column {image!r} of {name} holds web addresses such as {values[0][:80]}; download the pictures first "
            f"(img2dataset does), or take the column out to embed the captions alone"
        )


def _kept(schema: pa.Schema, taken: Sequence[str], caption: str | None, notes: list[str]) -> pa.Schema:
    """The columns that metadata carries: no lists, structs or bytes, but for several captions an image."""
    import pyarrow as pa

    kept, dropped = [], []
    for column in schema:
        if column.name in taken:
            continue
        if column.name in ("id", "image_path", "caption"):  # embed writes these
            dropped.append(column.name)
        elif pa.types.is_nested(column.type) or _is_bytes(schema, column.name):
            dropped.append(f"{column.name} ({column.type})")
        else:
            kept.append(pa.field(column.name, column.type))
    if caption is not None and _is_texts(schema, caption) and "captions" not in [column.name for column in kept]:
        kept.append(pa.field("captions", pa.list_(pa.string())))
        notes.append("several captions a row: the first is embedded, all are in the column captions")
    if dropped:
        notes.append(f"columns not kept: {', '.join(dropped)}")
    addresses = [column.name for column in kept if plain_key(column.name) in ("url", "image_url", "img_url")]
    if addresses:
        notes.append(f"column {addresses[0]} is kept; nothing is downloaded from it")
    return pa.schema(kept)


def _rows(
    name: str,
    columns: _Columns,
    pieces: Callable[[int], Iterable[pa.Table]],
    folder: Path | str,
    signature: str,
    total: int | None,
    notes: Sequence[str],
    names: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """A source of table rows; `names` are those of labels that are stored as numbers."""
    import pyarrow as pa

    names = {key: value for key, value in (names or {}).items() if key in columns.others.names}
    schema = pa.schema([(field.name, pa.string() if field.name in names else field.type) for field in columns.others])

    def items(start: int) -> Iterator[SourceItem]:
        number = start
        for piece in pieces(start):
            wanted = (columns.image, columns.caption, columns.id, *schema.names)
            present = dict.fromkeys(name for name in wanted if name in piece.column_names)
            for row in records_of(piece.select(list(present))):
                others = {key: row[key] for key in schema.names if key in row}
                for key, labels in names.items():
                    value = others[key]
                    others[key] = labels[value] if value is not None and 0 <= value < len(labels) else None
                yield _item(row, columns, others, folder, number)
                number += 1

    return Source(
        name, columns.image is not None, columns.caption is not None, signature, items, total, schema, tuple(notes)
    )


def _item(
    row: Mapping[str, Any], columns: _Columns, others: dict[str, Any], folder: Path | str, number: int
) -> SourceItem:
    image = row[columns.image] if columns.image else None
    path = damage = None
    if isinstance(image, dict):  # an image feature of the datasets library
        path, image = image.get("path"), image.get("bytes")
        image = path if image is None else image
    if isinstance(image, str):
        path = image
        try:
            image = _picture_path(folder, image) if image else None
        except SourceError as err:
            image, damage = None, str(err)
    if columns.image and image is None and damage is None:  # img2dataset says why it has no picture
        said = [str(row[name]) for name in ("status", "error_message") if row.get(name)]
        damage = ": ".join(said) or None
    caption = row[columns.caption] if columns.caption else None
    if isinstance(caption, list):
        captions = texts_of(caption)
        caption = next(iter(captions), None)
        if "captions" not in row:
            others["captions"] = captions
    given = row[columns.id] if columns.id else None
    id = str(given) if given not in (None, "") else path or str(number)
    return SourceItem(id, image, caption, others, damage)


def _picture_path(folder: Path | str, text: str) -> File:
    """Where the picture of a table's row lies: a path relative to the table, also with backslashes, or an address."""
    if isinstance(folder, str) or text.startswith(STORAGE):
        return far_picture(folder, text)
    if text.startswith("file:"):
        return Path(unquote(urlsplit(text).path))
    if _ADDRESS.match(text):
        raise SourceError("a web address; download the picture first")
    path = folder / text
    try:
        is_windows = "\\" in text and not path.exists()
    except (OSError, ValueError):
        is_windows = False
    return folder / text.replace("\\", "/") if is_windows else path


def _tars(name: str, paths: Sequence[File], notes: Sequence[str] = ()) -> Source:
    """The samples of webdataset shards; the first ones say whether there are images and captions."""
    if not paths:
        raise SourceError(f"{name} names no .tar file")
    for path in paths:
        if isinstance(path, Path) and not path.is_file():
            raise SourceError(f"{path} does not exist; {name} names {len(paths)} shards")
    counts = tars.Counts()
    first = list(itertools.islice(tars.samples(paths, 0, counts), _SAMPLED))
    if all(sample.damage is not None for sample in first):
        reason = f"; {first[0].id}: {first[0].damage}" if first else ""
        raise SourceError(f"{name} holds no samples; wanted members like 000001.jpg and 000001.txt{reason}")
    notes = list(notes)
    has_captions = _has_captions(first, notes)
    has_images = any(sample.image is not None for sample in first)
    if not has_images and not has_captions:
        key = next(sample.id for sample in first if sample.damage is None)
        raise SourceError(f"{name}: sample {key!r} has neither an image nor a caption (.txt, or in .json)")

    def items(start: int) -> Iterator[SourceItem]:
        return tars.samples(paths, start, counts)

    signature = _file_signature(paths)
    return Source(
        name, has_images, has_captions, signature, items, notes=tuple(notes), shards=tuple(paths), counts=counts
    )


def counted(source: Source, folder: Path, share: float = 0.0) -> Source:
    """`source` with its total, for which the headers of all shards are read once, whoever reads them.

    Args:
        folder: Where the count of each shard is kept.
        share: How far on in the list of shards to begin: processes that begin in different places share the work.

    Raises:
        SourceError: The samples cannot be counted beforehand.
    """
    if source.total is not None:
        return source
    n = len(source.shards)
    if n == 0:
        raise SourceError(
            f"{source.name} does not say how many samples it has, so it cannot be embedded in parts; "
            f"leave out streaming=1, or embed it without --part and --ray"
        )
    counts = source.counts
    counts.keep_in(folder)
    for number in range(int(share * n), int(share * n) + n):
        if counts.get(number % n) is None:
            counts.put(number % n, tars.count(source.shards[number % n]))
    total = sum(counts.get(number) or 0 for number in range(n))
    return replace(source, total=total)


def _is_bytes(schema: pa.Schema, column: str, *, whole: bool = False) -> bool:
    """Whether a column holds pictures or, unless `whole`, bytes of any kind."""
    import pyarrow as pa

    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        return "bytes" in [field.name for field in kind]
    return not whole and bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_text(schema: pa.Schema, column: str) -> bool:
    import pyarrow as pa

    kind = schema.field(column).type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_texts(schema: pa.Schema, column: str) -> bool:
    """Whether a column holds lists of texts."""
    import pyarrow as pa

    kind = schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return bool(pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type))


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _list(schema: pa.Schema) -> str:
    return ", ".join(schema.names) or "no columns"


def _refuse(err: OSError) -> None:
    raise SourceError(f"{err.filename} cannot be read ({err.strerror})")


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _signature_with_pictures(
    tables: Sequence[File], folder: Path | str, columns: _Columns, pieces: Callable[[int], Iterable[pa.Table]]
) -> str:
    """Changes when a table is replaced, or a picture of this machine that it lists by its path."""
    states = _picture_states(folder, columns.image, pieces) if isinstance(folder, Path) else ()
    return _digest([_file_signature(tables), *states])


def _picture_states(folder: Path, column: str | None, pieces: Callable[[int], Iterable[pa.Table]]) -> Iterator[str]:
    import pyarrow as pa

    if column is None:
        return
    for piece in pieces(0):
        values = piece.column(column)
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return  # the pictures are in the table
        for text in values.to_pylist():
            with contextlib.suppress(SourceError):
                yield _state(_picture_path(folder, text)) if text and not text.startswith(STORAGE) else ""


def _file_signature(paths: Sequence[File]) -> str:
    """Changes when a file gets another size, time or other ends: enough to notice that it was replaced."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path.name}:{_state(path)};".encode("utf-8", "surrogateescape"))
        if isinstance(path, FarFile):
            continue
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()
