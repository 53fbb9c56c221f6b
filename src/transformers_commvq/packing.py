"""Bits and bytes: the only module that knows how codes lie in memory.

A code is a vector of n signs, n a multiple of 8. Sign j sits in bit ``j % 8`` (least significant first) of byte
``j // 8``; a set bit means -1, so that on a GPU a sign is one XOR into a float's sign bit. The heads of a layer lie
side by side in a token's row, each with its own n and without padding:

    codes: uint8 (batch, tokens, bytes), bytes = sum over heads of n / 8

Index codes are two 6-bit indices a stage, 12 bits, the first index in the lower ones; heads and their stages lie end to
end, least significant bit first, filled up to whole bytes. A row may end in a float16 scale of its own.
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


INDEX_BITS = 6  # of one index; a stage holds two


def index_bytes(heads: int, stages: int) -> int:
    """Bytes of one token's indices."""
    return -(-heads * stages * 2 * INDEX_BITS // 8)


def pack_indices(indices: torch.Tensor) -> torch.Tensor:
    """Pack pairs of 6-bit indices into token rows.

    indices: (batch, tokens, heads, stages, 2), integers in [0, 64).
    Returns uint8 (batch, tokens, index_bytes(heads, stages)).
    """
    pairs = (indices[..., 0] | indices[..., 1] << INDEX_BITS).flatten(2)
    count = pairs.shape[-1]
    even, odd = torch.nn.functional.pad(pairs, (0, count % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    octets = torch.stack([even & 255, even >> 8 | (odd & 15) << 4, odd >> 4], -1).to(torch.uint8)
    return octets.flatten(-2)[..., : index_bytes(1, count)].contiguous()


def unpack_indices(codes: torch.Tensor, heads: int, stages: int) -> torch.Tensor:
    """The inverse of ``pack_indices``: uint8 (batch, tokens, bytes) -> int32 (batch, tokens, heads, stages, 2)."""
    count = heads * stages
    low, middle, high = torch.nn.functional.pad(codes.int(), (0, count % 2)).unflatten(-1, (-1, 3)).unbind(-1)
    pairs = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], -1).flatten(-2)[..., :count]
    return torch.stack([pairs & 63, pairs >> INDEX_BITS], -1).unflatten(2, (heads, stages))


SCALE_BYTES = 2


def with_scale(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows that end in a float16: uint8 (batch, tokens, bytes), float (batch, tokens) -> SCALE_BYTES wider."""
    limit = torch.finfo(torch.float16).max
    tail = scale.clamp(-limit, limit).to(torch.float16)[..., None].contiguous().view(torch.uint8)
    return torch.cat([codes, tail], -1)


def split_scale(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of ``with_scale``; the scale as float32 (batch, tokens)."""
    # A copy: two bytes at an odd place cannot be viewed as one number.
    scale = codes[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float16)[..., 0]
    return codes[..., :-SCALE_BYTES], scale.float()
