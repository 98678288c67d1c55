"""Why a process leaves its run before the end: it was asked to, or another process of the run failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """Asked to stop, and nothing is lost: programs end with exit code 0.

    As KeyboardInterrupt it is no ``Exception``: code that expects damaged files must not take it for one.
    """


class RunFailed(Exception):
    """The run is over because of another process, which the message names.

    ``code`` is the exit code; ``quiet`` when the first process prints the message for all.
    """

    def __init__(self, message: str, code: int, *, quiet: bool) -> None:
        super().__init__(message)
        self.code = code
        self.quiet = quiet


class StopRequest:
    """Whether this run was asked to stop: set by a signal or by another process of the run, read by whoever polls."""

    def __init__(self) -> None:
        self.reason = ""
        self.at_once = True
        """A request ends what is being done with :class:`Interrupted`; false while training, which polls instead."""
        self.wake: Callable[[], None] = lambda: None
        """Let the main thread notice a request that another thread made."""

    def __bool__(self) -> bool:
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """The first request counts."""
        self.reason = self.reason or reason

    def check(self) -> None:
        """Raise :class:`Interrupted` if there was a request."""
        if self.reason:
            raise Interrupted(self.reason)

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Within, a request ends nothing by itself: what runs here asks, and leaves when nothing is lost."""
        self.at_once = False
        self.check()
        yield
        # Not after an exception: the way out is not to be broken into.
        self.at_once = True
