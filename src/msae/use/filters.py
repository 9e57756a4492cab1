"""Filters on metadata such as `split == 'test' and not size in (1, 2)`: parsed, checked, never run as code.

The text is read by Python's own parser, and a node that is not on the list below is refused with its place.
A comparison with a missing value is neither true nor false, as in SQL: such a row is kept by neither `a == 1`
nor `not a == 1`, only by `a is null`.

Values of a CSV are text where writing them as numbers would change them, such as `9.50`. A column of text is
read as numbers where < <= > >= compare it with a number, and as true or false where it stands alone or is
compared with True or False.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from msae.base.errors import ConfigError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

    from msae.data.store import EmbeddingStore

LONGEST = 10_000
"""Characters of a filter."""

_HELP = "write for example split == 'test' and size in (1, 2)"
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_MIRRORED = {"less": "greater", "less_equal": "greater_equal", "greater": "less", "greater_equal": "less_equal"}
_NULLS = ("null", "NULL")

Truth = Callable[["pa.Table"], "pa.ChunkedArray"]
"""Gives true, false or null for each row of a table."""


@dataclass(frozen=True)
class Filter:
    """A filter that is well formed; whether it fits a table shows when it meets one."""

    text: str
    columns: tuple[str, ...]
    """Names of the columns it asks for."""
    _truth: Truth = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Filter:
        """The filter in `text`: == != < <= > >= in, not in, is null, is not null, and, or, not, parentheses.

        A column whose name is no Python name is written `column('its name')`.

        Raises:
            ConfigError: It is written otherwise; the message points at the place.
        """
        text = text.strip()
        if len(text) > LONGEST:
            raise ConfigError(f"the filter has {len(text):,} characters; at most {LONGEST:,} are read: shorten it")
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError as err:
            place = max((err.offset or 1) - 1, 0)
            doubled = "; = is written ==" if _has_single_equals(text) else ""
            raise _refuse(text, place, f"{err.msg}{doubled}; {_HELP}") from None
        except (ValueError, RecursionError, MemoryError) as err:
            raise ConfigError(f"the filter cannot be read ({type(err).__name__}); {_HELP}") from None
        parser = _Parser(text)
        try:
            truth = parser.truth(tree)
        except RecursionError:
            raise _too_deep() from None
        return cls(text, tuple(parser.columns), truth)

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """Which rows of `table` to keep.

        Raises:
            ConfigError: A column is missing (the nearest is named) or holds another type than it is compared with.
        """
        self._check(table.column_names)
        try:
            kept: NDArray[np.bool_] = self._truth(table).fill_null(False).to_numpy()
        except RecursionError:
            raise _too_deep() from None
        return kept

    def rows_of(self, store: EmbeddingStore) -> NDArray[np.bool_]:
        """Which rows of a store to keep, from one piece of its metadata after another; raises as `mask`."""
        import pyarrow as pa

        self._check(["id", *(name for name in store.columns if name != "id")])
        known = _first_texts(store.pieces(self.columns))
        kept = [self.mask(pa.concat_tables([known, piece]))[len(known) :] for piece in store.pieces(self.columns)]
        return np.concatenate(kept)

    def _check(self, columns: Sequence[str]) -> None:
        for name in self.columns:
            if name not in columns:
                hint = nearest(name, columns) or (
                    f"; there are {', '.join(columns) or 'none'}: compare one of these in --where"
                )
                raise ConfigError(f"there is no column {name!r} to filter by{hint}")


def _first_texts(pieces: Iterable[pa.Table]) -> pa.Table:
    """A few rows in which each column of text has one, where it has any.

    Whether a column of text says true or false is a matter of all its rows: a piece of it may be blank.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    found: list[pa.Table] = []
    missing: set[str] | None = None
    for piece in pieces:
        if missing is None:
            missing = {name for name in piece.column_names if pa.types.is_string(piece.column(name).type)}
            found.append(piece.slice(0, 0))
        for name in sorted(missing):
            row = pc.index(pc.fill_null(pc.not_equal(piece.column(name), ""), False), True).as_py()
            if row >= 0:
                found.append(piece.slice(row, 1))
                missing.remove(name)
        if not missing:
            break
    return pa.concat_tables(found)


def _has_single_equals(text: str) -> bool:
    return "=" in text.replace("==", "").replace("!=", "").replace("<=", "").replace(">=", "")


def _too_deep() -> ConfigError:
    return ConfigError(f"the filter is nested too deep; {_HELP}")


def _refuse(text: str, place: int, why: str) -> ConfigError:
    near = text[place : place + 24]
    where = f"at character {place + 1}, before {near!r}" if near else "at its end"
    return ConfigError(f"the filter {text!r} cannot be read {where}: {why}")


