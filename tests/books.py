"""Random codebooks and compressed pasts, for tests that need no model."""

import torch

from transformers_commvq import Codebook, LayerBook, ModelGeometry, SignBook
from transformers_commvq.ops import CodedPast
from transformers_commvq.packing import CodeLayout, pack
from transformers_commvq.positions import PositionTrack
from transformers_commvq.rope import Rope


def sign_book(bits, dim, seed=0, metric=False):
    """bits: per head."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, dim, generator=g) / n**0.5 for n in bits]
    rows = [r[r.norm(dim=1).argsort(descending=True)] for r in rows]
    root = torch.randn(len(bits), dim, dim, generator=g) / dim**0.5
    form = (root @ root.transpose(1, 2) + 0.3 * torch.eye(dim)).half() if metric else None
    mean = torch.randn(len(bits), dim, generator=g)
    return SignBook(CodeLayout(tuple(bits)), torch.cat(rows).half(), mean, form)


def layer_book(key_bits, value_bits, dim, seed=0):
    return LayerBook(sign_book(key_bits, dim, seed, metric=True), sign_book(value_bits, dim, seed + 1))


def codebook(geometry, bits, seed=0):
    """A random codebook for a model, about ``bits`` a element and uneven over heads."""
    layers = {}
    for i in geometry.layers:
        base = max(8, int(bits * geometry.head_dim) // 8 * 8)
        uneven = [max(8, base + (8 if h % 2 else -8)) for h in range(geometry.num_key_value_heads)]
        layers[i] = layer_book(uneven, uneven[::-1], geometry.head_dim, seed + 10 * i)
    return Codebook(geometry, layers)


def geometry(layers=2, heads=2, dim=16, name="org/tiny", **changes):
    values = dict(
        id=name, revision=None, model_type="llama", num_hidden_layers=layers, layers=tuple(range(layers)),
        num_key_value_heads=heads, head_dim=dim,
        rope={"layout": "half", "rotary_dim": dim, "parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    )  # fmt: skip
    return ModelGeometry(**{**values, **changes})


def random_codes(book, batch, tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return pack(torch.randn(batch, book.heads, tokens, book.layout.max_bits, generator=g), book.layout)


def track(tokens, pairs, rows=1, starts=(0,), scaling=1.0):
    inv = 1e4 ** (-torch.arange(pairs) / pairs)
    out = PositionTrack(inv, scaling)
    positions = (torch.arange(tokens)[None] + torch.tensor(starts)[:, None]).clamp_min(0)
    from transformers_commvq.rope import angles

    out.extend(0, positions, *angles(positions, inv, scaling))
    return out


def coded_past(batch=1, tokens=100, key_bits=(24, 40), value_bits=(32, 8), dim=16, rope=None, starts=(0,), hidden=None):
    book = layer_book(key_bits, value_bits, dim)
    rope = rope or Rope("half", dim)
    keys, values = random_codes(book.keys, batch, tokens, 3), random_codes(book.values, batch, tokens, 4)
    hidden = None if hidden is None else torch.tensor(hidden)
    return CodedPast(keys, values, book, rope, track(tokens, rope.pairs, starts=starts), hidden)
