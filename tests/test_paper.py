"""The authors' published format: converted, it must agree with their arithmetic, written down here a second time.

The files are made up, in the published layout, at a small size; the reference below follows the authors' formulas with
all 4096 centres spelled out, interleaved pairs, and torch's own modules.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from dataclasses import replace

import pytest
import torch
from generation import from_config, greedy
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from transformers_commvq import Codebook, cli, enable, hub, make_cache, ops, push_to_hub
from transformers_commvq.cards import CardError, License
from transformers_commvq.codebook import CONFIG_FILE, TENSOR_FILE
from transformers_commvq.config import (
    CodebookFormatError,
    CodebookIntegrityError,
    CodebookNotFoundError,
    CommVQConfig,
    ConfigError,
    UnsupportedModelError,
)
from transformers_commvq.geometry import read_model
from transformers_commvq.index_book import IndexBook
from transformers_commvq.ops import decode, encode, index_codes
from transformers_commvq.paper_import import import_paper, read_key_file

HEADS, DIM, STAGES, LAYERS, BITS = 2, 16, 3, 2, 32
BASE, LICENSE = "smith/Llama", License("llama3.1")


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
    return import_paper(published[0], published[1], folder, BASE, LICENSE), folder


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
    summed = index_codes.value_project(
        weights @ index_codes.value_features(codes, book), weights.sum(-1, keepdim=True), book
    )
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


def test_what_the_tensors_do_not_hold_is_refused(imported, tmp_path):
    imported[0].save(tmp_path)
    path = tmp_path / CONFIG_FILE
    config = json.loads(path.read_text())
    config["codec"]["bits_per_head"]["1"]["keys"] = [24, 24]
    path.write_text(json.dumps(config))
    with pytest.raises(CodebookFormatError, match="layer 1"):
        Codebook.load(tmp_path)


def test_shapes_are_checked_and_heads_stay_together(imported):
    layer = imported[0].layers[0]
    for wrong in (torch.zeros(3, 2, 32, 16), torch.zeros(3, 2, 64, 15), torch.zeros(2, 64, 16)):
        with pytest.raises(CodebookFormatError, match="even head_dim"):
            IndexBook(wrong)
    for change in ({"heads": 3}, {"scale": torch.ones(3)}, {"embedding": torch.ones(3)}):
        with pytest.raises(CodebookFormatError):
            replace(layer.values, **change)
    with pytest.raises(UnsupportedModelError, match="tensor parallelism"):
        layer.select_heads(0, 1)


def test_damaged_artefact_is_refused(imported, tmp_path):
    book, _ = imported
    book.save(tmp_path)
    path = tmp_path / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(CodebookIntegrityError):
        Codebook.load(tmp_path)
    path.unlink()
    with pytest.raises(CodebookNotFoundError):
        Codebook.load(tmp_path)


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


@torch.no_grad()
def authors_logits(model, ids: torch.Tensor, coded: int, sinks: int, thetas, modules, new: int):
    """Greedy decoding with a plain cache whose tokens sinks..coded went through the authors' arithmetic."""
    raw: dict[tuple[int, str], torch.Tensor] = {}
    attention = [layer.self_attn for layer in model.model.layers]
    hooks = [
        getattr(module, name).register_forward_hook(lambda m, a, out, at=(i, name): raw.__setitem__(at, out[0]))
        for i, module in enumerate(attention)
        for name in ("k_proj", "v_proj")
    ]
    cache = DynamicCache(config=model.config)
    logits = [model(ids, past_key_values=cache).logits[:, -1]]
    for hook in hooks:
        hook.remove()
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(ids.shape[1])[None])
    for i, layer in enumerate(cache.layers):
        keys, values = raw[i, "k_proj"].clone(), raw[i, "v_proj"].clone()
        keys[sinks:coded] = authors_keys(keys[sinks:coded], thetas[i])
        values[sinks:coded] = modules[i](values[sinks:coded])
        layer.keys = apply_rotary_pos_emb(split(keys), split(keys), cos, sin)[1]
        layer.values = split(values).clone()
    while len(logits) < new:
        logits.append(model(logits[-1].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1)


def test_generate_with_what_the_command_wrote(published, tmp_path, capsys):
    """import-paper, from_pretrained, generate(): the tokens of a plain cache filled by the authors' arithmetic."""
    keys, values, thetas, modules = published
    out = tmp_path / "book"
    told = ["--base-model", BASE, "--license", LICENSE.id]
    assert cli.main(["import-paper", str(keys), str(values), str(out), *told]) == 0
    assert str(out) in capsys.readouterr().out
    from_config(config()).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", kv_cache=str(out)).eval()
    ids = torch.randint(1, 64, (1, 400))  # 0 would be taken for padding
    done = greedy(model, {"input_ids": ids}, 6, return_dict_in_generate=True, output_logits=True)
    coded = done.past_key_values.layers[0].coded
    assert done.past_key_values.codebook.kind == "index" and coded == 256
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    want = authors_logits(plain, ids, coded, 4, thetas, modules, 6)
    got = torch.stack(done.logits, 1)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * want.std())
    assert torch.equal(done.sequences[0, 400:], want[0].argmax(-1))
    exact = authors_logits(plain, ids, coded, coded, thetas, modules, 6)
    assert (exact - want)[:, 1:].norm() > 0.1 * want[:, 1:].norm(), "codes make no difference to this model"


