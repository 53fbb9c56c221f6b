"""The published codebooks of the CommVQ authors, in our artefact: a second kind of code, with their arithmetic.

Keys (before RoPE) of all heads together are divided by their norm; then, head by head and stage by stage, the
remainder's nearest centre is subtracted. A stage's 4096 centres are ``z_a + i z_b`` of 64 complex vectors z, so they
commute with RoPE; a code is two 6-bit indices. Values of all heads together pass through a small encoder that gives
one of four choices a pair of bits; the bits times a matrix are a direction, to which the stored norm gives its length.

arXiv 2506.18879, section 3; https://github.com/UMass-Embodied-AGI/CommVQ. One difference: their value encoder draws
its choice (Gumbel noise) at inference too, here it is the most likely one. ``paper_import`` makes these books.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from .codebook import CONFIG_FILE, FORMAT_VERSION, LIBRARY, TENSOR_FILE, Codebook, LayerBook, ModelGeometry
from .config import CodebookFormatError, CodebookIntegrityError, CodebookNotFoundError
from .ops.codec import KINDS, CodeKind
from .packing import CodeLayout, pack, unpack

KIND = "paper"
ENTRIES = 64  # complex vectors of a stage
INDEX_BITS = 6
EPS = 1e-6  # as the authors guard their divisions
TOKENS = 512  # encoded at a time: (heads, tokens, 4096) distances are held

_NORM_BYTES = 2  # one float16 a token, over all heads


class _Tensors:
    """What the two kinds of book share: moving, counting, and code bytes that end in a float16 norm."""

    def to(self, device: torch.device | str):
        return type(self)(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in self._fields()))

    def _fields(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self)]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's codes, all heads, its norm included."""
        return self.layout.total_bytes + _NORM_BYTES

    @property
    def mean(self) -> torch.Tensor:
        """One of the tensors; there is no mean, but callers ask a book's ``mean`` for its device."""
        return next(iter(self.tensors().values()))

    def pack(self, bits: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """bits (batch, tokens, n) of 0 and 1, norm (batch, tokens) -> uint8 (batch, tokens, token_bytes)."""
        signs = torch.nn.functional.pad(
            1 - 2 * bits.to(torch.int8), (0, self.layout.max_bits - bits.shape[-1]), value=1
        )
        tail = norm.to(torch.float16)[..., None].contiguous().view(torch.uint8)
        return torch.cat([pack(signs[:, None], self.layout), tail], -1)

    def unpack(self, codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of ``pack``: bits as float32, norm as float32 (batch, tokens)."""
        signs = unpack(codes[..., :-_NORM_BYTES], self.layout)[:, 0, :, :bits]
        norm = codes[..., -_NORM_BYTES:].contiguous().view(torch.float16)[..., 0]
        return (1 - signs) / 2, norm.float()


def _layout(bits: int) -> CodeLayout:
    return CodeLayout((-(-bits // 8) * 8,))


@dataclass
class PaperKeys(_Tensors):
    """One layer's keys.

    z: (stages, heads, 64, head_dim) float32: complex vectors, half-split (real parts, then imaginary parts).
    """

    kind = "paper-keys"
    z: torch.Tensor

    @property
    def heads(self) -> int:
        return self.z.shape[1]

    @property
    def head_dim(self) -> int:
        return self.z.shape[3]

    @property
    def stages(self) -> int:
        return self.z.shape[0]

    @property
    def bits(self) -> int:
        """Code bits of one token, all heads."""
        return self.stages * self.heads * 2 * INDEX_BITS

    @cached_property
    def layout(self) -> CodeLayout:
        return _layout(self.bits)

    @cached_property
    def turned(self) -> torch.Tensor:
        """i z, shaped as z."""
        re, im = self.z.chunk(2, -1)
        return torch.cat([-im, re], -1)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """|z_a + i z_b|^2, (stages, heads, 64, 64)."""
        a, b = self.z.square().sum(-1), self.turned.square().sum(-1)
        return a[..., :, None] + b[..., None, :] + 2 * self.z @ self.turned.transpose(-1, -2)


@dataclass
class PaperValues(_Tensors):
    """One layer's values; d = heads * head_dim, n bits a token, names as in the authors' checkpoint.

    embedding: (n, d). scale: (d,). norm_weight, norm_bias: (d,), layer norm. enc_weight (m, d), enc_bias (m,),
    out_weight (2n, m), out_bias (2n,): the encoder, with a GELU between. heads: key/value heads.
    """

    kind = "paper-values"
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
        n, d = self.embedding.shape
        m = self.enc_weight.shape[0]
        want = {"scale": (d,), "norm_weight": (d,), "norm_bias": (d,), "enc_weight": (m, d), "enc_bias": (m,)}
        want |= {"out_weight": (2 * n, m), "out_bias": (2 * n,)}
        wrong = [k for k, shape in want.items() if tuple(getattr(self, k).shape) != shape]
        if wrong or d % self.heads:
            raise CodebookFormatError(f"values: {wrong or 'heads'} do not agree with embedding {(n, d)}.")

    @property
    def bits(self) -> int:
        """Code bits of one token, all heads."""
        return self.embedding.shape[0]

    @property
    def head_dim(self) -> int:
        return self.embedding.shape[1] // self.heads

    @cached_property
    def layout(self) -> CodeLayout:
        return _layout(self.bits)


def _joined(x: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) -> (batch, tokens, heads * head_dim) float32."""
    return x.float().transpose(1, 2).flatten(2)


def encode_keys(x: torch.Tensor, book: PaperKeys) -> torch.Tensor:
    """Codes of keys before RoPE, in the half-split layout; see CodeKind."""
    norm = _joined(x).norm(dim=-1)
    rest = x.float() / norm[:, None, :, None].clamp_min(torch.finfo(torch.float32).tiny)
    parts = [nearest_centres(part, book) for part in rest.split(TOKENS, 2)]
    index = torch.cat(parts, 1)  # (batch, tokens, heads, stages, 2)
    shifts = torch.arange(INDEX_BITS, device=x.device)
    return book.pack(((index[..., None] >> shifts) & 1).flatten(2), norm)


def nearest_centres(rest: torch.Tensor, book: PaperKeys) -> torch.Tensor:
    """Stage by stage the nearest centre to what the stages before left over.

    rest: (batch, heads, tokens, head_dim) float32, keys divided by their norm.
    Returns indices a and b, (batch, tokens, heads, stages, 2) int64.
    """
    rest, chosen = rest.clone(), []
    for stage in range(book.stages):
        z, turned = book.z[stage].float(), book.turned[stage].float()
        a, b = rest @ z.transpose(1, 2), rest @ turned.transpose(1, 2)  # (batch, heads, tokens, 64)
        distance = book.lengths[stage][:, None] - 2 * (a[..., :, None] + b[..., None, :])
        best = distance.flatten(-2).argmin(-1)
        index = torch.stack([best // ENTRIES, best % ENTRIES], -1)
        chosen.append(index)
        rest -= centre(index, z, turned)
    return torch.stack(chosen, 3).transpose(1, 2)


def centre(index: torch.Tensor, z: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """z_a + i z_b: index (batch, heads, tokens, 2) -> (batch, heads, tokens, head_dim)."""
    head = torch.arange(z.shape[0], device=z.device)[:, None]
    return z[head, index[..., 0]] + turned[head, index[..., 1]]


def key_features(codes: torch.Tensor, book: PaperKeys) -> torch.Tensor:
    """The decoded keys themselves: gathering vectors is cheaper than any one-hot feature."""
    bits, norm = book.unpack(codes, book.bits)
    shifts = torch.arange(INDEX_BITS, device=codes.device)
    index = (bits.long().unflatten(-1, (book.heads, book.stages, 2, INDEX_BITS)) << shifts).sum(-1)
    total = torch.zeros(codes.shape[0], book.heads, codes.shape[1], book.head_dim, device=codes.device)
    for stage in range(book.stages):
        total += centre(index[:, :, :, stage].transpose(1, 2), book.z[stage].float(), book.turned[stage].float())
    return total * norm[:, None, :, None]


def key_project(features: torch.Tensor, mass: Any, book: PaperKeys) -> torch.Tensor:
    return features


def encode_values(x: torch.Tensor, book: PaperValues) -> torch.Tensor:
    """Codes of values; see CodeKind."""
    functional = torch.nn.functional
    y = _joined(x) / (book.scale.float() + EPS)
    norm = y.norm(dim=-1, keepdim=True)
    y = functional.layer_norm(y / (norm + EPS), y.shape[-1:], book.norm_weight.float(), book.norm_bias.float())
    y = functional.gelu(functional.linear(y, book.enc_weight.float(), book.enc_bias.float()))
    y = functional.linear(y, book.out_weight.float(), book.out_bias.float())
    choice = y.unflatten(-1, (-1, 4)).argmax(-1)
    # Choices 0, 1, 2, 3 are the bit pairs (1, 0), (0, 1), (1, 1), (0, 0).
    bits = torch.stack([(choice == 0) | (choice == 2), (choice == 1) | (choice == 2)], -1).flatten(-2)
    return book.pack(bits, norm[..., 0])


def value_features(codes: torch.Tensor, book: PaperValues) -> torch.Tensor:
    """Bits, times the stored norm over the norm of what the bits decode to; the same for every head."""
    bits, norm = book.unpack(codes, book.bits)
    length = (bits @ book.embedding.float()).norm(dim=-1)
    features = bits * ((norm + EPS) / (length + EPS))[..., None]
    return features[:, None].expand(-1, book.heads, -1, -1)


def value_project(features: torch.Tensor, mass: Any, book: PaperValues) -> torch.Tensor:
    matrix = book.embedding.float() * (book.scale.float() + EPS)
    return features @ matrix.unflatten(-1, (book.heads, -1)).transpose(0, 1)


KINDS[PaperKeys.kind] = CodeKind(encode_keys, key_features, key_project)
KINDS[PaperValues.kind] = CodeKind(encode_values, value_features, value_project)


def save(book: Codebook, folder: str | os.PathLike) -> Path:
    """Write the artefact, config.json last. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        f"layers.{i}.{side}.{name}": tensor.contiguous()
        for i, layer in book.layers.items()
        for side in ("keys", "values")
        for name, tensor in getattr(layer, side).tensors().items()
    }
    part = folder / (TENSOR_FILE + ".part")
    save_file(flat, part, metadata={"format": "pt", "library": LIBRARY})
    with part.open("rb") as file:
        book.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    geometry = {f.name: getattr(book.geometry, f.name) for f in fields(book.geometry)}
    config = {
        "format_version": FORMAT_VERSION,
        "library_name": LIBRARY,
        "bits": book.bits,
        "base_model": geometry,
        "codec": {"kind": KIND},
        "calibration": book.calibration,
        "evaluation": book.evaluation,
        "files": {TENSOR_FILE: {"sha256": book.sha256, "size": part.stat().st_size}},
    }
    text = json.dumps(config, indent=2) + "\n"
    part.replace(folder / TENSOR_FILE)
    (folder / (CONFIG_FILE + ".part")).write_text(text)
    (folder / (CONFIG_FILE + ".part")).replace(folder / CONFIG_FILE)
    return folder


def is_paper(folder: str | os.PathLike) -> bool:
    """Whether a folder's config.json names this kind of code."""
    try:
        config = json.loads((Path(folder) / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and (config.get("codec") or {}).get("kind") == KIND


def load(folder: str | os.PathLike, expected_sha256: str | None = None) -> Codebook:
    """Read and verify an artefact that ``is_paper``; arguments and errors as ``Codebook.load``."""
    folder = Path(folder)
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    if config.get("format_version") != FORMAT_VERSION:
        raise CodebookFormatError(
            f"{folder} has format_version {config.get('format_version')!r}; this package reads {FORMAT_VERSION}. "
            "Fix: pip install -U transformers-commvq"
        )
    if not (folder / TENSOR_FILE).is_file():
        raise CodebookNotFoundError(f"{folder / TENSOR_FILE}: no such file.")
    data = (folder / TENSOR_FILE).read_bytes()
    got = hashlib.sha256(data).hexdigest()
    try:
        for want in (config["files"][TENSOR_FILE]["sha256"], expected_sha256):
            if want is not None and want != got:
                raise CodebookIntegrityError(
                    f"{folder / TENSOR_FILE} has sha256 {got[:16]}..., expected {want[:16]}.... Fix: fetch it again."
                )
        geometry = ModelGeometry(**{**config["base_model"], "layers": tuple(config["base_model"]["layers"])})
        flat = load_tensors(data)
        layers = {i: _layer(flat, i, geometry.num_key_value_heads) for i in geometry.layers}
    except (KeyError, TypeError, SafetensorError) as error:
        raise CodebookFormatError(f"{folder}: config.json and the tensors do not agree: {error!r}.") from error
    return Codebook(geometry, layers, config.get("calibration", {}), config.get("evaluation", {}), got)


def _layer(flat: dict[str, torch.Tensor], index: int, heads: int) -> LayerBook:
    def side(name: str, kind: type) -> list[torch.Tensor]:
        return [flat[f"layers.{index}.{name}.{f.name}"] for f in fields(kind) if f.name != "heads"]

    return LayerBook(PaperKeys(*side("keys", PaperKeys)), PaperValues(*side("values", PaperValues), heads))
