"""Speed, profile and snapshot of a run; metrics in trackers, real and imitated."""

from __future__ import annotations

import gzip
import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from egohod.config import Config
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.model.cost import clip_flops
from egohod.model.dual_encoder import create_model
from egohod.training import telemetry
from egohod.training.telemetry import Clock, peak_flops, require_trackers, snapshot_on_out_of_memory, throughput
from tests.support import Command

HERE = Distributed(0, 1, torch.device("cpu"), None)
GPU = Distributed(0, 1, torch.device("cuda", 0), None)


def demo(**train: Any) -> Config:
    cfg = Config()
    cfg.model.name, cfg.model.num_frames = "DEMO", 4
    for name, value in train.items():
        assert hasattr(cfg.train, name)
        setattr(cfg.train, name, value)
    return cfg


# --------------------------------------------------------------------------------------------------
# Speed
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "fp16", 989.0),
        ("NVIDIA H20", "bf16", 148.0),
        ("NVIDIA GH200 480GB", "bf16", 989.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156.0),
        ("NVIDIA A10G", "bf16", 70.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("Tesla V100-SXM2-32GB", "fp32", None),
        ("NVIDIA of the future", "bf16", None),
    ],
)
def test_the_peak_follows_from_the_name_of_the_card(
    name: str, precision: str, tera: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0) if "V100" in name else (8, 0))
    peak = peak_flops(demo(precision=precision), GPU)
    assert (peak and peak / 1e12) == tera
    # The knob counts more.
    assert peak_flops(demo(precision=precision, peak_tflops=2.0), GPU) == 2e12


def test_a_cpu_has_no_peak_of_its_own() -> None:
    assert peak_flops(demo(), HERE) is None
    assert "mfu" not in throughput(demo(), create_model(demo().model), HERE, 10.0, 8.0)


def test_mfu_is_the_models_own_work_over_the_peak() -> None:
    cfg = demo(peak_tflops=0.5, precision="fp32")
    model = create_model(cfg.model)
    two = Distributed(0, 2, torch.device("cpu"), "gloo")
    speed = throughput(cfg, model, two, clips_per_second=10.0, text_length=8.2)
    flops = clip_flops(model.geometry, 4, 8).step
    # Half of the clips are this process's.
    assert speed["mfu"] == pytest.approx(5 * flops / 0.5e12)
    assert speed["tflops"] == pytest.approx(5 * flops / 1e12)
    assert speed["tokens_per_second"] == pytest.approx(10 * (1 + 4 * 25 + 8.2))
    # The formula is of a model that is trained whole.
    cfg.train.trainable = "last_blocks"
    assert throughput(cfg, model, two, 10.0, 8.2).keys() == {"tokens_per_second"}


def test_pauses_are_no_training() -> None:
    clock = Clock()
    clock.step(5)
    with clock.paused("save"):
        begin = telemetry.time.perf_counter()
        while telemetry.time.perf_counter() - begin < 0.05:
            pass
    lap = clock.lap()
    assert (lap.steps, lap.text_tokens) == (1, 5)
    assert lap.seconds < 0.05 <= lap.paused["save"]
    assert clock.lap().paused == {}


