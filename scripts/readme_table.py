"""Write the demo's numbers into README.md: make demo && .venv/bin/python scripts/readme_table.py out

Copies the folder's demo.json and cache_size.png to benchmarks/demo/ and rewrites the README's block from the copy.
With --check nothing is written: exit code 1 if the README does not say what benchmarks/demo/demo.json says.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from readme_block import ROOT, update

KEPT = ROOT / "benchmarks" / "demo"


def block(numbers: dict) -> str:
    """The table as markdown, from what the demo wrote."""
    about, caches = numbers["about"], numbers["caches"]
    plain = caches[0]
    lines = [
        f"| cache, {plain['tokens']:,} tokens | size | of fp16 | answer | perplexity | KL to plain | decode tok/s |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for row in caches:
        name = f"plain, {about['dtype']}" if row is plain else f"commvq, {row['name']}"
        change = "" if row is plain else f" ({row['perplexity'] / plain['perplexity'] - 1:+.1%})"
        kl = "" if row["kl"] is None else f"{row['kl']:.3f}"
        lines.append(
            f"| {name} | {row['nbytes'] / 2**20:.1f} MiB | {row['ratio']:.1%} | {'right' if row['right'] else 'wrong'} "
            f"| {row['perplexity']:.2f}{change} | {kl} | {row['decode']:.1f} |"
        )
    text = (
        f"Measured by `make demo`: {about['model'].split('/')[-1]} in {about['dtype']} on {about['device']}, "
        f"a question on a prompt of {about['prompt_tokens']:,} tokens; perplexity on {about['held_tokens']:,} others. "
        "Sizes count every tensor the cache holds. Speeds are one run on one machine."
    )
    return "\n".join([*lines, "", text]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "out", help="what the demo wrote")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    args = parser.parse_args()
    if not args.check:
        KEPT.mkdir(parents=True, exist_ok=True)
        for name in ("demo.json", "cache_size.png"):
            shutil.copyfile(args.folder / name, KEPT / name)
    return update("demo", "readme_table.py", block(json.loads((KEPT / "demo.json").read_text())), args.check)


if __name__ == "__main__":
    sys.exit(main())
