"""The triton backend's door: whether the kernels can run here, and the plain path, said aloud, where they cannot.

Imports no triton until a tensor lies on a GPU.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch

from ..codebook import LayerBook, SignBook
from ..packing import CodeLayout
from ..positions import PositionTrack
from ..rope import Rope, angles
from .past import CodedPast


@cache
def available() -> bool:
    """Whether triton is installed and torch sees a GPU (CUDA or ROCm)."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def obstacle(query: torch.Tensor, past: CodedPast) -> str | None:
    """Why the kernels cannot do this, or None."""
    if query.device.type != "cuda":
        return f"the tensors are on {query.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed. Fix: pip install 'transformers-commvq[triton]'"
    from .attention_triton import supports

    if not supports(query, past):
        return "the codes are of a kind or width that the kernels do not take"
    return self_check(query.device)


@cache
def self_check(device: torch.device) -> str | None:
    """Once a process, the kernels against plain torch on a small random past; what is wrong, or None.

    A kernel that compiles wrongly for some GPU must not answer silently with wrong attention.
    """
    from .attention_cpu import attention_blockwise
    from .attention_triton import attention_triton

    generator = torch.Generator().manual_seed(0)
    tokens, dim, pairs = 200, 64, 32
    positions = torch.arange(tokens)[None]
    track = PositionTrack(10000.0 ** (-torch.arange(pairs) / pairs), 1.0)
    track.extend(0, positions, *angles(positions, track.inv_freq))
    books, codes = [], []
    for bits in ((40, 64), (64, 24)):
        rows = torch.randn(sum(bits), dim, generator=generator) / sum(bits) ** 0.5
        books.append(SignBook(CodeLayout(bits), rows.half(), torch.randn(2, dim, generator=generator)))
        codes.append(torch.randint(256, (1, tokens, sum(bits) // 8), generator=generator).to(torch.uint8))
    past = CodedPast(codes[0], codes[1], LayerBook(*books), Rope("half", dim), track)
    query = torch.randn(1, 4, 1, dim, generator=generator).half()
    want, _ = attention_blockwise(query, past, None, 0.125)
    past.keys, past.values, past.book = past.keys.to(device), past.values.to(device), past.book.to(device)
    try:
        got, _ = attention_triton(query.to(device), past, None, 0.125)
        error = ((got.cpu() - want).norm() / want.norm()).item()
    except Exception as problem:  # whatever a compiler or driver may raise: the plain path still works
        return f"the kernels do not run on {device}: {type(problem).__name__}: {problem}"
    return None if error < 5e-3 else f"the kernels' result on {device} is off by {error:.1e}; please report this GPU"


@cache
def warn_once(reason: str) -> None:
    """Say once that the plain path is taken, and why."""
    warnings.warn(
        f"attention over codes runs in plain torch, many times slower than in kernels: {reason}", stacklevel=4
    )


def attention_gpu(
    query: torch.Tensor,
    past: CodedPast,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ops.attention; in plain torch, with one warning, what the kernels cannot do."""
    if (reason := obstacle(query, past)) is not None:
        from .attention_cpu import attention_blockwise  # which imports ops.encode, which may come to import this module

        warn_once(reason)
        return attention_blockwise(query, past, mask, scaling, softcap)
    from .attention_triton import attention_triton

    return attention_triton(query, past, mask, scaling, softcap)
