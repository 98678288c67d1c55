"""Fine-tuning from annotation files to the report, and the errors for labels that cannot be learned from."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import main_eval
from egohod.config import Config, load
from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.data.labels import ClassLabels, ClassSpace, RelevantTexts, class_space
from egohod.data.table import ClipTable
from egohod.demo.world import NOUNS
from egohod.demo.write import write_benchmarks
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.embed import ClassProbabilities
from egohod.evaluation.tasks import ClassificationTask, head_tasks
from egohod.loss.classification import ClassificationLoss
from egohod.loss.config import LossConfig
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import create_model
from egohod.training.build import build_labels
from egohod.training.checkpoint import open_weights
from egohod.training.config import TrainConfig
from egohod.training.step import ClipMixer, TrainStep
from tests.ranks import finish
from tests.support import Command, ShortRun, losses, newest


@pytest.fixture(scope="module")
def ek100(demo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo world in EPIC-KITCHENS' formats, in a copy of its own."""
    copy = tmp_path_factory.mktemp("formats") / "world"
    shutil.copytree(demo_world, copy)
    write_benchmarks(copy)
    return copy / "test" / "benchmarks" / "ek100"


def table(path: Path) -> ClipTable:
    return read_clips(SourceConfig(metadata=str(path)))


def test_texts_are_drawn_by_relevancy(ek100: Path) -> None:
    clips = table(ek100 / "EPIC_100_train.csv")
    labels = RelevantTexts(clips, 0.1)
    rng = np.random.default_rng(0)
    relevancy = labels.relevancy([3])[0]
    drawn = [labels.draw(3, rng) for _ in range(300)]
    assert {text for text, _ in drawn} == {labels.texts[i] for i in np.flatnonzero(relevancy > 0.1)}
    assert clips.row(3).texts[0] in {text for text, _ in drawn}
    for text, values in drawn[:20]:
        verbs = values["clip_verbs"] == values["text_verbs"]
        nouns = values["clip_nouns"] @ values["text_nouns"]
        # In this world a clip has one noun.
        assert relevancy[labels.texts.index(text)] == (float(verbs) + float(nouns)) / 2
    strict = RelevantTexts(clips, 0.9)
    assert {strict.draw(3, rng)[0] for _ in range(50)} == {clips.row(3).texts[0]}


def test_a_sentence_csv_names_classes_itself_or_through_its_clips(ek100: Path, tmp_path: Path) -> None:
    clips = pd.read_csv(ek100 / "EPIC_100_train.csv", dtype=str).drop_duplicates("narration")
    (texts := clips[["narration_id", "narration"]]).to_csv(tmp_path / "ids.csv", index=False)
    texts.assign(verb_class=clips["verb_class"], noun_classes=clips["all_noun_classes"]).to_csv(
        tmp_path / "classes.csv", index=False
    )
    both = [
        RelevantTexts(table(ek100 / "EPIC_100_train.csv"), 0.1, str(tmp_path / name))
        for name in ("ids.csv", "classes.csv")
    ]
    np.testing.assert_array_equal(*(each.relevancy(range(9)) for each in both))
    texts.assign(narration_id="nowhere_" + texts["narration_id"]).to_csv(tmp_path / "ids.csv", index=False)
    with pytest.raises(UserError, match=r"ids\.csv: row 1: narration_id 'nowhere_"):
        RelevantTexts(table(ek100 / "EPIC_100_train.csv"), 0.1, str(tmp_path / "ids.csv"))


@pytest.mark.parametrize("with_classes", [False, True])
def test_a_sentence_is_the_narration_that_its_id_names(ek100: Path, tmp_path: Path, with_classes: bool) -> None:
    """EPIC_100_retrieval_train_sentence.csv, too, has texts beside the id of a neighbouring row."""
    clips = pd.read_csv(ek100 / "EPIC_100_train.csv", dtype=str).drop_duplicates("narration")
    rows = clips[["narration_id"]].assign(narration=np.roll(clips["narration"].to_numpy(), 1))
    if with_classes:
        rows = rows.assign(verb_class=clips["verb_class"], noun_classes=clips["all_noun_classes"])
    rows.to_csv(tmp_path / "sentences.csv", index=False)
    labels = RelevantTexts(table(ek100 / "EPIC_100_train.csv"), 0.1, str(tmp_path / "sentences.csv"))
    assert labels.texts == clips["narration"].tolist()


def test_a_clip_without_a_relevant_text_is_named(ek100: Path, tmp_path: Path) -> None:
    clips = pd.read_csv(ek100 / "EPIC_100_train.csv", dtype=str)
    alone = clips.assign(noun_classes=clips["all_noun_classes"]).drop_duplicates("narration")
    alone = alone[alone["verb_class"] != clips["verb_class"][0]]
    alone = alone[alone["all_noun_classes"] != clips["all_noun_classes"][0]]
    alone.to_csv(tmp_path / "sentences.csv", index=False)
    with pytest.raises(UserError, match=r"EPIC_100_train\.csv: row 1: no text is relevant"):
        RelevantTexts(table(ek100 / "EPIC_100_train.csv"), 0.1, str(tmp_path / "sentences.csv"))
    clips.drop(columns="verb_class").to_csv(tmp_path / "plain.csv", index=False)
    with pytest.raises(UserError, match=r"plain\.csv: data\.labels\.target=relevancy needs the column 'verb_class'"):
        RelevantTexts(table(tmp_path / "plain.csv"), 0.1)


