"""Tables in `.csv`, `.tsv`, `.parquet`, `.jsonl` and `.json` files, read with one-line errors."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from msae.base.errors import MsaeError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_PATH_COLUMNS = ("image_path", "path", "image", "file")
CAPTION_COLUMNS = ("caption", "text")
TEXT_COLUMNS = ("id", "key", *IMAGE_PATH_COLUMNS, *CAPTION_COLUMNS)
"""Columns read as strings whatever they look like: the id `00012` is not the number 12."""

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json")

_MISSING = ("", "nan", "NaN", "NA", "N/A", "#N/A", "null", "NULL", "None")
"""What stands for no value in a CSV column of numbers; in a column of text it is text."""
_SEPARATORS = (",", ";", "\t", "|")
_OTHER_SCRIPT = re.compile(rb"(?<![A-Za-z\x80-\xff])[\xc0-\xff]{3}(?![A-Za-z])|[\x80-\xff]{4,}")
"""Words without a letter of ASCII, rare in Windows-1252: Cyrillic or Japanese in an encoding of its own."""
ROWS_AT_ONCE = 65_536
"""Rows of metadata that are read at once; as many as a shard has."""
RECENT = 4
"""Pieces of a table that are kept for the next rows that are asked for."""
_BLOCK = 1 << 30  # bytes of a CSV that are parsed at once, at most: a row must fit into one block
_MORE_COLUMNS = 1000
_NOT_IN_PYTHON = (OverflowError, ValueError, KeyError)
"""What pyarrow raises on a year after 9999, a time too long, and (KeyError) a time zone that nobody knows."""

Error = Callable[[str], MsaeError]


def read_table(path: Path, error: Error, notes: list[str] | None = None) -> pa.Table:
    """The table of a file with one of `TABLE_SUFFIXES`.

    A CSV may be separated by commas, semicolons, tabs or bars, and be UTF-8, UTF-16 or Windows-1252. Its
    values are text as written; a column is of numbers, or of True and False, only where writing its values
    gives the text again: `001` and `1E5` stay text.

    Args:
        notes: Gets a line about what a person should know of how the file was read.

    Raises:
        MsaeError: Made by `error`: unreadable, damaged, or in another encoding.
    """
    import pyarrow as pa

    notes = [] if notes is None else notes
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table = _read_parquet(path)
        else:
            data = path.read_bytes()
            if not data:
                raise ValueError("the file is empty")
            text = _decoded(data, path, error, notes)
            table = _read_csv(text) if suffix in (".csv", ".tsv") else _read_json(text)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as err:
        raise error(f"{path} cannot be read as {suffix[1:]} ({first_line(err)}); repair it or make it again") from err
    if len(set(table.column_names)) != table.num_columns:
        raise error(f"{path} has two columns of one name among {', '.join(table.column_names)}; rename one")
    return conform(table, common_schema([table.schema]))


def array_of(values: Sequence[Any], kind: pa.DataType | None = None) -> pa.Array:
    """The values as one column, of this kind if they are; of several kinds, such as numbers and words, as text."""
    import pyarrow as pa

    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return pa.array([None if value is None else as_text(value) for value in values], pa.string())


def as_text(value: object) -> str:
    """A value as text that UTF-8 can hold; what is not text is written as JSON where it can be."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            value = str(value)
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def plain_key(name: str) -> str:
    """A column's name as names are compared: ` Image-Path` is `image_path`."""
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


def concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """The tables one after another; a column whose types do not agree becomes text."""
    import pyarrow as pa

    schema = common_schema(table.schema for table in tables)
    return pa.concat_tables([conform(table, schema) for table in tables])


def common_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The columns of all `schemas`, each with the one type that holds its values everywhere."""
    import pyarrow as pa

    types: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            known, kind = types.get(field.name), field.type
            if pa.types.is_dictionary(kind):  # the categories of pandas are their values
                kind = kind.value_type
            kind = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)
            types[field.name] = kind if known is None else _common_type(known, kind)
    return pa.schema(list(types.items()))


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns and types of `schema`; a missing column is null."""
    import pyarrow as pa

    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
        elif table.column(field.name).type == field.type:  # pyarrow's cast of a list of nulls is damaged
            columns.append(table.column(field.name))
        elif pa.types.is_string(field.type):
            columns.append(text_column(table.column(field.name)))
        else:
            columns.append(table.column(field.name).cast(field.type))
    return pa.table(columns, schema=schema)


def text_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values as text: as Arrow writes them, and as Python does where Arrow cannot."""
    import pyarrow as pa

    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        texts = [None if value is None else str(value) for value in values_of(column)]
        return pa.chunked_array([texts], pa.string())


def values_of(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values as Python has them; what it cannot hold, such as the year 50,000, as the text that Arrow writes."""
    try:
        return cast("list[Any]", column.to_pylist())
    except _NOT_IN_PYTHON:
        return [_value_of(one) for one in column]


