"""The README's code runs and its table is what the demo measured; tests/test_docs.py checks what all pages share."""

import re
import runpy
import subprocess
import sys
from dataclasses import fields

import markdown
import pytest
from markdown import ROOT

from transformers_commvq import CommVQConfig, demo_model

README = (ROOT / "README.md").read_text()


def test_python_blocks_run(smollm2_folder, tmp_path, monkeypatch, capsys):
    """In order, in one namespace, as a reader would; a local folder stands where the Hub's model would be."""
    place = tmp_path / demo_model.BASE_MODEL
    place.parent.mkdir(parents=True)
    place.symlink_to(smollm2_folder)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in markdown.blocks(ROOT / "README.md", "python"):
        assert block.excuse is None
        exec(compile(block.code, "README.md", "exec"), names)
    assert "Paris" in capsys.readouterr().out


def test_settings_are_the_configs():
    table = README.split("| setting |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == {f.name for f in fields(CommVQConfig)} - {"method", "quant_method"}
    for name, value in re.findall(r"^\| `(\w+)` \| (\d+) \|", table, flags=re.MULTILINE):
        assert getattr(CommVQConfig(), name) == int(value)


def test_table_is_what_the_demo_measured():
    if not (ROOT / "benchmarks" / "demo" / "demo.json").is_file():
        pytest.skip("the demo's numbers were not recorded yet: scripts/readme_table.py")
    script = ROOT / "scripts" / "readme_table.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0


def test_table_holds_the_numbers():
    block = runpy.run_path(str(ROOT / "scripts" / "readme_table.py"))["block"]
    about = {"dtype": "bfloat16", "model": "org/tiny", "device": "CPU", "prompt_tokens": 4000, "held_tokens": 2000}
    row = {
        "name": "plain",
        "tokens": 4020,
        "nbytes": 2**22,
        "ratio": 1.0,
        "right": True,
        "perplexity": 20.0,
        "kl": None,
    }
    ours = {**row, "name": "1 bit", "nbytes": 2**19, "ratio": 0.125, "right": False, "perplexity": 21.0, "kl": 0.1}
    table = block({"about": about, "caches": [{**row, "decode": 5.0}, {**ours, "decode": 4.0}]})
    assert "| plain, bfloat16 | 4.0 MiB | 100.0% | right | 20.00 |  | 5.0 |" in table
    assert "| commvq, 1 bit | 0.5 MiB | 12.5% | wrong | 21.00 (+5.0%) | 0.100 | 4.0 |" in table
