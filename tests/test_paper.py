"""The authors' published format: converted, it must agree with their arithmetic, written down here a second time.

The files are made up, in the published layout, at a small size; the reference below follows the authors' formulas with
all 4096 centres spelled out, interleaved pairs, and torch's own modules.
"""

from __future__ import annotations

import contextlib
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from transformers_commvq import enable, hub, make_cache, ops, paper
from transformers_commvq.config import CodebookFormatError, CodebookIntegrityError, CodebookNotFoundError, CommVQConfig
from transformers_commvq.geometry import read_model
from transformers_commvq.ops import decode, encode
from transformers_commvq.paper_import import import_paper, read_key_file

HEADS, DIM, STAGES, LAYERS, BITS = 2, 16, 3, 2, 32
BASE = "smith/Llama"


class AuthorsValues(nn.Module):
    """Layer norm, two linear layers, four choices for each pair of bits; then bits @ embedding, renormalized."""

    def __init__(self):
        super().__init__()
        d = HEADS * DIM
        self.embedding = nn.Parameter(torch.randn(BITS, d))
        self.learnable_scale = nn.Parameter(torch.rand(d) + 0.5)
        self.norm1, self.enc1, self.out = nn.LayerNorm(d), nn.Linear(d, 24), nn.Linear(24, 2 * BITS)
        nn.init.normal_(self.norm1.weight)
        nn.init.normal_(self.norm1.bias)

    @torch.no_grad()
    def forward(self, x):
        x = x / (self.learnable_scale + 1e-6)
        length = x.norm(dim=-1, keepdim=True)
        logits = self.out(nn.functional.gelu(self.enc1(self.norm1(x / (length + 1e-6)))))
        one_hot = nn.functional.one_hot(logits.unflatten(-1, (-1, 4)).argmax(-1), 4).float()
        bits = (one_hot[..., :2] + one_hot[..., 2:3]).flatten(-2)
        out = bits @ self.embedding
        out = out / (out.norm(dim=-1, keepdim=True) + 1e-6) * (length + 1e-6)
        return out * (self.learnable_scale + 1e-6)


def centres_of(theta: torch.Tensor) -> torch.Tensor:
    """All 64 * 64 centres, interleaved: x_a - y_b, x_b + y_a."""
    x, y = theta[0::2], theta[1::2]
    re = x[:, None] - y[None]
    im = x[None] + y[:, None]
    return torch.stack([re, im], -1).flatten(0, 1).flatten(1)


