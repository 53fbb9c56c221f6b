"""The benchmark commands run from end to end, on a toy; what they record is what they say they record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def command(*args, **variables):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, env={**env, **variables}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_speed_of_a_toy(tmp_path):
    ours = ["commvq-2", "commvq-1"]
    done = command(
        "benchmarks.speed", "--device", "cpu", "--model", "toy", "--contexts", "300", "450", "--methods", "dynamic",
        "commvq", "--bits", "2", "1", "--new", "3", "--steps", "5", "--rounds", "2", "--results", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("speed_toy_*.json")
    report = json.loads(file.read_text())
    assert list(report["contexts"]) == ["300", "450"]
    for tokens, context in report["contexts"].items():
        methods = context["methods"]
        assert list(methods) == ["dynamic", *ours]
        for row in methods.values():
            assert len(row["rounds"]) == 2
            assert len(row["steps_s"]) == 5
            assert min(row["steps_s"]) <= row["step_s"] <= max(row["steps_s"])
        # 4 layers, keys and values, 2 heads of 16 float32 numbers; the last new token is never stored
        assert methods["dynamic"]["cache_bytes"] == (int(tokens) + 2) * 4 * 2 * 2 * 16 * 4
        ratios = context["ratios_to"]["dynamic"]
        for name in ours:
            assert methods[name]["storing_s"] > 0
            assert ratios[name]["cache_bytes"] == methods[name]["cache_bytes"] / methods["dynamic"]["cache_bytes"]
            assert ratios[name]["step_speed"] == methods["dynamic"]["step_s"] / methods[name]["step_s"]
        assert methods["commvq-1"]["cache_bytes"] < methods["commvq-2"]["cache_bytes"]
    for plot in ("step", "cache"):
        assert file.with_name(f"{file.stem}_{plot}.png").stat().st_size > 1000


def test_speed_says_what_it_cannot_do():
    done = command("benchmarks.speed", "--device", "cpu", "--part", "kernels")
    assert done.returncode == 2
    assert "needs --device cuda" in done.stderr
