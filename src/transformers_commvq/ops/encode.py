"""Vectors to sign codes: greedy, then coordinate descent, a few signs at a time.

Minimises ``(x - mean - s C)^T M (x - mean - s C)`` over s in {-1, +1}^n. With h the correlation of every row of C
with the residual (in M) and ``gram = C M C^T``, the best joint choice of a group g of signs, all others fixed, is

    argmax over p in {-1, +1}^|g| of  2 p . (h_g + s_g gram_gg) - p gram_gg p

so each step is a small matrix product over all tokens and heads at once. The greedy pass is the same step from s = 0.
On a CPU with numba the same steps run as compiled loops, token by token, many times faster.
"""

from __future__ import annotations

import torch

from ..codebook import SignBook
from ..packing import pack
from . import jit

GROUP = 4  # signs chosen jointly: 16 candidates
SWEEPS = 2  # coordinate descent passes after the greedy one; a third gains 0.06% of the error
CHUNK = 256  # tokens at a time, so that the working set of a few heads stays in a core's L2 cache
JIT_CHUNK = 4096  # the compiled loops need no such blocking; this only bounds the correlations held at a time


def encode_signs(x: torch.Tensor, book: SignBook) -> torch.Tensor:
    """Sign codes of vectors.

    x: (batch, heads, tokens, head_dim), any float dtype; keys before RoPE.
    Returns uint8 (batch, tokens, bytes), see packing.
    """
    batch, heads, tokens, dim = x.shape
    rows = book.padded()
    dual = rows if book.metric is None else rows @ book.metric.float()  # C M, (heads, n, dim)
    gram = dual @ rows.transpose(1, 2)
    compiled = x.device.type == "cpu" and jit.available()
    out = torch.empty(batch, tokens, book.token_bytes, dtype=torch.uint8, device=x.device)
    step = max(1, (JIT_CHUNK if compiled else CHUNK) // batch)
    for start in range(0, tokens, step):
        y = (x[:, :, start : start + step].float() - book.mean[:, None]).transpose(0, 1)  # (heads, batch, tokens, dim)
        count = y.shape[2]
        correlation = y.reshape(heads, batch * count, dim) @ dual.transpose(1, 2)
        if compiled:
            correlation = correlation.view(heads, batch, count, -1)
            out[:, start : start + count] = jit.pack_signs_jit(correlation, gram, SWEEPS, book.layout)
        else:
            signs = choose_signs(correlation, gram)
            signs = signs.view(heads, batch, count, -1).transpose(0, 1)
            out[:, start : start + count] = pack(signs, book.layout)
    return out


def choose_signs(
    correlation: torch.Tensor,
    gram: torch.Tensor,
    signs: torch.Tensor | None = None,
    sweeps: int = SWEEPS,
    group: int = GROUP,
) -> torch.Tensor:
    """Signs that lower the squared error, in the metric behind ``correlation`` and ``gram``.

    correlation: (heads, tokens, n) float32, of every row of C with the target (or, given signs, with the residual);
        overwritten with the correlations of the final residual.
    gram: (heads, n, n).
    signs: (heads, tokens, n) to start from; None makes a greedy pass first.
    Returns (heads, tokens, n) float32 in {-1, +1}. n must be a multiple of group.
    """
    h, n = correlation, gram.shape[-1]
    passes = sweeps + (signs is None)
    signs = torch.zeros_like(h) if signs is None else signs.clone()
    candidates = _patterns(group, h.device)
    blocks = []
    for a in range(0, n, group):
        g = slice(a, a + group)
        inner = gram[:, g, g]
        cost = ((candidates @ inner) * candidates).sum(-1)[:, None]  # (heads, 1, candidates)
        blocks.append((g, inner, -cost, gram[:, g]))
    twice = 2 * candidates.T.expand(gram.shape[0], group, -1)
    for sweep in range(passes):
        for g, inner, bonus, rows in blocks:
            old = signs[:, :, g]
            target = h[:, :, g] if sweep == 0 and passes > sweeps else torch.baddbmm(h[:, :, g], old, inner)
            new = candidates[torch.baddbmm(bonus, target, twice).argmax(-1)]
            h.baddbmm_(new - old, rows, alpha=-1)
            signs[:, :, g] = new
    return signs


def _patterns(group: int, device: torch.device) -> torch.Tensor:
    bit = (torch.arange(2**group, device=device)[:, None] >> torch.arange(group, device=device)) & 1
    return (1 - 2 * bit).float()
