"""Tables in `.csv`, `.parquet` and `.jsonl` files, read with one-line errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msae.base.errors import MsaeError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_PATH_COLUMNS = ("image_path", "path", "image", "file")
CAPTION_COLUMNS = ("caption", "text")
TEXT_COLUMNS = ("id", "key", *IMAGE_PATH_COLUMNS, *CAPTION_COLUMNS)
"""Columns read as strings whatever they look like: the id `00012` is not the number 12."""

TABLE_SUFFIXES = (".csv", ".parquet", ".jsonl")

Error = Callable[[str], MsaeError]


def read_table(path: Path, error: Error) -> pa.Table:
    """The table of a `.csv`, `.jsonl` or `.parquet` file.

    Raises:
        MsaeError: Of the kind made by `error`: unreadable, damaged, or not UTF-8.
    """
    import pyarrow as pa

    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        table: pa.Table = readers[path.suffix.lower()](path)
    except (pa.ArrowException, OSError) as err:
        raise error(f"{path} cannot be read as {path.suffix[1:]} ({first_line(err)}); mend or make it again") from err
    for field in table.schema:
        if path.suffix.lower() != ".parquet" and pa.types.is_binary(field.type):
            raise error(f"column {field.name!r} of {path} is not UTF-8; save the file as UTF-8")
    if len(set(table.column_names)) != table.num_columns:
        raise error(f"{path} has two columns of one name among {', '.join(table.column_names)}; rename one")
    return table


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
            known = types.get(field.name)
            types[field.name] = field.type if known is None else _common_type(known, field.type)
    return pa.schema(list(types.items()))


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns and types of `schema`; a missing column is null."""
    import pyarrow as pa

    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
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
        return pa.chunked_array([[None if value is None else str(value) for value in column.to_pylist()]], pa.string())


def unique_ids(ids: Iterable[str]) -> Iterator[str]:
    """The ids in order, a repeated one with `#2`, `#3` … after it, so that each names one row."""
    seen: dict[str, int] = {}
    for id in ids:
        unique = id
        while unique in seen:
            seen[id] += 1
            unique = f"{id}#{seen[id]}"
        seen[unique] = 1
        yield unique


def first_line(err: BaseException) -> str:
    """The first line of an error's message, without a final full stop."""
    return (str(err).strip() or type(err).__name__).splitlines()[0].rstrip(".")


def _common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if a == b:
        return a
    try:
        fields = [pa.schema([("x", a)]), pa.schema([("x", b)])]
        return pa.unify_schemas(fields, promote_options="permissive").field("x").type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.string()


def _read_csv(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv

    if path.stat().st_size == 0:
        raise pa.ArrowInvalid("the file is empty")
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(TEXT_COLUMNS, pa.string())),
    )


def _read_jsonl(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.json

    if path.stat().st_size == 0:
        raise pa.ArrowInvalid("the file is empty")
    return pyarrow.json.read_json(path)


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read()  # ParquetFile: read_table would guess partitions from the path


@dataclass(frozen=True, eq=False)
class Metadata:
    """A table in several parquet files of which only the asked columns are read, or a table in memory."""

    names: tuple[str, ...]
    counts: list[int]
    """Rows of each file; empty where there is no metadata at all."""
    read: Callable[[list[str] | None], pa.Table]
    """The given columns, or all."""
    vectors: tuple[str, ...] = ()
    """Names of the columns of float lists."""

    @classmethod
    def none(cls) -> Metadata:
        """No columns."""
        import pyarrow as pa

        return cls((), [], lambda _: pa.table({}))

    @classmethod
    def of(cls, table: pa.Table) -> Metadata:
        """The columns of a table in memory."""
        return cls(
            tuple(table.column_names),
            [table.num_rows],
            lambda names: table if names is None else table.select(names),
        )

    @classmethod
    def open(cls, paths: Sequence[Path], error: Error, *, without: Sequence[str] = ()) -> Metadata:
        """The columns of parquet files that hold one table, less the columns `without`.

        Raises:
            MsaeError: Of the kind made by `error`: a file is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            footers = [pq.read_metadata(path) for path in paths]
            schemas = [footer.schema.to_arrow_schema() for footer in footers]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
            raise error(f"{_unreadable(paths)} is no readable parquet file ({first_line(err)}); make it again") from err
        schema = common_schema(schemas)
        schema = pa.schema([column for column in schema if column.name not in without])

        def read(names: list[str] | None) -> pa.Table:
            wanted = schema if names is None else pa.schema([schema.field(name) for name in names])
            tables = []
            for path, own, footer in zip(paths, schemas, footers, strict=True):
                present = [name for name in wanted.names if name in own.names]
                try:
                    table = pq.ParquetFile(path).read(columns=present)
                    table.validate(full=True)  # a changed byte may leave text that is not UTF-8
                except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
                    raise error(f"{path} is damaged ({first_line(err)}); copy or make it again") from err
                if present and (table.num_rows != footer.num_rows or table.column_names != present):
                    raise error(
                        f"{path} is damaged: {table.num_rows:,} rows of {len(present)} columns could be read where "
                        f"{footer.num_rows:,} rows are promised; copy or make it again"
                    )
                tables.append(conform(table, wanted))
            return pa.concat_tables(tables)

        vectors = tuple(column.name for column in schema if _is_vector(column.type))
        return cls(tuple(schema.names), [footer.num_rows for footer in footers], read, vectors)


def _is_vector(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_floating(kind.value_type))


def _unreadable(paths: Sequence[Path]) -> Path:
    """The first of `paths` that is no parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return path
    return paths[0]
