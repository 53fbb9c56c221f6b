"""The memory arithmetic against real caches, and the claims made with it."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen3Config

from transformers_commvq import enable, estimate, layer, make_cache, ops
from transformers_commvq.cli import estimate as command
from transformers_commvq.codebook import Codebook, LayerBook, SignBook
from transformers_commvq.config import ConfigError
from transformers_commvq.geometry import read_model
from transformers_commvq.ops import attention_cpu
from transformers_commvq.packing import CodeLayout

LLAMA_31_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    dtype="bfloat16",
)

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def enabled_model(config, tmp_path, bits: float = 2.0, dtype=torch.float32, **settings):
    """A random model with random codebooks of uneven bits a head."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    geometry = read_model(model).geometry
    dim, heads = geometry.head_dim, geometry.num_key_value_heads
    n = int(bits * dim)

    def side(layout: tuple[int, ...]) -> SignBook:
        return SignBook(CodeLayout(layout), torch.randn(sum(layout), dim).half(), torch.zeros(heads, dim))

    layers = {
        i: LayerBook(side((n - 8,) + (n,) * (heads - 1)), side((n + 8,) + (n,) * (heads - 1))) for i in geometry.layers
    }
    book = Codebook(geometry, layers)
    book.save(tmp_path / "book")
    enable(model, {"codebook": str(tmp_path / "book"), "bits": bits, **settings})
    return model, book


def real_bytes(
    model, prompt: int, generated: int, batch: int = 1, mask=None, backend: str = "blockwise"
) -> dict[str, int]:
    """memory_report of a cache that took a prompt and then decoded."""
    cache = make_cache(model)
    ids = torch.randint(0, 64, (batch, prompt))
    with torch.no_grad(), ops.backend(backend):
        for step in range(generated + 1):
            new = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
            if step and mask is not None:
                new["position_ids"] = new["position_ids"][:, -1:]
            model(ids[:, :1] if step else ids, past_key_values=cache, **new)
            mask = None if mask is None else torch.cat([mask, torch.ones(batch, 1, dtype=torch.long)], 1)
    return cache.memory_report()


def assert_agree(got: estimate.CacheBytes, real: dict[str, int]):
    """Bytes that grow with tokens are equal; what is kept beside them may move by a few."""
    grow = ("codes", "spare", "window", "other_layers")
    assert {k: real[k] for k in grow} == {k: getattr(got, k) for k in grow}
    assert got.total == pytest.approx(real["total"], rel=0.002)


def test_constants_are_the_caches():
    assert estimate.FLUSH == layer.FLUSH
    assert estimate.SPARE == layer.SPARE
    assert estimate.BLOCK == attention_cpu.BLOCK
    if "jit" in ops.BACKENDS:
        loops = importlib.import_module("transformers_commvq.ops.jit_attend")
        assert (estimate.OFFSETS, estimate.WIDTH) == (loops.OFFSETS, loops.WIDTH)


@pytest.mark.parametrize("backend", sorted(ops.BACKENDS))
@pytest.mark.parametrize(("bits", "dtype"), [(2.0, torch.float32), (1.0, torch.bfloat16)])
@pytest.mark.parametrize(
    ("prompt", "generated", "batch"), [(1, 3, 1), (127, 1, 1), (191, 2, 2), (192, 70, 1), (700, 5, 2), (1, 300, 1)]
)
def test_agrees_with_the_real_cache(tmp_path, bits, dtype, prompt, generated, batch, backend):
    model, book = enabled_model(LlamaConfig(**SMALL), tmp_path, bits, dtype)
    real = real_bytes(model, prompt, generated, batch, backend=backend)
    size = estimate.describe_config(model.config, dtype=str(dtype).removeprefix("torch."))
    got = estimate.compressed_bytes(
        size.shape, book.token_bytes, prompt + generated, prompt=prompt, batch=batch, backend=backend
    )
    assert_agree(got, real)


