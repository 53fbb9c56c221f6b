"""One layer of the compressed cache: sinks, window, and codes that are appended and never made anew.

Its tokens 0..length lie in two places. The oldest are codes; the newest (at least ``residual_length``) wait in the
window, as the model made them. Each row's first real tokens (sinks) are kept in full beside their codes, because every
query looks at them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import BaseQuantizedLayer

from .codebook import LayerBook
from .config import CacheUseError, CommVQConfig
from .ops import CodedPast, decode, decoded_keys_values, encode
from .positions import PositionTrack
from .rope import Rope

FLUSH = 64  # tokens encoded at a time while decoding: fewer, larger encoder calls
CHUNK = 4096  # tokens of a prompt encoded at a time, which bounds the float32 copies
SPARE = 32  # buffers grow by 1/SPARE: decoding copies little and never holds much unused


@dataclass
class Call:
    """One attention module's forward over one layer of a CommVQ cache, from pre-hook to attention function.

    cos, sin: (rows, new, pairs), as the module rotates with. positions: (rows, new) or None.
    mask: the attention mask the module was given, in whatever form its attention function takes.
    fused: True if the registered attention function will read the codes; else ``update`` must return everything.
    past: tokens before this call; -1 until the layer was updated.
    handed: the new keys and values that ``update`` returned to a module whose attention function reads the codes.
    """

    module: nn.Module
    layer: CommVQLayer
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None
    mask: Any
    fused: bool
    past: int = -1
    handed: tuple[torch.Tensor, torch.Tensor] | None = None


class _Current(threading.local):
    """positions: what the rotary module was given, for attention modules that are not told."""

    call: Call | None = None
    positions: torch.Tensor | None = None


current = _Current()  # per thread: two threads may run one model with their own caches


def _stored(function: Callable) -> Callable:
    """What a layer keeps carries no gradient, and stays usable after a ``torch.inference_mode()`` block has ended."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapper


class CommVQLayer(BaseQuantizedLayer):
    """The cache of one full-attention layer.

    Tensors, once initialized:
        key_codes, value_codes: uint8 (batch, capacity, bytes); the first ``coded`` tokens are in use.
        sink_keys, sink_values: (batch, heads, sink_tokens, head_dim), model dtype.
        sink_start: int64 (batch,), index of each row's first real token, -1 while unknown.
        keys, values: the window, (batch, heads, window, head_dim), model dtype, keys after RoPE.
    Other:
        book: LayerBook, shared by every cache of the model and never copied.
        rope: how this layer's keys are rotated.
        positions: PositionTrack, shared by the layers of one cache.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, book: LayerBook, config: CommVQConfig, rope: Rope, positions: PositionTrack):
        super().__init__()
        self.book, self.rope, self.positions = book, rope, positions
        self.sink_tokens, self.residual_length = config.sink_tokens, config.residual_length
        self._forget()

    def _forget(self) -> None:
        self.coded = 0
        self._pending = False  # tokens were handed to an attention function that has not come back
        self._joined: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None  # see with_new
        # Known without asking the device: whether every row's first real token is known, and past which token no
        # sink lies. Asking would make the host wait at every step.
        self._sinks_known, self._sinks_end = self.sink_tokens == 0, 0
        self._hidden: torch.Tensor | None = None
        self._past: CodedPast | None = None  # see coded_past

    @_stored
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, heads, _, dim = key_states.shape
        for name, states, book in (("keys", key_states, self.book.keys), ("values", value_states, self.book.values)):
            if (states.shape[1], states.shape[3]) != (book.heads, book.head_dim):
                raise CacheUseError(
                    f"{name} have {states.shape[1]} heads of {states.shape[3]} elements, the codebook {book.heads} of "
                    f"{book.head_dim}. Fix: use codebooks of this model."
                )
        if self.book.keys.device != self.device:
            self.book = self.book.to(self.device)
        self.key_codes, self.value_codes = (
            torch.empty(self.batch_size, 0, book.token_bytes, dtype=torch.uint8, device=self.device)
            for book in (self.book.keys, self.book.values)
        )
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.sink_keys = key_states.new_zeros(self.batch_size, heads, self.sink_tokens, dim)
        self.sink_values = value_states.new_zeros(self.batch_size, heads, self.sink_tokens, value_states.shape[-1])
        self.sink_start = torch.full((self.batch_size,), -1, device=self.device)
        self.is_initialized = True

    def _quantize(self, tensor: torch.Tensor, book: Any) -> torch.Tensor:
        return encode(tensor, book)

    def _dequantize(self, q_tensor: torch.Tensor, book: Any) -> torch.Tensor:
        return decode(q_tensor, book)

    @torch.compiler.disable
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take new tokens, (batch, heads, new, head_dim), keys after RoPE.

        Returns the new tokens alone when the "commvq" attention function will read the rest; else keys and values of
        all tokens, decoded.

        Raises:
            CacheUseError: the model is not enabled for CommVQ, or an earlier forward was interrupted.
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
        if key_states.shape[0] != self.batch_size:
            raise CacheUseError(f"the cache holds {self.batch_size} rows and is given {key_states.shape[0]}.")
        self.positions.extend(self.cumulative_length, call.positions, call.cos, call.sin)
        call.past = self.cumulative_length
        if call.fused:
            self._pending, call.handed = True, (key_states, value_states)
            return key_states, value_states
        everything = key_states, value_states
        if call.past:
            everything = tuple(torch.cat([o, n], 2) for o, n in zip(self.exact_keys_values(), everything, strict=True))
        self.append(key_states, value_states, call.mask)
        return everything

    def with_new(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the window and of new tokens behind it; joined once for attention and ``append``."""
        if not self.keys.shape[2]:
            return key_states, value_states
        if self._joined is None or self._joined[0] is not key_states:
            pairs = ((self.keys, key_states), (self.values, value_states))
            self._joined = key_states, tuple(torch.cat(pair, 2) for pair in pairs)
        return self._joined[1]

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, mask: Any) -> None:
        """Store tokens after attention has used them, and encode what leaves the window.

        mask: the attention mask over all tokens, these included; it tells each row's first real token.
        """
        self.cumulative_length += key_states.shape[2]
        self._pending = False
        if not self._sinks_known:
            self._find_sinks(mask)
        waiting = self.cumulative_length - self.coded
        flush = max(waiting - self.residual_length, 0) // FLUSH * FLUSH
        new = self.with_new(key_states, value_states)
        self._joined = None
        if self.keys.shape[2] and not flush:  # most steps of decoding
            self.keys, self.values = (t.detach() for t in new)
        else:
            self._flush(new, flush)

    @_stored
    def _flush(self, new: tuple[torch.Tensor, torch.Tensor], flush: int) -> None:
        """Encode the oldest ``flush`` tokens and keep the others as the window."""
        for start in range(0, flush, CHUNK):
            stop = min(start + CHUNK, flush)
            self._encode(*(t[:, :, start:stop] for t in new), room_for=self.coded + flush - start)
        # Copies: a view would keep a prompt's tensors alive.
        self.keys, self.values = (t[:, :, flush:].clone(memory_format=torch.contiguous_format) for t in new)

    def _encode(self, keys: torch.Tensor, values: torch.Tensor, room_for: int) -> None:
        start, stop = self.coded, self.coded + keys.shape[2]
        self._keep_sinks(keys, values, start, stop)
        cos, sin = (t[:, None] for t in self.positions.tables(start, stop, keys.device))
        self._past = None  # or it would keep the codes' old memory
        self._reserve(room_for)
        self.key_codes[:, start:stop] = self._quantize(self.rope.unrotate(keys.float(), cos, sin), self.book.keys)
        self.value_codes[:, start:stop] = self._quantize(values, self.book.values)
        self.coded = stop

    def _reserve(self, tokens: int) -> None:
        capacity = self.key_codes.shape[1]
        if tokens > capacity:  # a prompt gets what it needs; a cache that grows gets a small part more
            capacity = tokens if capacity == 0 else max(tokens, capacity + max(FLUSH, capacity // SPARE))
        elif not self.key_codes.is_inference():  # as a copy is that was made inside torch.inference_mode(): read only
            return
        for name in ("key_codes", "value_codes"):
            old = getattr(self, name)
            new = old.new_empty(old.shape[0], capacity, old.shape[2])
            new[:, : self.coded] = old[:, : self.coded]
            setattr(self, name, new)

    @_stored
    def _find_sinks(self, mask: Any) -> None:
        first = _first_visible(mask, self.batch_size, self.cumulative_length, self.device)
        self.sink_start = torch.where(self.sink_start < 0, first, self.sink_start)
        self._hidden = self._past = None
        starts = self.sink_start.tolist()
        self._sinks_known, self._sinks_end = min(starts) >= 0, max(starts) + self.sink_tokens

    def _keep_sinks(self, keys: torch.Tensor, values: torch.Tensor, start: int, stop: int) -> None:
        """Copy the sinks among tokens start..stop into their slots."""
        if start >= self._sinks_end:
            return
        token = self.sink_start[:, None] + torch.arange(self.sink_tokens, device=self.device)  # (batch, sinks)
        here = (self.sink_start[:, None] >= 0) & (token >= start) & (token < stop)
        index = (token - start).clamp(0, stop - start - 1)[:, None, :, None]
        here = here[:, None, :, None]
        for name, new in (("sink_keys", keys), ("sink_values", values)):
            moved = new.gather(2, index.expand(-1, new.shape[1], -1, new.shape[3]))
            setattr(self, name, torch.where(here, moved, getattr(self, name)))

    @property
    def sinks_coded(self) -> bool:
        """Whether every sink slot of every row stands in for a code (known without asking the device)."""
        return self._sinks_known and self.coded >= self._sinks_end

    def sink_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is in the slots of sink_keys and sink_values, (batch, heads, sink_tokens, head_dim).

        Returns each slot's token, and whether that token is coded, so that the slot stands in for its code (else it is
        still in the window, or unknown); both (batch, sink_tokens).
        """
        token = self.sink_start[:, None] + torch.arange(self.sink_tokens, device=self.device)
        return token, (self.sink_start[:, None] >= 0) & (token < self.coded)

    def coded_past(self) -> CodedPast:
        """The codes in use, as attention takes them; the same object until one of them changes."""
        if self._hidden is None and self.sink_tokens:
            start = self.sink_start.clamp_min(0)
            stop = torch.where(self.sink_start < 0, start, start + self.sink_tokens)
            self._hidden = torch.stack([start, stop], 1)
        if self._past is None:
            self._past = self._new_past()
        return self._past

    @_stored
    def _new_past(self) -> CodedPast:
        keys, values = self.key_codes[:, : self.coded], self.value_codes[:, : self.coded]
        return CodedPast(keys, values, self.book, self.rope, self.positions, self._hidden)

    def exact_keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values of every token, codes decoded, in the model's dtype."""
        decoded = decoded_keys_values(self.coded_past()) if self.coded else (self.keys[:, :, :0], self.values[:, :, :0])
        slots, out = (self.sink_keys, self.sink_values), []
        token, held = self.sink_slots()
        for old, kept, window in zip(decoded, slots, (self.keys, self.values), strict=True):
            old = old.to(self.dtype)
            rows, slot = held.nonzero(as_tuple=True)
            old[rows, :, token[rows, slot]] = kept[rows, :, slot]
            out.append(torch.cat([old, window], 2))
        return out[0], out[1]

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._forget()
        for name in ("key_codes", "value_codes", "sink_keys", "sink_values", "sink_start"):
            self.__dict__.pop(name, None)

    @_stored
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, given as a negative number; codes that stay are not touched."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove.")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = max(self.cumulative_length + tokens_to_remove, 0)
        window = max(length - self.coded, 0)
        self.keys, self.values = self.keys[:, :, :window].clone(), self.values[:, :, :window].clone()
        self.coded, self.cumulative_length, self._past = min(self.coded, length), length, None
        if length < self._sinks_end:  # the tokens that come instead may begin elsewhere
            self.sink_start = self.sink_start.masked_fill(self.sink_start >= length, -1)
            self._hidden, self._sinks_known = None, self.sink_tokens == 0

    @_stored
    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            for name in ("key_codes", "value_codes", "sink_keys", "sink_values", "sink_start", "keys", "values"):
                setattr(self, name, change(getattr(self, name)))
            self.batch_size, self._hidden, self._past = self.keys.shape[0], None, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def parts(self) -> dict[str, int]:
        """Bytes held, by part; storage is counted, not views."""
        if not self.is_initialized:
            return {"codes": 0, "spare": 0, "sinks": 0, "window": 0}
        codes = self.batch_size * self.coded * self.book.token_bytes
        held = sum(storage_bytes(t) for t in (self.key_codes, self.value_codes))
        hidden = () if self._hidden is None else (self._hidden,)
        return {
            "codes": codes,
            "spare": held - codes,
            "sinks": sum(storage_bytes(t) for t in (self.sink_keys, self.sink_values, self.sink_start, *hidden)),
            "window": sum(storage_bytes(t) for t in (self.keys, self.values)),
        }


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind a tensor, which may be more than the tensor shows."""
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