def test_lines_have_the_seconds_of_each_part(tiny_config: Path, tmp_path: Path, inside: Command) -> None:
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.duration=2 steps", "train.save_every=1 steps"]
    done = inside(*command, "train.max_batch_per_process=2", "train.peak_tflops=0.1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        seconds = [line[f"train/seconds_{part}"] for part in ("data", "forward", "backward", "optimizer")]
        assert all(each > 0 for each in seconds)
        assert sum(seconds) <= 8 / line["train/clips_per_second"]
        assert line["train/tokens_per_second"] > 100 * line["train/clips_per_second"]
        assert 0 < line["train/mfu"] < 10
    # The first step's checkpoint; the last one's comes after the last line.
    assert "train/seconds_save" not in lines[0]
    assert lines[1]["train/seconds_save"] > 0
    assert re.search(r"clips/s  MFU \d+ %  waits \d+ %  forward \d+ %  backward \d+ %  optimizer \d+ %", done.stderr)
    assert done.stderr.count("save took") == 2


# --------------------------------------------------------------------------------------------------
# Profile and snapshot
# --------------------------------------------------------------------------------------------------


def test_a_window_of_steps_is_profiled(tiny_config: Path, tmp_path: Path, inside: Command) -> None:
    command = ["main_pretrain.py", "--config_file", tiny_config, "model.num_frames=2", "train.global_batch_size=2"]
    done = inside(*command, "train.duration=4 steps", "train.profile=[2,3]")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "profile"
    assert {each.name for each in folder.iterdir()} == {"steps-2-3.json.gz", "steps-2-3.txt"}
    trace = json.loads(gzip.decompress((folder / "steps-2-3.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    for part in ("data", "features", "loss", "backward", "optimizer"):
        # Each step has a mark of its beginning and one of its end, which may be one event or two.
        assert names.count(part) == 2, part
    assert "aten::mm" in (folder / "steps-2-3.txt").read_text()
    # A resumed run that begins within the window records what is left of it.
    done = inside(*command, "train.duration=6 steps", "train.profile=[4,9]")
    assert done.returncode == 0, done.stderr
    assert (folder / "steps-5-9.json.gz").is_file()


@pytest.mark.parametrize("steps", ["[3]", "[5,4]", "[0,2]"])
def test_a_window_that_is_none_is_refused(tiny_config: Path, inside: Command, steps: str) -> None:
    done = inside("main_pretrain.py", "--config_file", tiny_config, f"train.profile={steps}")
    assert (done.returncode, "train.profile is" in done.stderr) == (2, True)


@pytest.mark.parametrize("history", [True, False])
def test_the_memory_is_written_at_the_moment_it_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: bool
) -> None:
    """The allocator of a GPU is imitated: it calls back with what was requested, when an allocation fails."""
    observers, recorded = list[Any](), list[Any]()
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: recorded.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).open("x").close())
    cfg = demo(output=str(tmp_path), memory_history=history)
    snapshot_on_out_of_memory(cfg, HERE)
    assert not observers
    snapshot_on_out_of_memory(cfg, GPU)
    for _ in range(2):  # the second one is not written over the first
        observers[0](0, 2_000_000_000, 80_000_000_000, 1_000_000)
    assert [each.name for each in tmp_path.iterdir()] == ["memory-rank0.pickle"]
    assert len(recorded) == history


# --------------------------------------------------------------------------------------------------
# Trackers
# --------------------------------------------------------------------------------------------------


class Calls:
    """A package that notes what is called, with the keyword arguments that the real ones have."""

    def __init__(self, *names: str) -> None:
        self.seen: list[tuple[str, Any, dict[str, Any]]] = []
        for name in names:
            setattr(self, name, self._note(name))

    def _note(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.seen.append((name, arguments, options))
            return SimpleNamespace(info=SimpleNamespace(run_id="f00d"))

        return call

    def named(self, name: str) -> list[tuple[Any, dict[str, Any]]]:
        return [(arguments, options) for called, arguments, options in self.seen if called == name]


def test_metrics_go_to_all_trackers_and_a_resumed_run_continues_there(
    tiny_config: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(telemetry.importlib.util, "find_spec", lambda name: name)
    command = ["main_pretrain.py", "--config_file", tiny_config, "model.num_frames=2", "train.global_batch_size=2"]
    command += ["train.trackers=[tensorboard,wandb,trackio,mlflow]"]
    ids = []
    for duration in (1, 2):
        modules = {
            "wandb": Calls("init", "log", "finish"),
            "trackio": Calls("init", "log", "finish"),
            "mlflow": Calls("set_tracking_uri", "set_experiment", "start_run", "log_dict", "log_metrics", "end_run"),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        done = inside(*command, f"train.duration={duration} steps")
        assert done.returncode == 0, done.stderr
        for name in ("wandb", "trackio"):
            (metrics,), options = modules[name].named("log")[0]
            assert options == {"step": duration}
            assert metrics["train/loss"] > 0
            assert len(modules[name].named("finish")) == 1
        (metrics,), options = modules["mlflow"].named("log_metrics")[0]
        assert (options, metrics["train/loss"] > 0) == ({"step": duration}, True)
        assert modules["mlflow"].named("set_tracking_uri") == [((f"sqlite:///{tmp_path}/run/mlflow.db",), {})]
        wandb, trackio = (modules[name].named("init")[0][1] for name in ("wandb", "trackio"))
        assert wandb["config"]["train"]["global_batch_size"] == 2
        assert wandb["dir"] == str(tmp_path / "run")
        assert (wandb["resume"], trackio["resume"]) == ("allow", "allow")
        ids.append((wandb["id"], trackio["name"], modules["mlflow"].named("start_run")[0][1]["run_id"]))
    assert ids[0][:2] == ids[1][:2]
    assert [each[2] for each in ids] == [None, "f00d"]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_trackers_are_imported_only_if_they_are_named(tiny_config: Path, tmp_path: Path, inside: Command) -> None:
    (tmp_path / "run").mkdir()
    done = inside("main_pretrain.py", "--config_file", tiny_config, "train.duration=1 steps", "train.trackers=[]")
    assert done.returncode == 0, done.stderr
    assert not {"wandb", "trackio", "mlflow"} & sys.modules.keys()
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_a_tracker_that_is_not_installed_is_one_error_before_anything_is_read(
    tiny_config: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry.importlib.util, "find_spec", lambda name: None)
    require_trackers(demo(trackers=["tensorboard"]))
    done = inside("main_pretrain.py", "--config_file", tiny_config, "train.trackers=[tensorboard,wandb]")
    assert done.returncode == 2
    assert done.stderr == "error: train.trackers names wandb, which is not installed: pip install wandb\n"
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_ends_the_run_and_one_that_fails_later_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no server\nand more")

    cfg = demo(output=str(tmp_path), trackers=["wandb"])
    module = Calls("init", "log", "finish")
    monkeypatch.setitem(sys.modules, "wandb", module)
    files = telemetry.Telemetry(tmp_path, cfg, HERE, total_steps=1, start_step=0, evaluates_first=False)
    monkeypatch.setattr(module, "log", fail)
    caplog.set_level(logging.ERROR)
    with files:
        files.write(1, {"train/loss": 1.0})
    assert "metrics of step 1 not sent to wandb: ConnectionError: no server; training continues" in caplog.text
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 1.0
    monkeypatch.setattr(module, "init", fail)
    with pytest.raises(UserError, match=r"train.trackers: wandb does not start: ConnectionError: no server$"):
        telemetry.Telemetry(tmp_path, cfg, HERE, total_steps=1, start_step=0, evaluates_first=False)
