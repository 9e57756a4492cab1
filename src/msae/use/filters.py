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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from msae.base.errors import ConfigError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

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
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}
_NULLS = ("null", "NULL")


@dataclass(frozen=True)
class Filter:
    """A filter that is well formed; whether it fits a table shows when it meets one."""

    text: str
    tree: ast.expr = field(repr=False)
    columns: tuple[str, ...]
    """Names of the columns it asks for."""

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
        columns: dict[str, None] = {}
        try:
            _check(text, tree, columns)
        except RecursionError:
            raise ConfigError(f"the filter is nested too deep; {_HELP}") from None
        return cls(text, tree, tuple(columns))

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """Which rows of `table` to keep.

        Raises:
            ConfigError: A column is missing (the nearest is named) or holds another type than it is compared with.
        """
        for name in self.columns:
            if name not in table.column_names:
                hint = nearest(name, table.column_names) or (
                    f"; there are {', '.join(table.column_names) or 'none'}: compare one of these in --where"
                )
                raise ConfigError(f"there is no column {name!r} to filter by{hint}")
        kept = _Evaluation(self.text, table).truth(self.tree)
        result: NDArray[np.bool_] = kept.fill_null(False).to_numpy()
        return result


def _has_single_equals(text: str) -> bool:
    return "=" in text.replace("==", "").replace("!=", "").replace("<=", "").replace(">=", "")


def _refuse(text: str, place: int, why: str) -> ConfigError:
    near = text[place : place + 24]
    where = f"at character {place + 1}, before {near!r}" if near else "at its end"
    return ConfigError(f"the filter {text!r} cannot be read {where}: {why}")


def _place(text: str, node: ast.expr) -> int:
    """Number of the character where a node begins; the parser counts bytes of UTF-8, line by line."""
    lines = text.splitlines(keepends=True)
    before = lines[node.lineno - 1].encode()[: node.col_offset].decode()
    return sum(map(len, lines[: node.lineno - 1])) + len(before)


def _check(text: str, node: ast.expr, columns: dict[str, None]) -> None:
    """Refuse what is not on the list, and collect the columns."""
    match node:
        case ast.BoolOp(values=parts):
            for part in parts:
                _check(text, part, columns)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            _check(text, part, columns)
        case ast.Compare(left=left, ops=ops, comparators=others):
            _check_compare(text, [left, *others], ops, columns)
        case _ if (name := _column(node)) is not None:
            columns[name] = None
        case _:
            raise _refuse(text, _place(text, node), f"wanted a comparison of a column; {_HELP}")


def _check_compare(text: str, sides: list[ast.expr], ops: list[ast.cmpop], columns: dict[str, None]) -> None:
    for left, op, right in zip(sides, ops, sides[1:], strict=False):
        names = [name for side in (left, right) if (name := _column(side)) is not None]
        columns |= dict.fromkeys(names)
        is_list = isinstance(right, ast.Tuple | ast.List | ast.Set)
        if isinstance(op, ast.In | ast.NotIn):
            if _column(left) is None:
                raise _refuse(text, _place(text, left), "wanted a column before in")
            if not is_list or not all(map(_is_value, right.elts)):  # type: ignore[attr-defined]
                raise _refuse(text, _place(text, right), "wanted a list of values after in, such as ('a', 'b')")
        elif isinstance(op, ast.Is | ast.IsNot):
            if _column(left) is None or not _is_null(right):
                raise _refuse(text, _place(text, right), "is compares with null alone: COLUMN is null")
        else:
            for side in (left, right):
                if _column(side) is None and not _is_value(side):
                    raise _refuse(text, _place(text, side), f"wanted a column, a number or a quoted text; {_HELP}")
            if not names:
                raise _refuse(text, _place(text, left), f"no column is compared here; {_HELP}")


def _column(node: ast.expr) -> str | None:
    """The column that a node names, if it names one."""
    match node:
        case ast.Name(id=name) if name not in _NULLS:
            return name
        case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str(name))], keywords=[]):
            return name
    return None


def _is_null(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id in _NULLS) or (isinstance(node, ast.Constant) and node.value is None)


def _is_value(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, str | int | float)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=value)):
            return isinstance(value, int | float) and not isinstance(value, bool)
    return False


def _value(node: ast.expr) -> str | int | float | bool:
    if isinstance(node, ast.UnaryOp):
        number = _value(node.operand)
        assert not isinstance(number, str)
        return -number if isinstance(node.op, ast.USub) else number
    assert isinstance(node, ast.Constant) and isinstance(node.value, str | int | float)
    return node.value


class _Evaluation:
    """A checked filter over the columns of one table."""

    def __init__(self, text: str, table: pa.Table) -> None:
        self.text, self.table = text, table

    def truth(self, node: ast.expr) -> pa.ChunkedArray:
        """True, false or null for each row."""
        import pyarrow as pa
        import pyarrow.compute as pc

        match node:
            case ast.BoolOp(op=op, values=parts):
                combine: Callable[[Any, Any], Any] = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                result = self.truth(parts[0])
                for part in parts[1:]:
                    result = combine(result, self.truth(part))
                return result
            case ast.UnaryOp(operand=part):
                return pc.invert(self.truth(part))
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                results = [self._compare(*three) for three in zip(sides, ops, others, strict=False)]
                result = results[0]
                for other in results[1:]:
                    result = pc.and_kleene(result, other)
                return result
        values = _as_truth(self._column(node))
        if not pa.types.is_boolean(values.type):
            raise _refuse(
                self.text, _place(self.text, node), f"this column holds {values.type}; compare it with a value"
            )
        return values

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pa.ChunkedArray:
        import pyarrow as pa
        import pyarrow.compute as pc

        if _column(left) is None:
            left, op, right = right, _MIRRORED[type(op)](), left
        values = self._column(left)
        try:
            match op:
                case ast.Is():
                    return values.is_null()
                case ast.IsNot():
                    return values.is_valid()
                case ast.In() | ast.NotIn():
                    members = [self._scalar(part, values.type) for part in right.elts]  # type: ignore[attr-defined]
                    equal = [pc.equal(values, member) for member in members]
                    found = equal[0] if equal else pc.and_kleene(values.is_null(), values.is_valid())
                    for other in equal[1:]:
                        found = pc.or_kleene(found, other)
                    return pc.invert(found) if isinstance(op, ast.NotIn) else found
            if _column(right) is not None:
                other = self._column(right)
            else:
                other = self._scalar(right, values.type)
                if pa.types.is_boolean(other.type):
                    values = _as_truth(values)
                elif pa.types.is_integer(other.type) or pa.types.is_floating(other.type):
                    values = values if isinstance(op, ast.Eq | ast.NotEq) else _as_numbers(values)
            return getattr(pc, _COMPARISONS[type(op)])(values, other)
        except (pa.ArrowException, TypeError, OverflowError):
            name = _column(left)
            raise _refuse(
                self.text, _place(self.text, right), f"column {name!r} holds {values.type}; compare it with one"
            ) from None

    def _scalar(self, node: ast.expr, kind: pa.DataType) -> pa.Scalar:
        """A value as one of the column's kind, where it is of a kind that is written as text, such as a date."""
        import pyarrow as pa

        value = _value(node)
        scalar = pa.scalar(value)
        if pa.types.is_temporal(kind) and isinstance(value, str):
            return scalar.cast(kind)
        return scalar

    def _column(self, node: ast.expr) -> pa.ChunkedArray:
        import pyarrow as pa

        name = _column(node)
        values = self.table.column(name)
        if pa.types.is_dictionary(values.type):
            return values.cast(values.type.value_type)
        return values


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
