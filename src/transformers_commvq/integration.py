"""Wires CommVQ into a model: ``enable``, ``disable``, and the cache it makes wherever it would make its own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import attention, hub
from .cache import CommVQCache
from .codebook import Codebook
from .config import METHOD, CacheUseError, CommVQConfig, ConfigError, UnsupportedModelError
from .geometry import CACHE_NAMES, ModelReading, cache_name, generate_cache_name, parameter_names, read_model
from .recipe import learn_missing

_STATE = "_commvq"  # attribute of an enabled model


@dataclass
class Enabled:
    """What an enabled model carries.

    codebooks: by the config they were resolved for; more than one after generate(kv_cache={...}).
    previous: the attention implementation to go back to.
    heads: the key heads this process holds under tensor parallelism; None: all.
    """

    config: CommVQConfig
    reading: ModelReading
    codebooks: dict[str, Codebook]
    previous: str
    heads: tuple[int, int] | None = None
    handles: list[Any] = field(default_factory=list)

    def codebook(
        self,
        config: CommVQConfig,
        model: PreTrainedModel,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Codebook:
        """The codebooks for a config, each layer's where that layer computes now; the rest as for ``enable``."""
        key = str((config.bits, config.codebook, config.revision, config.base_model))
        book = self.codebooks.get(key)
        if book is None:
            book = hub.resolve(
                config,
                self.reading.geometry,
                token=token,
                local_files_only=local_files_only,
                on_missing=lambda config, _: learn_missing(model, config),
            )
            if self.heads:
                book = replace(book, layers={i: layer.select_heads(*self.heads) for i, layer in book.layers.items()})
        self.codebooks[key] = _placed(book, self.reading)
        return self.codebooks[key]


def _placed(book: Codebook, reading: ModelReading) -> Codebook:
    """Codebooks on their layers' devices, so that caches share them instead of each moving its own."""
    moved = {}
    for i, layer in book.layers.items():
        device = _device(reading.attention[i])
        moved[i] = layer if layer.keys.device == device else layer.to(device)
    if all(moved[i] is layer for i, layer in book.layers.items()):
        return book
    return replace(book, layers=moved)


