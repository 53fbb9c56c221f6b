"""The benchmark commands run from end to end, on a toy; what they record is what they say they record."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are not installed

from benchmarks import authors_kernels, proof_24gb  # noqa: E402


def command(*args, **variables):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, env={**env, **variables}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_speed_of_a_toy(tmp_path):
    ours = ["commvq-2", "commvq-1"]
    done = command(
        "benchmarks.speed", "--device", "cpu", "--model", "toy", "--contexts", "300", "450", "--methods", "dynamic",
        "commvq", "--bits", "2", "1", "--new", "3", "--steps", "5", "--rounds", "2", "--results", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("speed_toy_*.json")
    report = json.loads(file.read_text())
    assert list(report["contexts"]) == ["300", "450"]
    for tokens, context in report["contexts"].items():
        methods = context["methods"]
        assert list(methods) == ["dynamic", *ours]
        for row in methods.values():
            assert len(row["rounds"]) == 2
            assert len(row["steps_s"]) == 5
            assert min(row["steps_s"]) <= row["step_s"] <= max(row["steps_s"])
        # 4 layers, keys and values, 2 heads of 16 float32 numbers; the last new token is never stored
        assert methods["dynamic"]["cache_bytes"] == (int(tokens) + 2) * 4 * 2 * 2 * 16 * 4
        ratios = context["ratios_to"]["dynamic"]
        for name in ours:
            assert methods[name]["storing_s"] > 0
            assert ratios[name]["cache_bytes"] == methods[name]["cache_bytes"] / methods["dynamic"]["cache_bytes"]
            assert ratios[name]["step_speed"] == methods["dynamic"]["step_s"] / methods[name]["step_s"]
        assert methods["commvq-1"]["cache_bytes"] < methods["commvq-2"]["cache_bytes"]
    for plot in ("step", "cache"):
        assert file.with_name(f"{file.stem}_{plot}.png").stat().st_size > 1000


def test_speed_says_what_it_cannot_do():
    done = command("benchmarks.speed", "--device", "cpu", "--part", "kernels")
    assert done.returncode == 2
    assert "needs --device cuda" in done.stderr


def test_proof_of_24_gb_runs_dry(tmp_path):
    """What it writes without a GPU, and that it claims nothing."""
    done = command(
        "benchmarks.proof_24gb", "--model", "tiny", "--device", "cpu", "--context", "600", "--new", "3",
        "--chunk", "128", "--results", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dynamic" in done.stdout and "nothing is proved" in done.stdout
    (file,) = tmp_path.glob("proof_24gb_tiny_*.json")
    report = json.loads(file.read_text())
    assert report["limit"] is None and report["shown"] is None
    runs, expected = report["runs"], report["expected"]
    assert {row["tokens_held"] for row in runs.values()} == {602}  # the last new token is never stored
    assert runs["dynamic"]["cache_bytes"] == 602 * 4 * 2 * 2 * 16 * 2
    assert runs["commvq-1"]["cache_bytes"] < runs["dynamic"]["cache_bytes"]
    assert expected["plain_cache"] == 603 * 4 * 2 * 2 * 16 * 2
    assert abs(expected["compressed_cache"] / runs["commvq-1"]["cache_bytes"] - 1) < 0.2


def test_proof_of_24_gb_expects_what_the_arithmetic_says():
    """Llama 3.1 8B: 8.03 billion parameters; 64 Ki elements a token, so 1 bit is 8 KiB and bfloat16 128 KiB a token."""
    expected = proof_24gb.estimate(proof_24gb.MODELS["llama-8b"](), 1.0, 131072 + 64)
    assert expected["weights"] == 2 * 8_030_261_248
    assert expected["plain_cache"] == (131072 + 64) * 65536 * 2
    assert 1.0 < expected["compressed_cache"] / (131072 * 65536 / 8) < 1.1
    shared = expected["weights"] + expected["reserve"]
    assert shared + expected["compressed_cache"] + expected["codebooks"] < proof_24gb.LIMIT
    assert shared + expected["plain_cache"] > proof_24gb.LIMIT


def test_proof_of_24_gb_tells_memory_that_ran_out_from_other_errors(monkeypatch):
    cache = mock.Mock(get_seq_length=lambda: 77)
    method = proof_24gb.Method("dynamic", None, lambda: cache)

    def generate_once(error):
        def run(method, *_):
            method.make()
            raise error

        return run

    ids = torch.zeros(1, 4, dtype=torch.long)
    monkeypatch.setattr(proof_24gb.measure, "generate_once", generate_once(torch.OutOfMemoryError("CUDA: no\nmore")))
    assert proof_24gb.attempt(method, ids, 1, 2) == {"failed": "CUDA: no", "tokens_held": 77}
    monkeypatch.setattr(proof_24gb.measure, "generate_once", generate_once(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        proof_24gb.attempt(method, ids, 1, 2)


@pytest.mark.parametrize("options", [("--device", "cpu"), ("--device", "cuda"), ("--model", "tiny", "--new", "0")])
def test_proof_of_24_gb_says_what_it_needs(options, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        proof_24gb.arguments(list(options))
    assert ended.value.code == 2
    assert re.search("Fix: .*--model tiny|1 or more", capsys.readouterr().err)


STAND_IN = """
import torch
def calculate_QC_T_triton(query_states, centers):
    heads, pairs, stages, centres, _, _ = centers.shape
    return centers.new_ones(heads, pairs, query_states.shape[0], stages, centres, 1, 2)
def gatherC1C2_and_sum_over_residual_and_apply_rope_and_sum(key_code, QC_T, qsin, qcos, prescale, factor):
    assert key_code.dtype == torch.int16 and QC_T.shape[3] == key_code.shape[2]
    assert qsin.shape == qcos.shape == (1, key_code.shape[-1], QC_T.shape[1])
    assert prescale.shape == (key_code.shape[0], 1, 1, key_code.shape[-1]) and factor == 128 ** 0.5
    return (QC_T.sum() + key_code.float().sum(2)).repeat_interleave(4, 1).unsqueeze(-2)
def attn_weights_mul_value_triton(attn_weights, value_code, prescale, learnable_scale, eps, codebook):
    assert value_code.dtype == torch.uint8 and 8 * value_code.shape[1] == prescale.shape[1] == attn_weights.shape[-1]
    codes = attn_weights.sum(-1, keepdim=True) * (learnable_scale + eps)
    return codes @ codebook.unsqueeze(0)
"""


def test_authors_kernels_are_called_as_their_model_calls_them(tmp_path):
    """With a stand-in of their three functions, whose shapes and names are those of their repository at d1f0377."""
    file = tmp_path / authors_kernels.KERNELS
    file.parent.mkdir()
    file.write_text(STAND_IN)
    kernels = authors_kernels.load(tmp_path)
    x = authors_kernels.authors_inputs(128, 2, torch.device("cpu"))
    out = authors_kernels.authors_attention(kernels, x)()
    assert out.shape == (2, 32, 1, 128) and out.isfinite().all()
    assert authors_kernels.revision(tmp_path) is None
    file.write_text("def calculate_QC_T_triton(query_states, centers): ...")
    with pytest.raises(SystemExit, match="has no gatherC1C2.*d1f0377"):
        authors_kernels.load(tmp_path)


def test_authors_kernels_say_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        authors_kernels.main([str(tmp_path)])
    assert ended.value.code == 2 and "torch sees no GPU. Fix" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"triton_kernels.py does not exist. Fix: git clone https"):
        authors_kernels.main([str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        authors_kernels.main([str(tmp_path), "--lengths", "1000"])
    assert ended.value.code == 2 and "multiples of 128" in capsys.readouterr().err