@pytest.fixture
def mir(ek100: Path, demo_world: Path, short_run: ShortRun, tmp_path: Path) -> list[str]:
    """A command that fine-tunes the short run's model for retrieval, four steps of eight clips."""
    path = tmp_path / "mir.yml"
    path.write_text(
        f"""
model:
  {{name: DEMO, num_frames: 5, activation: quick_gelu, weights: {{source: checkpoint, path: {short_run.folder}}}}}
data:
  train: {{demo: {{metadata: {ek100}/EPIC_100_train.csv, root: {demo_world}/train/videos}}}}
  labels: {{target: relevancy}}
  workers: 0
loss: {{name: sms}}
train:
  {{output: {tmp_path}/run, duration: 4 steps, global_batch_size: 8, precision: fp32, lr: 1e-4, log_every: 1 steps,
    save_every: 1000 steps}}
evaluate:
  benchmarks: {{mir: {{kind: ek100_mir, metadata: {ek100}, root: {demo_world}/test/videos}}}}
  num_frames: 5
  final: [mir]
  every: 1000 steps
"""
    )
    return ["--config_file", str(path)]


def test_retrieval_from_the_csv_to_the_report(mir: list[str], tmp_path: Path, inside: Command) -> None:
    done = inside("main_finetune.py", *mir)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert 0 < metrics["mir/map"] <= 100
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    chunks = inside("main_finetune.py", *mir, "train.max_batch_per_process=4", f"train.output={tmp_path}/chunks")
    assert chunks.returncode == 0, chunks.stderr
    # The loss over all clips of the batch does not depend on how many are held at a time.
    assert losses(tmp_path / "chunks")[0][1] == pytest.approx(losses(tmp_path / "run")[0][1], abs=1e-5)


def test_a_run_to_start_from_brings_its_model(short_run: ShortRun, tmp_path: Path, inside: Command) -> None:
    """The configuration has other frames and another activation, and starts from scratch."""
    command = [*short_run.command[:2], "train.global_batch_size=4", f"train.output={tmp_path}/run"]
    done = inside("main_finetune.py", *command, "--checkpoint", str(short_run.folder), "train.duration=1 steps")
    assert done.returncode == 0, done.stderr
    model = load(tmp_path / "run" / "config.yml").model
    assert (model.num_frames, model.activation, model.patch_dropout) == (5, "quick_gelu", 0.25)
    assert (model.weights.source, model.weights.path) == ("checkpoint", str(short_run.folder))
    done = inside("main_finetune.py", *command, "--checkpoint", f"{tmp_path}/none")
    assert done.returncode == 2
    assert "error: " in done.stderr


def test_a_relevancy_loss_needs_relevancies(mir: list[str], inside: Command) -> None:
    done = inside("main_finetune.py", *mir, "data.labels.target=narration")
    assert done.returncode == 2
    assert "needs data.labels.target=relevancy" in done.stderr
    done = inside("main_finetune.py", *mir, "evaluate.final=[mri]")
    assert "evaluate.final names the benchmark 'mri'" in done.stderr


def classes(mir: list[str], *columns: str, heads: str = "joint") -> list[str]:
    """The same command for action classes."""
    return [
        *mir,
        *("loss.name=classes", "data.labels.target=class", f"data.labels.columns=[{','.join(columns)}]"),
        *(f"model.heads={heads}", "evaluate.benchmarks.mir.kind=ek100_cls", "data.flip=0"),
    ]


@pytest.mark.parametrize(
    ("heads", "recipe"),
    [
        ("joint", ["train.optimizer=sgd", "train.mixup=0.8", "train.cutmix=1.0", "loss.label_smoothing=0.1"]),
        ("parts", ["train.ema=0.9", "train.layer_decay=0.7", "model.head_dropout=0.5", "model.drop_path=0.1"]),
        ("all", ["train.ema=0.9", "train.mixup=0.8"]),
    ],
)
def test_classification_from_the_csv_to_the_report(
    mir: list[str], ek100: Path, tmp_path: Path, inside: Command, heads: str, recipe: list[str]
) -> None:
    command = classes(mir, "verb_class", "noun_class", heads=heads)
    further = f"data.labels.classes=[{ek100}/EPIC_100_validation.csv]"
    done = inside("main_finetune.py", *command, *recipe, further, "train.max_batch_per_process=4")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    for name in ("action_top1", "action_top5", "verb_top1", "noun_top1", "action_mean_class"):
        assert 0 <= metrics[f"mir/{name}"] <= 100
    for line in ("M parameters", "textual blocks", "heads"):
        assert line in done.stderr
    last = newest(tmp_path / "run")
    assert last.manifest["identity"]["data.labels.columns"] == ["verb_class", "noun_class"]
    trained = {"joint": ["action"], "parts": ["noun", "verb"], "all": ["action", "noun", "verb"]}[heads]
    assert sorted(name.split(".")[1] for name in last.weights if re.fullmatch(r"heads\..*\.weight", name)) == trained
    again = inside("main_finetune.py", *command, *recipe, further, "train.max_batch_per_process=4")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"] == metrics


def test_heads_labels_and_loss_go_together(mir: list[str], inside: Command) -> None:
    for override, expected in (
        ("model.heads=joint", "go together"),
        ("model.heads=all", "model.heads=all needs several data.labels.columns"),
        ("train.mixup=0.8", "mixes labels"),
        ("train.trainable=heads", "needs heads to train"),
    ):
        done = inside("main_finetune.py", *mir, override)
        assert done.returncode == 2
        assert expected in done.stderr