def _device(module: nn.Module) -> torch.device:
    """Where a module computes; weights that accelerate keeps elsewhere come to it for the time of a forward."""
    hook = getattr(module, "_hf_hook", None)
    for child in (module, *module.children()):
        hook = hook or getattr(child, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.device.type == "meta" else parameter.device


def _local_heads(model: PreTrainedModel, heads: int) -> tuple[int, int] | None:
    """First and last key head (exclusive) of this process under tensor parallelism, None without it.

    Raises UnsupportedModelError when the heads cannot be dealt out evenly.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return None
    if heads % size:
        raise UnsupportedModelError(
            f"{heads} key heads over {size} processes: expected a multiple. Fix: another tp_size, or kv_cache=None."
        )
    rank, share = model._device_mesh["tp"].get_local_rank(), heads // size
    return rank * share, (rank + 1) * share


def enable(
    model: PreTrainedModel,
    kv_cache: Any = METHOD,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """Make a model use a compressed KV cache wherever it would make its own.

    model: a transformers model, or a PEFT or compiled wrapper of one.
    kv_cache: "commvq" (2 bits), a codebook folder or Hub id, a dict of CommVQConfig fields, or a CommVQConfig.
    token, local_files_only: for a Hub repository of codebooks, as in ``from_pretrained``, which hands its own on. The
        token is not kept.
    Returns the model, changed in place: generate() and plain forwards with ``use_cache`` now make a CommVQCache. The
    weights are not touched. Enabling again replaces the settings.

    Raises:
        ConfigError: the settings are wrong.
        UnsupportedModelError: the model's cache cannot be compressed; says why.
        CodebookError: no codebooks, or not this model's, or damaged; says how to get them.
    """
    given, model = model, _unwrapped(model)
    config = CommVQConfig.from_spec(kv_cache)
    reading = read_model(model, config.base_model)
    if config.base_model is None and hub.is_hub_id(reading.geometry.id) and not Path(reading.geometry.id).exists():
        # A saved copy must still find the codebooks of the model it is a copy of.
        config = replace(config, base_model=reading.geometry.id)
    previous = model.config.get_text_config(decoder=True)._attn_implementation
    if state := model.__dict__.get(_STATE):
        previous = state.previous
    state = Enabled(config, reading, {}, previous, _local_heads(model, reading.geometry.num_key_value_heads))
    # Everything that can fail has happened before the model is changed.
    state.codebook(config, model, token, local_files_only)
    disable(model)
    attention.register()
    _warn_if_little_is_compressed(reading)
    _set_attention(model, METHOD)
    for module in reading.attention.values():
        state.handles += [
            module.register_forward_pre_hook(attention.before_attention, with_kwargs=True),
            module.register_forward_hook(attention.after_attention, with_kwargs=True, always_call=True),
        ]
    for module in reading.rotary:
        state.handles.append(module.register_forward_pre_hook(attention.before_rotary, with_kwargs=True))
    state.handles.append(model.register_forward_pre_hook(_supply_cache, with_kwargs=True))
    model.__dict__[_STATE] = state
    model.__dict__["_prepare_cache_for_generation"] = _CachePreparer(model)
    model.__dict__["init_continuous_batching"] = _refuse_paged_cache
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation._from_model_config = False  # else transformers drops fields it does not know when reloading
        generation.kv_cache = config.to_dict()
    return given


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``enable``: the model makes its plain cache again. Does nothing to a model that is not enabled."""
    given, model = model, _unwrapped(model)
    state: Enabled | None = model.__dict__.pop(_STATE, None)
    if state is None:
        return given
    for handle in state.handles:
        handle.remove()
    for name in ("_prepare_cache_for_generation", "init_continuous_batching"):
        model.__dict__.pop(name, None)
    _set_attention(model, state.previous)
    generation = getattr(model, "generation_config", None)
    if hasattr(generation, "kv_cache"):
        del generation.kv_cache
    return given


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether ``enable`` is in effect."""
    return _STATE in _unwrapped(model).__dict__


def _unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside torch.compile's or PEFT's wrapper.

    Raises UnsupportedModelError when there is none.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model.")
    return inner


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the decoder's attention implementation; a vision or audio tower keeps its own."""
    path = _config_path(model.config, model.config.get_text_config(decoder=True))
    for key in reversed(path):
        name = {key: name}
    model.set_attn_implementation(name)


def _config_path(config: Any, wanted: Any) -> list[str]:
    """Names of the sub-configs that lead from one config to another."""
    if config is wanted:
        return []
    for key in config.sub_configs:
        if (inner := getattr(config, key, None)) is wanted:
            return [key]
        if inner is not None and (path := _config_path(inner, wanted)):
            return [key, *path]
    return []


def make_cache(model: PreTrainedModel, kv_cache: Any = None) -> CommVQCache:
    """An empty cache for an enabled model, to be passed as ``past_key_values`` and kept between calls.

    transformers 5.24 and newer call the argument ``cache``, and take the old name too.

    kv_cache: other settings than the model's, as for ``enable``; None takes the model's.

    Raises:
        CacheUseError: the model is not enabled.
    """
    model = _unwrapped(model)
    state: Enabled | None = model.__dict__.get(_STATE)
    if state is None:
        raise CacheUseError("this model is not enabled. Fix: call transformers_commvq.enable(model, ...) first.")
    config = _override(state.config, kv_cache)
    return CommVQCache(state.reading, state.codebook(config, model), config, model.config)


def _override(config: CommVQConfig, kv_cache: Any) -> CommVQConfig:
    """Settings of one call: a dict changes the model's settings, a config or a codebook's name replaces them."""
    if kv_cache in (None, True, METHOD):
        return config
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
        wanted = (
            all(model_kwargs.get(name) is None for name in CACHE_NAMES)
            and generation_config.use_cache is not False
            and spec is not False
        )
        other = generation_config.cache_implementation
        if wanted and other not in (None, "dynamic"):
            warnings.warn(
                f"cache_implementation={other!r} is used; the cache of this call is not compressed.", stacklevel=4
            )
            wanted = False
        if not wanted:
            args = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            return type(model)._prepare_cache_for_generation(model, *args)
        cache = model_kwargs[generate_cache_name()] = make_cache(model, spec)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None


def _refuse_paged_cache(*args, **kwargs):
    """Stands in for an enabled model's ``init_continuous_batching``, behind generate_batch."""
    raise CacheUseError(
        "generate_batch keeps a paged cache of its own, which cannot be compressed. "
        "Fix: use generate(), or call transformers_commvq.disable(model) first."
    )


@torch.compiler.disable
def _supply_cache(model: PreTrainedModel, args: tuple, kwargs: dict):
    """Forward pre-hook of the model: a plain call that wants a cache and brings none gets ours.

    Raises ConfigError when attention weights are asked for.
    """
    attention.forget_call()
    names, name = parameter_names(type(model)), cache_name(type(model))
    given = dict(zip(names, args, strict=False)) | kwargs
    config = model.config.get_text_config(decoder=True)
    asked = given.get("output_attentions")
    if (config.output_attentions if asked is None else asked) and config._attn_implementation == METHOD:
        raise ConfigError(
            "output_attentions: CommVQ attention never forms the weights. "
            'Fix: model.set_attn_implementation("eager"), which attends over the decoded cache; or leave it out.'
        )
    use_cache = given.get("use_cache")
    use_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
    wanted = use_cache and name is not None and all(given.get(n) is None for n in CACHE_NAMES)
    if wanted and not torch.is_grad_enabled() and not model.training:
        place = names.index(name)
        if len(args) > place:
            args = (*args[:place], make_cache(model), *args[place + 1 :])
        else:
            for other in CACHE_NAMES:  # a None under the old name would be told to be ignored
                kwargs.pop(other, None)
            kwargs[name] = make_cache(model)
    return args, kwargs


def _warn_if_little_is_compressed(reading: ModelReading) -> None:
    share = len(reading.geometry.layers) / reading.geometry.num_hidden_layers
    if share < 0.5:
        warnings.warn(
            f"only {len(reading.geometry.layers)} of {reading.geometry.num_hidden_layers} layers have full attention; "
            "the others (sliding window or linear attention) keep their own small cache.",
            stacklevel=3,
        )
