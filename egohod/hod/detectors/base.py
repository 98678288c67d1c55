"""The protocol of a detector, and what detectors share: rows of the table, one hand a side."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from egohod.data.detections import EDGES, SCHEMA, UNKNOWN_STATE
from egohod.errors import UserError

_SAME_HAND = 0.5  # two boxes that share more than this (intersection over union) are one hand found twice
_SIDE_BY_SIDE = 0.1  # in picture widths: hands closer than this are not told apart by place


class DetectorError(UserError):
    """A detector that cannot be used."""


class Undetectable(Exception):
    """A clip that a detector cannot look at; others it can."""


class Detector(Protocol):
    """What finds the boxes."""

    needs_pictures: bool
    """Whether it looks at the pictures; who has boxes already need not decode any."""

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        """Boxes in ``pictures`` uint8 [T, H, W, 3] of a video, seen at ``seconds`` [T], as a table of ``SCHEMA``.

        ``pictures`` may be None where they are not needed. No box is no error: the table is then empty.
        """
        ...

    def close(self) -> None:
        """Let go of processes and memory."""
        ...


def row(
    video_id: str, frame_number: int, second: float, box: np.ndarray, score: float, *, side: int = -1, name: str = ""
) -> dict[str, Any]:
    """One row of ``SCHEMA`` with no contact state: a hand of ``side``, or an object if that is -1."""
    edges = dict(zip(EDGES, np.clip(box, 0, 1).tolist(), strict=True))
    kind = "object" if side < 0 else "hand"
    where = {"video_id": video_id, "frame_number": int(frame_number), "second": float(second), "kind": kind}
    what = {"side": side, "state": UNKNOWN_STATE, "score": float(score), "name": name or None}
    return dict.fromkeys(SCHEMA.names) | where | what | edges


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows -> table of ``SCHEMA``."""
    return pa.Table.from_pylist(rows, SCHEMA)


def settle_sides(boxes: np.ndarray, scores: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most one hand a side in one picture: which boxes to keep [K], and the sides of those [K].

    ``boxes`` [N, 4], ``scores`` [N] and ``sides`` [N] (0 left, 1 right, -1 unknown) are what a detector found. Of one
    hand found twice the surer box stays, and never more than two. Two of one side are told apart by their place: the
    wearer's left hand is the one further left. Where they lie one above the other the surer keeps its side.
    """
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable").tolist():
        if len(kept) < 2 and all(_iou(boxes[i], boxes[j]) < _SAME_HAND for j in kept):
            kept.append(i)
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    found = np.array([sides[i] if sides[i] >= 0 else int(middle[i] > 0.5) for i in kept], dtype=np.int64)
    if len(kept) == 2 and found[0] == found[1]:
        first, second = middle[kept]
        if abs(first - second) >= _SIDE_BY_SIDE:
            found = np.array([0, 1] if first < second else [1, 0])
        else:
            found[1] = 1 - found[0]
    return np.array(kept, dtype=np.int64), found


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    common = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod()
    return float(common / max((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - common, 1e-9))
