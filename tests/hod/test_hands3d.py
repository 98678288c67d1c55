"""3-D hands: what facts gain from them, their file, and how results of HaMeR and WiLoR become one."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import exchange
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from egohod.data.detections import SCHEMA as BOXES
from egohod.errors import UserError
from egohod.hod import config
from egohod.hod.facts import ClipFacts, facts_of
from egohod.hod.hands3d import JOINTS, SCHEMA, Hands3d, from_hamer, from_wilor
from egohod.hod.pipeline import CHECK, DETECT, TRACK, build
from egohod.hod.store import Shard, from_plain
from tests.hod.runs import head
from tests.hod.test_facts import TIMES, Rows, boxes

T = len(TIMES)
STEP = np.linspace(0, 1, T)
REST = np.full(T, 0.5)


def skeleton(reach: float = 1.9) -> np.ndarray:
    """Joints of a hand [21, 3] that points away from the body, its fingertips at ``reach`` palms from the wrist."""
    joints = np.zeros((JOINTS, 3))
    for finger in range(5):
        along = np.array([(finger - 2) * 0.2, -1.0, 0.0]) / np.hypot((finger - 2) * 0.2, 1)
        for joint, part in enumerate((1, 1 + (reach - 1) / 3, 1 + 2 * (reach - 1) / 3, reach)):
            joints[1 + 4 * finger + joint] = 0.09 * part * along
    return joints


def placed(z: float, reach: float = 1.9) -> list[float]:
    """Joints of a hand before the camera, as a row of a file has them."""
    return (skeleton(reach) + np.array([0, 0, z])).ravel().tolist()  # type: ignore[no-any-return]


def moving(wrist: Any, reach: float | np.ndarray = 1.9) -> np.ndarray:
    """Joints of the right hand alone [T, 2, 21, 3] with its wrist at x, y, z."""
    joints = np.full((T, 2, JOINTS, 3), np.nan)
    path = np.stack(np.broadcast_arrays(*wrist, STEP)[:3], axis=1)
    hands = [skeleton(each) for each in np.broadcast_to(reach, T)]
    joints[:, 1] = np.stack(hands) + path[:, None]
    return joints


def facts(rows: Rows, joints: np.ndarray | None, aspect: float = 1.0, **more: Any) -> ClipFacts:
    table = pa.Table.from_pylist(rows, BOXES)
    return facts_of(table, TIMES, video_id="v", start=0.0, end=2.0, aspect=aspect, joints=joints, **more)


# --- Facts ---


def test_depth_tells_away_and_closer_and_lengths_are_true() -> None:
    rows = boxes(REST, REST)
    assert facts(rows, None).hands["right"].motion.directions == ("still",)
    away = facts(rows, moving((0, 0, 0.4 + 0.3 * STEP))).hands["right"].motion
    assert (away.directions, away.is_metric) == (("away",), True)
    assert away.distance == pytest.approx(0.3, rel=0.05)
    assert away.pace == pytest.approx(0.3 / (TIMES[-1] - TIMES[0]), rel=0.1)
    assert facts(rows, moving((0, 0, 0.7 - 0.3 * STEP))).hands["right"].motion.directions == ("closer",)
    flick = facts(rows, moving((0, 0, 0.4 + 0.2 * np.sin(np.pi * STEP)))).hands["right"].motion
    assert flick.directions == ("away", "closer")
    assert flick.distance == pytest.approx(0.4, rel=0.1)
    # Up in the picture with boxes of one size: upward without depth, and with it whichever way is longer.
    climbs = boxes(REST, 0.8 - 0.4 * STEP)
    assert facts(climbs, moving((0, 0.1 - 0.2 * STEP, 0.5))).hands["right"].motion.directions == ("up",)
    assert facts(climbs, moving((0, 0.05 - 0.1 * STEP, 0.4 + 0.3 * STEP))).hands["right"].motion.directions == ("away",)
    angle = 2 * np.pi * STEP
    circle = facts(boxes(REST, REST), moving((0.1 * np.cos(angle), 0.1 * np.sin(angle), 0.5))).hands["right"].motion
    assert circle.directions == ("clockwise",)
    # A straight way whose other axes only tremble does not go round.
    shaky = moving((0.02 * np.cos(2 * angle), 0.02 * np.sin(2 * angle), 0.4 + 0.3 * STEP))
    assert facts(rows, shaky).hands["right"].motion.directions == ("away",)


def test_a_hand_that_the_picture_cuts_off_has_true_lengths() -> None:
    cut = [each | {"bottom": 1.0} for each in boxes(0.2 + 0.5 * STEP, REST)]
    assert facts(cut, None).hands["right"].motion.distance is None
    motion = facts(cut, moving((0.3 * STEP, 0, 0.5))).hands["right"].motion
    assert (motion.directions, motion.distance) == (("right",), pytest.approx(0.3, rel=0.05))


def test_few_3d_hands_are_none() -> None:
    rows, joints = boxes(0.2 + 0.5 * STEP, REST), moving((0, 0, 0.4 + 0.3 * STEP))
    gaps = joints.copy()
    gaps[1::2] = np.nan
    assert facts(rows, gaps).hands["right"].motion.directions == ("away",)
    joints[5:] = np.nan
    few, none = facts(rows, joints).hands["right"], facts(rows, None).hands["right"]
    assert (few.motion.directions, few.motion.is_metric, few.grasp) == (("right",), False, None)
    assert few.motion.distance == none.motion.distance
    assert facts([], moving((0, 0, 0.5))).hands == {}


@pytest.mark.parametrize("turn", [(25, 0, 0), (0, 20, 0), (-20, 10, 15)])
@pytest.mark.parametrize("place", [(0.0, 0.0, 0.5), (0.1, 0.1, 0.4), (-0.15, 0.05, 0.5)])
@pytest.mark.parametrize("aspect", [1.0, 4 / 3])
def test_a_turning_head_moves_no_3d_hand(turn: tuple[float, ...], place: tuple[float, ...], aspect: float) -> None:
    """The camera pans, tilts and rolls by so many degrees, so that a hand at rest wanders over the picture."""
    focal, size = 0.6, np.array([1, 1 / aspect])
    turns = np.stack([_turn(0, 2, a) @ _turn(2, 1, b) @ _turn(1, 0, c) for a, b, c in np.radians(turn) * STEP[:, None]])
    lens = np.array([[focal, 0, 0.5], [0, focal * aspect, 0.5], [0, 0, 1]])
    camera = lens @ turns @ np.linalg.inv(lens)
    ways = {"still": (0, 0, 0), "right": (0.2, 0, 0), "up": (0, -0.2, 0), "away": (0, 0, 0.2)}
    for expected, way in ways.items():
        # Turns are from the axes of each picture to those of the first.
        seen = np.einsum("tji,tj->ti", turns, np.outer(STEP, way) + place)
        rows = boxes(*(0.5 + focal * seen[:, :2] / seen[:, 2:] / size).T)
        motion = facts(rows, moving(seen.T), aspect, camera=camera, focal=focal).hands["right"].motion
        assert (motion.directions, motion.distance) == ((expected,), pytest.approx(sum(np.abs(way)), rel=0.02))
        as_seen = facts(rows, moving(seen.T), aspect, camera=camera).hands["right"].motion
        assert expected != "still" or as_seen.directions != ("still",)


def _turn(one: int, other: int, angle: float) -> np.ndarray:
    """Rotation of one axis towards another."""
    matrix = np.eye(3)
    matrix[[one, other], [one, other]] = np.cos(angle)
    matrix[one, other], matrix[other, one] = np.sin(angle), -np.sin(angle)
    return matrix


def test_how_open_a_hand_is() -> None:
    rows = boxes(REST, REST)
    assert facts(rows, moving((0, 0, 0.5), 1.9)).hands["right"].grasp == "open"
    assert facts(rows, moving((0, 0, 0.5), 1.1)).hands["right"].grasp == "closed"
    assert facts(rows, moving((0, 0, 0.5), 1.45)).hands["right"].grasp is None
    assert facts(rows, moving((0, 0, 0.5), 1.8 - 0.6 * STEP)).hands["right"].grasp == "closing"
    assert facts(rows, moving((0, 0, 0.5), 1.2 + 0.6 * STEP)).hands["right"].grasp == "opening"
    assert facts(rows, None).hands["right"].grasp is None


# --- The file ---


def row(second: float = 0.5, side: int = 1, joints: Any = None, **more: Any) -> dict[str, Any]:
    return {"video_id": "v", "second": second, "side": side, "joints": joints or placed(0.5)} | more


def written(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def test_a_moment_has_the_nearest_hands(tmp_path: Path) -> None:
    near, far = placed(0.3), placed(0.9)
    rows = [row(1.0, joints=far), row(0.5, joints=near), row(0.5, 0, joints=far), row(2.0, joints=near)]
    rows += [row(1.0, 1, joints=near, score=0.9), row(1.0, 1, joints=far, score=0.5)]
    hands = Hands3d(written(tmp_path / "a.parquet", [{"focal": 0.8, "score": None} | each for each in rows]))
    joints, focal = hands.at("v", np.array([0.45, 0.58, 0.62, 1.0, 2.05, 5.0]))
    assert focal == pytest.approx(0.8)
    wrists = joints[:, :, 0, 2]
    np.testing.assert_allclose(wrists[:, 1], [0.3, 0.3, np.nan, 0.3, 0.3, np.nan], rtol=1e-6)
    np.testing.assert_allclose(wrists[:, 0], [0.9, 0.9, *[np.nan] * 4], rtol=1e-6)
    nothing, unknown = hands.at("other", np.array([0.5]))
    assert np.isnan(nothing).all()
    assert np.isnan(unknown)
    assert hands.videos() == {"v"}


def test_rows_without_a_hand_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rows = [row(), row(0.6, joints=[float("nan")] * 63), row(0.7, joints=placed(-0.5)), row(float("nan"))]
    rows += [row(0.8) | {"joints": None}, row(0.9, joints=[None] * 63)]
    path = written(tmp_path / "a.parquet", rows)
    assert np.isfinite(Hands3d(path).at("v", np.array([0.5, 2.0]))[0][:, 1, 0, 0]).tolist() == [True, False]
    assert f"{path}: 4 of 6 rows are without numbers, row 2 is the first" in caplog.text
    assert f"{path}: 1 of 6 rows are behind the camera (z must grow away from it), row 3 is the first" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row(joints=[0.0] * 60)], "row 2: joints has 60 numbers, not 63 (21 joints of x, y and z)"),
        ([row(rotation=[1.0] * 9), row(rotation=[1.0] * 3)], "row 2: rotation has 3 numbers, not 9 (a matrix)"),
        ([row(), row(side=2)], "row 2: side is 2, but must be 0 (left) or 1 (right)"),
        ([row(), row() | {"side": None}], "row 2: side is None, but must be 0 (left) or 1 (right)"),
        ([row() | {"side": "left"}], "column side"),
        ([row(focal=0.8), row(focal=-1.0)], "row 2: focal is -1, but must be above 0"),
        ([row(joints=[float("nan")] * 63)], "no row holds a hand: 1 of 1 rows are without numbers, row 1 is the first"),
        ([row(joints=[1000 * each for each in placed(0.5)])], "knuckle is 90, not about 0.09"),
        ([{"video_id": "v", "second": 0.5, "side": 1}], "check joints"),
        ([row() | {"joints": "63"}], "column joints holds string, not lists of 63 numbers"),
        ([row() | {"joints": ["a"] * 63}], "column joints: "),
        ([], "holds no row"),
    ],
)
def test_a_file_of_another_form_is_named_with_its_row(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = written(tmp_path / "a.parquet", rows, None if rows else SCHEMA)
    with pytest.raises(UserError) as error:
        Hands3d(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_what_is_no_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file of 3-D hands"):
        Hands3d(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("video_id,second\n")
    with pytest.raises(UserError, match="not readable as parquet"):
        Hands3d(tmp_path / "text.parquet")


# --- Results of models, in the form in which their authors' code returns them ---

FOCAL = 0.8  # of the camera, in longer sides
MODEL_FOCAL = 5000 / 256


def returned(side: int, place: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Joints and translation that a model returns for a hand at ``place``, before any mirroring."""
    joints = skeleton()
    joints[:, 0] += 0.01 * np.arange(JOINTS)  # no hand is its own mirror image
    return joints * (1 if side else -1, 1, 1), np.array(place) * (1, 1, MODEL_FOCAL / FOCAL)


