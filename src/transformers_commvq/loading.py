"""Wires CommVQ into loading: ``from_pretrained(kv_cache=...)`` and the ``quantization_config`` registry.

Importing the package adds names to registries and wraps exactly one function; ``unregister`` takes them out again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from . import attention
from .config import METHOD, CommVQConfig, CommVQError, ConfigError
from .integration import disable, enable, is_enabled

_lock = threading.Lock()
_default: CommVQConfig | None = None  # see kv_cache_by_default
# How the from_pretrained that is running reaches the Hub; transformers does not tell a quantizer.
_access: ContextVar[dict[str, Any]] = ContextVar("transformers_commvq_access", default=MappingProxyType({}))


@contextmanager
def kv_cache_by_default(kv_cache: Any = METHOD) -> Iterator[None]:
    """Inside the block, models load with this compressed cache where nothing else is said.

    For programs that call ``from_pretrained`` themselves and take no ``kv_cache=``, such as ``transformers serve``. It
    holds for all threads. A ``kv_cache=`` argument, False included, and settings saved with a checkpoint go first.

    kv_cache: as for ``enable``.
    """
    global _default
    before, _default = _default, CommVQConfig.from_spec(kv_cache)
    try:
        yield
    finally:
        _default = before


def _wrap_from_pretrained() -> None:
    original = PreTrainedModel.__dict__["from_pretrained"].__func__
    if hasattr(original, "_commvq_original"):
        return

    @functools.wraps(original)
    def from_pretrained(cls, *args, kv_cache=None, **kwargs):
        if kv_cache not in (None, False):
            kv_cache = CommVQConfig.from_spec(kv_cache)  # wrong settings are told before weights are loaded
        if ours := isinstance(kwargs.get("quantization_config"), CommVQConfig):
            _check_slot_is_free(args, kwargs)
        access = {name: kwargs[name] for name in ("token", "local_files_only") if name in kwargs}
        outer = _access.set(access)
        try:
            result = original(cls, *args, **kwargs)
        finally:
            _access.reset(outer)
        model = result[0] if isinstance(result, tuple) else result
        if ours and not is_enabled(model):
            raise ConfigError(_SLOT_TAKEN.format(method=_method(getattr(model.config, "quantization_config", None))))
        if kv_cache is False:
            disable(model)
        elif kv_cache is not None:
            enable(model, kv_cache, **access)
        elif not is_enabled(model):
            if saved := _saved_settings(model):
                _enable_as_saved(model, saved, access)
            elif _default is not None:
                enable(model, _default, **access)
        return result

    from_pretrained._commvq_original = original
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


_SLOT_TAKEN = (
    "this checkpoint's weights are already quantized ({method}), and transformers has one quantization_config slot. "
    'Fix: from_pretrained(..., kv_cache="commvq") or kv_cache=CommVQConfig(...), which goes with any weights.'
)


_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


def _check_slot_is_free(args: tuple, kwargs: dict) -> None:
    """Raises ConfigError when ``quantization_config=CommVQConfig`` would be ignored, if known before loading."""
    if kwargs.get("gguf_file"):
        raise ConfigError(_SLOT_TAKEN.format(method="gguf"))
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        path = config or kwargs.get("pretrained_model_name_or_path") or (args[0] if args else None)
        wanted = {k: kwargs[k] for k in _WHERE if k in kwargs}
        try:
            config = PreTrainedConfig.from_dict(PreTrainedConfig.get_config_dict(path, **wanted)[0])
        except (OSError, ValueError, TypeError):
            return  # loading itself will say what is wrong
    taken = _method(getattr(config, "quantization_config", None))
    if taken not in (None, METHOD):
        raise ConfigError(_SLOT_TAKEN.format(method=taken))


def _method(quantization: Any) -> str | None:
    if quantization is None:
        return None
    get = quantization.get if isinstance(quantization, dict) else functools.partial(getattr, quantization)
    method = get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def _saved_settings(model: nn.Module) -> dict | None:
    """``generation_config.kv_cache`` of a checkpoint that was saved while enabled."""
    saved = getattr(getattr(model, "generation_config", None), "kv_cache", None)
    return saved if isinstance(saved, dict) and saved.get("quant_method") == METHOD else None


def _enable_as_saved(model: PreTrainedModel, saved: dict, access: dict[str, Any]) -> None:
    try:
        enable(model, saved, **access)
    except CommVQError as error:
        raise type(error)(
            f"{error} (This checkpoint was saved with a compressed KV cache; kv_cache=False loads it without.)"
        ) from error


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
        return enable(model, self.quantization_config, **_access.get())

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
