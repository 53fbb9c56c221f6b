"""Cards say what the artefact says, and the finished ones in hub_cards/ are those that a push would upload."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from test_hub import APACHE, BASE, REPO, make_book

from transformers_commvq import hub
from transformers_commvq.cards import PICTURES, CardError, License, artefact_tag, make_card, measurements
from transformers_commvq.cli import cards as command
from transformers_commvq.codebook import CONFIG_FILE, TENSOR_FILE, Codebook

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_book().save(tmp_path / "book")


def test_metadata(folder):
    data = ModelCard(make_card(folder, REPO, APACHE)).data
    assert data.license == "apache-2.0" and data.base_model == BASE
    assert data.base_model_relation == "quantized" and data.library_name == "transformers_commvq"
    assert {"commvq", "kv-cache", "2-bit"} <= set(data.tags)


def test_no_placeholder_is_left(folder):
    card = make_card(folder, REPO, APACHE)
    assert "$" not in card and "None" not in card
    assert isinstance(yaml.safe_load(card.split("---")[1]), dict)


def test_usage_is_pinned_to_the_contents(folder):
    card = make_card(folder, REPO, APACHE)
    python = re.search(r"```python\n(.*?)```", card, re.S)[1]
    compile(python, "card", "exec")
    assert f'"codebook": "{REPO}"' in python
    assert f'"revision": "{artefact_tag((folder / CONFIG_FILE).read_bytes())}"' in python


def test_numbers_are_the_artefacts(folder):
    book = make_book()
    card = make_card(folder, REPO, APACHE)
    assert f"**{book.token_bytes:,} bytes**" in card and f"takes {2 * book.elements_per_token:,}." in card
    for name in (CONFIG_FILE, TENSOR_FILE):
        data = (folder / name).read_bytes()
        assert f"| {name} | {len(data):,} | `{hashlib.sha256(data).hexdigest()}` |" in card
    assert "| wikitext-2 test | 18.620 | 18.960 | 0.0167 | 3 |" in card
    assert "- command: `transformers-commvq learn ...`" in card
    assert "- dataset: made up" in card


def test_a_changed_number_changes_the_card(tmp_path, folder):
    other = make_book()
    other.evaluation["wikitext-2 test"]["perplexity"] = 19.5
    other.save(tmp_path / "other")
    assert "| 19.500 |" in make_card(tmp_path / "other", REPO, APACHE)
    assert "| 19.500 |" not in make_card(folder, REPO, APACHE)


def test_all_measurements_are_shown_and_nothing_recorded_is_dropped(tmp_path):
    row = {"perplexity": 2.5, "reference_perplexity": 2.0, "change": 0.25, "change_standard_error": None}
    evaluation = {"results": [{"dataset": "one", **row}, {"dataset": "two", **row}], "passkey": {"2048": 0.75}}
    replace(make_book(), evaluation=evaluation).save(tmp_path / "book")
    card = make_card(tmp_path / "book", REPO, APACHE)
    assert "| one | 2.000 | 2.500 | +25.00% |" in card and "| two | 2.000 |" in card
    assert "- passkey.2048: 0.75" in card
    assert [name for name, _ in measurements(evaluation)] == ["one", "two"]


def test_licenses():
    with pytest.raises(CardError, match="not an identifier"):
        License("apache2")
    with pytest.raises(CardError, match="needs a name"):
        License("other")
    assert License("other", "mine", "https://mine.example").metadata() == {
        "license": "other",
        "license_name": "mine",
        "license_link": "https://mine.example",
    }


@pytest.mark.parametrize("base", ["/data/model", "./model", "LlamaForCausalLM", "a/b/c"])
def test_base_model_must_be_a_hub_id(tmp_path, base):
    make_book(base=base).save(tmp_path / "book")
    with pytest.raises(CardError, match="no Hub id"):
        make_card(tmp_path / "book", REPO, APACHE)


# The maintainers' command


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package with two codebooks, not yet in its registry, which knows one repository."""
    monkeypatch.setattr(hub, "PACKAGED", tmp_path / "codebooks")
    monkeypatch.setattr(hub, "REGISTRY_FILE", tmp_path / "registry.json")
    kept = {"smith/Far": {"2": {"repo": "smith/Far-CommVQ-2bit", "commit": "0" * 40, "sha256": "0" * 64}}}
    (tmp_path / "registry.json").write_text(json.dumps(kept))
    for bits in (1, 2):
        make_book(bits).save(tmp_path / "codebooks" / f"Base-CommVQ-{bits}bit")
    return tmp_path


