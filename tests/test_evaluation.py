"""Streaming quality is exact for an uncompressed cache, and notices a bad one."""

import math

import pytest
import torch
from tiny_models import tiny_model, token_windows
from transformers import DynamicCache

from transformers_commvq.config import ConfigError
from transformers_commvq.evaluation import passkey_retrieval, streaming_quality, uncompressed


class NoisyCache(DynamicCache):
    """Adds noise to every value it is given."""

    def update(self, key, value, layer, *args, **kwargs):
        return super().update(key, value + 0.3 * value.std() * torch.sin(37 * value), layer, *args, **kwargs)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_uncompressed_streaming_equals_one_forward_pass(name, chunk):
    model, windows = tiny_model(name), token_windows(2, 50)
    got = streaming_quality(model, uncompressed, windows, chunk=chunk, progress=False)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:]).item() for w in windows]
    assert got.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    assert got.losses == pytest.approx(losses, rel=1e-4)
    assert got.mean_kl == pytest.approx(0, abs=1e-6) and got.change == pytest.approx(0, abs=1e-6)
    assert got.tokens == (49, 49)


def test_a_worse_cache_is_worse():
    got = streaming_quality(tiny_model("llama-gqa"), lambda m: NoisyCache(), token_windows(3, 60), progress=False)
    assert got.mean_kl > 1e-4
    assert got.noise["kl"] > 0
    report = got.to_dict()
    assert report["windows"] == 3 and report["tokens"] == 177


def test_refuses_what_it_cannot_measure():
    model = tiny_model("llama-gqa")
    for windows, chunk in (([], 8), ([torch.tensor([1])], 8), (token_windows(1, 9), 0)):
        with pytest.raises(ConfigError):
            streaming_quality(model, uncompressed, windows, chunk=chunk, progress=False)


class Characters:
    """A tokenizer with one token a character."""

    def __call__(self, text, return_tensors=None):
        ids = [ord(c) % 96 for c in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids):
        return "".join(chr(i + 32) if i < 64 else chr(i) for i in ids)


def test_passkey_grid():
    got = passkey_retrieval(tiny_model("llama-gqa"), Characters(), lengths=(200, 300), depths=(0.0, 1.0), trials=2)
    assert set(got) == {200, 300} and set(got[200]) == {0.0, 1.0}
    assert all(0 <= share <= 1 for row in got.values() for share in row.values())
