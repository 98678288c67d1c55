"""Your own clips: a table with video_id, start_second, end_second and text (or caption), as the HOD annotations have.

As a benchmark (``kind: custom``) it may have the columns uid and action, and files beside it: relevancy.csv,
classes.csv, questions.jsonl (docs/evaluation.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    Benchmark,
    BenchmarkData,
    BenchmarkOptions,
    ClassificationData,
    Format,
    Question,
    QuestionData,
    RetrievalData,
    TaskData,
    backwards_note,
    parse_table,
)
from egohod.data.table import ClipTable, RawClips
from egohod.data.text_files import parse_json, read_csv, read_lines
from egohod.errors import UserError

_COLUMNS = {
    "video_id": ["video_id"],
    "start_second": ["start_second"],
    "end_second": ["end_second"],
    "text": ["text", "caption"],
}
# Metrics of kinds of questions that have another name than the kind; questions.jsonl of the demo world has these.
KIND_METRICS = {
    "across_clips": "choice_across_clips",
    "object": "object",
    "state_changing": "motion_state_changing",
    "transient": "motion_transient",
}


def _parse(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    return parse_table(path, source, extra, _COLUMNS)


def _read_benchmark(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Clips and up to three tasks.

    Retrieval: clips against the distinct texts, graded by relevancy.csv (uid, text, relevancy) if it is there, else 1
    for texts of the same action, else 1 for the clip's own text. Classification: classes.csv (action, text, and one
    column for each coarser label). Multiple choice: questions.jsonl.
    """
    path = Path(source.metadata)
    table = ClipTable.checked(path, _parse(path, source, None), strict=True)
    uids = table.ids
    if len(set(uids)) < len(uids):
        again = next(i for i, uid in enumerate(uids) if uid in uids[:i])
        raise UserError(f"{table.where(again)}: uid '{uids[again]}' occurs twice")
    actions = table.column("action").astype(str) if "action" in table.column_names else None
    tasks: list[TaskData] = [_retrieval(table, uids, actions, path.with_name("relevancy.csv"))]
    if (classes := path.with_name("classes.csv")).exists():
        if actions is None:
            raise UserError(f"{path}: column 'action' is missing, whose classes {classes.name} describes")
        tasks.append(_classification(actions, classes))
    if (questions := path.with_name("questions.jsonl")).exists():
        tasks.append(read_questions(questions, uids))
    return BenchmarkData(table, tasks, backwards_note(table.report.backwards))


def _retrieval(table: ClipTable, uids: list[str], actions: np.ndarray | None, path: Path) -> RetrievalData:
    """Clips against distinct texts."""
    # Several clips may share a text; duplicates would compete with each other for the first rank.
    texts, text_of_clip = np.unique([table.row(i).texts[0] for i in range(len(table))], return_inverse=True)
    if path.exists():
        graded = read_csv(path, ("uid", "text", "relevancy"))
        row_of, column_of = {uid: i for i, uid in enumerate(uids)}, {text: i for i, text in enumerate(texts.tolist())}
        relevancy = np.zeros((len(uids), len(texts)), dtype=np.float32)
        for row, (uid, text, cell) in enumerate(zip(graded["uid"], graded["text"], graded["relevancy"], strict=True)):
            where = f"{path}: row {row + 1}"
            if uid not in row_of or text not in column_of:
                what = f"uid '{uid}'" if uid not in row_of else f"text '{text}'"
                raise UserError(f"{where}: {what} is not among the clips of {table.path}")
            try:
                value = float(cell)
            except ValueError:
                value = -1.0
            if not 0 <= value <= 1:
                raise UserError(f"{where}: relevancy is '{cell}', not a number from 0 to 1")
            relevancy[row_of[uid], column_of[text]] = value
    elif actions is not None:
        _, action = np.unique(actions, return_inverse=True)
        # A narration belongs to one action, that of the first clip that has it.
        first = np.unique(text_of_clip, return_index=True)[1]
        relevancy = (action[:, None] == action[first]).astype(np.float32)
    else:
        relevancy = (text_of_clip[:, None] == np.arange(len(texts))).astype(np.float32)
    return RetrievalData(texts.tolist(), text_of_clip, relevancy)


