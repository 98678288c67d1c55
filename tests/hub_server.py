"""The part of the Hugging Face Hub's API that downloads and uploads need, on loopback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

TOKEN = "hf_SecretOfTheTests"


class HubServer:
    """Repositories by name, each with its states by revision: ``repositories[name][revision][file] = bytes``.

    ``answers`` are errors by repository, (status, value of X-Error-Code); of ``gated`` repositories only the list of
    files is public. ``private`` are those that were created so. ``refusal`` is what is wrong with every model card.
    ``requests`` counts requests by method and path.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.answers: dict[str, tuple[int, str]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.refusal = ""
        self.requests: Counter[str] = Counter()
        self.large: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.requests[f"{self.command} {self.path.partition('?')[0]}"] += 1
                outer.tokens.add(self.headers.get("Authorization", ""))
                status, headers, content = outer.answer(self, unquote(self.path.partition("?")[0]), body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    with contextlib.suppress(OSError):
                        self.wfile.write(content)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, folder: Path, revision: str = "main") -> None:
        """Publish the files of a folder."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories.setdefault(name, {})[revision] = files

    def downloads(self, file: str) -> int:
        """How many times the content of a file was fetched."""
        return sum(count for path, count in self.requests.items() if path.startswith("GET") and path.endswith(file))

    def _state(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for named, files in self.repositories.get(name, {}).items():
            commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
            if revision in (named, commit):
                return commit, files
        return None

    def answer(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        def as_json(content: Any) -> tuple[int, dict[str, str], bytes]:
            return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

        def error(status: int, code: str = "") -> tuple[int, dict[str, str], bytes]:
            return status, {"X-Error-Code": code} if code else {}, b""

        is_user = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            _, headers, content = as_json({"errors": [{"message": self.refusal}] * bool(self.refusal), "warnings": []})
            return 400 if self.refusal else 200, headers, content
        if path == "/api/repos/create":
            name = "/".join(json.loads(body)[key] for key in ("organization", "name"))
            if not is_user:
                return error(401)
            _, headers, content = as_json({"url": f"{self.address}/{name}"})
            if name in self.repositories:
                return 409, headers, content
            self.repositories[name] = {"main": {}}
            sent = json.loads(body)
            # Older versions of the library send the former.
            self.private |= {name} if sent.get("private") or sent.get("visibility") == "private" else set()
            return 200, headers, content
        if upload := re.fullmatch(r"/large/(\w+)", path):
            self.large[upload[1]] = body
            return 200, {}, b""
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/(.+))?", path)
        match = match or re.fullmatch(r"/([^/]+/[^/]+)()\.git/info/lfs/objects/batch()", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None and resolve is None:
            return error(404)
        found = resolve or match
        assert found
        name = found[1]
        if name in self.answers:
            return error(*self.answers[name])
        if name not in self.repositories:
            return error(401, "RepoNotFound")
        if resolve:
            state = self._state(name, resolve[2])
            if name in self.gated and not is_user:
                return error(401, "GatedRepo")
            if state is None or resolve[3] not in state[1]:
                return error(404, "EntryNotFound" if state else "RevisionNotFound")
            content = state[1][resolve[3]]
            etag = hashlib.sha1(content).hexdigest()
            return 200, {"X-Repo-Commit": state[0], "ETag": f'"{etag}"'}, content
        assert match
        kind, revision = match[2] or "revision", match[3] or "main"
        if kind == "preupload":
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in files}
            return as_json(
                {"files": [{"path": file, "uploadMode": modes[file], "shouldIgnore": False} for file in files]}
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.address}/large/{each['oid']}"}}
            return as_json({"objects": objects, "transfer": "basic"})
        if kind == "commit":
            files = self.repositories[name].setdefault(revision, {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
            commit, _ = self._state(name, revision) or ("", {})
            return as_json({"commitUrl": f"{self.address}/{name}/commit/{commit}", "commitOid": commit})
        state = self._state(name, revision)
        if state is None:
            return error(404, "RevisionNotFound")
        if kind == "tree":
            return as_json(
                [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in state[1].items()
                ]
            )
        siblings = [{"rfilename": file} for file in state[1]]
        return as_json({"id": name, "sha": state[0], "siblings": siblings, "private": name in self.private, "tags": []})


@contextlib.contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A server that this process takes for the Hub, with ``cache`` as its local cache and without a token."""
    server = HubServer()
    # The library reads the environment when it is imported, which other tests may have done.
    settings = {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": False,
        # Of a busy machine, on which a thread may wait for seconds.
        "HF_HUB_ETAG_TIMEOUT": 300,
        "HF_HUB_DOWNLOAD_TIMEOUT": 300,
        # Without it files would go to another service, which is not part of this server.
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    try:
        yield server
    finally:
        server.close()


def variables(server: HubServer, cache: Path, **more: str) -> dict[str, str]:
    """The same as environment of a child process."""
    fixed = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "300", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    return {"HF_ENDPOINT": server.address, "HF_HUB_CACHE": str(cache), **fixed, **more}
