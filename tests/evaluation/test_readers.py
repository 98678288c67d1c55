"""Every benchmark on the demo world in its own format: what is read, what an oracle reaches, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_cases import assert_at_chance, made, random_features, settings, small_model
from torch import Tensor

from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset
from egohod.data.formats.custom import read_questions
from egohod.data.table import ClipTable
from egohod.errors import UserError
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.runner import PROTOCOLS, read_benchmark, tasks_of
from egohod.evaluation.tasks import (
    ClassificationTask,
    EvaluationTask,
    MultiLabelTask,
    MultipleChoiceTask,
    RetrievalTask,
)
from tests.data.video_files import encode

KINDS = ["ek100_mir", "ek100_cls", "egtea", "egomcq", "charades_ego", "custom"]
QUESTIONS = ["handyvqa", "egohoibench", "chirality", "egoexolearn_mcq", "egoexolearn_association", "hd_epic_vqa"]
KINDS += [*QUESTIONS, "egotempo"]


class Content(NamedTuple):
    """What the files of a benchmark give."""

    source: SourceConfig
    clips: ClipTable
    tables: list[EvaluationTask]
    notes: list[str]

    def dataset(self, protocol: str = "clean", **changed: object) -> ClipDataset:
        source = dataclasses.replace(self.source, **changed)
        return ClipDataset([(self.clips, source)], protocol=PROTOCOLS[protocol], size=32, decoder="pyav")


def load(kind: str, config: BenchmarkConfig, protocol: str = "clean") -> Content:
    source, data = read_benchmark(kind, config, PROTOCOLS[protocol].prompts)
    return Content(source, data.clips, tasks_of(data), data.notes)


def read(test: Path, kind: str, protocol: str = "clean") -> Content:
    return load(kind, settings(test, kind), protocol)


def oracle(table: EvaluationTask, clips: int) -> tuple[Tensor, Tensor]:
    """Features of clips and texts made from the labels; the similarities of a retrieval are its relevancies."""
    if isinstance(table, RetrievalTask):
        own = 0 if table.text_of_clip is None else table.text_of_clip[:, None] == np.arange(len(table.texts))
        return torch.from_numpy((table.relevancy + 0.5 * own).astype(np.float32)), torch.eye(len(table.texts))
    if isinstance(table, ClassificationTask):
        classes = torch.eye(int(table.class_of_text.max()) + 1)
        return classes[torch.from_numpy(table.labels)], classes[torch.from_numpy(table.class_of_text)]
    if isinstance(table, MultiLabelTask):
        return torch.from_numpy(table.labels).float(), torch.eye(len(table.texts))
    assert isinstance(table, MultipleChoiceTask)
    # Of what is alike, a group; a question about clips has a dimension of its own for each of its query's clips.
    width = len(table.texts)
    video, text = torch.zeros(clips, width + clips), torch.eye(width, width + clips)
    for question in table.questions:
        for right in (question.choices[i] for i in (question.answer, *question.also)):
            if question.of_clips:
                video[[question.query, right], width + question.query] = 1
            else:
                video[(question.query, right) if question.query_is_clip else (right, question.query)] = 1
    return video, text


@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_reaches_everything(formats: Path, kind: str) -> None:
    content = read(formats, kind)
    for table in content.tables:
        video, text = oracle(table, len(content.clips))
        for name, score in table.measure(video, text).items():
            assert score.value == (1 if score.is_rank else pytest.approx(100)), name
            assert score.interval() == (pytest.approx(score.value), pytest.approx(score.value))


@pytest.mark.parametrize("kind", KINDS)
def test_random_features_are_at_chance(formats: Path, kind: str) -> None:
    content = read(formats, kind)
    for table in content.tables:
        runs = [
            table.measure(
                random_features(len(content.clips), 2 * seed), random_features(len(table.texts), 2 * seed + 1)
            )
            for seed in range(150)
        ]
        # Verbs and nouns have unequally many classes: nobody guesses them evenly (docs/evaluation.md).
        parts = {f"{part}_top1" for part in getattr(table, "parts", {})}
        for name, score in runs[0].items():
            if not score.is_rank and name not in parts:
                assert_at_chance([run[name].value for run in runs], score.chance, name=name)


def test_every_format_tells_of_the_same_world(formats: Path) -> None:
    hod = pd.read_csv(formats / "hod.csv")
    contents = {kind: read(formats, kind) for kind in KINDS}
    for kind in ("ek100_mir", "ek100_cls", "custom"):
        clips = contents[kind].clips
        np.testing.assert_allclose(clips.start, hod["start_second"], atol=1e-5)
        assert clips.videos == hod["video_id"].tolist()
    assert len(contents["egtea"].clips) == len(hod)
    assert set(contents["egomcq"].clips.videos) <= set(hod["video_id"])
    charades = contents["charades_ego"].tables[0]
    assert isinstance(charades, MultiLabelTask)
    assert charades.labels.sum() == 2 * len(contents["charades_ego"].clips)
    mir = contents["ek100_mir"].tables[0]
    assert isinstance(mir, RetrievalTask)
    assert len(mir.texts) == len(set(mir.texts))


@pytest.mark.parametrize("kind", KINDS)
def test_each_benchmark_runs_from_its_files(formats: Path, kind: str) -> None:
    measured = made(formats, kind).measure(small_model())
    assert measured.rows == list(range(measured.report.clips))
    for name, value in measured.flat().items():
        assert np.isfinite(value), name


EK100_MIR = """narration_id,video_id,start_timestamp,stop_timestamp,narration,verb_class,noun_class,all_noun_classes
P22_04_144,P22_04,00:10:00.00,00:10:02.00,cut slice,7,96,[96]
P08_16_88,P08_16,00:05:00.00,00:05:01.50,throw away bits,13,80,[80]
P12_03_90,P12_03,00:01:00.00,00:01:03.00,stir,10,0,[0]
"""


def test_a_sentence_of_ek100_has_text_and_class_of_the_row_that_its_id_names(tmp_path: Path) -> None:
    """The texts of six published sentences stand beside a neighbour's id; the real rows, cut to three."""
    (tmp_path / "EPIC_100_retrieval_test.csv").write_text(EK100_MIR)
    (tmp_path / "EPIC_100_retrieval_test_sentence.csv").write_text(
        "narration_id,narration\nP22_04_144,wash cooker\nP08_16_88,cut slice\nP12_03_90,stir\n"
    )
    config = BenchmarkConfig(metadata=str(tmp_path), root="x")
    (mir,) = load("ek100_mir", config).tables
    assert isinstance(mir, RetrievalTask)
    assert mir.texts == ["cut slice", "throw away bits", "stir"]
    np.testing.assert_array_equal(mir.relevancy, np.eye(3))


