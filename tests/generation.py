"""Small random models, prompts with left padding, and random codebooks, for tests of the cache and of generate()."""

import torch
from books import sign_book
from transformers import AutoModelForCausalLM, LlamaConfig

from transformers_commvq import Codebook, LayerBook
from transformers_commvq.geometry import read_model

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def from_config(config, seed=0, spread=6.0, dtype=torch.float32):
    """A random model whose choices are far apart, so that an error in the cache changes its tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(spread)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


def tiny_llama(seed=0, dtype=torch.float32, **changes):
    return from_config(LlamaConfig(**{**SHAPE, **changes}), seed, dtype=dtype)


def prompt(rows=2, length=60, pads=25, seed=1):
    """input_ids and attention_mask; the last row is padded on the left."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=g)
    mask = torch.ones_like(ids)
    ids[-1, :pads], mask[-1, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, inputs=None, new=60, **kwargs):
    """Token ids of a greedy generation."""
    inputs = prompt() if inputs is None else inputs
    return model.generate(**inputs, **{"max_new_tokens": new, "do_sample": False, **kwargs})


def random_codebook(model, bits=2.0, seed=0):
    """Sign codebooks that fit a model; learned from nothing, so good for shapes and plumbing only."""
    geometry = read_model(model).geometry
    heads, dim = geometry.num_key_value_heads, geometry.head_dim
    layers = {
        i: LayerBook(
            sign_book((int(bits * dim),) * heads, dim, seed=seed + 2 * i),
            sign_book((int(bits * dim),) * heads, dim, seed=seed + 2 * i + 1),
        )
        for i in geometry.layers
    }
    return Codebook(geometry, layers)


def saved_codebook(model, folder, bits=2.0, seed=0):
    """The path of a folder that holds ``random_codebook``."""
    return str(random_codebook(model, bits, seed).save(folder))
