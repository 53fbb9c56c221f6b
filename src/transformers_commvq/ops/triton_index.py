"""The attention kernels over index codes: scores of rebuilt keys, and the values' bits summed under weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_decode import turned_queries


@triton.jit
def _load_scale(pointer, inside):
    """The float16 in two bytes that may lie at an odd address, as float32."""
    low = tl.load(pointer, mask=inside, other=0).to(tl.int16)
    high = tl.load(pointer + 1, mask=inside, other=0).to(tl.int16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "query_b", "query_h", "query_q", "keys_b", "keys_t", "start_b", "index_b", "first", "stop", "count", "scale",
    ],
    do_not_specialize_on_alignment=["query_ptr", "keys_ptr"],
)  # fmt: skip
def index_scores(
    query_ptr, keys_ptr, entry_ptr, element_ptr, table_cos_ptr, table_sin_ptr, start_cos_ptr, start_sin_ptr, index_ptr,
    score_ptr, query_b, query_h, query_q, keys_b, keys_t, start_b, index_b, first, stop, count, scale,
    GROUPS: tl.constexpr, STAGES: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, INDEXED: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """Scores of all queries with TOKENS keys of one KV head.

    Grid (tiles of tokens first..stop, kv_heads, batch); first and BLOCK are multiples of TOKENS. A key is rebuilt stage
    by stage from entries, float16 (stages, kv_heads, 64, 2, PAIRS), as ``z_a + i z_b``, and serves every query of its
    group. score: float32 (batch, heads, count, stop - first), times ``scale``.
    """
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    begin = first + tl.program_id(0) * TOKENS
    token = begin + tl.arange(0, TOKENS)
    inside = token < stop
    p = tl.arange(0, PAIRS)
    r = tl.arange(0, ROWS)
    codes = keys_ptr + row * keys_b + token.to(tl.int64) * keys_t

    x = tl.zeros((TOKENS, PAIRS), tl.float32)
    y = tl.zeros((TOKENS, PAIRS), tl.float32)
    for stage in range(STAGES):
        bit = (head * STAGES + stage) * 12  # a code is 12 bits, so it begins at a byte or in the middle of one
        at = codes + bit // 8
        word = tl.load(at, mask=inside, other=0).to(tl.int32)
        word = (word | (tl.load(at + 1, mask=inside, other=0).to(tl.int32) << 8)) >> (bit % 8)
        table = entry_ptr + (stage * heads + head) * (64 * 2 * PAIRS)
        a = table + (word & 63)[:, None] * (2 * PAIRS) + p[None, :]
        b = table + ((word >> 6) & 63)[:, None] * (2 * PAIRS) + p[None, :]
        x += tl.load(a).to(tl.float32) - tl.load(b + PAIRS).to(tl.float32)
        y += tl.load(a + PAIRS).to(tl.float32) + tl.load(b).to(tl.float32)
    norm = _load_scale(codes + (heads * STAGES * 12 + 7) // 8, inside)

    if INDEXED:
        entry = tl.load(index_ptr + row * index_b + token, mask=inside, other=0).to(tl.int64)
    else:
        entry = (token % BLOCK).to(tl.int64)
    place = entry[:, None] * PAIRS + p[None, :]
    cos = tl.load(table_cos_ptr + place).to(tl.float32)
    sin = tl.load(table_sin_ptr + place).to(tl.float32)
    turned_x = (x * cos - y * sin).to(tl.float16)
    turned_y = (x * sin + y * cos).to(tl.float16)

    element_x = tl.load(element_ptr + p)
    element_y = tl.load(element_ptr + PAIRS + p)
    start = row * start_b + (begin // BLOCK) * PAIRS + p
    for tile in range(0, count * GROUPS, ROWS):
        flat = tile + r  # a row is (query, head of the group)
        valid = flat < count * GROUPS
        which = (flat // GROUPS).to(tl.int64)
        query_head = (head * GROUPS + flat % GROUPS).to(tl.int64)
        query = query_ptr + row * query_b + query_head * query_h + which * query_q
        keep_x = (element_x >= 0)[:, None] & valid[None, :]
        keep_y = (element_y >= 0)[:, None] & valid[None, :]
        query_x, query_y = turned_queries(
            query, element_x, element_y, keep_x, keep_y, start_cos_ptr, start_sin_ptr, start, STARTS
        )
        scores = tl.dot(turned_y, query_y, tl.dot(turned_x, query_x))  # (TOKENS, ROWS)
        scores = scores * (norm * scale)[:, None]
        line = (row * (heads * GROUPS) + query_head) * count + which
        out = score_ptr + line[None, :] * (stop - first) + (token - first)[:, None]
        tl.store(out, scores, mask=inside[:, None] & valid[None, :])


@triton.jit(
    do_not_specialize=["values_b", "values_t", "first", "stop", "share", "rows"],
    do_not_specialize_on_alignment=["values_ptr", "weight_ptr"],
)  # fmt: skip
def weighted_bits(
    values_ptr, weight_ptr, sum_ptr, values_b, values_t, first, stop, share, rows,
    BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The values' bits, times each token's factor and weight, summed over one share of the tokens first..stop.

    Grid (BITS / WIDTH rounded up, tiles of rows, batch * splits). weight: float32 (batch, rows, stop - first), of all
    heads together, since they share their code. sum: float32 (batch * splits, rows, BITS).
    """
    bit = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    splits = tl.cdiv(stop - first, share)
    row = (tl.program_id(2) // splits).to(tl.int64)
    begin = first + tl.program_id(2) % splits * share
    end = tl.minimum(begin + share, stop)
    lines = weight_ptr + (row * rows + r)[:, None] * (stop - first)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < end
        codes = values_ptr + row * values_b + token.to(tl.int64) * values_t
        octets = tl.load(codes[:, None] + (bit // 8)[None, :], mask=inside[:, None] & (bit < BITS)[None, :], other=0)
        bits = (octets.to(tl.int32) >> (bit % 8)[None, :]) & 1
        factor = _load_scale(codes + BITS // 8, inside)
        weight = tl.load(lines + (token - first)[None, :], mask=(r < rows)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot((weight * factor[None, :]).to(tl.float16), bits.to(tl.float16), acc)
    out = sum_ptr + (tl.program_id(2).to(tl.int64) * rows + r)[:, None] * BITS + bit[None, :]
    tl.store(out, acc, mask=(r < rows)[:, None] & (bit < BITS)[None, :])
