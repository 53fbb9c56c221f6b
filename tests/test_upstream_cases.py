"""Cases that transformers holds its own caches to, run with DynamicCache and with ours.

Each case is a promise of the Cache interface or of GenerationMixin. Running it with DynamicCache first shows that the
promise is stated correctly; ours (with lossless codes) must keep it too.
"""

import copy

import pytest
import torch
from generation import greedy, prompt, tiny_llama
from lossless import enable_lossless
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import Cache, QuantizedCache

from transformers_commvq import CommVQCache, make_cache

KW = {"return_dict_in_generate": True}


@pytest.fixture(scope="module", params=["DynamicCache", "CommVQCache"])
def setup(request):
    """(model, function that makes an empty cache for it)."""
    model = tiny_llama()
    if request.param == "CommVQCache":
        enable_lossless(model, residual_length=16)
        return model, lambda: make_cache(model)
    return model, lambda: DynamicCache(config=model.config)


def inputs_of(ids, pads=0):
    mask = torch.ones_like(ids)
    mask[:, :pads] = 0
    return {"input_ids": ids, "attention_mask": mask}


def fill(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


class TestCacheInterface:
    def test_an_empty_cache(self, setup):
        cache = setup[1]()
        assert isinstance(cache, Cache) and len(cache) == 2 and cache.get_seq_length() == 0
        assert cache.get_mask_sizes(7, 0) == (7, 0) and cache.get_max_length() == -1
        assert not cache.is_initialized and not cache.is_compileable and cache.is_croppable
        assert cache.is_sliding == [False, False]
        assert cache.get_seq_length(99) == 0 and cache.get_mask_sizes(7, 99) == (7, 0)
        assert "CommVQLayer" in repr(cache) or "DynamicLayer" in repr(cache)

    def test_after_an_update(self, setup):
        model, new = setup
        cache = new()
        fill(model, cache, prompt(3, 100, 0)["input_ids"])
        assert cache.is_initialized and cache.get_seq_length() == cache.get_seq_length(1) == 100
        assert cache.get_mask_sizes(5, 0) == (105, 0) and cache.get_query_offset() == 100

    def test_early_initialization(self, setup):
        model, new = setup
        cache, ids = new(), prompt(2, 50, 0)["input_ids"]
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
        assert cache.is_initialized and cache.get_seq_length() == 0
        assert torch.equal(fill(model, cache, ids), fill(model, new(), ids))

    def test_reset_then_the_same_again(self, setup):
        model, new = setup
        cache, ids = new(), prompt(2, 100, 0)["input_ids"]
        first = fill(model, cache, ids)
        cache.reset()
        assert cache.get_seq_length() == 0 and torch.equal(fill(model, cache, ids), first)

    def test_batch_operations_are_what_they_say(self, setup):
        """Repeat, select and reorder of a cache equal a cache made from repeated, selected, reordered rows."""
        model, new = setup
        ids, more = prompt(3, 100, 0)["input_ids"], torch.full((3, 2), 9)

        def compare(change, rows):
            cache = new()
            fill(model, cache, ids)
            change(cache)
            fresh = new()
            fill(model, fresh, ids[rows])
            got, want = fill(model, cache, more[rows]), fill(model, fresh, more[rows])
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)

        compare(lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
        compare(lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0])
        compare(lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0])

    def test_crop_equals_never_having_seen_it(self, setup):
        model, new = setup
        ids, more = prompt(2, 120, 0)["input_ids"], torch.full((2, 3), 9)
        for remove in (1, 10, 60, 119):
            cache, fresh = new(), new()
            fill(model, cache, ids)
            cache.crop(-remove)
            fill(model, fresh, ids[:, :-remove])
            assert cache.get_seq_length() == 120 - remove
            torch.testing.assert_close(fill(model, cache, more), fill(model, fresh, more), atol=1e-3, rtol=1e-3)

    def test_positive_crop_is_an_error(self, setup):
        model, new = setup
        cache = new()
        fill(model, cache, prompt(1, 5, 0)["input_ids"])
        with pytest.raises(ValueError, match="negative|minus"):
            cache.crop(3)

    def test_past_recording_may_be_asked_of_any_cache(self, setup):
        cache = setup[1]()
        cache.activate_past_recording()
        assert not cache.is_recording_past(0)

    def test_deepcopy_is_independent(self, setup):
        model, new = setup
        cache = new()
        fill(model, cache, prompt(1, 80, 0)["input_ids"])
        twin = copy.deepcopy(cache)
        fill(model, twin, torch.full((1, 40), 5))
        assert (cache.get_seq_length(), twin.get_seq_length()) == (80, 120)


