"""Operations on codes. ``encode`` and ``attention`` choose a backend; the others are their parts.

Backends of attention over codes, all held to ``reference`` by one grid of tests:
    reference   decode everything; the definition
    blockwise   plain torch, one block of decoded keys at a time; any device
    jit         compiled loops over the codes themselves; CPU, needs numba (the ``cpu`` extra)
    triton      kernels over the codes themselves; GPU, needs triton
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ..codebook import LayerBook
from ..config import ConfigError
from . import gpu, jit, sign_groups
from .attention_cpu import attention_blockwise
from .attention_exact import attention_exact
from .attention_jit import attention_jit, held_bytes, merged_jit, supports
from .attention_reference import attention_reference, decoded_keys_values
from .codec import KINDS, CodeKind, decode, encode, kind_of
from .merge import OnlineSoftmax, merge
from .past import CodedPast

BACKENDS: dict[str, Callable] = {"reference": attention_reference, "blockwise": attention_blockwise}
if jit.available():
    BACKENDS["jit"] = attention_jit
if gpu.available():
    BACKENDS["triton"] = gpu.attention_gpu
_forced: ContextVar[str | None] = ContextVar("transformers_commvq_backend", default=None)


def choose_backend(query: torch.Tensor, past: CodedPast) -> str:
    """The backend ``attention`` will use for these inputs."""
    if forced := _forced.get():
        return forced
    if query.device.type == "cuda":
        if (reason := gpu.obstacle(query, past)) is None:
            return "triton"
        gpu.warn_once("attention over codes", reason)
        return "blockwise"
    return "jit" if query.device.type == "cpu" and jit.available() else "blockwise"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block, in this thread only.

    Raises ConfigError for a name that does not exist.
    """
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} does not exist; there are {sorted(BACKENDS)}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def attention(
    query: torch.Tensor,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries over a compressed past; nothing of the past's full size is rebuilt.

    query: (batch, heads, queries, head_dim), after RoPE; heads a multiple of the past's.
    mask: bool (True is visible) or additive float, (batch or 1, heads or 1, queries or 1, >= past.length), or None.
    Returns (out float32 (batch, heads, queries, head_dim), normalized over the past alone;
        lse float32 (batch, heads, queries), natural log-sum-exp of the scaled scores, -inf if nothing is visible).
    """
    return BACKENDS[choose_backend(query, past)](query, past, mask, scaling, softcap)


def merged_attention(
    query: torch.Tensor,
    exact: Sequence[tuple[torch.Tensor, torch.Tensor]],
    bias: torch.Tensor | None,
    past: CodedPast | None,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a compressed past and over tokens held in full, as one softmax.

    query, past, mask, scaling, softcap: as for ``attention``; past None where nothing is compressed yet.
    exact: one or two parts (keys, values) of tokens held in full; bias over all their tokens in order; both as for
        ``attention_exact``.
    Returns (out float32 (batch, heads, queries, head_dim); lse float32 (batch, heads, queries)).
    """
    if past is not None and choose_backend(query, past) == "jit" and supports(query, past):
        return merged_jit(query, exact, bias, past, mask, scaling, softcap)
    keys, values = exact[0] if len(exact) == 1 else (torch.cat(side, 2) for side in zip(*exact, strict=True))
    out, lse = attention_exact(query, keys, values, bias, scaling, softcap)
    return (out, lse) if past is None else merge(out, lse, *attention(query, past, mask, scaling, softcap))


def tables_nbytes(book: LayerBook) -> int:
    """Bytes of what backends have made of a layer's codebooks so far; kept as long as the book, for all caches."""
    encoders = sum(map(sign_groups.held_bytes, (book.keys, book.values)))
    return held_bytes(book) + gpu.held_bytes(book) + encoders


__all__ = [
    "BACKENDS",
    "KINDS",
    "CodeKind",
    "CodedPast",
    "OnlineSoftmax",
    "attention",
    "attention_exact",
    "backend",
    "choose_backend",
    "decode",
    "decoded_keys_values",
    "encode",
    "kind_of",
    "merge",
    "merged_attention",
    "tables_nbytes",
]
