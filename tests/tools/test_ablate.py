"""The study: its runs, its tables from what the runs left, and a tiny one for real."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from egohod.config import Config
from egohod.errors import UserError
from egohod.evaluation.embed import CONTROLS
from egohod.loss.config import LOSSES
from tests.support import ROOT, Command
from tools import ablate

CONFIG = ROOT / "configs" / "ablation_demo.yml"


def test_the_shipped_study_has_its_five_rows_and_three_seeds() -> None:
    study = ablate.read_study(CONFIG)
    runs = ablate.plan(study, CONFIG, tune=False)
    assert [run.seed for run in runs] == [seed for seed in (0, 1, 2) for _ in range(5)]
    assert {run.cfg.train.duration for run in runs} == {runs[0].cfg.train.duration}
    cost = {run.row: ablate.cost(run.cfg) for run in runs}
    assert cost["plain_4"] == cost["hod_4"]
    assert cost["egovideo"]["million_trainable"] > cost["hod_16"]["million_trainable"]
    assert all(list(run.cfg.evaluate.final) == ["test"] for run in runs)
    assert [(run.row, run.seed) for run in ablate.select(runs, ["egovideo"], ["0", "2"])] == [
        ("egovideo", 0),
        ("egovideo", 2),
    ]
    tuning = ablate.plan(study, CONFIG, tune=True)
    assert not any(run.cfg.evaluate.final for run in tuning)
    assert not {run.folder for run in tuning} & {run.folder for run in runs}


@pytest.mark.parametrize("name", ["ablation_finetune", "ablation_finetune_cls"])
def test_the_studies_of_fine_tuning_leave_the_test_world_closed_while_tuning(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yml"
    study = ablate.read_study(path)
    runs, tuning = ablate.plan(study, path, tune=False), ablate.plan(study, path, tune=True)
    # The start is measured once; all else is trained with every seed.
    assert len(runs) == 3 * (len(study.rows) - 1) + 1
    for run in runs + tuning:
        assert list(run.cfg.evaluate.during) == ["val"]
        assert {run.cfg.evaluate.benchmarks[world].protocol for world in ("val", "test")} == {"auto"}
        assert run.command[1].endswith("main_finetune.py" if run.trains else "main_eval.py")
    assert {tuple(run.cfg.evaluate.final) for run in runs} == {("test",)}
    assert {tuple(run.cfg.evaluate.final) for run in tuning} == {()}
    for starts, world in ((runs, "test"), (tuning, "val")):
        (start,) = (run for run in starts if not run.trains)
        assert start.command[start.command.index("--benchmark") + 1] == world
        assert start.command[start.command.index("--checkpoint") + 1] == start.cfg.model.weights.path
    # Both worlds are measured alike, and the start like what is trained.
    (kind,) = {run.cfg.evaluate.benchmarks[world].kind for run in runs for world in ("val", "test")}
    losses = {run.cfg.loss.name for run in runs if run.trains}
    target = {"ek100_mir": "relevancy", "ek100_cls": "class"}[kind]
    assert losses == {name for name, each in LOSSES.items() if each.target == target}
    for run in runs:
        assert run.cfg.evaluate.num_frames is runs[0].cfg.evaluate.num_frames


def test_the_study_of_generated_narrations_differs_in_the_narrations_alone() -> None:
    path = ROOT / "configs" / "ablation_hod.yml"
    runs = ablate.plan(ablate.read_study(path), path, tune=False)
    assert [run.row for run in runs] == ["plain", "generated", "own"] * 3
    sources = {run.row: run.cfg.data.train["demo"] for run in runs}
    assert len({source.metadata for source in sources.values()}) == 3
    assert len({source.root for source in sources.values()}) == 1
    assert len({(run.cfg.train.duration, run.cfg.model.num_frames) for run in runs}) == 1


def test_the_study_of_motion_compares_like_with_like(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ROOT / "configs" / "ablation_motion.yml"
    study = ablate.read_study(path)
    runs = ablate.plan(study, path, tune=False)
    assert len(runs) == 3 * len(study.rows)
    rows = {run.row: run.cfg for run in runs}
    # Two blocks, in which all rows have the same objective.
    assert [cfg.loss.opposites > 0 for cfg in rows.values()] == [False] * 3 + [True] * (len(rows) - 3)
    for block in (list(rows.values())[:3], list(rows.values())[3:]):
        assert len({(cfg.loss.opposites, cfg.loss.separation) for cfg in block}) == 1
    same = {
        (cfg.train.duration, cfg.train.global_batch_size, cfg.model.num_frames, cfg.model.patch_dropout, cfg.train.lr)
        for cfg in rows.values()
    }
    assert len(same) == 1
    gflop = {name: ablate.cost(cfg)["gflop_per_step"] for name, cfg in rows.items()}
    # Opposites are texts that are embedded, the stem is convolutions, and both are counted.
    assert gflop["plain_opposites"] - gflop["plain"] == pytest.approx(gflop["stem_opposites"] - gflop["stem"])
    assert gflop["plain"] < gflop["plain_opposites"] < gflop["stem"] < gflop["stem_opposites"]
    assert gflop["egovideo_cheap"] < 0.9 * gflop["plain_opposites"]
    assert gflop["egovideo_stem_cheap"] < 0.95 * gflop["stem_opposites"]
    # To read thirty configurations again takes as long as all the rest.
    monkeypatch.setattr(ablate, "plan", lambda *_, **__: runs)
    assert ablate.main(["--config_file", str(path), "--dry_run", "--jobs", "2", "--only", "plain,stem"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    steps = rows["plain"].train.duration.removesuffix(" steps")
    assert [line.split(" | ")[:3] for line in lines[2:4]] == [["| plain", "0", steps], ["| stem", "0", steps]]
    minutes = [float(line.split(" | ")[5]) for line in lines if line.startswith(("| plain", "| stem"))]
    assert total.startswith(f"6 runs, {sum(minutes) / 2:.0f} minutes with 2 at a time")


@pytest.mark.parametrize("name", ["ablation_demo", "ablation_hod", "ablation_finetune", "ablation_finetune_cls"])
def test_studies_with_published_numbers_have_the_world_of_these_numbers(name: str) -> None:
    assert ablate.read_study(ROOT / "configs" / f"{name}.yml").world.variant.version == 5


def test_a_metric_may_be_the_mean_of_two(tmp_path: Path) -> None:
    runs = ablate.plan(ablate.read_study(CONFIG), CONFIG, tune=True)[:1]
    run = dataclasses.replace(runs[0], folder=tmp_path)
    (tmp_path / "environment.json").write_text('{"commit": "abc"}')
    lines = [{"step": 1, "train/clips_per_second": 2.0}, {"step": 2, "val/a": 40.0, "val/b": 60.0, "val/c": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ablate._of_run(run, True, ["a+b", "c", "a+d"])["val"] == {2: {"a+b": 50.0, "c": 1.0}}


def test_runs_share_the_cores_and_a_failure_starts_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four runs, two at a time, of which the second fails."""
    script = "import os, sys, time; time.sleep(0.5); print(os.environ['OMP_NUM_THREADS']); sys.exit(int(sys.argv[1]))"
    runs = [
        ablate.Run(
            str(code), 0, tmp_path / str(number), [sys.executable, "-c", script, str(code)], Config(), trains=False
        )
        for number, code in enumerate((0, 3, 0, 0))
    ]
    monkeypatch.setattr(ablate, "usable_cores", lambda: 6)
    with pytest.raises(UserError, match=r"1: the run ended early \(exit code 3\)"):
        ablate.train_all(runs, jobs=2)
    assert (tmp_path / "0" / "log.txt").read_text() == "3\n", "half of the cores"
    assert runs[0].done, "what was under way is finished"
    assert not (tmp_path / "3").exists()
    ablate.train_all(runs[2:], jobs=2)
    assert all(run.done for run in runs[2:])
    with pytest.raises(UserError, match="--jobs 0: at least one run at a time"):
        ablate.main(["--config_file", str(CONFIG), "--jobs", "0"])


