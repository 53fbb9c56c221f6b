"""Random sequences of cache operations against a plain model of the cache: full tensors and nothing clever."""

import copy

import torch
from generation import tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossless import lossless_codebook

from transformers_commvq import CommVQCache, CommVQConfig
from transformers_commvq.geometry import read_model
from transformers_commvq.layer import FLUSH, Call, current

HEADS, DIM = 2, 16
MODEL = tiny_llama()
READING, BOOK = read_model(MODEL), lossless_codebook(MODEL)
ROTARY = MODEL.model.rotary_emb


class Plain:
    """What the cache must hold: keys after RoPE, values, padding and positions of every token."""

    def __init__(self, rows):
        self.keys = [torch.zeros(rows, HEADS, 0, DIM) for _ in range(2)]
        self.values = [torch.zeros(rows, HEADS, 0, DIM) for _ in range(2)]
        self.real = torch.zeros(rows, 0, dtype=torch.bool)

    @property
    def rows(self):
        return self.real.shape[0]

    def __len__(self):
        return self.real.shape[1]

    def change(self, function):
        self.keys, self.values = ([function(t) for t in held] for held in (self.keys, self.values))
        self.real = function(self.real)

    def crop(self, count):
        keep = max(len(self) - count, 0)
        self.keys, self.values = ([t[:, :, :keep] for t in held] for held in (self.keys, self.values))
        self.real = self.real[:, :keep]


class Machine:
    """A cache and its plain twin, kept in step."""

    def __init__(self, rows, sinks, window):
        config = CommVQConfig(sink_tokens=sinks, residual_length=window)
        self.cache, self.plain, self.seed = CommVQCache(READING, BOOK, config, MODEL.config), Plain(rows), 0
        self.earlier = None  # a deepcopy, and what it must still hold at the end

    def update(self, new, pads, fused):
        plain = self.plain
        rows, past = plain.rows, len(plain)
        self.seed += 1
        g = torch.Generator().manual_seed(self.seed)
        # Padding comes before everything else of a row.
        real = torch.arange(new) >= torch.tensor([[pads if r % 2 else 0] for r in range(rows)])
        real |= plain.real.any(1, keepdim=True)
        plain.real = torch.cat([plain.real, real], 1)
        positions = (plain.real.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        cos, sin = ROTARY(torch.zeros(rows, new, 1), positions)
        mask = plain.real[:, None, None, :].expand(rows, 1, new, -1)
        for i, layer in enumerate(self.cache.layers):
            k, v = (torch.randn(rows, HEADS, new, DIM, generator=g) for _ in range(2))
            compact = (READING.rope.compact(t) for t in (cos, sin))
            current.call = Call(None, layer, *compact, positions, mask, fused)
            keys, values = layer.update(k, v)
            current.call = None
            plain.keys[i] = torch.cat([plain.keys[i], k], 2)
            plain.values[i] = torch.cat([plain.values[i], v], 2)
            if fused:
                assert keys is k and values is v
                layer.append(keys, values, mask)
            else:
                self.compare((keys, values), i)

    def compare(self, got, i):
        for have, want in zip(got, (self.plain.keys[i], self.plain.values[i]), strict=True):
            torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)

    def apply(self, name, draw):
        cache, plain = self.cache, self.plain
        if name == "update":
            self.update(*draw)
        elif name == "crop":
            cache.crop(-draw)
            plain.crop(draw)
        elif name == "reorder":
            index = torch.tensor([draw(r) % plain.rows for r in range(plain.rows)])
            cache.reorder_cache(index)
            plain.change(lambda t: t[index])
        elif name == "repeat" and plain.rows * draw <= 6:
            cache.batch_repeat_interleave(draw)
            plain.change(lambda t: t.repeat_interleave(draw, 0))
        elif name == "select":
            index = torch.tensor([r for r in range(plain.rows) if draw(r) % 2] or [0])
            cache.batch_select_indices(index)
            plain.change(lambda t: t[index])
        elif name == "reset":
            cache.reset()
            self.plain = Plain(plain.rows)
        elif name == "deepcopy":
            self.earlier = cache, copy.deepcopy(plain)
            self.cache = copy.deepcopy(cache)
        elif name == "offload":
            for layer in cache.layers:
                layer.offload()
                layer.prefetch()

    def check(self):
        cache, plain = self.cache, self.plain
        assert cache.get_seq_length() == len(plain) == len(cache.positions)
        for i, layer in enumerate(cache.layers):
            if not layer.is_initialized:
                assert len(plain) == 0
                continue
            assert layer.batch_size == plain.rows and layer.get_mask_sizes(3) == (len(plain) + 3, 0)
            assert layer.coded + layer.keys.shape[2] == len(plain)
            assert layer.keys.shape[2] < layer.residual_length + FLUSH
            self.compare(layer.exact_keys_values(), i)
            self.check_sinks(layer, i)

    def check_sinks(self, layer, i):
        keys, values, (_, held) = layer.sink_keys, layer.sink_values, layer.sink_slots()
        hidden = layer.coded_past().hidden
        assert (hidden is None) == (layer.sink_tokens == 0)
        for row in range(self.plain.rows):
            real = self.plain.real[row].nonzero()
            start = int(real[0]) if len(real) else -1
            assert not layer.sink_tokens or layer.sink_start[row] == start
            if layer.sink_tokens:  # codes that sinks stand in for are hidden from attention, and no others
                a, b = hidden[row].tolist()
                assert b - a == (layer.sink_tokens if start >= 0 else 0) and (start < 0 or a == start)
            for slot in range(layer.sink_tokens):
                assert bool(held[row, slot]) == (start >= 0 and start + slot < layer.coded)
                if held[row, slot]:  # not merely close: a sink is the model's own tensor
                    assert torch.equal(keys[row, :, slot], self.plain.keys[i][row, :, start + slot])
                    assert torch.equal(values[row, :, slot], self.plain.values[i][row, :, start + slot])

    def finish(self):
        if self.earlier:  # what was done to the copy must not have touched the original
            self.cache, self.plain = self.earlier
            self.check()


def scrambled(seed):
    """A reproducible function from a row number to a number."""
    return lambda row: (seed * 7919 + row * 104729) >> 3


UPDATE = st.tuples(
    st.just("update"),
    st.tuples(st.one_of(st.just(1), st.integers(1, 40), st.integers(60, 200)), st.integers(0, 220), st.booleans()),
)
OPERATION = st.one_of(
    UPDATE,
    UPDATE,
    st.tuples(st.just("crop"), st.one_of(st.integers(0, 5), st.integers(0, 250))),
    st.tuples(st.just("reorder"), st.integers(0, 10**6).map(scrambled)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("select"), st.integers(0, 10**6).map(scrambled)),
    st.tuples(st.sampled_from(["reset", "deepcopy", "offload"]), st.none()),
)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 3),
    sinks=st.sampled_from([0, 1, 4, 70]),
    window=st.sampled_from([0, 1, 16, 100]),
    operations=st.lists(OPERATION, min_size=2, max_size=8),
)
def test_any_sequence_of_operations(rows, sinks, window, operations):
    machine = Machine(rows, sinks, window)
    with torch.no_grad():
        for name, draw in operations:
            machine.apply(name, draw)
            machine.check()
        machine.finish()
