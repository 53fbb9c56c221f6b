"""The architecture: every module has a layer, and imports point to lower ones."""

import ast
from pathlib import Path

import pytest

import transformers_commvq

PACKAGE = Path(transformers_commvq.__file__).parent

LAYERS = {
    "config": 0,
    "rope": 1,
    "packing": 1,
    "table": 1,
    "samples": 1,
    "text": 1,
    "positions": 2,
    "index_book": 2,
    "codebook": 3,
    "ops": 4,
    "geometry": 4,
    "traced_attention": 4,
    "calibration": 5,
    "em": 5,
    "learning": 6,
    "storage": 5,
    "estimate": 5,
    "layer": 5,
    "evaluation": 6,
    "tasks": 6,
    "cards": 6,
    "processes": 7,
    "recipe": 7,
    "cache": 6,
    "hub": 7,
    "attention": 7,
    "publish": 8,
    "paper_import": 9,
    "integration": 8,
    "loading": 9,
    "contenders": 9,
    "": 10,  # the package itself: the public names
    "demo_text": 11,
    "demo_model": 11,
    "demo_report": 11,
    "demo": 11,
    "cli": 12,
    "__main__": 13,
}
# Within these, modules may import each other; elsewhere only lower layers.
FREE = {"ops", "cli"}
DEMO = {"demo", "demo_model", "demo_report", "demo_text"}
# An upgrade of transformers touches these files only.
MAY_IMPORT_TRANSFORMERS = {
    "config",  # QuantizationConfigMixin
    "geometry",
    "calibration",
    "storage",
    "evaluation",
    "tasks",
    "contenders",
    "processes",
    "estimate",
    "loading",
    "layer",
    "cache",
    "attention",
    "integration",
    "demo_model",
    "demo",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def part(path):
    """The name a file goes by in LAYERS."""
    first = path.relative_to(PACKAGE).parts[0]
    name = first.removesuffix(".py")
    return "" if name == "__init__" else name


def imports(path, everywhere=True):
    """Modules a file imports, as (dots, name): also inside functions if ``everywhere``, but not for type checkers."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if everywhere else tree.body
    hints = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in nodes:
        if node in hints:
            continue
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.level, node.module
            else:
                yield from ((node.level, alias.name) for alias in node.names)


def own_imports(path):
    """The parts of this package that a file imports."""
    depth = len(path.relative_to(PACKAGE).parts)
    for level, name in imports(path):
        if level == depth:
            target = name.split(".")[0]
            yield target if (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").is_file() else ""
        elif 0 < level < depth:
            yield part(path)
        elif level == 0 and name.split(".")[0] == PACKAGE.name:
            yield name.partition(".")[2].split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_to_lower_layers(path):
    mine = part(path)
    assert mine in LAYERS, f"{mine} has no layer: give it one here"
    for target in own_imports(path):
        allowed = LAYERS[target] < LAYERS[mine] or (target == mine and mine in FREE) or {target, mine} <= DEMO
        assert allowed, f"{mine} (layer {LAYERS[mine]}) imports {target or 'the package'} (layer {LAYERS[target]})"


def test_layers_name_only_what_exists():
    assert set(LAYERS) == {part(p) for p in FILES}


def test_transformers_is_imported_in_few_files():
    found = {part(p) for p in FILES if any(n.split(".")[0] == "transformers" for _, n in imports(p, everywhere=False))}
    assert found <= MAY_IMPORT_TRANSFORMERS


def test_modules_are_small_enough_to_read():
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert not long