def test_mistakes_are_named(tmp_path: Path) -> None:
    runs = ablate.plan(ablate.read_study(CONFIG), CONFIG, tune=False)
    with pytest.raises(UserError, match="no row 'egovidoe'; there are plain_4"):
        ablate.select(runs, ["egovidoe"], [])
    with pytest.raises(UserError, match="no seed '7'; there are 0, 1, 2"):
        ablate.select(runs, [], ["7"])
    path = tmp_path / "study.yml"
    path.write_text("base: x.yml\nrow: {}\n")
    with pytest.raises(UserError, match=f"{path}: unknown key 'row'; did you mean 'rows'"):
        ablate.read_study(path)


def test_tables_have_means_spreads_and_equal_flops(tmp_path: Path) -> None:
    def seed(last: float) -> dict[str, object]:
        val = {step: dict.fromkeys(ablate.METRICS, float(step)) for step in (10, 20, 30)}
        test = dict.fromkeys(ablate.METRICS, last)
        controls = {name: dict.fromkeys(ablate.METRICS, 50.0) for name in CONTROLS}
        return {"steps": 30, "seconds_per_step": 0.5, "val": val, "test": test, "controls": controls}

    cheap = {"title": "cheap", "gflop_per_step": 10.0, "million_trainable": 1.0}
    dear = {"title": "dear", "gflop_per_step": 30.0, "million_trainable": 1.0}
    start = {
        "title": "start",
        "start": True,
        "seeds": {0: {"test": seed(40.0)["test"], "controls": seed(0.0)["controls"]}},
    }
    rows = {
        "start": start,
        "cheap": cheap | {"seeds": {0: seed(60.0), 1: seed(64.0)}},
        "dear": dear | {"seeds": {0: seed(70.0)}},
    }
    ablate.at_equal_flops(rows)
    headings = {"metrics": ablate.METRICS, "chance": ablate.CHANCE}
    results = {"rows": rows, **headings, "note": "note", "world_of_the_numbers": "test", "equal_flops": "0.3 TFLOP"}
    text = ablate.tables(results)
    assert "| start | 40.0 | 40.0 | 40.0 | 40.0 | - | - | - | 1 |" in text
    assert text.count("| start |") == 1 + len(ablate.CHANCE), "there is nothing to spend on it"
    assert "| cheap | 62.0 ± 2.8 | 62.0 ± 2.8 | 62.0 ± 2.8 | 62.0 ± 2.8 | 10 | 0.50 ± 0.00 | 1.0 | 2 |" in text
    assert "| dear | 10.0 | 10.0 | 10.0 | 10.0 |" in text, "thirty cheap steps buy ten dear ones"
    assert "| dear | transient pairs | 70.0 | 50.0 | 50.0 | 50.0 |" in text
    ablate.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.ci
