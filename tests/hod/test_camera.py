"""The motion of the camera: exactly known transforms, clips that show none, the same results everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from egohod.data.detections import SCHEMA
from egohod.errors import UserError
from egohod.hod import config
from egohod.hod.camera import background_motion, camera_transforms, import_opencv
from egohod.hod.facts import ClipFacts, facts_of
from tests.support import ROOT, Command, environment

SIZE = (320, 240)
MIDDLE = np.array([[1, 0, 160], [0, 1, 120], [0, 0, 1.0]])
NOTHING = SCHEMA.empty_table()


def similarity(degrees: float = 0.0, zoom: float = 1.0, right: float = 0.0, down: float = 0.0) -> np.ndarray:
    """What a head does to places in pixels: it turns and zooms about the middle, then shifts."""
    cos, sin = zoom * np.cos(np.radians(degrees)), zoom * np.sin(np.radians(degrees))
    return MIDDLE @ np.array([[cos, -sin, right], [sin, cos, down], [0, 0, 1]]) @ np.linalg.inv(MIDDLE)


def head(pan: float, tilt: float, roll: float) -> np.ndarray:
    """What a head that turns (degrees) does to places in pixels, with a lens that sees 77 degrees."""
    (a, b), lens = np.radians((pan, tilt)), np.diag([200, 200, 1.0])
    across = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    along = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return similarity(roll) @ MIDDLE @ lens @ along @ across @ np.linalg.inv(MIDDLE @ lens)


PERSPECTIVE = MIDDLE @ np.array([[1.02, 0.01, 3], [-0.02, 0.98, -2], [2e-4, -1e-4, 1]]) @ np.linalg.inv(MIDDLE)


def film(moves: list[np.ndarray], seed: int = 0) -> np.ndarray:
    """A textured plane under a camera: in picture t the scene is where moves[t] puts it, uint8 [T, 240, 320, 3]."""
    rng = np.random.default_rng(seed)
    scene = cv2.GaussianBlur(rng.integers(0, 256, (960, 1280, 3), dtype=np.uint8), (0, 0), 3)
    scene = cv2.normalize(scene, None, 0, 255, cv2.NORM_MINMAX)
    inside = np.array([[1, 0, -480], [0, 1, -360], [0, 0, 1.0]])
    return np.stack([cv2.warpPerspective(scene, move @ inside, SIZE) for move in moves])


def times(pictures: np.ndarray) -> np.ndarray:
    return np.arange(len(pictures)) / 8


def hand(pictures: np.ndarray, boxes: list[tuple[int, int, int, int]], paint: int | None = None) -> pa.Table:
    """A right hand in these pixels (left, top, right, bottom) of each picture, painted into it."""
    rows = []
    for i, (left, top, right, bottom) in enumerate(boxes):
        if paint is not None:
            noise = np.random.default_rng(paint).integers(0, 256, (240, 320, 3), dtype=np.uint8)
            pictures[i, top:bottom, left:right] = noise[: bottom - top, : right - left]
        edges = {"left": left / 320, "top": top / 240, "right": right / 320, "bottom": bottom / 240}
        what = {"video_id": "v", "frame_number": i, "second": i / 8, "kind": "hand", "side": 1, "state": -1}
        rows.append(dict.fromkeys(SCHEMA.names) | what | {"score": 1.0} | edges)
    return pa.Table.from_pylist(rows, SCHEMA)


def errors(transforms: np.ndarray, moves: list[np.ndarray]) -> np.ndarray:
    """For each picture how many pixels the transform misses by, in the farthest corner [T]."""
    # Shares count from the picture's edge, pixels of OpenCV from the middle of the first.
    shares = np.array([[1 / 320, 0, 0.5 / 320], [0, 1 / 240, 0.5 / 240], [0, 0, 1]])
    worst = []
    for transform, move in zip(transforms, moves, strict=True):
        corners = np.array([[(x, y)] for x in (0.0, 319.0) for y in (0.0, 239.0)])
        true = cv2.perspectiveTransform(corners, moves[0] @ np.linalg.inv(move))
        found = cv2.perspectiveTransform(corners, np.linalg.inv(shares) @ transform @ shares)
        worst.append(np.abs(found - true).max())
    return np.array(worst)


@pytest.mark.parametrize(
    ("model", "moves", "tolerance"),
    [
        ("shift", [similarity(right=9 * i, down=-4 * i) for i in range(4)], 0.2),
        ("affine", [similarity(3 * i, 1.05**i, 2 * i, i) for i in range(4)], 0.3),
        ("homography", [similarity(3 * i, 1.05**i, 2 * i, i) for i in range(4)], 0.6),
        ("homography", [np.eye(3), PERSPECTIVE, PERSPECTIVE @ PERSPECTIVE], 0.6),
    ],
)
def test_known_motions_are_found_while_a_hand_moves(model: str, moves: list[np.ndarray], tolerance: float) -> None:
    """To parts of a pixel of 320, in the corners of the picture, with a textured hand that goes another way."""
    for is_masked in (True, False):
        pictures = film(moves)
        boxes = [(80 + 25 * i, 90, 180 + 25 * i, 190) for i in range(len(moves))]
        rows = hand(pictures, boxes, paint=1)
        # A detector that misses it leaves it to RANSAC; a shift is a median, which it would bias.
        if is_masked or model != "shift":
            actual = camera_transforms(pictures, times(pictures), rows if is_masked else NOTHING, model)
            assert errors(actual, moves).max() < tolerance


SWING = np.sin(np.linspace(0, np.pi, 16))  # out and back


@pytest.mark.parametrize(
    ("model", "moves", "tolerance"),
    [
        ("affine", [similarity(24 * s, 1 + 0.3 * s, 40 * s, -20 * s) for s in SWING], 1.5),
        ("homography", [similarity(24 * s, 1 + 0.3 * s, 40 * s, -20 * s) for s in SWING], 3.0),
        ("homography", [head(12 * s, -5 * s, 5 * s) for s in SWING], 3.0),
    ],
)
def test_sixteen_frames_do_not_drift(model: str, moves: list[np.ndarray], tolerance: float) -> None:
    """The scene leaves a third of the picture and comes back; pixels of 320 in the corners."""
    pictures = film(moves)
    actual = camera_transforms(pictures, times(pictures), NOTHING, model)
    assert errors(actual, moves).max() < tolerance
    seen, left = background_motion(pictures, times(pictures), NOTHING, actual)
    assert seen > 0.01
    assert left < 0.001


def test_hands_over_most_of_the_picture_leave_enough_to_see() -> None:
    moves = [similarity(2 * i, 1 + 0.02 * i) for i in range(4)]
    pictures = film(moves)
    rows = hand(pictures, [(60, 0, 284 + 10 * i, 240) for i in range(4)], paint=2)
    assert errors(camera_transforms(pictures, times(pictures), rows, "homography"), moves).max() < 1.5


def test_what_shows_no_motion_counts_as_not_moved() -> None:
    still, moved = np.eye(3), [similarity(2 * i, right=3 * i) for i in range(4)]
    black, flat = np.zeros((4, 240, 320, 3), np.uint8), np.full((4, 240, 320, 3), 130, np.uint8)
    covered = film(moved)
    rows = hand(covered, [(0, 0, 320, 240)] * 4, paint=3)
    for pictures, boxes in ((black, NOTHING), (flat, NOTHING), (covered, rows), (film(moved)[:1], NOTHING)):
        actual = camera_transforms(pictures, times(pictures), boxes, "homography")
        np.testing.assert_allclose(actual, np.broadcast_to(still, (len(pictures), 3, 3)), atol=1e-9)
        assert all(np.isnan(each) or each == 0 for each in background_motion(pictures, times(pictures), boxes, actual))
    # Pictures smaller than the window around a corner.
    tiny = covered[:, :8, :8]
    assert np.isfinite(camera_transforms(tiny, times(tiny), NOTHING, "homography")).all()


@pytest.mark.parametrize("model", ["shift", "affine", "homography"])
def test_a_cut_a_blurred_frame_and_a_leap_are_no_wild_transforms(model: str) -> None:
    moves = [similarity(2 * i, right=3 * i) for i in range(4)]
    # A cut: after it, the camera is where it was before, and what it does then is followed.
    cut = np.concatenate([film(moves), film(moves, seed=5)])
    actual = camera_transforms(cut, times(cut), NOTHING, model)
    np.testing.assert_allclose(actual[4], actual[3], atol=1e-9)
    if model != "shift":
        after = [np.eye(3), *(move @ moves[3] for move in moves)]
        assert errors(actual[[0, 4, 5, 6, 7]], after).max() < 2
    # One dark frame and one that is blurred beyond recognition are bridged.
    pictures = film([*moves, *moves[::-1]])
    pictures[3], pictures[5] = 0, cv2.GaussianBlur(pictures[5], (0, 0), 40)
    actual = camera_transforms(pictures, times(pictures), NOTHING, model)
    if model != "shift":
        assert errors(actual, [*moves, *moves[::-1]])[[1, 2, 4, 6, 7]].max() < 2
    # No head turns by 90 degrees or comes three times as near between two samples.
    for leap in (similarity(90), similarity(0, 3.0)):
        pictures = film([np.eye(3), leap])
        np.testing.assert_allclose(camera_transforms(pictures, times(pictures), NOTHING, model)[1], np.eye(3), atol=0.2)


def test_the_same_in_every_process(tmp_path: Path) -> None:
    """Whatever a process has drawn before, and however many threads OpenCV would take."""
    pictures = film([similarity(2 * i, 1.02**i, 5 * i) for i in range(5)])
    pictures += np.random.default_rng(0).integers(0, 40, pictures.shape, dtype=np.uint8)  # not all corners agree
    np.save(tmp_path / "pictures.npy", pictures)
    code = (
        "import sys, cv2, numpy as np\n"
        "from egohod.data.detections import SCHEMA\n"
        "from egohod.hod.camera import camera_transforms\n"
        "cv2.setNumThreads(4); cv2.setRNGSeed(7); cv2.randu(np.zeros(9), 0, 1)\n"
        "pictures = np.load(sys.argv[1])\n"
        "found = camera_transforms(pictures, np.arange(5) / 8, SCHEMA.empty_table(), 'homography')\n"
        "print(found.tobytes().hex(), cv2.getNumThreads())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pictures.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    expected = camera_transforms(pictures, times(pictures), NOTHING, "homography")
    assert done.stdout.split() == [expected.tobytes().hex(), "1"]
    np.testing.assert_array_equal(camera_transforms(pictures, times(pictures), NOTHING, "homography"), expected)


def _facts(rows: pa.Table, camera: np.ndarray | None) -> ClipFacts:
    return facts_of(rows, np.arange(16) / 8, video_id="v", start=0.0, end=2.0, camera=camera)


def test_a_still_hand_under_a_zooming_head_is_still_and_keeps_its_size() -> None:
    """The zoom drives its box outward and lets it grow, which would be a motion towards the camera."""
    moves = [similarity(-0.6 * i, 1 + 0.04 * i) for i in range(16)]
    pictures = film(moves)
    boxes = []
    for move in moves:
        x, y = cv2.perspectiveTransform(np.array([[(200.0, 160.0)]]), move)[0, 0]
        half = 20 * np.sqrt(np.linalg.det(move[:2, :2]))
        boxes.append((round(x - half), round(y - half), round(x + half), round(y + half)))
    rows = hand(pictures, boxes, paint=4)
    seen = _facts(rows, None).hands["right"].motion
    assert seen.is_moving
    assert seen.size[-1] / seen.size[0] > 1.5
    actual = _facts(rows, camera_transforms(pictures, times(pictures), rows, "affine")).hands["right"].motion
    assert actual.directions == ("still",)
    assert np.ptp(actual.path, axis=0).max() < 0.01
    assert actual.size.max() / actual.size.min() < 1.06  # boxes have whole pixels
    # And one that moves along does move.
    level = hand(pictures, [boxes[0]] * 16)
    camera = camera_transforms(pictures, times(pictures), level, "affine")
    assert _facts(level, camera).hands["right"].motion.is_moving


def test_settings_of_earlier_releases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "old.yml"
    file.write_text(f"_base_: {ROOT}/configs/hod/default.yml\ntracks: {{camera: false}}\n")
    assert config.load(file).tracks.camera == "none"
    assert "tracks.camera=false is now tracks.camera=none" in caplog.text
    assert config.load(file, ["tracks.camera=true"]).tracks.camera == "homography"
    assert config.load(file, ["tracks.camera=shift"]).tracks.camera == "shift"
    with pytest.raises(UserError, match=r"tracks\.camera is 'zoom', but must be one of none, shift, affine, homograph"):
        config.load(file, ["tracks.camera=zoom"])


def test_without_opencv(monkeypatch: pytest.MonkeyPatch, few: list[str], inside: Command) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"pip install opencv-python-headless, or .* tracks\.camera=none"):
        import_opencv()
    done = inside("generate_hod.py", *few, "tracks.camera=affine")
    assert done.returncode == 2
    assert done.stderr.count("pip install opencv-python-headless") == 1
    assert inside("generate_hod.py", *few, "tracks.camera=none").returncode == 0
