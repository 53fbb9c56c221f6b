"""The compressed past of one layer, as every attention backend takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from ..positions import PositionTrack
from ..rope import Rope

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass
class CodedPast:
    """Tokens 0..length of a cache that are held as codes.

    keys, values: uint8 (batch, length, bytes).
    book: LayerBook.
    hidden: (batch, 2) int64 or None: tokens from hidden[:, 0] to hidden[:, 1] are held elsewhere (sinks) and must
        not be seen here.
    prepared: what a backend has made of these codes for its own use, by its name; it goes when they do.
    """

    keys: torch.Tensor
    values: torch.Tensor
    book: Any
    rope: Rope
    positions: PositionTrack
    hidden: torch.Tensor | None = None
    prepared: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Copies prepare their own: what is prepared may be views of these codes."""
        return {**self.__dict__, "prepared": {}}

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


def some_queries(limit: int) -> Callable[[Attend], Attend]:
    """Decorator of an attention function (see ops.attention): it is given at most ``limit`` queries at a time."""

    def limited(attend: Attend) -> Attend:
        @wraps(attend)
        def inner(query, past, mask, scaling, softcap=None):
            if query.shape[2] <= limit:
                return attend(query, past, mask, scaling, softcap)
            parts = []
            for a in range(0, query.shape[2], limit):
                rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, a : a + limit]
                parts.append(attend(query[:, :, a : a + limit], past, rows, scaling, softcap))
            return tuple(torch.cat(p, 2) for p in zip(*parts, strict=True))

        return inner

    return limited


def softcapped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Gemma 2's bounded logits: softcap * tanh(scores / softcap)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
