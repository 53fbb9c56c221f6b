"""Codebooks from the Hub as a user takes them: from_pretrained, enable, generate(), push_to_hub."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from generation import greedy, prompt, random_codebook, tiny_llama
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from transformers_commvq import Codebook, CommVQCache, CommVQConfig, enable, hub, make_cache, ops
from transformers_commvq.cards import License
from transformers_commvq.codebook import CONFIG_FILE, TENSOR_FILE
from transformers_commvq.config import CodebookNotFoundError

BASE, REPO, ALICE = "smith/Base", "alice/Base-CommVQ-2bit", "token-alice"
MEASURED = {"made up": {"perplexity": 18.96, "reference_perplexity": 18.62}}


@pytest.fixture
def model_folder(tmp_path):
    """A checkpoint on disk, without codebooks."""
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def book() -> Codebook:
    made = random_codebook(tiny_llama())
    return replace(made, geometry=replace(made.geometry, id=BASE), evaluation=MEASURED)


@pytest.fixture
def published(server, book):
    """The same, pushed from memory to a private repository."""
    return book.push_to_hub(REPO, license=License("mit"), private=True, token=ALICE)


def load(folder, kv_cache=None, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, kv_cache=kv_cache, **kwargs).eval()


def answer(model):
    """Greedy tokens and their logits, behind a prompt long enough that most of it is codes."""
    with ops.backend("blockwise"):  # the compiled loops would be compiled for this test alone
        out = greedy(model, prompt(2, 300), 8, return_dict_in_generate=True, output_logits=True)
    assert isinstance(out.past_key_values, CommVQCache) and out.past_key_values.layers[0].coded > 100
    return out.sequences, torch.stack(out.logits)


def test_pushed_pulled_and_generated_with_is_bit_for_bit(server, published, book, model_folder, tmp_path):
    saved = book.save(tmp_path / "book")
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert server.files(REPO)[name] == (saved / name).read_bytes()
    tokens, logits = answer(load(model_folder, str(saved)))
    pinned = {"codebook": REPO, "revision": published.tag, "base_model": BASE}
    book.save(model_folder / "commvq")  # and beside the checkpoint
    for spec in (REPO, {"codebook": REPO, "revision": published.revision}, pinned, "commvq"):
        got, got_logits = answer(load(model_folder, spec, token=ALICE))
        assert torch.equal(got, tokens) and torch.equal(got_logits, logits)
    plain = greedy(load(model_folder), prompt(2, 300), 8, return_dict_in_generate=True, output_logits=True)
    assert not torch.equal(torch.stack(plain.logits), logits)


def test_push_to_hub_is_push(server, published, book, tmp_path):
    assert set(server.files(REPO)) == {CONFIG_FILE, TENSOR_FILE, "README.md"} and server.repos[REPO].private
    assert published.sha256 == book.sha256 and published.tag in server.files(REPO)["README.md"].decode()
    again = Codebook.load(book.save(tmp_path / "book")).push_to_hub(REPO, license=License("mit"), token=ALICE)
    assert again.tag == published.tag


def test_the_token_of_from_pretrained_opens_private_codebooks(published, model_folder):
    with pytest.raises(CodebookNotFoundError, match="private"):
        load(model_folder, REPO)
    for way in (
        {"kv_cache": REPO},
        {"kv_cache": {"codebook": REPO, "revision": published.tag}},
        {"quantization_config": CommVQConfig(codebook=REPO)},
    ):
        model = load(model_folder, token=ALICE, **way)
        assert make_cache(model).codebook.sha256 == published.sha256
        assert ALICE not in str(model.generation_config) + str(model.config)


def test_a_saved_enabled_model_needs_the_token_again(published, model_folder, tmp_path):
    load(model_folder, REPO, token=ALICE).save_pretrained(tmp_path / "copy")
    assert ALICE not in "".join(path.read_text() for path in (tmp_path / "copy").glob("*.json"))
    with pytest.raises(CodebookNotFoundError, match="private"):
        load(tmp_path / "copy")
    assert make_cache(load(tmp_path / "copy", token=ALICE)).codebook.sha256 == published.sha256


def test_enable_takes_a_token(published, model_folder):
    model = load(model_folder)
    with pytest.raises(CodebookNotFoundError, match="private"):
        enable(model, REPO)
    assert make_cache(enable(model, REPO, token=ALICE)).codebook.sha256 == published.sha256


def test_another_revision_is_another_codebook(server, published, book, model_folder):
    other = random_codebook(tiny_llama(), seed=50)
    newer = replace(book, layers=other.layers).push_to_hub(REPO, license=License("mit"), token=ALICE)
    for revision, want in ((published.revision, published), (published.tag, published), (None, newer), ("main", newer)):
        spec = {"codebook": REPO, "revision": revision}
        assert make_cache(load(model_folder, spec, token=ALICE)).codebook.sha256 == want.sha256
    with pytest.raises(CodebookNotFoundError, match="no revision 'v9'"):
        load(model_folder, {"codebook": REPO, "revision": "v9"}, token=ALICE)


def test_local_files_only_asks_nobody(server, published, model_folder, monkeypatch):
    with pytest.raises(hub.HubUnreachableError, match="not in the local cache"):
        load(model_folder, REPO, token=ALICE, local_files_only=True)
    load(model_folder, REPO, token=ALICE)
    server.log.clear()
    assert make_cache(load(model_folder, REPO, local_files_only=True)).codebook.sha256 == published.sha256
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert make_cache(load(model_folder, REPO)).codebook.sha256 == published.sha256
    assert server.log == []
