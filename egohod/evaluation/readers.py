"""Benchmarks as thin readers: annotation files in, clips and tables out. What the files say is data, never code.

own           a csv of clips with what lies beside it: classes.csv, relevancy.csv, questions.jsonl (docs/evaluation.md)
labels        a csv of labelled clips: video, start, end, label
ek100_mir     EPIC_100_retrieval_test.csv and EPIC_100_retrieval_test_sentence.csv
ek100_cls     EPIC_100_validation.csv with EPIC_100_train.csv or actions.csv or both
egtea         action_idx.txt and test_split1.txt (2, 3)
egomcq        egomcq.json
charades_ego  CharadesEgo_v1_test_only1st.csv and Charades_v1_classes.txt
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipList, EvalProtocol
from egohod.data.frames import MIN_SECONDS
from egohod.data.relevancy import csv_relevancy, sentence_texts
from egohod.data.table import ClipTable
from egohod.data.text_files import AnnotationError, integers, parse_json, read_csv, read_json, read_lines, seconds
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.tasks import (
    ClassificationTask,
    EvaluationTask,
    MultiLabelTask,
    MultipleChoiceTask,
    Question,
    RetrievalTask,
)

# What the kinds of questions of the demo world are called in results; others keep their names.
KIND_NAMES = {
    "across_clips": "choice_across_clips",
    "object": "object",
    "state_changing": "motion_state_changing",
    "transient": "motion_transient",
}
EGOMCQ_KINDS = {1: "inter", 2: "intra"}
# Of EGTEA. Python refuses to read numbers of thousands of digits.
_CLASS = re.compile(r"[0-9]{1,6}")
EK100_COLUMNS = (
    "narration_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "narration",
    "verb_class",
    "noun_class",
)


@dataclass(frozen=True)
class Content:
    """What a reader found; ``notes`` are facts about the numbers that a report must not hide."""

    clips: ClipList
    tables: Sequence[EvaluationTask]
    notes: list[str] = field(default_factory=list)


Reader = Callable[[BenchmarkConfig, EvalProtocol, Path | None], Content]
"""Settings, protocol, folder for what is costly to build."""


def read_labels(config: BenchmarkConfig, protocol: EvalProtocol, cache: Path | None) -> Content:
    """A csv of labelled clips (video, start, end, label): classification, each class told by its name."""
    path = Path(config.metadata or "")
    source = SourceConfig(metadata=str(path), root=config.root or "", format="labels", columns=config.columns)
    table = ClipTable.read(source, strict=True)
    names, labels = np.unique([str(label).strip() for label in table.column("label")], return_inverse=True)
    clips = _table_clips([str(i + 1) for i in range(len(table))], table, config)
    texts = names.tolist()
    keys = [(name,) for name in texts]
    made = ClassificationTask(
        "action", texts, np.arange(len(texts)), labels, {}, texts, class_keys=keys, key_columns=["label"]
    )
    return Content(clips, [made], _backwards(table.report.backwards))


def read_own(config: BenchmarkConfig, protocol: EvalProtocol, cache: Path | None) -> Content:
    """A csv of clips (video_id, start_second, end_second, text; optional uid, action) and the files beside it.

    Retrieval: clips against the distinct texts, graded by relevancy.csv (uid, text, relevancy) if it is there, else 1
    for texts of the same action, else 1 for the clip's own text. Classification: classes.csv (action, text, and one
    column for each coarser label). Multiple choice: questions.jsonl.
    """
    path, root = Path(config.metadata or ""), config.root or ""
    source = SourceConfig(metadata=str(path), root=root, list_text="first")
    table = ClipTable.read(source, strict=True)
    columns = table.column_names
    uids = [str(uid) for uid in table.column("uid")] if "uid" in columns else [str(i + 1) for i in range(len(table))]
    if len(set(uids)) < len(uids):
        again = next(i for i, uid in enumerate(uids) if uid in uids[:i])
        raise AnnotationError(f"{table.where(again)}: uid '{uids[again]}' occurs twice")
    clips = _table_clips(uids, table, config)
    actions = table.column("action").astype(str) if "action" in columns else None
    tables: list[EvaluationTask] = [_own_retrieval(table, uids, actions, path.with_name("relevancy.csv"))]
    if (classes := path.with_name("classes.csv")).exists():
        if actions is None:
            raise AnnotationError(f"{path}: column 'action' is missing, which {classes.name} tells the classes of")
        tables.append(_own_classes(actions, classes))
    if (questions := path.with_name("questions.jsonl")).exists():
        tables.append(read_questions(questions, uids))
    return Content(clips, tables, _backwards(table.report.backwards))


def _forwards(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, int]:
    """Ends after the starts, and how many were not: what has no length is given a second."""
    backwards = end <= start
    return np.where(backwards, start + MIN_SECONDS, end), int(backwards.sum())


def _backwards(count: int) -> list[str]:
    """A note on the clips whose end was mended."""
    return [f"{count} clips end before they begin and were given {MIN_SECONDS:g} s"] if count else []


def _own_retrieval(table: ClipTable, uids: list[str], actions: np.ndarray | None, path: Path) -> RetrievalTask:
    """Clips against distinct texts."""
    texts, text_of_clip = np.unique([table.row(i).texts[0] for i in range(len(table))], return_inverse=True)
    if path.exists():
        graded = read_csv(path, ("uid", "text", "relevancy"))
        row_of, column_of = {uid: i for i, uid in enumerate(uids)}, {text: i for i, text in enumerate(texts.tolist())}
        relevancy = np.zeros((len(uids), len(texts)), dtype=np.float32)
        for row, (uid, text, value) in enumerate(zip(graded["uid"], graded["text"], graded["relevancy"], strict=True)):
            where = f"{path}: row {row + 1}"
            if uid not in row_of or text not in column_of:
                what = f"uid '{uid}'" if uid not in row_of else f"text '{text}'"
                raise AnnotationError(f"{where}: {what} is not among the clips of {table.path}")
            relevancy[row_of[uid], column_of[text]] = _fraction(value, where)
    elif actions is not None:
        _, action = np.unique(actions, return_inverse=True)
        # A narration belongs to one action; the first clip that has it tells which.
        first = np.unique(text_of_clip, return_index=True)[1]
        relevancy = (action[:, None] == action[first]).astype(np.float32)
    else:
        relevancy = (text_of_clip[:, None] == np.arange(len(texts))).astype(np.float32)
    return RetrievalTask(texts.tolist(), text_of_clip, relevancy)


def _fraction(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise AnnotationError(f"{where}: relevancy is '{text}', not a number from 0 to 1")
    return value


def _own_classes(actions: np.ndarray, path: Path) -> ClassificationTask:
    """Classes with one prompt a row; further columns are coarser labels (verb, noun)."""
    prompts = read_csv(path, ("action", "text"))
    names = list(dict.fromkeys(prompts["action"]))
    code = {name: number for number, name in enumerate(names)}
    if unlisted := [action for action in actions if action not in code]:
        raise AnnotationError(f"{path}: no class '{unlisted[0]}', but a clip has this action")
    first = prompts.drop_duplicates("action")
    parts = {
        str(part): np.unique(first[part], return_inverse=True)[1]
        for part in prompts.columns
        if part not in ("action", "text")
    }
    name = "_".join(parts) or "action"
    labels = np.array([code[action] for action in actions], dtype=np.int64)
    class_of_text = np.array([code[action] for action in prompts["action"]], dtype=np.int64)
    columns = list(parts) or ["action"]
    keys = [tuple(str(value) for value in row) for row in first[columns].to_numpy()]
    texts = prompts["text"].tolist()
    return ClassificationTask(name, texts, class_of_text, labels, parts, names, class_keys=keys, key_columns=columns)


def read_questions(path: Path, uids: Sequence[str]) -> MultipleChoiceTask:
    """Multiple-choice questions, one JSON object a line; clips are named by their uid.

    Raises :class:`AnnotationError` naming file, line and field.
    """
    rows = {uid: row for row, uid in enumerate(uids)}
    texts: dict[str, int] = {}

    def place(item: Any, where: str) -> tuple[bool, int]:
        """Whether it is a clip, and its row among the clips or the texts."""
        if not isinstance(item, dict) or set(item) not in ({"clip"}, {"text"}):
            raise AnnotationError(f'{where} must be {{"clip": uid}} or {{"text": "..."}}, not {json.dumps(item)}')
        if "text" in item:
            return False, texts.setdefault(str(item["text"]), len(texts))
        if str(item["clip"]) not in rows:
            raise AnnotationError(f"{where} is clip '{item['clip']}', which is not among the clips")
        return True, rows[str(item["clip"])]

    questions = []
    for number, line in enumerate(read_lines(path), start=1):
        where = f"{path}: line {number}"
        entry = parse_json(line, f"{where}: not a question with kind, query, choices and answer")
        try:
            kind, query, choices, answer = (entry[key] for key in ("kind", "query", "choices", "answer"))
        except (KeyError, TypeError) as error:
            raise AnnotationError(f"{where}: not a question with kind, query, choices and answer ({error})") from error
        if not isinstance(kind, str) or not kind.isidentifier():
            raise AnnotationError(
                f"{where}: kind is {json.dumps(kind)}, but becomes a metric's name: use letters and _"
            )
        if not isinstance(choices, list) or len(choices) < 2:
            raise AnnotationError(f"{where}: choices must be a list of at least two")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise AnnotationError(
                f"{where}: answer is {answer!r}, but there are {len(choices)} choices, counted from 0"
            )
        query_is_clip, row = place(query, f"{where}: query")
        placed = [place(choice, f"{where}: choice {i}") for i, choice in enumerate(choices)]
        if any(is_clip == query_is_clip for is_clip, _ in placed):
            raise AnnotationError(f"{where}: a clip asks for texts and a text for clips, never for its own kind")
        name = KIND_NAMES.get(kind, kind)
        questions.append(Question(name, query_is_clip, row, tuple(row for _, row in placed), answer))
    if not questions:
        raise AnnotationError(f"{path}: not a single question")
    return MultipleChoiceTask(list(texts), questions)


def read_ek100_mir(config: BenchmarkConfig, protocol: EvalProtocol, cache: Path | None) -> Content:
    """EPIC-KITCHENS-100 multi-instance retrieval: every clip against every sentence, graded."""
    clips_csv = _find(config, "EPIC_100_retrieval_test.csv")
    sentences_csv = _find(config, "EPIC_100_retrieval_test_sentence.csv")
    table = read_csv(clips_csv, EK100_COLUMNS, unique="narration_id")
    clips, notes = _ek100_clips(table, clips_csv, config)
    relevancy = csv_relevancy(clips_csv, sentences_csv, cache)
    rows = read_csv(sentences_csv, ("narration_id", "narration"))
    narrations = dict(zip(table["narration_id"], table["narration"], strict=True))
    sentences = sentence_texts(rows["narration_id"].tolist(), rows["narration"].tolist(), narrations)
    return Content(clips, [RetrievalTask(sentences, None, relevancy)], notes)


def read_ek100_cls(config: BenchmarkConfig, protocol: EvalProtocol, cache: Path | None) -> Content:
    """EPIC-KITCHENS-100 zero-shot action recognition over the verb-noun pairs of train and validation.

    A class is told by its distinct narrations, from train or from both (``protocol.prompts``), and by its name where
    there is none. The pairs of actions.csv (verb, noun, action) count too; it can stand in for EPIC_100_train.csv.
    """
    path = _find(config, "EPIC_100_validation.csv")
    table = read_csv(path, EK100_COLUMNS, unique="narration_id")
    clips, notes = _ek100_clips(table, path, config)
    told = [(table, path)] if protocol.prompts == "train+val" else []
    names: dict[tuple[int, int], str] = {}
    train, actions_csv = _look(config, "EPIC_100_train.csv"), _look(config, "actions.csv")
    if train is not None:
        training = read_csv(train, EK100_COLUMNS)
        told.append((training, train))
        _class_names(training, train, names)
    elif actions_csv is None:
        raise AnnotationError(
            f"{config.metadata}: neither EPIC_100_train.csv nor actions.csv there, one of which must tell the classes"
        )
    else:
        notes.append("EPIC_100_train.csv is not there: classes are those of actions.csv")
    if actions_csv is not None:
        actions = read_csv(actions_csv, ("verb", "noun", "action"))
        pairs = zip(integers(actions, "verb", actions_csv), integers(actions, "noun", actions_csv), strict=True)
        names |= {(int(v), int(n)): name for (v, n), name in zip(pairs, actions["action"], strict=True)}
    _class_names(table, path, names)
    pairs_in_order = sorted(names)
    code = {pair: number for number, pair in enumerate(pairs_in_order)}
    prompts: dict[tuple[int, str], None] = {}
    for frame, where in told:
        for pair, narration in zip(_pairs(frame, where), frame["narration"], strict=True):
            prompts[code[pair], narration.strip()] = None
    labels = np.array([code[pair] for pair in _pairs(table, path)], dtype=np.int64)
    untold = sorted(set(range(len(code))) - {number for number, _ in prompts})
    if untold:
        clips_without = int(np.isin(labels, untold).sum())
        notes.append(
            f"{len(untold)} of {len(code)} classes have no narration and are told by their names; "
            f"{len(set(untold) & set(labels.tolist()))} of them occur, in {clips_without} clips"
        )
    prompts |= {(number, names[pairs_in_order[number]]): None for number in untold}
    verbs, nouns = (np.unique(part, return_inverse=True)[1] for part in zip(*pairs_in_order, strict=True))
    return Content(
        clips,
        [
            ClassificationTask(
                "action",
                [text for _, text in prompts],
                np.array([number for number, _ in prompts], dtype=np.int64),
                labels,
                {"verb": verbs, "noun": nouns},
                [names[pair] for pair in pairs_in_order],
                class_keys=[(str(verb), str(noun)) for verb, noun in pairs_in_order],
                key_columns=["verb_class", "noun_class"],
            )
        ],
        notes,
    )


def _pairs(table: pd.DataFrame, path: Path) -> list[tuple[int, int]]:
    columns = integers(table, "verb_class", path).tolist(), integers(table, "noun_class", path).tolist()
    return list(zip(*columns, strict=True))


def _class_names(table: pd.DataFrame, path: Path, names: dict[tuple[int, int], str]) -> None:
    """Name the pairs that have no name yet ``verb noun``, as the first row that has them spells it."""
    spelled = zip(table["verb"], table["noun"], strict=True) if {"verb", "noun"} <= set(table.columns) else None
    told = [f"{v} {n}" for v, n in spelled] if spelled else table["narration"].tolist()
    for pair, name in zip(_pairs(table, path), told, strict=True):
        names.setdefault(pair, name.replace("-", " ").replace(":", " "))


def _ek100_clips(table: pd.DataFrame, path: Path, config: BenchmarkConfig) -> tuple[ClipList, list[str]]:
    start, end = (_clock(table, name, path) for name in ("start_timestamp", "stop_timestamp"))
    end, backwards = _forwards(start, end)
    ids, videos = table["narration_id"].tolist(), table["video_id"].tolist()
    return _clips(ids, videos, start, end, config), _backwards(backwards)


def _clock(table: pd.DataFrame, column: str, path: Path) -> np.ndarray:
    times = seconds(pa.chunked_array([pa.array(table[column].tolist(), pa.large_string())]))
    if (broken := np.isnan(times)).any():
        row = int(broken.argmax())
        raise AnnotationError(f"{path}: row {row + 1}: {column} is '{table[column][row]}', not HH:MM:SS.ss")
    return times


def read_egtea(config: BenchmarkConfig, protocol: EvalProtocol, cache: Path | None) -> Content:
    """EGTEA Gaze+ action recognition: 106 classes; split 1 and the mean over all splits that are there."""
    index = _find(config, "action_idx.txt")
    classes: dict[int, str] = {}
    for number, line in _lines(index):
        name, _, code = line.rpartition(" ")
        if not name or not _CLASS.fullmatch(code) or int(code) in classes:
            raise AnnotationError(f"{index}: line {number}: '{line}' is not a new class such as 'Take bowl 7'")
        classes[int(code)] = name.lower().replace("_", " ")
    if sorted(classes) != list(range(1, len(classes) + 1)):
        raise AnnotationError(f"{index}: classes must be numbered from 1 to {len(classes)} without a gap")
    labels: dict[str, int] = {}
    splits: list[list[str]] = []
    for split in [config.test_split] if config.test_split else [1, 2, 3]:
        name, optional = f"test_split{split}.txt", config.test_split is None and split > 1
        if (path := _look(config, name) if optional else _find(config, name)) is None:
            continue
        splits.append([])
        for number, line in _lines(path):
            clip, *codes = line.split()
            if not codes or not _CLASS.fullmatch(codes[0]) or int(codes[0]) not in classes:
                raise AnnotationError(f"{path}: line {number}: '{line}' is not '<clip> <action from 1> ...'")
            if clip.count("-") < 3 or labels.setdefault(clip, int(codes[0]) - 1) != int(codes[0]) - 1:
                raise AnnotationError(f"{path}: line {number}: '{clip}' is no clip name, or has two actions")
            splits[-1].append(clip)
        if not splits[-1]:
            raise AnnotationError(f"{path}: not a single clip")
    names = list(labels)
    row_of = {name: row for row, name in enumerate(names)}
    clips = _whole_files(names, [f"{'-'.join(name.split('-')[:3])}/{name}" for name in names], config)
    texts = [classes[code] for code in sorted(classes)]
    rows = [np.array([row_of[name] for name in split], dtype=np.int64) for split in splits]
    table = ClassificationTask(
        "action",
        texts,
        np.arange(len(texts)),
        np.array(list(labels.values()), dtype=np.int64),
        {},
        texts,
        rows,
        class_keys=[(str(code),) for code in sorted(classes)],
        key_columns=["action"],
    )
    said = f"split {config.test_split} of 3" if config.test_split else f"{len(splits)} of 3 splits are there"
    return Content(clips, [table], [] if len(splits) == 3 else [said])


def read_egomcq(config: BenchmarkConfig, protocol: EvalProtocol, cache: Path | None) -> Content:
    """EgoMCQ: which of five clips does a narration tell of; inter-video and intra-video questions apart."""
    path = _find(config, "egomcq.json")
    entries = read_json(path)
    if not isinstance(entries, dict) or not entries:
        raise AnnotationError(f"{path}: not a single question")
    clips: dict[tuple[str, float, float], int] = {}
    texts: dict[str, int] = {}
    questions = []
    for name, entry in entries.items():
        try:
            choices = entry["choices"]
            named = [
                (str(c["video_uid"]), float(c["clip_start"]), float(c["clip_end"]))
                for c in (choices[key] for key in sorted(choices, key=int))
            ]
            if not all(math.isfinite(time) for _, *times in named for time in times):
                raise ValueError("a time is not finite")
            rows = tuple(clips.setdefault(clip, len(clips)) for clip in named)
            kind, answer = EGOMCQ_KINDS[int(entry["types"])], int(entry["answer"])
            text = texts.setdefault(str(entry["query"]["clip_text"]), len(texts))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise AnnotationError(f"{path}: question '{name}': {type(error).__name__} {error}") from error
        if not 0 <= answer < len(rows):
            raise AnnotationError(f"{path}: question '{name}': answer is {answer}, but there are {len(rows)} choices")
        questions.append(Question(kind, False, text, rows, answer))
    videos, starts, ends = zip(*clips, strict=True)
    start = np.maximum(np.array(starts, dtype=np.float64), 0)
    end, backwards = _forwards(start, np.array(ends, dtype=np.float64))
    ids = [f"{video}:{a:.2f}-{b:.2f}" for video, a, b in clips]
    made = _clips(ids, list(videos), start, end, config)
    return Content(made, [MultipleChoiceTask(list(texts), questions)], _backwards(backwards))


def read_charades_ego(config: BenchmarkConfig, protocol: EvalProtocol, cache: Path | None) -> Content:
    """Charades-Ego: which of 157 classes occur in a video, by mAP; frames of the whole video."""
    classes_txt, path = _find(config, "Charades_v1_classes.txt"), _find(config, "CharadesEgo_v1_test_only1st.csv")
    names = {code: name for _, line in _lines(classes_txt) for code, _, name in [line.partition(" ")]}
    code_of = {code: number for number, code in enumerate(names)}
    table = read_csv(path, ("id", "actions"), unique="id")
    labels = np.zeros((len(table), len(names)), dtype=bool)
    for row, actions in enumerate(table["actions"]):
        for action in filter(None, (part.strip() for part in actions.split(";"))):
            code = action.split()[0]
            if code not in code_of:
                raise AnnotationError(f"{path}: row {row + 1}: actions names class '{code}', not in {classes_txt.name}")
            labels[row, code_of[code]] = True
    ids = table["id"].tolist()
    return Content(_whole_files(ids, ids, config), [MultiLabelTask("map", list(names.values()), labels)])


READERS: dict[str, Reader] = {
    "own": read_own,
    "labels": read_labels,
    "ek100_mir": read_ek100_mir,
    "ek100_cls": read_ek100_cls,
    "egtea": read_egtea,
    "egomcq": read_egomcq,
    "charades_ego": read_charades_ego,
}


def _whole_files(ids: list[str], videos: list[str], config: BenchmarkConfig) -> ClipList:
    made = _clips(ids, videos, np.zeros(len(ids)), np.full(len(ids), np.inf), config)
    return dataclasses.replace(made, layout="whole")


def _table_clips(ids: list[str], table: ClipTable, config: BenchmarkConfig) -> ClipList:
    videos = [str(video) for video in table.column("video_id")]
    return _clips(ids, videos, table.column("start_second"), table.column("end_second"), config)


def _clips(ids: list[str], videos: list[str], start: np.ndarray, end: np.ndarray, config: BenchmarkConfig) -> ClipList:
    return ClipList(
        ids, videos, start, end, config.root or "", config.layout, config.chunk_seconds, config.min_clip_seconds
    )


def _find(config: BenchmarkConfig, name: str) -> Path:
    """A file of a benchmark's annotation folder, or of its folder retrieval_annotations."""
    path = _look(config, name)
    if path is None:
        raise AnnotationError(f"{config.metadata}: no {name} there, which this benchmark needs")
    return path


def _look(config: BenchmarkConfig, name: str) -> Path | None:
    folder = Path(config.metadata or "")
    return next((path for path in (folder / name, folder / "retrieval_annotations" / name) if path.is_file()), None)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1."""
    lines = [(number, line.strip()) for number, line in enumerate(read_lines(path), start=1) if line.strip()]
    if not lines:
        raise AnnotationError(f"{path}: is empty")
    return lines
