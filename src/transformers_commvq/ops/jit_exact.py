"""What surrounds attention over codes: attention over tokens held in full, and the merge of both. See jit_attend."""

from __future__ import annotations

import numpy as np
from numba import njit

from .jit_block import Field, as_float, floats, integers, shorts
from .jit_vectors import WIDTH, exp2_minus

LOG2E = np.float32(1.4426950408889634)
_PART = int(Field.MORE_TOKENS - Field.FIRST_TOKENS)  # from a field of the first part to that of the other
MINUS_INFINITY = np.float32(-np.inf)
OPTIONS = {"fastmath": {"nsz", "arcp", "contract", "reassoc"}, "cache": True, "error_model": "numpy"}


@njit(**OPTIONS)
def _widen(at, brief, from_short, from_float, bits, number, dim):
    """number[:dim] = the numbers from ``at`` on: bfloat16, which are a float32's upper halves, or float32.

    number is a view of bits.
    """
    if brief:
        for i in range(dim):
            bits[i] = np.uint32(np.uint16(from_short[at + i])) << np.uint32(16)
    else:
        for i in range(dim):
            number[i] = from_float[at + i]


@njit(**OPTIONS)
def _held(f, b, h, part, field):
    """Where a part's keys or values of row b and head h are. field: the first part's KEYS_AT or VALUES_AT.

    Returns the part's first token among all exact tokens, its number of tokens, the address of its array, and in that
    the first token's element and the elements from one token to the next.
    """
    at = field + part * _PART  # its strides stand behind it: of rows, heads and tokens
    start = f[Field.FIRST_TOKENS] if part else 0
    return start, f[Field.FIRST_TOKENS + part * _PART], f[at], b * f[at + 1] + h * f[at + 2], f[at + 3]


