"""The main programs as a user meets them: help, dry run, mistakes, real clips."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import main_pretrain
from egohod.data.dataset import ClipDataset
from egohod.errors import UserError
from tests.support import Command, losses, newest


def test_a_typo_on_the_command_line(program: Command) -> None:
    done = program("main_pretrain.py", "--config_file", "configs/demo.yml", "train.lrr=1")
    assert done.returncode == 2
    assert "did you mean 'train.lr'" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_lists_every_knob_with_its_reason(program: Command) -> None:
    done = program("main_pretrain.py", "--help")
    assert done.returncode == 0
    for part in ("train.lr=4e-05", "data.hard_negatives.share=0.0", "--dry_run", "torchrun", "upstream does not clip"):
        assert part in done.stdout


def test_a_dry_run_explains_everything_that_is_missing(inside: Command) -> None:
    blank = dict.fromkeys(("EGO4D_ROOT", "HOD_CSV", "CLIP_WEIGHTS"), "")
    for name in blank:
        os.environ.pop(name, None)
    done = inside("main_pretrain.py", "--config_file", "configs/config/clip_base.yml", "--dry_run")
    assert done.returncode == 2
    for part in ("EGO4D_ROOT", "HOD_CSV", "CLIP_WEIGHTS", "785 a clip", "GFLOP", "MB a clip", "149.6 M parameters"):
        assert part in done.stderr, part


def test_a_metric_that_does_not_exist_costs_no_step(
    tiny_config: Path, tmp_path: Path, inside: Command, demo_world: Path
) -> None:
    command = ["--config_file", tiny_config, f"evaluate.demo_val={demo_world}/val", "train.duration=5 steps"]
    command += ["evaluate.every=2 steps", "train.save_every=1000 steps"]
    done = inside("main_pretrain.py", *command, "evaluate.best=val/choice_across_clip")
    assert done.returncode == 2, done.stderr
    assert "evaluate.best=val/choice_across_clip: no such metric; did you mean val/choice_across_clips?" in done.stderr
    assert newest(tmp_path / "run").step == 2
    # Metrics of an earlier run need not be those of this one: it continues to its own evaluation.
    done = inside("main_pretrain.py", *command, "evaluate.best=val/choice_across_clip")
    assert done.returncode == 2
    assert newest(tmp_path / "run").step == 4
    done = inside("main_pretrain.py", *command)
    assert done.returncode == 0, done.stderr
    assert "at step 4 of 5" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_frames=0", "model.num_frames"),
        ("train.precision=foo", "train.precision"),
        ("data.hard_negatives.group_size=0", "group_size"),
        ("evaluate.demo_test=/nowhere", "/nowhere"),
    ],
)
def test_a_dry_run_finds_what_would_stop_a_run(tiny_config: Path, inside: Command, override: str, message: str) -> None:
    done = inside("main_pretrain.py", override, "--config_file", tiny_config, "--dry_run")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_a_dry_run_of_a_good_config_tries_it_and_writes_nothing(
    tiny_config: Path, tmp_path: Path, inside: Command
) -> None:
    done = inside("main_pretrain.py", "--config_file", tiny_config, "--dry_run")
    assert done.returncode == 0, done.stderr
    for part in ("ready to run", "clip ", "one step", "steps an epoch", "checkpoints/"):
        assert part in done.stderr, part
    assert "adamw, 0.001 after a warm-up of 3 steps from 1e-06, then a cosine down to 1e-05" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_whose_clips_stop_coming_can_be_stopped(
    tiny_config: Path, tmp_path: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that does not answer: the steps so far are saved, and the exit code is that of any stop."""
    served, original = itertools.count(), ClipDataset.__getitem__

    def stuck(clips: ClipDataset, key: Any) -> Any:
        while next(served) >= 3 * 8:
            signal.pause()
        return original(clips, key)

    def stop() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").is_file() or len(losses(tmp_path / "run")) < 3:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ClipDataset, "__getitem__", stuck)
    threading.Thread(target=stop, daemon=True).start()
    done = inside("main_pretrain.py", "--config_file", tiny_config, "data.workers=1")
    assert done.returncode == 0, done.stderr
    assert "step 3 of 12 is saved" in done.stderr
    assert newest(tmp_path / "run").step == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.demo.root=/nowhere", "/nowhere"),
        ("data.train.demo.metadata=/nowhere.csv", "/nowhere.csv"),
        ("train.global_batch_size=1000", "there are only"),
        ("train.output=/proc/run", "/proc/run"),
        pytest.param(
            *("train.device=cuda", "no NVIDIA device"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the message is about a machine without a GPU"),
        ),
        ("data.hard_negatives.group_by=[nouns]", "nouns"),
    ],
)
def test_a_missing_part_is_reported_in_one_line(
    tiny_config: Path, inside: Command, override: str, message: str
) -> None:
    done = inside("main_pretrain.py", "--config_file", tiny_config, override)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


@pytest.mark.ci
def test_strict_stops_a_run_at_the_first_bad_row(demo_world: Path, tiny_config: Path, tmp_path: Path) -> None:
    table = (demo_world / "train" / "hod.csv").read_text().splitlines()
    columns = table[1].split(",")
    (tmp_path / "hod.csv").write_text("\n".join([table[0], ",".join([*columns, "one", "more"]), *table[1:]]) + "\n")
    with pytest.raises(UserError, match=r"hod\.csv: row 1: \d+ columns instead of"):
        main_pretrain.main(
            ["--config_file", str(tiny_config), "--strict", f"data.train.demo.metadata={tmp_path}/hod.csv"]
        )


