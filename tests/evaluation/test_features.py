"""Features once: what the cache keeps apart, what an interruption leaves, missing clips, views of protocols."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import ALONE, Counting, cached, made, small_model
from torch import Tensor

from egohod.data.dataset import ClipDataset
from egohod.errors import UserError
from egohod.evaluation.embed import Execution, embed_clips
from egohod.evaluation.features import (
    FeatureCache,
    Features,
    Hit,
    feature_key,
    is_written,
    open_index,
    read_features,
    read_index,
    read_json,
    search,
    span,
    write_json,
    write_video,
)
from egohod.evaluation.runner import Benchmark


def test_a_later_benchmark_finds_the_features_of_an_earlier_one(formats: Path, tmp_path: Path) -> None:
    model = Counting()
    first = cached(formats, "ek100_mir", tmp_path)
    plain = first.measure(model)
    clips = len(first.dataset)
    assert model.videos == 2 * clips
    again, other = first.measure(model), cached(formats, "ek100_cls", tmp_path).measure(model)
    assert model.videos == 2 * clips
    assert again.flat() == plain.flat()
    assert (again.report.from_cache, other.report.from_cache) == (clips, clips)
    texts = model.texts
    cached(formats, "ek100_cls", tmp_path).measure(model)
    assert model.texts == texts


def test_controls_do_not_depend_on_which_benchmark_computed_them(formats: Path, tmp_path: Path) -> None:
    def features(kind: str, cache: Path | None) -> Tensor:
        bench = made(formats, kind)
        feature_cache = FeatureCache(cache, {}) if cache else None
        run = Execution(8, 0, ALONE)
        return embed_clips(small_model(), bench.dataset, run, controls=["shuffle"], cache=feature_cache)[0]["shuffle"]

    features("ek100_mir", tmp_path)
    torch.testing.assert_close(features("egomcq", tmp_path), features("egomcq", None), atol=1e-6, rtol=0)


def test_features_are_never_mixed_up(formats: Path, tmp_path: Path) -> None:
    model = Counting()
    cached(formats, "custom", tmp_path).measure(model)
    seen = model.videos

    def computed(bench: Benchmark) -> int:
        before = model.videos
        bench.measure(model)
        return model.videos - before

    assert computed(cached(formats, "custom", tmp_path)) == 0
    assert computed(cached(formats, "custom", tmp_path, identity="other")) == seen
    bench = cached(formats, "custom", tmp_path)
    bench.dataset.protocol = dataclasses.replace(bench.dataset.protocol, frames=3)
    bench.dataset.num_frames = 3
    assert computed(bench) == seen
    renamed = cached(formats, "custom", tmp_path)
    renamed.dataset.protocol = dataclasses.replace(renamed.dataset.protocol, name="x", source="y", prompts="z")
    assert computed(renamed) == 0
    widened = cached(formats, "custom", tmp_path)
    lengths = widened.dataset.clips.end - widened.dataset.clips.start
    least = float(np.median(lengths))
    source = dataclasses.replace(widened.dataset.config, min_clip_seconds=least)
    widened.dataset = ClipDataset(
        [(widened.dataset.clips, source)], protocol=widened.dataset.protocol, size=widened.dataset.size, decoder="pyav"
    )
    assert computed(widened) == 2 * int((lengths < least).sum())
    video = next((formats / "videos").glob("*/0000.mp4"))
    os.utime(video, (1, 1))
    changed = computed(cached(formats, "custom", tmp_path))
    assert 0 < changed < seen


def test_an_interrupted_evaluation_goes_on(formats: Path, tmp_path: Path) -> None:
    bench = cached(formats, "custom", tmp_path, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        bench.measure(Counting(limit=16))
    model = Counting()
    measured = bench.measure(model)
    assert measured.report.from_cache == 8
    assert model.videos == 2 * (len(bench.dataset) - 8)
    assert measured.flat() == pytest.approx(made(formats, "custom", controls=["reverse"]).measure(Counting()).flat())


def test_damaged_files_of_the_cache_cost_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path, {"a": 1})
    cache.add("key", np.ones(3, dtype=np.float32))
    cache.flush()
    (cache.folder / "broken.npz").write_bytes(b"PK")
    assert FeatureCache(tmp_path, {"a": 1}).read(["key", "none"]).keys() == {"key"}
    assert "broken.npz: not readable" in caplog.text
    assert FeatureCache(tmp_path, {"a": 2}).read(["key"]) == {}


def test_a_cache_file_of_too_few_features_is_passed_over(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {})
    cache.add("key", np.ones(3, np.float32))
    cache.flush()
    np.savez(cache.folder / "damaged.npz", keys=np.array(["a", "b"]), features=np.ones((1, 3), np.float32))
    (cache.folder / "empty.npz").touch()
    assert FeatureCache(tmp_path, {}).read(["key", "a", "b"]).keys() == {"key"}


OLD = Path(__file__).with_name("old_features")
"""An index and a cache that release 0.1 wrote."""


def test_an_index_of_an_earlier_release_is_read_searched_and_added_to(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD / "index", tmp_path / "index"))
    index, missing = read_features(folder)
    assert missing == 1, "the third video of the index has no features yet"
    assert (index.videos, index.texts) == (["a", "a", "b/c"], ["opens the jar", "", "cuts"])
    assert (index.start.tolist(), index.end.tolist()) == ([0, 1, 0], [1, 2.5, np.inf])
    hits = search(index.features[1], index, 2)
    assert (hits[0].video, hits[0].start, hits[0].similarity) == ("a", 1, pytest.approx(1))
    assert is_written(folder, "b/c", "identity-c"), "it would not be embedded again"
    assert not is_written(folder, "b/c", "another")
    settings = read_index(folder)
    open_index(folder, settings | {"videos": {"later": "later.npz"}})
    write_video(folder, "later", index.features[:1], [0], [1], ["new"], "id")
    again, missing = read_features(folder)
    assert (missing, again.videos) == (0, ["a", "a", "b/c", "later"])
    assert np.array_equal(again.features[:3], index.features)


def test_a_cache_of_an_earlier_release_is_used() -> None:
    cache = FeatureCache(OLD / "cache", {"identity": {"weights": "w"}, "size": 40})
    key = feature_key("clip", "two", "plain")
    assert cache.read([key, "other"])[key].tolist() == [1, 2, 3]


def test_numbers_that_are_none_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"format": 1, "nan": float("nan"), "inf": [float("inf"), 1.5]})
    assert read_json(tmp_path / "a.json", 1, "") == {"format": 1, "nan": None, "inf": [None, 1.5]}


def test_search_ranks_and_passes_over_what_overlaps() -> None:
    features = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]], dtype=np.float32)
    index = Features(
        features, ["v", "v", "v", "w"], np.array([0.0, 1.0, 2.0, 0.0]), np.array([2.0, 3.0, 4.0, np.inf]), [""] * 4
    )
    query = np.array([1.0, 0.0], dtype=np.float32)
    assert [(hit.video, hit.start) for hit in search(query, index, 3)] == [("v", 0), ("v", 2), ("w", 0)]
    assert [hit.start for hit in search(query, index, 2, overlapping=True)] == [0, 1]
    assert span(Hit("v", 59.97, 3725.26, 1.0, "")) == "0:01:00.0 - 1:02:05.3"
    assert span(Hit("w", 0.0, np.inf, 1.0, "")) == "whole"


def test_features_of_two_models_never_share_a_folder(tmp_path: Path) -> None:
    settings = {
        "format": 1,
        "weights": "a",
        "protocol": {"frames": 4},
        "root": "r",
        "layout": "whole",
        "chunk_seconds": 15.0,
    }
    open_index(tmp_path, settings | {"videos": {"x": "x.npz"}})
    open_index(tmp_path, settings | {"videos": {"y": "y.npz"}})
    assert list(read_index(tmp_path)["videos"]) == ["x", "y"]
    for change, named in (
        ({"weights": "b"}, "weights"),
        ({"protocol": {"frames": 5}}, "protocol"),
        ({"root": "s"}, "in r"),
    ):
        with pytest.raises(UserError, match=named):
            open_index(tmp_path, settings | {"videos": {}} | change)
    with pytest.raises(UserError, match="no video of the index has features yet"):
        read_features(tmp_path)
