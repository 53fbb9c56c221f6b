"""The learner: allocation, EM, determinism, and going on after a stop."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model, token_windows

from transformers_commvq import em, learning
from transformers_commvq.calibration import CalibrationPlan, calibrate
from transformers_commvq.codebook import Codebook, SignBook
from transformers_commvq.config import ConfigError
from transformers_commvq.em import LearningPlan, encode_rows, fit_head, moments
from transformers_commvq.learning import allocate, learn, predicted_curve, shrunk_metric
from transformers_commvq.ops.codec import decode, encode
from transformers_commvq.recipe import Recipe, learn_codebooks
from transformers_commvq.samples import StoredSamples
from transformers_commvq.text import longest_windows

PLAN = LearningPlan(rounds=4, warm_tokens=256)


def gaussian(tokens=1024, dim=16, seed=0, decay=0.8):
    """Correlated vectors with a mean, (tokens, dim)."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    spread = decay ** torch.arange(dim)
    return torch.randn(tokens, dim, generator=generator) * spread @ turn + torch.randn(dim, generator=generator)


def random_metric(dim=16, seed=5):
    a = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / dim + 0.1 * torch.eye(dim)


def uneven(heads, tokens, seed=0):
    """Weights of mean 1, most of them small."""
    weights = torch.rand(heads, tokens, generator=torch.Generator().manual_seed(seed)) ** 4
    return weights / weights.mean(1, keepdim=True)


def samples(layers=2, heads=2, dim=16, tokens=512):
    return {
        layer: SimpleNamespace(
            keys=torch.stack([gaussian(tokens, dim, 10 * layer + h) for h in range(heads)]),
            values=torch.stack([gaussian(tokens, dim, 100 + 10 * layer + h) for h in range(heads)]),
            key_metric=torch.stack([random_metric(dim, layer + h) for h in range(heads)]),
            value_metric=torch.eye(dim).repeat(heads, 1, 1),
            key_weights=uneven(heads, tokens, layer),
            value_weights=uneven(heads, tokens, layer + 50),
        )
        for layer in range(layers)
    }


class Letters:
    """A tokenizer with a token a letter."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


def relative_error(x, rows, mean, metric=None):
    form = torch.eye(x.shape[1]) if metric is None else metric
    y = x - mean
    error = y - encode_rows(x, rows, mean, metric) @ rows
    return (((error @ form) * error).sum() / ((y @ form) * y).sum()).item()


@pytest.mark.parametrize("metric", [None, random_metric()])
@pytest.mark.parametrize("bits", [8, 16, 40])
def test_em_lowers_the_loss(bits, metric):
    x = gaussian()
    rows, mean, history = fit_head(x, metric, bits, LearningPlan(rounds=6, warm_tokens=len(x)))
    assert rows.shape == (bits, 16) and mean.shape == (16,)
    assert all(b <= a * 1.002 for a, b in pairwise(history))
    assert history[-1] < history[0]
    predicted = predicted_curve(moments(x, None)[1], metric, torch.eye(16) if metric is None else metric, bits)
    assert history[-1] < 1.05 * predicted[-1] / predicted[0]


def test_what_was_learned_holds_for_other_vectors_and_beats_random_rows():
    x, other = gaussian(8192).split(4096)
    rows, mean, history = fit_head(x, None, 16, PLAN)
    unseen = relative_error(other, rows, mean)
    assert unseen < 1.1 * history[-1]
    generator = torch.Generator().manual_seed(1)
    random_rows = torch.randn(16, 16, generator=generator) * rows.norm(dim=1, keepdim=True) / 4
    assert unseen < 0.7 * relative_error(other, random_rows, mean)


def test_tokens_that_count_more_get_smaller_errors():
    """Two kinds of vectors, one of them rare: given more weight it is served better, at the other's cost."""
    x = torch.cat([gaussian(3584, seed=1), gaussian(512, seed=2)])
    rare = torch.arange(len(x)) >= 3584
    weights = torch.where(rare, 20.0, 0.1)
    plan, errors = LearningPlan(rounds=4, warm_tokens=len(x)), {}
    for name, w in (("alike", None), ("uneven", weights)):
        rows, mean, history = fit_head(x, None, 24, plan, w)
        error = x - mean - encode_rows(x, rows, mean, None) @ rows
        errors[name] = [error[part].square().mean().item() for part in (~rare, rare)]
        assert history[-1] < history[0]
    assert errors["uneven"][1] < 0.8 * errors["alike"][1]
    assert errors["uneven"][0] > errors["alike"][0]


