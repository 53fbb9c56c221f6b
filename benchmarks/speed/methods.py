"""The caches that are compared: each a model that shares its weights with the others, and a way to make a cache."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from transformers_commvq import CommVQCache, CommVQConfig, enable, make_cache

from .models import Subject, saved_codebook

OTHERS = ("dynamic", "flash", "quanto-4", "quanto-2", "hqq-4", "hqq-2", "fp8")
OURS = "commvq"  # followed by its rate: commvq-2, commvq-1
PLAIN = "dynamic"  # what the others are compared with: DynamicCache with scaled_dot_product_attention


class NotHere(Exception):
    """A method that cannot run here; says why."""


@dataclass
class Method:
    """A cache under test.

    model: shares its weights with every other method's. make: a new, empty cache for it.
    """

    name: str
    model: PreTrainedModel
    make: Callable[[], Cache]


def build(name: str, model: PreTrainedModel, subject: Subject, folder: Path) -> Method:
    """A method by name.

    model: left as it is. folder: where random codebooks go.

    Raises NotHere: a package or a device is missing.
    """
    twin = sharing_weights(model)
    kind, _, bits = name.partition("-")
    if kind in ("dynamic", "flash"):
        if kind == "flash":
            if model.device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
                raise NotHere("needs a GPU and the flash_attn package")
            twin.set_attn_implementation("flash_attention_2")
        return Method(name, twin, lambda: DynamicCache(config=twin.config))
    if kind == OURS:
        codebook = {} if subject.base_model else {"codebook": saved_codebook(model, float(bits), folder)}
        enable(twin, CommVQConfig(bits=float(bits), base_model=subject.base_model, **codebook))
        return Method(name, twin, lambda: make_cache(twin))
    settings = {"backend": kind} if kind == "fp8" else {"backend": kind, "nbits": int(bits)}
    if kind == "hqq":
        settings |= {"axis_key": 1, "axis_value": 1}  # what transformers documents for this backend
    try:
        QuantizedCache(config=twin.config, **settings)
    except (ImportError, RuntimeError, ValueError) as error:
        raise NotHere(" ".join(str(error).split())) from error
    return Method(name, twin, lambda: QuantizedCache(config=twin.config, **settings))


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares all its tensors, so that it can be enabled while the original stays plain."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in shared})


def cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor a cache holds."""
    if isinstance(cache, CommVQCache):
        return cache.nbytes
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache)}.values())


def _tensors(thing: Any) -> list[torch.Tensor]:
    """Tensors inside caches, layers, and quantized tensors of the backends' own classes."""
    seen, queue, found = set(), [thing], []
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            # A wrapper subclass has no storage of its own, only what it flattens to.
            names = item.__tensor_flatten__()[0] if hasattr(item, "__tensor_flatten__") else None
            if names is None:
                found.append(item)
            else:
                queue += [getattr(item, name) for name in names]
        elif isinstance(item, dict):
            queue += item.values()
        elif isinstance(item, (list, tuple)):
            queue += item
        elif hasattr(item, "__dict__") and (isinstance(item, Cache) or hasattr(item, "get_seq_length")):
            queue += vars(item).values()
    return found
