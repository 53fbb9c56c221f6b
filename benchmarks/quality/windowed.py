"""What the reference caches share: exact sinks and an exact window, as ours has them, and codes between the two.

They are given the same sinks and window as ours, so that what is compared is the coding alone. KIVI and TurboQuant
themselves keep no sinks.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import BaseQuantizedLayer

SINKS, WINDOW, BLOCK = 4, 128, 64  # tokens; BLOCK of them are coded at a time, never again


class WindowedLayer(BaseQuantizedLayer):
    """One layer.

    sink_keys, sink_values: (batch, heads, SINKS, head_dim), model dtype. keys, values: the window, WINDOW to
    WINDOW + BLOCK - 1 tokens. blocks: codes of the tokens between, in order; a subclass says what they are.
    """

    def __init__(self):
        super().__init__()
        self.blocks: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    @abstractmethod
    def _quantize(self, tensor: torch.Tensor, side: str) -> dict[str, torch.Tensor]:
        """tensor: (batch, heads, a multiple of BLOCK tokens, head_dim). side: keys or values."""

    @abstractmethod
    def _dequantize(self, q_tensor: dict[str, torch.Tensor], side: str) -> torch.Tensor: ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.sink_keys, self.sink_values = self.keys, self.values
        self.cumulative_length += key_states.shape[2]
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        out = (
            torch.cat([self.sink_keys, *(self._decoded(b[0], "keys") for b in self.blocks), self.keys], 2),
            torch.cat([self.sink_values, *(self._decoded(b[1], "values") for b in self.blocks), self.values], 2),
        )
        self._move_on()
        return out

    def _decoded(self, codes: dict[str, torch.Tensor], side: str) -> torch.Tensor:
        return self._dequantize(codes, side).to(self.keys.dtype)

    def _move_on(self) -> None:
        """Oldest tokens of the window: to the sinks until these are full, then, in whole blocks, to codes."""
        missing = min(SINKS - self.sink_keys.shape[2], self.keys.shape[2])
        old = max(self.keys.shape[2] - missing - WINDOW, 0) // BLOCK * BLOCK
        if not missing and not old:
            return
        parts = [t.split([missing, old, t.shape[2] - missing - old], 2) for t in (self.keys, self.values)]
        (first_keys, old_keys, keys), (first_values, old_values, values) = parts
        self.sink_keys = torch.cat([self.sink_keys, first_keys], 2)
        self.sink_values = torch.cat([self.sink_values, first_values], 2)
        if old:
            self.blocks.append((self._quantize(old_keys, "keys"), self._quantize(old_values, "values")))
        self.keys, self.values = keys.clone(), values.clone()  # a view would keep the whole prompt alive


def reference_cache(model: PreTrainedModel, layer: type[WindowedLayer], bits: int) -> Cache:
    """A cache of one layer class; for models with full attention in every layer."""
    return Cache(layers=[layer(bits) for _ in range(model.config.get_text_config(decoder=True).num_hidden_layers)])


def pack_integers(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) integers below 2^bits -> uint8 (..., n * bits / 8)."""
    bit = (numbers[..., None].to(torch.uint8) >> torch.arange(bits, device=numbers.device)) & 1
    weights = 1 << torch.arange(8, device=numbers.device)
    return (bit.flatten(-2).unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def unpack_integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``pack_integers``, int64."""
    bit = (packed[..., None].long() >> torch.arange(8, device=packed.device)) & 1
    weights = 1 << torch.arange(bits, device=packed.device)
    return (bit.flatten(-2).unflatten(-1, (-1, bits)) * weights).sum(-1)
