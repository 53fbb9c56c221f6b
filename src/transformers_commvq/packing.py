"""Bits and bytes: the only module that knows how codes lie in memory.

A code is a vector of n signs, n a multiple of 8. Sign j sits in bit ``j % 8`` (least significant first) of byte
``j // 8``; a set bit means -1, so that on a GPU a sign is one XOR into a float's sign bit. The heads of a layer lie
side by side in a token's row, each with its own n and without padding:

    codes: uint8 (batch, tokens, bytes), bytes = sum over heads of n / 8
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .config import CodebookFormatError

_TABLES: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


@dataclass(frozen=True)
class CodeLayout:
    """Where each head's code lies in a token's row.

    bits: code bits of each head, each a multiple of 8 and at least 8.
    """

    bits: tuple[int, ...]

    def __post_init__(self):
        bad = [n for n in self.bits if n < 8 or n % 8]
        if not self.bits or bad:
            raise CodebookFormatError(f"bits per head {self.bits}: expected multiples of 8, at least 8, one per head.")

    @property
    def heads(self) -> int:
        return len(self.bits)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of one token's row."""
        return sum(self.bits) // 8

    @cached_property
    def max_bits(self) -> int:
        return max(self.bits)

    @cached_property
    def columns(self) -> torch.Tensor:
        """Byte columns of each head, (heads, max_bits / 8) int64; a short head is filled up with its first column.

        Filled-up bits are real bits of the wrong meaning: whoever uses this multiplies them by zero.
        """
        rows, start = [], 0
        for n in self.bits:
            own = list(range(start, start + n // 8))
            rows.append(own + [start] * (self.max_bits // 8 - len(own)))
            start += n // 8
        return torch.tensor(rows)

    @cached_property
    def rows(self) -> torch.Tensor:
        """For each head and padded bit, the row in the heads' rows laid end to end, (heads, max_bits) int64.

        -1 marks a filled-up bit.
        """
        out, start = torch.full((self.heads, self.max_bits), -1), 0
        for h, n in enumerate(self.bits):
            out[h, :n] = torch.arange(start, start + n)
            start += n
        return out

    @cached_property
    def uniform(self) -> bool:
        return len(set(self.bits)) == 1


def sign_table(dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """The eight signs of each byte, (256, 8) in {-1, +1}."""
    key = (dtype, torch.device(device))
    if key not in _TABLES:
        bit = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
        _TABLES[key] = (1 - 2 * bit).to(dtype)
    return _TABLES[key]


def pack(signs: torch.Tensor, layout: CodeLayout) -> torch.Tensor:
    """Pack signs into token rows.

    signs: (batch, heads, tokens, max_bits), negative where a sign is -1; bits past a head's own are dropped.
    Returns uint8 (batch, tokens, bytes), contiguous.
    """
    weights = (1 << torch.arange(8, device=signs.device)).to(torch.uint8)
    octets = (signs < 0).unflatten(-1, (-1, 8)).to(torch.uint8)
    octets = (octets * weights).sum(-1, dtype=torch.uint8)
    return torch.cat([octets[:, h, :, : n // 8] for h, n in enumerate(layout.bits)], -1).contiguous()


def unpack(codes: torch.Tensor, layout: CodeLayout, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The inverse of ``pack``, heads side by side.

    codes: uint8 (batch, tokens, bytes).
    Returns (batch, heads, tokens, max_bits) in {-1, +1}; see ``CodeLayout.columns`` for bits past a head's own.
    """
    batch, tokens, _ = codes.shape
    columns = layout.columns.to(codes.device)
    octets = codes.index_select(-1, columns.flatten()).view(batch, tokens, layout.heads, -1).transpose(1, 2)
    table = sign_table(dtype, codes.device)
    return torch.nn.functional.embedding(octets.int(), table).flatten(-2)
