"""Blockwise attention over codes in plain torch: never more than one block of decoded keys at a time.

Values are not decoded at all: their features (signs) are summed under the softmax weights, and the codebook is
applied once per query.
"""

from __future__ import annotations

import torch

from .codec import decode, kind_of
from .merge import OnlineSoftmax
from .past import CodedPast, softcapped, some_queries, visible

BLOCK = 1024  # tokens decoded at a time
QUERIES = 512  # queries at a time, so that scores stay small when a long prompt meets a long past


@some_queries(QUERIES)
def attention_blockwise(
    query: torch.Tensor,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.attention."""
    batch, heads, count, dim = query.shape
    groups = heads // past.heads
    scaled = query.float().reshape(batch, past.heads, groups * count, dim) * scaling
    value_kind = kind_of(past.book.values)
    state = OnlineSoftmax()
    for start in range(0, past.length, BLOCK):
        stop = min(start + BLOCK, past.length)
        keys = decode(past.keys[:, start:stop], past.book.keys)
        (cos, sin), origin = past.positions.block(start, stop, BLOCK, keys.device)
        keys = past.rope.rotate(keys, cos[:, None], sin[:, None])
        turned = scaled if origin is None else past.rope.pull_back(scaled, *(t[:, None] for t in origin))
        scores = softcapped(turned @ keys.transpose(2, 3), softcap)
        bias = visible(past, mask, start, stop)
        if bias is not None:
            full = scores.view(batch, heads, count, stop - start) + bias
            scores = full.view(batch, past.heads, groups * count, stop - start)
        state.add(scores, value_kind.features(past.values[:, start:stop], past.book.values))
    features, seen, lse = state.finish()
    out = value_kind.project(features, seen, past.book.values)
    return out.view(batch, heads, count, -1), lse.view(batch, heads, count)
