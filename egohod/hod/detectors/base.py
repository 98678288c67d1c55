"""What detectors share: the base class, rows of the table of detections, at most one hand a side in a frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pyarrow as pa

from egohod.data.detections import EDGES, SCHEMA, UNKNOWN_STATE

_SAME_HAND = 0.5  # intersection over union above which two boxes are two detections of one hand
_SIDE_BY_SIDE = 0.1  # in picture widths; the order of hands that are closer does not tell their sides


class Detector(ABC):
    """Finds boxes of hands and objects in the frames of a clip. The constructor's arguments are its options."""

    reads_files = False
    """Whether boxes are read from files (option ``path``). Such a detector is made once, before the workers start, and
    shared by them, and :meth:`videos` is checked against the clips; a model is loaded by each worker."""

    @abstractmethod
    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        """Boxes in ``pictures`` uint8 [T, H, W, 3] of a video, seen at ``seconds`` [T], as a table of ``SCHEMA``.

        ``pictures`` may be None for detectors that read files. A table without rows where there are no boxes. Raises
        :class:`VideoError` for a clip that it cannot process: that clip fails and the run continues.
        """

    def videos(self) -> set[str]:
        """Ids of the videos of which the files hold boxes; only of detectors that read files."""
        raise NotImplementedError


def row(
    video_id: str, frame_number: int, second: float, box: np.ndarray, score: float, *, side: int = -1, name: str = ""
) -> dict[str, Any]:
    """One row of ``SCHEMA`` without contact state: a hand of ``side``, or an object where that is -1."""
    # Detectors draw boxes over the picture's edge.
    edges = dict(zip(EDGES, np.clip(box, 0, 1).tolist(), strict=True))
    kind = "object" if side < 0 else "hand"
    values = {"video_id": video_id, "frame_number": int(frame_number), "second": float(second), "kind": kind}
    values |= {"side": side, "state": UNKNOWN_STATE, "score": float(score), "name": name or None}
    return dict.fromkeys(SCHEMA.names) | values | edges


def assign_sides(boxes: np.ndarray, scores: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most one hand a side in one picture: indices of the boxes that remain [K], and their sides [K].

    ``boxes`` [N, 4], ``scores`` [N] and ``sides`` [N] (0 left, 1 right, -1 unknown) are a detector's output. Of
    duplicates the box with the higher score remains, and never more than two.
    """
    chosen: list[int] = []
    # stable: of equal scores the detector's first
    for i in np.argsort(-scores, kind="stable").tolist():
        if len(chosen) < 2 and all(_iou(boxes[i], boxes[j]) < _SAME_HAND for j in chosen):
            chosen.append(i)
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    # Without a side from the detector: the wearer's left hand is in the left half of most pictures.
    assigned = np.array([sides[i] if sides[i] >= 0 else int(middle[i] > 0.5) for i in chosen], dtype=np.int64)
    if len(chosen) == 2 and assigned[0] == assigned[1]:
        first, second = middle[chosen]
        if abs(first - second) >= _SIDE_BY_SIDE:
            assigned = np.array([0, 1] if first < second else [1, 0])
        else:  # one above the other: place says nothing, the higher score does
            assigned[1] = 1 - assigned[0]
    return np.array(chosen, dtype=np.int64), assigned


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    common = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod()
    return float(common / max((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - common, 1e-9))
