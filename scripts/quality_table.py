"""Write the quality benchmark's table into README.md: .venv/bin/python scripts/quality_table.py

With --check nothing is written: exit code 1 if the README does not say what the json in benchmarks/results says.
"""

import argparse
import sys

from readme_block import ROOT, update

sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.quality import report  # noqa: E402 (needs the path above)

RESULTS = ROOT / "benchmarks" / "results" / "quality-smollm2.json"


def block(results: dict) -> str:
    """The table and the plot as markdown; nothing where nothing is recorded."""
    if not results["methods"]:
        return ""
    settings = results["settings"]
    texts = " and ".join(
        f"{text['windows']} window{'s' * (text['windows'] > 1)} of {settings['length']:,} tokens of {label}"
        for label, text in settings["texts"].items()
    )
    about = (
        f"Measured by `python -m benchmarks.quality`: {settings['model'].split('/')[-1]} on {texts}, held out, in "
        f"chunks of {settings['chunk']} through each cache. Bits count every tensor that grows with the text. "
        "[docs/benchmarks.md](docs/benchmarks.md#quality) says what each cache is."
    )
    picture = f"![Perplexity against bits an element]({RESULTS.relative_to(ROOT).with_suffix('.png')})"
    return "\n".join([report.table(results), "", about, "", picture]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    args = parser.parse_args()
    return update("quality", "quality_table.py", block(report.read(RESULTS)), args.check)


if __name__ == "__main__":
    sys.exit(main())
