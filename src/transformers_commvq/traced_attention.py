"""Attention written out, as calibration needs it: gradients can be watched, and it tells what errors would cost."""

from __future__ import annotations

import math

import torch
from torch import nn

BLOCK = 256  # queries whose probabilities are held at a time


def explicit_attention(query, key, value, mask, scaling, watch=None, softcap=None, s_aux=None, **_):
    """Softmax attention written out, so that gradients at the scores can be watched; the arguments of eager attention.

    query: (batch, heads, queries, head_dim); key, value: (batch, kv heads, keys, head_dim).
    mask: bool (True attends) or additive, or None for causal.
    watch: None, or two callables that receive the gradients of (unmasked, uncapped) scores, and of the output together
        with the probabilities.
    Returns (batch, queries, heads, head_dim).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if watch is None and softcap is None and s_aux is None:
        causal = mask is None and query.shape[2] > 1
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)
        return out.transpose(1, 2).contiguous()
    scores = (query * scaling) @ key.transpose(-1, -2)
    if watch:
        scores.register_hook(watch[0])
    if mask is None:
        q, k = scores.shape[-2:]
        mask = torch.ones(q, k, dtype=torch.bool, device=scores.device).tril(k - q)
    probabilities = _probabilities(scores, mask, softcap, s_aux).to(query.dtype)
    out = probabilities @ value
    if watch:
        out.register_hook(lambda grad: watch[1](grad, probabilities))
    return out.transpose(1, 2).contiguous()


def far_importance(query, key, value, mask, scaling, residual_length, softcap=None, s_aux=None, **_):
    """How much the errors of each token's key and value weigh, summed over the queries that will read its codes.

    With a the probability that a query gives the token and o the query's output, an error dv of the value moves the
    output by a dv, and an error dk of the key by a (v - o) (q . dk). So the squares count: a^2 for values, and
    a^2 |v - o|^2 |q|^2 for keys.

    Arguments as for ``explicit_attention``, queries and keys of the same tokens. residual_length: queries nearer than
    this read exact tokens.
    Returns (of keys, of values), both (batch, kv heads, tokens) float32.
    """
    heads, tokens = query.shape[1:3]
    groups = heads // key.shape[1]
    of_keys, of_values = torch.zeros(2, *key.shape[:3], device=query.device)
    near = max(residual_length, 1)
    for h in range(key.shape[1]):
        own = slice(h * groups, (h + 1) * groups)
        k, v = key[:, h : h + 1].float(), value[:, h : h + 1].float()
        aux = None if s_aux is None else s_aux.flatten()[own]
        for start in range(near // BLOCK * BLOCK, tokens, BLOCK):
            stop = min(start + BLOCK, tokens)
            q = query[:, own, start:stop].float()
            if mask is None:
                seen = torch.ones(stop - start, tokens, dtype=torch.bool, device=q.device).tril(start)[None, None]
            else:
                seen = (mask if mask.shape[1] == 1 else mask[:, own])[:, :, start:stop]
            a = _probabilities(q * scaling @ k.transpose(2, 3), seen, softcap, aux)
            out = a @ v
            square = a.tril(start - near).square().flatten(1, 2).transpose(1, 2)  # (batch, keys, groups * queries)
            of_values[:, h] += square.sum(2)
            rate = q.square().sum(3, keepdim=True)
            told = torch.cat([rate, rate * out, rate * out.square().sum(3, keepdim=True)], 3).flatten(1, 2)
            once, along, whole = (square @ told).split([1, v.shape[3], 1], 2)
            spread = v[:, 0].square().sum(2) * once[..., 0] - 2 * (along * v[:, 0]).sum(2) + whole[..., 0]
            of_keys[:, h] += spread.clamp_min(0)
    return of_keys, of_values


def _probabilities(scores, mask, softcap, s_aux):
    """Softmax over keys, float32; a sink logit takes its share and is left out."""
    logits = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1).to(logits.dtype)
        logits = torch.cat([logits, sink], -1)
    return logits.softmax(-1, torch.float32)[..., : scores.shape[-1]]
