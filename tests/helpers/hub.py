"""A small server on this machine that answers huggingface_hub as the Hub does, with faults on request."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import constants, hf_api

Files = dict[str, bytes]
_LFS = re.compile(r"\.(safetensors|bin|pt|pth)$")


class RefusedError(Exception):
    """An answer with this status and the Hub's code for it."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass
class Repo:
    """Branches and pull requests by name, and every commit's files."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main") -> str:
        sha = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha

    def sha(self, revision: str) -> str:
        sha = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if sha not in self.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def split(self, rest: str) -> tuple[str, str, str]:
        """The revision that an address goes on with, its commit, and the path after it."""
        known = [ref for ref in (*self.refs, *self.commits) if f"{rest}/".startswith(ref + "/")]
        revision = max(known, key=len, default=rest.partition("/")[0])
        return revision, self.sha(revision), rest[len(revision) + 1 :]

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.sha(revision)]


class Hub:
    """The server. `tokens` gives each token its user; one that starts with "read" may not write."""

    def __init__(self, home: Path) -> None:
        self.home, self.lock = home, threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens = {"hf_user": "user", "read_user": "user", "hf_other": "other"}
        self.rules: list[list[Any]] = []
        self.requests: list[str] = []
        self.connections: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def rule(self, request: str, then: int | str | Callable[[], Any], times: float = float("inf")) -> None:
        """What becomes of "METHOD /path" that match: a status, "cut" = an end in the middle, or a call before it."""
        self.rules.append([request, then, times])

    def environment(self, **changes: str) -> dict[str, str]:
        """Of another process that uses it."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_TOKEN": "hf_user", "HF_HUB_OFFLINE": "0"}
        return {**os.environ, **own, "HF_HUB_DISABLE_XET": "1", **changes}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server that huggingface_hub in this process talks to, with an empty cache, logged in as "user"."""
    server = Hub(tmp_path_factory.mktemp("hf_home"))
    cache = str(server.home / "hub")
    changes = {"ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": cache, "HF_HUB_DISABLE_XET": True}
    changes["HUGGINGFACE_CO_URL_TEMPLATE"] = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # PEFT looks at it itself
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # before another try
    yield server
    server.close()


def card_errors(content: str) -> list[str]:
    """What the Hub says about a card's metadata."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, flags=re.DOTALL)
    data = (yaml.safe_load(match.group(1)) if match else None) or {}
    bases = data.get("base_model", [])
    errors = [
        f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        for base in (bases if isinstance(bases, list) else [bases])
        if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", str(base))
    ]
    for key, kind in {"tags": list, "library_name": str, "pipeline_tag": str, "model-index": list}.items():
        errors += [f'"{key}" must be a {kind.__name__}'] if key in data and not isinstance(data[key], kind) else []
    for entry in data.get("model-index") or ():
        for result in entry.get("results") or ():
            errors += [] if {"task", "dataset", "metrics"} <= result.keys() else ['"model-index" lacks a field']
    return errors


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _LFS.search(path) else git_hash(content)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def log_message(self, *args: Any) -> None: ...

    def handle_any(self) -> None:
        url, cut, body = urlsplit(self.path), False, None
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for rule in self.hub.rules:
                if rule[2] > 0 and re.search(rule[0], f"{self.command} {path}"):
                    rule[2] -= 1
                    if isinstance(rule[1], int):
                        raise RefusedError(rule[1], f"the test's {rule[1]}")
                    cut = cut or rule[1] == "cut"
                    _ = rule[1]() if callable(rule[1]) else None
            if cut and self.command in ("PUT", "POST"):
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                return self._hang_up()
            body = self._body()
            with self.hub.lock:
                status, answer, headers = self._answer(path, query, body)
        except RefusedError as refused:
            _ = self._body() if body is None else None
            status, headers = refused.status, {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            answer = json.dumps({"error": refused.message, **refused.body}).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(answer)), **headers}.items():
            _ = self.send_header(key, value) if value else None
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer[: len(answer) // 2] if cut else answer)
            return self._hang_up() if cut else None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _user(self) -> tuple[str | None, bool]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token), bool(token) and not token.startswith("read")

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user, may_write = self._user()
        repo, owns = self.hub.repos.get(repo_id), user == repo_id.partition("/")[0]
        if repo is None or (repo.private and not owns):
            raise RefusedError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if repo.gated and not owns:
            raise RefusedError(403, "Access to this model is restricted", "GatedRepo")
        if write and not (owns and may_write):
            raise RefusedError(403 if user else 401, "You don't have the rights to do this")
        return repo

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        for request, answer in _ROUTES.items():
            if match := re.fullmatch(request, f"{self.command} {path}"):
                found = answer(self, *match.groups(), query=query, body=body)
                return found if isinstance(found, tuple) else (200, json.dumps(found).encode(), {})
        raise RefusedError(404, f"No such page: {self.command} {path}")

    def create(self, *, body: bytes, **_: Any) -> Any:
        (user, may_write), asked = self._user(), json.loads(body)
        owner = asked.get("organization") or user
        if owner != user or not may_write:
            raise RefusedError(401 if user is None else 403, f"You may not make a model under the namespace {owner}")
        repo_id = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if self.command == "DELETE":
            self.hub.repos.pop(repo_id)
            return {}
        if repo_id in self.hub.repos:
            raise RefusedError(409, "You already created this model repo", **url)
        self.hub.repos[repo_id] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
        self.hub.repos[repo_id].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return url

    def whoami(self, **_: Any) -> Any:
        if (user := self._user()[0]) is None:
            raise RefusedError(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}

    def validate(self, *, body: bytes, **_: Any) -> Any:
        if errors := card_errors(json.loads(body)["content"]):
            raise RefusedError(
                400, "Invalid metadata", errors=[{"message": message} for message in errors], warnings=[]
            )
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id: str, revision: str, *, query: dict[str, list[str]], body: bytes) -> Any:
        files = self._repo(repo_id, write="create_pr" not in query).files(revision)
        paths = [asked["path"] for asked in json.loads(body)["files"]]
        mode = {path: "lfs" if _LFS.search(path) else "regular" for path in paths}
        oids = {path: etag(path, files[path]) for path in paths if path in files}
        return {"files": [{"path": p, "uploadMode": mode[p], "shouldIgnore": False, "oid": oids.get(p)} for p in paths]}

    def batch(self, repo_id: str, *, body: bytes, **_: Any) -> Any:
        self._repo(repo_id)
        objects, url = json.loads(body)["objects"], self.hub.endpoint
        for wanted in objects:
            if wanted["oid"] not in self.hub.lfs:
                upload = {"href": f"{url}/lfs/upload/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": {"href": f"{url}/lfs/verify"}}
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str, *, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "The content does not have this hash")
        self.hub.lfs[oid] = body
        return {}

    def verify(self, *, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "Not uploaded")
        return {}

    def commit(self, repo_id: str, revision: str, *, query: dict[str, list[str]], body: bytes) -> Any:
        create_pr = "create_pr" in query
        repo = self._repo(repo_id, write=not create_pr)
        files = dict(repo.files(revision))
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif key != "header":  # a file or folder to delete
                files = {p: c for p, c in files.items() if not f"{p}/".startswith(value["path"].rstrip("/") + "/")}
        if errors := card_errors(files.get("README.md", b"").decode()):
            raise RefusedError(400, errors[0])
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        sha = repo.commit(files, f"refs/pr/{number}" if create_pr else revision)
        url = f"{self.hub.endpoint}/{repo_id}"
        pull = f"{url}/discussions/{number}" if create_pr else None
        return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "pullRequestUrl": pull}

    def branch(self, repo_id: str, name: str, *, body: bytes, **_: Any) -> Any:
        repo = self._repo(repo_id, write=True)
        if name in repo.refs:
            raise RefusedError(409, "Reference already exists")
        repo.refs[name] = repo.sha(json.loads(body or b"{}").get("startingPoint", "main"))
        return {}

    def info(self, repo_id: str, revision: str | None = None, **_: Any) -> Any:
        repo = self._repo(repo_id)
        sha = repo.sha(revision or "main")
        names = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        return {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": names}

    def tree(self, repo_id: str, rest: str, **_: Any) -> Any:
        revision, sha, folder = self._repo(repo_id).split(rest)
        files = sorted(self._repo(repo_id).commits[sha].items())
        found = [(path, content) for path, content in files if path.startswith(f"{folder}/" if folder else "")]
        if folder and not found:
            raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return [{"type": "file", "path": path, "size": len(c), "oid": git_hash(c)} for path, c in found]

    def refs(self, repo_id: str, **_: Any) -> Any:
        refs = {ref: sha for ref, sha in self._repo(repo_id).refs.items() if not ref.startswith("refs/")}
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs.items()]
        return {"branches": branches, "converts": [], "tags": []}

    def resolve(self, repo_id: str, rest: str, **_: Any) -> Any:
        repo = self._repo(repo_id)
        _, sha, path = repo.split(rest)
        content, headers = repo.commits[sha].get(path), {"X-Repo-Commit": sha}
        if content is None:
            return 404, b'{"error": "Entry not found"}', {"X-Error-Code": "EntryNotFound", **headers}
        headers |= {"ETag": f'"{etag(path, content)}"', "Accept-Ranges": "bytes"}
        if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")):
            return 200, content, headers
        first, last = int(wanted.group(1)), int(wanted.group(2) or len(content) - 1)
        return 206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES: dict[str, Callable[..., Any]] = {
    "POST /api/repos/create|DELETE /api/repos/delete": _Handler.create,
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/validate-yaml": _Handler.validate,
    f"POST /api/models/{_ID}/preupload/(.+)": _Handler.preupload,
    rf"POST /{_ID}\.git/info/lfs/objects/batch": _Handler.batch,
    "PUT /lfs/upload/([0-9a-f]{64})": _Handler.upload,
    "POST /lfs/verify": _Handler.verify,
    f"POST /api/models/{_ID}/commit/(.+)": _Handler.commit,
    f"POST /api/models/{_ID}/branch/(.+)": _Handler.branch,
    f"GET /api/models/{_ID}": _Handler.info,
    f"GET /api/models/{_ID}/revision/(.+)": _Handler.info,
    f"GET /api/models/{_ID}/tree/(.+)": _Handler.tree,
    f"GET /api/models/{_ID}/refs": _Handler.refs,
    f"(?:GET|HEAD) /{_ID}/resolve/(.+)": _Handler.resolve,
}
