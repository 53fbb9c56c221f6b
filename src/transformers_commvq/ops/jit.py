"""The jit backend: attention over codes and the encoder as compiled loops on the CPU (numba).

A key is rebuilt by looking up sums of codebook rows, 4 signs at a time, in tables that stay in cache; values are never
rebuilt. Needs the ``cpu`` extra (numba), but no C compiler.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from ..codebook import SignBook
from ..packing import CodeLayout, sign_table
from ..rope import Rope
from .attention_cpu import attention_blockwise
from .past import CodedPast, softcapped, visible

MAX_ROWS = 16  # queries of a group of heads; more are a matrix product, which the blockwise backend does better


@cache
def available() -> bool:
    """Whether numba is installed; it is imported on first use only."""
    return importlib.util.find_spec("numba") is not None


@cache
def _kernels() -> Any:
    from . import jit_kernels

    return jit_kernels


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="transformers_commvq")


def _run(kernel: Any, tasks: int, *args: Any, least: int = 1) -> None:
    """Spread a kernel's tasks over as many threads as torch uses; least: tasks that are worth a thread."""
    threads = max(1, min(torch.get_num_threads(), tasks // least))
    cuts = [tasks * i // threads for i in range(threads + 1)]
    pool = _pool(threads - 1) if threads > 1 else None
    others = [pool.submit(kernel, a, b, *args) for a, b in pairwise(cuts[1:])]
    kernel(0, cuts[1], *args)  # this thread takes its share too
    for other in others:
        other.result()


@cache
def _first_and_bits(layout: CodeLayout):
    bits = torch.tensor(layout.bits)
    return (bits.cumsum(0) - bits).numpy(), bits.numpy()


@cache
def _dimensions(rope: Rope, dim: int) -> torch.Tensor:
    """Order of a head's dimensions that puts real parts first, then imaginary parts, then what is not rotated."""
    return torch.cat(rope.split(torch.arange(dim)))


def _storage(codes: torch.Tensor):
    """(1-d uint8 array over the codes' memory, bytes from one batch row to the next)."""
    batch, tokens, width = codes.shape
    row = codes.stride(0) if batch > 1 else tokens * width
    if codes.stride(2) != 1 or (tokens > 1 and codes.stride(1) != width):
        codes, row = codes.contiguous(), tokens * width
    return codes.as_strided(((batch - 1) * row + tokens * width,), (1,)).numpy(), row


def attention_jit(
    query: torch.Tensor,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.attention. Inputs on the CPU; more than MAX_ROWS queries go to the blockwise backend."""
    batch, heads, count, dim = query.shape
    rows = heads // past.heads * count
    if rows > MAX_ROWS or not isinstance(past.book.keys, SignBook) or not isinstance(past.book.values, SignBook):
        return attention_blockwise(query, past, mask, scaling, softcap)
    grouped = query.float().reshape(batch, past.heads, rows, dim) * scaling
    scores = _scores(grouped, past).view(batch, heads, count, past.length)
    scores = softcapped(scores, softcap)
    bias = visible(past, mask, 0, past.length)
    scores = scores if bias is None else scores.add_(bias)
    lse = torch.logsumexp(scores, -1)
    weights = scores.sub_(lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_()
    weights = weights.view(batch, past.heads, rows, -1)
    sums = _value_sums(weights, past)
    book = past.book.values
    seen = (lse > -torch.inf).float().view(batch, past.heads, rows, 1)
    out = sums @ book.padded() + seen * book.mean[:, None]
    return out.view(batch, heads, count, -1), lse


def _scores(query: torch.Tensor, past: CodedPast) -> torch.Tensor:
    """(batch, heads, rows, dim) scaled -> (batch, heads, rows, tokens)."""
    kernels, book = _kernels(), past.book.keys
    order = _dimensions(past.rope, book.head_dim)
    first, bits = _first_and_bits(book.layout)
    tables = kernels.nibble_tables(
        book.vectors[:, order].float().numpy(), first, bits, book.mean[:, order].contiguous().numpy()
    )
    (cos, sin), (cos0, sin0), broken, whole = past.positions.groups(past.length, kernels.OFFSETS)
    batch = query.shape[0]
    cos0, sin0 = (t.expand(batch, -1, -1).contiguous().numpy() for t in (cos0, sin0))
    whole = whole.expand(batch, -1, -1, -1).contiguous().numpy()
    storage, row = _storage(past.keys)
    out = torch.empty(*query.shape[:3], past.length)
    tasks = batch * book.heads * -(-past.length // (kernels.OFFSETS * kernels.GROUPS))
    kernel = kernels.key_scores(book.head_dim, past.rope.pairs)
    turned = query[..., order].contiguous().numpy()
    _run(
        kernel, tasks, storage, row, book.token_bytes, past.length, tables, first, bits, turned, cos.numpy(),
        sin.numpy(), cos0, sin0, broken, whole, out.numpy(),
    )  # fmt: skip
    return out


def _value_sums(weights: torch.Tensor, past: CodedPast) -> torch.Tensor:
    """(batch, heads, rows, tokens) -> sums of signs (batch, heads, rows, max_bits)."""
    kernels, book = _kernels(), past.book.values
    threads = torch.get_num_threads()
    batch, heads, rows, tokens = weights.shape
    # Enough tasks for every thread, but none so short that clearing and folding its sums is most of its work.
    splits = max(1, min(-(-2 * threads // (batch * heads)), tokens // 1024))
    out = torch.zeros(batch, heads, splits, rows, book.layout.max_bits)
    storage, row = _storage(past.values)
    first, bits = _first_and_bits(book.layout)
    _run(
        kernels.value_sums(rows), batch * heads * splits, storage, row, book.token_bytes, tokens, first, bits,
        weights.contiguous().numpy(), splits, out.numpy(),
    )  # fmt: skip
    return out.sum(2)


@cache
def _candidates():
    return sign_table(torch.float32, "cpu")[:16, :4].T.contiguous().numpy()


def pack_signs_jit(correlation: torch.Tensor, gram: torch.Tensor, sweeps: int, layout: CodeLayout) -> torch.Tensor:
    """Choose signs as ops.encode.choose_signs does with groups of 4, and pack them.

    correlation: (heads, batch, tokens, n) float32, overwritten; gram: (heads, n, n). Both on the CPU.
    Returns uint8 (batch, tokens, bytes).
    """
    kernels = _kernels()
    _, batch, tokens, _ = correlation.shape
    out = torch.empty(batch, tokens, layout.total_bytes, dtype=torch.uint8)
    first, bits = _first_and_bits(layout)
    storage, row = _storage(out)
    gram = gram.contiguous().numpy()
    bonus = kernels.pattern_costs(gram, _candidates(), bits)
    heads, batch, tokens, _ = correlation.shape
    _run(
        kernels.choose_and_pack, heads * batch * -(-tokens // kernels.LANES), correlation.contiguous().numpy(), gram,
        bonus, sweeps, first, bits, storage, row, layout.total_bytes,
    )  # fmt: skip
    return out
