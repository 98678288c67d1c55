"""How the stages do their work: in processes that decode and detect, or one clip after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from egohod.data.clips import ClipSource
from egohod.data.pool import ForkedPool
from egohod.data.video import Frames, VideoError
from egohod.hod.blocks import Found
from egohod.hod.pipeline import Task

DETECT, TRACK, NARRATE, CHECK = STAGES = ("detect", "track", "narrate", "check")


class Looking:
    """The stage that reads frames: ``look`` makes a value of those of a clip, in ``workers`` processes.

    A clip whose video cannot be read is a failure; storage that cannot be used at all ends the run.
    """

    name, of_text = DETECT, False

    def __init__(
        self,
        source: ClipSource,
        frames: int,
        look: Callable[[Frames, str], Any],
        settings: Mapping[str, Any],
        workers: int,
    ) -> None:
        self.settings = {"frames": frames, **settings}
        self._source, self._frames, self._look, self._workers = source, frames, look, workers

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Found]]:
        """See :class:`~egohod.hod.pipeline.Stage`."""
        if not self._workers:
            yield from ((task, self._one(task)) for task in tasks)
            return
        with ForkedPool(self._workers, self._one) as pool:
            yield from pool.unordered(tasks)

    def _one(self, task: Task) -> Found:
        row = self._source.table.row(task.index)
        try:
            return Found(self._look(self._source.read(row, self._frames, None), row.video_id))
        except VideoError as error:
            return Found(None, str(error))


class Thinking:
    """A stage that works on what is known: ``think`` makes a value of a clip's number and the values so far.

    With ``at_once`` above 1 so many threads do, for a ``think`` that waits for others.
    """

    def __init__(
        self,
        name: str,
        think: Callable[[int, Mapping[str, Any]], Found],
        settings: Mapping[str, Any],
        of_text: bool = False,
        at_once: int = 1,
    ) -> None:
        self.name, self.settings, self.of_text = name, settings, of_text
        self._think, self._at_once = think, at_once

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Found]]:
        """See :class:`~egohod.hod.pipeline.Stage`."""
        if self._at_once == 1:
            yield from ((task, self._think(task.index, task.before)) for task in tasks)
            return
        todo, running = iter(tasks), dict[Future[Found], Task]()
        pool = ThreadPoolExecutor(self._at_once)
        try:
            while True:
                for task in itertools.islice(todo, self._at_once - len(running)):
                    running[pool.submit(self._think, task.index, task.before)] = task
                if not running:
                    return
                done = wait(running, return_when=FIRST_COMPLETED).done
                # What failed last: the others' work is then not lost with it.
                for future in sorted(done, key=lambda each: each.exception() is not None):
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
