"""Random models of a few thousand weights, built from configs: one per geometry that matters."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config

_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama-gqa": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=32),
    "phi3-partial": lambda: Phi3Config(**_SHAPE, num_key_value_heads=4, partial_rotary_factor=0.5, pad_token_id=0),
}


def tiny_model(name: str, seed: int = 0):
    """A float32 model in eval mode; its logits are spread enough that errors in the cache show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)
    return model


def token_windows(count: int, length: int, vocabulary: int = 96, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for _ in range(count)]
