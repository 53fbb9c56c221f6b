"""Rotary position embedding: which elements form a pair, and how a vector is rotated and rotated back.

RoPE (arXiv 2104.09864) views ``2 * pairs`` of a head's elements as complex numbers and multiplies pair p of the token
at position t by ``scale * exp(i * theta_p * t)``. This is the only module that names the two pair layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import UnsupportedModelError

LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True)
class Rope:
    """The pairs of one layer's heads.

    layout: ``"half"``: element p pairs with p + rotary_dim/2; ``"interleaved"``: element 2p pairs with 2p + 1;
        ``"none"``: a layer without RoPE, whose vectors every method below returns as they are.
    rotary_dim: how many of a head's leading elements are rotated; the others pass through. 0 with ``"none"``.
    """

    layout: str = "half"
    rotary_dim: int = 64

    def __post_init__(self):
        if self.layout not in (*LAYOUTS, "none"):
            raise UnsupportedModelError(f"RoPE layout {self.layout!r}: expected one of {LAYOUTS}.")
        if self.layout == "none":
            if self.rotary_dim:
                raise UnsupportedModelError(f"RoPE rotary_dim={self.rotary_dim}: expected 0 with layout 'none'.")
        elif self.rotary_dim < 2 or self.rotary_dim % 2:
            raise UnsupportedModelError(f"RoPE rotary_dim={self.rotary_dim}: expected an even number, 2 or more.")

    @property
    def pairs(self) -> int:
        return self.rotary_dim // 2

    def to_dict(self) -> dict:
        return {"layout": self.layout, "rotary_dim": self.rotary_dim}

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., head_dim) -> real (..., pairs), imaginary (..., pairs), unrotated rest (..., head_dim - rotary_dim)."""
        r = self.rotary_dim
        if self.layout != "interleaved":
            return x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
        return x[..., 0:r:2], x[..., 1:r:2], x[..., r:]

    def join(self, re: torch.Tensor, im: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """The inverse of ``split``."""
        if self.layout != "interleaved":
            return torch.cat([re, im, rest], -1)
        return torch.cat([torch.stack([re, im], -1).flatten(-2), rest], -1)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate every pair forward.

        x: (..., head_dim); cos, sin: broadcastable to (..., pairs), times any attention scaling.
        """
        if not self.rotary_dim:
            return x
        re, im, rest = self.split(x)
        return self.join(re * cos - im * sin, re * sin + im * cos, rest)

    def unrotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The exact inverse of ``rotate`` with the same cos and sin, whatever their scale."""
        scale = cos * cos + sin * sin  # 1, or the square of the attention scaling
        return self.rotate(x, cos / scale, -sin / scale)

    def pull_back(self, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate a query the other way: ``pull_back(q) . k == q . rotate(k)`` for every k (the transposed map)."""
        return self.rotate(q, cos, -sin)


def angles(positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions, (*positions.shape, pairs) float32, computed as transformers' rotary modules do."""
    phase = positions[..., None].float() * inv_freq.float()
    return phase.cos() * scaling, phase.sin() * scaling
