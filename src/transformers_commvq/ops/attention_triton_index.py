"""Attention over index codes in Triton kernels: the launches.

Plainer than the kernels for sign codes: scores with a span of tokens are written out, their softmax is torch's, and the
values' bits are summed under the weights. Keys and values are never rebuilt in memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.utils.weak import WeakIdKeyDictionary

from ..index_book import IndexBook, JointBinaryBook
from .index_codes import value_project
from .merge import merge
from .past import CodedPast, softcapped, some_queries, visible
from .triton_index import index_scores, weighted_bits
from .triton_tables import BLOCK, rotations

SCORES = 1 << 25  # scores held at a time, float32
QUERIES = 512  # at a time
ROWS = 16  # query rows of a tile: the least a matrix product takes
TOKENS = 32  # keys of a program, and values of a step
WIDTH = 128  # bits of a value that a program sums
SHARE = 1024  # tokens of a split of the values

_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass
class KeyTable:
    """A layer's key books as the kernel reads them; pairs padded to a power of two, 16 or more.

    entries: float16 (stages, heads, 64, 2, pairs), real and imaginary parts.
    elements: int32 (2, pairs), the element of a head each part is; -1 where there is none.
    """

    entries: torch.Tensor
    elements: torch.Tensor

    @property
    def pairs(self) -> int:
        return self.elements.shape[1]


def key_table(book: IndexBook) -> KeyTable:
    """The table of a book, made at the first call and kept as long as the book."""
    if book not in _tables:
        half = book.head_dim // 2
        pairs = max(16, triton.next_power_of_2(half))
        entries = torch.nn.functional.pad(book.z.unflatten(-1, (2, half)), (0, pairs - half)).half().contiguous()
        elements = torch.nn.functional.pad(torch.arange(book.head_dim).view(2, half), (0, pairs - half), value=-1)
        _tables[book] = KeyTable(entries, elements.to(book.device, torch.int32))
    return _tables[book]


def held_bytes(book: Any) -> int:
    """Bytes of the table made for a key book so far."""
    return _tables[book].entries.nbytes if book in _tables else 0


def supports(query: torch.Tensor, past: CodedPast) -> bool:
    """Whether the kernels can do this: index codes, and all of a head rotated as its codes are, in halves."""
    books = isinstance(past.book.keys, IndexBook) and isinstance(past.book.values, JointBinaryBook)
    dim = past.book.keys.head_dim
    return books and past.rope.layout == "half" and past.rope.rotary_dim == dim <= 256 and query.dtype != torch.float64


@some_queries(QUERIES)
def attention_index(
    query: torch.Tensor,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.attention. ``supports`` must hold."""
    batch, heads, count, _ = query.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (past.keys, past.values))
    span = max(1, SCORES // (batch * heads * count) // BLOCK) * BLOCK
    device = query.device
    features = lse = None
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for first in range(0, past.length, span):
            stop = min(first + span, past.length)
            scores = softcapped(_scores(query, keys, past, first, stop, scaling), softcap)
            bias = visible(past, mask, first, stop)
            scores = scores if bias is None else scores + bias
            new_lse = torch.logsumexp(scores, -1)
            weights = torch.exp(scores - new_lse.masked_fill(new_lse == -torch.inf, 0)[..., None])
            new = _summed(weights, values, past.book.values, first, stop)
            features, lse = (new, new_lse) if features is None else merge(features, lse, new, new_lse)
    out = value_project(features.view(batch, past.heads, -1, features.shape[-1]), 1.0, past.book.values)
    return out.view(batch, heads, count, -1), lse


def _scores(query, keys, past: CodedPast, first: int, stop: int, scaling: float) -> torch.Tensor:
    """Scaled scores with tokens first..stop, float32 (batch, heads, queries, tokens)."""
    batch, heads, count, _ = query.shape
    book, table = past.book.keys, key_table(past.book.keys)
    turn = rotations(past, table.pairs)
    starts, index = turn.start_cos, turn.index
    scores = torch.empty(batch, heads, count, stop - first, dtype=torch.float32, device=query.device)
    index_scores[(triton.cdiv(stop - first, TOKENS), book.heads, batch)](
        query, keys, table.entries, table.elements,
        turn.table_cos, turn.table_sin, starts, turn.start_sin, index, scores,
        *query.stride()[:3], *keys.stride()[:2],
        0 if starts is None or starts.shape[0] == 1 else starts.stride(0),
        0 if index is None or index.shape[0] == 1 else index.stride(0),
        first, stop, count, scaling,
        GROUPS=heads // book.heads, STAGES=book.stages, PAIRS=table.pairs, ROWS=ROWS, TOKENS=TOKENS, BLOCK=BLOCK,
        INDEXED=index is not None, STARTS=starts is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    return scores


def _summed(weights, values, book: JointBinaryBook, first: int, stop: int) -> torch.Tensor:
    """Bits times factors under weights (batch, heads, queries, tokens): float32 (batch, heads, queries, bits)."""
    batch, heads, count, _ = weights.shape
    rows, bits = heads * count, book.embedding.shape[0]
    splits = triton.cdiv(stop - first, SHARE)
    sums = torch.empty(batch * splits, rows, bits, dtype=torch.float32, device=weights.device)
    weighted_bits[(triton.cdiv(bits, WIDTH), triton.cdiv(rows, ROWS), batch * splits)](
        values, weights, sums, *values.stride()[:2], first, stop, SHARE, rows,
        BITS=bits, WIDTH=WIDTH, ROWS=ROWS, TOKENS=TOKENS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return sums.view(batch, splits, heads, count, bits).sum(1)
