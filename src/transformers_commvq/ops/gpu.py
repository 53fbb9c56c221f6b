"""The triton backend's door: whether the kernels can run here, and the plain path, said aloud, where they cannot.

Imports no triton until a tensor lies on a GPU.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch

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

    return None if supports(query, past) else "the codes are of a kind or width that the kernels do not take"


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
