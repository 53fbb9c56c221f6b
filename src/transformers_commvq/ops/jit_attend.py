"""Attention over sign codes, compiled by numba for the CPU at hand. Only arrays and numbers: no torch, no codebooks.

One pass over the codes, as in split-KV flash decoding: a tile of keys is rebuilt in registers and scored, its weights
are added to the sums of the values' signs, and nothing else is kept. ``finish`` merges the splits and meets the
values' codebook, once a query.

Scores are held in units of log 2 (weights are powers of two). Indices are unsigned or positive wherever they matter.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit, types, uint64

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
# No "parallel": numba's own thread pool is not safe to enter from two threads. Kernels let go of Python's lock and take
# a range of tasks instead; jit.run spreads the ranges over threads.
OPTIONS = {"fastmath": {"nsz", "arcp", "contract", "reassoc"}, "cache": True, "nogil": True, "error_model": "numpy"}
MINUS_INFINITY = np.float32(-np.inf)


@cache
def attend(pairs: int, padded_pairs: int, dim: int, rows: int):
    """The kernel for at most ``rows`` queries a KV head and ``dim`` padded elements of a key; 2 * padded_pairs turn.

    Sizes are compiled in: keys and sums then stay in registers. There are splits * batch * heads tasks.

    key_codes, value_codes: uint8 1-d storage; token t of row b begins at b * stride + t * width.
    tables: int16 1-d, sums of codebook rows for every value of every 4 bits of all heads, (groups, 16, dim).
    key_first, key_bits, value_first, value_bits: int64 (heads,), a head's first bit and its number of bits.
    query: float32 (batch, query heads, count, head_dim), rotated. order: int64 (dim,), the element of a head that
    stands at each place of ``tables``, or -1. scale: float32 (heads, dim), what a unit of ``tables`` is worth.
    factor: the attention's scaling, times log2(e).
    cos, sin: float32 1-d (OFFSETS, padded_pairs), rotation by an offset within a group of OFFSETS tokens.
    cos0, sin0: float32 (batch or 1, groups, pairs), rotation of each group's first token.
    broken: bool (groups,), True where positions are not consecutive; such tokens are rotated by
    whole_cos, whole_sin: float32 1-d (batch or 1, tokens, padded_pairs); empty if no group is broken.
    hidden: int64 (batch, 2), from and to which token none must be seen; empty for none.
    bias: float32 (batch or 1, query heads or 1, count or 1, >= tokens), added to scores; empty for none.
    softcap: bound of the scores in units of log 2, 0 for none.
    signs: float32 1-d (256, 8), the signs of every byte.
    sums: float32 (splits, batch, heads, octets * rows * 8), written: sums of the values' signs under the weights.
    tops, mass: float32 (splits, batch, heads, rows), written: greatest score, and sum of 2 ** (score - top).
    """
    vectors = dim // (2 * WIDTH)

    @njit(**OPTIONS)
    def kernel(
        begin_task, end_task, splits, key_codes, key_stride, key_width, value_codes, value_stride, value_width, tokens,
        tables, key_first, key_bits, value_first, value_bits, query, order, scale, factor, cos, sin, cos0, sin0, broken,
        whole_cos, whole_sin, hidden, bias, softcap, signs, sums, tops, mass,
    ):  # fmt: skip
        batch, heads, count = query.shape[0], scale.shape[0], query.shape[2]
        per_head = query.shape[1] // heads
        asked = per_head * count
        groups = (tokens + OFFSETS - 1) // OFFSETS
        share = (groups + splits - 1) // splits * OFFSETS
        given, turned = np.empty(rows * dim, np.float32), np.empty(rows * dim, np.float32)
        scores = np.empty(rows * TILE, np.float32)
        low, four, one = uint64(15), uint64(4), uint64(1)
        for task in range(begin_task, end_task):
            split, b, h = task // (batch * heads), task // heads % batch, task % heads
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
                            scores[r * TILE + i] += row[tile + i] * np.float32(1.4426950408889634)
                if hidden.shape[0] > 0:
                    for t in range(max(hidden[b, 0], tile), min(hidden[b, 1], tile + size)):
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

    return kernel


@cache
def attend_exact(brief: bool):
    """The kernel for tokens held in full: bfloat16 given as int16 if ``brief``, else float32.

    query: float32 (batch, query heads, count, head_dim). keys, values: (batch, heads, tokens, head_dim).
    more_keys, more_values: further tokens, in the same form.
    bias: float32 (batch or 1, query heads or 1, count or 1, all tokens), empty for none.
    factor, softcap: as in ``attend``.
    sums: float32 (batch, heads, rows, head_dim), written: sums of values under the weights. tops, mass: (batch, heads,
    rows), written, as in ``attend``.
    """

    held = types.Array(types.int16 if brief else types.float32, 4, "A")
    whole = {n: types.Array(types.float32, n, "C") for n in (3, 4)}
    number_kind = types.float64
    signature = types.void(
        whole[4], held, held, held, held, whole[4], number_kind, number_kind, whole[4], whole[3], whole[3]
    )

    @njit(signature, **OPTIONS)
    def kernel(query, keys, values, more_keys, more_values, bias, factor, softcap, sums, tops, mass):
        batch, heads, early, dim = keys.shape
        tokens = early + more_keys.shape[2]
        rows, wide = tops.shape[2], values.shape[3]
        count = query.shape[2]
        scores = np.empty((rows, (tokens + WIDTH - 1) // WIDTH * WIDTH), np.float32)
        flat = scores.reshape(scores.size)
        full = scores.shape[1]
        bits = np.empty(max(dim, wide), np.uint32)
        number = bits.view(np.float32)
        scaling, bound = np.float32(factor), np.float32(softcap)
        for b in range(batch):
            for h in range(heads):
                for t in range(tokens):
                    key = keys[b, h, t] if t < early else more_keys[b, h, t - early]
                    for i in range(dim):
                        if brief:
                            bits[i] = np.uint32(np.uint16(key[i])) << np.uint32(16)
                        else:
                            number[i] = key[i]
                    for r in range(rows):
                        q = query[b, h * (rows // count) + r // count, r % count]
                        dot = np.float32(0)
                        for i in range(dim):
                            dot += q[i] * number[i]
                        scores[r, t] = dot * scaling
                if softcap > 0:
                    for r in range(rows):
                        for t in range(tokens):
                            scores[r, t] = bound * np.tanh(scores[r, t] / bound)
                for r in range(rows):
                    if bias.shape[3] > 0:
                        row = bias[
                            min(b, bias.shape[0] - 1),
                            min(h * (rows // count) + r // count, bias.shape[1] - 1),
                            min(r % count, bias.shape[2] - 1),
                        ]
                        for t in range(tokens):
                            scores[r, t] += row[t] * np.float32(1.4426950408889634)
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
                for t in range(tokens):
                    value = values[b, h, t] if t < early else more_values[b, h, t - early]
                    for i in range(wide):
                        if brief:
                            bits[i] = np.uint32(np.uint16(value[i])) << np.uint32(16)
                        else:
                            number[i] = value[i]
                    for r in range(rows):
                        weight, target = scores[r, t], sums[b, h, r]
                        for i in range(wide):
                            target[i] += weight * number[i]

    return kernel


@njit(**OPTIONS)
def finish(sums, tops, mass, value_first, value_bits, vectors, mean, exact, exact_tops, exact_mass, count, out, lse):
    """Merge the splits of ``attend`` and the result of ``attend_exact``, and apply the values' codebook.

    vectors: float32 (sum of bits, dim). mean: float32 (heads, dim).
    exact, exact_tops, exact_mass: of ``attend_exact``; empty for none.
    out: float32 (batch, query heads, count, dim). lse: float32 (batch, query heads, count), natural. Both written.
    """
    splits, batch, heads, rows = tops.shape
    dim, per_head = vectors.shape[1], out.shape[1] // heads
    shares = np.empty(splits, np.float32)
    for b in range(batch):
        for h in range(heads):
            for r in range(per_head * count):
                top = MINUS_INFINITY if exact.size == 0 else exact_tops[b, h, r]
                for s in range(splits):
                    top = max(top, tops[s, b, h, r])
                row, q = h * per_head + r // count, r % count
                target = out[b, row, q]
                if top == MINUS_INFINITY:
                    target[:] = 0
                    lse[b, row, q] = MINUS_INFINITY
                    continue
                coded = np.float32(0)
                for s in range(splits):
                    shares[s] = np.exp2(tops[s, b, h, r] - top)
                    coded += shares[s] * mass[s, b, h, r]
                weight = coded
                for i in range(dim):
                    target[i] = coded * mean[h, i]
                if exact.size > 0:
                    share = np.exp2(exact_tops[b, h, r] - top)
                    weight += share * exact_mass[b, h, r]
                    for i in range(dim):
                        target[i] += share * exact[b, h, r, i]
                for k in range(value_bits[h] // 8):
                    for j in range(WIDTH):
                        x = np.float32(0)
                        for s in range(splits):
                            x += shares[s] * sums[s, b, h, (k * rows + r) * WIDTH + j]
                        vector = vectors[value_first[h] + k * WIDTH + j]
                        for i in range(dim):
                            target[i] += x * vector[i]
                for i in range(dim):
                    target[i] /= weight
                lse[b, row, q] = (top + np.log2(weight)) * np.float32(0.6931471805599453)
