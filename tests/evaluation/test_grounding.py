"""When does a text happen: Ego4D's queries and moments on synthetic recordings and on the demo world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import made, random_features
from torch import Tensor
from torch.nn.functional import normalize

from egohod.data.config import SourceConfig
from egohod.data.formats import BENCHMARKS
from egohod.data.formats.base import BenchmarkData, BenchmarkOptions, GroundingData, MomentQuery
from egohod.errors import UserError
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.grounding import GroundingTask, _interpolated_precision, _overlap
from egohod.evaluation.runner import read_benchmark

SECONDS = 60.0


def annotated(folder: Path, stem: str, recordings: int = 24) -> Path:
    """Recordings of a minute with four moments each, a third of them of the validation part."""
    rng = np.random.default_rng(0)
    for part, numbers in (("train", range(0, recordings, 1)), ("val", range(recordings, recordings + 8))):
        videos = []
        for number in numbers:
            starts = np.cumsum(rng.uniform(4, 9, 4)) + np.arange(4) * 5
            spans = [(float(start), float(start + rng.uniform(3, 7))) for start in starts]
            names = rng.permutation(6)[:4]
            queries = [
                {"query": f"what number {name}", "video_start_sec": 100 + a, "video_end_sec": 100 + b}
                for name, (a, b) in zip(names, spans, strict=True)
            ]
            labels = [
                {"label": f"do_/_number_{k}", "video_start_time": 100 + a, "video_end_time": 100 + b, "primary": True}
                for k, (a, b) in zip(names, spans, strict=True)
            ]
            annotation: dict[str, Any] = {"language_queries": queries} if stem == "nlq" else {"labels": labels}
            clip = {"clip_uid": f"c{number}", "video_start_sec": 100.0, "video_end_sec": 100 + SECONDS}
            videos.append({"video_uid": f"v{number}", "split": part, "clips": [{**clip, "annotations": [annotation]}]})
        (folder / f"{stem}_{part}.json").write_text(json.dumps({"videos": videos}))
    return folder


def read(folder: Path, stem: str) -> tuple[BenchmarkData, GroundingTask]:
    kind = {"nlq": "ego4d_nlq", "moments": "ego4d_mq"}[stem]
    data = BENCHMARKS[kind].read(SourceConfig(metadata=str(folder)), BenchmarkOptions())
    (task,) = data.tasks
    assert isinstance(task, GroundingData)
    return data, GroundingTask(**vars(task))


def oracle(task: GroundingTask) -> tuple[Tensor, Tensor]:
    """A window has the dimensions of the texts that happen at its centre, and a little noise."""
    texts = torch.eye(len(task.texts))
    video = 0.05 * random_features(len(task.centres), 0, len(task.texts))
    for query in task.queries:
        rows = task.recordings[query.recording]
        for start, end in query.moments:
            inside = (task.centres[rows] >= start) & (task.centres[rows] <= end)
            video[rows[inside], query.text] = 1.0
    return normalize(video, dim=1), texts


@pytest.mark.parametrize("stem", ["nlq", "moments"])
def test_an_oracle_finds_the_moments_and_random_features_only_their_lengths(tmp_path: Path, stem: str) -> None:
    _, task = read(annotated(tmp_path, stem), stem)
    scores = task.measure(*oracle(task))
    assert sorted(scores) == sorted(task.metric_names)
    for name, score in scores.items():
        assert score.value == pytest.approx(100), name
        assert score.chance is not None
        assert score.chance < 60, name
        low, high = score.interval()
        assert low <= score.value <= high + 1e-9
    random = task.measure(random_features(len(task.centres), 1), random_features(len(task.texts), 2))
    for name, score in random.items():
        low, high = score.interval()
        assert low - 8 <= scores[name].chance <= high + 8, name  # type: ignore[operator]


def test_a_measure_repeats_and_leaves_random_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, threads = GroundingTask._loss, set[int]()

    def counting(*arguments: Any) -> Tensor:
        threads.add(torch.get_num_threads())
        return loss(*arguments)

    monkeypatch.setattr(GroundingTask, "_loss", counting)
    _, task = read(annotated(tmp_path, "nlq"), "nlq")
    video, text = oracle(task)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = {name: score.value for name, score in task.measure(video, text).items()}
        # One core: bits do not depend on how many there are.
        assert threads == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.rand(1), expected)
    again = read(tmp_path, "nlq")[1].measure(video.clone(), text.clone())
    assert first == {name: score.value for name, score in again.items()}
    details = task.details(video, text)
    assert details["kind"] == "grounding"
    assert len(details["queries"]) == 32


def test_recordings_go_with_a_window_that_cannot_be_read(tmp_path: Path) -> None:
    data, task = read(annotated(tmp_path, "nlq"), "nlq")
    mask = np.ones(len(data.clips), dtype=bool)
    mask[int(task.recordings[-1][3])] = False
    rest = task.restricted(mask)
    assert len(rest.recordings) == len(task.recordings) - 1
    assert len(rest.queries) == len(task.queries) - 4
    video, text = oracle(task)
    assert rest.measure(video[torch.from_numpy(mask)], text)["recall_1_iou_30"].value > 90
    # Without a recording to learn from, or to be tested on, there are no numbers, and no failure either.
    for train in (True, False):
        mask = np.ones(len(data.clips), dtype=bool)
        for query in task.queries:
            if query.train == train:
                mask[task.recordings[query.recording][0]] = False
        rest, some = task.restricted(mask), video[torch.from_numpy(mask)]
        scores = rest.measure(some, text)
        assert sorted(scores) == sorted(task.metric_names)
        assert np.isnan([score.value for score in scores.values()]).all()
        assert rest.details(some, text)["queries"] == []


def test_windows_cover_a_recording_and_end_with_it(tmp_path: Path) -> None:
    data, task = read(annotated(tmp_path, "nlq"), "nlq")
    rows = task.recordings[0]
    starts, ends = data.clips.start[rows], data.clips.end[rows]
    assert starts[0] == 100
    assert ends[-1] == 160
    assert np.allclose(np.diff(starts), 1.0)
    assert np.allclose(ends - starts, 2.0)
    assert (task.centres[rows] == (starts + ends) / 2).all()


def test_annotators_agree_and_queries_without_text_are_counted(tmp_path: Path) -> None:
    for stem, notes in (("nlq", 1), ("moments", 0)):
        folder = annotated(tmp_path, stem)
        content = json.loads((folder / f"{stem}_val.json").read_text())
        first = content["videos"][0]["clips"][0]["annotations"]
        if stem == "nlq":
            first[0]["language_queries"][0]["query"] = ""
        else:
            shifted = json.loads(json.dumps(first[0]))
            for label in shifted["labels"]:
                label["video_start_time"] += 0.2  # a second annotator
            shifted["labels"].append({**shifted["labels"][0], "label": "unsure", "primary": False})
            first.append(shifted)
        (folder / f"{stem}_val.json").write_text(json.dumps(content))
        data, task = read(folder, stem)
        assert len(data.notes) == notes
        assert "unsure" not in task.texts
        tested = [query for query in task.queries if not query.train and query.moments]
        assert sum(len(query.moments) for query in tested) == 32 - notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clip: clip.pop("video_end_sec"), "clip 'c24': KeyError 'video_end_sec'"),
        (lambda clip: clip.update(video_end_sec=50), "clip 'c24': 100 to 50 s is not a range of time"),
        (lambda clip: clip["annotations"][0]["language_queries"][0].pop("video_start_sec"), "KeyError"),
        (lambda clip: clip.update(annotations=[3]), "clip 'c24': TypeError"),
    ],
)
def test_damaged_annotations_are_named(tmp_path: Path, change: Any, message: str) -> None:
    folder = annotated(tmp_path, "nlq")
    content = json.loads((folder / "nlq_val.json").read_text())
    change(content["videos"][0]["clips"][0])
    (folder / "nlq_val.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"nlq_val.json: .*{message}"):
        read(folder, "nlq")
    (folder / "nlq_val.json").unlink()
    with pytest.raises(UserError, match=r"no nlq_val\.json there"):
        read(folder, "nlq")


def test_detections_are_ranked_as_activitynet_does() -> None:
    assert _overlap((0, 4), (2, 6)) == pytest.approx(1 / 3)
    assert _overlap((0, 1), (2, 3)) == 0
    # Hits at ranks 2 and 3 of three: the precision at recall 1/3 is that of the higher recall, 2/3.
    right = np.array([False, True, True])
    assert _interpolated_precision(right, 3) == pytest.approx((2 / 3 + 2 / 3) / 3)


def test_numbers_are_those_of_a_small_case_and_whole_recordings_are_resampled() -> None:
    moments = [(((0, 10),),), (((0, 10),), ((20, 30), (40, 50)))]  # by recording and class
    queries = [
        MomentQuery(recording, number, spans, train=False)
        for recording, texts in enumerate(moments)
        for number, spans in enumerate(texts)
    ]
    rows = [np.arange(2), np.arange(2, 4)]
    task = GroundingTask(["a", "b"], rows, np.arange(4.0), 1.0, queries, detection=True)
    segments = [
        np.array([[0, 5, 0.9], [0, 8, 0.8]]),  # overlaps of 0.5 and, too late, 0.8
        np.array([[20, 30, 0.7], [0, 4, 0.6]]),  # none, 0.4
        np.array([[41, 51, 0.9], [0, 9, 0.5], [20, 26, 0.1]]),  # 9/11, none, 0.6: behind two segments
    ]
    scores = task._scores(segments, {})
    # Class a at 0.5: a hit, two that are none, and one that is none: 1/1 of one of two moments. Class b: 1/1 and 2/3.
    assert scores["map_iou_50"].value == pytest.approx(100 * (1 / 2 + (1 + 2 / 3) / 2) / 2)
    # At 0.4 the last of a is a hit too, at rank 4.
    assert scores["map_iou_40"].value == pytest.approx(100 * ((1 + 2 / 4) / 2 + (1 + 2 / 3) / 2) / 2)
    assert scores["recall_1x_iou_50"].value == pytest.approx(100 * 2 / 4)

    queries = [MomentQuery(i // 4, 0, ((0, 10),), train=False) for i in range(8)]
    task = GroundingTask(["a"], rows, np.arange(4.0), 1.0, queries)
    scores = task._scores([np.array([[0, 4.0, 0.9], [0, 6, 0.8]])] * 4 + [np.array([[50, 60, 1.0]])] * 4, {})
    values = {"recall_1_iou_30": 50, "recall_1_iou_50": 0, "recall_5_iou_50": 50, "recall_1_mean": 25}
    assert {name: scores[name].value for name in values} == values
    # One of two recordings has all hits: every share is possible, as if there were two queries and not eight.
    assert scores["recall_1_iou_30"].interval() == (0, 100)
    # A single recording has no interval, rather than one of no width.
    for detection in (True, False):
        alone = GroundingTask(["a"], rows, np.arange(4.0), 1.0, queries[:4], detection)
        assert all(np.isnan(score.interval()).all() for score in alone._scores([segments[0]] * 4, {}).values())


def test_the_length_of_windows_is_a_setting(tmp_path: Path) -> None:
    annotated(tmp_path, "nlq")
    counts = []
    for seconds in (2.0, 4.0):
        settings = BenchmarkConfig(kind="ego4d_nlq", metadata=str(tmp_path), root="x", window_seconds=seconds)
        _, data = read_benchmark("ego4d_nlq", settings)
        assert data.clips.end[0] - data.clips.start[0] == seconds
        counts.append(len(data.clips))
    assert counts[0] == pytest.approx(2 * counts[1], rel=0.05)


@pytest.mark.parametrize(("knob", "value"), [("flip", True), ("ensemble", ["other.pt"])])
def test_one_model_trains_the_head(formats: Path, knob: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"benchmark ego4d_nlq: evaluate.{knob} averages similarities"):
        made(formats, "ego4d_nlq", **{knob: value})
