"""`transformers-commvq serve`: transformers' own server, asked over HTTP as `transformers chat` and others do."""

import json
import socket
import threading
import time
import urllib.request

import pytest
from transformers.utils.import_utils import is_serve_available

from transformers_commvq import CommVQCache, cli, integration

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed")


@pytest.fixture
def server(smollm2_folder, monkeypatch):
    """Runs the command with a real model; yields a function that posts json and returns the answer."""
    import uvicorn

    servers, make = [], uvicorn.Server
    monkeypatch.setattr(uvicorn, "Server", lambda config: servers.append(make(config)) or servers[-1])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = ["serve", "--bits", "1", "demo", "--port", port, "--device", "cpu", "--dtype", "float32"]
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(command)))
    thread.start()
    until = time.monotonic() + 120
    while not (servers and servers[0].started):
        assert thread.is_alive() and time.monotonic() < until, f"the server did not start: {codes}"
        time.sleep(0.1)

    def post(path, body):
        request = urllib.request.Request(f"http://localhost:{port}/{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    yield post
    servers[0].should_exit = True
    thread.join(30)
    assert codes == [0]


@pytest.mark.slow
def test_a_chat(server, smollm2_folder, monkeypatch):
    made, make = [], integration.make_cache
    monkeypatch.setattr(integration, "make_cache", lambda *args: made.append(make(*args)) or made[-1])
    body = {"model": str(smollm2_folder), "max_tokens": 12, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    answer = json.loads(server("v1/chat/completions", body))
    assert "Paris" in answer["choices"][0]["message"]["content"]
    streamed = server("v1/chat/completions", {**body, "stream": True})
    assert "Paris" in streamed and streamed.startswith("data: ")
    assert [type(cache) for cache in made] == [CommVQCache] * 2
    assert made[0].codebook.bits == 1.0 and made[0].get_seq_length() == answer["usage"]["total_tokens"] - 1
    settings = json.dumps({"kv_cache": False, "max_new_tokens": 4, "do_sample": False})
    server("v1/chat/completions", {**body, "generation_config": settings})
    assert len(made) == 2  # this once, the plain cache


@pytest.mark.parametrize("option", ["--continuous-batching", "--compile"])
def test_caches_that_are_not_compressed_are_refused(option, capsys):
    assert cli.main(["serve", "demo", option]) == 2
    assert f"error: {option}: " in capsys.readouterr().err
