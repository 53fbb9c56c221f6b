"""What compression costs: streaming perplexity and KL divergence against the uncompressed cache, and passkey retrieval.

Streaming means the way a cache is used: a window of text goes through the model in chunks, every chunk attends to
what the cache kept of the ones before. Any transformers cache can be measured; nothing here knows how one compresses.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from .config import ConfigError
from .geometry import cache_name

MakeCache = Callable[[PreTrainedModel], Cache]


def uncompressed(model: PreTrainedModel) -> Cache:
    """The cache everything is compared with."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@dataclass(frozen=True)
class StreamingQuality:
    """Measured over windows of text; every token but a window's first is predicted.

    losses, reference_losses: mean negative log-likelihood of each window, nats a token.
    kl: mean KL(uncompressed || compressed) of each window, nats a token.
    tokens: predicted tokens of each window.
    """

    losses: tuple[float, ...]
    reference_losses: tuple[float, ...]
    kl: tuple[float, ...]
    tokens: tuple[int, ...]

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
) -> StreamingQuality:
    """Compare a cache with the uncompressed one.

    make_cache(model): a fresh cache, called once a window.
    windows: 1-d int64 token ids, two or more each.
    chunk: tokens a step; both caches go through the same steps, so only one chunk's logits are ever held.

    Raises ConfigError for no windows, too short ones, or a chunk below 1.
    """
    if not windows or min(map(len, windows)) < 2 or chunk < 1:
        raise ConfigError("expected at least one window of two or more tokens, and chunk=1 or more (default 128).")
    was_training = model.training
    model.eval()
    rows = []
    try:
        for window in tqdm(windows, desc="evaluate", unit="window", disable=not progress):
            rows.append(_window(model, window.to(model.device), make_cache(model), make_reference(model), chunk))
    finally:
        model.train(was_training)
    return StreamingQuality(*(tuple(column) for column in zip(*rows, strict=True)))


def _window(model, ids, cache, reference, chunk) -> tuple[float, float, float, int]:
    loss = reference_loss = kl = 0.0
    for start in range(0, len(ids) - 1, chunk):
        part = ids[None, start : min(start + chunk, len(ids) - 1)]
        labels = ids[start + 1 : start + 1 + part.shape[1], None]
        ours = _log_probabilities(model, part, cache)
        theirs = _log_probabilities(model, part, reference)
        loss -= ours.gather(1, labels).sum().item()
        reference_loss -= theirs.gather(1, labels).sum().item()
        kl += torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    n = len(ids) - 1
    return loss / n, reference_loss / n, kl / n, n


def _log_probabilities(model, ids, cache) -> torch.Tensor:
    given = {cache_name(type(model)): cache}
    return model(input_ids=ids, use_cache=True, **given).logits[0].float().log_softmax(-1)


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_ASK = "What is the pass key? The pass key is"


@torch.inference_mode()
def passkey_retrieval(
    model: PreTrainedModel,
    tokenizer: Any,
    make_cache: MakeCache = uncompressed,
    lengths: Sequence[int] = (1024,),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    trials: int = 1,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
) -> dict[int, dict[float, float]]:
    """How often a five-digit number hidden in filler text is repeated (arXiv 2305.16300, section 4.3).

    lengths: prompt tokens, about.  depths: where the number is hidden, 0 (start) to 1 (end).
    part: (i, n) tries only every n-th trial, from the i-th on; shares are of all trials, so the n parts add up.
    Returns length -> depth -> share of trials in which greedy decoding gives all digits.
    """
    draw, out, number = random.Random(seed), {}, itertools.count()
    filler = len(tokenizer(_FILLER)["input_ids"])
    for length in lengths:
        out[length] = {}
        count = max(2, (length - 60) // filler)
        for depth in depths:
            before = round(count * depth)
            hits = 0
            for _ in range(trials):
                key = str(draw.randrange(10000, 100000))
                if next(number) % part[1] != part[0]:
                    continue
                hidden = f"The pass key is {key}. Remember it. {key} is the pass key. "
                prompt = _FILLER * before + hidden + _FILLER * (count - before) + _ASK
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
                answer = _greedy(model, ids, make_cache(model), len(tokenizer(f" {key}")["input_ids"]) + 2)
                hits += key in tokenizer.decode(answer)
            out[length][depth] = hits / trials
    return out


def _greedy(model, ids: torch.Tensor, cache: Cache, count: int) -> list[int]:
    """Plain greedy decoding through a cache; no generation config of the model can change it."""
    step, answer = ids, []
    for _ in range(count):
        logits = model(input_ids=step, use_cache=True, logits_to_keep=1, **{cache_name(type(model)): cache}).logits
        step = logits[:, -1:].argmax(-1)
        answer.append(int(step))
    return answer
