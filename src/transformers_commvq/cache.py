"""The compressed KV cache: sinks, window, and codes that are appended and never made anew.

A layer's tokens 0..length lie in two places. The oldest are codes; the newest (at least ``residual_length``) wait in
the window, as the model made them. Each row's first real tokens (sinks) are kept in full beside their codes, because
every query looks at them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    BaseQuantizedLayer,
    Cache,
    QuantizedCache,
    get_layer_types_and_kwargs,
)

from .codebook import Codebook, LayerBook
from .config import CacheUseError, CommVQConfig
from .geometry import ModelReading, RopeReading, frequencies
from .ops import CodedPast, decode, decoded_keys_values, encode
from .positions import PositionTrack

FLUSH = 64  # tokens encoded at a time while decoding: fewer, larger encoder calls
SPARE = 32  # buffers grow by 1/SPARE: decoding copies little and never holds much unused

# Rotation frequencies of these change while a sequence grows, so tokens' rotations are kept, not recomputed.
_CHANGING_ROPE = ("dynamic", "longrope")


@dataclass
class Call:
    """One attention module's forward over one layer of a CommVQ cache, from pre-hook to attention function.

    cos, sin: (rows, new, pairs), as the module rotates with. positions: (rows, new) or None.
    mask: the attention mask the module was given, in whatever form its attention function takes.
    fused: True if the registered attention function will read the codes; else ``update`` must return everything.
    past: tokens before this call; -1 until the layer was updated.
    """

    module: nn.Module
    layer: CommVQLayer
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None
    mask: Any
    fused: bool
    past: int = -1


class _Current(threading.local):
    call: Call | None = None


current = _Current()  # per thread: two threads may run one model with their own caches


class CommVQLayer(BaseQuantizedLayer):
    """The cache of one full-attention layer.

    Tensors, once initialized:
        key_codes, value_codes: uint8 (batch, capacity, bytes); the first ``coded`` tokens are in use.
        sink_keys, sink_values: (batch, heads, sink_tokens, head_dim), model dtype.
        sink_start: int64 (batch,), index of each row's first real token, -1 while unknown.
        keys, values: the window, (batch, heads, window, head_dim), model dtype, keys after RoPE.
    Other:
        book: LayerBook, shared by every cache of the model and never copied.
        positions: PositionTrack, shared by the layers of one cache.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, book: LayerBook, config: CommVQConfig, rope: RopeReading, positions: PositionTrack):
        super().__init__()
        self.book, self.rope, self.positions = book, rope, positions
        self.sink_tokens, self.residual_length = config.sink_tokens, config.residual_length
        self.coded = 0
        self._pending = False  # tokens were handed to an attention function that has not come back

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, heads, _, dim = key_states.shape
        if (heads, dim) != (self.book.keys.heads, self.book.keys.head_dim):
            raise CacheUseError(
                f"keys have {heads} heads of {dim} elements, the codebook {self.book.keys.heads} of "
                f"{self.book.keys.head_dim}. Fix: use codebooks of this model."
            )
        if self.book.keys.mean.device != self.device:
            self.book = self.book.to(self.device)
        self.key_codes = torch.empty(self.batch_size, 0, self.book.keys.token_bytes, dtype=torch.uint8).to(self.device)
        self.value_codes = torch.empty(self.batch_size, 0, self.book.values.token_bytes, dtype=torch.uint8)
        self.value_codes = self.value_codes.to(self.device)
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.sink_keys = key_states.new_zeros(self.batch_size, heads, self.sink_tokens, dim)
        self.sink_values = value_states.new_zeros(self.batch_size, heads, self.sink_tokens, value_states.shape[-1])
        self.sink_start = torch.full((self.batch_size,), -1, device=self.device)
        self.is_initialized = True

    def _quantize(self, tensor: torch.Tensor, book: Any) -> torch.Tensor:
        return encode(tensor, book)

    def _dequantize(self, q_tensor: torch.Tensor, book: Any) -> torch.Tensor:
        return decode(q_tensor, book)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take new tokens, (batch, heads, new, head_dim), keys after RoPE.

        Returns the new tokens alone when the "commvq" attention function will read the rest, or when there is no
        past; else keys and values of all tokens, decoded.

        Raises:
            CacheUseError: the model is not enabled for CommVQ, or an earlier update never reached attention.
        """
        call = current.call
        if call is None or call.layer is not self:
            raise CacheUseError(
                "a CommVQCache was given to a model that is not enabled for it. "
                "Fix: call transformers_commvq.enable(model, ...), or load it with from_pretrained(..., kv_cache=...)."
            )
        if self._pending:
            raise CacheUseError(
                "this cache's last forward was interrupted inside an attention layer; it no longer knows its tokens. "
                "Fix: start from a new cache, or reset() this one."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        call.past = self.cumulative_length
        self.positions.extend(call.past, call.positions, call.cos, call.sin)
        if call.fused:
            self._pending = True
            return key_states, value_states
        everything = key_states, value_states
        if call.past:
            everything = tuple(torch.cat([o, n], 2) for o, n in zip(self.exact_keys_values(), everything, strict=True))
        self.append(key_states, value_states, call.mask)
        return everything

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, mask: Any) -> None:
        """Store tokens after attention has used them, and encode what leaves the window.

        mask: the attention mask over all tokens, these included; it tells each row's first real token.
        """
        self.cumulative_length += key_states.shape[2]
        self._pending = False
        self._find_sinks(mask)
        waiting = self.cumulative_length - self.coded
        flush = max(waiting - self.residual_length, 0) // FLUSH * FLUSH
        keys, values = (torch.cat(p, 2) for p in ((self.keys, key_states), (self.values, value_states)))
        if flush:
            self._encode(keys[:, :, :flush], values[:, :, :flush])
            keys, values = keys[:, :, flush:].clone(), values[:, :, flush:].clone()  # let the prompt's tensors go
        self.keys, self.values = keys, values

    def _encode(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        start, stop = self.coded, self.coded + keys.shape[2]
        self._keep_sinks(keys, values, start, stop)
        cos, sin = (t[:, None] for t in self.positions.tables(start, stop, keys.device))
        self._reserve(stop)
        self.key_codes[:, start:stop] = self._quantize(self.rope.rope.unrotate(keys.float(), cos, sin), self.book.keys)
        self.value_codes[:, start:stop] = self._quantize(values, self.book.values)
        self.coded = stop

    def _reserve(self, tokens: int) -> None:
        capacity = self.key_codes.shape[1]
        if tokens <= capacity:
            return
        # A prompt gets what it needs; a cache that grows gets a small part more.
        capacity = tokens if capacity == 0 else max(tokens, capacity + max(FLUSH, capacity // SPARE))
        for name in ("key_codes", "value_codes"):
            old = getattr(self, name)
            new = old.new_empty(old.shape[0], capacity, old.shape[2])
            new[:, : self.coded] = old[:, : self.coded]
            setattr(self, name, new)

    def _find_sinks(self, mask: Any) -> None:
        unknown = self.sink_start < 0
        if not self.sink_tokens or not bool(unknown.any()):
            return
        first = _first_visible(mask, self.batch_size, self.cumulative_length, self.device)
        self.sink_start = torch.where(unknown, first, self.sink_start)

    def _keep_sinks(self, keys: torch.Tensor, values: torch.Tensor, start: int, stop: int) -> None:
        """Copy the sinks among tokens start..stop into their slots."""
        token = self.sink_start[:, None] + torch.arange(self.sink_tokens, device=self.device)  # (batch, sinks)
        here = (self.sink_start[:, None] >= 0) & (token >= start) & (token < stop)
        if not bool(here.any()):
            return
        index = (token - start).clamp(0, stop - start - 1)[:, None, :, None]
        here = here[:, None, :, None]
        for slots, new in ((self.sink_keys, keys), (self.sink_values, values)):
            slots.copy_(torch.where(here, new.gather(2, index.expand(-1, new.shape[1], -1, new.shape[3])), slots))

    def sinks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sinks that stand in for codes.

        Returns keys, values (batch, heads, sink_tokens, head_dim); their token index, and whether that token is coded
        (else it is still in the window, or unknown), both (batch, sink_tokens).
        """
        token = self.sink_start[:, None] + torch.arange(self.sink_tokens, device=self.device)
        return self.sink_keys, self.sink_values, token, (self.sink_start[:, None] >= 0) & (token < self.coded)

    def coded_past(self) -> CodedPast:
        """The codes in use, as attention takes them."""
        hidden = None
        if self.sink_tokens:
            start = self.sink_start.clamp_min(0)
            hidden = torch.stack([start, torch.where(self.sink_start < 0, start, start + self.sink_tokens)], 1)
        keys, values = self.key_codes[:, : self.coded], self.value_codes[:, : self.coded]
        return CodedPast(keys, values, self.book, self.rope.rope, self.positions, hidden)

    def exact_keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values of every token, codes decoded, in the model's dtype."""
        decoded = decoded_keys_values(self.coded_past()) if self.coded else (self.keys[:, :, :0], self.values[:, :, :0])
        slots_keys, slots_values, token, held = self.sinks()
        out = []
        for old, slots, window in zip(decoded, (slots_keys, slots_values), (self.keys, self.values), strict=True):
            old = old.to(self.dtype)
            rows, slot = held.nonzero(as_tuple=True)
            old[rows, :, token[rows, slot]] = slots[rows, :, slot]
            out.append(torch.cat([old, window], 2))
        return out[0], out[1]

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.coded, self._pending = 0, False
        for name in ("key_codes", "value_codes", "sink_keys", "sink_values", "sink_start"):
            self.__dict__.pop(name, None)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, given as a negative number; codes that stay are not touched."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove.")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = max(self.cumulative_length + tokens_to_remove, 0)
        window = max(length - self.coded, 0)
        self.keys, self.values = self.keys[:, :, :window].clone(), self.values[:, :, :window].clone()
        self.coded, self.cumulative_length = min(self.coded, length), length
        self.sink_start[self.sink_start >= length] = -1

    def _map(self, change) -> None:
        if self.is_initialized:
            for name in self._names():
                setattr(self, name, change(getattr(self, name)))
            self.batch_size = self.keys.shape[0]

    @staticmethod
    def _names() -> tuple[str, ...]:
        return ("key_codes", "value_codes", "sink_keys", "sink_values", "sink_start", "keys", "values")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))

    def parts(self) -> dict[str, int]:
        """Bytes held, by part; storage is counted, not views."""
        if not self.is_initialized:
            return {"codes": 0, "spare": 0, "sinks": 0, "window": 0}
        codes = self.batch_size * self.coded * self.book.token_bytes
        held = sum(_storage_bytes(t) for t in (self.key_codes, self.value_codes))
        return {
            "codes": codes,
            "spare": held - codes,
            "sinks": sum(_storage_bytes(t) for t in (self.sink_keys, self.sink_values, self.sink_start)),
            "window": sum(_storage_bytes(t) for t in (self.keys, self.values)),
        }


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
        self.positions = PositionTrack(
            *frequencies(reading.rotary[0], "full_attention"), fixed=kind not in _CHANGING_ROPE
        )
        self.codebook = codebook
        layers = [
            CommVQLayer(codebook.layers[i], config, reading.rope, self.positions)
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
        ``other_layers`` (not compressed), ``total``; apart from these ``codebooks`` (shared by all caches of the
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
                report["other_layers"] += sum(_storage_bytes(t) for t in held)
                if getattr(layer, "keys", None) is not None:
                    elements += layer.keys.numel() + layer.values.numel()
        report["positions"] = self.positions.nbytes
        total = sum(report.values())
        fp16 = 2 * elements
        return {
            **report,
            "total": total,
            "codebooks": self.codebook.nbytes,
            "tokens": self.get_seq_length(),
            "fp16": fp16,
            "ratio": total / fp16 if fp16 else 0.0,
            "bits_per_element": 8 * total / elements if elements else 0.0,
        }

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


def _storage_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _first_visible(mask: Any, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Index of each row's first token that its newest query may see, -1 if it sees none.

    mask: (batch, heads, queries, tokens) bool or additive, (batch, tokens) of 0 and 1, or None (all visible). Other
    forms (block masks) carry no padding that could be read here: token 0 is taken.
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        return torch.zeros(batch, dtype=torch.int64, device=device)
    if mask.dim() == 4:
        mask = mask[:, 0, -1]
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    else:
        shown = mask != 0
    shown = shown[:, :length].to(device).expand(batch, -1)
    return torch.where(shown.any(1), shown.int().argmax(1), -1)
