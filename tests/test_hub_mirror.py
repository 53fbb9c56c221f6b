"""Codebooks through olah, a mirror of the Hub by others: what the client sees is not only our own server's idea of it.

Optional: `pip install olah`, best in an environment of its own, and name its command in OLAH_CLI if it is not in PATH.
"""

import os
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest
from huggingface_hub import constants
from test_hub import REPO, assert_same, files_of, make_book

from transformers_commvq import hub
from transformers_commvq.codebook import TENSOR_FILE
from transformers_commvq.config import CodebookIntegrityError, CodebookNotFoundError

OLAH = os.environ.get("OLAH_CLI") or shutil.which("olah-cli")
pytestmark = pytest.mark.skipif(OLAH is None, reason="olah is not installed")


@pytest.fixture
def mirror(server, tmp_path, monkeypatch):
    """The address of a mirror of ``server``, which the client in this process now talks to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    origin, here = server.url.removeprefix("http://"), f"127.0.0.1:{port}"
    options = {
        "host": "127.0.0.1", "port": port, "hf-scheme": "http", "hf-netloc": origin, "hf-lfs-netloc": origin,
        "mirror-scheme": "http", "mirror-netloc": here, "mirror-lfs-netloc": here,
        "repos-path": tmp_path / "mirrored", "log-path": tmp_path / "log",
    }  # fmt: skip
    command = [OLAH, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    log = tmp_path / "olah.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://{here}"
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.25)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    yield url
    process.terminate()
    process.wait(30)


def test_pull_through_a_mirror(server, mirror, tmp_path):
    book = make_book()
    commit = server.add(REPO, files_of(book.save(tmp_path / "book")))
    assert_same(hub.pull(REPO, commit), book)
    assert any(path.endswith(TENSOR_FILE) for _, path in server.log), "the mirror asked the server"
    server.log.clear()
    assert_same(hub.pull(REPO, commit), book)
    assert server.log == []
    assert_same(hub.pull(REPO), book)
    with pytest.raises(CodebookNotFoundError):
        hub.pull(REPO, "no-such-branch")


def test_tampering_behind_a_mirror_is_found(server, mirror, tmp_path):
    files = files_of(make_book().save(tmp_path / "book"))
    server.add(REPO, files)
    data = bytearray(files[TENSOR_FILE])
    data[-1] ^= 1
    server.tamper[TENSOR_FILE] = bytes(data)
    with pytest.raises(CodebookIntegrityError, match="sha256"):
        hub.pull(REPO)
