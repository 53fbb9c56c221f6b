"""What the package says when something is wrong: the texts in its source, with ``…`` for what is filled in."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FILLED = "…"


def texts(folder: Path) -> list[str]:
    """Every string of a folder's modules, those of neighbouring lines joined."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (text := _text(node)) is not None:
                found.append(re.sub(r"\{\w+\}|%[sg]", FILLED, text))
    return found


def error_classes(folder: Path) -> set[str]:
    """Names of the exceptions that a folder's modules define."""
    trees = [ast.parse(path.read_text()) for path in folder.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name for node in classes if node.name.endswith("Error")}


def raised(folder: Path) -> set[tuple[str, str]]:
    """(exception, text) of every ``raise`` whose text stands in it."""
    out = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                first = node.exc.args[0]
                while isinstance(first, ast.BinOp):
                    first = first.left
                if (text := _text(first)) is not None:
                    out.add((getattr(node.exc.func, "id", ""), text))
    return out


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else FILLED for v in node.values)
    return None
