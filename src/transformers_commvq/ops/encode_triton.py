"""Vectors to sign codes on a GPU: ops.encode with its inner loop in Triton kernels (triton_encode)."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch.utils.weak import WeakIdKeyDictionary

from ..codebook import SignBook
from .encode import COUPLED_ORDERS, COUPLED_TIMES, PLAIN_PASSES
from .sign_groups import gram_of, orders_of
from .triton_encode import improve_signs, pack_signs

CHUNK = 4096  # tokens at a time, which bounds the scratch: 5 bytes a token and padded sign
TOKENS = 64  # of one program
DEPTH = 64  # signs multiplied at a time; bits are padded to a multiple
BLOCK = 16  # signs whose correlations are held together

_lock = threading.Lock()
_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass
class Arrangement:
    """C M C^T with its rows in the order of some passes, padded with zeros to a multiple of DEPTH.

    passes: how many in a row go through the signs in this order.
    order, back: int64 (heads, 1, padded), the row at each place and the place of each row; None for the rows' own.
    high, low: float16 (heads, padded, padded), gram = (high + low) scale of the encoder's tables.
    inner: float32 (heads, padded / BLOCK, BLOCK, BLOCK), the blocks on gram's diagonal.
    """

    passes: int
    order: torch.Tensor | None
    back: torch.Tensor | None
    high: torch.Tensor
    low: torch.Tensor
    inner: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in vars(self).values() if isinstance(t, torch.Tensor)]


@dataclass
class EncoderTables:
    """A codebook as the encoder's kernels read it.

    dual: float32 (heads, padded, head_dim), C M. scale: float32 (heads,).
    bits, first: int32 (heads,), each head's number of bits and first byte in a token's row.
    turns: the arrangements in the order of the encoder's passes; one that comes again is the same object.
    """

    dual: torch.Tensor
    scale: torch.Tensor
    bits: torch.Tensor
    first: torch.Tensor
    turns: list[Arrangement]

    @property
    def padded(self) -> int:
        return self.dual.shape[1]

    @property
    def nbytes(self) -> int:
        own = [self.dual, self.scale, self.bits, self.first]
        arrangements = {id(turn): turn for turn in self.turns}.values()
        return sum(t.nbytes for t in (*own, *(t for turn in arrangements for t in turn.tensors)))


def encode_signs_triton(x: torch.Tensor, book: SignBook) -> torch.Tensor:
    """Sign codes of vectors; the codes of ops.encode.encode_signs but where two choices tie to float32 rounding.

    x: (batch, heads, tokens, head_dim), any float dtype; keys before RoPE.
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
            for turn in tables.turns:
                aim, chosen = target, signs
                if turn.order is not None:
                    order = turn.order.expand_as(signs)
                    aim, chosen = target.gather(2, order), signs.gather(2, order)
                improve_signs[(triton.cdiv(batch * count, TOKENS), heads)](
                    aim, chosen, turn.high, turn.low, turn.inner, tables.scale, tables.bits,
                    batch * count, padded, turn.passes, TOKENS=TOKENS, DEPTH=DEPTH, num_warps=8, num_stages=2,
                )  # fmt: skip
                signs = chosen if turn.back is None else chosen.gather(2, turn.back.expand_as(chosen))
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
    dual, gram = gram_of(book)
    more = -dual.shape[1] % DEPTH
    dual, gram = (torch.nn.functional.pad(t, pad) for t, pad in ((dual, (0, 0, 0, more)), (gram, (0, more, 0, more))))
    scale = gram.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny) / 1024  # away from subnormal float16
    coupled = [_arrangement(gram, scale, order) for order in orders_of(book, COUPLED_ORDERS)]
    lengths = torch.tensor(book.layout.bits, dtype=torch.int32)
    first = (lengths.cumsum(0) - lengths).div(8, rounding_mode="floor").to(torch.int32)
    return EncoderTables(
        dual.contiguous(), scale, lengths.to(dual.device), first.to(dual.device),
        [_arrangement(gram, scale, None, PLAIN_PASSES), *coupled * COUPLED_TIMES],
    )  # fmt: skip


def _arrangement(gram: torch.Tensor, scale: torch.Tensor, order: torch.Tensor | None, passes: int = 1) -> Arrangement:
    """gram: float32 (heads, padded, padded). order: (heads, n) or None."""
    back = None
    if order is not None:
        rest = torch.arange(order.shape[1], gram.shape[1], device=order.device).expand(len(order), -1)
        order = torch.cat([order, rest], 1)
        gram = gram.gather(1, order[..., None].expand_as(gram)).gather(2, order[:, None].expand_as(gram))
        order, back = order[:, None], order.argsort(1)[:, None]
    scaled = gram / scale[:, None, None]
    high = scaled.half()
    low = (scaled - high.float()).half()
    blocks = gram.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # (heads, block, row, block, column)
    inner = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
    return Arrangement(passes, order, back, high, low, inner)
