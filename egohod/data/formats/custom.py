"""Your own clips: a table with video_id, start_second, end_second and text (or caption), as the HOD annotations have.

hod         the format; as a benchmark (``kind: custom``) it may have the columns uid and action, and files beside it:
            relevancy.csv, classes.csv, questions.jsonl (docs/evaluation.md)
labels      a csv of labelled clips: video, start, end, label
no file     the videos of a folder, windows that slide over them, or the rows of a csv without narrations: see
            :func:`whole_files`, :func:`windows` and :func:`rows_of_csv`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    NAMELESS,
    Benchmark,
    BenchmarkData,
    BenchmarkOptions,
    ClassificationData,
    Format,
    Question,
    QuestionData,
    RawClips,
    RetrievalData,
    TaskData,
    canonical_column,
    parse_json,
    parse_table,
    read_csv,
    read_header,
    read_lines,
    require_clips,
    seconds,
)
from egohod.data.table import ClipTable, text_column
from egohod.data.videos import list_videos, sliding_windows
from egohod.errors import UserError

_COLUMNS = {
    "video_id": ["video_id"],
    "start_second": ["start_second"],
    "end_second": ["end_second"],
    "text": ["text", "caption"],
}
_LABEL_COLUMNS = {"video_id": ["video"], "start_second": ["start"], "end_second": ["end"], "text": ["label"]}

# --------------------------------------------------------------------------------------------------
# Narrated clips
# --------------------------------------------------------------------------------------------------


def _read_benchmark(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Clips and up to three tasks.

    Retrieval: clips against the distinct texts, graded by relevancy.csv (uid, text, relevancy) if it is there, else 1
    for texts of the same action, else 1 for the clip's own text. Classification: classes.csv (action, text, and one
    column for each coarser label). Multiple choice: questions.jsonl.
    """
    path = Path(source.metadata)
    table, notes = require_clips(path, parse_table(path, source, None, _COLUMNS))
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
        tasks.append(read_questions(questions, uids, options.metric_names))
    return BenchmarkData(table, tasks, notes)


def _retrieval(table: ClipTable, uids: list[str], actions: np.ndarray | None, path: Path) -> RetrievalData:
    """Clips against distinct texts."""
    # Several clips may share a text; duplicates would compete with each other for the first rank.
    texts, text_of_clip = np.unique([table.row(i).texts[0] for i in range(len(table))], return_inverse=True)
    if path.exists():
        graded = read_csv(path, ("uid", "text", "relevancy"))
        row_of, column_of = {uid: i for i, uid in enumerate(uids)}, {text: i for i, text in enumerate(texts.tolist())}
        relevancy = np.zeros((len(uids), len(texts)), dtype=np.float32)
        for row, (uid, text, cell) in enumerate(zip(graded["uid"], graded["text"], graded["relevancy"], strict=True)):
            # A missing pair is 0, a misspelled one must not become that.
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
    # Of several prompts for a class, the first row has its coarser labels.
    first = prompts.drop_duplicates("action")
    further = [column for column in prompts.columns if column not in ("action", "text")]
    parts = {str(part): np.unique(first[part], return_inverse=True)[1] for part in further}
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


def read_questions(path: Path, uids: Sequence[str], metric_names: Mapping[str, str] | None = None) -> QuestionData:
    """Multiple-choice questions, one JSON object a line; clips are named by their uid.

    A kind of question gives its metric the name that ``metric_names`` has for it, else its own.
    Raises :class:`UserError` naming file, line and field.
    """
    rows = {uid: row for row, uid in enumerate(uids)}
    texts: dict[str, int] = {}

    def place(item: Any, where: str) -> tuple[bool, int]:
        """Whether it is a clip, and its row among the clips or the texts."""
        if not isinstance(item, dict) or set(item) not in ({"clip"}, {"text"}):
            raise UserError(f'{where} must be {{"clip": uid}} or {{"text": "..."}}, not {json.dumps(item)}')
        if "text" in item:
            # Texts recur in many questions and are encoded once.
            return False, texts.setdefault(str(item["text"]), len(texts))
        if str(item["clip"]) not in rows:
            raise UserError(f"{where} is clip '{item['clip']}', which is not among the clips")
        return True, rows[str(item["clip"])]

    questions = []
    # Numbers of lines, not of questions: that is where an editor goes to.
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
        name = (metric_names or {}).get(kind, kind)
        questions.append(Question(name, query_is_clip, row, tuple(row for _, row in placed), answer))
    if not questions:
        raise UserError(f"{path}: not a single question")
    return QuestionData(list(texts), questions)


# --------------------------------------------------------------------------------------------------
# Labelled clips
# --------------------------------------------------------------------------------------------------


