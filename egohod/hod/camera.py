"""Motion of the camera in a clip, estimated from the picture outside hands, arms and objects, with OpenCV.

Corners (Shi and Tomasi, "Good features to track", 1994) are followed from frame to frame (Lucas and Kanade, 1981, in
pyramids), and a transform is fitted to them by RANSAC (Fischler and Bolles, 1981). Undone in the positions of hands and
objects, it leaves their motion in the scene, as far as the scene is flat or far away: parallax stays.

OpenCV is imported where it is used: ``tracks.camera=none`` does without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from egohod.errors import UserError

MODELS = ("shift", "affine", "homography")
"""From the simplest on; where one cannot be fitted, the one before it is tried."""

_WIDTH = 320  # larger pictures are reduced to this width: a tenth of a pixel there is enough
_TILES = (4, 3)  # columns and rows: corners are taken from all of them, not only from where the contrast is highest
_CORNERS = 16  # in a tile, at most
_APART = 6  # pixels between two corners
_CONTRAST = 0.002  # of the weakest corner, relative to the strongest of the picture
_WINDOW = 15  # side of the square around a corner that is compared, in pixels
_LEVELS = 3  # halvings of the picture: corners are found again up to some fifty pixels away
_ERROR = 1.0  # pixels by which a corner may miss its place, there and back, and the place that the transform gives it
_LEAST = {"shift": 6, "affine": 10, "homography": 20}  # corners that must agree
_AGREE = 0.4  # share of the corners found again that must agree: a few always do by chance
_SHIFT_ERROR = 0.04  # the same of a shift, in picture widths: what turns and zooms moves by different ways
_NEARLY = 0.95  # a simpler model with which nearly as many corners agree is better: it goes less astray between them
_SPREAD = 0.06  # least area around the corners that agree, as a share of the picture, but for a shift
_STAYS = 0.5  # share of the reference frame's corners that must agree, or the frame before becomes the reference


class _Limits(NamedTuple):
    """What a camera may do at most; what is beyond is a mistake of the fit."""

    shift: float  # of the picture's middle, in picture widths
    turn: float  # degrees
    scale: float  # of lengths anywhere in the picture, or its inverse
    slant: float  # largest over smallest scale anywhere in the picture


_MOST_OF_STEP = _Limits(0.4, 30.0, 1.5, 2.0)
_MOST_OF_CLIP = _Limits(2.0, 60.0, 4.0, 6.0)


def import_opencv() -> Any:
    """The package cv2. Raises :class:`UserError` without it."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"tracks.camera needs OpenCV, which cannot be imported ({error}): pip install opencv-python-headless, or "
            "leave the camera's motion in with tracks.camera=none"
        ) from error
    # Clips are spread over processes: threads of each would only get in the way of the others.
    cv2.setNumThreads(1)
    return cv2


def camera_transforms(pictures: np.ndarray, seconds: np.ndarray, rows: pa.Table, model: str) -> np.ndarray:
    """Pictures uint8 [T, H, W, 3] seen at ``seconds`` [T] -> maps from places in each to places in the first [T, 3, 3].

    Places are (x, y, 1) in shares of width and height. ``rows``, in the schema of detections, mask what moves by
    itself: objects, hands, and the arms below them. ``model`` is one of ``MODELS``. Where a model cannot be fitted the
    simpler ones are tried, and where none can (darkness, blur, a cut, hands all over), the camera counts as not moved.
    """
    cv2 = import_opencv()
    small, masks, to_shares = _prepare(cv2, pictures, seconds, rows)
    size = small[0].shape[::-1]
    for name in MODELS[MODELS.index(model) :: -1]:
        maps = _chain(cv2, small, masks, name)
        if all(_is_plausible(each, size, _MOST_OF_CLIP) for each in maps):
            return to_shares @ maps @ np.linalg.inv(to_shares)
    return np.tile(np.eye(3), (len(small), 1, 1))