def test_default_backend_is_the_one_that_runs(tmp_path):
    model, book = enabled_model(LlamaConfig(**SMALL), tmp_path)
    size = estimate.describe_config(model.config, dtype="float32")
    got = estimate.compressed_bytes(size.shape, book.token_bytes, 702, prompt=700)
    assert_agree(got, real_bytes(model, 700, 2, backend="jit" if "jit" in ops.BACKENDS else "blockwise"))


def test_from_the_rate_alone(tmp_path):
    """What ``estimate`` prints knows the rate, not the codebook."""
    model, book = enabled_model(LlamaConfig(**SMALL), tmp_path, 2.0)
    size = estimate.describe_config(model.config, dtype="float32")
    assert book.bits == 2
    got = estimate.compressed_bytes(size.shape, 2 * size.shape.elements / 8, 1501, prompt=1500, backend="blockwise")
    assert got.total == pytest.approx(real_bytes(model, 1500, 1)["total"], rel=0.005)


def test_settings_and_left_padding(tmp_path):
    model, book = enabled_model(LlamaConfig(**SMALL), tmp_path, sink_tokens=7, residual_length=64)
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :40] = 0
    real = real_bytes(model, 300, 2, 2, mask)
    size = estimate.describe_config(model.config, dtype="float32")
    got = estimate.compressed_bytes(
        size.shape,
        book.token_bytes,
        302,
        prompt=300,
        batch=2,
        sink_tokens=7,
        residual_length=64,
        same_positions=False,
        backend="blockwise",
    )
    # Positions do not follow each other in a block with padding, and 302 tokens are one block: no rotations are kept.
    table = estimate.BLOCK * size.shape.pairs * 2 * 4
    assert_agree(replace(got, positions=got.positions - table), real)


def test_sliding_layers_keep_their_window(tmp_path):
    config = Gemma3TextConfig(
        **SMALL, sliding_window=96, layer_types=["sliding_attention", "full_attention", "full_attention"]
    )
    model, book = enabled_model(config, tmp_path)
    real = real_bytes(model, 400, 2)
    size = estimate.describe_config(model.config, dtype="float32")
    got = estimate.compressed_bytes(size.shape, book.token_bytes, 402, prompt=400, backend="blockwise")
    assert size.layers == 2
    assert_agree(got, real)


def test_spare_never_exceeds_what_largest_allows(tmp_path):
    shape = estimate.CacheShape(layers=1, elements=64, pairs=8)
    for prompt in (1, 500, 5000):
        for tokens in range(prompt, prompt + 6000, 37):
            room, coded = estimate.capacity(prompt, tokens), estimate.coded_tokens(tokens)
            assert coded <= room <= coded + max(estimate.FLUSH, coded // estimate.SPARE)
            now = estimate.compressed_bytes(shape, 16, tokens, prompt=prompt).total
            assert now <= estimate.largest_bytes(shape, 16, tokens)


def test_plain_cache_equals_transformers():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), dtype=torch.float16)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(2, 50, dtype=torch.long), past_key_values=cache)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    size = estimate.describe_config(model.config, dtype="float16")
    assert estimate.plain_bytes(size.shape, 50, 2) == real
    assert size.parameters == sum(p.numel() for p in model.parameters())


def test_llama_31_8b_128k_in_24_gb():
    """The paper's claim: at 1 bit, 128K tokens of Llama-3.1-8B fit a 24 GB card, which the plain cache does not."""
    size = estimate.describe_config(LLAMA_31_8B)
    tokens, budget = 131072, estimate.GPUS["RTX 4090"] * 2**20
    assert size.parameters == 8_030_261_248
    assert size.weights == 2 * size.parameters
    plain = size.weights + estimate.plain_bytes(size.shape, tokens)
    one_bit = (
        size.weights + estimate.largest_bytes(size.shape, size.shape.elements / 8, tokens) + size.codebook_bytes(1)
    )
    assert estimate.plain_bytes(size.shape, tokens) == 16 * 2**30
    assert plain > budget
    assert one_bit + estimate.RESERVE_BYTES < budget
    assert estimate.plain_bytes(size.shape, tokens) / (one_bit - size.weights) > 14


