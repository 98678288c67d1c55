"""Protocols by family: which frames, how resized, how views are merged, which statistics the weights expect."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import ALONE, FRAMES, config, evaluate, random_features, small_model
from test_features import cached
from test_readers import settings
from torch import Tensor
from torch.nn.functional import interpolate

from egohod.config import Config
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, EvalProtocol
from egohod.data.formats.base import Question
from egohod.data.labels import ClassSpace
from egohod.data.table import ClipTable
from egohod.errors import UserError
from egohod.evaluation.config import PROTOCOL_NAMES
from egohod.evaluation.embed import Execution, embed_clips
from egohod.evaluation.runner import PROTOCOLS, benchmark, execution_of, protocol_for
from egohod.evaluation.tasks import ClassificationTask, MultiLabelTask, MultipleChoiceTask, RetrievalTask
from egohod.model.config import IMAGE_STATS
from tests.data.video_files import FPS, HEIGHT, encode, numbers, picture

# The clip [1.26, 2.84) and the short one [1.26, 1.44) of a file of 10 frames a second, four frames each, by hand.
SHOWN = {
    "clean": ([15, 18, 21, 25], [13, 13, 13, 13]),
    "upstream": ([15, 18, 21, 25], [13, 14, 15, 15]),
    "lavila": ([15, 19, 22, 26], [13, 13, 13, 14]),
    "avion": ([14, 18, 22, 26], [13, 14, 15, 16]),
}


def clips_of(folder: Path, videos: list[str], start: np.ndarray, end: np.ndarray, **options: Any) -> ClipDataset:
    table = ClipTable.of(folder, videos, start, end)
    return ClipDataset([(table, SourceConfig(root=str(folder), layout="whole"))], decoder="pyav", **options)


def dataset(folder: Path, protocol: EvalProtocol, size: int = HEIGHT) -> ClipDataset:
    encode(folder / "v.mp4", 50)
    times = np.array([1.26, 1.26]), np.array([2.84, 1.44])
    return clips_of(folder, ["v", "v"], *times, protocol=protocol, size=size)


def test_the_configuration_knows_every_protocol() -> None:
    assert tuple(PROTOCOLS) == PROTOCOL_NAMES


@pytest.mark.parametrize("name", SHOWN)
def test_each_family_shows_the_frames_that_its_loader_picks(tmp_path: Path, name: str) -> None:
    shown = dataset(tmp_path, dataclasses.replace(PROTOCOLS[name], frames=4))
    for index, expected in enumerate(SHOWN[name]):
        frames = shown[index]["video"][0].permute(1, 2, 3, 0).numpy()
        assert numbers(frames) == expected


@pytest.mark.parametrize(("name", "mode"), [("upstream", "bicubic"), ("avion", "bilinear"), ("lavila", "bilinear")])
def test_families_resize_float32_frames_without_antialiasing(tmp_path: Path, name: str, mode: str) -> None:
    data = dataset(tmp_path, PROTOCOLS[name], size=24)
    frames = data.sources[0].read(data.row(0), 16, None, name).pictures
    small = interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), (24, 36), mode=mode, align_corners=False)
    video = data[0]["video"]
    assert video.dtype == torch.float32
    torch.testing.assert_close(video[0].transpose(0, 1), small[..., 6:30], atol=1e-4, rtol=0)
    ours = dataset(tmp_path, PROTOCOLS["clean"], size=24)[0]["video"]
    assert ours.dtype == torch.uint8, "the loader's own protocol moves a quarter of the bytes"


def test_a_familys_name_means_its_own_egtea() -> None:
    assert protocol_for("auto", "egtea").name == "whole_clip"
    assert protocol_for("auto", "ek100_mir").name == "clean"
    assert protocol_for("upstream", "egtea").name == "upstream_egtea"
    assert (protocol_for("upstream_4", "egtea").name, protocol_for("upstream_4", "egtea").frames) == (
        "upstream_egtea",
        4,
    )
    assert protocol_for("lavila", "egtea").name == "lavila_10x3"
    assert protocol_for("lavila", "charades_ego").name == "lavila"
    assert protocol_for("avion", "egtea").name == "avion"


def test_one_knob_chooses_the_protocol_of_all_benchmarks(formats: Path) -> None:
    cfg = config(protocol="upstream", num_frames=None)
    made = {
        kind: benchmark(cfg, kind, settings(formats, kind), execution_of(cfg, ALONE)).dataset.protocol
        for kind in ("ek100_mir", "egtea")
    }
    assert {kind: each.name for kind, each in made.items()} == {"ek100_mir": "upstream", "egtea": "upstream_egtea"}
    own = dataclasses.replace(settings(formats, "egtea"), protocol="clean")
    assert benchmark(cfg, "egtea", own, execution_of(cfg, ALONE)).dataset.protocol.name == "clean"
    cfg.evaluate.protocol = "lavila_10x3"
    with pytest.raises(UserError, match=r"evaluate\.protocol=lavila_10x3 is for clips that .* ek100_mir"):
        benchmark(cfg, "ek100_mir", settings(formats, "ek100_mir"), execution_of(cfg, ALONE))


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------

# Two views of a clip and three texts: one view is sure of the first text, both half like the third.
# max over views: 0.9, 0.1, 0.5 (text 0); mean: 0.45, 0.05, 0.5 (text 2).
VIEWS = torch.tensor([[[0.9, 0.0, 0.5], [0.0, 0.1, 0.5]]])
MEAN = VIEWS.mean(dim=1)
TEXT = torch.eye(3)


def test_the_maximum_over_views_counts_for_every_kind_of_table() -> None:
    texts = ["a", "b", "c"]
    classes = ClassificationTask("action", texts, np.arange(3), np.array([0]))
    assert evaluate(classes, VIEWS, TEXT)["action_top1"] == 100
    assert evaluate(classes, MEAN, TEXT)["action_top1"] == 0
    assert classes.details(VIEWS, TEXT)["similarity"][0] == pytest.approx([0.9, 0.5, 0.1])
    retrieval = RetrievalTask(texts, np.array([0]), np.eye(3, dtype=np.float32)[:1])
    assert evaluate(retrieval, VIEWS, TEXT)["recall_1_v2t"] == 100
    assert evaluate(retrieval, MEAN, TEXT)["recall_1_v2t"] == 0
    assert retrieval.details(VIEWS, TEXT)["best_texts"] == [[0, 2, 1]]
    questions = MultipleChoiceTask(texts, [Question("q", True, 0, (0, 1, 2), 0)])
    assert evaluate(questions, VIEWS, TEXT)["q"] == 100
    assert evaluate(questions, MEAN, TEXT)["q"] == 0
    assert questions.details(VIEWS, TEXT)["questions"][0]["similarity"] == pytest.approx([0.9, 0.1, 0.5])
    # Two clips and a text: the second clip's mean is nearer, the first one's best view.
    both = torch.cat([VIEWS, torch.tensor([[[0.6, 0.0, 0.0], [0.6, 0.0, 0.0]]])])
    asked = MultipleChoiceTask(texts, [Question("q", False, 0, (0, 1), 0)])
    assert (evaluate(asked, both, TEXT)["q"], evaluate(asked, both.mean(dim=1), TEXT)["q"]) == (100, 0)
    labels = MultiLabelTask("map", texts, np.array([[True, False, False], [False, True, False]]))
    # The first class is found first or second, the other one second.
    assert (evaluate(labels, both, TEXT)["map"], evaluate(labels, both.mean(dim=1), TEXT)["map"]) == (75, 50)


def test_the_maximum_of_one_view_is_the_mean() -> None:
    labels = np.arange(30) % 5
    table = ClassificationTask("action", [f"{i}" for i in range(5)], np.arange(5), labels)
    video, text = random_features(30, 0), random_features(5, 1)
    assert table.evaluate(video[:, None], text) == pytest.approx(table.evaluate(video, text))


def test_features_of_views_are_kept_apart_for_the_maximum_alone(formats: Path, tmp_path: Path) -> None:
    protocol = EvalProtocol("x", "", FRAMES, "windows", windows=2, stride=2, crops=3, merge="max")
    cfg, source = config(), settings(formats, "egtea")

    def features(merge: str) -> Tensor:
        each = dataclasses.replace(protocol, merge=merge)
        bench = benchmark(cfg, "egtea", source, execution_of(cfg, ALONE))
        bench.dataset.protocol = each
        return embed_clips(small_model(), bench.dataset, Execution(12, 0, ALONE), controls=["reverse"])[0]["reverse"]

    apart, averaged = features("max"), features("mean")
    assert apart.shape[:2] == (len(averaged), 6)
    torch.testing.assert_close(apart.mean(dim=1), averaged, atol=1e-6, rtol=0)
    torch.testing.assert_close(apart.norm(dim=2), torch.ones(apart.shape[:2]))
    # The cache keeps both, and never takes one for the other.
    results = {}
    for merge in ("max", "mean", "max", "mean"):
        bench = cached(formats, "egtea", tmp_path)
        bench.dataset.protocol = dataclasses.replace(protocol, merge=merge)
        measured = bench.measure(small_model())
        assert measured.report.from_cache == (len(bench.dataset) if merge in results else 0)
        assert measured.flat() == results.setdefault(merge, measured.flat())


def test_a_file_shorter_than_a_window_is_filled_up_with_black(tmp_path: Path) -> None:
    encode(tmp_path / "v.mp4", 5)
    data = clips_of(tmp_path, ["v"], np.zeros(1), np.full(1, np.inf), protocol=PROTOCOLS["lavila_10x3"], size=HEIGHT)
    video = data[0]["video"]
    assert video.shape == (30, 3, 16, HEIGHT, HEIGHT)
    assert all(torch.equal(view, video[1]) for view in video[4::3]), "ten times the same window"
    assert numbers(video[1, :, :3].permute(1, 2, 3, 0).numpy()) == [0, 2, 4]
    assert (video[:, :, 3:] == 0).all()
    assert picture(4).any()


def test_views_of_heads_are_averaged(formats: Path) -> None:
    cfg, source = config(), dataclasses.replace(settings(formats, "egtea"), protocol="lavila")
    (table,) = benchmark(cfg, "egtea", source, execution_of(cfg, ALONE)).tasks
    assert isinstance(table, ClassificationTask)
    space = ClassSpace(("action",), tuple(table.class_keys), tuple(table.class_names))
    bench = benchmark(cfg, "egtea", source, execution_of(cfg, ALONE), classes=space)
    assert (bench.dataset.protocol.name, bench.dataset.protocol.merge) == ("lavila_10x3", "mean")


# --------------------------------------------------------------------------------------------------
# Statistics of the pixels
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", list(IMAGE_STATS))
def test_frames_are_normalised_as_the_model_expects(formats: Path, stats: str) -> None:
    class Mean(torch.nn.Module):
        image_stats = IMAGE_STATS[stats]

        def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
            return video.mean(dim=(2, 3, 4))

    cfg = config()
    data = benchmark(cfg, "custom", settings(formats, "custom"), execution_of(cfg, ALONE)).dataset
    got = embed_clips(Mean(), data, Execution(4, 0, ALONE))[0]["plain"][0]
    mean, std = (torch.tensor(each) for each in IMAGE_STATS[stats])
    expected = (data[0]["video"][0].float().mean(dim=(1, 2, 3)) / 255 - mean) / std
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_other_statistics_give_other_features(formats: Path, tmp_path: Path) -> None:
    """The same weights are never taken for each other in the cache."""
    numbers_of = []
    for stats in ("clip", "avion", "clip"):
        model = small_model()
        model.image_stats = IMAGE_STATS[stats]
        measured = cached(formats, "custom", tmp_path).measure(model)
        numbers_of.append((measured.report.from_cache > 0, measured.scores["plain"]["map"].value))
    assert [from_cache for from_cache, _ in numbers_of] == [False, False, True]
    assert numbers_of[0][1] == numbers_of[2][1]


def test_a_familys_protocol_with_other_statistics_says_so(formats: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warned(cfg: Config, protocol: str, stats: str) -> str:
        caplog.clear()
        model = small_model()
        model.image_stats = IMAGE_STATS[stats]
        source = dataclasses.replace(settings(formats, "ek100_mir"), protocol=protocol)
        with caplog.at_level(logging.WARNING):
            benchmark(cfg, "ek100_mir", source, execution_of(cfg, ALONE)).measure(model)
        return caplog.text

    cfg = config()
    assert "protocol avion reproduces numbers of weights with model.image_stats=avion" in warned(cfg, "avion", "clip")
    assert "image_stats" not in warned(cfg, "avion", "avion")
    assert "image_stats" not in warned(cfg, "upstream", "clip")
    assert "image_stats" not in warned(cfg, "clean", "avion")


def test_ten_frames_a_second() -> None:
    """What the frame numbers above were computed for."""
    assert FPS == 10
