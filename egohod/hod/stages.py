"""How the stages do their work: in processes that decode and detect, or on several clips at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from egohod.data.pool import Lost, Workers
from egohod.data.source import ClipSource
from egohod.data.video import Frames, VideoError
from egohod.hod.blocks import Found
from egohod.hod.detectors.base import Undetectable
from egohod.hod.pipeline import Task

DETECT, TRACK, NARRATE, CHECK = STAGES = ("detect", "track", "narrate", "check")
# Part of what results are called by. Raise a stage's when its code makes something else of the same clip and settings:
# what older code made is then done again.
VERSIONS = {DETECT: 1, TRACK: 2, NARRATE: 8, CHECK: 5}


class Looker(Protocol):
    """Makes a value of the frames of a clip."""

    def begin(self) -> None:
        """Called once, before there are workers: what they can share is made here."""
        ...

    def __call__(self, frames: Frames, video_id: str) -> Any:
        """The value."""
        ...


class Looking:
    """The stage that reads frames: ``look`` makes a value of those of a clip, in ``workers`` processes.

    A clip whose video cannot be read is a failure, and so is one at which a process dies or takes longer than
    ``patience`` seconds; storage that cannot be used at all ends the run.
    """

    name, of_text = DETECT, False

    def __init__(
        self,
        source: ClipSource,
        frames: int,
        look: Looker,
        settings: Mapping[str, Any],
        workers: int,
        patience: float = 600.0,
    ) -> None:
        self.settings: Mapping[str, Any] = {"version": VERSIONS[DETECT], "frames": frames, **settings}
        self._source, self._frames, self._look = source, frames, look
        self._workers, self._patience = workers, patience

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Found]]:
        """See :class:`~egohod.hod.pipeline.Stage`."""
        todo = iter(tasks)
        first = next(todo, None)
        if first is None:
            return
        tasks = itertools.chain([first], todo)
        self._look.begin()
        if not self._workers:
            yield from ((task, self._one(task)) for task in tasks)
            return
        with Workers(self._workers, self._one, self._patience) as workers:
            for task, found in workers.unordered(tasks):
                yield task, Found(None, found.reason) if isinstance(found, Lost) else found

    def _one(self, task: Task) -> Found:
        row = self._source.table.row(task.index)
        try:
            return Found(self._look(self._source.read(row, self._frames, None), row.video_id))
        except (VideoError, Undetectable) as error:
            return Found(None, str(error))


class Thinking:
    """A stage that works on what is known: ``think`` gives (place, what is made of it) of each of some tasks.

    It is handed ``group`` tasks at a time.
    """

    def __init__(
        self,
        name: str,
        think: Callable[[Sequence[Task]], Iterable[tuple[int, Found]]],
        settings: Mapping[str, Any],
        of_text: bool = False,
        group: int = 256,
    ) -> None:
        self.name, self.of_text = name, of_text
        self.settings: Mapping[str, Any] = {"version": VERSIONS[name], **settings}
        self._think, self._group = think, group

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Found]]:
        """See :class:`~egohod.hod.pipeline.Stage`."""
        todo = iter(tasks)
        while some := list(itertools.islice(todo, self._group)):
            for place, found in self._think(some):
                yield some[place], found
