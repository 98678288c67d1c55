"""The 100DOH detector of hands and the objects that they touch: Faster R-CNN on ResNet-101-C4 with three further heads.

Each hand has a side, a contact state and an offset that points to what it touches. Source: Shan et al., "Understanding
Human Hands in Contact at Internet Scale", CVPR 2020, and facts about its code (ddshan/hand_object_detector, commit
e6eec71, MIT licence); written anew in PyTorch, nothing needs to be compiled. Names in the state dict are those of its
checkpoints. Where its code differs from a textbook Faster R-CNN the weights were trained with the difference, so it is
kept and marked "as trained".
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import nms, roi_align

from egohod.data.detections import NO_CONTACT, SCHEMA, STATIONARY_OBJECT
from egohod.data.videos import VideoError
from egohod.errors import UserError
from egohod.hod.detectors import Detector, row
from egohod.model.checkpoints import without_wrappers
from egohod.model.weight_files import errors_of, open_weight_file

log = logging.getLogger(__name__)

RANDOM = "random"
"""The value of ``weights`` for a network that has learned nothing: to try what is around it."""
CLASSES = 3
OBJECT, HAND = 1, 2  # 0 is the background
STRIDE = 16
_MEANS_BGR = (102.9801, 115.9465, 122.7717)  # Caffe's: of BGR from 0 to 255, without a division
_SHORT_SIDE, _LONG_SIDE = 600, 1000
_PROPOSAL_CANDIDATES, _PROPOSAL_NMS = 6000, 0.7
_DETECTION_NMS = 0.3
_DELTA_SCALES = (0.1, 0.1, 0.2, 0.2)
_PADDING = 0.3
_ANCHORS = 12
# Pixels of the original picture that an offset of magnitude 1 spans, for a direction that is a tenth of a unit long.
_OFFSET_PIXELS = 10_000
_LEAST_SIDE = 16  # of the resized picture; a narrower one has no features
# Width and height of the anchors of one place, by ratio (h/w 0.5, 1, 2), then by scale (8, 16, 32, 64). As trained:
# the sides of 16-pixel squares were rounded before they were scaled (23 x 12, 16 x 16, 11 x 22).
_ANCHOR_SIZES = tuple((w * scale, h * scale) for w, h in ((23, 12), (16, 16), (11, 22)) for scale in (8, 16, 32, 64))


# --- Network ---


class Detections(NamedTuple):
    """What is detected in one picture, by class; hands beside what the three further heads say of them."""

    objects: Tensor  # boxes [M, 4] in pixels of the original picture: x1, y1, x2, y2
    object_scores: Tensor  # [M]
    object_rois: Tensor  # int [M], the proposal that each came from
    hands: Tensor  # boxes [N, 4]
    hand_scores: Tensor  # [N]
    hand_rois: Tensor  # int [N]
    states: Tensor  # int [N], contact states in the order of egohod.data.detections
    offsets: Tensor  # [N, 3]: magnitude, and a tenth of the unit vector (dx, dy)
    sides: Tensor  # int [N]: 0 left, 1 right


class _Bottleneck(nn.Module):
    # As trained: the stride is in the first 1x1 convolution, as in Caffe's ResNet; torchvision's is in the 3x3.
    def __init__(self, channels: int, width: int, stride: int, has_shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if has_shortcut:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))
        else:
            self.downsample = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        return functional.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


def _layer(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (_Bottleneck(4 * width, width, 1, False) for _ in range(blocks - 1))
    return nn.Sequential(_Bottleneck(channels, width, stride, True), *rest)


class _ProposalHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.RPN_Conv = nn.Conv2d(1024, 512, 3, padding=1)
        self.RPN_cls_score = nn.Conv2d(512, 2 * _ANCHORS, 1)
        self.RPN_bbox_pred = nn.Conv2d(512, 4 * _ANCHORS, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.relu(self.RPN_Conv(features))
        return self.RPN_cls_score(hidden), self.RPN_bbox_pred(hidden)


class _Extensions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # The dropout does nothing here, but the last layer's number in the checkpoints counts it.
        self.hand_contact_state_layer = nn.Sequential(
            nn.Linear(2048, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, STATIONARY_OBJECT + 1)
        )
        self.hand_dydx_layer = nn.Linear(2048, 3)
        self.hand_lr_layer = nn.Linear(2048, 1)

    def offsets(self, padded: Tensor) -> Tensor:
        """Pooled features [N, 2048] of padded RoIs -> magnitude, and a tenth of the unit vector (dx, dy), [N, 3]."""
        magnitude, direction = self.hand_dydx_layer(padded).split((1, 2), dim=1)
        return torch.cat([magnitude, 0.1 * functional.normalize(direction, dim=1)], dim=1)


class HandObjectNetwork(nn.Module):
    """Faster R-CNN with the state dict of ``faster_rcnn_1_8_*.pth``; only for inference, ``eval()`` is assumed.

    ``proposals`` is how many regions of a picture are classified (300 as published); time of the head grows with it.
    """

    def __init__(self, proposals: int = 300) -> None:
        super().__init__()
        self.proposals = proposals
        self.RCNN_base = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            # As trained: no padding, and the last window may reach over the edge.
            nn.MaxPool2d(3, stride=2, padding=0, ceil_mode=True),
            _layer(64, 64, 3, 1),
            _layer(256, 128, 4, 2),
            _layer(512, 256, 23, 2),
        )
        self.RCNN_rpn = _ProposalHead()
        self.RCNN_top = nn.Sequential(_layer(1024, 512, 3, 2))
        self.RCNN_cls_score = nn.Linear(2048, CLASSES)
        self.RCNN_bbox_pred = nn.Linear(2048, 4 * CLASSES)
        self.extension_layer = _Extensions()

    def forward(
        self,
        pictures: Tensor,
        min_object_score: float = 0.5,
        min_hand_score: float = 0.5,
        precision: torch.dtype = torch.float32,
    ) -> list[Detections]:
        """Pictures uint8 RGB [B, H, W, 3] of one size -> what is in each, scores **above** the thresholds.

        ``precision`` is that of the convolutions; boxes, scores and the linear layers are always float32.
        """
        blob, scale = preprocess(pictures)
        # Not the boxes: bfloat16 has three digits, too few for pixels.
        with torch.autocast(pictures.device.type, precision, enabled=precision != torch.float32):
            features = self.RCNN_base(blob)
            scores, deltas = self.RCNN_rpn(features)
        features = features.float()
        outputs = []
        for i in range(len(pictures)):
            one, info = features[i : i + 1], (blob.shape[2], blob.shape[3])
            rois = propose(scores[i].float(), deltas[i].float(), info, self.proposals)
            pooled = self.pool_and_embed(one, rois, precision)
            probability = self.RCNN_cls_score(pooled).softmax(dim=1)
            boxes = decode_detections(rois, self.RCNN_bbox_pred(pooled), info) / scale
            objects, hands = (
                select(boxes[:, 4 * c : 4 * c + 4], probability[:, c], threshold)
                for c, threshold in ((OBJECT, min_object_score), (HAND, min_hand_score))
            )
            # The second branch is needed for hands alone: pooling and layer 4 treat each region by itself, and the
            # original computes both for all 300.
            padded = self.pool_and_embed(one, enlarge(rois[hands], info), precision)
            extension = self.extension_layer
            outputs.append(
                Detections(
                    *(boxes[objects, 4 * OBJECT : 4 * OBJECT + 4], probability[objects, OBJECT], objects),
                    *(boxes[hands, 4 * HAND : 4 * HAND + 4], probability[hands, HAND], hands),
                    states=extension.hand_contact_state_layer(padded).argmax(dim=1),
                    offsets=extension.offsets(padded),
                    # The logit above 0 is the sigmoid above 1/2.
                    sides=(extension.hand_lr_layer(pooled[hands])[:, 0] > 0).long(),
                )
            )
        return outputs

    def pool_and_embed(self, features: Tensor, rois: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
        """Features [1, 1024, h, w] and RoIs [N, 4] in pixels of the resized picture -> [N, 2048]."""
        pooled = pool(features, rois)
        with torch.autocast(features.device.type, precision, enabled=precision != torch.float32):
            top = self.RCNN_top(pooled)
        return top.float().mean(dim=(2, 3))


# --- Stages without weights ---


def preprocess(pictures: Tensor) -> tuple[Tensor, float]:
    """Pictures uint8 RGB [B, H, W, 3] -> the network's input float32 BGR [B, 3, h, w], and h / H.

    The short side becomes 600 pixels, or the long one 1000 where it would be longer. As OpenCV's bilinear resize with a
    scale **factor**: places follow from the factor, not from the rounded size, which moves a pixel at the far edge by
    up to half of one. Without antialiasing, as trained.
    """
    height, width = pictures.shape[1:3]
    scale = _SHORT_SIDE / min(height, width)
    if np.round(scale * max(height, width)) > _LONG_SIDE:
        scale = _LONG_SIDE / max(height, width)
    x, means = pictures.flip(3).permute(0, 3, 1, 2), torch.tensor(_MEANS_BGR, device=pictures.device).view(3, 1, 1)
    for dim, length, offset in ((3, width, means), (2, height, 0)):
        # Half to even, as OpenCV rounds. A picture that is a thousand times as long as high keeps one line.
        place = (torch.arange(max(1, round(length * scale)), dtype=torch.float64) + 0.5) / scale - 0.5
        place = place.clamp(0, length - 1).to(pictures.device)
        low = place.long()
        share = (place - low).float().view(-1, *[1] * (3 - dim))
        # Floats only of what is needed: photos have many megapixels.
        one, two = (x.index_select(dim, each).float() - offset for each in (low, (low + 1).clamp(max=length - 1)))
        x = one * (1 - share) + two * share
    return x, scale


def anchors(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Anchors of a feature map, [height * width * 12, 4]: by row, column, ratio and scale."""
    sizes = torch.tensor(_ANCHOR_SIZES, dtype=torch.float32)
    # Around the middle of the pixels 0 to 15; x2 and y2 are the last pixels inside, so a width is x2 - x1 + 1.
    base = torch.cat([7.5 - (sizes - 1) / 2, 7.5 + (sizes - 1) / 2], dim=1).to(device)
    y, x = (STRIDE * torch.arange(n, dtype=torch.float32, device=device) for n in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return (torch.stack([x, y, x, y], dim=-1)[:, :, None] + base).reshape(-1, 4)


def decode(boxes: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] moved by deltas [N, 4], and cut at the border of a picture of ``size`` (height, width)."""
    extent = boxes[:, 2:] - boxes[:, :2] + 1
    centre = boxes[:, :2] + 0.5 * extent + deltas[:, :2] * extent
    # As trained: the exponent has no upper limit, and x2, y2 are without the -1 of the widths.
    half = 0.5 * deltas[:, 2:].exp() * extent
    limit = boxes.new_tensor([size[1] - 1, size[0] - 1])
    corners = [torch.minimum(each.clamp(min=0), limit) for each in (centre - half, centre + half)]
    return torch.cat(corners, dim=1)


def decode_detections(rois: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
    """RoIs [N, 4] and the box head's output [N, 4 C] -> boxes [N, 4 C], one a class, in pixels of the RoIs."""
    scales = deltas.new_tensor(_DELTA_SCALES)
    return torch.cat([decode(rois, each * scales, size) for each in deltas.split(4, dim=1)], dim=1)


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: indices of what remains, the highest score first."""
    # As trained: areas count the last pixels (x2 - x1 + 1), which for torchvision are boxes that end a pixel later.
    return nms(boxes + boxes.new_tensor([0, 0, 1, 1]), scores, threshold)


def propose(scores: Tensor, deltas: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """The RPN's output for one picture, [24, h, w] and [48, h, w] -> ``count`` RoIs [count, 4], the best first.

    ``size`` is the resized picture's (height, width).
    """
    height, width = scores.shape[1:]
    # Channels 0 to 11 are the background of the twelve anchors, 12 to 23 their foreground.
    foreground = scores.view(2, _ANCHORS, height, width).softmax(dim=0)[1].permute(1, 2, 0).reshape(-1)
    moves = deltas.permute(1, 2, 0).reshape(-1, 4)
    boxes = decode(anchors(height, width, scores.device), moves, size)
    # As trained: no minimum size, though the original's configuration states one.
    foreground, order = foreground.sort(descending=True, stable=True)
    foreground, boxes = foreground[:_PROPOSAL_CANDIDATES], boxes[order[:_PROPOSAL_CANDIDATES]]
    boxes = boxes[suppress(boxes, foreground, _PROPOSAL_NMS)[:count]]
    # As trained: in a small picture the rest are boxes of zeros, which are classified as any other.
    return functional.pad(boxes, (0, 0, 0, count - len(boxes)))


def pool(features: Tensor, rois: Tensor) -> Tensor:
    """Features [1, C, h, w] and RoIs [N, 4] in pixels of the resized picture -> [N, C, 7, 7]."""
    # As trained: pixel centres are not shifted by half a pixel ("aligned"). The same numbers as the original's kernel,
    # also where a padded RoI is inside out.
    return roi_align(features, [rois], 7, 1 / STRIDE, sampling_ratio=-1, aligned=False)


def enlarge(rois: Tensor, size: tuple[int, int]) -> Tensor:
    """RoIs [N, 4] grown by 0.3 of their width and height on each side, from which contact and offset are read.

    ``size`` is the resized picture's (height, width).
    """
    margin = _PADDING * (rois[:, 2:] - rois[:, :2])
    low = (rois[:, :2] - margin).clamp(min=0)
    # As trained: x2 is limited by the **height** and y2 by the **width** of the picture. In a wide one some RoIs end
    # left of where they begin. In order, the limits change the contact state of a third of the regions and more (with
    # random weights).
    high = torch.minimum(rois[:, 2:] + margin, rois.new_tensor([size[0], size[1]]))
    return torch.cat([low, high], dim=1)


def select(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes [N, 4] of one class that score above ``threshold`` and overlap no better one."""
    candidates = (scores > threshold).nonzero()[:, 0]
    order = candidates[scores[candidates].argsort(descending=True, stable=True)]
    return order[suppress(boxes[order], scores[order], _DETECTION_NMS)]


# --- Detector ---


class Doh100(Detector):
    """Hands and objects by a checkpoint ``weights`` of the original, or of a network trained with its code.

    ``weights=random`` runs without one, with boxes that mean nothing. All hands above ``min_hand_score`` are given,
    other people's too, and objects above ``min_object_score`` (0.5 and 0.5 in the original's demo, 0.1 in its
    evaluation). ``batch_size`` frames are computed at once; ``precision`` is that of the convolutions, float32 as
    published; ``proposals`` of a picture are classified, 300 as published.

    Raises :class:`UserError` for a file that is no such checkpoint, and for a device that there is not.
    """

    is_batched = True

    def __init__(
        self,
        weights: str,
        min_hand_score: float = 0.5,
        min_object_score: float = 0.5,
        device: str = "cpu",
        batch_size: int = 4,
        precision: Literal["float32", "bfloat16"] = "float32",
        proposals: int = 300,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("proposals", proposals)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        for name, score in (("min_hand_score", min_hand_score), ("min_object_score", min_object_score)):
            if not 0 <= score <= 1:
                raise UserError(f"{name} must be from 0 to 1, not {score:g}")
        if weights == RANDOM:
            log.warning("detector doh100: random weights, boxes mean nothing")
            network = random_network(proposals)
        else:
            with torch.device("meta"):  # without a second of random numbers that nothing needs
                network = HandObjectNetwork(proposals)
            network.to_empty(device="cpu")
            load_weights(network, Path(weights))
        try:
            # Convolutions on CPUs are about a tenth faster with the channels last.
            self._network = network.eval().to(device).to(memory_format=torch.channels_last)
        # A torch without CUDA raises an AssertionError, one without a device a RuntimeError.
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device is '{device}': {' '.join(str(error).split())[:200]}") from error
        self._thresholds = min_object_score, min_hand_score
        self._device, self._batch_size, self._precision = device, batch_size, getattr(torch, precision)

    @torch.inference_mode()
    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        """See :meth:`Detector.detect`."""
        assert pictures is not None, "a network needs pictures"
        height, width = pictures.shape[1:3]
        if _LONG_SIDE * min(height, width) < _LEAST_SIDE * max(height, width):
            raise VideoError(f"{video_id}: {width} x {height} pixels are too narrow for the detector doh100")
        rows: list[dict[str, Any]] = []
        for first in range(0, len(pictures), self._batch_size):
            part = slice(first, first + self._batch_size)
            batch = torch.tensor(pictures[part], device=self._device)
            try:
                outputs = self._network(batch, *self._thresholds, self._precision)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"doh100: the memory of {self._device} is too small for {len(batch)} pictures at once; lower "
                    "detector.options.batch_size"
                ) from error
            for number, second, each in zip(frame_numbers[part], seconds[part], outputs, strict=True):
                rows += rows_of(each, width, height, video_id, number, second)
        return pa.Table.from_pylist(rows, SCHEMA)


def rows_of(
    detected: Detections, width: int, height: int, video_id: str, frame_number: int, second: float
) -> list[dict[str, Any]]:
    """Rows of ``SCHEMA`` from what is detected in a picture of ``width`` x ``height`` pixels.

    A hand's offset is where its head points, as in EPIC-KITCHENS' files, not the way to the nearest object, which
    :func:`egohod.data.detections.link_objects` finds.
    """
    size = np.array([width, height])
    arrays = {name: value.cpu().double().numpy() for name, value in detected._asdict().items()}
    rows = []
    for i in range(len(detected.hands)):
        score, side = arrays["hand_scores"][i], int(arrays["sides"][i])
        one = row(video_id, frame_number, second, arrays["hands"][i] / np.tile(size, 2), score, side=side)
        one["state"] = int(arrays["states"][i])
        if one["state"] != NO_CONTACT:
            magnitude, dx, dy = arrays["offsets"][i]
            one["offset_x"], one["offset_y"] = (_OFFSET_PIXELS * magnitude * np.array([dx, dy]) / size).tolist()
        rows.append(one)
    for box, score in zip(arrays["objects"], arrays["object_scores"], strict=True):
        rows.append(row(video_id, frame_number, second, box / np.tile(size, 2), score))
    return rows


def load_weights(network: HandObjectNetwork, path: Path) -> None:
    """Load a checkpoint of the original's training code, or a plain state dict.

    Every name must be there and no other, but for the batch counts that older releases of PyTorch did not save.
    Nothing in the file is run. Raises :class:`UserError`.
    """
    with errors_of(str(path)):
        opened = open_weight_file(path)
        for remark in opened.remarks:
            log.info("%s: %s", path, remark)
        tensors = {without_wrappers(name): value for name, value in opened.tensors.items()}
        # The checkpoint's own mode is the one that it was trained with: the original lets it override the
        # configuration. "crop" and "pool" are other numbers from the same weights, which no test here could confirm.
        pooling = opened.beside.get("pooling_mode", "align")
        if pooling != "align":
            raise UserError(
                f"was trained with pooling_mode '{pooling}'; only 'align', of the original's res101.yml, is supported"
            )
        expected = network.state_dict()
        stem, classes = tensors.get("RCNN_base.0.weight"), tensors.get("RCNN_cls_score.weight")
        deltas = tensors.get("RCNN_bbox_pred.weight")
        if stem is None or classes is None or deltas is None:
            raise UserError(
                "no checkpoint of the 100DOH detector: it lacks RCNN_base.0.weight, RCNN_cls_score.weight "
                f"or RCNN_bbox_pred.weight; it has {', '.join([*tensors][:3])}, ..."
            )
        if stem.shape[-1] == 3:
            raise UserError("a Faster R-CNN on VGG-16; only ResNet-101 is supported")
        if len(classes) != CLASSES:
            raise UserError(f"has {len(classes)} classes instead of {CLASSES} (background, object, hand)")
        if opened.beside.get("class_agnostic") or len(deltas) == 4:
            raise UserError("has one box for all classes (class_agnostic); only one for each is supported")
        missing = [name for name in expected if name not in tensors and not name.endswith(".num_batches_tracked")]
        further = [name for name in tensors if name not in expected]
        if missing or further:
            parts = [
                f"{what} {len(names)} of its weights, such as {', '.join(names[:3])}"
                for what, names in (("lacks", missing), ("holds more than", further))
                if names
            ]
            raise UserError(f"is no ResNet-101 of the 100DOH detector: {'; '.join(parts)}")
        for name, value in tensors.items():
            if value.shape != expected[name].shape:
                raise UserError(f"{name} is {list(value.shape)} instead of {list(expected[name].shape)}")
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(f"{name} has numbers that are not finite; damaged, or of a training run that diverged")
        network.load_state_dict(tensors, strict=False)


def random_network(proposals: int = 300) -> HandObjectNetwork:
    """A network with random weights, always the same, that detects something in most pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = HandObjectNetwork(proposals)
        for name, weight in network.named_parameters():
            # He's initialization keeps the size of activations; the last convolution of a block is smaller, since its
            # result is added to what it began with, and the first one takes pictures from -128 to 128. What predicts
            # must differ between regions, not between pictures: its rows have no mean.
            if weight.ndim == 4 and "RPN_" not in name:
                nn.init.kaiming_normal_(weight)
                weight.data *= 0.2 if "conv3" in name else 1 / 64 if name == "RCNN_base.0.weight" else 1
            elif weight.ndim > 1:
                weight.data -= weight.data.mean(dim=1, keepdim=True)
                weight.data *= 0.1 if "bbox_pred" in name else 0.2 if "dydx" in name else 4
        # Measured on pictures, so that some regions of each are hands, objects and in contact.
        network.RCNN_cls_score.bias.data += torch.tensor([7.0, -0.9, -6.7])
        states = network.extension_layer.hand_contact_state_layer[-1]
        states.bias.data += torch.tensor([13.5, 7.8, 2.0, 7.9, -9.8])  # type: ignore[operator]
    return network
