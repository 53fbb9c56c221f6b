"""A part of README.md that a script writes: what stands between two comments."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def with_block(readme: str, name: str, script: str, text: str) -> str:
    """The README with another text between ``name``'s comments. script: file name of the script that writes it."""
    begin, end = f"<!-- {name}: begin; written by scripts/{script} -->\n", f"<!-- {name}: end -->"
    before, rest = readme.split(begin)
    return before + begin + text + end + rest.split(end)[1]


def update(name: str, script: str, text: str, check: bool) -> int:
    """Write the block. With check nothing is written: 1 if the README says something else, else 0."""
    old = README.read_text()
    new = with_block(old, name, script, text)
    if not check:
        README.write_text(new)
    return int(check and old != new)
