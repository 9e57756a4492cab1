"""What there is to embed: images and captions with ids, read one after another from many kinds of places."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msae.base.errors import MissingDependencyError, SourceError, nearest
from msae.data.images import SUFFIXES as IMAGE_SUFFIXES
from msae.data.sources import tars
from msae.data.tables import CAPTION_COLUMNS, IMAGE_PATH_COLUMNS, TABLE_SUFFIXES, first_line, read_table

if TYPE_CHECKING:
    import pyarrow as pa

_PIECE = 256  # rows of a table that are turned into Python objects at a time
_ENDS = 1 << 20  # bytes of each end of a file that tell whether it has changed
_ID_COLUMNS = ("id", "key")


@dataclass(frozen=True)
class SourceItem:
    """One sample, not yet decoded."""

    id: str
    """Not necessarily unique: `embed` numbers repeated ones."""
    image: Path | bytes | None = None
    caption: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else is known about it."""
    damage: str | None = None
    """Why the sample cannot be used at all, where reading it has already failed."""


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


def open_source(source: str | Path) -> Source:
    """The source at a path: nothing but names is read yet.

    Args:
        source: A folder of images (recursive); a .txt of captions, one a line; a .csv, .jsonl or .parquet
            with image paths (relative to its folder), captions, or both; a .tar of webdataset, a folder of
            them or a pattern such as `shards/{000..012}.tar`; or a dataset of Hugging Face as
            `hf://owner/name?split=train&config=NAME&streaming=1&image=COLUMN&caption=COLUMN`, in which an
            absolute path stands for a dataset saved on disk (`hf:///data/saved`).

    Raises:
        SourceError: There is nothing there, it is empty, or it has neither images nor captions.
    """
    text = str(source)
    if text.startswith("hf:/"):
        return _hugging_face(text)
    if "{" in text and text.endswith(".tar"):
        return _tars(text, tars.expand(text))
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return _tars(text, shards) if shards else _folder(path)
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SourceError(f"{path} does not exist{nearest(path.name, siblings)}")
    if suffix == ".txt":
        return _captions(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in TABLE_SUFFIXES:
        return _table(path)
    if suffix == ".tar":
        return _tars(text, [path])
    hint = "; give the folder that it is in" if suffix in IMAGE_SUFFIXES else ""
    raise SourceError(
        f"{path} is no source{hint}; wanted a folder of images, .txt, .csv, .jsonl, .parquet, .tar or hf://"
    )


def _folder(path: Path) -> Source:
    """Every image below a folder in the order of their paths, without hidden files and links to folders."""
    names = []
    for folder, subfolders, files in os.walk(path, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names += [
            (Path(folder) / name).relative_to(path).as_posix()
            for name in files
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    names.sort()
    if not names:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(f"{path} has no images in it; wanted files ending in one of {kinds}")

    def items(start: int) -> Iterator[SourceItem]:
        for name in names[start:]:
            yield SourceItem(name, image=path / name)

    return Source(str(path), True, False, _digest(names), items, total=len(names))


def _captions(path: Path) -> Source:
    """The lines of a text file; the id of a caption is the number of its line, from 0."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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


def _table(path: Path) -> Source:
    """The rows of a .csv or .jsonl file, which is held in memory."""
    table = read_table(path, SourceError)
    if table.num_rows == 0:
        raise SourceError(f"{path} has no rows")

    def pieces(start: int) -> Iterator[pa.Table]:
        for first in range(start, table.num_rows, _PIECE):
            yield table.slice(first, _PIECE)

    columns = _Columns.of(table.schema, str(path))
    return _rows(str(path), columns, pieces, path.parent, _file_signature([path]), table.num_rows)


def _parquet(path: Path) -> Source:
    """The rows of a .parquet file, read a row group at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as err:
        raise SourceError(f"{path} is no readable parquet file ({first_line(err)}); make it again") from err
    if footer.num_rows == 0:
        raise SourceError(f"{path} has no rows")

    def pieces(start: int) -> Iterator[pa.Table]:
        group = 0
        while group < footer.num_row_groups and start >= footer.row_group(group).num_rows:
            start -= footer.row_group(group).num_rows
            group += 1
        groups = range(group, footer.num_row_groups)
        try:
            for batch in pq.ParquetFile(path).iter_batches(_PIECE, row_groups=groups):
                if start < batch.num_rows:
                    yield pa.Table.from_batches([batch.slice(start)])
                start = max(0, start - batch.num_rows)
        except (pa.ArrowException, OSError) as err:
            raise SourceError(f"{path} is damaged ({first_line(err)}); copy or make it again") from err

    columns = _Columns.of(schema, str(path))
    return _rows(str(path), columns, pieces, path.parent, _file_signature([path]), footer.num_rows)


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
    dataset = _load_dataset(url, parts.netloc + parts.path, options)
    features = dataset.features
    if features is None:
        raise SourceError(f"{url} does not say what its columns are; load it without streaming")
    columns = _Columns.of(features.arrow_schema, url, options.get("image"), options.get("caption"))
    names = {name: kind.names for name, kind in features.items() if type(kind).__name__ == "ClassLabel"}
    is_streamed = not hasattr(dataset, "__len__")
    total = None if is_streamed else len(dataset)
    if total == 0:
        raise SourceError(f"{url} has no rows")
    tables = dataset.with_format("arrow")

    def pieces(start: int) -> Iterator[pa.Table]:
        if is_streamed:
            yield from tables.skip(start).iter(_PIECE)
        else:
            for first in range(start, len(dataset), _PIECE):
                yield tables[first : first + _PIECE]

    signature = _digest([url, str(total), "" if is_streamed else str(dataset._fingerprint)])
    return _rows(url, columns, pieces, Path(), signature, total, names)


def _load_dataset(url: str, name: str, options: Mapping[str, str]) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError.of("datasets", extra="sources") from None

    path = Path(name)
    streaming = options.get("streaming", "").lower() in ("1", "true", "yes")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
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
            raise SourceError(f"{url} has the splits {', '.join(splits)}; add one as ?split={splits[0]}")
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
    def of(cls, schema: pa.Schema, name: str, image: str | None = None, caption: str | None = None) -> _Columns:
        for asked in (image, caption):
            if asked is not None and asked not in schema.names:
                raise SourceError(
                    f"{name} has no column {asked!r}{nearest(asked, schema.names)}; it has {_list(schema)}"
                )
        image = image or next((column for column in IMAGE_PATH_COLUMNS if _is_image(schema, column)), None)
        caption = caption or next((column for column in CAPTION_COLUMNS if _is_text(schema, column)), None)
        if image is None and caption is None:
            wanted = ", ".join(IMAGE_PATH_COLUMNS + CAPTION_COLUMNS)
            close = next(
                (hint for column in schema.names if (hint := nearest(column, (*IMAGE_PATH_COLUMNS, *CAPTION_COLUMNS)))),
                "",
            )
            raise SourceError(f"{name} has the columns {_list(schema)}; wanted one of {wanted}{close}")
        id = next((column for column in _ID_COLUMNS if column in schema.names), None)
        return cls(image, caption, id, _plain(schema, without=(image, caption, "id", "image_path", "caption")))


def _rows(
    name: str,
    columns: _Columns,
    pieces: Callable[[int], Iterable[pa.Table]],
    folder: Path,
    signature: str,
    total: int | None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """A source of table rows; `names` are those of labels that are stored as numbers."""
    import pyarrow as pa

    names = {key: value for key, value in (names or {}).items() if key in columns.others.names}
    schema = pa.schema([(field.name, pa.string() if field.name in names else field.type) for field in columns.others])
    wanted = dict.fromkeys(name for name in (columns.image, columns.caption, columns.id, *schema.names) if name)

    def items(start: int) -> Iterator[SourceItem]:
        number = start
        for piece in pieces(start):
            for row in piece.select(list(wanted)).to_pylist():
                others = {key: row[key] for key in schema.names}
                for key, labels in names.items():
                    value = others[key]
                    others[key] = labels[value] if value is not None and 0 <= value < len(labels) else None
                yield _item(row, columns, others, folder, number)
                number += 1

    return Source(name, columns.image is not None, columns.caption is not None, signature, items, total, schema)


def _item(
    row: Mapping[str, Any], columns: _Columns, others: Mapping[str, Any], folder: Path, number: int
) -> SourceItem:
    image = row[columns.image] if columns.image else None
    path = None
    if isinstance(image, dict):  # an image feature of the datasets library
        path, image = image.get("path"), image.get("bytes")
        image = path if image is None else image
    if isinstance(image, str):
        path, image = image, (folder / image if image else None)
    given = row[columns.id] if columns.id else None
    id = str(given) if given is not None else path or str(number)
    return SourceItem(id, image, row[columns.caption] if columns.caption else None, others)


def _tars(name: str, paths: Sequence[Path]) -> Source:
    """The samples of webdataset shards; the first one says whether there are images and captions."""
    if not paths:
        raise SourceError(f"{name} names no .tar file")
    for path in paths:
        if not path.is_file():
            raise SourceError(f"{path} does not exist; {name} names {len(paths)} shards")
    first = next((sample for sample in tars.samples(paths) if sample.damage is None), None)
    if first is None:
        raise SourceError(f"{name} holds no samples; wanted members like 000001.jpg and 000001.txt")
    has_images, has_captions = first.image is not None, first.caption is not None
    if not has_images and not has_captions:
        raise SourceError(f"{name}: sample {first.key!r} has neither an image nor a caption (.txt, or in .json)")

    def items(start: int) -> Iterator[SourceItem]:
        for number, sample in enumerate(tars.samples(paths)):
            if number >= start:
                yield SourceItem(sample.key, sample.image, sample.caption, sample.columns, sample.damage)

    return Source(name, has_images, has_captions, _file_signature(paths), items)


def _is_image(schema: pa.Schema, column: str) -> bool:
    import pyarrow as pa

    if column not in schema.names:
        return False
    kind = schema.field(column).type
    has_bytes = pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]
    return bool(has_bytes or _is_text(schema, column) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(schema: pa.Schema, column: str) -> bool:
    import pyarrow as pa

    kind = schema.field(column).type if column in schema.names else pa.null()
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _plain(schema: pa.Schema, *, without: Sequence[str | None]) -> pa.Schema:
    """The columns that metadata can carry: no lists, structs or bytes."""
    import pyarrow as pa

    kept = []
    for column in schema:
        is_bytes = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
        if column.name not in without and not pa.types.is_nested(column.type) and not is_bytes:
            kept.append(pa.field(column.name, column.type))
    return pa.schema(kept)


def _list(schema: pa.Schema) -> str:
    return ", ".join(schema.names) or "no columns"


def _refuse(err: OSError) -> None:
    raise SourceError(f"{err.filename} cannot be read ({err.strerror})")


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _file_signature(paths: Sequence[Path]) -> str:
    """Changes when a file gets another size or other ends: enough to notice that it was replaced."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()