def labelled(folder: Path, labels: list[str], columns: str = "video,start,end,label") -> Path:
    path = folder / "labels.csv"
    rows = [f"clip,{i},{i + 2},{label}" for i, label in enumerate(labels)]
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def space_of(path: Path, *columns: str, further: tuple[str, ...] = ()) -> ClassSpace:
    return class_space([table(path)], columns or ("label",), further)


def test_own_labels_are_classes_in_order(tmp_path: Path) -> None:
    space = space_of(labelled(tmp_path, ["pour", "cut", "pour", "10", "9"]))
    assert space.names == ("9", "10", "cut", "pour")
    labels = ClassLabels(table(tmp_path / "labels.csv"), space, "joint")
    text, values = labels.draw(1, np.random.default_rng(0))
    assert text == "cut"
    assert values["action_label"] == 2


def test_verb_and_noun_are_marginals(ek100: Path) -> None:
    space = class_space([table(ek100 / "EPIC_100_train.csv")], ["verb_class", "noun_class"])
    verbs, code = space.parts["verb"]
    assert space.heads("joint") == {"action": len(space.keys)}
    assert space.heads("parts") == {"verb": len(verbs), "noun": len(space.parts["noun"][0])}
    assert space.heads("all") == space.heads("joint") | space.heads("parts")
    labels = ClassLabels(table(ek100 / "EPIC_100_train.csv"), space, "all").draw(0, np.random.default_rng(0))[1]
    assert verbs[labels["verb_label"]] == space.keys[labels["action_label"]][0]
    assert all(verbs[code[i]] == key[0] for i, key in enumerate(space.keys))
    more = class_space([table(ek100 / "EPIC_100_train.csv")], space.columns, [str(ek100 / "EPIC_100_validation.csv")])
    assert set(space.keys) <= set(more.keys)
    assert {name.split()[-1] for name in more.names} <= set(NOUNS)


def test_labels_that_cannot_be_learned_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"labels\.csv: all clips are of one class, 'cut'"):
        space_of(labelled(tmp_path, ["cut", "cut"]))
    with pytest.raises(UserError, match=r"labels\.csv: no column 'verb_class' for data\.labels\.columns"):
        space_of(labelled(tmp_path, ["cut", "pour"]), "verb_class")
    with pytest.raises(UserError, match=r"labels\.csv: unknown column 'weight'"):
        table(labelled(tmp_path, ["cut,1", "pour,2"], "video,start,end,label,weight"))
    space_of(labelled(tmp_path, ["1", "2", "5"]))
    assert "the ids run from 1 to 5, but 2 of them never occur, such as 3" in caplog.text
    (tmp_path / "more.csv").write_text("label\ncut\nstir\n")
    space = space_of(labelled(tmp_path, ["cut", "pour"]), further=(str(tmp_path / "more.csv"),))
    assert "1 of 3 classes have no training clip, such as 'stir'" in caplog.text
    with pytest.raises(UserError, match="class 'boil' has no training clip"):
        space.number(("boil",), "here")


def test_columns_by_whose_name_no_head_can_be_called() -> None:
    space = ClassSpace(("type",), (("1",), ("2",)), ("1", "2"))
    assert space.heads("joint") == {"action": 2}
    with pytest.raises(UserError, match="no head can be called 'type'"):
        space.heads("parts")
    with pytest.raises(UserError, match=r"no head can be called 'a\.b'"):
        ClassSpace(("a.b",), (("1",), ("2",)), ("1", "2")).heads("joint")


def test_heads_are_measured_on_classes_of_the_same_columns(ek100: Path) -> None:
    train = table(ek100 / "EPIC_100_train.csv")
    keys = [("0", "1"), ("2", "3")]
    task = ClassificationTask(
        "action", ["a", "b"], np.arange(2), np.array([0]), class_keys=keys, key_columns=["verb_class", "noun_class"]
    )
    for columns in (["noun_class", "verb_class"], ["verb_class"]):
        space = class_space([train], columns)
        with pytest.raises(UserError, match=r"its classes are identified by verb_class and noun_class, those of"):
            head_tasks([task], space, "here")


