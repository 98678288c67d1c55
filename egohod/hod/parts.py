"""The four stages of a configuration: detector, tracks, narrator and check, each as the pipeline runs it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from egohod.config import PROJECT
from egohod.data.source import ClipSource
from egohod.data.table import ClipTable
from egohod.data.video import Frames, VideoError
from egohod.errors import UserError
from egohod.hod import records, tracking
from egohod.hod.blocks import Found
from egohod.hod.config import HodConfig
from egohod.hod.detectors import make_detector, typed_options
from egohod.hod.detectors.base import Detector
from egohod.hod.detectors.files import DetectionFiles
from egohod.hod.facts import ClipFacts, FactsParams, facts_of, without_rare
from egohod.hod.narrate import make_narrator, make_template, narrate_checked
from egohod.hod.narrators.base import Narration, Narrator, Request
from egohod.hod.pipeline import Stage, Task
from egohod.hod.settings import used
from egohod.hod.stages import CHECK, DETECT, NARRATE, TRACK, Looking, Thinking
from egohod.hod.tracking import TrackParams

log = logging.getLogger(__name__)

PROMPTS = PROJECT / "configs" / "hod" / "prompts"
# What changes how long a narrator takes, or whom it asks, but not what it is asked.
_ROUTE = ("endpoint", "api_key_env", "concurrency", "timeout_seconds", "retries", "give_up_seconds", "prompt")
# Files are read once and shared by the workers; models are loaded by each.
_SHARED = ("detections", "oracle")


def make_stages(cfg: HodConfig, source: ClipSource, text_of: Callable[[int], str]) -> list[Stage]:
    """Detect, track, narrate, check. ``text_of`` is what was said about a clip before."""
    narrating = _Narrating(cfg, source, text_of)
    # Enough that no request waits for another at the end of a group; frames of so many clips must fit the memory.
    at_once = cfg.narrator.batch * cfg.narrator.concurrency
    group = 256 if cfg.narrator.kind == "template" else 2 * at_once if cfg.narrator.kind == "vlm" else 8 * at_once
    detector = {
        "detector": cfg.detector.kind,
        "options": typed_options(cfg.detector.kind, cfg.detector.options),
        "camera": cfg.tracks.camera,
        # Which files a clip's frames lie in, and where in them. The folders are left out: they differ by machine.
        "layout": cfg.source.layout,
        "chunk_seconds": cfg.source.chunk_seconds,
        "min_clip_seconds": cfg.source.min_clip_seconds,
    }
    tracks = {name: value for name, value in vars(cfg.tracks).items() if name != "camera"}
    return [
        Looking(source, cfg.frames, _Look(cfg, source.table), detector, cfg.workers, cfg.clip_seconds),
        Thinking(TRACK, _Tracking(cfg, source), tracks),
        Thinking(NARRATE, narrating, narrator_settings(cfg), of_text=True, group=group),
        Thinking(CHECK, narrating.check, vars(cfg.check), of_text=True, group=group),
    ]


def narrator_settings(cfg: HodConfig) -> dict[str, Any]:
    """All that a narrator's words depend on; the text of its prompt stands for the file."""
    narrator = cfg.narrator
    kept = {name: value for name, value in used(narrator).items() if name not in _ROUTE}
    kept["min_seen"] = cfg.check.min_seen
    if narrator.kind == "template":
        return kept
    prompt = Path(narrator.prompt or PROMPTS / f"{narrator.kind}.jinja")
    # A prompt that is not there, or no text, is the narrator's complaint.
    return kept | {
        "prompt": prompt.read_text(encoding="utf-8-sig", errors="replace") if prompt.is_file() else str(prompt)
    }


class _Look:
    """Boxes of a clip's frames, and how the camera moved between them."""

    def __init__(self, cfg: HodConfig, table: ClipTable) -> None:
        self._table = table
        self._kind, self._options = cfg.detector.kind, cfg.detector.options
        self._camera = cfg.tracks.camera
        self._detector: Detector | None = None

    def begin(self) -> None:
        if self._kind in _SHARED and self._detector is None:
            self._detector = make_detector(self._kind, self._options)
            assert isinstance(self._detector, DetectionFiles)
            _require_detections(self._options["path"], self._detector.videos(), self._table)

    def __call__(self, frames: Frames, video_id: str) -> dict[str, Any]:
        # A clip of fewer frames shows some of them twice.
        seconds, kept = np.unique(frames.seconds, return_index=True)
        numbers, pictures = frames.numbers[kept], frames.pictures[kept]
        if self._detector is None:
            self._detector = make_detector(self._kind, self._options)
        found = self._detector.detect(video_id, numbers, seconds, pictures)
        height, width = pictures.shape[1:3]
        shifts = tracking.camera_shifts(pictures, seconds, found) if self._camera else None
        return records.plain(
            {"seconds": seconds, "aspect": width / height, "boxes": records.boxes_to_plain(found), "shifts": shifts}
        )


