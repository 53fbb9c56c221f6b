"""Vector values for numba: what its scalar loops cannot say reliably, said once and portably.

A value of type ``Lanes(count, width, element)`` is ``count`` vectors of ``width`` numbers in registers. The operations
are written in LLVM's generic vectors, so any CPU runs them with the vector instructions it has (AVX, NEON, ...). Sizes
are compile-time constants and all loops over them are unrolled when a kernel is built.

Addresses are elements of 1-d contiguous arrays; nothing is bounds-checked.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

WIDTH = 8  # float32 numbers of a vector: one AVX register, two of NEON
_F32, _I32, _I16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_FAST = ("fast",)


class Lanes(types.Type):
    """``count`` vectors of ``width`` elements each, ``"f4"`` or ``"i2"``."""

    def __init__(self, count: int, width: int, element: str):
        self.count, self.width, self.element = count, width, element
        super().__init__(name=f"Lanes({count}, {width}, {element})")

    @property
    def llvm(self) -> ir.Type:
        return ir.ArrayType(ir.VectorType(_F32 if self.element == "f4" else _I16, self.width), self.count)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


def _address(context, builder, kind, value, index):
    """Pointer to element ``index`` of a 1-d contiguous array."""
    data = context.make_array(kind)(context, builder, value).data
    return builder.gep(data, [index])


def _load(builder, pointer, element, width, offset, align):
    """A vector of ``width`` elements at ``offset`` elements behind ``pointer``."""
    at = builder.gep(pointer, [ir.Constant(ir.IntType(64), offset)])
    at = builder.bitcast(at, ir.VectorType(element, width).as_pointer())
    return builder.load(at, align=align, typ=ir.VectorType(element, width))


def _store(builder, vector, pointer, offset, align):
    at = builder.gep(pointer, [ir.Constant(ir.IntType(64), offset)])
    builder.store(vector, builder.bitcast(at, vector.type.as_pointer()), align=align)


def _splat(builder, scalar, width):
    lane = builder.insert_element(
        ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined), scalar, ir.Constant(_I32, 0)
    )
    zeros = ir.Constant(ir.VectorType(_I32, width), [0] * width)
    return builder.shuffle_vector(lane, ir.Constant(lane.type, ir.Undefined), zeros)


def _multiply_add(builder, a, b, c):
    """a * b + c; contracted to one instruction where the CPU has it."""
    return builder.fadd(builder.fmul(a, b, flags=_FAST), c, flags=_FAST)


def _part(builder, vector, start, width):
    mask = ir.Constant(ir.VectorType(_I32, width), list(range(start, start + width)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _sum(builder, vector):
    """Sum of a vector's elements, by halves."""
    width = vector.type.count
    while width > 1:
        width //= 2
        vector = builder.fadd(_part(builder, vector, 0, width), _part(builder, vector, width, width), flags=_FAST)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@intrinsic(prefer_literal=True)
def zero_rows(typingctx, rows):
    """``rows`` vectors of WIDTH float32 zeros. rows: a compile-time constant."""
    if not isinstance(rows, types.IntegerLiteral):
        return None
    out = Lanes(rows.literal_value, WIDTH, "f4")

    def build(context, builder, signature, args):
        return ir.Constant(out.llvm, None)

    return out(rows), build


@intrinsic
def add_weighted(typingctx, sums, table, row, weights, at, stride):
    """sums[r] + weights[at + r * stride] * table[row], for every r.

    table: float32, rows of WIDTH laid end to end. weights: float32.
    """
    signature = sums(sums, table, row, weights, at, stride)

    def build(context, builder, signature, args):
        total, table_, row_, weights_, at_, stride_ = args
        _, kind, row_kind, weights_kind, at_kind, stride_kind = signature.args
        row_ = context.cast(builder, row_, row_kind, types.intp)
        step = context.cast(builder, stride_, stride_kind, types.intp)
        place = builder.mul(row_, ir.Constant(row_.type, WIDTH))
        vector = _load(builder, _address(context, builder, kind, table_, place), _F32, WIDTH, 0, 4)
        index = context.cast(builder, at_, at_kind, types.intp)
        data = context.make_array(weights_kind)(context, builder, weights_).data
        for r in range(signature.return_type.count):
            weight = builder.load(builder.gep(data, [index]), typ=_F32)
            index = builder.add(index, step)
            old = builder.extract_value(total, r)
            new = _multiply_add(builder, _splat(builder, weight, WIDTH), vector, old)
            total = builder.insert_value(total, new, r)
        return total

    return signature, build


@intrinsic
def add_to_memory(typingctx, sums, array, at):
    """array[at + r * WIDTH : ...] += sums[r], for every r. array: float32."""
    signature = types.void(sums, array, at)

    def build(context, builder, signature, args):
        total, array_, at_ = args
        kind, array_kind, at_kind = signature.args
        pointer = _address(context, builder, array_kind, array_, context.cast(builder, at_, at_kind, types.intp))
        for r in range(kind.count):
            old = _load(builder, pointer, _F32, WIDTH, r * WIDTH, 4)
            _store(builder, builder.fadd(old, builder.extract_value(total, r), flags=_FAST), pointer, r * WIDTH, 4)
        return context.get_dummy_value()

    return signature, build


