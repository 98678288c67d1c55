"""Files for the challenges: what we write, and files as the organisers' own code writes them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_cases import ALONE, config, made, settings, small_model

from egohod.data.labels import ClassSpace
from egohod.errors import UserError
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.runner import Benchmark, benchmark, execution_of
from egohod.evaluation.submission import challenge_task, check_submission, write_submission
from egohod.evaluation.tasks import ClassificationTask, RetrievalTask, head_tasks
from tests.support import Command
from tools import check_submission as tool

CLIPS, TEXTS = ["P01_11_0", "P01_11_1", "P01_11_2"], ["P01_11_0", "P01_11_2"]
LEVELS = {"sls_pt": 2, "sls_tl": 3, "sls_td": 4}


def recognition() -> dict[str, Any]:
    """As epic-kitchens/C1-Action-Recognition writes it; actions as participants add them."""
    clip = {name: {str(c): 0.5 for c in range(count)} for name, count in (("verb", 97), ("noun", 300))}
    clip["action"] = {f"{c % 97},{c}": 0.1 for c in range(100)}
    results = {name: copy.deepcopy(clip) for name in CLIPS}
    return {"version": "0.2", "challenge": "action_recognition", **LEVELS, "results": results}


def retrieval() -> dict[str, Any]:
    """As mwray/Joint-Part-of-Speech-Embeddings writes it: its version is a number, its ids are indices of pandas."""
    ids = {"vis_ids": pd.Index(CLIPS, dtype=object, name="narration_id"), "txt_ids": pd.Index(TEXTS, dtype=object)}
    matrix = np.arange(6.0).reshape(3, 2)
    return {"version": 0.1, "challenge": "multi_instance_retrieval", "sim_mat": matrix, **ids, **LEVELS}


def zipped(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def test_files_of_the_organisers_code_follow_the_rules(tmp_path: Path) -> None:
    content = json.dumps(recognition()).encode()
    line = check_submission(zipped(tmp_path / "test_results.zip", "test.json", content), CLIPS)
    assert line.endswith("action_recognition, 3 clips, supervision SLS-2-3-4: follows the rules")
    without = recognition()
    for scores in without["results"].values():
        del scores["action"]
    (tmp_path / "without.json").write_text(json.dumps(without))
    check_submission(tmp_path / "without.json", CLIPS)
    for protocol in (2, 3, 4):
        pickled = pickle.dumps(retrieval(), protocol=protocol)
        assert "multi_instance" in check_submission(zipped(tmp_path / "m.zip", "test.pkl", pickled), CLIPS, TEXTS)
    as_arrays = retrieval() | {"version": "0.1", "vis_ids": np.array(CLIPS, dtype=object), "txt_ids": np.array(TEXTS)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(as_arrays, protocol=4))
    check_submission(tmp_path / "a.pkl", CLIPS, TEXTS)


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    content = recognition()
    change(content)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("version"), "no 'version'"),
        (lambda c: c.update(version="0.1"), "'version' is '0.1', not '0.2'"),
        (lambda c: c.update(challenge="action_anticipation"), "not 'action_recognition'"),
        (lambda c: c.update(sls_td=6), "'sls_td' is 6, not a whole number from 0 to 5"),
        (lambda c: c.update(results=[]), "'results' is not a dictionary"),
        (lambda c: c["results"].pop(CLIPS[0]), "1 narration ids are missing: P01_11_0"),
        (lambda c: c["results"].update(P02_1=c["results"][CLIPS[0]]), "ids are not in the challenge: P02_1"),
        (lambda c: c["results"][CLIPS[1]]["verb"].pop("96"), "P01_11_1: 'verb' needs a score of each class"),
        (lambda c: c["results"][CLIPS[1]]["noun"].update({"300": 1}), "P01_11_1: 'noun' needs a score of each class"),
        (lambda c: c["results"][CLIPS[0]]["action"].popitem(), "'action' needs exactly 100 scores"),
        (
            lambda c: c["results"][CLIPS[0]].update(action={f"97,{n}": 1 for n in range(100)}),
            "action '97,0' is not a 'verb,noun' of the challenge",
        ),
        (lambda c: c["results"][CLIPS[0]].pop("action"), "some clips have 'action' scores and others none"),
        (lambda c: c["results"][CLIPS[0]]["verb"].update({"3": "high"}), "the score of '3' is 'high', not a finite"),
        (lambda c: c["results"][CLIPS[0]]["verb"].update({"3": float("nan")}), "the score of '3' is nan, not a finite"),
    ],
)  # fmt: skip
def test_every_broken_rule_of_recognition_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = zipped(tmp_path / "s.zip", "test.json", changed(change))
    with pytest.raises(UserError) as raised:
        check_submission(path, CLIPS)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.2"}, "'version' is '0.2', not '0.1' or 0.1"),
        ({"sls_pt": None}, "'sls_pt' is None"),
        ({"sim_mat": np.zeros((2, 3))}, "'sim_mat' is [2, 3], but vis_ids and txt_ids are [3, 2]"),
        ({"sim_mat": np.full((3, 2), np.nan)}, "'sim_mat' holds NaN"),
        ({"sim_mat": [[1.0]]}, "'sim_mat' is not a matrix"),
        ({"vis_ids": CLIPS[::-1]}, "'vis_ids' has the right ids, but not once each in the order"),
        ({"txt_ids": ["P01_11_0", "P9"]}, "1 ids of 'txt_ids' are missing: P01_11_2"),
        ({"txt_ids": 3}, "'txt_ids' is not a list of narration ids"),
    ],
)
def test_every_broken_rule_of_retrieval_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = zipped(tmp_path / "s.zip", "test.pkl", pickle.dumps(retrieval() | change, protocol=4))
    with pytest.raises(UserError) as raised:
        check_submission(path, CLIPS, TEXTS)
    assert message in str(raised.value)


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_files_that_are_no_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content, message in (
        ("results.json", b"{}", "must hold test.json or test.pkl alone, not results.json"),
        ("test.json", b"{", "test.json cannot be read"),
        ("test.json", b"[]", "holds no dictionary"),
        ("test.pkl", pickle.dumps({"sim_mat": Runs()}), "could run code; nothing in it was run"),
    ):
        with pytest.raises(UserError, match=message):
            check_submission(zipped(tmp_path / "s.zip", name, content), CLIPS, TEXTS)
    assert "run" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file"):
        check_submission(tmp_path / "none.zip", CLIPS)
    (tmp_path / "s.txt").write_text("x")
    with pytest.raises(UserError, match=r"neither a zip nor a \.json or \.pkl"):
        check_submission(tmp_path / "s.txt", CLIPS)


def test_the_tool_names_what_is_missing(tmp_path: Path, inside: Command) -> None:
    assert "none.zip: no such file" in inside("check_submission", tmp_path / "none.zip", "--metadata", tmp_path).stderr
    file = zipped(tmp_path / "s.zip", "test.json", b"{}")
    done = inside("check_submission", file, "--metadata", tmp_path)
    assert done.returncode == 2
    assert "no EPIC_100_test_timestamps.csv there; a file of the validation split needs --split" in done.stderr


def content_of(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [name]
        raw = archive.read(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also of names that NumPy no longer uses
        return json.loads(raw) if name.endswith("json") else pickle.loads(raw)


def submitted(bench: Benchmark, folder: Path) -> Path:
    return write_submission(folder, bench, bench.measure(small_model()), [2, 3, 4])


def test_retrieval_from_features_to_the_file(formats: Path, tmp_path: Path) -> None:
    bench = made(formats, "ek100_mir")
    path = submitted(bench, tmp_path)
    content, ids = content_of(path, "test.pkl"), pd.read_csv(formats / "benchmarks/ek100/EPIC_100_retrieval_test.csv")
    assert {key: content[key] for key in LEVELS} == LEVELS
    assert content["vis_ids"] == ids["narration_id"].tolist()
    sentences = pd.read_csv(formats / "benchmarks/ek100/EPIC_100_retrieval_test_sentence.csv")
    assert content["txt_ids"] == sentences["narration_id"].tolist()
    # The numbers that the matrix gives are those of the results.
    task, result = bench.tasks[0], bench.measure(small_model())
    assert isinstance(task, RetrievalTask)
    matrix = torch.from_numpy(content["sim_mat"])
    again = task.measure(matrix, torch.eye(matrix.shape[1]))
    assert again["map"].value == pytest.approx(result.flat()["map"])
    with zipfile.ZipFile(path) as archive:
        assert b"numpy._core" not in archive.read("test.pkl"), "NumPy 1 does not have it"
    assert tool.main([str(path), "--metadata", str(formats / "benchmarks/ek100")]) == 0


def test_recognition_zero_shot_and_on_the_secret_test_split(
    formats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = made(formats, "ek100_cls")
    path = submitted(bench, tmp_path)
    results = content_of(path, "test.json")["results"]
    rows = pd.read_csv(formats / "benchmarks/ek100/EPIC_100_validation.csv")
    assert list(results) == rows["narration_id"].tolist()
    flat = bench(small_model())
    for part in ("verb", "noun"):
        best = [int(max(results[clip][part], key=results[clip][part].get)) for clip in rows["narration_id"]]
        assert 100 * np.mean(best == rows[f"{part}_class"]) == pytest.approx(flat[f"{part}_top1"])
        assert sum(results[rows["narration_id"][0]][part].values()) == pytest.approx(1, abs=1e-4)
    assert not any("action" in scores for scores in results.values()), "fewer than 100 classes: none or 100"

    # The test split as the organisers publish it: another uid than the narration's, and no labels.
    folder = tmp_path / "ek100"
    folder.mkdir()
    for source in (formats / "benchmarks/ek100").iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    columns = ["narration_id", "participant_id", "video_id", "narration_timestamp"]
    columns += ["start_timestamp", "stop_timestamp", "start_frame", "stop_frame"]
    rows.loc[:9, columns].to_csv(folder / "EPIC_100_test_timestamps.csv", index_label="uid")
    pairs = [(verb, noun, f"action {verb} {noun}") for verb in range(12) for noun in range(12)]
    pd.DataFrame(pairs, columns=["verb", "noun", "action"]).to_csv(folder / "actions.csv", index=False)
    source = BenchmarkConfig(kind="ek100_cls_test", metadata=str(folder), root=settings(formats, "ek100_cls").root)
    cfg = config()
    secret, public = (
        benchmark(cfg, kind, dataclasses.replace(source, kind=kind), execution_of(cfg, ALONE))
        for kind in ("ek100_cls_test", "ek100_cls")
    )
    assert secret(small_model()) == {}
    of_test = content_of(submitted(secret, tmp_path), "test.json")["results"]
    of_validation = content_of(submitted(public, tmp_path), "test.json")["results"]
    assert of_test == {clip: of_validation[clip] for clip in rows["narration_id"][:10]}
    best = [max(scores["action"], key=scores["action"].get) for scores in of_validation.values()]
    true = [f"{verb},{noun}" for verb, noun in zip(rows["verb_class"], rows["noun_class"], strict=True)]
    assert 100 * np.mean(np.array(best) == true) == pytest.approx(public(small_model())["action_top1"])
    assert all(len(scores["action"]) == 100 for scores in of_test.values())
    assert tool.main([str(tmp_path / "ek100_cls_test.zip"), "--metadata", str(folder)]) == 0
    assert "10 clips, supervision SLS-2-3-4: follows the rules" in capsys.readouterr().out


def test_what_no_challenge_takes(formats: Path, tmp_path: Path) -> None:
    assert challenge_task(made(formats, "custom")) is None
    assert challenge_task(made(formats, "egomcq")) is None
    bench = made(formats, "ek100_mir")
    result = bench.measure(small_model())
    object.__setattr__(result, "rows", result.rows[1:])
    with pytest.raises(UserError, match="a submission needs all clips"):
        write_submission(tmp_path, bench, result, [0, 0, 0])
    task = made(formats, "ek100_cls").tasks[0]
    assert isinstance(task, ClassificationTask)
    space = ClassSpace(("verb_class", "noun_class"), (("0", "0"), ("97", "1")), ("a", "b"))
    bench = made(formats, "ek100_cls")
    (heads,) = head_tasks([dataclasses.replace(task, labels=np.full(len(task.labels), -1))], space, "here")
    bench.tasks = [heads]
    result = made(formats, "ek100_cls").measure(small_model())
    object.__setattr__(result, "features", [(torch.full((len(result.rows), 2), 0.5), torch.zeros(0, 2))])
    with pytest.raises(UserError, match="a class has verb 97, but EPIC-KITCHENS-100 has 97: 0 to 96"):
        write_submission(tmp_path, bench, result, [0, 0, 0])
    assert not (tmp_path / "ek100_cls.zip").exists()