def _require_detections(path: str, videos: set[str], table: ClipTable) -> None:
    """Say how many videos have no detections: their clips would get their plain narrations back without a word."""
    wanted = pd.unique(table.column("video_id"))
    lacking = [each for each in wanted if each not in videos]
    if len(lacking) == len(wanted):
        raise UserError(
            f"{path}: has detections of none of the {len(wanted):,} videos of {table.path}, such as '{lacking[0]}'; "
            "the video_id must be the same in both"
        )
    if lacking:
        log.warning(
            "%s: %s of %s videos have no detections, such as '%s'; no hand is told of in their clips",
            *(path, f"{len(lacking):,}", f"{len(wanted):,}", lacking[0]),
        )


class _Tracking:
    """Facts from boxes."""

    def __init__(self, cfg: HodConfig, source: ClipSource) -> None:
        track = TrackParams(**{each.name: getattr(cfg.tracks, each.name) for each in dataclasses.fields(TrackParams)})
        self._params, self._table = FactsParams(track=track), source.table

    def __call__(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Found]]:
        for place, task in enumerate(tasks):
            row, seen = self._table.row(task.index), task.before[DETECT]
            facts = facts_of(
                records.boxes_from_plain(seen["boxes"], row.video_id),
                np.array(seen["seconds"]),
                video_id=row.video_id,
                start=row.start,
                end=row.end,
                aspect=seen["aspect"],
                shifts=None if seen["shifts"] is None else np.array(seen["shifts"]),
                params=self._params,
            )
            yield place, Found(records.plain(facts))


class _Narrating:
    """Narrations from facts, and the check of them; the narrator is made when it is first needed."""

    def __init__(self, cfg: HodConfig, source: ClipSource, text_of: Callable[[int], str]) -> None:
        self._cfg, self._source, self._text_of = cfg, source, text_of
        self._narrator: Narrator | None = None

    def __call__(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Found]]:
        requests, faults = self._requests(tasks)
        places = list(requests)
        for number, answer in self._made().narrate(list(requests.values())):
            yield places[number], Found(records.plain(answer), makeshift=answer.problem is not None)
        yield from faults

    def check(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Found]]:
        """Judge what was narrated; what is refused is narrated once more, or by the template."""
        requests, faults = self._requests(tasks)
        places = list(requests)
        first = [records.read(Narration, tasks[place].before[NARRATE]) for place in places]
        narrator = _Remembering(self._made(), first)
        template = make_template(self._cfg.narrator)
        for number, checked in narrate_checked(narrator, list(requests.values()), self._cfg.check, template):
            if checked.text is None:
                reasons = "; ".join(dict.fromkeys((*checked.refusals, *checked.verdict.reasons)))
                yield places[number], Found(None, f"nothing true to say: {reasons}")
            else:
                value = records.plain(checked) | {"text": " ".join(checked.text.split())}
                yield places[number], Found(value, makeshift=checked.unanswered)
        yield from faults

    def _made(self) -> Narrator:
        if self._narrator is None:
            self._narrator = make_narrator(self._cfg.narrator, PROMPTS)
        return self._narrator

    def _requests(self, tasks: Sequence[Task]) -> tuple[dict[int, Request], list[tuple[int, Found]]]:
        """What to ask of each task by its place, and of which it cannot be asked."""
        requests, faults = dict[int, Request](), list[tuple[int, Found]]()
        for place, task in enumerate(tasks):
            try:
                facts = without_rare(records.read(ClipFacts, task.before[TRACK]), self._cfg.check.min_seen)
                requests[place] = Request(self._text_of(task.index), facts, task.index, self._frames(task.index))
            except VideoError as error:
                faults.append((place, Found(None, str(error))))
        return requests, faults

    def _frames(self, index: int) -> np.ndarray | None:
        if self._cfg.narrator.kind != "vlm":
            return None
        return self._source.read(self._source.table.row(index), self._cfg.narrator.frames, None).pictures


class _Remembering:
    """A narrator whose first answers are known."""

    def __init__(self, narrator: Narrator, first: Sequence[Narration]) -> None:
        self.name = narrator.name
        self.instructions = getattr(narrator, "instructions", "")
        self._narrator, self._first = narrator, first

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """See :class:`~egohod.hod.narrators.base.Narrator`."""
        if any(request.complaints for request in requests):
            return self._narrator.narrate(requests)
        return enumerate(self._first)