class _Parser:
    """Turns the nodes of a filter into functions of a table, and collects the columns."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: dict[str, None] = {}

    def truth(self, node: ast.expr) -> Truth:
        import pyarrow.compute as pc

        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self.truth(value) for value in values]
                combine = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                return lambda table: reduce(combine, [part(table) for part in parts])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self.truth(operand)
                return lambda table: pc.invert(inner(table))
            case ast.Compare(left=left, ops=ops, comparators=others):
                three = zip([left, *others], ops, others, strict=False)
                pairs = [self._compare(*one) for one in three]
                return lambda table: reduce(pc.and_kleene, [pair(table) for pair in pairs])
        name = self._column(node)
        if name is None:
            raise self._refuse(node, f"wanted a comparison of a column; {_HELP}")
        return lambda table: self._alone(node, _as_truth(_values(table, name)))

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Truth:
        import pyarrow as pa
        import pyarrow.compute as pc

        name, other = self._column(left), self._column(right)
        match op:
            case ast.In() | ast.NotIn():
                if name is None:
                    raise self._refuse(left, "wanted a column before in")
                is_list = isinstance(right, ast.Tuple | ast.List | ast.Set)
                members = [_value(member) for member in right.elts] if is_list else [None]  # type: ignore[attr-defined]
                if None in members:
                    raise self._refuse(right, "wanted a list of values after in, such as ('a', 'b')")
            case ast.Is() | ast.IsNot():
                if name is None or not _is_null(right):
                    raise self._refuse(right, "is compares with null alone: COLUMN is null")
            case _:
                for side, column in ((left, name), (right, other)):
                    if column is None and _value(side) is None:
                        raise self._refuse(side, f"wanted a column, a number or a quoted text; {_HELP}")
                comparison = _COMPARISONS[type(op)]
                if name is None:
                    left, comparison, right = right, _MIRRORED.get(comparison, comparison), left
                    name, other = other, None
                if name is None:
                    raise self._refuse(right, f"no column is compared here; {_HELP}")

        def compared(table: pa.Table, values: pa.ChunkedArray) -> pa.ChunkedArray:
            match op:
                case ast.Is():
                    return values.is_null()
                case ast.IsNot():
                    return values.is_valid()
                case ast.In() | ast.NotIn():
                    none = pc.and_kleene(values.is_null(), values.is_valid())
                    equal = [pc.equal(values, _scalar(member, values.type)) for member in members]
                    found = reduce(pc.or_kleene, equal, none)
                    return found if isinstance(op, ast.In) else pc.invert(found)
            if other is not None:
                return getattr(pc, comparison)(values, _values(table, other))
            scalar = _scalar(_value(right), values.type)
            if pa.types.is_boolean(scalar.type):
                values = _as_truth(values)
            elif not pa.types.is_string(scalar.type) and not isinstance(op, ast.Eq | ast.NotEq):
                values = _as_numbers(values)
            return getattr(pc, comparison)(values, scalar)

        def truth(table: pa.Table) -> pa.ChunkedArray:
            values = _values(table, name)
            try:
                return compared(table, values)
            except (pa.ArrowException, TypeError, OverflowError):
                raise self._refuse(right, f"column {name!r} holds {values.type}; compare it with one") from None

        return truth

    def _alone(self, node: ast.expr, values: pa.ChunkedArray) -> pa.ChunkedArray:
        import pyarrow as pa

        if not pa.types.is_boolean(values.type):
            raise self._refuse(node, f"this column holds {values.type}; compare it with a value")
        return values

    def _column(self, node: ast.expr) -> str | None:
        """The column that a node names, if it names one."""
        match node:
            case ast.Name(id=name) if name not in _NULLS:
                self.columns[name] = None
                return name
            case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str(name))], keywords=[]):
                self.columns[name] = None
                return name
        return None

    def _refuse(self, node: ast.expr, why: str) -> ConfigError:
        """The error at a node; the parser counts bytes of UTF-8, line by line."""
        lines = self.text.splitlines(keepends=True)
        before = lines[node.lineno - 1].encode()[: node.col_offset].decode()
        return _refuse(self.text, sum(map(len, lines[: node.lineno - 1])) + len(before), why)


def _is_null(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id in _NULLS) or (isinstance(node, ast.Constant) and node.value is None)


def _value(node: ast.expr) -> str | int | float | bool | None:
    """The number, text or truth value that a node is; None where it is none of these."""
    match node:
        case ast.Constant(value=str() | int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as number)):
            if not isinstance(number, bool):
                return -number if isinstance(sign, ast.USub) else number
    return None


def _values(table: pa.Table, name: str) -> pa.ChunkedArray:
    import pyarrow as pa

    values = table.column(name)
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def _scalar(value: object, kind: pa.DataType) -> pa.Scalar:
    """A value as one of the column's kind, where it is of a kind that is written as text, such as a date."""
    import pyarrow as pa

    scalar = pa.scalar(value)
    return scalar.cast(kind) if pa.types.is_temporal(kind) and isinstance(value, str) else scalar


def _as_truth(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of text that says true or false, in any letter case, as truth values; any other as it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_string(values.type):
        return values
    lower = pc.utf8_lower(values)
    present = set(pc.unique(lower).to_pylist()) - {None, ""}
    if not present or not present <= {"true", "false"}:
        return values
    return pc.if_else(pc.equal(lower, ""), None, lower).cast(pa.bool_())


def _as_numbers(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of text as numbers, where all that is not empty is one; an error of pyarrow where it is not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_string(values.type):
        return values
    return pc.if_else(pc.equal(values, ""), None, values).cast(pa.float64())
