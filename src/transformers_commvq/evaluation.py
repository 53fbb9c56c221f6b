"""What compression costs: streaming perplexity and KL divergence against the uncompressed cache.

Streaming means the way a cache is used: a window of text goes through the model in chunks, every chunk attends to
what the cache kept of the ones before. Any transformers cache can be measured; nothing here knows how one compresses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel

from .config import ConfigError
from .geometry import cache_name
from .storage import MakeCache, cache_bytes, uncompressed

Reference = Callable[[int], Iterable[torch.Tensor]]  # window's number -> log-probabilities of its chunks


@dataclass(frozen=True)
class StreamingQuality:
    """Measured over windows of text; every token but a window's first is predicted.

    losses, reference_losses: mean negative log-likelihood of each window, nats a token.
    kl: mean KL(uncompressed || compressed) of each window, nats a token.
    tokens: predicted tokens of each window.
    cache_bytes: what the cache held at the end of each window, everything counted (storage.cache_bytes).
    """

    losses: tuple[float, ...]
    reference_losses: tuple[float, ...]
    kl: tuple[float, ...]
    tokens: tuple[int, ...]
    cache_bytes: tuple[int, ...]

    def _mean(self, per_window: Sequence[float]) -> float:
        return sum(x * n for x, n in zip(per_window, self.tokens, strict=True)) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self._mean(self.losses))

    @property
    def reference_perplexity(self) -> float:
        return math.exp(self._mean(self.reference_losses))

    @property
    def change(self) -> float:
        """Relative change of perplexity; 0.01 is one percent worse."""
        return self.perplexity / self.reference_perplexity - 1

    @property
    def mean_kl(self) -> float:
        return self._mean(self.kl)

    @property
    def noise(self) -> dict[str, float]:
        """Standard errors over windows of the change and of the KL; nan for a single window."""
        ratios = [math.exp(a - b) - 1 for a, b in zip(self.losses, self.reference_losses, strict=True)]
        return {"change": _standard_error(ratios), "kl": _standard_error(self.kl)}

    def to_dict(self) -> dict[str, Any]:
        noise = self.noise
        return {
            "windows": len(self.tokens),
            "tokens": sum(self.tokens),
            "reference_perplexity": round(self.reference_perplexity, 4),
            "perplexity": round(self.perplexity, 4),
            "change": round(self.change, 5),
            "kl": round(self.mean_kl, 5),
            "change_standard_error": None if math.isnan(noise["change"]) else round(noise["change"], 5),
            "kl_standard_error": None if math.isnan(noise["kl"]) else round(noise["kl"], 5),
        }


@torch.inference_mode()
def streaming_quality(
    model: PreTrainedModel,
    make_cache: MakeCache,
    windows: Sequence[torch.Tensor],
    chunk: int = 128,
    make_reference: MakeCache = uncompressed,
    progress: bool = True,
    reference: Reference | None = None,
) -> StreamingQuality:
    """Compare a cache with the uncompressed one.

    make_cache(model): a fresh cache, called once a window.
    windows: 1-d int64 token ids, two or more each.
    chunk: tokens a step; both caches go through the same steps, so only one chunk's logits are ever held.
    reference: ``kept_reference`` of the same windows and chunk, to compare several caches with one run of the model;
        without it, the model runs on the cache that ``make_reference`` makes.

    Raises ConfigError for no windows, too short ones, or a chunk below 1.
    """
    _check(windows, chunk)
    was_training = model.training
    model.eval()
    rows = []
    try:
        for number, window in enumerate(tqdm(windows, desc="evaluate", unit="window", disable=not progress)):
            kept = reference(number) if reference else _stream(model, window, make_reference(model), chunk)
            rows.append(_window(model, window, make_cache(model), kept, chunk))
    finally:
        model.train(was_training)
    return StreamingQuality(*(tuple(column) for column in zip(*rows, strict=True)))


@torch.inference_mode()
def kept_reference(model: PreTrainedModel, windows: Sequence[torch.Tensor], chunk: int = 128) -> Reference:
    """The uncompressed run of ``streaming_quality``, made once and held: four bytes for every token and entry of the
    vocabulary, 400 MB for a window of 2048 tokens and a vocabulary of 49 thousand.

    Raises ConfigError as ``streaming_quality`` does.
    """
    _check(windows, chunk)
    return [list(_stream(model, window, uncompressed(model), chunk)) for window in windows].__getitem__


def _check(windows: Sequence[torch.Tensor], chunk: int) -> None:
    if not windows or min(map(len, windows)) < 2 or chunk < 1:
        raise ConfigError("expected at least one window of two or more tokens, and chunk=1 or more (default 128).")


def _stream(model: PreTrainedModel, window: torch.Tensor, cache: Cache, chunk: int) -> Iterator[torch.Tensor]:
    """Log-probabilities after each token but the last, a chunk at a time: (tokens, vocabulary) float32."""
    given = {cache_name(type(model)): cache, "use_cache": True}
    for part in window[:-1].to(model.device).split(chunk):
        yield model(input_ids=part[None], **given).logits[0].float().log_softmax(-1)


def _window(model, window, cache, reference, chunk) -> tuple[float, float, float, int, int]:
    loss = reference_loss = kl = 0.0
    labels = window[1:, None].to(model.device).split(chunk)
    for ours, theirs, label in zip(_stream(model, window, cache, chunk), reference, labels, strict=True):
        loss -= ours.gather(1, label).sum().item()
        reference_loss -= theirs.gather(1, label).sum().item()
        kl += torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    n = len(window) - 1
    return loss / n, reference_loss / n, kl / n, n, cache_bytes(cache)


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
