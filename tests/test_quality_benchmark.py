"""benchmarks/quality: the reference codes are what their papers say, and results are kept and shown as measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
from generation import saved_codebook
from tiny_models import tiny_model, token_windows

from transformers_commvq import CommVQConfig
from transformers_commvq.contenders import contender
from transformers_commvq.evaluation import streaming_quality
from transformers_commvq.geometry import cache_name
from transformers_commvq.storage import bits_per_element

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.quality import cli, methods, paper_codes, report
from benchmarks.quality.kivi import KiviLayer
from benchmarks.quality.turboquant import TurboQuantLayer, rotation, sphere_levels
from benchmarks.quality.windowed import WindowedLayer, pack_integers, reference_cache, unpack_integers


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")  # head_dim 32, 2 key heads, 2 layers


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_integers_are_packed(bits):
    numbers = torch.randint(0, 2**bits, (3, 64))
    packed = pack_integers(numbers, bits)
    assert packed.shape == (3, 8 * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack_integers(packed, bits), numbers)


class Lossless(WindowedLayer):
    """Keeps what it should code."""

    def __init__(self, bits):
        super().__init__()

    def _quantize(self, tensor, side):
        return {"itself": tensor.clone()}

    def _dequantize(self, q_tensor, side):
        return q_tensor["itself"]


@pytest.mark.parametrize("chunk", [1, 3, 100, 400])
def test_windows_keep_every_token_in_order(model, chunk):
    windows = token_windows(1, 330 if chunk > 1 else 210)
    got = streaming_quality(model, lambda m: reference_cache(m, Lossless, 0), windows, chunk, progress=False)
    assert got.mean_kl == pytest.approx(0, abs=1e-6)
    cache = reference_cache(model, Lossless, 0)
    model(windows[0][None, :205], **{cache_name(type(model)): cache})
    layer = cache.layers[0]
    assert cache.get_seq_length() == 205
    assert (layer.sink_keys.shape[2], len(layer.blocks), layer.keys.shape[2]) == (4, 1, 205 - 4 - 64)


@pytest.mark.parametrize(("layer", "bits", "stored"), [(KiviLayer, 2, 3), (KiviLayer, 4, 5), (TurboQuantLayer, 3, 3.5)])
def test_reference_codes_store_what_their_papers_say(model, layer, bits, stored):
    """KIVI: float16 scale and zero of 32 elements; TurboQuant: a float16 norm of head_dim 32."""
    assert bits_per_element(model, lambda m: reference_cache(m, layer, bits)) == stored


@pytest.mark.parametrize("side", ["keys", "values"])
def test_kivi_rounds_within_its_groups(side):
    x = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 50  # a loud channel, which keys have: groups along tokens keep it from the others
    layer = KiviLayer(4)
    error = (layer._dequantize(layer._quantize(x, side), side) - x).abs()
    groups = x.unflatten(2, (2, 32)) if side == "keys" else x
    axis = 3 if side == "keys" else -1
    step = (groups.amax(axis, keepdim=True) - groups.amin(axis, keepdim=True)) / 15
    assert (error.view_as(groups) <= 0.51 * step + 1e-2 * groups.abs()).all()
    quiet = error[..., torch.arange(32) != 3].mean()
    assert quiet < 0.1 if side == "keys" else quiet > 0.5


def test_turboquant_is_the_optimal_scalar_quantizer():
    """Errors of unit vectors as the paper's theorem 1 states them for 1 to 4 bits, on vectors of any shape."""
    x = torch.randn(1, 1, 4096, 64, generator=torch.Generator().manual_seed(0)) ** 3
    assert torch.allclose(rotation(64, "keys") @ rotation(64, "keys").T, torch.eye(64), atol=1e-5)
    assert not torch.allclose(rotation(64, "keys"), rotation(64, "values"), atol=0.1)
    for bits, expected in ((1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)):
        levels = sphere_levels(64, bits)
        assert torch.allclose(levels, -levels.flip(0), atol=1e-5)
        layer = TurboQuantLayer(bits)
        error = layer._dequantize(layer._quantize(x, "keys"), "keys") - x
        assert (error.square().sum(-1) / x.square().sum(-1)).mean() == pytest.approx(expected, rel=0.15)


