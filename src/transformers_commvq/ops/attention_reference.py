"""The definition of attention over codes: decode everything, rotate, softmax. Slow, and right by reading."""

from __future__ import annotations

import torch

from .codec import decode
from .past import CodedPast, softcapped, visible


def decoded_keys_values(past: CodedPast, start: int = 0, stop: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys after RoPE and values of tokens start..stop, float32 (batch, heads, tokens, head_dim)."""
    stop = past.length if stop is None else stop
    cos, sin = past.positions.tables(start, stop, past.keys.device)
    keys = decode(past.keys[:, start:stop], past.book.keys)
    return past.rope.rotate(keys, cos[:, None], sin[:, None]), decode(past.values[:, start:stop], past.book.values)


def attention_reference(
    query: torch.Tensor,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.attention. Computes in float32, or in float64 for a float64 query."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // past.heads
    keys, values = (t.to(dtype).repeat_interleave(group, 1) for t in decoded_keys_values(past))
    scores = softcapped(query.to(dtype) @ keys.transpose(2, 3) * scaling, softcap)
    bias = visible(past, mask, 0, past.length)
    scores = scores if bias is None else scores + bias
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return weights @ values, lse
