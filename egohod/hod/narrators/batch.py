"""Requests to a language model in a file, and its answers in another: JSON lines as of OpenAI's batches.

    {"custom_id": "4f0c9a1b2c3d-1-0x8", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"custom_id": "4f0c9a1b2c3d-1-0x8", "response": {"status_code": 200, "body": {...}}, "error": null}

``vllm run-batch`` and OpenAI's Batch API read the first kind and write the second. A ``custom_id`` has the run's
fingerprint, 1 for the first caption of a clip or 2 for the second one, after a refusal, and the clips of the request
as runs of their indices: ``0x8_12`` are the clips 0 to 7 and 12. So answers need neither the requests nor an order, and
those of another run are recognised.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from egohod.errors import UserError
from egohod.hod.config import NarratorConfig
from egohod.hod.narrators import Narration, Request
from egohod.hod.narrators.llm import MAX_BYTES, Answer, ChatFormat, read_chat, shown, spelled

log = logging.getLogger(__name__)

FIRST, SECOND = 1, 2
_NO_JSON, _OTHER_RUN = "not JSON", "of another run"  # kinds of lines
_NAMED = 3  # examples of each kind of line that cannot be used
_LONGEST_ID = 64  # characters: some services refuse files with longer ones
_ID = re.compile(r"([0-9a-f]{12})-([12])-(\d{1,9}(?:x\d{1,9})?(?:_\d{1,9}(?:x\d{1,9})?)*)")


def custom_id(run: str, attempt: int, clips: Sequence[int]) -> str:
    """The name of a request for ``clips`` in ascending order."""
    runs: list[list[int]] = []
    for clip in clips:
        if runs and clip == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([clip, 1])
    places = "_".join(f"{first}x{count}" if count > 1 else str(first) for first, count in runs)
    return f"{run}-{attempt}-{places}"


def split(run: str, attempt: int, clips: Sequence[int], size: int) -> Iterator[range]:
    """The places of ``clips`` by request: at most ``size`` of them, and no more than its name has room for."""
    start = 0
    while start < len(clips):
        end = min(start + size, len(clips))
        while len(custom_id(run, attempt, clips[start:end])) > _LONGEST_ID:
            end -= 1
        yield range(start, end)
        start = end


def request_line(run: str, attempt: int, clips: Sequence[int], body: dict[str, Any]) -> str:
    """A line of a file of requests, for ``clips`` in ascending order."""
    name = custom_id(run, attempt, clips)
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line, ensure_ascii=True) + "\n"


class _Row(NamedTuple):
    """One answer."""

    attempt: int
    clips: list[int]
    answer: Answer


class _Unusable(NamedTuple):
    """A line that is no answer to this run."""

    kind: str
    name: str = ""  # which of its kind


class BatchNarrator:
    """The narrator that has its answers from files. Reads them once for an index; answers stay on disk.

    Lines that cannot be used are counted and logged by their kind. Raises :class:`UserError` for files that cannot be
    read, are of another run, or in which no request has succeeded.
    """

    def __init__(self, settings: NarratorConfig, paths: Sequence[Path], run: str, clips: range, total: int) -> None:
        """``clips`` are those of the shard, of a table of ``total``; ``run`` is the fingerprint of the requests."""
        self.name = settings.kind
        self._format = ChatFormat(settings)
        self.instructions = self._format.instructions
        self._settings, self._paths, self._run, self._clips, self._total = settings, list(paths), run, clips, total
        # For each attempt and clip of the shard the file that has its answer (-1: none), the place in it, and whether
        # that is a failure: 22 bytes a clip, however long the answers are.
        self._file = np.full((2, len(clips)), -1, np.int16)
        self._offset = np.zeros((2, len(clips)), np.int64)
        self._failed = np.zeros((2, len(clips)), bool)
        self._last: tuple[tuple[int, int], dict[int, Narration]] = ((-1, -1), {})
        for number in range(len(self._paths)):
            self._index(number)

    @property
    def answered(self) -> list[int]:
        """The clips of the shard with an answer, be it a failure, to one of their requests."""
        return [self._clips[place] for place in np.flatnonzero((self._file >= 0).any(axis=0)).tolist()]

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """See :class:`~egohod.hod.narrators.Narrator`; the requests' seeds are the indices of their clips."""
        for number, request in enumerate(requests):
            attempt = SECOND if request.complaints else FIRST
            at = attempt - 1, request.seed - self._clips.start
            key = int(self._file[at]), int(self._offset[at])
            if key[0] < 0:
                problem = "no answer: none in the batch" + (" to a second request" if attempt == SECOND else "")
                yield number, Narration(None, self.name, problem=problem)
                continue
            # The clips of a request follow one another: its answer is read once.
            if self._last[0] != key:
                with self._paths[key[0]].open("rb") as file:
                    file.seek(key[1])
                    row = self._parse(file.readline(MAX_BYTES))
                if isinstance(row, _Unusable):
                    raise UserError(f"{self._paths[key[0]]}: has changed while it was read")
                narrations = self._format.narrations(row.answer, len(row.clips))
                self._last = key, dict(zip(row.clips, narrations, strict=True))
            yield number, self._last[1][request.seed]

    def _index(self, number: int) -> None:
        """Find the answers in a file, and log what else is in it."""
        path = self._paths[number]
        notes, examples = Counter[str](), dict[str, list[str]]()

        def note(kind: str, name: str) -> None:
            notes[kind] += 1
            if notes[kind] <= _NAMED:
                examples.setdefault(kind, []).append(name)

        lines = answers = failed = 0
        reason: str | None = None
        try:
            with path.open("rb") as file:
                while line := file.readline(MAX_BYTES):
                    offset, lines = file.tell() - len(line), lines + 1
                    row: _Row | _Unusable
                    if len(line) == MAX_BYTES and not line.endswith(b"\n"):
                        while (rest := file.readline(MAX_BYTES)) and not rest.endswith(b"\n"):
                            pass
                        row = _Unusable(f"longer than {MAX_BYTES / 1e6:g} MB")
                    elif not line.strip():
                        continue
                    else:
                        row = self._parse(line)
                    if isinstance(row, _Unusable):
                        if row.kind == _OTHER_RUN:
                            raise UserError(
                                f"{path}: line {lines} is of another run{row.name}, this one has the fingerprint "
                                f"{self._run}; give --batch_answers the clips and settings that --batch_requests had"
                            )
                        cut = row.kind == _NO_JSON and not line.endswith(b"\n")
                        note("broken off at the end of the file" if cut else row.kind, f"line {lines}{row.name}")
                        continue
                    answers += 1
                    if row.answer.problem is not None:
                        failed += 1
                        reason = reason or row.answer.problem
                    if not any(clip in self._clips for clip in row.clips):
                        note("answers to another shard", f"line {lines}")
                    elif self._take(number, offset, row):
                        note("further answers to a request", f"line {lines} (clip {row.clips[0]})")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        for kind, count in notes.items():
            names = ", ".join(examples[kind]) + (", ..." if count > _NAMED else "")
            log.warning("%s: %s of %s lines: %s: %s", path, f"{count:,}", f"{lines:,}", kind, names)
        if not answers:
            raise UserError(f"{path}: has no answer to a request of this run, in {lines:,} lines")
        if failed == answers:
            raise UserError(f"{path}: not one of {answers:,} requests has succeeded; the first: {reason}")
        if failed:
            log.warning("%s: %s of %s requests have failed; the first: %s", path, f"{failed:,}", f"{answers:,}", reason)

    def _take(self, number: int, offset: int, row: _Row) -> bool:
        """Note where the answer of each clip is; whether one had an answer already."""
        places = np.array([clip - self._clips.start for clip in row.clips if clip in self._clips])
        attempt, has_failed = row.attempt - 1, row.answer.problem is not None
        is_taken = self._file[attempt, places] >= 0
        # The first answer counts, unless it is a failure: files of two tries may have been put together.
        places = places[~is_taken | (self._failed[attempt, places] & (not has_failed))]
        self._file[attempt, places], self._offset[attempt, places] = number, offset
        self._failed[attempt, places] = has_failed
        return bool(is_taken.any())

    def _parse(self, line: bytes) -> _Row | _Unusable:
        """A line of a file."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return _Unusable(_NO_JSON)
        if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
            return _Unusable("without a custom_id")
        name = f" (custom_id '{shown(row['custom_id'])[:80]}')"
        match = _ID.fullmatch(row["custom_id"])
        if match is None:
            return _Unusable("not of this program", name)
        if "response" not in row and "error" not in row:
            return _Unusable("requests, not answers")
        if match[1] != self._run:
            return _Unusable(_OTHER_RUN, name)
        runs = [(int(first), int(count or 1)) for first, _, count in (x.partition("x") for x in match[3].split("_"))]
        # Before they are written out: a number in a file must not decide on the memory.
        if sum(count for _, count in runs) > self._settings.batch or any(sum(each) > self._total for each in runs):
            return _Unusable("of clips that no request has", name)
        clips = [clip for first, count in runs for clip in range(first, first + count)]
        if len(set(clips)) < len(clips):
            return _Unusable("of clips that no request has", name)
        return _Row(int(match[2]), clips, _answer(row))


def _answer(row: dict[str, Any]) -> Answer:
    """The answer in a row; with a problem for a request that failed."""
    response, error = row.get("response"), row.get("error")
    status = response.get("status_code", 200) if isinstance(response, dict) else None
    if status == 200 and not error:
        try:
            return read_chat(response.get("body"), shown)  # type: ignore[union-attr]
        except ValueError as fault:
            return Answer(None, problem=str(fault))
    # OpenAI's error is {code, message}; vLLM's a text, or {error: {message}}.
    while isinstance(error, dict) and ("error" in error or "message" in error):
        error = error.get("message") or error.get("error")
    body = response.get("body") if isinstance(response, dict) else None
    text = shown(spelled(error if error is not None else body))
    return Answer(None, problem=f"HTTP {status}: {text}" if status is not None else text)
