"""Reads a transformers model: its attention layers, its RoPE, what a codebook must fit. Changes nothing."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import cache as cache_results
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from .codebook import ModelGeometry
from .config import UnsupportedModelError
from .rope import Rope

# Models whose cache does not hold "RoPE over a plain key".
_REFUSED = {
    "llama4_text": "its RoPE layers attend in chunks, and its other layers scale queries by position",
    "jetmoe": "it repeats keys and values between its cache and its attention",
    "diffllama": "it attends twice over halves of its values",
    "hunyuan_v1_dense": "it normalizes keys after RoPE, so codes learned before RoPE would not fit",
    "hunyuan_v1_moe": "it normalizes keys after RoPE, so codes learned before RoPE would not fit",
    "hunyuan_vl_text": "it normalizes keys after RoPE, so codes learned before RoPE would not fit",
}
# Models whose full-attention layers do not rotate keys: always, or when other layers have a sliding window.
_BARE = ("afmoe", "cohere2", "cohere2_moe", "flint")
_BARE_BESIDE_SLIDING = ("exaone4", "exaone4_5_text", "exaone_moe", "kolibri1")

# What a forward calls the cache it is given: transformers 5.24 renamed it, and modeling files outside follow slowly.
CACHE_NAMES = ("cache", "past_key_values")


@cache_results
def parameter_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of a module class's forward parameters, self left out."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def cache_name(cls: type[nn.Module]) -> str | None:
    """The name under which a model class's forward takes a cache, None if it takes none."""
    return next((name for name in CACHE_NAMES if name in parameter_names(cls)), None)


def generate_cache_name() -> str:
    """The name under which ``generate`` keeps the cache in its model_kwargs."""
    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in names)


@dataclass(frozen=True)
class RopeReading:
    """How one attention class uses the (cos, sin) it is handed.

    rope: the pairs.
    columns: which columns of cos and sin, (..., width), hold one value a pair.
    width: columns of cos and sin.
    """

    rope: Rope
    columns: slice
    width: int

    def compact(self, table: torch.Tensor) -> torch.Tensor:
        """cos or sin as the model passes them, (..., width) -> (..., pairs)."""
        return table[..., self.columns]


def attention_modules(model: nn.Module, config: Any = None) -> dict[int, nn.Module]:
    """The decoder's self-attention modules by layer index.

    config: the decoder's; modules of another kind of config (a vision tower's) are passed over. None takes all.

    Raises:
        UnsupportedModelError: none is found, or they do not take ``position_embeddings``.
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or "Attention" not in type(module).__name__ or not hasattr(module, "config"):
            continue
        if config is not None and type(module.config) is not type(config):
            continue
        names = inspect.signature(module.forward).parameters
        if "position_embeddings" in names and not getattr(module, "is_cross_attention", False):
            found[index] = module
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention layer that takes rotary position_embeddings; CommVQ needs a "
            "RoPE model whose attention follows transformers' AttentionInterface. Fix: use kv_cache=None for it."
        )
    return found


def rotary_modules(model: nn.Module, config: Any = None) -> list[nn.Module]:
    """Modules that compute (cos, sin); most models have one. config: as for ``attention_modules``."""
    return [
        m
        for m in model.modules()
        if ("Rotary" in type(m).__name__ or "RotaryEmbedding" in type(m).__name__)
        and any(n.endswith("inv_freq") for n, _ in m.named_buffers())
        and (config is None or type(getattr(m, "config", config)) is type(config))
    ]


def frequencies(rotary: nn.Module, layer_type: str | None = None) -> tuple[torch.Tensor, float]:
    """(inv_freq (pairs,), attention scaling) that a rotary module uses for a layer type now."""
    prefix = f"{layer_type}_" if layer_type and hasattr(rotary, f"{layer_type}_inv_freq") else ""
    scaling = getattr(rotary, f"{prefix}attention_scaling", getattr(rotary, "attention_scaling", 1.0))
    return getattr(rotary, f"{prefix}inv_freq"), float(scaling)


def read_rope(attention: nn.Module, head_dim: int, width: int) -> RopeReading:
    """Find the pairs by feeding unit vectors to the modeling file's own ``apply_rotary_pos_emb``.

    width: columns of the model's cos and sin.

    Raises:
        UnsupportedModelError: no such function, another signature, or pairs this package does not know.
    """
    name = type(attention).__name__
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedModelError(f"{name}: its modeling file has no apply_rotary_pos_emb, so RoPE cannot be read.")
    dim = getattr(attention, "rotary_ndims", head_dim)
    exact = {"dtype": torch.float32}  # whatever the default dtype is
    unit = torch.eye(dim, **exact)[None, None]  # token t is unit vector t
    zero, one = torch.zeros(1, dim, width, **exact), torch.ones(1, dim, width, **exact)
    label = torch.arange(1, width + 1, **exact).expand(1, dim, width)
    alone = list(inspect.signature(apply).parameters)[1] == "cos"  # takes queries and keys one at a time
    try:
        turned = (apply(unit, zero, one) if alone else apply(unit, unit, zero, one)[1])[0, 0]
        scaled = (apply(unit, label, zero) if alone else apply(unit, unit, label, zero)[1])[0, 0].diagonal()
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{name}: apply_rotary_pos_emb does not take plain (q, k, cos, sin): {error}."
        ) from error
    rotary_dim = int((turned.diagonal() == 0).sum())
    for layout in ("half", "interleaved"):
        rope = Rope(layout, max(rotary_dim, 2))
        quarter = torch.zeros(rope.pairs, **exact), torch.ones(rope.pairs, **exact)  # cos, sin
        expected = rope.rotate(torch.eye(dim, **exact), *quarter)
        if rotary_dim and torch.equal(expected, turned):
            first = scaled[:2].long() - 1 if layout == "half" else scaled[:4:2].long() - 1
            step = int(first[1] - first[0]) if rope.pairs > 1 else 1
            columns = slice(int(first[0]), int(first[0]) + step * rope.pairs, step)
            return RopeReading(rope, columns, width)
    raise UnsupportedModelError(f"{name}: rotates pairs of elements this package does not know.")


def rope_parameters(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """The model config's own description of the RoPE its compressed layers use."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if layer_type in parameters:
        parameters = parameters[layer_type]
    return {k: v for k, v in sorted(parameters.items()) if isinstance(v, (str, int, float, list, tuple))}


