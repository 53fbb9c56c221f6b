"""The models that are timed, and codebooks for those that have none of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from transformers_commvq import Codebook, LayerBook, SignBook, demo_model
from transformers_commvq.geometry import read_model
from transformers_commvq.packing import CodeLayout

# Bits of the heads over their mean, as allocation deals them; a model with other than 8 heads repeats them.
UNEVEN = (0.5, 0.75, 0.75, 1.0, 1.0, 1.25, 1.25, 1.5)
SPREAD = 0.02  # of random weights: transformers' own initializer_range


@dataclass(frozen=True)
class Subject:
    """A model to time.

    base_model: Hub id under which its codebooks are shipped, or None: codebooks of random numbers are made, of the
        shapes that learned ones have; speed and memory depend on nothing else.
    """

    name: str
    load: Callable[[torch.device, torch.dtype], PreTrainedModel]
    base_model: str | None


def llama_8b_config(**changes) -> LlamaConfig:
    """The geometry of Llama 3.1 8B."""
    values = dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=128000, eos_token_id=None, pad_token_id=0,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    return LlamaConfig(**{**values, **changes})


def toy_config(**changes) -> LlamaConfig:
    """The same kind of model, small enough to run anywhere in seconds."""
    small = dict(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    return llama_8b_config(**{**small, "bos_token_id": 1, **changes})


@torch.no_grad()
def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model of random weights, each module's made where it will stay: nothing of its size is ever held twice."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=dtype, device=device)
            made = made.fill_(1.0) if parameter.dim() == 1 else made.normal_(0, SPREAD, generator=generator)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
    if config.tie_word_embeddings:
        model.tie_weights()
    with torch.device(device):  # its buffers are computed, not loaded
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if left:
        raise RuntimeError(f"{left} were left without memory: this model has parts that random_model does not make.")
    return model


def random_codebook(model: PreTrainedModel, bits: float, seed: int = 0) -> Codebook:
    """Sign codebooks of random numbers with everything a learned one has: uneven bits, means, a key metric."""
    geometry = read_model(model).geometry
    heads, dim = geometry.num_key_value_heads, geometry.head_dim
    generator = torch.Generator().manual_seed(seed)
    shares = [
        UNEVEN[h * len(UNEVEN) // heads] if heads < len(UNEVEN) else UNEVEN[h % len(UNEVEN)] for h in range(heads)
    ]
    wanted = [bits * dim * share * heads / sum(shares) for share in shares]

    def book(metric: bool) -> SignBook:
        layout = CodeLayout(tuple(max(8, round(n / 8) * 8) for n in wanted))
        rows = [torch.randn(n, dim, generator=generator) / n**0.5 for n in layout.bits]
        rows = [r[r.norm(dim=1).argsort(descending=True)] for r in rows]
        form = torch.eye(dim).expand(heads, -1, -1).half().clone() if metric else None
        return SignBook(layout, torch.cat(rows).half(), torch.randn(heads, dim, generator=generator), form)

    return Codebook(geometry, {i: LayerBook(book(True), book(False)) for i in geometry.layers})


def saved_codebook(model: PreTrainedModel, bits: float, folder: Path) -> str:
    """A folder with random codebooks, made if it is not there."""
    target = folder / f"{bits:g}bit"
    if not (target / "config.json").is_file():
        random_codebook(model, bits).save(target)
    return str(target)


def _smollm2(device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    return demo_model.load(dtype)[0].to(device)


SUBJECTS = {
    "llama-8b": Subject(
        "Llama 3.1 8B geometry, random weights", lambda d, t: random_model(llama_8b_config(), d, t), None
    ),
    "smollm2": Subject("SmolLM2-135M-Instruct", _smollm2, demo_model.BASE_MODEL),
    "toy": Subject("a toy of 4 layers, random weights", lambda d, t: random_model(toy_config(), d, t), None),
}
