"""A test double: codes that hold the float32 itself. With it every path must give DynamicCache's tokens."""

from dataclasses import dataclass
from unittest import mock

import torch

from transformers_commvq import Codebook, LayerBook, enable, hub
from transformers_commvq.geometry import read_model
from transformers_commvq.ops import KINDS, CodeKind


@dataclass
class LosslessBook:
    heads: int
    head_dim: int
    kind = "lossless"
    nbytes = 0
    device = torch.device("cpu")

    @property
    def token_bytes(self):
        return self.heads * self.head_dim * 4

    def to(self, device):
        return self

    def select_heads(self, start, stop):
        return LosslessBook(stop - start, self.head_dim)


def _encode(x, book):
    return x.float().transpose(1, 2).contiguous().view(torch.uint8).flatten(2)


def _features(codes, book):
    return codes.contiguous().view(torch.float32).unflatten(2, (book.heads, book.head_dim)).transpose(1, 2)


KINDS["lossless"] = CodeKind(_encode, _features, lambda f, mass, book: f)


def lossless_codebook(model):
    geometry = read_model(model).geometry
    book = LosslessBook(geometry.num_key_value_heads, geometry.head_dim)
    return Codebook(geometry, {i: LayerBook(book, book) for i in geometry.layers})


def enable_lossless(model, **config):
    with mock.patch.object(hub, "resolve", lambda *a, **k: lossless_codebook(model)):
        return enable(model, {"bits": 8, **config})
