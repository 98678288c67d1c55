"""Multiple-choice benchmarks about hands, objects and time; each is a row of ``FORMATS``: where its columns are.

handyvqa                   <type>/<question>.json: question, options, correct_idx [3]
egohoibench                a csv with tabs: video_uid, clip_start, clip_end, clip_text, verb_neg, noun_neg
chirality                  cia-<dataset>-<split>.csv: id, chiral_triplet_id, chiral_label, and a text
egoexolearn_mcq            *.jsonl: image.video, conversations: a prompt with lettered options, and a letter
egoexolearn_association    association_*.json: {question: {query, choices: {"0": {video_uid, start_sec, ...}}, answer}}
hd_epic_vqa                <type>.json: {question: {inputs: {"video 1": {id, start_time, ...}}, choices, correct_idx}}
egotempo                   egotempo_openQA.json: {annotations: [{clip_id, question_type, question, answer}]}

A dual encoder answers by similarity: of the clip to the choices, without the question.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from egohod.data.config import SourceConfig
from egohod.data.formats.base import (
    Benchmark,
    BenchmarkData,
    BenchmarkOptions,
    Question,
    QuestionData,
    backwards_note,
    is_utf8,
    parse_json,
    read_csv,
    read_json,
    read_lines,
    seconds,
)
from egohod.data.table import ClipTable, text_column
from egohod.data.videos import ENDINGS, MIN_SECONDS
from egohod.errors import UserError, nearest

Clip = tuple[str, float, float]
"""Video, start and end in seconds; an infinite end is that of the file."""

# "(A) The right hand flips the pork." on a line of its own.
_LETTERED = re.compile(r"^\(([A-Z])\)\s*(.*\S)\s*$", re.MULTILINE)
# EgoHOIBench's evaluation takes so many replaced captions of each sort.
_NEGATIVES = 10
_TIME = re.compile(r"<TIME ([\d:.]+) video 1>")
# Columns that say what happens in a clip, of SSv2, EPIC-KITCHENS and Charades.
_CHIRAL_TEXTS = ("text", "template", "narration", "caption", "label")


@dataclass
class Entry:
    """A question: its query and choices are clips or texts, ``right`` the numbers of the correct choices."""

    kind: str
    query: Clip | str
    choices: Sequence[Clip | str]
    right: tuple[int, ...]


@dataclass(frozen=True)
class QuestionFormat:
    """Where the columns of a benchmark are.

    A path such as ``inputs.0.id`` leads through objects and lists; of ``one|two`` the first that is there is taken.
    """

    name: str
    files: str
    """Pattern of its files below the folder of annotations, which may itself be given as one file."""
    video: str = ""
    """Not there: the name of the question."""
    choices: str = ""
    """A list of texts, or a prompt with lettered options. Empty: the answers of all questions of the same kind."""
    answer: str = ""
    """A number from 0, a letter, a choice, or a list of these."""
    kind: str = ""
    """Not there: the name of the file, or of the folder if a file is one question."""
    inside: str = ""
    """Where the questions are in a file."""
    clip: str = ""
    """Pattern of ``video`` with the groups video, start and end."""
    parse: Callable[[Mapping[str, Any], str], Iterator[Entry]] | None = None
    """Makes questions of an entry where columns are not enough; also gets the name of the file."""
    precision: Mapping[str, str] = field(default_factory=dict)
    """Kinds with several correct choices, as of :class:`~egohod.data.formats.base.QuestionData`."""
    note: str = ""
    whole_files: bool = False

    def read(self, source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
        """Clips and questions. Raises :class:`UserError` naming file, question and field."""
        questions, open_ended = Questions(Path(source.metadata)), list[tuple[Entry, str]]()
        entries = left_out = 0
        for path, name, entry in _entries(Path(source.metadata), self.files, self.inside):
            where = f"{path}: {name}"
            entries += 1
            # The keys of a file of others may be of any type, and lead anywhere.
            try:
                parsed = list(self.parse(entry, path.stem)) if self.parse else [self._entry(entry, path, name)]
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise UserError(f"{where}: {type(error).__name__} {error}") from error
            left_out += not parsed
            for each in parsed:
                if self.choices or self.parse:
                    questions.add(each, where)
                else:
                    open_ended.append((each, where))
        answers: dict[str, list[Clip | str]] = {}
        for each, _ in open_ended:
            answers.setdefault(each.kind, []).extend(each.choices)
        for each, where in open_ended:
            # The same answers in the same order for all questions of a kind.
            pool = list(dict.fromkeys(answers[each.kind]))
            questions.add(Entry(each.kind, each.query, pool, (pool.index(each.choices[0]),)), where)
        notes = [self.note] if self.note else []
        if left_out:
            notes.append(f"{left_out} of {entries} questions are left out, which no dual encoder can answer")
        return questions.data(notes, self.precision)

    def _entry(self, entry: Mapping[str, Any], path: Path, name: str) -> Entry:
        # "question 'action_0001'" has a name, "line 3" has none.
        video = str(_value(entry, self.video, default=name.partition("'")[2].rstrip("'") or None))
        start, end = 0.0, math.inf
        if self.clip:
            match = re.fullmatch(self.clip, video)
            if match is None:
                raise UserError(f"{self.video} is '{video}', not a video and two times")
            video, start, end = match["video"], float(match["start"]), float(match["end"])
        video = video.removesuffix(suffix) if (suffix := PurePosixPath(video).suffix) in ENDINGS else video
        kind = str(
            _value(entry, self.kind, default=path.parent.name if name == f"question '{path.stem}'" else path.stem)
        )
        answer = _value(entry, self.answer)
        if not self.choices:
            return Entry(kind, (video, start, end), [str(answer)], (0,))
        choices = _choices(_value(entry, self.choices))
        answers = answer if isinstance(answer, list) else [answer]
        return Entry(kind, (video, start, end), choices, tuple(_number(each, choices) for each in answers))


class Questions:
    """Questions while they are read: clips and texts recur in many of them and are encoded once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clips: dict[Clip, int] = {}
        self._texts: dict[str, int] = {}
        self._questions: list[Question] = []

    def add(self, entry: Entry, where: str) -> None:
        """Add a question. Raises :class:`UserError` that begins with ``where`` if it cannot be asked."""
        kind = re.sub(r"\W+", "_", entry.kind.lower()).strip("_")
        if not kind:
            raise UserError(f"{where}: the kind of question is '{entry.kind}', but becomes a metric's name")
        if len(entry.choices) < 2:
            raise UserError(f"{where}: there must be at least two choices, not {len(entry.choices)}")
        if not entry.right or not all(0 <= i < len(entry.choices) for i in entry.right):
            shown = ", ".join(map(str, entry.right)) or "missing"
            raise UserError(f"{where}: answer is {shown}, but there are {len(entry.choices)} choices, counted from 0")
        query, *choices = (self._place(each, where) for each in (entry.query, *entry.choices))
        first, *others = entry.right
        is_clip = isinstance(entry.query, tuple)
        of_clips = is_clip and isinstance(entry.choices[0], tuple)
        self._questions.append(Question(kind, is_clip, query, tuple(choices), first, of_clips, tuple(others)))

    def _place(self, item: Clip | str, where: str) -> int:
        if isinstance(item, str):
            if not item.strip() or not is_utf8(item):
                raise UserError(f"{where}: a text is {'not UTF-8' if item.strip() else 'empty'}")
            return self._texts.setdefault(item.strip(), len(self._texts))
        video, start, end = item
        parts = PurePosixPath(video)
        unsafe = not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in video
        if unsafe or not is_utf8(video):
            raise UserError(f"{where}: video '{video}' leads out of the folder")
        if not math.isfinite(start) or math.isnan(end):
            raise UserError(f"{where}: a time is not finite")
        return self._clips.setdefault(item, len(self._clips))

    def data(self, notes: Sequence[str] = (), precision: Mapping[str, str] | None = None) -> BenchmarkData:
        """All of it. Raises :class:`UserError` without a single question."""
        if not self._questions:
            raise UserError(f"{self.path}: not a single question")
        videos, starts, ends = zip(*self._clips, strict=True)
        start, end = np.maximum(np.array(starts, dtype=np.float64), 0), np.array(ends, dtype=np.float64)
        backwards = end <= start
        ids = [video if math.isinf(b) else f"{video}:{a:.2f}-{b:.2f}" for video, a, b in self._clips]
        table = ClipTable.of(self.path, videos, start, np.where(backwards, start + MIN_SECONDS, end), uid=ids)
        task = QuestionData(list(self._texts), self._questions, dict(precision or {}))
        return BenchmarkData(table, [task], [*notes, *backwards_note(int(backwards.sum()))])


