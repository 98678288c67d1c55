"""Configuration files: what is accepted, and how a mistake is explained."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import yaml

from egohod.config import ConfigError, UserError, duration_in_steps, help_text, knobs, load, load_leniently, to_yaml
from egohod.evaluation.temporal import CONTROLS
from egohod.hod import config as hod

ROOT = Path(__file__).parents[1]


def write(folder: Path, text: str, name: str = "run.yml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_scientific_notation_is_a_float(tmp_path: Path) -> None:
    assert load(write(tmp_path, "train: {lr: 1e-5}")).train.lr == 1e-5
    assert load(write(tmp_path, "{}"), ["train.lr=3e-4"]).train.lr == 3e-4


def test_bases_are_merged_deepest_first(tmp_path: Path) -> None:
    write(tmp_path, "train: {lr: 1e-3, seed: 1}\nmodel: {num_frames: 8}", "deep.yml")
    (tmp_path / "sub").mkdir()
    write(tmp_path, "_base_: ../deep.yml\ntrain: {seed: 2}", "sub/middle.yml")
    cfg = load(write(tmp_path, "_base_: sub/middle.yml\nmodel: {num_frames: 16}"), ["train.output=x"])
    assert (cfg.train.lr, cfg.train.seed, cfg.model.num_frames, cfg.train.output) == (1e-3, 2, 16, "x")


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "_base_: run.yml", "other.yml")
    with pytest.raises(ConfigError, match="leads back"):
        load(write(tmp_path, "_base_: other.yml"))


def test_interpolation_reads_keys_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGO_TEST_ROOT", "/data/ego")
    path = write(
        tmp_path, "data: {train: {own: {root: '${oc.env:EGO_TEST_ROOT}/v', metadata: '${data.train.own.root}/x.csv'}}}"
    )
    source = load(path).data.train["own"]
    assert (source.root, source.metadata) == ("/data/ego/v", "/data/ego/v/x.csv")


def test_every_missing_variable_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EGO_A", "EGO_B"):
        monkeypatch.delenv(name, raising=False)
    path = write(tmp_path, "data: {train: {a: {root: '${oc.env:EGO_A}', dataset_roots: {ego4d: '${oc.env:EGO_B}'}}}}")
    cfg, problems = load_leniently(path)
    assert cfg.data.train["a"].root == "$EGO_A"
    assert len(problems) == 2
    assert "data.train.a.root" in problems[0]
    assert "EGO_A" in problems[0]
    assert "data.train.a.dataset_roots.ego4d" in problems[1]
    with pytest.raises(ConfigError, match="EGO_B"):
        load(path)


@pytest.mark.parametrize(
    ("text", "override", "said"),
    [
        ("{}", "train.lrr=1", ["override 'train.lrr=1'", "unknown key 'train.lrr'", "train.lr'"]),
        ("train: {warm_up: 3 steps}", None, ["run.yml", "train.warm_up", "did you mean 'train.warmup'"]),
        ("modle: {}", None, ["run.yml", "'modle'", "model"]),
        ("train: {seed: abc}", None, ["run.yml", "train.seed", "int"]),
        ("train: {lr: -1}", None, ["run.yml", "train.lr", "above 0"]),
        ("{}", "train.lr=0", ["override 'train.lr=0'", "above 0"]),
        ("model: {name: CLIP_VITB}", None, ["model.name", "CLIP_VITB16", "did you mean"]),
        ("train: 5", None, ["'train' is a section"]),
        ("train: {duration: 5 parsecs}", None, ["train.duration", "epochs"]),
        ("train: {save_every: 0 steps}", None, ["train.save_every", "longer"]),
        ("loss: {gather_with_grad: false}", None, ["loss.gather_with_grad", "biased"]),
        ("train: {schedule: cosine, lr: 1e-6, lr_end: 1e-5}", None, ["train.lr_end", "at most"]),
        ("model: {weights: {source: clip}}", None, ["model.weights.path"]),
        ("model: {fast: {spatial: true}, patch_dropout: 0.5}", None, ["model.fast.spatial", "model.patch_dropout=0"]),
        ("loss: {boxes: 1}\ndata: {train: {mine: {root: x}}}", None, ["data.train.mine.detections", "loss.boxes"]),
        ("train: [", None, ["run.yml", "YAML"]),
        ("train: {seed: 1, seed: 2}", None, ["run.yml", "seed"]),
        ("- a", None, ["run.yml", "mapping"]),
        ("{}", "train.lr", ["section.key=value"]),
        ("train: {betas: [0.9]}", None, ["train.betas", "two numbers"]),
        ("{}", "train.lr=nan", ["train.lr", "finite"]),
        ("{}", "train.seed=99999999999999999999999", ["train.seed", "at most"]),
        ("train: {duration: 1e400 steps}", None, ["train.duration", "too long"]),
        ("_base_: 5", None, ["_base_", "name of a config file"]),
        ("data: {labels: {target: relevancy}}", None, ["loss.name=infonce knows no relevancy", "sms"]),
        ("loss: {name: sms}", None, ["loss.name=sms grades texts by relevancy", "data.labels.target=relevancy"]),
        ("data: {labels: {columns: []}}", None, ["data.labels.columns", "is empty"]),
        ("data: {labels: {columns: [verb, verb_class]}}", None, ["data.labels.columns", "twice"]),
        ("data: {labels: {columns: [verb, action]}}", None, ["data.labels.columns", "called action"]),
        ("evaluate: {demo_val: x, best: test/map}", None, ["evaluate.best=test/map", "set evaluate.best=val/METRIC"]),
        ("data: {workers: '${oc.env:EGO_UNSET_NUMBER}'}", None, ["data.workers", "EGO_UNSET_NUMBER"]),
    ],
)
def test_a_mistake_gets_one_line_with_file_key_and_cure(
    tmp_path: Path, text: str, override: str | None, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), [override] if override else [])
    assert "\n" not in str(caught.value)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "finetune").glob("[!d]*.yml")), ids=lambda path: path.stem)
def test_a_recipe_names_every_variable_that_it_needs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe in path.parent.glob("*.yml"):
        for name in re.findall(r"oc\.env:(\w+)}", recipe.read_text()):
            monkeypatch.delenv(name, raising=False)
    _, problems = load_leniently(path)
    assert any("model.weights.path needs the environment variable START_WEIGHTS" in text for text in problems)
    assert len(problems) >= 3


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "{}", "demo.yml")
    with pytest.raises(ConfigError, match=r"demos\.yml: no such config file; did you mean .*demo\.yml"):
        load(tmp_path / "demos.yml")


@pytest.mark.parametrize(
    ("text", "steps"),
    [("7 steps", 7), ("1 step", 1), ("1.5 epochs", 15), ("4e3 samples", 40), ("0.001 epochs", 1), ("0 steps", 0)],
)
def test_durations(text: str, steps: int) -> None:
    assert duration_in_steps(text, steps_per_epoch=10, global_batch_size=100) == steps


def test_every_knob_has_a_reason_and_stands_in_the_help() -> None:
    text = help_text()
    for name, entry, _ in knobs():
        assert entry.metadata["why"], name
        assert f"  {name}=" in text


def test_the_written_config_reads_back_as_the_same_run(tmp_path: Path) -> None:
    source = "data: {train: {own: {weight: 2, columns: {text: t}}}}"
    cfg = load(write(tmp_path, f"train: {{lr: 1e-5, clip_norm: 1.0}}\n{source}"))
    assert load(write(tmp_path, to_yaml(cfg), "again.yml")) == cfg


def test_shipped_configs_are_valid_and_say_how_to_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted((ROOT / "configs").rglob("*.yml"))
    assert len(paths) >= 5
    for path in paths:
        if path.name.startswith("ablation_"):  # a study of many runs, see tests/test_ablate.py
            continue
        names = "EGO4D_ROOT HOWTO_ROOT HOD_CSV CLIP_WEIGHTS CLIPS VIDEOS DUAL_ENCODER START_WEIGHTS LABELS TEST_LABELS"
        names += " EK100_ANNOTATIONS EK100_VIDEOS EGTEA_ANNOTATIONS EGTEA_VIDEOS CHARADES_ANNOTATIONS CHARADES_VIDEOS"
        for variable in names.split():
            monkeypatch.setenv(variable, "/somewhere")
        (hod.load if path.parent.name == "hod" else load)(path)  # raises what is wrong with it
        header = path.read_text().splitlines()[:8]
        for word in ("Command:", "Hardware:", "Time:", "Result:"):
            assert any(line.startswith("#") and word in line for line in header), f"{path}: no '{word}' on top"
        for value in yaml.safe_load(path.read_text()).values():
            assert "'/" not in str(value), f"{path}: absolute path"


def test_published_recipe() -> None:
    """SPEC of the released configs: lr, batch, epochs, constant schedule, fixed temperature."""
    for name, lr, batch in (("default_clip_base", 4e-5, 2048), ("default_clip_large", 1e-5, 128)):
        cfg, _ = load_leniently(ROOT / "configs" / f"{name}.yml")
        assert (cfg.train.lr, cfg.train.global_batch_size, cfg.train.duration) == (lr, batch, "15 epochs")
        assert (cfg.train.schedule, cfg.train.clip_norm, cfg.train.warmup) == ("constant", None, "0 steps")
        assert (cfg.loss.temperature, cfg.loss.learn_temperature) == (0.07, False)
        assert (cfg.train.betas, cfg.train.weight_decay) == ([0.9, 0.999], 0.01)
        assert (cfg.model.num_frames, cfg.model.activation, cfg.data.crop_scale_min) == (4, "gelu", 0.5)


def test_sources_have_names_of_the_users_choice(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: {a: {metadata: a.csv, weight: 1}}}")
    train = load(path, ["data.train.b.metadata=b.csv", "data.train.b.weight=0.5"]).data.train
    assert [(name, source.metadata, source.weight) for name, source in train.items()] == [
        ("a", "a.csv", 1.0),
        ("b", "b.csv", 0.5),
    ]
    for override, said in {
        "data.train.a.metadat=x": "unknown key 'data.train.a.metadat'; did you mean 'data.train.a.metadata'",
        "data.train.a=3": "'data.train.a' is a section",
        "data.train=3": "'data.train' holds sections with names of your choice",
        "data.train.a.layout=chunk": "did you mean chunks?",
        "data.train.a.chunk_seconds=long": "key data.train.a.chunk_seconds: float, above 0",
        "data.train.b.metadata=b.csv": "data.train.b.weight is not set",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            load(path, [override])


def test_temporal_controls_are_checked_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path, "{}")
    assert load(path, ["evaluate.controls=[freeze,shuffle]"]).evaluate.controls == ["freeze", "shuffle"]
    with pytest.raises(ConfigError, match=r"evaluate.controls .* one of shuffle, reverse, freeze; did you mean freeze"):
        load(path, ["evaluate.controls=[shuffle,frozen]"])
    with pytest.raises(ConfigError, match=r"model\.num_frames is 1"):
        load(path, ["evaluate.controls=[reverse]", "model.num_frames=1"])


def test_every_temporal_control_can_be_asked_for() -> None:
    choices = {name: field.metadata["choices"] for name, field, _ in knobs()}
    assert choices["evaluate.controls"] == tuple(CONTROLS)


def test_a_message_is_one_bounded_line_whatever_it_quotes() -> None:
    for quoted in ("two\nlines", "u\u2028v", "\x1b[31mred", "\ud800", "A" * 5000, "many words " * 900, "\0"):
        text = str(UserError(f"clips.csv: row 3: text is '{quoted}', not a narration"))
        assert text.startswith("clips.csv: row 3: text is '")
        assert text.endswith("', not a narration")
        assert text.isprintable()
        assert len(text) <= 1000
    assert str(UserError("first: é 物", "second")) == "first: é 物\nsecond"
    assert str(pickle.loads(pickle.dumps(UserError("a\nb", "c")))) == "a\\nb\nc"
