"""Every way to switch the compressed cache on, keep it through saving and copying, and switch it off."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from generation import SHAPE, from_config, greedy, prompt, random_codebook, saved_codebook, tiny_llama
from lossless import enable_lossless
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

import transformers_commvq
from transformers_commvq import (
    CacheUseError,
    CodebookError,
    CodebookMismatchError,
    CommVQCache,
    CommVQConfig,
    ConfigError,
    UnsupportedModelError,
    disable,
    enable,
    make_cache,
)
from transformers_commvq.geometry import cache_name, generate_cache_name
from transformers_commvq.loading import kv_cache_by_default


@pytest.fixture
def checkpoint(tmp_path):
    """A saved tiny Llama with 2- and 1-bit codebooks beside it, where ``kv_cache="commvq"`` looks."""
    model, folder = tiny_llama(), tmp_path / "model"
    model.save_pretrained(folder)
    for bits in (2, 1):
        saved_codebook(model, folder / "commvq" / f"{bits}bit", bits, seed=bits)
    return str(folder)


def cache_of(model, **kwargs):
    return greedy(model, new=4, return_dict_in_generate=True, **kwargs).past_key_values


class TestFromPretrained:
    @pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
    @pytest.mark.parametrize("spec", ["commvq", True, {}, {"bits": 1}, "object", "folder"], ids=str)
    def test_every_spec(self, checkpoint, loader, spec):
        bits = 1.0 if spec == {"bits": 1} else 2.0
        if spec == "object":
            spec = CommVQConfig(residual_length=16)
        elif spec == "folder":
            spec = checkpoint + "/commvq/2bit"
        model = loader.from_pretrained(checkpoint, kv_cache=spec)
        cache = cache_of(model)
        assert isinstance(cache, CommVQCache) and cache.codebook.bits == bits

    def test_without_the_argument_nothing_changes(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert type(cache_of(model)) is DynamicCache and model.config._attn_implementation == "sdpa"
        assert not [m for m in model.modules() if m._forward_pre_hooks]

    def test_loading_info_and_other_arguments(self, checkpoint):
        config = AutoConfig.from_pretrained(checkpoint)
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint, config=config, dtype=torch.bfloat16, output_loading_info=True, kv_cache="commvq"
        )
        assert "missing_keys" in info and model.dtype == torch.bfloat16
        assert isinstance(cache_of(model), CommVQCache)

    def test_a_model_without_a_head(self, checkpoint):
        model = AutoModel.from_pretrained(checkpoint, kv_cache="commvq")
        with torch.no_grad():
            assert isinstance(model(prompt()["input_ids"]).past_key_values, CommVQCache)

    def test_wrong_settings_are_told_before_loading(self, tmp_path):
        for spec, text in (({"bit": 2}, "unknown fields"), ({"bits": 99}, "bits=99"), (3.5, "expected 'commvq'")):
            with pytest.raises(ConfigError, match=text):
                LlamaForCausalLM.from_pretrained(str(tmp_path / "nothing here"), kv_cache=spec)

    def test_no_codebook(self, tmp_path):
        tiny_llama().save_pretrained(tmp_path)
        with pytest.raises(CodebookError, match="transformers-commvq learn"):
            AutoModelForCausalLM.from_pretrained(tmp_path, kv_cache="commvq")

    def test_a_codebook_of_another_geometry(self, checkpoint, tmp_path):
        other = saved_codebook(tiny_llama(num_key_value_heads=4), tmp_path / "other")
        with pytest.raises(CodebookMismatchError, match="num_key_value_heads"):
            AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache=other)

    def test_pipeline(self, checkpoint):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, pipeline

        words = {f"w{i}": i for i in range(96)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")
        pipe = pipeline("text-generation", checkpoint, tokenizer=fast, model_kwargs={"kv_cache": "commvq"})
        seen = []
        name = cache_name(type(pipe.model))
        pipe.model.register_forward_pre_hook(lambda m, a, k: seen.append(k[name]), with_kwargs=True)
        assert pipe("w5 w6 w7", max_new_tokens=3, return_full_text=True)[0]["generated_text"].startswith("w5")
        assert seen and all(isinstance(c, CommVQCache) for c in seen)


class TestByDefault:
    """For programs that call from_pretrained themselves."""

    def test_holds_inside_the_block(self, checkpoint):
        with kv_cache_by_default({"bits": 1}):
            assert cache_of(AutoModelForCausalLM.from_pretrained(checkpoint)).codebook.bits == 1.0
        assert type(cache_of(AutoModelForCausalLM.from_pretrained(checkpoint))) is DynamicCache

    def test_what_is_said_goes_first(self, checkpoint, tmp_path):
        spec = {"codebook": checkpoint + "/commvq/2bit", "sink_tokens": 2}
        AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache=spec).save_pretrained(tmp_path / "copy")
        with kv_cache_by_default({"bits": 1}):
            assert type(cache_of(AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache=False))) is DynamicCache
            saved = cache_of(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"))
        assert saved.codebook.bits == 2.0 and saved.layers[0].sink_tokens == 2

    def test_a_model_that_cannot_be_compressed_is_an_error(self, tmp_path):
        from_config(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4)).save_pretrained(tmp_path)
        with kv_cache_by_default(), pytest.raises(UnsupportedModelError, match="rotary"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(cache_of(AutoModelForCausalLM.from_pretrained(tmp_path))) is DynamicCache


class TestQuantizationConfig:
    def test_enables_and_survives_saving(self, checkpoint, tmp_path):
        config = CommVQConfig(codebook=checkpoint + "/commvq/2bit", residual_length=16)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
        assert isinstance(cache_of(model), CommVQCache)
        plain = AutoModelForCausalLM.from_pretrained(checkpoint)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, plain.state_dict()[name])
        model.half().float()
        model.save_pretrained(tmp_path / "copy")
        assert (
            json.loads((tmp_path / "copy/config.json").read_text())["quantization_config"]["quant_method"] == "commvq"
        )
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
        cache = cache_of(again)
        assert isinstance(cache, CommVQCache) and cache.layers[0].residual_length == 16

    def test_kv_cache_argument_goes_first(self, checkpoint):
        config = CommVQConfig(codebook=checkpoint + "/commvq/2bit")
        one_bit = {"bits": 1, "codebook": checkpoint + "/commvq/1bit"}
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, kv_cache=one_bit)
        assert cache_of(model).codebook.bits == 1.0
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, kv_cache=False)
        assert type(cache_of(model)) is DynamicCache

    @pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
    def test_a_taken_slot_is_an_error_that_names_kv_cache(self, checkpoint, loader):
        """A checkpoint with quantized weights: transformers would ignore our config with a warning."""
        path = Path(checkpoint, "config.json")
        config = json.loads(path.read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        path.write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=r"bitsandbytes.*kv_cache="):
            loader.from_pretrained(checkpoint, quantization_config=CommVQConfig())

    def test_gguf_has_no_slot(self, tmp_path):
        with pytest.raises(ConfigError, match=r"gguf.*kv_cache="):
            LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", quantization_config=CommVQConfig())


class TestEnable:
    def test_enable_and_disable(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        before, attributes = greedy(model), set(vars(model))
        assert enable(model, checkpoint + "/commvq/2bit") is model
        assert isinstance(cache_of(model), CommVQCache)
        assert disable(model) is model
        assert set(vars(model)) == attributes and not hasattr(model.generation_config, "kv_cache")
        assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(greedy(model), before) and type(cache_of(model)) is DynamicCache
        disable(model)  # does nothing

    def test_enable_twice_replaces(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", kv_cache="commvq")
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        enable(model, {"bits": 1, "sink_tokens": 2})
        assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
        cache = cache_of(model)
        assert cache.codebook.bits == 1.0 and cache.layers[0].sink_tokens == 2
        disable(model)
        assert model.config._attn_implementation == "eager"

    def test_a_failed_enable_changes_nothing(self, checkpoint, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")
        with pytest.raises(CodebookError):
            enable(model, str(tmp_path / "none"))
        assert isinstance(cache_of(model), CommVQCache)

    def test_not_a_model(self):
        with pytest.raises(UnsupportedModelError, match="Linear"):
            enable(torch.nn.Linear(2, 2))

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_copies_are_enabled_and_independent(self, checkpoint, way):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache={"residual_length": 16})
        want = greedy(model)
        twin = way(model)
        assert torch.equal(greedy(twin), want) and isinstance(cache_of(twin), CommVQCache)
        disable(twin)
        assert type(cache_of(twin)) is DynamicCache and isinstance(cache_of(model), CommVQCache)
        assert torch.equal(greedy(model), want)
        assert not [m for m in twin.modules() if m._forward_pre_hooks]


class TestOneCall:
    @pytest.fixture
    def model(self, checkpoint):
        return AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")

    def test_off_for_one_call(self, model, checkpoint):
        plain = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert type(cache_of(model, kv_cache=False)) is DynamicCache
        assert torch.equal(greedy(model, kv_cache=False), greedy(plain))
        assert isinstance(cache_of(model), CommVQCache)

    def test_other_settings_for_one_call(self, model, checkpoint):
        cache = cache_of(model, kv_cache={"bits": 1})
        assert cache.codebook.bits == 1.0
        assert cache_of(model, kv_cache={"sink_tokens": 0}).layers[0].sink_tokens == 0
        assert cache_of(model, kv_cache="commvq").codebook.bits == 2.0
        assert cache_of(model, kv_cache=checkpoint + "/commvq/1bit").codebook.bits == 1.0
        assert cache_of(model, kv_cache={"bits": 1}).codebook is cache.codebook  # read once
        with pytest.raises(ConfigError, match="unknown fields"):
            cache_of(model, kv_cache={"bitz": 1})

    def test_own_generation_config(self, model):
        config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
        out = model.generate(**prompt(), generation_config=config, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, CommVQCache)

    def test_use_cache_false(self, model, checkpoint):
        out = greedy(model, new=5, use_cache=False, return_dict_in_generate=True)
        assert out.past_key_values is None
        assert torch.equal(out.sequences, greedy(AutoModelForCausalLM.from_pretrained(checkpoint), new=5))

    def test_an_explicit_cache_is_used(self, model):
        given = DynamicCache(config=model.config)
        assert cache_of(model, past_key_values=given) is given
        given = make_cache(model, {"residual_length": 8})
        assert cache_of(model, past_key_values=given) is given

    @pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
    @pytest.mark.parametrize("name", sorted({"past_key_values", generate_cache_name()}))
    def test_under_every_name_this_transformers_knows(self, model, name):
        """Version 5.24 renamed the argument; a cache given under either name must not be replaced by ours."""
        for given in (DynamicCache(config=model.config), make_cache(model)):
            assert cache_of(model, **{name: given}) is given and given.get_seq_length() == 63
            ids = torch.tensor([[5, 6]] * 2)
            with torch.no_grad():
                assert model(ids, **{name: given}).past_key_values is given and given.get_seq_length() == 65
                fresh = model(ids, **{name: None}).past_key_values
            assert isinstance(fresh, CommVQCache) and fresh.get_seq_length() == 2

    def test_no_warnings_beyond_the_plain_cache(self, model):
        def warned(**kwargs):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                greedy(model, new=3, **kwargs)
                with torch.no_grad():
                    model(prompt()["input_ids"])
            return [str(w.message) for w in caught]

        assert warned() == warned(kv_cache=False)

    def test_another_cache_implementation_is_used_and_told(self, model, checkpoint):
        with pytest.warns(UserWarning, match="not compressed"):
            out = greedy(model, cache_implementation="static", return_dict_in_generate=True, disable_compile=True)
        assert type(out.past_key_values).__name__ == "StaticCache"
        assert torch.equal(out.sequences, greedy(AutoModelForCausalLM.from_pretrained(checkpoint)))


class TestPlainForward:
    def test_supplies_a_cache(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")
        ids = prompt()["input_ids"]
        with torch.no_grad():
            assert isinstance(model(ids).past_key_values, CommVQCache)
            assert isinstance(model(ids, None, None, None).past_key_values, CommVQCache)
            assert model(ids, use_cache=False).past_key_values is None
            mine = make_cache(model)
            assert model(ids, None, None, mine).past_key_values is mine and mine.get_seq_length() == ids.shape[1]

    def test_training_keeps_its_own_cache(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")
        ids = prompt()["input_ids"]
        out = model(ids, labels=ids)
        assert not isinstance(out.past_key_values, CommVQCache)
        out.loss.backward()
        model.train()
        with torch.no_grad():
            assert not isinstance(model(ids).past_key_values, CommVQCache)

    def test_the_prompt_alone_is_exact(self, checkpoint):
        """On an empty cache attention is the model's own: nothing has been compressed yet."""
        plain = AutoModelForCausalLM.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")
        inputs = prompt(2, 300)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=0)

    def test_attention_weights_are_refused(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")
        with pytest.raises(ConfigError, match=r"output_attentions.*eager"):
            model(**prompt(), output_attentions=True)
        with pytest.raises(ConfigError, match="output_attentions"):
            greedy(model, output_attentions=True, return_dict_in_generate=True)
        model.set_attn_implementation("eager")  # what the message says
        out = greedy(model, new=5, output_attentions=True, return_dict_in_generate=True)
        assert out.attentions[-1][0].shape == (2, 4, 1, 64) and isinstance(out.past_key_values, CommVQCache)


class TestSaved:
    def test_reload_enables_again(self, checkpoint, tmp_path):
        spec = {"codebook": checkpoint + "/commvq/2bit", "residual_length": 16}
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache=spec)
        model.save_pretrained(tmp_path / "copy")
        saved = json.loads((tmp_path / "copy/generation_config.json").read_text())["kv_cache"]
        assert saved["residual_length"] == 16 and saved["quant_method"] == "commvq"
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
        assert isinstance(cache_of(again), CommVQCache)
        assert torch.equal(greedy(again), greedy(model))
        off = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", kv_cache=False)
        assert type(cache_of(off)) is DynamicCache

    def test_a_copy_without_codebooks_says_how_to_load_it(self, checkpoint, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")
        model.save_pretrained(tmp_path / "copy")
        with pytest.raises(CodebookError, match="kv_cache=False"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
        assert type(cache_of(AutoModelForCausalLM.from_pretrained(tmp_path / "copy", kv_cache=False))) is DynamicCache

    def test_the_hub_id_of_the_model_is_saved(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.config._name_or_path = "org/tiny"
        enable(model, checkpoint + "/commvq/2bit")
        assert model.generation_config.kv_cache["base_model"] == "org/tiny"

    def test_saving_after_disable_leaves_no_trace(self, checkpoint, tmp_path):
        model = disable(AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq"))
        model.save_pretrained(tmp_path / "copy")
        assert "kv_cache" not in (tmp_path / "copy/generation_config.json").read_text()
        assert "commvq" not in (tmp_path / "copy/config.json").read_text()


class TestUnsupported:
    def test_models_without_rope(self):
        with pytest.raises(UnsupportedModelError, match="rotary"):
            enable(from_config(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4)))

    def test_encoder_decoder(self):
        class Pair(LlamaForCausalLM):
            pass

        model = Pair(LlamaConfig(**SHAPE, is_encoder_decoder=True))
        with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
            enable(model)

    def test_generate_batch_is_refused(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")
        with pytest.raises(CacheUseError, match=r"generate_batch.*disable"):
            model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2))


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": 200,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_type(kind):
    """Dynamic and longrope change their frequencies in the middle of this sequence."""
    limit = 200 if kind in ("dynamic", "longrope") else 2048
    model, inputs = tiny_llama(rope_parameters=ROPES[kind], max_position_embeddings=limit), prompt(2, 170, 40)
    want = greedy(model, inputs, 60)
    enable_lossless(model, residual_length=32)
    for name in ("commvq", "sdpa"):
        model.set_attn_implementation(name)
        got = greedy(model, inputs, 60, return_dict_in_generate=True)
        assert torch.equal(got.sequences, want)
        assert got.past_key_values.positions.fixed == (kind not in ("dynamic", "longrope"))
        assert got.past_key_values.layers[0].coded == 192


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["commvq", "sdpa", "eager"])
def test_dtypes_and_fallback_paths(dtype, implementation):
    """With any other attention function the cache hands out everything, decoded."""
    model, inputs = tiny_llama(dtype=dtype), prompt(2, 200, 70)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
        new = torch.tensor([[5, 6, 7]] * 2)
        want = model(new, attention_mask=mask, past_key_values=cache).logits
        enable_lossless(model, residual_length=32)
        model.set_attn_implementation(implementation)
        mine = model(**inputs).past_key_values
        got = model(new, attention_mask=mask, past_key_values=mine).logits
    assert isinstance(mine, CommVQCache) and mine.layers[0].coded >= 128 and got.dtype == dtype
    # Half precision: keys are rotated back from values rounded to the dtype, and added up in another order.
    bound = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    assert (got - want).abs().max() <= bound * want.abs().max()


def run_python(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class TestImport:
    def test_changes_nothing_but_registries_and_from_pretrained(self):
        run_python("""
            import sys, types
            import transformers
            from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, cache_utils
            from transformers import modeling_utils, masking_utils, generation
            from transformers.generation import utils, configuration_utils
            from transformers.quantizers import auto
            from transformers.models.llama import modeling_llama
            import transformers.models.auto.auto_factory

            def snapshot():
                out = {}
                for name, module in list(sys.modules.items()):
                    if name.split(".")[0] != "transformers" or module is None:
                        continue
                    for key, value in list(vars(module).items()):
                        out[name, key] = value
                        if isinstance(value, type) and value.__module__.startswith("transformers"):
                            for attribute, member in list(vars(value).items()):
                                if not attribute.startswith(("__", "_abc")):
                                    out[name, key, attribute] = member
                return out

            known = [AttentionInterface, AttentionMaskInterface]
            sizes = lambda: [set(k._global_mapping) for k in known] + [
                set(auto.AUTO_QUANTIZER_MAPPING), set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)]
            before, mappings = snapshot(), sizes()
            import transformers_commvq
            after = snapshot()
            changed = {k for k in before if k in after and after[k] is not before[k]}
            assert {k[1:] for k in changed} == {("PreTrainedModel", "from_pretrained")}, changed
            assert all(b - a == {"commvq"} for a, b in zip(mappings, sizes()))

            once = vars(PreTrainedModel)["from_pretrained"]
            transformers_commvq.register()
            assert vars(PreTrainedModel)["from_pretrained"] is once
            transformers_commvq.unregister()
            first = next(v for k, v in before.items() if k[1:] == ("PreTrainedModel", "from_pretrained"))
            assert vars(PreTrainedModel)["from_pretrained"].__func__ is first.__func__
            assert sizes()[2:] == mappings[2:]  # the attention function stays, for models still enabled
            transformers_commvq.unregister()
            transformers_commvq.register()
            assert hasattr(vars(PreTrainedModel)["from_pretrained"].__func__, "_commvq_original")
        """)

    def test_an_enabled_model_outlives_unregister(self):
        run_python("""
            import sys; sys.path.insert(0, "tests")
            import transformers_commvq
            from generation import greedy, tiny_llama
            from lossless import enable_lossless
            model = enable_lossless(tiny_llama())
            transformers_commvq.unregister()
            out = greedy(model, return_dict_in_generate=True)
            assert type(out.past_key_values).__name__ == "CommVQCache"
        """)


def test_random_codebooks_fit(checkpoint):
    """The fixture itself: what it saves is what a model of its geometry takes."""
    random_codebook(tiny_llama()).check(transformers_commvq.geometry.read_model(tiny_llama()).geometry)
