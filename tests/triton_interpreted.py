"""The Triton kernels in Triton's interpreter, against the reference; run by test_triton.py in a process of its own."""

import copy
from dataclasses import dataclass

import pytest
import torch
from books import coded_past, sign_book, track
from definition import check_attention, definition

from transformers_commvq.ops import attention_triton as attention_module
from transformers_commvq.ops import decode, triton_signs
from transformers_commvq.ops import encode_triton as encode_module
from transformers_commvq.ops.attention_reference import attention_reference
from transformers_commvq.ops.attention_triton import attention_triton, split_plan, supports
from transformers_commvq.ops.encode import encode_signs
from transformers_commvq.ops.encode_triton import encode_signs_triton
from transformers_commvq.ops.merge import merge
from transformers_commvq.ops.past import CodedPast
from transformers_commvq.ops.triton_tables import BLOCK, layer_tables, rotations
from transformers_commvq.packing import CodeLayout, pack
from transformers_commvq.positions import PositionTrack
from transformers_commvq.rope import Rope, angles

TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty full of NaN: a kernel that leaves a hole in its output, or reads one, is found out."""
    empty = torch.empty

    def fill(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(77)

    monkeypatch.setattr(torch, "empty", fill)


def check(past, group, queries, dtype=torch.float32, **kwargs):
    check_attention(supported, past, group, queries, TOLERANCE[dtype], dtype, **kwargs)


def supported(query, past, *args):
    assert supports(query, past)
    return attention_triton(query, past, *args)


CASES = {
    "one token, byte codes": (dict(tokens=1, key_bits=(8, 8), value_bits=(8, 8)), 1, 1),
    "several splits": (dict(tokens=3 * BLOCK + 5), 3, 1),
    "one token past a block": (dict(tokens=BLOCK + 1), 1, 1),
    "rows of the batch": (dict(batch=3, tokens=37), 2, 1),
    "head_dim 64, uneven bits": (
        dict(dim=64, rope=Rope("half", 64), key_bits=(104, 8, 56), value_bits=(64, 136, 16)),
        4,
        1,
    ),
    "head_dim 96, three chunks": (dict(tokens=40, dim=96, key_bits=(72,), value_bits=(288,)), 16, 1),
    "head_dim 256, wide chunks": (dict(tokens=40, dim=256, key_bits=(264,), value_bits=(520,)), 1, 1),
    "interleaved pairs": (dict(rope=Rope("interleaved", 16)), 2, 1),
    "partial rotary": (dict(rope=Rope("half", 8), dim=24), 2, 1),
    "partial rotary, interleaved": (dict(rope=Rope("interleaved", 6), dim=20), 2, 1),
    "few queries": (dict(tokens=75), 2, 5),
    "a tile of 64 rows and a rest": (dict(tokens=75, key_bits=(24,), value_bits=(32,)), 3, 23),
    "tiles of 32 rows": (dict(tokens=40, key_bits=(24,), value_bits=(136,)), 4, 9),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_attention_agrees_with_the_reference(case):
    settings, group, queries = CASES[case]
    check(coded_past(**settings), group, queries)


@dataclass
class Point:
    """One point of the grid: head_dim, query heads of a KV head, and what else comes with it.

    padding: a batch of two rows, the second with so many tokens of padding on the left, whose sinks are hidden.
    window: each query sees so many tokens before it. sink_logits: one more logit in every softmax.
    """

    dim: int
    ratio: int
    bits: tuple[int, ...] = (64,)
    queries: int = 1
    tokens: int = 70
    padding: int = 0
    window: int | None = None
    softcap: float | None = None
    sink_logits: bool = False


GRID = [
    Point(64, 1, bits=(64, 40)),
    Point(64, 16, bits=(128,), softcap=3.0),
    Point(64, 4, queries=7, padding=9, window=30),
    Point(80, 8, padding=17, window=25, softcap=2.0),
    Point(96, 2, bits=(96, 192), sink_logits=True),
    Point(128, 4, bits=(128,), padding=5, sink_logits=True),
    Point(128, 16, bits=(256,), tokens=BLOCK + 20, window=100),
    Point(128, 2, bits=(104,), queries=9, softcap=4.0, sink_logits=True),
    Point(192, 8, bits=(192,), tokens=40, padding=3, softcap=5.0),
    Point(256, 1, bits=(256,), tokens=40, window=12, sink_logits=True),
    Point(256, 16, bits=(136,), tokens=40, padding=6, window=20, softcap=2.0, sink_logits=True),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("point", GRID, ids=lambda p: f"head_dim {p.dim}, ratio {p.ratio}")
def test_every_point_of_the_grid_agrees_with_float64(point, dtype):
    """Relative error at most 2e-3 for float16 queries, 1e-2 for bfloat16."""
    batch = 2 if point.padding else 1
    hidden = [[0, 4], [point.padding, point.padding + 4]] if point.padding else None
    past = coded_past(
        batch, point.tokens, point.bits, point.bits[::-1], point.dim, starts=(0, -point.padding)[:batch], hidden=hidden
    )
    g = torch.Generator().manual_seed(8)
    query = torch.randn(batch, past.heads * point.ratio, point.queries, point.dim, generator=g).to(dtype)
    token, newest = torch.arange(point.tokens), point.tokens + torch.arange(point.queries)
    mask = torch.ones(batch, 1, point.queries, point.tokens, dtype=torch.bool)
    if point.padding:
        mask[1, ..., : point.padding] = False
    if point.window:
        mask &= token > newest[:, None] - point.window
    mask = mask if point.padding or point.window else None
    logits = torch.randn(query.shape[1], generator=g) + 2 if point.sink_logits else None
    want, want_lse = definition(query, past, mask, point.dim**-0.5, point.softcap, logits)

    out, lse = attention_triton(query, past, mask, point.dim**-0.5, point.softcap)
    if logits is not None:
        out, lse = merge(out, lse, torch.zeros_like(out), logits[None, :, None].expand_as(lse))
    assert (out.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
    assert (lse.double() - want_lse).abs().max() <= 2 * TOLERANCE[dtype]


def test_sinks_are_hidden_in_each_row_by_its_own_range():
    past = coded_past(batch=2, tokens=BLOCK + 30, hidden=[[BLOCK - 2, BLOCK + 2], [0, 4]])
    check(past, 2, 1)
    check(past, 1, 3)


@pytest.mark.parametrize("form", ["bool", "float32", "float16", "one row for all", "a head each"])
def test_masks(form):
    past = coded_past(batch=2, tokens=70)
    g = torch.Generator().manual_seed(6)
    mask = torch.rand(2, 1, 3, 77, generator=g) > 0.4
    if form.startswith("float"):
        mask = torch.randn(mask.shape, generator=g).masked_fill_(~mask, -torch.inf).to(getattr(torch, form))
    elif form == "one row for all":
        mask = mask[:1, :, :1]
    elif form == "a head each":
        mask = torch.rand(2, 4, 3, 77, generator=g) > 0.4
    check(past, 2, 3, mask=mask)


def test_left_padding_with_sinks():
    past = coded_past(batch=2, tokens=160, starts=(0, -17), hidden=[[0, 4], [17, 21]])
    mask = torch.ones(2, 1, 1, 160, dtype=torch.bool)
    mask[1, ..., :17] = False
    assert rotations(past, 16).index is not None  # positions are not consecutive in the padding
    check(past, 2, 1, mask=mask)


def test_softcap():
    check(coded_past(), 2, 1, softcap=2.0, spread=8.0)


def test_nothing_visible():
    past = coded_past(tokens=20)
    mask = torch.ones(1, 1, 2, 20, dtype=torch.bool)
    mask[:, :, 1] = False
    check(past, 1, 2, mask=mask)


@pytest.mark.parametrize("step", [1, 1000])
def test_gaps_in_positions(step):
    past = coded_past(tokens=140)
    past.positions = track(70, 8, starts=(3,))
    more = torch.arange(70)[None] * step + 90
    past.positions.extend(70, more, *angles(more, past.positions.inv_freq))
    check(past, 2, 1)
    turn = rotations(past, 16)
    assert turn.index is not None and (turn.start_cos is None) == (step == 1000)  # too far apart for a block's table


def test_frequencies_that_change():
    past = coded_past(tokens=140)
    cos, sin = past.positions.tables(0, 140, torch.device("cpu"))
    past.positions = PositionTrack(past.positions.inv_freq, 1.0, fixed=False)
    past.positions.extend(0, None, cos * 1.1, sin * 1.1)
    check(past, 2, 1)


def test_attention_scaling_of_rope_leaves_the_unrotated_part_alone():
    past = coded_past(rope=Rope("half", 8), dim=16)
    past.positions = track(100, 4, scaling=1.3)
    check(past, 1, 1)


def test_rotations_follow_a_cache_that_grows_is_cut_and_reordered():
    whole = coded_past(batch=2, tokens=300, starts=(0, -9))

    def at(length):
        keys, values = whole.keys[:, :length], whole.values[:, :length]  # views of a larger buffer
        return CodedPast(keys, values, whole.book, whole.rope, positions)

    positions = copy.deepcopy(whole.positions)
    positions.crop(100)
    check(at(100), 1, 1)
    more = whole.positions.positions[:, 100:]
    positions.extend(100, more, *whole.positions.tables(100, 300, torch.device("cpu")))
    check(at(300), 1, 1)
    positions.select_rows(torch.tensor([1, 0]))
    check(at(300), 1, 1)
    positions.crop(150)
    other = whole.positions.positions[:, 150:] + 7
    positions.extend(150, other, *angles(other, positions.inv_freq))
    check(at(300), 1, 1)


def test_codes_and_queries_that_are_views():
    past = coded_past(batch=2, tokens=90)
    past.keys = torch.cat([past.keys, past.keys.flip(1)], 1)[:, :90]
    past.values = torch.cat([past.values, past.values.flip(1)], 1)[:, :90]
    query = torch.randn(2, 3, 4, 16).transpose(1, 2)
    want, _ = attention_reference(query, past, None, 0.25)
    out, _ = attention_triton(query, past, None, 0.25)
    assert (out - want).norm() <= 2e-3 * want.norm()


def test_codebook_rows_lie_in_the_order_of_unpacked_signs():
    """Against unpack, which owns the byte layout: a wrong permutation shared by kernel and tables would show here."""
    layout = CodeLayout((40, 8))
    signs = torch.randn(1, 2, 5, 40, generator=torch.Generator().manual_seed(1)).sign()
    codes = pack(signs, layout)
    words = torch.nn.functional.pad(codes[0, :, :5], (0, 3)).contiguous().view(torch.int32)
    order = triton_signs.COLUMN_ORDER
    for word in range(2):
        for bit in order:
            sign = torch.where((words[:, word] >> bit) & 1 == 1, -1.0, 1.0)
            if 32 * word + bit < 40:
                assert torch.equal(sign, signs[0, 0, :, 32 * word + bit])
    past = coded_past(tokens=3)
    tables = layer_tables(past.book, past.rope)
    assert torch.equal(tables.keys[2, 0, :8], past.book.keys.vectors[order[2], :8])


def test_splits_cover_every_token_once():
    for length in (1, 127, 128, 129, 5000, 131072):
        for programs in (1, 8, 64, 4096):
            splits, span = split_plan(length, programs, torch.device("cpu"))
            assert span % BLOCK == 0 and (splits - 1) * span < length <= splits * span


def test_what_the_kernels_cannot_do_is_known():
    past = coded_past(tokens=8)
    assert not supports(torch.zeros(1, 2, 1, 16, dtype=torch.float64), past)
    wide = coded_past(tokens=8, key_bits=(8,), value_bits=(1032,))
    assert not supports(torch.zeros(1, 1, 1, 16), wide)


@pytest.mark.parametrize(
    "bits, metric, batch, tokens",
    [((24, 40), True, 1, 70), ((8, 72), False, 3, 7)],
    ids=["metric", "plain"],
)
def test_encoder_gives_the_codes_of_the_reference(bits, metric, batch, tokens):
    book = sign_book(bits, 16, metric=metric)
    x = torch.randn(batch, len(bits), tokens, 16, generator=torch.Generator().manual_seed(2)) * 1.3
    want, got = encode_signs(x, book), encode_signs_triton(x, book)
    assert (want == got).float().mean() > 0.99  # ties may fall either way
    errors = [(decode(c, book) - x).norm() for c in (want, got)]
    assert abs(errors[0] - errors[1]) <= 1e-3 * errors[0]


@pytest.fixture
def fresh_checks():
    from transformers_commvq.ops import gpu

    checks = (gpu.self_check, gpu.encoder_check, gpu.warn_once)
    for function in checks:
        function.cache_clear()
    yield gpu
    for function in checks:
        function.cache_clear()


CHECKS = {
    "self_check": ("attention_triton", lambda right: lambda *a: (right(*a)[0] * 1.01, None)),
    "encoder_check": ("encode_signs_triton", lambda right: lambda *a: encode_signs(*a) ^ 1),
}


@pytest.mark.parametrize("name", CHECKS)
def test_self_checks_pass_and_notice_a_wrong_kernel(name, fresh_checks, monkeypatch):
    """What a GPU's first use goes through, here on the interpreter's device."""
    check, (kernel, spoil) = getattr(fresh_checks, name), CHECKS[name]
    module = attention_module if name == "self_check" else encode_module
    assert check(torch.device("cpu")) is None
    monkeypatch.setattr(module, kernel, spoil(getattr(module, kernel)))
    check.cache_clear()
    assert "off by" in check(torch.device("cpu"))
    monkeypatch.setattr(module, kernel, lambda *a: 1 / 0)
    check.cache_clear()
    assert "do not run" in check(torch.device("cpu"))


def test_encoding_on_a_gpu_takes_the_kernels_or_says_why_not(fresh_checks, monkeypatch):
    book = sign_book((24, 40), 16)
    x = torch.randn(1, 2, 9, 16)
    coded = []
    monkeypatch.setattr(encode_module, "encode_signs_triton", lambda *a: coded.append(a) or "codes of the kernels")
    monkeypatch.setattr(fresh_checks, "encoder_check", lambda device: None)
    assert fresh_checks.encode_gpu(x, book) == "codes of the kernels" and coded == [(x, book)]
    monkeypatch.setattr(fresh_checks, "encoder_check", lambda device: "it is broken")
    with pytest.warns(UserWarning, match="encoding runs in plain torch.*it is broken"):
        plain = fresh_checks.encode_gpu(x, book)
    assert torch.equal(plain, encode_signs(x, book)) and len(coded) == 1