def test_a_tiny_study_runs_in_parts_and_refuses_to_mix_recipes(
    tiny_config: Path, tmp_path: Path, demo_world: Path, program: Command
) -> None:
    study = tmp_path / "study.yml"
    base = tmp_path / "base.yml"
    base.write_text(
        f"_base_: {tiny_config.name}\n"
        f"evaluate: {{every: 2 steps, demo_val: {demo_world}/val, demo_test: {demo_world}/test,\n"
        f"  num_frames: 4, benchmarks: {{test: {{metadata: {demo_world}/test/hod.csv,"
        f" root: {demo_world}/test/videos}}}}}}\n"
        "train: {duration: 4 steps}\nmodel: {patch_dropout: 0.0}\n"
    )
    study.write_text(
        f"base: base.yml\noutput: {tmp_path}/study\nseeds: [0]\n"
        f"world: {{folder: {demo_world}, scale: 0.03, variant: {{version: 5}}}}\n"
        "rows:\n  four: {title: four frames, overrides: [model.num_frames=4]}\n"
        "  start: {title: what four frames know, start: true, overrides: [model.num_frames=4, "
        f"model.weights.path={tmp_path}/study/final/four-0]}}\n"
        "  both: {title: both paths, overrides: [model.num_frames=8, model.name=DEMO_Slowfast]}\n"
    )
    command = ["tools/ablate.py", "--config_file", study]
    done = program(*command, "--only", "four")
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "study" / "final" / "four-0" / "results.json").stat().st_mtime_ns
    assert (tmp_path / "study" / "final" / "four-0" / "report.html").stat().st_size > 1000
    done = program(*command, "--only", "start,both", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "study" / "final" / "four-0" / "results.json").stat().st_mtime_ns == before
    results = json.loads((tmp_path / "study" / "final.json").read_text())
    assert set(results["rows"]) == {"four", "start", "both"}
    four, start = (results["rows"][name]["seeds"]["0"] for name in ("four", "start"))
    # The same weights, frames and questions.
    assert start["test"] == pytest.approx(four["test"])
    assert start["controls"]["freeze"] == pytest.approx(four["controls"]["freeze"])
    for row in (results["rows"][name] for name in ("four", "both")):
        assert set(row["seeds"]["0"]["val"]) == {"2", "4"}
        assert set(row["seeds"]["0"]["controls"]) == set(CONTROLS)
        assert 0 <= row["seeds"]["0"]["test"]["motion_transient"] <= 100
    study.write_text(study.read_text().replace("model.num_frames=4", "model.num_frames=2"))
    done = program(*command, "--tables")
    assert done.returncode == 2
    assert "four-0: holds a run of another configuration" in done.stderr


def test_a_study_names_its_own_metrics_or_has_those_of_the_demo() -> None:
    assert ablate.read_study(ROOT / "configs" / "ablation_demo.yml").metrics == ablate.METRICS
    study = ablate.read_study(ROOT / "configs" / "ablation_finetune.yml")
    assert set(study.metrics) == {"map", "ndcg", "map_v2t", "map_t2v"}
    assert set(study.chance) == {"map"}


def test_the_text_of_a_study_is_text_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "study.yml"
    path.write_text(
        "base: base.yml\noutput: 2024_01_01\nseeds: [0, 07]\nrows: {on: {title: 1e3, start: yes}, 010: {title: ~x}}\n"
    )
    study = ablate.read_study(path)
    assert (study.output, study.seeds, list(study.rows)) == ("2024_01_01", [0, 7], ["on", "010"])
    assert (study.rows["on"].title, study.rows["on"].start) == ("1e3", True)
