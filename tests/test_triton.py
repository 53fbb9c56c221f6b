"""Runs the tests in triton_*interpreted.py under TRITON_INTERPRET=1, which must be set before anything imports triton.

No GPU is needed, and none is tested: the interpreter shows what the kernels compute, not what a compiler makes of them.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, part",
    [("triton_interpreted", "attention"), ("triton_interpreted", "not attention"), ("triton_index_interpreted", "")],
)
def test_interpreted_kernels_agree_with_the_reference(file, part):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", part]
    run = subprocess.run(
        [*command, str(HERE / f"{file}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout
