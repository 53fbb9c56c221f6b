"""Every way of generating: with codes that lose nothing, the tokens of transformers' own DynamicCache."""

import copy
import threading

import pytest
import torch
from generation import greedy, prompt, random_codebook, tiny_llama
from lossless import enable_lossless
from transformers import DynamicCache, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from transformers_commvq import CommVQCache, disable, enable, hub, make_cache
from transformers_commvq.layer import FLUSH

KW = {"return_dict_in_generate": True}


@pytest.fixture(scope="module")
def pair():
    """The same weights without and with the compressed cache; a small window, so that most tokens are codes."""
    plain = tiny_llama()
    return plain, enable_lossless(copy.deepcopy(plain), residual_length=16)


def both(pair, inputs=None, seed=0, **kwargs):
    """Generate with both models from the same random state; returns (plain, compressed) outputs."""
    out = []
    for model in pair:
        torch.manual_seed(seed)
        out.append(greedy(model, prompt(2, 150, 40) if inputs is None else inputs, **{**KW, **kwargs}))
    assert isinstance(out[1].past_key_values, CommVQCache) and not isinstance(out[0].past_key_values, CommVQCache)
    return out


def same(pair, inputs=None, **kwargs):
    plain, ours = both(pair, inputs, **kwargs)
    assert torch.equal(plain.sequences, ours.sequences)
    assert ours.past_key_values.layers[0].coded >= 64
    return ours


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "prefill in chunks": {"prefill_chunk_size": 32},
    "repetition penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "logits kept for later": {"output_logits": True, "output_hidden_states": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_same_tokens(pair, way):
    same(pair, **WAYS[way])


@pytest.mark.parametrize("lookup", [2, 5])
def test_prompt_lookup_crops_through_codes(pair, lookup, monkeypatch):
    cropped = []
    crop = CommVQCache.crop
    monkeypatch.setattr(CommVQCache, "crop", lambda self, n: (cropped.append(n), crop(self, n))[1])
    one = {k: v.repeat(1, 3) for k, v in prompt(1, 60, 0).items()}  # repeats, so that there is something to look up
    same(pair, one, new=80, prompt_lookup_num_tokens=lookup)
    assert cropped and min(cropped) < 0


@pytest.mark.parametrize("enabled", ["target", "assistant", "both"])
def test_assisted_decoding(enabled):
    target, assistant = tiny_llama(), tiny_llama(seed=0, num_hidden_layers=1)
    assistant.model.load_state_dict(target.model.state_dict(), strict=False)  # agrees often, not always
    one = prompt(1, 120, 0)
    want = greedy(target, one, 60)
    target.generation_config.kv_cache = None
    if enabled in ("target", "both"):
        enable_lossless(target, residual_length=8)
    if enabled in ("assistant", "both"):
        enable_lossless(assistant, residual_length=8)
    got = greedy(target, one, 60, assistant_model=assistant, num_assistant_tokens=4, **KW)
    assert torch.equal(got.sequences, want)
    assert isinstance(got.past_key_values, CommVQCache) == (enabled != "assistant")


def test_scores(pair):
    plain, ours = both(pair, output_scores=True, output_logits=True, new=40)
    assert torch.equal(plain.sequences, ours.sequences)
    for a, b in zip(plain.scores + plain.logits, ours.scores + ours.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_inputs_embeds(pair):
    ids = prompt(2, 150, 40)
    embeds = pair[0].get_input_embeddings()(ids["input_ids"]).detach()
    same(pair, {"inputs_embeds": embeds, "attention_mask": ids["attention_mask"]})


def test_streamers(pair):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, one = Collect(), prompt(1, 120, 0)
    got = greedy(pair[1], one, 30, streamer=streamer)
    assert streamer.ended and streamer.tokens == got[0].tolist() == greedy(pair[0], one, 30)[0].tolist()
    assert TextIteratorStreamer  # the usual one is built on the same two methods


def test_a_second_generate_on_the_same_cache(pair):
    outs = []
    for model, cache in ((pair[0], DynamicCache(config=pair[0].config)), (pair[1], make_cache(pair[1]))):
        inputs = prompt(2, 100, 30)
        first = greedy(model, inputs, 40, past_key_values=cache)
        more = torch.cat([first, torch.full((2, 5), 7)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 45, dtype=torch.long)], 1)
        outs.append(greedy(model, {"input_ids": more, "attention_mask": mask}, 40, past_key_values=cache))
        assert cache.get_seq_length() == outs[-1].shape[1] - 1
    assert torch.equal(*outs)


