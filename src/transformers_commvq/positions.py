"""Where each cached token stands: positions and the rotations that follow from them, one track per cache.

RoPE with fixed frequencies needs 4 bytes a token: its position. Frequencies that change with the sequence (dynamic,
longrope) need the cos and sin each token was rotated with. Which one holds is found by comparing, not by name.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .config import CacheUseError
from .rope import angles

# bf16 cos and sin are off by 2^-9; a wrong frequency or scale is off by far more within a few tokens.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 1e-2}


@dataclass
class GroupedRotations:
    """Rotations of a cache's tokens in groups: R(token) = R(group's first) R(offset). numpy arrays.

    cos, sin: float32 1-d (size, padded pairs), of offsets within a group.
    first_cos, first_sin: float32 (rows, groups, pairs), of each group's first token.
    broken: bool (groups,), True where positions are not consecutive.
    whole_cos, whole_sin: float32 1-d (rows, length, padded pairs), of single tokens; empty if no group is broken.
    """

    cos: Any
    sin: Any
    first_cos: Any
    first_sin: Any
    broken: Any
    whole_cos: Any
    whole_sin: Any


class PositionTrack:
    """Positions (or rotations) of the tokens of one cache, shared by its layers.

    Tensors:
        positions: int32 (rows, tokens) or None.
        cos, sin: (rows, tokens, pairs) or None, when the frequencies are not fixed.
    Other:
        rows is 1 when all rows of the batch agree, else the batch size.

    Only coded tokens are ever looked up, so new tokens wait in a list and are joined when one of them is needed:
    decoding one token reads nothing back from the device and copies nothing that grows.

    edits: counts changes of recorded tokens, so that what was made of them need not be compared with them; tokens that
        come behind them are none.
    """

    def __init__(self, inv_freq: torch.Tensor, scaling: float, fixed: bool = True):
        """inv_freq: (pairs,) float32; fixed: False keeps cos and sin from the start."""
        self.inv_freq, self.scaling = inv_freq.detach().float().cpu(), scaling
        self._initially_fixed = fixed
        self.edits = 0
        self._by_device: dict[torch.device, torch.Tensor] = {}
        self._relative: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._clear()

    def _clear(self) -> None:
        self.edits += 1
        self.fixed = self._initially_fixed
        self._length = 0
        self._held: dict[str, torch.Tensor] = {}
        self._waiting: dict[str, list[torch.Tensor]] = {}
        self._grouped = None
        self._breaks: list[int] = []  # tokens whose position does not follow their predecessor's in every row

    def __len__(self) -> int:
        return self._length

    @property
    def positions(self) -> torch.Tensor | None:
        self._join()
        return self._held.get("positions")

    @property
    def nbytes(self) -> int:
        held = [*self._held.values(), *(t for parts in self._waiting.values() for t in parts)]
        if self._grouped is not None:
            held += vars(self._grouped[1]).values()
        return sum(t.nbytes for t in held) + sum(t.nbytes for pair in self._relative.values() for t in pair)

    def extend(self, past: int, positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Record new tokens; a second layer's call for the same tokens changes nothing.

        past: tokens of the cache before these. positions: (rows, new) or None. cos, sin: (rows, new, pairs).

        Raises:
            CacheUseError: the layers of the cache no longer hold the same tokens.
        """
        new = cos.shape[1]
        if self._length == past + new:
            return
        if self._length != past:
            raise CacheUseError(
                f"this layer holds {past} tokens and is given {new}, but the cache has seen {self._length}: an earlier "
                "forward was interrupted, or skipped layers. Fix: start from a new cache, or reset() this one."
            )
        # Comparing waits for the device, so a single further token is trusted: types of RoPE that change while
        # decoding are not fixed from the start.
        plain = positions is not None and positions.dim() == 2 and positions.shape[1] == new
        if self.fixed and not (plain and ((past and new == 1) or self._agree(positions, cos, sin))):
            self._stop_being_fixed(cos.dtype)
        if self.fixed:
            # Rows are compared when they are joined; one row needs no comparison.
            self._wait(positions=positions.to(torch.int32))
        else:
            self._wait(cos=cos, sin=sin)
        self._length += new

    def _wait(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self._waiting.setdefault(name, []).append(tensor.detach().clone())

    def _join(self) -> None:
        """Move waiting tokens to the held ones."""
        for name, parts in self._waiting.items():
            new = parts[0]
            for part in parts[1:]:
                new = _append(new, part)
            held = self._held.get(name)
            if name == "positions":
                new = self._noted(new, held)
            self._held[name] = new if held is None else _append(held, new)
        self._waiting = {}

    def _noted(self, new: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
        """Note where positions do not follow their predecessors'; returns one row of them where all rows agree.

        Reads once from the device where nothing breaks off, which is all that a cache that grows ever asks it.
        """
        joint = new if held is None else _append(held[:, -1:], new)
        broken = (joint.diff(dim=1) != 1).any(0)
        agree, breaks = _read(torch.stack([(new == new[:1]).all(), broken.any()]))
        if breaks:
            first = 1 if held is None else held.shape[1]
            self._breaks += _read(first + broken.nonzero().flatten())
        return new[:1].clone() if agree and new.shape[0] > 1 else new

    def _agree(self, positions, cos, sin) -> bool:
        want_cos, want_sin = angles(positions.to(cos.device), self.frequencies(cos.device), self.scaling)
        if want_cos.shape[-1] != cos.shape[-1]:
            return False
        bound = _TOLERANCE[cos.dtype] * max(self.scaling, 1.0)
        return all(bool(((a - b.float()).abs() <= bound).all()) for a, b in ((want_cos, cos), (want_sin, sin)))

    def _stop_being_fixed(self, dtype: torch.dtype) -> None:
        self._join()
        self.fixed, self._grouped = False, None
        self.edits += 1
        if (positions := self._held.pop("positions", None)) is not None:
            cos, sin = angles(positions, self.frequencies(positions.device), self.scaling)
            self._held = {"cos": cos.to(dtype), "sin": sin.to(dtype)}

    def tables(self, start: int, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of tokens start..stop, float32 (rows, stop - start, pairs)."""
        if self.fixed:
            return angles(self._get("positions", start, stop, device), self.frequencies(device), self.scaling)
        return tuple(self._get(name, start, stop, device).float() for name in ("cos", "sin"))

    def _get(self, name: str, start: int, stop: int, device: torch.device) -> torch.Tensor:
        if name not in self._held or stop > self._held[name].shape[1]:
            self._join()
        return self._held[name][:, start:stop].to(device)

    def block(self, start: int, stop: int, size: int, device: torch.device):
        """The rotations of a block as ``R(position) = R(start) R(offset)``, when its positions are consecutive.

        size: length of the table of offsets that is kept; stop - start may be shorter.
        Returns ((cos, sin) of offsets (1, stop - start, pairs), (cos, sin) of the start (rows, 1, pairs)); the second
        is None where positions are not consecutive, and then the first is that of ``tables``.
        """
        if self.fixed:
            origin = self._get("positions", start, stop, device)[:, :1]  # first: it may bring new breaks
        if not self.fixed or self._broken(start + 1, stop):
            return self.tables(start, stop, device), None
        key = (device, size)
        if key not in self._relative:
            offsets = torch.arange(size, device=device)[None]
            self._relative[key] = angles(offsets, self.frequencies(device))
        table = tuple(t[:, : stop - start] for t in self._relative[key])
        return table, angles(origin, self.frequencies(device), self.scaling)

    def groups(self, length: int, size: int, pad: int) -> GroupedRotations:
        """The rotations of tokens 0..length in groups of ``size``, on the CPU; kept until the length changes.

        pad: rotations of single tokens get zeros for as many further pairs as make their number a multiple.
        """
        if self._grouped is not None and self._grouped[0] == (length, size, pad):
            return self._grouped[1]
        device = torch.device("cpu")
        if self.fixed:
            first = angles(self._get("positions", 0, length, device)[:, ::size], self.frequencies(device), self.scaling)
        else:
            first = tuple(self._get(name, 0, length, device)[:, ::size].float() for name in ("cos", "sin"))
        starts = range(0, length, size)
        broken = [not self.fixed or self._broken(a + 1, min(a + size, length)) for a in starts]
        whole = self.tables(0, length, device) if any(broken) else (torch.empty(1, 0, self.inv_freq.shape[0]),) * 2
        spare = -self.inv_freq.shape[0] % pad
        flat = [
            torch.nn.functional.pad(t, (0, spare)).flatten().numpy()
            for t in (*angles(torch.arange(size), self.frequencies(device)), *whole)
        ]
        arrays = flat[:2] + [t.contiguous().numpy() for t in first] + [torch.tensor(broken).numpy()] + flat[2:]
        self._grouped = (length, size, pad), GroupedRotations(*arrays)
        return self._grouped[1]

    def recorded(self, length: int) -> torch.Tensor:
        """The tensor in which tokens 0..length, or more, are recorded: positions, or cos where frequencies change.

        The same object until tokens are joined to it or changed, so that what is made of it can be kept as long.
        ``positions`` would join the tokens that wait at every step, which only their coding needs.
        """
        name = "positions" if self.fixed else "cos"
        held = self._held.get(name)
        if held is None or held.shape[1] < length:
            self._join()
        return self._held[name]

    def consecutive(self, start: int, stop: int, size: int) -> bool:
        """Whether every row's positions are consecutive within each block of ``size`` tokens, counted from token 0.

        start, stop: the tokens in question, among those that ``recorded`` has joined; start a multiple of size.
        """
        return not any(
            b % size for b in self._breaks[bisect_left(self._breaks, start) : bisect_left(self._breaks, stop)]
        )

    def _broken(self, first: int, stop: int) -> bool:
        return bisect_left(self._breaks, stop) > bisect_right(self._breaks, first - 1)

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """inv_freq on a device, copied there once."""
        if device not in self._by_device:
            self._by_device[device] = self.inv_freq.to(device)
        return self._by_device[device]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self._map(lambda t: t[:, :length].clone())
        self._length = min(self._length, length)
        self._breaks = [b for b in self._breaks if b < length]

    def reset(self) -> None:
        self._clear()

    def select_rows(self, index: torch.Tensor) -> None:
        """Rows of the batch become ``old[index]``."""
        self._map(lambda t: t if t.shape[0] == 1 else t[index.to(t.device)])

    def repeat_rows(self, repeats: int) -> None:
        self._map(lambda t: t if t.shape[0] == 1 else t.repeat_interleave(repeats, 0))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._join()
        self._grouped = None
        self.edits += 1
        self._held = {name: change(held) for name, held in self._held.items()}


def _read(values: torch.Tensor) -> list:
    """Values on the host, which waits for the device."""
    return values.tolist()


def _append(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Concatenate tokens, letting one row stand for all where the other has many."""
    rows = max(held.shape[0], new.shape[0])
    held, new = (t if t.shape[0] == rows else t.expand(rows, *t.shape[1:]) for t in (held, new))
    return torch.cat([held, new.to(held.device, held.dtype)], 1)
