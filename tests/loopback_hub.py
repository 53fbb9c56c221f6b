"""A Hugging Face Hub on 127.0.0.1 for tests: real HTTP, in memory, with commits, large files, private and gated repos.

It speaks the part of the Hub's API that pushing and pulling models uses, and can be told to misbehave:

    with LoopbackHub({"token": "alice"}) as hub:
        hub.add("alice/books", {"config.json": b"..."}, private=True)
        hub.tamper["codebooks.safetensors"] = b"other bytes"      # served in place, under the true file's etag
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".pt")


@dataclass
class Repo:
    """One model repository: commits by sha, and branches and tags by name."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit({}, "initial commit")

    def commit(self, files: dict[str, bytes], message: str, branch: str = "main") -> str:
        """Make ``files`` the branch's whole content; returns the commit."""
        content = {path: hashlib.sha256(data).hexdigest() for path, data in sorted(files.items())}
        sha = hashlib.sha1(json.dumps([self.refs.get(branch), message, content]).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None

    def info(self, sha: str) -> dict:
        files = self.commits[sha]
        card = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.S)
        return {
            "_id": self.id,
            "id": self.id,
            "modelId": self.id,
            "sha": sha,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "tags": [],
            "cardData": (yaml.safe_load(card[1]) if card else None) or {},
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def entry(self, sha: str, path: str) -> dict:
        """A file in a listing."""
        size, etag = len(self.commits[sha][path]), self.etag(sha, path)
        large = {"lfs": {"oid": etag, "size": size, "pointerSize": 134}} if path.endswith(LARGE) else {}
        return {"type": "file", "path": path, "size": size, "oid": etag[:40], **large}

    def etag(self, sha: str, path: str) -> str:
        data = self.commits[sha][path]
        if path.endswith(LARGE):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LoopbackHub(ThreadingHTTPServer):
    """The server; a context manager.

    tokens: token -> user. A user may write to the namespace of that name, and see what is private or gated in it.
    log: (method, path) of every request.
    status: path -> HTTP status that a file is answered with.
    tamper: path -> bytes sent in place of a file's own.
    cut: path -> count of bytes after which the connection is dropped, though the header promised them all.
    hold: path -> event; half of the file is sent at once, the rest when the event is set.
    """

    daemon_threads = True

    def __init__(self, tokens: dict[str, str] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens = dict(tokens or {})
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.status: dict[str, int] = {}
        self.tamper: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.hold: dict[str, threading.Event] = {}
        self.held = threading.Event()  # a held download has sent its first half
        self.live: set[socket.socket] = set()
        self.lock = threading.RLock()

    def add(self, repo_id: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> str:
        """Create a repository, or commit to it; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id, private, gated))
        return repo.commit(files, "add")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def stop(self) -> None:
        """Stop at once: kept-alive connections are closed too, or clients would still be answered on them."""
        self.shutdown()
        self.server_close()
        for connection in list(self.live):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # already gone
                continue

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def handle_error(self, request, client_address):
        """A client that went away is part of these tests, not news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def setup(self):
        super().setup()
        self.server.live.add(self.connection)

    def finish(self):
        self.server.live.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        """The log is ``LoopbackHub.log``."""

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = self.server.tokens.get(token)
        with self.server.lock:
            self.server.log.append((self.command, path))
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, path):
                return method(self, *match.groups())
        return self.fail(404, "", f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def reply(self, content: object = None, code: int = 200, kind: str = "application/json", **headers: str):
        data = json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, code: int, error: str, message: str, **headers: str):
        self.reply({"error": message}, code, X_Error_Code=error, X_Error_Message=message, **headers)

    def find(self, repo_id: str, write: bool = False) -> Repo | None:
        """The repository if the user may see it; else answers as the Hub does, which hides private ones."""
        repo = self.server.repos.get(repo_id)
        mine = self.user == repo_id.split("/")[0]
        if repo is None or (repo.private and not mine):
            return self.fail(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and not mine:
            return self.fail(403 if self.user else 401, "", f"no right to write to {repo_id}")
        return repo

    def find_commit(self, repo: Repo, revision: str) -> str | None:
        sha = repo.resolve(unquote(revision))
        return sha or self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def whoami(self):
        if self.user is None:
            return self.fail(401, "InvalidToken", "Invalid credentials in Authorization header")
        return self.reply({"type": "user", "name": self.user, "orgs": []})

    def validate_yaml(self):
        self.reply({"errors": [], "warnings": []})

    def create(self):
        if self.user is None:
            return self.fail(401, "", "Unauthorized")
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if repo_id.split("/")[0] != self.user:
            return self.fail(403, "", f"no right to create {repo_id}")
        new = repo_id not in self.server.repos
        if new:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.server.repos[repo_id] = Repo(repo_id, private)
        return self.reply({"url": f"{self.server.url}/{repo_id}", "name": repo_id}, 200 if new else 409)

    def info(self, repo_id: str, revision: str | None):
        if (repo := self.find(repo_id)) and (sha := self.find_commit(repo, revision or "main")):
            self.reply(repo.info(sha))

    def tree(self, repo_id: str, revision: str):
        if (repo := self.find(repo_id)) and (sha := self.find_commit(repo, revision)):
            self.reply([repo.entry(sha, path) for path in repo.commits[sha]])

    def paths_info(self, repo_id: str, revision: str):
        if (repo := self.find(repo_id)) and (sha := self.find_commit(repo, revision)):
            is_json = "json" in (self.headers.get("Content-Type") or "")
            asked = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
            self.reply([repo.entry(sha, path) for path in asked if path in repo.commits[sha]])

    def preupload(self, repo_id: str, revision: str):
        if self.find(repo_id, write=True):
            files = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                }
                for file in json.loads(self.body)["files"]
            ]
            self.reply({"files": files})

    def batch(self, repo_id: str):
        if self.find(repo_id, write=True):
            objects = json.loads(self.body)["objects"]
            for thing in objects:
                if thing["oid"] not in self.server.large:
                    thing["actions"] = {"upload": {"href": f"{self.server.url}/_large/{thing['oid']}"}}
            self.reply({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def store(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "", "sha256 mismatch")
        self.server.large[oid] = self.body
        return self.reply()

    def commit(self, repo_id: str, branch: str):
        repo = self.find(repo_id, write=True)
        if not repo:
            return None
        with self.server.lock:
            head = repo.resolve(branch)
            files, header = dict(repo.commits[head]), {}
            for line in self.body.splitlines():
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "header":
                    header = value
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                else:
                    return self.fail(400, "", f"unknown operation {key}")
            if header.get("parentCommit") not in (None, head):
                return self.fail(412, "", "the parent commit is not the head")
            sha = repo.commit(files, header["summary"], branch)
        return self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}"})

    def tag(self, repo_id: str, revision: str):
        repo = self.find(repo_id, write=True)
        if not repo:
            return None
        name = json.loads(self.body)["tag"]
        if name in repo.refs:
            return self.fail(409, "", f"tag {name} exists")
        repo.refs[name] = repo.resolve(unquote(revision))
        return self.reply()

    def resolve(self, repo_id: str, revision: str, path: str):
        repo = self.find(repo_id)
        if not repo:
            return None
        if repo.gated and self.user != repo_id.split("/")[0]:
            return self.fail(403 if self.user else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
        sha = self.find_commit(repo, revision)
        if not sha:
            return None
        if path not in repo.commits[sha]:
            return self.fail(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        if path in self.server.status:
            return self.fail(self.server.status[path], "", "told to fail")
        data = self.server.tamper.get(path, repo.commits[sha][path])
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{repo.etag(sha, path)}"')
        self.end_headers()
        if self.command == "HEAD":
            return None
        if path in self.server.cut:
            self.wfile.write(data[start : self.server.cut[path]])
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if path in self.server.hold:
            middle = (start + len(data)) // 2
            self.wfile.write(data[start:middle])
            self.wfile.flush()
            self.server.held.set()
            self.server.hold[path].wait(60)
            start = middle
        return self.wfile.write(data[start:])


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (r"/api/repos/create", _Handler.create),
    (rf"/api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    (rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"/api/models/{_NAME}/paths-info/([^/]+)", _Handler.paths_info),
    (rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"/api/models/{_NAME}/tag/(.+)", _Handler.tag),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/_large/([0-9a-f]{64})", _Handler.store),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
