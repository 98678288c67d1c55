"""Files for the EPIC-KITCHENS-100 challenges of multi-instance retrieval and action recognition, and their check.

<folder>/<benchmark>.zip    a zip of one file: test.pkl for retrieval, test.json for action recognition

The rules are those of the organisers' own code: ``create_submission.py`` and ``utils/challenge.py`` of
epic-kitchens/C1-Action-Recognition, ``validate_submission`` of epic-kitchens/C3-Action-Anticipation, which names both
challenges, and ``test_jpose_triplet.py`` of mwray/Joint-Part-of-Speech-Embeddings, their baseline of retrieval.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from egohod import pickles
from egohod.errors import UserError
from egohod.evaluation.metrics import rank_items
from egohod.evaluation.runner import Benchmark, BenchmarkResult, Measured
from egohod.evaluation.tasks import TEMPERATURE, ClassificationTask, RetrievalTask
from egohod.runtime import atomic_write

# Classes that the challenge wants a score of, and how many actions if any.
CLASSES = {"verb": 97, "noun": 300}
ACTIONS = 100
# Levels of the Supervision Levels Scale (2008.09890): pretraining, training labels, training data.
LEVELS = ("sls_pt", "sls_tl", "sls_td")
# The baseline of retrieval writes its version as a number, participants as a text.
_VERSIONS: Mapping[str, Sequence[Any]] = {"test.json": ("0.2",), "test.pkl": ("0.1", 0.1)}
_CHALLENGES = {"test.json": "action_recognition", "test.pkl": "multi_instance_retrieval"}
_KEY_COLUMNS = ["verb_class", "noun_class"]
# Of a message: ids or problems that it names.
_NAMED = 5
# Far above what such a file has (150 MB for retrieval): a small zip may hold any number of zeros.
_LARGEST = 4 << 30


def challenge_task(benchmark: Measured) -> int | None:
    """Which of the benchmark's tasks a challenge scores; None if there is no challenge for any."""
    for number, task in enumerate(benchmark.tasks if isinstance(benchmark, Benchmark) else ()):
        if isinstance(task, RetrievalTask) and task.text_ids:
            return number
        if isinstance(task, ClassificationTask) and list(task.key_columns) == _KEY_COLUMNS:
            return number
    return None


def write_submission(
    folder: str | Path, benchmark: Benchmark, result: BenchmarkResult, supervision: Sequence[int]
) -> Path:
    """Write the challenge's file for a benchmark that has one (:func:`challenge_task`), check it, and return its path.

    ``supervision`` are the values of ``LEVELS``. Raises :class:`UserError` where clips are missing or a class is not
    one of EPIC-KITCHENS-100.
    """
    number = challenge_task(benchmark)
    assert number is not None, f"{benchmark.name}: no challenge"
    task, (video, text), clips = benchmark.tasks[number], result.features[number], benchmark.dataset.clips.ids
    if len(result.rows) < len(clips):
        some = f"{len(result.rows)} of {len(clips)} clips"
        raise UserError(f"benchmark {benchmark.name}: a submission needs all clips, and {some} could be read")
    name = "test.pkl" if isinstance(task, RetrievalTask) else "test.json"
    header = {"version": _VERSIONS[name][0], "challenge": _CHALLENGES[name]}
    header |= dict(zip(LEVELS, supervision, strict=True))
    path = Path(folder) / f"{benchmark.name}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=5) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        if isinstance(task, RetrievalTask):
            matrix = task.scores(video, text).numpy()
            content = header | {"sim_mat": matrix, "vis_ids": list(clips), "txt_ids": list(task.text_ids)}
            # NumPy 2 renamed the module of an array's constructor. It reads the old name too, and a grader with NumPy 1
            # reads no other. Protocol 3 writes names as plain lines.
            old, new = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
            file.write(pickle.dumps(content, protocol=3).replace(old, new, 1))
        else:
            assert isinstance(task, ClassificationTask)
            # Piece by piece: all 13,092 clips of the test split are six million numbers.
            file.write((json.dumps(header)[:-1] + ', "results": {').encode())
            for place, (clip, scores) in enumerate(zip(clips, _action_scores(task, video, text), strict=True)):
                file.write(f"{', ' if place else ''}{json.dumps(clip)}: {json.dumps(scores)}".encode())
            file.write(b"}}")
    check_submission(path, clips, task.text_ids if isinstance(task, RetrievalTask) else ())
    return path


