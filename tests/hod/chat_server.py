"""A chat endpoint on loopback that answers, or misbehaves, on request."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A caption, or all that an item of the answer has besides its clip.
Captioner = Callable[[dict[str, Any]], str | dict[str, Any]]


def clips_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The clips of a request."""
    content = body["messages"][1]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    return json.loads(text[text.index("[") : text.rindex("]") + 1])


class ChatServer:
    """Answers with ``caption`` of each clip, except that the first answers are those of ``script``.

    An entry of the script is a (status, headers) pair, ``"hang"``, ``"drop"``, ``"half"`` (JSON that breaks off),
    ``"schema"``, ``"echo"`` (the prompt), ``"short"`` (one clip too few), ``"no chat"``, ``"ok"``, or a function of the
    right text that returns the ``choices`` entry to send.

    It is a proxy as well: requests for any address are answered, and ``paths`` keeps what they asked for. ``host`` is
    the address to listen on.
    """

    def __init__(
        self,
        caption: Captioner,
        script: list[Any] | None = None,
        hold: threading.Barrier | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.caption, self.script = caption, list(script or [])
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.most = 0
        self.now = 0
        self._hold, self._lock = hold, threading.Lock()
        self._over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        self._server = Server((host, 0), Handler)
        self.port = self._server.server_port
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.bodies.append(body)
            self.paths.append(request.path)
            self.keys.append(request.headers.get("Authorization"))
            step = self.script.pop(0) if self.script else "ok"
        try:
            if self._hold is not None:
                self._hold.wait(10)
            self._do(request, body, step)
        finally:
            with self._lock:
                self.now -= 1

    def _do(self, request: BaseHTTPRequestHandler, body: dict[str, Any], step: Any) -> None:
        if isinstance(step, tuple):
            # Some services repeat the key that they refuse.
            refusal = f"refused {request.headers.get('Authorization')}".encode()
            self._send(request, step[0], refusal, step[1])
            return
        if step == "hang":
            self._over.wait(10)
        if step in ("hang", "drop"):
            request.close_connection = True
            request.connection.close()
            return
        clips = clips_of(body)
        captions = []
        for each in clips:
            item = self.caption(each)
            captions.append({"clip": each["clip"], **(item if isinstance(item, dict) else {"caption": item})})
        if step == "short":
            captions = captions[:-1]
        text = json.dumps({"captions": captions})
        if step == "half":
            text = text[: len(text) // 2]
        elif step == "schema":
            text = json.dumps([each["caption"] for each in captions])
        elif step == "echo":
            system = re.sub(r"\s+", " ", body["messages"][0]["content"])
            text = json.dumps({"captions": [{"clip": each["clip"], "caption": system[:150]} for each in clips]})
        choice = step(text) if callable(step) else {"message": {"role": "assistant", "content": text}}
        answer: dict[str, Any] = {
            "choices": [choice],
            "usage": {"prompt_tokens": 101, "completion_tokens": 11},
        }
        self._send(request, 200, json.dumps({"hello": 1} if step == "no chat" else answer).encode(), {})

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)
