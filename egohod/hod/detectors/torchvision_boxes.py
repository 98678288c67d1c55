"""Hands and objects by your own Faster R-CNN of torchvision."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from egohod.data.detections import LEFT, RIGHT
from egohod.hod.detectors.base import DetectorError, row, settle_sides, table
from egohod.model.weight_files import read_tensors
from egohod.model.weight_names import WeightsError

log = logging.getLogger(__name__)

ARCHITECTURES = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
HANDS = {"left hand": LEFT, "right hand": RIGHT, "hand": -1}
"""What a label map calls hands; ``hand`` is of a side that its place tells. All else is the name of an object."""
_CLASSES = "roi_heads.box_predictor.cls_score.weight"


class TorchvisionBoxes:
    """Boxes by the checkpoint ``weights``: a state dict, alone or within what a training saved.

    ``labels`` maps the model's class numbers (0 is the background) to names, see ``HANDS``; classes without a name are
    left out, and the name ``object`` stands for no class in particular. Raises :class:`DetectorError` for a file that
    is no such checkpoint, and for labels that it does not have or that name no hand.
    """

    needs_pictures = True

    def __init__(
        self,
        weights: str,
        labels: Mapping[Any, str],
        architecture: str = "fasterrcnn_resnet50_fpn",
        min_score: float = 0.3,
        device: str = "cpu",
        batch_size: int = 4,
    ) -> None:
        from torchvision.models import detection

        if architecture not in ARCHITECTURES:
            raise DetectorError(f"architecture is '{architecture}', but must be one of {', '.join(ARCHITECTURES)}")
        if batch_size < 1:
            raise DetectorError(f"batch_size must be at least 1, not {batch_size}")
        try:
            state, remarks = read_tensors(Path(weights))
        except WeightsError as error:
            raise DetectorError(str(error)) from error
        for remark in remarks:
            log.info("%s: %s", weights, remark)
        if _CLASSES not in state:
            raise DetectorError(f"{weights}: no Faster R-CNN of torchvision, it has no {_CLASSES}")
        classes = len(state[_CLASSES])
        self._labels = _checked(labels, classes, weights)
        model = getattr(detection, architecture)(weights=None, weights_backbone=None, num_classes=classes)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise DetectorError(f"{weights}: is no {architecture}: {' '.join(str(error).split())[:300]}") from error
        try:
            self._model = model.eval().to(device)
        except (RuntimeError, AssertionError) as error:
            raise DetectorError(f"device is '{device}': {' '.join(str(error).split())[:200]}") from error
        self._min_score, self._device, self._batch_size = min_score, device, batch_size

    @torch.inference_mode()
    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        """See :class:`~egohod.hod.detectors.base.Detector`."""
        assert pictures is not None, "a network looks at pictures"
        height, width = pictures.shape[1:3]
        rows: list[dict[str, Any]] = []
        for first in range(0, len(pictures), self._batch_size):
            part = slice(first, first + self._batch_size)
            batch = torch.from_numpy(np.ascontiguousarray(pictures[part])).to(self._device)
            found = self._model([each.permute(2, 0, 1).float() / 255 for each in batch])
            for number, second, one in zip(frame_numbers[part], seconds[part], found, strict=True):
                boxes = one["boxes"].cpu().double().numpy() / (width, height, width, height)
                scores, numbers = one["scores"].cpu().numpy(), one["labels"].cpu().numpy()
                rows += self._rows(video_id, number, second, boxes, scores, numbers)
        return table(rows)

    def close(self) -> None:
        """See :class:`~egohod.hod.detectors.base.Detector`."""
        del self._model

    def _rows(
        self, video_id: str, number: int, second: float, boxes: np.ndarray, scores: np.ndarray, numbers: np.ndarray
    ) -> list[dict[str, Any]]:
        names = [
            self._labels.get(int(each)) if score >= self._min_score else None
            for each, score in zip(numbers, scores, strict=True)
        ]
        hands = [i for i, name in enumerate(names) if name in HANDS]
        sides = np.array([HANDS[names[i] or ""] for i in hands], dtype=np.int64)
        kept, sides = settle_sides(boxes[hands], scores[hands], sides)
        rows = [
            row(video_id, number, second, boxes[hands[i]], scores[hands[i]], side=int(side))
            for i, side in zip(kept, sides, strict=True)
        ]
        for box, score, name in zip(boxes, scores, names, strict=True):
            if name is not None and name not in HANDS:
                rows.append(row(video_id, number, second, box, score, name="" if name == "object" else name))
        return rows


def _checked(labels: Mapping[Any, str], classes: int, weights: str) -> dict[int, str]:
    known: dict[int, str] = {}
    for number, name in labels.items():
        if not str(number).isdecimal() or not 0 < int(number) < classes:
            raise DetectorError(f"labels: {weights} has the classes 1 to {classes - 1}, not {number} ({name})")
        known[int(number)] = name
    if not any(name in HANDS for name in known.values()):
        raise DetectorError(
            f"labels: none is called {', '.join(HANDS)}; there are {', '.join(known.values()) or 'none'}"
        )
    return known
