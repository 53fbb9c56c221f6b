"""Wires CommVQ into transformers: ``enable`` and ``disable`` for a model, ``kv_cache=`` for from_pretrained, and the
``quantization_config`` registry. Importing adds names to registries and wraps exactly one function.
"""

from __future__ import annotations

import functools
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from . import attention, hub
from .cache import CommVQCache
from .codebook import Codebook
from .config import METHOD, CacheUseError, CommVQConfig, ConfigError
from .geometry import ModelReading, read_model

_STATE = "_commvq"
_lock = threading.Lock()


@dataclass
class Enabled:
    """What an enabled model carries.

    codebooks: by the config they were resolved for; more than one after generate(kv_cache={...}).
    previous: the attention implementation to go back to.
    """

    config: CommVQConfig
    reading: ModelReading
    codebooks: dict[str, Codebook]
    previous: str
    handles: list[Any] = field(default_factory=list)

    def codebook(self, config: CommVQConfig) -> Codebook:
        key = str((config.bits, config.codebook, config.revision, config.base_model))
        if key not in self.codebooks:
            self.codebooks[key] = _resolve(config, self.reading)
        return self.codebooks[key]


def _resolve(config: CommVQConfig, reading: ModelReading) -> Codebook:
    return hub.resolve(config, reading.geometry).to(_device(reading))


