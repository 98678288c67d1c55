"""detect_hands.py as a user meets it: pictures and videos of a folder, good and bad, drawn, resumed, changed."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import ClassVar

import detect_hands
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from egohod.__main__ import main
from egohod.data import detections
from egohod.data.decoders import choose_decoder
from egohod.data.detections import LEFT, PORTABLE_OBJECT, ROLE_COLOURS, SCHEMA
from egohod.hod.config import DETECTORS
from egohod.hod.detectors import Detector, row
from egohod.hod.detectors.mediapipe_hands import FOLDER
from egohod.hod.draw import draw_boxes
from egohod.runtime import locked
from tests.data import video_files
from tests.support import ROOT, Command


class Spots(Detector):
    """A left hand that holds an object, in every picture; its height is the picture's mean brightness."""

    is_batched = True
    calls: ClassVar[list[tuple[int, ...]]] = []  # shapes of what it was given
    stop_at: ClassVar[int | None] = None  # a call at which the user presses Ctrl-C

    def __init__(self, width: float = 0.25) -> None:
        self._width = width

    def detect(
        self, video_id: str, frame_numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None
    ) -> pa.Table:
        assert pictures is not None
        if len(self.calls) == Spots.stop_at:
            raise KeyboardInterrupt
        self.calls.append(pictures.shape)
        rows = []
        for number, second, picture in zip(frame_numbers, seconds, pictures, strict=True):
            edges = np.array([0.125, 0.125, 0.125 + self._width, 0.125 + picture.mean() / 512])
            touching = {"state": PORTABLE_OBJECT, "offset_x": 0.5, "offset_y": 0.25}
            rows.append(row(video_id, number, second, edges, 0.9, side=LEFT) | touching)
            rows.append(row(video_id, number, second, np.array([0.625, 0.5, 0.875, 0.75]), 0.8))
        return pa.Table.from_pylist(rows, SCHEMA)


