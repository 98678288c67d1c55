"""The benchmark from settings to page, on a toy robot; what a rerun reuses; intervals; settings that are refused."""

from __future__ import annotations

import base64
import json
import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml

import egohod
from egohod.__main__ import main
from egohod.config import Config
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.embed import Execution
from egohod.evaluation.features import read_json
from egohod.evaluation.runner import named_evaluators, resolve_benchmarks
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import create_model
from egohod.robot import benchmark
from egohod.robot.config import PolicyConfig, RobotConfig, SceneConfig, load
from tests.robot.test_cloning import Pixels
from tests.robot.toy import SCENE, ToySimulators
from tests.support import ROOT

ROWS = ["full state", "proprioception", "random weights", "one frame", "checkpoint"]


class Blind(Pixels):
    def encode_video(self, video: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        self.calls += 1
        return torch.zeros(len(video), 4)


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RobotConfig:
    monkeypatch.setattr(benchmark, "Simulators", ToySimulators)
    monkeypatch.setattr(benchmark, "_versions", lambda cfg: {"toy": "1"})
    return RobotConfig(
        scene=SceneConfig(tasks=["reach"], image_size=40, repeat=1, horizon=30),
        policy=PolicyConfig(steps=200, checkpoint_every=100, checkpoints=2, width=32),
        demonstrations=[8, 3], seeds=2, rollouts=4, slots=4, processes=2, device="cpu", cache=str(tmp_path / "cache"),
    )  # fmt: skip


def run(cfg: RobotConfig, output: Path, model: Any = None) -> dict[str, Any]:
    return benchmark.run(cfg, model or Pixels(), Blind(), {"path": "toy.pt", "sha256": "0" * 64}, output)


def test_a_run_has_every_row_and_its_page_shows_films(cfg: RobotConfig, tmp_path: Path) -> None:
    cfg.scene.tasks = ["reach", "again"]
    results = run(cfg, tmp_path / "out")
    assert [(row["demonstrations"], row["row"]) for row in results["rows"]] == [
        (n, row) for n in (3, 8) for row in ROWS
    ]
    means = {(row["demonstrations"], row["row"]): row["cells"]["mean"] for row in results["rows"]}
    assert means[8, "full state"]["value"] > 75 > means[8, "random weights"]["value"]
    for each in means.values():
        assert each["interval"][0] <= each["value"] <= each["interval"][1]
        assert each["best"] >= each["value"]
        assert np.mean(each["seeds"]) == pytest.approx(each["value"])
    assert {each["minus"] for each in results["differences"]} == set(ROWS) - {"checkpoint"}
    table = benchmark.markdown(results)
    assert "| 8 | one frame |" in table
    assert "checkpoint minus proprioception" in table

    page = (tmp_path / "out" / "report.html").read_text()
    assert "media-src data:" in page
    films = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    assert 2 <= len(films) <= 8 * cfg.films
    (tmp_path / "film.mp4").write_bytes(base64.b64decode(films[0]))
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert len(list(container.decode(video=0))) > 1
    # A page without its films is still a page.
    for path in (tmp_path / "out" / "films").iterdir():
        path.unlink()
    assert "<video" not in benchmark.write_page(tmp_path / "out").read_text()


def test_a_killed_run_gives_the_same_results(cfg: RobotConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg.demonstrations = [3]
    whole = run(replace(cfg, cache=str(tmp_path / "elsewhere")), tmp_path / "whole")
    whole["settings"]["cache"] = cfg.cache
    with monkeypatch.context() as patched:
        measure, calls = benchmark._measure, list[str]()

        def killed(*arguments: Any) -> dict[str, Any]:
            calls.append(arguments[4])
            if len(calls) == 5:
                raise KeyboardInterrupt
            return measure(*arguments)

        patched.setattr(benchmark, "_measure", killed)
        with pytest.raises(KeyboardInterrupt):
            run(cfg, tmp_path / "out")
    model = Pixels()
    assert run(cfg, tmp_path / "out", model) == whole
    films = sorted(path.name for path in (tmp_path / "out" / "films").iterdir())
    assert films == sorted(path.name for path in (tmp_path / "whole" / "films").iterdir())
    # Finished rows are read, from another folder of results too.
    model.calls = 0
    assert run(cfg, tmp_path / "more", model) == whole
    assert model.calls == 0
    assert (tmp_path / "more" / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()
    # A row whose file is damaged is measured again; one whose films were deleted is not.
    row = next((tmp_path / "cache" / "rows").glob("*checkpoint*"))
    row.write_text(row.read_text()[:100])
    assert run(cfg, tmp_path / "out", model) == whole
    assert model.calls > 0
    model.calls = 0
    for film in (tmp_path / "cache" / "films").iterdir():
        film.unlink()
    assert run(cfg, tmp_path / "last", model) == whole
    assert model.calls == 0
    # Rows of another protocol are measured again.
    run(replace(cfg, rollouts=3, processes=9), tmp_path / "out", model)  # more processes than simulators
    assert model.calls > 0


def test_demonstrations_are_simulated_once_and_failures_left_out(cfg: RobotConfig, tmp_path: Path) -> None:
    simulators = ToySimulators()
    first = benchmark.demonstrations(simulators, SCENE, tmp_path / "toy", 6, 3)  # type: ignore[arg-type]
    assert [key for key, _ in first] == [f"toy/{number}" for number in (0, 1, 2, 3, 5, 6)]
    tried = len(simulators.demonstrated)
    # More of them begin with the same ones, whatever the number of processes.
    (tmp_path / "toy" / "00001.npz").write_bytes(b"damaged")
    more = benchmark.demonstrations(simulators, SCENE, tmp_path / "toy", 7, 2)  # type: ignore[arg-type]
    assert simulators.demonstrated[tried:] == [1]
    for (key, one), (other, again) in zip(first, more, strict=False):
        assert key == other
        np.testing.assert_array_equal(one.frames, again.frames)


def test_an_expert_that_fails_is_reported(cfg: RobotConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToySimulators, "demonstrate", lambda *_: None)
    message = r"expert of reach succeeded in 0 of 16 demonstrations within 30 steps; raise scene.horizons.reach"
    with pytest.raises(UserError, match=message):
        benchmark.demonstrations(ToySimulators(), SCENE, tmp_path / "toy", 2, 2)  # type: ignore[arg-type]


def test_intervals_are_paired_and_of_seeds_and_starts() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((3, 4, 25)) < 0.5
    one, other = benchmark.score([base.astype(float)]), benchmark.score([np.ones((3, 4, 25)), base])
    low, high = one.interval()
    assert low < one.value < high
    assert other.value == pytest.approx((100 + one.value) / 2)
    assert benchmark.score([np.ones((1, 2, 3))]).interval() == (100, 100)
    # The same rollouts: a row does not differ from itself, and more successes are seen as such.
    assert one.interval(one) == (0, 0)
    better = base.copy()
    better[:, :, :10] = True
    difference = benchmark.score([better.astype(float)])
    assert difference.interval(one)[0] > 0
    # Checkpoints of a seed are one policy that wavers: three equal ones make no interval shorter.
    once, thrice = base[:1].astype(float), base[[0, 0, 0]].astype(float)
    assert benchmark.score([once]).interval() == pytest.approx(benchmark.score([thrice]).interval())


def test_an_estimate_names_the_parts(cfg: RobotConfig) -> None:
    seconds = benchmark.estimate(cfg, Pixels(), Blind())
    assert list(seconds) == ["demonstrations", "simulation and drawing", "features", "training", "at most"]
    assert all(each > 0 for each in seconds.values())


def test_without_a_window_or_a_second_model_there_are_fewer_rows(cfg: RobotConfig) -> None:
    cfg.features.frames = 1
    assert [each.name for each in benchmark.inputs(cfg, Pixels(), None)] == [
        "full state",
        "proprioception",
        "checkpoint",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scene.suite=metawrld", "did you mean metaworld"),
        ("scene.suite=kitchen", "needs scene.recordings"),
        ("scene.recordings=file.hdf5", "is for scene.suite=kitchen"),
        ("scene.tasks=[]", "needs at least one entry"),
        ("scene.tasks=[hammer,hammer]", "none twice"),
        ("scene.horizons={hammer: 900}", "at most 500"),
        ("policy.steps=2000", "need more steps than policy.steps=2000"),
        ("demonstrations=[0]", "must be at least 1"),
    ],
)
def test_settings_that_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load(ROOT / "configs/robot/metaworld.yml", [override])


def test_an_evaluation_reports_the_checkpoint_and_one_frame_as_a_control(
    cfg: RobotConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "load", lambda path: cfg)
    dist = Distributed(0, 1, torch.device("cpu"), None)
    execution, config = Execution(8, 0, dist), BenchmarkConfig()
    bench = benchmark.RobotBenchmark(Config(), "metaworld", config, execution)
    result = bench.measure(Pixels())
    names = [f"success_{count}{task}" for count in (3, 8) for task in ("", "_reach")]
    assert sorted(result.scores) == ["freeze", "plain"]
    assert list(result.scores["plain"]) == names == list(result.scores["freeze"])
    # The same numbers as in the full table.
    rows = read_json(next(tmp_path.rglob("results.json")), benchmark.FORMAT, "")["rows"]
    for row in rows:
        if row["row"] == "checkpoint":
            assert result.scores["plain"][f"success_{row['demonstrations']}"].value == row["cells"]["mean"]["value"]
    assert any("8 demonstrations, full state: " in line for line in bench.about()["notes"])
    with pytest.raises(UserError, match="metaworld: runs in one process"):
        benchmark.RobotBenchmark(Config(), "metaworld", config, replace(execution, dist=replace(dist, world_size=2)))
    with pytest.raises(UserError, match="metaworld: draws its own frames"):
        benchmark.RobotBenchmark(Config(), "metaworld", config, execution, need_videos=False)


class Colours:
    """An outside model: the mean colours of every frame."""

    image_size = 40

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.mean(dim=(2, 3)).flatten(1)


def test_the_command_and_python_find_it_by_its_card(
    cfg: RobotConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg.demonstrations = [3]
    settings, weights = tmp_path / "robot.yml", tmp_path / "demo.pt"
    settings.write_text(yaml.safe_dump(asdict(cfg)))
    torch.manual_seed(0)
    torch.save({"state_dict": create_model(ModelConfig(name="DEMO", num_frames=4)).state_dict()}, weights)
    (tmp_path / "eval.yml").write_text("{}")
    command = [
        *(
            "eval",
            "--config_file",
            str(tmp_path / "eval.yml"),
            "--checkpoint",
            str(weights),
            "--benchmark",
            "metaworld",
        ),
        *("--metadata", str(settings), "--output", str(tmp_path / "out"), "model.name=DEMO", "model.num_frames=4"),
    ]
    with caplog.at_level(logging.INFO):
        assert main(command) == 0
    assert "thumbnail" not in caplog.text
    results = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["metaworld"]
    assert list(results["metrics"]) == ["success_3", "success_3_reach"]
    assert list(results["metrics"]["success_3"]["controls"]) == ["freeze"]
    for row in ("full state", "proprioception", "random weights"):
        assert any(f"3 demonstrations, {row}: " in note for note in results["notes"])
    assert "| metaworld | success_3 " in (tmp_path / "out" / "results.md").read_text()
    assert "<h2>metaworld" in (tmp_path / "out" / "report.html").read_text()
    for knob in (f"ensemble=[{weights}]", "flip=true"):
        with pytest.raises(UserError, match=f"metaworld: evaluate.{knob.split('=')[0]} averages similarities"):
            main([*command, f"evaluate.{knob}"])

    bench = egohod.load_benchmark("metaworld", settings)
    assert bench.clips.empty
    assert not bench.texts
    assert bench.card is not None
    assert "metaworld/freeze/success_3" in bench.evaluate(Colours()).metrics


def test_all_benchmarks_include_it_only_with_its_settings(tmp_path: Path) -> None:
    config = Config()
    config.evaluate.benchmarks = {"metaworld": BenchmarkConfig()}
    with pytest.raises(UserError, match="no benchmark's data is found"):
        resolve_benchmarks(config, "all")
    assert list(resolve_benchmarks(config, "metaworld")) == ["metaworld"]
    config.evaluate.benchmarks["metaworld"].metadata = str(ROOT / "configs/robot/metaworld.yml")
    assert list(resolve_benchmarks(config, "all")) == ["metaworld"]


def test_a_training_run_refuses_it_and_names_the_command() -> None:
    config = Config()
    # Also by another name, and whether or not its settings are given.
    config.evaluate.benchmarks = {"metaworld": BenchmarkConfig(), "robot": BenchmarkConfig(kind="metaworld")}
    config.evaluate.during, config.evaluate.final, config.train.output = ["metaworld"], ["robot"], "runs/mine"
    for part, key, name in (("val", "during", "metaworld"), ("test", "final", "robot")):
        message = rf"evaluate\.{key}: {name} is simulated, .* egohod eval --checkpoint runs/mine --benchmark {name}"
        with pytest.raises(UserError, match=message):
            named_evaluators(config, Distributed(0, 1, torch.device("cpu"), None), part)
