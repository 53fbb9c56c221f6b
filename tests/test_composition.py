"""The compressed cache beside other things that change a model: adapters, quantized weights, offloading, sharding."""

import subprocess
import sys
import textwrap

import pytest
import torch
from generation import greedy, prompt, saved_codebook, tiny_llama
from lossless import enable_lossless
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from transformers_commvq import CommVQCache, CommVQConfig, ConfigError, demo_model, disable, enable, make_cache

KW = {"return_dict_in_generate": True}


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny_llama(num_hidden_layers=3, intermediate_size=128)
    model.save_pretrained(tmp_path / "model")
    saved_codebook(model, tmp_path / "model" / "commvq")
    return str(tmp_path / "model")


def same_as_plain(model, plain, inputs=None):
    """With lossless codes a model must give what its plain twin gives."""
    inputs = prompt(2, 120, 40) if inputs is None else inputs
    want = greedy(plain, inputs, 30)
    got = greedy(model, inputs, 30, **KW)
    assert isinstance(got.past_key_values, CommVQCache) and got.past_key_values.layers[0].coded >= 64
    assert torch.equal(got.sequences, want)


class TestPeft:
    @pytest.fixture
    def adapted(self):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj"])
        model = peft.get_peft_model(tiny_llama(), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)  # an adapter that does something
        return model

    def test_enable_on_a_peft_model(self, adapted):
        want = greedy(adapted)
        assert enable_lossless(adapted, residual_length=16) is adapted
        out = greedy(adapted, **KW)
        assert isinstance(out.past_key_values, CommVQCache) and torch.equal(out.sequences, want)
        assert isinstance(make_cache(adapted), CommVQCache)
        assert not isinstance(greedy(disable(adapted), **KW).past_key_values, CommVQCache)

    def test_an_adapter_added_after_enable(self, checkpoint):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"]))
        assert isinstance(greedy(model.eval(), **KW).past_key_values, CommVQCache)
        with model.disable_adapter():
            assert isinstance(greedy(model, **KW).past_key_values, CommVQCache)


def both(checkpoint, weights):
    """(with the plain cache, with a compressed one) of a checkpoint loaded with quantized weights."""
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=weights)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=weights, kv_cache="commvq")
    plain.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    return plain, model


def same_tokens_as(model, plain):
    """Its own 2-bit codes first, then codes that lose nothing."""
    assert isinstance(greedy(model, **KW).past_key_values, CommVQCache)
    enable_lossless(model, residual_length=16)
    same_as_plain(model, plain)


class TestQuantizedWeights:
    def test_torchao(self, checkpoint):
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import Int8WeightOnlyConfig

        plain, model = both(checkpoint, TorchAoConfig(Int8WeightOnlyConfig()))
        assert "Int8" in type(model.model.layers[0].self_attn.k_proj.weight).__name__
        same_tokens_as(model, plain)

    def test_quanto(self, checkpoint):
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        plain, model = both(checkpoint, QuantoConfig(weights="int8"))
        assert type(model.model.layers[0].self_attn.k_proj).__name__ == "QLinear"
        same_tokens_as(model, plain)

    @pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["8 bits", "4 bits"])
    def test_bitsandbytes(self, checkpoint, bits):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        plain, model = both(checkpoint, BitsAndBytesConfig(**bits))
        assert type(model.model.layers[0].self_attn.k_proj).__module__.startswith("bitsandbytes")
        same_tokens_as(model, plain)

    def test_a_saved_quantized_checkpoint_has_no_slot(self, checkpoint, tmp_path):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        _, model = both(checkpoint, BitsAndBytesConfig(load_in_4bit=True))
        model.save_pretrained(tmp_path / "4bit")
        with pytest.raises(ConfigError, match="bitsandbytes.*kv_cache="):
            AutoModelForCausalLM.from_pretrained(tmp_path / "4bit", quantization_config=CommVQConfig())

    @pytest.mark.slow
    def test_gguf(self):
        """A real GGUF file in one call: its weights stay packed, the cache takes the codebooks that ship."""
        try:
            file = demo_model.find_gguf()
        except demo_model.DemoModelError as error:
            pytest.skip(str(error))
        kv_cache = {"base_model": demo_model.BASE_MODEL, "residual_length": 16}
        where = {"gguf_file": file.name, "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(file.parent, **where, kv_cache=kv_cache)
        assert model.config.quantization_config.quant_method == "gguf"
        inputs = prompt(1, 90, 0)
        out = greedy(model, inputs, 4, **KW)
        assert isinstance(out.past_key_values, CommVQCache) and out.past_key_values.layers[0].coded == 64
        want = greedy(model, inputs, 4, kv_cache=False)
        enable_lossless(model, residual_length=16)
        assert torch.equal(greedy(model, inputs, 4), want)


@pytest.mark.parametrize("place", ["disk", "cpu", "auto"])
def test_offloaded_weights(checkpoint, tmp_path, place):
    """Layers whose weights come and go: hooks of accelerate and ours on the same modules."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": place if i else "cpu" for i in range(3)}
    settings = {"device_map": device_map}
    if place == "auto":  # the memory allowed leaves no room for all layers
        half = sum(p.nbytes for p in plain.parameters()) // 2
        settings = {"device_map": "auto", "max_memory": {"cpu": half}}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, offload_folder=str(tmp_path / "off"), kv_cache="commvq", **settings
    )
    plain.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    if place != "cpu":
        assert next(model.model.layers[2].parameters()).device.type == "meta"
    assert isinstance(greedy(model, **KW).past_key_values, CommVQCache)
    enable_lossless(model, residual_length=16)
    same_as_plain(model, plain)


def test_moving_the_model_after_enable(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, kv_cache="commvq")
    first = make_cache(model).codebook
    assert make_cache(model).codebook is first  # shared, not copied, between caches
    model.to(torch.float64).to(torch.bfloat16)
    assert isinstance(greedy(model, **KW).past_key_values, CommVQCache)


@pytest.mark.slow
def test_tensor_parallel(checkpoint, tmp_path):
    """Two processes with half the key heads each give the tokens of one process with all."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    enable(model, {"codebook": checkpoint + "/commvq", "residual_length": 16})
    model.generation_config.eos_token_id = None
    want = greedy(model, prompt(2, 120, 40), 30)
    torch.save(want, tmp_path / "want.pt")
    script = tmp_path / "work.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        sys.path.insert(0, "tests")
        import torch
        import torch.distributed as dist
        from generation import greedy, prompt
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        import transformers_commvq

        folder, want = sys.argv[1], torch.load(sys.argv[2])
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=2), dtype=torch.float32,
            kv_cache={"codebook": folder + "/commvq", "residual_length": 16},
        )
        model.generation_config.eos_token_id = None
        out = greedy(model, prompt(2, 120, 40), 30, return_dict_in_generate=True)
        layer = out.past_key_values.layers[0]
        assert layer.keys.shape[1] == 1 and layer.coded == 128, (layer.keys.shape, layer.coded)
        assert torch.equal(out.sequences, want)
        print("same tokens", flush=True)
        dist.destroy_process_group()
    """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(script), checkpoint, str(tmp_path / "want.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same tokens") == 2
