"""The jit backend: attention over sign codes as compiled loops on the CPU (numba), and the tables they read.

A key is rebuilt by adding up int16 sums of codebook rows, 4 signs at a time, from tables that stay in cache; values are
never rebuilt. Sums of int16 are exact: the only rounding is that of the tables' entries, half of a 2^-15 of the largest
sum that a pair of elements can reach.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..codebook import LayerBook, SignBook
from ..packing import sign_table
from ..rope import Rope
from . import jit
from .attention_cpu import attention_blockwise
from .past import CodedPast

MAX_ROWS = 16  # queries of a group of heads; more are a matrix product, which the blockwise backend does better
LANES = 16  # int16 numbers of a vector: elements of a key are padded to a multiple
THREAD_TOKENS = 512  # tokens of one head that make another thread worth its start
LOG2E = math.log2(math.e)

_lock = threading.Lock()
_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass
class LayerTables:
    """One layer's codebooks as the loops read them; numpy arrays, shared by all caches of a model.

    order: int64 (dim,), element of a head that stands at each place of a key (real parts, imaginary parts, rest, each
        padded), or -1.
    entries: int16 1-d (sum of key bits / 4, 16, dim), sums of 4 rows of C for every pattern of their signs; the mean
        is in each head's first.
    scale: float32 (heads, dim), what a unit of ``entries`` is worth; equal for both parts of a pair.
    vectors, mean: float32 (sum of value bits, head_dim), (heads, head_dim), of the values.
    """

    order: np.ndarray
    entries: np.ndarray
    scale: np.ndarray
    vectors: np.ndarray
    mean: np.ndarray
    padded_pairs: int

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, f.name).nbytes for f in fields(self) if f.name != "padded_pairs")


def layer_tables(book: LayerBook, rope: Rope) -> LayerTables:
    """The tables of a layer's books, made at the first call and kept as long as the book."""
    known = _tables.get(book)
    if known is None or known[0] != rope:
        with _lock:
            known = _tables[book] = (rope, _layer_tables(book, rope))
    return known[1]


def held_bytes(book: LayerBook) -> int:
    """Bytes of the tables made for this book so far."""
    known = _tables.get(book)
    return 0 if known is None else known[1].nbytes