def test_slips_of_the_pen_in_labels(ek100: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Blanks around a label make no class of its own; what is missing is no class called "None".
    assert space_of(labelled(tmp_path, ["cut", "cut ", " t-shirt"])).names == ("cut", "t-shirt")
    for nothing in ("", "NaN"):
        with pytest.raises(UserError, match=rf"labels\.csv: row 2: the label is '{nothing}', which is none"):
            table(labelled(tmp_path, ["cut", nothing, "pour"]))
    clips = pd.read_csv(ek100 / "EPIC_100_train.csv", dtype=str)
    clips.loc[1, "verb_class"] = ""
    clips.to_csv(tmp_path / "holes.csv", index=False)
    with pytest.raises(UserError, match=r"holes\.csv: row 2: verb_class is empty"):
        space_of(tmp_path / "holes.csv", "verb_class", "noun_class")
    (tmp_path / "more.csv").write_text("label,other\nstir,1\n,2\n")
    with pytest.raises(UserError, match=r"more\.csv: row 2: label is empty"):
        space_of(labelled(tmp_path, ["cut", "pour"]), further=(str(tmp_path / "more.csv"),))
    # Neither asks for the memory that its number names.
    space_of(labelled(tmp_path, ["1", "999999999999"]))
    assert "999999999997 of them never occur, such as 2" in caplog.text
    clips = pd.read_csv(ek100 / "EPIC_100_train.csv", dtype=str)
    clips.loc[2, "all_noun_classes"] = "[4000000000]"
    clips.to_csv(tmp_path / "far.csv", index=False)
    with pytest.raises(UserError, match=r"far\.csv: row 3: all_noun_classes is '\[4000000000\]', but classes are"):
        RelevantTexts(table(tmp_path / "far.csv"), 0.1)


def test_labels_that_tell_left_from_right_are_named_when_clips_are_mirrored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["left hand pick", "pick_right", "take leftovers", "leave room", "turn clockwise", "pick"]
    labelled(tmp_path, names)
    cfg = Config()
    cfg.data.train["own"] = SourceConfig(metadata=str(tmp_path / "labels.csv"))
    cfg.data.labels.target = "class"
    for flip in (0.0, 0.5):
        cfg.data.flip = flip
        build_labels(cfg, [table(tmp_path / "labels.csv")])
        warned = "3 of 6 classes tell left from right ('left hand pick', 'pick_right', 'turn clockwise')" in caplog.text
        assert warned == (flip > 0)


def test_texts_whose_mirror_image_is_graded_otherwise_are_named(
    ek100: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = pd.read_csv(ek100 / "EPIC_100_train.csv", dtype=str).iloc[:5]
    clips["narration"] = ["turn cup clockwise", "turn cup counterclockwise", "put left glove", "put right glove", "cut"]
    clips["verb_class"] = ["1", "2", "3", "3", "4"]
    clips["all_noun_classes"] = "[1]"
    clips.to_csv(tmp_path / "sides.csv", index=False)
    cfg = Config()
    cfg.data.train["own"] = SourceConfig(metadata=str(tmp_path / "sides.csv"))
    cfg.data.labels.target = "relevancy"
    for flip in (0.0, 0.5):
        cfg.data.flip = flip
        build_labels(cfg, [table(tmp_path / "sides.csv")])
        # Both gloves are of one class, so a mirrored clip is graded rightly.
        warned = "2 of 5 texts tell left from right ('turn cup clockwise', 'turn cup counterclockwise')" in caplog.text
        assert warned == (flip > 0)


def test_a_cut_takes_the_share_of_pixels_of_its_label() -> None:
    torch.manual_seed(0)
    mixer = ClipMixer(TrainConfig(cutmix=1.0))
    for _ in range(20):
        video = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 5, 12, 16).clone()
        mixed, shares = mixer(video)
        for clip in range(4):
            pixels = torch.stack([(mixed[clip] == other).float().mean() for other in range(4)])
            torch.testing.assert_close(pixels, shares[clip], atol=1e-6, rtol=0)
        # The same box in every frame.
        assert (mixed == mixed[:, :, :1]).all()


def test_what_is_mixed_follows_from_torchs_generator_alone() -> None:
    mixer, mixed = ClipMixer(TrainConfig(mixup=0.8, cutmix=1.0)), []
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for _ in range(2):
        torch.manual_seed(3)
        mixed.append(mixer(torch.rand(4, 3, 2, 8, 8)))
    assert torch.equal(mixed[0][0], mixed[1][0])
    assert torch.equal(mixed[0][1], mixed[1][1])
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_the_loss_of_heads_is_cross_entropy_with_smoothing_and_mixing() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    values = {"verb_logits": logits, "verb_label": label}
    expected = F.cross_entropy(logits, label, label_smoothing=0.1)
    torch.testing.assert_close(ClassificationLoss(LossConfig(label_smoothing=0.1))(**values)["loss"], expected)
    shares = torch.eye(4) * 0.7 + torch.eye(4).flip(0) * 0.3
    mixed = 0.7 * F.cross_entropy(logits, label) + 0.3 * F.cross_entropy(logits, label.flip(0))
    torch.testing.assert_close(ClassificationLoss()(**values, mixing=shares)["loss"], mixed)
    # Of two chunks each mixes its own clips.
    chunks = torch.cat([shares[:2, :2] / 0.7, shares[:2, :2] / 0.7])
    torch.testing.assert_close(ClassificationLoss()(**values, mixing=chunks)["loss"], F.cross_entropy(logits, label))


def test_three_heads_are_trained_together_and_measured_each_by_itself() -> None:
    torch.manual_seed(0)
    sizes = {"action": 6, "verb": 2, "noun": 3}
    logits = {name: torch.randn(4, count, requires_grad=True) for name, count in sizes.items()}
    labels = {name: torch.arange(4) % count for name, count in sizes.items()}
    values = {f"{name}_logits": each for name, each in logits.items()}
    values |= {f"{name}_label": each for name, each in labels.items()}
    result = ClassificationLoss()(**values)
    torch.testing.assert_close(result["loss"], sum(F.cross_entropy(logits[name], labels[name]) for name in sizes))
    result["loss"].backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in logits.values())
    # An action is right when its own head is, whatever those of verb and noun say.
    expected = (logits["action"].argmax(dim=1) == labels["action"]).float().mean()
    torch.testing.assert_close(result["accuracy"], expected)

    keys = tuple((str(verb), str(noun)) for verb in range(2) for noun in range(3))
    space = ClassSpace(("verb_class", "noun_class"), keys, tuple(map(" ".join, keys)))
    model = create_model(ModelConfig(name="DEMO", num_frames=4), classes=space.heads("all")).eval()
    encoder, video = ClassProbabilities(model, space), torch.randn(5, 3, 4, 40, 40)
    with torch.no_grad():
        features = encoder.encode_video(video)
        own = {name: each.softmax(dim=1) for name, each in model.classify(video).items()}
    torch.testing.assert_close(features, torch.cat([own["action"], own["verb"], own["noun"]], dim=1))
    task = ClassificationTask(
        "action", ["x"] * 6, np.arange(6), np.arange(5), class_keys=keys, key_columns=["verb_class", "noun_class"]
    )
    (heads,) = head_tasks([task], space, "here")
    assert isinstance(heads, ClassificationTask)
    nothing = torch.zeros(0, 1)
    torch.testing.assert_close(heads.scores(features, nothing), own["action"])
    for name, probabilities in heads.part_scores(features, nothing).items():
        np.testing.assert_allclose(probabilities, own[name].numpy(), rtol=1e-6)
    # Without heads of their own verb and noun are sums over the classes.
    marginals = heads.part_scores(features[:, :6], nothing)
    np.testing.assert_allclose(marginals["verb"][:, 0], own["action"][:, :3].sum(dim=1).numpy(), rtol=1e-6)


