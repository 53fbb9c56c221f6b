"""What a cache costs: exact arithmetic of plain and compressed caches, and the longest context that fits a GPU.

The functions take numbers and need no weights; a test holds them to ``CommVQCache.memory_report``. ``describe_model``
gets a model's numbers from its config alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import CommVQConfig, ConfigError
from .ops import BACKENDS

# Constants of the cache (layer.FLUSH, layer.SPARE) and of attention's backends (attention_cpu.BLOCK, OFFSETS of the
# compiled CPU kernels); a test holds them equal.
FLUSH = 64
SPARE = 32
BLOCK = 1024
OFFSETS = 64
WIDTH = 8

# Memory as the driver reports it for the whole card, MiB.
GPUS = {
    "RTX 4060": 8188,
    "RTX 3060": 12288,
    "RTX 4070": 12282,
    "T4": 15360,
    "RTX 4080": 16376,
    "A10": 23028,
    "L4": 23034,
    "RTX 4090": 24564,
    "RTX 3090": 24576,
    "RTX 5090": 32607,
    "A100 40GB": 40960,
    "L40S": 46068,
    "RTX A6000": 49140,
    "H100": 81559,
    "A100 80GB": 81920,
    "H200": 143771,
}
# Other ways to hold the cache, in bits an element: FP8 with one scale for all, and int4 in groups of 64 with a scale
# and a zero point of 16 bits each. Their windows of exact tokens, where they keep one, are not counted.
OTHERS = {"fp8": 8.0, "int4": 4 + 32 / 64}
# Assumed, not measured: the driver's context, and activations when the prompt is read in chunks.
RESERVE_BYTES = 1 << 30
LONGEST = 1 << 30  # tokens; where the search for the longest context ends


@dataclass(frozen=True)
class CacheShape:
    """What of a model decides the size of its cache.

    layers: full-attention layers, whose cache is compressed.
    elements: key and value elements of one token in those layers.
    pairs: RoPE pairs of a head.
    itemsize: bytes of one element of the model's dtype.
    sliding_layers, sliding_elements, sliding_window: layers with a sliding window, their elements of one token, and
        the tokens they keep.
    changing_rope: the frequencies change with the length (dynamic, longrope), so rotations are kept, not positions.
    """

    layers: int
    elements: int
    pairs: int
    itemsize: int = 2
    sliding_layers: int = 0
    sliding_elements: int = 0
    sliding_window: int = 0
    changing_rope: bool = False


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a compressed cache, by part."""

    codes: int
    spare: int
    sinks: int
    window: int
    positions: int
    other_layers: int

    @property
    def total(self) -> int:
        return self.codes + self.spare + self.sinks + self.window + self.positions + self.other_layers


def coded_tokens(tokens: int, residual_length: int = 128) -> int:
    """How many of a cache's tokens are codes; the others wait in the window."""
    return max(tokens - residual_length, 0) // FLUSH * FLUSH


