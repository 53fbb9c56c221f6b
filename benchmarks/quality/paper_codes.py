"""The codes of the CommVQ paper (arXiv 2506.18879), learned here in minutes, in our cache.

Keys are as in the paper: divided by the norm of all heads together (kept as float16), then coded head by head in
stages of 12 bits, each of whose 4096 centres is z_a + i z_b of 64 complex vectors z; a stage is learned by EM on what
the stages before leave over. The assignments are hard; the authors anneal soft ones.

Values are binary codes over all heads together. The paper's encoder, a network trained for hours, is replaced by
coordinate descent, and its stored norm is left out; both are to the paper's favour. As in the paper, all heads get the
same number of bits and errors count alike. Sinks and window are exact, as ours; the paper keeps no sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from transformers_commvq import Codebook, CommVQCache, CommVQConfig, LayerBook, SignBook
from transformers_commvq.calibration import CalibrationPlan, calibrate
from transformers_commvq.em import LearningPlan, fit_head
from transformers_commvq.geometry import read_model
from transformers_commvq.index_book import ENTRIES, IndexBook
from transformers_commvq.ops.codec import KINDS, CodeKind
from transformers_commvq.ops.encode import encode_signs
from transformers_commvq.ops.index_codes import TOKENS, nearest_centres, times_i
from transformers_commvq.packing import CodeLayout, unpack
from transformers_commvq.samples import LayerSample
from transformers_commvq.storage import MakeCache

STAGE_BITS = 12
SAMPLES = 4096  # tokens of a layer that EM sees
ROUNDS = 8  # of EM a stage


@dataclass
class JointSigns:
    """Sign codes of one layer's values, all heads together. signs: a book of one head of ``heads * head_dim``."""

    kind = "joint-signs"
    signs: SignBook
    heads: int

    @property
    def head_dim(self) -> int:
        return self.signs.head_dim // self.heads

    @property
    def device(self) -> torch.device:
        return self.signs.device

    @property
    def token_bytes(self) -> int:
        return self.signs.token_bytes

    @property
    def nbytes(self) -> int:
        return self.signs.nbytes

    def to(self, device: torch.device | str) -> JointSigns:
        return JointSigns(self.signs.to(device), self.heads)

    @cached_property
    def rows(self) -> torch.Tensor:
        """(heads, bits, head_dim) float32."""
        return self.signs.vectors.float().unflatten(1, (self.heads, -1)).transpose(0, 1)


def _encode(x: torch.Tensor, book: JointSigns) -> torch.Tensor:
    return encode_signs(x.transpose(1, 2).flatten(2)[:, None], book.signs)


def _features(codes: torch.Tensor, book: JointSigns) -> torch.Tensor:
    return unpack(codes, book.signs.layout).expand(-1, book.heads, -1, -1)


def _project(features: torch.Tensor, mass: Any, book: JointSigns) -> torch.Tensor:
    return features @ book.rows + mass * book.signs.mean.view(book.heads, 1, -1)


KINDS[JointSigns.kind] = CodeKind(_encode, _features, _project)


def learn_keys(keys: torch.Tensor, stages: int, seed: int) -> IndexBook:
    """EM, stage by stage. keys: (heads, tokens, head_dim) float32 before RoPE, the half-split layout."""
    generator = torch.Generator().manual_seed(seed)
    rest = keys / keys.transpose(0, 1).flatten(1).norm(dim=1)[:, None].clamp_min(1e-6)
    learned = []
    for _ in range(stages):
        # A drawn vector x is itself a centre if z_a = x / (1 + i): then z_a + i z_a = x.
        drawn = _complex(rest[:, torch.randperm(rest.shape[1], generator=generator)[:ENTRIES]]) / (1 + 1j)
        z = _real(drawn)
        for _ in range(ROUNDS):
            chosen = _assign(rest, z)
            z = torch.stack([_update(x, index) for x, index in zip(rest, chosen, strict=True)])
        learned.append(z)
        for x, index, vectors, turned in zip(rest, _assign(rest, z), z, times_i(z), strict=True):
            x -= vectors[index[:, 0]] + turned[index[:, 1]]
    return IndexBook(torch.stack(learned))


