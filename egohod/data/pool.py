"""Processes that work for a tool: what each does first, and a pool that shares the memory of its parent."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from egohod.config import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


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


class ForkedPool(Generic[Task, Result]):
    """Processes that call one function on tasks and share this process's memory as it is now.

    An exception in a task is raised here as it is. Leaving the context ends the processes.
    """

    def __init__(self, workers: int, function: Callable[[Task], Result]) -> None:
        self._function = function
        context = multiprocessing.get_context("fork")
        self._tasks: Any = context.SimpleQueue()
        self._results: Any = context.SimpleQueue()
        self._processes = [context.Process(target=self._work, daemon=True) for _ in range(workers)]

    def __enter__(self) -> ForkedPool[Task, Result]:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # they hold nothing that could be lost
        for process in self._processes:
            process.join()

    def unordered(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """(task, result) of every task, in any order. Tasks are taken as there is room for them."""
        todo = iter(tasks)
        # Twice as many as there are processes keeps all of them busy.
        waiting = sum(self._give(task) for task in itertools.islice(todo, 2 * len(self._processes)))
        while waiting:
            while not self._results._reader.poll(1.0):
                dead = [process for process in self._processes if not process.is_alive()]
                if dead:
                    raise UserError(f"a worker process died (exit code {dead[0].exitcode}); too little memory?")
            task, result, error = self._results.get()
            if error is not None:
                raise error
            waiting += -1 + sum(self._give(task) for task in itertools.islice(todo, 1))
            yield task, result

    def _give(self, task: Task) -> int:
        self._tasks.put(task)
        return 1

    def _work(self) -> None:
        follow_parent()
        while True:
            task = self._tasks.get()
            try:
                self._results.put((task, self._function(task), None))
            except Exception as error:
                self._results.put((task, None, error))
