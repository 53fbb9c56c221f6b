"""Pushes a codebook to the Hub: one commit with config.json, codebooks.safetensors and README.md, and a tag."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from .cards import PICTURES, README, CardError, License, artefact_tag, check_publishable, render
from .codebook import CONFIG_FILE, LIBRARY, TENSOR_FILE, Codebook
from .config import CodebookError, ConfigError
from .hub import hub_errors, is_hub_id, rates_agree


@dataclass(frozen=True)
class Published:
    """Where a codebook is. revision: the commit. tag: names the contents, whatever the commit."""

    repo_id: str
    revision: str
    tag: str
    sha256: str


@dataclass(frozen=True)
class Package:
    """What is published. files: name -> bytes, the card among them. tag: names the contents."""

    book: Codebook
    files: dict[str, bytes]
    tag: str


def package(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: License | None = None,
    base_model: str | None = None,
    token: str | None = None,
) -> Package:
    """Everything that ``push`` would send, verified; sends nothing. Arguments and errors as for ``push``.

    The Hub is asked for nothing but the license of the base model, and that only if none is given.
    """
    if not is_hub_id(repo_id):
        raise ConfigError(f"{repo_id!r} is no Hub repository id. Fix: give org/name.")
    book, config_json, tensors = _read(folder, base_model)
    license = license or inherited_license(HfApi(library_name=LIBRARY, token=token), book.geometry.id)
    drawn = {name: path.read_bytes() for name in PICTURES if (path := Path(folder) / name).is_file()}
    card = render(book, config_json, len(tensors), repo_id, license, drawn)
    files = {CONFIG_FILE: config_json, TENSOR_FILE: tensors, README: card.encode(), **drawn}
    return Package(book, files, artefact_tag(config_json))


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: License | None = None,
    base_model: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> Published:
    """Publish a codebook and its card, in one commit: readers see all of it or none.

    license: the base model's; None asks the base model's card on the Hub.
    base_model: Hub id of the base model, for codebooks learned from a local folder.

    Raises:
        CardError: a local path as base model, no evaluation, or no license; nothing was sent.
        CodebookError: the folder is no valid codebook, or the Hub refused or cannot be reached.
        ConfigError: ``repo_id`` has not the form org/name, or that repository holds something else.
    """
    sent = package(folder, repo_id, license=license, base_model=base_model, token=token)
    api = HfApi(library_name=LIBRARY, token=token)
    with hub_errors(repo_id):
        parent = _head(api, repo_id, sent.book)
        if parent is None:
            parent = _create(api, repo_id, private)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in sent.files.items()],
            commit_message=f"{sent.book.bits:.3g}-bit CommVQ codebooks of {sent.book.geometry.id}",
            parent_commit=parent,  # somebody else's push since _head is an error, not overwritten
        )
        api.create_tag(repo_id, tag=sent.tag, revision=commit.oid, exist_ok=True)
    return Published(repo_id, commit.oid, sent.tag, sent.book.sha256)


def push_to_hub(
    book: Codebook,
    repo_id: str,
    *,
    license: License | None = None,
    base_model: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> Published:
    """``Codebook.push_to_hub``: publish a codebook and its card; arguments and errors as for ``push``."""
    with tempfile.TemporaryDirectory() as folder:
        return push(book.save(folder), repo_id, license=license, base_model=base_model, private=private, token=token)


# A codebook itself moves no files over a network; whoever can publish gives it the method that users look for.
Codebook.push_to_hub = push_to_hub


def inherited_license(api: HfApi, base_model: str) -> License:
    """The license that the base model's card states.

    Raises CardError when there is none to be had.
    """
    try:
        with hub_errors(base_model):
            card = api.model_info(base_model).card_data or {}
    except CodebookError as error:
        raise CardError(f"the license of {base_model} cannot be looked up: {error} Or name it: --license ID") from error
    if not isinstance(card.get("license"), str):
        raise CardError(f"the card of {base_model} does not state one license. Fix: --license ID")
    return License(card["license"], card.get("license_name"), card.get("license_link"))


def _read(folder: str | os.PathLike, base_model: str | None) -> tuple[Codebook, bytes, bytes]:
    """The verified codebook, and the bytes of its files; config.json with another base model id if one is given."""
    folder = Path(folder)
    book = Codebook.load(folder)
    recorded = book.geometry.id
    if base_model and base_model != recorded and is_hub_id(recorded) and not Path(recorded).is_dir():
        raise CardError(
            f"the codebook was learned from {recorded}, not from {base_model}. Fix: leave --base-model out, or learn "
            f"codebooks of {base_model}."
        )
    check_publishable(book, base_model)
    config_json, tensors = (folder / CONFIG_FILE).read_bytes(), (folder / TENSOR_FILE).read_bytes()
    if base_model and base_model != recorded:
        config = json.loads(config_json)
        config["base_model"]["id"] = base_model
        config_json = (json.dumps(config, indent=2) + "\n").encode()
        book = replace(book, geometry=replace(book.geometry, id=base_model))
    return book, config_json, tensors


def _head(api: HfApi, repo_id: str, book: Codebook) -> str | None:
    """The repository's newest commit, or None if there is no such repository.

    Raises ConfigError if it holds anything but an earlier version of this codebook.
    """
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    held = {file.rfilename for file in info.siblings or ()} - {".gitattributes", README, *PICTURES}
    if held:
        try:
            there = json.loads(Path(api.hf_hub_download(repo_id, CONFIG_FILE, revision=info.sha)).read_bytes())
        except (EntryNotFoundError, ValueError):
            there = None
        if not isinstance(there, dict) or there.get("library_name") != LIBRARY:
            raise ConfigError(f"{repo_id} holds something else than CommVQ codebooks. Fix: push to another name.")
        base = there.get("base_model", {}).get("id")
        if base != book.geometry.id:
            raise ConfigError(
                f"{repo_id} holds the codebooks of {base}; these are of {book.geometry.id}. Fix: push to another name."
            )
        if not rates_agree(there.get("bits", 0), book.bits):
            raise ConfigError(
                f"{repo_id} holds codebooks at {there.get('bits')} bits; these have {book.bits:.3g}. Fix: one "
                "repository a rate, e.g. org/Model-CommVQ-1bit."
            )
    return info.sha


def _create(api: HfApi, repo_id: str, private: bool) -> str:
    try:
        api.create_repo(repo_id, private=private)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise ConfigError(
            f"you cannot create {repo_id}: {error} Fix: run hf auth login with a token that may write to "
            f"{repo_id.split('/')[0]}."
        ) from error
    return api.model_info(repo_id).sha
