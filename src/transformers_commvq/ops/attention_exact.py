"""Attention over tokens held in full (sinks, window, the new tokens), with its log-sum-exp for merging."""

from __future__ import annotations

import torch

from .past import softcapped

QUERIES = 512  # queries at a time: scores of a long prompt are never held whole


def attention_exact(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention in float32.

    query: (batch, heads, queries, head_dim); keys, values: (batch, kv_heads, tokens, head_dim).
    bias: added to the scores, -inf hides; broadcastable to (batch, heads, queries, tokens), or None.
    Returns (out float32, normalized; lse float32 (batch, heads, queries)).
    """
    batch, heads, count, dim = query.shape
    kv_heads = keys.shape[1]
    keys, values = keys.float(), values.float()
    outs, sums = [], []
    for a in range(0, count, QUERIES):
        q = query[:, :, a : a + QUERIES].float() * scaling
        rows = q.shape[2]
        scores = q.reshape(batch, kv_heads, -1, dim) @ keys.transpose(2, 3)
        scores = softcapped(scores.view(batch, heads, rows, -1), softcap)
        if bias is not None:
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, a : a + QUERIES])
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        out = weights.view(batch, kv_heads, -1, weights.shape[-1]) @ values
        outs.append(out.view(batch, heads, rows, -1))
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)
