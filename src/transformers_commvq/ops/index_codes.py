"""Index codes and the joint binary codes that go with them: the CommVQ authors' arithmetic. See index_book.

Two differences from theirs. Their value encoder draws its choice (Gumbel noise) at inference too, here it is the most
likely one. And what is stored of a value is not its norm but the norm over that of the decoded bits, the same float16:
decoding then needs no norm of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from ..index_book import ENTRIES, IndexBook, JointBinaryBook
from ..packing import pack, pack_indices, split_scale, unpack, unpack_indices, with_scale

EPS = 1e-6  # as the authors guard their divisions
TOKENS = 512  # encoded at a time: (heads, tokens, 4096) distances are held


def _joined(x: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) -> (batch, tokens, heads * head_dim) float32."""
    return x.float().transpose(1, 2).flatten(2)


def times_i(x: torch.Tensor) -> torch.Tensor:
    """A half-split complex vector times i."""
    re, im = x.chunk(2, -1)
    return torch.cat([-im, re], -1)


def encode_keys(x: torch.Tensor, book: IndexBook) -> torch.Tensor:
    """Codes of keys before RoPE, in the half-split layout; see CodeKind."""
    norm = _joined(x).norm(dim=-1)
    rest = x.float() / norm[:, None, :, None].clamp_min(torch.finfo(torch.float32).tiny)
    step = max(1, TOKENS // x.shape[0])
    indices = torch.cat([nearest_centres(part, book.z.float()) for part in rest.split(step, 2)], 1)
    return with_scale(pack_indices(indices), norm)


def nearest_centres(rest: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Stage by stage the nearest centre to what the stages before left over.

    rest: (batch, heads, tokens, head_dim) float32, keys divided by their norm.
    z: (stages, heads, 64, head_dim) float32.
    Returns indices a and b, (batch, tokens, heads, stages, 2) int64.
    """
    head = torch.arange(z.shape[1], device=z.device)[:, None]
    chosen = []
    for entries in z:
        turned = times_i(entries)
        a, b = rest @ entries.transpose(1, 2), rest @ turned.transpose(1, 2)  # (batch, heads, tokens, 64)
        squares = entries.square().sum(-1)
        lengths = squares[..., :, None] + squares[..., None, :] + 2 * entries @ turned.transpose(1, 2)
        distance = lengths[:, None] - 2 * (a[..., :, None] + b[..., None, :])
        best = distance.flatten(-2).argmin(-1)
        first, second = best // ENTRIES, best % ENTRIES
        chosen.append(torch.stack([first, second], -1))
        rest = rest - entries[head, first] - turned[head, second]
    return torch.stack(chosen, 3).transpose(1, 2)


def key_features(codes: torch.Tensor, book: IndexBook) -> torch.Tensor:
    """The decoded keys themselves: gathering vectors is cheaper than any one-hot feature."""
    stages, heads, _, dim = book.z.shape
    packed, norm = split_scale(codes)
    indices = unpack_indices(packed, heads, stages).permute(4, 0, 2, 1, 3)  # (2, batch, heads, tokens, stages)
    table = torch.arange(stages, device=codes.device) * heads + torch.arange(heads, device=codes.device)[:, None]
    rows = indices + table.to(indices.dtype)[:, None] * ENTRIES
    vectors = book.z.float().view(-1, dim)
    sums = torch.nn.functional.embedding_bag(rows.reshape(-1, stages), vectors, mode="sum")
    first, second = sums.view(*rows.shape[:-1], dim)
    return (first + times_i(second)) * norm[:, None, :, None]


def key_project(features: torch.Tensor, mass: Any, book: IndexBook) -> torch.Tensor:
    """Nothing is left to do: ``key_features`` are keys."""
    return features


def encode_values(x: torch.Tensor, book: JointBinaryBook) -> torch.Tensor:
    """Codes of values; see CodeKind."""
    functional = torch.nn.functional
    y = _joined(x) / (book.scale.float() + EPS)
    norm = y.norm(dim=-1, keepdim=True)
    y = functional.layer_norm(y / (norm + EPS), y.shape[-1:], book.norm_weight.float(), book.norm_bias.float())
    y = functional.gelu(functional.linear(y, book.enc_weight.float(), book.enc_bias.float()))
    y = functional.linear(y, book.out_weight.float(), book.out_bias.float())
    choice = y.unflatten(-1, (-1, 4)).argmax(-1)
    # Choices 0, 1, 2, 3 are the bit pairs (1, 0), (0, 1), (1, 1), (0, 0).
    bits = torch.stack([(choice == 0) | (choice == 2), (choice == 1) | (choice == 2)], -1).flatten(-2).float()
    length = (bits @ book.embedding.float()).norm(dim=-1)
    return with_scale(pack(1 - 2 * bits[:, None], book.layout), (norm[..., 0] + EPS) / (length + EPS))


def value_features(codes: torch.Tensor, book: JointBinaryBook) -> torch.Tensor:
    """Bits times the stored factor; the same for every head."""
    packed, factor = split_scale(codes)
    bits = (1 - unpack(packed, book.layout)[:, 0]) / 2
    return (bits * factor[..., None])[:, None].expand(-1, book.heads, -1, -1)


def value_matrix(book: JointBinaryBook) -> torch.Tensor:
    """What bits are multiplied by, (heads, n, head_dim) float32."""
    matrix = book.embedding.float() * (book.scale.float() + EPS)
    return matrix.unflatten(-1, (book.heads, -1)).transpose(0, 1)


def value_project(features: torch.Tensor, mass: Any, book: JointBinaryBook) -> torch.Tensor:
    """See CodeKind; there is no mean, so ``mass`` plays no part."""
    return features @ value_matrix(book)