def test_the_real_sentences_are_the_narrations_of_their_ids(shared: Path) -> None:
    folder = shared / "annotations/epic-kitchens-100"
    (mir,) = load("ek100_mir", BenchmarkConfig(metadata=str(folder), root="x")).tables
    written = pd.read_csv(folder / "retrieval_annotations/EPIC_100_retrieval_test_sentence.csv")
    changed = {old: new for old, new in zip(written["narration"], mir.texts, strict=True) if old != new}
    assert len(mir.texts) == 3842
    assert changed == {
        "wash cooker": "cut slice",
        "cut slice": "throw away bits",
        "throw away bits": "put down down slice",
        "put down down slice": "looking for something",
        "looking for something": "count",
        "count": "stir",
    }


def test_the_short_clips_of_ek100_are_counted_and_widened_in_chunks_only(shared: Path, tmp_path: Path) -> None:
    """15.7 % of its test clips are shorter than a second; published numbers show them as they are."""
    metadata = str(shared / "annotations/epic-kitchens-100")
    content = load("ek100_mir", BenchmarkConfig(metadata=metadata, root=str(tmp_path)))
    clips = content.clips
    short = clips.end - clips.start < 1
    assert (len(clips), int(short.sum()), content.notes) == (9668, 1519, [])
    first = int(np.flatnonzero(short)[0])
    video, start, end = clips.videos[first], clips.start[first], clips.end[first]
    for folder, names in (
        ("tree", [f"{video[:3]}/videos/{video}.MP4"]),
        ("chunks", [f"{video}/{n:04d}.mp4" for n in range(2)]),
    ):
        for number, name in enumerate(names):
            encode(tmp_path / folder / name, 150, first=150 * number)
        one = clips.restricted(np.arange(len(clips)) == first)
        one.start, one.end = np.array([3.0]), np.array([3.0 + end - start])
        there = content._replace(clips=one)
        dataset = there.dataset(root=str(tmp_path / folder))
        assert dataset.missing() == {}
        assert dataset[0]["fault"] is None
        widened = 0 if folder == "tree" else 1
        assert dataset.length_note() == f"1 clips are shorter than 1 s: {widened} of them were widened to it"
    exact = load("ek100_mir", BenchmarkConfig(metadata=metadata, root=str(tmp_path), min_clip_seconds=0.0)).source
    other = there.dataset(root=str(tmp_path / folder), min_clip_seconds=exact.min_clip_seconds)
    assert other.length_note() == "1 clips are shorter than 1 s: 0 of them were widened to it"
    assert other.identities != dataset.identities
    assert not torch.equal(other[0]["video"], dataset[0]["video"])


