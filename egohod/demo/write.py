"""Write demo worlds: 15 s H.264 chunks, narration tables, true boxes and questions.

    world.json                         seed, scale, version and which splits are done (changed last)
    <split>/videos/<video>/0000.mp4    chunks of 15 s
    <split>/hod.csv, narrations.csv    the same clips, narrated with the hands' motion or as coarsely as Ego4D
    <split>/detections.parquet         the true boxes of both hands and the object, with contact states
    <split>/classes.csv                one prompt per action class
    <split>/questions.jsonl            multiple choice, val and test only

A video's folder appears under its name only when it is complete: rerun to resume.

A split can also be written in the formats of the field's benchmarks, so that each of them runs on it:

<split>/benchmarks/
    ek100/          EPIC_100_*.csv over the split's own chunks, training rows from the train world
    egtea/          action_idx.txt, train_split1.txt and test_split1.txt (2, 3); videos/<session>/<clip>.mp4
    egomcq/         egomcq.json over the split's own chunks
    charades_ego/   CharadesEgo_v1_test_only1st.csv, Charades_v1_classes.txt; videos/<id>.mp4, two actions each;
                    CharadesEgo_v1_train_only1st.csv over the train world's chunks
    labels/         train.csv, test.csv (video,start,end,label) over the chunks of the train world and of the split
    <name>/         handyvqa, egohoibench, chirality, ... as egohod/data/formats/questions.py and moments.py read them,
                    over the split's own chunks or over egtea's files
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from egohod.data import detections
from egohod.data.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.formats import read_clips
from egohod.data.table import ClipReader
from egohod.demo.render import PICTURE, Stage
from egohod.demo.world import (
    DEFAULT,
    FEW,
    FPS,
    NOUNS,
    SPLITS,
    VERBS,
    VERSIONS,
    Realism,
    Variant,
    Video,
    make_split,
    phrase,
)
from egohod.errors import UserError
from egohod.runtime import (
    UNFINISHED_PREFIX,
    Lost,
    Progress,
    Workers,
    atomic_write,
    usable_cores,
    write_text,
)

log = logging.getLogger(__name__)

MAX_SCALE = 100
MAX_REACH = 1.6  # beyond, motions leave the picture
MAX_ROLL, MAX_ZOOM = 20.0, 30.0  # degrees and per cent; beyond, heads do not go in a second or two
CHUNK_SECONDS = 15
CHOICES = 5  # of a multiple choice question, as in EgoMCQ
# One thread: there is a process for every core, and x264's bytes depend on their number. A key frame a second and no
# B-frames: small clips that any decoder seeks in alike.
CODEC_OPTIONS = {"preset": "veryfast", "tune": "fastdecode", "crf": "20", "g": "12", "bf": "0", "threads": "1"}


def encode(frames: Iterable[np.ndarray], path: Path) -> None:
    """Write uint8 [H, W, 3] frames as one H.264 file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=CODEC_OPTIONS)
        stream.width, stream.height = PICTURE
        stream.pix_fmt = "yuv420p"  # what every player takes
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_video(video: Video, folder: Path) -> pa.Table:
    """Render one video below ``folder`` unless it is there; returns its true boxes, a table of ``SCHEMA``."""
    stage, final = Stage(video), folder / video.video_id
    try:
        if not final.exists():  # else of a run that was killed: boxes are written with the split's tables only
            with atomic_write(final) as part:
                part.mkdir()
                frames, size = stage.frames(), CHUNK_SECONDS * FPS
                for chunk in range(math.ceil(video.frames / size)):
                    encode(itertools.islice(frames, size), part / f"{chunk:04d}.mp4")
    except (OSError, av.FFmpegError) as error:  # PyAV's own errors cannot be sent to another process
        raise UserError(f"cannot write {final}: {error}; rerun to resume after fixing this") from error
    return pa.Table.from_pylist(list(stage.truth()), detections.SCHEMA)


def seconds(frame: int) -> float:
    """When a frame begins, rounded up to the microsecond so that rounding down to a frame number gives the frame."""
    return math.ceil(frame / FPS * 1e6) / 1e6


