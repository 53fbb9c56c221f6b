"""Bits and bytes of a cache are those of its tensors."""

import pytest
import torch
from generation import saved_codebook
from tiny_models import tiny_model

from transformers_commvq.config import ConfigError
from transformers_commvq.contenders import contender, stock_cache
from transformers_commvq.storage import bits_per_element, cache_bytes, filled, uncompressed

ELEMENTS = 2 * 2 * 2 * 16  # of a token: layers, keys and values, heads, head_dim of "llama-gqa"
POSITION = 32 / ELEMENTS  # bits an element: one int32 a token, for all layers


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa").to(torch.bfloat16)


def test_the_uncompressed_cache(model):
    assert cache_bytes(filled(model, uncompressed, 100)) == 100 * ELEMENTS * 2
    assert bits_per_element(model, uncompressed, 128) == 16


@pytest.mark.parametrize(
    ("name", "bits"),
    # groups of 64 elements: a scale and a zero point of 16 bits each
    [("quanto-4", 4.5), ("quanto-2", 2.5), ("hqq-4", 4.5), ("hqq-1", 1.5), ("fp8", 8)],
)
def test_stock_caches_with_all_that_they_store(model, name, bits):
    pytest.importorskip(name.split("-")[0].replace("quanto", "optimum.quanto").replace("fp8", "torch"))
    with contender(model, name) as make:
        assert bits_per_element(model, make) == pytest.approx(bits)


def test_ours(model, tmp_path):
    from transformers_commvq import CommVQConfig

    config = CommVQConfig(codebook=saved_codebook(model, tmp_path, 2.0))
    with contender(model, "commvq-2", config) as make:
        assert bits_per_element(model, make) == pytest.approx(2 + POSITION)
        cache = filled(model, make, 300)
        assert cache_bytes(cache) == cache.nbytes
    assert bits_per_element(model, uncompressed, 128) == 16  # the model is plain again


def test_what_is_no_cache_is_refused(model):
    for name in ("quanto-3", "zip", "commvq-two", "fp8-4"):
        with pytest.raises(ConfigError, match=name), contender(model, name):
            pass
    with pytest.raises(ConfigError, match="multiple of 128"):
        bits_per_element(model, stock_cache("dynamic", model), 100)
