"""Pulling and pushing codebooks over HTTP, against a Hub on 127.0.0.1. Every failure has one clear error."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from transformers_commvq import hub, publish
from transformers_commvq.cards import PICTURES, CardError, License, artefact_tag, make_card
from transformers_commvq.cli import inspect as inspect_command
from transformers_commvq.cli import push as push_command
from transformers_commvq.codebook import CONFIG_FILE, TENSOR_FILE, Codebook, LayerBook, ModelGeometry, SignBook
from transformers_commvq.config import (
    CodebookFormatError,
    CodebookIntegrityError,
    CodebookMismatchError,
    CodebookNotFoundError,
    CommVQConfig,
    ConfigError,
)
from transformers_commvq.packing import CodeLayout

BASE, REPO = "smith/Base", "alice/Base-CommVQ-2bit"
PACKAGE = Path(hub.__file__).parent


def make_book(bits: int = 2, base: str = BASE, seed: int = 0) -> Codebook:
    """A small codebook of random numbers, with uneven bits a head."""
    g = torch.Generator().manual_seed(seed)
    heads, dim, layers = 2, 16, 2
    rope = {"layout": "half", "rotary_dim": dim, "parameters": {"rope_theta": 1e4}}
    geometry = ModelGeometry(base, None, "llama", layers, tuple(range(layers)), heads, dim, rope)

    def side(layout: tuple[int, ...], metric: bool) -> SignBook:
        return SignBook(
            CodeLayout(layout),
            torch.randn(sum(layout), dim, generator=g).half(),
            torch.randn(heads, dim, generator=g),
            torch.eye(dim).half().repeat(heads, 1, 1) if metric else None,
        )

    n = bits * dim
    books = {i: LayerBook(side((n - 8, n), True), side((n, n + 8), False)) for i in range(layers)}
    evaluation = {
        "command": "transformers-commvq learn ...",
        "wikitext-2 test": {"perplexity": 18.96, "reference_perplexity": 18.62, "kl": 0.0167, "windows": 3},
    }
    return Codebook(geometry, books, {"dataset": "made up", "tokens": 0, "seed": seed}, evaluation)


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in (CONFIG_FILE, TENSOR_FILE)}


@pytest.fixture
def book(tmp_path) -> Codebook:
    made = make_book()
    made.save(tmp_path / "book")
    return made


@pytest.fixture
def files(book, tmp_path) -> dict[str, bytes]:
    return files_of(tmp_path / "book")


def assert_same(a: Codebook, b: Codebook):
    assert a.sha256 == b.sha256 and a.geometry == b.geometry and a.evaluation == b.evaluation
    for i, layer in a.layers.items():
        for side in ("keys", "values"):
            mine, other = getattr(layer, side), getattr(b.layers[i], side)
            assert mine.layout == other.layout
            for name, tensor in mine.tensors().items():
                assert torch.equal(tensor, other.tensors()[name]), (i, side, name)


def assert_nothing_half_written(tmp_path: Path):
    """A cache in which an offline pull finds no book, and no half of one is left under a final name."""
    snapshots = list((tmp_path / "cache").glob("models--*/snapshots/*/*"))
    assert TENSOR_FILE not in {path.name for path in snapshots}
    with pytest.raises(hub.HubUnreachableError):
        hub.pull(REPO, local_files_only=True)


# Where codebooks are looked for


def test_explicit_folder(book, tmp_path):
    assert_same(hub.resolve(CommVQConfig(codebook=str(tmp_path / "book")), book.geometry), book)


def test_explicit_folder_has_no_revision(book, tmp_path):
    with pytest.raises(ConfigError, match="a folder has no revisions"):
        hub.resolve(CommVQConfig(codebook=str(tmp_path / "book"), revision="main"), book.geometry)


def test_revision_needs_a_repository(book):
    with pytest.raises(ConfigError, match="revision of the codebook's repository"):
        hub.resolve(CommVQConfig(revision="main"), book.geometry)


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "spaces in/it"])
def test_explicit_neither_folder_nor_id(book, name):
    with pytest.raises(CodebookNotFoundError, match="neither a folder nor a Hub"):
        hub.resolve(CommVQConfig(codebook=name), book.geometry)


def test_explicit_wins_over_beside_and_registry(book, tmp_path, monkeypatch):
    other = make_book(seed=1)
    other.save(tmp_path / "model" / "commvq")
    geometry = replace(book.geometry, id=str(tmp_path / "model"))
    assert hub.resolve(CommVQConfig(), geometry).sha256 == other.sha256
    assert hub.resolve(CommVQConfig(codebook=str(tmp_path / "book")), geometry).sha256 == book.sha256


def test_beside_a_checkpoint_by_rate(tmp_path):
    one, two = make_book(1), make_book(2)
    one.save(tmp_path / "model" / "commvq" / "1bit")
    two.save(tmp_path / "model" / "commvq" / "2bit")
    geometry = replace(one.geometry, id=str(tmp_path / "model"))
    assert hub.resolve(CommVQConfig(bits=1), geometry).sha256 == one.sha256
    assert hub.resolve(CommVQConfig(bits=2), geometry).sha256 == two.sha256


def test_beside_at_another_rate_is_named_in_the_error(tmp_path):
    two = make_book(2)
    two.save(tmp_path / "model" / "commvq")
    with pytest.raises(CodebookNotFoundError, match="commvq holds 2 bits"):
        hub.resolve(CommVQConfig(bits=1), replace(two.geometry, id=str(tmp_path / "model")))


def test_beside_but_broken_is_an_error(tmp_path, book):
    book.save(tmp_path / "model" / "commvq")
    (tmp_path / "model" / "commvq" / TENSOR_FILE).write_bytes(b"short")
    with pytest.raises(CodebookIntegrityError):
        hub.resolve(CommVQConfig(), replace(book.geometry, id=str(tmp_path / "model")))


@pytest.fixture
def registry(book, tmp_path, monkeypatch):
    """A registry whose one entry is ``book``, as if packaged."""
    entry = {"packaged": "book", "sha256": book.sha256}
    content = {BASE: {"2": entry}}
    path = tmp_path / "registry.json"
    monkeypatch.setattr(hub, "PACKAGED", tmp_path)
    monkeypatch.setattr(hub, "REGISTRY_FILE", path)
    path.write_text(json.dumps(content))

    def change(**fields):
        content[BASE]["2"] = {**entry, **fields} if "repo" not in fields else fields
        path.write_text(json.dumps(content))

    return change


def test_registry_packaged(registry, book):
    assert_same(hub.resolve(CommVQConfig(), book.geometry), book)


def test_registry_hash_is_checked(registry, book):
    registry(sha256="0" * 64)
    with pytest.raises(CodebookIntegrityError, match="pinned hash"):
        hub.resolve(CommVQConfig(), book.geometry)


def test_registry_repository_is_pinned(registry, book, files, server):
    commit = server.add(REPO, files)
    server.add(REPO, {"README.md": b"the files are gone from main"})
    registry(repo=REPO, commit=commit, sha256=book.sha256)
    assert_same(hub.resolve(CommVQConfig(), book.geometry), book)


def test_local_copy_with_base_model_uses_the_registry(registry, book, tmp_path):
    geometry = replace(book.geometry, id=str(tmp_path))
    assert hub.resolve(CommVQConfig(base_model=BASE), geometry).sha256 == book.sha256


def test_local_copy_without_base_model_says_so(registry, book, tmp_path):
    with pytest.raises(CodebookNotFoundError, match="base_model") as caught:
        hub.resolve(CommVQConfig(), replace(book.geometry, id=str(tmp_path)))
    assert f"transformers-commvq learn {tmp_path} --text FILE --bits 2" in str(caught.value)


def test_not_found_prints_the_learn_command(registry, book):
    with pytest.raises(CodebookNotFoundError) as caught:
        hub.resolve(CommVQConfig(bits=1), book.geometry)
    assert f"transformers-commvq learn {BASE} --text FILE --bits 1" in str(caught.value)
    assert f"{BASE} at 2 bits" in str(caught.value)


def test_learn_on_first_use_only_if_asked(registry, book):
    def learn(config, geometry):
        calls.append((config.bits, geometry.id))
        return make_book(1)

    calls: list = []
    with pytest.raises(CodebookNotFoundError):
        hub.resolve(CommVQConfig(bits=1), book.geometry, on_missing=learn)
    assert not calls
    assert hub.resolve(CommVQConfig(bits=1, learn=True), book.geometry, on_missing=learn).bits == pytest.approx(1)
    assert calls == [(1.0, BASE)]
    assert_same(hub.resolve(CommVQConfig(learn=True), book.geometry, on_missing=learn), book)
    assert len(calls) == 1, "learned although the registry had one"


@pytest.mark.parametrize("change", [{"head_dim": 32}, {"rope": {"layout": "interleaved"}}, {"model_type": "qwen3"}])
def test_another_models_codebook_is_refused(book, tmp_path, change):
    with pytest.raises(CodebookMismatchError, match=next(iter(change))):
        hub.resolve(CommVQConfig(codebook=str(tmp_path / "book")), replace(book.geometry, **change))


def test_a_finetune_is_warned_about(book, tmp_path, caplog):
    hub.resolve(CommVQConfig(codebook=str(tmp_path / "book")), replace(book.geometry, id="bob/finetune"))
    assert "bob/finetune" in caplog.text


# Pulling


def test_pull_by_branch_tag_and_commit(server, files, book):
    commit = server.add(REPO, files)
    server.repos[REPO].refs["v1"] = commit
    server.add(REPO, files_of(make_book(seed=3).save(Path(constants.HF_HUB_CACHE) / "other")))
    for revision in ("v1", commit):
        assert_same(hub.pull(REPO, revision), book)
        assert_same(hub.resolve(CommVQConfig(codebook=REPO, revision=revision), book.geometry), book)
    assert hub.pull(REPO).sha256 != book.sha256


def test_all_files_of_a_pull_come_from_one_commit(server, files, book, monkeypatch):
    """The repository changes between the two downloads of one pull."""
    server.add(REPO, files)
    real = hub.hf_hub_download

    def download(repo_id, name, **kwargs):
        path = real(repo_id, name, **kwargs)
        server.add(REPO, files_of(make_book(seed=9).save(Path(constants.HF_HUB_CACHE) / "newer")))
        return path

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert_same(hub.pull(REPO), book)


def test_warm_pinned_pull_makes_no_request(server, files, book):
    commit = server.add(REPO, files)
    hub.pull(REPO, commit)
    assert server.log
    server.log.clear()
    assert_same(hub.pull(REPO, commit), book)
    assert server.log == []


def test_warm_branch_pull_downloads_nothing_again(server, files):
    server.add(REPO, files)
    hub.pull(REPO)
    server.log.clear()
    hub.pull(REPO)
    assert server.log == [("GET", f"/api/models/{REPO}/revision/main")] or server.log == [
        ("GET", f"/api/models/{REPO}")
    ]


def test_expected_sha256(server, files, book):
    server.add(REPO, files)
    assert_same(hub.pull(REPO, expected_sha256=book.sha256), book)
    with pytest.raises(CodebookIntegrityError, match="pinned hash"):
        hub.pull(REPO, expected_sha256="0" * 64)


def test_missing_repository(server):
    with pytest.raises(CodebookNotFoundError, match="does not exist"):
        hub.pull("alice/nothing", token="token-alice")


def test_wrong_revision(server, files):
    server.add(REPO, files)
    for revision in ("no-such-branch", "f" * 40):
        with pytest.raises(CodebookNotFoundError, match="no revision"):
            hub.pull(REPO, revision)


@pytest.mark.parametrize("absent", [CONFIG_FILE, TENSOR_FILE])
def test_repository_without_a_codebook(server, files, absent, tmp_path):
    server.add(REPO, {k: v for k, v in files.items() if k != absent})
    with pytest.raises(CodebookNotFoundError, match="holds no CommVQ codebook"):
        hub.pull(REPO)
    assert_nothing_half_written(tmp_path)


def test_config_of_something_else(server, files):
    server.add(REPO, {**files, CONFIG_FILE: b'{"model_type": "llama"}'})
    with pytest.raises(CodebookFormatError, match="no CommVQ codebook"):
        hub.pull(REPO)


def test_private(server, files, book, monkeypatch):
    server.add(REPO, files, private=True)
    for token in (None, "token-bob"):
        with pytest.raises(CodebookNotFoundError, match="private and your token cannot see it"):
            hub.pull(REPO, token=token)
    assert_same(hub.pull(REPO, token="token-alice"), book)
    monkeypatch.setenv("HF_TOKEN", "token-alice")
    assert_same(hub.resolve(CommVQConfig(codebook=REPO), book.geometry), book)


def test_gated(server, files, book, tmp_path):
    server.add(REPO, files, gated=True)
    for token in (None, "token-bob"):
        with pytest.raises(hub.CodebookAccessError, match=r"gated.*accept its terms"):
            hub.pull(REPO, token=token)
    assert_nothing_half_written(tmp_path)
    assert_same(hub.pull(REPO, token="token-alice"), book)


def test_tampered_at_the_same_size(server, files, book, tmp_path):
    server.add(REPO, files)
    data = bytearray(files[TENSOR_FILE])
    data[-1] ^= 1
    server.tamper[TENSOR_FILE] = bytes(data)
    with pytest.raises(CodebookIntegrityError, match="sha256"):
        hub.pull(REPO)
    assert_nothing_half_written(tmp_path)
    server.tamper.clear()
    assert_same(hub.pull(REPO), book)


def test_corrupted_in_the_cache(server, files, book, tmp_path):
    commit = server.add(REPO, files)
    hub.pull(REPO, commit)
    blob = (hub.download(REPO, commit) / TENSOR_FILE).resolve()
    blob.write_bytes(blob.read_bytes()[:-7])
    with pytest.raises(CodebookIntegrityError, match="removed from the cache"):
        hub.pull(REPO, commit)
    assert_same(hub.pull(REPO, commit), book)


def test_truncated_in_the_repository(server, files, tmp_path):
    server.add(REPO, {**files, TENSOR_FILE: files[TENSOR_FILE][:-100]})
    with pytest.raises(CodebookIntegrityError, match="sha256"):
        hub.pull(REPO)
    assert_nothing_half_written(tmp_path)


def test_connection_cut_mid_download(server, files, book, tmp_path):
    server.add(REPO, files)
    server.cut[TENSOR_FILE] = len(files[TENSOR_FILE]) // 2
    with pytest.raises(hub.HubUnreachableError):
        hub.pull(REPO)
    assert_nothing_half_written(tmp_path)
    server.cut.clear()
    assert_same(hub.pull(REPO), book)


def test_server_sends_less_than_its_metadata_says(server, files, tmp_path, monkeypatch):
    server.add(REPO, files)
    server.tamper[TENSOR_FILE] = files[TENSOR_FILE][:-8]
    with pytest.raises(CodebookIntegrityError):
        hub.pull(REPO)
    assert_nothing_half_written(tmp_path)


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, hub.HubUnreachableError), (503, hub.HubUnreachableError), (403, hub.CodebookAccessError)],
)
def test_server_that_answers_with_an_error(server, files, book, tmp_path, status, error):
    server.add(REPO, files)
    server.status[TENSOR_FILE] = status
    with pytest.raises(error, match=REPO):
        hub.pull(REPO)
    assert_nothing_half_written(tmp_path)
    server.status.clear()
    assert_same(hub.pull(REPO), book)


def test_server_down(server, files, book, tmp_path):
    commit = server.add(REPO, files)
    hub.pull(REPO)
    server.stop()
    assert_same(hub.pull(REPO), book)  # what the branch last was
    assert_same(hub.pull(REPO, commit), book)
    with pytest.raises(hub.HubUnreachableError, match="not in the local cache"):
        hub.pull("alice/never-pulled")
    with pytest.raises(hub.HubUnreachableError, match="not in the local cache"):
        hub.pull(REPO, "e" * 40)


def test_offline(server, files, book, monkeypatch):
    commit = server.add(REPO, files)
    hub.pull(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.log.clear()
    assert_same(hub.pull(REPO), book)
    assert_same(hub.pull(REPO, commit), book)
    with pytest.raises(hub.HubUnreachableError, match="offline mode is on"):
        hub.pull("alice/never-pulled")
    assert server.log == []


# The package's __init__ loads transformers' modeling code, most of a client's time; these clients need hub alone.
CLIENT = f"""
import sys, types
package = sys.modules["transformers_commvq"] = types.ModuleType("transformers_commvq")
package.__path__ = [{str(PACKAGE)!r}]
from transformers_commvq import hub
"""


def start_client(server, tmp_path, code: str, **environment: str) -> subprocess.Popen:
    """Another process that runs ``code`` with ``hub`` imported."""
    env = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-c", CLIENT + code]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


PULL = f"print(hub.pull({REPO!r}).sha256)"


def test_killed_mid_download(server, files, book, tmp_path):
    server.add(REPO, files)
    server.hold[TENSOR_FILE] = threading.Event()
    client = start_client(server, tmp_path, PULL)
    assert server.held.wait(60), client.communicate(timeout=5)
    client.send_signal(signal.SIGKILL)
    client.communicate()
    server.hold.pop(TENSOR_FILE).set()
    assert_nothing_half_written(tmp_path)
    assert_same(hub.pull(REPO), book)


def test_two_processes_at_once(server, files, book, tmp_path):
    """Neither gets past the first half of the file until both have asked for it."""
    server.add(REPO, files)
    gate = server.hold[TENSOR_FILE] = threading.Event()
    clients = [start_client(server, tmp_path, PULL) for _ in range(2)]
    asked = 0
    while asked < 2 and all(client.poll() is None for client in clients):
        time.sleep(0.05)
        with server.lock:
            asked = sum(method == "HEAD" and path.endswith(TENSOR_FILE) for method, path in server.log)
    gate.set()
    for client in clients:
        out, err = client.communicate(timeout=60)
        assert client.returncode == 0, err
        assert out.strip() == book.sha256
    assert_same(hub.pull(REPO, local_files_only=True), book)


def test_offline_by_environment(server, files, book, tmp_path):
    server.add(REPO, files)
    hub.pull(REPO)
    server.log.clear()
    client = start_client(server, tmp_path, PULL + "; hub.pull('alice/never-pulled')", HF_HUB_OFFLINE="1")
    out, err = client.communicate(timeout=60)
    assert out.strip() == book.sha256, err
    assert client.returncode != 0 and "HubUnreachableError" in err and "offline mode is on" in err
    assert server.log == []


# Content tags


def test_content_tag_pins_and_needs_no_request_when_warm(server, files, book):
    commit = server.add(REPO, files)
    tag = artefact_tag(files[CONFIG_FILE])
    server.repos[REPO].refs[tag] = commit
    assert_same(hub.pull(REPO, tag), book)
    server.log.clear()
    assert_same(hub.pull(REPO, tag), book)
    assert server.log == []


def test_moved_content_tag_is_refused(server, files, tmp_path):
    other = files_of(make_book(seed=5).save(tmp_path / "other"))
    tag = artefact_tag(files[CONFIG_FILE])
    server.repos.pop(REPO, None)
    server.add(REPO, files)
    server.repos[REPO].refs[tag] = server.add(REPO, other)
    with pytest.raises(CodebookIntegrityError, match="is not the one that revision"):
        hub.pull(REPO, tag)


# Pushing

APACHE = License("apache-2.0")


def push(tmp_path, repo_id: str = REPO, **changes):
    return publish.push(tmp_path / "book", repo_id, **{"license": APACHE, "token": "token-alice", **changes})


def test_push_then_pull_is_bit_for_bit(server, files, book, tmp_path):
    done = push(tmp_path)
    assert set(server.files(REPO)) == {CONFIG_FILE, TENSOR_FILE, "README.md"}
    assert {name: server.files(REPO)[name] for name in files} == files
    for revision in (None, done.revision, done.tag):
        folder = hub.download(REPO, revision)
        assert files_of(folder) == files
        assert_same(hub.resolve(CommVQConfig(codebook=REPO, revision=revision), book.geometry), book)
    card = server.files(REPO)["README.md"].decode()
    assert done.tag in card and f'"codebook": "{REPO}"' in card
    assert card == make_card(tmp_path / "book", REPO, APACHE)


def test_push_takes_pictures_along(server, book, tmp_path):
    for name in PICTURES:
        (tmp_path / "book" / name).write_bytes(b"\x89PNG " + name.encode())
    push(tmp_path)
    assert all(server.files(REPO)[name] == b"\x89PNG " + name.encode() for name in PICTURES)
    assert all(f"]({name})" in server.files(REPO)["README.md"].decode() for name in PICTURES)
    push(tmp_path)  # and it is no stranger there the next time


def test_push_is_one_commit(server, book, tmp_path):
    push(tmp_path)
    with_files = [sha for sha, files in server.repos[REPO].commits.items() if files]
    assert len(with_files) == 1
    assert ("POST", "/api/validate-yaml") in server.log


def test_push_again_and_update(server, book, tmp_path):
    first = push(tmp_path)
    assert push(tmp_path).tag == first.tag
    make_book(seed=7).save(tmp_path / "book")
    second = push(tmp_path)
    assert second.tag != first.tag
    assert hub.pull(REPO, second.tag).sha256 == second.sha256
    assert hub.pull(REPO, first.tag).sha256 == first.sha256 == book.sha256


def test_push_private(server, book, tmp_path):
    push(tmp_path, private=True)
    assert server.repos[REPO].private


def test_push_refuses_a_local_base_model(server, tmp_path):
    make_book(base=str(tmp_path)).save(tmp_path / "book")
    with pytest.raises(CardError, match="no Hub id"):
        push(tmp_path)
    assert server.log == []


def test_push_refuses_a_relative_folder_that_looks_like_an_id(server, book, tmp_path, monkeypatch):
    (tmp_path / BASE).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CardError, match="local folder"):
        push(tmp_path)
    assert server.log == []


def test_push_with_base_model_renames_it(server, tmp_path):
    local = make_book(base=str(tmp_path))
    local.save(tmp_path / "book")
    push(tmp_path, base_model=BASE)
    pulled = hub.pull(REPO)
    assert pulled.geometry == replace(local.geometry, id=BASE) and pulled.sha256 == local.sha256
    assert str(tmp_path) not in server.files(REPO)[CONFIG_FILE].decode() + server.files(REPO)["README.md"].decode()


def test_push_refuses_another_base_model_than_recorded(server, book, tmp_path):
    with pytest.raises(CardError, match="was learned from smith/Base"):
        push(tmp_path, base_model="smith/Other")
    assert server.log == []


def test_push_refuses_what_was_not_measured(server, book, tmp_path):
    for evaluation in ({}, {"perplexity": 3.0}, {"perplexity": float("nan"), "reference_perplexity": 2.0}):
        replace(book, evaluation=evaluation).save(tmp_path / "book")
        with pytest.raises(CardError, match="no evaluation"):
            push(tmp_path)
    assert server.log == []


def test_push_refuses_a_damaged_folder(server, book, tmp_path):
    (tmp_path / "book" / TENSOR_FILE).write_bytes(b"damaged")
    with pytest.raises(CodebookIntegrityError):
        push(tmp_path)
    assert server.log == []


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}, "something else"),
        ({"data.csv": b"1,2"}, "something else"),
        ("another base", "holds the codebooks of smith/Elsewhere"),
        ("another rate", "at 1.0 bits"),
    ],
)
def test_push_never_overwrites_something_else(server, book, tmp_path, there, message):
    if isinstance(there, str):
        other = make_book(1) if there == "another rate" else make_book(base="smith/Elsewhere")
        there = files_of(other.save(tmp_path / "other"))
    commit = server.add(REPO, there)
    with pytest.raises(ConfigError, match=message):
        push(tmp_path)
    assert server.repos[REPO].refs == {"main": commit}


def test_push_into_an_empty_repository(server, book, tmp_path):
    server.add(REPO, {".gitattributes": b"", "README.md": b"soon"})
    push(tmp_path)
    assert hub.pull(REPO).sha256 == book.sha256


@pytest.mark.parametrize("token", [None, "token-bob", "wrong"])
def test_push_without_the_right(server, book, tmp_path, token):
    with pytest.raises((ConfigError, hub.CodebookAccessError), match=r"cannot create|refused"):
        push(tmp_path, token=token)
    assert REPO not in server.repos


def test_push_elsewhere_in_between_is_not_overwritten(server, book, tmp_path, monkeypatch):
    push(tmp_path)
    real = publish._head

    def head(*args):
        result = real(*args)
        server.add(REPO, {"README.md": b"theirs"})
        return result

    monkeypatch.setattr(publish, "_head", head)
    with pytest.raises(hub.CodebookAccessError, match="refused"):
        push(tmp_path)
    assert server.files(REPO) == {"README.md": b"theirs"}


def test_push_to_a_server_that_is_down(server, book, tmp_path):
    server.stop()
    with pytest.raises(hub.HubUnreachableError):
        push(tmp_path)


def test_license_is_inherited(server, book, tmp_path):
    with pytest.raises(CardError, match=r"cannot be looked up.*--license"):
        push(tmp_path, license=None)
    server.add(BASE, {"README.md": b"---\ntags: [x]\n---\n"})
    with pytest.raises(CardError, match="does not state one license"):
        push(tmp_path, license=None)
    server.add(BASE, {"README.md": b"---\nlicense: other\nlicense_name: smith\nlicense_link: https://s.example\n---\n"})
    push(tmp_path, license=None)
    card = server.files(REPO)["README.md"].decode()
    assert (
        "license: other\n" in card and "license_name: smith\n" in card and "license_link: https://s.example\n" in card
    )


def run_cli(module, capsys, *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.run(parser.parse_args(arguments)) == 0
    return capsys.readouterr().out


def test_a_dry_run_sends_nothing(server, files, tmp_path, capsys):
    out = run_cli(push_command, capsys, str(tmp_path / "book"), REPO, "--license", "apache-2.0", "--dry-run")
    assert server.log == [] and REPO not in server.repos
    assert artefact_tag(files[CONFIG_FILE]) in out and f"{len(files[TENSOR_FILE]):,} bytes  {TENSOR_FILE}" in out


def test_commands_push_and_inspect(server, files, book, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "token-alice")
    out = run_cli(push_command, capsys, str(tmp_path / "book"), REPO, "--license", "apache-2.0")
    tag = artefact_tag(files[CONFIG_FILE])
    assert f'"revision": "{tag}"' in out
    report = json.loads(run_cli(inspect_command, capsys, REPO, "--revision", tag, "--json"))
    assert report["commit"] == server.repos[REPO].refs["main"]
    assert report["bits"] == book.bits and report["bytes_per_token"] == book.token_bytes
    assert report["files"][TENSOR_FILE] == {"sha256": book.sha256, "size": len(files[TENSOR_FILE])}
    assert report["bits_per_head"]["0"]["keys"] == list(book.layers[0].keys.layout.bits)
    text = run_cli(inspect_command, capsys, str(tmp_path / "book"))
    for expected in (BASE, book.sha256, "2 bits an element", "perplexity 18.62 plain, 18.96", "24 32 | 32 40", tag):
        assert expected in text


# Trust


def test_nothing_unpickles():
    """The importer of published codebooks is the one opt-in exception, and only with torch's restricted loader."""
    importer = PACKAGE / "paper_import.py"
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert not re.search(r"\b(c?pickle|dill|joblib|marshal|shelve)\.(loads?|open|Unpickler)\b", source, re.I), path
        assert not re.search(r"^\s*from\s+(pickle|dill|joblib|marshal|shelve)\s+import", source, re.M), path
        assert "trust_remote_code=True" not in source, path
        calls = re.findall(r"torch\.load\(([^)]*)\)", source)
        assert not calls or path == importer, path
        assert all("weights_only=True" in arguments for arguments in calls), path
