"""A chat endpoint on loopback that answers, or misbehaves, on request; and the same answers in the files of a batch."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# A caption, or all that an item of the answer has besides its clip.
Captioner = Callable[[dict[str, Any]], str | dict[str, Any]]


def clips_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The clips of a request."""
    content = body["messages"][1]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    return json.loads(text[text.index("[") : text.rindex("]") + 1])


def text_of(body: dict[str, Any], caption: Captioner) -> str:
    """What the model says to a request."""
    captions = []
    for each in clips_of(body):
        item = caption(each)
        captions.append({"clip": each["clip"], **(item if isinstance(item, dict) else {"caption": item})})
    return json.dumps({"captions": captions})


USAGE = {"prompt_tokens": 101, "completion_tokens": 11}


def completion(choice: dict[str, Any], usage: dict[str, int] = USAGE) -> dict[str, Any]:
    """The body of an answer."""
    return {"choices": [choice], "usage": usage}


def run_batch(requests: Path, answers: Path, caption: Captioner) -> list[dict[str, Any]]:
    """Write the answers to a file of requests as vLLM's run-batch does; they are returned as well."""
    rows = []
    for line in requests.read_text().splitlines():
        request = json.loads(line)
        assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
        choice = {"message": {"role": "assistant", "content": text_of(request["body"], caption)}}
        response = {"status_code": 200, "request_id": f"r{len(rows)}", "body": completion(choice)}
        rows.append({"id": f"v{len(rows)}", "custom_id": request["custom_id"], "response": response, "error": None})
    write_rows(answers, rows)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


class ChatServer:
    """Answers with ``caption`` of each clip, except that the first answers are those of ``script``.

    An entry of the script is a (status, headers) pair, ``"hang"``, ``"drop"``, ``"half"`` (JSON that breaks off),
    ``"schema"``, ``"echo"`` (the prompt), ``"short"`` (one clip too few), ``"no chat"``, ``"trickle"`` and ``"trickle
    headers"`` (a byte now and then), ``"endless"``, ``"ok"``, or a function of the right text that returns the
    ``choices`` entry to send.

    It is a proxy as well: requests for any address are answered, and ``paths`` keeps what they asked for. ``host`` is
    the address to listen on, ``usage`` what it counts of a request.
    """

    def __init__(
        self,
        caption: Captioner,
        script: list[Any] | None = None,
        hold: threading.Barrier | None = None,
        host: str = "127.0.0.1",
        usage: Callable[[dict[str, Any]], dict[str, int]] = lambda _: USAGE,
    ) -> None:
        self.usage = usage
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
        if step in ("trickle", "trickle headers", "endless"):
            self._never_end(request, step)
            return
        clips = clips_of(body)
        text = text_of(body, self.caption)
        captions = json.loads(text)["captions"]
        if step == "short":
            text = json.dumps({"captions": captions[:-1]})
        elif step == "half":
            text = text[: len(text) // 2]
        elif step == "schema":
            text = json.dumps([each["caption"] for each in captions])
        elif step == "echo":
            system = re.sub(r"\s+", " ", body["messages"][0]["content"])
            text = json.dumps({"captions": [{"clip": each["clip"], "caption": system[:150]} for each in clips]})
        choice = step(text) if callable(step) else {"message": {"role": "assistant", "content": text}}
        answer = {"hello": 1} if step == "no chat" else completion(choice, self.usage(body))
        self._send(request, 200, json.dumps(answer).encode(), {})

    def _never_end(self, request: BaseHTTPRequestHandler, step: str) -> None:
        """Send for ten seconds, by which a test has failed, or until the client goes or the server ends."""
        request.close_connection = True
        start = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n"
        piece, pause = (b" " * 65536, 0.0) if step == "endless" else (b" ", 0.05)
        if step == "trickle headers":
            start, piece = start + b"X-Long: ", b"x"
        else:
            start += b"\r\n"
        until = time.monotonic() + 10
        try:
            request.wfile.write(start)
            while time.monotonic() < until and not self._over.wait(pause):
                request.wfile.write(piece)
        except OSError:
            pass

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)