def wrists(table: pa.Table) -> list[tuple[float, int, list[float]]]:
    """Time, side and the little finger's tip of each row."""
    return [(each["second"], each["side"], np.round(each["joints"][-3:], 4).tolist()) for each in table.to_pylist()]


def tip(place: tuple[float, float, float]) -> list[float]:
    joints = skeleton()
    return np.round(joints[-1] + (0.2, 0, 0) + place, 4).tolist()  # type: ignore[no-any-return]


def test_hamer_arrays_become_hands_in_the_camera(tmp_path: Path) -> None:
    places = {1: (0.1, 0.2, 0.5), 0: (-0.1, 0.2, 0.6)}
    for frame, sides in ((3, (1, 0)), (12, (0,))):
        joints, moved = zip(*(returned(side, places[side]) for side in sides), strict=True)
        arrays = {"pred_keypoints_3d": np.stack(joints), "pred_cam_t_full": np.stack(moved), "right": np.array(sides)}
        arrays = {name: each.astype(np.float32) for name, each in arrays.items()} | {"scaled_focal_length": 37500.0}
        np.savez(tmp_path / f"kitchen_{frame:06d}.npz", **arrays)
    table = from_hamer(tmp_path, "v", 10.0, FOCAL)
    assert wrists(table) == [
        (0.35, 1, tip(places[1])),
        (0.35, 0, tip(places[0])),
        (1.25, 0, tip(places[0])),
    ]
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    assert Hands3d(tmp_path / "a.parquet").at("v", np.array([0.35]))[1] == pytest.approx(FOCAL)


