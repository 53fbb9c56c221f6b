"""The codebooks in the package: found by the model's id, fit it, and cost what the README says, in real bytes."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transformers_commvq import Codebook, disable, enable, make_cache
from transformers_commvq.evaluation import streaming_quality
from transformers_commvq.hub import PACKAGED, resolve
from transformers_commvq.rope import angles

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENS = 8000
RATES = {2: 0.15, 1: 0.09}  # bits -> the most a cache of 8,000 tokens may hold, against fp16


@pytest.fixture(scope="module")
def model():
    """SmolLM2-135M's shapes without its weights."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.model.rotary_emb.to_empty(device="cpu")
    inv_freq = 1.0 / 100000.0 ** (torch.arange(0, 64, 2).float() / 64)
    model.model.rotary_emb.inv_freq.copy_(inv_freq)
    return model


def filled(model, tokens, batch=1):
    """A cache after a prompt of random keys and values; storing them is all that an attention layer asks of it."""
    cache = make_cache(model)
    positions = torch.arange(tokens)[None]
    cos, sin = angles(positions, model.model.rotary_emb.inv_freq)
    cache.positions.extend(0, positions, cos, sin)
    for layer in cache.layers:
        keys, values = torch.randn(2, batch, 3, tokens, 64).to(torch.bfloat16)
        layer.lazy_initialization(keys, values)
        layer.append(keys, values, None)
    return cache


@pytest.mark.parametrize("bits", RATES)
def test_bytes_of_a_real_cache(model, bits):
    enable(model, {"bits": bits, "base_model": BASE})
    cache = filled(model, TOKENS)
    fp16 = 2 * 2 * 30 * 3 * 64 * TOKENS
    assert cache.memory_report()["fp16"] == fp16
    assert cache.get_seq_length() == TOKENS
    assert cache.nbytes <= RATES[bits] * fp16
    held = {}
    for owner in (*cache.layers, cache.positions):  # every tensor, found without the report's help
        for value in vars(owner).values():
            for t in value.values() if isinstance(value, dict) else [value]:
                if (isinstance(t, torch.Tensor) and t.is_floating_point()) or getattr(t, "dtype", None) in (
                    torch.uint8, torch.int32, torch.int64,
                ):  # fmt: skip
                    held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    assert abs(sum(held.values()) - cache.nbytes) <= 0.001 * cache.nbytes


@pytest.mark.parametrize("bits", RATES)
def test_rate_and_size(model, bits):
    enable(model, {"bits": bits, "base_model": BASE})
    book = make_cache(model).codebook
    assert book.bits <= bits and book.bits > bits - 0.01  # all-in: nothing else is stored for a token
    assert book.nbytes <= (4 << 20 if bits == 2 else 3 << 20)
    assert book.geometry.id == BASE
    assert book.evaluation and book.calibration, "shipped codebooks say what they were learned from and measured on"


@pytest.mark.parametrize("folder", sorted(p for p in PACKAGED.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_packaged_folder_is_whole(folder):
    book = Codebook.load(folder)
    for layer in book.layers.values():
        for side in (layer.keys, layer.values):
            assert all(torch.isfinite(t).all() for t in side.tensors().values())
            if side.metric is not None:
                assert torch.linalg.eigvalsh(side.metric.float()).min() > 0


def test_resolve_needs_no_network(model, monkeypatch):
    import socket

    from transformers_commvq import CommVQConfig
    from transformers_commvq.geometry import read_model

    def refuse(*args, **kwargs):
        raise AssertionError("a packaged codebook must not touch the network")

    monkeypatch.setattr(socket, "socket", refuse)
    assert resolve(CommVQConfig(bits=2, base_model=BASE), read_model(model).geometry).bits <= 2


@pytest.mark.parametrize("bits, change, kl", [(2, 0.03, 0.03), (1, 0.12, 0.12)])
def test_quality_on_text_not_learned_from(smollm2, bits, change, kl):
    """One window of prose, streamed as the README's numbers are: a broken codec or codebook is off by far more."""
    model, tokenizer = smollm2
    text = (Path(__file__).parents[1] / "README.md").read_text()
    window = torch.tensor(tokenizer(text).input_ids[:1024])
    enable(model, {"bits": bits, "base_model": BASE})
    try:
        quality = streaming_quality(model, make_cache, [window], progress=False)
    finally:
        disable(model)
    assert quality.change <= change
    assert 0 < quality.mean_kl <= kl
