"""The block of numbers that all threads of an attention step read: sizes, addresses, and what has been claimed.

It is one int64 array, because a C function that any thread pool can run takes one pointer. Python writes it; the loops
make arrays of it again. Whoever writes an address keeps its array alive until the step is done.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

INLINE = {"inline": "always", "error_model": "numpy"}


class Field(IntEnum):
    """What stands where. Names that end in _AT are addresses of contiguous arrays.

    Of a step: CLAIMED tasks so far; TASKS in all, the first CODED_TASKS over codes, the others over exact tokens;
    SPLITS of the codes; BATCH; HEADS and GROUP (query heads of a KV head); COUNT of queries.

    QUERY_AT: float32 (batch, query heads, count, head_dim), rotated.
    BIAS_AT: float32 (.._BATCH, .._HEADS, .._COUNT, .._TOKENS), added to scores of codes; the first three may be 1, the
        last is 0 for none. EXACT_BIAS_AT: the same for exact tokens.
    Exact tokens come in two parts, FIRST and MORE: .._TOKENS of each (0 for none), keys and values at .._KEYS_AT and
        .._VALUES_AT, float32 or (BRIEF) bfloat16, with their .._BATCH, .._HEAD and .._TOKEN strides in elements.
    FACTOR, SOFTCAP: the attention's scaling and the bound of its scores (0 for none), times log2(e); bits of a float64.
    SUMS_AT: float32 (splits, batch, heads, rows * MOST_VALUE_BITS), scratch: sums of the values' signs by weight.
    TOPS_AT, MASS_AT: float32 (splits, batch, heads, rows), scratch: greatest score, and sum of 2 ** (score - top).
    EXACT_SUMS_AT, EXACT_TOPS_AT, EXACT_MASS_AT: the same of exact tokens, (batch, heads, asked rows, head_dim or none).
    OUT_AT, LSE_AT: float32 (batch, query heads, count, VALUE_DIM), (batch, query heads, count), written.

    Held, from HELD on, as long as the codes stay: uint8 codes of token t of row b begin at KEY_CODES_AT + b *
    KEY_STRIDE + t * KEY_WIDTH, the values' likewise; TOKENS of them; KEY_FIRST_AT, KEY_BITS_AT: int64 (heads,), a
    head's first bit and its number of bits, the values' likewise; MOST_VALUE_BITS of a head; HEAD_DIM, VALUE_DIM.
    TABLES_AT: int16 (groups of 4 bits, 16, dim), sums of codebook rows for every value of every 4 bits of all heads.
    ORDER_AT: int64 (dim,), the element of a head that stands at each place of a table's entry, or -1.
    SCALE_AT: float32 (heads, dim), what a unit of the tables is worth.
    COS_AT, SIN_AT: float32 (OFFSETS, padded pairs), rotation by an offset within a group of OFFSETS tokens.
    START_COS_AT, START_SIN_AT: float32 (START_ROWS, groups, pairs), rotation of each group's first token.
    BROKEN_AT: bool (groups,), True where positions are not consecutive; such tokens are rotated by
    WHOLE_COS_AT, WHOLE_SIN_AT: float32 (START_ROWS, tokens, padded pairs).
    HIDDEN_AT: int64 (HIDDEN_ROWS, 2), from and to which token none must be seen; no rows for none.
    SIGNS_AT: float32 (256, 8), the signs of every byte.
    VECTORS_AT, MEAN_AT: float32 (sum of value bits, VALUE_DIM), (heads, VALUE_DIM), the values' codebook.

    Behind the block stands, for each row of the batch and KV head, how many of its tasks are done.
    """

    (
        CLAIMED, TASKS, CODED_TASKS, SPLITS, BATCH, HEADS, GROUP, COUNT, BRIEF, FACTOR, SOFTCAP, QUERY_AT,
        BIAS_AT, BIAS_BATCH, BIAS_HEADS, BIAS_COUNT, BIAS_TOKENS,
        EXACT_BIAS_AT, EXACT_BIAS_BATCH, EXACT_BIAS_HEADS, EXACT_BIAS_COUNT, EXACT_BIAS_TOKENS,
        FIRST_TOKENS, FIRST_KEYS_AT, FIRST_KEYS_BATCH, FIRST_KEYS_HEAD, FIRST_KEYS_TOKEN,
        FIRST_VALUES_AT, FIRST_VALUES_BATCH, FIRST_VALUES_HEAD, FIRST_VALUES_TOKEN,
        MORE_TOKENS, MORE_KEYS_AT, MORE_KEYS_BATCH, MORE_KEYS_HEAD, MORE_KEYS_TOKEN,
        MORE_VALUES_AT, MORE_VALUES_BATCH, MORE_VALUES_HEAD, MORE_VALUES_TOKEN,
        SUMS_AT, TOPS_AT, MASS_AT, EXACT_SUMS_AT, EXACT_TOPS_AT, EXACT_MASS_AT, OUT_AT, LSE_AT,
        KEY_CODES_AT, KEY_STRIDE, KEY_WIDTH, VALUE_CODES_AT, VALUE_STRIDE, VALUE_WIDTH, TOKENS,
        KEY_FIRST_AT, KEY_BITS_AT, VALUE_FIRST_AT, VALUE_BITS_AT, MOST_VALUE_BITS, HEAD_DIM, VALUE_DIM,
        TABLES_AT, ORDER_AT, SCALE_AT, COS_AT, SIN_AT, START_COS_AT, START_SIN_AT, START_ROWS, BROKEN_AT,
        WHOLE_COS_AT, WHOLE_SIN_AT, HIDDEN_AT, HIDDEN_ROWS, SIGNS_AT, VECTORS_AT, MEAN_AT,
    ) = range(78)  # fmt: skip


HELD = int(Field.KEY_CODES_AT)
SIZE = len(Field)


def float_bits(x: float) -> int:
    """A float64's bits as an int64."""
    return struct.unpack("q", struct.pack("d", x))[0]


@intrinsic
def _pointer(typingctx, address):
    def build(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@intrinsic
def as_float(typingctx, bits):
    """The float64 of these bits."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), build


@intrinsic
def fetch_add(typingctx, array, at):
    """Add 1 to array[at], int64, as one step among all threads; returns what it was. What was written before is seen
    by whoever counts later."""

    def build(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        index = context.cast(builder, args[1], signature.args[1], types.intp)
        return builder.atomic_rmw("add", builder.gep(data, [index]), ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(array, at), build


@njit(**INLINE)
def floats(address, shape):
    """The float32 array at an address."""
    return carray(_pointer(address), shape, np.float32)


@njit(**INLINE)
def shorts(address):
    """int16 numbers from an address on, any number of them."""
    return carray(_pointer(address), (1,), np.int16)


@njit(**INLINE)
def octets(address):
    """uint8 numbers from an address on."""
    return carray(_pointer(address), (1,), np.uint8)


@njit(**INLINE)
def integers(address):
    """int64 numbers from an address on."""
    return carray(_pointer(address), (1,), np.int64)