def wilor_hand(side: int, place: tuple[float, float, float]) -> dict[str, Any]:
    """A hand as WiLoR-mini's predict returns it: left ones are mirrored already, half precision, a batch of one."""
    joints, moved = returned(side, place)
    joints = joints * (1 if side else -1, 1, 1)
    values = {"pred_keypoints_3d": joints[None], "pred_cam_t_full": moved[None], "betas": np.zeros((1, 10))}
    predictions: dict[str, Any] = {name: each.astype(np.float32) for name, each in values.items()}
    predictions |= {"global_orient": np.zeros((1, 1, 3), np.float16), "scaled_focal_length": np.float64(37500.0)}
    return {"hand_bbox": [638.0, 10.5, 700.0, 80.0], "is_right": float(side), "wilor_preds": predictions}


def test_wilor_results_become_the_same_hands(tmp_path: Path) -> None:
    places = {1: (0.1, 0.2, 0.5), 0: (-0.1, 0.2, 0.6)}
    hands = [wilor_hand(side, places[side]) for side in (1, 0)]
    (tmp_path / "0003.pkl").write_bytes(pickle.dumps(hands))
    (tmp_path / "0004.pkl").write_bytes(pickle.dumps([]))
    stacked = {
        n: np.concatenate([h["wilor_preds"][n] for h in hands]) for n in ("pred_keypoints_3d", "pred_cam_t_full")
    }
    np.savez(tmp_path / "0005.npz", is_right=[1, 0], **stacked)
    expected = [(1, tip(places[1])), (0, tip(places[0]))]
    table = from_wilor(tmp_path, "v", 10.0, FOCAL)
    assert wrists(table) == [*((0.35, *each) for each in expected), *((0.55, *each) for each in expected)]


