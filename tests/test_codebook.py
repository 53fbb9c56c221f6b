import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from books import codebook, geometry
from safetensors.torch import save_file

from transformers_commvq import (
    Codebook,
    CodebookError,
    CodebookFormatError,
    CodebookIntegrityError,
    CodebookMismatchError,
    CodebookNotFoundError,
)
from transformers_commvq import codebook as module
from transformers_commvq.codebook import CONFIG_FILE, TENSOR_FILE


@pytest.fixture
def saved(tmp_path):
    return codebook(geometry(), 2).save(tmp_path / "book")


def edit(folder, change):
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_round_trip_is_bit_for_bit(saved):
    first, again = codebook(geometry(), 2), Codebook.load(saved)
    assert again.geometry == first.geometry and again.bits == first.bits
    for i, book in first.layers.items():
        for side in ("keys", "values"):
            a, b = getattr(book, side), getattr(again.layers[i], side)
            assert a.layout == b.layout
            assert a.tensors().keys() == b.tensors().keys()
            assert all(torch.equal(t, b.tensors()[k]) for k, t in a.tensors().items())


def test_the_same_codebook_is_the_same_bytes(saved, tmp_path):
    """Made twice, and saved again by another process: hashes name contents, so contents decide every byte."""
    codebook(geometry(), 2).save(tmp_path / "twin")
    program = (  # without the package's __init__, which takes seconds to import
        "import sys, types; package = sys.modules['transformers_commvq'] = types.ModuleType('transformers_commvq')\n"
        "package.__path__ = [sys.argv[1]]\n"
        "from transformers_commvq.codebook import Codebook; Codebook.load(sys.argv[2]).save(sys.argv[3])"
    )
    arguments = [str(Path(module.__file__).parent), str(saved), str(tmp_path / "again")]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=120)
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert {(tmp_path / f / name).read_bytes() for f in ("twin", "again")} == {(saved / name).read_bytes()}


def test_bits_count_every_code_bit():
    book = codebook(geometry(layers=1, heads=2, dim=16), 2)  # 24, 40 and 40, 24 code bits for 4 x 16 elements
    assert book.bits == 128 / 64
    assert book.token_bytes == 16


def test_same_size_tampering_is_refused(saved):
    data = bytearray((saved / TENSOR_FILE).read_bytes())
    data[-1] ^= 1
    (saved / TENSOR_FILE).write_bytes(data)
    with pytest.raises(CodebookIntegrityError, match="sha256"):
        Codebook.load(saved)


def test_truncation_is_refused(saved):
    data = (saved / TENSOR_FILE).read_bytes()
    (saved / TENSOR_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(CodebookIntegrityError, match="delete the folder"):
        Codebook.load(saved)


def test_pinned_hash_is_checked(saved):
    Codebook.load(saved, expected_sha256=Codebook.load(saved).sha256)
    with pytest.raises(CodebookIntegrityError, match="pinned"):
        Codebook.load(saved, expected_sha256="0" * 64)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda c: c.update(format_version=99), CodebookFormatError, "pip install -U"),
        (lambda c: c.update(library_name="other"), CodebookFormatError, "no CommVQ codebook"),
        (lambda c: c.pop("files"), CodebookFormatError, "lacks"),
        (lambda c: c["codec"].update(kind="rvq"), CodebookFormatError, "code kind"),
        (lambda c: c["codec"].update(kind="index"), CodebookFormatError, "do not agree"),
        (lambda c: c.update(bits=1.0), CodebookFormatError, "other layers or bits"),
        (lambda c: c["codec"]["bits_per_head"].pop("1"), CodebookFormatError, "other layers or bits"),
        (lambda c: c["codec"]["bits_per_head"]["0"].update(keys=[24, 48]), CodebookFormatError, "expected"),
        (lambda c: c["codec"]["bits_per_head"]["0"].update(keys=[24, 41]), CodebookFormatError, "multiples of 8"),
        (lambda c: c["base_model"].pop("rope"), CodebookFormatError, "do not agree"),
    ],
)
def test_wrong_config_is_refused(saved, change, error, words):
    edit(saved, change)
    with pytest.raises(error, match=words):
        Codebook.load(saved)


def test_missing_files_are_told(saved, tmp_path):
    with pytest.raises(CodebookNotFoundError, match="no such folder"):
        Codebook.load(tmp_path / "nowhere")
    (saved / TENSOR_FILE).unlink()
    with pytest.raises(CodebookNotFoundError, match=TENSOR_FILE):
        Codebook.load(saved)


def test_broken_json_is_told(saved):
    (saved / CONFIG_FILE).write_text("{")
    with pytest.raises(CodebookFormatError, match="json"):
        Codebook.load(saved)


def test_not_safetensors_is_told(saved):
    (saved / TENSOR_FILE).write_bytes(b"\x80\x04.")
    import hashlib

    edit(saved, lambda c: c["files"][TENSOR_FILE].update(sha256=hashlib.sha256(b"\x80\x04.").hexdigest()))
    with pytest.raises(CodebookFormatError, match="safetensors"):
        Codebook.load(saved)


def test_missing_tensor_is_told(saved):
    import hashlib

    save_file({"x": torch.zeros(1)}, saved / TENSOR_FILE)
    digest = hashlib.sha256((saved / TENSOR_FILE).read_bytes()).hexdigest()
    edit(saved, lambda c: c["files"][TENSOR_FILE].update(sha256=digest))
    with pytest.raises(CodebookFormatError, match="do not agree"):
        Codebook.load(saved)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(num_key_value_heads=4), "num_key_value_heads: codebook 2, model 4"),
        (dict(head_dim=32), "head_dim"),
        (dict(model_type="qwen3"), "model_type"),
        (dict(rope={"layout": "half", "rotary_dim": 16, "parameters": {"rope_theta": 5e5}}), "rope"),
    ],
)
def test_wrong_model_is_refused(saved, change, words):
    book = Codebook.load(saved)
    book.check(geometry(name="elsewhere/same-geometry"))  # the id alone does not matter
    with pytest.raises(CodebookMismatchError, match=words):
        book.check(geometry(**change))


def test_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    import os

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        codebook(geometry(), 2).save(tmp_path / "book")
    assert not list((tmp_path / "book").iterdir())


def test_every_load_error_is_a_codebook_error():
    for error in (CodebookFormatError, CodebookIntegrityError, CodebookMismatchError, CodebookNotFoundError):
        assert issubclass(error, CodebookError)
