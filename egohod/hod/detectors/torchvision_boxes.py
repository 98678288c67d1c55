"""Hands and objects by your own Faster R-CNN checkpoint of torchvision, with a label map."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from egohod.data.detections import LEFT, RIGHT, SCHEMA
from egohod.errors import UserError
from egohod.hod.detectors import Detector, assign_sides, row
from egohod.model.checkpoints import read_tensors

log = logging.getLogger(__name__)

_ARCHITECTURES = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
# What a label map calls hands; the side of a "hand" follows from its place. Other names are those of objects.
_HANDS = {"left hand": LEFT, "right hand": RIGHT, "hand": -1}
_CLASSES = "roi_heads.box_predictor.cls_score.weight"


class TorchvisionBoxes(Detector):
    """Boxes by the checkpoint ``weights``: a state dict, alone or inside a training checkpoint.

    ``labels`` maps the model's class numbers (0 is the background) to names: ``left hand``, ``right hand``, ``hand``
    (a side is assigned by place), the name of an object, or ``object`` for one of no particular class. Classes without
    a name are ignored. Raises :class:`UserError` for a file that is no such checkpoint, and for labels that it does not
    have or that name no hand.
    """

    is_batched = True

    def __init__(
        self,
        weights: str,
        labels: Mapping[Any, str],
        architecture: str = "fasterrcnn_resnet50_fpn",
        min_score: float = 0.3,
        device: str = "cpu",
        batch_size: int = 4,
    ) -> None:
        from torchvision.models import detection  # slow to import, and of no use to the other detectors

        if architecture not in _ARCHITECTURES:
            raise UserError(f"architecture is '{architecture}', but must be one of {', '.join(_ARCHITECTURES)}")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        # Tensors only: a checkpoint from elsewhere may hold code.
        state, remarks = read_tensors(Path(weights))
        for remark in remarks:
            log.info("%s: %s", weights, remark)
        if _CLASSES not in state:
            raise UserError(f"{weights}: no Faster R-CNN of torchvision, it has no {_CLASSES}")
        classes = len(state[_CLASSES])
        for number, name in labels.items():
            if not str(number).isdecimal() or not 0 < int(number) < classes:
                raise UserError(f"labels: {weights} has the classes 1 to {classes - 1}, not {number} ({name})")
        # YAML gives numbers, the command line gives text.
        self._labels = {int(number): name for number, name in labels.items()}
        if not _HANDS.keys() & self._labels.values():
            names = ", ".join(self._labels.values()) or "none"
            raise UserError(f"labels: none is called {', '.join(_HANDS)}; there are {names}")
        model = getattr(detection, architecture)(weights=None, weights_backbone=None, num_classes=classes)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{weights}: is no {architecture}: {' '.join(str(error).split())[:300]}") from error
        try:
            self._model = model.eval().to(device)
        # A torch without CUDA raises an AssertionError, one without a device a RuntimeError.
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device is '{device}': {' '.join(str(error).split())[:200]}") from error
        self._min_score, self._device, self._batch_size = min_score, device, batch_size

    @torch.inference_mode()
    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        """See :meth:`Detector.detect`."""
        assert pictures is not None, "a network needs pictures"
        height, width = pictures.shape[1:3]
        rows: list[dict[str, Any]] = []
        for first in range(0, len(pictures), self._batch_size):
            part = slice(first, first + self._batch_size)
            batch = torch.from_numpy(np.ascontiguousarray(pictures[part])).to(self._device)
            # Shares of full intensity; the model itself resizes and normalises.
            outputs = self._model([picture.permute(2, 0, 1).float() / 255 for picture in batch])
            for number, second, output in zip(frame_numbers[part], seconds[part], outputs, strict=True):
                boxes = output["boxes"].cpu().double().numpy() / (width, height, width, height)
                scores, labels = output["scores"].cpu().numpy(), output["labels"].cpu().numpy()
                names = [
                    self._labels.get(int(label)) if score >= self._min_score else None
                    for label, score in zip(labels, scores, strict=True)
                ]
                # Objects may be many; of hands there is one a side.
                hands = [i for i, name in enumerate(names) if name in _HANDS]
                sides = np.array([_HANDS[names[i] or ""] for i in hands], dtype=np.int64)
                chosen, sides = assign_sides(boxes[hands], scores[hands], sides)
                for i, side in zip(chosen, sides, strict=True):
                    rows.append(row(video_id, number, second, boxes[hands[i]], scores[hands[i]], side=int(side)))
                for box, score, name in zip(boxes, scores, names, strict=True):
                    if name is not None and name not in _HANDS:
                        rows.append(row(video_id, number, second, box, score, name="" if name == "object" else name))
        return pa.Table.from_pylist(rows, SCHEMA)