def stepped(steps: int = 1, **train: object) -> tuple[dict[str, torch.Tensor], TrainStep, float]:
    """Weights before and the state after some steps of a small model with heads, and the first loss."""
    cfg = Config(loss=LossConfig(name="classes"))
    for name, value in {"lr": 1e-2, "precision": "fp32", "optimizer": "sgd", **train}.items():
        section = cfg.train if hasattr(cfg.train, name) else cfg.model
        assert hasattr(section, name)
        setattr(section, name, value)
    cfg.model.name, cfg.model.num_frames = "DEMO_SMALL", 2
    torch.manual_seed(0)
    model = create_model(cfg.model, cfg.loss, {"action": 3})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = TrainStep(model, cfg, Distributed(0, 1, torch.device("cpu"), None), total_steps=10, steps_per_epoch=10)
    side, generator = model.geometry.image_size, torch.Generator().manual_seed(0)
    batch = {
        "video": torch.randint(256, (4, 3, 2, side, side), dtype=torch.uint8, generator=generator),
        "tokens": torch.ones(4, 4, dtype=torch.long),
        "labels": {"action_label": torch.tensor([0, 1, 2, 0])},
    }
    losses = [float(step(number, [batch])["loss"]) for number in range(1, steps + 1)]
    return before, step, losses[0]


def test_the_average_of_the_weights_is_what_is_evaluated_and_saved() -> None:
    name = "heads.action.1.weight"
    _, first, _ = stepped(ema=0.25)
    after_one = first._inner.state_dict()[name]
    _, step, _ = stepped(2, ema=0.25)
    (saved, training), moved = step.state_dict(), step._inner.state_dict()[name]
    assert not torch.equal(moved, after_one)
    # It begins with the weights of the first step; that of the second could be up to 1 - 2 ** (-2 / 3) = 0.37.
    torch.testing.assert_close(step.ema_or_model.state_dict()[name], 0.25 * after_one + 0.75 * moved)
    assert torch.equal(saved[name], step.ema_or_model.state_dict()[name])
    assert torch.equal(training["weights"][name], moved)
    step.load_ema_weights()
    assert torch.equal(step._inner.state_dict()[name], saved[name])


def test_earlier_blocks_learn_slower_by_layer_decay() -> None:
    def moved(decay: float) -> dict[str, float]:
        before, step, _ = stepped(layer_decay=decay, momentum=0.0, weight_decay=0.0)
        after = step._inner.state_dict()
        return {name: float((after[name] - before[name]).norm()) for name in before if "causal" not in name}

    plain, decayed = moved(1.0), moved(0.5)
    blocks = len({name.split(".")[3] for name in plain if name.startswith("visual.transformer.resblocks.")})
    assert plain["heads.action.1.weight"] > 0
    for name, share in (
        ("heads.action.1.weight", 1.0),
        *((f"visual.transformer.resblocks.{i}.mlp.c_fc.weight", 0.5 ** (blocks - i)) for i in range(blocks)),
        ("visual.conv1.weight", 0.5 ** (blocks + 1)),
    ):
        assert decayed[name] == pytest.approx(share * plain[name], rel=1e-3), name


@pytest.mark.parametrize(
    "knob",
    [{"mixup": 0.8}, {"cutmix": 1.0}, {"drop_path": 0.9}, {"head_dropout": 0.9}, {"optimizer": "adamw"}],
    ids=str,
)
def test_a_recipe_is_chosen_by_the_configuration(knob: dict[str, object]) -> None:
    _, plain, loss = stepped(2)
    _, other, changed = stepped(2, **knob)
    # The optimizer shows in the weights only.
    assert (changed == loss) == ("optimizer" in knob)
    name = "visual.conv1.weight"
    assert not torch.equal(plain.state_dict()[0][name], other.state_dict()[0][name])