def clip_choices(
    path: Path, times: tuple[str, str], kinds: Mapping[int, str], text: str | None = None
) -> BenchmarkData:
    """Questions whose choices are clips: {question: {query, choices: {"0": {video_uid, ...}}, answer, types}}.

    ``times`` are the keys of start and end, ``kinds`` names by ``types``, and ``text`` the key of a query that is no
    clip. Raises :class:`UserError` naming file and question.
    """
    entries = read_json(path)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: not a single question")

    def clip(value: Mapping[str, Any]) -> Clip:
        start, end = (float(value[key]) for key in times)
        if not math.isfinite(start) or not math.isfinite(end):
            raise ValueError("a time is not finite")
        return str(value["video_uid"]), start, end

    questions = Questions(path)
    for name, entry in entries.items():
        try:
            choices = entry["choices"]
            # JSON objects have no order, and "10" sorts before "2".
            named = [clip(choices[key]) for key in sorted(choices, key=int)]
            query = str(entry["query"][text]) if text else clip(entry["query"])
            parsed = Entry(kinds[int(entry["types"])], query, named, (int(entry["answer"]),))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{path}: question '{name}': {type(error).__name__} {error}") from error
        questions.add(parsed, f"{path}: question '{name}'")
    return questions.data()


# --------------------------------------------------------------------------------------------------
# Files and values
# --------------------------------------------------------------------------------------------------


