"""What a cache holds: the bytes of every tensor in it, and what one more token costs, of any transformers cache.

Nothing is taken from a method's stated rate: scales, zero points, norms and positions are tensors, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from .config import ConfigError
from .geometry import cache_name

MakeCache = Callable[[PreTrainedModel], Cache]


def uncompressed(model: PreTrainedModel) -> Cache:
    """The cache everything is compared with."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def cache_bytes(cache: Cache) -> int:
    """Bytes of the memory behind every tensor that a cache holds; what it shares with other caches may not count.

    A cache that knows better says so by an attribute ``nbytes``, as CommVQCache does: its codebooks are the model's.
    """
    if (known := getattr(cache, "nbytes", None)) is not None:
        return known
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache)}.values())


def bits_per_element(
    model: PreTrainedModel, make_cache: MakeCache, tokens: int = 256, gained: int | None = None
) -> float:
    """Bits that one more token costs, for each of its key and value elements, in the model's dtype.

    Measured: the bytes of a cache of ``2 * tokens`` tokens less those of one of ``tokens``, over the elements that an
    uncompressed cache gains. So what is held once a sequence (a window of exact tokens, sinks) is left out, and all
    that grows is in.

    tokens: a multiple of 128, so that windows which are emptied in blocks hold the same at both.
    gained: ``elements_gained`` of the same tokens, where it is known already.

    Raises ConfigError for another number of tokens.
    """
    if tokens < 128 or tokens % 128:
        raise ConfigError(f"tokens={tokens}: expected a multiple of 128 (default 256).")
    short, long = (cache_bytes(filled(model, make_cache, n)) for n in (tokens, 2 * tokens))
    return 8 * (long - short) / (gained or elements_gained(model, tokens))


def elements_gained(model: PreTrainedModel, tokens: int = 256) -> int:
    """Key and value elements that an uncompressed cache of ``2 * tokens`` tokens has more than one of ``tokens``."""
    short, long = (sum(t.numel() for t in _tensors(filled(model, uncompressed, n))) for n in (tokens, 2 * tokens))
    return long - short


@torch.inference_mode()
def filled(model: PreTrainedModel, make_cache: MakeCache, tokens: int) -> Cache:
    """A cache after a prompt of so many tokens, read in one piece; which tokens is no matter to its size."""
    cache = make_cache(model)
    ids = torch.arange(tokens, device=model.device)[None] * 97 % model.get_input_embeddings().weight.shape[0]
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_name(type(model)): cache})
    return cache


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
