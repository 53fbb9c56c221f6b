"""Write the speed benchmark's tables into README.md: .venv/bin/python scripts/speed_table.py

One table for each benchmarks/results/speed_*.json that is named, or for all. With --check nothing is written: exit code
1 if the README does not say what these files say.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from readme_block import ROOT, update

sys.path.insert(0, str(ROOT / "src"))

from transformers_commvq.table import markdown_table

RESULTS = ROOT / "benchmarks" / "results"


def block(report: dict[str, Any], picture: str | None = None) -> str:
    """One file's table as markdown: tokens a second after the first of a generate(), and bytes at the longest context.

    picture: path of the plot, from the repository's root.
    """
    contexts = {int(tokens): data["methods"] for tokens, data in report["contexts"].items()}
    longest = max(contexts)
    names = [name for name in contexts[longest] if any(m[name]["rounds"] for m in contexts.values() if name in m)]
    head = ["decode, tokens a second", *(f"{tokens:,} tokens" for tokens in sorted(contexts)), f"cache at {longest:,}"]
    body = []
    for name in names:
        rows = [contexts[tokens].get(name, {}) for tokens in sorted(contexts)]
        speeds = [row.get("decode_tokens_per_s") for row in rows]
        size = rows[-1].get("cache_bytes")
        cells = ["" if speed is None else f"{speed:.1f}" for speed in speeds]
        body.append([name, *cells, "" if size is None else f"{size / 2**20:.1f} MiB"])
    where = report["device"] + (f", {report['threads']} threads" if report["threads"] else "")
    about = (
        f"{report['model']} in {report['dtype']} on {where}, batch {report['batch']}: `generate()` of {report['new']} "
        f"tokens, the caches in turns, median of {report['rounds']}; transformers {report['transformers']}, torch "
        f"{report['torch']}."
    )
    if report["not_here"]:
        about += f" Left out: {', '.join(report['not_here'])}."
    shown = ["", f"![Time of a decode step against the context]({picture})"] if picture else []
    return "\n".join([markdown_table(head, body), "", about, *shown]) + "\n"


def blocks(files: list[Path]) -> str:
    """All files' tables; nothing where nothing is recorded."""
    parts = []
    for file in files:
        plot = file.with_name(f"{file.stem}_step.png")
        parts.append(block(json.loads(file.read_text()), plot.relative_to(ROOT).as_posix() if plot.is_file() else None))
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="json files of benchmarks.speed (default: all results)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    args = parser.parse_args()
    files = [file.resolve() for file in args.files] or sorted(RESULTS.glob("speed_*.json"))
    return update("speed", "speed_table.py", blocks(files), args.check)


if __name__ == "__main__":
    sys.exit(main())