def test_the_papers_key_codes_are_found_again():
    """Keys that are sums of planted centres: the first stages explain almost all of them."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 64, 8, generator=generator)
    turned = torch.cat([-z[..., 4:], z[..., :4]], -1)
    a, b = torch.randint(0, 64, (2, 1024), generator=generator)
    keys = z[:, a] + turned[:, b]
    scale = torch.rand(1, 1024, 1, generator=generator) + 0.5
    unit = keys / keys.norm(dim=-1, keepdim=True)
    spread = []
    for stages in (1, 2):
        book = paper_codes.learn_keys(unit * scale, stages, seed=0)
        assert book.z.shape == (stages, 1, 64, 8)
        codes = paper_codes.KINDS["index"].encode((unit * scale)[None], book)
        decoded = paper_codes.KINDS["index"].features(codes, book)
        spread.append(((decoded - unit * scale).square().sum() / scale.square().sum()).item())
    assert spread[1] < spread[0] / 3 < 0.05


def test_the_papers_codes_in_our_cache(model, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_codes, "ROUNDS", 2)
    windows = token_windows(2, 400)
    kl, bits = [], []
    for rate in (2.0, 1.0):
        make = paper_codes.paper_cache(model, None, rate, [2.0, 1.0], windows, tmp_path / "paper")
        config = CommVQConfig(codebook=saved_codebook(model, tmp_path / "any"))
        with contender(model, "commvq-2", config):
            kl.append(streaming_quality(model, make, windows, progress=False).mean_kl)
            bits.append(bits_per_element(model, make))
    assert 0 < kl[0] < kl[1]
    # keys: 5 or 3 stages of 12 bits a head, filled up to bytes, and 16 bits of norm; values: the rate; a position
    words = [(2 * 5 * 12, 128), (2 * 3 * 12, 64)]
    assert bits == pytest.approx([(-(-k // 8) * 8 + 16 + v + 16) / 128 for k, v in words])
    assert len(list((tmp_path / "paper").iterdir())) == 2  # one file a layer, read again by the second rate


class Characters:
    """A tokenizer of one token a character."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) % 96 for c in text]}


@pytest.fixture
def toy(tmp_path):
    """What the command measures with, and its arguments, for the toy instead of SmolLM2."""
    texts = {"a text": "".join(f"Line {i} holds {i * i}.\n" for i in range(2000))}
    results = str(tmp_path / "results" / "toy.json")
    arguments = [
        "--text",
        "a text=-",
        "--windows",
        "2",
        "--length",
        "400",
        "--results",
        results,
        "--work",
        str(tmp_path),
    ]
    return methods.Setting(None, Characters(), texts, tmp_path, None), arguments


def test_results_are_kept_method_by_method(model, toy, monkeypatch, capsys):
    setting, arguments = toy
    args = cli.build_parser().parse_args([*arguments, "--methods", "kivi-2", "turboquant-2"])
    cli.measure(model, setting, args)
    measured = report.read(args.results)
    assert list(measured["methods"]) == ["kivi-2", "turboquant-2"]
    row = measured["methods"]["turboquant-2"]
    assert row["bits"] == 2.5 and row["texts"]["a text"]["kl"] > 0 and row["texts"]["a text"]["windows"] == 2
    assert measured["methods"]["kivi-2"]["bits"] == 3

    asked = []
    monkeypatch.setattr(cli, "one", lambda name, *_: asked.append(name) or dict(row))
    args = cli.build_parser().parse_args([*arguments, "--methods", "kivi-2", "fp8", "turboquant-2"])
    cli.measure(model, setting, args)
    assert asked == ["fp8"]  # the others have results
    cli.measure(model, setting, cli.build_parser().parse_args([*arguments, "--methods", "fp8", "--again"]))
    assert asked == ["fp8", "fp8"]
    assert list(report.read(args.results)["methods"]) == ["fp8", "kivi-2", "turboquant-2"]
    other = cli.build_parser().parse_args([*arguments, "--methods", "kivi-4", "--length", "500"])
    with pytest.raises(cli.CommVQError, match="other settings"):
        cli.measure(model, setting, other)


def test_table_and_plot(tmp_path):
    def row(bits, change):
        got = {
            "reference_perplexity": 10,
            "perplexity": 10 * (1 + change),
            "change": change,
            "kl": change / 2,
            "kl_standard_error": 0.001,
        }
        return {"bits": bits, "texts": {"prose": got}}

    results = {
        "settings": {"model": "org/toy", "texts": {"prose": {}}},
        "methods": {"hqq-1": {"left_out": "no hqq"}, "commvq-1": row(1.0, 0.05),
                    "commvq-2": row(2.0, 0.01)},
    }  # fmt: skip
    lines = report.table(results).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["cache", "-" * 14, "uncompressed", "commvq-2", "commvq-1"]
    assert [cell.strip() for cell in lines[4].split("|")[2:5]] == ["1.00", "10.50 (+5.0%)", "0.0250 ± 0.0010"]
    assert report.series(results, "prose") == {"commvq": [(1.0, 10.5), (2.0, 10.1)]}
    pytest.importorskip("matplotlib")
    file = tmp_path / "toy.json"
    file.write_text(json.dumps(results))
    assert report.draw(file).stat().st_size > 1000