@pytest.mark.parametrize("kind", ["egtea", "charades_ego"])
def test_benchmarks_of_whole_files_find_their_videos_where_their_owners_put_them(
    formats: Path, tmp_path: Path, kind: str
) -> None:
    """Whichever frames a protocol shows: the middles of a clip's parts, or some of the whole file."""
    usual = settings(formats, kind)
    names = read(formats, kind).clips.videos
    below = {"egtea": "cropped_clips", "charades_ego": "CharadesEgo_v1_480"}[kind]
    renamed = names if kind == "egtea" else [f"{row:04d}ZEGO" for row in range(len(names))]
    for old, new in zip(names, renamed, strict=True):
        path = tmp_path / below / f"{new}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(f"{usual.root}/{old}.mp4")
    for protocol in ("clean", "whole_clip", "lavila_10x3"):
        content = read(formats, kind)
        at_home = content.dataset(protocol)
        others = {name: content.clips.column(name).tolist() for name in ("uid",)}
        clips = ClipTable.of(content.clips.path, renamed, content.clips.start, content.clips.end, **others)
        moved = content._replace(clips=clips).dataset(protocol, root=str(tmp_path))
        assert moved.missing() == {}
        assert torch.equal(moved[3]["video"], at_home[3]["video"])


def test_class_prompts_follow_the_protocol(formats: Path, tmp_path: Path) -> None:
    clean, upstream = (read(formats, "ek100_cls", name) for name in ("clean", "upstream"))
    assert len(clean.tables[0].texts) <= len(upstream.tables[0].texts)
    assert not upstream.notes
    # Without the training csv the classes are those of actions.csv, identified by their names or by validation.
    shutil.copytree(formats / "benchmarks/ek100", tmp_path / "ek100")
    (tmp_path / "ek100/EPIC_100_train.csv").unlink()
    cfg = BenchmarkConfig(metadata=str(tmp_path / "ek100"), root="x")
    with pytest.raises(UserError, match=r"neither EPIC_100_train\.csv nor actions\.csv"):
        load("ek100_cls", cfg)
    (tmp_path / "ek100/actions.csv").write_text("id,verb,noun,action\n0,90,91,juggle anvil\n")
    content = load("ek100_cls", cfg)
    assert "classes are those of actions.csv" in content.notes[0]
    assert "have no narration and are described by their names" in content.notes[1]
    assert "juggle anvil" in content.tables[0].texts


def test_a_test_class_that_train_lacks_is_reported_by_name_and_counted(formats: Path, tmp_path: Path) -> None:
    shutil.copytree(formats / "benchmarks/ek100", tmp_path / "ek100")
    path = tmp_path / "ek100/EPIC_100_validation.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[3, ["verb", "verb_class", "noun", "noun_class"]] = ["juggle", "77", "anvil:iron", "78"]
    # Other order, extra columns, CRLF: none of it matters.
    table[table.columns[::-1]].assign(extra="x").to_csv(path, index=False, lineterminator="\r\n")
    content = load("ek100_cls", BenchmarkConfig(metadata=str(tmp_path / "ek100"), root="x"))
    assert "juggle anvil iron" in content.tables[0].texts
    assert len(content.notes) == 1


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def endless_clip(folder: Path) -> None:
    entries = json.loads((folder / "egomcq.json").read_text())
    entries["0"]["choices"]["2"]["clip_end"] = float("nan")
    (folder / "egomcq.json").write_text(json.dumps(entries))


def first_row_twice(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([*lines[:2], *lines[1:]]) + "\n")

    return change


