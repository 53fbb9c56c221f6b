"""The triton backend's door: whether the kernels can run here, and the plain path, said aloud, where they cannot.

Imports no triton until a tensor lies on a GPU.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache

import torch

from ..codebook import LayerBook, SignBook
from ..index_book import ENTRIES, IndexBook, JointBinaryBook
from ..packing import CodeLayout, pack_indices, with_scale
from ..positions import PositionTrack
from ..rope import Rope, angles
from .encode import encode_signs
from .past import Attend, CodedPast

NOT_INSTALLED = "triton is not installed. Fix: pip install 'transformers-commvq[triton]'"


@cache
def installed() -> bool:
    """Whether there is a triton to import."""
    return importlib.util.find_spec("triton") is not None


@cache
def available() -> bool:
    """Whether triton is installed and torch sees a GPU (CUDA or ROCm)."""
    return installed() and torch.cuda.is_available()


def obstacle(query: torch.Tensor, past: CodedPast) -> str | None:
    """Why the attention kernels cannot do this, or None."""
    if query.device.type != "cuda":
        return f"the tensors are on {query.device.type}"
    if not installed():
        return NOT_INSTALLED
    supports, _ = _kernels(past.book.keys.kind)
    if not supports(query, past):
        return "the codes are of a kind or width that the kernels do not take"
    return self_check(query.device, past.book.keys.kind)


def _kernels(kind: str) -> tuple[Callable[..., bool], Attend]:
    """What tells whether the kernels for a kind of code can do something, and what does it."""
    if kind == IndexBook.kind:
        from .attention_triton_index import attention_index, supports

        return supports, attention_index
    from .attention_triton import attention_triton, supports

    return supports, attention_triton


@cache
def self_check(device: torch.device, kind: str = SignBook.kind) -> str | None:
    """Once a process, the attention kernels of one kind of code against plain torch; what is wrong, or None.

    kind: of the keys' codes. The past they are compared on is small and random.

    A kernel that compiles wrongly for some GPU must not answer silently with wrong attention. One query and many take
    different variants of it.
    """
    from .attention_cpu import attention_blockwise

    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        past = _index_past(generator) if kind == IndexBook.kind else _sign_past(generator)
        dim = past.book.keys.head_dim
        queries = [torch.randn(1, 4, count, dim, generator=generator).half() for count in (1, 24)]
        wanted = [attention_blockwise(query, past, None, 0.125)[0] for query in queries]

    def error() -> float:
        past.keys, past.values, past.book = past.keys.to(device), past.values.to(device), past.book.to(device)
        found = [_kernels(kind)[1](query.to(device), past, None, 0.125)[0].cpu() for query in queries]
        off = [(got - want).norm() / want.norm() for got, want in zip(found, wanted, strict=True)]
        return torch.stack(off).max().item()

    return _complaint(error, 5e-3, device)


@cache
def encoder_check(device: torch.device) -> str | None:
    """Once a process, the encoder's kernels against the plain encoder on the same device; what is wrong, or None.

    Compared by the error that the codes leave: choices that tie to rounding may fall either way.
    """
    from .codec import decode  # which imports this module
    from .encode_triton import encode_signs_triton

    bits, dim = (8, 72), 64  # one length below and one above what the kernel multiplies at a time
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(len(bits), dim, dim, generator=generator) / dim**0.5
        book = _random_book(bits, dim, generator, root @ root.transpose(1, 2) + torch.eye(dim)).to(device)
        x = torch.randn(2, len(bits), 25, dim, generator=generator).to(device)

    def error() -> float:
        left = [x - decode(encoder(x, book), book) for encoder in (encode_signs_triton, encode_signs)]
        got, want = (((e @ book.metric.float()) * e).sum() for e in left)
        return (got / want - 1).abs().item()

    return _complaint(error, 1e-2, device)


def _past(keys: torch.Tensor, values: torch.Tensor, book: LayerBook) -> CodedPast:
    tokens, dim = keys.shape[1], book.keys.head_dim
    positions = torch.arange(tokens)[None]
    track = PositionTrack(10000.0 ** (-torch.arange(dim // 2) / (dim // 2)), 1.0)
    track.extend(0, positions, *angles(positions, track.inv_freq))
    return CodedPast(keys, values, book, Rope("half", dim), track)


def _sign_past(generator: torch.Generator, tokens: int = 200, dim: int = 64) -> CodedPast:
    book = LayerBook(*(_random_book(bits, dim, generator) for bits in ((40, 64), (64, 24))))
    codes = (
        torch.randint(256, (1, tokens, side.token_bytes), generator=generator).to(torch.uint8)
        for side in (book.keys, book.values)
    )
    return _past(*codes, book)


def _index_past(generator: torch.Generator, tokens: int = 200, dim: int = 64) -> CodedPast:
    heads, stages, bits = 2, 3, 72
    keys = IndexBook(torch.randn(stages, heads, ENTRIES, dim, generator=generator) / dim**0.5)
    width = heads * dim
    encoder = [torch.zeros(shape) for shape in ((width,), (8, width), (8,), (2 * bits, 8), (2 * bits,))]
    rows = torch.randn(bits, width, generator=generator) / bits**0.5
    values = JointBinaryBook(rows, torch.ones(width), torch.ones(width), *encoder, heads=heads)
    indices = torch.randint(ENTRIES, (1, tokens, heads, stages, 2), generator=generator)
    octets = torch.randint(256, (1, tokens, bits // 8), generator=generator).to(torch.uint8)
    scales = torch.rand(2, 1, tokens, generator=generator) + 0.5
    return _past(
        with_scale(pack_indices(indices), 4 * scales[0]), with_scale(octets, scales[1]), LayerBook(keys, values)
    )


def _random_book(
    bits: tuple[int, ...], dim: int, generator: torch.Generator, metric: torch.Tensor | None = None
) -> SignBook:
    rows = torch.randn(sum(bits), dim, generator=generator) / sum(bits) ** 0.5
    mean = torch.randn(len(bits), dim, generator=generator)
    return SignBook(CodeLayout(bits), rows.half(), mean, None if metric is None else metric.half())


def _complaint(error: Callable[[], float], bound: float, device: torch.device) -> str | None:
    """What is wrong with kernels whose relative error must be under a bound, or None."""
    try:
        off = error()
    except Exception as problem:  # whatever a compiler or driver may raise: the plain path still works
        return f"the kernels do not run on {device}: {type(problem).__name__}: {problem}"
    return None if off < bound else f"the kernels' result on {device} is off by {off:.1e}; please report this GPU"


@cache
def warn_once(what: str, reason: str) -> None:
    """Say once that the plain path is taken, for what, and why."""
    warnings.warn(f"{what} runs in plain torch, many times slower than in kernels: {reason}", stacklevel=4)


def encode_gpu(x: torch.Tensor, book: SignBook) -> torch.Tensor:
    """See ops.encode.encode_signs; x on a GPU. In plain torch, with one warning, where the kernels cannot run."""
    reason = encoder_check(x.device) if installed() else NOT_INSTALLED
    if reason is not None:
        warn_once("encoding", reason)
        return encode_signs(x, book)
    from .encode_triton import encode_signs_triton

    return encode_signs_triton(x, book)


def held_bytes(book: LayerBook) -> int:
    """Bytes of what the kernels read in place of a layer's codebooks, as far as it was made."""
    if not available():
        return 0
    from . import attention_triton_index, encode_triton, triton_tables

    held = triton_tables.held_bytes(book) + attention_triton_index.held_bytes(book.keys)
    return held + sum(map(encode_triton.held_bytes, (book.keys, book.values)))


def attention_gpu(
    query: torch.Tensor,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.attention; in plain torch, with one warning, what the kernels cannot do."""
    if (reason := obstacle(query, past)) is not None:
        from .attention_cpu import attention_blockwise  # which imports ops.codec, which imports this module

        warn_once("attention over codes", reason)
        return attention_blockwise(query, past, mask, scaling, softcap)
    return _kernels(past.book.keys.kind)[1](query, past, mask, scaling, softcap)
