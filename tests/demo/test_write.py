"""Worlds on disk: what is written, reading it back, interruptions and bad requests."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from egohod.data.detections import EDGES, BoxTable
from egohod.demo import make_world, plan
from egohod.demo.render import PICTURE, Stage, frame_time, preview
from egohod.demo.world import DEFAULT, FPS, VERBS, Variant, make_split
from egohod.demo.write import CHUNK_SECONDS, questions, seconds
from egohod.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "make_demo_data.py")]
SEED, SCALE = 4, 0.02  # 40 + 6 + 10 clips


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "world"
    assert make_world(out, SEED, SCALE, workers=1, splits=("val", "test")) == ["val", "test"]
    return out


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _decode(folder: Path) -> np.ndarray:
    """All frames of a video, chunk after chunk."""
    frames = []
    for chunk in sorted(folder.iterdir()):
        with av.open(str(chunk)) as container:
            frames += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def test_videos_are_h264_chunks_of_the_rendered_frames(world: Path) -> None:
    (video,) = make_split(SEED, "test", SCALE)
    folder = world / "test" / "videos" / video.video_id
    assert sorted(p.name for p in folder.iterdir()) == ["0000.mp4", "0001.mp4"]
    with av.open(str(folder / "0000.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == FPS
        assert stream.frames == CHUNK_SECONDS * FPS
    decoded = _decode(folder)
    assert decoded.shape == (video.frames, PICTURE[1], PICTURE[0], 3)
    drawn = np.stack(list(Stage(video).frames()))
    errors = np.abs(decoded.astype(int) - drawn).mean((1, 2, 3))
    assert errors.max() < 8  # every frame is there, in its place: a neighbouring clip would be off by far more


def test_tables_agree_with_each_other(world: Path) -> None:
    hod, coarse = _rows(world / "test" / "hod.csv"), _rows(world / "test" / "narrations.csv")
    assert len(hod) == 10
    assert [{**row, "text": ""} for row in hod] == [{**row, "text": ""} for row in coarse]
    clips = [clip for video in make_split(SEED, "test", SCALE) for clip in video.clips]
    assert [row["text"] for row in hod] == [clip.hod for clip in clips]
    assert [row["text"] for row in coarse] == [clip.narration for clip in clips]
    classes = {row["action"]: row for row in _rows(world / "test" / "classes.csv")}
    assert len(classes) == len(DEFAULT.actions)
    boxes = BoxTable.read(world / "test" / "detections.parquet")
    assert len(boxes) == sum(clip.frames for clip in clips)
    # Each frame finds its own boxes, not those of a neighbour.
    video = make_split(SEED, "test", SCALE)[0]
    actual = boxes.at(video.video_id, (np.arange(video.frames) + 0.5) / FPS)[:, 2]
    stage = Stage(video)
    own = [stage.moment(c, frame_time(i)).box(c.noun) for c in video.clips for i in range(c.frames)]
    np.testing.assert_allclose(actual, own, atol=1e-6)
    for row in hod:
        assert classes[row["action"]]["verb"] == row["verb"]
        assert row["motion"] == VERBS[row["verb"]].path
        begin, end = float(row["start_second"]), float(row["end_second"])
        assert 2.4 < end - begin < 2.7
        seen = np.isfinite(boxes.at(row["video_id"], np.arange(begin, end, 1 / FPS))).all(axis=2)
        assert seen[:, ("left", "right").index(row["hand"])].any()
        assert seen[:, 2].all()


def test_seconds_lead_back_to_their_frame() -> None:
    for frame in range(20_000):
        assert int(seconds(frame) * FPS) == frame


def test_questions_have_one_right_answer() -> None:
    videos = make_split(SEED, "test", 0.2)
    clips = {clip.uid: (video.video_id, clip) for video in videos for clip in video.clips}
    drawn = list(questions(videos, np.random.default_rng(0)))
    kinds = [question["kind"] for question in drawn]
    assert kinds.count("across_clips") == kinds.count("object") == len(clips)
    for question in drawn:
        choices, answer = question["choices"], question["answer"]
        if question["kind"] == "across_clips":
            chosen = [clips[choice["clip"]] for choice in choices]
            assert len({(clip.verb, clip.noun) for _, clip in chosen}) == 5
            assert len({video for video, _ in chosen}) == 5
            assert chosen[answer][1].hod == question["query"]["text"]
        else:
            clip = clips[question["query"]["clip"]][1]
            verb = VERBS[clip.verb]
            right, wrong = choices[answer]["text"], choices[1 - answer]["text"]
            assert verb.phrase.format(o=f"the {clip.noun}") in right
            if question["kind"] == "object":
                assert any(verb.phrase.format(o=f"the {noun}") in wrong for noun in verb.nouns if noun != clip.noun)
            else:
                assert verb.kind == question["kind"]
                assert VERBS[verb.opposite].phrase.format(o=f"the {clip.noun}") in wrong
            assert right.endswith(f" with the {clip.hand} hand")
            assert wrong.endswith(f" with the {clip.hand} hand")
    for kind, count in (("across_clips", 5), ("object", 2), ("state_changing", 2), ("transient", 2)):
        answers = [question["answer"] for question in drawn if question["kind"] == kind]
        assert set(answers) == set(range(count))


def test_a_complete_world_is_left_alone(world: Path) -> None:
    before = _tree(world)
    assert make_world(world, SEED, SCALE, splits=("val", "test")) == []
    assert _tree(world) == before


def test_other_settings_and_other_folders_are_refused(world: Path, tmp_path: Path) -> None:
    before = _tree(world)
    with pytest.raises(UserError, match=r"seed 4 \(requested: 5\)"):
        make_world(world, 5, SCALE)
    with pytest.raises(UserError, match=r"scale 0.02 \(requested: 1.0\)"):
        make_world(world, SEED)
    assert _tree(world) == before
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds no demo world"):
        make_world(tmp_path)
    with pytest.raises(UserError, match="allowed are train, val, test"):
        make_world(tmp_path / "new", splits=("train", "dev"))
    with pytest.raises(UserError, match=r"roll None \(requested: 9\)"):
        plan(world, SEED, SCALE, variant=Variant(roll=9))
    assert not {"roll", "zoom"} & set(json.loads((world / "world.json").read_text()))
    with pytest.raises(UserError, match="version 5 of the world neither turns nor zooms"):
        plan(tmp_path / "new", variant=Variant(version=5, zoom=10))
    for wrong in ({"roll": 21}, {"zoom": -1}, {"roll": float("nan")}):
        with pytest.raises(UserError, match=r"may turn by 0 to 20\.0 degrees and zoom by 0 to 30\.0 per cent"):
            plan(tmp_path / "new", variant=Variant(**wrong))
    with pytest.raises(UserError, match="scale must be"):
        make_world(tmp_path / "new", scale=0)
    (tmp_path / "torn").mkdir()
    for torn in ('{"seed": ', "[" * 9999):
        (tmp_path / "torn" / "world.json").write_text(torn)
        with pytest.raises(UserError, match="not a demo world's description"):
            make_world(tmp_path / "torn")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letter.txt", "torn"]


def test_annotation_files_of_version_5_are_unchanged(tmp_path: Path) -> None:
    make_world(tmp_path / "w", SEED, SCALE, workers=1, splits=("val",), variant=Variant(version=5))
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in (tmp_path / "w" / "val").iterdir()
        if path.suffix in (".csv", ".jsonl")
    }
    assert digests == {
        "classes.csv": "3cc1737f9f5e3653",
        "hod.csv": "a352a2b60cee31f8",
        "narrations.csv": "e928dc05a3887da1",
        "questions.jsonl": "f3a20b8b466f1045",
    }
    # Not the bytes of the boxes: they depend on the version of Arrow as well.
    boxes = pq.read_table(tmp_path / "w" / "val" / "detections.parquet").to_pandas()
    digest = hashlib.sha256(boxes[list(EDGES)].to_numpy(np.float64).round(6).tobytes())
    assert digest.hexdigest()[:16] == "d4812612047ac29b"


def test_a_world_of_another_version_is_refused_or_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, fresh, old = tmp_path / "w", tmp_path / "fresh", Variant(version=5)
    make_world(out, SEED, 0.01, workers=1, splits=("val", "test"), variant=old)
    (out / "val" / "own.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"version 5 \(requested: 6\)"):
        make_world(out, SEED, 0.01, splits=("val",))
    with pytest.raises(UserError, match=r"seed 4 \(requested: 5\), version 5 \(requested: 6\)"):
        make_world(out, 5, 0.01, splits=("val",), replace=True)
    with pytest.raises(UserError, match="versions of the world are 5, 6; got 7"):
        make_world(out, SEED, 0.01, variant=Variant(version=7))
    before = _tree(out)
    assert list(plan(out, SEED, 0.01, ("val",), replace=True)) == ["val"]
    assert _tree(out) == before
    # Interrupted between two splits: no video of the old version may be taken for one of the new.
    monkeypatch.setattr(shutil, "rmtree", _raise_after(1, shutil.rmtree))
    with pytest.raises(UserError, match="stopped"):
        make_world(out, SEED, 0.01, workers=1, splits=("val",), replace=True)
    monkeypatch.undo()
    world = json.loads((out / "world.json").read_text())
    assert (world["version"], any(world["done"].values())) == (5, False)
    assert make_world(out, SEED, 0.01, workers=1, splits=("val",), replace=True) == ["val"]
    assert make_world(out, SEED, 0.01, workers=1, splits=("val",), replace=True) == []
    make_world(fresh, SEED, 0.01, workers=1, splits=("val",))
    assert (out / "val" / "own.txt").read_text() == "keep me"
    files = sorted(p.relative_to(fresh) for p in fresh.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.name != "own.txt")
    assert all((fresh / file).read_bytes() == (out / file).read_bytes() for file in files)


def _raise_after(times: int, function: Callable[..., None]) -> Callable[..., None]:
    """The function that fails from its call number ``times`` + 1 on."""
    calls = itertools.count()

    def call(*args: object, **kwargs: object) -> None:
        if next(calls) >= times:
            raise OSError("stopped")
        function(*args, **kwargs)

    return call


def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    out, straight = tmp_path / "killed", tmp_path / "straight"
    command = [*TOOL, "--output", str(out), "--scale", str(SCALE), "--splits", "train", "--workers", "1"]
    videos = out / "train" / "videos"
    run = subprocess.Popen(command)
    while not (videos / "demo_train_0000").exists():  # the first of two videos
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert [p.name for p in videos.iterdir() if not p.name.startswith(".")] == ["demo_train_0000"]
    assert not json.loads((out / "world.json").read_text())["done"]["train"]
    assert not (out / "train" / "hod.csv").exists()
    before = _tree(videos / "demo_train_0000")
    assert make_world(out, 0, SCALE, workers=1, splits=("train",)) == ["train"]
    assert _tree(videos / "demo_train_0000") == before
    make_world(straight, 0, SCALE, workers=2, splits=("train",))  # nor does it matter how many processes render
    files = sorted(p.relative_to(straight) for p in straight.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert all((straight / file).read_bytes() == (out / file).read_bytes() for file in files)


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_video(tmp_path: Path) -> None:
    """A limit on the size of files imitates a full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r}); import make_demo_data; from egohod import cli;"
        f"arguments = ['--output', {str(tmp_path / 'w')!r}, '--scale', '0.02', '--splits', 'test', '--workers', '1'];"
        "sys.exit(cli.run(make_demo_data.main, arguments))"
    )
    run = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: cannot write")
    assert run.stderr.count("\n") == 1
    assert not [p for p in (tmp_path / "w" / "test" / "videos").iterdir() if not p.name.startswith(".")]


