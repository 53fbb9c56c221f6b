"""Ways of generating with the shipped 2-bit codebooks on a real model: codes are used, and a run repeats itself."""

import pytest
import torch
from generation import greedy

from transformers_commvq import demo_model, disable, enable

NEW = 6
WAYS = {
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam search": {"num_beams": 3},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "prefill in chunks": {"prefill_chunk_size": 48},
    "scores": {"output_scores": True, "output_logits": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 4},
}
ONE_ROW = {"prompt lookup", "early exit"}  # transformers' own limit


@pytest.fixture(scope="module")
def model(smollm2):
    model = smollm2[0]
    enable(model, {"bits": 2, "base_model": demo_model.BASE_MODEL, "residual_length": 16})
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    yield model
    model.generation_config.eos_token_id = before
    disable(model)


def prompt(rows):
    ids = torch.randint(100, 40000, (rows, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[-1, :60], mask[-1, :60] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("way", WAYS)
def test_runs_on_codes_and_repeats_itself(model, way):
    rows = 1 if way in ONE_ROW else 2
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(greedy(model, prompt(rows), NEW, return_dict_in_generate=True, **WAYS[way]))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert runs[0].sequences.shape[1] == 150 + NEW
    assert all(layer.coded >= 128 for layer in runs[0].past_key_values.layers)
    if way == "scores":
        assert all(torch.isfinite(step).all() for step in runs[0].logits)