class TestGenerationMixin:
    def test_left_padding_does_not_change_the_logits(self, setup):
        model, _ = setup
        ids = prompt(2, 70, 0)["input_ids"]
        padded = torch.cat([torch.zeros(2, 40, dtype=torch.long), ids], 1)
        kw = {**KW, "output_logits": True}
        a = greedy(model, inputs_of(ids), 20, **kw)
        b = greedy(model, inputs_of(padded, 40), 20, **kw)
        assert torch.equal(a.sequences[:, 70:], b.sequences[:, 110:])
        torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), atol=2e-3, rtol=1e-3)

    def test_continue_from_past_key_values(self, setup):
        """Generating 20 tokens equals generating 12, then 8 more from the cache."""
        model, _ = setup
        inputs = prompt(2, 80, 30)
        whole = greedy(model, inputs, 20)
        first = greedy(model, inputs, 12, **KW)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12, dtype=torch.long)], 1)
        more = {"input_ids": first.sequences, "attention_mask": mask}
        assert torch.equal(greedy(model, more, 8, past_key_values=first.past_key_values), whole)

    def test_continue_from_inputs_embeds(self, setup):
        model, _ = setup
        embeds = model.get_input_embeddings()(prompt(2, 80, 0)["input_ids"]).detach()
        whole = greedy(model, {"inputs_embeds": embeds}, 20)
        first = greedy(model, {"inputs_embeds": embeds}, 12, **KW)
        again = torch.cat([embeds, model.get_input_embeddings()(first.sequences).detach()], 1)
        more = greedy(model, {"inputs_embeds": again}, 8, past_key_values=first.past_key_values)
        assert torch.equal(torch.cat([first.sequences, more], 1), whole)

    def test_with_and_without_a_cache(self, setup):
        model, _ = setup
        assert torch.equal(greedy(model, new=25), greedy(model, new=25, use_cache=False))

    @pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}])
    def test_dictionary_outputs(self, setup, way):
        model, new = setup
        torch.manual_seed(0)
        out = greedy(model, new=6, output_scores=True, output_hidden_states=True, **KW, **way)
        assert out.sequences.shape == (2, 66) and len(out.scores) == len(out.hidden_states) == 6
        assert type(out.past_key_values) is type(new()) and out.past_key_values.get_seq_length() == 65

    def test_sampling_from_the_same_seed_repeats(self, setup):
        model, _ = setup
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(greedy(model, do_sample=True, num_return_sequences=2))
        assert torch.equal(*runs) and not torch.equal(runs[0][0], runs[0][1])

    def test_assisted_decoding_gives_the_greedy_tokens(self, setup):
        model, new = setup
        one = prompt(1, 90, 0)
        want = greedy(model, one, 25)
        assistant = copy.deepcopy(model)
        with torch.no_grad():
            assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.3)
        for extra in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
            out = greedy(model, one, 25, **extra, **KW)
            assert torch.equal(out.sequences, want) and type(out.past_key_values) is type(new())

    def test_assisted_sampling_repeats(self, setup):
        model, new = setup
        runs = []
        for _ in range(2):
            torch.manual_seed(4)
            runs.append(greedy(model, prompt(1, 90, 0), 12, assistant_model=copy.deepcopy(model), do_sample=True, **KW))
        assert torch.equal(runs[0].sequences, runs[1].sequences)
        assert type(runs[0].past_key_values) is type(new())

    def test_prompt_lookup_stops_at_the_end_token(self, setup):
        """An end token among the candidates ends the text where greedy decoding ends it."""
        model, _ = setup
        one = prompt(1, 90, 0)
        tokens = greedy(model, one, 20)[0, 90:].tolist()
        end = {"eos_token_id": tokens[9]}
        want = greedy(model, one, 20, **end)
        assert want.shape[1] == 90 + tokens.index(tokens[9]) + 1
        assert torch.equal(greedy(model, one, 20, prompt_lookup_num_tokens=4, **end), want)

    def test_without_a_prompt(self, setup):
        model, _ = setup
        out = model.generate(max_new_tokens=5, do_sample=False, bos_token_id=1)
        assert torch.equal(out, greedy(model, inputs_of(torch.tensor([[1]])), 5))

    def test_beams_from_inputs_embeds(self, setup):
        model, _ = setup
        inputs = prompt(2, 80, 0)
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        out = greedy(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, 8, num_beams=2)
        assert torch.equal(out, greedy(model, inputs, 8, num_beams=2)[:, 80:])

    def test_logits_to_keep(self, setup):
        model, new = setup
        ids = prompt(2, 80, 0)["input_ids"]
        with torch.no_grad():
            all_logits = model(ids, past_key_values=new()).logits
            last = model(ids, past_key_values=new(), logits_to_keep=1).logits
        assert last.shape[1] == 1
        torch.testing.assert_close(last[:, 0], all_logits[:, -1])

    def test_prefill_in_chunks(self, setup):
        model, _ = setup
        inputs = prompt(2, 100, 45)
        assert torch.equal(greedy(model, inputs), greedy(model, inputs, prefill_chunk_size=20))

    def test_a_model_survives_generate(self, setup):
        """generate() must not change the model or its generation config."""
        model, _ = setup
        before = copy.deepcopy(model.generation_config.to_dict()), set(vars(model))
        model.generate(**prompt(), generation_config=GenerationConfig(max_new_tokens=3, pad_token_id=0))
        assert before == (model.generation_config.to_dict(), set(vars(model)))


def test_ours_is_a_quantized_cache():
    model = enable_lossless(tiny_llama())
    assert isinstance(make_cache(model), QuantizedCache) and issubclass(CommVQCache, Cache)
