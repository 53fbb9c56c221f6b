"""Every family of models: lossless codes give DynamicCache's tokens, or enabling says why it cannot."""

import warnings

import pytest
import torch
import transformers
from generation import SHAPE, from_config
from lossless import enable_lossless
from model_zoo import MULTIMODAL, REFUSED, SUPPORTED, build, build_multimodal, config_of, outcome

from transformers_commvq import UnsupportedModelError, disable, enable
from transformers_commvq.geometry import read_model

REASONS = {
    "Mistral 7B v0.1": "no full-attention layer.*sliding_attention",
    "GPT-2": "no attention layer that takes rotary",
    "OPT": "no attention layer that takes rotary",
    "BLOOM": "AttentionInterface",
    "Mamba": "no full-attention layer.*linear_attention",
    "DeepSeek-V3": "latent",
    "Llama 4": "chunks",
    "Gemma 3n": "another layer's keys",
    "HunYuan": "normalizes keys after RoPE",
    "JetMoE": "repeats keys",
    "DiffLlama": "attends twice",
    "nanochat": "rotates pairs",
    "Falcon": "AttentionInterface",
    "GPT-J": "AttentionInterface|no RoPE",  # transformers 5.24 moved it to AttentionInterface, its rotation inside
    "Jamba": "rotary",
}


@pytest.mark.filterwarnings("ignore:only .* layers have full attention:UserWarning")
@pytest.mark.parametrize("name", SUPPORTED)
def test_same_tokens(name):
    same, difference, chosen, cache = outcome(build(name))
    assert same and difference < 2e-3
    assert chosen > 1
    compressed = [layer for layer in cache.layers if type(layer).__name__ == "CommVQLayer"]
    assert compressed and all(layer.coded == 128 for layer in compressed)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_same_tokens_with_a_picture(name):
    model, inputs = build_multimodal(name)
    same, difference, chosen, cache = outcome(model, inputs)
    assert same and difference < 2e-3 and chosen > 3 and cache.layers[0].coded == 128
    text = model.config.get_text_config()
    assert (text._attn_implementation, model.config.vision_config._attn_implementation) == ("commvq", "sdpa")
    disable(model)
    assert text._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    model = from_config(config_of(name))
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=REASONS[name]):
        enable(model)
    assert model.config._attn_implementation == before and "_commvq" not in vars(model)


@pytest.mark.parametrize("name", ["SmolLM3", "Cohere 2", "EXAONE 4"])
def test_layers_without_rope_store_keys_as_they_are(name):
    """Their codebooks are learned from unrotated keys, so rotating them back would spoil the codes."""
    model = enable_lossless(build(name))
    reading = vars(model)["_commvq"].reading
    kinds = {i: reading.rope_of(i).layout for i in reading.geometry.layers}
    want = {"SmolLM3": {0: "half", 1: "none", 2: "half", 3: "none"}}.get(name, {1: "none", 3: "none"})
    assert kinds == want


def test_little_compressed_is_told():
    settings = {"sliding_window": 48, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    config = transformers.Olmo3Config(**{**SHAPE, **settings, "num_hidden_layers": 4})
    with pytest.warns(UserWarning, match="only 1 of 4 layers"):
        enable_lossless(from_config(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_lossless(build("Llama 3"))


def test_reading_does_not_depend_on_the_default_dtype():
    model = from_config(transformers.LlamaConfig(**{**SHAPE, "head_dim": 512}))
    want = read_model(model).rope
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert read_model(model).rope == want and want.rope.rotary_dim == 512
    finally:
        torch.set_default_dtype(torch.float32)
