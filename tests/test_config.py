"""Configuration files: what is accepted, and how a mistake is explained."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from egohod.config import Config, load, load_as, load_leniently, model_config, to_yaml
from egohod.errors import UserError
from egohod.evaluation.embed import CONTROLS
from egohod.hod import config as hod
from egohod.knobs import help_text, knob, knobs, part
from egohod.robot import config as robot
from egohod.training.config import duration_in_steps

ROOT = Path(__file__).parents[1]


def write(folder: Path, text: str, name: str = "run.yml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_scientific_notation_is_a_float(tmp_path: Path) -> None:
    assert load(write(tmp_path, "train: {lr: 1e-5}")).train.lr == 1e-5
    assert load(write(tmp_path, "{}"), ["train.lr=3e-4"]).train.lr == 3e-4


# What YAML 1.1 takes for numbers, dates and switches.
GUESSES = [
    *("0123", "12:30:45", "on", "No", "yes", "true", "2024_01_01", "2024-01-01", "1e3", "1_000", "0x1F", "0o17"),
    *(".inf", "1.50", "-7", "+", "=", "<<", "y"),
]


def values(config: object, name: str) -> object:
    """The value of a dotted key, through dataclasses, dicts and lists."""
    for key in name.split("."):
        config = config[key] if isinstance(config, dict) else getattr(config, key)
    return config


@pytest.mark.parametrize("schema", [Config, hod.HodConfig], ids=lambda schema: schema.__name__)
def test_a_text_knob_takes_text_as_it_is_written(schema: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name.replace("NAME", "on"): kind for name, _, kind in knobs(schema)}
    # These were truth values in earlier releases, so all spellings of one are read.
    switches = ("model.compile", "tracks.camera")
    texts = [name for name, kind in kinds.items() if kind in (str, str | None) and name not in switches]
    lists = [name for name, kind in kinds.items() if kind == list[str]]
    maps = [name for name, kind in kinds.items() if kind == dict[str, str]]
    assert len(texts) > 10
    assert lists
    assert maps
    for word in GUESSES:
        lines: dict[str, object] = dict.fromkeys(texts, word) | {name: [word, word] for name in lists}
        lines |= {name: {word: word} if word != "<<" else {} for name in maps}
        config = load_as(schema, write(tmp_path, as_yaml(lines)), [], none)
        for name in lines:
            assert values(config, name) == lines[name]
        assert load_as(schema, write(tmp_path, to_yaml(config), "again.yml"), [], none) == config
    empty, names = write(tmp_path, "{}"), [*texts, *(f"{name}.012" for name in maps)]
    for shift in (0, 7):
        words = {name: GUESSES[(place + shift) % len(GUESSES)] for place, name in enumerate(names)}
        config = load_as(schema, empty, [f"{name}={word}" for name, word in words.items()], none)
        assert {name: values(config, name) for name in names} == words
    for word in ("0123", "on"):
        monkeypatch.setenv("EGO_TEST_WORD", word)
        lines = dict.fromkeys(texts, "${oc.env:EGO_TEST_WORD}")
        config = load_as(schema, write(tmp_path, as_yaml(lines, "'")), [], none)
        assert {values(config, name) for name in texts} == {word}
    config = load_as(schema, empty, [f"{lists[0]}=[no, 1e3, 'null']"], none)
    assert values(config, lists[0]) == ["no", "1e3", "null"]


def none(config: object) -> list[tuple[str, str]]:
    """No complaint, whatever the values are."""
    return []


def as_yaml(lines: dict[str, object], quote: str = "") -> str:
    """Dotted keys as nested sections, every scalar plain or in quotes."""
    tree: dict[str, object] = {}
    for name, value in lines.items():
        *sections, last = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})  # type: ignore[assignment]
        inner[last] = value
    return json.dumps(tree).replace('"', quote)


def test_names_of_sections_are_text_too(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: {on: {root: a}, 2024: {root: b}, null: {columns: {no: ~x}}, 012: {}}}")
    train = load(path, ["data.train.1e3.root=c"]).data.train
    assert list(train) == ["on", "2024", "null", "012", "1e3"]
    assert train["null"].columns == {"no": "~x"}


def test_null_is_no_value_and_a_word_in_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {cache: x}")
    for word in ("null", "~"):
        assert load(write(tmp_path, f"data: {{cache: {word}}}", "null.yml")).data.cache is None
        assert load(path, [f"data.cache={word}"]).data.cache is None
        for quoted in (f"'{word}'", f'"{word}"'):
            assert load(write(tmp_path, f"data: {{cache: {quoted}}}", "null.yml")).data.cache == word
            assert load(path, [f"data.cache={quoted}"]).data.cache == word
    assert load(write(tmp_path, "data:\n  cache:\n", "null.yml")).data.cache is None
    with pytest.raises(UserError, match=r"train\.output.*'null' in quotes"):
        load(path, ["train.output=null"])


def test_text_on_the_command_line_may_hold_what_yaml_reads_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path, "{}")
    for text in ("a: b", "#1", "[x", "{", "- a", "@a", "%", "a #b", "'tis", "*star", "&x", "!tag", ""):
        assert load(path, [f"train.output={text}"]).train.output == text


@pytest.mark.parametrize(("written", "value"), [("1_000", 1000), ("0012", 12), ("'12'", 12), ("+3", 3)])
def test_numbers_and_switches_are_read_tolerantly(written: str, value: int, tmp_path: Path) -> None:
    path = write(tmp_path, f"data: {{workers: {written}, cache_gb: {written}}}")
    assert (load(path).data.workers, load(path).data.cache_gb) == (value, float(value))
    assert load(path, [f"train.seed={written}"]).train.seed == value
    for yes, no in (("true", "false"), ("on", "off"), ("Yes", "NO"), ("y", "n"), ("1", "0")):
        data = load(write(tmp_path, f"data: {{strict: {yes}, pin_memory: {no}}}"), []).data
        assert (data.strict, data.pin_memory) == (True, False)


@pytest.mark.parametrize("written", ["auto", "null"])
def test_the_machine_may_choose_the_number_of_workers(
    written: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(write(tmp_path, f"data: {{workers: {written}}}")).data.workers is None
    assert load(write(tmp_path, "data: {workers: 3}"), [f"data.workers={written}"]).data.workers is None
    assert not caplog.records


def test_yaml_features_that_stay(tmp_path: Path) -> None:
    text = "train: &a {lr: 1e-3, seed: 1}\nmodel: {fast: {slow_frames: 2}}\n"
    assert load(write(tmp_path, "\ufeff" + text)).train.seed == 1
    merged = "data:\n  train:\n    a: &a {root: x, weight: 1}\n    b:\n      <<: *a\n      root: y\n"
    train = load(write(tmp_path, merged)).data.train
    assert [(each.root, each.weight) for each in train.values()] == [("x", 1.0), ("y", 1.0)]


def test_bases_are_merged_deepest_first(tmp_path: Path) -> None:
    write(tmp_path, "train: {lr: 1e-3, seed: 1}\nmodel: {num_frames: 8}", "deep.yml")
    (tmp_path / "sub").mkdir()
    write(tmp_path, "_base_: ../deep.yml\ntrain: {seed: 2}", "sub/middle.yml")
    cfg = load(write(tmp_path, "_base_: sub/middle.yml\nmodel: {num_frames: 16}"), ["train.output=x"])
    assert (cfg.train.lr, cfg.train.seed, cfg.model.num_frames, cfg.train.output) == (1e-3, 2, 16, "x")


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "_base_: run.yml", "other.yml")
    with pytest.raises(UserError, match="leads back"):
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
    with pytest.raises(UserError, match="EGO_B"):
        load(path)


@pytest.mark.parametrize(
    ("text", "override", "expected"),
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
        ("model: {weights: {source: clip}}", None, ["model.weights.path", "model.weights.source=scratch"]),
        ("model: {fast: {spatial: true}, patch_dropout: 0.5}", None, ["model.fast.spatial", "model.patch_dropout=0"]),
        ("loss: {boxes: 1}\ndata: {train: {mine: {root: x}}}", None, ["data.train.mine.detections", "loss.boxes"]),
        (
            "model: {heads: joint}\ndata: {labels: {target: class}}\nloss: {name: classes, opposites: 1}",
            None,
            ["loss.opposites", "model.heads"],
        ),
        ("loss: {separation: 1}\ntrain: {trainable: vision}", None, ["loss.separation", "train.trainable=vision"]),
        (
            "loss: {name: sms, opposites: 1}\ndata: {labels: {target: relevancy}, train: {mine: {opposite_column: x}}}",
            None,
            ["data.train.mine.opposite_column", "data.labels.target=relevancy"],
        ),
        ("train: [", None, ["run.yml", "YAML"]),
        ("train: {seed: 1, seed: 2}", None, ["run.yml", "duplicate key 'seed'"]),
        ("train: {seed: 12:30:45}", None, ["run.yml", "train.seed", "int"]),
        ("train: {seed: 1e3}", None, ["run.yml", "train.seed", "int"]),
        ("train: {? [a] : 1}", None, ["run.yml", "a key must be text"]),
        ("train: &a {betas: *a}", None, ["run.yml", "aliases stand for more"]),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
            None,
            ["aliases stand for more"],
        ),
        ("train: {betas: " + 99 * "[" + 99 * "]" + "}", None, ["run.yml", "nested deeper than 50 levels"]),
        ("data: {train: {a: {root: [b]}}}", None, ["'data.train.a.root' is one value, not a list"]),
        ("evaluate: {controls: [[freeze]]}", None, ["'evaluate.controls[0]' is one value, not a list"]),
        ("{}", "train" + 5000 * ".a" + "=1", ["section.key=value"]),
        ("train: {betas: " + 3000 * "[" + 3000 * "]" + "}", None, ["run.yml"]),
        ("- a", None, ["run.yml", "mapping"]),
        ("{}", "train.lr", ["section.key=value"]),
        ("train: {betas: [0.9]}", None, ["train.betas", "two numbers"]),
        ("{}", "train.lr=nan", ["train.lr", "finite"]),
        ("{}", "train.seed=99999999999999999999999", ["train.seed", "at most"]),
        ("train: {duration: 1e400 steps}", None, ["train.duration", "too long"]),
        ("_base_: {a: b}", None, ["_base_", "name of a config file"]),
        ("data: {labels: {target: relevancy}}", None, ["loss.name=infonce ignores relevancy", "sms"]),
        ("loss: {name: sms}", None, ["loss.name=sms grades texts by relevancy", "data.labels.target=relevancy"]),
        ("data: {labels: {columns: []}}", None, ["data.labels.columns", "is empty"]),
        ("data: {labels: {columns: [verb, verb_class]}}", None, ["data.labels.columns", "twice"]),
        ("data: {labels: {columns: [verb, action]}}", None, ["data.labels.columns", "called action"]),
        ("evaluate: {demo_val: x, best: test/map}", None, ["evaluate.best=test/map", "set evaluate.best=val/METRIC"]),
        ("data: {workers: '${oc.env:EGO_UNSET_NUMBER}'}", None, ["data.workers", "EGO_UNSET_NUMBER"]),
    ],
)
def test_a_mistake_gets_one_line_with_file_key_and_cure(
    tmp_path: Path, text: str, override: str | None, expected: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text), [override] if override else [])
    assert "\n" not in str(caught.value)
    for words in expected:
        assert words in str(caught.value)


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
    with pytest.raises(UserError, match=r"demos\.yml: no such config file; did you mean .*demo\.yml"):
        load(tmp_path / "demos.yml")


@pytest.mark.parametrize(
    ("text", "steps"),
    [("7 steps", 7), ("1 step", 1), ("1.5 epochs", 15), ("4e3 samples", 40), ("0.001 epochs", 1), ("0 steps", 0)],
)
def test_durations(text: str, steps: int) -> None:
    assert duration_in_steps(text, steps_per_epoch=10, global_batch_size=100) == steps


def test_every_knob_has_a_reason_and_stands_in_the_help() -> None:
    text = help_text(Config)
    for name, entry, _ in knobs(Config):
        assert entry.metadata["why"], name
        assert f"  {name}=" in text


def test_the_written_config_reads_back_as_the_same_run(tmp_path: Path) -> None:
    source = "data: {train: {own: {weight: 2, columns: {text: t}}}}"
    cfg = load(write(tmp_path, f"train: {{lr: 1e-5, clip_norm: 1.0}}\n{source}"))
    assert load(write(tmp_path, to_yaml(cfg), "again.yml")) == cfg


def test_shipped_configs_are_valid_and_name_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted((ROOT / "configs").rglob("*.yml"))
    assert len(paths) >= 5
    for path in paths:
        if path.name.startswith("ablation_"):  # a study of many runs, see tests/tools/test_ablate.py
            continue
        names = "EGO4D_ROOT HOWTO_ROOT HOD_CSV CLIP_WEIGHTS CLIPS VIDEOS DUAL_ENCODER START_WEIGHTS LABELS TEST_LABELS"
        names += " EK100_ANNOTATIONS EK100_VIDEOS EGTEA_ANNOTATIONS EGTEA_VIDEOS CHARADES_ANNOTATIONS CHARADES_VIDEOS"
        for variable in names.split():
            monkeypatch.setenv(variable, "/somewhere")
        {"hod": hod.load, "robot": robot.load}.get(path.parent.name, load)(path)  # raises what is wrong with it
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
        assert cfg.model.activation_of(cfg.model.geometry()) == "gelu"
        assert (cfg.model.num_frames, cfg.data.crop_scale_min) == (4, 0.5)


def test_sources_have_names_of_the_users_choice(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: {a: {metadata: a.csv, weight: 1}}}")
    train = load(path, ["data.train.b.metadata=b.csv", "data.train.b.weight=0.5"]).data.train
    assert [(name, source.metadata, source.weight) for name, source in train.items()] == [
        ("a", "a.csv", 1.0),
        ("b", "b.csv", 0.5),
    ]
    for override, expected in {
        "data.train.a.metadat=x": "unknown key 'data.train.a.metadat'; did you mean 'data.train.a.metadata'",
        "data.train.a=3": "'data.train.a' is a section",
        "data.train=3": "'data.train' holds sections with names of your choice",
        "data.train.a.layout=chunk": "did you mean chunks?",
        "data.train.a.chunk_seconds=long": "key data.train.a.chunk_seconds: float, above 0",
        "data.train.b.metadata=b.csv": "data.train.b.weight is not set",
    }.items():
        with pytest.raises(UserError, match=re.escape(expected)):
            load(path, [override])


def test_temporal_controls_are_checked_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path, "{}")
    assert load(path, ["evaluate.controls=[freeze,shuffle]"]).evaluate.controls == ["freeze", "shuffle"]
    with pytest.raises(UserError, match=r"evaluate.controls .* one of shuffle, reverse, freeze; did you mean freeze"):
        load(path, ["evaluate.controls=[shuffle,frozen]"])
    with pytest.raises(UserError, match=r"model\.num_frames is 1"):
        load(path, ["evaluate.controls=[reverse]", "model.num_frames=1"])


def test_every_temporal_control_is_accepted() -> None:
    choices = {name: field.metadata["choices"] for name, field, _ in knobs(Config)}
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


def test_aliases_of_aliases_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    for text in ("\n".join(lines), "a: &a [*a]"):
        with pytest.raises(UserError, match=r"run\.yml: not readable as YAML: its aliases stand for more than 100,000"):
            load(write(tmp_path, text))
    assert load(write(tmp_path, "train: {betas: &b [0.9, 0.95]}\nevaluate: {final: []}")).train.betas == [0.9, 0.95]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {betas: {a: 0.9}}", "'train.betas' is a list, such as [a, b], not a dict"),
        ("data: {train: {a: {columns: [b]}}}", "'data.train.a.columns' is a mapping, such as {a: b}, not a list"),
        ("data: {hard_negatives: {group_by: [{a: video}]}}", "data.hard_negatives.group_by[0]"),
        ("data: {train: {a: {columns: {text: {b: c}}}}}", "'data.train.a.columns.text' is one value, not a dict"),
    ],
)
def test_lists_and_mappings_are_what_their_knob_is(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.b", "../a", "a/b", "", "a\nb"])
def test_a_name_of_ones_choice_cannot_be_a_path(tmp_path: Path, name: str) -> None:
    text = yaml.safe_dump({"data": {"train": {name: {"metadata": "x.csv"}}}})
    with pytest.raises(UserError, match=r"'data\.train' has the name '.*'; use letters, digits"):
        load(write(tmp_path, text))
    assert "my set-1 é" in load(write(tmp_path, "data: {train: {my set-1 é: {metadata: x.csv}}}")).data.train


@dataclass
class Renamed:
    """A section of which one key and one value have changed since the last release."""

    kind: str = knob("custom", "a renamed value")
    seconds: float = knob(1.0, "a renamed key")

    @staticmethod
    def convert_old_keys(section: dict[str, Any], below: dict[str, Any]) -> list[tuple[str, str]]:
        renamed = []
        if section.get("kind") == "own":
            section["kind"] = "custom"
            renamed.append(("inner.kind=own", "custom"))
        if "minutes" in section:
            section["seconds"] = float(section.pop("minutes")) * 60 + below["seconds"]
            renamed.append(("inner.minutes", "inner.seconds"))
        return renamed


@dataclass
class Outer:
    """A schema."""

    inner: Renamed = part(Renamed)


def test_keys_and_values_of_the_last_release_are_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "{inner: {kind: own, minutes: 3}}")
    config = load_as(Outer, path, ["inner.minutes=2"], none)
    # The override's 120 seconds come on top of the file's 180 and the default's 1.
    assert config.inner == Renamed("custom", 301.0)
    notices = [record.getMessage() for record in caplog.records]
    assert f"{path}: inner.minutes is now inner.seconds; the old name is read for one more release" in notices
    assert f"{path}: inner.kind=own is now custom; the old name is read for one more release" in notices
    assert any(notice.startswith("override 'inner.minutes=2': inner.minutes is now") for notice in notices)
    assert len(notices) == 3
    caplog.clear()
    assert load_as(Outer, write(tmp_path, "{inner: {seconds: 1}}"), [], none) == Outer()
    assert not caplog.records


def test_a_benchmark_of_the_former_kind_own_is_custom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "evaluate: {benchmarks: {mine: {kind: own, metadata: a.csv, root: b}}}")
    assert load(path).evaluate.benchmarks["mine"].kind == "custom"
    assert load(path, ["evaluate.benchmarks.mine.kind=own"]).evaluate.benchmarks["mine"].kind == "custom"
    assert "evaluate.benchmarks.mine.kind=own is now custom" in caplog.text


def test_settings_are_read_without_pytorch() -> None:
    """Tools that need no model start at once."""
    code = "import sys, egohod.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_folders_of_demo_worlds_become_benchmarks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As configurations of earlier releases name them."""
    (tmp_path / "old.yml").write_text("evaluate: {demo_val: d/val, demo_test: d/test, final: [mine]}\n")
    mine = ["evaluate.benchmarks.mine.metadata=m", "evaluate.benchmarks.mine.root=r"]
    cfg = load(tmp_path / "old.yml", mine).evaluate
    assert (cfg.during, cfg.final, cfg.best) == (["val"], ["test", "mine"], "val/choice_across_clips")
    val = cfg.benchmarks["val"]
    assert (val.kind, val.metadata, val.root) == ("custom", "d/val/hod.csv", "d/val/videos")
    assert (val.layout, val.protocol) == ("chunks", "as_trained")
    assert val.metric_names == load(ROOT / "configs" / "demo.yml").evaluate.benchmarks["val"].metric_names
    cfg = load(tmp_path / "old.yml", [*mine, "evaluate.demo_val=null", "evaluate.demo_test=null"]).evaluate
    assert (cfg.during, cfg.final) == ([], ["mine"])
    assert "evaluate.demo_val is now evaluate.benchmarks.val and evaluate.during" in caplog.text