def test_a_chat_of_many_turns(pair):
    ids = [prompt(1, 20, 0)["input_ids"]] * 2
    caches = [DynamicCache(config=pair[0].config), make_cache(pair[1])]
    for turn in range(8):
        for i, model in enumerate(pair):
            said = torch.full((1, 6), 10 + turn)
            asked = torch.cat([ids[i], said], 1)
            inputs = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
            ids[i] = greedy(model, inputs, 15, past_key_values=caches[i])
        assert torch.equal(*ids)
    assert caches[1].layers[0].coded >= 128


def test_a_prefix_is_computed_once(pair):
    """Copies of one prefix cache go different ways and leave it as it is."""
    prefix_ids = prompt(1, 130, 0)["input_ids"]
    prefix = make_cache(pair[1])
    with torch.no_grad():
        pair[1](prefix_ids, past_key_values=prefix)
    for question in (5, 50):
        ids = torch.cat([prefix_ids, torch.full((1, 10), question)], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got = greedy(pair[1], inputs, 30, past_key_values=copy.deepcopy(prefix))
        assert torch.equal(got, greedy(pair[0], inputs, 30))
    assert prefix.get_seq_length() == 130


def test_steps_by_hand(pair):
    """A loop over model(...): the cache comes out of the first call and goes into the next."""
    ids, tokens = prompt(2, 100, 0), []
    for model in pair:
        out, chosen = model_step(model, ids["input_ids"], None), []
        for _ in range(40):
            token = out.logits[:, -1:].argmax(-1)
            chosen.append(token)
            out = model_step(model, token, out.past_key_values)
        tokens.append(torch.cat(chosen, 1))
    assert torch.equal(*tokens) and isinstance(out.past_key_values, CommVQCache)


@torch.no_grad()
def model_step(model, ids, cache):
    return model(ids, past_key_values=cache, use_cache=True)


def test_batched_rows_do_not_touch_each_other(monkeypatch):
    """With real codes: a row gives the same tokens alone, beside another, and padded on the left."""
    model = tiny_llama()
    monkeypatch.setattr(hub, "resolve", lambda *a, **k: random_codebook(model))
    enable(model, {"residual_length": 32})
    pads = FLUSH  # so that the same tokens leave the window together, with and without the padding
    long, short = prompt(1, 200, 0, seed=1), prompt(1, 200 - pads, 0, seed=2)
    alone = [greedy(model, x, 60)[0, -60:] for x in (long, short)]
    ids, mask = long["input_ids"].repeat(2, 1), torch.ones(2, 200, dtype=torch.long)
    ids[1, :pads], mask[1, :pads] = 0, 0
    ids[1, pads:] = short["input_ids"][0]
    together = greedy(model, {"input_ids": ids, "attention_mask": mask}, 60)[:, -60:]
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])


def test_compression_shows_in_the_output(monkeypatch):
    """The other tests could pass with a cache that keeps everything: with codes of noise the tokens must change."""
    model, inputs = tiny_llama(), prompt(2, 200, 50)
    want = greedy(model, inputs, 40)
    monkeypatch.setattr(hub, "resolve", lambda *a, **k: random_codebook(model))
    enable(model, {"residual_length": 16})
    out = greedy(model, inputs, 40, **KW)
    assert not torch.equal(out.sequences, want)
    assert out.past_key_values.memory_report()["bits_per_element"] < 16


def test_the_model_after_disable_is_the_model_before(pair):
    model = copy.deepcopy(pair[1])
    assert torch.equal(greedy(disable(model)), greedy(pair[0]))


def test_two_threads_on_one_model(pair):
    inputs = [prompt(1, 90 + 40 * i, 0, seed=i) for i in range(4)]
    want = [greedy(pair[0], x, 40) for x in inputs]
    got, errors = [None] * 4, []

    def work(i):
        try:
            got[i] = greedy(pair[1], inputs[i], 40)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("part", [pytest.param("model", marks=pytest.mark.slow), "decoder"])
def test_torch_compile(part):
    """Compiled modules give the same tokens: what the compiler cannot trace runs as it is."""
    torch.compiler.reset()
    plain, inputs = tiny_llama(num_hidden_layers=1), prompt(2, 100, 30)
    want = greedy(plain, inputs, 3)
    model = enable_lossless(plain, residual_length=16)
    if part == "decoder":
        model.model = torch.compile(model.model, backend="eager", dynamic=True)
    else:
        model.compile(backend="eager", dynamic=True)
    got = greedy(model, inputs, 3, **KW)
    assert isinstance(got.past_key_values, CommVQCache) and got.past_key_values.layers[0].coded == 64
    assert torch.equal(got.sequences, want)
