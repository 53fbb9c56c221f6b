"""Which signs of a code the encoder chooses together in its last passes: those whose rows are most alike.

Coordinate descent over groups of signs stops where no group can do better alone. The rows' own order puts rows of like
length side by side, which hardly depend on one another, so it stops early. Rows that point the same way depend most: a
change of one sign is best made good by the other. Groups of such rows go on where the first passes stopped
(docs/learning-experiments.md, "Groups of rows that are alike").
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..codebook import SignBook

GROUP = 4  # signs chosen jointly: 16 candidates
_lock = threading.Lock()
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def gram_of(book: SignBook) -> tuple[torch.Tensor, torch.Tensor]:
    """(C M, (heads, n, head_dim); C M C^T, (heads, n, n)), float32; n is the most bits of a head, missing rows zero."""
    rows = book.padded()
    dual = rows if book.metric is None else rows @ book.metric.float()
    return dual, dual @ rows.transpose(1, 2)


def coupled_orders(gram: torch.Tensor, bits: Sequence[int], count: int) -> list[torch.Tensor]:
    """Orders of rows whose every four neighbours are a group.

    gram: (heads, n, n) float32, C M C^T. bits: each head's own rows, a multiple of 4; rows past them stay at the end.
    Returns ``count`` orders, int64 (heads, n), on the device of ``gram``. A group is led by the first row that is in
    none yet; the others are those with the greatest products with the rows already in it. No two rows meet in two
    orders, as long as there are others.
    """
    heads, n = gram.shape[:2]
    likeness, head = gram.detach().to("cpu", copy=True).abs(), torch.arange(heads)
    own = torch.arange(n) < torch.tensor(bits)[:, None]
    likeness.masked_fill_(~own[:, None], -math.inf)  # no group takes a row past its head's own
    orders = []
    for _ in range(count):
        free, order = torch.ones(heads, n), torch.empty(heads, n, dtype=torch.int64)
        for at in range(n):
            if at % GROUP == 0:
                wanted = torch.zeros(heads, n)
                row = free.argmax(1)
            else:
                row = wanted.masked_fill(free == 0, -math.inf).argmax(1)
                # A head that has no own row left goes through the others in order.
                row = torch.where(at < own.sum(1), row, free.argmax(1))
            order[:, at], free[head, row] = row, 0
            wanted += likeness[head, row]
        groups = order.view(heads, -1, GROUP)
        for i in range(GROUP):
            for j in range(GROUP):
                likeness[head[:, None], groups[..., i], groups[..., j]] = 0
        orders.append(order.to(gram.device))
    return orders


def orders_of(book: SignBook, count: int) -> list[torch.Tensor]:
    """``coupled_orders`` of a codebook, made at the first call and kept as long as the book."""
    with _lock:
        known = _known.get(book)
        if known is None or len(known) < count:
            known = coupled_orders(gram_of(book)[1], book.layout.bits, count)
            known = _known[book] = [order.short() for order in known]  # held as long as the model
    return [order.long() for order in known[:count]]


def held_bytes(book: SignBook) -> int:
    """Bytes of the orders made for this book so far."""
    return sum(order.nbytes for order in _known.get(book, ()))
