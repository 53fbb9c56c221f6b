"""Calibration records the model truthfully and leaves it as it was."""

import pytest
import torch
from tiny_models import CONFIGS, tiny_model, token_windows
from transformers import AttentionInterface, AttentionMaskInterface

from transformers_commvq.calibration import IMPLEMENTATION, CalibrationPlan, calibrate, token_weights
from transformers_commvq.config import ConfigError
from transformers_commvq.traced_attention import explicit_attention, watched_attention, weighing_attention

PLAN = CalibrationPlan(samples=256, metric_windows=2, metric_length=64, sink_tokens=2, residual_length=16)


def state_of(model):
    modules = list(model.modules())
    return (
        model.config._attn_implementation,
        model.training,
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        IMPLEMENTATION in AttentionInterface(),
        IMPLEMENTATION in AttentionMaskInterface(),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_records_keys_before_rope_and_values(name):
    model, windows = tiny_model(name), token_windows(1, 64)
    seen = {}
    first = model.model.layers[0].self_attn
    if name == "phi3-partial":
        first.qkv_proj.register_forward_hook(
            lambda _, __, out: seen.update(keys=out[0, :, 64:128], values=out[0, :, 128:])
        )
    else:
        keys = first.k_norm if name == "qwen3" else first.k_proj
        keys.register_forward_hook(lambda _, __, out: seen.update(keys=out[0]))
        first.v_proj.register_forward_hook(lambda _, __, out: seen.update(values=out[0]))
    _, samples = calibrate(model, windows, PLAN, progress=False)
    for side in ("keys", "values"):
        got = getattr(samples[0], side)
        want = seen[side].reshape(64, got.shape[0], got.shape[2])[2:].transpose(0, 1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_leaves_the_model_as_it_was(training):
    model = tiny_model("llama-gqa").train(training)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before, rng = state_of(model), torch.get_rng_state()
    windows = token_windows(2, 64)
    logits = model.eval()(windows[0][None]).logits
    model.train(training)
    calibrate(model, windows, PLAN, progress=False)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model.eval()(windows[0][None]).logits, logits)


def test_leaves_the_model_as_it_was_after_an_error():
    model = tiny_model("llama-gqa")
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, token_windows(1, 64), PLAN, progress=False)
    assert state_of(model) == before
    handle.remove()


def test_is_deterministic_and_draws_the_asked_number_of_tokens():
    runs = [calibrate(tiny_model("qwen3"), token_windows(4, 200), PLAN, progress=False)[1] for _ in range(2)]
    for layer, sample in runs[0].items():
        assert sample.keys.shape == sample.values.shape == (2, 256, 32)
        for name, tensor in sample.tensors().items():
            assert torch.equal(tensor, runs[1][layer].tensors()[name]), name


@pytest.mark.parametrize("metric_windows", [0, 2])
def test_metrics_are_symmetric_and_positive(metric_windows):
    plan = CalibrationPlan(samples=256, metric_windows=metric_windows, sink_tokens=2, residual_length=16)
    _, samples = calibrate(tiny_model("llama-gqa"), token_windows(2, 128), plan, progress=False)
    for sample in samples.values():
        for metric in (sample.key_metric, sample.value_metric):
            torch.testing.assert_close(metric, metric.transpose(1, 2))
            assert torch.linalg.eigvalsh(metric.double()).min() > -1e-6 * metric.abs().max()
            assert metric.diagonal(dim1=1, dim2=2).sum() > 0


def test_a_model_without_gradients_gets_the_query_estimate():
    model, windows = tiny_model("llama-gqa"), token_windows(2, 128)
    want = calibrate(model, windows, CalibrationPlan(samples=256, metric_windows=0), progress=False)[1]
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: OneWay.apply(out))
    before = state_of(model)
    with pytest.warns(UserWarning, match="no gradients"):
        got = calibrate(model, windows, CalibrationPlan(samples=256), progress=False)[1]
    assert state_of(model) == before
    assert all(torch.equal(got[i].key_metric, want[i].key_metric) for i in want)


