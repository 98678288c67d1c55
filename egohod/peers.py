"""The processes of a run watch one another: one that dies, hangs or fails ends all, with a message that names it.

Collectives know nothing of this: gloo says that a connection was closed, NCCL waits for half an hour. So every process
keeps one connection to the first one, on which both sides say every few seconds that they are there. A process that is
killed closes it at once; a node that vanishes falls silent. The first process tells all others what happened, and also
that one of them was asked to stop.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from egohod.distributed import Distributed, host_name
from egohod.errors import UserError
from egohod.stopping import Interrupted, RunFailed

# How long a process may take to leave by itself (to finish a checkpoint, say) before it is ended.
GRACE_SECONDS = 20.0
_TICK_SECONDS = 0.5
_CONNECT_SECONDS = 120.0
# How errors of collectives read when a process at the other end has left.
_OF_COLLECTIVES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "tcpstore", "processgroup")
BROKEN, USER_ERROR = 1, 2


@contextmanager
def watched(dist: Distributed, patience: float) -> Iterator[None]:
    """Within, the end of one process is the end of all: collective over the processes of the run.

    A process that has not been heard of for ``patience`` seconds counts as dead. Raises, instead of what collectives
    raise when another process left: :class:`RunFailed` naming the one that failed, or :class:`Interrupted` if it
    left because the run was asked to stop.
    """
    if dist.world_size == 1:
        yield
        return
    peers = _Peers(dist, patience)
    try:
        yield
        # Nobody goes before the first process has written what comes last: if it cannot, all have failed.
        dist.gather_objects(None)
    except BaseException as error:
        dist.stop.at_once = False
        cause = peers.leave(error)
        if cause is error:
            raise
        raise cause from None
    peers.done()


@dataclass
class _Connection:
    """To the process ``rank``."""

    socket: socket.socket
    rank: int
    heard: float
    received: bytes = b""
    left: bool = False


def _who(peer: socket.socket, token: str) -> int | None:
    """The rank of the process that connected; None if it does not know the word, as whoever else finds the port."""
    peer.settimeout(10.0)
    with suppress(OSError):
        # Unbuffered: what follows the line is read by the watch.
        said = peer.makefile("rb", buffering=0).readline(100).split()
        if len(said) == 2 and said[0] == token.encode():
            return int(said[1])
    return None


class _Peers:
    def __init__(self, dist: Distributed, patience: float) -> None:
        self._dist, self._patience = dist, patience
        self._failure: tuple[str, int] | None = None
        self._told = threading.Event()
        self._deadline = float("inf")
        self._asked = False
        self._done = False
        self._alone = False
        self._beaten = 0.0
        self._sending = threading.Lock()
        self._connections = self._accept() if dist.is_main else self._connect()
        self._selector = selectors.DefaultSelector()
        for each in self._connections:
            each.socket.settimeout(_CONNECT_SECONDS)
            self._selector.register(each.socket, selectors.EVENT_READ, each)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    # Joining

    def _accept(self) -> list[_Connection]:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=both) as server:
            server.settimeout(_CONNECT_SECONDS)
            token, port = secrets.token_hex(8), server.getsockname()[1]
            self._hosts = [host for host, _, _ in self._dist.gather_objects((host_name(), port, token))]
            found: dict[int, _Connection] = {}
            while len(found) < self._dist.world_size - 1:
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    late = [
                        f"rank {rank} on {host}" for rank, host in enumerate(self._hosts) if rank not in (0, *found)
                    ]
                    raise UserError(f"{host_name()}, port {port}, was not reached by {', '.join(late)}") from None
                rank = _who(peer, token)
                if rank is None:
                    peer.close()
                else:
                    found[rank] = _Connection(peer, rank, time.monotonic())
        return [found[rank] for rank in sorted(found)]

    def _connect(self) -> list[_Connection]:
        told = self._dist.gather_objects((host_name(), 0, ""))
        self._hosts = [host for host, _, _ in told]
        main, port, token = told[0]
        names = [os.environ.get("MASTER_ADDR", main), main]
        failures = []
        for name in dict.fromkeys(names):
            try:
                peer = socket.create_connection((name, port), timeout=_CONNECT_SECONDS)
            except OSError as error:
                failures.append(f"{name}:{port}: {error.strerror or error}")
                continue
            peer.sendall(f"{token} {self._dist.rank}\n".encode())
            return [_Connection(peer, 0, time.monotonic())]
        raise UserError(f"{host_name()} cannot reach the first process: {', '.join(failures)}")

    # Leaving

    def leave(self, error: BaseException) -> BaseException:
        """Tell the others that this process leaves with ``error``; returns what it should leave with instead."""
        cause = self._cause(error)
        if isinstance(cause, Interrupted):
            self._say("interrupted", str(cause))
            self.done()
        else:
            # What is left to do, such as leaving the process group, may wait for processes that are gone.
            self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
        return cause

    def done(self) -> None:
        """End the watching; the others are told that this process may go."""
        self._say("done", "")
        self._done = True
        self._thread.join(2 * _TICK_SECONDS)
        for each in self._connections:
            each.socket.close()

    def _cause(self, error: BaseException) -> BaseException:
        text, of_collective = str(error), False
        if isinstance(error, RuntimeError) and any(word in text.lower() for word in _OF_COLLECTIVES):
            of_collective = self._told.wait(self._patience + _TICK_SECONDS)
        if isinstance(error, UserError):
            self._fail(f"rank {self._dist.rank} on {host_name()}: {text}", USER_ERROR)
            # The first process prints it for all.
            return RunFailed(text, USER_ERROR, quiet=True) if self._is_quiet else error
        if self._failure is not None:
            return RunFailed(*self._failure, quiet=self._is_quiet)
        if of_collective:
            return Interrupted(self._dist.stop.reason)
        if not isinstance(error, Interrupted):
            self._fail(f"rank {self._dist.rank} on {host_name()}: {type(error).__name__}: {text}", BROKEN)
        return error

    @property
    def _is_quiet(self) -> bool:
        return not self._dist.is_main and not self._alone

    # Watching

    def _watch(self) -> None:
        while not self._done:
            for key, _ in self._selector.select(_TICK_SECONDS):
                self._receive(key.data)
            self._beat()
            for each in self._connections:
                silent = time.monotonic() - each.heard
                if not each.left and silent > self._patience:
                    self._lost(each, f"has not answered for {silent:.0f} s (train.peer_timeout)")
            if self._dist.stop and not self._asked:
                self._asked = True
                self._say("stop", f"rank {self._dist.rank} on {host_name()}: {self._dist.stop.reason}")
            if time.monotonic() > self._deadline:
                self._end()

    def _receive(self, peer: _Connection) -> None:
        try:
            received = peer.socket.recv(65536)
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(peer.socket)
            self._alone = not self._dist.is_main
            if not peer.left:
                peer.left = True
                self._lost(peer, "is gone: killed, out of memory, or its node is down")
            return
        peer.heard = time.monotonic()
        *lines, peer.received = (peer.received + received).split(b"\n")
        for line in lines:
            self._hear(peer, json.loads(line))

    def _hear(self, peer: _Connection, message: dict[str, Any]) -> None:
        kind = message["is"]
        if kind in ("done", "interrupted") and message["rank"] == peer.rank:
            peer.left = True
        if kind == "failed":
            self._fail(message["text"], message["code"], teller=peer)
        elif kind in ("stop", "interrupted") and not (kind == "stop" and self._asked):
            # Told on by the first process, so that all of them stop at the same step.
            self._pass_on(message, teller=peer)
            self._asked = True
            self._dist.stop.ask(message["text"])
            self._dist.stop.wake()
            if kind == "interrupted":
                self._told.set()

    def _lost(self, peer: _Connection, how: str) -> None:
        self._alone = not self._dist.is_main
        where = f"rank {peer.rank} on {self._hosts[peer.rank]}"
        self._fail(f"{where} {how}; the same command goes on from the last checkpoint", BROKEN, teller=peer)

    def _fail(self, text: str, code: int, teller: _Connection | None = None) -> None:
        if self._failure is not None:
            return
        self._failure = text, code
        message = {"is": "failed", "rank": self._dist.rank, "text": text, "code": code}
        if teller is None:
            self._send(message)
            return
        self._pass_on(message, teller)
        self._deadline = time.monotonic() + GRACE_SECONDS
        self._told.set()
        self._dist.stop.ask(text)
        self._dist.stop.wake()

    def _say(self, kind: str, text: str) -> None:
        self._send({"is": kind, "rank": self._dist.rank, "text": text})

    def _pass_on(self, message: dict[str, Any], teller: _Connection) -> None:
        if self._dist.is_main:
            self._send(message, but=teller)

    def _send(self, message: dict[str, Any], but: _Connection | None = None) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for each in self._connections:
                if each is not but:
                    # One that is gone is noticed when it is listened to.
                    with suppress(OSError):
                        each.socket.sendall(line)

    def _beat(self) -> None:
        if time.monotonic() - self._beaten > min(self._patience / 4, 10.0):
            self._beaten = time.monotonic()
            self._say("here", "")

    def _end(self) -> None:
        """The main thread waits for something that never comes."""
        assert self._failure is not None
        text, code = self._failure
        if not self._is_quiet:
            sys.stderr.write(f"error: {text}\n")
            sys.stderr.flush()
        os._exit(code)
