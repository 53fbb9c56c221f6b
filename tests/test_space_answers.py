"""The Space's other tabs: what they show is what the package computes, over the network too."""

import json
import time
from itertools import pairwise

import answers
import app
import picture
import pytest
import recorded
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from transformers_commvq import ConfigError, demo_text, make_cache
from transformers_commvq.demo import cache_bytes
from transformers_commvq.geometry import generate_cache_name

LONG = "Tell me about heaps. " + " ".join(f"Heap number {i} is a tree." for i in range(28))


@pytest.fixture(scope="module")
def loaded(smollm2_folder):
    """The page's own model, which the wheel provides."""
    return answers.load()


@pytest.fixture(scope="module")
def client(loaded):
    demo = app.build()
    _, url, _ = app.launch(demo, prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False)
    demo.close()


@pytest.mark.slow
def test_answers_are_those_of_generate(loaded, client):
    """Streamed over the network: text, and bytes of the cache, as generate() has them with each cache."""
    job = client.submit(LONG, "1", 8, api_name="/answer")
    last = job.result(timeout=120)
    states = job.outputs()
    assert states[0]["read_seconds"] is None
    assert [s["plain"]["tokens"] for s in states[:2]] == [0, 1]
    assert all(a["plain"]["cache_bytes"] <= b["plain"]["cache_bytes"] for a, b in pairwise(states))
    assert last["done"] and not states[-2]["done"]
    model, name = loaded.model, generate_cache_name()
    ids = torch.tensor([demo_text.chat_ids(loaded.tokenizer, LONG)])
    assert last["prompt_tokens"] == ids.shape[1] > 240
    settings = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
    made = {
        side: model.generate(ids, attention_mask=torch.ones_like(ids), kv_cache=kv_cache, **settings)
        for side, kv_cache in (("plain", False), ("commvq", {"bits": 1.0}))
    }
    written = {side: result.sequences[0, ids.shape[1] :].tolist() for side, result in made.items()}
    for side, result in made.items():
        assert last[side]["text"] == loaded.tokenizer.decode(written[side], skip_special_tokens=True)
        assert last[side]["cache_tokens"] == result[name].get_seq_length()
        assert last[side]["cache_bytes"] == pytest.approx(cache_bytes(result[name])[0], rel=0.01)  # spare room
    assert last["commvq"]["cache_bytes"] < last["plain"]["cache_bytes"]
    index = next((i for i, (a, b) in enumerate(zip(*written.values(), strict=False)) if a != b), None)
    assert (last["difference"] or {"index": None})["index"] == index


@torch.inference_mode()
def test_filled_cache_is_the_one_a_pass_makes(loaded):
    ids = torch.tensor([loaded.tokenizer(LONG)["input_ids"]])[:, :220]
    plain, ours, own = answers.DynamicCache(config=loaded.model.config), *(make_cache(loaded.model) for _ in range(2))
    loaded.model(input_ids=ids, cache=plain, use_cache=True, logits_to_keep=1)
    loaded.model(input_ids=ids, cache=own, use_cache=True, logits_to_keep=1)
    answers.fill(loaded, plain, ours)
    assert ours.get_seq_length() == own.get_seq_length() == 220
    for mine, theirs in zip(ours.layers, own.layers, strict=True):
        assert mine.coded == theirs.coded > 0
        for tensor in ("key_codes", "value_codes", "keys", "values", "sink_keys", "sink_values"):
            assert torch.equal(getattr(mine, tensor), getattr(theirs, tensor)), tensor


def test_cancelling_stops_the_work(client, monkeypatch):
    calls, step = [], answers._step
    monkeypatch.setattr(answers, "_step", lambda *args: calls.append(time.sleep(0.02)) or step(*args))
    job = client.submit("Write a long story about a lighthouse.", "2", 256, api_name="/answer")
    deadline = time.time() + 60
    while len(calls) < 6 and time.time() < deadline:
        time.sleep(0.05)
    job.cancel()
    time.sleep(1.5)
    before = len(calls)
    time.sleep(1)
    assert 6 <= before == len(calls) < 500
    monkeypatch.undo()
    assert client.predict("Say hello.", "2", 2, api_name="/answer")["done"]  # the place in the queue is free again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("  ", "2", 8), "There is no prompt"),
        (("word " * 5000, "2", 8), "this page reads up to 4,096"),
        (("x" * 40_001, "2", 8), "40,001 characters"),
        (("hi", "3", 8), "bits '3'"),
        (("hi", "2", 1000), "expected 1 to 256"),
        (("hi", "2", None), "nothing given"),
    ],
)
def test_bad_prompts_are_explained(loaded, arguments, message):
    with pytest.raises(ConfigError, match=message):
        next(answers.answer(*arguments))


