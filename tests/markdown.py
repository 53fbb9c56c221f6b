"""The project's pages, taken apart: code blocks, links and headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])

_BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block. excuse: why it cannot run in a test, as the comment in front of it says, or None."""

    language: str
    code: str
    excuse: str | None


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[Block]:
    found = (Block(kind, code, excuse or None) for excuse, kind, code in _BLOCK.findall(page.read_text()))
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _BLOCK.sub("", page.read_text())


def links(page: Path) -> list[str]:
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What ``#...`` may point to, made from headings as GitHub makes it."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(prose(page)))
    return {heading.replace(" ", "-") for heading in plain}


def shell_lines(page: Path) -> list[str]:
    """The command lines of a page, comments and prompts left out; a line that ends in a backslash goes on."""
    code = "\n".join(block.code for block in blocks(page, "sh")).replace("\\\n", " ")
    return [line.strip() for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
