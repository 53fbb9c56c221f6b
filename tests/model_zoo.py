"""Tiny random models of many families, for the support table and its tests. No weights are fetched."""

import torch
import transformers
from generation import SHAPE, from_config, greedy, prompt
from lossless import enable_lossless
from transformers import AutoModelForImageTextToText

from transformers_commvq import CommVQCache

HALF_SLIDING = {
    "num_hidden_layers": 4,
    "sliding_window": 48,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 130,
    "partial_rotary_factor": 0.5,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
EVERY_HEAD = {"num_key_value_heads": None}  # models that have no grouped keys and would ignore the setting
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}

# name -> (config class, its settings beside SHAPE)
SUPPORTED = {
    "Llama 3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Ministral": ("MinistralConfig", {**HALF_SLIDING, "head_dim": 16}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 32}),
    "Qwen3 MoE": ("Qwen3MoeConfig", {**MOE, "head_dim": 16, "num_experts": 4}),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        {
            **MOE,
            **LINEAR,
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "Gemma": ("GemmaConfig", {"head_dim": 16}),
    "Gemma 2": ("Gemma2Config", {**HALF_SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "Gemma 3": ("Gemma3TextConfig", {**HALF_SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "Gemma 4": ("Gemma4TextConfig", {**HALF_SLIDING, "head_dim": 16, "num_kv_shared_layers": 0}),
    "Phi": ("PhiConfig", {}),
    "Phi-3": ("Phi3Config", {}),
    "Phi-4-mini": ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 130}),
    "SmolLM3": ("SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "Cohere": ("CohereConfig", {}),
    "Cohere 2": ("Cohere2Config", HALF_SLIDING),
    "GLM": ("GlmConfig", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "GLM-4": ("Glm4Config", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "OLMo": ("OlmoConfig", {}),
    "OLMo 2": ("Olmo2Config", {}),
    "OLMo 3": ("Olmo3Config", HALF_SLIDING),
    "Granite": ("GraniteConfig", {}),
    "Granite 4 (hybrid)": (
        "GraniteMoeHybridConfig",
        {
            **MAMBA,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention"] * 2,
            "position_embedding_type": "rope",
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "Bamba": ("BambaConfig", {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3], "mamba_n_groups": 1}),
    "LFM2": ("Lfm2Config", {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}),
    "StableLM": ("StableLmConfig", {"partial_rotary_factor": 0.25}),
    "GPT-NeoX": ("GPTNeoXConfig", {**EVERY_HEAD, "rotary_pct": 0.25}),
    "Persimmon": ("PersimmonConfig", EVERY_HEAD),
    "GPT-OSS": ("GptOssConfig", {**HALF_SLIDING, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "EXAONE 4": ("Exaone4Config", HALF_SLIDING),
    "Nemotron": ("NemotronConfig", {}),
    "StarCoder2": ("Starcoder2Config", {"sliding_window": None}),
    "ERNIE 4.5": ("Ernie4_5Config", {}),
    "MiniMax-M2": ("MiniMaxM2Config", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Seed-OSS": ("SeedOssConfig", {"head_dim": 16}),
    "Apertus": ("ApertusConfig", {}),
    "Arcee": ("ArceeConfig", {}),
    "Helium": ("HeliumConfig", {"head_dim": 16}),
    "BitNet": ("BitNetConfig", {}),
    "dots.llm1": (
        "Dots1Config",
        {**MOE, "head_dim": 16, "n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    ),
}
_TEXT = {**SHAPE, "rope_parameters": MROPE}
# name -> (config class, its settings, how many image tokens a picture has)
MULTIMODAL = {
    "Qwen2-VL": ("Qwen2VLConfig", {"vision_config": {**VISION, "embed_dim": 32, "hidden_size": 64}}, 4),
    "Qwen2.5-VL": (
        "Qwen2_5_VLConfig",
        {
            "vision_config": {
                **VISION,
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            }
        },
        4,
    ),
    "Qwen3-VL": (
        "Qwen3VLConfig",
        {
            "vision_config": {
                **VISION,
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            }
        },
        4,
    ),
    "LLaVA (Llama)": ("LlavaConfig", {}, 16),
}
REFUSED = {
    "Mistral 7B v0.1": ("MistralConfig", {"sliding_window": 64}),
    "GPT-2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "OPT": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "BLOOM": ("BloomConfig", {}),
    "Mamba": ("MambaConfig", {"state_size": 8}),
    "DeepSeek-V3": ("DeepseekV3Config", {**LATENT, **MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    "Llama 4": ("Llama4TextConfig", {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64}),
    "Gemma 3n": (
        "Gemma3nTextConfig",
        {**HALF_SLIDING, "head_dim": 16, "intermediate_size": [96] * 4, "num_kv_shared_layers": 2},
    ),
    "HunYuan": ("HunYuanDenseV1Config", {"head_dim": 16}),
    "JetMoE": ("JetMoeConfig", {"kv_channels": 16, "num_local_experts": 4}),
    "DiffLlama": ("DiffLlamaConfig", {}),
    "nanochat": ("NanoChatConfig", {}),
    "Falcon": ("FalconConfig", {"alibi": False, "new_decoder_architecture": False, "multi_query": False}),
    "GPT-J": ("GPTJConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "Jamba": (
        "JambaConfig",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8},
    ),
}


def config_of(name):
    cls, settings = (SUPPORTED | REFUSED)[name]
    settings = {k: v for k, v in {**SHAPE, **settings}.items() if k != "num_key_value_heads" or v is not None}
    return getattr(transformers, cls)(**settings)


def build(name):
    """A tiny model of a family."""
    # BitNet's layers normalize their inputs, so its weights need no spreading.
    return from_config(config_of(name), spread=1.0 if name == "BitNet" else 6.0)


def build_multimodal(name):
    """(model, inputs with one picture in each row)."""
    cls, settings, count = MULTIMODAL[name]
    ids = prompt(2, 120, 40)
    g = torch.Generator().manual_seed(2)
    if cls == "LlavaConfig":
        vision = transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        settings = {
            "text_config": transformers.LlamaConfig(**SHAPE),
            "vision_config": vision,
            "image_token_index": 90,
            "image_seq_length": count,
        }
        pictures = {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}
    else:
        tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
        text = {**_TEXT, "head_dim": 16} if cls == "Qwen3VLConfig" else _TEXT
        settings = {**settings, **tokens, "text_config": text}
        pictures = {
            "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=g),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(getattr(transformers, cls)(**settings), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(6)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    tokens = ids["input_ids"]
    tokens[tokens >= 90] = 5
    tokens[:, 60], tokens[:, 61 : 61 + count], tokens[:, 61 + count] = 92, 90, 93
    if cls != "LlavaConfig":
        pictures["mm_token_type_ids"] = (tokens == 90).int()
    return model.eval(), {**ids, **pictures}


def outcome(model, inputs=None, new=30):
    """Generate with DynamicCache, then with lossless codes.

    Returns (same tokens, largest difference of logits over the largest logit, tokens chosen, the CommVQ cache).
    """
    inputs = prompt(2, 120, 40) if inputs is None else inputs
    kwargs = {"return_dict_in_generate": True, "output_logits": True}
    want = greedy(model, inputs, new, **kwargs)
    enable_lossless(model, residual_length=16)
    got = greedy(model, inputs, new, **kwargs)
    cache = got.past_key_values
    assert isinstance(cache, CommVQCache)
    a, b = torch.stack(want.logits), torch.stack(got.logits)
    difference = float((a - b).abs().max() / a.abs().max())
    chosen = len(set(want.sequences[:, -new:].flatten().tolist()))
    return torch.equal(want.sequences, got.sequences), difference, chosen, cache
