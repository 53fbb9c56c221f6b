"""What ``learn`` draws beside a codebook: see cards.PICTURES."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from ..cards import PICTURES
from ..codebook import Codebook

Curves = Mapping[str, Mapping[str, list[list[float]]]]  # layer -> keys or values -> head -> round -> relative error


def draw(folder: Path, book: Codebook, curves: Curves) -> dict[Path, str]:
    """Draw all pictures into a codebook's folder; none without matplotlib. Returns what each file shows."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    bits, loss = (folder / name for name in PICTURES)
    _heat_map(bits, book)
    _loss_curves(loss, curves)
    return {bits: "bits of every head", loss: "error of every head, round by round"}


def _heat_map(path: Path, book: Codebook) -> None:
    """Bits an element, layers by heads, keys beside values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 0.5 * next(iter(book.layers.values())).keys.heads, 1.5 + 0.18 * len(book.layers)))
    layers = list(book.layers)
    tables = {s: [[n / getattr(b, s).head_dim for n in getattr(b, s).bits_per_head] for b in book.layers.values()]
              for s in ("keys", "values")}  # fmt: skip
    top = max(max(map(max, table)) for table in tables.values())
    for place, (side, table) in enumerate(tables.items(), 1):
        axes = figure.add_subplot(1, 2, place)
        image = axes.imshow(table, aspect="auto", vmin=0, vmax=top, cmap="viridis")
        axes.set_title(side)
        axes.set_xlabel("KV head")
        axes.set_xticks(range(len(table[0])))
        axes.set_yticks(range(0, len(layers), max(1, len(layers) // 10)))
        axes.set_yticklabels(layers[:: max(1, len(layers) // 10)])
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=figure.axes, label="bits an element")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _loss_curves(path: Path, curves: Curves) -> None:
    """Error of every head relative to its spread, from the start (0) round by round, keys beside values."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, side in zip(panels, ("keys", "values"), strict=True):
        for place, heads in enumerate(curves.values()):
            colour = colormaps["viridis"](place / max(1, len(curves) - 1))
            for curve in heads[side]:
                axes.plot(range(len(curve)), curve, color=colour, linewidth=0.8, alpha=0.7)
        axes.set_title(f"{side} (dark: first layers)")
        axes.set_xlabel("round")
        axes.set_yscale("log")
    panels[0].set_ylabel("relative error")
    figure.savefig(path, dpi=120, bbox_inches="tight")
