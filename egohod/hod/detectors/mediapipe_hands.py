"""Hands by MediaPipe: boxes around its 21 landmarks, sides corrected for an egocentric view.

MediaPipe tells the side of a hand as in a mirrored selfie; the wearer's side is the other one. It finds no objects and
tells no contact. It runs in a child process (see :mod:`egohod.hod.detectors.mediapipe_worker`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from egohod.config import PROJECT
from egohod.data.detections import LEFT, RIGHT
from egohod.hod.detectors import mediapipe_worker
from egohod.hod.detectors.base import DetectorError, Undetectable, row, settle_sides, table

FOLDER = ".mediapipe"
"""In the project; exps/generate_hod.sh installs it there."""
_WEARERS = {"Left": RIGHT, "Right": LEFT}


def _install() -> str:
    """The command that installs MediaPipe, to be typed where the user stands."""
    here = Path() if Path.cwd() == PROJECT else PROJECT
    requirements = here / "exps" / "mediapipe_requirements.txt"
    return f"python -m pip install --no-deps --target {here / FOLDER} -r {requirements}"


class _Died(Exception):
    """The child process is gone, with its last words."""


class MediapipeHands:
    """Starts one child process, which :meth:`close` ends.

    ``folder`` holds MediaPipe and what it needs (None: the environment variable EGOHOD_MEDIAPIPE, else ``.mediapipe``
    of the project); ``confidence`` is the least that its palm detector asks for and ``following`` the least that there
    still is a hand where one was in the picture before: the first proposes, the second checks. ``margin`` is added
    around the landmarks, which lie inside the hand, as a share of their box. Raises :class:`DetectorError` where
    MediaPipe is not or does not start.
    """

    needs_pictures = True

    def __init__(
        self, folder: str | None = None, confidence: float = 0.1, following: float = 0.3, margin: float = 0.15
    ) -> None:
        if not margin >= 0:
            raise DetectorError(f"margin must be at least 0, not {margin:g}")
        place = Path(folder or os.environ.get("EGOHOD_MEDIAPIPE") or PROJECT / FOLDER).resolve()
        if not (place / "mediapipe").is_dir():
            raise DetectorError(
                f"MediaPipe is not in {place}; cure: {_install()} (or set EGOHOD_MEDIAPIPE to its folder)"
            )
        self._margin = margin
        self._command = [sys.executable, mediapipe_worker.__file__, str(confidence), str(following)]
        paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        self._start()

    def _start(self) -> None:
        # Its log is told only if it dies.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=self._environment
        )
        try:
            self._answer()
        except _Died as died:
            raise DetectorError(f"MediaPipe does not run: {died}; cure: {_install()}") from died

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        """See :class:`~egohod.hod.detectors.base.Detector`.

        Raises :class:`Undetectable` if MediaPipe died of the pictures, :class:`DetectorError` if it does not come back.
        """
        assert pictures is not None, "MediaPipe looks at pictures"
        try:
            answer = self._ask(pictures)
        except _Died as died:
            self._start()
            raise Undetectable(f"MediaPipe died: {died}") from died
        rows = []
        for number, second, hands in zip(frame_numbers, seconds, answer, strict=True):
            if not hands:
                continue
            boxes = np.array([self._box(np.array(marks)) for _, _, marks in hands])
            scores = np.array([score for _, score, _ in hands])
            kept, sides = settle_sides(boxes, scores, np.array([_WEARERS[label] for label, _, _ in hands]))
            rows += [
                row(video_id, number, second, boxes[i], scores[i], side=int(side))
                for i, side in zip(kept, sides, strict=True)
            ]
        return table(rows)

    def close(self) -> None:
        """End the child process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # Where it has died already, what was not written to it yet cannot be.
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _box(self, marks: np.ndarray) -> np.ndarray:
        low, high = marks.min(axis=0), marks.max(axis=0)
        margin = self._margin * (high - low)
        return np.clip(np.concatenate([low - margin, high + margin]), 0, 1)

    def _ask(self, pictures: np.ndarray) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"%d %d %d\n" % pictures.shape[:3])
            self._process.stdin.write(np.ascontiguousarray(pictures).tobytes())
            self._process.stdin.flush()
        except OSError as error:
            raise self._died() from error
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        return json.loads(line)

    def _died(self) -> _Died:
        self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        self._log.close()
        return _Died(said[-1] if said else f"exit code {self._process.returncode}")
