"""The quality tab: what the project's benchmarks recorded, and the cards of its codebooks.

What is not there is not shown.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from style import safe, table

from transformers_commvq import ConfigError

HERE = Path(__file__).parent
ROOT = HERE if (HERE / "benchmarks").is_dir() else HERE.parent  # a Space holds copies; a checkout, the folders
CARD_SECTIONS = ("Memory", "Quality")


def names(root: Path = ROOT) -> list[str]:
    """The recordings that are there."""
    return list(_sources(root))


def show(name: str, root: Path = ROOT) -> tuple[str, str]:
    """(markdown, html) of one recording: what was measured, tables and plots.

    Raises:
        ConfigError: no such recording.
    """
    sources = _sources(root)
    if name not in sources:
        raise ConfigError(f"{name!r}: expected one of {', '.join(sources) or 'none: nothing is recorded'}.")
    file = sources[name]
    if file.suffix == ".md":
        return _card(file.read_text()), _pictures(sorted(file.parent.glob("*.png")))
    report = json.loads(file.read_text())
    pictures = file.parent.glob("*.png" if file.stem == "demo" else f"{file.stem}*.png")
    return _about(report), "".join(_tables(report)) + _pictures(sorted(pictures))


def _sources(root: Path) -> dict[str, Path]:
    found = {}
    if (demo := root / "benchmarks" / "demo" / "demo.json").is_file():
        found["make demo"] = demo
    for file in sorted((root / "benchmarks" / "results").glob("*.json")):
        if _tables(json.loads(file.read_text())):
            found[f"Benchmark: {re.sub('[-_]+', ' ', file.stem)}"] = file
    for card in sorted((root / "hub_cards").glob("*/README.md")):
        found[f"Codebook: {card.parent.name}"] = card
    return found


def _tables(report: dict[str, Any]) -> list[str]:
    """A recording's numbers; empty for one of a kind that is not known here, or that has no numbers yet."""
    if isinstance(report.get("caches"), dict):  # of transformers-commvq eval
        rows = {name: row for name, row in report["caches"].items() if "passkey" in row}
        return [table("Passkeys found", [_passkey_row(name, row) for name, row in rows.items()])] if rows else []
    if "caches" in report:
        return [table("The measurements", [_demo_row(row) for row in report["caches"]])]
    if "contexts" in report:
        return [
            table(f"{int(tokens):,} tokens", [_speed_row(name, row) for name, row in context["methods"].items()])
            for tokens, context in report["contexts"].items()
        ]
    rows = {name: row for name, row in report.get("methods", {}).items() if "texts" in row}
    return [table("Quality", [_quality_row(name, row) for name, row in rows.items()])] if rows else []


def _demo_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "cache": row["name"],
        "size": f"{row['nbytes'] / 2**20:.1f} MiB",
        "of fp16": f"{row['ratio']:.1%}",
        "answer": "right" if row["right"] else "wrong",
        "perplexity": f"{row['perplexity']:.2f}",
        "KL to plain": "" if row["kl"] is None else f"{row['kl']:.3f}",
        "decoding": f"{row['decode']:.1f} tokens/s",
    }


def _passkey_row(name: str, row: dict[str, Any]) -> dict[str, str]:
    cells = {"cache": name, "bits an element": f"{row['bits']:.2f}"}
    for length, found in row["passkey"].items():
        cells[f"{int(length):,} tokens"] = f"{sum(found.values()) / len(found):.0%}"
    return cells


def _speed_row(name: str, row: dict[str, Any]) -> dict[str, str]:
    """Of what one method has; a method that failed has less."""

    def cell(key: str, scale: float, form: str) -> str:
        return form.format(row[key] * scale) if row.get(key) is not None else "not measured"

    return {
        "cache": name,
        "decode step": cell("step_s", 1e3, "{:.2f} ms"),
        "generate": cell("tokens_per_s", 1, "{:.1f} tokens/s"),
        "prefill": cell("prefill_s", 1, "{:.2f} s"),
        "cache size": cell("cache_bytes", 2**-20, "{:.1f} MiB"),
    }


def _quality_row(name: str, row: dict[str, Any]) -> dict[str, str]:
    cells = {"cache": name, "bits an element": f"{row['bits']:.2f}"}
    for text, got in row["texts"].items():
        cells[f"{text}: perplexity"] = f"{got['perplexity']:.3f} ({got['change']:+.1%})"
        cells["KL, nats" if len(row["texts"]) == 1 else f"{text}: KL, nats"] = f"{got['kl']:.4f}"
    return cells


def _about(report: dict[str, Any]) -> str:
    """On what it was measured: the recording's plain facts, in one paragraph."""
    facts = {**report, **report.get("about", {}), **report.get("settings", {})}
    plain = {k: v for k, v in facts.items() if isinstance(v, (str, int, float)) and not isinstance(v, bool)}
    return "Measured with " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items()) + "."


def _card(text: str) -> str:
    """The sections of a model card that hold numbers."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    kept = [part for part in sections if part.split("\n", 1)[0].strip() in CARD_SECTIONS]
    return re.sub(r"!\[[^\]]*\]\([^)]*\)", "", "### " + "\n### ".join(kept)) if kept else ""


def _pictures(files: list[Path]) -> str:
    """Plots within the page, one below the other."""
    out = []
    for file in files:
        data = base64.b64encode(file.read_bytes()).decode()
        label = safe(file.stem.replace("_", " "))
        out.append(
            f'<div class="drawing" style="max-width:760px"><img alt="{label}" src="data:image/png;base64,{data}"></div>'
        )
    return "".join(out)
