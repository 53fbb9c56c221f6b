"""Attention over disjoint sets of tokens, combined exactly."""

from __future__ import annotations

import torch


def merge(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor):
    """Attention over the union of two disjoint token sets (arXiv 2205.14135, section 3.1).

    out_*: (batch, heads, queries, head_dim), normalized over its own tokens only.
    lse_*: (batch, heads, queries), natural log-sum-exp of the scaled scores; -inf if no token is visible.
    Returns (out, lse) of the union; zeros and -inf where neither has a visible token.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0)
    weight_a, weight_b = (torch.exp(x - base)[..., None] for x in (lse_a, lse_b))
    return out_a * weight_a + out_b * weight_b, lse


class OnlineSoftmax:
    """Running softmax-weighted sum over blocks of tokens (arXiv 2112.05682).

    rows are whatever leading shape the scores have; all state is float32.
    """

    def __init__(self):
        self.top = self.mass = self.sum = None

    def add(self, scores: torch.Tensor, features: torch.Tensor) -> None:
        """scores: (..., rows, tokens), -inf where hidden; features: (..., tokens, width)."""
        top = scores.amax(-1, keepdim=True)
        if self.top is not None:
            top = torch.maximum(top, self.top)
        shift = top.masked_fill(top == -torch.inf, 0)
        weights = torch.exp(scores - shift)
        mass, total = weights.sum(-1, keepdim=True), weights @ features
        if self.top is not None:
            decay = torch.exp(self.top - shift)
            mass, total = mass + self.mass * decay, total + self.sum * decay
        self.top, self.mass, self.sum = top, mass, total

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mean of features (..., rows, width), 1 where any token was visible (..., rows, 1), lse (..., rows))."""
        seen = (self.mass > 0).to(self.mass.dtype)
        lse = (self.mass.log() + self.top).squeeze(-1)
        return self.sum / self.mass.clamp_min(torch.finfo(self.mass.dtype).tiny), seen, lse