def test_the_mean_of_three_splits(tmp_path: Path, inside: Command) -> None:
    for number, top1 in ((1, 70.0), (2, 80.0), (3, 93.0)):
        (tmp_path / f"split{number}").mkdir()
        results = {"format": 1, "metrics": {"egtea/action_top1": top1, f"only/{number}": 1.0}}
        (tmp_path / f"split{number}" / "results.json").write_text(json.dumps(results))
    done = inside("mean_results.py", *(tmp_path / f"split{number}" for number in (1, 2, 3)))
    (_, line) = done.stdout.splitlines()
    assert line.split() == ["egtea/action_top1", "70.00", "80.00", "93.00", "81.00"]
    done = inside("mean_results.py", tmp_path / "split1", tmp_path / "split4")
    assert done.returncode == 2
    assert "split4" in done.stderr


@pytest.mark.parametrize(
    ("kind", "learning"),
    [
        ("heads", {"heads."}),
        ("last_blocks", {"heads.", "visual.transformer.resblocks.1.", "visual.ln_post.", "visual.image_projection"}),
    ],
)
def test_what_is_trained(kind: str, learning: set[str]) -> None:
    model = create_model(ModelConfig(name="DEMO_SMALL", num_frames=2), classes={"action": 3})
    if kind == "heads":
        model.freeze("heads")
    else:
        model.freeze("last_blocks", len(model.visual.transformer.resblocks) - 1)
        learning = learning | {"visual.transformer.resblocks.2."}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(tuple(learning))}


def test_a_small_checkpoint_holds_what_was_trained_and_knows_its_base(
    mir: list[str], ek100: Path, short_run: ShortRun, tmp_path: Path, inside: Command
) -> None:
    command = [*classes(mir, "verb_class", "noun_class"), "train.trainable=heads", "evaluate.final=[]"]
    done = inside("main_finetune.py", *command, "train.duration=2 steps", "train.save_every=1 steps")
    assert done.returncode == 0, done.stderr
    last = newest(tmp_path / "run")
    assert set(last.weights) >= {"heads.action.1.weight", "heads.action.1.bias"}
    assert not [name for name in last.weights if name.startswith(("visual.", "textual."))]
    # It resumes, and it is whole again for whoever opens it.
    assert inside("main_finetune.py", *command, "train.duration=4 steps").returncode == 0
    whole, base = open_weights(tmp_path / "run"), newest(short_run.folder).weights
    assert torch.equal(whole.tensors["visual.conv1.weight"], base["visual.conv1.weight"])
    other = tmp_path / "other"
    shutil.copytree(short_run.folder, other)
    (weights,) = other.glob("checkpoints/*/model.safetensors")
    changed = load_file(weights)
    changed["visual.conv1.weight"][0, 0] += 1
    save_file(changed, weights)
    manifest = json.loads((weights.parent / "manifest.json").read_text())
    manifest["sha256"]["model.safetensors"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (weights.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was trained from other weights than"):
        open_weights(tmp_path / "run", base=str(other))
    with pytest.raises(UserError, match=r"/nowhere, which cannot be used .* set model\.weights\.base to where"):
        open_weights(tmp_path / "run", base="/nowhere")
    resumed = inside("main_finetune.py", *command, "train.duration=6 steps", f"model.weights.path={other}")
    assert resumed.returncode == 2
    assert "was trained with base.sha256=" in resumed.stderr
    resumed = inside("main_finetune.py", *command, "train.duration=6 steps", "train.trainable=all")
    assert resumed.returncode == 2
    assert "was trained with train.trainable=heads, this run has its default" in resumed.stderr
    # A head for other classes than the data has.
    fewer = [*classes(mir, "verb_class"), f"train.output={tmp_path}/fewer", f"model.weights.path={tmp_path}/run"]
    done = inside("main_finetune.py", *fewer, "evaluate.final=[]")
    assert done.returncode == 2
    assert "a head for other classes" in done.stderr
    # As many classes, but others.
    clips = pd.read_csv(ek100 / "EPIC_100_train.csv", dtype=str)
    clips.assign(noun_class=(clips["noun_class"].astype(int) + 1000).astype(str)).to_csv(
        tmp_path / "o.csv", index=False
    )
    others = [*command, *fewer[-2:], f"data.train.demo.metadata={tmp_path}/o.csv"]
    done = inside("main_finetune.py", *others)
    assert done.returncode == 2
    assert "a head for other classes" in done.stderr
    parts = [*classes(mir, "verb_class", "noun_class", heads="parts"), *fewer[-2:]]
    done = inside("main_finetune.py", *parts)
    assert done.returncode == 2
    assert "has model.heads=joint; train it with the same" in done.stderr
    for number, heads in enumerate((others, parts)):
        anew = [*heads, "evaluate.final=[]", "model.weights.adapt=true", f"train.output={tmp_path}/anew{number}"]
        done = inside("main_finetune.py", *anew)
        assert done.returncode == 0, done.stderr
        assert "they start from new weights" in done.stderr
    # A file tells no classes, so its heads may be for any.
    file = f"model.weights.path={newest(tmp_path / 'anew1').path}/model.safetensors"
    bare = [*others[:-2], file, others[-1], f"train.output={tmp_path}/bare", "evaluate.final=[]"]
    done = inside("main_finetune.py", *bare)
    assert done.returncode == 2
    assert "heads but not their classes" in done.stderr
    done = inside("main_finetune.py", *bare, "model.weights.adapt=true")
    assert done.returncode == 0, done.stderr
    assert "they start from new weights" in done.stderr
    with pytest.raises(UserError, match="not a run or checkpoint folder"):
        main_eval.main(["--checkpoint", str(weights), "--heads", "--benchmark", "mir"])


def test_a_dry_run_names_all_that_is_missing_once_and_tries_the_heads(
    mir: list[str], ek100: Path, tmp_path: Path, inside: Command
) -> None:
    command = [*classes(mir, "verb_class", "noun_class"), "train.lr_reference_batch=2", "--dry_run"]
    gone = ["data.train.demo.metadata=/gone/train.csv", "data.train.demo.root=/gone/videos"]
    gone += ["model.weights.path=/gone/weights.pt", "evaluate.benchmarks.mir.metadata=/gone/test"]
    done = inside("main_finetune.py", *command, *gone)
    assert done.returncode == 2
    problems = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "0.0004 (train.lr=0.0001 is for 2 clips, a step has 8)" in done.stderr
    for what in ("train.csv", "videos", "weights.pt", "test"):
        assert len([line for line in problems if f"/gone/{what}" in line]) == 1, problems
    # No head for a class of the test clips, and pairs of one clip.
    clips = pd.read_csv(ek100 / "EPIC_100_train.csv", dtype=str)
    clips[clips["verb_class"] == clips["verb_class"].mode()[0]].to_csv(tmp_path / "few.csv", index=False)
    few = [f"data.train.demo.metadata={tmp_path}/few.csv", "train.global_batch_size=4"]
    done = inside("main_finetune.py", *command, *few, "train.mixup=0.8", "train.max_batch_per_process=1")
    assert done.returncode == 2
    assert "benchmark mir: class '" in done.stderr
    assert "mix pairs, but 1 clips are held at a time" in done.stderr


def test_own_labels_train_and_are_evaluated(mir: list[str], demo_world: Path, tmp_path: Path, inside: Command) -> None:
    for split in ("train", "test"):
        clips = pd.read_csv(demo_world / split / "hod.csv")
        clips = clips[clips["noun"].isin(pd.read_csv(demo_world / "train" / "hod.csv")["noun"])]
        renamed = {"video_id": "video", "start_second": "start", "end_second": "end", "noun": "label"}
        clips.rename(columns=renamed)[list(renamed.values())].to_csv(tmp_path / f"{split}.csv", index=False)
    command = [*classes(mir, "label"), f"data.train.demo.metadata={tmp_path}/train.csv"]
    command += ["evaluate.benchmarks.mir.kind=labels", f"evaluate.benchmarks.mir.metadata={tmp_path}/test.csv"]
    done = inside("main_finetune.py", *command, "train.duration=2 steps")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert 0 <= metrics["mir/action_top1"] <= 100
    # The same heads, measured once more by the program that only evaluates.
    options = ["--checkpoint", str(tmp_path / "run"), "--benchmark", "mir", "--output", str(tmp_path / "again")]
    done = inside("main_eval.py", *command[:2], *command[-2:], *options, "--heads")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "results.json").read_text())["metrics"]
    assert again == pytest.approx(metrics)
    assert ", classification heads |" in (tmp_path / "again" / "results.md").read_text()


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "metric"), [("demo_charades", "charades_ego/map"), ("demo_custom", "test/action_top1")]
)
def test_the_demo_in_other_formats(
    ek100: Path,
    short_run: ShortRun,
    tmp_path: Path,
    inside: Command,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    metric: str,
) -> None:
    monkeypatch.setenv("DEMO_DATA", str(ek100.parents[2]))
    monkeypatch.setenv("DEMO_CHECKPOINT", str(short_run.folder))
    small = ["train.duration=2 steps", "train.global_batch_size=8", "data.workers=0", "evaluate.num_frames=5"]
    small += ["model.num_frames=5", "model.activation=quick_gelu", f"train.output={tmp_path}/run"]
    # So few training clips do not show every class.
    small += [f"data.labels.classes=[{ek100.parent}/labels/test.csv]"] if name == "demo_custom" else []
    done = inside("main_finetune.py", "--config_file", f"configs/finetune/{name}.yml", *small)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert 0 <= metrics[metric] <= 100
    assert "tell left from right" not in done.stderr