def test_codebook_bytes_equal_a_codebooks(tmp_path):
    heads, dim = 8, 128
    size = estimate.describe_config(LLAMA_31_8B)

    def side(metric: bool) -> SignBook:
        tensors = torch.zeros(heads * dim, dim).half(), torch.zeros(heads, dim)
        return SignBook(CodeLayout((dim,) * heads), *tensors, torch.zeros(heads, dim, dim).half() if metric else None)

    one_layer = LayerBook(side(True), side(False)).nbytes
    assert size.codebook_bytes(1) == 32 * one_layer


def test_longest_context_is_the_last_that_fits():
    assert estimate.longest_context(lambda t: 10 + 3 * t, 100) == 30
    assert estimate.longest_context(lambda t: 10 + 3 * t, 9) == 0


def test_cards():
    assert estimate.gpu_bytes(["rtx4090", "nvidia h100", "24"]) == {
        "RTX 4090": 24564 << 20,
        "H100": 81559 << 20,
        "24 GiB": 24 << 30,
    }
    with pytest.raises(ConfigError, match="not a known card"):
        estimate.gpu_bytes(["abacus"])


def run_command(capsys, *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(arguments)) == 0
    return capsys.readouterr().out


def test_command_on_a_config_file(tmp_path, capsys):
    LLAMA_31_8B.save_pretrained(tmp_path)
    path = str(tmp_path / "config.json")
    report = json.loads(run_command(capsys, path, "--context", "131072", "--bits", "1", "--gpu", "24", "--json"))
    assert report["plain_cache_bytes"] == 16 * 2**30
    assert 15 < report["compressed"]["1"]["times_smaller"] < 16
    longest = report["gpus"]["24 GiB"]["longest_context"]
    assert longest["plain"] < 131072 < longest["1"]
    assert longest["plain"] < longest["fp8"] < longest["int4"] < longest["1"]
    assert report["other_cache_bytes"] == {"fp8": 8 * 2**30, "int4": round(4.5 * 2**30)}
    table = run_command(capsys, path, "--weight-bits", "4.5")
    assert "RTX 4090" in table and "8.03 B parameters" in table


GEOMETRIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL | {"head_dim": 32}),
    "phi3, partial rotary": Phi3Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"}, partial_rotary_factor=0.5, pad_token_id=0
    ),
}


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_what_the_command_prints_is_what_a_cache_holds(tmp_path, capsys, monkeypatch, name, bits):
    """Within 0.5%: the command knows the config and the rate alone, and allows for padding."""
    monkeypatch.delitem(ops.BACKENDS, "jit", raising=False)  # whose loops would be compiled for each of these sizes
    model, book = enabled_model(GEOMETRIES[name], tmp_path, bits, torch.bfloat16)
    assert book.bits == bits
    model.config.save_pretrained(tmp_path)
    told = run_command(capsys, str(tmp_path), "--context", "2001", "--bits", str(bits), "--dtype", "bfloat16", "--json")
    real = real_bytes(model, 2000, 1)["total"]
    assert json.loads(told)["compressed"][str(bits)]["cache_bytes"] == pytest.approx(real, rel=0.005)


def test_command_takes_a_hub_id_and_fetches_no_weights(server, tmp_path, capsys):
    LLAMA_31_8B.save_pretrained(tmp_path)
    files = {"config.json": (tmp_path / "config.json").read_bytes(), "model.safetensors": b"16 GB of weights"}
    server.add("meta/Llama", files)
    table = run_command(capsys, "meta/Llama", "--bits", "1", "--gpu", "rtx4090")
    assert "16.00 GiB" in table and "RTX 4090" in table
    asked = {path.rsplit("/", 1)[-1] for _, path in server.log if "/resolve/" in path}
    assert "config.json" in asked and not any(name.endswith(".safetensors") for name in asked)


def test_command_errors(tmp_path, capsys):
    with pytest.raises(ConfigError, match="config cannot be read"):
        run_command(capsys, str(tmp_path))
    LLAMA_31_8B.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="context 0: expected 1 or more"):
        run_command(capsys, str(tmp_path), "--context", "0")
    with pytest.raises(ConfigError, match="dtype"):
        run_command(capsys, str(tmp_path), "--dtype", "bfloat61")
