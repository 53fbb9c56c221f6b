"""Streaming quality is exact for an uncompressed cache, and notices a bad one."""

import json
import math
import subprocess
import sys

import pytest
import torch
from generation import saved_codebook
from tiny_models import tiny_model, token_windows
from transformers import DynamicCache

from transformers_commvq.config import ConfigError
from transformers_commvq.evaluation import kept_reference, streaming_quality
from transformers_commvq.storage import uncompressed


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


def test_a_kept_reference_changes_nothing():
    model, windows = tiny_model("llama-gqa"), token_windows(2, 60)
    kept = kept_reference(model, windows, chunk=16)
    for make in (uncompressed, lambda m: NoisyCache()):
        live = streaming_quality(model, make, windows, chunk=16, progress=False)
        assert streaming_quality(model, make, windows, chunk=16, progress=False, reference=kept) == live


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
    arguments += ["--windows", "3", "--length", "200", "--chunk", "64"]
    arguments += ["--task", "perplexity", "passkey", "--lengths", "150", "--trials", "1"]
    # Without a GPU, --multi_gpu is accelerate's way to start several processes on the CPU, by torch.distributed.run.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    reports = []
    for start in ([], launch):
        done = subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        reports.append(done.stdout)
    assert reports[0] == reports[1]  # the second is printed once, and equal to the last digit
    report = json.loads(reports[0])["caches"]["commvq-2"]
    assert report["texts"]["text.txt"]["windows"] == 3 and report["texts"]["text.txt"]["kl"] > 0
    assert set(report["passkey"]) == {"150"}
