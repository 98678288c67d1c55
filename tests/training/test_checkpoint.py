"""Checkpoints: whole or not there, checked on reading, never executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from egohod.config import Config
from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.errors import UserError
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import create_model
from egohod.training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    classes_of,
    copy_to_host,
    identity,
    read,
    require_identity,
)

WEIGHTS = {"w": torch.arange(6.0).view(2, 3), "scale": torch.tensor(2.5)}


def save(store: CheckpointStore, step: int, metric: float = 0.0) -> Path:
    training = {"optimizer": {"state": {0: {"step": torch.tensor(float(step))}}}, "note": "x"}
    return store.save(step, WEIGHTS, training, metrics={"val/top1": metric}, identity={"model.name": "DEMO"})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = save(store, 7)
    checkpoint = read(path)
    assert checkpoint.step == 7
    assert checkpoint.weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(checkpoint.weights[name], value) for name, value in WEIGHTS.items())
    assert checkpoint.training["optimizer"]["state"][0]["step"] == 7
    assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == path.name
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))
    # Whoever may read the one file may read all.
    assert len({each.stat().st_mode for each in path.iterdir()}) == 1


def test_newest_and_best_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=1, best="val/top1")
    for step, metric in ((1, 0.2), (2, 0.9), (3, 0.3), (4, 0.4), (5, 0.1)):
        save(store, step, metric)
    assert [path.name for path in store.steps()] == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_score_is_kept_if_it_is_among_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=2, best="val/top1")
    assert store.would_keep(0.0)
    for step, metric in enumerate((0.5, 0.9, 0.1), start=1):
        save(store, step, metric)
    assert [store.would_keep(score) for score in (0.4, 0.5, 0.6, float("nan"))] == [False, False, True, False]
    assert not CheckpointStore(tmp_path, keep_best=0, best="val/top1").would_keep(1.0)


def test_a_later_score_is_saved_and_counts(tmp_path: Path) -> None:
    """As when an evaluation was cut short and the resumed run made up for it."""
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=1, best="val/top1")
    save(store, 1, 0.5)
    path = store.save(2, WEIGHTS, {"note": "x"}, metrics={}, identity={"model.name": "DEMO"})
    assert [each.name for each in store.steps()] == ["step-00000001", "step-00000002"]
    store.rate(2, {"val/top1": 0.9})
    assert [each.name for each in store.steps()] == ["step-00000002"]
    assert read(path).manifest["metrics"] == {"val/top1": 0.9}
    assert {each.name for each in path.iterdir()} == {"model.safetensors", "training.pt", "manifest.json"}


@pytest.mark.parametrize(
    ("name", "setting", "was", "now"),
    [("max_margin", "margin", 0.2, 0.3), ("sms", "tau", 0.1, 0.2), ("classes", "label_smoothing", 0.0, 0.1)],
)
def test_a_run_is_resumed_with_the_objective_that_it_was_trained_with(
    tmp_path: Path, name: str, setting: str, was: float, now: float
) -> None:
    cfg, model = Config(), create_model(ModelConfig(name="DEMO"))
    cfg.loss.name = name
    saved = identity(cfg, model, 60, None)
    assert saved[f"loss.{setting}"] == was
    path = CheckpointStore(tmp_path).save(1, WEIGHTS, {}, metrics={}, identity=saved)
    require_identity(read(path), identity(cfg, model, 60, None))
    setattr(cfg.loss, setting, now)
    with pytest.raises(UserError, match=f"was trained with loss.{setting}={was}, this run has {now}"):
        require_identity(read(path), identity(cfg, model, 60, None))
    # Earlier releases did not record it.
    del saved[f"loss.{setting}"]
    path = CheckpointStore(tmp_path).save(2, WEIGHTS, {}, metrics={}, identity=saved)
    require_identity(read(path), identity(cfg, model, 60, None))
    # Losses that ignore a setting do not mind another value.
    cfg.loss.name = "infonce"
    assert f"loss.{setting}" not in identity(cfg, model, 60, None)


@pytest.mark.parametrize(
    ("key", "now"),
    [
        ("data.flip", 0.25),
        ("data.crop_scale_min", 0.9),
        ("data.hard_negatives.share", 0.5),
        ("data.hard_negatives.group_size", 3),
        ("data.hard_negatives.group_by", ["noun"]),
        ("model.patch_dropout", 0.5),
        ("model.drop_path", 0.1),
        ("train.mixup", 0.8),
        ("train.cutmix", 1.0),
    ],
)
def test_a_run_is_resumed_with_the_clips_drawn_and_changed_as_before(tmp_path: Path, key: str, now: object) -> None:
    cfg, model = Config(), create_model(ModelConfig(name="DEMO"))
    if key.startswith("data.hard_negatives.group"):
        # Without hard negatives it means nothing, and may change.
        before = identity(cfg, model, 60, None)
        change(cfg, key, now)
        assert identity(cfg, model, 60, None) == before
        cfg = Config()
        cfg.data.hard_negatives.share = 0.25
    saved = identity(cfg, model, 60, None)
    store = CheckpointStore(tmp_path)
    path = store.save(1, WEIGHTS, {}, metrics={}, identity=saved)
    require_identity(read(path), identity(cfg, model, 60, None))
    change(cfg, key, now)
    with pytest.raises(UserError, match=f"was trained with {key}=.*, this run has"):
        require_identity(read(path), identity(cfg, model, 60, None))
    # Earlier releases did not record it.
    earlier = {name: value for name, value in saved.items() if not name.startswith(key.rpartition(".")[0])}
    path = store.save(2, WEIGHTS, {}, metrics={}, identity=identity(cfg, model, 60, None) | earlier)
    require_identity(read(path), identity(cfg, model, 60, None))


def change(cfg: Config, key: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    assert hasattr(attrgetter(section)(cfg), name)
    setattr(attrgetter(section)(cfg), name, value)


def test_annotations_may_move_and_may_not_change(tmp_path: Path) -> None:
    """As a csv does that every job of a requeued run copies to a folder of its own."""
    rows = "video_id,start_second,end_second,text\na,0,2,C cuts\na,2,4,C opens\na,4,5,C cuts\nb,1,3,C stirs\n"
    cfg, model = Config(), create_model(ModelConfig(name="DEMO"))

    def of(folder: str, content: str, name: str = "hod.csv") -> dict[str, object]:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        cfg.data.train = {"hod": SourceConfig(metadata=str(path))}
        return identity(cfg, model, 3, None, {"hod": read_clips(str(path)).content_hash()})

    saved = of("job-1", rows)
    assert str(tmp_path) not in json.dumps(saved)
    path = CheckpointStore(tmp_path).save(1, WEIGHTS, {}, metrics={}, identity=saved)
    require_identity(read(path), of("job-2", rows, "copy.txt"))
    # A column that training does not read.
    require_identity(read(path), of("job-3", rows.replace("text\n", "text,note\n").replace("s\n", "s,x\n")))
    for old, new in (("C stirs", "C stirs it"), ("b,1,3", "b,1,2.5"), ("b,1", "c,1"), ("a,2,4,C opens\n", "")):
        with pytest.raises(UserError, match=r"was trained with data\.train\.sha256="):
            require_identity(read(path), of("job-4", rows.replace(old, new)))
    lines = rows.splitlines(keepends=True)
    with pytest.raises(UserError, match=r"data\.train\.sha256"):
        require_identity(read(path), of("job-5", "".join([lines[0], *reversed(lines[1:])])))
    # Earlier releases recorded the path and the weight, and nothing of the content.
    earlier = {name: value for name, value in saved.items() if not name.startswith("data.train.")}
    earlier |= {"data.train": {"hod": ["/gone/hod.csv", None]}, "data.train.clips": 3}
    path = CheckpointStore(tmp_path).save(2, WEIGHTS, {}, metrics={}, identity=earlier)
    require_identity(read(path), of("job-6", rows))
    cfg.data.train["hod"].weight = 2.0
    with pytest.raises(UserError, match=r"data\.train\.weight"):
        require_identity(read(path), identity(cfg, model, 3, None))


def test_a_copy_of_the_state_is_not_changed_by_training() -> None:
    weight, memory = torch.arange(3.0), dict[tuple[object, ...], torch.Tensor]()
    state = ({"w": weight}, {"groups": [{"lr": 0.1, "step": torch.tensor(1.0)}], "betas": (0.9, weight[1:])})
    first = copy_to_host(state, memory)
    weight.add_(10)
    assert first[0]["w"].tolist() == [0, 1, 2]
    assert first[1]["betas"][1].tolist() == [1, 2]
    assert (first[1]["groups"], type(first[1]["betas"])) == ([{"lr": 0.1, "step": 1}], tuple)
    # The next copy takes no memory of its own, unless a shape has changed.
    second = copy_to_host(state, memory)
    assert second[0]["w"].data_ptr() == first[0]["w"].data_ptr()
    assert copy_to_host(({"w": torch.zeros(5)},), memory)[0]["w"].shape == (5,)


def test_a_lost_run_folder_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not saved"):
        save(CheckpointStore(tmp_path / "gone"), 1)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("damage", ["cut weights", "flip a byte", "no training", "no manifest", "half a manifest"])
def test_a_torn_newest_checkpoint_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    save(store, 1)
    torn = save(store, 2)
    weights = torn / "model.safetensors"
    content = weights.read_bytes()
    if damage == "cut weights":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "flip a byte":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no training":
        (torn / "training.pt").unlink()
    elif damage == "no manifest":
        (torn / "manifest.json").unlink()
    else:
        (torn / "manifest.json").write_text((torn / "manifest.json").read_text()[:40])
    newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    assert "step-00000002" in caplog.text
    assert "trying the one before" in caplog.text


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/executed",)

    path = save(CheckpointStore(tmp_path), 1)
    with (path / "training.pt").open("wb") as file:
        pickle.dump({"optimizer": Evil()}, file)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["training.pt"] = hashlib.sha256((path / "training.pt").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="refused"):
        read(path)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A real refusal by the kernel: the process may not write files beyond a size."""
    store = CheckpointStore(tmp_path)
    save(store, 1)
    big = {"w": torch.zeros(300_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="older checkpoints are untouched"):
            store.save(2, big, {}, metrics={}, identity={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    assert sorted(p.name for p in store.folder.iterdir()) == ["LAST", "step-00000001"]


def test_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """SIGKILL at a random moment of saving over and over: whatever is there under a final name is whole."""
    program = (
        "import sys, torch\nfrom pathlib import Path\nfrom egohod.training.checkpoint import CheckpointStore\n"
        "store = CheckpointStore(Path(sys.argv[1]), keep_last=3)\nprint('go', flush=True)\n"
        "for step in range(1, 10000):\n"
        "    store.save(step, {'w': torch.full((200_000,), float(step))}, {'step': step}, metrics={}, identity={})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    store = CheckpointStore(tmp_path)
    while len(store.steps()) < 3:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for path in store.steps():
        checkpoint = read(path)
        assert torch.equal(checkpoint.weights["w"], torch.full((200_000,), float(checkpoint.step)))


def test_killed_in_the_middle_of_deleting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)

    def dies(folder: Path, **_: object) -> None:
        next(folder.glob("model.*")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            save(store, 2)
    assert [read(path).step for path in store.steps()] == [2]
    save(store, 3)
    assert sorted(p.name for p in store.folder.iterdir()) == ["LAST", "step-00000003"]


def test_going_back_sets_later_checkpoints_aside_and_deletes_nothing_good(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (800, 900):
        save(store, step)
    back = CheckpointStore(tmp_path, keep_last=2)
    back.set_aside_after(500)
    saved = save(back, 600)
    assert saved.is_dir()
    names = sorted(path.name for path in store.folder.iterdir() if path.is_dir())
    assert names == ["abandoned-step-00000800", "abandoned-step-00000900", "step-00000600"]
    newest = back.newest()
    assert newest is not None
    assert newest.step == 600


def test_a_torn_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    torn = save(store, 600)
    (torn / "model.safetensors").unlink()
    saved = save(store, 550)
    newest = store.newest()
    assert newest is not None
    assert newest.path == saved


def test_folders_of_the_user_are_left_alone_and_leftovers_are_cleared(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    mine = save(store, 100).rename(store.folder / "step-00000100-good")
    leftover = store.folder / f".tmp-step-00000200-{os.getpid()}"
    leftover.mkdir()
    for step in (200, 300):
        save(store, step)
    assert mine.is_dir()
    assert not leftover.exists()
    assert [path.name for path in store.steps()] == ["step-00000300"]


@pytest.mark.parametrize("field", ["step", "sha256", "metrics", "identity"])
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, field: str) -> None:
    path = save(CheckpointStore(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {field: None}))
    with pytest.raises(CheckpointError, match="not a manifest"):
        read(path)


@pytest.mark.parametrize(
    ("heads", "classes", "names"),
    [("model.heads", "data.classes.keys", "data.classes.names"), ("heads", "classes", "names of the classes")],
    ids=["now", "earlier release"],
)
def test_classes_that_do_not_fit_their_names_are_refused(tmp_path: Path, heads: str, classes: str, names: str) -> None:
    identity = {heads: "joint", "data.labels.columns": ["verb", "noun"], classes: [["0", "1"], ["1", "0"]]}
    identity[names] = ["cut onion", "take pot"]
    for changed in ({classes: [["0"], ["1", "0"]]}, {names: ["cut onion"]}):
        CheckpointStore(tmp_path).save(1, WEIGHTS, {}, metrics={}, identity=identity | changed)
        with pytest.raises(CheckpointError, match="columns, classes and names of classes do not fit"):
            classes_of(tmp_path)
    CheckpointStore(tmp_path).save(1, WEIGHTS, {}, metrics={}, identity=identity)
    assert classes_of(tmp_path)[1].names == ("cut onion", "take pot")
