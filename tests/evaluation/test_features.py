"""Features once: what the cache keeps apart, what an interruption leaves, missing clips, views of protocols."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from evaluation_cases import ALONE, FRAMES, config, small_model
from test_readers import made, settings
from torch import Tensor, nn

from egohod.data.dataset import ClipDataset, EvalProtocol, frame_numbers
from egohod.errors import UserError
from egohod.evaluation.embed import Execution, embed_clips
from egohod.evaluation.features import (
    FeatureCache,
    feature_key,
    is_written,
    open_index,
    read_features,
    read_index,
    search,
    write_video,
)
from egohod.evaluation.models import FrameAverage, fingerprint
from egohod.evaluation.results import RESULTS_FILE, write_results
from egohod.evaluation.runner import PROTOCOLS, Benchmark, benchmark, execution_of


def cached(test: Path, kind: str, cache: Path, identity: str = "weights", **more: Any) -> Benchmark:
    cfg = config()
    execution = dataclasses.replace(execution_of(cfg, ALONE), cache=cache, identity={"weights": identity}, **more)
    return benchmark(cfg, kind, settings(test, kind), execution, controls=["reverse"])


class Counting(nn.Module):
    """The small model, which counts what it is asked for and may stop working."""

    def __init__(self, limit: int = 10**9) -> None:
        super().__init__()
        self.inner, self.limit, self.videos, self.texts = small_model(), limit, 0, 0

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        if self.videos + len(video) > self.limit:
            raise KeyboardInterrupt
        self.videos += len(video)
        return self.inner.encode_video(video, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        self.texts += len(tokens)
        return self.inner.encode_text(tokens, normalize=normalize)


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
        kept = FeatureCache(cache, {}) if cache else None
        run = Execution(8, 0, ALONE)
        return embed_clips(small_model(), bench.dataset, run, controls=["shuffle"], cache=kept)[0]["shuffle"]

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


def test_the_fingerprint_is_that_of_the_weights() -> None:
    model = small_model()
    before = fingerprint(model)
    assert fingerprint(small_model()) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(model) != before


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
    # What is not there is told before anything is decoded.
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


def test_results_hold_every_number_with_all_it_depends_on(formats: Path, tmp_path: Path) -> None:
    cfg, bench = config(), made(formats, "ek100_cls", controls=["freeze"])
    measured = bench.measure(small_model())
    checkpoint = {"path": "run", "sha256": fingerprint(small_model())}
    write_results(
        tmp_path, cfg, ALONE, [(bench, measured)], checkpoint=checkpoint, also={"val/x": 1.0}, published="EgoVideo-L"
    )
    results = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert results["checkpoint"] == checkpoint
    assert len(results["config"]["sha256"]) == 64
    assert {"egohod", "torch", "python"} <= results["versions"].keys()
    assert results["metrics"]["val/x"] == 1
    each = results["benchmarks"]["ek100_cls"]
    assert each["protocol"]["name"] == "clean"
    assert each["protocol"]["size"] == bench.dataset.size
    top1 = each["metrics"]["action_top1"]
    assert top1["interval"][0] <= top1["value"] <= top1["interval"][1]
    assert top1["published"] == 24.0
    freeze = top1["controls"]["freeze"]
    assert freeze["drop"] == pytest.approx(top1["value"] - freeze["value"])
    assert freeze["drop_interval"][0] <= freeze["drop"] <= freeze["drop_interval"][1]
    sidecar = json.loads((tmp_path / each["details"]).read_text())
    assert sidecar["clips"]["id"] == bench.dataset.clips.ids
    assert sidecar["tables"][0]["kind"] == "classification"


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
    source = settings(formats, "egtea")
    cfg, protocol = config(), EvalProtocol("x", "", FRAMES, "windows", windows=2, stride=2, crops=3)
    bench = benchmark(cfg, "egtea", source, execution_of(cfg, ALONE))
    bench.dataset.protocol = protocol
    views = bench.dataset[0]["video"]
    assert views.shape == (6, 3, FRAMES, bench.dataset.size, bench.dataset.size)
    # Three different crops of two different windows.
    assert len({view.numpy().tobytes() for view in views}) == 6
    bench.dataset.protocol = dataclasses.replace(protocol, crops=1)
    single = bench.dataset[0]["video"][0]
    # Half a pixel is rounded down for the single crop here, up for the middle one of three.
    assert torch.equal(views[1][..., :-1], single[..., 1:])
    bench.dataset.protocol = protocol
    assert all(np.isfinite(value) for value in bench(small_model()).values())


@pytest.fixture
def outside(tmp_path: Path) -> FrameAverage:
    settings = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny_outside.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path / "tiny_outside.json")
    return FrameAverage("tiny_outside")


def test_an_outside_model_runs_on_every_benchmark(formats: Path, outside: FrameAverage) -> None:
    cfg = config()
    for kind in ("custom", "ek100_cls"):
        bench = benchmark(
            cfg, kind, settings(formats, kind), execution_of(cfg, ALONE),
            size=outside.size, tokenizer=outside.tokenizer, controls=["shuffle", "freeze"],
        )  # fmt: skip
        results = bench(outside)
        # It sees frames one by one, so their order means nothing to it; which frames there are does.
        drops = [value for name, value in results.items() if name.startswith("shuffle/") and name.endswith("_drop")]
        assert drops == pytest.approx([0] * len(drops), abs=1e-3)


def test_an_unknown_outside_model_is_refused() -> None:
    with pytest.raises(UserError, match="open_clip:ViT-nothing"):
        FrameAverage("ViT-nothing")


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
