"""Sixteen float32 numbers in registers, as a numba type: what the loops of `cpu` are written in.

Numba's own vectoriser keeps a running sum of gathered rows in memory and uses half-width registers on AVX-512. With an
explicit vector type LLVM keeps such sums in registers and splits the vector for whatever the machine has.
This is the one place that builds LLVM code by hand, so the one that a new llvmlite can break; `msae.sae.kernels` then
falls back to the reference.
"""

# The arguments are numba's: it wants all of them named, used or not, and has no types to offer for them.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WIDTH = 16
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_EXACT = ("contract",)  # one rounding for a * b + c where the machine can; nothing that would lose a NaN


class Lanes(types.Type):
    """`WIDTH` float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{WIDTH}")


lanes = Lanes()


def _builtin(function: Any) -> Any:
    """`function` as a numba intrinsic: its types and, inside, the code to build for a call."""
    return intrinsic(function)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VECTOR)


def _address(context, builder, array_type, array, offset):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())


def _spread(builder, scalar):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH))


@_builtin
def load(typing, flat, offset):
    """`flat[offset : offset + WIDTH]` of a flat float32 array."""

    def build(context, builder, signature, args):
        return builder.load(_address(context, builder, signature.args[0], *args), align=4)

    return lanes(flat, types.intp), build


@_builtin
def store(typing, flat, offset, values):
    """`flat[offset : offset + WIDTH] = values`."""

    def build(context, builder, signature, args):
        builder.store(args[2], _address(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(flat, types.intp, lanes), build


@_builtin
def zeros(typing):
    """`WIDTH` zeros."""

    def build(context, builder, signature, args):
        return ir.Constant(_VECTOR, [0.0] * WIDTH)

    return lanes(), build


@_builtin
def add(typing, a, b):
    """`a + b`, each a vector."""

    def build(context, builder, signature, args):
        return builder.fadd(*args)

    return lanes(lanes, lanes), build


@_builtin
def sub(typing, a, b):
    """`a - b`, each a vector."""

    def build(context, builder, signature, args):
        return builder.fsub(*args)

    return lanes(lanes, lanes), build


@_builtin
def fma(typing, accumulator, a, b):
    """`accumulator + a * b`, each a vector."""

    def build(context, builder, signature, args):
        return builder.fadd(args[0], builder.fmul(args[1], args[2], flags=_EXACT), flags=_EXACT)

    return lanes(lanes, lanes, lanes), build


@_builtin
def axpy(typing, accumulator, scalar, vector):
    """`accumulator + scalar * vector`."""

    def build(context, builder, signature, args):
        product = builder.fmul(_spread(builder, args[1]), args[2], flags=_EXACT)
        return builder.fadd(args[0], product, flags=_EXACT)

    return lanes(lanes, types.float32, lanes), build


@_builtin
def total(typing, vector):
    """The sum of the vector's numbers."""

    def build(context, builder, signature, args):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _VECTOR])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{WIDTH}f32")
        # "reassoc" lets LLVM add in a tree instead of one by one; the order is fixed when it is compiled.
        return builder.call(function, [ir.Constant(ir.FloatType(), -0.0), args[0]], fastmath=("reassoc", "contract"))

    return types.float32(lanes), build
