"""Every attention backend against the definition, written out here once more in float64."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from books import coded_past
from definition import definition

from transformers_commvq import ConfigError
from transformers_commvq.ops import BACKENDS, attention, attention_exact, backend, jit, merge, merged_attention
from transformers_commvq.rope import Rope

# Largest error of out, relative, and of lse. The jit backend's tables are int16: finer than float16 keys, not float32.
TOLERANCE = {"reference": 1e-5, "blockwise": 1e-5, "jit": 1e-3, "triton": 2e-3}


def assert_agrees(name, got, want):
    bound = TOLERANCE[name]
    seen = want[1] > -torch.inf
    assert torch.equal(got[1] > -torch.inf, seen)
    assert not got[0][~seen].any()
    assert ((got[1].double() - want[1])[seen].abs() < 2 * bound).all()
    assert (got[0].double() - want[0]).norm() <= bound * want[0].norm()


CASES = {
    "one": dict(),
    "odd lengths": dict(tokens=1, key_bits=(8, 8), value_bits=(8, 8)),
    "many blocks": dict(tokens=2500),
    "batch": dict(batch=3, tokens=37),
    "left padding": dict(batch=2, tokens=50, starts=(0, -17), hidden=[[0, 4], [17, 21]]),
    "sinks across blocks": dict(batch=2, tokens=1100, hidden=[[1022, 1026], [0, 4]]),
    "interleaved": dict(rope=Rope("interleaved", 16)),
    "partial": dict(rope=Rope("half", 8), dim=24),
    "partial interleaved": dict(rope=Rope("interleaved", 6), dim=20),
    "wide heads": dict(dim=64, key_bits=(104, 8, 56), value_bits=(64, 136, 16)),
    "gap in positions": dict(batch=2, tokens=40, starts=(0, -9)),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
@pytest.mark.parametrize("group, queries, softcap", [(1, 1, None), (3, 1, None), (2, 5, None), (2, 3, 2.0)])
def test_backends_agree_with_the_definition(name, case, group, queries, softcap):
    past = coded_past(**CASES[case])
    batch = past.keys.shape[0]
    g = torch.Generator().manual_seed(5)
    query = torch.randn(batch, past.heads * group, queries, past.book.keys.head_dim, generator=g)
    for mask in (None, torch.rand(batch, 1, queries, past.length + 7, generator=g) > 0.3):
        want = definition(query, past, mask, 0.3, softcap)
        with backend(name):
            got = attention(query, past, mask, 0.3, softcap)
        assert_agrees(name, got, want)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries(name, dtype):
    past = coded_past(tokens=300)
    query = torch.randn(1, 4, 2, 16).to(dtype)
    want, _ = definition(query, past, None, 0.25)
    with backend(name):
        out, lse = attention(query, past, None, 0.25)
    assert out.dtype == lse.dtype == torch.float32
    assert (out.double() - want).norm() / want.norm() < 2e-3


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_visible_gives_zeros_and_minus_infinity(name):
    past = coded_past(tokens=20)
    mask = torch.zeros(1, 1, 1, 20, dtype=torch.bool)
    with backend(name):
        out, lse = attention(torch.randn(1, 2, 1, 16), past, mask, 0.25)
    assert (lse == -torch.inf).all() and not out.isnan().any()


@pytest.mark.parametrize("name", BACKENDS)
def test_additive_mask_is_added(name):
    past = coded_past(tokens=30)
    query, bias = torch.randn(1, 2, 2, 16), torch.randn(1, 1, 2, 30)
    want = definition(query, past, bias.double(), 0.25)
    with backend(name):
        got = attention(query, past, bias, 0.25)
    assert_agrees(name, got, want)


def test_many_queries_are_split_without_a_seam():
    past = coded_past(tokens=64)
    query = torch.randn(1, 2, 1200, 16)
    mask = torch.rand(1, 1, 1200, 64) > 0.4
    whole, _ = attention(query, past, mask, 0.25)
    torch.testing.assert_close(whole[:, :, 1100:], attention(query[:, :, 1100:], past, mask[:, :, 1100:], 0.25)[0])


def test_merge_of_parts_is_the_whole():
    query, keys, values = torch.randn(2, 6, 3, 8), torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)
    bias = torch.zeros(2, 1, 3, 40).masked_fill_(torch.rand(2, 1, 3, 40) > 0.6, -torch.inf)
    bias[0, :, 0, :25] = -torch.inf  # one row sees nothing of the first part
    whole = attention_exact(query, keys, values, bias, 0.35)
    parts = [
        attention_exact(query, keys[:, :, s], values[:, :, s], bias[..., s], 0.35) for s in (slice(25), slice(25, 40))
    ]
    for got, want in zip(merge(*parts[0], *parts[1]), whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="blockwise"), backend("cuda"):
        pass


def test_forced_backend_ends_with_its_block():
    from transformers_commvq.ops import choose_backend

    past = coded_past()
    with backend("reference"):
        assert choose_backend(torch.zeros(1), past) == "reference"
    assert choose_backend(torch.zeros(1), past) == ("jit" if "jit" in BACKENDS else "blockwise")


@pytest.mark.skipif("jit" not in BACKENDS, reason="needs numba")
@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_compiled_loops_give_the_same_whatever_the_threads(threads, openmp, monkeypatch):
    """Threads claim tasks as they come; the OpenMP runtime of torch or, where there is none, Python's threads."""
    past, before = coded_past(batch=2, tokens=2700, starts=(0, -9)), torch.get_num_threads()
    query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(5))
    keys, values = torch.randn(2, 2, 2, 21, 16, generator=torch.Generator().manual_seed(6))
    want = merge(*attention_exact(query, keys, values, None, 0.25), *definition(query, past, None, 0.25))
    if not openmp:
        monkeypatch.setattr(jit, "_openmp", lambda: None)

    def attend(_):
        return merged_attention(query, [(keys, values)], None, past, None, 0.25)

    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(3) as pool:  # several users of one model at once
            results = list(pool.map(attend, range(12)))
    finally:
        torch.set_num_threads(before)
    for got in results:
        assert_agrees("jit", got, want)


def test_a_copied_past_prepares_its_own():
    """What a backend prepared may be views of the codes; a copy must not read those of the original."""
    past = coded_past(tokens=60)
    query = torch.randn(1, 2, 1, 16)
    for name in BACKENDS:
        with backend(name):
            attention(query, past, None, 0.25)
    twin = copy.deepcopy(past)
    assert not twin.prepared
    twin.keys.bitwise_not_()
    want = definition(query, twin, None, 0.25)
    for name in BACKENDS:
        with backend(name):
            assert_agrees(name, attention(query, twin, None, 0.25), want)