def _value_of(scalar: pa.Scalar) -> Any:
    import pyarrow as pa

    try:
        return scalar.as_py()
    except _NOT_IN_PYTHON:
        return " ".join(pa.array([scalar], scalar.type).to_string().split()).removeprefix("[ ").removesuffix(" ]")


def encoded(column: pa.ChunkedArray) -> tuple[list[Any], NDArray[np.int64]]:
    """The different values of a column, and of each row which it has; one number more stands for none."""
    import pyarrow as pa

    if pa.types.is_float16(column.type):  # not every Arrow can encode these; as wider numbers they are the same
        column = column.cast(pa.float32())
    coded = column.combine_chunks().dictionary_encode()
    values = values_of(coded.dictionary)
    return values, coded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)


def records_of(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table, their values as `values_of` has them."""
    columns = [values_of(column) for column in table.columns]
    rows = zip(*columns, strict=True) if columns else ((),) * table.num_rows
    return [dict(zip(table.column_names, row, strict=True)) for row in rows]


class UniqueIds:
    """Ids in order, a repeated one with `#2`, `#3` … after it, so that each names one row."""

    def __init__(self, hashes: Iterable[NDArray[np.int64]] | None = None) -> None:
        """Begin.

        Args:
            hashes: Those of all ids that will come; then an id that comes once is not kept in memory.
        """
        self._seen: dict[str, int] = {}
        self._twice: set[int] | None = None
        if hashes is not None:
            ordered = np.sort(np.concatenate([np.zeros(0, np.int64), *hashes]))
            self._twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())

    def of(self, ids: Iterable[str]) -> Iterator[str]:
        """The next ids."""
        seen = self._seen
        for id in ids:
            if self._twice is not None and hash(id) not in self._twice and "#" not in id:
                yield id  # it comes once, and is none that is made here
                continue
            unique = id
            while unique in seen:
                seen[id] += 1
                unique = f"{id}#{seen[id]}"
            seen[unique] = 1
            yield unique


def hashes_of(ids: Sequence[str]) -> NDArray[np.int64]:
    """For `UniqueIds`; they are of this process alone."""
    return np.fromiter(map(hash, ids), np.int64, len(ids))


def _common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if a == b:
        return a
    try:
        fields = [pa.schema([("x", a)]), pa.schema([("x", b)])]
        return pa.unify_schemas(fields, promote_options="permissive").field("x").type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.string()


def _decoded(data: bytes, path: Path, error: Error, notes: list[str]) -> str:
    """The text of a file, by its byte order mark, else UTF-8, else Windows-1252 where that can be."""
    try:
        is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        if any(len(set(word)) > 1 for word in _OTHER_SCRIPT.findall(data)):
            raise error(f"{path} is not UTF-8; save the file as UTF-8") from None
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            raise error(f"{path} is not UTF-8; save the file as UTF-8") from None
        notes.append(f"{path} is not UTF-8: read as Windows-1252; where letters look wrong, save it as UTF-8")
    if "\0" in text:
        raise error(f"{path} holds bytes that are no text; save the file as UTF-8")
    return text


def _read_csv(text: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv

    start = text[:100_000].lstrip("\r\n")
    if not start:
        raise ValueError("the file is empty")
    widths = {separator: len(_first_record(start, separator)) for separator in _SEPARATORS}
    separator = max(_SEPARATORS, key=widths.__getitem__)
    if text.count('"') % 2 and _has_open_quote(text, separator):
        raise ValueError('a quotation mark " is opened and never closed')
    n_columns = widths[separator]
    data = text.strip("\r\n").encode() + b"\n"  # without blank lines around it: in one column they would be rows
    table = pyarrow.csv.read_csv(
        pa.py_buffer(data),
        read_options=pyarrow.csv.ReadOptions(
            autogenerate_column_names=True, use_threads=False, block_size=min(max(len(data), 1), _BLOCK)
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=separator, newlines_in_values=True, ignore_empty_lines=n_columns > 1
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={f"f{number}": pa.string() for number in range(n_columns + _MORE_COLUMNS)}
        ),
    )
    names = [str(column[0].as_py()).strip() for column in table.columns]
    table = table.slice(1)
    columns: list[tuple[str, pa.ChunkedArray]] = []
    for number, (name, column) in enumerate(zip(names, table.columns, strict=True)):
        if not name:
            if _is_empty_or_counts(column):  # the index that pandas writes, or a separator at the end of lines
                continue
            name = f"column_{number}"
        columns.append((name, column if plain_key(name) in TEXT_COLUMNS else _numbers_as_written(column)))
    return pa.Table.from_arrays([column for _, column in columns], [name for name, _ in columns])


def _first_record(text: str, separator: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])
    except csv.Error:
        return text.split("\n", 1)[0].split(separator)


def _has_open_quote(text: str, separator: str) -> bool:
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
            pass
    except csv.Error as err:
        return "unexpected end of data" in str(err) or "field larger" in str(err)
    return False


def _is_empty_or_counts(column: pa.ChunkedArray) -> bool:
    """Whether every value is empty, or each is the number of its row, from 0 or 1."""
    values = column.to_pylist()
    return not any(values) or any(all(v == str(i) for i, v in enumerate(values, first)) for first in (0, 1))


def _numbers_as_written(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as numbers or truth values where writing them gives exactly its text, else as it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_missing = pc.is_in(column, value_set=pa.array(_MISSING))
    values = pc.if_else(is_missing, pa.scalar(None, pa.string()), column)
    present = pc.unique(values.drop_null()).to_pylist()
    if not present:
        is_blank = not len(column) or pc.all(pc.equal(column, "")).as_py()
        return values if is_blank else column
    for kind, writes_as in ((pa.int64(), int), (pa.float64(), float)):
        if all(_is_written(value, writes_as) for value in present):
            return values.cast(kind)
    return values.cast(pa.bool_()) if set(present) <= {"True", "False"} else column


def _is_written(value: str, kind: type[int] | type[float]) -> bool:
    try:
        return len(value) <= 18 + 7 * (kind is float) and str(kind(value)) == value and value not in ("inf", "-inf")
    except ValueError:
        return False


def _read_json(text: str) -> pa.Table:
    """One object a line, or one array of objects."""
    import pyarrow as pa

    records: list[Any]
    if text.lstrip().startswith("["):
        records = json.loads(text)
    else:
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as err:
                    raise ValueError(f"line {number}: {err.msg}; wanted one object a line, or an array") from err
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"record {number} is a {type(record).__name__}; wanted objects")  # noqa: TRY004
    names = dict.fromkeys(name for record in records for name in record)
    columns = [array_of([record.get(name) for record in records]) for name in names]
    return pa.Table.from_arrays(columns, [as_text(name) for name in names])


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read()  # ParquetFile: read_table would guess partitions from the path


def read_footer(path: object, error: Error, end: io.BytesIO | None = None) -> pq.FileMetaData:
    """What a parquet file says of itself, its schema among it.

    Args:
        end: The end of the file, where `path` is no path of this machine.

    Raises:
        MsaeError: Made by `error`: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(end or path)
        footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
        raise error(f"{path} is no readable parquet file ({first_line(err)}); make it again") from err
    return footer


class Piece(NamedTuple):
    """Consecutive rows of a table, which are read at once."""

    n: int
    read: Callable[[Sequence[str]], pa.Table]
    """The given columns of them."""


@dataclass(frozen=True, eq=False)
class Metadata:
    """A table in several parquet files of which only the asked columns and rows are read, or a table in memory."""

    counts: list[int]
    """Rows of each file; empty where there is no metadata at all."""
    pieces: Callable[[], Sequence[Piece]]
    schema: Callable[[], pa.Schema]
    """All columns with their types."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.schema().names)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the columns of float lists."""
        return tuple(column.name for column in self.schema() if _is_vector(column.type))

    def read(self, names: Sequence[str], rows: NDArray[np.int64] | None = None) -> pa.Table:
        """The given columns, of all rows or of ascending `rows`."""
        import pyarrow as pa

        pieces = (self if rows is None else self.at(rows)).pieces()
        tables = [piece.read(names) for piece in pieces if names]
        return pa.concat_tables(tables) if tables else _selected(self.schema(), names).empty_table()

    def at(self, rows: NDArray[np.int64]) -> Metadata:
        """The table of ascending `rows`; what was read last is kept for the next rows."""

        def taken(number: int, own: pa.Array, names: Sequence[str]) -> pa.Table:
            return self._recent[1](number, tuple(names)).take(own)

        def pieces() -> list[Piece]:
            starts = self._recent[0]
            cuts = np.searchsorted(rows, starts)
            found = []
            for number in np.flatnonzero(np.diff(cuts)).tolist():
                own = row_numbers(rows[cuts[number] : cuts[number + 1]] - starts[number])
                found.append(Piece(len(own), partial(taken, number, own)))
            return found

        return replace(self, counts=[len(rows)], pieces=cache(pieces))

    @cached_property
    def _recent(self) -> tuple[NDArray[np.int64], Callable[[int, tuple[str, ...]], pa.Table]]:
        """Where pieces start, with the end of the last, and what reads one and keeps the last few."""
        pieces = self.pieces()
        starts = np.cumsum([0, *(piece.n for piece in pieces)])
        return starts, lru_cache(RECENT)(lambda number, names: pieces[number].read(names))

    def is_unique(self, name: str) -> bool:
        """Whether a column of text or whole numbers has a value in every row and none twice; takes 16 bytes a row."""
        import pyarrow as pa

        kind = self.schema().field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            return False
        hashes = [np.zeros(0, np.int64)]
        for piece in self.pieces():
            column = text_column(piece.read([name]).column(0))
            if column.null_count:
                return False
            hashes.append(hashes_of(column.to_pylist()))
        ordered = np.concatenate(hashes)
        ordered.sort()
        return not bool((ordered[1:] == ordered[:-1]).any())

    def without(self, names: Collection[str]) -> Metadata:
        """The other columns."""
        import pyarrow as pa

        others = pa.schema([column for column in self.schema() if column.name not in names])
        return replace(self, schema=lambda: others)

    @classmethod
    def of(cls, table: pa.Table) -> Metadata:
        """The columns of a table in memory."""
        parts = [table.slice(first, ROWS_AT_ONCE) for first in range(0, table.num_rows, ROWS_AT_ONCE)]
        pieces = [Piece(part.num_rows, part.select) for part in parts]
        return cls([table.num_rows], lambda: pieces, lambda: table.schema)

    @classmethod
    def later(cls, counts: list[int], fetch: Sequence[Callable[[], Path]], error: Error) -> Metadata:
        """The columns of `.parquet` files that are fetched when one is first asked for; the first says what there is.

        Args:
            counts: Rows that each file must have.

        Raises:
            MsaeError: Made by `error`, when it is read: a file does not arrive, is damaged or has other rows.
        """

        @cache
        def pieces() -> Sequence[Piece]:
            paths = [one() for one in fetch]
            found = cls.open(paths, error)
            for path, n, wanted in zip(paths, found.counts, counts, strict=True):
                if n != wanted:
                    raise error(f"{path} holds {n:,} rows of metadata, its embeddings are {wanted:,}; make both again")
            return found.pieces()

        @cache
        def schema() -> pa.Schema:
            return common_schema([read_footer(fetch[0](), error).schema.to_arrow_schema()])

        return cls(counts, pieces, schema)

    @classmethod
    def open(cls, paths: Sequence[Path], error: Error) -> Metadata:
        """The columns of a `.csv` file, or of the `.parquet` files that hold one table; none without a file.

        Raises:
            MsaeError: Made by `error`: a file is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not paths:
            return cls([], list, lambda: pa.schema([]))
        if paths[0].suffix.lower() == ".csv":
            return cls.of(read_table(paths[0], error))
        footers = [read_footer(path, error) for path in paths]
        schemas = [footer.schema.to_arrow_schema() for footer in footers]
        schema = common_schema(schemas)

        def read(path: Path, footer: pq.FileMetaData, groups: Sequence[int], n: int, names: Sequence[str]) -> pa.Table:
            own = footer.schema.to_arrow_schema()
            present = [name for name in names if name in own.names]
            if not present:
                return pa.table([pa.nulls(n, schema.field(name).type) for name in names], list(names))
            try:
                table = pq.ParquetFile(path, metadata=footer).read_row_groups(groups, columns=present)
                table.validate(full=True)  # a changed byte may leave text that is not UTF-8
            except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
                raise error(f"{path} is damaged ({first_line(err)}); copy or make it again") from err
            if table.num_rows != n or table.column_names != present:
                raise error(
                    f"{path} is damaged: {table.num_rows:,} rows of {len(present)} columns could be read where "
                    f"{n:,} rows are promised; copy or make it again"
                )
            return conform(table, _selected(schema, names))

        pieces = []
        for path, footer in zip(paths, footers, strict=True):
            sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            if sum(sizes) != footer.num_rows:
                raise error(
                    f"{path} is damaged: it has {sum(sizes):,} of {footer.num_rows:,} rows; copy or make it again"
                )
            ends = np.cumsum([0, *sizes])
            place = ends[:-1] // ROWS_AT_ONCE  # small groups are read together
            for groups in np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(place)) + 1):
                n = int(ends[groups[-1] + 1] - ends[groups[0]]) if len(groups) else 0
                pieces += [Piece(n, partial(read, path, footer, groups.tolist(), n))] if n else []
        return cls([footer.num_rows for footer in footers], lambda: pieces, lambda: schema)


def _selected(schema: pa.Schema, names: Iterable[str]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([schema.field(name) for name in names])


def row_numbers(rows: NDArray[np.int64]) -> pa.Array:
    """`rows` for pyarrow. `pa.array` would import pandas where it is installed, a tenth of the time of a search."""
    import pyarrow as pa

    numbers = np.ascontiguousarray(rows, dtype=np.int64)
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])


def _is_vector(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_floating(kind.value_type))
