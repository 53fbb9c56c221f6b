"""Finds, fetches and verifies codebooks: folders, the registry shipped in the package, repositories on the Hub.

Nothing here trusts a download: every tensor file is hashed against its config.json, and against a hash from the
registry or the caller where there is one. Files are safetensors and json; nothing is unpickled or executed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import validate_repo_id

from .cards import TAG_PREFIX, artefact_tag
from .codebook import CONFIG_FILE, LIBRARY, TENSOR_FILE, Codebook, ModelGeometry
from .config import (
    CodebookError,
    CodebookFormatError,
    CodebookIntegrityError,
    CodebookMismatchError,
    CodebookNotFoundError,
    CommVQConfig,
    ConfigError,
)

logger = logging.getLogger(__name__)

REGISTRY_FILE = Path(__file__).with_name("registry.json")
PACKAGED = Path(__file__).with_name("codebooks")
BESIDE = "commvq"  # the folder beside a local checkpoint
# Bits come in steps of 8 a head, so a small model may miss its rate; 1-bit index codes take 1.03 with their norms.
RATE_TOLERANCE = 0.04


class CodebookAccessError(CodebookError, PermissionError):
    """The repository is gated, or the Hub refused the request."""


class HubUnreachableError(CodebookError, ConnectionError):
    """The files are not in the local cache, and the Hub cannot be reached or offline mode forbids it."""


OnMissing = Callable[[CommVQConfig, ModelGeometry], Codebook]


def resolve(
    config: CommVQConfig,
    geometry: ModelGeometry,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
    on_missing: OnMissing | None = None,
) -> Codebook:
    """The codebook a model will use, verified, and known to fit the model.

    Looked for in this order: ``config.codebook``; ``commvq/`` or ``commvq/<bits>bit/`` beside a local checkpoint; the
    registry shipped in the package; ``on_missing``, when ``config.learn``.

    geometry: the model's; its id is a Hub id or the local folder the model was loaded from.
    on_missing: learns a codebook. Called only when ``config.learn`` is set and nothing was found.

    Raises:
        ConfigError: ``revision`` without a Hub repository to apply it to.
        CodebookNotFoundError: nothing was found; the message holds the command that learns one.
        CodebookMismatchError: what was found is for another model, or holds another rate than asked for.
        CodebookError: the other errors of ``pull`` and ``Codebook.load``.
    """
    if config.revision is not None and config.codebook is None:
        raise ConfigError(
            f"revision={config.revision!r} without codebook: it is a revision of the codebook's repository. "
            "Fix: name the repository with codebook=, or leave revision out."
        )
    model_id = config.base_model or geometry.id
    if config.codebook is not None:
        book = _explicit(config.codebook, config.revision, token, local_files_only)
    else:
        book, others = _beside(geometry.id, config.bits)
        if book is None:
            book = _registered(model_id, config.bits, token, local_files_only)
        if book is None and config.learn and on_missing is not None:
            book = on_missing(config, geometry)
        if book is None:
            raise CodebookNotFoundError(_not_found(config, geometry, others))
    book.check(geometry)
    if book.geometry.id != model_id and is_hub_id(model_id) and is_hub_id(book.geometry.id):
        logger.warning(
            "The codebooks of %s are used with %s: the shapes fit, but their quality was measured on the former.",
            book.geometry.id,
            model_id,
        )
    return book


def pull(
    repo_id: str,
    revision: str | None = None,
    *,
    expected_sha256: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Codebook:
    """Fetch a codebook from the Hub into the Hub cache, verify it, and read it.

    Both files come from one commit. A pinned commit, or a tag made by ``push``, that is already in the cache costs no
    request; such a tag is a hash of the artefact, which is checked.

    expected_sha256: of the tensor file, from a source more trusted than the repository.

    Raises:
        CodebookNotFoundError: no such repository, revision or file, or a private one the token cannot see.
        CodebookAccessError: the repository is gated, or the Hub refused.
        HubUnreachableError: not in the cache, and the Hub cannot be reached.
        CodebookIntegrityError, CodebookFormatError: the bytes are not a codebook or not those published. They are
            removed from the cache, so that a later pull fetches them anew.
    """
    folder = download(repo_id, revision, token=token, local_files_only=local_files_only)
    try:
        if (revision or "").startswith(TAG_PREFIX) and artefact_tag((folder / CONFIG_FILE).read_bytes()) != revision:
            raise CodebookIntegrityError(f"{CONFIG_FILE} is not the one that revision {revision} names.")
        return Codebook.load(folder, expected_sha256)
    except (CodebookIntegrityError, CodebookFormatError) as error:
        _forget(folder)
        raise type(error)(
            f"{repo_id} at commit {folder.name}: {error} The downloaded files were removed from the cache, so another "
            "pull starts anew; if it fails again, the repository itself is at fault."
        ) from error


def download(
    repo_id: str, revision: str | None = None, *, token: str | bool | None = None, local_files_only: bool = False
) -> Path:
    """Fetch a codebook's files, unverified, from one commit. Returns the cache folder, which is named by the commit.

    Raises: as ``pull``, but for integrity and format.
    """
    with hub_errors(repo_id, revision):
        validate_repo_id(repo_id)
        # One request turns a branch or tag into a commit; both files are then asked for by that commit.
        commit = _commit(repo_id, revision, token, local_files_only)
        paths = [
            hf_hub_download(
                repo_id,
                name,
                revision=commit,
                token=token,
                local_files_only=local_files_only,
                library_name=LIBRARY,
            )
            for name in (CONFIG_FILE, TENSOR_FILE)
        ]
    return Path(paths[0]).parent


def _commit(repo_id: str, revision: str | None, token: Any, local_files_only: bool) -> str:
    api = HfApi(library_name=LIBRARY)
    if (revision or "").startswith(TAG_PREFIX):  # names its contents: what the cache knows of it cannot be outdated
        with suppress(RevisionResolutionError):
            return api.resolve_revision(repo_id, revision=revision, local_files_only=True).resolved
    return api.resolve_revision(repo_id, revision=revision, token=token, local_files_only=local_files_only).resolved


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``org/name`` of a Hub repository; asks nobody whether it exists."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def read_registry() -> dict[str, dict[str, dict[str, str]]]:
    """Base model id -> rate -> where its codebook is: ``packaged`` or ``repo`` and ``commit``, and ``sha256``."""
    return json.loads(REGISTRY_FILE.read_text())


def learn_command(model: str, bits: float) -> str:
    """The command that learns a codebook for a model."""
    return f"transformers-commvq learn {model} --text FILE --bits {bits:g}"


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the client's many errors into this package's few, each with its remedy."""
    at = f"{repo_id}@{revision}" if revision else repo_id
    try:
        yield
    except HFValidationError as error:
        raise CodebookNotFoundError(
            f"codebook={repo_id!r} is neither a folder nor a Hub repository id. Fix: give a folder that exists, "
            "or org/name."
        ) from error
    except GatedRepoError as error:  # before RepositoryNotFoundError, its base class
        raise CodebookAccessError(
            f"{at} is gated. Fix: accept its terms at {constants.ENDPOINT}/{repo_id}, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise CodebookNotFoundError(
            f"{repo_id} does not exist on {constants.ENDPOINT}, or it is private and your token cannot see it. "
            "Fix: check the spelling, or run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise CodebookNotFoundError(
            f"{repo_id} has no revision {revision!r}. Fix: a branch, tag or commit of {constants.ENDPOINT}/{repo_id}"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise CodebookNotFoundError(
            f"{at} holds no CommVQ codebook: it lacks {CONFIG_FILE} or {TENSOR_FILE}. Fix: name a repository made by "
            "transformers-commvq push."
        ) from error
    except (EntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError, HTTPError) as error:
        # The client hides a refusal to send a file behind "not in the cache".
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(answer, HfHubHTTPError) and answer.response.status_code < 500:
            raise CodebookAccessError(f"the Hub refused {at}: {answer}") from error
        if (cause := error.__cause__) and isinstance(cause, RevisionNotFoundError):
            raise CodebookNotFoundError(f"{repo_id} has no revision {revision!r}.") from error
        why = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} failed"
        raise HubUnreachableError(
            f"{at} is not in the local cache ({constants.HF_HUB_CACHE}), and {why}: {error} "
            f"Fix: go online once and run: hf download {at.replace('@', ' --revision ')}"
        ) from error
    except OSError as error:  # the client's size check
        if isinstance(error, CodebookError) or "Consistency check" not in str(error):
            raise
        raise CodebookIntegrityError(f"{at}: the download was cut short: {error}") from error


