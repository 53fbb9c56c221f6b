"""The attention kernels over sign codes: one pass over the codes in splits, then the splits merged and projected."""

# Compile-time and run-time conditions of Triton stay apart, each in its own statement.
# ruff: noqa: SIM102, SIM108

from __future__ import annotations

import triton
import triton.language as tl

from .triton_signs import load_words, unpack_words

# Columns of the int32 table that says where a head's codes and codebook rows lie; triton_tables fills it.
META = tl.constexpr(8)
# Up to this many query rows, turned queries and unsummed weights stay in registers; with more there is no room.
HELD = tl.constexpr(16)


@triton.jit
def _signs(words, bits):
    """Signs of words; bits is positive.

    The branch that is never taken keeps Triton from looking through to the bytes: it would choose the matrix units'
    operand layout for 8-bit numbers, at twice the instructions on sm_80 and sm_120.
    """
    if bits > 0:
        signs = unpack_words(words)
    else:
        signs = tl.zeros((words.shape[0], words.shape[1] * 32), tl.float16)
    return signs


@triton.jit
def _gather(acc, words, weights, decay, bits):
    """acc (bits, ROWS) * decay + signs^T weights: values summed in code space. bits is positive."""
    if weights.shape[1] > HELD:
        # Hidden as in _signs: triton 3.6 finds no layout for sm_100's tensor cores through the reshape.
        signs = _signs(words, bits)
    else:
        signs = unpack_words(words)
    return tl.dot(tl.trans(signs), weights, acc * decay[None, :])


@triton.jit
def turned_queries(query, element_x, element_y, keep_x, keep_y, cos_ptr, sin_ptr, start, STARTS: tl.constexpr):
    """Queries turned back by the start of their block, float16 real and imaginary parts (PAIRS, ROWS)."""
    x = tl.load(query[None, :] + element_x[:, None], mask=keep_x, other=0.0).to(tl.float32)
    y = tl.load(query[None, :] + element_y[:, None], mask=keep_y, other=0.0).to(tl.float32)
    if STARTS:
        cos = tl.load(cos_ptr + start)[:, None]
        sin = tl.load(sin_ptr + start)[:, None]
        turned_x = x * cos + y * sin
        turned_y = y * cos - x * sin
    else:
        turned_x = x
        turned_y = y
    return turned_x.to(tl.float16), turned_y.to(tl.float16)