def capacity(prompt: int, tokens: int, residual_length: int = 128) -> int:
    """Tokens that the code buffers have room for: what the prompt took, grown by steps while decoding."""
    held = coded_tokens(prompt, residual_length)
    need = coded_tokens(tokens, residual_length)
    while held < need:
        held = held + max(FLUSH, held // SPARE) if held else FLUSH
    return held


def plain_bytes(shape: CacheShape, tokens: int, batch: int = 1) -> int:
    """Bytes of an uncompressed cache of the same tokens, spare room not counted."""
    sliding = min(tokens, shape.sliding_window) * shape.sliding_elements
    return batch * shape.itemsize * (tokens * shape.elements + sliding)


def rounded_bytes(shape: CacheShape, tokens: int, bits: float, batch: int = 1) -> int:
    """Bytes of a cache that holds every element at the same rate, as the usual quantized caches do."""
    return round(plain_bytes(shape, tokens, batch) * bits / (8 * shape.itemsize))


def compressed_bytes(
    shape: CacheShape,
    token_bytes: float,
    tokens: int,
    *,
    prompt: int | None = None,
    batch: int = 1,
    sink_tokens: int = 4,
    residual_length: int = 128,
    same_positions: bool = True,
    backend: str | None = None,
) -> CacheBytes:
    """Bytes of a compressed cache, as ``CommVQCache.memory_report`` counts them after a decoding step.

    token_bytes: of one token's codes over all compressed layers: ``Codebook.token_bytes``, or bits * elements / 8.
    tokens: in the cache, each row. prompt: how many of them came in one call; None: all.
    same_positions: every row of the batch has the same positions (no padding), so that one row is kept.
    backend: of attention; they keep different tables of rotations (half a MiB for heads of 128 at 64K tokens).
        None: the one this machine's CPU would use.
    """
    backend = backend or ("jit" if "jit" in BACKENDS else "blockwise")
    coded = coded_tokens(tokens, residual_length)
    room = capacity(tokens if prompt is None else prompt, tokens, residual_length)
    rows = 1 if same_positions else batch
    pair = 2 * shape.pairs * 4  # cos and sin of one token, float32
    # Fixed frequencies: a position (int32) a token. Tables exist once attention has met codes.
    positions = rows * tokens * (2 * shape.pairs * shape.itemsize if shape.changing_rope else 4)
    if coded and backend == "blockwise" and not shape.changing_rope:
        positions += BLOCK * pair
    elif coded and backend == "jit":
        groups = -(-coded // OFFSETS)
        positions += OFFSETS * 2 * 4 * -(-shape.pairs // WIDTH) * WIDTH + rows * groups * pair + groups
    sliding = min(tokens, shape.sliding_window) * shape.sliding_elements
    indices = 24 if coded and sink_tokens else 8  # int64: where a row's sinks start, and once there are codes, end
    return CacheBytes(
        codes=round(batch * coded * token_bytes),
        spare=round(batch * (room - coded) * token_bytes),
        sinks=batch * (sink_tokens * shape.elements * shape.itemsize + indices * shape.layers),
        window=batch * (tokens - coded) * shape.elements * shape.itemsize,
        positions=positions,
        other_layers=batch * sliding * shape.itemsize + 8 * shape.sliding_layers,  # they hold their window as int64
    )


def largest_bytes(
    shape: CacheShape, token_bytes: float, tokens: int, batch: int = 1, config: CommVQConfig | None = None
) -> int:
    """The most a cache of that length can take: spare room at its limit, the backend with the largest tables."""
    config = config or CommVQConfig()
    settings = {"sink_tokens": config.sink_tokens, "residual_length": config.residual_length}
    total = max(
        compressed_bytes(
            shape, token_bytes, tokens, batch=batch, same_positions=False, backend=backend, **settings
        ).total
        for backend in ("blockwise", "jit")
    )
    coded = coded_tokens(tokens, config.residual_length)
    return total + round(batch * max(FLUSH, coded // SPARE) * token_bytes if coded else 0)


def longest_context(bytes_at: Callable[[int], int], budget: int) -> int:
    """The most tokens whose cache, ``bytes_at(tokens)``, fits a budget in bytes; 0 if none does. At most LONGEST."""
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_at(middle) <= budget else (low, middle - 1)
    return low


@dataclass(frozen=True)
class ModelSize:
    """A model's numbers, from its config.

    weights: bytes of its parameters in its dtype. heads, head_dim: key/value heads of a compressed layer.
    max_context: what the config says the model was made for, or None.
    """

    name: str
    model_type: str
    dtype: str
    parameters: int
    weights: int
    layers: int
    heads: int
    head_dim: int
    max_context: int | None
    shape: CacheShape

    def codebook_bytes(self, bits: float) -> int:
        """Codebooks of all layers at a mean rate: vectors and key metric float16, means float32."""
        d = self.head_dim
        vectors = 2 * bits * d * d * 2  # keys and values: (bits * d, d) float16 each
        return round(self.layers * self.heads * (vectors + d * d * 2 + 2 * d * 4))


def tabulate(
    size: ModelSize,
    context: int,
    bits: Sequence[float] = (2.0, 1.0),
    batch: int = 1,
    cards: dict[str, int] | None = None,
    weight_bits: float | None = None,
) -> dict[str, Any]:
    """Everything that ``transformers-commvq estimate`` says about a model, as plain json.

    context: tokens in each of the ``batch`` caches. cards: name -> bytes of memory; None: all of GPUS.
    weight_bits: bits a weight where they are quantized; None: in the model's dtype.

    Raises:
        ConfigError: no such rate, or a context or batch below 1.
    """
    for name, count in (("context", context), ("batch", batch)):
        if count < 1:
            raise ConfigError(f"{name} {count}: expected 1 or more.")
    settings = {rate: CommVQConfig(bits=rate) for rate in bits}
    cards = gpu_bytes(GPUS) if cards is None else cards
    weights = round(size.parameters * weight_bits / 8) if weight_bits else size.weights
    shape = size.shape

    def largest(rate: float, tokens: int) -> int:
        cache = largest_bytes(shape, rate * shape.elements / 8, tokens, batch, settings[rate])
        return cache + size.codebook_bytes(rate)

    caches: dict[str, Callable[[int], int]] = {"plain": lambda tokens: plain_bytes(shape, tokens, batch)}
    caches |= {n: lambda tokens, b=b: rounded_bytes(shape, tokens, b, batch) for n, b in OTHERS.items()}
    caches |= {f"{rate:g}": lambda tokens, r=rate: largest(r, tokens) for rate in bits}
    plain = caches["plain"](context)
    compressed = {}
    for rate in bits:
        parts = compressed_bytes(shape, rate * shape.elements / 8, context, batch=batch, same_positions=False)
        compressed[f"{rate:g}"] = {
            "cache_bytes": parts.total,
            **vars(parts),
            "codebook_bytes": size.codebook_bytes(rate),
            "times_smaller": plain / parts.total,
        }
    return {
        "model": size.name,
        "parameters": size.parameters,
        "dtype": size.dtype,
        "max_context": size.max_context,
        "context": context,
        "batch": batch,
        "weights_bytes": weights,
        "plain_cache_bytes": plain,
        "other_cache_bytes": {name: caches[name](context) for name in OTHERS},
        "compressed": compressed,
        "gpus": {
            card: {
                "memory_bytes": memory,
                "longest_context": {
                    name: longest_context(at, memory - weights - RESERVE_BYTES) for name, at in caches.items()
                },
            }
            for card, memory in cards.items()
        },
    }


def describe_model(model: str | os.PathLike, dtype: str | None = None, local_files_only: bool = False) -> ModelSize:
    """Read a model's numbers from its config; no weights are fetched, and none are allocated.

    model: a Hub id, a folder, or a config.json. dtype: of weights and cache; None takes the config's.

    Raises:
        ConfigError: no such model, or a dtype that torch does not know.
        UnsupportedModelError: it has no full-attention layer with RoPE.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(model), local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model}: its config cannot be read: {error} Fix: name a Hub id, a folder or a config.json."
        ) from error
    return describe_config(config, str(model), dtype)


def describe_config(config, name: str = "", dtype: str | None = None) -> ModelSize:
    """``describe_model`` of a transformers config."""
    import torch
    from transformers import AutoModelForCausalLM

    from .geometry import head_dimension, read_model

    chosen = getattr(torch, dtype, None) if dtype else getattr(config, "dtype", None) or torch.bfloat16
    if not isinstance(chosen, torch.dtype):
        raise ConfigError(f"dtype={dtype!r}: expected one of torch's, e.g. bfloat16, float16, float32.")
    text = config.get_text_config(decoder=True)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError:  # a model with more inputs than text: count its decoder
            model = AutoModelForCausalLM.from_config(text)
    count = sum(p.numel() for p in model.parameters())
    geometry = read_model(model, name or None).geometry
    heads, dim = geometry.num_key_value_heads, head_dimension(text)
    sliding = [t for t in getattr(text, "layer_types", None) or () if t in ("sliding_attention", "chunked_attention")]
    window = getattr(text, "sliding_window", None) or 0
    itemsize = chosen.itemsize
    shape = CacheShape(
        layers=len(geometry.layers),
        elements=len(geometry.layers) * heads * dim * 2,
        pairs=geometry.rope["rotary_dim"] // 2,
        itemsize=itemsize,
        sliding_layers=len(sliding),
        sliding_elements=len(sliding) * heads * dim * 2,
        sliding_window=window if sliding else 0,
        changing_rope=geometry.rope["parameters"].get("rope_type", "default") in ("dynamic", "longrope"),
    )
    return ModelSize(
        name=name or geometry.id,
        model_type=geometry.model_type,
        dtype=str(chosen).removeprefix("torch."),
        parameters=count,
        weights=count * itemsize,
        layers=len(geometry.layers),
        heads=heads,
        head_dim=dim,
        max_context=getattr(text, "max_position_embeddings", None),
        shape=shape,
    )


def gpu_bytes(names: Iterable[str]) -> dict[str, int]:
    """Memory of cards by name (case and spaces do not matter), or of "24", a card of that many GiB.

    Raises:
        ConfigError: a card that is not known.
    """
    plain = {_plain(name): name for name in GPUS}
    out = {}
    for name in names:
        if _plain(name) in plain:
            known = plain[_plain(name)]
            out[known] = GPUS[known] << 20
        elif (number := _plain(name).removesuffix("gib").removesuffix("gb")).isdigit():
            out[f"{number} GiB"] = int(number) << 30
        else:
            raise ConfigError(f"--gpu {name!r}: not a known card. Fix: one of {', '.join(GPUS)}, or its GiB, e.g. 24.")
    return out


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum()).removeprefix("nvidia").removeprefix("geforce")
