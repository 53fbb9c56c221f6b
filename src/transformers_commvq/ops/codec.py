"""What a kind of code can do: vectors -> codes, codes -> vectors. Everything above talks to this seam.

A kind splits decoding into ``features`` (per token, cheap) and ``project`` (linear), so that attention over values
can sum features first and project once per query (codec.md, "Values"):

    x_hat = project(features(codes), 1)        sum_t p_t x_hat_t = project(sum_t p_t features_t, sum_t p_t)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..codebook import SignBook
from ..config import CodebookFormatError
from ..index_book import IndexBook, JointBinaryBook
from ..packing import unpack
from . import gpu, index_codes
from .encode import encode_signs


@dataclass(frozen=True)
class CodeKind:
    """The operations of one kind of code.

    encode(x, book): (batch, heads, tokens, head_dim) any float -> uint8 (batch, tokens, bytes)
    features(codes, book): uint8 (batch, tokens, bytes) -> float32 (batch, heads, tokens, width)
    project(f, mass, book): (batch, heads, rows, width), (batch, heads, rows, 1) -> (batch, heads, rows, head_dim)
    """

    encode: Callable[[torch.Tensor, Any], torch.Tensor]
    features: Callable[[torch.Tensor, Any], torch.Tensor]
    project: Callable[[torch.Tensor, torch.Tensor | float, Any], torch.Tensor]


def _sign_codes(x, book):
    return gpu.encode_gpu(x, book) if x.device.type == "cuda" else encode_signs(x, book)


def _sign_features(codes, book):
    return unpack(codes, book.layout, torch.float32)


def _sign_project(features, mass, book):
    return features @ book.padded() + mass * book.mean[:, None]


KINDS: dict[str, CodeKind] = {
    SignBook.kind: CodeKind(_sign_codes, _sign_features, _sign_project),
    IndexBook.kind: CodeKind(index_codes.encode_keys, index_codes.key_features, index_codes.key_project),
    JointBinaryBook.kind: CodeKind(index_codes.encode_values, index_codes.value_features, index_codes.value_project),
}


def kind_of(book: Any) -> CodeKind:
    """The operations for a codebook.

    Raises CodebookFormatError for a kind that is not registered in ``KINDS``.
    """
    if book.kind not in KINDS:
        raise CodebookFormatError(f"code kind {book.kind!r} is not known; known: {sorted(KINDS)}.")
    return KINDS[book.kind]


def encode(x: torch.Tensor, book: Any) -> torch.Tensor:
    """Codes of vectors; see CodeKind."""
    return kind_of(book).encode(x, book)


def decode(codes: torch.Tensor, book: Any) -> torch.Tensor:
    """Rebuilt vectors, float32 (batch, heads, tokens, head_dim). Keys come back as they are before RoPE."""
    kind = kind_of(book)
    return kind.project(kind.features(codes, book), 1.0, book)