def compressed_layers(config: Any) -> tuple[int, ...]:
    """Indices of the full-attention layers; the others keep their own cache."""
    types, _ = get_layer_types_and_kwargs(config)
    return tuple(i for i, t in enumerate(types) if t == "full_attention")


def head_dimension(config: Any) -> int:
    """Elements of a key; config: a decoder's, or one layer's where layers differ."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_shape(config: Any, layers: tuple[int, ...]) -> tuple[int, int]:
    """(key heads, head_dim) of the compressed layers; in other layers they may differ.

    Raises UnsupportedModelError when they differ among the compressed layers.
    """
    own = [config.per_layer_config[i] for i in layers]
    shapes = {(getattr(c, "num_key_value_heads", None) or c.num_attention_heads, head_dimension(c)) for c in own}
    if len(shapes) > 1:
        raise UnsupportedModelError(
            f"{config.model_type}: the shape of keys (heads, head_dim) differs between layers: {sorted(shapes)}."
        )
    return shapes.pop()


@dataclass(frozen=True)
class ModelReading:
    """All that the cache, calibration and integration need to know of a model.

    rope: of the layers that rotate keys; of no pairs when none of them does.
    bare: compressed layers that do not rotate keys.
    attention: layer index -> attention module, compressed layers only.
    """

    geometry: ModelGeometry
    rope: RopeReading
    attention: dict[int, nn.Module]
    rotary: list[nn.Module]
    bare: frozenset[int] = frozenset()

    def rope_of(self, layer: int) -> Rope:
        """How one compressed layer's keys are rotated."""
        return Rope("none", 0) if layer in self.bare else self.rope.rope


def read_model(model: PreTrainedModel, base_model: str | None = None) -> ModelReading:
    """Describe a model.

    base_model: Hub id; by default what the model was loaded from.

    Raises:
        UnsupportedModelError: with the reason, when its cache cannot be compressed.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if reason := _REFUSED.get(config.model_type):
        raise UnsupportedModelError(f"{config.model_type} models are not supported: {reason}.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; CommVQ compresses decoder-only models.")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{name}: multi-head latent attention keeps a latent vector, not keys.")
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(f"{name} does not use transformers' AttentionInterface.")
    types, _ = get_layer_types_and_kwargs(config)
    layers = compressed_layers(config)
    if not layers:
        raise UnsupportedModelError(
            f"{name} has no full-attention layer whose cache could be compressed; its layers are "
            f"{', '.join(sorted(set(types)))}, whose cache does not grow with the text."
        )
    if "dummy" in types and getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name}: layers that read another layer's keys are not supported.")
    modules = attention_modules(model, config)
    if missing := [i for i in layers if i not in modules]:
        raise UnsupportedModelError(f"{name}: layers {missing} have no attention module that uses RoPE.")
    rotary = rotary_modules(model, config)
    if not rotary:
        raise UnsupportedModelError(f"{name} has no rotary embedding module, so its keys have no RoPE.")
    heads, dim = key_shape(config, layers)
    bare = _bare_layers(config, modules, layers)
    rotated = [i for i in layers if i not in bare]
    if rotated:
        reading = read_rope(modules[rotated[0]], dim, _table_width(rotary[0]))
    else:
        reading = RopeReading(Rope("none", 0), slice(0, 0), 0)
    rope = {**reading.rope.to_dict(), "parameters": rope_parameters(config)}
    if rotated and bare:
        rope["bare_layers"] = sorted(bare)
    geometry = ModelGeometry(
        id=base_model or str(getattr(model.config, "_name_or_path", "") or name),
        revision=None,
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        layers=layers,
        num_key_value_heads=heads,
        head_dim=dim,
        rope=rope,
    )
    return ModelReading(geometry, reading, {i: modules[i] for i in layers}, rotary, bare)


def _bare_layers(config: Any, modules: dict[int, nn.Module], layers: tuple[int, ...]) -> frozenset[int]:
    """Compressed layers whose keys are not rotated."""
    kind = config.model_type
    windowed = getattr(config, "sliding_window", None) is not None
    if (kind in _BARE and not getattr(config, "force_rope", False)) or (kind in _BARE_BESIDE_SLIDING and windowed):
        return frozenset(layers)
    return frozenset(i for i in layers if not getattr(modules[i], "use_rope", True))


def _table_width(rotary: nn.Module) -> int:
    """Columns of the cos this module returns."""
    buffer = next(b for n, b in rotary.named_buffers() if n.endswith("inv_freq"))
    x, positions = torch.zeros(1, 1, 1, device=buffer.device), torch.zeros(1, 1, dtype=torch.long, device=buffer.device)
    kwargs = {"layer_type": "full_attention"} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    try:
        return rotary(x, positions, **kwargs)[0].shape[-1]
    except (TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(rotary).__name__} does not take plain (x, position_ids); its RoPE is not supported ({error})."
        ) from error
