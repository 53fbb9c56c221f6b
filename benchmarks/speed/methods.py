"""The caches that are compared: each a model that shares its weights with the others, and a way to make a cache."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import Cache, DynamicCache, PreTrainedModel

from transformers_commvq import CommVQConfig, enable, make_cache
from transformers_commvq.contenders import ContenderUnavailableError, stock_cache

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
    try:
        return Method(name, twin, partial(stock_cache(name, twin), twin))
    except ContenderUnavailableError as error:
        raise NotHere(str(error)) from error


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares all its tensors, so that it can be enabled while the original stays plain."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in shared})
