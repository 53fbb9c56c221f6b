"""The documentation holds: its code runs, its commands parse, its links lead somewhere, its quotes are real."""

import importlib
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import markdown
import messages
import pytest
from markdown import PAGES, ROOT
from test_layering import LAYERS

from transformers_commvq import cli, demo_model

PYTHON_PAGES = [p for p in PAGES if p.name != "README.md"]  # tests/test_readme.py runs the README's
WITH_PYTHON = [p for p in PYTHON_PAGES if any(b.excuse is None for b in markdown.blocks(p, "python"))]
COMMANDS = [(page, line) for page in PAGES for line in markdown.shell_lines(page)]


def ids(values):
    return [markdown.name(v) if isinstance(v, Path) else f"{markdown.name(v[0])}: {v[1]}" for v in values]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=ids(WITH_PYTHON))
def test_python_blocks_run(page, smollm2_folder, tmp_path, monkeypatch, capsys):
    """In order, in one namespace, as a reader would; a local folder stands where the Hub's model would be."""
    place = tmp_path / demo_model.BASE_MODEL
    place.parent.mkdir(parents=True)
    place.symlink_to(smollm2_folder)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, block in enumerate(markdown.blocks(page, "python")):
        if block.excuse is None:
            exec(compile(block.code, f"{page.name}, Python block {number}", "exec"), names)


def test_what_is_not_run_at_least_compiles():
    left = [(p, b) for p in PAGES for b in markdown.blocks(p, "python") if b.excuse]
    for page, block in left:
        compile(block.code, markdown.name(page), "exec")


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=ids(COMMANDS))
def test_commands_parse(page, line, monkeypatch):
    """Every command line is one that the program it names would take."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]  # variables of the environment
    if words[:2] == ["optimum-cli", "commvq"]:
        words = words[1:]
        words[0] = cli.PROGRAM
    if words[0] in ("pip", "git", "cd", "hf", "export", "bash"):
        return
    if cli.PROGRAM in words:  # alone, or behind a launcher
        args = words[words.index(cli.PROGRAM) + 1 :]
        if args in (["--version"], ["--help"]):
            return
        assert callable(cli.build_parser().parse_args(args).run)
    elif words[0] == "transformers":  # transformers' own command
        assert words[1] in ("chat", "serve")
    elif words[0] == "python" and words[1] == "-c":
        compile(words[2], markdown.name(page), "exec")
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        for target in targets:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make has no target {target}"
    elif "-m" in words:  # behind python or a launcher
        _check_module(words[words.index("-m") + 1], words[words.index("-m") + 2 :])
    elif Path(words[0]).name.startswith("python") and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
        if words[1].startswith("examples/"):
            monkeypatch.syspath_prepend(str(ROOT / "examples"))
            runpy.run_path(str(ROOT / words[1]))["build_parser"]().parse_args(words[2:])
    else:
        pytest.fail(f"no test knows what {words[0]} takes")


def _check_module(module, args):
    if module in ("pip", "pytest", "venv"):
        return
    if module == "transformers_commvq":
        assert callable(cli.build_parser().parse_args(args).run)
        return
    path = ROOT.joinpath(*module.split("."))
    path = path if path.parent != ROOT else ROOT / "src" / module
    assert (path / "__main__.py").is_file() or path.with_suffix(".py").is_file(), f"there is no module {module}"
    if module == "benchmarks.speed":
        sys.path.insert(0, str(ROOT))
        from benchmarks.speed.cli import arguments

        arguments(args)
    if module in ("benchmarks.authors_kernels", "benchmarks.proof_24gb"):
        sys.path.insert(0, str(ROOT))
        importlib.import_module(module).build_parser().parse_args(args)
    if module == "benchmarks.quality":
        sys.path.insert(0, str(ROOT))
        from benchmarks.quality.cli import build_parser

        build_parser().parse_args(args)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page):
    for link in markdown.links(page):
        if re.match(r"[a-z]+:", link):
            continue  # the web is not asked
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in markdown.anchors(target), f"{link}: no such heading"


def test_a_wrong_page_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title, `code`\n\n[a](#a-title-code) [b](b.md)\n\n<!-- not run: why -->\n```python\n1\n```\n\n"
        "```sh\n# note\nmake \\\n  demo\n```\n"
    )
    assert markdown.blocks(page, "python") == [markdown.Block("python", "1\n", "why")]
    assert markdown.shell_lines(page) == ["make    demo"]
    assert markdown.links(page) == ["#a-title-code", "b.md"]
    assert markdown.anchors(page) == {"a-title-code"}


def test_design_names_the_layers():
    table = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "docs" / "design.md").read_text(), flags=re.MULTILINE)
    listed = {}
    for layer, modules in table:
        for module in [""] if modules == "the package" else re.findall(r"`(\w+)`", modules):
            listed[module] = int(layer)
    assert listed == LAYERS, "docs/design.md, Layers, is not what tests/test_layering.py says"


def test_quickstart_names_the_extras():
    table = (ROOT / "docs" / "quickstart.md").read_text().split("| extra |")[1].split("\n\n")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == set(extras) - {"test", "space"}


TROUBLE = ROOT / "docs" / "troubleshooting.md"
SOURCE = ROOT / "src" / "transformers_commvq"


def test_quoted_messages_are_in_the_source():
    quoted = re.findall(r"^\| `(.+?)` \|", TROUBLE.read_text(), flags=re.MULTILINE)
    assert len(quoted) > 100
    known = messages.texts(SOURCE)
    missing = [quote for quote in quoted if not any(quote.strip() in text for text in known)]
    assert not missing


def test_every_error_has_its_place():
    """Every exception is named, and of the messages of each at least nine in ten are quoted, in part at least."""
    page = TROUBLE.read_text()
    assert not {name for name in messages.error_classes(SOURCE) if f"`{name}`" not in page}
    quotes = re.findall(r"`([^`\n]{8,})`", page)
    raised = {text for name, text in messages.raised(SOURCE) if name.endswith("Error") and name != "ValueError"}
    untold = sorted(text for text in raised if not any(quote.strip() in text for quote in quotes))
    assert len(untold) <= 0.1 * len(raised), untold
