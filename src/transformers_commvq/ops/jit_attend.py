"""Attention over sign codes, compiled by numba for the CPU at hand. Only arrays and numbers: no torch, no codebooks.

One pass over the codes, as in split-KV flash decoding: a tile of keys is rebuilt in registers and scored, its weights
are added to the sums of the values' signs, and nothing else is kept. The thread that ends a head's last task merges its
splits and exact tokens, and meets the values' codebook.

All threads of a step run one C function over one block of numbers (jit_block) and claim tasks from it, so that a
layer's attention is a single call.

Scores are held in units of log 2 (weights are powers of two). Indices are unsigned or positive wherever they matter.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, types, uint64

from .jit_block import SIZE, Field, as_float, fetch_add, floats, integers, octets, shorts
from .jit_exact import LOG2E, MINUS_INFINITY, OPTIONS, exact_head, finish_head
from .jit_vectors import (
    WIDTH,
    add_shorts,
    add_to_memory,
    add_weighted,
    exp2_minus,
    load_shorts,
    rotated_products,
    zero_rows,
)

OFFSETS = 64  # tokens that share one starting rotation
TILE = 256  # tokens whose scores are held at a time


@cache
def attend(pairs: int, padded_pairs: int, dim: int, rows: int) -> Any:
    """The C function for at most ``rows`` queries a KV head and ``dim`` padded elements of a key.

    Of these, 2 * padded_pairs turn. Sizes are compiled in: keys and sums then stay in registers. The function takes the
    address of a block, and does tasks until all are claimed; any number of threads may run it at once.
    """
    vectors = dim // (2 * WIDTH)

    @cfunc(types.void(types.CPointer(types.int64)), **OPTIONS)
    def work(address):
        f = carray(address, (SIZE,))
        splits, batch, heads, count = f[Field.SPLITS], f[Field.BATCH], f[Field.HEADS], f[Field.COUNT]
        per_head, tokens = f[Field.GROUP], f[Field.TOKENS]
        asked = per_head * count
        groups = (tokens + OFFSETS - 1) // OFFSETS
        share = (groups + splits - 1) // splits * OFFSETS
        most_bits = f[Field.MOST_VALUE_BITS]
        key_codes, value_codes = octets(f[Field.KEY_CODES_AT]), octets(f[Field.VALUE_CODES_AT])
        key_stride, key_width = f[Field.KEY_STRIDE], f[Field.KEY_WIDTH]
        value_stride, value_width = f[Field.VALUE_STRIDE], f[Field.VALUE_WIDTH]
        key_first, key_bits = integers(f[Field.KEY_FIRST_AT]), integers(f[Field.KEY_BITS_AT])
        value_first, value_bits = integers(f[Field.VALUE_FIRST_AT]), integers(f[Field.VALUE_BITS_AT])
        tables, order, signs = shorts(f[Field.TABLES_AT]), integers(f[Field.ORDER_AT]), floats(f[Field.SIGNS_AT], (1,))
        scale = floats(f[Field.SCALE_AT], (heads, dim))
        cos, sin = floats(f[Field.COS_AT], (1,)), floats(f[Field.SIN_AT], (1,))
        whole_cos, whole_sin = floats(f[Field.WHOLE_COS_AT], (1,)), floats(f[Field.WHOLE_SIN_AT], (1,))
        starts = (f[Field.START_ROWS], groups, pairs)
        cos0, sin0 = floats(f[Field.START_COS_AT], starts), floats(f[Field.START_SIN_AT], starts)
        broken, hidden = octets(f[Field.BROKEN_AT]), integers(f[Field.HIDDEN_AT])
        query = floats(f[Field.QUERY_AT], (batch, heads * per_head, count, f[Field.HEAD_DIM]))
        bias_shape = (f[Field.BIAS_BATCH], f[Field.BIAS_HEADS], f[Field.BIAS_COUNT], f[Field.BIAS_TOKENS])
        bias = floats(f[Field.BIAS_AT], bias_shape)
        factor, softcap = as_float(f[Field.FACTOR]), as_float(f[Field.SOFTCAP])
        sums = floats(f[Field.SUMS_AT], (splits, batch, heads, rows * most_bits))
        tops = floats(f[Field.TOPS_AT], (splits, batch, heads, rows))
        mass = floats(f[Field.MASS_AT], (splits, batch, heads, rows))
        done = carray(address, (SIZE + batch * heads,))
        parts = splits + (1 if f[Field.TASKS] > f[Field.CODED_TASKS] else 0)

        given, turned = np.empty(rows * dim, np.float32), np.empty(rows * dim, np.float32)
        scores = np.empty(rows * TILE, np.float32)
        low, four, one = uint64(15), uint64(4), uint64(1)
        while True:
            task = fetch_add(f, Field.CLAIMED)
            if task >= f[Field.TASKS]:
                break
            if task >= f[Field.CODED_TASKS]:
                b, h = divmod(task - f[Field.CODED_TASKS], heads)
                exact_head(f, b, h)
                if fetch_add(done, SIZE + b * heads + h) == parts - 1:
                    finish_head(f, b, h, rows)
                continue
            # Threads that begin together take the splits of one head, which are of one length.
            h, b, split = task // (splits * batch), task // splits % batch, task % splits
            top, weight, total = tops[split, b, h], mass[split, b, h], sums[split, b, h]
            top[:], weight[:], total[:] = MINUS_INFINITY, 0, 0
            for r in range(rows):
                for i in range(dim):
                    q = np.float32(0)
                    if order[i] >= 0 and r < asked:
                        q = query[b, h * per_head + r // count, r % count, order[i]] * scale[h, i] * np.float32(factor)
                    given[r * dim + i] = turned[r * dim + i] = q
            table, key_octets, value_octets = uint64(key_first[h] // 4), key_bits[h] // 8, value_bits[h] // 8
            start_row = min(b, cos0.shape[0] - 1)
            stop = min(tokens, (split + 1) * share)
            for tile in range(split * share, stop, TILE):
                size = min(TILE, stop - tile)
                for group in range(tile // OFFSETS, (tile + size + OFFSETS - 1) // OFFSETS):
                    single = broken[group]
                    if single:
                        turned[:] = given
                    else:
                        c0, s0 = cos0[start_row, group], sin0[start_row, group]
                        for r in range(rows):
                            for p in range(pairs):
                                x, y = given[r * dim + p], given[r * dim + padded_pairs + p]
                                turned[r * dim + p] = x * c0[p] + y * s0[p]
                                turned[r * dim + padded_pairs + p] = y * c0[p] - x * s0[p]
                    first = group * OFFSETS
                    for j in range(min(OFFSETS, stop - first)):
                        at = uint64(b * key_stride + (first + j) * key_width + key_first[h] // 8)
                        c = uint64(key_codes[at])
                        key = load_shorts(vectors, tables, (table * uint64(16) + (c & low)) * uint64(dim))
                        entry = (table + one) * uint64(16)
                        key = add_shorts(key, tables, (entry + (c >> four)) * uint64(dim))
                        for k in range(1, key_octets):
                            c = uint64(key_codes[at + uint64(k)])
                            entry += uint64(16)
                            key = add_shorts(key, tables, (entry + (c & low)) * uint64(dim))
                            entry += uint64(16)
                            key = add_shorts(key, tables, (entry + (c >> four)) * uint64(dim))
                        place = first + j - tile
                        if single:
                            turn = (start_row * tokens + first + j) * padded_pairs
                            rotated_products(
                                key, padded_pairs, rows, dim, whole_cos, whole_sin, turn, turned, 0, scores, place, TILE
                            )
                        else:
                            turn = j * padded_pairs
                            rotated_products(
                                key, padded_pairs, rows, dim, cos, sin, turn, turned, 0, scores, place, TILE
                            )
                if softcap > 0:
                    bound = np.float32(softcap)
                    for r in range(rows):
                        for i in range(r * TILE, r * TILE + size):
                            scores[i] = bound * np.tanh(scores[i] / bound)
                if bias.shape[3] > 0:
                    for r in range(asked):
                        row = bias[
                            min(b, bias.shape[0] - 1),
                            min(h * per_head + r // count, bias.shape[1] - 1),
                            min(r % count, bias.shape[2] - 1),
                        ]
                        for i in range(size):
                            scores[r * TILE + i] += row[tile + i] * LOG2E
                if f[Field.HIDDEN_ROWS] > 0:
                    for t in range(max(hidden[2 * b], tile), min(hidden[2 * b + 1], tile + size)):
                        for r in range(rows):
                            scores[r * TILE + t - tile] = MINUS_INFINITY
                full = (size + WIDTH - 1) // WIDTH * WIDTH
                for r in range(rows):
                    for i in range(size, full):
                        scores[r * TILE + i] = MINUS_INFINITY
                    new = top[r]
                    for i in range(size):
                        new = max(new, scores[r * TILE + i])
                    if new == MINUS_INFINITY:
                        for i in range(size):
                            scores[r * TILE + i] = 0
                        continue
                    if new > top[r]:
                        if weight[r] > 0:
                            decay = np.exp2(top[r] - new)
                            weight[r] *= decay
                            for k in range(value_octets):
                                for i in range((k * rows + r) * WIDTH, (k * rows + r + 1) * WIDTH):
                                    total[i] *= decay
                        top[r] = new
                    seen = np.float32(0)
                    for i in range(r * TILE, r * TILE + full, WIDTH):
                        seen += exp2_minus(scores, i, new)
                    weight[r] += seen
                for k in range(value_octets):
                    part = zero_rows(rows)
                    at = uint64(b * value_stride + tile * value_width + value_first[h] // 8 + k)
                    for t in range(size):
                        part = add_weighted(part, signs, value_codes[at], scores, t, TILE)
                        at += uint64(value_width)
                    add_to_memory(part, total, k * rows * WIDTH)
            if fetch_add(done, SIZE + b * heads + h) == parts - 1:
                finish_head(f, b, h, rows)

    return work