def test_equal_weights_are_no_weights():
    x = gaussian()
    fits = fit_head(x, None, 16, PLAN), fit_head(x, None, 16, PLAN, torch.full((len(x),), 3.0))
    for a, b in zip(*(fit[:2] for fit in fits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("metric", [None, random_metric()])
def test_rows_come_in_the_order_they_were_learned_in(metric):
    """So the encoder meets the error of the best round; in another order it would not."""
    x = gaussian(2048)
    rows, mean, history = fit_head(x, metric, 48, PLAN)
    best = min(history[PLAN.rounds // 2 :])
    assert relative_error(x, rows, mean, metric) == pytest.approx(best, rel=0.02)
    shuffled = rows[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    assert relative_error(x, shuffled, mean, metric) > 1.5 * best


@pytest.mark.parametrize("bits", [8, 64])
def test_a_constant_head_does_no_harm(bits):
    rows, mean, _ = fit_head(torch.ones(512, 16), None, bits, PLAN)
    assert torch.isfinite(rows).all()
    torch.testing.assert_close(mean, torch.ones(16), atol=1e-3, rtol=0)


@pytest.mark.parametrize("budget", [64, 72, 100, 333, 512])
def test_allocation_meets_the_budget_and_prefers_the_costly_head(budget):
    falling = 0.5 ** (torch.arange(129, dtype=torch.float64) / 16)
    curves = {"cheap": falling, "usual": 4 * falling, "costly": 64 * falling, "flat": 0 * falling}
    bits = allocate(curves, budget)
    assert sum(bits.values()) == budget // 8 * 8
    assert all(n >= 8 and n % 8 == 0 for n in bits.values())
    assert bits["costly"] >= bits["usual"] >= bits["cheap"] >= bits["flat"]
    if 72 < budget < 300:
        assert bits["flat"] == 8 and bits["costly"] > bits["usual"]


def test_allocation_refuses_what_cannot_be():
    curves = {h: torch.linspace(1, 0, 33) for h in "abc"}
    for budget in (8, 97 + 8):
        with pytest.raises(ConfigError):
            allocate(curves, budget)
    assert allocate(curves, 96) == {"a": 32, "b": 32, "c": 32}


def test_shrinking_makes_the_metric_definite():
    metric = torch.stack([torch.diag(torch.tensor([4.0, 0, 0])), torch.eye(3)])
    got = shrunk_metric(metric, 0.2)
    assert torch.linalg.eigvalsh(got).min() > 0.1
    torch.testing.assert_close(got.diagonal(dim1=1, dim2=2).mean(1), torch.ones(2))


def test_rates_are_exact_and_more_bits_are_better():
    recorded = samples()
    learned = learn(recorded, [1.0, 2.0], PLAN, progress=False)
    errors = []
    for rate, result in learned.items():
        total = sum(sum(b.keys.layout.bits) + sum(b.values.layout.bits) for b in result.layers.values())
        assert total == rate * 16 * 2 * 2 * 2
        book = result.layers[0].values
        x = recorded[0].values[None]
        errors.append((decode(encode(x, book), book) - x).square().mean().item())
        assert book.vectors.dtype == torch.float16 and book.metric is None
        assert result.layers[0].keys.metric.dtype == torch.float16
    assert errors[1] < errors[0]


def same(a: SignBook, b: SignBook) -> bool:
    return a.layout == b.layout and all(torch.equal(t, b.tensors()[n]) for n, t in a.tensors().items())


def test_a_stopped_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    recorded = samples(layers=3)
    whole = learn(recorded, [1.0], PLAN, progress=False, workers=1)[1.0]
    fit, calls = fit_head, []

    def stop_at_the_sixth(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(learning, "fit_head", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        learn(recorded, [1.0], PLAN, tmp_path, progress=False, workers=1)
    monkeypatch.setattr(learning, "fit_head", lambda *args: calls.append(1) or fit(*args))
    calls.clear()
    resumed = learn(recorded, [1.0], PLAN, tmp_path, progress=False, workers=2)[1.0]
    assert len(calls) == 8  # the first layer's four heads were there
    assert resumed.report == whole.report
    for layer, book in whole.layers.items():
        assert same(book.keys, resumed.layers[layer].keys) and same(book.values, resumed.layers[layer].values)


def test_samples_of_another_calibration_are_not_taken(tmp_path):
    windows = token_windows(2, 150)
    plan = CalibrationPlan(samples=256, metric_windows=1, residual_length=16)
    geometry, recorded = calibrate(tiny_model("llama-gqa"), windows, plan, progress=False)
    stored = StoredSamples(tmp_path, geometry.layers, "a")
    assert not stored.complete
    (tmp_path / "recording").mkdir()
    (tmp_path / "recording" / "0-keys").write_bytes(b"left by a run that was killed")
    calibrate(tiny_model("llama-gqa"), windows, plan, progress=False, store=stored)
    assert stored.complete and not StoredSamples(tmp_path, geometry.layers, "b").complete
    assert not (tmp_path / "recording").exists()
    for i in recorded:  # what went through files is what is kept in memory
        assert all(torch.equal(t, stored[i].tensors()[n]) for n, t in recorded[i].tensors().items())


@pytest.mark.parametrize("name", ["llama-gqa", "phi3-partial"])
def test_from_model_to_artefact(tmp_path, name):
    recipe = Recipe(
        tokens=600, window=100,
        calibration=CalibrationPlan(samples=256, metric_windows=1, residual_length=16),
        learning=LearningPlan(rounds=2),
    )  # fmt: skip
    learned = learn_codebooks(
        tiny_model(name), None, [1.0], recipe=recipe, base_model="a/b", work=tmp_path / "work", progress=False
    )
    book, _ = learned[1.0]
    assert book.bits == 1.0 and book.geometry.id == "a/b"
    assert book.calibration["texts"] == ["written by the model"] and book.calibration["tokens"] == 600
    assert not (tmp_path / "work").exists()
    again = Codebook.load(book.save(tmp_path / "book"))
    assert same(again.layers[0].keys, book.layers[0].keys)


def test_outliers_are_in_range_from_the_start(monkeypatch):
    """Most of the spread is in few vectors: a Gaussian's quantizer would leave them out of its range."""
    x = gaussian(2048)
    x = x * torch.rand(2048, 1, generator=torch.Generator().manual_seed(3)).clamp_min(1e-3) ** -0.5
    plan = LearningPlan(rounds=4, warm_tokens=len(x))
    history = fit_head(x, None, 48, plan)[2]
    monkeypatch.setattr(em, "_RANGES", (1.0,))
    assert min(history) < 0.8 * min(fit_head(x, None, 48, plan)[2])


@pytest.mark.parametrize(("letters", "length", "count"), [(9000, 4096, 4), (5000, 4096, 3), (3000, 1024, 10)])
def test_windows_are_as_long_as_the_texts_allow(letters, length, count):
    windows = longest_windows(Letters(), ["a" * 80000, "b" * letters], 4 * 4096, 4096)
    assert len(windows) == count and {len(w) for w in windows} == {length}
    assert {w[0].item() for w in windows} == {ord("a"), ord("b")}


def test_a_text_without_a_window_is_named(caplog):
    windows = longest_windows(Letters(), ["a" * 80000, "b" * 1000], 4 * 4096, 4096)
    assert {w[0].item() for w in windows} == {ord("a")} and {len(w) for w in windows} == {4096}
    assert "text 2 of 2" in caplog.text and "holds no 1024 tokens" in caplog.text


def test_texts_without_a_window_are_refused():
    with pytest.raises(ConfigError, match="1024 tokens in a row"):
        longest_windows(Letters(), ["a" * 1000], 4096, 4096)
