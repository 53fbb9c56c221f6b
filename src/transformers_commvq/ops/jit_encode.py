"""The sign encoder as loops, compiled by numba for the CPU at hand. Only arrays and integers: no torch, no codebooks.

Imported by the jit module alone, so that numba is neither needed nor loaded without it. What the compiler makes is
kept on disk (NUMBA_CACHE_DIR says where), so that only the first process on a machine waits for it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .jit_vectors import WIDTH, load_floats, subtract_products

LANES = 16  # tokens encoded side by side
COLUMNS = LANES // WIDTH  # vectors of LANES numbers
MOVES = 4 * COLUMNS
_OPTIONS = {"fastmath": True, "cache": True, "nogil": True, "error_model": "numpy"}


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
    first, bits: int64 (heads,), a head's first row and its number of rows. Token t of batch row b begins at byte
    b * row_stride + t * width of
    codes: uint8 1-d storage, written.
    """
    _, batch, tokens, widest = correlation.shape
    tasks = (tokens + LANES - 1) // LANES
    state = np.empty((widest, LANES), np.float32)
    signs = np.empty((widest, LANES), np.float32)
    target = np.empty((4, LANES), np.float32)
    step = np.empty((4, LANES), np.float32)
    states, steps, products = state.reshape(state.size), step.reshape(step.size), gram.reshape(gram.size)
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
                moves = load_floats(MOVES, steps, 0)
                for k in range(n):
                    subtract_products(
                        states, k * LANES, moves, COLUMNS, products, (h * widest + a) * widest + k, widest
                    )
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
