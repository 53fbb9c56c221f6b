"""Sign codes inside Triton kernels: packed bytes to words, words to signs that a matrix unit takes.

A 32-bit word of a code holds 32 signs. They are unpacked two at a time, bits i and i + 16 into the two float16 halves
of a register (one shift, one three-input logic operation), so a kernel sees a head's signs in this order:

    column 32 w + 2 m + half of the tile  <->  sign 32 w + m + 16 half of the code

``COLUMN_ORDER`` says so to whoever lays out the codebook's rows (triton_tables).
"""

from __future__ import annotations

import triton
import triton.language as tl

WORD = 32
COLUMN_ORDER = [m + 16 * half for m in range(16) for half in (0, 1)]


@triton.jit
def load_words(pointer, rows, row_mask, first, bytes_left, WORDS: tl.constexpr):
    """Words of one head's codes.

    rows: int64 (R,), byte offset of each token's row. first: the first byte wanted, counted in the row.
    bytes_left: bytes of this head from there on; what lies past them reads as zero.
    Returns int32 (R, WORDS).
    """
    word = tl.arange(0, WORDS) * 4
    at = pointer + (rows[:, None] + (first + word)[None, :])
    out = tl.zeros((rows.shape[0], WORDS), tl.int32)
    for i in tl.static_range(4):
        inside = row_mask[:, None] & (word + i < bytes_left)[None, :]
        out |= tl.load(at + i, mask=inside, other=0).to(tl.int32) << (8 * i)
    return out


@triton.jit
def _two(words, BIT: tl.constexpr):
    # 1.0 is 0x3C00 in float16; a set bit becomes its sign bit.
    return ((words << (15 - BIT)) & -0x7FFF8000) ^ 0x3C003C00


@triton.jit
def _four(words, BIT: tl.constexpr):
    return tl.join(_two(words, BIT), _two(words, BIT + 8))


@triton.jit
def _eight(words, BIT: tl.constexpr):
    return tl.join(_four(words, BIT), _four(words, BIT + 4))


@triton.jit
def _sixteen(words, BIT: tl.constexpr):
    return tl.join(_eight(words, BIT), _eight(words, BIT + 2))


@triton.jit
def unpack_words(words):
    """int32 (R, W) -> float16 (R, 32 W) in {-1, +1}, columns in ``COLUMN_ORDER``."""
    rows: tl.constexpr = words.shape[0]
    columns: tl.constexpr = words.shape[1]
    pairs = tl.reshape(tl.join(_sixteen(words, 0), _sixteen(words, 1)), (rows, columns * 16))
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), (rows, columns * 32))