def _classification(actions: np.ndarray, path: Path) -> ClassificationData:
    """Classes with one prompt a row; further columns are coarser labels (verb, noun)."""
    prompts = read_csv(path, ("action", "text"))
    # In the order of the file: users compare confusion matrices with their own lists.
    names = list(dict.fromkeys(prompts["action"]))
    code = {name: number for number, name in enumerate(names)}
    if unlisted := [action for action in actions if action not in code]:
        raise UserError(f"{path}: no class '{unlisted[0]}', but a clip has this action")
    first = prompts.drop_duplicates("action")
    parts = {
        str(part): np.unique(first[part], return_inverse=True)[1]
        for part in prompts.columns
        if part not in ("action", "text")
    }
    columns = list(parts) or ["action"]
    return ClassificationData(
        "_".join(parts) or "action",
        prompts["text"].tolist(),
        np.array([code[action] for action in prompts["action"]], dtype=np.int64),
        np.array([code[action] for action in actions], dtype=np.int64),
        parts,
        names,
        class_keys=[tuple(str(value) for value in row) for row in first[columns].to_numpy()],
        key_columns=columns,
    )


def read_questions(path: Path, uids: Sequence[str]) -> QuestionData:
    """Multiple-choice questions, one JSON object a line; clips are named by their uid.

    Raises :class:`UserError` naming file, line and field.
    """
    rows = {uid: row for row, uid in enumerate(uids)}
    texts: dict[str, int] = {}

    def place(item: Any, where: str) -> tuple[bool, int]:
        """Whether it is a clip, and its row among the clips or the texts."""
        if not isinstance(item, dict) or set(item) not in ({"clip"}, {"text"}):
            raise UserError(f'{where} must be {{"clip": uid}} or {{"text": "..."}}, not {json.dumps(item)}')
        if "text" in item:
            return False, texts.setdefault(str(item["text"]), len(texts))
        if str(item["clip"]) not in rows:
            raise UserError(f"{where} is clip '{item['clip']}', which is not among the clips")
        return True, rows[str(item["clip"])]

    # Numbers of lines, not of questions: that is where an editor goes to.
    questions = []
    for number, line in enumerate(read_lines(path), start=1):
        where = f"{path}: line {number}"
        entry = parse_json(line, f"{where}: not a question with kind, query, choices and answer")
        try:
            kind, query, choices, answer = (entry[key] for key in ("kind", "query", "choices", "answer"))
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: not a question with kind, query, choices and answer ({error})") from error
        if not isinstance(kind, str) or not kind.isidentifier():
            raise UserError(f"{where}: kind is {json.dumps(kind)}, but becomes a metric's name: use letters and _")
        if not isinstance(choices, list) or len(choices) < 2:
            raise UserError(f"{where}: choices must be a list of at least two")
        # bool is an int to Python.
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise UserError(f"{where}: answer is {answer!r}, but there are {len(choices)} choices, counted from 0")
        query_is_clip, row = place(query, f"{where}: query")
        placed = [place(choice, f"{where}: choice {i}") for i, choice in enumerate(choices)]
        if any(is_clip == query_is_clip for is_clip, _ in placed):
            raise UserError(f"{where}: the choices of a clip must be texts, those of a text clips")
        name = KIND_METRICS.get(kind, kind)
        questions.append(Question(name, query_is_clip, row, tuple(row for _, row in placed), answer))
    if not questions:
        raise UserError(f"{path}: not a single question")
    return QuestionData(list(texts), questions)


HOD = Format("hod", _parse, benchmarks=(Benchmark("custom", _read_benchmark),))