@njit(**OPTIONS)
def exact_head(f, b, h):
    """Attention of one KV head's queries over its exact tokens, in row b of the batch; f: the block."""
    heads, count = f[Field.HEADS], f[Field.COUNT]
    tokens, dim, wide = f[Field.FIRST_TOKENS] + f[Field.MORE_TOKENS], f[Field.HEAD_DIM], f[Field.VALUE_DIM]
    per_head, brief = f[Field.GROUP], f[Field.BRIEF] != 0
    rows = per_head * count
    query = floats(f[Field.QUERY_AT], (f[Field.BATCH], heads * per_head, count, dim))
    shape = (
        f[Field.EXACT_BIAS_BATCH],
        f[Field.EXACT_BIAS_HEADS],
        f[Field.EXACT_BIAS_COUNT],
        f[Field.EXACT_BIAS_TOKENS],
    )
    bias = floats(f[Field.EXACT_BIAS_AT], shape)
    factor, bound = np.float32(as_float(f[Field.FACTOR])), np.float32(as_float(f[Field.SOFTCAP]))
    sums = floats(f[Field.EXACT_SUMS_AT], (f[Field.BATCH], heads, rows, wide))
    tops = floats(f[Field.EXACT_TOPS_AT], (f[Field.BATCH], heads, rows))
    mass = floats(f[Field.EXACT_MASS_AT], (f[Field.BATCH], heads, rows))

    full = (tokens + WIDTH - 1) // WIDTH * WIDTH
    scores = np.empty((rows, full), np.float32)
    flat = scores.reshape(rows * full)
    bits = np.empty(max(dim, wide), np.uint32)
    number = bits.view(np.float32)
    for part in range(2):
        start, size, place, origin, step = _held(f, b, h, part, Field.FIRST_KEYS_AT)
        as_short, as_whole = shorts(place), floats(place, (1,))
        for t in range(size):
            _widen(origin + t * step, brief, as_short, as_whole, bits, number, dim)
            for r in range(rows):
                q = query[b, h * per_head + r // count, r % count]
                dot = np.float32(0)
                for i in range(dim):
                    dot += q[i] * number[i]
                scores[r, start + t] = dot * factor
    if bound > 0:
        for r in range(rows):
            for t in range(tokens):
                scores[r, t] = bound * np.tanh(scores[r, t] / bound)
    for r in range(rows):
        if bias.shape[3] > 0:
            line = bias[
                min(b, bias.shape[0] - 1),
                min(h * per_head + r // count, bias.shape[1] - 1),
                min(r % count, bias.shape[2] - 1),
            ]
            for t in range(tokens):
                scores[r, t] += line[t] * LOG2E
        top = MINUS_INFINITY
        for t in range(tokens):
            top = max(top, scores[r, t])
        scores[r, tokens:] = MINUS_INFINITY
        tops[b, h, r], mass[b, h, r] = top, 0
        if top == MINUS_INFINITY:
            scores[r] = 0
        else:
            for t in range(0, full, WIDTH):
                mass[b, h, r] += exp2_minus(flat, r * full + t, top)
        sums[b, h, r] = 0
    for part in range(2):
        start, size, place, origin, step = _held(f, b, h, part, Field.FIRST_VALUES_AT)
        as_short, as_whole = shorts(place), floats(place, (1,))
        for t in range(size):
            _widen(origin + t * step, brief, as_short, as_whole, bits, number, wide)
            for r in range(rows):
                weight, target = scores[r, start + t], sums[b, h, r]
                for i in range(wide):
                    target[i] += weight * number[i]


@njit(**OPTIONS)
def finish_head(f, b, h, rows):
    """Merge what splits and exact tokens of a KV head came to, and apply the values' codebook. rows: of the splits."""
    splits, batch, heads, count = f[Field.SPLITS], f[Field.BATCH], f[Field.HEADS], f[Field.COUNT]
    per_head, dim, most_bits = f[Field.GROUP], f[Field.VALUE_DIM], f[Field.MOST_VALUE_BITS]
    exact = f[Field.TASKS] > f[Field.CODED_TASKS]
    first, bits = integers(f[Field.VALUE_FIRST_AT])[h], integers(f[Field.VALUE_BITS_AT])[h]
    vectors, mean = floats(f[Field.VECTORS_AT], (first + bits, dim)), floats(f[Field.MEAN_AT], (heads, dim))[h]
    sums = floats(f[Field.SUMS_AT], (splits, batch, heads, rows * most_bits))
    tops = floats(f[Field.TOPS_AT], (splits, batch, heads, rows))
    mass = floats(f[Field.MASS_AT], (splits, batch, heads, rows))
    exact_sums = floats(f[Field.EXACT_SUMS_AT], (batch, heads, per_head * count, dim))
    exact_tops = floats(f[Field.EXACT_TOPS_AT], (batch, heads, per_head * count))
    exact_mass = floats(f[Field.EXACT_MASS_AT], (batch, heads, per_head * count))
    out = floats(f[Field.OUT_AT], (batch, heads * per_head, count, dim))
    lse = floats(f[Field.LSE_AT], (batch, heads * per_head, count))
    shares = np.empty(splits, np.float32)
    for r in range(per_head * count):
        top = exact_tops[b, h, r] if exact else MINUS_INFINITY
        for s in range(splits):
            top = max(top, tops[s, b, h, r])
        line, q = h * per_head + r // count, r % count
        target = out[b, line, q]
        if top == MINUS_INFINITY:
            target[:] = 0
            lse[b, line, q] = MINUS_INFINITY
            continue
        coded = np.float32(0)
        for s in range(splits):
            shares[s] = np.exp2(tops[s, b, h, r] - top)
            coded += shares[s] * mass[s, b, h, r]
        weight = coded
        for i in range(dim):
            target[i] = coded * mean[i]
        if exact:
            share = np.exp2(exact_tops[b, h, r] - top)
            weight += share * exact_mass[b, h, r]
            for i in range(dim):
                target[i] += share * exact_sums[b, h, r, i]
        for k in range(bits // 8):
            for j in range(WIDTH):
                x = np.float32(0)
                for s in range(splits):
                    x += shares[s] * sums[s, b, h, (k * rows + r) * WIDTH + j]
                vector = vectors[first + k * WIDTH + j]
                for i in range(dim):
                    target[i] += x * vector[i]
        for i in range(dim):
            target[i] /= weight
        lse[b, line, q] = (top + np.log2(weight)) * np.float32(0.6931471805599453)
