"""CommVQCache: where tokens lie, what is kept, what it costs, and what every operation does to it."""

import copy
import gc
import itertools
import pickle
import traceback
import weakref
from pathlib import Path

import pytest
import torch
from generation import greedy, prompt, random_codebook, tiny_llama
from lossless import enable_lossless
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_commvq import CacheUseError, CommVQCache, CommVQLayer, enable, hub, make_cache
from transformers_commvq.geometry import cache_name
from transformers_commvq.layer import FLUSH, SPARE, _first_visible, storage_bytes
from transformers_commvq.ops import backend, tables_nbytes

aten = torch.ops.aten

SINKS, WINDOW = 4, 32


def signed(model, monkeypatch, **config):
    """Enable with random 2-bit sign codebooks."""
    monkeypatch.setattr(hub, "resolve", lambda *a, **k: random_codebook(model))
    return enable(model, {"sink_tokens": SINKS, "residual_length": WINDOW, **config})


@pytest.fixture
def model(monkeypatch):
    return signed(tiny_llama(), monkeypatch)


@torch.no_grad()
def feed(model, cache, ids, mask=None, chunk=None):
    """Run tokens through the model; mask covers the cached tokens too. Returns the logits of all of them."""
    out, start = [], cache.get_seq_length()
    for a in range(0, ids.shape[1], chunk or ids.shape[1]):
        part = ids[:, a : a + (chunk or ids.shape[1])]
        seen = None if mask is None else mask[:, : start + a + part.shape[1]]
        positions = None
        if mask is not None:
            positions = (seen.cumsum(1) - 1).clamp_min(0)[:, -part.shape[1] :]
        out.append(model(part, attention_mask=seen, position_ids=positions, past_key_values=cache).logits)
    return torch.cat(out, 1)


def codes(layer):
    return layer.key_codes[:, : layer.coded].clone(), layer.value_codes[:, : layer.coded].clone()


def random_ids(rows, length, seed=5):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_tokens_lie_in_codes_and_window(model):
    cache = make_cache(model)
    feed(model, cache, random_ids(2, 300))
    for layer in cache.layers:
        assert isinstance(layer, CommVQLayer)
        assert layer.coded % FLUSH == 0 and layer.coded + layer.keys.shape[2] == 300 == layer.get_seq_length()
        assert WINDOW <= layer.keys.shape[2] < WINDOW + FLUSH
        assert layer.get_mask_sizes(5) == (305, 0)


@pytest.mark.parametrize("chunk", [None, 7, 64])
@pytest.mark.parametrize("pads", [0, 3, 100, 200], ids=lambda p: f"pads{p}")
def test_sinks_are_each_rows_first_real_tokens(model, pads, chunk):
    """Also when the padding is longer than what the first flush encodes, or than the first chunk."""
    ids, mask = random_ids(2, 260), torch.ones(2, 260, dtype=torch.long)
    mask[1, :pads] = 0
    cache, plain = make_cache(model), make_cache(model, {"residual_length": 1000})
    feed(model, cache, ids, mask, chunk)
    feed(model, plain, ids, mask, chunk)  # nothing is coded here, so its window holds the true keys
    layer, true = cache.layers[0], plain.layers[0]
    assert layer.sink_start.tolist() == [0, pads]
    keys, values, (token, held) = layer.sink_keys, layer.sink_values, layer.sink_slots()
    for row, start in enumerate((0, pads)):
        for slot in range(SINKS):
            assert token[row, slot] == start + slot
            assert bool(held[row, slot]) == (start + slot < layer.coded)
            if held[row, slot]:
                torch.testing.assert_close(keys[row, :, slot], true.keys[row, :, start + slot])
                torch.testing.assert_close(values[row, :, slot], true.values[row, :, start + slot])


