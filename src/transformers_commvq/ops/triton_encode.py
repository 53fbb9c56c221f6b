"""The encoder's kernels: coordinate descent on groups of four signs, sixteen signs of a tile of tokens at a time.

Passes of ops.encode.choose_signs in one order of rows, computed another way: instead of pushing every change into the
correlations of all signs, a block's correlations are made when its turn comes, from the signs as they then are (zero
while undecided):

    correlation of block = correlation with the target - signs gram[:, block]

so that nothing is updated in memory but the signs, one byte each. ``gram`` comes as the sum of two float16 matrices
(22 bits), because signs are exact in float16 and products of float16 run on matrix units everywhere; within a block of
sixteen signs it is read in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _column(tile, index, AT: tl.constexpr):
    """Column AT of (R, 4, 4) at each group that ``index`` marks: (R,)."""
    four = tl.arange(0, 4)
    marked = (four[None, :, None] == index) & (four[None, None, :] == AT)
    return tl.sum(tl.sum(tl.where(marked, tile, 0.0), 2), 1)


@triton.jit(do_not_specialize=["tokens", "padded", "passes"])
def improve_signs(
    target_ptr, signs_ptr, gram_high_ptr, gram_low_ptr, inner_ptr, scale_ptr, bits_ptr, tokens, padded, passes,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``passes`` of coordinate descent over the signs of a tile of tokens of one head; from zeros, the first is greedy.

    Grid (tiles, heads). target: float32 (heads, tokens, padded), correlations of C's rows with the vectors.
    signs: int8 (heads, tokens, padded), changed. gram_high, gram_low: float16 (heads, padded, padded),
    gram = (high + low) scale. inner: float32 (heads, padded / 16, 16, 16), the blocks on gram's diagonal.
    scale: float32 (heads,). bits: int32 (heads,). padded: a multiple of DEPTH.
    """
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    bits = tl.load(bits_ptr + head)
    scale = tl.load(scale_ptr + head)
    line = (head * tokens + token) * padded
    square = head * padded * padded
    sixteen = tl.arange(0, 16)
    deep = tl.arange(0, DEPTH)
    for _ in range(passes):
        for block in range(0, bits, 16):
            column = block + sixteen
            change = tl.zeros((TOKENS, 16), tl.float32)
            for depth in range(0, bits, DEPTH):
                at = square + (depth + deep)[:, None] * padded + column[None, :]
                part = tl.load(signs_ptr + line[:, None] + (depth + deep)[None, :], mask=inside[:, None], other=0)
                part = part.to(tl.float16)
                change = tl.dot(part, tl.load(gram_high_ptr + at), change)
                change = tl.dot(part, tl.load(gram_low_ptr + at), change)
            target = tl.load(target_ptr + line[:, None] + column[None, :], mask=inside[:, None], other=0.0)
            old = tl.load(signs_ptr + line[:, None] + column[None, :], mask=inside[:, None], other=0)
            left = tl.reshape(target - change * scale, (TOKENS, 4, 4))
            chosen = tl.reshape(old.to(tl.float32), (TOKENS, 4, 4))
            inner = inner_ptr + (head * padded + block) * 16
            for group in range(4):
                left, chosen = _choose(left, chosen, inner, group)
            new = tl.reshape(chosen, (TOKENS, 16)).to(tl.int8)
            keep = inside[:, None] & (column < bits)[None, :]
            # The tile's signs are read again by other threads of this program.
            tl.debug_barrier()
            tl.store(signs_ptr + line[:, None] + column[None, :], new, mask=keep)
            tl.debug_barrier()


