"""Where each cached token stands: positions and the rotations that follow from them, one track per cache.

RoPE with fixed frequencies needs 4 bytes a token: its position. Frequencies that change with the sequence (dynamic,
longrope) need the cos and sin each token was rotated with. Which one holds is found by comparing, not by name.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable

import torch

from .config import CacheUseError
from .rope import angles

# bf16 cos and sin are off by 2^-9; a wrong frequency or scale is off by far more within a few tokens.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 1e-2}


class PositionTrack:
    """Positions (or rotations) of the tokens of one cache, shared by its layers.

    Tensors:
        positions: int32 (rows, tokens) or None.
        cos, sin: (rows, tokens, pairs) or None, when the frequencies are not fixed.
    Other:
        rows is 1 when all rows of the batch agree, else the batch size.
    """

    def __init__(self, inv_freq: torch.Tensor, scaling: float, fixed: bool = True):
        """inv_freq: (pairs,) float32; fixed: False keeps cos and sin from the start."""
        self.inv_freq, self.scaling, self.fixed = inv_freq.detach().float().cpu(), scaling, fixed
        self._initially_fixed = fixed
        self._by_device: dict[torch.device, torch.Tensor] = {}
        self._relative: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._clear()

    def _clear(self) -> None:
        self.fixed = self._initially_fixed
        self.positions = self.cos = self.sin = None
        self._breaks: list[int] = []  # tokens whose position does not follow their predecessor's in every row

    def __len__(self) -> int:
        held = self.positions if self.fixed else self.cos
        return 0 if held is None else held.shape[1]

    @property
    def nbytes(self) -> int:
        held = [t for t in (self.positions, self.cos, self.sin) if t is not None]
        return sum(t.nbytes for t in held) + sum(t.nbytes for pair in self._relative.values() for t in pair)

    def extend(self, past: int, positions: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Record new tokens; a second layer's call for the same tokens changes nothing.

        past: tokens of the cache before these. positions: (rows, new) or None. cos, sin: (rows, new, pairs).
        """
        new = cos.shape[1]
        if len(self) >= past + new:
            return
        if len(self) != past:
            raise CacheUseError(f"positions of {len(self)} tokens are known, but the cache holds {past}.")
        if self.fixed and not self._agree(positions, cos, sin):
            self._stop_being_fixed(cos.dtype)
        if not self.fixed:
            cos, sin = cos.cpu(), sin.cpu()
            self.cos, self.sin = (_append(a, b, 1) for a, b in ((self.cos, cos), (self.sin, sin)))
            return
        positions = positions.to("cpu", torch.int32)
        positions = positions[:1] if bool((positions == positions[:1]).all()) else positions
        before = self.positions
        self.positions = _append(before, positions, 1).contiguous()
        first = max(past, 1)
        steps = self.positions[:, first:] - self.positions[:, first - 1 : -1]
        self._breaks += (first + (steps != 1).any(0).nonzero().flatten()).tolist()

    def _agree(self, positions, cos, sin) -> bool:
        if positions is None or positions.dim() != 2 or positions.shape[1] != cos.shape[1]:
            return False
        want_cos, want_sin = angles(positions.cpu(), self.inv_freq, self.scaling)
        if want_cos.shape[-1] != cos.shape[-1]:
            return False
        bound = _TOLERANCE[cos.dtype] * max(self.scaling, 1.0)
        return all(bool(((a - b.float().cpu()).abs() <= bound).all()) for a, b in ((want_cos, cos), (want_sin, sin)))

    def _stop_being_fixed(self, dtype: torch.dtype) -> None:
        self.fixed = False
        if self.positions is not None:
            self.cos, self.sin = (t.to(dtype) for t in angles(self.positions, self.inv_freq, self.scaling))
            self.positions = None

    def tables(self, start: int, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of tokens start..stop, float32 (rows, stop - start, pairs)."""
        if self.fixed:
            return angles(self.positions[:, start:stop].to(device), self._frequencies(device), self.scaling)
        return tuple(t[:, start:stop].to(device, torch.float32) for t in (self.cos, self.sin))

    def block(self, start: int, stop: int, size: int, device: torch.device):
        """The rotations of a block as ``R(position) = R(start) R(offset)``, when its positions are consecutive.

        size: length of the table of offsets that is kept; stop - start may be shorter.
        Returns ((cos, sin) of offsets (1, stop - start, pairs), (cos, sin) of the start (rows, 1, pairs)); the second
        is None where positions are not consecutive, and then the first is that of ``tables``.
        """
        if not self.fixed or self._broken(start + 1, stop):
            return self.tables(start, stop, device), None
        key = (device, size)
        if key not in self._relative:
            offsets = torch.arange(size, device=device)[None]
            self._relative[key] = angles(offsets, self._frequencies(device))
        table = tuple(t[:, : stop - start] for t in self._relative[key])
        return table, angles(self.positions[:, start : start + 1].to(device), self._frequencies(device), self.scaling)

    def _broken(self, first: int, stop: int) -> bool:
        return bisect_left(self._breaks, stop) > bisect_right(self._breaks, first - 1)

    def _frequencies(self, device: torch.device) -> torch.Tensor:
        if device not in self._by_device:
            self._by_device[device] = self.inv_freq.to(device)
        return self._by_device[device]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self._map(lambda t: t[:, :length].contiguous())
        self._breaks = [b for b in self._breaks if b < length]

    def reset(self) -> None:
        self._clear()

    def select_rows(self, index: torch.Tensor) -> None:
        """Rows of the batch become ``old[index]``."""
        self._map(lambda t: t if t.shape[0] == 1 else t[index.to(t.device)])

    def repeat_rows(self, repeats: int) -> None:
        self._map(lambda t: t if t.shape[0] == 1 else t.repeat_interleave(repeats, 0))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in ("positions", "cos", "sin"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, change(held))


def _append(held: torch.Tensor | None, new: torch.Tensor, dim: int) -> torch.Tensor:
    """Concatenate along dim, letting one row stand for all where the other has many."""
    if held is None:
        return new
    rows = max(held.shape[0], new.shape[0])
    held, new = (t if t.shape[0] == rows else t.expand(rows, *t.shape[1:]) for t in (held, new))
    return torch.cat([held, new.to(held.dtype)], dim)
