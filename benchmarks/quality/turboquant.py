"""TurboQuant (arXiv 2504.19874), its variant for the squared error: random rotation, then the best scalar quantizer.

A vector is divided by its norm (kept as float16) and rotated; its coordinates are then distributed as those of a
random point of the sphere, whatever the data, and each is rounded to the nearest level of the Lloyd-Max quantizer of
that distribution. The variant for inner products, which spends one bit on the residual, is not built here: at equal
bits its squared error is larger.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .windowed import WindowedLayer, pack_integers, unpack_integers


class TurboQuantLayer(WindowedLayer):
    """bits: of a coordinate; with its share of the norm an element costs bits + 16 / head_dim."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def _quantize(self, tensor, side):
        norm = tensor.float().norm(dim=-1, keepdim=True).clamp_min(1e-6).half()
        turned = tensor.float() / norm.float() @ rotation(tensor.shape[-1], side).to(tensor.device)
        levels = sphere_levels(tensor.shape[-1], self.bits).to(tensor.device)
        numbers = torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)
        return {"numbers": pack_integers(numbers, self.bits), "norm": norm}

    def _dequantize(self, q_tensor, side):
        numbers, norm = unpack_integers(q_tensor["numbers"], self.bits), q_tensor["norm"].float()
        dim = numbers.shape[-1]
        return sphere_levels(dim, self.bits).to(norm.device)[numbers] @ rotation(dim, side).T.to(norm.device) * norm


@lru_cache
def rotation(dim: int, side: str) -> torch.Tensor:
    """A random orthogonal matrix, the same in every run; one for keys, one for values."""
    generator = torch.Generator().manual_seed(("keys", "values").index(side))
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


@lru_cache
def sphere_levels(dim: int, bits: int) -> torch.Tensor:
    """Levels of the Lloyd-Max quantizer of one coordinate of a random unit vector, (2^bits,) float32, ascending.

    The density is proportional to (1 - x^2)^((dim - 3) / 2); levels and thresholds are improved in turn on a fine grid.
    """
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    density = (1 - x * x) ** ((dim - 3) / 2)
    count = 2**bits
    share = density.cumsum(0) / density.sum()
    levels = x[torch.searchsorted(share, (torch.arange(count, dtype=torch.float64) + 0.5) / count)]
    for _ in range(500):
        cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros(count, dtype=torch.float64).index_add_(0, cell, density)
        new = torch.zeros(count, dtype=torch.float64).index_add_(0, cell, density * x) / mass
        if (new - levels).abs().max() < 1e-9:
            break
        levels = new
    return levels.float()