def test_sinks_are_attended_in_full(monkeypatch):
    """With codes of noise, an output that rests on the sinks must still be right."""
    model = signed(tiny_llama(), monkeypatch, sink_tokens=96, residual_length=0)
    ids = random_ids(1, 96 + 32)
    cache = make_cache(model)
    feed(model, cache, ids[:, :-1])
    assert cache.layers[0].coded == 64
    got = feed(model, cache, ids[:, -1:])
    want = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_codes_are_never_made_anew(model):
    cache = make_cache(model)
    feed(model, cache, random_ids(2, 200))
    layer = cache.layers[1]
    first = codes(layer)
    for step in range(150):
        feed(model, cache, random_ids(2, 1, seed=step))
    cache.crop(-20)
    feed(model, cache, random_ids(2, 90, seed=3), chunk=30)
    cache.reorder_cache(torch.tensor([1, 0]))
    feed(model, cache, random_ids(2, 70, seed=4))
    for before, now in zip(first, codes(layer), strict=True):
        assert now.shape[1] > before.shape[1]
        assert torch.equal(now[:, : before.shape[1]], before[[1, 0]])


def test_codes_that_stay_survive_a_crop_into_codes(model):
    cache = make_cache(model)
    ids = random_ids(2, 300)
    feed(model, cache, ids)
    layer = cache.layers[0]
    first = codes(layer)
    cache.crop(-200)
    assert cache.get_seq_length() == layer.coded == 100 and layer.keys.shape[2] == 0 and len(cache.positions) == 100
    feed(model, cache, random_ids(2, 200, seed=9))
    for before, now in zip(first, codes(layer), strict=True):
        assert torch.equal(now[:, :100], before[:, :100])
        assert not torch.equal(now[:, 100:200], before[:, 100:200])


def test_buffers_grow_seldom_and_little(model):
    cache = make_cache(model)
    feed(model, cache, random_ids(1, 4096 + WINDOW))
    layer, copies = cache.layers[0], 0
    assert layer.key_codes.shape[1] == layer.coded == 4096
    held = layer.key_codes.data_ptr()
    for step in range(8):
        feed(model, cache, random_ids(1, FLUSH, seed=step))
        assert layer.key_codes.shape[1] <= layer.coded * (1 + 1 / SPARE) + FLUSH
        copies += layer.key_codes.data_ptr() != held
        held = layer.key_codes.data_ptr()
    assert layer.coded == 4096 + 8 * FLUSH and copies == 4


def test_one_token_changes_nothing_but_the_window(model):
    cache = make_cache(model)
    feed(model, cache, random_ids(1, 200))
    layer = cache.layers[0]
    before = layer.key_codes.data_ptr(), layer.value_codes.data_ptr(), layer.coded
    feed(model, cache, random_ids(1, 1))
    assert before == (layer.key_codes.data_ptr(), layer.value_codes.data_ptr(), layer.coded)


def every_tensor(cache):
    """All tensors reachable from a cache, codebooks and models apart."""
    seen, queue, out = set(), [cache], []
    while queue:
        thing = queue.pop()
        if id(thing) in seen or type(thing).__name__ in ("Codebook", "LayerBook", "LosslessBook"):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            out.append(thing)
        elif isinstance(thing, dict):
            queue += thing.values()
        elif isinstance(thing, (list, tuple)):
            queue += thing
        elif hasattr(thing, "__dict__"):
            queue += vars(thing).values()
    return out


@pytest.mark.parametrize("tokens", [1, 50, 333, 700])
def test_nbytes_is_all_storage(model, tokens):
    cache = make_cache(model)
    feed(model, cache, *prompt(2, tokens, min(tokens - 1, 40)).values())
    storages = {t.untyped_storage().data_ptr(): storage_bytes(t) for t in every_tensor(cache) if t.numel()}
    frequencies = sum(t.nbytes for t in (cache.positions.inv_freq, *cache.positions._by_device.values()))
    # the frequencies are the model's, a few numbers whatever the length
    assert abs(sum(storages.values()) - cache.nbytes) <= frequencies
    report = cache.memory_report()
    parts = ("codes", "spare", "sinks", "window", "positions", "other_layers")
    assert cache.nbytes == report["total"] == sum(report[p] for p in parts)
    assert report["tokens"] == tokens and report["fp16"] == 2 * 2 * 2 * 2 * 16 * 2 * tokens
    made = sum(tables_nbytes(layer.book) for layer in cache.layers)  # the encoder's, once something is coded
    assert report["codebooks"] == cache.codebook.nbytes + made and (made > 0) == (report["codes"] > 0)
    assert report["ratio"] == report["total"] / report["fp16"]


