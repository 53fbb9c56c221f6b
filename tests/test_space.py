"""The Space: its numbers are those of ``estimate``, and every endpoint answers a client over the network."""

import argparse
import json
import shlex
from dataclasses import asdict
from itertools import pairwise

import app
import memory
import presets
import pytest
import style
from gradio_client import Client
from gradio_client.exceptions import AppError

from transformers_commvq import ConfigError
from transformers_commvq.cli import estimate as estimate_command
from transformers_commvq.estimate import describe_config

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def config_json(name):
    return json.dumps(json.loads(presets.FILE.read_text())[name]["config"])


@pytest.fixture(scope="module")
def client():
    demo = app.build()
    _, url, _ = app.launch(demo, prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False)
    demo.close()


@pytest.mark.parametrize("name", [LLAMA, "google/gemma-3-1b-it", "microsoft/phi-4"])
def test_presets_hold_what_estimate_computes(name):
    entry = json.loads(presets.FILE.read_text())[name]
    assert asdict(describe_config(presets.config_from_dict(entry["config"]), name)) == entry["size"]
    assert asdict(presets.read_presets()[name]) == entry["size"]


def run_estimate(line, folder, capsys):
    """What the command line prints as json, in a folder with the config.json it names."""
    parser = argparse.ArgumentParser()
    estimate_command.add_arguments(parser)
    words = shlex.split(line)
    assert words[:2] == ["transformers-commvq", "estimate"]
    words[2] = str(folder / "config.json")
    assert estimate_command.run(parser.parse_args([*words[2:], "--json"])) == 0
    return json.loads(capsys.readouterr().out)


def same(ours, theirs):
    """Two reports, but for the model's name."""
    assert {**ours, "model": None} == {**theirs, "model": None}


def test_numbers_are_those_of_the_command_the_page_shows(client, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config_json(LLAMA))
    gpus, choices = ["RTX 4090", "H100"], (LLAMA, "", 200_000, 3, ["1", "1.5"])
    shown = client.predict(*choices, gpus, "4.5 bits", api_name="/estimate")
    line = memory.command(LLAMA, "", shown, gpus, "4.5 bits")
    same(run_estimate(line, tmp_path, capsys), shown)
    assert shown["gpus"]["H100"]["longest_context"]["1"] > 200_000
    table = memory.cache_table(shown)
    assert [row["cache"] for row in table] == ["fp16", "FP8", "int4", "CommVQ 1.5-bit", "CommVQ 1-bit"]
    assert table[0]["GiB"] == f"{shown['plain_cache_bytes'] / 2**30:.2f}"
    rows = memory.gpu_table(shown)
    assert rows[1]["fp16"] == f"{shown['gpus']['H100']['longest_context']['plain']:,}"
    assert [row["GPU"] for row in rows] == gpus


def test_pasted_config_is_read_like_a_file(client, tmp_path, capsys):
    pasted = config_json("google/gemma-3-1b-it")
    (tmp_path / "config.json").write_text(pasted)
    shown = client.predict("", pasted, 4096, 1, [], ["24"], "16 bits", api_name="/estimate")
    same(run_estimate(memory.command("", pasted, shown, ["24"], "16 bits"), tmp_path, capsys), shown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "../../etc"}, "expected a model of the list"),
        ({"model": "/etc"}, "expected a model of the list"),
        ({"config_json": "{"}, "config.json cannot be read"),
        ({"config_json": '{"model_type": "no-such"}'}, "config.json cannot be read"),
        ({"config_json": '{"model_type": "llama", "num_hidden_layers": 100000}'}, "up to 1000 layers"),
        ({"config_json": "x" * 100_001}, "100,001 characters"),
        ({"context": 0}, "tokens: nothing given"),
        ({"context": 1 << 21}, "expected 1 to 1,048,576"),
        ({"batch": 1000}, "expected 1 to 256"),
        ({"bits": ["7"]}, "bits 7: expected some of"),
        ({"weights": "3 bits"}, "weights '3 bits'"),
        ({"gpus": ["abacus"]}, "not a known card"),
    ],
)
def test_bad_choices_are_explained(changes, message):
    with pytest.raises(ConfigError, match=message):
        memory.report(**{"model": LLAMA, **changes})


def test_errors_reach_the_client(client):
    with pytest.raises(AppError, match="expected 1 to 1,048,576"):
        client.predict(LLAMA, "", 1 << 22, 1, [], [], "16 bits", api_name="/estimate")


def test_labels_never_overlap():
    figure = style.new_figure(4, 4)
    axes = figure.subplots()
    axes.set(yscale="log", ylim=(1, 100))
    style.labels_beside(axes, {"a": (10, "k"), "b": (10.1, "k"), "c": (10.2, "k"), "d": (99, "k")})
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.04
    assert "http" not in style.drawing(figure, "a test").replace("http://www.w3.org", "")
