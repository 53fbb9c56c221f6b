"""Caches by name, on one model, so that all are measured by the same code: transformers' own and ours.

dynamic                                 the uncompressed cache
quanto-4 quanto-2                       optimum-quanto, 4 or 2 bits
hqq-8 hqq-4 hqq-3 hqq-2 hqq-1           HQQ
fp8                                     8-bit floating point
commvq-2 commvq-1 commvq-RATE           this package, at a rate in bits an element
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from transformers import PreTrainedModel, QuantizedCache

from .config import METHOD, CommVQConfig, CommVQError, ConfigError
from .integration import disable, enable, make_cache
from .storage import MakeCache, uncompressed

PLAIN = "dynamic"
BACKENDS = {"quanto": ("4", "2"), "hqq": ("8", "4", "3", "2", "1"), "fp8": ("",)}


class ContenderUnavailableError(CommVQError, ImportError):
    """A cache was named whose package is not installed here."""


def stock_cache(name: str, model: PreTrainedModel) -> MakeCache:
    """One of transformers' own caches.

    model: made for it once, to find out whether it can be had.

    Raises:
        ConfigError: no such cache.
        ContenderUnavailableError: its package is missing, or too old, or refuses the model.
    """
    if name == PLAIN:
        return uncompressed
    backend, _, bits = name.partition("-")
    if bits not in BACKENDS.get(backend, ()):
        known = [PLAIN, *(f"{b}-{n}" if n else b for b, rates in BACKENDS.items() for n in rates)]
        raise ConfigError(f"cache {name!r}: expected {', '.join(known)}, or {METHOD}-RATE, e.g. {METHOD}-2.")
    settings = {"backend": backend, **({"nbits": int(bits)} if bits else {})}
    if backend == "hqq":
        settings |= {"axis_key": 1, "axis_value": 1}  # what transformers documents for this backend

    def make(model: PreTrainedModel) -> QuantizedCache:
        return QuantizedCache(config=model.config, **settings)

    try:
        make(model)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ContenderUnavailableError(f"cache {name}: {' '.join(str(error).split())}") from error
    return make


@contextmanager
def contender(model: PreTrainedModel, name: str, config: CommVQConfig | None = None) -> Iterator[MakeCache]:
    """A cache by name; the model makes it, or plain caches, inside the block and is plain again afterwards.

    config: the settings of ours besides its rate.

    Raises:
        ConfigError, ContenderUnavailableError: as ``stock_cache``.  CodebookError: no codebooks at this rate.
    """
    method, _, rate = name.partition("-")
    disable(model)
    if method != METHOD:
        yield stock_cache(name, model)
        return
    try:
        bits = float(rate)
    except ValueError as error:
        raise ConfigError(f"cache {name!r}: expected {METHOD}- and a rate in bits, e.g. {METHOD}-1.5.") from error
    enable(model, replace(config or CommVQConfig(), bits=bits))
    try:
        yield make_cache
    finally:
        disable(model)
