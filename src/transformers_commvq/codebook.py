"""The codebook artefact: tensors, shapes, file format, hashes. Moves no files over a network and knows no model class.

A folder with two files is one artefact:

    config.json             format_version, bits, geometry and RoPE of the base model, sha256 and size of the tensors
    codebooks.safetensors   layers.I.keys.NAME and layers.I.values.NAME, the tensors of the layer's books

``codec.kind`` of config.json says which: "sign" (SignBook for both) or "index" (index_book).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from .config import CodebookFormatError, CodebookIntegrityError, CodebookMismatchError, CodebookNotFoundError
from .index_book import IndexBook, JointBinaryBook
from .packing import CodeLayout

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TENSOR_FILE = "codebooks.safetensors"
LIBRARY = "transformers_commvq"


@dataclass
class SignBook:
    """Sign codes of one layer's keys or values: ``x_hat = mean + s @ C``, s in {-1, +1}^n, per head.

    Tensors:
        vectors: C of all heads laid end to end, (sum of bits, head_dim) float16; the encoder chooses signs in the
            order of a head's rows.
        mean: (heads, head_dim) float32.
        metric: (heads, head_dim, head_dim) float16 or None: the positive definite form in which the encoder measures
            error (keys: shrunk Fisher information, codec.md step 2); None is the plain squared error.
    Other:
        layout: code bits of each head.
    """

    kind = "sign"
    layout: CodeLayout
    vectors: torch.Tensor
    mean: torch.Tensor
    metric: torch.Tensor | None = None

    def __post_init__(self):
        heads, dim = self.mean.shape
        want = (sum(self.layout.bits), dim)
        if self.layout.heads != heads or tuple(self.vectors.shape) != want:
            raise CodebookFormatError(
                f"vectors {tuple(self.vectors.shape)}, mean {tuple(self.mean.shape)}: expected {want} and "
                f"({self.layout.heads}, head_dim) for bits per head {self.layout.bits}."
            )
        if self.metric is not None and tuple(self.metric.shape) != (heads, dim, dim):
            raise CodebookFormatError(f"metric {tuple(self.metric.shape)}: expected {(heads, dim, dim)}.")

    @property
    def heads(self) -> int:
        return self.mean.shape[0]

    @property
    def head_dim(self) -> int:
        return self.mean.shape[1]

    @property
    def device(self) -> torch.device:
        return self.vectors.device

    @property
    def bits_per_head(self) -> tuple[int, ...]:
        return self.layout.bits

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's codes, all heads."""
        return self.layout.total_bytes

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.vectors, self.mean, self.metric) if t is not None)

    def padded(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """C as (heads, max_bits, head_dim); rows past a head's own bits are zero."""
        if self.layout.uniform:
            return self.vectors.view(self.heads, -1, self.head_dim).to(dtype)
        rows = self.layout.rows.to(self.vectors.device)
        c = self.vectors[rows.clamp_min(0)].to(dtype)
        return c.masked_fill_((rows < 0)[..., None], 0)

    def to(self, device: torch.device | str) -> SignBook:
        metric = None if self.metric is None else self.metric.to(device)
        return SignBook(self.layout, self.vectors.to(device), self.mean.to(device), metric)

    def select_heads(self, start: int, stop: int) -> SignBook:
        """The codes of heads start..stop alone, as a process that holds a part of the heads needs them."""
        bits = self.layout.bits
        rows = slice(sum(bits[:start]), sum(bits[:stop]))
        metric = None if self.metric is None else self.metric[start:stop]
        return SignBook(CodeLayout(bits[start:stop]), self.vectors[rows], self.mean[start:stop], metric)

    def tensors(self) -> dict[str, torch.Tensor]:
        out = {"vectors": self.vectors, "mean": self.mean, "metric": self.metric}
        return {k: v.contiguous() for k, v in out.items() if v is not None}


@dataclass
class LayerBook:
    """The codebooks of one attention layer. Never changed once made, so copies of a cache share it."""

    keys: SignBook | IndexBook
    values: SignBook | JointBinaryBook

    def __deepcopy__(self, memo: dict) -> LayerBook:
        return self

    @property
    def token_bytes(self) -> int:
        return self.keys.token_bytes + self.values.token_bytes

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def to(self, device: torch.device | str) -> LayerBook:
        return LayerBook(self.keys.to(device), self.values.to(device))

    def select_heads(self, start: int, stop: int) -> LayerBook:
        return LayerBook(self.keys.select_heads(start, stop), self.values.select_heads(start, stop))


@dataclass(frozen=True)
class ModelGeometry:
    """What a codebook assumes of its base model; checked against the model before use.

    layers: indices of the layers whose cache is compressed.
    rope: layout and rotary_dim of the pairs, and the model's own RoPE parameters under ``"parameters"``.
    """

    id: str
    revision: str | None
    model_type: str
    num_hidden_layers: int
    layers: tuple[int, ...]
    num_key_value_heads: int
    head_dim: int
    rope: dict[str, Any]

    def differences(self, model: ModelGeometry) -> list[str]:
        """What keeps this codebook from being used with ``model``; the id and revision do not count."""
        names = ("model_type", "num_hidden_layers", "layers", "num_key_value_heads", "head_dim", "rope")
        mine, other = _plain(asdict(self)), _plain(asdict(model))
        return [f"{n}: codebook {mine[n]}, model {other[n]}" for n in names if mine[n] != other[n]]


@dataclass
class Codebook:
    """All codebooks of a model at one rate.

    layers: layer index -> its books.
    bits: mean bits per element over the compressed layers, keys and values together.
    calibration, evaluation: what was learned from and what was measured, as plain json.
    """

    geometry: ModelGeometry
    layers: dict[int, LayerBook]
    calibration: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None  # of the tensor file this was read from

    def __deepcopy__(self, memo: dict) -> Codebook:
        return self

    @property
    def kind(self) -> str:
        """The kind of code, by that of the keys: "sign" or "index"."""
        return next(iter(self.layers.values())).keys.kind

    @property
    def bits(self) -> float:
        return 8 * self.token_bytes / self.elements_per_token

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's codes over all compressed layers."""
        return sum(book.token_bytes for book in self.layers.values())

    @property
    def elements_per_token(self) -> int:
        """Key and value elements of one token over all compressed layers."""
        return sum(s.heads * s.head_dim for b in self.layers.values() for s in (b.keys, b.values))

    @property
    def nbytes(self) -> int:
        return sum(book.nbytes for book in self.layers.values())

    def to(self, device: torch.device | str) -> Codebook:
        layers = {i: b.to(device) for i, b in self.layers.items()}
        return Codebook(self.geometry, layers, self.calibration, self.evaluation, self.sha256)

    def check(self, model: ModelGeometry) -> None:
        """Raises CodebookMismatchError when this codebook was not learned for ``model``."""
        if wrong := self.geometry.differences(model):
            raise CodebookMismatchError(
                f"these codebooks were learned for {self.geometry.id} and do not fit {model.id}: "
                + "; ".join(wrong)
                + f". Fix: name codebooks of this model, or learn them: transformers-commvq learn {model.id}"
            )

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the artefact; each file appears whole or not at all, config.json last. Returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        flat = {
            f"layers.{i}.{side}.{name}": tensor.cpu()
            for i, book in self.layers.items()
            for side in ("keys", "values")
            for name, tensor in getattr(book, side).tensors().items()
        }
        # One entry only: safetensors writes several in random order, and equal tensors must have equal hashes.
        data = save_tensors(flat, metadata={"format": "pt"})
        self.sha256 = hashlib.sha256(data).hexdigest()
        config = {
            "format_version": FORMAT_VERSION,
            "library_name": LIBRARY,
            "bits": self.bits,
            "base_model": _plain(asdict(self.geometry)),
            "codec": {
                "kind": self.kind,
                "bits_per_head": {
                    str(i): {"keys": list(b.keys.bits_per_head), "values": list(b.values.bits_per_head)}
                    for i, b in self.layers.items()
                },
            },
            "calibration": self.calibration,
            "evaluation": self.evaluation,
            "files": {TENSOR_FILE: {"sha256": self.sha256, "size": len(data)}},
        }
        _write_whole(folder / TENSOR_FILE, data)
        _write_whole(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike, expected_sha256: str | None = None) -> Codebook:
        """Read and verify an artefact.

        expected_sha256: hash of the tensor file from a source more trusted than the folder itself.

        Raises:
            CodebookNotFoundError: no folder, or a file is missing.
            CodebookFormatError: not an artefact, or a version this package does not read.
            CodebookIntegrityError: the tensor file's bytes are not those config.json (or expected_sha256) names.
        """
        folder = Path(folder)
        config = read_config(folder)
        data = _read(folder / TENSOR_FILE)
        named = config["files"][TENSOR_FILE]
        got = hashlib.sha256(data).hexdigest()
        for want, source in ((named["sha256"], CONFIG_FILE), (expected_sha256, "the pinned hash")):
            if want is not None and want != got:
                raise CodebookIntegrityError(
                    f"{folder / TENSOR_FILE}: {len(data)} bytes with sha256 {got[:16]}..., but {source} says "
                    f"{want[:16]}... ({named['size']} bytes). Fix: delete the folder and fetch it again."
                )
        try:
            flat = load_tensors(data)
        except SafetensorError as error:
            raise CodebookFormatError(f"{folder / TENSOR_FILE} is no safetensors file: {error}.") from error
        try:
            geometry = ModelGeometry(**{**config["base_model"], "layers": tuple(config["base_model"]["layers"])})
            make, codec = _MAKERS[config["codec"]["kind"]], config["codec"]
            layers = {int(i): make(flat, int(i), bits) for i, bits in codec["bits_per_head"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CodebookFormatError(f"{folder}: config.json and the tensors do not agree: {error!r}.") from error
        book = cls(geometry, layers, config.get("calibration", {}), config.get("evaluation", {}), got)
        if set(layers) != set(geometry.layers) or abs(book.bits - config["bits"]) > 1e-9:
            raise CodebookFormatError(f"{folder}: config.json states other layers or bits than its tensors hold.")
        return book


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked config.json of an artefact; see Codebook.load for the errors."""
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise CodebookNotFoundError(f"{folder}: no such folder. Fix: name a folder made by transformers-commvq learn.")
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise CodebookFormatError(f"{path} is no json: {error}.") from error
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY:
        raise CodebookFormatError(f"{path} is no CommVQ codebook (library_name is not {LIBRARY!r}).")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CodebookFormatError(
            f"{path} has format_version {version!r}; this package reads {FORMAT_VERSION}. "
            "Fix: pip install -U transformers-commvq"
        )
    missing = {"bits", "base_model", "codec", "files"} - set(config)
    if missing or TENSOR_FILE not in config["files"]:
        raise CodebookFormatError(f"{path} lacks {sorted(missing) or TENSOR_FILE}.")
    if config["codec"].get("kind") not in _MAKERS:
        raise CodebookFormatError(
            f"{path} has code kind {config['codec'].get('kind')!r}; known: {sorted(_MAKERS)}. "
            "Fix: pip install -U transformers-commvq"
        )
    return config


def _sign_layer(flat: dict[str, torch.Tensor], index: int, bits: dict[str, list[int]]) -> LayerBook:
    sides = {}
    for side, with_metric in (("keys", True), ("values", False)):
        prefix = f"layers.{index}.{side}."
        sides[side] = SignBook(
            CodeLayout(tuple(bits[side])),
            flat[prefix + "vectors"],
            flat[prefix + "mean"],
            flat.get(prefix + "metric") if with_metric else None,
        )
    return LayerBook(**sides)


def _index_layer(flat: dict[str, torch.Tensor], index: int, bits: dict[str, list[float]]) -> LayerBook:
    keys = IndexBook(flat[f"layers.{index}.keys.z"])
    names = [f.name for f in fields(JointBinaryBook) if f.name != "heads"]
    values = JointBinaryBook(*(flat[f"layers.{index}.values.{name}"] for name in names), heads=keys.heads)
    if tuple(bits["keys"]) != keys.bits_per_head or tuple(bits["values"]) != values.bits_per_head:
        raise CodebookFormatError(f"layer {index}: config.json states other bits than its tensors hold.")
    return LayerBook(keys, values)


_MAKERS = {SignBook.kind: _sign_layer, IndexBook.kind: _index_layer}


def _plain(value: Any) -> Any:
    """What json would give back: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CodebookNotFoundError(f"{path}: no such file; a codebook is {CONFIG_FILE} and {TENSOR_FILE}.") from error


def _write_whole(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
