"""Protocols by family, and benchmarks from their names to their numbers."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import (
    ALONE,
    FRAMES,
    Counting,
    Oracle,
    cached,
    config,
    demo_benchmark,
    made,
    settings,
    small_model,
    world_split,
)
from torch import Tensor
from torch.nn.functional import interpolate

from egohod.config import Config
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, EvalProtocol, Tokenizer, frame_numbers
from egohod.data.formats import read_clips
from egohod.data.labels import ClassSpace
from egohod.data.table import ClipTable
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.config import PROTOCOL_NAMES, BenchmarkConfig
from egohod.evaluation.embed import Execution, embed_clips
from egohod.evaluation.results import RESULTS_FILE, table, write_results
from egohod.evaluation.runner import (
    PROTOCOLS,
    benchmark,
    execution_of,
    named_evaluators,
    protocol_for,
    resolve_benchmarks,
)
from egohod.evaluation.tasks import ClassificationTask
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


def test_a_missing_file_of_any_benchmark_shows_before_the_first_is_decoded(formats: Path, tmp_path: Path) -> None:
    cfg, model = config(), Counting()
    execution, here = execution_of(cfg, ALONE), settings(formats, "custom")
    first = benchmark(cfg, "custom", here, execution)
    benchmark(cfg, "other", dataclasses.replace(here, root=str(tmp_path)), execution)
    with pytest.raises(UserError, match="no such file"):
        first(model)
    assert model.videos == 0


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


def test_features_of_views_stay_separate_for_the_maximum_alone(formats: Path, tmp_path: Path) -> None:
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


def test_missing_clips_are_all_named_and_may_be_left_out(formats: Path, tmp_path: Path) -> None:
    test = tmp_path / "test"
    shutil.copytree(formats, test)
    (test / "benchmarks/egtea/videos").rename(test / "moved")
    files = sorted((test / "moved").glob("*/*.mp4"))
    (test / "moved").rename(test / "benchmarks/egtea/videos")
    gone = [test / "benchmarks/egtea/videos" / path.relative_to(test / "moved") for path in files[:3]]
    for path in gone[:2]:
        path.unlink()
    gone[2].write_bytes(b"no video")
    bench = made(test, "egtea")
    with pytest.raises(UserError) as error:
        bench.measure(small_model())
    # Missing files are reported before anything is decoded.
    assert all(path.stem in str(error.value) for path in gone[:2])
    assert gone[2].stem not in str(error.value)
    assert "2 of 15 clips cannot be read; main_eval.py --allow_missing" in str(error.value)
    bench.execution = dataclasses.replace(bench.execution, allow_missing=True)
    measured = bench.measure(small_model())
    assert (measured.report.clips, len(measured.rows), len(measured.report.faults)) == (15, 12, 3)
    assert all(np.isfinite(value) for value in measured.flat().values())
    cfg = config()
    write_results(tmp_path, cfg, ALONE, [(bench, measured)], checkpoint={"path": "x", "sha256": "y"})
    written = json.loads((tmp_path / RESULTS_FILE).read_text())["benchmarks"]["egtea"]
    assert written["partial"]
    assert any("PARTIAL: 12 of 15 clips (80.0 %)" in note for note in written["notes"])
    assert len(written["missing"]) == 3


def test_protocols_for_whole_files() -> None:
    midpoints = PROTOCOLS["whole_clip"]
    assert frame_numbers(midpoints, 32).tolist() == [[1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31]]
    assert frame_numbers(midpoints, 8)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    windows = frame_numbers(PROTOCOLS["lavila_10x3"], 122)
    assert windows.shape == (10, 16)
    assert windows[:, 0].tolist() == list(range(0, 91, 10))
    assert windows[0].tolist() == list(range(0, 32, 2))
    assert frame_numbers(PROTOCOLS["lavila_10x3"], 5)[9].tolist() == list(range(0, 32, 2)), "from 5 on black"


def test_views_are_averaged(formats: Path) -> None:
    cfg, protocol = config(), EvalProtocol("x", "", FRAMES, "windows", windows=2, stride=2, crops=3)
    bench = benchmark(cfg, "egtea", settings(formats, "egtea"), execution_of(cfg, ALONE))
    options = {"size": bench.dataset.size, "decoder": "pyav"}
    source = (bench.dataset.clips, bench.dataset.config)
    bench.dataset = ClipDataset([source], protocol=protocol, **options)
    views = bench.dataset[0]["video"]
    assert views.shape == (6, 3, FRAMES, bench.dataset.size, bench.dataset.size)
    # Three different crops of two different windows.
    assert len({view.numpy().tobytes() for view in views}) == 6
    single = ClipDataset([source], protocol=dataclasses.replace(protocol, crops=1), **options)[0]["video"][0]
    # Half a pixel is rounded down for the single crop here, up for the middle one of three.
    assert torch.equal(views[1][..., :-1], single[..., 1:])
    assert all(np.isfinite(value) for value in bench(small_model()).values())


def test_all_names_what_it_leaves_out(formats: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config()
    cfg.evaluate.benchmarks = {
        "mine": settings(formats, "custom"),
        "gone": BenchmarkConfig(metadata="/nowhere/gone.csv"),
        "egtea": BenchmarkConfig(),
    }
    with caplog.at_level(logging.INFO):
        assert list(resolve_benchmarks(cfg, "all")) == ["mine"]
    assert "benchmark gone is left out: /nowhere/gone.csv does not exist" in caplog.text
    assert "benchmark egtea is left out: evaluate.benchmarks.egtea.metadata is not set" in caplog.text
    cfg.evaluate.during, cfg.evaluate.final = ["mine"], ["mine", "gone"]
    with pytest.raises(UserError, match=r"benchmark gone of evaluate.during or evaluate.final: /nowhere/gone.csv does"):
        resolve_benchmarks(cfg, "all")


def test_two_metrics_of_a_name_are_an_error_before_anything_is_computed(formats: Path) -> None:
    custom = dataclasses.replace(settings(formats, "custom"), metric_names={"across_clips": "map"})
    cfg = config()
    with pytest.raises(UserError, match="benchmark mine: two of its tasks have a metric called 'map'; rename"):
        benchmark(cfg, "mine", custom, execution_of(cfg, ALONE))


def test_names_of_benchmarks(formats: Path) -> None:
    cfg = config()
    assert resolve_benchmarks(cfg, "egtea", root="r", metadata="m") == {
        "egtea": BenchmarkConfig(root="r", metadata="m")
    }
    with pytest.raises(UserError, match="--benchmark mri: no such benchmark; choose all, ek100_mir, ek100_cls"):
        resolve_benchmarks(cfg, "mri")
    assert list(resolve_benchmarks(cfg, "egtea, egomcq")) == ["egtea", "egomcq"]
    with pytest.raises(UserError, match="--root and --metadata belong to one benchmark"):
        resolve_benchmarks(cfg, "egtea,egomcq", root="r")
    with pytest.raises(UserError, match="no benchmark's data is found"):
        resolve_benchmarks(cfg, "all")
    cfg.evaluate.benchmarks = {"mine": settings(formats, "custom"), "gone": BenchmarkConfig(metadata="/nowhere")}
    assert list(resolve_benchmarks(cfg, "all")) == ["mine"]
    with pytest.raises(
        UserError, match=r"benchmark egtea: evaluate.benchmarks.egtea.metadata is not set; give --metadata"
    ):
        benchmark(cfg, "egtea", BenchmarkConfig(root="x"), execution_of(cfg, ALONE))
    with pytest.raises(UserError, match="protocol=lavila_10x3 is for clips that are files of their own"):
        benchmark(
            cfg, "mine", BenchmarkConfig(metadata="x", root="x", protocol="lavila_10x3"), execution_of(cfg, ALONE)
        )


# Metrics of the demo world's four kinds of questions.
CHOICES = ("choice_across_clips", "object", "motion_state_changing", "motion_transient")
HEADLINES = {"map", "recall_1_v2t", "recall_5_v2t", "median_rank_v2t", "verb_noun_top1", "verb_top1", "noun_top1"}


def test_oracle_reaches_everything(world: Path) -> None:
    bench = demo_benchmark(world)
    results = bench(Oracle(bench.dataset, read_clips(world / "hod.csv"), Tokenizer()))
    assert {*HEADLINES, *CHOICES} <= results.keys()
    for key, value in results.items():
        if not key.endswith("_chance"):
            assert value == (1 if "rank" in key else pytest.approx(100)), key
    chances = [results[f"{kind}_chance"] for kind in CHOICES]
    assert chances == pytest.approx([20, 50, 50, 50])
    assert results["verb_noun_top1_chance"] < 2


def test_untrained_model_is_far_from_it_and_every_number_has_a_chance_level(world: Path) -> None:
    results = demo_benchmark(world, workers=2)(small_model())
    metrics = {key for key in results if not key.endswith("_chance")}
    assert {f"{key}_chance" for key in metrics - {"verb_noun_mean_class"}} <= results.keys()
    assert results["map"] < 50
    assert results["verb_noun_top1"] < 30
    assert results["choice_across_clips"] < 60
    assert all(f"{results[key]:.1f}" in table(results) for key in metrics)


def test_controls_are_reported_beside_the_plain_numbers(world: Path) -> None:
    cfg = Config()
    cfg.model.name, cfg.model.num_frames, cfg.data.workers = "DEMO", FRAMES, 0
    cfg.evaluate.benchmarks["test"], cfg.evaluate.final = world_split(world), ["test"]
    alone = Distributed(0, 1, torch.device("cpu"), None)
    (bench,) = named_evaluators(cfg, alone, "test", controls=["reverse", "freeze"])
    (plain,) = named_evaluators(cfg, alone, "test")
    model, results = small_model(), bench(small_model())
    assert {key: value for key, value in results.items() if "/" not in key} == plain(model)
    for control in ("reverse", "freeze"):
        for key in ("map", "verb_noun_top1", "motion_transient"):
            drop = results[key] - results[f"{control}/{key}"]
            assert results[f"{control}/{key}_drop"] == pytest.approx(drop)
    assert not any(key.startswith("shuffle/") for key in results)


def test_evaluator_follows_the_configuration(world: Path) -> None:
    cfg = Config()
    cfg.model.name, cfg.model.num_frames, cfg.evaluate.batch_size, cfg.data.workers = "DEMO", 2, 5, 0
    cfg.data.decoder, cfg.evaluate.precision = "pyav", "bf16"
    cfg.evaluate.benchmarks["val"], cfg.evaluate.during = world_split(world), ["val"]
    (made,) = named_evaluators(cfg, Distributed(0, 1, torch.device("cpu"), None), "val")
    assert made.name == "val"
    assert made.dataset[0]["video"].shape == (1, 3, 2, made.dataset.size, made.dataset.size)
    assert made.execution.batch_size == 5
    assert made.execution.precision == torch.bfloat16


def test_the_benchmarks_that_a_configuration_names_are_measured(demo_world: Path) -> None:
    cfg, alone = Config(), Distributed(0, 1, torch.device("cpu"), None)
    cfg.model.name = "DEMO"
    cfg.evaluate.benchmarks = {name: world_split(demo_world / name) for name in ("val", "test")}
    assert named_evaluators(cfg, alone, "val") == named_evaluators(cfg, alone, "test") == []
    cfg.evaluate.final = ["test"]
    assert [[each.name for each in named_evaluators(cfg, alone, part)] for part in ("val", "test")] == [[], ["test"]]
    cfg.evaluate.during = ["val"]
    assert [each.name for each in named_evaluators(cfg, alone, "val")] == ["val"]


@pytest.mark.parametrize("part", ["hod.csv", "videos"])
def test_a_folder_without_clips_or_videos_is_refused(world: Path, tmp_path: Path, part: str) -> None:
    for entry in world.iterdir():
        if entry.name != part:
            (tmp_path / entry.name).symlink_to(entry)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / part))):
        demo_benchmark(tmp_path)


def test_classes_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    for entry in world.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    classes = tmp_path / "classes.csv"
    text = classes.read_text()
    classes.unlink()
    classes.write_text(text.replace("action,verb", "actor,verb", 1))
    with pytest.raises(UserError, match=r"classes\.csv: column 'action' is missing"):
        demo_benchmark(tmp_path)
    classes.write_text(text.splitlines()[0] + "\nfly cup,fly,cup,#C C flies the cup\n")
    with pytest.raises(UserError, match=r"classes\.csv: no class '.+', but a clip has"):
        demo_benchmark(tmp_path)
