"""Signals that ask a run to stop. While training: finish the step, save, leave with exit code 0; else leave at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

from egohod.stopping import Interrupted, StopRequest

# SIGTERM: schedulers before they take a node back; SIGUSR1: Slurm's --signal; SIGINT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Turns signals into a request. Repeats change nothing (launchers send several); a second Ctrl-C ends at once."""

    def __init__(self, stop: StopRequest):
        self._stop = stop
        self._raised = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        # Signal handlers run in the main thread, wherever it is: as a real signal does.
        self._stop.wake = lambda: os.kill(os.getpid(), signal.SIGTERM)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.wake = lambda: None
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._stop.ask(f"{signal.Signals(number).name} received")
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]
        # Once only: a repeat must not break into the way out.
        if self._stop.at_once and not self._raised:
            self._raised = True
            raise Interrupted(self._stop.reason)