def test_command_writes_registry_and_cards(package, capsys):
    out = package / "cards"
    with pytest.raises(CardError, match="--license"):
        run("--out", str(out))
    assert run("--out", str(out), "--license", "apache-2.0", "--org", "alice") == 0
    registry = hub.read_registry()
    tensors = (package / "codebooks" / "Base-CommVQ-1bit" / TENSOR_FILE).read_bytes()
    assert registry[BASE]["1"]["sha256"] == hashlib.sha256(tensors).hexdigest()
    assert registry[BASE]["2"]["packaged"] == "Base-CommVQ-2bit" and "smith/Far" in registry
    card = (out / "Base-CommVQ-2bit" / "README.md").read_text()
    assert card == make_card(hub.PACKAGED / "Base-CommVQ-2bit", "alice/Base-CommVQ-2bit", APACHE)
    assert run("--out", str(out), "--org", "alice", "--check") == 0


def test_picture_goes_with_the_card(package):
    out, drawn = package / "cards", package / "codebooks" / "Base-CommVQ-2bit" / "bits.png"
    drawn.write_bytes(b"\x89PNG picture")
    run("--out", str(out), "--license", "mit")
    card = (out / "Base-CommVQ-2bit" / "README.md").read_text()
    assert "](bits.png)" in card and "loss.png" not in card
    assert (out / "Base-CommVQ-2bit" / "bits.png").read_bytes() == b"\x89PNG picture"
    assert not any(name in (out / "Base-CommVQ-1bit" / "README.md").read_text() for name in PICTURES)
    drawn.write_bytes(b"\x89PNG other")
    assert run("--out", str(out), "--check") == 1


def test_command_notices_what_is_stale(package, capsys):
    out = package / "cards"
    assert run("--out", str(out), "--license", "mit", "--check") == 1
    assert not out.exists()
    run("--out", str(out), "--license", "mit")
    make_book(2, seed=8).save(package / "codebooks" / "Base-CommVQ-2bit")
    assert run("--out", str(out), "--check") == 1
    assert "Base-CommVQ-2bit" in capsys.readouterr().out
    run("--out", str(out))
    assert run("--out", str(out), "--check") == 0


def test_finished_cards_are_up_to_date(capsys):
    """hub_cards/ and registry.json are what `make cards` makes from the codebooks in the package."""
    assert run("--out", str(ROOT / "hub_cards"), "--check") == 0, capsys.readouterr().out
    names = {entry["packaged"] for rates in hub.read_registry().values() for entry in rates.values()}
    assert names == {path.name for path in (ROOT / "hub_cards").iterdir() if path.is_dir()}
    assert {f"SmolLM2-135M-Instruct-CommVQ-{bits}bit" for bits in (1, 2)} <= names


def test_template_in_hub_cards_is_the_packages():
    assert (ROOT / "hub_cards" / "template.md").read_text() == (hub.PACKAGED.parent / "card_template.md").read_text()


def test_every_packaged_codebook_is_registered_and_intact():
    for model, rates in hub.read_registry().items():
        for rate, entry in rates.items():
            book = Codebook.load(hub.PACKAGED / entry["packaged"], entry["sha256"])
            assert book.geometry.id == model and hub.rates_agree(book.bits, float(rate))
