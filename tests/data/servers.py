"""S3 on loopback: a real server in a process of its own, and one that fails on request."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SECRET, TOKEN, SIGNATURE = (
    "wJalrXUtnFEMIsecret",
    "IQoJb3JpZ2luX2VjEtoken",
    "X-Amz-Signature=fe5f80f77d5fa3beca038a248ff027",
)

_MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the starting process closes the pipe or is gone
"""


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """The address of a moto server, which ends with this process."""
    process = subprocess.Popen(
        [sys.executable, "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def point_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Send this process's S3 requests to ``address``, with credentials that no message may show."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


class FaultyS3:
    """Serves ``objects`` (by ``/bucket/key``), except that the first answers are those of ``script``.

    An entry of the script is an error as (status, code), ``"half"`` for a body that ends early, ``"drop"`` for a
    connection that is closed without an answer, or ``"ok"``. ``requests`` records the requests. Without ``ranges``
    it sends whole objects, as simple servers do; ``sizes`` false leaves out how large they are.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.script: list[tuple[int, str] | str] = []
        self.requests: list[str] = []
        self.ranges = self.sizes = True
        self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range", "")
        self.requests.append(f"{request.command} {request.path} {wanted}".strip())
        step = self.script.pop(0) if self.script else "ok"
        if step == "ok" and request.path.partition("?")[0] not in self.objects:
            step = (404, "NoSuchKey")
        if isinstance(step, tuple):
            status, code = step
            # Real services put such things into their answers; our messages must not repeat them.
            text = f"<Error><Code>{code}</Code><Message>{TOKEN} https://x.test/?{SIGNATURE} {SECRET}</Message></Error>"
            self._send(request, status, text.encode())
        elif step == "drop":
            request.close_connection = True
            request.connection.close()
        else:
            body = self.objects[request.path.partition("?")[0]]
            wanted = wanted if self.ranges else ""
            if wanted:
                first, last = (int(each) for each in wanted.removeprefix("bytes=").split("-"))
                body = body[first : last + 1]
            self._send(request, 206 if wanted else 200, body, cut=step == "half")

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, *, cut: bool = False) -> None:
        request.send_response(status)
        if self.sizes:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            body = body[: len(body) // 2] if cut else body
            with contextlib.suppress(OSError):  # a client that has enough
                for start in range(0, len(body), 1 << 16):
                    self.sent += request.wfile.write(body[start : start + (1 << 16)])
        request.close_connection = cut or not self.sizes
