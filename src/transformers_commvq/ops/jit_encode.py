"""The sign encoder as loops, compiled by numba for the CPU at hand. Only arrays and integers: no torch, no codebooks.

Imported by the jit module alone, so that numba is neither needed nor loaded without it. What the compiler makes is
kept on disk (NUMBA_CACHE_DIR says where), so that only the first process on a machine waits for it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

LANES = 16  # tokens encoded side by side
_OPTIONS = {"fastmath": True, "cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def pattern_costs(gram, candidates, rows, bits):
    """-p gram_gg p / 2 of every pattern p of every group of 4 signs whose last is +: float32 (passes, heads, n / 4, 8).

    It is the same for a pattern and its opposite.
    """
    passes, heads, n = rows.shape
    bonus = np.zeros((passes, heads, n // 4, 8), np.float32)
    for turn in range(passes):
        for h in range(heads):
            for g in range(bits[h] // 4):
                for v in range(8):
                    cost = np.float32(0)
                    for i in range(4):
                        for j in range(4):
                            both = candidates[i, v] * candidates[j, v]
                            cost += both * gram[h, rows[turn, h, 4 * g + i], rows[turn, h, 4 * g + j]]
                    bonus[turn, h, g, v] = -cost / 2
    return bonus


@njit(inline="always", error_model="numpy")
def _better(best, product, pattern, other, bonus, number):
    """The better of the best pattern so far and another, each as good as its opposite: (score, t . p, p's number)."""
    score = abs(other) + bonus
    if score > best:
        return score, other, np.int32(number)
    return best, product, pattern


@njit(**_OPTIONS)
def choose_and_pack(begin_task, end_task, correlation, gram, bonus, rows, first, bits, codes, row_stride, width):
    """Greedy signs, then coordinate descent, packed. The steps are those of ``ops.encode.choose_signs``.

    LANES tokens go side by side: decisions are vector instructions over tokens. What a decision changes is passed on
    token by token, along the rows of ``gram``, because few tokens change their signs after the greedy pass. A pattern
    and its opposite cost the same and have opposite products with the target, so half of the patterns are tried.
    There are heads * batch * ceil(tokens / LANES) tasks.

    correlation: float32 (heads, batch, tokens, n), of C's rows with each target in the metric.
    gram: float32 (heads, n, n). bonus: of ``pattern_costs``.
    rows: int64 (passes, heads, n), the order in which each pass takes the rows, 4 together.
    first, bits: int64 (heads,), a head's first row and its number of rows. Token t of batch row b begins at byte
    b * row_stride + t * width of
    codes: uint8 1-d storage, written.
    """
    _, batch, tokens, widest = correlation.shape
    tasks = (tokens + LANES - 1) // LANES
    state = np.zeros((LANES, widest), np.float32)  # correlations with the residuals
    signs = np.zeros((widest, LANES), np.float32)
    target = np.empty((4, LANES), np.float32)
    move = np.empty((4, LANES), np.float32)
    moved = np.empty(LANES, np.float32)
    for task in range(begin_task, end_task):
        h, b, t = task // (batch * tasks), task // tasks % batch, task % tasks * LANES
        n, lanes = bits[h], min(LANES, tokens - t)
        signs[:n] = 0
        for lane in range(lanes):
            state[lane, :n] = correlation[h, b, t + lane, :n]
        for turn in range(rows.shape[0]):
            for g in range(n // 4):
                r0, r1 = rows[turn, h, 4 * g], rows[turn, h, 4 * g + 1]
                r2, r3 = rows[turn, h, 4 * g + 2], rows[turn, h, 4 * g + 3]
                for m in range(LANES):
                    target[0, m], target[1, m] = state[m, r0], state[m, r1]
                    target[2, m], target[3, m] = state[m, r2], state[m, r3]
                g00, g11, g22, g33 = gram[h, r0, r0], gram[h, r1, r1], gram[h, r2, r2], gram[h, r3, r3]
                g01, g02, g03 = gram[h, r0, r1], gram[h, r0, r2], gram[h, r0, r3]
                g12, g13, g23 = gram[h, r1, r2], gram[h, r1, r3], gram[h, r2, r3]
                b0, b1, b2, b3 = bonus[turn, h, g, 0], bonus[turn, h, g, 1], bonus[turn, h, g, 2], bonus[turn, h, g, 3]
                b4, b5, b6, b7 = bonus[turn, h, g, 4], bonus[turn, h, g, 5], bonus[turn, h, g, 6], bonus[turn, h, g, 7]
                for m in range(LANES):
                    s0, s1, s2, s3 = signs[r0, m], signs[r1, m], signs[r2, m], signs[r3, m]
                    t0 = target[0, m] + (s0 * g00 + s1 * g01) + (s2 * g02 + s3 * g03)
                    t1 = target[1, m] + (s0 * g01 + s1 * g11) + (s2 * g12 + s3 * g13)
                    t2 = target[2, m] + (s0 * g02 + s1 * g12) + (s2 * g22 + s3 * g23)
                    t3 = target[3, m] + (s0 * g03 + s1 * g13) + (s2 * g23 + s3 * g33)
                    same, differ, high, low = t0 + t1, t0 - t1, t3 + t2, t3 - t2
                    u, v = high + same, np.int32(0)  # t . p, and p's number: a set bit is a -
                    best = abs(u) + b0
                    best, u, v = _better(best, u, v, high - differ, b1, 1)
                    best, u, v = _better(best, u, v, high + differ, b2, 2)
                    best, u, v = _better(best, u, v, high - same, b3, 3)
                    best, u, v = _better(best, u, v, low + same, b4, 4)
                    best, u, v = _better(best, u, v, low - differ, b5, 5)
                    best, u, v = _better(best, u, v, low + differ, b6, 6)
                    best, u, v = _better(best, u, v, low - same, b7, 7)
                    v = v ^ np.int32(15) if u < 0 else v  # the opposite
                    n0, n1 = np.float32(1 - 2 * (v & 1)), np.float32(1 - (v & 2))
                    n2, n3 = np.float32(1 - ((v >> 1) & 2)), np.float32(1 - ((v >> 2) & 2))
                    move[0, m], move[1, m], move[2, m], move[3, m] = n0 - s0, n1 - s1, n2 - s2, n3 - s3
                    moved[m] = abs(n0 - s0) + abs(n1 - s1) + abs(n2 - s2) + abs(n3 - s3)
                    signs[r0, m], signs[r1, m], signs[r2, m], signs[r3, m] = n0, n1, n2, n3
                for m in range(lanes):
                    if moved[m] == 0:
                        continue
                    if turn == 0:  # from 0: all four have moved
                        f0, f1, f2, f3 = move[0, m], move[1, m], move[2, m], move[3, m]
                        for k in range(n):
                            near, far = f0 * gram[h, r0, k] + f1 * gram[h, r1, k], f2 * gram[h, r2, k]
                            state[m, k] -= near + (far + f3 * gram[h, r3, k])
                        continue
                    for i in range(4):
                        f, r = move[i, m], rows[turn, h, 4 * g + i]
                        if f != 0:
                            for k in range(n):
                                state[m, k] -= f * gram[h, r, k]
        for lane in range(lanes):
            at = b * row_stride + (t + lane) * width + first[h] // 8
            for k in range(n // 8):
                octet = 0
                for i in range(8):
                    if signs[8 * k + i, lane] < 0:
                        octet |= 1 << i
                codes[at + k] = octet
