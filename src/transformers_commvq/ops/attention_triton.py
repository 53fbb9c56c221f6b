"""Attention over sign codes in Triton kernels (NVIDIA and AMD GPUs): the launches and their fixed settings.

The kernels (triton_decode) read codes once, in splits, decode keys tile by tile, and sum values in code space; a second
kernel merges the splits and applies the values' codebook. Products are float16 with float32 sums. Nothing here depends
on the number of tokens but the number of splits: no tuning runs, no compilation as a cache grows.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache

import torch
import triton

from .past import CodedPast
from .triton_decode import attend_splits, merge_splits
from .triton_tables import BLOCK, CHUNKS, LayerTables, layer_tables, rotations, value_chunks

WAVES = 2  # programs per multiprocessor that splits aim at: two fit at once, more only lengthen the merge
SPLITS = 16  # splits merged at a time
INTERPRETED_UNITS = 2  # multiprocessors to assume where there are none (Triton's interpreter)


def supports(query: torch.Tensor, past: CodedPast) -> bool:
    """Whether the kernels can do this: sign codes, an even head_dim, and values of at most 1024 bits a head."""
    book = past.book
    if book.keys.kind != "sign" or book.values.kind != "sign" or query.dtype == torch.float64:
        return False
    _, chunks = value_chunks(book.values.layout.max_bits)
    return chunks <= CHUNKS and book.keys.head_dim % 2 == 0 and max(book.keys.head_dim, book.values.head_dim) <= 256


def tile_settings(rows: int, tables: LayerTables) -> dict[str, int]:
    """Fixed launch settings of ``attend_splits``.

    rows: query rows (queries times heads of a group) of one KV head.

    One decoded key serves all rows of a tile, so the tile is as tall as the rows ask for. Registers bound it: they hold
    TOKENS x 2 pairs of decoded keys and value_bits x rows of sums.
    """
    tall = min(64 if tables.chunks == 1 and tables.pairs <= 64 else 32, max(8, triton.next_power_of_2(rows)))
    return {
        "ROWS": tall,
        "TOKENS": 32 if tables.pairs > 64 else 64,
        "num_warps": 8 if tall == 64 else 4,
        "num_stages": 2,
    }


def attention_triton(
    query: torch.Tensor,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.attention. ``supports`` must hold. A mask that hides by a huge negative number hides altogether."""
    batch, heads, count, _ = query.shape
    book, device = past.book, query.device
    tables = layer_tables(book, past.rope)
    turn = rotations(past, tables.pairs)
    kv_heads = past.heads
    groups = heads // kv_heads
    settings = tile_settings(groups * count, tables)
    rows = settings["ROWS"]
    tiles = -(-groups * count // rows)
    splits, span = split_plan(past.length, batch * kv_heads * tiles, device)
    width = tables.chunks * tables.value_bits
    places = batch * kv_heads * tiles * splits * rows
    sums = torch.empty(places, width, dtype=torch.float32, device=device)
    tops = torch.empty(places * 2, dtype=torch.float32, device=device)
    out = torch.empty(batch, heads, count, book.values.head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=device)

    query = query if query.stride(-1) == 1 else query.contiguous()
    keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (past.keys, past.values))
    form, strides = 0, (0, 0, 0, 0)
    if mask is not None:
        form = 1 if mask.dtype == torch.bool else 2
        strides = tuple(0 if n == 1 else s for n, s in zip(mask.shape[:3], mask.stride()[:3], strict=True))
        strides += (mask.stride(3),)
        mask = mask.view(torch.uint8) if form == 1 else mask
    hidden = None if past.hidden is None else past.hidden.contiguous()
    starts, index = turn.start_cos, turn.index
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        attend_splits[(kv_heads * tiles, splits, batch)](
            query, keys, values, tables.keys, tables.key_mean, tables.meta, tables.elements,
            turn.table_cos, turn.table_sin, starts, turn.start_sin, index, hidden, mask, sums, tops,
            *query.stride()[:3], *keys.stride()[:2], *values.stride()[:2],
            0 if starts is None or starts.shape[0] == 1 else starts.stride(0),
            0 if index is None or index.shape[0] == 1 else index.stride(0),
            *strides, past.length, span, splits, count, tiles, scaling * math.log2(math.e), float(softcap or 0.0),
            GROUPS=groups, PAIRS=tables.pairs, BLOCK=BLOCK,
            KEY_BITS=tables.key_bits, VALUE_BITS=tables.value_bits, CHUNKS=tables.chunks,
            INDEXED=index is not None, STARTS=starts is not None, HIDDEN=hidden is not None, MASK=form,
            SOFTCAP=softcap is not None, **settings,
        )  # fmt: skip
        merged = 16  # the least a matrix product takes
        merge_splits[(kv_heads * tiles, -(-rows // merged), batch)](
            sums, tops, tables.values, tables.value_mean, tables.meta, out, lse, splits, count, tiles,
            GROUPS=groups, ROWS=rows, MERGED=merged, DIM=book.values.head_dim, PADDED=tables.values.shape[1],
            WIDTH=width, BITS=tables.merge_bits, SPLITS=SPLITS, num_warps=8, num_stages=2,
        )  # fmt: skip
    return out, lse


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_UNITS
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_plan(length: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(splits, tokens of a split): enough splits to fill the device, each a multiple of BLOCK tokens."""
    blocks = -(-length // BLOCK)
    splits = max(1, min(blocks, -(-WAVES * multiprocessors(device) // programs)))
    span = -(-blocks // splits) * BLOCK
    return -(-length // span), span