def _device(reading: ModelReading) -> torch.device:
    """Where the first compressed layer computes; layers elsewhere move their own books on first use."""
    parameter = next(next(iter(reading.attention.values())).parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.device.type == "meta" else parameter.device


def enable(model: PreTrainedModel, kv_cache: Any = METHOD) -> PreTrainedModel:
    """Make a model use a compressed KV cache wherever it would make its own.

    kv_cache: "commvq" (2 bits), a codebook folder or Hub id, a dict of CommVQConfig fields, or a CommVQConfig.
    Returns the model, changed in place: generate() and plain forwards with ``use_cache`` now make a CommVQCache. The
    weights are not touched. Enabling again replaces the settings.

    Raises:
        ConfigError: the settings are wrong.
        UnsupportedModelError: the model's cache cannot be compressed; says why.
        CodebookError: no codebooks, or not this model's, or damaged; says how to get them.
    """
    config = CommVQConfig.from_spec(kv_cache)
    reading = read_model(model, config.base_model)
    previous = model.config._attn_implementation
    if state := model.__dict__.get(_STATE):
        previous = state.previous
    state = Enabled(config, reading, {}, previous)
    state.codebook(config)  # everything that can fail has happened before the model is changed
    disable(model)
    register()
    _warn_if_little_is_compressed(reading)
    model.set_attn_implementation(METHOD)
    state.handles = [
        handle
        for module in reading.attention.values()
        for handle in (
            module.register_forward_pre_hook(attention.before_attention, with_kwargs=True),
            module.register_forward_hook(attention.after_attention, with_kwargs=True),
        )
    ]
    state.handles.append(model.register_forward_pre_hook(_supply_cache, with_kwargs=True))
    model.__dict__[_STATE] = state
    model.__dict__["_prepare_cache_for_generation"] = _CachePreparer(model)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation._from_model_config = False  # else transformers drops fields it does not know when reloading
        generation.kv_cache = config.to_dict()
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``enable``: the model makes its plain cache again. Does nothing to a model that is not enabled."""
    state: Enabled | None = model.__dict__.pop(_STATE, None)
    if state is None:
        return model
    for handle in state.handles:
        handle.remove()
    model.__dict__.pop("_prepare_cache_for_generation", None)
    model.set_attn_implementation(state.previous)
    generation = getattr(model, "generation_config", None)
    if hasattr(generation, "kv_cache"):
        del generation.kv_cache
    return model


def make_cache(model: PreTrainedModel, kv_cache: Any = None) -> CommVQCache:
    """An empty cache for an enabled model, to be passed as ``past_key_values`` and kept between calls.

    kv_cache: other settings than the model's, as for ``enable``; None takes the model's.

    Raises:
        CacheUseError: the model is not enabled.
    """
    state: Enabled | None = model.__dict__.get(_STATE)
    if state is None:
        raise CacheUseError("this model is not enabled. Fix: call transformers_commvq.enable(model, ...) first.")
    config = state.config if kv_cache is None else _override(state.config, kv_cache)
    return CommVQCache(state.reading, state.codebook(config), config, model.config)


def _override(config: CommVQConfig, kv_cache: Any) -> CommVQConfig:
    """Settings of one call: a dict changes the model's settings, anything else replaces them."""
    if not isinstance(kv_cache, dict):
        return CommVQConfig.from_spec(kv_cache)
    changed = config.to_dict() | kv_cache
    if "bits" in kv_cache and "codebook" not in kv_cache and kv_cache["bits"] != config.bits:
        changed["codebook"] = changed["revision"] = None  # another rate is another codebook
    return CommVQConfig.from_spec(changed)


class _CachePreparer:
    """Stands in for the model's ``_prepare_cache_for_generation``; an object, so that pickle and deepcopy keep it."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length):
        model = self.model
        spec = getattr(generation_config, "kv_cache", None)
        ours = (
            model_kwargs.get("past_key_values") is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation in (None, "dynamic")
            and spec is not False
        )
        if not ours:
            args = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            return type(model)._prepare_cache_for_generation(model, *args)
        cache = model_kwargs["past_key_values"] = make_cache(model, spec or None)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None


def _supply_cache(model: PreTrainedModel, args: tuple, kwargs: dict):
    """Forward pre-hook of the model: a plain call that wants a cache and brings none gets ours."""
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(model.config.get_text_config(decoder=True), "use_cache", True)
    if use_cache and kwargs.get("past_key_values") is None and not torch.is_grad_enabled() and not model.training:
        kwargs["past_key_values"] = make_cache(model)
    return args, kwargs


def _warn_if_little_is_compressed(reading: ModelReading) -> None:
    share = len(reading.geometry.layers) / reading.geometry.num_hidden_layers
    if share < 0.5:
        warnings.warn(
            f"only {len(reading.geometry.layers)} of {reading.geometry.num_hidden_layers} layers have full attention; "
            "the others (sliding window or linear attention) keep their own small cache.",
            stacklevel=3,
        )


def _wrap_from_pretrained() -> None:
    current = PreTrainedModel.__dict__["from_pretrained"].__func__
    if hasattr(current, "_commvq_original"):
        return

    @functools.wraps(current)
    def from_pretrained(cls, *args, kv_cache=None, **kwargs):
        if kv_cache not in (None, False):
            kv_cache = CommVQConfig.from_spec(kv_cache)  # wrong settings are told before weights are loaded
        result = current(cls, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if kv_cache is None and _STATE not in model.__dict__:
            kv_cache = _saved_settings(model)
        if isinstance(kv_cache, (CommVQConfig, dict)):
            enable(model, kv_cache)
        return result

    from_pretrained._commvq_original = current
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _saved_settings(model: nn.Module) -> dict | None:
    """``generation_config.kv_cache`` of a checkpoint that was saved while enabled."""
    saved = getattr(getattr(model, "generation_config", None), "kv_cache", None)
    return saved if isinstance(saved, dict) and saved.get("quant_method") == METHOD else None


def register() -> None:
    """Add CommVQ to transformers' registries and let from_pretrained take ``kv_cache=``; idempotent."""
    with _lock:
        attention.register()
        if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(METHOD)(CommVQConfig)
        if METHOD not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(METHOD)(CommVQQuantizer)
        _wrap_from_pretrained()


def unregister() -> None:
    """Undo the wrapping of from_pretrained and the quantizer registration; enabled models keep working."""
    with _lock:
        wrapped = PreTrainedModel.__dict__["from_pretrained"].__func__
        if original := getattr(wrapped, "_commvq_original", None):
            PreTrainedModel.from_pretrained = classmethod(original)
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
        AUTO_QUANTIZER_MAPPING.pop(METHOD, None)


class CommVQQuantizer(HfQuantizer):
    """``from_pretrained(quantization_config=CommVQConfig(...))``: leaves the weights alone and enables the cache."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.is_quantized = False  # the weights are plain: .half(), .to() and save_pretrained must keep working
        if not isinstance(self.quantization_config, CommVQConfig):
            raise ConfigError(f"quantization_config is a {type(self.quantization_config).__name__}, not CommVQConfig.")
        return enable(model, self.quantization_config)

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_weight_conversions(self) -> list:
        return []