@intrinsic(prefer_literal=True)
def load_shorts(typingctx, count, array, at):
    """``count`` vectors of 2 * WIDTH int16 from array[at]. count: a compile-time constant."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    out = Lanes(count.literal_value, 2 * WIDTH, "i2")

    def build(context, builder, signature, args):
        _, kind, at_kind = signature.args
        pointer = _address(context, builder, kind, args[1], context.cast(builder, args[2], at_kind, types.intp))
        total = ir.Constant(out.llvm, ir.Undefined)
        for v in range(out.count):
            total = builder.insert_value(total, _load(builder, pointer, _I16, out.width, v * out.width, 2), v)
        return total

    return out(count, array, at), build


@intrinsic
def add_shorts(typingctx, sums, array, at):
    """sums + the as many int16 from array[at]."""

    def build(context, builder, signature, args):
        shape, kind, at_kind = signature.args
        pointer = _address(context, builder, kind, args[1], context.cast(builder, args[2], at_kind, types.intp))
        total = args[0]
        for v in range(shape.count):
            new = _load(builder, pointer, _I16, shape.width, v * shape.width, 2)
            total = builder.insert_value(total, builder.add(builder.extract_value(total, v), new), v)
        return total

    return sums(sums, array, at), build


@intrinsic(prefer_literal=True)
def rotated_products(typingctx, key, pairs, rows, width, cos, sin, turn, query, at, out, place, stride):
    """out[place + r * stride] = query row r . R key, for every r; R rotates the first ``pairs`` pairs.

    key: 2 * pairs + rest int16 as ``load_shorts`` gives them: real parts, imaginary parts, rest.
    pairs, rows, width: compile-time constants; pairs and width (elements of a query row) multiples of WIDTH.
    cos, sin: float32; the rotation begins at element ``turn`` of both.
    query: float32, rows of ``width`` elements from element ``at`` on.
    """
    if not all(isinstance(n, types.IntegerLiteral) for n in (pairs, rows, width)):
        return None
    shape, half, count, wide = key, pairs.literal_value, rows.literal_value, width.literal_value

    def build(context, builder, signature, args):
        kinds = signature.args
        cast = lambda i: context.cast(builder, args[i], kinds[i], types.intp)  # noqa: E731
        turn_at, query_at, place_at, step = cast(6), cast(8), cast(10), cast(11)
        c_at, s_at = (_address(context, builder, kinds[i], args[i], turn_at) for i in (4, 5))
        q_at = _address(context, builder, kinds[7], args[7], query_at)

        def key_part(start):
            short = _part(builder, builder.extract_value(args[0], start // shape.width), start % shape.width, WIDTH)
            return builder.sitofp(builder.sext(short, ir.VectorType(_I32, WIDTH)), ir.VectorType(_F32, WIDTH))

        totals = [None] * count

        def add(part, start):
            for r in range(count):
                q = _load(builder, q_at, _F32, WIDTH, r * wide + start, 4)
                totals[r] = (
                    builder.fmul(q, part, flags=_FAST)
                    if totals[r] is None
                    else _multiply_add(builder, q, part, totals[r])
                )

        for start in range(0, half, WIDTH):
            x, y = key_part(start), key_part(half + start)
            c, s = (_load(builder, pointer, _F32, WIDTH, start, 4) for pointer in (c_at, s_at))
            minus = builder.fmul(y, s, flags=_FAST)
            add(builder.fsub(builder.fmul(x, c, flags=_FAST), minus, flags=_FAST), start)
            add(_multiply_add(builder, x, s, builder.fmul(y, c, flags=_FAST)), half + start)
        for start in range(2 * half, wide, WIDTH):
            add(key_part(start), start)
        data = context.make_array(kinds[9])(context, builder, args[9]).data
        for r in range(count):
            builder.store(_sum(builder, totals[r]), builder.gep(data, [place_at]))
            place_at = builder.add(place_at, step)
        return context.get_dummy_value()

    signature = types.void(key, pairs, rows, width, cos, sin, turn, query, at, out, place, stride)
    return signature, build


# 2^f = sum c_k f^k on [-0.5, 0.5]: Taylor's series, relative error below 2e-7 there.
_EXP2 = [math.log(2) ** k / math.factorial(k) for k in range(7)]


@intrinsic
def exp2_minus(typingctx, array, at, shift):
    """Write 2 ** (array[i] - shift) over array[i], for WIDTH numbers from ``at`` on; returns their sum.

    Differences are at most 0; those below -126 give 0.
    """
    signature = types.float32(array, at, types.float32)

    def build(context, builder, signature, args):
        kind, at_kind, _ = signature.args
        vector, whole = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH)
        constant = lambda x: ir.Constant(vector, [x] * WIDTH)  # noqa: E731
        pointer = _address(context, builder, kind, args[0], context.cast(builder, args[1], at_kind, types.intp))
        x = builder.fsub(_load(builder, pointer, _F32, WIDTH, 0, 4), _splat(builder, args[2], WIDTH))
        tiny = builder.fcmp_unordered("<", x, constant(-126.0))  # also where x is -inf
        x = builder.select(tiny, constant(-126.0), x)
        nearest = builder.fptosi(builder.fsub(x, constant(0.5)), whole)  # x <= 0: truncation rounds to the nearest
        f = builder.fsub(x, builder.sitofp(nearest, vector))
        power = constant(_EXP2[-1])
        for c in reversed(_EXP2[:-1]):
            power = _multiply_add(builder, power, f, constant(c))
        exponent = builder.shl(
            builder.add(nearest, ir.Constant(whole, [127] * WIDTH)), ir.Constant(whole, [23] * WIDTH)
        )
        value = builder.fmul(power, builder.bitcast(exponent, vector))
        value = builder.select(tiny, constant(0.0), value)
        _store(builder, value, pointer, 0, 4)
        return _sum(builder, value)

    return signature, build


__all__ = [
    "WIDTH", "Lanes", "add_shorts", "add_to_memory", "add_weighted", "exp2_minus", "load_shorts", "rotated_products",
    "zero_rows",
]  # fmt: skip
