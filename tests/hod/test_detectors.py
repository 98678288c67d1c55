"""Detectors: files, noise, a real (untrained) Faster R-CNN, and MediaPipe on real clips where it is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision.models import detection

from egohod.data import detections
from egohod.data.decoders import choose_decoder
from egohod.data.detections import EDGES, LEFT, RIGHT, SCHEMA
from egohod.data.videos import VideoError, read_clip
from egohod.errors import UserError
from egohod.hod import config as hod
from egohod.hod.camera import background_motion, camera_transforms
from egohod.hod.config import DETECTORS
from egohod.hod.detectors import Detector, assign_sides, make_detector, typed_options
from egohod.hod.detectors.files import DetectionFiles, Oracle
from egohod.hod.detectors.mediapipe_hands import FOLDER, MediapipeHands
from egohod.hod.detectors.torchvision_boxes import TorchvisionBoxes
from egohod.hod.facts import facts_of
from tests.support import ROOT, Command

FPS = 12


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames of one hand and one object, at 12 frames a second."""
    rows = []
    for frame in range(40):
        where = {"video_id": "v", "frame_number": frame, "second": (frame + 0.5) / FPS, "score": 1.0, "state": 0}
        box = {"left": 0.1 + frame / 100, "top": 0.2, "right": 0.3 + frame / 100, "bottom": 0.4}
        for kind, side in (("hand", RIGHT), ("object", -1)):
            rows.append(dict.fromkeys(SCHEMA.names) | where | box | {"kind": kind, "side": side})
    path = tmp_path_factory.mktemp("truth") / "boxes.parquet"
    detections.write(pa.Table.from_pylist(rows, SCHEMA), path)
    return path


def frames(numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(numbers), (np.array(numbers) + 0.5) / FPS


def test_files_give_each_moment_once_to_the_nearest_picture(truth: Path, tmp_path: Path) -> None:
    files = DetectionFiles(str(truth))
    assert files.reads_files
    actual = files.detect("v", *frames([0, 4, 8, 39])).to_pandas()
    assert actual["frame_number"].tolist() == [0, 0, 4, 4, 8, 8, 39, 39]
    assert len(files.detect("elsewhere", *frames([0]))) == 0
    assert len(files.detect("v", *frames([100]))) == 0
    # Where frames lack boxes the neighbours' boxes are not used twice.
    thin = detections.read(truth).to_pandas().query("frame_number % 3 == 0")
    detections.write(pa.Table.from_pandas(thin, preserve_index=False), tmp_path / "thin.parquet")
    actual = DetectionFiles(str(tmp_path)).detect("v", *frames(list(range(12)))).to_pandas()
    assert actual["frame_number"].tolist() == [0, 0, 3, 3, 6, 6, 9, 9]


def test_boxes_of_many_videos_are_read_video_by_video(truth: Path, tmp_path: Path) -> None:
    """Of two files whose row groups hold a few rows each, of several videos; in memory are a few of the videos."""
    one = detections.read(truth).to_pandas()
    videos = [one.assign(video_id=f"v{number}", score=0.5 + number / 100) for number in range(20)]
    table = pa.Table.from_pandas(pd.concat(videos).sort_values("second", kind="stable"), SCHEMA, preserve_index=False)
    for name, rows in (("a", table.slice(0, 700)), ("b", table.slice(700))):
        pa.parquet.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=31)
    files = DetectionFiles(str(tmp_path))
    assert files.videos() == {f"v{number}" for number in range(20)}
    expected = DetectionFiles(str(truth)).detect("v", *frames([0, 4, 39])).to_pandas()
    for number in (*range(20), 0, 19, 7):
        actual = files.detect(f"v{number}", *frames([0, 4, 39])).to_pandas()
        assert actual["score"].unique() == pytest.approx([0.5 + number / 100])
        pd.testing.assert_frame_equal(actual[[*EDGES, "second", "kind"]], expected[[*EDGES, "second", "kind"]])
        assert len(files._videos) <= 8
    wrong = table.to_pandas()
    wrong.loc[100, "left"] = 7.0
    pa.parquet.write_table(pa.Table.from_pandas(wrong), tmp_path / "b.parquet", row_group_size=31)
    with pytest.raises(UserError, match=r"b\.parquet: row 101 is no box"):
        DetectionFiles(str(tmp_path))


