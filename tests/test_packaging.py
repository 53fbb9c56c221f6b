"""What is in the wheel and the source distribution, and what importing the package does."""

import ast
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import transformers_commvq

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "transformers_commvq"

pytest.importorskip("hatchling", reason="hatchling is not installed")


def build(kind, folder):
    program = f"from hatchling.build import build_{kind}; print(build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel"))) as archive:
        yield archive


def shipped():
    """Files of the package that are not Python: codebooks, registry, templates."""
    found = [p for p in SOURCE.rglob("*") if p.is_file() and p.suffix != ".py"]
    return [p for p in found if "__pycache__" not in p.parts]


def test_wheel_has_the_code_and_the_codebooks(wheel):
    names = set(wheel.namelist())
    assert "transformers_commvq/cli/__init__.py" in names
    data = shipped()
    assert [p for p in data if p.name == "codebooks.safetensors"], "no codebooks are shipped"
    for path in data:
        name = str(path.relative_to(ROOT / "src"))
        assert wheel.read(name) == path.read_bytes()


def test_wheel_leaves_optimum_a_namespace(wheel):
    ours = [n for n in wheel.namelist() if n.startswith("optimum/")]
    assert ours == ["optimum/commands/register/register_commvq.py"]
    assert not list((ROOT / "src" / "optimum").rglob("__init__.py"))


def test_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {
        "transformers_commvq",
        "optimum",
        f"transformers_commvq-{transformers_commvq.__version__}.dist-info",
    }
    assert not [n for n in wheel.namelist() if "__pycache__" in n]


def test_sdist_has_the_codebooks_and_the_license(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "Makefile"} <= names
    assert {str(p.relative_to(ROOT)) for p in shipped()} <= names


def test_every_third_party_import_is_declared():
    """Modules imported at the top of a file must come from the dependencies, or from an extra that guards them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {d.split(">")[0].split("=")[0].split("[")[0].strip() for d in project["dependencies"]}
    loops = ("jit_attend.py", "jit_block.py", "jit_encode.py", "jit_exact.py", "jit_vectors.py")
    guarded = {"demo_report.py": {"matplotlib", "rich"}, **{name: {"numba", "llvmlite"} for name in loops}}
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            tops = {n.split(".")[0] for n in names} - sys.stdlib_module_names
            if "triton" in path.name:
                tops -= {"triton"}
            assert tops <= declared | guarded.get(path.name, set()), f"{path.name} imports {tops - declared}"


def test_importing_needs_no_extra():
    """The package imports where no extra is missing."""
    program = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'gguf', 'datasets', 'optimum', 'gradio', 'numba', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import transformers_commvq, transformers_commvq.cli as cli\n"
        "cli.build_parser()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
