"""What the Triton kernels read besides codes and queries: codebooks laid out for them, and rotations.

Both are made once and kept beside their owner: a codebook's layout for the life of the book, the rotations of a cache's
tokens for the life of its PositionTrack, extended as the cache grows.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..codebook import LayerBook, SignBook
from ..positions import PositionTrack
from ..rope import Rope, angles
from .past import CodedPast
from .triton_signs import COLUMN_ORDER, WORD

BLOCK = 128  # tokens that share one rotation of the query, R(position) = R(start) R(offset)
TABLE = 2 * BLOCK  # entries of a rotation table: a block may hold small gaps in its positions
CHUNKS = 4  # most accumulators for values; see attend_splits
META = 8  # columns of LayerTables.meta

_lock = threading.Lock()
_layers: WeakIdKeyDictionary = WeakIdKeyDictionary()
_tracks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass
class LayerTables:
    """One layer's codebooks as the kernels read them. Pairs are padded to a power of two, 16 or more, with zeros.

    Tensors:
        keys: float16 (padded rows, 2, pairs): real and imaginary parts of C's rows, columns in COLUMN_ORDER.
        key_mean: float32 (heads, 2, pairs).
        elements: int32 (2, pairs), the element of a head each part comes from; -1 where there is none.
        values, value_mean: float16 (padded rows, dim), float32 (heads, dim); dim padded to a power of two.
        meta: int32 (heads, META): first byte, bytes and padded bits of the keys; first byte and bytes of the values;
            first row in ``keys``; padded bits and first row in ``values``.
    Other:
        key_bits: signs of a key decoded at a time. value_bits, chunks: accumulators for values.
    """

    keys: torch.Tensor
    key_mean: torch.Tensor
    elements: torch.Tensor
    values: torch.Tensor
    value_mean: torch.Tensor
    meta: torch.Tensor
    key_bits: int
    value_bits: int
    chunks: int
    merge_bits: int

    @property
    def pairs(self) -> int:
        return self.elements.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, torch.Tensor))


def value_chunks(max_bits: int) -> tuple[int, int]:
    """(signs per accumulator, accumulators) that hold a value's code; more than CHUNKS accumulators are too many."""
    bits = min(128, max(WORD, _power(max_bits)))
    if max_bits > CHUNKS * bits:
        bits = 256
    return bits, -(-max_bits // bits)


def layer_tables(book: LayerBook, rope: Rope) -> LayerTables:
    """The tables of a layer's books, made at the first call."""
    with _lock:
        known = _layers.get(book)
        if known is None or known[0] != rope:
            known = _layers[book] = (rope, _layer_tables(book, rope))
    return known[1]


def held_bytes(book: LayerBook) -> int:
    """Bytes of the tables made for this book so far."""
    known = _layers.get(book)
    return 0 if known is None else known[1].nbytes


def _layer_tables(book: LayerBook, rope: Rope) -> LayerTables:
    keys, values = book.keys, book.values
    device = keys.vectors.device
    re, im, rest = rope.split(torch.arange(keys.head_dim))
    # Elements that RoPE leaves alone make pairs of their own, with an angle of zero.
    re, im = torch.cat([re, rest[0::2]]), torch.cat([im, rest[1::2]])
    pairs = max(16, _power(len(re)))
    elements = torch.full((2, pairs), -1)
    elements[0, : len(re)], elements[1, : len(im)] = re, im
    key_bits = 32 if pairs > 64 else 64
    value_bits, chunks = value_chunks(values.layout.max_bits)
    merge_bits = WORD

    key_rows, key_firsts, key_padded = _padded_rows(keys, key_bits)
    value_rows, value_firsts, value_padded = _padded_rows(values, merge_bits)
    index = elements.clamp_min(0).to(device)
    none = (elements < 0).to(device)
    split = key_rows[:, index].masked_fill_(none, 0)
    mean = keys.mean[:, index].masked_fill(none, 0)
    dim = max(16, _power(values.head_dim))
    values_wide = torch.nn.functional.pad(value_rows, (0, dim - values.head_dim))
    value_mean = torch.nn.functional.pad(values.mean, (0, dim - values.head_dim))
    meta = []
    key_byte = value_byte = 0
    for h, (n, m) in enumerate(zip(keys.layout.bits, values.layout.bits, strict=True)):
        meta.append(
            [key_byte, n // 8, key_padded[h], value_byte, m // 8, key_firsts[h], value_padded[h], value_firsts[h]]
        )
        key_byte, value_byte = key_byte + n // 8, value_byte + m // 8
    return LayerTables(
        split.contiguous(),
        mean.float().contiguous(),
        elements.to(device, torch.int32),
        values_wide.contiguous(),
        value_mean.float().contiguous(),
        torch.tensor(meta, dtype=torch.int32, device=device),
        key_bits,
        value_bits,
        chunks,
        merge_bits,
    )


def _padded_rows(book: SignBook, multiple: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """C with each head's rows in the kernels' order, padded with zero rows to a multiple.

    Returns float16 (rows, head_dim), each head's first row and its padded number of bits.
    """
    order = torch.tensor(COLUMN_ORDER)
    parts, firsts, padded, start, at = [], [], [], 0, 0
    for n in book.layout.bits:
        width = -(-n // multiple) * multiple
        rows = (torch.arange(0, width, WORD)[:, None] + order).flatten()
        parts.append(torch.where(rows < n, rows + start, -1))
        firsts.append(at)
        padded.append(width)
        start, at = start + n, at + width
    rows = torch.cat(parts).to(book.vectors.device)
    c = book.vectors[rows.clamp_min(0)].half()
    return c.masked_fill_((rows < 0)[:, None], 0), firsts, padded


class Rotations:
    """The rotations of one cache's tokens on one device, for one padded number of pairs.

    A token's rotation is R(start of its block) R(entry), both looked up:

        table_cos, table_sin: float16 (entries, pairs).
        start_cos, start_sin: float32 (rows, blocks, pairs), or None: the table holds whole rotations.
        index: int32 (rows, tokens), each token's entry, or None: its place in its block (consecutive positions).

    rows is 1 when all rows of the batch agree.
    """

    def __init__(self, device: torch.device, pairs: int):
        self.device, self.pairs = device, pairs
        self._forget()

    def _forget(self) -> None:
        self.source: torch.Tensor | None = None
        self.length = self.edits = 0
        self.table_cos = self.table_sin = self.start_cos = self.start_sin = self.index = None

    @torch.inference_mode(False)  # or these could not be extended once a torch.inference_mode() block has ended
    @torch.no_grad()
    def update(self, track: PositionTrack, length: int) -> None:
        """Cover tokens 0..length. Cheap when nothing changed; reads only the new blocks when tokens were added.

        The host waits for the device only after tokens were changed or where positions are not consecutive.
        """
        source = track.recorded(length)
        if source is self.source and length <= self.length:
            return
        known = self.length // BLOCK * BLOCK if self._still_true(track, source, min(length, self.length)) else 0
        if not track.fixed or not self._blocks(track, source, known, length):
            self._whole(track, length)
        self.source, self.length, self.edits = source, length, track.edits

    def _still_true(self, track: PositionTrack, source: torch.Tensor, length: int) -> bool:
        old = self.source
        if old is None or self.start_cos is None or old.shape[0] != source.shape[0] or old.dim() != source.dim():
            return False
        return track.edits == self.edits or torch.equal(old[:, :length], source[:, :length])

    def _blocks(self, track: PositionTrack, positions: torch.Tensor, known: int, length: int) -> bool:
        """Rotations by blocks of positions; False if the positions of some block lie too far apart for the table."""
        consecutive = track.consecutive(known, length, BLOCK)
        if not consecutive and self.index is None:
            known = 0  # entries are now needed for every token
        new = positions[:, known:length]
        count = -(-new.shape[1] // BLOCK)
        short = count * BLOCK - new.shape[1]
        tail = new[:, -1:] + torch.arange(1, short + 1, dtype=new.dtype, device=new.device)
        blocks = torch.cat([new, tail], 1).view(new.shape[0], count, BLOCK)
        low = blocks.amin(-1)
        entries = blocks - low[..., None]
        if not consecutive and int(entries.max()) >= TABLE:
            return False
        frequencies = track.frequencies(self.device)
        if known == 0:
            self._forget()
            self.table_cos, self.table_sin = (
                t.half() for t in self._padded(*angles(torch.arange(TABLE, device=self.device), frequencies))
            )
        cos, sin = self._padded(*angles(low.to(self.device), frequencies, track.scaling))
        first = known // BLOCK
        self.start_cos, self.start_sin = (
            _put(old, new, first) for old, new in ((self.start_cos, cos), (self.start_sin, sin))
        )
        if not consecutive or self.index is not None:
            self.index = _put(self.index, entries.flatten(1).to(self.device, torch.int32), known)
        return True

    def _whole(self, track: PositionTrack, length: int) -> None:
        self._forget()
        cos, sin = self._padded(*track.tables(0, length, self.device))
        self.table_cos, self.table_sin = (t.flatten(0, 1).half() for t in (cos, sin))
        entries = torch.arange(self.table_cos.shape[0], dtype=torch.int32, device=self.device)
        self.index = entries.view(cos.shape[0], length)

    def _padded(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        more = (0, self.pairs - cos.shape[-1])
        cos = torch.nn.functional.pad(cos.to(self.device), more, value=1.0)
        return cos, torch.nn.functional.pad(sin.to(self.device), more)


def _put(held: torch.Tensor | None, new: torch.Tensor, at: int) -> torch.Tensor:
    """Write ``new`` at ``at`` along dim 1, in a buffer that at least doubles when it has to grow."""
    need = at + new.shape[1]
    if held is None or held.shape[1] < need:
        grown = new.new_zeros(new.shape[0], need if held is None else max(need, 2 * held.shape[1]), *new.shape[2:])
        if held is not None:
            grown[:, :at] = held[:, :at]
        held = grown
    held[:, at:need] = new
    return held


def rotations(past: CodedPast, pairs: int) -> Rotations:
    """The rotations of the tokens of a past, kept for as long as its PositionTrack lives."""
    device = past.keys.device
    with _lock:
        mine = _tracks.setdefault(past.positions, {})
        found = mine.setdefault((device, pairs), Rotations(device, pairs))
    found.update(past.positions, past.length)
    return found
