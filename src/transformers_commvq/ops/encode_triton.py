"""Vectors to sign codes on a GPU: ops.encode with its inner loop in Triton kernels (triton_encode)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch.utils.weak import WeakIdKeyDictionary

from ..codebook import SignBook
from .encode import SWEEPS
from .triton_encode import improve_signs, pack_signs

CHUNK = 4096  # tokens at a time, which bounds the scratch: 5 bytes a token and padded sign
TOKENS = 64  # of one program
DEPTH = 64  # signs multiplied at a time; bits are padded to a multiple

_grams: WeakIdKeyDictionary = WeakIdKeyDictionary()


def encode_signs_triton(x: torch.Tensor, book: SignBook, sweeps: int = SWEEPS) -> torch.Tensor:
    """Sign codes of vectors; the codes of ops.encode.encode_signs but where two choices tie to float32 rounding.

    x: (batch, heads, tokens, head_dim), any float dtype; keys before RoPE.
    sweeps: coordinate descent passes after the greedy one.
    Returns uint8 (batch, tokens, bytes), see packing.
    """
    batch, heads, tokens, dim = x.shape
    device = x.device
    if book not in _grams:
        _grams[book] = _gram(book)
    dual, gram, high, low, scale, bits, first = _grams[book]
    padded = gram.shape[1]
    out = torch.empty(batch, tokens, book.token_bytes, dtype=torch.uint8, device=device)
    step = max(1, CHUNK // batch)
    for start in range(0, tokens, step):
        y = x[:, :, start : start + step].float() - book.mean[:, None]
        count = y.shape[2]
        y = y.transpose(0, 1).reshape(heads, batch * count, dim)
        target = y @ dual.transpose(1, 2)
        signs = torch.zeros(target.shape, dtype=torch.int8, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            improve_signs[(triton.cdiv(batch * count, TOKENS), heads)](
                target, signs, high, low, gram, scale, bits, batch * count, padded, sweeps,
                TOKENS=TOKENS, DEPTH=DEPTH, num_warps=8, num_stages=2,
            )  # fmt: skip
            pack_signs[(triton.cdiv(count, TOKENS), heads, batch)](
                signs, out, bits, first, start, count, batch * count, padded, *out.stride()[:2],
                TOKENS=TOKENS, BYTES=8, num_warps=4, num_stages=2,
            )  # fmt: skip
    return out


def _gram(book: SignBook) -> tuple[torch.Tensor, ...]:
    """C M; gram = C M C^T, rows padded with zeros; its float16 parts and scale; bits and first byte of each head."""
    rows = book.padded()
    padded = -(-rows.shape[1] // DEPTH) * DEPTH
    rows = torch.nn.functional.pad(rows, (0, 0, 0, padded - rows.shape[1]))
    dual = rows if book.metric is None else rows @ book.metric.float()
    gram = dual @ rows.transpose(1, 2)
    scale = gram.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny) / 1024  # away from subnormal float16
    scaled = gram / scale[:, None, None]
    high = scaled.half()
    low = (scaled - high.float()).half()
    lengths = torch.tensor(book.layout.bits, dtype=torch.int32)
    first = (lengths.cumsum(0) - lengths).div(8, rounding_mode="floor").to(torch.int32)
    device = rows.device
    return dual.contiguous(), gram.contiguous(), high, low, scale, lengths.to(device), first.to(device)
