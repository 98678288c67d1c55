"""Demo worlds on disk: 15 s H.264 chunks, narration tables, true boxes and questions.

    world.json                         seed, scale, version and which splits are done (changed last)
    <split>/videos/<video>/0000.mp4    chunks of 15 s
    <split>/hod.csv, narrations.csv    the same clips, told with the hands' motion or as coarsely as Ego4D
    <split>/truth.parquet              per frame: boxes of both hands and the object, contact states
    <split>/classes.csv                one prompt per action class
    <split>/questions.jsonl            multiple choice, val and test only

A video's folder appears under its name only when it is complete, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from egohod.config import UserError
from egohod.data.pool import follow_parent
from egohod.demo.render import EDGES, PICTURE, Stage
from egohod.demo.world import ACTIONS, FPS, SPLITS, VERBS, Clip, Video, make_split, phrase

VERSION = 2  # of the world: a change of what is drawn or told raises it
MAX_SCALE = 100
CHUNK_SECONDS = 15
CHOICES = 5
TRUTH = pa.schema(
    [("video_id", pa.string()), ("frame", pa.int32()), ("second", pa.float64()), ("noun", pa.string())]
    + [(f"{side}_state", pa.int8()) for side in ("left", "right")]
    + [(f"{role}_{edge}", pa.float32()) for role in ("left", "right", "object") for edge in EDGES]
)
CODEC_OPTIONS = {"preset": "veryfast", "tune": "fastdecode", "crf": "20", "g": "12", "bf": "0", "threads": "1"}


class DemoError(UserError):
    """A demo world that cannot be made as asked."""


# --------------------------------------------------------------------------------------------------
# One video
# --------------------------------------------------------------------------------------------------


def encode(frames: Iterable[np.ndarray], path: Path) -> None:
    """Write uint8 [H, W, 3] frames as one H.264 file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=CODEC_OPTIONS)
        stream.width, stream.height = PICTURE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_video(video: Video, folder: Path) -> tuple[str, pa.Table]:
    """Render one video below ``folder`` unless it is there; its id and its truth, a row a frame."""
    stage, final = Stage(video), folder / video.video_id
    if not final.exists():
        part = folder / f".{video.video_id}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        frames = stage.frames()
        size = CHUNK_SECONDS * FPS
        for chunk in range(math.ceil(video.frames / size)):
            encode(itertools.islice(frames, size), part / f"{chunk:04d}.mp4")
        part.rename(final)
    return video.video_id, pa.Table.from_pylist(list(stage.truth()), TRUTH)


def _written(videos: Sequence[Video], folder: Path, workers: int) -> Iterator[tuple[str, pa.Table]]:
    """Write videos in any order, over ``workers`` processes."""
    if workers <= 1:
        yield from (write_video(video, folder) for video in videos)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), follow_parent)
    try:
        for future in as_completed([pool.submit(write_video, video, folder) for video in videos]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def action(verb: str, noun: str) -> str:
    """Name of an action class."""
    return f"{verb} {noun}"


def seconds(frame: int) -> float:
    """When a frame begins, rounded up to the microsecond so that cutting back to a frame number finds the frame."""
    return math.ceil(frame / FPS * 1e6) / 1e6


def _row(video: Video, clip: Clip) -> dict[str, object]:
    return {
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
        "action": action(clip.verb, clip.noun),
        "motion": VERBS[clip.verb].path,
        "motion_kind": VERBS[clip.verb].kind,
    }


def _write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def questions(videos: Sequence[Video], rng: np.random.Generator) -> Iterator[dict[str, object]]:
    """Multiple choice over the clips of ``videos``.

    ``across_clips``: which of five clips of five actions, from as many videos as there are, does a hand-object
    narration tell of. ``state_changing`` and ``transient``: which of two texts that differ in the motion alone does a
    clip show.
    """
    clips = [(video.video_id, clip) for video in videos for clip in video.clips]
    for place, clip in clips:
        wrong: list[Clip] = []
        actions, places = {(clip.verb, clip.noun)}, {place}
        order = [clips[int(i)] for i in rng.permutation(len(clips))]
        for new_place_only in (True, False):
            for at, candidate in order:
                unlike = (candidate.verb, candidate.noun) not in actions and not (new_place_only and at in places)
                if unlike and len(wrong) < CHOICES - 1:
                    wrong.append(candidate)
                    actions.add((candidate.verb, candidate.noun))
                    places.add(at)
        answer = int(rng.integers(len(wrong) + 1))
        uids = [other.uid for other in wrong]
        choices = [{"clip": uid} for uid in (*uids[:answer], clip.uid, *uids[answer:])]
        yield {"kind": "across_clips", "query": {"text": clip.hod}, "choices": choices, "answer": answer}
        opposite = VERBS[clip.verb].opposite
        if opposite:
            answer = int(rng.integers(2))
            verbs = (clip.verb, opposite) if answer == 0 else (opposite, clip.verb)
            texts = [{"text": phrase(verb, clip.noun, clip.hand)} for verb in verbs]
            yield {"kind": VERBS[clip.verb].kind, "query": {"clip": clip.uid}, "choices": texts, "answer": answer}


def _write_tables(folder: Path, split: str, seed: int, videos: Sequence[Video], truth: dict[str, pa.Table]) -> None:
    rows = [_row(video, clip) for video in videos for clip in video.clips]
    coarse = [
        row | {"text": clip.narration} for row, clip in zip(rows, (c for v in videos for c in v.clips), strict=True)
    ]
    _write_csv(folder / "hod.csv", rows)
    _write_csv(folder / "narrations.csv", coarse)
    _write_csv(
        folder / "classes.csv",
        [{"action": action(v, n), "verb": v, "noun": n, "text": phrase(v, n)} for v, n in ACTIONS],
    )
    pa.parquet.write_table(pa.concat_tables([truth[video.video_id] for video in videos]), folder / "truth.parquet")
    if split != "train":
        rng = np.random.default_rng((seed, list(SPLITS).index(split), len(videos), 2))
        with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(question) + "\n" for question in questions(videos, rng))