def _entries(place: Path, pattern: str, inside: str) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """(file, question, its content) of all files of a benchmark."""
    # The path itself, if it is a file: people rename what they download.
    paths = [place] if place.is_file() else sorted(place.glob(pattern))
    if not paths:
        raise UserError(f"{place}: no {pattern} there, which this benchmark needs")
    for path in paths:
        if path.suffix == ".json":
            content = read_json(path)
            try:
                content = _value(content, inside) if inside else content
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            if isinstance(content, dict) and not all(isinstance(each, dict) for each in content.values()):
                yield path, f"question '{path.stem}'", content  # a file of its own for each question
            elif isinstance(content, (dict, list)):
                named = content.items() if isinstance(content, dict) else enumerate(content, 1)
                for name, entry in named:
                    yield path, f"question '{name}'", entry
            else:
                raise UserError(f"{path}: not a list of questions")
        elif path.suffix == ".jsonl":
            for number, line in enumerate(read_lines(path), 1):
                yield path, f"line {number}", parse_json(line, f"{path}: line {number}: not a question")
        else:
            for number, row in enumerate(read_csv(path, ()).to_dict("records"), 1):
                yield path, f"row {number}", {str(key): value for key, value in row.items()}


def _value(entry: Any, path: str, default: str | None = None) -> Any:
    """What a path leads to. Raises :class:`UserError` naming what is missing, if there is no default."""
    if default is not None:
        there = [each for each in path.split("|") if isinstance(entry, Mapping) and each.split(".")[0] in entry]
        if not there:
            return default
        path = there[0]
    for key in path.split("."):
        if isinstance(entry, Mapping):
            if key not in entry:
                raise UserError(f"no '{key}'{nearest(key, [str(each) for each in entry])}")
            entry = entry[key]
        elif isinstance(entry, list) and key.isdecimal() and int(key) < len(entry):
            entry = entry[int(key)]
        else:
            raise UserError(f"no '{path}', as '{key}' is missing")
    return entry