def authors_keys(x: torch.Tensor, thetas: list[list[torch.Tensor]]) -> torch.Tensor:
    """x (tokens, HEADS * DIM), as the model's key projection gives it; thetas by head and stage."""
    x = x.view(-1, HEADS, 2, DIM // 2).transpose(2, 3).flatten(1)
    length = x.norm(dim=-1, keepdim=True)
    rest = (x / length).view(-1, HEADS, DIM).clone()
    total = torch.zeros_like(rest)
    for head in range(HEADS):
        for theta in thetas[head]:
            centres = centres_of(theta)
            nearest = centres[torch.cdist(rest[:, head], centres).argmin(-1)]
            rest[:, head] -= nearest
            total[:, head] += nearest
    out = total.flatten(1) * length
    return out.view(-1, HEADS, DIM // 2, 2).transpose(2, 3).flatten(1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(key folder, value folder, thetas, value modules)"""
    torch.manual_seed(0)
    keys, values = tmp_path_factory.mktemp("keys"), tmp_path_factory.mktemp("values")
    thetas = [
        [[torch.randn(128, DIM // 2) * 0.3 / 2**s for s in range(STAGES)] for _ in range(HEADS)] for _ in range(LAYERS)
    ]
    for layer, heads in enumerate(thetas):
        for head, stages in enumerate(heads):
            steps = [{"theta": t, "clustering_centers": centres_of(t), "mse_loss": 0.0} for t in stages]
            torch.save({"final_error": 0.0, "steps": steps}, keys / f"{layer:03d}_{head}.pt")
    modules = [AuthorsValues() for _ in range(LAYERS)]
    flat = {
        f"model.layers.{i}.self_attn.value_vq_model.{name}": tensor.contiguous()
        for i, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }
    flat["model.norm.weight"] = torch.ones(3)
    save_file(flat, values / "model-00001-of-00001.safetensors")
    config().save_pretrained(values)
    return keys, values, thetas, modules


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=1024,
    )


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    return import_paper(published[0], published[1], folder, BASE), folder


def split(x: torch.Tensor) -> torch.Tensor:
    """(tokens, HEADS * DIM) -> (1, HEADS, tokens, DIM)"""
    return x.view(1, -1, HEADS, DIM).transpose(1, 2)


def joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)[0]


def test_keys_agree_with_the_authors_arithmetic(published, imported):
    x = torch.randn(700, HEADS * DIM)
    for layer in range(LAYERS):
        book = imported[0].layers[layer].keys
        codes = encode(split(x), book)
        assert codes.shape == (1, 700, book.token_bytes) and codes.dtype == torch.uint8
        torch.testing.assert_close(
            joined(decode(codes, book)), authors_keys(x, published[2][layer]), rtol=2e-3, atol=2e-3
        )


def test_values_agree_with_the_authors_arithmetic(published, imported):
    x = torch.randn(700, HEADS * DIM) * 3
    for layer in range(LAYERS):
        book = imported[0].layers[layer].values
        got = joined(decode(encode(split(x), book), book))
        torch.testing.assert_close(got, published[3][layer](x), rtol=2e-3, atol=2e-3)


def test_attention_may_sum_before_projecting(imported):
    book = imported[0].layers[0].values
    codes = encode(torch.randn(1, HEADS, 50, DIM), book)
    weights = torch.rand(1, HEADS, 3, 50)
    summed = paper.value_project(weights @ paper.value_features(codes, book), weights.sum(-1, keepdim=True), book)
    torch.testing.assert_close(summed, weights @ decode(codes, book))


def test_bytes_are_counted_with_their_norms(imported):
    book = imported[0]
    key_bytes = HEADS * STAGES * 12 // 8 + 2
    value_bytes = BITS // 8 + 2
    assert book.token_bytes == LAYERS * (key_bytes + value_bytes)
    assert book.bits == 8 * book.token_bytes / (LAYERS * 2 * HEADS * DIM)


def test_artefact_round_trip(imported):
    book, folder = imported
    read = hub.resolve(CommVQConfig(codebook=str(folder)), book.geometry)
    assert read.sha256 == book.sha256 and read.geometry == book.geometry and read.bits == book.bits
    for i, layer in book.layers.items():
        for side in ("keys", "values"):
            mine, other = getattr(layer, side).tensors(), getattr(read.layers[i], side).tensors()
            assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def test_damaged_artefact_is_refused(imported, tmp_path):
    book, _ = imported
    paper.save(book, tmp_path)
    path = tmp_path / "codebooks.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(CodebookIntegrityError):
        hub.load(tmp_path)
    path.unlink()
    with pytest.raises(CodebookNotFoundError):
        hub.load(tmp_path)


@torch.no_grad()
def test_a_model_runs_on_it(imported):
    """Attention over codes gives what attention over the decoded keys and values gives."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
    enable(model, str(imported[1]))
    ids = torch.randint(0, 64, (1, 400))
    logits = []
    for backend in ("reference", "blockwise", None):
        with ops.backend(backend) if backend else contextlib.nullcontext():  # None: what would be chosen
            cache = make_cache(model)
            model(ids[:, :-1], past_key_values=cache)
            logits.append(model(ids[:, -1:], past_key_values=cache).logits)
    assert cache.layers[0].coded > 0
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-4, atol=1e-4)
    assert read_model(model).geometry.differences(imported[0].geometry) == []


class Trap:
    def __reduce__(self):
        return print, ("unpickled",)


def test_the_importer_runs_no_code_of_a_file(tmp_path, capsys):
    path = tmp_path / "000_0.pt"
    torch.save({"steps": [Trap()]}, path)
    with pytest.raises(CodebookFormatError):
        read_key_file(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CodebookFormatError):
        read_key_file(path)
    assert "unpickled" not in capsys.readouterr().out


def test_centres_that_do_not_commute_are_refused(published, tmp_path):
    theta = published[2][0][0][0]
    path = tmp_path / "000_0.pt"
    torch.save({"steps": [{"theta": theta, "clustering_centers": torch.randn(4096, DIM)}]}, path)
    with pytest.raises(CodebookFormatError, match="not z_a"):
        read_key_file(path)
    with pytest.raises(CodebookNotFoundError, match="LLL_G"):
        read_key_file(tmp_path / "001_0.pt")


def test_a_checkpoint_without_value_codebooks_is_refused(published, tmp_path):
    config().save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CodebookNotFoundError, match="value_vq_model"):
        import_paper(published[0], tmp_path, tmp_path / "out", BASE)
    assert not (tmp_path / "out").exists()
