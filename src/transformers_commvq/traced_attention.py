"""Attention written out, as calibration needs it: gradients can be watched, and it tells what errors would cost."""

from __future__ import annotations

import math

import torch
from torch import nn

BLOCK = 256  # queries whose probabilities are held at a time


def explicit_attention(query, key, value, mask, scaling, softcap=None, s_aux=None, **_):
    """Softmax attention written out; the arguments of eager attention.

    query: (batch, heads, queries, head_dim); key, value: (batch, kv heads, keys, head_dim).
    mask: bool (True attends) or additive, or None for causal.
    Returns (batch, queries, heads, head_dim).
    """
    groups = query.shape[1] // key.shape[1]
    if softcap is None and s_aux is None:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        causal = mask is None and query.shape[2] == key.shape[2]
        if mask is None and not causal:
            mask = _causal(query, key)
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)
        return out.transpose(1, 2).contiguous()
    return _block_attention(query, key, value, mask, scaling, softcap, s_aux)[0].transpose(1, 2).contiguous()


def watched_attention(query, key, value, mask, scaling, residual_length, watch, softcap=None, s_aux=None, **_):
    """``explicit_attention`` whose backward pass also tells what keys and values get from far queries alone.

    Queries and keys are of the same tokens, and no query sees a later key. Probabilities are held for ``BLOCK``
    queries at a time, in the backward pass too, so memory grows with the tokens, not with their square.

    residual_length: queries nearer than this are left out of what is told; gradients flow from all.
    watch: called once in the backward pass with the gradients of keys and of values, both (batch, kv heads, tokens,
        head_dim).
    """
    out = _Watched.apply(query, key, value, mask, scaling, max(residual_length, 1), watch, softcap, s_aux)
    return out.transpose(1, 2).contiguous()


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scaling, near, watch, softcap, s_aux):
        ctx.save_for_backward(query, key, value)
        ctx.mask, ctx.near, ctx.watch = mask, near, watch
        ctx.settings = scaling, softcap, s_aux
        blocks = [
            _block_attention(*_block(at, query, key, value), _block_mask(at, mask), *ctx.settings)[0]
            for at in _blocks(query.shape[2])
        ]
        return torch.cat(blocks, 2)

    @staticmethod
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
        far_key, far_value = torch.zeros_like(key), torch.zeros_like(value)

        def of_kv_heads(weights, rows):
            """Sum over queries, and over the query heads of a KV head."""
            return (weights.transpose(2, 3) @ rows).unflatten(1, (key.shape[1], -1)).sum(2)

        for at in _blocks(query.shape[2]):
            with torch.enable_grad():
                q, k, v = (x.detach().requires_grad_() for x in _block(at, query, key, value))
                out, scores, probabilities = _block_attention(q, k, v, _block_mask(at, ctx.mask), *ctx.settings)
            below, seen = grad[:, :, at], slice(at.stop)
            of_query[:, :, at], more_key, more_value, of_scores = torch.autograd.grad(out, (q, k, v, scores), below)
            of_key[:, :, seen] += more_key
            of_value[:, :, seen] += more_value
            last = at.start - ctx.near  # the newest key that a block's first query sees as a code
            far_key[:, :, seen] += of_kv_heads(of_scores.tril(last), q.detach() * ctx.settings[0])
            far_value[:, :, seen] += of_kv_heads(probabilities.detach().tril(last), below)
        ctx.watch(far_key, far_value)
        return of_query, of_key, of_value, *[None] * 6


def _blocks(queries: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, queries)) for start in range(0, queries, BLOCK)]


def _block(at, query, key, value):
    return query[:, :, at], key[:, :, : at.stop], value[:, :, : at.stop]


def _block_mask(at, mask):
    return None if mask is None else mask[:, :, at, : at.stop]


def _causal(query, key):
    """The last query sees all keys."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril(keys - queries)


def _block_attention(query, key, value, mask, scaling, softcap, s_aux):
    """(output (batch, heads, queries, head_dim), uncapped scores, probabilities) with everything held."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query * scaling) @ key.transpose(-1, -2)
    if mask is None:
        mask = _causal(query, key)
    probabilities = _probabilities(scores, mask, softcap, s_aux).to(query.dtype)
    return probabilities @ value, scores, probabilities


def weighing_attention(query, key, value, mask, scaling, residual_length, softcap=None, s_aux=None, **_):
    """Attention, and how much the errors of each token's key and value weigh for the queries that read its codes.

    With a the probability that a query gives the token and o the query's output, an error dv of the value moves the
    output by a dv, and an error dk of the key by a (v - o) (q . dk). So the squares count: a^2 for values, and
    a^2 |v - o|^2 |q|^2 for keys, summed over queries.

    Arguments as for ``explicit_attention``, queries and keys of the same tokens, none of which sees a later one.
    residual_length: queries nearer than this read exact tokens.
    Returns the output (batch, queries, heads, head_dim), and the weights (of keys, of values), both (batch, kv heads,
    tokens) float32.
    """
    heads, tokens = query.shape[1:3]
    output = query.new_empty(*query.shape[:3], value.shape[3])
    groups = heads // key.shape[1]
    of_keys, of_values = torch.zeros(2, *key.shape[:3], device=query.device)
    near = max(residual_length, 1)
    for h in range(key.shape[1]):
        own = slice(h * groups, (h + 1) * groups)
        queries, keys, values = query[:, own].float(), key[:, h : h + 1].float(), value[:, h : h + 1].float()
        visible = mask if mask is None or mask.shape[1] == 1 else mask[:, own]
        aux = None if s_aux is None else s_aux.flatten()[own]
        for at in _blocks(tokens):
            q, k, v = _block(at, queries, keys, values)
            seen = _causal(q, k) if mask is None else _block_mask(at, visible)
            a = _probabilities(q * scaling @ k.transpose(2, 3), seen, softcap, aux)
            out = output[:, own, at] = a @ v
            square = a.tril(at.start - near).square().flatten(1, 2).transpose(1, 2)  # (batch, keys, groups * queries)
            of_values[:, h, : at.stop] += square.sum(2)
            rate = q.square().sum(3, keepdim=True)
            told = torch.cat([rate, rate * out, rate * out.square().sum(3, keepdim=True)], 3).flatten(1, 2)
            once, along, whole = (square @ told).split([1, v.shape[3], 1], 2)
            spread = v[:, 0].square().sum(2) * once[..., 0] - 2 * (along * v[:, 0]).sum(2) + whole[..., 0]
            of_keys[:, h, : at.stop] += spread.clamp_min(0)
    return output.transpose(1, 2).contiguous(), (of_keys, of_values)


def _probabilities(scores, mask, softcap, s_aux):
    """Softmax over keys, float32; a sink logit takes its share and is left out."""
    logits = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1).to(logits.dtype)
        logits = torch.cat([logits, sink], -1)
    return logits.softmax(-1, torch.float32)[..., : scores.shape[-1]]