def test_two_bits_take_an_eighth_of_fp16_in_the_end(monkeypatch):
    model = signed(tiny_llama(dtype=torch.float16), monkeypatch)
    cache = make_cache(model)
    feed(model, cache, random_ids(1, 4096))
    report = cache.memory_report()
    # 2 of 16 bits, and beside them the window, and 4 bytes for the position of a token
    assert report["codes"] / report["fp16"] == pytest.approx(1 / 8 * cache.layers[0].coded / 4096)
    assert report["positions"] <= 4 * 4096 + 2 * 4 * 1024 * 8
    assert report["ratio"] < 0.125 + 0.02 + report["positions"] / report["fp16"]


def test_the_prompts_tensors_are_let_go(model):
    cache, kept = make_cache(model), []
    attention = model.model.layers[0].self_attn
    attention.v_proj.register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out.untyped_storage())))
    attention.k_proj.register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out.untyped_storage())))
    feed(model, cache, random_ids(1, 500))
    gc.collect()
    assert len(kept) == 2 and all(ref() is None for ref in kept)
    assert storage_bytes(cache.layers[0].values) < 500 * 2 * 16 * 4 / 3


def test_prefill_holds_one_layer_at_a_time(monkeypatch):
    """When layer i is done its full keys are gone: held memory never has two layers uncompressed."""
    model = signed(tiny_llama(num_hidden_layers=4), monkeypatch)
    cache, held = make_cache(model), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *a: held.append(cache.nbytes))
    feed(model, cache, random_ids(1, 2000))
    steps = [b - a for a, b in itertools.pairwise(held)]
    full = 2000 * 2 * 2 * 16 * 4
    assert len(steps) == 3 and max(steps) < 0.15 * full


def test_deepcopy_shares_codebooks_and_nothing_else(model):
    prefix = make_cache(model)
    feed(model, prefix, random_ids(1, 200))
    twin = copy.deepcopy(prefix)
    assert twin.codebook is prefix.codebook and twin.layers[0].book is prefix.layers[0].book
    assert twin.layers[0].positions is twin.layers[1].positions is twin.positions is not prefix.positions
    mine, theirs = ({t.data_ptr() for t in every_tensor(c) if t.numel()} for c in (prefix, twin))
    assert not mine & theirs
    before = feed(model, copy.deepcopy(prefix), random_ids(1, 80, seed=8))
    feed(model, twin, random_ids(1, 200, seed=7))
    assert prefix.get_seq_length() == 200
    assert torch.equal(feed(model, prefix, random_ids(1, 80, seed=8)), before)


def test_pickle_of_a_cache(model):
    cache = make_cache(model)
    feed(model, cache, random_ids(1, 200))
    twin = pickle.loads(pickle.dumps(cache))
    ids = random_ids(1, 90, seed=2)
    assert torch.equal(feed(model, twin, ids), feed(model, cache, ids))


def test_reset_forgets_everything(model):
    cache, ids = make_cache(model), prompt(2, 200, 30)
    first = feed(model, cache, *ids.values())
    cache.reset()
    assert cache.get_seq_length() == 0 == cache.memory_report()["codes"] and len(cache.positions) == 0
    assert torch.equal(feed(model, cache, *ids.values()), first)
    cache.reset()
    feed(model, cache, random_ids(3, 10))  # another batch size


def test_crop_rules(model):
    cache = make_cache(model)
    cache.crop(-3)  # nothing to remove yet
    feed(model, cache, random_ids(1, 15))
    cache.crop(0)
    assert cache.get_seq_length() == 15
    with pytest.raises(ValueError, match="minus"):
        cache.crop(5)
    cache.crop(-2)
    assert cache.get_seq_length() == 13
    cache.crop(-100)
    assert cache.get_seq_length() == 0 == len(cache.positions)


def test_crop_before_the_sinks_finds_new_ones(model):
    cache, ids, mask = make_cache(model), random_ids(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[1, :50] = 0
    feed(model, cache, ids, mask)
    cache.crop(-180)
    assert cache.layers[0].sink_start.tolist() == [0, -1]
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, :30] = 0
    feed(model, cache, ids[:, 20:], mask)
    assert cache.layers[0].sink_start.tolist() == [0, 30]