def _assign(rest: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """E-step: (heads, tokens, head_dim), (heads, 64, head_dim) -> indices (heads, tokens, 2)."""
    parts = [nearest_centres(part[None], z[None])[0, :, :, 0] for part in rest.split(TOKENS, 1)]
    return torch.cat(parts).transpose(0, 1)


def _update(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """M-step of one head: least squares of x on z_a + i z_b. x: (tokens, d), index: (tokens, 2). Returns (64, d)."""
    a, b = index.T
    used = (torch.bincount(a, minlength=ENTRIES) + torch.bincount(b, minlength=ENTRIES)).to(torch.complex64)
    pairs = torch.bincount(a * ENTRIES + b, minlength=ENTRIES**2).view(ENTRIES, ENTRIES)
    normal = torch.diag(used + 1e-3) + 1j * (pairs - pairs.T)
    target = _complex(x)
    sums = torch.zeros(ENTRIES, target.shape[1], dtype=target.dtype)
    sums.index_add_(0, a, target).index_add_(0, b, -1j * target)
    return _real(torch.linalg.solve(normal, sums))


def _complex(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(*x.chunk(2, -1))


def _real(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.real, x.imag], -1)


def learn_values(values: torch.Tensor, bits: int) -> JointSigns:
    """values: (heads, tokens, head_dim) float32. bits: of one token, all heads."""
    rows, mean, _ = fit_head(values.transpose(0, 1).flatten(1), None, bits, LearningPlan())
    return JointSigns(SignBook(CodeLayout((bits,)), rows.half(), mean[None]), values.shape[0])


def stages_of(rate: float, dim: int) -> int:
    """Stages of a key; the paper's own are 11 and 21 at 1 and 2 bits and head_dim 128."""
    return max(1, round(rate * dim / STAGE_BITS))


def learn_layer(sample: LayerSample, rates: Sequence[float], seed: int) -> tuple[IndexBook, dict[float, JointSigns]]:
    """One layer's keys at the highest rate, whose first stages serve the others, and its values at every rate."""
    heads, tokens, dim = sample.keys.shape
    stride = max(1, tokens // SAMPLES)
    values = {rate: learn_values(sample.values[:, ::stride], round(rate * heads * dim)) for rate in rates}
    return learn_keys(sample.keys[:, ::stride], stages_of(max(rates), dim), seed), values


def paper_cache(
    model: PreTrainedModel,
    base_model: str | None,
    rate: float,
    rates: Sequence[float],
    windows: Sequence[torch.Tensor],
    folder: Path,
) -> MakeCache:
    """Caches with the paper's codes, to be used while the model is enabled for CommVQ with whatever codebook.

    rates: what is learned together. windows: the text they are learned from. folder: keeps a file for every layer, so
        that a run which was stopped goes on.
    """
    reading = read_model(model, base_model)
    layers, missing = {}, [i for i in reading.geometry.layers if not _file(folder, i).exists()]
    if missing:
        plan = CalibrationPlan(samples=max(256, min(SAMPLES, sum(map(len, windows)))), metric_windows=0)
        _, samples = calibrate(model, windows, plan, base_model)
        for i in tqdm(missing, desc="the paper's codes", unit="layer"):
            _save(*learn_layer(samples[i], rates, seed=i), _file(folder, i))
    for i in reading.geometry.layers:
        layers[i] = _load(_file(folder, i), rate)
    codebook = Codebook(reading.geometry, layers)
    return lambda model: CommVQCache(read_model(model, base_model), codebook, CommVQConfig(), model.config)


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.safetensors"


def _save(keys: IndexBook, values: dict[float, JointSigns], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {"z": keys.z}
    for rate, book in values.items():
        flat[f"{rate:g}.vectors"], flat[f"{rate:g}.mean"] = book.signs.vectors, book.signs.mean
    partial = path.with_suffix(".partial")
    save_file(flat, partial)
    partial.replace(path)


def _load(path: Path, rate: float) -> LayerBook:
    z, vectors, mean = (load_file(path)[name] for name in ("z", f"{rate:g}.vectors", f"{rate:g}.mean"))
    signs = SignBook(CodeLayout((len(vectors),)), vectors, mean)
    return LayerBook(IndexBook(z[: stages_of(rate, z.shape[-1])]), JointSigns(signs, z.shape[1]))
