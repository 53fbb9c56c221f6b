"""Streaming quality is exact for an uncompressed cache, and notices a bad one."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from generation import saved_codebook
from tiny_models import tiny_model, token_windows
from transformers import DynamicCache

from transformers_commvq import evaluation
from transformers_commvq.config import ConfigError
from transformers_commvq.evaluation import passkey_retrieval, streaming_quality, uncompressed


class NoisyCache(DynamicCache):
    """Adds noise to every value it is given."""

    def update(self, key, value, layer, *args, **kwargs):
        return super().update(key, value + 0.3 * value.std() * torch.sin(37 * value), layer, *args, **kwargs)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_uncompressed_streaming_equals_one_forward_pass(name, chunk):
    model, windows = tiny_model(name), token_windows(2, 50)
    got = streaming_quality(model, uncompressed, windows, chunk=chunk, progress=False)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:]).item() for w in windows]
    assert got.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    assert got.losses == pytest.approx(losses, rel=1e-4)
    assert got.mean_kl == pytest.approx(0, abs=1e-6) and got.change == pytest.approx(0, abs=1e-6)
    assert got.tokens == (49, 49)


def test_a_worse_cache_is_worse():
    got = streaming_quality(tiny_model("llama-gqa"), lambda m: NoisyCache(), token_windows(3, 60), progress=False)
    assert got.mean_kl > 1e-4
    assert got.noise["kl"] > 0
    report = got.to_dict()
    assert report["windows"] == 3 and report["tokens"] == 177


def test_refuses_what_it_cannot_measure():
    model = tiny_model("llama-gqa")
    for windows, chunk in (([], 8), ([torch.tensor([1])], 8), (token_windows(1, 9), 0)):
        with pytest.raises(ConfigError):
            streaming_quality(model, uncompressed, windows, chunk=chunk, progress=False)


class Characters:
    """A tokenizer with one token a character."""

    def __call__(self, text, return_tensors=None):
        ids = [ord(c) % 96 for c in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids):
        return "".join(chr(i + 32) if i < 64 else chr(i) for i in ids)


def test_passkey_grid():
    got = passkey_retrieval(tiny_model("llama-gqa"), Characters(), lengths=(200, 300), depths=(0.0, 1.0), trials=2)
    assert set(got) == {200, 300} and set(got[200]) == {0.0, 1.0}
    assert all(0 <= share <= 1 for row in got.values() for share in row.values())


class Letters:
    """A tokenizer whose tokens can be read back."""

    def __call__(self, text, return_tensors=None):
        ids = [ord(c) for c in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_parts_of_a_passkey_grid_add_up(monkeypatch):
    """Several processes try every trial once, with the passkeys of one process."""
    asked = []

    def knows_odd_numbers(model, ids, cache, count):
        key = re.search(r"pass key is (\d+)", Letters().decode(ids[0].tolist())).group(1)
        asked.append(key)
        return [ord(c) for c in key] if int(key) % 2 else []

    monkeypatch.setattr(evaluation, "_greedy", knows_odd_numbers)
    model, settings = tiny_model("llama-gqa"), {"lengths": (300, 400), "depths": (0.0, 0.5), "trials": 5}
    whole = passkey_retrieval(model, Letters(), **settings)
    keys, asked[:] = sorted(asked), []
    assert 0 < sum(share for row in whole.values() for share in row.values()) < 4
    for count in (2, 3):
        parts = [passkey_retrieval(model, Letters(), **settings, part=(i, count)) for i in range(count)]
        for length, row in whole.items():
            for depth, share in row.items():
                assert sum(p[length][depth] for p in parts) == pytest.approx(share)
        assert sorted(asked) == keys
        asked.clear()


@pytest.mark.slow
def test_processes_of_accelerate_launch_report_what_one_process_does(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny_model("llama-gqa")
    model.save_pretrained(tmp_path / "model")
    saved_codebook(model, tmp_path / "model" / "commvq")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{int(i)}" for i in torch.randint(4, 96, (2000,))))
    arguments = ["-m", "transformers_commvq", "eval", str(tmp_path / "model"), "--text", str(text), "--json"]
    arguments += ["--windows", "3", "--length", "200", "--chunk", "64", "--passkey", "150", "--trials", "1"]
    # Without a GPU, --multi_gpu is accelerate's way to start several processes on the CPU, by torch.distributed.run.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    reports = []
    for start in ([], launch):
        done = subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        reports.append(done.stdout)
    assert reports[0] == reports[1]  # the second is printed once, and equal to the last digit
    report = json.loads(reports[0])
    assert report["texts"]["text.txt"]["windows"] == 3 and report["texts"]["text.txt"]["kl"] > 0
    assert set(report["passkey"]) == {"150"}
