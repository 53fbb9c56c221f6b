"""The Triton kernels over index codes in Triton's interpreter, against the reference; run by test_triton.py."""

import pytest
import torch
from books import track
from definition import check_attention
from triton_interpreted import poisoned  # noqa: F401  (a fixture: torch.empty full of NaN)

from transformers_commvq import LayerBook
from transformers_commvq.index_book import ENTRIES, IndexBook, JointBinaryBook
from transformers_commvq.ops import attention_triton_index as index_module
from transformers_commvq.ops import encode, gpu
from transformers_commvq.ops.attention_triton_index import attention_index, supports
from transformers_commvq.ops.past import CodedPast
from transformers_commvq.ops.triton_tables import BLOCK, rotations
from transformers_commvq.packing import pack_indices, with_scale
from transformers_commvq.positions import PositionTrack
from transformers_commvq.rope import Rope, angles


def index_past(batch=1, tokens=100, heads=2, dim=32, stages=3, bits=40, starts=(0,), hidden=None):
    """Random books and codes; values are encoded, so that some tokens may have no bit set."""
    g = torch.Generator().manual_seed(0)
    keys = IndexBook(torch.randn(stages, heads, ENTRIES, dim, generator=g) / dim**0.5)
    width = heads * dim
    shapes = ((bits, width), (width,), (width,), (width,), (24, width), (24,), (2 * bits, 24), (2 * bits,))
    tensors = [torch.randn(shape, generator=g) / shape[-1] ** 0.5 for shape in shapes]
    tensors[1] = torch.rand(width, generator=g) + 0.5
    values = JointBinaryBook(*tensors, heads=heads)
    indices = torch.randint(ENTRIES, (batch, tokens, heads, stages, 2), generator=g)
    key_codes = with_scale(pack_indices(indices), torch.rand(batch, tokens, generator=g) * 6)
    value_codes = encode(torch.randn(batch, heads, tokens, dim, generator=g), values)
    hidden = None if hidden is None else torch.tensor(hidden)
    positions = track(tokens, dim // 2, starts=starts)
    return CodedPast(key_codes, value_codes, LayerBook(keys, values), Rope("half", dim), positions, hidden)


def check(past, group, queries, **kwargs):
    check_attention(supported, past, group, queries, 2e-3, **kwargs)


def supported(query, past, *args):
    assert supports(query, past)
    return attention_index(query, past, *args)


CASES = {
    "one token": (dict(tokens=1), 1, 1),
    "one token past a block, odd number of codes": (dict(tokens=BLOCK + 1, heads=1), 1, 1),
    "rows of the batch": (dict(batch=3, tokens=37, heads=3, stages=1), 2, 1),
    "head_dim 128, as published at 1 bit": (dict(tokens=70, dim=128, stages=11, bits=256), 4, 1),
    "head_dim 80": (dict(tokens=40, dim=80, heads=1), 1, 1),
    "more queries than a tile": (dict(tokens=75), 3, 7),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_attention_agrees_with_the_reference(case):
    settings, group, queries = CASES[case]
    check(index_past(**settings), group, queries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries(dtype):
    check(index_past(), 2, 2, dtype=dtype)


def test_spans_of_tokens_and_slices_of_queries_are_put_together(monkeypatch):
    monkeypatch.setattr(index_module, "SCORES", BLOCK * 8)  # one block at a time
    monkeypatch.setattr(index_module, "SHARE", 64)
    check(index_past(tokens=2 * BLOCK + 9, hidden=[[BLOCK - 3, BLOCK + 2]]), 1, 3)


def test_masks_sinks_and_padding():
    past = index_past(batch=2, tokens=160, starts=(0, -17), hidden=[[0, 4], [17, 21]])
    mask = torch.ones(2, 1, 1, 160, dtype=torch.bool)
    mask[1, ..., :17] = False
    assert rotations(past, 16).index is not None  # positions are not consecutive in the padding
    check(past, 2, 1, mask=mask)
    additive = torch.randn(2, 1, 3, 160).masked_fill(~mask, -torch.inf)
    check(past, 1, 3, mask=additive, softcap=2.0, spread=4.0)


def test_nothing_visible():
    mask = torch.ones(1, 1, 2, 20, dtype=torch.bool)
    mask[:, :, 1] = False
    check(index_past(tokens=20), 1, 2, mask=mask)


def test_frequencies_that_change():
    past = index_past(tokens=140)
    cos, sin = angles(torch.arange(140)[None] * 1.1, past.positions.inv_freq)
    past.positions = PositionTrack(past.positions.inv_freq, 1.0, fixed=False)
    past.positions.extend(0, None, cos, sin)
    check(past, 2, 1)


def test_codes_that_are_views():
    past = index_past(tokens=90)
    past.keys, past.values = (torch.cat([t, t.flip(1)], 1)[:, :90] for t in (past.keys, past.values))
    check(past, 2, 1)


def test_what_the_kernels_cannot_do_is_known():
    past = index_past(tokens=8)
    assert not supports(torch.zeros(1, 2, 1, 32, dtype=torch.float64), past)
    past.rope = Rope("half", 16)  # codes commute with the rotation of whole heads
    assert not supports(torch.zeros(1, 2, 1, 32), past)


def test_self_check_passes_and_notices_a_wrong_kernel(monkeypatch):
    device = torch.device("cpu")
    gpu.self_check.cache_clear()
    assert gpu.self_check(device, "index") is None
    monkeypatch.setattr(index_module, "attention_index", lambda *a: (attention_index(*a)[0] * 1.01, None))
    gpu.self_check.cache_clear()
    assert "off by" in gpu.self_check(device, "index")
    gpu.self_check.cache_clear()