def _parse_labels(path: Path, source: SourceConfig, extra: Sequence[str] | None) -> RawClips:
    allowed = {name for usual in _LABEL_COLUMNS.values() for name in usual}
    allowed |= {*source.columns.values(), *map(canonical_column, source.columns.values())}
    # Refused rather than ignored: a further column is often the start of a csv of another format.
    strange = [name for name in read_header(path).names if name not in allowed and not NAMELESS.fullmatch(name)]
    if strange:
        raise UserError(
            f"{path}: unknown column '{strange[0]}'; a csv of labelled clips has video,start,end,label "
            "(the source's columns can name others)"
        )
    # A wrong class is worse than a missing clip, so one bad label refuses the file.
    raw = parse_table(path, source, (), _LABEL_COLUMNS)
    for number, label in zip(raw.numbers, raw.columns["text"].to_pylist(), strict=True):
        # "nan" is what a missing one becomes on its way through many programs.
        if label is None or label.strip().lower() in ("", "nan"):
            raise UserError(f"{path}: {raw.unit} {number}: the label is '{label or ''}', which is none")
    columns = raw.columns.append_column("label", raw.columns["text"])
    return dataclasses.replace(raw, columns=columns, class_names=True)


def _read_labels(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Classification; the prompt of each class is its name."""
    path = Path(source.metadata)
    table, notes = require_clips(path, _parse_labels(path, source, None))
    names, labels = np.unique([str(label).strip() for label in table.column("label")], return_inverse=True)
    texts = names.tolist()
    keys = [(name,) for name in texts]
    classes = ClassificationData(
        "action", texts, np.arange(len(texts)), labels, class_names=texts, class_keys=keys, key_columns=["label"]
    )
    return BenchmarkData(table, [classes], notes)


# --------------------------------------------------------------------------------------------------
# Any videos. Clips of one video are side by side. They are used as they are, so read them with min_clip_seconds=0.
# --------------------------------------------------------------------------------------------------


def whole_files(root: str) -> tuple[ClipTable, list[str]]:
    """Every video below a local folder as one clip, and why some videos have none.

    Raises :class:`UserError` if there is no video.
    """
    files, faults = list_videos(root)
    # Only the decoder knows how long a file is; an infinite end is that of the video.
    return _grouped(Path(root), [(video, 0.0, np.inf) for video in files]), faults


def windows(root: str, window: float, stride: float, decoder: str = "auto") -> tuple[ClipTable, list[str]]:
    """Windows of ``window`` seconds every ``stride`` seconds over every video below a local folder.

    They start at 0, stride, 2 x stride, ... until one reaches the end of the video, where it is cut. Also returns why
    some videos have none. Raises :class:`UserError` if there is no video.
    """
    clips, faults = sliding_windows(root, window, stride, decoder)
    return _grouped(Path(root), clips), faults


def rows_of_csv(path: Path) -> ClipTable:
    """The clips of a csv with video_id, start_second and end_second (seconds or HH:MM:SS.ss), and perhaps text.

    Raises :class:`UserError` naming file, row and column.
    """
    table = read_csv(path, ("video_id", "start_second", "end_second"))
    start, end = (seconds(text_column(table[name].tolist())) for name in ("start_second", "end_second"))
    clips = list(zip(table["video_id"], start.tolist(), end.tolist(), strict=True))
    for row, (video, first, last) in enumerate(clips):
        where, parts = f"{path}: row {row + 1}", PurePosixPath(video)
        # Feature files are called like the videos: none may lead out of the folder.
        if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in video:
            raise UserError(f"{where}: video_id '{video}' leads out of the folder")
        if not 0 <= first < last:  # false for NaN, too
            times = f"{table['start_second'][row]}' to '{table['end_second'][row]}"
            raise UserError(f"{where}: '{times}' is no stretch of time: 0 <= start_second < end_second is needed")
    return _grouped(path, clips, table["text"].tolist() if "text" in table.columns else None)


def _grouped(path: Path, clips: Sequence[tuple[str, float, float]], texts: Sequence[str] | None = None) -> ClipTable:
    """A table of (video, start, end), videos in the order in which they first occur."""
    # Stable: features are written video by video, whatever the order of the csv.
    first = {video: row for row, (video, _, _) in reversed(list(enumerate(clips)))}
    order = sorted(range(len(clips)), key=lambda row: first[clips[row][0]])
    videos, starts, ends = zip(*(clips[row] for row in order), strict=True) if clips else ((), (), ())
    uids = [
        video if np.isinf(end) else f"{video} {start:.2f}-{end:.2f} s"
        for video, start, end in zip(videos, starts, ends, strict=True)
    ]
    narrations = [texts[row] for row in order] if texts else [""] * len(order)
    return ClipTable.of(path, videos, starts, ends, uid=uids, text=narrations)


HOD = Format("hod", partial(parse_table, columns=_COLUMNS), benchmarks=(Benchmark("custom", _read_benchmark),))
LABELS = Format("labels", _parse_labels, columns=("video", "label"), benchmarks=(Benchmark("labels", _read_labels),))