def _action_scores(task: ClassificationTask, video: Any, text: Any) -> Iterator[dict[str, dict[str, float]]]:
    """For each clip: a score of every verb and noun of the challenge, and of the best actions as 'verb,noun'."""
    numbers = np.array([[int(value) for value in key] for key in task.class_keys])
    for column, (part, count) in enumerate(CLASSES.items()):
        if (largest := int(numbers[:, column].max())) >= count:
            raise UserError(f"a class has {part} {largest}, but EPIC-KITCHENS-100 has {count}: 0 to {count - 1}")
    actions = task.scores(video, text).double()
    if not task.by_heads:
        actions = (actions / TEMPERATURE).softmax(dim=1)
    parts = []
    for column, (name, probabilities) in enumerate(task.part_scores(video, text).items()):
        # Of a class without a training clip nothing is known: it is the least likely.
        full = np.zeros((len(probabilities), CLASSES[name]))
        place = np.zeros(probabilities.shape[1], dtype=np.int64)
        place[task.parts[name]] = numbers[:, column]
        full[:, place] = probabilities
        parts.append((name, full))
    names = [f"{verb},{noun}" for verb, noun in numbers.tolist()]
    for row, scores in enumerate(actions.numpy()):
        # Six digits: enough for a ranking, and half the size.
        clip = {name: {str(c): _rounded(value) for c, value in enumerate(full[row])} for name, full in parts}
        # All or none: of fewer actions the organisers' program refuses any, and derives them from verbs and nouns.
        if len(names) >= ACTIONS:
            best = rank_items(scores[None])[0, :ACTIONS]
            clip["action"] = {names[c]: _rounded(scores[c]) for c in best}
        yield clip


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


# --------------------------------------------------------------------------------------------------
# The check
# --------------------------------------------------------------------------------------------------