def _explicit(codebook: str, revision: str | None, token: Any, local_files_only: bool) -> Codebook:
    folder = Path(codebook).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision={revision!r}: codebook={codebook!r} is a folder, and a folder has no revisions. "
                "Fix: leave revision out."
            )
        return Codebook.load(folder)
    return pull(codebook, revision, token=token, local_files_only=local_files_only)


def _beside(model: str, bits: float) -> tuple[Codebook | None, list[str]]:
    """The codebook beside a local checkpoint, and descriptions of those at other rates.

    One that is there but broken is an error, not a reason to look elsewhere.
    """
    others = []
    for folder in (Path(model) / BESIDE / f"{bits:g}bit", Path(model) / BESIDE):
        if (folder / CONFIG_FILE).is_file():
            book = Codebook.load(folder)
            if rates_agree(book.bits, bits):
                return book, []
            others.append(f"{folder} holds {book.bits:.3g} bits")
    return None, others


def _registered(model_id: str, bits: float, token: Any, local_files_only: bool) -> Codebook | None:
    entry = read_registry().get(model_id, {}).get(f"{bits:g}")
    if entry is None:
        return None
    if "packaged" in entry:
        book = Codebook.load(PACKAGED / entry["packaged"], entry["sha256"])
    else:
        book = pull(
            entry["repo"],
            entry["commit"],
            expected_sha256=entry["sha256"],
            token=token,
            local_files_only=local_files_only,
        )
    if not rates_agree(book.bits, bits):
        raise CodebookMismatchError(f"the registry's {bits:g}-bit codebook of {model_id} holds {book.bits:.3g} bits.")
    return book