@triton.jit
def _choose(left, chosen, inner_ptr, group):
    """The best four signs of a group, the others fixed.

    left: correlations with the residual, (TOKENS, 4, 4). inner: the block's own part of gram, (16, 16).
    """
    candidate = tl.arange(0, 16)
    four = tl.arange(0, 4)
    p0 = (1 - 2 * (candidate & 1)).to(tl.float32)
    p1 = (1 - 2 * ((candidate >> 1) & 1)).to(tl.float32)
    p2 = (1 - 2 * ((candidate >> 2) & 1)).to(tl.float32)
    p3 = (1 - 2 * ((candidate >> 3) & 1)).to(tl.float32)
    rows = inner_ptr + 64 * group
    row0 = rows + 4 * group
    row1 = row0 + 16
    row2 = row1 + 16
    row3 = row2 + 16
    g00 = tl.load(row0)
    g01 = tl.load(row0 + 1)
    g02 = tl.load(row0 + 2)
    g03 = tl.load(row0 + 3)
    g11 = tl.load(row1 + 1)
    g12 = tl.load(row1 + 2)
    g13 = tl.load(row1 + 3)
    g22 = tl.load(row2 + 2)
    g23 = tl.load(row2 + 3)
    g33 = tl.load(row3 + 3)
    s0 = _column(chosen, group, 0)
    s1 = _column(chosen, group, 1)
    s2 = _column(chosen, group, 2)
    s3 = _column(chosen, group, 3)
    t0 = _column(left, group, 0) + s0 * g00 + s1 * g01 + s2 * g02 + s3 * g03
    t1 = _column(left, group, 1) + s0 * g01 + s1 * g11 + s2 * g12 + s3 * g13
    t2 = _column(left, group, 2) + s0 * g02 + s1 * g12 + s2 * g22 + s3 * g23
    t3 = _column(left, group, 3) + s0 * g03 + s1 * g13 + s2 * g23 + s3 * g33
    cross = p0 * p1 * g01 + p0 * p2 * g02 + p0 * p3 * g03 + p1 * p2 * g12 + p1 * p3 * g13 + p2 * p3 * g23
    cost = g00 + g11 + g22 + g33 + 2 * cross
    gain = t0[:, None] * p0[None, :] + t1[:, None] * p1[None, :] + t2[:, None] * p2[None, :] + t3[:, None] * p3[None, :]
    best = tl.argmax(2 * gain - cost[None, :], 1)
    n0 = (1 - 2 * (best & 1)).to(tl.float32)
    n1 = (1 - 2 * ((best >> 1) & 1)).to(tl.float32)
    n2 = (1 - 2 * ((best >> 2) & 1)).to(tl.float32)
    n3 = (1 - 2 * ((best >> 3) & 1)).to(tl.float32)
    # Push the change into the block's other groups: rows of the block's gram as (4, 4).
    columns = four[:, None] * 4 + four[None, :]
    left -= (n0 - s0)[:, None, None] * tl.load(rows + columns)[None, :, :]
    left -= (n1 - s1)[:, None, None] * tl.load(rows + 16 + columns)[None, :, :]
    left -= (n2 - s2)[:, None, None] * tl.load(rows + 32 + columns)[None, :, :]
    left -= (n3 - s3)[:, None, None] * tl.load(rows + 48 + columns)[None, :, :]
    at = four[None, None, :]
    new = tl.where(at == 0, n0[:, None, None], n1[:, None, None])
    new = tl.where(at == 2, n2[:, None, None], new)
    new = tl.where(at == 3, n3[:, None, None], new)
    return left, tl.where(four[None, :, None] == group, new, chosen)


@triton.jit(do_not_specialize=["tokens", "start", "count", "padded", "codes_b", "codes_t"])
def pack_signs(
    signs_ptr, codes_ptr, bits_ptr, first_ptr, start, count, tokens, padded, codes_b, codes_t,
    TOKENS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Signs of ``count`` tokens from ``start`` of every row of the batch, into their bytes; grid (tiles, heads, batch).

    signs: int8 (heads, tokens, padded), tokens = batch * count. codes: uint8 (batch, all tokens, bytes).
    first: int32 (heads,), each head's first byte.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < count
    bytes = tl.load(bits_ptr + head) // 8
    line = (head.to(tl.int64) * tokens + batch * count + token) * padded
    byte = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    out = codes_ptr + batch * codes_b + (start + token).to(tl.int64) * codes_t + tl.load(first_ptr + head)
    for first in range(0, bytes, BYTES):
        keep = inside[:, None] & (first + byte < bytes)[None, :]
        at = line[:, None, None] + ((first + byte) * 8)[None, :, None] + bit[None, None, :]
        signs = tl.load(signs_ptr + at, mask=keep[:, :, None], other=1)
        octets = tl.sum(tl.where(signs < 0, 1 << bit[None, None, :], 0), 2)
        tl.store(out[:, None] + (first + byte)[None, :], octets.to(tl.uint8), mask=keep)