def emptied(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text().splitlines()[0] + "\n") and None


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("ek100_cls", replace("EPIC_100_validation.csv", "start_timestamp", "begin"), "no column .start_time"),
        ("ek100_cls", replace("EPIC_100_validation.csv", ".000000,00", ".000000,xx"), "row 1: .*'xx:.*', not a time"),
        ("ek100_cls", first_row_twice("EPIC_100_validation.csv"), "row 2: uid 'demo_.*' occurs twice"),
        ("ek100_mir", first_row_twice("EPIC_100_retrieval_test_sentence.csv"), "row 2: narration_id .* occurs twice"),
        ("ek100_mir", emptied("EPIC_100_retrieval_test.csv"), "no clip"),
        ("egtea", replace("action_idx.txt", " 2\n", " two\n"), "line 2: .* is not a new class"),
        ("egtea", replace("action_idx.txt", " 2\n", f" {'2' * 5000}\n"), "line 2: .* is not a new class"),
        ("egtea", replace("test_split1.txt", "DEMO", "broken line DEMO"), "line 1: .* is not '<clip> <action"),
        ("egomcq", lambda folder: (folder / "egomcq.json").write_text("{}") and None, "not a single question"),
        ("egomcq", replace("egomcq.json", '"answer": ', '"answer": 1'), "question '0': answer is 1"),
        ("egomcq", replace("egomcq.json", '"answer": ', '"answer": 1e999, "was": '), "question '0': OverflowError"),
        ("egomcq", endless_clip, "question '0': ValueError a time is not finite"),
        ("egomcq", replace("egomcq.json", '"0": {"video_uid"', '"0": {"video"'), "question '0': KeyError 'video_uid'"),
        ("charades_ego", replace("CharadesEgo_v1_test_only1st.csv", "hen,c", "hen,d"), "row 1: actions names class 'd"),
    ],
)  # fmt: skip
def test_bad_annotations_are_refused_with_file_and_place(
    formats: Path, tmp_path: Path, kind: str, change: Callable[[Path], None], expected: str
) -> None:
    source = settings(formats, kind)
    folder = tmp_path / "annotations"
    shutil.copytree(str(source.metadata), folder, ignore=shutil.ignore_patterns("videos"))
    change(folder)
    with pytest.raises(UserError, match=expected) as error:
        load(kind, BenchmarkConfig(metadata=str(folder), root=source.root))
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_anyones_csv_is_a_benchmark(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text(
        "text,video_id,end_second,start_second,uid,action\n"
        "cuts an onion,v1,3,1,a,cut\nstirs soup,v1,6,4,b,stir\nslices a leek,v2,2,0,c,cut\n"
    )
    config = BenchmarkConfig(metadata=str(tmp_path / "clips.csv"), root=str(tmp_path))
    (table,) = load("custom", config).tables
    assert isinstance(table, RetrievalTask)
    assert list(table.texts) == ["cuts an onion", "slices a leek", "stirs soup"]
    assert table.relevancy.tolist() == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]
    (tmp_path / "relevancy.csv").write_text("uid,text,relevancy\na,cuts an onion,1\na,slices a leek,0.5\n")
    (tmp_path / "classes.csv").write_text("action,text\ncut,a person cuts\nstir,a person stirs\ncut,cutting\n")
    (tmp_path / "questions.jsonl").write_text(
        '{"kind": "mine", "query": {"clip": "a"}, "choices": [{"text": "x"}, {"text": "y"}], "answer": 0}\n'
    )
    retrieval, classes, questions = load("custom", config).tables
    assert retrieval.relevancy.tolist() == [[1, 0.5, 0], [0, 0, 0], [0, 0, 0]]
    assert classes.labels.tolist() == [0, 1, 0]
    assert classes.class_of_text.tolist() == [0, 1, 0]
    assert questions.questions[0].kind == "mine"
    (tmp_path / "relevancy.csv").write_text("uid,text,relevancy\na,cuts an onion,2\n")
    with pytest.raises(UserError, match=r"relevancy\.csv: row 1: relevancy is '2', not a number from 0 to 1"):
        load("custom", config)
    (tmp_path / "relevancy.csv").write_text("uid,text,relevancy\nz,cuts an onion,1\n")
    with pytest.raises(UserError, match=r"row 1: uid 'z' is not among the clips"):
        load("custom", config)