def test_weights_that_do_not_fit_or_bite(tiny_config: Path, tmp_path: Path, inside: Command) -> None:
    command = ["main_pretrain.py", "--config_file", tiny_config, "train.duration=1 steps"]
    assert inside(*command).returncode == 0
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    start_there = [
        "model.weights.source=checkpoint",
        f"model.weights.path={checkpoint}",
        f"train.output={tmp_path}/next",
    ]
    assert inside(*command, *start_there).returncode == 0
    other = inside(*command, *start_there, "model.num_frames=8", f"train.output={tmp_path}/other")
    assert other.returncode == 2
    assert "visual.temporal_embedding is [4, 128] there and [8, 128] here" in other.stderr

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/executed",)

    for name, content in (("evil.pt", {"state_dict": Evil()}), ("tensor.pt", torch.zeros(3))):
        path = tmp_path / name
        if name == "evil.pt":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, path)
        done = inside(
            *command, "model.weights.source=clip", f"model.weights.path={path}", f"train.output={tmp_path}/evil"
        )
        assert done.returncode == 2
        assert name in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.ci
def test_unreadable_clips_are_replaced_counted_and_stop_the_run_when_too_many(
    demo_world: Path, tiny_config: Path, tmp_path: Path, program: Command
) -> None:
    table = (demo_world / "train" / "hod.csv").read_text().splitlines()
    broken = [line.replace(line.split(",")[0], "no_such_video", 1) for line in table[1:3]]
    (tmp_path / "hod.csv").write_text("\n".join([table[0], *broken, *table[3:]]) + "\n")
    command = ["main_pretrain.py", "--config_file", tiny_config, f"data.train.demo.metadata={tmp_path}/hod.csv"]
    done = program(*command)
    assert done.returncode == 0, done.stderr
    # Each line names the places where the video was looked for.
    assert sum("no_such_video" in line for line in done.stderr.splitlines()) == 2
    done = program(*command, "data.max_bad_fraction=0", f"train.output={tmp_path}/strict")
    assert done.returncode == 2
    assert "data.max_bad_fraction" in done.stderr


def test_the_run_folder_holds_what_the_readme_promises(
    tiny_config: Path, tmp_path: Path, demo_world: Path, inside: Command
) -> None:
    run = tmp_path / "run"
    evaluation = [
        f"evaluate.demo_val={demo_world}/val",
        f"evaluate.demo_test={demo_world}/test",
        "evaluate.every=6 steps",
    ]
    command = ["main_pretrain.py", "--config_file", tiny_config, *evaluation]
    done = inside(*command)
    assert done.returncode == 0, done.stderr
    for name in ("config.yml", "environment.json", "metrics.jsonl", "results.json", "checkpoints/LAST"):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").glob("events*"))
    snapshot = json.loads((run / "environment.json").read_text())
    assert (
        snapshot["packages"]["torch"] == torch.__version__.split("+")[0]
        or snapshot["packages"]["torch"] in torch.__version__
    )
    results = json.loads((run / "results.json").read_text())["metrics"]
    for kind in ("choice_across_clips", "verb_noun_top1", "motion_state_changing", "motion_transient"):
        assert 0 <= results[f"test/{kind}"] <= 100
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/verb_noun_top1" in line] == [6, 12]
    training = next(line for line in lines if "train/loss" in line)
    for name in ("loss", "accuracy", "lr", "grad_norm", "clips_per_second", "data_wait", "memory_gb"):
        assert f"train/{name}" in training
    assert "ETA" in done.stderr
    assert newest(run).manifest["metrics"]["val/verb_noun_top1"] == lines[-1]["val/verb_noun_top1"]
    # Started again, a finished run trains nothing and shows its table.
    again = inside(*command)
    assert again.returncode == 0
    assert "test/verb_noun_top1" in again.stderr
    assert losses(run)[-1][0] == 12


@pytest.mark.ci
def test_real_clips_train(shared: Path, tmp_path: Path, program: Command) -> None:
    """A HOD csv over real egocentric and kitchen clips, at their real sizes, through the real decoder."""
    captions = {
        "3c0dffd0-e38e-4643-bc48-d513943dc20b_012_014": "#C C stirs the red sauce with a spatula in the right hand",
        "cf7c12db-1a9e-46d3-96d6-38174bbe373c": "#C C works in the kitchen",
        "mixkit-chef-preparing-a-sauce-in-a-blender-43034-medium": "a chef prepares a sauce in a blender",
        "mixkit-hands-of-a-baker-kneading-a-dough-42467-medium": "both hands knead a dough",
        "mixkit-pastry-chef-cutting-a-loaf-into-slices-43015-medium": "the right hand cuts a loaf into slices",
    }
    lines = ["video_id,start_second,end_second,text"]
    for name, text in captions.items():
        assert (shared / "media" / "lavila" / f"{name}.mp4").is_file()
        lines += [f"{name},0.0,1.6,{text}"]
    (tmp_path / "hod.csv").write_text("\n".join(lines) + "\n")
    config = tmp_path / "real.yml"
    config.write_text(
        f"""
model: {{name: DEMO, num_frames: 4}}
data: {{train: {{own: {{metadata: {tmp_path}/hod.csv, root: {shared}/media/lavila}}}}, workers: 2, flip: 0.0}}
train:
  {{output: {tmp_path}/run, duration: 20 steps, global_batch_size: 5, lr: 5e-4,
    log_every: 1 steps, save_every: 10 steps}}
"""
    )
    done = program("main_pretrain.py", "--config_file", config)
    assert done.returncode == 0, done.stderr
    curve = [loss for _, loss, _ in losses(tmp_path / "run")]
    assert len(curve) == 20
    assert sum(curve[-5:]) / 5 < 0.6 * sum(curve[:3]) / 3
    assert newest(tmp_path / "run").step == 20
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
