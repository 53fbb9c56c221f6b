"""The compressed past of one layer, as every attention backend takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..positions import PositionTrack
from ..rope import Rope


@dataclass
class CodedPast:
    """Tokens 0..length of a cache that are held as codes.

    keys, values: uint8 (batch, length, bytes).
    book: LayerBook.
    hidden: (batch, 2) int64 or None: tokens from hidden[:, 0] to hidden[:, 1] are held elsewhere (sinks) and must
        not be seen here.
    """

    keys: torch.Tensor
    values: torch.Tensor
    book: Any
    rope: Rope
    positions: PositionTrack
    hidden: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    @property
    def heads(self) -> int:
        return self.book.keys.heads


def visible(past: CodedPast, mask: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    """What to add to the scores of tokens start..stop, broadcastable to (batch, heads, queries, tokens); None: nothing.

    mask: bool (True is visible) or additive float, (batch or 1, heads or 1, queries or 1, at least stop), or None.
    """
    bias = None
    if mask is not None:
        bias = mask[..., start:stop]
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, device=bias.device).masked_fill_(~bias, -torch.inf)
        bias = bias.float()
    if past.hidden is not None and start < int(past.hidden[:, 1].max()) and stop > int(past.hidden[:, 0].min()):
        token = torch.arange(start, stop, device=past.hidden.device)
        inside = (token >= past.hidden[:, :1]) & (token < past.hidden[:, 1:])
        hide = torch.zeros(inside.shape, device=inside.device).masked_fill_(inside, -torch.inf)[:, None, None]
        bias = hide if bias is None else bias + hide
    return bias


def softcapped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Gemma 2's bounded logits: softcap * tanh(scores / softcap)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
