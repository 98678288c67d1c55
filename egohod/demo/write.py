"""Demo worlds on disk: 15 s H.264 chunks, narration tables, true boxes and questions.

    world.json                         seed, scale, version and which splits are done (changed last)
    <split>/videos/<video>/0000.mp4    chunks of 15 s
    <split>/hod.csv, narrations.csv    the same clips, told with the hands' motion or as coarsely as Ego4D
    <split>/detections.parquet         the true boxes of both hands and the object, with contact states
    <split>/classes.csv                one prompt per action class
    <split>/questions.jsonl            multiple choice, val and test only

A video's folder appears under its name only when it is complete, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from egohod.data import detections
from egohod.demo.render import PICTURE, Stage
from egohod.demo.world import DEFAULT, FEW, FPS, NOUNS, SPLITS, VERBS, Clip, Variant, Video, make_split, phrase
from egohod.errors import UserError
from egohod.runtime import follow_parent, usable_cores

VERSION = 5  # of the world: a change of what is drawn or told raises it
MAX_SCALE = 100
MAX_REACH = 1.6  # beyond, motions leave the picture
CHUNK_SECONDS = 15
CHOICES = 5
CODEC_OPTIONS = {"preset": "veryfast", "tune": "fastdecode", "crf": "20", "g": "12", "bf": "0", "threads": "1"}


class DemoError(UserError):
    """A demo world that cannot be made as asked."""


def encode(frames: Iterable[np.ndarray], path: Path) -> None:
    """Write uint8 [H, W, 3] frames as one H.264 file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=CODEC_OPTIONS)
        stream.width, stream.height = PICTURE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_video(video: Video, folder: Path) -> pa.Table:
    """Render one video below ``folder`` unless it is there; its true boxes."""
    stage, final = Stage(video), folder / video.video_id
    if not final.exists():
        part = folder / f".{video.video_id}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        frames, size = stage.frames(), CHUNK_SECONDS * FPS
        for chunk in range(math.ceil(video.frames / size)):
            encode(itertools.islice(frames, size), part / f"{chunk:04d}.mp4")
        part.rename(final)
    return pa.Table.from_pylist(list(stage.truth()), detections.SCHEMA)


def _written(videos: Sequence[Video], folder: Path, workers: int) -> Iterator[pa.Table]:
    """Write videos over ``workers`` processes; their truths in the order of the videos."""
    write = partial(write_video, folder=folder)
    if workers <= 1:
        yield from map(write, videos)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), follow_parent)
    try:
        yield from pool.map(write, videos)
    finally:
        pool.shutdown(cancel_futures=True)


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
        "action": f"{clip.verb} {clip.noun}",
        "motion": VERBS[clip.verb].path,
        "motion_kind": VERBS[clip.verb].kind,
    }


