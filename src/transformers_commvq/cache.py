"""The compressed KV cache of a model: one layer of codes for each full-attention layer, and their shared positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    QuantizedCache,
    get_layer_types_and_kwargs,
)

from .codebook import Codebook, LayerBook
from .config import CommVQConfig
from .geometry import ModelReading, frequencies
from .layer import CommVQLayer, storage_bytes
from .ops import tables_nbytes
from .positions import PositionTrack

# Rotation frequencies of all others may change while a sequence grows, so tokens' rotations are kept, not recomputed.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


class CommVQCache(QuantizedCache):
    """A KV cache whose full-attention layers hold codes; other layers keep transformers' own cache layers.

    Made by an enabled model for each generate(); make one yourself to keep it between calls.

    reading: the model. codebook: its codebooks. config: sinks and window.
    """

    def __init__(self, reading: ModelReading, codebook: Codebook, config: CommVQConfig, model_config: Any):
        # QuantizedCache.__init__ knows a closed list of backends and no hybrid models; its base takes any layers.
        config_text = model_config.get_text_config(decoder=True)
        types, kwargs = get_layer_types_and_kwargs(config_text)
        kind = reading.geometry.rope["parameters"].get("rope_type", "default")
        inv_freq, scaling = frequencies(reading.rotary[0], "full_attention")
        self.positions = PositionTrack(
            inv_freq[: reading.rope.rope.pairs], scaling, fixed=kind in _FIXED_ROPE or not reading.rope.rope.pairs
        )
        self.codebook, self.rope = codebook, reading.rope
        layers = [
            CommVQLayer(codebook.layers[i], config, reading.rope_of(i), self.positions)
            if i in codebook.layers
            else DYNAMIC_LAYER_TYPE_MAPPING[name](**kw)
            for i, (name, kw) in enumerate(zip(types, kwargs, strict=True))
        ]
        Cache.__init__(self, layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this cache holds, spare capacity included; codebooks are the model's, not counted."""
        return self.memory_report()["total"]

    def memory_report(self) -> dict[str, Any]:
        """Where the bytes are.

        Returns bytes by part: ``codes``, ``spare`` (capacity not yet used), ``sinks``, ``window``, ``positions``,
        ``other_layers`` (not compressed), ``total``; apart from these ``codebooks`` (with the tables that attention has
        made of them; shared by all caches of the
        model), ``tokens``, ``fp16`` (an fp16 cache of the same tokens), ``ratio`` (total / fp16) and
        ``bits_per_element`` (total, in bits, over all key and value elements).
        """
        report = dict.fromkeys(("codes", "spare", "sinks", "window", "positions", "other_layers"), 0)
        elements = 0
        for layer in self.layers:
            if isinstance(layer, CommVQLayer):
                for name, count in layer.parts().items():
                    report[name] += count
                if layer.is_initialized:
                    book = layer.book
                    per_token = sum(side.heads * side.head_dim for side in (book.keys, book.values))
                    elements += layer.batch_size * layer.cumulative_length * per_token
            else:
                held = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
                report["other_layers"] += sum(storage_bytes(t) for t in held)
                if getattr(layer, "keys", None) is not None:
                    elements += layer.keys.numel() + layer.values.numel()
        report["positions"] = self.positions.nbytes
        total = sum(report.values())
        fp16 = 2 * elements
        return {
            **report,
            "total": total,
            "codebooks": self.codebook.nbytes + sum(map(tables_nbytes, self._books())),
            "tokens": self.get_seq_length(),
            "fp16": fp16,
            "ratio": total / fp16 if fp16 else 0.0,
            "bits_per_element": 8 * total / elements if elements else 0.0,
        }

    def _books(self) -> list[LayerBook]:
        return [layer.book for layer in self.layers if isinstance(layer, CommVQLayer)]

    def reset(self) -> None:
        super().reset()
        self.positions.reset()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self.positions.crop(max(len(self.positions) + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.positions.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.positions.repeat_rows(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.positions.select_rows(indices)