@pytest.fixture(autouse=True)
def spots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egohod.hod.detectors.files.Spots", Spots, raising=False)
    monkeypatch.setitem(DETECTORS, "spots", "files.Spots")
    monkeypatch.setattr(Spots, "calls", [])
    monkeypatch.setattr(Spots, "stop_at", None)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Three pictures of two sizes, one of them in a folder below, and a video of 40 frames."""
    folder = tmp_path / "media"
    (folder / "more").mkdir(parents=True)
    for number, (name, size) in enumerate((("a.jpg", (64, 48)), ("b.png", (64, 48)), ("more/c.JPG", (80, 40)))):
        Image.new("RGB", size, (60 + 60 * number,) * 3).save(folder / name)
    video_files.encode(folder / "more" / "film.mp4", 40)
    return folder


@pytest.fixture
def detect(inside: Command, media: Path, tmp_path: Path) -> Command:
    """Run the program with the detector above on that folder."""

    def run(*arguments: object) -> object:
        return inside("detect_hands.py", media, "--detector", "spots", "--output", tmp_path / "out", *arguments)

    return run


def boxes(folder: Path) -> pd.DataFrame:
    return detections.read(folder / "boxes.parquet").to_pandas()


def drawn(folder: Path) -> list[str]:
    files = (folder / "drawn").rglob("*")
    return sorted(path.relative_to(folder / "drawn").as_posix() for path in files if path.is_file())


def test_pictures_and_videos_become_a_table_and_drawings(detect: Command, tmp_path: Path) -> None:
    done = detect("--draw", "--fps", "10", "--epic", tmp_path / "epic")
    assert done.returncode == 0, done.stderr
    table = boxes(tmp_path / "out")
    assert table["video_id"].unique().tolist() == ["a.jpg", "b.png", "more/c.JPG", "more/film"]
    film = table[(table["video_id"] == "more/film") & (table["kind"] == "hand")]
    step = video_files.FPS / 10
    assert film["frame_number"].tolist() == [int(each * step) for each in range(len(film))]
    np.testing.assert_allclose(film["second"], (film["frame_number"] + 0.5) / video_files.FPS, atol=1e-4)
    assert film["bottom"].nunique() > 3, "each frame is another one"
    assert drawn(tmp_path / "out") == ["a.jpg", "b.png.jpg", "more/c.JPG", "more/film.mp4"]
    with Image.open(tmp_path / "out" / "drawn" / "more" / "c.JPG") as image:
        assert image.size == (80, 40)
    decoder = choose_decoder()[1](tmp_path / "out" / "drawn" / "more" / "film.mp4")
    assert (round(decoder.fps, 2), round(decoder.duration * 10)) == (10, len(film))
    decoder.close()
    epic = detections.read_epic(tmp_path / "epic" / "more" / "film.pkl", video_files.FPS).to_pandas()
    np.testing.assert_allclose(epic.query("kind == 'hand'")["bottom"], film["bottom"], atol=1e-6)
    # Progress, and how fast it was.
    assert f"{3 + len(film)} pictures in " in done.stderr
    assert "detector spots: " in done.stderr
    assert "ETA" in done.stderr


def test_boxes_are_drawn_with_contact_and_a_line_to_what_is_held() -> None:
    table = Spots().detect("v", np.zeros(1), np.zeros(1), np.zeros((1, 10, 10, 3), np.uint8)).to_pandas()
    pixels = np.asarray(draw_boxes(np.zeros((400, 800, 3), np.uint8), table.assign(bottom=[0.5, 0.75])))
    hand, _, thing = ROLE_COLOURS
    for colour, edge in ((hand, pixels[120:180, 98:104]), (thing, pixels[240:290, 498:504])):
        assert (edge == colour).all(axis=2).any(axis=1).all(), "the left edge of each box"
    # From the hand's middle (0.25, 0.31) to the object's (0.75, 0.63), in the hand's colour.
    assert (pixels[186:190, 396:404] == hand).all(axis=2).any()
    assert (pixels[248:252, 598:602] == hand).all()
    bare = np.asarray(draw_boxes(np.zeros((400, 800, 3), np.uint8), table.assign(bottom=[0.5, 0.75], state=0)))
    assert not (bare[186:190, 396:404] == hand).all(axis=2).any()
    # Its label is above the box, in words on the hand's colour.
    assert (pixels[30:50, 102:200] == hand).all(axis=2).mean() > 0.4
    assert np.asarray(draw_boxes(np.zeros((9, 9, 3), np.uint8), table.iloc[:0])).max() == 0


def test_a_second_run_computes_only_what_changed(detect: Command, media: Path, tmp_path: Path) -> None:
    assert detect("--draw").returncode == 0
    first, before = boxes(tmp_path / "out"), drawn(tmp_path / "out")
    Spots.calls.clear()
    done = detect("--draw")
    assert "4 of 4 files are done already" in done.stderr
    assert not Spots.calls
    pd.testing.assert_frame_equal(boxes(tmp_path / "out"), first)
    # Another content under the same name, and the same under another.
    Image.new("RGB", (64, 48), (255, 255, 255)).save(media / "a.jpg")
    (media / "b.png").rename(media / "d.png")
    done = detect("--draw")
    assert Spots.calls == [(1, 48, 64, 3)]
    assert drawn(tmp_path / "out") == ["a.jpg", "d.png.jpg", *before[2:]]
    assert boxes(tmp_path / "out").query("video_id == 'a.jpg'")["bottom"].iloc[0] == pytest.approx(
        0.125 + 255 / 512, abs=1e-5
    )
    # Other options: drawings of the former ones are removed even where none are made.
    own = tmp_path / "out" / "drawn" / "mine.jpg"
    own.write_bytes(b"mine")
    Spots.calls.clear()
    assert detect("--option", "width=0.5").returncode == 0
    assert sum(shape[0] for shape in Spots.calls) > 3
    assert drawn(tmp_path / "out") == ["mine.jpg"]
    assert set(boxes(tmp_path / "out").query("kind == 'hand'")["right"]) == {0.625}
    # Drawings alone, and with the first options again, whose results are still there.
    Spots.calls.clear()
    assert detect("--draw").returncode == 0
    assert not Spots.calls
    assert drawn(tmp_path / "out") == ["a.jpg", "d.png.jpg", "mine.jpg", *before[2:]]


def test_an_interrupted_video_resumes_within(detect: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect_hands, "FRAMES", 8)
    monkeypatch.setattr(Spots, "stop_at", 4)  # two sizes of pictures, and two parts of the video
    assert detect("--draw", "--fps", "0").returncode == 130
    assert drawn(tmp_path / "out") == ["a.jpg", "b.png.jpg", "more/c.JPG"]
    # What one leaves that is killed.
    for folder in (tmp_path / "out", tmp_path / "out" / "drawn" / "more"):
        (folder / ".tmp-1-film.mp4").write_bytes(b"half")
    monkeypatch.setattr(Spots, "stop_at", None)
    Spots.calls.clear()
    assert detect("--draw", "--fps", "0").returncode == 0
    assert len(Spots.calls) == 3
    assert len(boxes(tmp_path / "out").query("video_id == 'more/film' and kind == 'hand'")) == 40
    assert not list((tmp_path / "out").rglob(".tmp-*"))


def test_pictures_of_one_size_are_detected_together_and_read_once(
    detect: Command, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (media / "more" / "film.mp4").unlink()
    opened, real = [], Image.open

    def counted(path: Path) -> Image.Image:
        opened.append(path)
        return real(path)

    monkeypatch.setattr("PIL.Image.open", counted)
    assert detect("--draw").returncode == 0
    assert Spots.calls == [(2, 48, 64, 3), (1, 40, 80, 3)]
    assert len(opened) == 3
    # No more pixels than that at once.
    Spots.calls.clear()
    monkeypatch.setattr(detect_hands, "PIXELS", 64 * 48 + 1)
    assert detect("--option", "width=0.5").returncode == 0
    assert [shape[0] for shape in Spots.calls] == [1, 1, 1]
    # A detector that follows hands from frame to frame gets unrelated pictures one by one.
    Spots.calls.clear()
    monkeypatch.setattr(detect_hands, "PIXELS", 10**9)
    monkeypatch.setattr(Spots, "is_batched", False)
    assert detect("--option", "width=0.375").returncode == 0
    assert [shape[0] for shape in Spots.calls] == [1, 1, 1]


def test_damaged_files_are_counted_and_listed(detect: Command, media: Path, tmp_path: Path) -> None:
    (media / "cut.jpg").write_bytes((media / "a.jpg").read_bytes()[:200])
    (media / "cut.mp4").write_bytes((media / "more" / "film.mp4").read_bytes()[:300])
    (media / "empty.png").touch()
    (media / "._hidden.jpg").write_bytes(b"of the system")
    done = detect()
    assert done.returncode == 0, done.stderr
    assert "3 of 7 files cannot be read: " in done.stderr
    lines = (tmp_path / "out" / "failures.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["file", "cut.mp4", "cut.jpg", "empty.png"]
    assert boxes(tmp_path / "out")["video_id"].nunique() == 4
    for name in ("cut.jpg", "cut.mp4", "empty.png"):
        (media / name).unlink()
    assert detect().returncode == 0
    assert not (tmp_path / "out" / "failures.csv").exists()


def test_a_phone_s_picture_is_turned_upright(detect: Command, media: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (64, 48), (9, 9, 9)).save(media / "a.jpg", exif=exif)
    assert detect("--draw").returncode == 0
    with Image.open(tmp_path / "out" / "drawn" / "a.jpg") as image:
        assert image.size == (48, 64)


def test_a_dry_run_writes_nothing(detect: Command, tmp_path: Path) -> None:
    done = detect("--dry_run", "--fps", "0")
    assert done.returncode == 0
    assert "3 pictures and 1 videos: 43 pictures are to do, 0 are done" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not Spots.calls
    detect("--fps", "0")
    assert "0 pictures are to do, 43 are done" in detect("--dry_run", "--fps", "0").stderr


def test_mistakes_end_in_one_line(inside: Command, detect: Command, media: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"no picture")
    for arguments, message in (
        ([tmp_path / "absent"], "no such folder"),
        ([tmp_path / "empty"], "no picture or video is in it or below (.jpg, "),
        ([tmp_path / "bad"], "not one of its 1 files can be read, such as x.jpg: cannot identify image file"),
        ([media, "--fps", "-1"], "--fps must be 0 or above, not -1"),
        ([media, "--option", "width"], "--option is 'width', but must be NAME=VALUE"),
        ([media, "--option", "widht=1"], "does not know widht; its options are width"),
        ([media, "--option", "width=wide"], "options.width is 'wide', but must be float"),
        ([media, "--output", media], "the folder of the pictures itself"),
    ):
        done = inside("detect_hands.py", "--detector", "spots", "--output", tmp_path / "o", *arguments)
        assert done.returncode == 2, message
        assert message in done.stderr.splitlines()[-1]
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".lock"):
        done = detect()
    assert done.returncode == 2
    assert "another run is writing here" in done.stderr


def test_the_output_within_the_folder_is_no_input(media: Path, inside: Command, tmp_path: Path) -> None:
    """As after `cd media; egohod hod detect . --draw`, twice, and with another output; nor are links to folders."""
    (media / "more" / "again").symlink_to(media)
    for out in (media / "media.detections", media / "media.detections", media / "other"):
        assert inside("detect_hands.py", media, "--detector", "spots", "--draw", "--output", out).returncode == 0
        assert boxes(out)["video_id"].nunique() == 4


def test_every_file_has_a_drawing_of_its_own(detect: Command, media: Path, tmp_path: Path) -> None:
    shutil.copy(media / "a.jpg", media / "b.png.jpg")
    assert detect("--draw").returncode == 0
    assert drawn(tmp_path / "out") == ["a.jpg", "b.png.jpg", "b.png.jpg.jpg", "more/c.JPG", "more/film.mp4"]
    assert "5 of 5 files are done already" in detect("--draw").stderr


def test_frames_without_boxes_are_messages_of_epic_kitchens(
    detect: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the published files, where the place in the list is the frame."""

    def nothing(self: Spots, video_id: str, numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray) -> pa.Table:
        return SCHEMA.empty_table()

    monkeypatch.setattr(Spots, "detect", nothing)
    assert detect("--fps", "0", "--epic", tmp_path / "epic").returncode == 0
    with (tmp_path / "epic" / "more" / "film.pkl").open("rb") as file:
        messages = [detections.epic_message_class().FromString(each) for each in pickle.load(file)]
    assert [each.frame_number for each in messages] == list(range(1, 41))
    assert {each.video_id for each in messages} == {"more/film"}
    assert (tmp_path / "epic" / "a.jpg.pkl").is_file()