def questions(videos: Sequence[Video], rng: np.random.Generator) -> Iterator[dict[str, object]]:
    """Multiple choice over the clips of ``videos``.

    ``across_clips``: which of five clips of five actions, from as many videos as there are, does a hand-object
    narration tell of. ``object``, ``state_changing`` and ``transient``: which of two texts that differ in the object,
    or in the motion alone, does a clip show.
    """

    def ask(kind: str, query: dict[str, str], right: dict[str, str], *wrong: dict[str, str]) -> dict[str, object]:
        answer = int(rng.integers(len(wrong) + 1))
        return {"kind": kind, "query": query, "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer}

    clips = [(video.video_id, clip) for video in videos for clip in video.clips]
    nouns = {noun for video in videos for noun in video.kitchen.nouns}
    for place, clip in clips:
        others = [clips[i] for i in rng.permutation(len(clips))]
        places, chosen = {place}, {(clip.verb, clip.noun): clip.uid}
        for anywhere, (at, other) in itertools.product((False, True), others):  # first those from further videos
            new = (other.verb, other.noun) not in chosen and (anywhere or at not in places)
            if new and len(chosen) < CHOICES:
                places.add(at)
                chosen[other.verb, other.noun] = other.uid
        yield ask("across_clips", {"text": clip.hod}, *({"clip": uid} for uid in chosen.values()))
        verb = VERBS[clip.verb]
        elsewhere = [noun for noun in verb.nouns if noun in nouns and noun != clip.noun]
        if elsewhere:
            texts = ({"text": phrase(clip.verb, noun, clip.hand)} for noun in (clip.noun, str(rng.choice(elsewhere))))
            yield ask("object", {"clip": clip.uid}, *texts)
        if verb.opposite:
            texts = ({"text": phrase(name, clip.noun, clip.hand)} for name in (verb.name, verb.opposite))
            yield ask(verb.kind, {"clip": clip.uid}, *texts)


def _write_tables(
    folder: Path, seed: int, videos: Sequence[Video], truth: list[pa.Table], actions: Sequence[tuple[str, str]]
) -> None:
    import pandas as pd  # not needed by the rendering processes, and slow to load

    hod = pd.DataFrame([_row(video, clip) for video in videos for clip in video.clips])
    coarse = hod.assign(text=[clip.narration for video in videos for clip in video.clips])
    classes = pd.DataFrame([{"action": f"{v} {n}", "verb": v, "noun": n, "text": phrase(v, n)} for v, n in actions])
    for name, table in (("hod", hod), ("narrations", coarse), ("classes", classes)):
        table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\r\n")
    detections.write(pa.concat_tables(truth), folder / "detections.parquet")
    if folder.name != "train":
        rng = np.random.default_rng((seed, list(SPLITS).index(folder.name), len(videos), 2))
        lines = [json.dumps(question) + "\n" for question in questions(videos, rng)]
        (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


def _world(out: Path, seed: int, scale: float, variant: Variant) -> dict[str, Any]:
    """What is or will be in ``world.json``; an error when the folder holds anything but a world of these settings."""
    asked: dict[str, Any] = {"seed": seed, "scale": scale, **asdict(variant), "version": VERSION}
    file = out / "world.json"
    if not file.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DemoError(f"{out} is not an empty folder and holds no demo world; choose another folder")
        return asked | {"done": dict.fromkeys(SPLITS, False)}
    try:
        found = json.loads(file.read_bytes())
        done = {split: bool(found["done"].get(split)) for split in SPLITS}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"not a demo world's description ({error})"
        raise DemoError(f"{file}: {reason}; remove it or choose another folder") from error
    # What a world's file does not tell yet was not to be chosen when it was made.
    found = asdict(DEFAULT) | found
    other = [f"{key} {found.get(key)} (asked: {value})" for key, value in asked.items() if found.get(key) != value]
    if other:
        raise DemoError(f"{out} holds a demo world with {', '.join(other)}; choose another folder or remove it")
    return asked | {"done": done}


def _save(out: Path, world: dict[str, Any]) -> None:
    part = out / "world.json.part"
    part.write_text(json.dumps(world, indent=1) + "\n", encoding="utf-8")
    part.replace(out / "world.json")


def plan(
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    splits: Sequence[str] = tuple(SPLITS),
    variant: Variant = DEFAULT,
) -> dict[str, list[Video]]:
    """The videos of the splits that ``out`` does not hold yet; writes nothing.

    Raises:
        DemoError: unknown split, bad scale, seed or variant, a folder that holds something else or cannot be read.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or not splits:
        raise DemoError(f"splits: {', '.join(unknown) or 'none'}; allowed are {', '.join(SPLITS)}")
    if not 0 < scale <= MAX_SCALE or seed < 0:
        allowed = f"scale must be above 0 and at most {MAX_SCALE}, seed 0 or more"
        raise DemoError(f"{allowed}; got scale {scale}, seed {seed}")
    if not len(FEW) <= variant.objects <= len(NOUNS) or not 0.5 <= variant.reach <= MAX_REACH:
        allowed = f"there must be {len(FEW)} to {len(NOUNS)} objects and a reach from 0.5 to {MAX_REACH}"
        raise DemoError(f"{allowed}; got {variant.objects} objects, reach {variant.reach}")
    if not 0 <= variant.event_spread <= 1:
        raise DemoError(f"the spread of brief events must be from 0 to 1; got {variant.event_spread}")
    try:
        done = _world(out, seed, scale, variant)["done"]
    except OSError as error:
        raise DemoError(f"cannot read {out}: {error}") from error
    return {split: make_split(seed, split, scale, variant) for split in splits if not done[split]}


def make_world(
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    workers: int | None = None,
    *,
    splits: Sequence[str] = tuple(SPLITS),
    variant: Variant = DEFAULT,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Write a demo world; the splits that were made now (none when all were there).

    ``scale`` multiplies the 2,000 + 300 + 500 clips; ``workers`` processes render (default: one per core);
    ``progress(split, frames done, frames in all)`` is called after each video. The same seed gives the same frames.

    Raises:
        DemoError: what :func:`plan` raises, and a folder that is not writable or whose disk is full.
    """
    todo = plan(out, seed, scale, splits, variant)
    try:
        for split, videos in todo.items():
            folder = out / split
            world = _world(out, seed, scale, variant)
            out.mkdir(parents=True, exist_ok=True)
            _save(out, world)
            (folder / "videos").mkdir(parents=True, exist_ok=True)
            truth, done, total = list[pa.Table](), 0, sum(video.frames for video in videos)
            written = _written(videos, folder / "videos", min(workers or usable_cores(), len(videos)))
            for video, boxes in zip(videos, written, strict=True):
                truth.append(boxes)
                done += video.frames
                if progress:
                    progress(split, done, total)
            _write_tables(folder, seed, videos, truth, variant.actions)
            world["done"][split] = True
            _save(out, world)
    except (OSError, av.FFmpegError, pa.ArrowException) as error:
        raise DemoError(f"cannot write {out}: {error}; run again to go on once that is mended") from error
    except BrokenProcessPool as error:
        raise DemoError("a rendering process was killed (too little memory?); run again to go on") from error
    return list(todo)