def _order(rope: Rope, dim: int) -> tuple[torch.Tensor, int]:
    re, im, rest = rope.split(torch.arange(dim))
    padded = -(-len(re) // (LANES // 2)) * (LANES // 2)
    order = torch.full((2 * padded + -(-len(rest) // LANES) * LANES,), -1)
    order[: len(re)], order[padded : padded + len(im)] = re, im
    order[2 * padded : 2 * padded + len(rest)] = rest
    return order, padded


@torch.inference_mode(False)
@torch.no_grad()
def _layer_tables(book: LayerBook, rope: Rope) -> LayerTables:
    keys, values = book.keys, book.values
    order, padded = _order(rope, keys.head_dim)
    rows = keys.vectors.float()[:, order.clamp_min(0)].masked_fill(order < 0, 0)
    mean = keys.mean[:, order.clamp_min(0)].masked_fill(order < 0, 0)
    patterns = sign_table(torch.float32, "cpu")[:16, :4]
    entries, scales, start = [], [], 0
    for head, bits in enumerate(keys.layout.bits):
        mine = rows[start : start + bits]
        # No sum of rows and mean may leave int16, nor any sum on the way: the bound is that of all signs agreeing.
        reach = mine.abs().sum(0) + mean[head].abs()
        pair = torch.maximum(reach[:padded], reach[padded : 2 * padded])
        scale = torch.cat([pair, pair, reach[2 * padded :]]).clamp_min(torch.finfo(torch.float32).tiny) / 32700
        sums = torch.einsum("vi,gid->gvd", patterns, mine.view(-1, 4, len(order)))
        sums[0] += mean[head]
        entries.append((sums / scale).round().to(torch.int16))
        scales.append(scale)
        start += bits
    return LayerTables(
        order.numpy(),
        torch.cat(entries).flatten().numpy(),
        torch.stack(scales).numpy(),
        values.vectors.float().contiguous().numpy(),
        values.mean.float().contiguous().numpy(),
        padded,
    )


@dataclass
class _Codes:
    """What the loops read of a compressed past: made once for all steps between two encodings.

    fields: those of a block that stay (from jit_block.HELD on). arrays: what their addresses mean, kept alive.
    rotations: the arrays among them that may change while codes do not.
    """

    tables: LayerTables
    rotations: Any
    fields: array[int]
    arrays: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, past: CodedPast, rotations: Any) -> _Codes:
        from .jit_block import HELD, Field

        keys, values, tables = past.book.keys, past.book.values, layer_tables(past.book, past.rope)
        (key_codes, key_row), (value_codes, value_row) = jit.storage(past.keys), jit.storage(past.values)
        arrays = {
            Field.KEY_CODES_AT: key_codes,
            Field.VALUE_CODES_AT: value_codes,
            Field.TABLES_AT: tables.entries,
            Field.ORDER_AT: tables.order,
            Field.SCALE_AT: tables.scale,
            Field.COS_AT: rotations.cos,
            Field.SIN_AT: rotations.sin,
            Field.START_COS_AT: rotations.first_cos,
            Field.START_SIN_AT: rotations.first_sin,
            Field.BROKEN_AT: rotations.broken,
            Field.WHOLE_COS_AT: rotations.whole_cos,
            Field.WHOLE_SIN_AT: rotations.whole_sin,
            Field.HIDDEN_AT: np.empty((0, 2), np.int64) if past.hidden is None else past.hidden.numpy(),
            Field.SIGNS_AT: _signs(),
            Field.VECTORS_AT: tables.vectors,
            Field.MEAN_AT: tables.mean,
        }
        for side, book in (("KEY", keys), ("VALUE", values)):
            first, bits = jit.first_and_bits(book.layout)
            arrays |= {Field[f"{side}_FIRST_AT"]: first, Field[f"{side}_BITS_AT"]: bits}
        assert all(a.flags.c_contiguous for a in arrays.values())
        numbers = {
            Field.KEY_STRIDE: key_row,
            Field.KEY_WIDTH: keys.token_bytes,
            Field.VALUE_STRIDE: value_row,
            Field.VALUE_WIDTH: values.token_bytes,
            Field.TOKENS: past.length,
            Field.MOST_VALUE_BITS: values.layout.max_bits,
            Field.HEAD_DIM: keys.head_dim,
            Field.VALUE_DIM: values.head_dim,
            Field.START_ROWS: rotations.first_cos.shape[0],
            Field.HIDDEN_ROWS: arrays[Field.HIDDEN_AT].shape[0],
        } | {field: a.ctypes.data for field, a in arrays.items()}
        held = array("q", (numbers[field] for field in list(Field)[HELD:]))
        return cls(tables, rotations, held, tuple(arrays.values()))


def _codes(past: CodedPast, offsets: int, width: int) -> _Codes:
    rotations = past.positions.groups(past.length, offsets, width)
    known = past.prepared.get("jit")
    if known is None or known.rotations is not rotations:
        known = past.prepared["jit"] = _Codes.of(past, rotations)
    return known


@cache
def _kernels() -> Any:
    from . import jit_attend, jit_block

    return jit_attend, jit_block


@cache
def _signs():
    return sign_table(torch.float32, "cpu").flatten().numpy()


def supports(query: torch.Tensor, past: CodedPast) -> bool:
    """Whether the loops can do this: on the CPU, sign codes, few queries."""
    rows = query.shape[1] // past.heads * query.shape[2]
    signs = isinstance(past.book.keys, SignBook) and isinstance(past.book.values, SignBook)
    return query.device.type == "cpu" and signs and rows <= MAX_ROWS and jit.available()


def attention_jit(
    query: torch.Tensor,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.attention. Inputs on the CPU; what ``supports`` denies goes to the blockwise backend."""
    if not supports(query, past):
        return attention_blockwise(query, past, mask, scaling, softcap)
    return merged_jit(query, (), None, past, mask, scaling, softcap)


def merged_jit(
    query: torch.Tensor,
    exact: Sequence[tuple[torch.Tensor, torch.Tensor]],
    bias: torch.Tensor | None,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.merged_attention; at most two parts, none leaves the exact tokens out. ``supports`` must hold."""
    batch, heads, count, _ = query.shape
    asked_rows = heads // past.heads * count
    # Kernels are compiled for a number of rows: a step of decoding gets its own, more queries share two sizes.
    rows = asked_rows if count == 1 else next(r for r in (MAX_ROWS // 2, MAX_ROWS) if r >= asked_rows)
    kernels, block = _kernels()
    codes = _codes(past, kernels.OFFSETS, kernels.WIDTH)
    query = query.float().contiguous()
    pairs, exact_tokens = batch * past.heads, sum(keys.shape[2] for keys, _ in exact)
    threads = max(1, min(torch.get_num_threads(), (past.length + exact_tokens) * pairs // THREAD_TOKENS))
    # Every split takes its own tokens of all heads, since heads differ in their bits.
    splits = max(1, min(threads, past.length // 512))
    values = past.book.values
    most_bits, dim = values.layout.max_bits, values.head_dim
    brief = bool(exact) and exact[0][0].dtype == torch.bfloat16
    parts, alive = [], []
    for keys_values in (*exact, *[None] * (2 - len(exact))):
        parts.append(0 if keys_values is None else keys_values[0].shape[2])
        for t in keys_values or ():
            t = t if brief else t.float()
            t = t if t.stride(3) == 1 else t.contiguous()
            alive.append(t)
            parts += [t.data_ptr(), *t.stride()[:3]]
        if keys_values is None:
            parts += [0] * 8
    masks = [_additive(mask), _additive(bias)]
    out, lse = torch.empty(batch, heads, count, dim), torch.empty(batch, heads, count)
    sizes = [splits * pairs * rows * n for n in (most_bits, 1, 1)] + [pairs * asked_rows * n for n in (dim, 1, 1)]
    ends = list(accumulate(sizes))
    scratch = torch.empty(ends[-1])
    base = scratch.data_ptr()
    coded_tasks = splits * pairs
    fields = [
        0, coded_tasks + (pairs if exact else 0), coded_tasks, splits, batch, past.heads, heads // past.heads, count,
        brief, block.float_bits(scaling * LOG2E), block.float_bits((softcap or 0.0) * LOG2E), query.data_ptr(),
        *(n for m in masks for n in ((0, 0, 0, 0, 0) if m is None else (m.data_ptr(), *m.shape))),
        *parts, *(base + 4 * start for start in (0, *ends[:-1])), out.data_ptr(), lse.data_ptr(),
    ]  # fmt: skip
    numbers = array("q", fields)
    numbers.extend(codes.fields)
    numbers.extend([0] * pairs)
    work = kernels.attend(past.rope.pairs, codes.tables.padded_pairs, len(codes.tables.order), rows)
    jit.run_team(work, numbers, threads)
    return out, lse


def _additive(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.float().contiguous()
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