# --------------------------------------------------------------------------------------------------
# The world
# --------------------------------------------------------------------------------------------------


def _done(out: Path, settings: dict[str, object]) -> dict[str, bool]:
    """Which splits are done; an error when the folder holds anything but a world of these settings."""
    file = out / "world.json"
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            done = {split: bool(found["done"].get(split)) for split in SPLITS}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DemoError(
                f"{file}: not a demo world's description ({error}); remove it or choose another folder"
            ) from error
        other = [
            f"{key} {found.get(key)} (asked: {value})" for key, value in settings.items() if found.get(key) != value
        ]
        if other:
            raise DemoError(f"{out} holds a demo world with {', '.join(other)}; choose another folder or remove it")
        return done
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DemoError(f"{out} is not an empty folder and holds no demo world; choose another folder")
    return dict.fromkeys(SPLITS, False)


def _save_world(out: Path, settings: dict[str, object], done: dict[str, bool]) -> None:
    part = out / "world.json.part"
    part.write_text(json.dumps(settings | {"done": done}, indent=1) + "\n", encoding="utf-8")
    part.replace(out / "world.json")


def plan(out: Path, seed: int = 0, scale: float = 1.0, splits: Sequence[str] = tuple(SPLITS)) -> dict[str, list[Video]]:
    """The videos of the splits that ``out`` does not hold yet; writes nothing.

    Raises:
        DemoError: unknown split, bad scale or seed, a folder that holds something else or cannot be read.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or not splits:
        raise DemoError(f"splits: {', '.join(unknown) or 'none'}; allowed are {', '.join(SPLITS)}")
    if not 0 < scale <= MAX_SCALE or seed < 0:
        raise DemoError(
            f"scale must be above 0 and at most {MAX_SCALE}, seed 0 or more; got scale {scale}, seed {seed}"
        )
    try:
        done = _done(out, _settings(seed, scale))
    except OSError as error:
        raise DemoError(f"cannot read {out}: {error}") from error
    return {split: make_split(seed, split, scale) for split in splits if not done[split]}


def _settings(seed: int, scale: float) -> dict[str, object]:
    return {"seed": seed, "scale": scale, "version": VERSION}


def make_world(
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    workers: int | None = None,
    *,
    splits: Sequence[str] = tuple(SPLITS),
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Write a demo world; the splits that were made now (none when all were there).

    ``scale`` multiplies the 2,000 + 300 + 500 clips; ``workers`` processes render (default: one per core);
    ``progress(split, frames done, frames in all)`` is called after each video. The same seed gives the same frames.

    Raises:
        DemoError: what :func:`plan` raises, and a folder that is not writable or whose disk is full.
    """
    todo = plan(out, seed, scale, splits)
    settings = _settings(seed, scale)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split, videos in todo.items():
            done = _done(out, settings)
            _save_world(out, settings, done)
            (out / split / "videos").mkdir(parents=True, exist_ok=True)
            truth: dict[str, pa.Table] = {}
            finished, total = 0, sum(video.frames for video in videos)
            for video_id, table in _written(
                videos, out / split / "videos", min(workers or os.cpu_count() or 1, len(videos))
            ):
                truth[video_id] = table
                finished += table.num_rows
                if progress:
                    progress(split, finished, total)
            _write_tables(out / split, split, seed, videos, truth)
            _save_world(out, settings, done | {split: True})
    except (OSError, av.FFmpegError, pa.ArrowException) as error:
        raise DemoError(f"cannot write {out}: {error}; run again to go on once that is mended") from error
    except BrokenProcessPool as error:
        raise DemoError("a rendering process was killed (too little memory?); run again to go on") from error
    return list(todo)
