"""Calibration tensors of a model's layers: in memory, or in a folder, so that only one layer's are held at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


@dataclass
class LayerSample:
    """What was recorded of one layer.

    keys, values: (kv heads, tokens, head_dim) float32; keys before RoPE; sink tokens left out.
    key_metric, value_metric: (kv heads, head_dim, head_dim) float32, the second-order cost of an error, in nats:
        E[g g^T] with g the gradient of the loss, or its estimate from queries where there are no gradients.
    key_weights, value_weights: (kv heads, tokens) float32, how much each token's errors weigh against the other
        tokens', mean 1; see ``traced_attention.weighing_attention``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_metric: torch.Tensor
    value_metric: torch.Tensor
    key_weights: torch.Tensor
    value_weights: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {k: v.contiguous() for k, v in vars(self).items()}


class Spool:
    """Pieces of tensors, joined along their tokens when they are taken; appended to files if there is a folder.

    folder: made empty at the start; a run that was stopped while it recorded records again.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._pieces: dict[tuple[int, str], list[torch.Tensor]] = {}
        self._shapes: dict[tuple[int, str], list[torch.Size]] = {}
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def holds(self, layer: int) -> bool:
        return any(key[0] == layer for key in (*self._pieces, *self._shapes))

    def add(self, layer: int, name: str, piece: torch.Tensor) -> None:
        """piece: (heads, tokens, ...) float32 on the CPU."""
        if self.folder is None:
            self._pieces.setdefault((layer, name), []).append(piece)
            return
        self._shapes.setdefault((layer, name), []).append(piece.shape)
        with open(self._path(layer, name), "ab") as file:
            file.write(piece.contiguous().numpy().data)

    def take(self, layer: int, name: str) -> torch.Tensor:
        """All pieces of a tensor as one, (heads, all tokens, ...); they are then forgotten."""
        if self.folder is None:
            return torch.cat(self._pieces.pop((layer, name)), 1)
        path, shapes = self._path(layer, name), self._shapes.pop((layer, name))
        flat = torch.from_numpy(np.fromfile(path, np.float32)).split([shape.numel() for shape in shapes])
        path.unlink()
        return torch.cat([part.view(shape) for part, shape in zip(flat, shapes, strict=True)], 1)

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)

    def _path(self, layer: int, name: str) -> Path:
        return self.folder / f"{layer}-{name}"


class StoredSamples(Mapping):
    """Layer samples in a folder, one safetensors file a layer, read when asked for; so a run can be resumed.

    key: names the calibration; a folder with another key's files is not mistaken for it.
    """

    def __init__(self, folder: str | Path, layers: Sequence[int], key: str):
        self.folder, self.layers, self.key = Path(folder), tuple(layers), key
        self._last: tuple[int, LayerSample] | None = None

    @property
    def complete(self) -> bool:
        return all(self._path(i).exists() for i in self.layers)

    def put(self, layer: int, sample: LayerSample) -> None:
        """Write one layer's sample; its file appears complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._path(layer).with_suffix(".partial")
        save_file(sample.tensors(), partial)
        partial.replace(self._path(layer))

    def remove(self) -> None:
        for i in self.layers:
            self._path(i).unlink(missing_ok=True)

    def __getitem__(self, layer: int) -> LayerSample:
        if layer not in self.layers:
            raise KeyError(layer)
        if self._last is None or self._last[0] != layer:
            self._last = (layer, LayerSample(**load_file(self._path(layer))))
        return self._last[1]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def _path(self, layer: int) -> Path:
        return self.folder / f"sample-{layer}-{self.key}.safetensors"
