"""Vectors to sign codes: greedy, then coordinate descent, a few signs at a time.

Minimises ``(x - mean - s C)^T M (x - mean - s C)`` over s in {-1, +1}^n. With h the correlation of every row of C
with the residual (in M) and ``gram = C M C^T``, the best joint choice of a group g of signs, all others fixed, is

    argmax over p in {-1, +1}^|g| of  2 p . (h_g + s_g gram_gg) - p gram_gg p

so each step is a small matrix product over all tokens and heads at once. The greedy pass is the same step from s = 0.
It and the next go through the rows in their own order; the last passes take rows together that are alike (sign_groups).
On a CPU with numba the same steps run as compiled loops, token by token, many times faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..codebook import SignBook
from ..packing import pack
from . import jit
from .sign_groups import GROUP, gram_of, orders_of

PLAIN_PASSES = 2  # the greedy one, and one of coordinate descent
COUPLED_ORDERS, COUPLED_TIMES = 2, 2  # then of coordinate descent over rows that are alike
ROUGH_PASSES = 3  # in all, where only the rows' own order is used
CHUNK = 256  # tokens at a time, so that the working set of a few heads stays in a core's L2 cache
JIT_CHUNK = 4096  # the compiled loops need no such blocking; this only bounds the correlations held at a time


def encode_signs(x: torch.Tensor, book: SignBook, rough: bool = False) -> torch.Tensor:
    """Sign codes of vectors.

    x: (batch, heads, tokens, head_dim), any float dtype; keys before RoPE.
    rough: never leave the rows' own order. Codes lose more; the learner begins so (em.py).
    Returns uint8 (batch, tokens, bytes), see packing.
    """
    batch, heads, tokens, dim = x.shape
    dual, gram = gram_of(book)
    orders = pass_orders(book, rough)
    compiled = x.device.type == "cpu" and jit.available()
    out = torch.empty(batch, tokens, book.token_bytes, dtype=torch.uint8, device=x.device)
    step = max(1, (JIT_CHUNK if compiled else CHUNK) // batch)
    for start in range(0, tokens, step):
        y = (x[:, :, start : start + step].float() - book.mean[:, None]).transpose(0, 1)  # (heads, batch, tokens, dim)
        count = y.shape[2]
        correlation = y.reshape(heads, batch * count, dim) @ dual.transpose(1, 2)
        if compiled:
            correlation = correlation.view(heads, batch, count, -1)
            out[:, start : start + count] = jit.pack_signs_jit(correlation, gram, orders, book.layout)
        else:
            signs = choose_signs(correlation, gram, orders)
            signs = signs.view(heads, batch, count, -1).transpose(0, 1)
            out[:, start : start + count] = pack(signs, book.layout)
    return out


def pass_orders(book: SignBook, rough: bool = False) -> list[torch.Tensor | None]:
    """The order of rows in each of the encoder's passes, int64 (heads, n); None is their own."""
    if rough:
        return [None] * ROUGH_PASSES
    return [None] * PLAIN_PASSES + orders_of(book, COUPLED_ORDERS) * COUPLED_TIMES


def choose_signs(
    correlation: torch.Tensor,
    gram: torch.Tensor,
    orders: Sequence[torch.Tensor | None],
    signs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Signs that lower the squared error, in the metric behind ``correlation`` and ``gram``.

    correlation: (heads, tokens, n) float32, of every row of C with the target (or, given signs, with the residual);
        overwritten.
    gram: (heads, n, n).
    orders: of each pass, the order of rows, every ``GROUP`` neighbours chosen together: int64 (heads, n), or None.
    signs: (heads, tokens, n) to start from; None: the first pass is greedy.
    Returns (heads, tokens, n) float32 in {-1, +1}. n must be a multiple of ``GROUP``.
    """
    signs = torch.zeros_like(correlation) if signs is None else signs.clone()
    for order in orders:
        if order is None:
            _pass(correlation, gram, signs)
            continue
        columns = order[:, None]
        turned = gram.gather(1, order[..., None].expand_as(gram)).gather(2, columns.expand_as(gram))
        wide = columns.expand_as(signs)
        h, s = correlation.gather(2, wide), signs.gather(2, wide)
        _pass(h, turned, s)
        correlation.scatter_(2, wide, h)
        signs.scatter_(2, wide, s)
    return signs


def _pass(h: torch.Tensor, gram: torch.Tensor, signs: torch.Tensor) -> None:
    """Coordinate descent over neighbours, in place. h: correlations with the residual, (heads, tokens, n)."""
    candidates = _patterns(GROUP, h.device)
    twice = 2 * candidates.T.expand(gram.shape[0], GROUP, -1)
    for start in range(0, gram.shape[-1], GROUP):
        g = slice(start, start + GROUP)
        inner, old = gram[:, g, g], signs[:, :, g]
        bonus = -((candidates @ inner) * candidates).sum(-1)[:, None]  # (heads, 1, candidates)
        target = torch.baddbmm(h[:, :, g], old, inner)
        new = candidates[torch.baddbmm(bonus, target, twice).argmax(-1)]
        h.baddbmm_(new - old, gram[:, g], alpha=-1)
        signs[:, :, g] = new


def _patterns(group: int, device: torch.device) -> torch.Tensor:
    bit = (torch.arange(2**group, device=device)[:, None] >> torch.arange(group, device=device)) & 1
    return (1 - 2 * bit).float()
