"""S3 on loopback: a real server in a process of its own, and one that fails on request."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

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
    it sends whole objects, as simple servers do; ``sizes`` false leaves out how large they are. Once
    ``opened`` is cleared, answers wait until ``gate`` requests are in flight.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.script: list[tuple[int, str] | str] = []
        self.requests: list[str] = []
        self.ranges = self.sizes = True
        self.sent = 0
        self.gate = self.most_in_flight = self._in_flight = 0
        self._lock, self.opened = threading.Lock(), threading.Event()
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

    @property
    def listed(self) -> list[str]:
        """The folders that were listed, in order."""
        return [
            parse_qs(each.partition("?")[2].partition(" ")[0]).get("prefix", [""])[0]
            for each in self.requests
            if "list-type=2" in each
        ]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range", "")
        self.requests.append(f"{request.command} {request.path} {wanted}".strip())
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            if self._in_flight >= self.gate:
                self.opened.set()
        self.opened.wait(60)
        self.opened.set()
        try:
            self._answer(request, wanted)
        finally:
            with self._lock:
                self._in_flight -= 1

    def _answer(self, request: BaseHTTPRequestHandler, wanted: str) -> None:
        step = self.script.pop(0) if self.script else "ok"
        if step == "ok" and "list-type=2" in request.path:
            return self._send(request, 200, self._listing(request.path).encode())
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

    def _listing(self, path: str) -> str:
        """One page of a folder's files and sub-folders, as ListObjectsV2 answers."""
        bucket, _, query = path.partition("?")
        prefix = parse_qs(query).get("prefix", [""])[0]
        below = {key[len(bucket) + 1 :]: body for key, body in self.objects.items() if key.startswith(f"{bucket}/")}
        entries = {}
        for key, body in below.items():
            if key.startswith(prefix):
                name, slash, _ = key[len(prefix) :].partition("/")
                entries[prefix + name + slash] = len(body)
        lines = [
            f"<CommonPrefixes><Prefix>{escape(key)}</Prefix></CommonPrefixes>"
            if key.endswith("/")
            else f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size></Contents>"
            for key, size in sorted(entries.items())
        ]
        return (
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false</IsTruncated>'
            f"<KeyCount>{len(lines)}</KeyCount><Prefix>{escape(prefix)}</Prefix>{''.join(lines)}</ListBucketResult>"
        )

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
