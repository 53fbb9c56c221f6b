import itertools
from unittest import mock

import pytest
import torch
from books import sign_book

from transformers_commvq import CodebookFormatError
from transformers_commvq.ops import decode, encode, gpu, jit, kind_of
from transformers_commvq.ops.encode import choose_signs, encode_signs
from transformers_commvq.ops.sign_groups import coupled_orders, gram_of, held_bytes


def error(x, codes, book):
    """Mean squared error in the book's metric, (batch, heads, tokens)."""
    e = x.float() - decode(codes, book)
    m = torch.eye(e.shape[-1]) if book.metric is None else book.metric.float()[:, None]
    return (e.unsqueeze(-2) @ m @ e.unsqueeze(-1))[..., 0, 0]


def alike(gram, met):
    """One head's groups of four rows that are alike, no two of which are in ``met`` if it can be helped."""
    free, groups = list(range(len(gram))), []
    while free:
        group = [free.pop(0)]
        while len(group) < 4:
            total = {r: sum(0 if {r, m} in met else abs(float(gram[m, r])) for m in group) for r in free}
            group.append(max(free, key=total.get))
            free.remove(group[-1])
        groups.append(group)
    return groups


def plain_encode(x, book):
    """The same algorithm as a loop over tokens, heads and groups of signs, each group by exhaustion."""
    out = torch.zeros(*x.shape[:3], book.layout.max_bits)
    rows, start = [], 0
    for n in book.layout.bits:
        rows.append(book.vectors[start : start + n].float())
        start += n
    for b, h, t in itertools.product(*map(range, x.shape[:3])):
        c = rows[h]
        m = torch.eye(x.shape[-1]) if book.metric is None else book.metric[h].float()
        target, s = x[b, h, t] - book.mean[h], torch.zeros(len(c))
        own = [list(range(a, a + 4)) for a in range(0, len(c), 4)]
        once = alike(c @ m @ c.T, [])
        again = alike(c @ m @ c.T, [set(pair) for group in once for pair in itertools.combinations(group, 2)])
        for group in [*own, *own, *once, *again, *once, *again]:
            best = None
            for p in itertools.product((1.0, -1.0), repeat=4):
                trial = s.clone()
                trial[group] = torch.tensor(p)
                e = target - trial @ c
                loss = float(e @ m @ e)
                best = min(best or (loss, trial), (loss, trial), key=lambda v: v[0])
            s = best[1]
        out[b, h, t, : len(c)] = s
    return out


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("bits", [(8,), (16, 8), (8, 24, 8)])
def test_equals_the_plain_loop(bits, metric):
    book = sign_book(bits, 8, seed=1, metric=metric)
    if metric:
        book.metric = (book.metric + book.metric.transpose(1, 2)) / 2
    x = torch.randn(2, len(bits), 3, 8, generator=torch.Generator().manual_seed(2)) + book.mean[:, None]
    from transformers_commvq.packing import pack

    want = error(x, pack(plain_encode(x, book), book.layout), book)
    torch.testing.assert_close(error(x, encode(x, book), book), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (3, 130), (5, 7)])
def test_no_single_flip_helps_much(shape, dtype):
    """Coordinate descent ends near a local minimum, whatever the batch, length, dtype and chunking."""
    book = sign_book((24, 40), 16, metric=True)
    x = (torch.randn(shape[0], 2, shape[1], 16) + book.mean[:, None]).to(dtype)
    codes = encode(x, book)
    assert codes.shape == (*shape, 8) and codes.dtype == torch.uint8
    base = error(x, codes, book)
    worse = torch.zeros_like(base)
    for byte, bit in itertools.product(range(8), range(8)):
        flipped = codes.clone()
        flipped[..., byte] ^= 1 << bit
        worse = torch.maximum(worse, base - error(x, flipped, book))
    assert (worse > 1e-3 * base).float().mean() < 0.1  # three sweeps leave few tokens with a flip to gain
    assert worse.mean() < 0.02 * base.mean()


def test_chunks_do_not_change_codes():
    book = sign_book((16, 32), 16)
    x = torch.randn(1, 2, 600, 16)
    assert torch.equal(encode(x, book)[:, 500:], encode(x[:, :, 500:], book))


def test_rows_do_not_change_each_other():
    book = sign_book((16, 32), 16)
    x = torch.randn(4, 2, 50, 16)
    assert torch.equal(encode(x, book)[2:3], encode(x[2:3], book))


