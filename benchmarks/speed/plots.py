"""Two plots of a recorded run: the time of a decode step, and memory, against the length of the context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLORS = {
    "dynamic": "#222222", "flash": "#888888", "quanto-4": "#9ecae1", "quanto-2": "#4292c6", "hqq-4": "#a1d99b",
    "hqq-2": "#41ab5d", "fp8": "#9e9ac8", "commvq-2": "#fd8d3c", "commvq-1": "#d62728",
}  # fmt: skip


def draw(file: Path) -> list[Path]:
    """Plots beside a json file of run_models; returns them. Nothing, with a word, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed. Fix: pip install matplotlib")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    report = json.loads(file.read_text())
    made = []
    for what, label, scale in (
        ("step_s", "one decode step, ms", 1e3),
        ("cache_bytes", "cache, MB", 1e-6),
        ("peak_bytes", "peak beyond the weights while generating, GB", 1e-9),
    ):
        lines = series(report, what)
        if not lines:
            continue
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for name, points in lines.items():
            tokens, values = zip(*points, strict=True)
            axes.plot(tokens, [v * scale for v in values], marker="o", ms=4, label=name, color=COLORS.get(name))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel(label)
        axes.set_title(f"{report['model']}, {report['dtype']}\n{report['device']}", fontsize=10)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize=8, ncols=2)
        figure.tight_layout()
        made.append(file.with_name(f"{file.stem}_{what.rsplit('_', 1)[0]}.png"))
        figure.savefig(made[-1], dpi=120)
        pyplot.close(figure)
        print(f"drew {made[-1]}")
    return made


def series(report: dict[str, Any], what: str) -> dict[str, list[tuple[int, float]]]:
    """Method -> (tokens, value) of every context in which it has one."""
    out: dict[str, list[tuple[int, float]]] = {}
    for context, data in sorted(report["contexts"].items(), key=lambda item: int(item[0])):
        for name, row in data["methods"].items():
            if row.get(what):
                out.setdefault(name, []).append((int(context), row[what]))
    return out
