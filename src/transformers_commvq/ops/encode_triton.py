"""Vectors to sign codes on a GPU: ops.encode with its inner loop in Triton kernels (triton_encode)."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch.utils.weak import WeakIdKeyDictionary

from ..codebook import SignBook
from .encode import SWEEPS
from .triton_encode import improve_signs, pack_signs

CHUNK = 4096  # tokens at a time, which bounds the scratch: 5 bytes a token and padded sign
TOKENS = 64  # of one program
DEPTH = 64  # signs multiplied at a time; bits are padded to a multiple
BLOCK = 16  # signs whose correlations are held together

_lock = threading.Lock()
_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass
class EncoderTables:
    """A codebook as the encoder's kernels read it. ``gram`` is C M C^T, rows padded with zeros to a multiple of DEPTH.

    dual: float32 (heads, padded, head_dim), C M.
    high, low: float16 (heads, padded, padded), gram = (high + low) scale. scale: float32 (heads,).
    inner: float32 (heads, padded / BLOCK, BLOCK, BLOCK), the blocks on gram's diagonal.
    bits, first: int32 (heads,), each head's number of bits and first byte in a token's row.
    """

    dual: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor
    inner: torch.Tensor
    bits: torch.Tensor
    first: torch.Tensor

    @property
    def padded(self) -> int:
        return self.dual.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values())


def encode_signs_triton(x: torch.Tensor, book: SignBook, sweeps: int = SWEEPS) -> torch.Tensor:
    """Sign codes of vectors; the codes of ops.encode.encode_signs but where two choices tie to float32 rounding.

    x: (batch, heads, tokens, head_dim), any float dtype; keys before RoPE.
    sweeps: coordinate descent passes after the greedy one.
    Returns uint8 (batch, tokens, bytes), see packing.
    """
    batch, heads, tokens, dim = x.shape
    device = x.device
    tables = encoder_tables(book)
    padded = tables.padded
    out = torch.empty(batch, tokens, book.token_bytes, dtype=torch.uint8, device=device)
    step = max(1, CHUNK // batch)
    for start in range(0, tokens, step):
        y = x[:, :, start : start + step].float() - book.mean[:, None]
        count = y.shape[2]
        y = y.transpose(0, 1).reshape(heads, batch * count, dim)
        target = y @ tables.dual.transpose(1, 2)
        signs = torch.zeros(target.shape, dtype=torch.int8, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            improve_signs[(triton.cdiv(batch * count, TOKENS), heads)](
                target, signs, tables.high, tables.low, tables.inner, tables.scale, tables.bits,
                batch * count, padded, sweeps, TOKENS=TOKENS, DEPTH=DEPTH, num_warps=8, num_stages=2,
            )  # fmt: skip
            pack_signs[(triton.cdiv(count, TOKENS), heads, batch)](
                signs, out, tables.bits, tables.first, start, count, batch * count, padded, *out.stride()[:2],
                TOKENS=TOKENS, BYTES=8, num_warps=4, num_stages=2,
            )  # fmt: skip
    return out


def encoder_tables(book: SignBook) -> EncoderTables:
    """The tables of a codebook, made at the first call and kept as long as the book."""
    with _lock:
        known = _tables.get(book)
        if known is None:
            known = _tables[book] = _encoder_tables(book)
    return known


def held_bytes(book: SignBook) -> int:
    """Bytes of the tables made for this book so far."""
    known = _tables.get(book)
    return 0 if known is None else known.nbytes


def _encoder_tables(book: SignBook) -> EncoderTables:
    rows = book.padded()
    padded = -(-rows.shape[1] // DEPTH) * DEPTH
    rows = torch.nn.functional.pad(rows, (0, 0, 0, padded - rows.shape[1]))
    dual = rows if book.metric is None else rows @ book.metric.float()
    gram = dual @ rows.transpose(1, 2)
    scale = gram.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny) / 1024  # away from subnormal float16
    scaled = gram / scale[:, None, None]
    high = scaled.half()
    low = (scaled - high.float()).half()
    blocks = gram.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # (heads, block, row, block, column)
    inner = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
    lengths = torch.tensor(book.layout.bits, dtype=torch.int32)
    first = (lengths.cumsum(0) - lengths).div(8, rounding_mode="floor").to(torch.int32)
    device = rows.device
    return EncoderTables(dual.contiguous(), high, low, scale, inner, lengths.to(device), first.to(device))
