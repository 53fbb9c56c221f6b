"""kv_cache={"learn": True}: codebooks are learned once, kept, and found again."""

import functools
import logging

import pytest
import torch
from huggingface_hub import constants
from tiny_models import tiny_model

from transformers_commvq import CodebookNotFoundError, enable, make_cache, recipe
from transformers_commvq.calibration import CalibrationPlan
from transformers_commvq.learning import LearningPlan


@pytest.fixture
def small_recipe(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    plan = CalibrationPlan(samples=256, metric_windows=2, metric_length=96, residual_length=16)
    quick = functools.partial(
        recipe.Recipe, tokens=512, window=96, calibration=plan, learning=LearningPlan(rounds=2, warm_tokens=128)
    )
    monkeypatch.setattr(recipe, "Recipe", quick)
    return tmp_path / "commvq" / "learned"


def test_learned_once_and_found_again(small_recipe, caplog):
    model = tiny_model("llama-gqa").eval()
    with caplog.at_level(logging.WARNING):
        enable(model, {"bits": 2, "learn": True})
    assert "learning them now" in caplog.text and str(small_recipe) in caplog.text
    (folder,) = small_recipe.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["codebooks.safetensors", "config.json"]
    first = make_cache(model).codebook
    out = model.generate(torch.arange(3, 40)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 41)

    caplog.clear()
    again = tiny_model("llama-gqa").eval()
    enable(again, {"bits": 2, "learn": True})
    assert not caplog.text and make_cache(again).codebook.sha256 == first.sha256


def test_other_weights_learn_their_own(small_recipe):
    model = tiny_model("llama-gqa").eval()
    enable(model, {"bits": 2, "learn": True})
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    enable(model, {"bits": 2, "learn": True})
    assert len(list(small_recipe.iterdir())) == 2


def test_without_learn_the_command_is_told():
    with pytest.raises(CodebookNotFoundError, match="transformers-commvq learn"):
        enable(tiny_model("llama-gqa"), {"bits": 2})
