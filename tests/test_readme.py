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


SCRIPTS = ROOT / "scripts"


@pytest.mark.parametrize("script", ["readme_table", "quality_table", "speed_table"])
def test_tables_are_what_was_measured(script):
    command = [sys.executable, SCRIPTS / f"{script}.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def load(script, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return runpy.run_path(str(SCRIPTS / f"{script}.py"))


def test_a_stale_readme_is_noticed(monkeypatch):
    with_block = load("readme_block", monkeypatch)["with_block"]
    stale = with_block(README, "demo", "readme_table.py", "| another table |\n")
    assert stale != README and with_block(stale, "demo", "readme_table.py", _between(README, "demo")) == README


def _between(text, name):
    return re.search(rf"<!-- {name}: begin[^\n]*\n(.*?)<!-- {name}: end", text, flags=re.DOTALL)[1]


def test_table_holds_the_numbers(monkeypatch):
    block = load("readme_table", monkeypatch)["block"]
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


def test_speed_table_holds_the_numbers(monkeypatch):
    block = load("speed_table", monkeypatch)["block"]

    def row(speed, size):
        return {"rounds": [{}], "failed": None, "decode_tokens_per_s": speed, "cache_bytes": size}

    failed = {"rounds": [], "failed": "out of memory"}
    about = {"model": "tiny", "device": "a CPU", "threads": 2, "dtype": "float32", "batch": 1, "new": 32, "rounds": 3}
    report = {
        **about, "transformers": "5.24.0", "torch": "2.13.0", "not_here": {"flash": "no GPU"},
        "contexts": {
            "8192": {"methods": {"dynamic": failed, "commvq-2": row(6.0, 2**23)}},
            "1024": {"methods": {"dynamic": row(20.25, 2**24), "commvq-2": row(10.0, 2**20)}},
        },
    }  # fmt: skip
    table = [re.sub(" +", " ", line) for line in block(report, "speed.png").splitlines()]
    assert table[0] == "| decode, tokens a second | 1,024 tokens | 8,192 tokens | cache at 8,192 |"
    assert table[2] == "| dynamic | 20.2 | | |" and table[3] == "| commvq-2 | 10.0 | 6.0 | 8.0 MiB |"
    assert "Left out: flash." in table[5] and "(speed.png)" in table[7]
