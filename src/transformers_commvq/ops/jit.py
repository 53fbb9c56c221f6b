"""Plumbing of the compiled CPU loops (numba): whether they can run, threads, and torch tensors as arrays.

Needs the ``cpu`` extra (numba), but no C compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from ..packing import CodeLayout, sign_table


@cache
def available() -> bool:
    """Whether numba is installed; it is imported on first use only."""
    return importlib.util.find_spec("numba") is not None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="transformers_commvq")


def run(kernel: Any, tasks: int, *args: Any) -> None:
    """Spread a kernel's tasks over as many threads as torch uses: kernel(begin, end, *args)."""
    threads = max(1, min(torch.get_num_threads(), tasks))
    cuts = [tasks * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(kernel, a, b, *args) for a, b in pairwise(cuts[1:])]
    kernel(0, cuts[1], *args)
    for other in others:
        other.result()


@cache
def _openmp() -> Callable[..., None] | None:
    """Start of a parallel region in the OpenMP runtime that torch itself runs on, if it is one that says so.

    Its threads are awake between torch's own operations, while those of a pool must be woken: on a virtual machine
    that alone takes as long as a layer's attention over a few thousand tokens.
    """
    try:
        start = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # found among what torch is linked with
    except (AttributeError, OSError):
        return None
    start.argtypes, start.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return start


def run_team(work: Any, block: array[int], threads: int) -> None:
    """Run a C function (numba's cfunc) on so many threads, each with the address of the block.

    It returns when all have ended. Python's lock is free meanwhile. The function must do the same whatever the number
    of threads that come, which may be fewer.
    """
    address = block.buffer_info()[0]
    if threads > 1 and (start := _openmp()):
        start(work.address, address, threads, 0)
        return
    others = [_pool(threads - 1).submit(_call(work), address) for _ in range(threads - 1)]
    _call(work)(address)
    for other in others:
        other.result()


@cache
def _call(work: Any) -> Callable[[int], None]:
    """A C function as Python calls it; Python's lock is free meanwhile."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work.address)


@cache
def first_and_bits(layout: CodeLayout):
    """Each head's first bit and number of bits, int64 (heads,)."""
    bits = torch.tensor(layout.bits)
    return (bits.cumsum(0) - bits).numpy(), bits.numpy()


def storage(codes: torch.Tensor):
    """(1-d uint8 array over the codes' memory, bytes from one batch row to the next)."""
    batch, tokens, width = codes.shape
    row = codes.stride(0) if batch > 1 else tokens * width
    if codes.stride(2) != 1 or (tokens > 1 and codes.stride(1) != width):
        codes, row = codes.contiguous(), tokens * width
    return codes.as_strided(((batch - 1) * row + tokens * width,), (1,)).numpy(), row


@cache
def _candidates():
    return sign_table(torch.float32, "cpu")[:16, :4].T.contiguous().numpy()


def pack_signs_jit(
    correlation: torch.Tensor, gram: torch.Tensor, orders: Sequence[torch.Tensor | None], layout: CodeLayout
) -> torch.Tensor:
    """Choose signs as ops.encode.choose_signs does, and pack them.

    correlation: (heads, batch, tokens, n) float32, overwritten; gram: (heads, n, n); orders: of each pass, int64
    (heads, n) or None. All on the CPU.
    Returns uint8 (batch, tokens, bytes).
    """
    from . import jit_encode

    heads, batch, tokens, n = correlation.shape
    out = torch.empty(batch, tokens, layout.total_bytes, dtype=torch.uint8)
    first, bits = first_and_bits(layout)
    codes, row = storage(out)
    own = torch.arange(n).expand(heads, n)
    rows = torch.stack([own if order is None else order for order in orders]).numpy()
    gram = gram.contiguous().numpy()
    bonus = jit_encode.pattern_costs(gram, _candidates(), rows, bits)
    run(
        jit_encode.choose_and_pack, heads * batch * -(-tokens // jit_encode.LANES), correlation.contiguous().numpy(),
        gram, bonus, rows, first, bits, codes, row, layout.total_bytes,
    )  # fmt: skip
    return out
