"""The learn and eval commands, on a random model with a tokenizer of one token a character."""

import argparse
import json

import pytest
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_commvq.cards import PICTURES, License, make_card
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
        assert book.calibration["window"] == 512 and book.calibration["tokens"] == 1024  # a window of each text
        assert set(book.evaluation) == {"plain.txt", "rows.jsonl"}
        assert str(tmp_path) not in (folder / "config.json").read_text()
        report = json.loads((folder / "report.json").read_text())
        assert set(report) == {"bits_per_head", "relative_error", "loss_curves"}
        for layer, sides in report["loss_curves"].items():
            for side, curves in sides.items():
                assert [min(curve[4:]) for curve in curves] == report["relative_error"][layer][side]
                assert all(len(curve) == 1 + 8 and min(curve) >= 0 for curve in curves)
        for picture in PICTURES:
            assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / ".learning").exists()
    (folder / "README.md").write_text(make_card(folder, "someone/tiny-CommVQ-1bit", License("mit")))
    words = [checkpoint, "--codebook", folder, "--bits", 1, "--text", texts[0], "--json", "--record"]
    assert run(eval_command, *words, "--windows", 1, "--length", 300) == 0
    measured = json.loads(capsys.readouterr().out)["caches"]["commvq-1"]["texts"]["plain.txt"]
    assert measured["kl"] > 0
    recorded = Codebook.load(folder)
    assert recorded.sha256 == book.sha256 and recorded.evaluation["rows.jsonl"] == book.evaluation["rows.jsonl"]
    assert recorded.evaluation["plain.txt"] == measured != book.evaluation["plain.txt"]
    card = (folder / "README.md").read_text()
    assert card == make_card(folder, folder.name, License("mit"))
    assert f"| plain.txt | {measured['reference_perplexity']:.3f} | {measured['perplexity']:.3f} |" in card


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


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    rows = [{"question": f"{i} plus {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(5)]
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_caches_side_by_side(checkpoint, texts, problems, capsys):
    pytest.importorskip("optimum.quanto")
    words = [checkpoint, "--cache", "dynamic", "quanto-4", "fp8", "--task", "perplexity", "passkey", "gsm8k"]
    words += ["--text", texts[0], "--windows", 1, "--length", 300, "--lengths", 300, "--depths", 0.5, "--trials", 1]
    words += ["--file", problems, "--problems", 2, "--shots", 1]
    assert run(eval_command, *words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "float32"
    caches = report["caches"]
    assert {name: row["bits"] for name, row in caches.items()} == {"dynamic": 32, "quanto-4": 5, "fp8": 8}
    plain, quanto, fp8 = (row["texts"]["plain.txt"] for row in caches.values())
    assert quanto["kl"] > fp8["kl"] > plain["kl"] == 0
    assert max(quanto["cache_bytes"], fp8["cache_bytes"]) < plain["cache_bytes"] == 299 * 128 * 4
    for row in caches.values():
        assert list(row["passkey"]["300"]) == ["0.5"]
        assert len(row["gsm8k"]["answers"]) == 2 and 0 <= row["gsm8k"]["accuracy"] <= 1
    printed = eval_command.summary(report).splitlines()
    assert printed[0].split("|")[1:4] == [" cache    ", "  bits ", " plain.txt: perplexity "]
    assert printed[3].split("|")[2].strip() == "5.00"


def test_mistakes_of_eval_are_explained(checkpoint, texts, tmp_path):
    for words, message in (
        ([], "nothing to measure. Fix: give --text FILE"),
        (["--task", "gsm8k"], "nothing to measure. Fix: give --file JSONL"),
        (["--text", texts[0], "--cache", "zip"], "'zip': expected dynamic"),
        (["--text", texts[0], "--cache", "fp8", "--codebook", "x"], "one commvq cache"),
        (["--cache", "dynamic", "--task", "passkey", "--depths", "2"], "depths from 0 to 1"),
        (["--text", texts[0], "--codebook", "someone/books", "--record"], "is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(eval_command, checkpoint, *words)