class OneWay(torch.autograd.Function):
    """The identity, with no backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


def test_the_metric_is_blind_to_tokens_that_stay_exact():
    """With a window longer than the text no key is ever seen as a code, so no error can cost anything."""
    plan = CalibrationPlan(samples=256, metric_windows=1, metric_length=64, residual_length=64)
    _, samples = calibrate(tiny_model("llama-gqa"), token_windows(1, 64), plan, progress=False)
    assert all(s.key_metric.abs().max() == 0 and s.value_metric.abs().max() == 0 for s in samples.values())
    assert all((s.key_weights == 1).all() and (s.value_weights == 1).all() for s in samples.values())


def test_explicit_attention_is_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), torch.ones(5, 9, dtype=torch.bool).tril(4)
    ).transpose(1, 2)
    torch.testing.assert_close(explicit_attention(q, k, v, None, 8**-0.5), want)
    far = explicit_attention(q, k, v, None, 8**-0.5, s_aux=torch.full((4,), -1e9))
    torch.testing.assert_close(far, want)


def attention_case(kind, tokens):
    """(query, key, value, mask, settings), float64, four heads on two."""
    query, key, value = (torch.randn(1, heads, tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    settings = {"softcap": {"softcap": 500.0}, "sinks": {"s_aux": torch.randn(4, dtype=torch.float64)}}.get(kind, {})
    mask = None
    if kind == "mask":  # a sliding window
        age = torch.arange(tokens)[:, None] - torch.arange(tokens)
        mask = ((age >= 0) & (age < 90))[None, None]
    return query, key, value, mask, settings


KINDS = ["plain", "mask", "softcap", "sinks"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [7, 256, 300])
def test_watched_attention_has_attentions_gradients_and_tells_those_of_far_queries(kind, tokens):
    torch.manual_seed(2)
    near, scaling, told = 20, 0.3, []
    query, key, value, mask, settings = attention_case(kind, tokens)
    weight = torch.randn(1, tokens, 4, 8, dtype=torch.float64)

    def gradients(function, *more):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = function(*leaves, mask, scaling, *more, **settings)
        return out, torch.autograd.grad((out * weight).sum(), leaves)

    want = gradients(explicit_attention)
    torch.testing.assert_close(
        gradients(watched_attention, near, lambda *g: told.extend(g)), want, rtol=1e-5, atol=1e-5
    )

    far = [torch.zeros_like(key), torch.zeros_like(value)]
    for q in range(near, tokens):  # each query alone, differentiated by the keys and values of far tokens
        old = [x[:, :, : q - near + 1].clone().requires_grad_() for x in (key, value)]
        k, v = (torch.cat([a, x[:, :, q - near + 1 :]], 2) for a, x in zip(old, (key, value), strict=True))
        row = torch.ones(1, tokens, dtype=torch.bool).tril(q)[None, None] if mask is None else mask[:, :, q : q + 1]
        out = explicit_attention(query[:, :, q : q + 1], k, v, row, scaling, **settings)
        for total, g in zip(far, torch.autograd.grad((out * weight[:, q : q + 1]).sum(), old), strict=True):
            total[:, :, : q - near + 1] += g
    torch.testing.assert_close(told, far, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_the_squared_effect_of_an_error(kind):
    """Measured by finite differences: how far the outputs of far queries move with one token's key or value."""
    torch.manual_seed(1)
    tokens, near, scaling = 300, 20, 0.3
    query, key, value, mask, settings = attention_case(kind, tokens)
    out, (of_keys, of_values) = weighing_attention(query, key, value, mask, scaling, near, **settings)
    torch.testing.assert_close(
        out, explicit_attention(query, key, value, mask, scaling, **settings), rtol=1e-5, atol=1e-5
    )

    def moved(keys, values):
        change = [explicit_attention(query, k, v, mask, scaling, **settings) for k, v in ((keys, values), (key, value))]
        return (change[0] - change[1])[0, :, 2:].double() / step  # (tokens, query heads of KV head 1, 8)

    step = 1e-3
    for token in (0, 57, 279, 280, 299):
        far = slice(token + near, tokens)
        more = value.clone()
        more[0, 1, token] += step * torch.nn.functional.normalize(torch.randn(8, dtype=torch.float64), dim=0)
        want = moved(key, more)[far].square().sum()
        torch.testing.assert_close(of_values[0, 1, token].double(), want, rtol=2e-3, atol=1e-9)
        want = 0  # |q . dk|^2 over all directions of dk is |q|^2
        for i in range(8):
            more = key.clone()
            more[0, 1, token, i] += step
            want += moved(more, value)[far].square().sum() / scaling**2
        torch.testing.assert_close(of_keys[0, 1, token].double(), torch.as_tensor(want), rtol=2e-2, atol=1e-9)


def test_token_weights_trust_many_readers_more_than_one():
    """Per reader the last token weighs five times as much as the first, but it has one reader only."""
    weights = token_weights(torch.tensor([[80, 0, 0, 0.4]]), torch.tensor([1000, 1000, 1000, 1]))[0]
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert weights[0] > 1.5 * weights[3] and weights[3] > 10 * weights[1] and weights[1] == weights[2]


def test_refuses_no_windows_and_bad_plans():
    with pytest.raises(ConfigError):
        calibrate(tiny_model("llama-gqa"), [], PLAN, progress=False)
    with pytest.raises(ConfigError):
        CalibrationPlan(samples=3)
