"""How the page looks. System fonts and drawings within the page: it asks no other server for anything."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence

import gradio as gr
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
THEME = gr.themes.Default(primary_hue="blue", font=FONT, font_mono=MONO)
# Told apart by colour-blind eyes too.
COLORS = {
    "fp16": "#4d4d4d", "FP8": "#e69f00", "int4": "#cc79a7", "CommVQ 3-bit": "#56b4e9", "CommVQ 2-bit": "#0072b2",
    "CommVQ 1.5-bit": "#009e73", "CommVQ 1-bit": "#d55e00",
}  # fmt: skip

HEADING = """# CommVQ: the KV cache in 2 bits or 1
The keys and values of a language model, stored as learned signs: up to 16 times smaller, weights untouched.
[Paper](https://arxiv.org/abs/2506.18879) · `pip install transformers-commvq`"""

CSS = """
.gradio-container { max-width: 1180px !important; margin: auto; }
.drawing { background: white; border-radius: 8px; padding: 4px; }
.drawing svg, .drawing img { display: block; width: 100%; height: auto; margin: auto; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 8em; }
.answer mark { background: #ffd54d; color: black; border-radius: 3px; }
.numbers { overflow-x: auto; width: 0; min-width: 100%; margin-bottom: 12px; }
.numbers table { width: 100%; margin: 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.numbers table, .numbers thead, .numbers tr { border: 0 !important; }
.numbers th, .numbers td {
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  padding: 3px 8px; text-align: right; white-space: nowrap;
}
.numbers th { white-space: normal; vertical-align: bottom; }
.numbers th:first-child, .numbers td:first-child { text-align: left; }
@media (max-width: 480px) {
  .tab-container button { padding: 0 7px; font-size: 14px; }
  .numbers table { font-size: 13px; }
  .numbers th, .numbers td { padding: 3px 5px; }
}
"""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches; no pyplot: nothing global, no display."""
    matplotlib.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(width, height), layout="constrained")


def labels_beside(axes: Axes, ends: dict[str, tuple[float, str]], inside: bool = False) -> None:
    """Name lines at their right ends (or, inside, above them at the left), moved apart where they would overlap.

    ends: name -> (height, colour). The axes' limits must be set; heights may be logarithmic.
    """
    low, high = axes.get_ylim()

    def place(y: float) -> float:
        """Share of the axes' height at which a value stands."""
        if axes.get_yscale() == "log":
            return math.log(y / low) / math.log(high / low)
        return (y - low) / (high - low)

    least, last = 0.047, -1.0  # shares of the axes' height
    for name, (y, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        last = max(place(y), last + least)
        at = (0.01, last + 0.005) if inside else (1.01, last)
        axes.text(
            *at, name, color=color, transform=axes.transAxes, size=7.5 if inside else 9, clip_on=False,
            va="bottom" if inside else "center", fontweight="normal" if inside else "bold",
        )  # fmt: skip


def drawing(figure: Figure, description: str) -> str:
    """A figure as html that scales with the page; ``description`` is read to those who do not see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # names other servers; nothing asks them
    widest = round(figure.get_figwidth() * 120)
    return f'<div class="drawing" role="img" aria-label="{description}" style="max-width:{widest}px">{svg}</div>'


def table(title: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as an html table that scrolls within itself where the page is narrow."""
    head = "".join(f"<th>{safe(name)}</th>" for name in rows[0]) if rows else ""
    body = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return (
        f'<div class="numbers"><strong>{safe(title)}</strong><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def safe(text: str) -> str:
    """Text as html; ``gr.HTML`` fills in templates, so their braces are written as entities too."""
    return html.escape(str(text)).translate({ord(c): f"&#{ord(c)};" for c in "{}$`"})
