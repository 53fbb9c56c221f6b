"""How the demo shows what it measured: text in the terminal, a picture and a json file in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .demo_text import FACT, Prompt

if TYPE_CHECKING:
    from .demo import Measured

console = Console(width=None if Console().is_terminal else 110, highlight=False)
NUMBERS, PICTURE = "demo.json", "cache_size.png"
_COLORS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by colour-blind eyes too


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def introduce(about: dict[str, Any], prompt: Prompt) -> None:
    """Say what will be done, on what."""
    console.print(f"\n[bold]{about['model']}[/bold] in {about['dtype']} on {about['device']}")
    console.print(
        f"The prompt: {about['prompt_tokens']:,} tokens of Python's own documentation with one sentence of ours among "
        f"them:\n  [italic]{FACT}[/italic]\nand at its end the question:\n  [italic]{prompt.question}[/italic]\n"
    )


@contextmanager
def progress(stages: int) -> Iterator[Callable[[str], None]]:
    """A bar over the stages; yields the function that begins the next one. Without a terminal, a line a stage."""
    if not console.is_terminal:
        begun = iter(range(1, stages + 1))
        yield lambda text: console.print(f"[{next(begun)}/{stages}] {text} ...", markup=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=stages)
        begun = iter(range(stages))
        yield lambda text: bar.update(task, description=text, completed=next(begun))


def show(about: dict[str, Any], rows: list[Measured]) -> None:
    """The answers side by side, the table, and what to know when reading it."""
    answers = Table(title="The answers", title_justify="left", title_style="bold", show_lines=False)
    for row in rows:
        answers.add_column(f"{row.name} cache", ratio=1)
    answers.add_row(*(row.answer for row in rows))
    answers.add_row(*("[green]found the fact[/green]" if row.right else "[red]missed the fact[/red]" for row in rows))
    console.print(answers, "")

    table = Table(title="The measurements", title_justify="left", title_style="bold")
    table.add_column("cache")
    for heading in ("size", "of fp16", "perplexity", "KL to plain", "prefill tok/s", "decode tok/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*cells(row, rows[0]))
    console.print(table)
    grid = Table.grid(padding=(0, 2))
    for term, explanation in notes(about, rows):
        grid.add_row(f"[bold]{term}[/bold]", explanation)
    console.print(grid)


def cells(row: Measured, plain: Measured) -> list[str]:
    """One row of the table as text."""
    change = "" if row is plain else f" ({row.perplexity / plain.perplexity - 1:+.1%})"
    return [
        row.name,
        mib(row.nbytes),
        f"{row.ratio:.1%}",
        f"{row.perplexity:.2f}{change}",
        "-" if row.kl is None else f"{row.kl:.4f}",
        f"{row.prefill:.0f}",
        f"{row.decode:.1f}",
    ]


def notes(about: dict[str, Any], rows: list[Measured]) -> list[tuple[str, str]]:
    """What the numbers are and are not: (column, explanation)."""
    books = ", ".join(f"{row.name}: {mib(row.codebook_bytes)}" for row in rows[1:])
    return [
        (
            "size",
            f"every tensor the cache holds after the answer, {rows[0].tokens:,} tokens; the first "
            f"{about['sink_tokens']} and the newest {about['residual_length']} or more of them stay in "
            f"{about['dtype']}. The codebooks belong to the model like weights, one copy for all caches ({books}), and "
            "are not counted.",
        ),
        ("of fp16", "against 16 bits for every key and value element of those tokens."),
        (
            "perplexity, KL",
            f"on {about['held_tokens']:,} other tokens of documentation, passed through the cache {about['chunk']} "
            "at a time; KL in nats a token, 0 is the plain cache. One passage: small changes mean little.",
        ),
        (
            "speeds",
            f"on this machine ({about['device']}), one run; decoding is the median step, at the prompt's length.",
        ),
        ("all", f"measured in this run, in {about['seconds']:.0f} s."),
    ]


def save(about: dict[str, Any], rows: list[Measured], folder: Path) -> None:
    """Write the picture and the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NUMBERS).write_text(json.dumps({"about": about, "caches": [r.to_dict() for r in rows]}, indent=2) + "\n")
    picture(about, rows).savefig(folder / PICTURE, dpi=150)
    console.print(f"\nWritten: {folder / PICTURE} and {folder / NUMBERS}")


def picture(about: dict[str, Any], rows: list[Measured]) -> Figure:
    """Cache size against context length: measured points, the line between them, and the line they lead on to."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")  # no pyplot: nothing global, no display
        axes = figure.subplots()
    end = 2 * max(row.tokens for row in rows)
    for row, color in zip(rows, _COLORS * len(rows), strict=False):
        tokens, sizes = zip(*((t, b / 2**20) for t, b in row.sizes), strict=True)
        axes.plot(tokens, sizes, "-", color=color, linewidth=1.5)
        axes.plot(tokens, sizes, "o", color=color, markersize=3.5)
        slope = (sizes[-1] - sizes[-2]) / (tokens[-1] - tokens[-2])
        last = sizes[-1] + slope * (end - tokens[-1])
        axes.plot([tokens[-1], end], [sizes[-1], last], "--", color=color, linewidth=1)
        name = f"plain, {about['dtype']}" if row is rows[0] else row.name
        axes.annotate(f" {name}", (end, last), color=color, va="center", annotation_clip=False)
    axes.set(xlim=(0, end), ylim=(0, None), xlabel="tokens in the cache", ylabel="MiB, every tensor the cache holds")
    model = about["model"].split("/")[-1]
    axes.set_title(f"KV cache of {model}: measured (dots), extended (dashes)", loc="left", size=11)
    axes.grid(alpha=0.25)
    return figure
