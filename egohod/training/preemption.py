"""Being asked to stop: finish the step, save, leave with exit code 0."""

from __future__ import annotations

import logging
import signal
from types import FrameType, TracebackType

from egohod.distributed import Distributed

log = logging.getLogger(__name__)

# SIGTERM: schedulers before they take a node back; SIGUSR1: Slurm's --signal; SIGINT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Remembers that a signal came. Repeats change nothing (launchers send several); a second Ctrl-C ends at once."""

    def __init__(self, dist: Distributed):
        self._dist = dist
        self._received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]

    def requested(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer at the same step."""
        asked = self._dist.any(self._received is not None)
        if asked and self._received is not None:
            log.info("%s received: saving, then leaving", signal.Signals(self._received).name)
        return asked
