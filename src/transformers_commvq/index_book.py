"""The codebooks of index codes, the second kind: the form in which the CommVQ authors published theirs.

Keys (before RoPE) of all heads together are divided by their norm; then, head by head and stage by stage, the
remainder's nearest centre is subtracted. A stage's 4096 centres are ``z_a + i z_b`` of 64 complex vectors z, so they
commute with RoPE; a code is two 6-bit indices a stage. Values of all heads together pass through a small encoder that
gives one of four choices a pair of bits; the bits times a matrix are a direction, and a stored factor gives its length.

arXiv 2506.18879, section 3; https://github.com/UMass-Embodied-AGI/CommVQ. ops.index_codes computes with these books,
``paper_import`` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch

from .config import CodebookFormatError, UnsupportedModelError
from .packing import INDEX_BITS, SCALE_BYTES, CodeLayout, index_bytes

ENTRIES = 1 << INDEX_BITS  # complex vectors of a stage


class _JointBook:
    """What both share: codes that belong to all heads together and end in a float16."""

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.contiguous() for name, value in values.items() if isinstance(value, torch.Tensor)}

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def select_heads(self, start: int, stop: int) -> Self:
        """Raises UnsupportedModelError: a token's code has one norm over all heads, so no part of them can do alone."""
        raise UnsupportedModelError(
            "index codes belong to all key/value heads together and cannot be split over processes. "
            "Fix: sign codes (transformers-commvq learn), or no tensor parallelism."
        )


@dataclass
class IndexBook(_JointBook):
    """One layer's keys.

    z: (stages, heads, 64, head_dim) float32: complex vectors, half-split (real parts, then imaginary parts).
    """

    kind = "index"
    z: torch.Tensor

    def __post_init__(self):
        if self.z.dim() != 4 or self.z.shape[2] != ENTRIES or self.z.shape[3] % 2:
            raise CodebookFormatError(f"z {tuple(self.z.shape)}: expected (stages, heads, {ENTRIES}, even head_dim).")

    @property
    def stages(self) -> int:
        return self.z.shape[0]

    @property
    def heads(self) -> int:
        return self.z.shape[1]

    @property
    def head_dim(self) -> int:
        return self.z.shape[3]

    @property
    def bits_per_head(self) -> tuple[int, ...]:
        return (2 * INDEX_BITS * self.stages,) * self.heads

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's codes, all heads, the norm included."""
        return index_bytes(self.heads, self.stages) + SCALE_BYTES


@dataclass
class JointBinaryBook(_JointBook):
    """One layer's values; d = heads * head_dim, n bits a token, names as in the authors' checkpoint.

    embedding: (n, d), n a multiple of 8. scale: (d,). norm_weight, norm_bias: (d,), layer norm. enc_weight (m, d),
    enc_bias (m,), out_weight (2n, m), out_bias (2n,): the encoder, with a GELU between. heads: key/value heads.
    """

    kind = "joint-binary"
    embedding: torch.Tensor
    scale: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    enc_weight: torch.Tensor
    enc_bias: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    heads: int

    def __post_init__(self):
        matrices = {"embedding": self.embedding, "enc_weight": self.enc_weight}
        if flat := [f"{name} {tuple(tensor.shape)}" for name, tensor in matrices.items() if tensor.dim() != 2]:
            raise CodebookFormatError(f"{', '.join(flat)}: expected a matrix.")
        n, d = self.embedding.shape
        m = self.enc_weight.shape[0]
        wanted = {
            "scale": (d,), "norm_weight": (d,), "norm_bias": (d,), "enc_weight": (m, d), "enc_bias": (m,),
            "out_weight": (2 * n, m), "out_bias": (2 * n,),
        }  # fmt: skip
        wrong = [f"{k} {tuple(getattr(self, k).shape)}" for k, v in wanted.items() if getattr(self, k).shape != v]
        if wrong or d % self.heads:
            raise CodebookFormatError(
                f"{', '.join(wrong) or f'{d} elements'}: not of an encoder of {n} bits for {self.heads} heads."
            )
        _ = self.layout  # raises for bits that are no whole bytes

    @property
    def head_dim(self) -> int:
        return self.embedding.shape[1] // self.heads

    @cached_property
    def layout(self) -> CodeLayout:
        """Of all heads' bits together, as if of one head."""
        return CodeLayout((self.embedding.shape[0],))

    @property
    def bits_per_head(self) -> tuple[float, ...]:
        return (self.embedding.shape[0] / self.heads,) * self.heads

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's codes, all heads, the factor included."""
        return self.layout.total_bytes + SCALE_BYTES
