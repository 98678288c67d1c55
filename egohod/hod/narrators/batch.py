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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from egohod.errors import UserError
from egohod.hod.config import NarratorConfig
from egohod.hod.narrators import Narration, Request
from egohod.hod.narrators.llm import MAX_BYTES, Answer, ChatFormat, read_chat, shown

log = logging.getLogger(__name__)

FIRST, SECOND = 1, 2
_ID = re.compile(r"([0-9a-f]{12})-([12])-(\d{1,9}(?:x\d{1,9})?(?:_\d{1,9}(?:x\d{1,9})?)*)")


def request_line(run: str, attempt: int, clips: Sequence[int], body: dict[str, Any]) -> str:
    """A line of a file of requests, for ``clips`` in ascending order."""
    runs: list[list[int]] = []
    for clip in clips:
        if runs and clip == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([clip, 1])
    places = "_".join(f"{first}x{count}" if count > 1 else str(first) for first, count in runs)
    line = {"custom_id": f"{run}-{attempt}-{places}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line, ensure_ascii=True) + "\n"


class _Row(NamedTuple):
    """One answer."""

    attempt: int
    clips: list[int]
    answer: Answer


class BatchNarrator:
    """The narrator that has its answers from files. Reads them once for an index; answers stay on disk.

    Lines that cannot be used are counted and logged by their kind. Raises :class:`UserError` for files that cannot be
    read, are of another run, or have no answer at all.
    """

    def __init__(self, settings: NarratorConfig, paths: Sequence[Path], run: str, clips: range, total: int) -> None:
        """``clips`` are those of the shard, of a table of ``total``; ``run`` is the fingerprint of the requests."""
        self.name = settings.kind
        self._format = ChatFormat(settings)
        self.instructions = self._format.instructions
        self._settings, self._paths, self._run, self._clips, self._total = settings, list(paths), run, clips, total
        # For each clip of the shard and attempt the file, and the place in it, of its answer: 20 bytes a clip, however
        # long the answers are. -1: none.
        self._files = np.full((2, len(clips)), -1, np.int16)
        self._offsets = np.full((2, len(clips)), -1, np.int64)
        self._row: tuple[tuple[int, int], dict[int, Narration]] = ((-1, -1), {})
        for number in range(len(self._paths)):
            self._index(number)

    @property
    def answered(self) -> list[int]:
        """The clips of the shard with an answer, be it a failure, to one of their requests."""
        return [self._clips[place] for place in np.flatnonzero((self._files >= 0).any(axis=0)).tolist()]

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """See :class:`~egohod.hod.narrators.Narrator`; the requests' seeds are the indices of their clips."""
        for number, request in enumerate(requests):
            attempt = SECOND if request.complaints else FIRST
            place = request.seed - self._clips.start
            key = int(self._files[attempt - 1, place]), int(self._offsets[attempt - 1, place])
            if key[0] < 0:
                again = " to the request after the refusal" if attempt == SECOND else ""
                yield number, Narration(None, self.name, problem=f"no answer{again} in the batch")
                continue
            # The clips of a request follow one another: its answer is read once.
            if self._row[0] != key:
                with self._paths[key[0]].open("rb") as file:
                    file.seek(key[1])
                    row = self._parse(file.readline(MAX_BYTES))
                if isinstance(row, str):
                    raise UserError(f"{self._paths[key[0]]}: changed while it was read")
                narrations = self._format.narrations(row.answer, len(row.clips))
                self._row = key, dict(zip(row.clips, narrations, strict=True))
            yield number, self._row[1][request.seed]

    def _index(self, number: int) -> None:
        """Find the answers in a file, and log what else is in it."""
        path = self._paths[number]
        notes: dict[str, list[str]] = {}  # kind of line: where the first few are
        rows = usable = failed = 0
        reason = ""
        try:
            with path.open("rb") as file:
                while True:
                    offset, line = file.tell(), file.readline(MAX_BYTES)
                    if not line:
                        break
                    if not line.strip():
                        continue
                    rows += 1
                    row: _Row | str
                    if len(line) == MAX_BYTES and not line.endswith(b"\n"):
                        while len(rest := file.readline(MAX_BYTES)) == MAX_BYTES and not rest.endswith(b"\n"):
                            pass
                        row = f"longer than {MAX_BYTES / 1e6:g} MB"
                    else:
                        row = self._parse(line)
                        if row == _NO_JSON and not line.endswith(b"\n"):
                            row = "broken off at the end of the file"
                    if isinstance(row, str):
                        notes.setdefault(row, []).append(f"line {rows}")
                        continue
                    usable += 1
                    if row.answer.problem is not None:
                        failed += 1
                        reason = reason or row.answer.problem
                    self._take(number, offset, row, notes)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        for kind, where in notes.items():
            log.warning("%s: %s lines are %s: %s", path, f"{len(where):,}", kind, ", ".join(where[:3]))
        if not usable:
            raise UserError(f"{path}: holds no answer to a request of this run, in {rows:,} lines")
        if failed == usable:
            raise UserError(f"{path}: not one of its {usable:,} requests has succeeded; the first: {reason}")
        if failed:
            log.warning("%s: %s of %s requests have failed; the first: %s", path, f"{failed:,}", f"{usable:,}", reason)

    def _take(self, number: int, offset: int, row: _Row, notes: dict[str, list[str]]) -> None:
        """Note where the answer of each clip is."""
        places = [clip - self._clips.start for clip in row.clips if clip in self._clips]
        if not places:
            notes.setdefault("of another shard", []).append(f"clip {row.clips[0]}")
            return
        attempt = row.attempt - 1
        taken = self._files[attempt, places] >= 0
        if taken.any():
            notes.setdefault("a second answer to their request", []).append(f"clip {row.clips[0]}")
        # The first answer of a clip counts, unless that failed: a file may have another try after it.
        for place, is_taken in zip(places, taken.tolist(), strict=True):
            if not is_taken or (row.answer.problem is None and self._has_failed(attempt, place)):
                self._files[attempt, place], self._offsets[attempt, place] = number, offset

    def _has_failed(self, attempt: int, place: int) -> bool:
        with self._paths[self._files[attempt, place]].open("rb") as file:
            file.seek(int(self._offsets[attempt, place]))
            row = self._parse(file.readline(MAX_BYTES))
        return not isinstance(row, str) and row.answer.problem is not None

    def _parse(self, line: bytes) -> _Row | str:
        """A line of the file, or what it is instead of an answer. Raises :class:`UserError` for one of another run."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return _NO_JSON
        if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
            return "without a custom_id"
        match = _ID.fullmatch(row["custom_id"])
        if match is None:
            return f"of something else (custom_id '{shown(row['custom_id'])[:40]}')"
        if match[1] != self._run:
            raise UserError(
                f"answers of another run: custom_id '{shown(row['custom_id'])}' is not of {self._run}, the fingerprint of these "
                "clips and settings; run --batch_answers with the settings of --batch_requests"
            )
        if "response" not in row and "error" not in row:
            return "requests, not answers"
        runs = [(int(first), int(count or 1)) for first, _, count in (x.partition("x") for x in match[3].split("_"))]
        # Before they are written out: a number in a file must not decide on the memory.
        if sum(count for _, count in runs) > self._settings.batch or any(sum(each) > self._total for each in runs):
            return "of clips that no request has"
        clips = [clip for first, count in runs for clip in range(first, first + count)]
        return _Row(int(match[2]), clips, _answer(row))


_NO_JSON = "not JSON"


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
    what = error if error is not None else body
    text = what if isinstance(what, str) else json.dumps(what)
    return Answer(None, problem=f"HTTP {status}: {shown(text)}" if status is not None else shown(text))
