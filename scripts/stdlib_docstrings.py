"""Prints the longer docstrings of Python's standard library: calibration text of a third kind, at hand anywhere.

python scripts/stdlib_docstrings.py > python-docstrings.txt
"""

import ast
import sysconfig
from pathlib import Path

SHORTEST = 200  # characters


def docstrings():
    """Docstrings of the top-level modules and of everything in them, modules by name."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > SHORTEST:
                    yield text


if __name__ == "__main__":
    print("\n\n".join(docstrings()))