def test_a_file_with_other_weights_under_its_name_counts_as_another(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"1")
    options = {"weights": str(tmp_path / "weights.pth"), "batch_size": 2}
    first = detect_hands._detector_key("doh100", options)
    assert detect_hands._detector_key("doh100", dict(reversed(options.items()))) == first
    shutil.copy(tmp_path / "weights.pth", tmp_path / "same.pth")
    assert detect_hands._detector_key("doh100", options | {"weights": str(tmp_path / "same.pth")}) == first
    (tmp_path / "weights.pth").write_bytes(b"2")
    assert detect_hands._detector_key("doh100", options) != first


def test_it_is_a_command_of_two_words(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["hod", "detect", str(media), "--detector", "spots"]) == 0
    assert (tmp_path / "media.detections" / "boxes.parquet").is_file()


@pytest.mark.ci
def test_real_pictures_and_clips(shared: Path, tmp_path: Path, program: Command) -> None:
    """MediaPipe, where it is installed, on all of them; doh100 with random weights on photos and a short film."""
    media = shared / "media"
    if (Path(os.environ.get("EGOHOD_MEDIAPIPE") or ROOT / FOLDER) / "mediapipe").is_dir():
        done = program("tools/detect_hands.py", media, "--draw", "--fps", "2", "--output", tmp_path / "mediapipe")
        assert done.returncode == 0, done.stderr
        table = boxes(tmp_path / "mediapipe")
        assert len(drawn(tmp_path / "mediapipe")) >= 22
        # The hands of a chef and of a baker, and of most of the photos.
        assert table["video_id"].nunique() >= 15
    few = tmp_path / "few"
    (few / "clips").mkdir(parents=True)
    for path in sorted((media / "hamer").iterdir())[:2]:
        shutil.copy(path, few)
    shutil.copy(media / "lavila" / "3c0dffd0-e38e-4643-bc48-d513943dc20b_012_014.mp4", few / "clips")
    options = ["--detector", "doh100", "--option", "weights=random", "--option", "proposals=50", "--fps", "1"]
    done = program("tools/detect_hands.py", few, *options, "--draw", "--output", tmp_path / "doh100")
    assert done.returncode == 0, done.stderr
    assert "random weights, boxes mean nothing" in done.stderr
    assert len(drawn(tmp_path / "doh100")) == 3
    assert set(boxes(tmp_path / "doh100")["kind"]) == {"hand", "object"}