@triton.jit
def _store_sum(acc, pointer, valid, r, FIRST: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    at = pointer + r[None, :] * WIDTH + FIRST + tl.arange(0, BITS)[:, None]
    tl.store(at, acc, mask=valid[None, :])


@triton.jit(
    do_not_specialize=[
        "query_b", "query_h", "query_q", "keys_b", "keys_t", "values_b", "values_t", "start_b", "index_b",
        "mask_b", "mask_h", "mask_q", "mask_t", "length", "span", "splits", "count", "tiles", "scale", "softcap",
    ],
    do_not_specialize_on_alignment=["query_ptr", "keys_ptr", "values_ptr", "mask_ptr", "hidden_ptr"],
)  # fmt: skip
def attend_splits(
    query_ptr, keys_ptr, values_ptr, book_ptr, mean_ptr, meta_ptr, element_ptr,
    table_cos_ptr, table_sin_ptr, start_cos_ptr, start_sin_ptr, index_ptr, hidden_ptr, mask_ptr, sum_ptr, top_ptr,
    query_b, query_h, query_q, keys_b, keys_t, values_b, values_t, start_b, index_b,
    mask_b, mask_h, mask_q, mask_t, length, span, splits, count, tiles, scale, softcap,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, CHUNKS: tl.constexpr,
    INDEXED: tl.constexpr, STARTS: tl.constexpr, HIDDEN: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One split of the tokens, one tile of query rows, one KV head: sums in code space, and their maximum and mass.

    Grid (kv_heads * tiles, splits, batch); heads are neighbours, so that they share the cache lines of a token's row.
    A query row is (query, head of the group); ROWS of them make a tile. A split is ``span`` tokens, a multiple of
    BLOCK, the tokens for which the query is turned once. Results, for each (batch, kv head, tile, split):
    sum (ROWS, CHUNKS * VALUE_BITS) float32, not normalised; top (2, ROWS): maximum of scores * log2 e, mass.
    """
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    split = tl.program_id(1)
    row = tl.program_id(2)
    place = ((row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * splits + split) * ROWS

    meta = meta_ptr + head * META
    key_first, key_bytes, key_padded = tl.load(meta), tl.load(meta + 1), tl.load(meta + 2)
    value_first, value_bytes = tl.load(meta + 3), tl.load(meta + 4)
    book_ptr += tl.load(meta + 5) * (2 * PAIRS)
    mean_ptr += head * (2 * PAIRS)

    p = tl.arange(0, PAIRS)
    r = tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    flat = tile * ROWS + r
    valid = flat < count * GROUPS
    which = flat // GROUPS  # of the queries
    query_head = head * GROUPS + flat % GROUPS
    element_x = tl.load(element_ptr + p)
    element_y = tl.load(element_ptr + PAIRS + p)
    query = query_ptr + row.to(tl.int64) * query_b + query_head.to(tl.int64) * query_h + which.to(tl.int64) * query_q
    keep_x = (element_x >= 0)[:, None] & valid[None, :]
    keep_y = (element_y >= 0)[:, None] & valid[None, :]
    keys_ptr += row.to(tl.int64) * keys_b
    values_ptr += row.to(tl.int64) * values_b
    if MASK != 0:
        mask_row = mask_ptr + (
            row.to(tl.int64) * mask_b + query_head.to(tl.int64) * mask_h + which * mask_q.to(tl.int64)
        )
    hidden_from = 0
    hidden_to = 0
    if HIDDEN:
        hidden_from = tl.load(hidden_ptr + 2 * row)
        hidden_to = tl.load(hidden_ptr + 2 * row + 1)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    if ROWS <= HELD:
        mass = tl.zeros((TOKENS, ROWS), tl.float32)  # by place in the tile; summed at the end
    else:
        mass = tl.zeros((ROWS,), tl.float32)
    sum_0 = tl.zeros((VALUE_BITS, ROWS), tl.float32)
    sum_1 = sum_0
    sum_2 = sum_0
    sum_3 = sum_0

    begin = split * span
    end = tl.minimum(begin + span, length)
    both = tl.arange(0, 2 * PAIRS)
    bit = tl.arange(0, KEY_BITS)
    book = book_ptr + bit[:, None] * (2 * PAIRS) + both[None, :]
    C: tl.constexpr = VALUE_BITS // 8
    KEY_WORDS: tl.constexpr = KEY_BITS // 32
    VALUE_WORDS: tl.constexpr = VALUE_BITS // 32

    # Codes are read one step ahead of their use, through the loops: products hide their way from memory.
    inside = begin + t < end
    rows = (begin + t).to(tl.int64)
    key_words = load_words(keys_ptr, rows * keys_t, inside, key_first, key_bytes, KEY_WORDS)
    words_0 = load_words(values_ptr, rows * values_t, inside, value_first, value_bytes, VALUE_WORDS)
    words_1 = words_0
    words_2 = words_0
    words_3 = words_0
    if CHUNKS > 1:
        words_1 = load_words(values_ptr, rows * values_t, inside, value_first + C, value_bytes - C, VALUE_WORDS)
    if CHUNKS > 2:
        words_2 = load_words(values_ptr, rows * values_t, inside, value_first + 2 * C, value_bytes - 2 * C, VALUE_WORDS)
    if CHUNKS > 3:
        words_3 = load_words(values_ptr, rows * values_t, inside, value_first + 3 * C, value_bytes - 3 * C, VALUE_WORDS)

    for block in tl.range(begin, end, BLOCK, num_stages=1):
        if ROWS <= HELD:
            turned_x, turned_y = turned_queries(
                query, element_x, element_y, keep_x, keep_y, start_cos_ptr, start_sin_ptr,
                row.to(tl.int64) * start_b + (block // BLOCK) * PAIRS + p, STARTS,
            )  # fmt: skip
        for first in tl.range(block, tl.minimum(block + BLOCK, end), TOKENS, num_stages=1):
            token = first + t
            parts = tl.zeros((TOKENS, 2 * PAIRS), tl.float32) + tl.load(mean_ptr + both)[None, :]
            for bits in range(0, key_padded, KEY_BITS):
                following = bits + KEY_BITS
                wrap = following >= key_padded  # on to the next tile
                ahead = token + tl.where(wrap, TOKENS, 0)
                byte = tl.where(wrap, 0, following // 8)
                next_words = load_words(
                    keys_ptr, ahead.to(tl.int64) * keys_t, ahead < end, key_first + byte, key_bytes - byte, KEY_WORDS
                )
                parts = tl.dot(_signs(key_words, key_padded), tl.load(book + bits * (2 * PAIRS)), parts)
                key_words = next_words
            halves = tl.permute(tl.reshape(parts.to(tl.float16), (TOKENS, 2, PAIRS)), (0, 2, 1))
            x, y = tl.split(halves)

            inside = token < end
            if INDEXED:
                entry = tl.load(index_ptr + row.to(tl.int64) * index_b + token, mask=inside, other=0).to(tl.int64)
            else:
                entry = token - block
            place_in_table = entry[:, None] * PAIRS + p[None, :]
            cos = tl.load(table_cos_ptr + place_in_table)
            sin = tl.load(table_sin_ptr + place_in_table)
            if ROWS > HELD:
                turned_x, turned_y = turned_queries(
                    query, element_x, element_y, keep_x, keep_y, start_cos_ptr, start_sin_ptr,
                    row.to(tl.int64) * start_b + (block // BLOCK) * PAIRS + p, STARTS,
                )  # fmt: skip
            scores = tl.dot(x * cos - y * sin, turned_x)
            scores = tl.dot(x * sin + y * cos, turned_y, scores)  # (TOKENS, ROWS)

            # Everything from here on in base 2; scale holds log2 e.
            if SOFTCAP:
                z = tl.exp2(tl.abs(scores) * scale * (-2.0 / softcap))  # tanh |x| = (1 - e^-2x) / (1 + e^-2x)
                scores = tl.where(scores < 0, softcap, -softcap) * (z - 1.0) / (z + 1.0) * 1.4426950408889634
            else:
                scores = scores * scale
            if MASK != 0:
                mask_at = mask_row[None, :] + token.to(tl.int64)[:, None] * mask_t
                shown = tl.load(mask_at, mask=inside[:, None] & valid[None, :], other=0)
                if MASK == 1:
                    scores = tl.where(shown != 0, scores, float("-inf"))
                else:
                    scores += shown.to(tl.float32) * 1.4426950408889634
            if HIDDEN:
                inside = inside & ((token < hidden_from) | (token >= hidden_to))
            scores = tl.where(inside[:, None], scores, float("-inf"))

            new_top = tl.maximum(top, tl.max(scores, 0))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            decay = tl.exp2(top - safe)
            weights = tl.exp2(scores - safe[None, :])
            if ROWS <= HELD:
                mass = mass * decay[None, :] + weights
            else:
                mass = mass * decay + tl.sum(weights, 0)
            top = new_top
            weights = weights.to(tl.float16)
            # A head shorter than the layer's longest skips the chunks it does not have.
            ahead = token + TOKENS
            rows = ahead.to(tl.int64) * values_t
            inside = ahead < end
            next_0 = load_words(values_ptr, rows, inside, value_first, value_bytes, VALUE_WORDS)
            sum_0 = _gather(sum_0, words_0, weights, decay, value_bytes)
            words_0 = next_0
            if CHUNKS > 1:
                if value_bytes > C:
                    next_1 = load_words(values_ptr, rows, inside, value_first + C, value_bytes - C, VALUE_WORDS)
                    sum_1 = _gather(sum_1, words_1, weights, decay, value_bytes)
                    words_1 = next_1
            if CHUNKS > 2:
                if value_bytes > 2 * C:
                    next_2 = load_words(values_ptr, rows, inside, value_first + 2 * C, value_bytes - 2 * C, VALUE_WORDS)
                    sum_2 = _gather(sum_2, words_2, weights, decay, value_bytes)
                    words_2 = next_2
            if CHUNKS > 3:
                if value_bytes > 3 * C:
                    next_3 = load_words(values_ptr, rows, inside, value_first + 3 * C, value_bytes - 3 * C, VALUE_WORDS)
                    sum_3 = _gather(sum_3, words_3, weights, decay, value_bytes)
                    words_3 = next_3

    out = sum_ptr + place * (CHUNKS * VALUE_BITS)
    _store_sum(sum_0, out, valid, r, 0, VALUE_BITS, CHUNKS * VALUE_BITS)
    if CHUNKS > 1:
        _store_sum(sum_1, out, valid, r, VALUE_BITS, VALUE_BITS, CHUNKS * VALUE_BITS)
    if CHUNKS > 2:
        _store_sum(sum_2, out, valid, r, 2 * VALUE_BITS, VALUE_BITS, CHUNKS * VALUE_BITS)
    if CHUNKS > 3:
        _store_sum(sum_3, out, valid, r, 3 * VALUE_BITS, VALUE_BITS, CHUNKS * VALUE_BITS)
    tl.store(top_ptr + place * 2 + r, top)
    if ROWS <= HELD:
        tl.store(top_ptr + place * 2 + ROWS + r, tl.sum(mass, 0))
    else:
        tl.store(top_ptr + place * 2 + ROWS + r, mass)


@triton.jit(do_not_specialize=["splits", "count", "tiles"])
def merge_splits(
    sum_ptr, top_ptr, book_ptr, mean_ptr, meta_ptr, out_ptr, lse_ptr, splits, count, tiles,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, MERGED: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    WIDTH: tl.constexpr, BITS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of MERGED of a tile's rows, project the sums with the values' codebook, add the mean.

    Grid (kv_heads * tiles, ROWS / MERGED, batch). out: (batch, heads, queries, DIM) float32; lse: natural logarithm.
    """
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(2)
    place = (batch.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * splits * ROWS
    local = tl.program_id(1) * MERGED + tl.arange(0, MERGED)
    flat = tile * ROWS + local
    valid = (flat < count * GROUPS) & (local < ROWS)
    s = tl.arange(0, SPLITS)

    top = tl.full((MERGED,), float("-inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        at = (place + (start + s)[:, None] * ROWS) * 2 + local[None, :]
        here = (start + s < splits)[:, None] & valid[None, :]
        top = tl.maximum(top, tl.max(tl.load(top_ptr + at, mask=here, other=float("-inf")), 0))
    safe = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.zeros((MERGED,), tl.float32)
    for start in range(0, splits, SPLITS):
        at = (place + (start + s)[:, None] * ROWS) * 2 + local[None, :]
        here = (start + s < splits)[:, None] & valid[None, :]
        weight = tl.exp2(tl.load(top_ptr + at, mask=here, other=float("-inf")) - safe[None, :])
        mass += tl.sum(weight * tl.load(top_ptr + at + ROWS, mask=here, other=0.0), 0)
    seen = mass > 0
    inverse = tl.where(seen, 1.0 / tl.where(seen, mass, 1.0), 0.0)

    d = tl.arange(0, PADDED)
    meta = meta_ptr + head * META
    padded = tl.load(meta + 6)
    book = book_ptr + tl.load(meta + 7).to(tl.int64) * PADDED
    out = tl.zeros((MERGED, PADDED), tl.float32)
    bit = tl.arange(0, BITS)
    for first in range(0, padded, BITS):
        signs = tl.zeros((MERGED, BITS), tl.float32)
        for start in range(0, splits, SPLITS):
            split = start + s
            here = (split < splits)[:, None] & valid[None, :]
            at = place + split[:, None] * ROWS + local[None, :]
            level = tl.load(
                top_ptr + (place + split[:, None] * ROWS) * 2 + local[None, :], mask=here, other=float("-inf")
            )
            weight = tl.exp2(level - safe[None, :]) * inverse[None, :]
            part = tl.load(
                sum_ptr + at[:, :, None] * WIDTH + (first + bit)[None, None, :], mask=here[:, :, None], other=0.0
            )
            signs += tl.sum(part * weight[:, :, None], 0)
        rows = tl.load(book + (first + bit)[:, None] * PADDED + d[None, :])
        out = tl.dot(signs.to(tl.float16), rows, out)
    mean = tl.load(mean_ptr + head * PADDED + d)
    out += tl.where(seen, 1.0, 0.0)[:, None] * mean[None, :]
    query_head = head * GROUPS + flat % GROUPS
    heads = (tl.num_programs(0) // tiles) * GROUPS
    line = (batch.to(tl.int64) * heads + query_head) * count + flat // GROUPS
    tl.store(out_ptr + line[:, None] * DIM + d[None, :], out, mask=valid[:, None] & (d < DIM)[None, :])
    lse = (top + tl.log2(tl.where(seen, mass, 1.0))) * 0.6931471805599453
    tl.store(lse_ptr + line, tl.where(seen, lse, float("-inf")), mask=valid)
