"""The learn and eval commands, on a random model with a tokenizer of one token a character."""

import argparse
import json

import pytest
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_commvq.cli import eval as eval_command
from transformers_commvq.cli import learn as learn_command
from transformers_commvq.codebook import Codebook
from transformers_commvq.config import ConfigError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama-gqa").save_pretrained(folder)
    characters = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(95)} | {"\n": 95}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, unk_token=" ").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "plain.txt").write_text("".join(f"Line {i} holds {i * i} and {i % 7}.\n" for i in range(2000)))
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"{2 * i}"} for i in range(2000)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(folder / "plain.txt"), str(folder / "rows.jsonl")]


def run(command, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(w) for w in words]))


def test_learn_then_eval(checkpoint, texts, tmp_path, capsys):
    words = [checkpoint, "--bits", 2, 1, "--out", tmp_path, "--tokens", 1024, "--base-model", "someone/tiny"]
    assert run(learn_command, *words, "--text", *texts, "--eval-windows", 1) == 0
    printed = capsys.readouterr().out
    for rate in (2, 1):
        folder = tmp_path / f"tiny-CommVQ-{rate}bit"
        assert str(folder) in printed
        book = Codebook.load(folder)
        assert book.bits == rate and book.geometry.id == "someone/tiny"
        assert book.calibration["texts"] == ["plain.txt", "rows.jsonl"]
        assert set(book.evaluation) == {"plain.txt", "rows.jsonl"}
        assert str(tmp_path) not in (folder / "config.json").read_text()
        assert set(json.loads((folder / "report.json").read_text())) == {"bits_per_head", "relative_error"}
    assert not (tmp_path / ".learning").exists()
    words = [checkpoint, "--codebook", tmp_path / "tiny-CommVQ-1bit", "--bits", 1, "--text", texts[0], "--json"]
    assert run(eval_command, *words, "--windows", 1, "--length", 300, "--passkey", 300, "--trials", 1) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["texts"]["plain.txt"]["kl"] > 0 and report["passkey"]["300"]


def test_learn_is_reproducible(checkpoint, texts, tmp_path):
    for name in ("a", "b"):
        words = [checkpoint, "--bits", 1, "--out", tmp_path / name, "--tokens", 1024, "--text", texts[0]]
        run(learn_command, *words, "--eval-windows", 0)
    a, b = (next((tmp_path / name).glob("*/codebooks.safetensors")).read_bytes() for name in ("a", "b"))
    assert a == b


def test_mistakes_are_explained(checkpoint, texts, tmp_path):
    with pytest.raises(ConfigError, match="no such text file"):
        run(learn_command, checkpoint, "--text", tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="dtype"):
        run(learn_command, checkpoint, "--text", texts[0], "--dtype", "float3")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        run(learn_command, tmp_path, "--text", texts[0])
    with pytest.raises(ConfigError, match="nothing to measure"):
        run(eval_command, checkpoint)