def test_the_tool_explains_itself_and_its_errors(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*TOOL, *arguments], capture_output=True, text=True, check=False)

    dry = call("--output", str(tmp_path / "new"), "--dry_run")
    assert dry.returncode == 0
    assert "100 videos, 2000 clips" in dry.stdout
    assert not (tmp_path / "new").exists()
    world = ("--output", str(tmp_path / "w"), "--scale", "0.005", "--splits", "val", "--workers", "1")
    assert call(*world, "--world_version", "5").returncode == 0
    again = call(*world)
    assert again.returncode == 0
    assert "holds version 5 of the demo world; it is replaced by version 6" in again.stdout + again.stderr
    assert json.loads((tmp_path / "w" / "world.json").read_text())["version"] == 6
    (tmp_path / "file").write_text("")
    wrong = call("--output", str(tmp_path / "file" / "world"), "--scale", "0.01")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: cannot")


def test_preview_is_a_small_picture(tmp_path: Path) -> None:
    preview(tmp_path / "a" / "sheet.png", seed=1)
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert sheet.width == 6 * PICTURE[0]
    assert (tmp_path / "a" / "sheet.png").stat().st_size < 400_000
    preview(tmp_path / "moving.webp", seed=1)
    with Image.open(tmp_path / "moving.webp") as moving:
        assert (moving.width, moving.n_frames) == (4 * PICTURE[0], 16)
    assert (tmp_path / "moving.webp").stat().st_size < 400_000
    preview(tmp_path / "tidy.png", seed=1, variant=Variant(version=5))
    with Image.open(tmp_path / "tidy.png") as tidy, Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert np.abs(np.asarray(tidy.convert("RGB"), float) - np.asarray(sheet.convert("RGB"))).mean() > 5
    with pytest.raises(UserError, match="cannot write"):
        preview(tmp_path / "sheet.nothing")