def check_submission(path: str | Path, clips: Sequence[str], texts: Sequence[str] = ()) -> str:
    """Check a submission, anyone's, against the organisers' rules, and return what it is in a line.

    ``path`` is the zip, or the test.json or test.pkl inside; ``clips`` are the narration ids that the challenge
    expects, ``texts`` those of the sentences of retrieval. Nothing in the file is run. Raises :class:`UserError` with
    everything that is wrong.
    """
    path = Path(path)
    name, raw = _unpacked(path)
    try:
        content = json.loads(raw) if name == "test.json" else pickles.load(raw, "a submission", arrays=True)
    except (OSError, ValueError, RecursionError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: {name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {name} holds no dictionary")
    problems = []
    expected = {"version": _VERSIONS[name], "challenge": (_CHALLENGES[name],)} | dict.fromkeys(LEVELS, range(6))
    for key, allowed in expected.items():
        value = content.get(key)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value not in allowed:
            choices = "a whole number from 0 to 5" if key in LEVELS else " or ".join(map(repr, allowed))
            problems.append(f"'{key}' is {value!r:.60}, not {choices}" if key in content else f"no '{key}'")
    if name == "test.json":
        problems += _result_problems(content.get("results"), clips)
    else:
        problems += _matrix_problems(content, clips, texts)
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise UserError(f"{path}: {'; '.join(problems[:_NAMED])}{more}")
    levels = "-".join(str(content[level]) for level in LEVELS)
    return f"{path}: {_CHALLENGES[name]}, {len(clips)} clips, supervision SLS-{levels}: follows the rules"


def is_retrieval(path: Path) -> bool:
    """Whether a submission's name says that it is one of retrieval: its own, or that of the file in the zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "test.pkl" in archive.namelist()
    except Exception:  # no zip, or a damaged one, which check_submission names
        return path.suffix == ".pkl"


def _unpacked(path: Path) -> tuple[str, bytes]:
    """The name and content of the file inside a zip, or of the file itself."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if not zipfile.is_zipfile(path):
            if path.suffix not in (".json", ".pkl"):
                raise UserError(f"{path}: neither a zip nor a .json or .pkl file")
            return f"test{path.suffix}", path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) != 1 or names[0] not in _CHALLENGES:
                raise UserError(f"{path}: must hold test.json or test.pkl alone, not {', '.join(names[:_NAMED])}")
            if archive.infolist()[0].file_size > _LARGEST:
                raise UserError(f"{path}: {names[0]} would have {archive.infolist()[0].file_size:,} bytes")
            return names[0], archive.read(names[0])
    except UserError:
        raise
    except Exception as error:  # a damaged zip can raise anything
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _id_problems(what: str, ids: Sequence[Any], expected: Sequence[str]) -> list[str]:
    missing, unexpected = set(expected) - set(ids), set(ids) - set(expected)
    return [
        f"{len(each)} {what} are {kind}: {', '.join(sorted(map(str, each))[:_NAMED])}{', ...' * (len(each) > _NAMED)}"
        for kind, each in (("missing", missing), ("not in the challenge", unexpected))
        if each
    ]


def _result_problems(results: Any, clips: Sequence[str]) -> list[str]:
    """What is wrong with the scores of action recognition."""
    if not isinstance(results, dict):
        return ["'results' is not a dictionary by narration id"]
    problems, with_actions = _id_problems("narration ids", list(results), clips), set()
    for clip, scores in results.items():
        if not isinstance(scores, dict):
            problems.append(f"{clip}: no dictionary of scores")
            continue
        with_actions.add("action" in scores)
        for part, count in CLASSES.items():
            given = scores.get(part)
            if not isinstance(given, dict):
                problems.append(f"{clip}: no '{part}' scores")
            elif given.keys() != {str(c) for c in range(count)}:
                problems.append(f"{clip}: '{part}' needs a score of each class '0' to '{count - 1}', has {len(given)}")
        actions = scores.get("action", {})
        if not isinstance(actions, dict) or ("action" in scores and len(actions) != ACTIONS):
            problems.append(f"{clip}: 'action' needs exactly {ACTIONS} scores, or to be left out everywhere")
            actions = {}
        for key in actions:
            words = [text.strip() for text in key.split(",")]
            numbers = [int(text) if text.isdecimal() and len(text) < 5 else -1 for text in words]
            if len(numbers) != 2 or not all(0 <= n < c for n, c in zip(numbers, CLASSES.values(), strict=True)):
                problems.append(f"{clip}: action '{key:.40}' is not a 'verb,noun' of the challenge")
        for part in scores.values():
            for key, score in part.items() if isinstance(part, dict) else ():
                # The organisers' program takes NaN and infinity too, but their rank is arbitrary.
                if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 1e300:
                    problems.append(f"{clip}: the score of '{key:.40}' is {score!r:.40}, not a finite number")
        if len(problems) > 100:
            break
    if len(with_actions) > 1:
        problems.append("some clips have 'action' scores and others none: give them for all clips or for none")
    return problems


def _matrix_problems(content: Mapping[str, Any], clips: Sequence[str], texts: Sequence[str]) -> list[str]:
    """What is wrong with the similarities of retrieval."""
    problems, lengths = [], []
    for key, expected in (("vis_ids", clips), ("txt_ids", texts)):
        ids = content.get(key)
        # A list, or an array or a pandas Index of texts.
        if not isinstance(ids, (list, tuple, np.ndarray)) or not all(isinstance(each, str) for each in ids):
            problems.append(f"'{key}' is not a list of narration ids")
            continue
        ids = list(ids)
        lengths.append(len(ids))
        wrong = _id_problems(f"ids of '{key}'", ids, expected)
        # The grader's code is not public: whether it would sort them is unknown.
        if not wrong and ids != list(expected):
            wrong = [f"'{key}' has the right ids, but not once each in the order of the annotation file"]
        problems += wrong
    matrix = content.get("sim_mat")
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f":
        problems.append("'sim_mat' is not a matrix of numbers")
    elif len(lengths) == 2 and list(matrix.shape) != lengths:
        problems.append(f"'sim_mat' is {list(matrix.shape)}, but vis_ids and txt_ids are {lengths}")
    elif not np.isfinite(matrix).all():
        problems.append("'sim_mat' holds NaN or infinite values")
    return problems