def test_codes_beat_chance_and_more_bits_beat_fewer():
    x = torch.randn(1, 1, 500, 16)
    losses = []
    for bits in (8, 16, 32, 64):
        book = sign_book((bits,), 16)
        book.mean.zero_()
        losses.append(float(error(x, encode(x, book), book).mean() / x.square().sum(-1).mean()))
    assert losses == sorted(losses, reverse=True) and losses[0] < 0.85 and losses[-1] < 0.1


def test_warm_start_never_loses():
    torch.manual_seed(0)
    c = torch.randn(1, 24, 12)
    y = torch.randn(1, 200, 12)
    gram = c @ c.transpose(1, 2)
    start = torch.randn(1, 200, 24).sign()
    before = ((y - start @ c) ** 2).sum(-1)
    orders = [None, torch.randperm(24)[None]]
    after = ((y - choose_signs((y - start @ c) @ c.transpose(1, 2), gram, orders, start.clone()) @ c) ** 2).sum(-1)
    assert (after <= before + 1e-4).all() and after.mean() < before.mean()


def test_groups_are_made_of_rows_that_are_alike():
    """Of 16 directions with four rows each, every direction's rows are a group; then others meet."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(64, generator=generator)
    direction = (places % 16).tolist()
    rows = torch.eye(16)[direction] * (1 + places // 16)[:, None] + 0.01 * torch.randn(64, 16, generator=generator)
    once, again, third = coupled_orders((rows @ rows.T)[None], (64,), 3)
    for group in once.view(-1, 4).tolist():
        assert len({direction[row] for row in group}) == 1
    met = set()
    for order in (once, again, third):
        assert sorted(order.flatten().tolist()) == list(range(64))
        pairs = {pair for group in order.view(-1, 4).tolist() for pair in itertools.permutations(group, 2)}
        assert len(pairs & met) <= 0.1 * len(pairs)  # the last group takes the rows that are left
        met |= pairs


@pytest.mark.parametrize("metric", [False, True])
def test_groups_keep_to_a_heads_own_rows(metric):
    book = sign_book((8, 104, 40), 16, metric=metric)
    for order in coupled_orders(gram_of(book)[1], book.layout.bits, 2):
        for n, rows in zip(book.layout.bits, order.tolist(), strict=True):
            assert sorted(rows[:n]) == list(range(n)) and rows[n:] == list(range(n, 104))


def test_passes_over_like_rows_lower_the_error():
    """Rows as EM leaves them, many to a direction: here the multiples 1, 2, 4 and 8 of noisy directions."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 1, 16, generator=generator) * torch.tensor([8.0, 4, 2, 1])[:, None]
    rows = (rows + 0.2 * torch.randn(24, 4, 16, generator=generator)).view(96, 16)
    book = sign_book((96,), 16)
    book.vectors = rows[rows.norm(dim=1).argsort(descending=True)].half()
    x = 20 * torch.randn(1, 1, 500, 16, generator=generator)
    rough, fine = (error(x, encode_signs(x, book, rough), book).mean() for rough in (True, False))
    assert fine < 0.8 * rough
    assert held_bytes(book) == 2 * 96 * 2  # two orders of int16


def test_unknown_kind_is_refused():
    book = sign_book((8,), 8)
    book.kind = "rvq"
    with pytest.raises(CodebookFormatError, match="rvq"):
        kind_of(book)


@pytest.mark.parametrize("metric", [False, True])
def test_compiled_and_plain_encoders_agree(metric, monkeypatch):
    """With and without numba: the same bytes, but where two choices tie to rounding."""
    book = sign_book((16, 40, 104), 32, metric=metric)
    x = torch.randn(2, 3, 90, 32) + book.mean[:, None]
    assert jit.available(), "the test environment installs numba"
    compiled = encode(x, book)
    monkeypatch.setattr(jit, "available", lambda: False)
    plain = encode(x, book)
    assert (compiled == plain).float().mean() > 0.995
    torch.testing.assert_close(error(x, compiled, book).mean(), error(x, plain, book).mean(), rtol=1e-4, atol=0)


def test_tensors_on_a_gpu_go_to_the_gpu_encoder(monkeypatch):
    """No GPU is needed to see which way they take; tests/triton_interpreted.py shows what happens there."""
    book, x = sign_book((8,), 8), mock.Mock(device=torch.device("cuda"))
    monkeypatch.setattr(gpu, "encode_gpu", lambda *args: args)
    assert encode(x, book) == (x, book)