def move_boxes(transforms: np.ndarray, centre: np.ndarray, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes by centre and extent [T, 2], moved by ``transforms`` [T, 3, 3]; NaN stays NaN.

    A box stands for the ellipse in it, and becomes the box around the moved ellipse: turning does not make it larger.
    """
    x, y, w = np.moveaxis(transforms @ np.append(centre, np.ones((len(centre), 1)), axis=1)[:, :, None], 1, 0)[..., 0]
    moved = np.stack([x, y], axis=1) / w[:, None]
    # Derivative of the map at the centre.
    slopes = (transforms[:, :2, :2] - moved[:, :, None] * transforms[:, 2:, :2]) / w[:, None, None]
    return moved, np.sqrt(np.einsum("tij,tj->ti", slopes**2, extent**2))


def background_motion(
    pictures: np.ndarray, seconds: np.ndarray, rows: pa.Table, transforms: np.ndarray
) -> tuple[float, float]:
    """Median way of corners outside the boxes from each frame to the next, in picture widths: as seen, and after
    :func:`camera_transforms`, whose arguments and result these are. NaN where no corner is found again."""
    cv2 = import_opencv()
    small, masks, to_shares = _prepare(cv2, pictures, seconds, rows)
    maps = np.linalg.inv(to_shares) @ transforms @ to_shares
    ways: list[np.ndarray] = []
    for i in range(1, len(small)):
        guess, corners = np.linalg.inv(maps[i]) @ maps[i - 1], _corners(cv2, small[i - 1], masks[i - 1])
        # All that are found, not only those to which the transform was fitted.
        source, target = _follow(cv2, small[i - 1], small[i], masks[i], corners, guess)
        remains = _moved(target, maps[i]) - _moved(source, maps[i - 1])
        ways += [np.hypot(*each.T) for each in (target - source, remains)]
    if not any(map(len, ways)):
        return np.nan, np.nan
    seen, left = (float(np.median(np.concatenate(each))) / small[0].shape[1] for each in (ways[::2], ways[1::2]))
    return seen, left


def _prepare(
    cv2: Any, pictures: np.ndarray, seconds: np.ndarray, rows: pa.Table
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Grey pictures uint8 [h, w]; masks, 255 where the scene is seen; and the map from pixels to shares [3, 3]."""
    width = min(pictures.shape[2], _WIDTH)
    height = max(1, round(pictures.shape[1] * width / pictures.shape[2]))
    grey = (cv2.cvtColor(each, cv2.COLOR_RGB2GRAY) for each in pictures)
    small = [cv2.resize(each, (width, height), interpolation=cv2.INTER_AREA) for each in grey]
    masks = [np.full((height, width), 255, np.uint8) for _ in small]
    for row in rows.to_pylist():
        mask = masks[int(np.argmin(np.abs(seconds - row["second"])))]
        # Arms come from below, and are about as wide as hands.
        bottom = height if row["kind"] == "hand" else int(np.ceil(row["bottom"] * height))
        mask[int(row["top"] * height) : bottom, int(row["left"] * width) : int(np.ceil(row["right"] * width))] = 0
    # Pixels have their middles at whole numbers.
    to_shares = np.array([[1 / width, 0, 0.5 / width], [0, 1 / height, 0.5 / height], [0, 0, 1]])
    return small, masks, to_shares


def _chain(cv2: Any, small: list[np.ndarray], masks: list[np.ndarray], model: str) -> np.ndarray:
    """Maps from the pixels of each frame to those of the first [T, 3, 3]."""
    maps, reference, corners = [np.eye(3)], 0, _corners(cv2, small[0], masks[0])
    for i in range(1, len(small)):
        step = None
        for start in sorted({reference, i - 1}):
            if start != reference:
                reference, corners = start, _corners(cv2, small[start], masks[start])
            # Where the corners of the reference are in this frame, and would be had the camera rested since the last.
            guess = np.linalg.inv(maps[i - 1]) @ maps[reference]
            source, target = _follow(cv2, small[reference], small[i], masks[i], corners, guess)
            fitted, agree = _fit(cv2, _moved(source, guess), target, small[0].shape[::-1], model)
            step = step if fitted is None else fitted
            # One reference as long as it is seen: chained from frame to frame the errors would add up.
            if agree >= _STAYS * len(corners):
                break
        maps.append(maps[i - 1] if step is None else maps[i - 1] @ np.linalg.inv(step))
    return np.stack([each / each[2, 2] for each in maps])


def _corners(cv2: Any, picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Places that can be found again, from all over the picture, float32 [N, 2]."""
    # Not at the border of a box, whose inside is in the window too.
    inner = cv2.erode(mask, np.ones((5, 5), np.uint8))
    corners = cv2.goodFeaturesToTrack(picture, 0, _CONTRAST, _APART, mask=inner)
    if corners is None:
        return np.zeros((0, 2), np.float32)
    # The strongest of each tile; they come in the order of their strength.
    tile = (corners[:, 0] * _TILES // picture.shape[::-1]).astype(int) @ (1, _TILES[0])
    chosen = np.concatenate([np.flatnonzero(tile == each)[:_CORNERS] for each in np.unique(tile)])
    return corners[chosen, 0]


def _follow(
    cv2: Any, one: np.ndarray, two: np.ndarray, two_mask: np.ndarray, corners: np.ndarray, guess: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The ``corners`` of ``one`` that are found again in ``two``, about where ``guess`` [3, 3] says: both places."""
    expected, size = _moved(corners, guess), np.array(two.shape[::-1])
    # Not what is far outside, or nowhere; what is a little outside may have come back.
    near = ((expected > -size) & (expected < 2 * size)).all(axis=1)
    corners, expected = corners[near], expected[near]
    if not len(corners):
        return corners, corners
    expected = np.ascontiguousarray(expected[:, None], np.float32)
    how = {"winSize": (_WINDOW, _WINDOW), "maxLevel": _LEVELS, "flags": cv2.OPTFLOW_USE_INITIAL_FLOW}
    after, there, _ = cv2.calcOpticalFlowPyrLK(one, two, corners[:, None], expected, **how)
    # What is followed back does not come home if it was lost or covered.
    again, back, _ = cv2.calcOpticalFlowPyrLK(two, one, after, corners[:, None].copy(), **how)
    after, missed = after[:, 0], np.abs(again[:, 0] - corners).max(axis=1)
    pixel = np.nan_to_num(after).round().astype(int)
    x, y = pixel.clip(0, size - 1).T
    is_free = (pixel == np.stack([x, y], axis=1)).all(axis=1) & (two_mask[y, x] > 0)
    is_match = (there[:, 0] == 1) & (back[:, 0] == 1) & (missed <= _ERROR) & is_free
    return corners[is_match], after[is_match]


def _moved(points: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Points [N, 2] moved by a map [3, 3]."""
    moved = np.append(points, np.ones((len(points), 1)), axis=1) @ step.T
    return moved[:, :2] / moved[:, 2:]


def _fit(
    cv2: Any, source: np.ndarray, target: np.ndarray, size: tuple[int, int], model: str
) -> tuple[np.ndarray | None, int]:
    """The map from ``source`` to ``target`` [N, 2], None if not even a shift fits, and how many agree with it."""
    best, most = None, 0
    for name in MODELS[MODELS.index(model) :: -1]:
        if len(source) < _LEAST[name] or (name == "shift" and best is not None):
            continue
        # RANSAC draws at random: the same draws in every process, whatever it has done before.
        cv2.setRNGSeed(0)
        if name == "homography":
            step, agree = cv2.findHomography(source, target, cv2.RANSAC, _ERROR)
        elif name == "affine":
            rows, agree = cv2.estimateAffine2D(source, target, method=cv2.RANSAC, ransacReprojThreshold=_ERROR)
            step = None if rows is None else np.append(rows, [[0, 0, 1]], axis=0)
        else:
            way = np.median(target - source, axis=0)
            step = np.array([[1, 0, way[0]], [0, 1, way[1]], [0, 0, 1]])
            agree = np.abs(target - source - way).max(axis=1, keepdims=True) <= _SHIFT_ERROR * size[0]
        if step is None or agree.sum() < max(_LEAST[name], _AGREE * len(source), _NEARLY * most):
            continue
        agreeing = source[agree[:, 0] > 0].astype(np.float32)
        is_spread = name == "shift" or cv2.contourArea(cv2.convexHull(agreeing)) >= _SPREAD * size[0] * size[1]
        if is_spread and _is_plausible(step, size, _MOST_OF_STEP):
            best, most = step, len(agreeing)
    return best, most


def _is_plausible(step: np.ndarray, size: tuple[int, int], most: _Limits) -> bool:
    """Whether a camera does that."""
    width, height = size
    places = np.array([(0, 0, 1), (width, 0, 1), (0, height, 1), (width, height, 1), (width / 2, height / 2, 1)])
    moved = places @ step.T
    if not np.isfinite(step).all() or (moved[:, 2] <= 1e-6).any():
        return False
    points = moved[:, :2] / moved[:, 2:]
    slopes = (step[:2, :2] - points[:, :, None] * step[2:, :2]) / moved[:, 2, None, None]
    if (np.linalg.det(slopes) <= 1e-6).any():
        return False
    scales = np.linalg.svd(slopes, compute_uv=False)
    turn = np.degrees(np.arctan2(slopes[-1, 1, 0] - slopes[-1, 0, 1], slopes[-1].trace()))
    return bool(
        np.hypot(*(points[-1] - places[-1, :2])) <= most.shift * width
        and abs(turn) <= most.turn
        and scales.max() <= most.scale
        and scales.min() >= 1 / most.scale
        and scales.max() <= most.slant * scales.min()
    )
