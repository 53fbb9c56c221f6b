"""Converts the files that the authors of CommVQ published into our artefact, once; see ``index_book`` for the codes.

Key codebooks are ``LLL_G.pt`` files (layer, key/value head): pickles, which this module alone reads, and only with
torch's restricted loader. Value codebooks are tensors named ``value_vq_model`` in a model checkpoint.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open

from .cards import README, License, render
from .codebook import CONFIG_FILE, LIBRARY, TENSOR_FILE, Codebook, LayerBook, ModelGeometry
from .config import CodebookFormatError, CodebookNotFoundError, ConfigError
from .hub import hub_errors, is_hub_id
from .index_book import ENTRIES, IndexBook, JointBinaryBook
from .publish import inherited_license

CENTRE_TOLERANCE = 1e-2  # relative; the files hold centres and what they are made of, in at least bfloat16
_VALUE_NAMES = {
    "embedding": "embedding",
    "learnable_scale": "scale",
    "norm1.weight": "norm_weight",
    "norm1.bias": "norm_bias",
    "enc1.weight": "enc_weight",
    "enc1.bias": "enc_bias",
    "out.weight": "out_weight",
    "out.bias": "out_bias",
}


def import_paper(
    keys: str | os.PathLike,
    values: str | os.PathLike,
    out: str | os.PathLike,
    base_model: str | None = None,
    license: License | None = None,
    token: str | bool | None = None,
) -> Codebook:
    """Convert published codebooks and write the artefact and its card.

    keys: folder or Hub id of the ``.pt`` files. values: folder or Hub id of the checkpoint, config.json included.
    base_model: Hub id of the model they are for; by default that of ``values``.
    license: the base model's, for the card; None asks the base model's card on the Hub. token: for the Hub.

    Raises:
        ConfigError: no Hub id of a base model.
        CardError: its license is not known.
        CodebookNotFoundError: a file is missing.
        CodebookFormatError: the files are not what the authors publish, or keys and values do not agree.
        CodebookError: the Hub's, as ``hub.pull``.
    """
    base_model = base_model or str(values)
    if not is_hub_id(base_model) or Path(base_model).is_dir():
        raise ConfigError(f"base model {base_model!r}: expected a Hub id. Fix: --base-model org/name.")
    license = license or inherited_license(HfApi(library_name=LIBRARY, token=token), base_model)
    key_folder, value_folder = _folder(keys, ["*.pt"], token), _folder(values, ["config.json", "*.safetensors"], token)
    geometry = _geometry(value_folder, base_model)
    layers = {}
    heads = geometry.num_key_value_heads
    tensors = _value_tensors(value_folder)
    for i in geometry.layers:
        of_heads = [read_key_file(key_folder / f"{i:03d}_{g}.pt") for g in range(heads)]
        if len({z.shape for z in of_heads}) > 1:
            raise CodebookFormatError(f"{key_folder}: layer {i} has heads of different stages or sizes.")
        named = {ours: tensors.get((i, theirs)) for theirs, ours in _VALUE_NAMES.items()}
        if missing := [name for name, place in named.items() if place is None]:
            raise CodebookNotFoundError(f"{value_folder}: layer {i} has no {missing} under value_vq_model.")
        values_book = JointBinaryBook(**{name: _read(place) for name, place in named.items()}, heads=heads)
        books = LayerBook(IndexBook(torch.stack(of_heads, 1)), values_book)
        if {(b.heads, b.head_dim) for b in (books.keys, books.values)} != {(heads, geometry.head_dim)}:
            raise CodebookFormatError(f"layer {i}: codebooks are not for {heads} heads of {geometry.head_dim}.")
        layers[i] = books
    named = {"source": "published by the authors of arXiv 2506.18879", "keys": keys, "values": values}
    # Of a folder its name alone: where it lay on this machine is nobody's business.
    source = {k: Path(v).name if Path(v).is_dir() else str(v) for k, v in named.items()}
    book = Codebook(geometry, layers, calibration=source)
    folder = book.save(out)
    config_json, size = (folder / CONFIG_FILE).read_bytes(), (folder / TENSOR_FILE).stat().st_size
    (folder / README).write_text(render(book, config_json, size, folder.resolve().name, license))
    return book


def read_key_file(path: Path) -> torch.Tensor:
    """One head's key codebooks, (stages, 64, head_dim) float32, half-split.

    Raises:
        CodebookNotFoundError: no such file.
        CodebookFormatError: it holds something else, or centres that are not ``z_a + i z_b``.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        steps = [(step["theta"].float(), step["clustering_centers"].float()) for step in content["steps"]]
    except FileNotFoundError as error:
        raise CodebookNotFoundError(f"{path}: no such file; expected one LLL_G.pt a layer and head.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise CodebookFormatError(f"{path} is no key codebook of the authors: {error!r}.") from error
    if not steps:
        raise CodebookFormatError(f"{path} has no stages.")
    stages = []
    for number, (theta, centres) in enumerate(steps):
        pairs = steps[0][0].shape[-1] if steps[0][0].dim() else 0
        if theta.shape != (2 * ENTRIES, pairs) or centres.shape != (ENTRIES**2, 2 * pairs):
            raise CodebookFormatError(
                f"{path}, stage {number}: theta {tuple(theta.shape)}, centres {tuple(centres.shape)}: expected "
                f"({2 * ENTRIES}, pairs) and ({ENTRIES**2}, 2 * pairs), the same in every stage."
            )
        z = theta.unflatten(0, (ENTRIES, 2)).flatten(1)  # rows 2a and 2a+1: real and imaginary parts of z_a
        made = z[:, None] + torch.cat([-theta[1::2], theta[0::2]], 1)[None]
        told = centres.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(1)  # theirs are interleaved
        if (made.flatten(0, 1) - told).norm() > CENTRE_TOLERANCE * told.norm():
            raise CodebookFormatError(f"{path}, stage {number}: its centres are not z_a + i z_b of its theta.")
        stages.append(z)
    return torch.stack(stages)


def _folder(source: str | os.PathLike, patterns: list[str], token: str | bool | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    with hub_errors(str(source)):
        return Path(snapshot_download(str(source), allow_patterns=patterns, library_name=LIBRARY, token=token))


def _geometry(folder: Path, base_model: str) -> ModelGeometry:
    from transformers import AutoConfig, AutoModelForCausalLM

    from .geometry import read_model

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CodebookNotFoundError(f"{folder}: its config.json cannot be read: {error}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return read_model(model, base_model).geometry


def _value_tensors(folder: Path) -> dict[tuple[int, str], tuple[Path, str]]:
    """(layer, the authors' name) -> file and tensor.

    Raises CodebookFormatError for a file that is no safetensors file.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
        except SafetensorError as error:
            raise CodebookFormatError(f"{path} is no safetensors file: {error}.") from error
        for key in keys:
            before, middle, name = key.partition(".self_attn.value_vq_model.")
            if middle:
                found[int(before.rpartition(".")[2]), name] = path, key
    return found


def _read(place: tuple[Path, str]) -> torch.Tensor:
    path, key = place
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)