def test_card_says_what_these_codes_are(imported):
    book, folder = imported
    card = (folder / "README.md").read_text()
    text = " ".join(card.split())
    assert "index codes" in text and "is slower than with the sign codes" in text
    assert "Not measured with this plugin" in text and "Measured; lower is better" not in text
    assert "$" not in card and str(folder.parent) not in card
    data = ModelCard(card).data
    assert data.license == "llama3.1" and data.base_model == BASE and f"{book.bits:.4g}-bit" in data.tags


def test_inspect_shows_them(imported, capsys):
    assert cli.main(["inspect", str(imported[1])]) == 0
    shown = capsys.readouterr().out
    assert "index codes" in shown and "0: 36 36 | 16 16" in shown and "quality         not measured" in shown


def test_imported_from_the_hub_and_pushed(server, published, tmp_path):
    """The published files as repositories, one of them private; then ours, once it was measured."""
    for repo, folder, private in (("alice/keys", published[0], True), ("smith/values", published[1], False)):
        server.add(repo, {p.name: p.read_bytes() for p in folder.iterdir()}, private=private)
    server.add(BASE, {"README.md": b"---\nlicense: llama3.1\n---\n"})
    with pytest.raises(CodebookNotFoundError, match="private"):
        import_paper("alice/keys", "smith/values", tmp_path / "out", BASE)
    book = import_paper("alice/keys", "smith/values", tmp_path / "out", BASE, token="token-alice")
    assert book.calibration["keys"] == "alice/keys"
    with pytest.raises(CardError, match="no evaluation"):
        book.push_to_hub("alice/Llama-CommVQ", token="token-alice")
    measured = replace(book, evaluation={"text": {"perplexity": 3.0, "reference_perplexity": 2.9}})
    done = push_to_hub(measured, "alice/Llama-CommVQ", token="token-alice")
    pulled = hub.pull("alice/Llama-CommVQ", done.tag)
    assert pulled.kind == "index" and pulled.sha256 == book.sha256 == done.sha256
    assert "| text | 2.900 | 3.000 |" in server.files("alice/Llama-CommVQ")["README.md"].decode()


def test_base_model_and_license_are_needed(published, tmp_path):
    with pytest.raises(ConfigError, match="--base-model"):
        import_paper(published[0], published[1], tmp_path / "out")
    with pytest.raises(CardError, match="--license"):
        import_paper(published[0], published[1], tmp_path / "out", BASE)  # offline
    assert not (tmp_path / "out").exists()


class Trap:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("way", ["inside good tensors", "in a zip archive", "a bare pickle"])
def test_the_importer_runs_no_code_of_a_file(published, tmp_path, capsys, way):
    keys, values, thetas, _ = published
    for path in keys.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "001_1.pt"  # the last that is read
    if way == "a bare pickle":
        path.write_bytes(pickle.dumps(Trap(), protocol=2))
    else:
        steps = [{"theta": t, "clustering_centers": centres_of(t)} for t in thetas[1][1]]
        torch.save({"steps": steps, "note": Trap()} if way == "inside good tensors" else Trap(), path)
    pickle.loads(path.read_bytes()) if way == "a bare pickle" else torch.load(path, weights_only=False)
    assert "unpickled" in capsys.readouterr().out, "not a trap"
    with pytest.raises(CodebookFormatError, match="001_1.pt is no key codebook"):
        import_paper(tmp_path, values, tmp_path / "out", BASE, LICENSE)
    assert "unpickled" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_centres_that_do_not_commute_are_refused(published, tmp_path):
    theta = published[2][0][0][0]
    path = tmp_path / "000_0.pt"
    torch.save({"steps": [{"theta": theta, "clustering_centers": torch.randn(4096, DIM)}]}, path)
    with pytest.raises(CodebookFormatError, match="not z_a"):
        read_key_file(path)
    with pytest.raises(CodebookNotFoundError, match="LLL_G"):
        read_key_file(tmp_path / "001_0.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"steps": []},
        {"steps": [{"theta": torch.zeros(128), "clustering_centers": torch.zeros(4096, 16)}]},
        {"steps": [{"theta": torch.zeros(64, 8), "clustering_centers": torch.zeros(4096, 16)}]},
        {"steps": [{"theta": 1.0}]},
        [1, 2],
    ],
    ids=["no stages", "no matrix", "other size", "no tensors", "a list"],
)
def test_key_files_of_another_form_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "000_0.pt")
    with pytest.raises(CodebookFormatError):
        read_key_file(tmp_path / "000_0.pt")


def test_heads_that_differ_and_damaged_checkpoints_are_refused(published, tmp_path):
    keys, values, thetas, _ = published
    for path in keys.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    steps = [{"theta": t, "clustering_centers": centres_of(t)} for t in thetas[0][1][:-1]]
    torch.save({"steps": steps}, tmp_path / "000_1.pt")
    with pytest.raises(CodebookFormatError, match="different stages"):
        import_paper(tmp_path, values, tmp_path / "out", BASE, LICENSE)
    config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CodebookFormatError, match="no safetensors"):
        import_paper(keys, tmp_path, tmp_path / "out", BASE, LICENSE)


def test_a_checkpoint_without_value_codebooks_is_refused(published, tmp_path):
    config().save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CodebookNotFoundError, match="value_vq_model"):
        import_paper(published[0], tmp_path, tmp_path / "out", BASE, LICENSE)
    assert not (tmp_path / "out").exists()