@pytest.mark.parametrize("change", ["reorder", "select", "repeat", "crop"])
def test_attention_after_a_change_of_rows(model, change):
    """Rows at different positions: whatever a backend keeps between steps must follow its rows."""
    cache = make_cache(model)
    inputs = prompt(2, 150, 50)
    feed(model, cache, *inputs.values())
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    feed(model, cache, random_ids(2, 1), mask)
    if change == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
        mask = mask[[1, 0]]
    elif change == "select":
        cache.batch_select_indices(torch.tensor([1]))
        mask = mask[1:]
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
        mask = mask.repeat_interleave(2, 0)
    else:
        cache.crop(-100)
        mask = mask[:, :51]
    rows = len(mask)
    mask = torch.cat([mask, torch.ones(rows, 1, dtype=torch.long)], 1)
    twin = copy.deepcopy(cache)
    got = feed(model, cache, random_ids(rows, 1), mask)
    with backend("reference"):
        want = feed(model, twin, random_ids(rows, 1), mask)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=1e-3)


def test_offload_and_prefetch_keep_the_tokens(model):
    cache = make_cache(model)
    feed(model, cache, random_ids(1, 200))
    twin = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    ids = random_ids(1, 5, seed=3)
    assert torch.equal(feed(model, cache, ids), feed(model, twin, ids))


def test_a_cache_made_in_inference_mode_lives_on(model):
    cache, twin = make_cache(model), make_cache(model)
    ids = random_ids(2, 400)
    with torch.inference_mode():
        feed(model, cache, ids[:, :200])
        cache.reorder_cache(torch.tensor([0, 1]))
    feed(model, twin, ids[:, :200])
    for c in (cache, twin):
        c.crop(-10)
    assert torch.equal(feed(model, cache, ids[:, 190:]), feed(model, twin, ids[:, 190:]))


def test_a_copy_made_in_inference_mode_lives_on(model, monkeypatch):
    """With room left in the buffers it was copied with, that nothing may be written to."""
    monkeypatch.setattr("transformers_commvq.layer.SPARE", 1)
    ids, prefix = random_ids(2, 500), make_cache(model)
    for part in ids[:, :400].split(64, 1):
        feed(model, prefix, part)
    spare = prefix.layers[0].key_codes.shape[1] - prefix.layers[0].coded
    assert spare >= 128
    with torch.inference_mode():
        twin = copy.deepcopy(prefix)
        inside = feed(model, twin, ids[:, 400:])
    with torch.inference_mode():
        later = copy.deepcopy(prefix)
    expected = feed(model, prefix, ids[:, 400:])
    assert torch.equal(inside, expected) and torch.equal(feed(model, later, ids[:, 400:]), expected)


def test_gradients_are_not_kept(model):
    cache = make_cache(model)
    out = model(random_ids(1, 200), past_key_values=cache)
    assert out.logits.requires_grad and not cache.layers[0].keys.requires_grad
    out.logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_empty_settings(monkeypatch):
    """No sinks and no window beyond what waits for the next flush."""
    model = signed(tiny_llama(), monkeypatch, sink_tokens=0, residual_length=0)
    cache = make_cache(model)
    feed(model, cache, random_ids(1, 130))
    assert cache.layers[0].coded == 128 and cache.memory_report()["sinks"] == 2 * 8  # one index a row and layer
    assert torch.isfinite(feed(model, cache, random_ids(1, 3))).all()


def test_decoding_one_token_waits_for_nothing(model):
    """Nothing that cache or attention function do at a step reads a value back, which on a GPU would stall the host.

    What the backends in ops do is theirs to say.
    """
    inputs = prompt(2, 150, 40)
    cache = make_cache(model)
    feed(model, cache, *inputs.values())
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal):
                frames = [f.filename for f in traceback.extract_stack() if "transformers" in f.filename]
                asked.append(frames[-1])
            return function(*args, **(kwargs or {}))

    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with Watch():
        feed(model, cache, random_ids(2, 1), mask)
    assert asked  # transformers itself looks at the padding mask, so the watch works
    assert not [f for f in asked if Path(f).parent.name == "transformers_commvq"]


