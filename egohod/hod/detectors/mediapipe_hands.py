"""Hands by MediaPipe: boxes around its 21 landmarks, sides corrected for an egocentric view. No objects, no contact."""

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

from egohod.config import IS_CHECKOUT, PROJECT
from egohod.data.detections import LEFT, RIGHT, SCHEMA
from egohod.data.videos import VideoError
from egohod.errors import UserError
from egohod.hod.detectors import Detector, assign_sides, mediapipe_worker, row

FOLDER = ".mediapipe"  # exps/generate_hod.sh installs it there
REQUIREMENTS = Path(__file__).with_name("mediapipe_requirements.txt")
# MediaPipe assumes a mirrored selfie, so that its left hand is the wearer's right one.
_WEARERS = {"Left": RIGHT, "Right": LEFT}


class MediapipeHands(Detector):
    """Runs MediaPipe in one child process (:mod:`~egohod.hod.detectors.mediapipe_worker`), which :meth:`close` ends.

    ``folder`` holds MediaPipe and what it needs (None: the environment variable EGOHOD_MEDIAPIPE, else ``.mediapipe``
    of the checkout or, with an installed package, of the working directory); ``confidence`` is the least that its palm
    detector asks for and ``following`` the least that there still is a hand where one was in the picture before: the
    first proposes, the second checks. ``margin`` is added around the landmarks, which are inside the hand, as a share
    of their box. Raises :class:`UserError` where MediaPipe is not installed or does not start.
    """

    def __init__(
        self, folder: str | None = None, confidence: float = 0.1, following: float = 0.3, margin: float = 0.15
    ) -> None:
        if not margin >= 0:
            raise UserError(f"margin must be at least 0, not {margin:g}")
        home = Path() if Path.cwd() == PROJECT or not IS_CHECKOUT else PROJECT
        self._cure = f"cure: python -m pip install --no-deps --target {home / FOLDER} -r {REQUIREMENTS}"
        place = Path(folder or os.environ.get("EGOHOD_MEDIAPIPE") or home / FOLDER).resolve()
        if not (place / "mediapipe").is_dir():
            raise UserError(f"MediaPipe is not in {place}; {self._cure} (or set EGOHOD_MEDIAPIPE to its folder)")
        self._margin = margin
        # -P: the worker's folder is this package, whose modules must not shadow those that MediaPipe imports.
        self._command = [sys.executable, "-P", mediapipe_worker.__file__, str(confidence), str(following)]
        paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        self._start()

    def _start(self) -> None:
        # MediaPipe logs a dozen lines whenever it starts: its log is shown only where it dies.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=self._environment
        )
        if self._read_answer() is None:
            raise UserError(f"MediaPipe does not run: {self._last_words()}; {self._cure}")

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        """See :meth:`Detector.detect`.

        Raises :class:`VideoError` if MediaPipe died of the pictures, :class:`UserError` if it does not start again.
        """
        assert pictures is not None, "MediaPipe needs pictures"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"%d %d %d\n" % pictures.shape[:3])
            self._process.stdin.write(np.ascontiguousarray(pictures).tobytes())
            self._process.stdin.flush()
            answer = self._read_answer()
        except OSError:  # a broken pipe: the process is gone
            answer = None
        if answer is None:
            reason = self._last_words()
            self._start()
            raise VideoError(f"MediaPipe died: {reason}")
        rows = []
        for number, second, hands in zip(frame_numbers, seconds, answer, strict=True):
            if not hands:
                continue
            marks = [np.array(landmarks) for _, _, landmarks in hands]  # each [21, 2], shares of the picture
            low, high = np.stack([m.min(axis=0) for m in marks]), np.stack([m.max(axis=0) for m in marks])
            margin = self._margin * (high - low)
            boxes = np.clip(np.concatenate([low - margin, high + margin], axis=1), 0, 1)
            scores = np.array([score for _, score, _ in hands])
            chosen, sides = assign_sides(boxes, scores, np.array([_WEARERS[label] for label, _, _ in hands]))
            rows += [
                row(video_id, number, second, boxes[i], scores[i], side=int(side))
                for i, side in zip(chosen, sides, strict=True)
            ]
        return pa.Table.from_pylist(rows, SCHEMA)

    def close(self) -> None:
        """End the child process; without it, it ends with this one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # If it has died already, closing the pipe fails to flush what was not written yet.
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _read_answer(self) -> Any:
        """One line of the worker as JSON; None where the worker is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        # Without its end it is what the worker wrote before it died.
        return json.loads(line) if line.endswith(b"\n") else None

    def _last_words(self) -> str:
        """The last line that the worker logged before it died, else its exit code."""
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self._log.close()
        return lines[-1] if lines else f"exit code {self._process.returncode}"