def rates_agree(actual: float, asked: float) -> bool:
    """Whether a codebook's bits per element are the rate a user asked for."""
    return abs(actual - asked) <= RATE_TOLERANCE * asked


def _not_found(config: CommVQConfig, geometry: ModelGeometry, others: list[str]) -> str:
    model_id, bits = config.base_model or geometry.id, config.bits
    local = Path(geometry.id).is_dir()
    known = {name: "/".join(rates) for name, rates in read_registry().items()}
    where = [f"the package knows {', '.join(f'{n} at {r} bits' for n, r in known.items()) or 'none'}"]
    if local:
        where.insert(0, "; ".join(others) or f"{geometry.id} has no {BESIDE}/ folder with one")
    target = geometry.id if local or is_hub_id(geometry.id) else config.base_model or "MODEL"
    text = f"no {bits:g}-bit codebook for {model_id}: {'; '.join(where)}. Fix: {learn_command(target, bits)}"
    if local and config.base_model is None:
        text += (
            f" (the model was loaded from the folder {geometry.id}, so its Hub id is unknown: if it is a copy of a "
            'Hub model, say so: kv_cache={"base_model": "org/name"})'
        )
    return text + "; then pass its output folder as codebook=."


def _forget(folder: Path) -> None:
    """Remove a snapshot's files and the blobs behind them from the Hub cache."""
    for name in (TENSOR_FILE, CONFIG_FILE):
        link = folder / name
        blob = link.resolve()
        link.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
