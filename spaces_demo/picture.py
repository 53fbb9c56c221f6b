"""The how-it-works tab: one real key of SmolLM2, coded, decoded and rotated, as a picture."""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass
from typing import Any

import torch
from answers import RATES, load
from matplotlib.figure import Figure
from style import COLORS, new_figure
from transformers import DynamicCache

from transformers_commvq import ConfigError, SignBook, make_cache
from transformers_commvq.geometry import cache_name
from transformers_commvq.ops import decode, encode
from transformers_commvq.packing import unpack
from transformers_commvq.rope import Rope

TOKENS = 128  # of the text whose keys are shown
FARTHEST = 65_535  # position to rotate to
EXACT, CODED = COLORS["fp16"], COLORS["CommVQ 2-bit"]


@dataclass(frozen=True)
class Example:
    """One key and its code.

    key, mean, decoded: (head_dim,) float32, before RoPE. signs: (n,) in {-1, +1}. vectors: (n, head_dim), C of the
    head. cos, sin: (pairs,) at the position to rotate to.
    """

    key: torch.Tensor
    mean: torch.Tensor
    decoded: torch.Tensor
    signs: torch.Tensor
    vectors: torch.Tensor
    rope: Rope
    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def error(self) -> float:
        """‖key − decoded‖² as a share of ‖key − mean‖²."""
        return float((self.key - self.decoded).square().sum() / (self.key - self.mean).square().sum())

    @property
    def commutes(self) -> float:
        """Largest element of rotate(decoded) − (rotate(mean) + signs · rotate(C)): rounding alone."""
        turned = (self.rope.rotate(x, self.cos, self.sin) for x in (self.decoded, self.mean, self.vectors))
        whole, mean, vectors = turned
        return float((whole - (mean + self.signs @ vectors)).abs().max())


@functools.cache
@torch.inference_mode()
def _recorded() -> tuple[list[str], list[torch.Tensor]]:
    """(the text's tokens, keys before RoPE of every layer, (heads, tokens, head_dim) float32)."""
    loaded = load()
    model = loaded.model
    ids = loaded.tokenizer(heapq.__about__, return_tensors="pt")["input_ids"][:, :TOKENS].to(model.device)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, use_cache=True, **{cache_name(type(model)): cache})
    cos, sin = _tables(torch.arange(TOKENS))
    rope = loaded.reading.rope.rope
    keys = [rope.unrotate(layer.keys[0].float().cpu(), cos, sin) for layer in cache.layers]
    return [loaded.tokenizer.decode(i) for i in ids[0]], keys


def _tables(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (positions, pairs), as the model's own rotary module computes them."""
    loaded = load()
    device = loaded.model.device
    tables = loaded.reading.rotary[0](torch.zeros(1, device=device), positions.to(device)[None])
    return tuple(loaded.reading.rope.compact(t)[0].float().cpu() for t in tables)


def example(layer: float = 8, head: float = 1, token: float = 24, position: float = 300, bits: str = "2") -> Example:
    """A key of the model, of one token of a fixed text, coded with the shipped codebook.

    Raises:
        ConfigError: a choice is out of its range.
    """
    if bits not in RATES:
        raise ConfigError(f"bits {bits!r}: expected one of {', '.join(RATES)}.")
    geometry = load().reading.geometry
    ranges = {
        "layer": (layer, geometry.num_hidden_layers), "head": (head, geometry.num_key_value_heads),
        "token": (token, TOKENS), "position": (position, FARTHEST + 1),
    }  # fmt: skip
    for name, (value, count) in ranges.items():
        if value is None or not 0 <= value < count:
            raise ConfigError(f"{name} {value}: expected 0 to {count - 1:,}.")
    layer, head, token = int(layer), int(head), int(token)
    book: SignBook = make_cache(load().model, {"bits": float(bits)}).codebook.layers[layer].keys.to("cpu")
    keys = _recorded()[1][layer][None, :, token : token + 1]
    codes = encode(keys, book)
    n = book.layout.bits[head]
    signs = unpack(codes, book.layout)[0, head, 0, :n]
    decoded = decode(codes, book)[0, head, 0]
    cos, sin = (t[0] for t in _tables(torch.tensor([int(position)])))
    rope = load().reading.rope.rope
    return Example(keys[0, head, 0], book.mean[head], decoded, signs, book.padded()[head, :n], rope, cos, sin)


def caption(made: Example, token: float, position: float) -> str:
    """What the picture shows, with its numbers, in markdown."""
    n, dim = len(made.signs), len(made.key)
    return (
        f"The key of token {int(token)}, `{_recorded()[0][int(token)].strip()}`: {dim} numbers, {16 * dim:,} bits in "
        f"fp16, are kept as **{n} signs, {n} bits** ({n / dim:g} an element for this head; the mean over heads is the "
        f"stated rate). The code leaves {made.error:.1%} of the key's squared distance from the mean. Rotating the "
        f"decoded key to position {int(position):,} and decoding with rotated vectors differ by at most "
        f"{made.commutes:.0e}, which is rounding: one codebook serves every position."
    )


def draw(made: Example, position: float) -> Figure:
    """Three panels, one below the other: the key and what its code reads as; the code; one pair rotated by RoPE."""
    figure = new_figure(5.6, 9.2)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=[3, 1.1, 5])
    elements = range(len(made.key))
    top.bar(elements, made.key, color="#c8c8c8", width=0.9, label="the key, before RoPE")
    top.plot(elements, made.decoded, "o", color=CODED, markersize=3, label="decoded: mean + signs · C")
    top.set_title("1. A key of one head", loc="left", size=10)
    top.set_xlabel("element")
    top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, fontsize=8, frameon=False)

    n, columns = len(made.signs), 64
    grid = torch.zeros(-(-n // columns) * columns)
    grid[:n] = made.signs
    middle.imshow(grid.view(-1, columns), cmap="PuOr", vmin=-1.6, vmax=1.6, aspect="auto")
    middle.set_title(f"2. Its code: {n} signs, one bit each", loc="left", size=10)
    middle.set(xticks=[], yticks=[])

    _draw_pair(bottom, made, int(position))
    return figure


def _draw_pair(axes: Any, made: Example, position: int) -> None:
    """The path of signed vectors in the plane of one RoPE pair, and the same path with every vector rotated."""
    re, im, _ = made.rope.split(made.key)
    turned = (made.cos - 1).hypot(made.sin)  # how far RoPE moves a point at distance 1
    pair = int((re.hypot(im) * (turned + 1e-3)).argmax())  # the pair that moves farthest

    def plane(x: torch.Tensor) -> torch.Tensor:
        re, im, _ = made.rope.split(x)
        return torch.stack([re[..., pair], im[..., pair]], -1)

    def turn(x: torch.Tensor) -> torch.Tensor:
        return made.rope.rotate(x, made.cos, made.sin)

    for change, alpha, label in ((lambda x: x, 0.45, "before RoPE"), (turn, 1.0, f"at position {position:,}")):
        steps = change(made.mean) + (made.signs[:, None] * change(made.vectors)).cumsum(0)
        path = plane(torch.cat([change(made.mean)[None], steps]))
        axes.plot(*path.T, color=CODED, linewidth=1, alpha=alpha)
        axes.plot(*path[-1], "o", color=CODED, markersize=7, alpha=alpha, label=f"decoded, {label}")
        axes.plot(*plane(change(made.key)), "x", color=EXACT, markersize=9, alpha=alpha, label=f"key, {label}")
    axes.plot(0, 0, "+", color="#888888")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(f"3. Pair {pair}: mean, then one signed vector after another", loc="left", size=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, fontsize=8, frameon=False)
