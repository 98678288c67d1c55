"""The network of the 100DOH hand-object detector: Faster R-CNN on ResNet-101-C4 with heads for contact, offset and side.

Source: Shan et al., "Understanding Human Hands in Contact at Internet Scale", CVPR 2020, and the behaviour of its code
(ddshan/hand_object_detector, commit e6eec71, MIT licence), written anew from measurements of it. Names in the state
dict are those of its checkpoints. Where its code differs from a textbook Faster R-CNN the weights were trained with the
difference, so it is kept and marked "as trained" below.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import nms, roi_align

CLASSES = 3
OBJECT, HAND = 1, 2  # 0 is the background
STATES = 5
STRIDE = 16
_MEANS_BGR = (102.9801, 115.9465, 122.7717)  # Caffe's: of BGR from 0 to 255, without a division
_SHORT_SIDE, _LONG_SIDE = 600, 1000
_PROPOSAL_CANDIDATES, _PROPOSAL_NMS = 6000, 0.7
_DETECTION_NMS = 0.3
_DELTA_SCALES = (0.1, 0.1, 0.2, 0.2)
_PADDING = 0.3
_ANCHORS = 12
# Width and height of the anchors of one place, by ratio (h/w 0.5, 1, 2), then by scale (8, 16, 32, 64). As trained:
# the sides of 16-pixel squares were rounded before they were scaled (23 x 12, 16 x 16, 11 x 22).
_ANCHOR_SIZES = tuple((w * scale, h * scale) for w, h in ((23, 12), (16, 16), (11, 22)) for scale in (8, 16, 32, 64))


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
            nn.Linear(2048, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, STATES)
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
        self, pictures: Tensor, min_object_score: float = 0.5, min_hand_score: float = 0.5, precision: torch.dtype = torch.float32
    ) -> list[Detections]:
        """Pictures uint8 RGB [B, H, W, 3] of one size -> what is in each, scores **above** the thresholds.

        ``precision`` is that of the convolutions; boxes, scores and the linear layers are always float32.
        """
        height, width = pictures.shape[1:3]
        blob, scale = preprocess(pictures)
        # 1e-4 of a pixel is beyond bfloat16, so only the convolutions are in it.
        with torch.autocast(pictures.device.type, precision, enabled=precision != torch.float32):
            features = self.RCNN_base(blob)
            scores, deltas = self.RCNN_rpn(features)
        features = features.float()
        found = []
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
            found.append(
                Detections(
                    *(boxes[objects, 4 * OBJECT : 4 * OBJECT + 4], probability[objects, OBJECT], objects),
                    *(boxes[hands, 4 * HAND : 4 * HAND + 4], probability[hands, HAND], hands),
                    states=extension.hand_contact_state_layer(padded).argmax(dim=1),
                    offsets=extension.offsets(padded),
                    # The logit above 0 is the sigmoid above 1/2.
                    sides=(extension.hand_lr_layer(pooled[hands])[:, 0] > 0).long(),
                )
            )
        return found

    def pool_and_embed(self, features: Tensor, rois: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
        """Features [1, 1024, h, w] and RoIs [N, 4] in pixels of the resized picture -> [N, 2048]."""
        # As trained: pixel centres are not shifted by half a pixel ("aligned"). The same numbers as the original's
        # kernel, also where a padded RoI is inside out.
        pooled = roi_align(features, [rois], 7, 1 / STRIDE, sampling_ratio=-1, aligned=False)
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
    x = pictures.flip(3).permute(0, 3, 1, 2).float() - torch.tensor(_MEANS_BGR, device=pictures.device).view(3, 1, 1)
    for dim, length in ((3, width), (2, height)):
        # Half to even, as OpenCV rounds. A picture that is a thousand times as long as high keeps one line.
        place = (torch.arange(max(1, round(length * scale)), dtype=torch.float64) + 0.5) / scale - 0.5
        place = place.clamp(0, length - 1).to(pictures.device)
        low = place.long()
        share = (place - low).float().view(-1, *[1] * (3 - dim))
        x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, (low + 1).clamp(max=length - 1)) * share
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


def enlarge(rois: Tensor, size: tuple[int, int]) -> Tensor:
    """RoIs [N, 4] grown by 0.3 of their width and height on each side, from which contact and offset are read.

    ``size`` is the resized picture's (height, width).
    """
    margin = _PADDING * (rois[:, 2:] - rois[:, :2])
    low = (rois[:, :2] - margin).clamp(min=0)
    # As trained: x2 is limited by the **height** and y2 by the **width** of the picture. In a wide one some RoIs end
    # left of where they begin; with the limits in order every third hand would have another contact state.
    high = torch.minimum(rois[:, 2:] + margin, rois.new_tensor([size[0], size[1]]))
    return torch.cat([low, high], dim=1)


def select(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes [N, 4] of one class that score above ``threshold`` and overlap no better one."""
    candidates = (scores > threshold).nonzero()[:, 0]
    order = candidates[scores[candidates].argsort(descending=True, stable=True)]
    return order[suppress(boxes[order], scores[order], _DETECTION_NMS)]
