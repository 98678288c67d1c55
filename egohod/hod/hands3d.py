"""3-D hands from any model, in a table that tracks are measured with: true lengths, depth, and how open a hand is.

A parquet file (the setting ``tracks.hands3d``) with one row for a hand in a frame:

    video_id    of the clips' metadata
    second      middle of the time that the frame is on display, (frame + 1/2) / fps, as in the table of detections
    side        of the wearer: 0 left, 1 right
    joints      63 numbers: x, y, z of 21 joints in metres from the camera; x to the right, y down, z away from it.
                The wrist first, then four joints of each finger from thumb to little finger, fingertips last
    focal       optional: the camera's focal length in longer sides of the picture, to remove the camera's motion
    score       optional: of several rows of a side in a frame the one with the highest counts
    rotation    optional, for other programs: of the wrist, 9 numbers, by rows

:func:`from_hamer` and :func:`from_wilor` make it from what these models return.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from egohod import pickles
from egohod.data.detections import LEFT, NEAREST_SECONDS, RIGHT
from egohod.errors import UserError

log = logging.getLogger(__name__)

JOINTS = 21
SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("second", pa.float64()),
        ("side", pa.int8()),
        ("joints", pa.list_(pa.float32())),
        ("focal", pa.float32()),
    ]
)
_WRIST, _KNUCKLE = 0, 9
# From the wrist to the middle finger's knuckle an adult's hand measures 0.09 m: outside of these the unit is another.
_PALM = (0.03, 0.3)
# Both models assume this focal length, in longer sides of the picture (EXTRA.FOCAL_LENGTH / MODEL.IMAGE_SIZE of their
# configurations). No camera has it: distances from the camera come out twenty times too large.
_MODEL_FOCAL = 5000 / 256


class Hands3d:
    """The 3-D hands of a file, by video and time."""

    def __init__(self, path: str | Path) -> None:
        """Read a file as described above; rows that hold no hand are left out, counted and logged.

        Raises :class:`UserError` with file and row for what is not of this form, and if no row is left.
        """
        table = _read(Path(path))
        order = [(name, "ascending") for name in ("video_id", "side", "second", "score")]
        table = table.sort_by(order)
        videos = table["video_id"].to_numpy(zero_copy_only=False).astype(str)
        sides, seconds, focal = (table[name].to_numpy() for name in ("side", "second", "focal"))
        joints = _numbers(table["joints"]).reshape(-1, JOINTS, 3)
        is_new = np.r_[True, (videos[1:] != videos[:-1]) | (sides[1:] != sides[:-1])]
        # Of several rows of a hand at one time the last one, which has the highest score.
        is_last = np.r_[is_new[1:] | (seconds[1:] != seconds[:-1]), True]
        self._hands: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}  # seconds [N], joints [N, 21, 3]
        self._focal: dict[str, float] = {}
        for first, end in itertools.pairwise([*np.flatnonzero(is_new), len(videos)]):
            video, chosen = str(videos[first]), np.flatnonzero(is_last[first:end]) + first
            self._hands[video, int(sides[first])] = seconds[chosen], joints[chosen]
            lengths = focal[first:end][np.isfinite(focal[first:end])]
            if len(lengths) or video not in self._focal:
                self._focal[video] = float(np.median(lengths)) if len(lengths) else np.nan

    def videos(self) -> set[str]:
        """The ids of its videos."""
        return set(self._focal)

    def at(self, video_id: str, seconds: np.ndarray) -> tuple[np.ndarray, float]:
        """``seconds`` [T] -> joints float64 [T, 2, 21, 3] by side, NaN where there is no hand, and the focal length.

        A moment takes the nearest hand that is at most ``NEAREST_SECONDS`` away; the focal length may be NaN.
        """
        joints = np.full((len(seconds), 2, JOINTS, 3), np.nan)
        for side in (LEFT, RIGHT):
            if (video_id, side) in self._hands:
                times, own = self._hands[video_id, side]
                after = np.searchsorted(times, seconds).clip(max=len(times) - 1)
                before = (after - 1).clip(min=0)
                nearest = np.where(seconds - times[before] <= times[after] - seconds, before, after)
                near = np.abs(times[nearest] - seconds) <= NEAREST_SECONDS
                joints[near, side] = own[nearest[near]]
        return joints, self._focal.get(video_id, np.nan)


def _read(path: Path) -> pa.Table:
    """The rows of a file that hold a hand, with all columns but the rotation."""
    try:
        table = pa.parquet.read_table(path)
        names = table.column_names
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of 3-D hands") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as parquet: {' '.join(str(error).split())}") from error
    absent = [name for name in ("video_id", "second", "side", "joints") if names.count(name) != 1]
    if absent:
        raise UserError(f"{path}: needs one column each of video_id, second, side and joints; check {absent[0]}")
    if not len(table):
        raise UserError(f"{path}: holds no row")
    columns = {}
    for name, kind in {"video_id": pa.string(), "second": pa.float64(), "side": pa.int64()}.items():
        columns[name] = _cast(table[name], kind, f"{path}: column {name}")
    for name, missing in {"focal": np.nan, "score": -np.inf}.items():
        column = table[name] if name in names else pa.nulls(len(table))
        values = _cast(column, pa.float64(), f"{path}: column {name}").fill_null(np.nan).to_numpy()
        columns[name] = pa.array(np.nan_to_num(values, nan=missing, posinf=missing))
    focal = columns["focal"].to_numpy()
    if (focal <= 0).any():
        row = int(np.argmax(focal <= 0))
        raise UserError(f"{path}, row {row + 1}: focal is {focal[row]:g}, but must be above 0")
    for name, length in {"joints": 3 * JOINTS, "rotation": 9}.items():
        if name not in names:
            continue
        kind = table[name].type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise UserError(f"{path}: column {name} holds {kind}, not lists of {length} numbers")
        lists = table[name].cast(pa.list_(kind.value_type))
        lengths = pc.list_value_length(lists).fill_null(length).to_numpy()
        if (lengths != length).any():
            row = int(np.argmax(lengths != length))
            what = f"{JOINTS} joints of x, y and z" if name == "joints" else "a matrix"
            raise UserError(f"{path}, row {row + 1}: {name} has {lengths[row]} numbers, not {length} ({what})")
        columns[name] = _cast(lists, pa.list_(pa.float32()), f"{path}: column {name}")
    columns.pop("rotation", None)
    wrong = pc.fill_null(pc.invert(pc.is_in(columns["side"], pa.array([LEFT, RIGHT]))), True).to_numpy()
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(f"{path}, row {row + 1}: side is {columns['side'][row]}, but must be 0 (left) or 1 (right)")

    # --- Rows without a hand: models leave some out, or fill them with NaN ---
    has_values = columns["joints"].is_valid().to_numpy() & columns["video_id"].is_valid().to_numpy()
    joints = np.full((len(table), JOINTS, 3), np.nan, dtype=np.float32)
    joints[columns["joints"].is_valid().to_numpy()] = _numbers(columns["joints"].drop_null()).reshape(-1, JOINTS, 3)
    second = columns["second"].fill_null(np.nan).to_numpy()
    reasons = {
        "without numbers": ~(has_values & np.isfinite(second) & np.isfinite(joints).all(axis=(1, 2))),
        "behind the camera (z must grow away from it)": joints[:, _WRIST, 2] <= 0,
    }
    good = ~np.logical_or.reduce(list(reasons.values()))
    for reason, bad in reasons.items():
        if bad.any():
            count = f"{int(bad.sum()):,} of {len(table):,} rows are {reason}, row {np.argmax(bad) + 1} is the first"
            if not good.any():
                raise UserError(f"{path}: no row holds a hand: {count}")
            log.warning("%s: %s; they are left out", path, count)
    palm = float(np.median(np.linalg.norm(joints[good, _KNUCKLE] - joints[good, _WRIST], axis=1)))
    if not _PALM[0] <= palm <= _PALM[1]:
        raise UserError(
            f"{path}: from the wrist to the middle finger's knuckle is {palm:.3g}, not about 0.09: joints must be in "
            "metres, the wrist first, the middle finger's as numbers 9 to 12"
        )
    return pa.table(columns).filter(pa.array(good))


def _cast(column: pa.ChunkedArray | pa.Array, kind: pa.DataType, where: str) -> pa.ChunkedArray | pa.Array:
    try:
        return column.cast(kind)
    except pa.ArrowException as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _numbers(lists: pa.ChunkedArray) -> np.ndarray:
    """All numbers of lists, one after the other; NaN for those that are null."""
    return pc.list_flatten(lists).to_numpy(zero_copy_only=False)


# --- Converters ---

_Hand = tuple[bool, np.ndarray, np.ndarray]  # whether it is a right one, joints [21, 3], translation [3]


def from_hamer(folder: str | Path, video_id: str, fps: float, focal: float) -> pa.Table:
    """What HaMeR returns for a video -> a table of 3-D hands.

    Args:
        folder: a .npz file for each picture with a hand, whose name ends in the number of the frame, from 0. Its arrays
            are those of demo.py before any is mirrored: ``pred_keypoints_3d`` [N, 21, 3] of the model's output,
            ``pred_cam_t_full`` [N, 3] and ``right`` [N] of the batch. WiLoR's demo.py has the same.
        video_id: of the video.
        fps: its frame rate.
        focal: the camera's true focal length in longer sides of the picture, since the model assumes another.

    Raises:
        UserError: with the file's name.
    """

    def hands(path: Path) -> Iterator[_Hand]:
        arrays = _arrays(path, {"pred_keypoints_3d": (JOINTS, 3), "pred_cam_t_full": (3,), "right": ()})
        for joints, translation, right in zip(*arrays, strict=True):
            # Left hands were shown to a model of right ones as in a mirror.
            yield bool(right), joints * (1 if right else -1, 1, 1), translation

    return _convert(folder, {".npz": hands}, video_id, fps, focal)


def from_wilor(folder: str | Path, video_id: str, fps: float, focal: float) -> pa.Table:
    """What WiLoR-mini's ``predict`` returns for a video -> a table of 3-D hands.

    Like :func:`from_hamer`, but of left hands that are mirrored already. A file is the pickled list that it returns
    (.pkl; plain data and NumPy's arrays only, anything else is refused before it runs), or a .npz with its arrays of
    all hands of the picture: ``pred_keypoints_3d`` [N, 21, 3], ``pred_cam_t_full`` [N, 3] and ``is_right`` [N].
    """

    def of_npz(path: Path) -> Iterator[_Hand]:
        arrays = _arrays(path, {"pred_keypoints_3d": (JOINTS, 3), "pred_cam_t_full": (3,), "is_right": ()})
        for joints, translation, right in zip(*arrays, strict=True):
            yield bool(right), joints, translation

    def of_pickle(path: Path) -> Iterator[_Hand]:
        try:
            results = pickles.load(path, "WiLoR-mini's results", arrays=True)
            for each in results:
                values = each["wilor_preds"]
                joints = np.asarray(values["pred_keypoints_3d"], np.float64).reshape(JOINTS, 3)
                translation = np.asarray(values["pred_cam_t_full"], np.float64).reshape(3)
                yield bool(each["is_right"]), joints, translation
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}: not a list of WiLoR-mini's hands ({reason})") from error

    return _convert(folder, {".npz": of_npz, ".pkl": of_pickle}, video_id, fps, focal)


def _convert(
    folder: str | Path, readers: dict[str, Callable[[Path], Iterator[_Hand]]], video_id: str, fps: float, focal: float
) -> pa.Table:
    if not (fps > 0 and focal > 0):
        raise UserError(f"fps and focal must be above 0, not {fps:g} and {focal:g}")
    files = sorted(each for each in Path(folder).glob("*") if each.suffix in readers)
    if not files:
        raise UserError(f"{folder}: holds no {' or '.join(readers)} file")
    rows: list[dict[str, Any]] = []
    for path in files:
        number = re.search(r"\d+$", path.stem)
        if number is None:
            raise UserError(f"{path}: its name must end in the number of the frame")
        for is_right, joints, translation in readers[path.suffix](path):
            # Across the view the place does not depend on the focal length, the distance is proportional to it.
            place = translation * (1, 1, focal / _MODEL_FOCAL)
            values = (video_id, (int(number[0]) + 0.5) / fps, RIGHT if is_right else LEFT, (joints + place).ravel())
            rows.append(dict(zip(SCHEMA.names, (*values, focal), strict=True)))
    return pa.Table.from_pylist(rows, SCHEMA)


def _arrays(path: Path, shapes: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
    """Arrays of a .npz by name, each with this shape behind the number of hands, which is the same in all."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], np.float64) for name in shapes if name in file}
    except Exception as error:  # whatever NumPy, zipfile and zlib raise for a damaged file
        raise UserError(f"{path}: not a readable .npz of numbers: {' '.join(str(error).split())}") from error
    for name, shape in shapes.items():
        if name not in arrays:
            raise UserError(f"{path}: has no array {name}")
        actual, count = arrays[name].shape, len(next(iter(arrays.values())))
        if actual != (count, *shape):
            raise UserError(f"{path}: {name} has the shape {list(actual)}, not {[count, *shape]}")
    return list(arrays.values())
