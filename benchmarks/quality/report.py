"""A table and a plot of recorded results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers_commvq.table import markdown_table

from .methods import DESCRIPTIONS, OURS, PAPER

TOP = 1.2  # perplexities above this many times the uncompressed cache's are drawn at the edge, with their number
STYLES = {
    "quanto": ("#4292c6", "s"), "hqq": ("#41ab5d", "^"), "fp8": ("#9e9ac8", "D"), "kivi": ("#8c6d31", "v"),
    "turboquant": ("#7b7b7b", "P"), PAPER: ("#e7969c", "X"), OURS: ("#d62728", "o"),
}  # fmt: skip


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def table(results: dict[str, Any]) -> str:
    """Markdown, one line a method, by falling bits; above them the uncompressed cache, which all are compared with."""
    rows = {name: row for name, row in results["methods"].items() if "texts" in row}
    labels = list(next(iter(rows.values()))["texts"]) if rows else []
    head = ["cache", "bits an element"]
    head += [f"{label}: {what}" for label in labels for what in ("perplexity", "KL, nats")]
    plain = [next(iter(rows.values()))["texts"][label]["reference_perplexity"] for label in labels]
    body = [["uncompressed", "16.00", *(cell for value in plain for cell in (f"{value:,.2f}", ""))]] if rows else []
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["bits"]):
        cells = [name, f"{row['bits']:.2f}"]
        for label in labels:
            got = row["texts"][label]
            error = got["kl_standard_error"]
            cells += [
                f"{got['perplexity']:,.2f} ({_times(got['change'])})",
                f"{got['kl']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            ]
        body.append(cells)
    return markdown_table(head, body)


def _times(change: float) -> str:
    return f"{change:+.1%}" if change < 1 else f"{1 + change:,.0f} times"


def draw(file: Path) -> Path | None:
    """A plot beside the json file: change of perplexity, and KL, against bits. Nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed. Fix: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = read(file)
    labels = list(results["settings"]["texts"])
    figure, grid = pyplot.subplots(1, len(labels), figsize=(5.5 * len(labels), 4.6), squeeze=False)
    for axes, label in zip(grid[0], labels, strict=True):
        measured = (row["texts"][label] for row in results["methods"].values() if "texts" in row)
        plain = next(measured)["reference_perplexity"]
        top = plain * TOP
        axes.axhline(plain, color="#222222", lw=0.8, ls="--", label="uncompressed (16 bits)")
        for number, (kind, points) in enumerate(series(results, label).items()):
            color, marker = STYLES[kind]
            bits, perplexity = zip(*points, strict=True)
            axes.plot(
                bits, [min(p, top) for p in perplexity], color=color, marker=marker, lw=2 if kind == OURS else 1.2,
                label=DESCRIPTIONS[kind], zorder=3 if kind == OURS else 2, clip_on=False,
            )  # fmt: skip
            for x, y in points:
                if y > top:
                    place = (0, -12 - 9 * number)  # below the edge, one line a kind
                    axes.annotate(f"{y:,.0f}", (x, top), place, textcoords="offset points", fontsize=7, color=color)
        axes.set_ylim(top=top)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 1.5, 2, 3, 4, 5, 8], ["1", "1.5", "2", "3", "4", "5", "8"])
        axes.set_xlabel("bits an element, all that is stored counted")
        axes.set_title(label, fontsize=10)
        axes.grid(True, which="both", alpha=0.25)
    grid[0][0].set_ylabel("perplexity")
    grid[0][-1].legend(fontsize=7)
    figure.suptitle(f"{results['settings']['model'].split('/')[-1]}, held-out text", fontsize=10)
    figure.tight_layout()
    made = file.with_suffix(".png")
    figure.savefig(made, dpi=120)
    pyplot.close(figure)
    return made


def series(results: dict[str, Any], label: str) -> dict[str, list[tuple[float, float]]]:
    """Kind of method -> (bits, perplexity) by rising bits, on one text."""
    out: dict[str, list[tuple[float, float]]] = {}
    for name, row in results["methods"].items():
        kind = name.partition("-")[0]
        if kind in STYLES and "texts" in row:
            out.setdefault(kind, []).append((row["bits"], row["texts"][label]["perplexity"]))
    return {kind: sorted(points) for kind, points in out.items()}
