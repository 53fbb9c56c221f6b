"""Loops over codes, compiled by numba for the CPU at hand. Only arrays and integers: no torch, no codebook classes.

Imported by the jit backend alone, so that numba is neither needed nor loaded without it. What the compiler makes is
kept on disk (NUMBA_CACHE_DIR says where), so that only the first process on a machine waits for it.

Indices are unsigned wherever they are computed: numba would else test each for a negative value, which keeps the
compiler from using vector instructions.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit, uint64

OFFSETS = 64  # tokens that share one starting rotation
GROUPS = 4  # such groups of tokens in one task
LANES = 16  # tokens encoded side by side
# No "parallel": numba's own thread pool is not safe to enter from two threads. Kernels let go of Python's lock and take
# a range of tasks instead; jit.run spreads the ranges over threads.
_OPTIONS = {"fastmath": True, "cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def nibble_tables(rows, first, bits, mean):
    """Sums of codebook rows for every value of every 4 bits.

    rows: float32 (sum of bits, dim). first, bits: int64 (heads,), a head's first row and its number of rows.
    mean: float32 (heads, dim), added to each head's first table.
    Returns float32 (sum of bits / 4, 16, dim): entry [g, v] is sum_i (1 - 2 * bit_i(v)) * rows[4 g + i].
    """
    heads, dim = mean.shape
    tables = np.empty((rows.shape[0] // 4, 16, dim), np.float32)
    for h in range(heads):
        for g in range(first[h] // 4, (first[h] + bits[h]) // 4):
            r0, r1, r2, r3 = rows[4 * g], rows[4 * g + 1], rows[4 * g + 2], rows[4 * g + 3]
            add = mean[h] if 4 * g == first[h] else np.zeros(dim, np.float32)
            for v in range(16):
                s0, s1 = np.float32(1 - 2 * (v & 1)), np.float32(1 - (v & 2))
                s2, s3 = np.float32(1 - (v & 4) // 2), np.float32(1 - (v & 8) // 4)
                entry = tables[g, v]
                for i in range(dim):
                    entry[i] = add[i] + (s0 * r0[i] + s1 * r1[i]) + (s2 * r2[i] + s3 * r3[i])
    return tables


@cache
def key_scores(dim, pairs):
    """The kernel for heads of ``dim`` elements, 2 * ``pairs`` of them rotated: scores of queries with coded keys.

    Known sizes let the compiler unroll and keep sums in registers; unknown ones cost four times as much.
    There are batch * heads * ceil(tokens / OFFSETS / GROUPS) tasks.

    codes: uint8 1-d storage; token t of batch row b begins at b * row_stride + t * width.
    tables: of ``nibble_tables``; dimensions in the order real parts, imaginary parts, rest.
    query: float32 (batch, heads, rows, dim), scaled, in the same order of dimensions.
    cos, sin: float32 (OFFSETS, pairs), rotation by an offset within a group of OFFSETS tokens.
    cos0, sin0: float32 (batch, groups, pairs), rotation of each group's first token.
    broken: bool (groups,), True where a group's positions are not consecutive; its tokens are then rotated by
    whole: float32 (batch, tokens, 2, pairs), cos and sin of single tokens; may be empty if no group is broken.
    out: float32 (batch, heads, rows, tokens), written.
    """

    @njit(**_OPTIONS)
    def kernel(
        begin_task, end_task, codes, row_stride, width, tokens, tables, first, bits, query, cos, sin, cos0, sin0,
        broken, whole, out,
    ):  # fmt: skip
        _, heads, count, _ = query.shape
        groups = (tokens + OFFSETS - 1) // OFFSETS
        tasks = (groups + GROUPS - 1) // GROUPS
        low, four, one = uint64(15), uint64(4), uint64(1)
        for task in range(begin_task, end_task):
            b, h = task // (heads * tasks), task // tasks % heads
            begin = task % tasks * GROUPS
            octets, table = bits[h] // 8, uint64(first[h] // 4)
            key = np.empty(dim, np.float32)
            turned = np.empty((count, dim), np.float32)
            for group in range(begin, min(begin + GROUPS, groups)):
                single = broken[group]
                for r in range(count):
                    q, turn = query[b, h, r], turned[r]
                    for i in range(dim):
                        turn[i] = q[i]
                    if not single:
                        c0, s0 = cos0[b, group], sin0[b, group]
                        for p in range(pairs):
                            turn[p] = q[p] * c0[p] + q[pairs + p] * s0[p]
                            turn[pairs + p] = q[pairs + p] * c0[p] - q[p] * s0[p]
                start = group * OFFSETS
                for j in range(min(OFFSETS, tokens - start)):
                    at = b * row_stride + (start + j) * width + first[h] // 8
                    code = codes[at : at + octets]
                    c = uint64(code[0])
                    t0, t1 = tables[table, c & low], tables[table + one, c >> four]
                    for i in range(dim):
                        key[i] = t0[i] + t1[i]
                    k = 1
                    while k + 1 < octets:
                        c, e, g = uint64(code[k]), uint64(code[k + 1]), table + uint64(2 * k)
                        t0, t1 = tables[g, c & low], tables[g + one, c >> four]
                        t2, t3 = tables[g + uint64(2), e & low], tables[g + uint64(3), e >> four]
                        for i in range(dim):
                            key[i] += (t0[i] + t1[i]) + (t2[i] + t3[i])
                        k += 2
                    if k < octets:
                        c, g = uint64(code[k]), table + uint64(2 * k)
                        t0, t1 = tables[g, c & low], tables[g + one, c >> four]
                        for i in range(dim):
                            key[i] += t0[i] + t1[i]
                    if single:
                        cc, ss = whole[b, start + j, 0], whole[b, start + j, 1]
                    else:
                        cc, ss = cos[j], sin[j]
                    for p in range(pairs):
                        x, y = key[p], key[pairs + p]
                        key[p] = x * cc[p] - y * ss[p]
                        key[pairs + p] = x * ss[p] + y * cc[p]
                    for r in range(count):
                        turn = turned[r]
                        total = np.float32(0)
                        for i in range(dim):
                            total += turn[i] * key[i]
                        out[b, h, r, start + j] = total

    return kernel


@cache
def value_sums(count):
    """The kernel for ``count`` rows of weights a head: sums of signs under weights,
    out[b, h, :, r, j] sums to sum_t weights[b, h, r, t] * sign_j(t).

    There are batch * heads * splits tasks. A byte of a code has 256 values: the weights of tokens with equal bytes are
    added first, one addition a byte, and only the 256 sums meet their 8 signs, by folding the table in half once a bit.

    codes, row_stride, width, tokens, first, bits: as in ``key_scores``.
    weights: float32 (batch, heads, rows, tokens). splits: tasks a head, each over its own tokens.
    out: float32 (batch, heads, splits, rows, max_bits), a head's own bits are written.
    """

    @njit(**_OPTIONS)
    def kernel(begin_task, end_task, codes, row_stride, width, tokens, first, bits, weights, splits, out):

        heads = weights.shape[1]
        chunk = (tokens + splits - 1) // splits
        for task in range(begin_task, end_task):
            b, h, split = task // (heads * splits), task // splits % heads, task % splits
            octets = bits[h] // 8
            sums = np.zeros((octets * 256, count), np.float32)
            w = np.empty(count, np.float32)
            for t in range(split * chunk, min((split + 1) * chunk, tokens)):
                at = b * row_stride + t * width + first[h] // 8
                code = codes[at : at + octets]
                for r in range(count):
                    w[r] = weights[b, h, r, t]
                for k in range(octets):
                    cell = sums[uint64(256 * k) + uint64(code[k])]
                    for r in range(count):
                        cell[r] += w[r]
            for k in range(octets):
                half = 128
                for bit in range(7, -1, -1):
                    for r in range(count):
                        total = np.float32(0)
                        for v in range(256 * k, 256 * k + half):
                            total += sums[v, r] - sums[v + half, r]
                            sums[v, r] += sums[v + half, r]
                        out[b, h, split, r, 8 * k + bit] = total
                    half //= 2

    return kernel


@njit(**_OPTIONS)
def pattern_costs(gram, candidates, bits):
    """-p gram_gg p of every pattern p of every 4 signs: float32 (heads, n / 4, 16)."""
    heads = gram.shape[0]
    bonus = np.zeros((heads, gram.shape[1] // 4, 16), np.float32)
    for h in range(heads):
        for g in range(bits[h] // 4):
            for v in range(16):
                cost = np.float32(0)
                for i in range(4):
                    for j in range(4):
                        cost += candidates[i, v] * candidates[j, v] * gram[h, 4 * g + i, 4 * g + j]
                bonus[h, g, v] = -cost
    return bonus


@njit(**_OPTIONS)
def choose_and_pack(begin_task, end_task, correlation, gram, bonus, sweeps, first, bits, codes, row_stride, width):
    """Greedy signs, then coordinate descent, packed. The steps are those of ``ops.encode.choose_signs``.

    LANES tokens go side by side: every decision is a vector instruction over tokens, and their state stays in L1 cache.
    There are heads * batch * ceil(tokens / LANES) tasks.

    correlation: float32 (heads, batch, tokens, n), of C's rows with each target in the metric.
    gram: float32 (heads, n, n). bonus: of ``pattern_costs``.
    sweeps: passes of coordinate descent after the greedy pass, fewer if one changes nothing.
    first, bits, row_stride, width: as in ``key_scores``.
    codes: uint8 1-d storage, written.
    """
    _, batch, tokens, widest = correlation.shape
    tasks = (tokens + LANES - 1) // LANES
    state = np.empty((widest, LANES), np.float32)
    signs = np.empty((widest, LANES), np.float32)
    target = np.empty((4, LANES), np.float32)
    step = np.empty((4, LANES), np.float32)
    best = np.empty(LANES, np.float32)
    pick = np.empty(LANES, np.int32)
    for task in range(begin_task, end_task):
        h, b, t = task // (batch * tasks), task // tasks % batch, task % tasks * LANES
        n, lanes = bits[h], min(LANES, tokens - t)
        state[:] = 0
        signs[:] = 0
        for lane in range(lanes):
            for k in range(n):
                state[k, lane] = correlation[h, b, t + lane, k]
        for _ in range(sweeps + 1):
            changed = False
            for g in range(n // 4):
                a = 4 * g
                for i in range(4):
                    goal, x = target[i], state[a + i]
                    s0, s1, s2, s3 = signs[a], signs[a + 1], signs[a + 2], signs[a + 3]
                    g0, g1 = gram[h, a, a + i], gram[h, a + 1, a + i]
                    g2, g3 = gram[h, a + 2, a + i], gram[h, a + 3, a + i]
                    for m in range(LANES):
                        goal[m] = 2 * (x[m] + (s0[m] * g0 + s1[m] * g1) + (s2[m] * g2 + s3[m] * g3))
                t0, t1, t2, t3 = target[0], target[1], target[2], target[3]
                for m in range(LANES):
                    best[m] = bonus[h, g, 0] + (t0[m] + t1[m]) + (t2[m] + t3[m])
                    pick[m] = 0
                for v in range(1, 16):
                    extra = bonus[h, g, v]
                    c0, c1 = np.float32(1 - 2 * (v & 1)), np.float32(1 - (v & 2))
                    c2, c3 = np.float32(1 - (v & 4) // 2), np.float32(1 - (v & 8) // 4)
                    for m in range(LANES):
                        score = extra + (c0 * t0[m] + c1 * t1[m]) + (c2 * t2[m] + c3 * t3[m])
                        better = score > best[m]
                        best[m] = score if better else best[m]
                        pick[m] = v if better else pick[m]
                moved = np.float32(0)
                for i in range(4):
                    move, old = step[i], signs[a + i]
                    for m in range(LANES):
                        new = np.float32(1 - 2 * ((pick[m] >> i) & 1))
                        move[m] = new - old[m]
                        old[m] = new
                        moved += abs(move[m])
                if moved == 0:
                    continue
                changed = True
                d0, d1, d2, d3 = step[0], step[1], step[2], step[3]
                r0, r1, r2, r3 = gram[h, a], gram[h, a + 1], gram[h, a + 2], gram[h, a + 3]
                for k in range(n):
                    x = state[k]
                    for m in range(LANES):
                        x[m] -= (d0[m] * r0[k] + d1[m] * r1[k]) + (d2[m] * r2[k] + d3[m] * r3[k])
            if not changed:
                break
        for lane in range(lanes):
            at = b * row_stride + (t + lane) * width + first[h] // 8
            for k in range(n // 8):
                octet = 0
                for i in range(8):
                    if signs[8 * k + i, lane] < 0:
                        octet |= 1 << i
                codes[at + k] = octet