def _second(value: Any, key: str) -> float:
    second = float(seconds(text_column([str(value)]))[0])
    if math.isnan(second):
        raise UserError(f"{key} is '{value}', not a time in seconds or HH:MM:SS")
    return second


def _clip(entry: Any, video: str, start: str, end: str) -> Clip:
    first, last = (_second(_value(entry, key), key) for key in (start, end))
    return str(_value(entry, video)), first, last


def _choices(value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    if isinstance(value, str) and (options := _LETTERED.findall(value)):
        letters = "".join(letter for letter, _ in options)
        if letters != "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)]:
            raise UserError(f"the options are lettered {letters}")
        return [text for _, text in options]
    raise UserError("the choices are neither a list of texts nor a prompt with options (A), (B), ...")


def _number(answer: Any, choices: Sequence[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and re.fullmatch(r"\(?[A-Z]\)?\.?", answer.strip()):
        return ord(answer.strip("() .")) - ord("A")
    raise UserError(f"answer is {answer!r}, neither a number, a letter nor one of the choices")


# --------------------------------------------------------------------------------------------------
# What columns do not describe
# --------------------------------------------------------------------------------------------------


def _egohoi(row: Mapping[str, Any], file: str) -> Iterator[Entry]:
    """A clip against its caption with the verb or the noun replaced; ``action`` is both at once."""
    clip = _clip(row, "video_uid", "clip_start", "clip_end")
    own, replaced = str(_value(row, "clip_text")).strip(), {}
    for kind in ("verb", "noun"):
        texts = [text.strip() for text in str(_value(row, f"{kind}_neg")).split(",")]
        replaced[kind] = list(dict.fromkeys(text for text in texts[:_NEGATIVES] if text and text != own))
    # A few captions have no noun, or no verb, that could be replaced.
    if all(replaced.values()):
        replaced["action"] = replaced["verb"] + replaced["noun"]
    for kind, texts in replaced.items():
        if texts:
            # Not always first: of equal similarities the first counts, and a model that sees nothing would be right.
            place = zlib.crc32(own.encode()) % (len(texts) + 1)
            yield Entry(kind, clip, [*texts[:place], own, *texts[place:]], (place,))


def _hd_epic(entry: Mapping[str, Any], file: str) -> Iterator[Entry]:
    """A question about one clip; nothing for those about boxes, pictures, several videos or a whole recording."""
    inputs, choices, right = (_value(entry, key) for key in ("inputs", "choices", "correct_idx"))
    question = str(_value(entry, "question"))
    shown = inputs.get("video 1", {})
    if list(inputs) != ["video 1"] or "start_time" not in shown:
        return
    choices, right = _choices(choices), (_number(right, choices),)
    clip = _clip(shown, "id", "start_time", "end_time")
    times = [_TIME.findall(choice) for choice in choices]
    if all(len(each) == 2 for each in times) and (action := re.search(r"<([^<>]+)>", question)):
        # "When did the action <hit spatula> happen": which of the clips shows the text?
        clips = [(clip[0], _second(start, "TIME"), _second(end, "TIME")) for start, end in times]
        yield Entry(file, action[1], clips, right)
    elif not any("<BBOX" in text or "<TIME" in text for text in (question, *choices)):
        yield Entry(file, clip, choices, right)


def _read_chirality(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Opposite actions on the same kind of object: which of two texts is a clip's, and the clips of a text (mAP)."""
    place = Path(source.metadata)
    paths = [place] if place.is_file() else sorted(place.glob("cia-*.csv"))
    if len(paths) != 1:
        held = "no" if not paths else "several"
        raise UserError(f"{place}: {held} cia-*.csv there; give the file itself, such as cia-ssv2-validation.csv")
    path = paths[0]
    table = read_csv(path, ("id", "chiral_triplet_id", "chiral_label"))
    column = next((name for name in _CHIRAL_TEXTS if name in table.columns), None)
    if column is None:
        raise UserError(f"{path}: no column with a text; one of {', '.join(_CHIRAL_TEXTS)} is needed")
    if strange := sorted(set(table["chiral_label"]) - {"0", "1", "0.0", "1.0"}):
        raise UserError(f"{path}: chiral_label is '{strange[0]}', but must be 0 or 1, the two directions")
    table["chiral_label"] = table["chiral_label"].str[0]
    table = table.drop_duplicates(["id", "chiral_triplet_id", "chiral_label"])
    questions, alone = Questions(path), 0
    for name, rows in table.groupby("chiral_triplet_id", sort=False):
        # As the authors do: the first clip of a direction names it.
        texts = rows.drop_duplicates("chiral_label").set_index("chiral_label")[column].to_dict()
        if len(texts) < 2 or texts["0"] == texts["1"]:
            alone += 1
            continue
        clips: list[Clip | str] = [(str(video), 0.0, math.inf) for video in rows["id"]]
        labels = rows["chiral_label"].tolist()
        where = f"{path}: triplet '{name}'"
        for clip, label in zip(clips, labels, strict=True):
            questions.add(Entry("pairs", clip, [texts["0"], texts["1"]], (int(label),)), where)
        for label, text in texts.items():
            right = tuple(i for i, other in enumerate(labels) if other == label)
            questions.add(Entry("pairs_map_t2v", text, clips, right), where)
    notes = [f"{alone} triplets have clips of one direction only, or one text for both, and are left out"]
    return questions.data(notes if alone else [], {"pairs_map_t2v": "each"})


def _read_association(source: SourceConfig, options: BenchmarkOptions) -> BenchmarkData:
    """Which of several clips from the other view shows the same action: egocentric to exocentric, and back."""
    place = Path(source.metadata)
    paths = [place] if place.is_file() else sorted(place.glob("association_*.json"))
    if not paths:
        raise UserError(f"{place}: no association_*.json there, which this benchmark needs")
    return clip_choices(paths[0], ("start_sec", "end_sec"), {1: "ego_to_exo", 2: "exo_to_ego"})


_TABLES = (
    QuestionFormat(
        "handyvqa", "*/*.json", video="video|video_id|clip_id|question_id", choices="options", answer="correct_idx",
        kind="question_type|category", precision={"objects": "pooled"}, whole_files=True,
    ),
    QuestionFormat("egohoibench", "*.csv", parse=_egohoi),
    QuestionFormat(
        "egoexolearn_mcq", "*.jsonl", video="image.video", choices="conversations.0.value",
        answer="conversations.1.value", whole_files=True,
    ),
    QuestionFormat("hd_epic_vqa", "*.json", parse=_hd_epic),
    QuestionFormat(
        "egotempo", "egotempo_openQA.json", inside="annotations", video="clip_id", kind="question_type",
        answer="answer", clip=r"(?P<video>.+)_(?P<start>[\d.]+)_(?P<end>[\d.]+)",
        note="the answers of all questions of a type are the choices; the authors grade open answers by an LLM, so "
        "that these numbers compare with none of theirs",
    ),
)  # fmt: skip
QUESTIONS = (
    *(Benchmark(each.name, each.read, each.whole_files) for each in _TABLES),
    Benchmark("chirality", _read_chirality, whole_files=True),
    Benchmark("egoexolearn_association", _read_association),
)