def test_epic_files_are_read_by_video_at_the_rate_of_the_frames(truth: Path, tmp_path: Path) -> None:
    folder = tmp_path / "P01"
    detections.write_epic(detections.read(truth), folder)
    one, other = (DetectionFiles(str(path)).detect("v", *frames([3, 4, 5])) for path in (truth, tmp_path))
    pd.testing.assert_frame_equal(one.to_pandas()[list(EDGES)], other.to_pandas()[list(EDGES)])
    np.testing.assert_allclose(one.column("second").to_numpy(), other.column("second").to_numpy())
    (folder / "v.pkl").write_bytes(b"\x80\x04cut")
    with pytest.raises(VideoError, match=r"v\.pkl"):
        DetectionFiles(str(tmp_path)).detect("v", *frames([3]))


def test_noise_follows_from_the_seed_and_the_frame_alone(truth: Path) -> None:
    def boxes(numbers: list[int], **noise: float) -> pd.DataFrame:
        return Oracle(str(truth), **noise).detect("v", *frames(numbers)).to_pandas()

    every = list(range(40))
    spoiled = boxes(every, jitter=0.05, drop=0.2)
    assert 20 <= spoiled["frame_number"].nunique() < 40
    pd.testing.assert_frame_equal(spoiled, boxes(every, jitter=0.05, drop=0.2))
    assert not spoiled[list(EDGES)].equals(boxes(every, jitter=0.05, drop=0.2, seed=1)[list(EDGES)])
    some = boxes([10, 11, 12], jitter=0.05, drop=0.2)
    expected = spoiled[spoiled["frame_number"].between(10, 12)].reset_index(drop=True)
    pd.testing.assert_frame_equal(some.reset_index(drop=True), expected)
    jittered, true = boxes(every, jitter=0.05), boxes(every)
    # 5 % of a box of 0.2: 0.01 for its middle, and half of that for the width's part.
    assert np.std(jittered["left"] - true["left"]) == pytest.approx(0.2 * 0.05 * 1.12, rel=0.35)
    assert boxes(every, drop=1.0).empty


def test_two_hands_of_one_side_get_different_sides() -> None:
    box = np.array([[0.1, 0.5, 0.3, 0.8], [0.6, 0.5, 0.8, 0.8], [0.61, 0.5, 0.8, 0.8]])
    chosen, sides = assign_sides(box, np.array([0.6, 0.9, 0.8]), np.array([RIGHT, RIGHT, LEFT]))
    assert dict(zip(chosen.tolist(), sides.tolist(), strict=True)) == {1: RIGHT, 0: LEFT}
    above = box[:2] * (0, 1, 0, 1) + [[0.4, 0, 0.6, 0], [0.41, -0.4, 0.61, -0.4]]
    assert assign_sides(above, np.array([0.6, 0.9]), np.array([LEFT, LEFT]))[1].tolist() == [LEFT, RIGHT]
    chosen, sides = assign_sides(np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64))
    assert len(chosen) == len(sides) == 0


def test_unknown_detectors_and_options(truth: Path) -> None:
    assert isinstance(make_detector("oracle", {"path": str(truth), "drop": 0.5}), Oracle)
    for name, options, pattern in (
        ("yolo", {}, "must be one of mediapipe, detections"),
        ("oracle", {"path": str(truth), "jiter": 1}, "does not know jiter; its options are path, fps, jitter"),
        ("torchvision", {"weights": "w.pth"}, "needs labels"),
        ("detections", {"path": str(truth) + ".absent"}, "no such file or folder"),
        ("oracle", {"path": str(truth), "drop": 2}, "from 0 to 1"),
        ("detections", {"path": str(ROOT / "exps")}, "neither parquet files nor"),
        ("detections", {"path": 5}, "options.path is 5, but must be str"),
        ("detections", {"path": str(truth), "fps": "abc"}, "options.fps is 'abc', but must be float | null"),
        ("detections", {"path": str(truth), "fps": 0}, "fps must be above 0"),
        ("oracle", {"path": str(truth), "jitter": None}, "options.jitter is None, but must be float"),
        ("oracle", {"path": str(truth), "seed": -1}, "seed must be at least 0"),
        ("oracle", {"path": str(truth), "seed": True}, "options.seed is True, but must be int"),
        ("torchvision", {"weights": "w.pth", "labels": ["hand"]}, r"options.labels is \['hand'\], but must be Mapping"),
        ("torchvision", {"weights": "w.pth", "labels": {1: "hand"}, "batch_size": 0}, "batch_size must be at least 1"),
        ("mediapipe", {"margin": -1}, "margin must be at least 0"),
    ):
        with pytest.raises(UserError, match=pattern.replace("|", r"\|")):
            make_detector(name, options)