def test_the_formats_of_egtea_and_charades(tmp_path: Path) -> None:
    (tmp_path / "action_idx.txt").write_text("Take bowl 1\nCut_onion 2\n")
    split = tmp_path / "train_split1.txt"
    split.write_text("P01-R01-Salad-1000-3500-F000024-F000084 2 1 1 \nnonsense\nP01-R01-Salad-1-2-F0-F1 9 1 1\n")
    clips = table(split)
    assert len(clips) == 1
    row = clips.row(0)
    assert (row.video_id, row.start, row.end) == ("P01-R01-Salad/P01-R01-Salad-1000-3500-F000024-F000084", 0.0, 2.5)
    assert row.texts == ("cut onion",)
    assert clips.column("action").tolist() == ["2"]
    (tmp_path / "Charades_v1_classes.txt").write_text("c000 Holding clothes\nc001 Opening a door\n")
    (tmp_path / "train.csv").write_text("id,actions\nABC,c001 1.50 4.20;c000 0 3\nDEF,\n")
    clips = table(tmp_path / "train.csv")
    assert [clips.row(i).texts[0] for i in range(2)] == ["Opening a door", "Holding clothes"]
    assert RelevantTexts(clips, 0.9).relevancy([0, 1]).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_predict_names_classes_and_writes_a_timeline(
    mir: list[str], short_run: ShortRun, demo_world: Path, tmp_path: Path, inside: Command
) -> None:
    command = [*classes(mir, "verb_class", "noun_class", heads="parts"), "evaluate.final=[]", "train.duration=1 steps"]
    assert inside("main_finetune.py", *command).returncode == 0
    chunk = next((demo_world / "test" / "videos").rglob("*.mp4"))
    run = ["--checkpoint", tmp_path / "run", "--output", tmp_path / "predicted", "train.device=cpu"]
    done = inside("predict.py", chunk, *run)
    assert done.returncode == 0, done.stderr
    timeline = pd.read_csv(tmp_path / "predicted" / "timeline.csv")
    assert (timeline.groupby("start")["rank"].max() == 5).all()
    # No scrap of a window at the end.
    assert (timeline["end"] - timeline["start"] >= 1).all()
    assert timeline["score"].between(0, 1).all()
    assert (tmp_path / "predicted" / "timeline.png").stat().st_size > 1000
    done = inside("predict.py", chunk, *run, "--window", "1000")
    assert len(done.stdout.splitlines()) == 5
    # The text tower is still there, and a $ is no formula.
    priced = ["--sentences", "pays $5_$ at once", "cuts", "--window", "1"]
    done = inside("predict.py", chunk, *run, *priced)
    assert done.returncode == 0, done.stderr
    done = inside("predict.py", chunk, *run, "--window", "1000", "--sentences", "opens the drawer", "cuts")
    assert sorted(line.split("  ")[1] for line in done.stdout.splitlines()) == ["cuts", "opens the drawer"]
    done = inside("predict.py", chunk, *run, "--window", "0")
    assert done.returncode == 2
    assert "--window must be above 0" in done.stderr
    done = inside("predict.py", chunk, "--checkpoint", short_run.folder)
    assert done.returncode == 2
    assert "has no classification heads" in done.stderr
    (weights,) = (tmp_path / "run" / "checkpoints").glob("*/model.safetensors")
    done = inside("predict.py", chunk, "--checkpoint", weights)
    assert done.returncode == 2
    assert "give its run or checkpoint folder" in done.stderr
    done = inside("predict.py", chunk, "--checkpoint", tmp_path / "run", "--output", weights)
    assert done.returncode == 2
    assert f"--output {weights}: " in done.stderr
    # Whoever asks for no heads needs no classes, and so no training csv.
    options = ["--sentences", "cuts", "data.train.demo.metadata=/gone.csv", *command[2:7]]
    done = inside("predict.py", chunk, *command[:2], *run, *options)
    assert done.returncode == 0, done.stderr