def test_records_survive_what_other_programs_take_for_line_ends(tmp_path: Path) -> None:
    path, text = tmp_path / "questions.jsonl", "C stops\u2028C\x85turns\x0c\x1e"
    question = {"kind": "order", "query": {"clip": "a"}, "choices": [{"text": text}, {"text": "other"}], "answer": 0}
    line = json.dumps(question, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(f"{line}\r\n{line}\r\n".encode(encoding))
        table = read_questions(path, ["a"])
        assert list(table.texts) == [text, "other"]
        assert len(table.questions) == 2
    for content, expected in (
        (line.encode() + b"\n\xff\n", r"line 2, byte 0xff at column 1"),
        (line.encode() + b"\n\n", r"line 2: not a question"),
        (b"[" * 100_000, r"line 1: not a question"),
        (line.replace("order", "x" * 5000 + "\\n!").encode(), r"line 1: kind is .*becomes a metric's name"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=expected) as caught:
            read_questions(path, ["a"])
        assert len(str(caught.value)) < 1000
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_annotation_files_may_be_saved_by_an_editor(formats: Path, tmp_path: Path, encoding: str) -> None:
    """Every file of every benchmark with a byte order mark, in UTF-8 and UTF-16."""
    shutil.copytree(formats / "benchmarks", tmp_path / "benchmarks")
    for path in (tmp_path / "benchmarks").rglob("*"):
        if path.suffix in (".csv", ".json", ".jsonl", ".txt"):
            path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    for kind in ("ek100_mir", "ek100_cls", "egtea", "egomcq", "charades_ego"):
        before, after = read(formats, kind), read(tmp_path, kind)
        assert list(after.clips.videos) == list(before.clips.videos)
        assert [list(table.texts) for table in after.tables] == [list(table.texts) for table in before.tables]


GOOD: dict[str, Any] = {
    "kind": "transient",
    "query": {"clip": "u1"},
    "choices": [{"text": "a"}, {"text": "b"}],
    "answer": 1,
}


def test_questions_are_read_with_shared_texts(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    other = {"kind": "across_clips", "query": {"text": "b"}, "choices": [{"clip": "u0"}, {"clip": "u1"}], "answer": 0}
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(other) + "\n")
    table = read_questions(path, ["u0", "u1"], {"transient": "motion_transient"})
    assert table.texts == ["a", "b"]
    first, second = table.questions
    assert (first.kind, first.query_is_clip, first.query, first.choices, first.answer) == (
        "motion_transient",
        True,
        1,
        (0, 1),
        1,
    )
    assert (second.kind, second.query_is_clip, second.query, second.choices) == ("across_clips", False, 1, (0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "very quick"}, 'kind is "very quick", but becomes a metric'),
        ({"query": {"clip": "u7"}}, "query is clip 'u7', which is not among the clips"),
        ({"query": "u1"}, 'query must be {"clip": uid} or'),
        ({"choices": [{"text": "a"}]}, "choices must be a list of at least two"),
        ({"choices": [{"text": "a"}, {"clip": "u0"}]}, "the choices of a clip must be texts"),
        ({"answer": 2}, "answer is 2, but there are 2 choices"),
        ({"answer": -1}, "answer is -1"),
        ({"answer": "1"}, "answer is '1'"),
    ],
)
def test_a_bad_question_is_refused_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(UserError) as error:
        read_questions(path, ["u0", "u1"])
    assert f"{path}: line 2: {message}" in str(error.value)


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "transient"}', "3"])
def test_a_line_that_is_no_question_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match="line 1: not a question with kind, query, choices and answer"):
        read_questions(path, ["u0"])


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("")
    with pytest.raises(UserError, match="not a single question"):
        read_questions(path, ["u0"])


def test_details_name_every_clip_with_plain_values(formats: Path) -> None:
    for kind in KINDS:
        content = read(formats, kind)
        for table in content.tables:
            video, text = oracle(table, len(content.clips))
            details = json.loads(json.dumps(table.details(video, text)))
            assert details["kind"] in ("retrieval", "classification", "multilabel", "multiple_choice")
            if details["kind"] == "classification":
                assert [row[0] for row in details["best_classes"]] == details["labels"]
                assert all(each["accuracy"] == 100 for each in details["per_class"])
                assert sum(count for *_, count in details["confusion"]) == len(content.clips)
