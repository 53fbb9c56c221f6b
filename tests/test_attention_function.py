"""The "commvq" attention function: equal to plain attention over the decoded cache, each token counted once."""

import pytest
import torch
from generation import random_codebook, tiny_llama
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from transformers_commvq import CacheUseError, CommVQConfig, attention
from transformers_commvq.cache import CommVQCache
from transformers_commvq.geometry import read_model
from transformers_commvq.layer import Call, current
from transformers_commvq.ops import BACKENDS, backend

HEADS, KV_HEADS, DIM = 4, 2, 16


def module():
    out = nn.Module()
    out.num_key_value_groups, out.is_causal, out.layer_idx = HEADS // KV_HEADS, True, 0
    return out.eval()


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Harness:
    """One layer of a cache, driven through the attention function without a model."""

    def __init__(self, sinks=4, window=16, batch=2):
        model = tiny_llama()
        self.reading = read_model(model)
        config = CommVQConfig(sink_tokens=sinks, residual_length=window)
        self.cache = CommVQCache(self.reading, random_codebook(model), config, model.config)
        self.layer, self.module, self.batch, self.rotary = self.cache.layers[0], module(), batch, model.model.rotary_emb

    def step(self, new, mask=None, seed=0, **kwargs):
        """Attend with random tensors. Returns (output, query, all keys and values as attention should see them)."""
        q = randn(self.batch, HEADS, new, DIM, seed=seed)
        k, v = (randn(self.batch, KV_HEADS, new, DIM, seed=seed + i) for i in (1, 2))
        past = self.layer.get_seq_length()
        positions = torch.arange(past, past + new)[None].expand(self.batch, -1)
        cos, sin = (self.reading.rope.compact(t) for t in self.rotary(q, positions))
        before = self.layer.exact_keys_values() if past else (k[:, :, :0], v[:, :, :0])
        current.call = Call(self.module, self.layer, cos, sin, positions, mask, True)
        try:
            handed = self.layer.update(k, v)
            out, weights = attention.commvq_attention(self.module, q, *handed, mask, scaling=DIM**-0.5, **kwargs)
            assert weights is None and self.layer.get_seq_length() == past + new
        finally:
            current.call = None
        return out, q, *(torch.cat([old, n], 2) for old, n in zip(before, (k, v), strict=True))


def expected(query, keys, values, mask, softcap=None, s_aux=None):
    """Attention by its formula, all keys at hand."""
    new, total = query.shape[2], keys.shape[2]
    keys, values = (t.repeat_interleave(HEADS // KV_HEADS, 1).double() for t in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * DIM**-0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.arange(total) <= torch.arange(total - new, total)[:, None]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        aux = s_aux.double().view(1, HEADS, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, aux], 3)
        values = torch.cat([values, torch.zeros_like(values[:, :, :1])], 2)
    return (scores.softmax(-1) @ values).transpose(1, 2).float()


def padded(new, total, pads=(0, 37)):
    """A causal mask, (batch, 1, new, total), whose second row hides its first tokens."""
    token = torch.arange(total)
    causal = token <= torch.arange(total - new, total)[:, None]
    return torch.stack([causal & (token >= p) for p in pads])[:, None]


CASES = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sinks of no token": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "both": {"softcap": 3.0, "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("name", [n for n in ("blockwise", "jit") if n in BACKENDS])
@pytest.mark.parametrize("form", ["none", "bool", "additive", "too long"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("new", [1, 5, 70])
def test_equals_attention_over_the_decoded_cache(case, form, new, name):
    harness, past = Harness(), 150

    def mask(count, total):
        if form == "none":
            return None
        out = padded(count, total + (9 if form == "too long" else 0))
        if form == "too long":  # as a static mask: columns of tokens yet to come
            out = torch.cat([padded(count, total), torch.zeros(2, 1, count, 9, dtype=torch.bool)], 3)
        return torch.zeros(out.shape).masked_fill_(~out, torch.finfo().min) if form == "additive" else out

    first = harness.step(past, mask(past, past), seed=10, **CASES[case])
    assert harness.layer.coded == 128
    real = torch.ones(2, past, dtype=torch.bool) if form == "none" else padded(1, past)[:, 0, 0]
    want = expected(*first[1:], None if form == "none" else mask(past, past)[..., :past], **CASES[case])
    torch.testing.assert_close(first[0][real], want[real], atol=2e-5, rtol=1e-4)
    with backend(name):
        out, *rest = harness.step(new, mask(new, past + new), seed=20, **CASES[case])
    want = expected(*rest, None if form == "none" else mask(new, past + new)[..., : past + new], **CASES[case])
    if name == "jit":  # whose tables are int16
        assert (out - want).norm() < 5e-4 * want.norm()
    else:
        torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sinks, window", [(0, 0), (0, 16), (4, 0), (200, 0), (3, 500)])
def test_any_split_between_sinks_codes_and_window(sinks, window):
    harness = Harness(sinks, window)
    harness.step(130, seed=1)
    for step in range(3):
        out, *rest = harness.step(40, padded(40, 170 + 40 * step), seed=30 + step)
        torch.testing.assert_close(out, expected(*rest, padded(40, 170 + 40 * step)), atol=2e-5, rtol=1e-4)


def test_sinks_of_rows_that_start_later_than_the_first_chunks():
    """A row whose first chunks are all padding: its sinks come late, and hidden codes must not be counted."""
    harness, pads = Harness(window=0), (0, 150)
    for step in range(6):
        total = 64 * (step + 1)
        mask = padded(64, total, pads)
        out, *rest = harness.step(64, mask, seed=40 + step)
        real = mask.any(-1)[:, 0]
        torch.testing.assert_close(out[real], expected(*rest, mask)[real], atol=2e-5, rtol=1e-4)
        assert torch.isfinite(out).all()
    assert harness.layer.sink_start.tolist() == [0, 150]


@pytest.mark.parametrize("case", CASES)
def test_without_a_cache_it_is_ordinary_attention(case):
    q, k, v = randn(2, HEADS, 9, DIM, seed=1), *(randn(2, KV_HEADS, 9, DIM, seed=i) for i in (2, 3))
    out, _ = attention.commvq_attention(module(), q, k, v, None, **CASES[case])
    torch.testing.assert_close(out, expected(q, k, v, None, **CASES[case]), atol=1e-5, rtol=1e-4)
    mask = padded(3, 9, (0, 4))  # another cache's keys: more of them than queries
    out, _ = attention.commvq_attention(module(), q[:, :, -3:], k, v, mask, **CASES[case])
    torch.testing.assert_close(out, expected(q[:, :, -3:], k, v, mask, **CASES[case]), atol=1e-5, rtol=1e-4)


def test_dropout_is_refused_where_it_cannot_be_done():
    harness = Harness()
    harness.step(100)
    with pytest.raises(CacheUseError, match="dropout"):
        harness.step(1, dropout=0.1)


def test_registered_with_a_mask_function():
    """Without a mask function transformers silently passes None, and padding is attended."""
    assert AttentionInterface._global_mapping["commvq"] is attention.commvq_attention
    assert AttentionMaskInterface._global_mapping["commvq"] is sdpa_mask


def test_rows_that_see_nothing_give_zeros_not_nan():
    harness = Harness()
    harness.step(150, seed=1)
    mask = padded(2, 152)
    mask[1] = False
    out, *_ = harness.step(2, mask, seed=2)
    assert torch.isfinite(out).all() and (out[1] == 0).all() and out[0].abs().sum() > 0