def test_errors_reach_the_client(client):
    with pytest.raises(AppError, match="There is no prompt"):
        client.predict("", "2", 8, api_name="/answer")


def test_samples_and_files(client, tmp_path):
    lengths = [len(client.predict(name, api_name="/sample")) for name in answers.SAMPLES]
    assert lengths[0] > 5000 and lengths[2] < 100
    asked = len(demo_text.chat_ids(answers.load().tokenizer, answers.sample(answers.SAMPLES[0])))
    assert 1900 < asked < 2100  # what the name says
    file = tmp_path / "notes.txt"
    file.write_text("Ünïcode " * 10_000)
    assert client.predict(handle_file(str(file)), api_name="/read_file") == "Ünïcode " * 5_000
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AppError, match="no text in UTF-8"):
        client.predict(handle_file(str(file)), api_name="/read_file")


def test_first_difference_is_marked():
    sides = {n: {"text": t} for n, t in (("plain", "It is <red> now"), ("commvq", "It is blue"))}
    state = {**sides, "difference": {"index": 2, "before": "It is ", "plain": "<red>", "commvq": "blue"}}
    assert answers.answer_html(state, "plain") == ('<div class="answer">It is <mark>&lt;red&gt;</mark> now</div>')
    assert "<mark>" not in answers.answer_html({**state, "difference": None}, "commvq")
    assert "{" not in answers.answer_html({**state, "plain": {"text": "{{x}} ${1}"}}, "plain")


def test_picture_is_of_a_real_key(client):
    made = picture.example()
    assert made.signs.abs().eq(1).all()
    assert torch.allclose(made.decoded, made.mean + made.signs @ made.vectors, atol=1e-5)
    assert made.commutes < 1e-4
    assert 0.01 < made.error < 0.5
    assert picture.example(bits="1").error > made.error
    html, caption = client.predict(8, 1, 24, 300, "2", api_name="/picture")
    assert "<svg" in html
    assert f"{len(made.signs)} bits" in caption
    with pytest.raises(ConfigError, match="token 128: expected 0 to 127"):
        picture.example(token=128)
    with pytest.raises(AppError, match="greater than maximum value 29"):  # gradio's own check of the slider
        client.predict(30, 1, 24, 300, "2", api_name="/picture")


def test_every_recording_is_shown(client):
    names = recorded.names()
    assert {"make demo"} | {f"Codebook: SmolLM2-135M-Instruct-CommVQ-{bits}bit" for bits in (1, 2)} <= set(names)
    numbers = json.loads((recorded.ROOT / "benchmarks" / "demo" / "demo.json").read_text())
    for name in names:
        about, html = client.predict(name, api_name="/recorded")
        assert about.startswith("Measured with model") or len(about) > 100
        if name.startswith("make demo"):
            assert f"{numbers['caches'][1]['nbytes'] / 2**20:.1f} MiB" in html
        if not name.startswith("Benchmark"):
            assert "data:image/png" in html
    with pytest.raises(ConfigError, match="expected one of make demo"):
        recorded.show("../secret")


def test_recordings_that_are_missing_or_unknown_are_left_out(tmp_path):
    assert recorded.names(tmp_path) == []
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "other.json").write_text('{"something": 1}')
    (folder / "quality-begun.json").write_text('{"settings": {"model": "m"}, "methods": {}}')
    text = {"prose": {"perplexity": 20.5, "change": 0.01, "kl": 0.004}}
    done = {"settings": {"model": "m"}, "methods": {"commvq-2": {"bits": 2.02, "texts": text}, "late": {}}}
    (folder / "quality-done.json").write_text(json.dumps(done))
    assert recorded.names(tmp_path) == ["Benchmark: quality done"]
    about, html = recorded.show("Benchmark: quality done", tmp_path)
    assert about == "Measured with model m."
    assert "20.500 (+1.0%)" in html and "0.0040" in html
    found = {"bits": 2.0, "passkey": {"1024": {"0.1": 1.0, "0.9": 0.5}}}
    (folder / "passkeys.json").write_text(json.dumps({"model": "m", "caches": {"commvq-2": found}}))
    assert "75%" in recorded.show("Benchmark: passkeys", tmp_path)[1]
