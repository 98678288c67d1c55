"""A headless Chromium, spoken to over a pipe in its debugging protocol: no driver and no package between."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a real browser (Debian: apt-get install chromium)")
_PATIENCE = 60.0
_KEY_CODES = {
    **{"Tab": 9, "Enter": 13, "Escape": 27, "End": 35},
    **{"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40},
}


class Page:
    """One tab. ``requests`` are the addresses it requested, ``complaints`` the errors and warnings of its console."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._in, self._out, self._rest, self._number = incoming, outgoing, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._events: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, address: Path | str) -> None:
        """Load a file or an address and wait until it is all there."""
        self._events.clear()
        self.send("Page.navigate", url=address if isinstance(address, str) else address.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._read()

    def run(self, script: str) -> Any:
        """What a JavaScript expression gives."""
        reply = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def until(self, script: str) -> Any:
        """What an expression gives once that is true."""
        until = time.monotonic() + _PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < until, f"not within {_PATIENCE:g} s: {script}; {self.complaints}"
            time.sleep(0.05)
        return value

    def press(self, *keys: str) -> None:
        """Press keys one after the other: a character, or a name such as Enter, Tab or ArrowDown."""
        for key in keys:
            text = "\r" if key == "Enter" else key if len(key) == 1 else ""
            code = _KEY_CODES.get(key, ord(key[0].upper()) if key.isalnum() else 0)
            event = {"key": key, "text": text, "windowsVirtualKeyCode": code}
            self.send("Input.dispatchKeyEvent", type="keyDown", **event)
            self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def pictures(self) -> list[int]:
        """The widths of the page's images in pixels; one that is broken is an error.

        Those below the fold load lazily, so they are fetched here, or a slow machine would not have them yet.
        """
        return self.run(
            "Promise.all([...document.images].map((each) => {"
            "each.loading = 'eager'; return each.decode().then(() => each.naturalWidth); }))"
        )

    def size(self, width: int, height: int, scale: float = 1, mobile: bool = False) -> None:
        """As if on a screen of that many CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def picture(self, whole: bool = False) -> bytes:
        """What is seen, or the page in its whole length, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, until - time.monotonic()))
            assert ready, "Chromium does not start"
            more = os.read(self._in, 1 << 20)
            assert more, "Chromium has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        reply = json.loads(message)
        self._note(reply.get("method", ""), reply.get("params", {}))
        return reply

    def _note(self, method: str, event: dict[str, Any]) -> None:
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.complaints.append(event["entry"]["text"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a fresh Chromium that keeps its files in ``profile``."""
    assert CHROMIUM
    to_us, from_it = os.pipe()
    to_it, from_us = os.pipe()
    command = [CHROMIUM, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu"]
    # A container has neither the rights for the sandbox nor much shared memory.
    command += ["--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", "about:blank"]
    # Chromium reads from its descriptor 3 and writes to 4. First out of the way of both numbers.
    shell = f'exec 8<&{to_it} 9>&{from_it}; exec 3<&8 4>&9; exec "$@" 8<&- 9>&-'
    process = subprocess.Popen(
        ["bash", "-c", shell, "chromium", *command],
        pass_fds=(to_it, from_it),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(profile)},
    )
    os.close(to_it)
    os.close(from_it)
    try:
        yield Page(to_us, from_us)
    finally:
        # The end of its input is its sign to go.
        os.close(from_us)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_us)