class _Command:
    """Unpickled by what trusts files, it leaves a file behind."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"is_right": _Command()}], "refused: it asks for posix.mkdir"),
        ([{"is_right": 1}], "no 'wilor_preds'"),
        ({"is_right": 1}, "not a list of WiLoR-mini's hands"),
        ([wilor_hand(1, (0, 0, 1)) | {"wilor_preds": {"pred_keypoints_3d": np.zeros((1, 20, 3))}}], "reshape"),
    ],
)
def test_pickles_of_anything_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0003.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError) as error:
        from_wilor(tmp_path, "v", 10.0, FOCAL)
    assert str(error.value).startswith(str(tmp_path / "0003.pkl"))
    assert message in str(error.value)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("name", "arrays", "message"),
    [
        ("0003", {"pred_keypoints_3d": np.zeros((1, 21, 3))}, "has no array pred_cam_t_full"),
        (
            "0003",
            {"pred_keypoints_3d": np.zeros((1, 778, 3)), "pred_cam_t_full": np.zeros((1, 3)), "right": np.zeros(1)},
            "pred_keypoints_3d has the shape [1, 778, 3], not [1, 21, 3]",
        ),
        (
            "0003",
            {"pred_keypoints_3d": np.zeros((2, 21, 3)), "pred_cam_t_full": np.zeros((1, 3)), "right": np.zeros(2)},
            "pred_cam_t_full has the shape [1, 3], not [2, 3]",
        ),
        ("0003", {"right": np.array([{}])}, "not a readable .npz of numbers"),
        ("frame", {"right": np.zeros(1)}, "must end in the number of the frame"),
    ],
)
def test_arrays_of_another_form_are_named(tmp_path: Path, name: str, arrays: Any, message: str) -> None:
    np.savez(tmp_path / f"{name}.npz", **arrays)
    with pytest.raises(UserError) as error:
        from_hamer(tmp_path, "v", 10.0, FOCAL)
    assert str(error.value).startswith(str(tmp_path / f"{name}.npz"))
    assert message in str(error.value)


@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "array"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"3{suffix}"
    if suffix == ".npz":
        joints, place = np.zeros((1, JOINTS, 3)), np.ones((1, 3))
        np.savez(path, pred_keypoints_3d=joints, pred_cam_t_full=place, is_right=np.ones(1))
    else:
        path.write_bytes(pickle.dumps([wilor_hand(1, (0.1, 0.2, 0.5))]))
    whole = path.read_bytes()
    flipped = bytes(byte ^ 255 if 150 < i < 300 else byte for i, byte in enumerate(whole))
    contents = {"empty": b"", "cut": whole[:-200], "flipped": flipped, "text": b"PK\x03\x04 and no archive"}
    path.write_bytes(contents.get(damage, b""))
    if damage == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    with pytest.raises(UserError) as error:
        from_wilor(tmp_path, "v", 10.0, FOCAL)
    assert str(error.value).startswith(str(path))


def test_a_folder_of_videos_is_converted(tmp_path: Path) -> None:
    for video in ("a", "b"):
        (tmp_path / "in" / video).mkdir(parents=True)
        (tmp_path / "in" / video / "3.pkl").write_bytes(pickle.dumps([wilor_hand(1, (0.1, 0.2, 0.5))]))
    command = [str(tmp_path / "in"), "--fps", "10", "--focal", str(FOCAL), "--output"]
    exchange.main(["wilor", *command, str(tmp_path / "out.parquet")])
    assert Hands3d(tmp_path / "out.parquet").videos() == {"a", "b"}
    for wrong, message in (
        (["hamer", *command, str(tmp_path / "out.csv")], "must end in .parquet"),
        (["hamer", *command, str(tmp_path / "o.parquet")], "holds no .npz file"),
        (["wilor", str(tmp_path / "in" / "a"), *command[1:], str(tmp_path / "o.parquet")], "holds no folder"),
    ):
        with pytest.raises(UserError, match=message):
            exchange.main(wrong)


# --- The pipeline ---


def test_the_pipeline_measures_with_3d_hands_and_notices_another_file(
    demo_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    world = demo_world / "train"
    (tmp_path / "clips.csv").write_text("\n".join(head(demo_world, 2)) + "\n")
    clips = pd.read_csv(tmp_path / "clips.csv")
    video, end = clips["video_id"][0], float(clips["end_second"].max())
    path = tmp_path / "hands.parquet"

    def write(names: list[str], reach: float) -> None:
        joints = placed(0.5, reach)
        seconds = np.arange(0, end, 1 / 12) + 1 / 24
        written(path, [row(s, side, joints) | {"video_id": n} for n in names for s in seconds for side in (0, 1)])

    def pipeline() -> Any:
        settings = [f"source.metadata={tmp_path}/clips.csv", f"source.root={world}/videos", "workers=0", "frames=8"]
        settings += [
            "demo.folder=null",
            f"detector.options.path={world}/detections.parquet",
            f"output={tmp_path}/o.csv",
        ]
        return build(config.load("configs/hod/demo.yml", [*settings, f"tracks.hands3d={path}"]))

    with pytest.raises(UserError, match=r"tracks.hands3d=.*hands.parquet: No such file"):
        pipeline()
    write([video, "elsewhere"], 1.9)
    first = pipeline()
    first.run_all(Shard())
    assert "1 videos of 3-D hands have no clips, such as 'elsewhere'" in caplog.text
    with first.store.results() as results:
        stored = from_plain(ClipFacts, first.stored(0, results)[TRACK].parsed())
    assert {hand.grasp for hand in stored.hands.values()} == {"open"}
    assert all(hand.motion.is_metric for hand in stored.hands.values())

    write([video], 1.1)
    second = pipeline()
    assert second.keys(0)[DETECT] == first.keys(0)[DETECT]
    assert second.keys(0)[TRACK] != first.keys(0)[TRACK]
    assert second.keys(0)[CHECK] != first.keys(0)[CHECK]
    second.run_all(Shard())
    with second.store.results() as results:
        stored = from_plain(ClipFacts, second.stored(0, results)[TRACK].parsed())
    assert {hand.grasp for hand in stored.hands.values()} == {"closed"}

    write([video], 1.5)
    third = pipeline()
    write([video], 1.1)
    with pytest.raises(UserError, match="has changed since the run started"):
        third.run_all(Shard())
    write(["elsewhere"], 1.9)
    with pytest.raises(UserError, match="has hands of none of the 1 videos"):
        pipeline().run_all(Shard())
