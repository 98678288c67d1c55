"""Processes that work for a tool: what each does first, and some that share the memory of their parent.

One that dies or hangs costs the task that it was at, and nothing else.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_CONTEXT = multiprocessing.get_context("fork")
# The next one waits at the worker, so that it is never idle.
_AT_ONCE = 2
_LOOK = 1.0


def follow_parent() -> None:
    """Leave interrupts to the main process, and leave when it is gone, however it went.

    An initialiser for process pools. A scheduler sends its signal to all processes at once; the main process decides
    what becomes of the work.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Lost(NamedTuple):
    """Why there is no result."""

    reason: str


class Workers(Generic[Task, Result]):
    """``count`` processes that call one function on tasks, and share this process's memory as it is when they start.

    An exception in a task is raised here as it is. A process that dies, or is at one task for longer than ``patience``
    seconds and is killed for it, is replaced. Leaving the context ends the processes.
    """

    def __init__(self, count: int, function: Callable[[Task], Result], patience: float) -> None:
        self._count, self._function, self._patience = count, function, patience
        self._workers: list[_Worker[Task, Result]] = []

    def __enter__(self) -> Workers[Task, Result]:
        self._workers = [_Worker(self._function) for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def unordered(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result | Lost]]:
        """(task, result) of every task, in any order. Tasks are taken as there is room for them."""
        todo = iter(tasks)
        for worker in self._workers:
            worker.give(itertools.islice(todo, _AT_ONCE))
        while busy := [worker for worker in self._workers if worker.tasks]:
            multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=_LOOK)
            for worker in busy:
                answer = worker.answer(self._patience)
                if answer is None:
                    continue
                task, (result,) = worker.tasks.popleft(), answer
                if isinstance(result, Lost):
                    self._workers[self._workers.index(worker)] = replacement = _Worker(self._function)
                    replacement.give(worker.tasks)
                    worker = replacement
                worker.give(itertools.islice(todo, 1))
                yield task, result


class _Worker(Generic[Task, Result]):
    def __init__(self, function: Callable[[Task], Result]) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.tasks = collections.deque[Task]()
        self._process = _CONTEXT.Process(target=_work, args=(theirs, function), daemon=True)
        self._process.start()
        theirs.close()
        self._since = time.monotonic()

    def give(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            if not self.tasks:
                self._since = time.monotonic()
            self.tasks.append(task)
            with contextlib.suppress(OSError):  # it is dead, which is seen when its answer is asked for
                self.pipe.send(task)

    def answer(self, patience: float) -> tuple[Result | Lost] | None:
        """What came of its first task; None if it is still at it. Raises what the task raised."""
        try:
            if self.pipe.poll():
                result, error = self.pipe.recv()
                self._since = time.monotonic()
                if error is not None:
                    raise error
                return (result,)
        except (EOFError, ConnectionError):
            self._process.join()
            self.pipe.close()
            return (Lost(f"the process that worked on it died ({_told(self._process.exitcode)})"),)
        if time.monotonic() - self._since > patience:
            self.end()
            return (Lost(f"it took longer than {patience:g} s"),)
        return None

    def end(self) -> None:
        self._process.kill()  # it holds nothing that could be lost
        self._process.join()
        self.pipe.close()


def _work(pipe: Any, function: Callable[[Any], Any]) -> None:
    follow_parent()
    while True:
        task = pipe.recv()
        answer: tuple[Any, Exception | None]
        try:
            answer = function(task), None
        except Exception as error:
            answer = None, _sendable(error)
        pipe.send(answer)


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it does not come through a pipe as it is."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _told(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}; too little memory?" if -code == signal.SIGKILL else name
    return f"exit code {code}"