MASKS = {
    "none": (None, [0, 0]),
    "rows of 0 and 1": (torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), [2, 0]),
    "a row of padding": (torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]]), [-1, 1]),
    "bool": (torch.tensor([[False, True, True, True], [True] * 4])[:, None, None], [1, 0]),
    "additive": (torch.tensor([[torch.finfo().min, 0.0, 0, 0], [-torch.inf, -torch.inf, 0, 0]])[:, None, None], [1, 2]),
    "additive of half precision": (torch.tensor([[-65504.0, 0, 0, 0], [0, 0, 0, 0]]).half()[:, None, None], [1, 0]),
    "one row for all": (torch.tensor([[0, 1, 1, 1]]).bool()[:, None, None], [1, 1]),
    "columns to come": (torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]), [1, -1]),
    "several queries": (torch.ones(2, 1, 3, 4).tril(1).bool(), [0, 0]),
    "a block mask": (object(), [0, 0]),
}


@pytest.mark.parametrize("form", MASKS)
def test_the_first_real_token_is_read_from_any_mask(form):
    mask, want = MASKS[form]
    assert _first_visible(mask, 2, 4, torch.device("cpu")).tolist() == want


class TestMistakes:
    def test_a_model_that_is_not_enabled(self, model):
        with pytest.raises(CacheUseError, match=r"not enabled.*enable"):
            feed(tiny_llama(), make_cache(model), random_ids(1, 5))

    def test_the_attention_function_was_never_called(self, model, monkeypatch):
        attention = model.model.layers[0].self_attn

        def forward(hidden_states, position_embeddings, **kwargs):
            heads = hidden_states.view(1, -1, 4, 16).transpose(1, 2)[:, :2]
            kwargs[cache_name(type(attention))].update(heads, heads, 0)
            return hidden_states, None

        monkeypatch.setattr(attention, "forward", forward)
        with pytest.raises(CacheUseError, match="did not call"):
            feed(model, make_cache(model), random_ids(1, 5))

    def test_keys_changed_after_the_cache(self, model, monkeypatch):
        update = CommVQLayer.update
        monkeypatch.setattr(CommVQLayer, "update", lambda *a, **k: tuple(t * 1 for t in update(*a, **k)))
        with pytest.raises(CacheUseError, match="changes keys or values"):
            feed(model, make_cache(model), random_ids(1, 5))

    @pytest.mark.parametrize("where", ["attention", "between layers"])
    def test_an_interrupted_forward_is_noticed(self, model, monkeypatch, where):
        from transformers_commvq import attention

        cache = make_cache(model)
        feed(model, cache, random_ids(1, 100))
        with monkeypatch.context() as patch:
            if where == "attention":
                patch.setattr(attention, "_merged", lambda *a: 1 / 0)
            else:
                patch.setattr(model.model.layers[1].mlp, "forward", lambda *a: 1 / 0)
                patch.setattr(model.model.layers[0].mlp, "forward", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                feed(model, cache, random_ids(1, 1))
        with pytest.raises(CacheUseError, match="interrupted"):
            feed(model, cache, random_ids(1, 1))
        cache.reset()
        feed(model, cache, random_ids(1, 100))

    def test_another_batch_size(self, model):
        cache = make_cache(model)
        feed(model, cache, random_ids(2, 10))
        with pytest.raises(CacheUseError, match="2 rows"):
            feed(model, cache, random_ids(3, 1))

    def test_other_heads(self, model, monkeypatch):
        wide = tiny_llama(num_key_value_heads=4)
        monkeypatch.setattr(hub, "resolve", lambda *a, **k: random_codebook(model))
        enable(wide)
        with pytest.raises(CacheUseError, match="4 heads of 16"):
            feed(wide, make_cache(wide), random_ids(1, 5))

    def test_make_cache_needs_enable(self):
        with pytest.raises(CacheUseError, match="enable"):
            make_cache(tiny_llama())


def test_lossless_greedy_equals_dynamic_cache():
    """The vertical slice: 600 tokens and more, a batch of 2, one row padded on the left."""
    model, inputs = tiny_llama(), prompt(2, 250, 120)
    want = greedy(model, inputs, 400)
    enable_lossless(model)
    got = greedy(model, inputs, 400, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want) and want.shape[1] == 650
    assert len(set(want[1, 250:].tolist())) > 20  # the model does not just repeat itself
    cache = got.past_key_values
    assert isinstance(cache, CommVQCache) and cache.layers[0].coded >= 448
