"""The demo world written in every annotation format: what is read is the truth, and training runs on it."""

from __future__ import annotations

import csv
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import main_pretrain
from egohod.config import load
from egohod.demo.render import Stage, frame_time
from egohod.demo.world import FPS, Clip, Variant, Video, make_split
from egohod.training.build import build_dataset
from tests.support import losses

Clips = list[tuple[Video, Clip]]


@pytest.fixture(scope="module")
def clips() -> Clips:
    """The truth of the fixture's training world."""
    return [(video, clip) for video in make_split(0, "train", 0.03, Variant(version=5)) for clip in video.clips]


def span(clip: Clip) -> tuple[float, float]:
    """Seconds, a little inside the clip so that rounding does not reach for the neighbour."""
    return clip.start / FPS + 0.001, (clip.start + clip.frames) / FPS


def write_hod(path: Path, clips: Clips) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "start_second", "end_second", "text"])
        writer.writerows([video.video_id, *span(clip), clip.hod] for video, clip in clips)


def write_egoclip(path: Path, clips: Clips) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["video_uid", "narration_time", "clip_start", "clip_end", "clip_text", "tag_verb", "tag_noun"])
        for video, clip in clips:
            start, end = span(clip)
            writer.writerow([video.video_id, (start + end) / 2, start, end, clip.hod, "[1]", "[2]"])


def write_pickle(path: Path, clips: Clips) -> None:
    path.write_bytes(pickle.dumps([(video.video_id, *span(clip), [clip.hod]) for video, clip in clips]))


def write_ego4d(path: Path, clips: Clips) -> None:
    content: dict[str, dict[str, dict[str, list[dict[str, object]]]]] = {}
    for video, clip in clips:
        passes = content.setdefault(video.video_id, {"narration_pass_1": {"narrations": []}})
        passes["narration_pass_1"]["narrations"].append(
            {"timestamp_sec": sum(span(clip)) / 2, "narration_text": clip.hod}
        )
    path.write_text(json.dumps(content))


FORMATS: dict[str, tuple[str, Callable[[Path, Clips], None]]] = {
    "hod": ("clips.csv", write_hod),
    "egoclip": ("egoclip.csv", write_egoclip),
    "pickle": ("clips.pkl", write_pickle),
    "ego4d": ("narration.json", write_ego4d),
}


@pytest.mark.parametrize("name", FORMATS)
def test_clips_are_the_truth_and_two_steps_train(
    name: str, demo_world: Path, tiny_config: Path, tmp_path: Path, clips: Clips
) -> None:
    file, write = FORMATS[name]
    write(tmp_path / file, clips)
    overrides = [f"data.train.demo.metadata={tmp_path / file}", "train.duration=2 steps", "data.hard_negatives.share=0"]
    dataset = build_dataset(load(tiny_config, overrides), 40)
    assert len(dataset) == len(clips)
    looked_at = (0, 7, len(clips) - 1)
    videos = {video.video_id: video for video, _ in (clips[index] for index in looked_at)}
    stages = {name: Stage(video) for name, video in videos.items()}
    for index in looked_at:
        video, clip = clips[index]
        row, (start, end) = dataset.row(index), span(clip)
        assert (row.video_id, row.texts) == (video.video_id, (clip.hod,))
        if row.start > 0:  # a moment at the very beginning is cut there
            assert (row.start + row.end) / 2 == pytest.approx((start + end) / 2, abs=1e-3)
        if name != "ego4d":  # whose clips have a length by rule
            assert (row.start, row.end) == pytest.approx((start, end))
        # One frame, from the middle: the picture that the renderer draws there.
        picture = dataset.sources[0].read(row, 1, None).pictures[0]
        number = round((row.start + row.end) / 2 * FPS - 0.5)
        drawn = [
            np.asarray(stages[video.video_id].draw(clip, frame_time(n - clip.start)))
            for n in (number - 1, number, number + 1)
        ]
        assert min(np.abs(picture.astype(int) - each.astype(int)).mean() for each in drawn) < 4
        elsewhere = np.asarray(Stage(clips[-1 - index][0]).draw(clips[-1 - index][1], 0.1))
        assert np.abs(picture.astype(int) - elsewhere.astype(int)).mean() > 8
    assert main_pretrain.main(["--config_file", str(tiny_config), *overrides]) == 0
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2]


def test_two_sources_with_weights_train_and_resume(
    demo_world: Path, tiny_config: Path, tmp_path: Path, clips: Clips, caplog: pytest.LogCaptureFixture
) -> None:
    write_pickle(tmp_path / "own.pkl", clips[:12])
    overrides = [
        "data.train.demo.weight=3",
        "data.train.own.weight=1",
        f"data.train.own.metadata={tmp_path / 'own.pkl'}",
        f"data.train.own.root={demo_world}/train/videos",
        "data.hard_negatives.share=0",
    ]
    command = ["--config_file", str(tiny_config), *overrides]
    assert main_pretrain.main([*command, "train.duration=4 steps", f"train.output={tmp_path}/straight"]) == 0
    assert main_pretrain.main([*command, "train.duration=2 steps"]) == 0
    caplog.set_level(logging.INFO)
    assert main_pretrain.main([*command, "train.duration=4 steps"]) == 0
    assert "resuming" in caplog.text
    assert losses(tmp_path / "run")[2:] == losses(tmp_path / "straight")[2:]