def test_the_timeout_of_the_former_monitor_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It bounded silence between processes; as the limit of a collective, 120 s would end runs that are saving."""
    (tmp_path / "old.yml").write_text("train: {peer_timeout: 120}\n")
    assert load(tmp_path / "old.yml", ["train.peer_timeout=60"]).train.collective_timeout == 1800
    assert "train.peer_timeout is now train.collective_timeout, which is longer" in caplog.text


def test_gradient_checkpointing_is_all_blocks_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As configurations of earlier releases have it, where it and compile were truth values."""
    (tmp_path / "old.yml").write_text("model: {gradient_checkpointing: true, compile: True}\n")
    model = load(tmp_path / "old.yml").model
    assert (model.checkpoint_blocks, model.compile) == ("all", "true")
    assert load(tmp_path / "old.yml", ["model.gradient_checkpointing=no"]).model.checkpoint_blocks == "none"
    assert model_config("DEMO", gradient_checkpointing=True).checkpoint_blocks == "all"
    assert "model.gradient_checkpointing is now model.checkpoint_blocks" in caplog.text
    assert load(tmp_path / "old.yml", ["model.checkpoint_blocks=3"]).model.checkpoint_blocks == "3"
    for change in (
        "model.checkpoint_blocks=some",
        "model.checkpoint_blocks=-1",
        "model.gradient_checkpointing=perhaps",
    ):
        with pytest.raises(
            UserError, match=r"model.checkpoint_blocks is '.*', but must be auto, all, none or a number"
        ):
            load(tmp_path / "old.yml", [change])