@pytest.mark.ci
def test_predict_on_a_real_clip(shared: Path, short_run: ShortRun, inside: Command) -> None:
    clip = next((shared / "media" / "lavila").glob("3c0dffd0*.mp4"))
    options = ["--sentences", "stirs the sauce", "opens a car", "--window", "1000"]
    done = inside("predict.py", clip, "--checkpoint", short_run.folder, *options)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.ci
def test_a_killed_fine_tuning_goes_on_exactly(mir: list[str], tmp_path: Path, program: Command) -> None:
    from tests.training.test_resume import assert_same, start, wait_for

    straight, broken = (f"train.output={tmp_path}/{name}" for name in ("straight", "broken"))
    assert program("main_finetune.py", *mir, straight).returncode == 0
    process = start(Path(mir[1]), broken, "train.save_every=2 steps", main="main_finetune.py")
    wait_for(process, "saved")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert program("main_finetune.py", *mir, broken).returncode == 0
    one, other = newest(tmp_path / "straight"), newest(tmp_path / "broken")
    assert_same(one.weights, other.weights)
    assert_same(one.training["optimizer"], other.training["optimizer"])
    assert losses(tmp_path / "straight") == losses(tmp_path / "broken")


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["sms", "classes"])
def test_two_processes_fine_tune_as_one_does(mir: list[str], ek100: Path, tmp_path: Path, kind: str) -> None:
    further = f"data.labels.classes=[{ek100}/EPIC_100_validation.csv]"
    # A margin has no temperature, so nothing waits for its gradient.
    learned = "loss.learn_temperature=true"
    command = [*mir, learned] if kind == "sms" else [*classes(mir, "verb_class", "noun_class", heads="parts"), further]
    for processes, name in enumerate(("one", "two"), start=1):
        log = finish(processes, "main_finetune.py", [*command, f"train.output={tmp_path}/{name}"], tmp_path / "logs")
    assert "2 processes over gloo" in log
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, *_ in two] == [1, 2, 3, 4]
    for (step, *values), (_, *others) in zip(one, two, strict=True):
        # The same arithmetic in another order; AdamW's division by small averages widens it as steps go by.
        assert values == pytest.approx(others, rel=1e-5 if step == 1 else 2e-3), step
    weights = newest(tmp_path / "two").weights
    for name, weight in newest(tmp_path / "one").weights.items():
        torch.testing.assert_close(weight, weights[name], atol=4e-4, rtol=0, msg=name)
    first, second = (json.loads((tmp_path / n / "results.json").read_text())["metrics"] for n in ("one", "two"))
    assert first.keys() == second.keys()
    # Of fifteen clips a near tie may fall to the other side.
    assert all(abs(first[name] - second[name]) <= 100 / 15 + 1e-6 for name in first if "rank" not in name)
