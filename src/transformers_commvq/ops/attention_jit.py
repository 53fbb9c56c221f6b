"""The jit backend: attention over sign codes as compiled loops on the CPU (numba), and the tables they read.

A key is rebuilt by adding up int16 sums of codebook rows, 4 signs at a time, from tables that stay in cache; values are
never rebuilt. Sums of int16 are exact: the only rounding is that of the tables' entries, half of a 2^-15 of the largest
sum that a pair of elements can reach.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
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


@cache
def _kernels() -> Any:
    from . import jit_attend

    return jit_attend


@cache
def _signs():
    return sign_table(torch.float32, "cpu").flatten().numpy()


@cache
def _nothing():
    return np.empty((0, 0, 0, 0), np.float32), np.empty((0, 2), np.int64)


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
    kernels, book, tables = _kernels(), past.book, layer_tables(past.book, past.rope)
    turns = past.positions.groups(past.length, kernels.OFFSETS, kernels.WIDTH)
    key_codes, key_row = jit.storage(past.keys)
    value_codes, value_row = jit.storage(past.values)
    key_first, key_bits = jit.first_and_bits(book.keys.layout)
    value_first, value_bits = jit.first_and_bits(book.values.layout)
    no_bias, no_hidden = _nothing()
    hidden = no_hidden if past.hidden is None else past.hidden.numpy()
    factor, bound = scaling * LOG2E, (softcap or 0.0) * LOG2E
    asked = query.float().contiguous().numpy()
    # Every thread takes its own tokens of all heads, since heads differ in their bits.
    splits = max(1, min(torch.get_num_threads(), past.length // 512))
    parts = (splits, batch, past.heads)
    sums = np.empty((*parts, rows * book.values.layout.max_bits), np.float32)
    tops, mass = np.empty((2, *parts, rows), np.float32)
    work = jit.run(
        kernels.attend(past.rope.pairs, tables.padded_pairs, len(tables.order), rows), splits * batch * past.heads,
        splits, key_codes, key_row, book.keys.token_bytes, value_codes, value_row, book.values.token_bytes, past.length,
        tables.entries, key_first, key_bits, value_first, value_bits, asked, tables.order, tables.scale, factor,
        turns.cos, turns.sin, turns.first_cos, turns.first_sin, turns.broken, turns.whole_cos, turns.whole_sin, hidden,
        no_bias if mask is None else _additive(mask), bound, _signs(), sums, tops, mass,
    )  # fmt: skip
    own = batch if exact else 0
    summed = np.empty((own, past.heads, asked_rows, book.values.head_dim), np.float32)
    summed_tops, summed_mass = np.empty((2, own, past.heads, asked_rows), np.float32)
    if exact:
        brief = exact[0][0].dtype == torch.bfloat16
        arrays = [(t.view(torch.int16) if brief else t.float()).numpy() for part in exact for t in part]
        arrays += [t[:, :, :0] for t in arrays[: 4 - len(arrays)]]
        kernels.attend_exact(brief)(
            asked,
            *arrays,
            no_bias if bias is None else _additive(bias),
            factor,
            bound,
            summed,
            summed_tops,
            summed_mass,
        )
    work()
    out, lse = torch.empty(batch, heads, count, book.values.head_dim), torch.empty(batch, heads, count)
    kernels.finish(
        sums, tops, mass, value_first, value_bits, tables.vectors, tables.mean, summed, summed_tops, summed_mass, count,
        out.numpy(), lse.numpy(),
    )  # fmt: skip
    return out, lse


def _additive(mask: torch.Tensor) -> np.ndarray:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf).numpy()
    return mask.float().contiguous().numpy()
