"""KIVI (arXiv 2402.02750): asymmetric integers, keys grouped along tokens in each channel, values along channels."""

from __future__ import annotations

import torch

from .windowed import WindowedLayer, pack_integers, unpack_integers

GROUP = 32  # elements that share a scale and a zero point, both float16


class KiviLayer(WindowedLayer):
    """bits: of an integer; with its share of scale and zero point an element costs bits + 1."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def _quantize(self, tensor, side):
        grouped = _grouped(tensor.float(), side)
        low = grouped.amin(-1, keepdim=True).half()
        scale = ((grouped.amax(-1, keepdim=True) - low) / (2**self.bits - 1)).clamp_min(2.0**-14).half()
        numbers = ((grouped - low) / scale.float()).round().clamp(0, 2**self.bits - 1)
        return {"numbers": pack_integers(numbers, self.bits), "scale": scale, "low": low}

    def _dequantize(self, q_tensor, side):
        numbers = unpack_integers(q_tensor["numbers"], self.bits)
        return _ungrouped(numbers * q_tensor["scale"].float() + q_tensor["low"].float(), side)


def _grouped(tensor: torch.Tensor, side: str) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) -> (batch, heads, tokens / 32, head_dim, 32), or (..., tokens, groups, 32)."""
    if side == "keys":
        return tensor.unflatten(2, (-1, GROUP)).transpose(3, 4)
    return tensor.unflatten(3, (-1, GROUP))


def _ungrouped(grouped: torch.Tensor, side: str) -> torch.Tensor:
    return grouped.transpose(3, 4).flatten(2, 3) if side == "keys" else grouped.flatten(3)