def test_options_of_a_configuration_get_the_types_that_the_detector_declares(tmp_path: Path) -> None:
    path = tmp_path / "hod.yml"
    path.write_text("detector: {kind: oracle, options: {path: 0123, fps: 30, jitter: 5e-2, seed: 07}}")
    options = hod.load(path, ["detector.options.drop=.2"]).detector.options
    typed = typed_options("oracle", options)
    assert typed == {"path": "0123", "fps": 30, "jitter": 0.05, "drop": 0.2, "seed": 7}
    assert typed_options("mediapipe", {"folder": None, "margin": "1"}) == {"folder": None, "margin": 1}
    with pytest.raises(UserError, match=r"options\.seed is '1.5', but must be int"):
        typed_options("oracle", {"path": "x", "seed": "1.5"})


class Region(Detector):
    """Somebody's detector, with options of every shape."""

    def __init__(
        self,
        box: list[float],
        sizes: Mapping[str, int] | None = None,
        corner: tuple[float, float] = (0.0, 0.0),
        names: list[str] | None = None,
        is_mirrored: bool = False,
        order: Literal["x", "y"] = "x",
    ) -> None:
        self.given = {"box": box, "sizes": sizes, "corner": corner, "names": names}

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        return SCHEMA.empty_table()


@pytest.fixture
def region(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of that detector."""
    # A path within the package of detectors, as every line of the registry.
    monkeypatch.setattr("egohod.hod.detectors.files.Region", Region, raising=False)
    monkeypatch.setitem(DETECTORS, "region", "files.Region")
    return "region"


def test_elements_of_lists_and_mappings_get_their_types_too(region: str, tmp_path: Path) -> None:
    path = tmp_path / "hod.yml"
    path.write_text(
        "detector:\n  options: {box: [0.5, .5, 8e-1, 1], sizes: {cup: 12}, corner: [1, 2.5], names: [01, x],"
        " is_mirrored: true, order: y}"
    )
    typed = typed_options(region, hod.load(path).detector.options)
    assert typed == {
        "box": [0.5, 0.5, 0.8, 1],
        "sizes": {"cup": 12},
        "corner": (1, 2.5),
        "names": ["01", "x"],
        "is_mirrored": True,
        "order": "y",
    }
    assert typed_options(region, typed) == typed
    for options, pattern in (
        ({"box": ["a", "b"]}, r"options.box is \['a', 'b'\], but must be list\[float\]"),
        ({"box": "0.5"}, r"options.box is '0.5', but must be list\[float\]"),
        ({"box": [], "sizes": {"cup": "1.5"}}, r"options.sizes is \{'cup': '1.5'\}, but must be Mapping\[str, int\]"),
        ({"box": [], "corner": [1]}, r"options.corner is \[1\], but must be tuple\[float, float\]"),
        ({"box": [], "is_mirrored": "ja"}, "options.is_mirrored is 'ja', but must be bool"),
        ({"box": [], "order": "z"}, "options.order is 'z', but must be Literal"),
    ):
        with pytest.raises(UserError, match=pattern):
            typed_options(region, options)


def test_options_of_other_detectors_are_ignored_with_a_warning(truth: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As after detector.kind=mediapipe over a configuration for files."""
    assert typed_options("mediapipe", {"path": str(truth), "margin": "0.2"}) == {"margin": 0.2}
    assert "detector.options.path is ignored: detector.kind=mediapipe does not read it" in caplog.text
    with pytest.raises(UserError, match="does not know marign; its options are folder"):
        typed_options("mediapipe", {"path": str(truth), "marign": 1})


def test_a_clip_of_one_frame_at_second_0_shows_no_frame_rate(truth: Path, tmp_path: Path) -> None:
    folder = tmp_path / "P01"
    detections.write_epic(detections.read(truth), folder)
    first = np.array([0]), np.array([0.0])
    with pytest.raises(VideoError, match=r"v: .*set detector\.options\.fps"):
        DetectionFiles(str(folder)).detect("v", *first)
    assert len(DetectionFiles(str(folder), fps=FPS).detect("v", *first)) == 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Faster R-CNN of three classes with random weights, as training scripts save it."""
    torch.manual_seed(0)
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=4)
    with torch.no_grad():  # all classes are then equally likely, so that each one is detected
        model.roi_heads.box_predictor.cls_score.weight.zero_()
        model.roi_heads.box_predictor.cls_score.bias.zero_()
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}, "epoch": 3}, path)
    return path


SMALL = {"architecture": "fasterrcnn_mobilenet_v3_large_320_fpn", "min_score": 0.0}


def test_a_faster_rcnn_gives_rows_of_the_schema(checkpoint: Path) -> None:
    labels = {1: "hand", "2": "cup", 3: "object"}
    detector = TorchvisionBoxes(str(checkpoint), labels, **SMALL)
    pictures = np.random.default_rng(0).integers(0, 255, (3, 60, 80, 3), dtype=np.uint8)
    actual = detector.detect("v", *frames([0, 1, 2]), pictures)
    detections.check(actual, "found")
    rows = actual.to_pandas()
    assert len(rows) > 3
    assert rows[rows["kind"] == "hand"].groupby(["frame_number", "side"]).size().max() <= 1
    assert rows[rows["kind"] == "hand"]["frame_number"].nunique() == 3
    assert set(rows[rows["kind"] == "object"]["name"].dropna()) == {"cup"}
    assert rows[rows["kind"] == "object"]["name"].isna().any()
    # A quarter each: nothing is sure.
    assert (
        len(
            TorchvisionBoxes(str(checkpoint), labels, **SMALL | {"min_score": 0.9}).detect(
                "v", *frames([0]), pictures[:1]
            )
        )
        == 0
    )


def test_checkpoints_and_label_maps_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    def refuses(path: Path, labels: dict[object, str], pattern: str, **more: object) -> None:
        with pytest.raises(UserError, match=pattern):
            TorchvisionBoxes(str(path), labels, **SMALL | more)

    refuses(checkpoint, {1: "hand", 4: "cup"}, r"classes 1 to 3, not 4 \(cup\)")
    refuses(checkpoint, {0: "hand"}, "classes 1 to 3, not 0")
    refuses(checkpoint, {"one": "hand"}, "not one")
    refuses(checkpoint, {1: "person"}, "none is called left hand, right hand, hand; there are person")
    refuses(checkpoint, {1: "hand"}, "is no fasterrcnn_resnet50_fpn", architecture="fasterrcnn_resnet50_fpn")
    refuses(checkpoint, {1: "hand"}, "must be one of", architecture="maskrcnn")
    refuses(tmp_path / "absent.pth", {1: "hand"}, "no such file")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    refuses(tmp_path / "other.pth", {1: "hand"}, "no Faster R-CNN")
    torch.save({"model": Path("x")}, tmp_path / "objects.pth")
    refuses(tmp_path / "objects.pth", {1: "hand"}, "nothing was run")
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:5000])
    refuses(tmp_path / "cut.pth", {1: "hand"}, "cut.pth")


def test_a_missing_or_broken_mediapipe_is_an_error_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip install --no-deps --target"):
        MediapipeHands(str(tmp_path))
    (tmp_path / "mediapipe").mkdir()
    (tmp_path / "mediapipe" / "__init__.py").write_text("raise ImportError('no libGL')")
    with pytest.raises(UserError, match="ImportError: no libGL; cure: "):
        MediapipeHands(str(tmp_path))


@pytest.fixture(scope="module")
def mediapipe_hands() -> Iterator[MediapipeHands]:
    folder = Path(os.environ.get("EGOHOD_MEDIAPIPE") or ROOT / FOLDER)
    if not (folder / "mediapipe").is_dir():
        pytest.skip("needs MediaPipe, see egohod/hod/detectors/mediapipe_requirements.txt")
    hands = MediapipeHands(str(folder))
    yield hands
    hands.close()


@pytest.mark.ci
def test_mediapipe_sees_the_right_hand_stir_and_the_left_hold(mediapipe_hands: MediapipeHands, shared: Path) -> None:
    """The real Ego4D clip: the left hand holds the pan below, the right one stirs on the right side of the picture."""
    path = shared / "media" / "lavila" / "3c0dffd0-e38e-4643-bc48-d513943dc20b_012_014.mp4"
    pictures, seconds, _ = read_clip(choose_decoder()[1], path, path.name, 0, 2, 16)
    actual = mediapipe_hands.detect("v", np.round(seconds * 30 - 0.5), seconds, pictures)
    detections.check(actual, "found")
    camera = camera_transforms(pictures, seconds, actual, "homography")
    before, after = background_motion(pictures, seconds, actual, camera)
    assert before > 0.004
    assert after < 0.2 * before
    facts = facts_of(actual, seconds, video_id="v", start=0, end=2, camera=camera)
    left, right = facts.hands["left"], facts.hands["right"]
    assert left.seen >= 0.9
    assert right.seen >= 0.5
    assert left.motion.directions == ("still",)
    assert (facts.acting, facts.hands_together) == ("right", "apart")
    assert right.motion.speed > 0.2
    spread = np.nanmax(right.motion.path, axis=0) - np.nanmin(right.motion.path, axis=0)
    assert (spread > 0.15).all(), "stirring goes both across and along"
    assert np.nanmean(right.motion.path[:, 0]) > np.nanmean(left.motion.path[:, 0]) + 0.2


@pytest.mark.ci
def test_mediapipe_finds_hands_in_epic_frames_and_none_in_the_dark(
    mediapipe_hands: MediapipeHands, shared: Path
) -> None:
    files = sorted((shared / "media" / "hoi-forecast" / "P01_01").glob("*.jpg"))
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    numbers = np.array([int(file.stem.removeprefix("frame_")) for file in files])
    actual = mediapipe_hands.detect("P01_01", numbers, numbers / 60, pictures)
    assert len(set(actual.column("frame_number").to_pylist())) >= 8
    dark = np.zeros((2, 240, 320, 3), dtype=np.uint8)
    assert len(mediapipe_hands.detect("dark", *frames([0, 1]), dark)) == 0


@pytest.mark.ci
def test_a_mediapipe_that_dies_costs_one_clip_and_comes_back(
    mediapipe_hands: MediapipeHands, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = MediapipeHands(str(Path(os.environ.get("EGOHOD_MEDIAPIPE") or ROOT / FOLDER)))
    dark = np.zeros((1, 240, 320, 3), dtype=np.uint8)
    other._process.kill()
    with pytest.raises(VideoError, match="MediaPipe died"):
        other.detect("v", *frames([0]), dark)
    assert len(other.detect("v", *frames([0]), dark)) == 0
    monkeypatch.setattr(other, "_command", [sys.executable, "-c", "raise SystemExit('no MediaPipe')"])
    other._process.kill()
    with pytest.raises(UserError, match="MediaPipe does not run: no MediaPipe"):
        other.detect("v", *frames([0]), dark)
    other.close()


def test_half_an_answer_of_a_mediapipe_that_dies_costs_one_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys\n"
        "print('\"ready\"', flush=True)\n"
        "sys.stdin.buffer.readline()\n"
        "sys.stdout.write('[[[\"Le')\n"
        "sys.exit('out of memory')\n"
    )
    monkeypatch.setattr("egohod.hod.detectors.mediapipe_worker.__file__", str(worker))
    (tmp_path / "mediapipe").mkdir()
    hands = MediapipeHands(str(tmp_path))
    with pytest.raises(VideoError, match="MediaPipe died: out of memory"):
        hands.detect("v", *frames([0]), np.zeros((1, 2, 2, 3), dtype=np.uint8))
    hands.close()


def test_mediapipe_is_looked_for_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EGOHOD_MEDIAPIPE", raising=False)
    monkeypatch.setattr("egohod.hod.detectors.mediapipe_hands.PROJECT", tmp_path / "checkout")
    message = r"is not in .*/checkout/\.mediapipe; cure: .* -r .*/hod/detectors/mediapipe_requirements\.txt"
    with pytest.raises(UserError, match=message):
        MediapipeHands()
    # An installed package is left as it is.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("egohod.hod.detectors.mediapipe_hands.IS_CHECKOUT", False)
    with pytest.raises(UserError, match=rf"is not in {tmp_path}/\.mediapipe; cure: .* --target \.mediapipe -r /"):
        MediapipeHands()


def test_a_broken_protobuf_is_named_where_it_is_needed(tmp_path: Path, program: Command) -> None:
    protobuf = tmp_path / "broken" / "google" / "protobuf"
    protobuf.mkdir(parents=True)
    # As protobuf speaks where the generated code is of another version.
    error = "Descriptors cannot be created directly. If this call came from a _pb2.py file ..."
    (protobuf / "__init__.py").write_text(f"raise TypeError({error!r})")
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes" / "P01_01.pkl").touch()
    code = (
        "import sys; sys.path.insert(0, 'tools'); import generate_hod\n"
        "from egohod.hod.detectors.files import DetectionFiles\n"
        "from egohod.errors import UserError\n"
        "try:\n    DetectionFiles(sys.argv[1])\nexcept UserError as error:\n    print(error)"
    )
    done = program("-c", code, tmp_path / "boxes", PYTHONPATH=f"{tmp_path}/broken:{ROOT}")
    assert done.returncode == 0, done.stderr
    assert "boxes: EPIC-KITCHENS' files need protobuf, which cannot be used (Descriptors cannot" in done.stdout