def questions(videos: Sequence[Video], rng: np.random.Generator) -> Iterator[dict[str, object]]:
    """Multiple choice over the clips of ``videos``.

    ``across_clips``: which of five clips of five actions, from as many videos as possible, does a hand-object narration
    describe. ``object``, ``state_changing`` and ``transient``: which of two texts that differ in the object, or in the
    motion alone, describes a clip.
    """

    def question(kind: str, query: dict[str, str], right: dict[str, str], *wrong: dict[str, str]) -> dict[str, object]:
        answer = int(rng.integers(len(wrong) + 1))
        return {"kind": kind, "query": query, "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer}

    clips = [(video.video_id, clip) for video in videos for clip in video.clips]
    # A small world has few objects: no question may name one that is never there.
    nouns = {noun for video in videos for noun in video.kitchen.nouns}
    for place, clip in clips:
        others = [clips[i] for i in rng.permutation(len(clips))]
        places, chosen = {place}, {(clip.verb, clip.noun): clip.uid}
        for anywhere, (at, other) in itertools.product((False, True), others):  # first those from further videos
            new = (other.verb, other.noun) not in chosen and (anywhere or at not in places)
            if new and len(chosen) < CHOICES:
                places.add(at)
                chosen[other.verb, other.noun] = other.uid
        yield question("across_clips", {"text": clip.hod}, *({"clip": uid} for uid in chosen.values()))
        verb = VERBS[clip.verb]
        elsewhere = [noun for noun in verb.nouns if noun in nouns and noun != clip.noun]
        if elsewhere:
            texts = ({"text": phrase(clip.verb, noun, clip.hand)} for noun in (clip.noun, str(rng.choice(elsewhere))))
            yield question("object", {"clip": clip.uid}, *texts)
        if verb.opposite:
            texts = ({"text": phrase(name, clip.noun, clip.hand)} for name in (verb.name, verb.opposite))
            yield question(verb.kind, {"clip": clip.uid}, *texts)


def _write_tables(
    folder: Path, seed: int, videos: Sequence[Video], truth: list[pa.Table], actions: Sequence[tuple[str, str]]
) -> None:
    hod = pd.DataFrame(
        [
            {
                "video_id": video.video_id,
                "start_second": seconds(clip.start),
                "end_second": seconds(clip.start + clip.frames),
                "text": clip.hod,
                "dataset": "demo",
                "uid": clip.uid,
                "scene": video.kitchen.name,
                "hand": clip.hand,
                "verb": clip.verb,
                "noun": clip.noun,
                "colour": video.kitchen.nouns[clip.noun],
                "action": f"{clip.verb} {clip.noun}",
                "motion": VERBS[clip.verb].path,
                "motion_kind": VERBS[clip.verb].kind,
            }
            for video in videos
            for clip in video.clips
        ]
    )
    coarse = hod.assign(text=[clip.narration for video in videos for clip in video.clips])
    classes = pd.DataFrame([{"action": f"{v} {n}", "verb": v, "noun": n, "text": phrase(v, n)} for v, n in actions])
    for name, table in (("hod", hod), ("narrations", coarse), ("classes", classes)):
        table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\r\n")
    detections.write(pa.concat_tables(truth), folder / "detections.parquet")
    if folder.name != "train":  # nothing is chosen or reported on train
        # A stream apart from the takes' (seed, split, number) and the counters' (..., 1).
        rng = np.random.default_rng((seed, list(SPLITS).index(folder.name), len(videos), 2))
        lines = [json.dumps(question) + "\n" for question in questions(videos, rng)]
        (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


def _read_world(out: Path, seed: int, scale: float, variant: Variant, replace: bool) -> dict[str, Any]:
    """The present or future content of ``world.json``; with ``replace``, nothing of another version counts as done.

    Raises :class:`UserError` if the folder holds anything but a world of these settings.
    """
    settings: dict[str, Any] = {"seed": seed, "scale": scale, **asdict(variant)}
    # What the version alone decides is not written: the files of a world that can do less stay as they are.
    new = {key: value for key, value in settings.items() if value is not None}
    file = out / "world.json"
    if not file.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is not an empty folder and holds no demo world; choose another folder")
        return new | {"done": dict.fromkeys(SPLITS, False)}
    try:
        world = json.loads(file.read_bytes())
        done = {split: bool(world["done"].get(split)) for split in SPLITS}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"not a demo world's description ({error})"
        raise UserError(f"{file}: {reason}; remove it or choose another folder") from error
    # A key that an older file lacks had its default when that world was written.
    world = asdict(DEFAULT) | {"version": None} | world
    other = {key: value for key, value in settings.items() if world.get(key) != value}
    if replace and list(other) == ["version"]:
        return new | {"done": dict.fromkeys(SPLITS, False)}
    if other:
        held = ", ".join(f"{key} {world.get(key)} (requested: {value})" for key, value in other.items())
        raise UserError(f"{out} holds a demo world with {held}; choose another folder or remove it")
    return new | {"done": done}


def _remove_other_version(out: Path, world: dict[str, Any]) -> None:
    """Remove what :func:`make_world` wrote into ``out`` with another version; ``world`` is the new ``world.json``.

    Files that it did not write stay.
    """
    file = out / "world.json"
    held = json.loads(file.read_bytes()) if file.exists() else world
    if held.get("version") == world["version"]:
        return
    log.warning(
        "%s holds version %s of the demo world; it is replaced by version %s",
        out,
        held.get("version"),
        world["version"],
    )
    # If this is interrupted, the old version is unfinished; the new one is announced only when no old video is left,
    # since a video that is there counts as rendered.
    write_text(file, json.dumps(held | {"done": dict.fromkeys(SPLITS, False)}, indent=1) + "\n")
    for folder in (out / split for split in SPLITS):
        for name in ("videos", "benchmarks"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        for name in ("hod.csv", "narrations.csv", "classes.csv", "detections.parquet", "questions.jsonl"):
            (folder / name).unlink(missing_ok=True)
    write_text(file, json.dumps(world, indent=1) + "\n")


def plan(
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    splits: Sequence[str] = tuple(SPLITS),
    variant: Variant = DEFAULT,
    replace: bool = False,
) -> dict[str, list[Video]]:
    """List the videos of the splits that ``out`` does not hold yet; writes nothing.

    Raises :class:`UserError` for an unknown split, a bad scale, seed or variant, and for a folder that holds something
    else (with ``replace``, other than another version) or cannot be read.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or not splits:
        raise UserError(f"splits: {', '.join(unknown) or 'none'}; allowed are {', '.join(SPLITS)}")
    if not 0 < scale <= MAX_SCALE or seed < 0:
        allowed = f"scale must be above 0 and at most {MAX_SCALE}, seed 0 or more"
        raise UserError(f"{allowed}; got scale {scale}, seed {seed}")
    if not len(FEW) <= variant.objects <= len(NOUNS) or not 0.5 <= variant.reach <= MAX_REACH:
        allowed = f"there must be {len(FEW)} to {len(NOUNS)} objects and a reach from 0.5 to {MAX_REACH}"
        raise UserError(f"{allowed}; got {variant.objects} objects, reach {variant.reach}")
    if not 0 <= variant.event_spread <= 1:
        raise UserError(f"the spread of brief events must be from 0 to 1; got {variant.event_spread}")
    if variant.version not in VERSIONS:
        raise UserError(f"versions of the world are {', '.join(map(str, VERSIONS))}; got {variant.version}")
    if VERSIONS[variant.version] == Realism() and (variant.roll, variant.zoom) != (None, None):
        raise UserError(f"the camera of version {variant.version} of the world neither turns nor zooms")
    if not (0 <= (variant.roll or 0) <= MAX_ROLL and 0 <= (variant.zoom or 0) <= MAX_ZOOM):
        allowed = f"the camera may turn by 0 to {MAX_ROLL} degrees and zoom by 0 to {MAX_ZOOM} per cent"
        raise UserError(f"{allowed}; got roll {variant.roll}, zoom {variant.zoom}")
    try:
        done = _read_world(out, seed, scale, variant, replace)["done"]
    except OSError as error:
        raise UserError(f"cannot read {out}: {error}") from error
    return {split: make_split(seed, split, scale, variant) for split in splits if not done[split]}


def make_world(
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    workers: int | None = None,
    *,
    splits: Sequence[str] = tuple(SPLITS),
    variant: Variant = DEFAULT,
    replace: bool = False,
) -> list[str]:
    """Write a demo world; returns the splits that were written now (none when all were there).

    ``scale`` multiplies the 2,000 + 300 + 500 clips; ``workers`` processes render (default: one per core). The same
    seed gives the same frames. With ``replace``, a world that differs in its version alone is removed first. Raises
    :class:`UserError` as :func:`plan` does, and for a folder that is not writable or whose disk is full.
    """
    todo = plan(out, seed, scale, splits, variant, replace)
    try:
        if replace:
            _remove_other_version(out, _read_world(out, seed, scale, variant, replace))
        for split, videos in todo.items():
            folder = out / split
            world = _read_world(out, seed, scale, variant, replace=False)
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "world.json", json.dumps(world, indent=1) + "\n")
            (folder / "videos").mkdir(parents=True, exist_ok=True)
            for part in (folder / "videos").glob(f"{UNFINISHED_PREFIX}*"):  # of a run that was killed
                shutil.rmtree(part)
            truth, done = dict[str, pa.Table](), 0
            processes = min(workers or usable_cores(), len(videos))
            with (
                Progress(split, sum(video.frames for video in videos), unit="frames") as progress,
                Workers(processes, partial(write_video, folder=folder / "videos"), math.inf, tasks_in_flight=1) as pool,
            ):
                for video, boxes in pool.unordered(videos):
                    if isinstance(boxes, Lost):
                        raise UserError(f"{boxes.reason}; rerun to resume")
                    truth[video.video_id] = boxes
                    done += video.frames
                    progress.update(done)
            # In the order of the videos, not of the answers: the same bytes with any number of workers.
            _write_tables(folder, seed, videos, [truth[video.video_id] for video in videos], variant.actions)
            world["done"][split] = True
            write_text(out / "world.json", json.dumps(world, indent=1) + "\n")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot write {out}: {error}; rerun to resume after fixing this") from error
    return list(todo)


# --------------------------------------------------------------------------------------------------
# The formats of the field's benchmarks
# --------------------------------------------------------------------------------------------------

_NOUNS, _VERBS = sorted(NOUNS), list(VERBS)
# Of all objects, whatever the world's variant: classes without a clip harm nobody.
_ACTIONS = DEFAULT.actions


def write_benchmarks(world: Path, split: str = "test") -> bool:
    """Write ``world/<split>/benchmarks`` as a whole or not at all; returns False if it was there."""
    final = world / split / "benchmarks"
    if final.exists():
        return _add_questions(final)
    part = final.with_name(".benchmarks.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    train, table = (pd.read_csv(world / name / "hod.csv") for name in ("train", split))
    coarse = pd.read_csv(world / split / "narrations.csv")["text"].str.removeprefix("#C C ")
    # All frames of each clip, uint8 [T, H, W, 3], read by the project's own reader: two benchmarks cut their own files.
    source = SourceConfig(metadata=str(world / split / "hod.csv"), root=str(world / split / "videos"), layout="chunks")
    clips = ClipReader(read_clips(source, strict=True), source, choose_decoder()[1])
    rows = [clips.table.row(i) for i in range(len(clips.table))]
    frames = [clips.read(row, round((row.end - row.start) * FPS), None).pictures for row in rows]
    _write_ek100(part / "ek100", train, table)
    _write_egtea(part / "egtea", table, frames)
    _write_egomcq(part / "egomcq", table, coarse)
    _write_charades(part / "charades_ego", train, table, frames)
    (part / "labels").mkdir()
    columns = {"video_id": "video", "start_second": "start", "end_second": "end", "action": "label"}
    for name, labelled in (("train", train), ("test", table)):
        labelled[list(columns)].rename(columns=columns).to_csv(part / "labels" / f"{name}.csv", index=False)
    _add_questions(part, table)
    part.rename(final)
    return True


def _add_questions(folder: Path, table: pd.DataFrame | None = None) -> bool:
    """The benchmarks of questions, also into a folder that an earlier release wrote; False if they were there."""
    if (folder / "handyvqa").exists():
        return False
    table = pd.read_csv(folder.parent / "hod.csv") if table is None else table
    videos = folder / "egtea" / "videos"
    # F000012 is the clip's number, see _write_egtea.
    files = {int(path.stem.split("-F")[1]): path for path in videos.rglob("*.mp4")}
    names = [files[row].relative_to(videos).with_suffix("").as_posix() for row in range(len(table))]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".questions.") as part:
        _write_questions(Path(part), table, names)
        # handyvqa last: by it a later call sees that all are there.
        for each in sorted(Path(part).iterdir(), key=lambda path: path.name == "handyvqa"):
            shutil.rmtree(folder / each.name, ignore_errors=True)
            each.rename(folder / each.name)
    return True


def _write_ek100(folder: Path, train: pd.DataFrame, test: pd.DataFrame) -> None:
    folder.mkdir(parents=True)
    for name, table in (("train", train), ("validation", test)):
        start, stop = (
            [f"{int(s // 3600):02d}:{int(s // 60 % 60):02d}:{s % 60:09.6f}" for s in table[column]]
            for column in ("start_second", "end_second")
        )
        noun = table["noun"].map(_NOUNS.index)
        rows = pd.DataFrame(
            {
                "narration_id": table["uid"],
                "participant_id": table["video_id"].str.rpartition("_")[0],
                "video_id": table["video_id"],
                "narration_timestamp": start,
                "start_timestamp": start,
                "stop_timestamp": stop,
                "start_frame": (table["start_second"] * FPS).round().astype(int),
                "stop_frame": (table["end_second"] * FPS).round().astype(int),
                "narration": [VERBS[v].phrase.format(o=n) for v, n in zip(table["verb"], table["noun"], strict=True)],
                "verb": table["verb"].str.replace(" ", "-"),  # particles are joined by hyphens there
                "verb_class": table["verb"].map(_VERBS.index),
                "noun": table["noun"],
                "noun_class": noun,
                "all_nouns": [f"['{word}']" for word in table["noun"]],
                "all_noun_classes": [f"[{code}]" for code in noun],
            }
        )
        rows.to_csv(folder / f"EPIC_100_{name}.csv", index=False)
    # Retrieval tests on the validation rows, each distinct narration once.
    rows.to_csv(folder / "EPIC_100_retrieval_test.csv", index=False)
    sentences = rows.drop_duplicates("narration")[["narration_id", "narration"]]
    sentences.to_csv(folder / "EPIC_100_retrieval_test_sentence.csv", index=False)


def _write_egtea(folder: Path, table: pd.DataFrame, frames: Sequence[np.ndarray]) -> None:
    """Every clip a file of its own; a clip of class k is in the split k mod 3 + 1 and, to overlap, in the next one."""
    folder.mkdir(parents=True)
    code = {f"{verb} {noun}": number for number, (verb, noun) in enumerate(_ACTIONS, start=1)}
    index = [f"{verb.replace(' ', '_').capitalize()} {noun} {code[f'{verb} {noun}']}" for verb, noun in _ACTIONS]
    (folder / "action_idx.txt").write_text("\n".join(index) + "\n")
    rows = [f"{number},{verb} {noun}" for number, (verb, noun) in enumerate(_ACTIONS, start=1)]
    (folder / "classes.csv").write_text("\n".join(["action,class_name", *rows]) + "\n")
    splits: list[list[str]] = [[], [], []]
    for row, clip in enumerate(frames):
        # Names as in the original, from which its readers take the session and the frames: ms, then frame numbers.
        action, video = table["action"][row], int(table["video_id"][row].rpartition("_")[2])
        session = f"DEMO{video:02d}-R01-Kitchen"
        begin = round(table["start_second"][row] * 1000)
        name = f"{session}-{begin}-{begin + 1000 * len(clip) // FPS}-F{row:06d}-F{row + len(clip):06d}"
        verb, noun = _VERBS.index(table["verb"][row]) + 1, _NOUNS.index(table["noun"][row]) + 1
        for split in (row % 3, (row + 1) % 3):
            splits[split].append(f"{name} {code[action]} {verb} {noun}")
        (folder / "videos" / session).mkdir(parents=True, exist_ok=True)
        encode(clip, folder / "videos" / session / f"{name}.mp4")
    everything = list(dict.fromkeys(line for lines in splits for line in lines))
    for number, lines in enumerate(splits, start=1):
        # As in the original, a split trains on the clips that it does not test.
        rest = [line for line in everything if line not in set(lines)]
        # The blank at the end of a line is in the original as well.
        for name, some in (("test", lines), ("train", rest)):
            (folder / f"{name}_split{number}.txt").write_text("".join(f"{line} \n" for line in some))


def _write_egomcq(folder: Path, table: pd.DataFrame, coarse: pd.Series) -> None:
    """For every clip the question across videos, and the one within its video where that has five other actions."""
    folder.mkdir(parents=True)
    columns = [*(table[name] for name in ("video_id", "start_second", "end_second", "text")), coarse]
    keys = ("video_uid", "clip_start", "clip_end", "clip_text", "narration")
    clips = [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
    rng = np.random.default_rng(0)  # the questions are a function of the clips alone
    entries: dict[str, dict[str, object]] = {}
    for row, clip in enumerate(clips):
        same = table["video_id"] == clip["video_uid"]
        other = table["action"] != table["action"][row]
        for kind, rest in ((1, table[~same & other]), (2, table[same & other])):
            wrong = rest.drop_duplicates("action").index.to_numpy()
            if len(wrong) < CHOICES - 1:
                continue
            rows = [row, *rng.permutation(wrong)[: CHOICES - 1].tolist()]
            order = rng.permutation(CHOICES)
            entries[str(len(entries))] = {
                "answer": int(np.flatnonzero(order == 0)[0]),  # where the shuffle put the clip itself
                "query": clip,
                "choices": {str(i): clips[rows[place]] for i, place in enumerate(order)},
                "types": kind,
            }
    (folder / "egomcq.json").write_text(json.dumps(entries))


def _write_charades(folder: Path, train: pd.DataFrame, table: pd.DataFrame, frames: Sequence[np.ndarray]) -> None:
    (folder / "videos").mkdir(parents=True)
    code = {f"{verb} {noun}": f"c{number:03d}" for number, (verb, noun) in enumerate(_ACTIONS)}
    classes = [f"{code[f'{verb} {noun}']} {VERBS[verb].phrase.format(o=noun)}" for verb, noun in _ACTIONS]
    (folder / "Charades_v1_classes.txt").write_text("\n".join(classes) + "\n")
    # The train world's videos are whole already, with many actions each.
    annotations = [
        f"{code[a]} {start:.2f} {end:.2f}" for a, start, end in train[["action", "start_second", "end_second"]].values
    ]
    actions_of = train.assign(annotation=annotations).groupby("video_id")["annotation"].agg(";".join)
    trained = pd.DataFrame({"id": actions_of.index, "scene": "Kitchen", "actions": actions_of.to_numpy()})
    trained.to_csv(folder / "CharadesEgo_v1_train_only1st.csv", index=False)
    rows = []
    # Two actions a video: the benchmark is multi-label.
    for first in range(0, len(table) - 1, 2):
        pair, at, actions = (first, first + 1), 0.0, []
        for row in pair:
            length = len(frames[row]) / FPS
            actions.append(f"{code[table['action'][row]]} {at:.2f} {at + length:.2f}")
            at += length
        name = f"D{first:04d}EGO"
        encode(np.concatenate([frames[row] for row in pair]), folder / "videos" / f"{name}.mp4")
        rows.append({"id": name, "scene": "Kitchen", "actions": ";".join(actions), "length": f"{at:.2f}"})
    pd.DataFrame(rows).to_csv(folder / "CharadesEgo_v1_test_only1st.csv", index=False)


# Questions and moments, in the formats of egohod/data/formats/questions.py and moments.py.

# Takes of a recording in which a moment is looked for.
_TAKES = 5


def _write_questions(folder: Path, table: pd.DataFrame, files: Sequence[str]) -> None:
    """Write a folder for each benchmark; ``files`` are the clips' own video files below those of egtea."""
    rng = np.random.default_rng(0)  # the questions are a function of the clips alone
    rows = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    for row in rows:
        verb, noun = str(row["verb"]), str(row["noun"])
        row["caption"] = VERBS[verb].phrase.format(o=noun)
        # The opposite motion first: of all wrong captions it is the hardest.
        others = [name for name in VERBS if noun in VERBS[name].nouns and name != verb]
        others.sort(key=lambda name, verb=verb: name != VERBS[verb].opposite)  # type: ignore[misc]
        row["other_verbs"] = [VERBS[name].phrase.format(o=noun) for name in others]
        row["other_nouns"] = [VERBS[verb].phrase.format(o=each) for each in VERBS[verb].nouns if each != noun]

    def shuffled(right: str, wrong: Sequence[str]) -> tuple[list[str], int]:
        choices = [right, *wrong[: CHOICES - 1]]
        order = rng.permutation(len(choices))
        return [choices[i] for i in order], int(np.flatnonzero(order == 0)[0])

    def write(path: str, content: Any) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content if isinstance(content, str) else json.dumps(content))

    localised, recognised, mcq, tempo, hoi = dict[str, Any](), dict[str, Any](), list[str](), list[Any](), list[Any]()
    for i, row in enumerate(rows):
        choices, right = shuffled(row["caption"], row["other_verbs"])
        shared = {"question": "What is the person doing?", "options": choices, "correct_idx": [right]}
        write(f"handyvqa/action/action_{i:04d}.json", {**shared, "video": files[i]})
        things = [str(row["noun"]), f"{row['colour']} {row['noun']}", *(n for n in NOUNS if n != row["noun"])][:6]
        objects = {"question": "Which objects?", "options": things, "correct_idx": [0, 1], "video": files[i]}
        write(f"handyvqa/objects/objects_{i:04d}.json", objects)
        lettered = "\n".join(f"({'ABCDE'[k]}) {text}" for k, text in enumerate(choices))
        prompt = f"<video>\nWhat does the {row['hand']} hand do?\n{lettered}\nAnswer with the option's letter."
        talk = [{"from": "human", "value": prompt}, {"from": "gpt", "value": "ABCDE"[right]}]
        mcq.append(json.dumps({"id": str(i), "conversations": talk, "image": {"video": f"{files[i]}.mp4"}}))
        hoi.append(
            {
                "video_uid": row["video_id"], "clip_start": row["start_second"], "clip_end": row["end_second"],
                "clip_text": row["caption"], "tag_verb": "[0]", "tag_noun": "[0]",
                "verb_neg": ",".join(row["other_verbs"]), "noun_neg": ",".join(row["other_nouns"]),
            }
        )  # fmt: skip
        shown = {"video 1": {"id": row["video_id"], **_times(row, "start_time", "end_time")}}
        recognised[f"fine_grained_action_recognition_{i}"] = {
            "inputs": shown, "question": "Which best describes it?", "choices": choices, "correct_idx": right,
        }  # fmt: skip
        same = [each for each in rows if each["video_id"] == row["video_id"] and each["action"] != row["action"]]
        if len(same) >= CHOICES - 1:
            picked = [row, *(same[k] for k in rng.permutation(len(same))[: CHOICES - 1])]
            stretches = [
                "video 1 from <TIME {a} video 1> to <TIME {b} video 1>".format(**_times(each, "a", "b"))
                for each in picked
            ]
            localised[f"fine_grained_action_localization_{i}"] = {
                "inputs": shown, "question": f"When did the action <{row['caption']}> happen in the video 1?",
                "choices": stretches, "correct_idx": 0,
            }  # fmt: skip
        clip = f"{row['video_id']}_{row['start_second']}_{row['end_second']}"
        tempo.append(
            {
                "question_id": f"{clip}_0", "clip_id": clip, "question_type": "action sequence",
                "question": "What happens?", "answer": row["caption"],
            }
        )  # fmt: skip
    # One that no dual encoder answers, as most of the original.
    counting = {"inputs": {"video 1": {"id": rows[0]["video_id"]}}, "question": "How often is <BBOX 1 2 3 4> moved?"}
    recognised["3d_perception_0"] = {**counting, "choices": ["0", "1", "2", "3", "4"], "correct_idx": 0}
    write("hd_epic_vqa/fine_grained_action_recognition.json", recognised)
    write("hd_epic_vqa/fine_grained_action_localization.json", localised)
    write("egoexolearn_mcq/mcq.jsonl", "\n".join(mcq) + "\n")
    write("egotempo/egotempo_openQA.json", {"info": {"version": "1"}, "annotations": tempo})
    write("egohoibench/EgoHOIBench.csv", pd.DataFrame(hoi).to_csv(sep="\t", index=False))
    chiral = [
        {
            "id": name, "chiral_triplet_id": f"{VERBS[row['verb']].path} {row['noun']}",
            "chiral_label": int(VERBS[row["verb"]].backwards), "narration": row["caption"],
        }
        for name, row in zip(files, rows, strict=True)
        if VERBS[row["verb"]].opposite
    ]  # fmt: skip
    write("chirality/cia-demo-validation.csv", pd.DataFrame(chiral).to_csv(index=False))
    write("egoexolearn_association/association_val_hard.json", _association(rows, rng))
    _write_moments(folder, rows)


def _times(row: Mapping[str, Any], *names: str) -> dict[str, str]:
    values = (row["start_second"], row["end_second"])
    pairs = zip(names, values, strict=True)
    return {name: f"{int(s // 3600):02d}:{int(s // 60 % 60):02d}:{s % 60:09.6f}" for name, s in pairs}


def _association(rows: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """Which of several clips shows the same kind of motion as a clip; both views are that of the demo world."""
    clips = [
        {
            "video_uid": row["video_id"], "start_sec": row["start_second"], "end_sec": row["end_second"],
            "narration_en": row["caption"],
        }
        for row in rows
    ]  # fmt: skip
    result: dict[str, Any] = {}
    for i, row in enumerate(rows):
        same = [k for k, other in enumerate(rows) if k != i and other["motion_kind"] == row["motion_kind"]]
        wrong = [k for k, other in enumerate(rows) if other["motion_kind"] != row["motion_kind"]]
        if same and len(wrong) >= CHOICES - 1:
            picked = [same[0], *rng.permutation(wrong)[: CHOICES - 1].tolist()]
            order = rng.permutation(CHOICES)
            result[str(len(result))] = {
                "answer": int(np.flatnonzero(order == 0)[0]), "query": clips[i], "types": 1 + i % 2,
                "choices": {str(place): clips[picked[k]] for place, k in enumerate(order)},
            }  # fmt: skip
    return result


def _write_moments(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Recordings of a few takes each, by turns of the training and the validation part."""
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    videos = dict.fromkeys(str(row["video_id"]) for row in rows)
    takes = [[row for row in rows if row["video_id"] == video] for video in videos]
    groups = [some[at : at + _TAKES] for some in takes for at in range(0, len(some), _TAKES)]
    for number, group in enumerate(groups):
        part = "val" if number % 2 else "train"
        clip = {
            "clip_uid": f"clip_{number:03d}", "video_start_sec": group[0]["start_second"],
            "video_end_sec": group[-1]["end_second"],
        }  # fmt: skip
        queries = [
            {"query": row["caption"], "video_start_sec": row["start_second"], "video_end_sec": row["end_second"]}
            for row in group
        ]
        labels = [
            {
                "label": str(row["motion"]).replace(" ", "_"), "video_start_time": row["start_second"],
                "video_end_time": row["end_second"], "primary": True,
            }
            for row in group
        ]  # fmt: skip
        for stem, annotation in (("nlq", {"language_queries": queries}), ("moments", {"labels": labels})):
            video = {"video_uid": group[0]["video_id"], "split": part, "clips": [{**clip, "annotations": [annotation]}]}
            parts.setdefault((stem, part), []).append(video)
    for (stem, part), content in parts.items():
        path = folder / {"nlq": "ego4d_nlq", "moments": "ego4d_mq"}[stem] / f"{stem}_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": "1", "videos": content}))
