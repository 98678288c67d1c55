"""What the page of ``egohod serve`` shows: moments of an index and their videos, marks, tracks of hands."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from egohod import config
from egohod.data.dataset import tokenizer_for
from egohod.data.decoders import choose_decoder, container_format, plain, video_stream
from egohod.data.detections import EDGES, LEFT, NO_CONTACT
from egohod.data.storage import LruCache, VideoError, VideoFile
from egohod.data.videos import VideoStore
from egohod.distributed import setup
from egohod.errors import UserError
from egohod.evaluation.embed import Execution, embed_texts, fingerprint
from egohod.evaluation.features import (
    CONFIG_FILE,
    Features,
    best_rows,
    feature_files,
    read_index,
    read_json,
    write_json,
)
from egohod.evaluation.page import jpeg
from egohod.evaluation.report import strip
from egohod.runtime import locked
from egohod.training.build import build_model

log = logging.getLogger(__name__)

# Codecs of browsers by the container that FFmpeg names, and the only layouts of pixels that all of them show.
_SHOWN_CODECS = {"mov": ("h264", "av1", "vp9"), "matroska": ("vp8", "vp9", "av1")}
_SHOWN_PIXELS = ("yuv420p", "yuvj420p")
# Of a stretch that is converted for the browser: the most seconds, those before and after a moment, pixels in height,
# pictures a second. A few seconds convert in about as long as they play.
_STRETCH, _AROUND, _STRETCH_HEIGHT, _STRETCH_FPS = 20.0, 2.0, 480, 15
# Frames of a thumbnail side by side, which the page plays while the pointer is on it, and their height.
THUMB_FRAMES, _THUMB_HEIGHT = 4, 176
# No answer can hold half a character, and no player or decoder counts beyond these ten years.
_HALF, _LAST_SECOND = re.compile("[\ud800-\udfff]"), 3e8
# Points of a chart: more would not be distinguishable on a screen.
_CHART_POINTS = 600


# --------------------------------------------------------------------------------------------------
# Moments
# --------------------------------------------------------------------------------------------------


class TextTower:
    """Encodes sentences with the checkpoint that made an index.

    ``checkpoint`` is where it is now, if it was moved. Raises :class:`UserError` if it is gone or another one.
    """

    def __init__(self, folder: Path, checkpoint: str | None = None) -> None:
        cfg = config.load(folder / CONFIG_FILE, [f"model.weights.path={checkpoint}"] if checkpoint else [])
        # Alone: variables of a launcher, as in an interactive Slurm job, must not make it wait for others.
        dist = setup(cfg.train.device, alone=True, inference=True)
        self._model = build_model(cfg, dist)
        # Another checkpoint has another embedding space: similarities to these features would be noise.
        if fingerprint(self._model) != read_index(folder)["weights"]:
            raise UserError(f"{cfg.model.weights.path}: not the weights that made {folder}; give --checkpoint")
        self._tokenizer = tokenizer_for(cfg.model)
        self.decoder = cfg.data.decoder
        # One text, no workers.
        self._run = Execution(1, 0, dist)
        self._lock = threading.Lock()
        self._encoded: LruCache[str, NDArray[np.float32]] = LruCache(1024)

    def encode(self, text: str) -> NDArray[np.float32]:
        """The feature of a sentence, float32 [D] of unit length."""
        with self._lock:
            feature = self._encoded.get(text)
            if feature is None:
                feature = embed_texts(self._model, [text], self._tokenizer, self._run)[0].numpy()
                self._encoded.put(text, feature)
            return feature


class Library:
    """A folder of features, its videos, and its text tower if that can be loaded.

    ``videos`` is the folder of the videos and ``checkpoint`` the weights, if they were moved. Raises
    :class:`UserError` for a folder that is no index or a damaged one, and if the folder of the videos is gone.
    """

    def __init__(self, folder: Path, videos: str | None = None, checkpoint: str | None = None) -> None:
        self.folder, settings = folder, read_index(folder)
        self.name = folder.name or str(folder)
        self.features = _mapped_features(folder, list(settings["videos"]))
        self.names = list(self.features.rows_of)
        """Videos with features; one without is an index that still grows."""
        self._video_of = np.repeat(np.arange(len(self.names)), [*map(len, self.features.rows_of.values())])
        start, end = self.features.start, self.features.end
        self.middle = np.where(np.isfinite(end), (start + end) / 2, start)
        """Of each moment, in seconds; of a whole video its start."""
        _, opener = choose_decoder("auto")
        self._opener = opener
        try:
            # Never widened: a hit shows the moment that was encoded.
            self.store = VideoStore(
                videos or settings["root"], settings["layout"], float(settings["chunk_seconds"]), opener,
                min_clip_seconds=0.0,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"{error}; if the videos were moved, give --videos") from error
        self.missing = self._missing()
        self.tower: TextTower | None = None
        self.no_text = ""
        """Why there is no text tower."""
        try:
            self.tower = TextTower(folder, checkpoint)
        except UserError as error:
            # Moments can still be compared with one another, which takes no model.
            self.no_text = str(error).splitlines()[0]
            log.warning("%s: no sentences, only moments as queries: %s", folder, self.no_text)

    def _missing(self) -> list[str]:
        """Videos whose files are gone since they were indexed."""
        missing = list[str]()
        for video, rows in self.features.rows_of.items():
            try:
                self.store.states(video, float(self.features.start[rows.start]))
            except VideoError:
                missing.append(video)
        if missing:
            log.warning("%d of %d videos are gone, such as %s", len(missing), len(self.names), missing[0])
        return missing

    def search(
        self,
        query: NDArray[np.float32],
        top: int,
        *,
        videos: str = "",
        start: float = 0.0,
        end: float = np.inf,
        overlapping: bool = False,
    ) -> tuple[list[int], NDArray[np.float32]]:
        """The rows of the ``top`` moments most similar to a query [D], best first, and the similarity of every row [N].

        Of videos whose name contains ``videos`` in any case, and of moments that touch ``start`` to ``end`` seconds.
        """
        if query.shape != self.features.features.shape[1:]:
            width = self.features.features.shape[1]
            raise UserError(f"{self.folder}: features of {width} dimensions, the query has {len(query)}")
        similarity = self.features.features @ query
        allowed = (self.features.start < end) & (self.features.end > start)
        if videos:
            named = np.array([videos.casefold() in name.casefold() for name in self.names])
            allowed &= named[self._video_of]
        return best_rows(similarity, self.features, top, overlapping, allowed), similarity

    def spread(self, count: int) -> list[int]:
        """Rows of moments spread evenly over the index, to begin with."""
        total = len(self.features.videos)
        return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist()

    def row_at(self, video: str, second: float) -> int | None:
        """The moment of a video whose middle is nearest to a second, None if the video is not in this index."""
        rows = self.features.rows_of.get(video)
        if rows is None:
            return None
        return rows.start + int(np.abs(self.middle[rows.start : rows.stop] - second).argmin())

    def chart(self, similarity: NDArray[np.float32], video: str) -> list[list[float]]:
        """(second, similarity) over a video, the highest of each of at most 600 stretches."""
        rows = self.features.rows_of.get(video)
        if rows is None:
            return []
        middle, values = (each[rows.start : rows.stop] for each in (self.middle, similarity))
        order = np.argsort(middle, kind="stable")
        parts = np.array_split(order, min(len(order), _CHART_POINTS))
        best = [part[values[part].argmax()] for part in parts]
        return [[round(float(middle[each]), 2), round(float(values[each]), 4)] for each in best]

    # ----------------------------------------------------------------------------------------------
    # Pictures
    # ----------------------------------------------------------------------------------------------

    def file(self, row: int) -> tuple[VideoFile, float]:
        """The file in which a moment begins, and the second of the video at which that file begins."""
        return self.store.locate(self.features.videos[row], float(self.features.start[row]))

    def end(self, row: int) -> float:
        """When a moment ends; that of a whole video is measured. Raises :class:`VideoError`."""
        end = float(self.features.end[row])
        if np.isfinite(end):
            return end
        file, _ = self.file(row)
        decoder = self._opener(file, self.features.videos[row])
        decoder.close()
        return decoder.duration

    def why_not_shown(self, row: int) -> str:
        """Why browsers cannot play the file of a moment as it is; empty if they can. Raises :class:`VideoError`."""
        video, (file, _) = self.features.videos[row], self.file(row)
        if not isinstance(file, Path):
            return "a remote file"
        format = container_format(file, video)
        if format is None:
            raise VideoError(f"{video}: not a video")
        if format not in _SHOWN_CODECS or (format == "matroska" and file.suffix.lower() != ".webm"):
            return f"browsers do not play {file.suffix.lower()[1:]} files"
        try:
            with av.open(plain(file), format=format, metadata_errors="replace") as container:
                stream, _ = video_stream(container)
                if stream is None or stream.codec_context is None:
                    raise VideoError(f"{video}: has no picture")
                codec, pixels = stream.codec_context.name, stream.codec_context.pix_fmt
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{video}: truncated or damaged video") from error
        codec = {"libdav1d": "av1", "libvpx-vp9": "vp9", "libvpx": "vp8"}.get(codec, codec)
        if codec not in _SHOWN_CODECS[format] or pixels not in _SHOWN_PIXELS:
            return f"browsers do not play {codec.upper()} video ({pixels})"
        return ""

    def write_thumbnail(self, row: int, path: Path) -> None:
        """Write frames of a moment side by side as JPEG. Raises :class:`VideoError`."""
        start, end = float(self.features.start[row]), float(self.features.end[row])
        frames = self.store.read(self.features.videos[row], start, end, THUMB_FRAMES).pictures
        # Without the gaps of a strip: the page shows one after the other in the same place.
        sheet = np.hstack([np.asarray(strip(frame[None], _THUMB_HEIGHT)) for frame in frames])
        path.write_bytes(jpeg(Image.fromarray(sheet)))

    def stretch(self, row: int) -> tuple[float, float]:
        """From which to which second :meth:`write_stretch` shows the surroundings of a moment."""
        start = max(0.0, float(self.features.start[row]) - _AROUND)
        return start, min(self.end(row) + _AROUND, start + _STRETCH)

    def write_stretch(self, row: int, path: Path) -> None:
        """Convert the surroundings of a moment to an MP4 that browsers play, small and without sound.

        Raises :class:`VideoError`.
        """
        video, (file, begin) = self.features.videos[row], self.file(row)
        start, end = (second - begin for second in self.stretch(row))
        start = max(start, 0.0)  # of a chunk no more than its own pictures
        try:
            with (
                av.open(plain(file), format=container_format(file, video), metadata_errors="replace") as source,
                av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as target,
            ):
                stream, _ = video_stream(source)
                if stream is None:
                    raise VideoError(f"{video}: has no picture")
                first, tick = stream.start_time or 0, stream.time_base
                source.seek(first + int(start / tick), stream=stream, backward=True)
                out, following = None, 0
                for frame in source.decode(stream):
                    second = float((frame.pts - first) * tick) if frame.pts is not None else start
                    if second >= end:
                        break
                    number = round((second - start) * _STRETCH_FPS)
                    if second < start - 1e-3 or number < following:
                        continue
                    height = min(frame.height, _STRETCH_HEIGHT) // 2 * 2
                    width = round(frame.width * height / frame.height) // 2 * 2
                    picture = frame.reformat(width, height, format="rgb24").to_ndarray()
                    picture = np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))
                    if out is None:
                        out = target.add_stream("libx264", rate=_STRETCH_FPS, options={"preset": "veryfast"})
                        out.height, out.width, out.pix_fmt = *picture.shape[:2], "yuv420p"
                    shown = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    shown.pts, following = number, number + 1
                    target.mux(out.encode(shown))
                if out is None:
                    raise VideoError(f"{video}: no pictures at {start:.1f} s")
                target.mux(out.encode(None))
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{video}: cannot be converted: {error}") from error


def _mapped_features(folder: Path, videos: list[str]) -> Features:
    """The features of an index, which stay on disk: the system keeps what fits in memory, for all processes together.

    Raises as :func:`~egohod.evaluation.features.read_features` does, and for features that are not finite.
    """
    # Nameless: the file is gone with this process, however it ends. In the index if that can be written: /tmp is
    # memory on many machines, which would be taken twice.
    where = folder if os.access(folder, os.W_OK) else None
    names, starts, ends, texts = list[str](), list[NDArray[Any]](), list[NDArray[Any]](), list[str]()
    with tempfile.TemporaryFile(dir=where) as file:
        for video, (features, start, end, text) in feature_files(folder, videos):
            if not (np.isfinite(features).all() and np.isfinite(start).all() and not np.isnan(end).any()):
                raise UserError(
                    f"{folder}: the features or times of {video} are not finite; delete its .npz and extract again"
                )
            if not ((start >= 0) & (start < _LAST_SECOND) & (end >= start)).all():
                raise UserError(f"{folder}: impossible times in {video}; delete its .npz and extract again")
            if any(map(_HALF.search, text)):
                raise UserError(f"{folder}: a text of {video} is not Unicode; delete its .npz and extract again")
            if _HALF.search(video):
                raise UserError(f"{video!a}: a name that is not UTF-8; rename the file and extract again")
            file.write(np.ascontiguousarray(features).tobytes())
            names += [video] * len(features)
            starts.append(start)
            ends.append(end)
            texts += [str(each) for each in text]
        if not names:
            raise UserError(f"{folder}: not a single moment; extract again")
        file.flush()
        mapped = np.memmap(file, np.float32, "r", shape=(len(names), file.tell() // 4 // len(names)))
    # A plain view: memmap's own operators cost more than the product of a small index.
    return Features(mapped.view(np.ndarray), names, np.concatenate(starts), np.concatenate(ends), texts)


# --------------------------------------------------------------------------------------------------
# Pictures that are made once
# --------------------------------------------------------------------------------------------------


class Made:
    """Files that are made when first wanted; those last wanted, of ``most`` bytes, stay until :meth:`close`."""

    def __init__(self, most: int = 1 << 29) -> None:
        # Whatever is being written when the server ends may come after the rest was deleted.
        self._folder = tempfile.TemporaryDirectory(prefix="egohod-serve-", ignore_cleanup_errors=True)
        self._most, self._lock = most, threading.Lock()
        self._sizes: dict[Path, int] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def get(self, name: str, write: Callable[[Path], None]) -> Path:
        """The file ``name``; several requests at once make it once. What ``write`` raises is raised, and made again."""
        path = Path(self._folder.name) / name
        with self._lock:
            wait = self._locks[name]
        with wait:
            if path not in self._sizes:
                write(path)
            with self._lock:
                self._sizes[path] = self._sizes.pop(path, 0) or path.stat().st_size  # the last one now
                while sum(self._sizes.values()) > self._most and len(self._sizes) > 1:
                    oldest = next(iter(self._sizes))
                    del self._sizes[oldest]
                    oldest.unlink(missing_ok=True)
                self._locks.pop(name, None)
        return path

    def close(self) -> None:
        """Delete all of them."""
        self._folder.cleanup()


# --------------------------------------------------------------------------------------------------
# Marks
# --------------------------------------------------------------------------------------------------

MARKS_FILE, _MARKS_FORMAT = "marks.json", 1
RIGHT, WRONG = "right", "wrong"


@dataclass(frozen=True, order=True)
class Moment:
    """A stretch of a video; without an end it is the whole of it."""

    video: str
    start: float
    end: float | None

    @classmethod
    def of(cls, video: str, start: float, end: float) -> Moment:
        """That of an index, whose whole videos end at infinity."""
        return cls(video, round(float(start), 3), round(float(end), 3) if np.isfinite(end) else None)


class Marks:
    """Labels of moments, each marked right or wrong, in one file that is always whole.

    Several tabs and several servers may add to it. Raises :class:`UserError` for a file that is damaged or cannot be
    written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._marks = self._read()

    def _read(self) -> dict[Moment, dict[str, str]]:
        if not self.path.exists():
            return {}
        content, marks = read_json(self.path, _MARKS_FORMAT, ""), defaultdict[Moment, dict[str, str]](dict)
        try:
            for each in content["marks"]:
                start, end = float(each["start"]), None if each["end"] is None else float(each["end"])
                if not 0 <= start < (np.inf if end is None else end) or end == np.inf:  # false for NaN, too
                    raise ValueError(f"{start} to {end} is no stretch of time")
                if each["mark"] not in (RIGHT, WRONG):
                    raise ValueError(f"mark is {each['mark']!r}")
                video, label = str(each["video"]), str(each["label"])
                (video + label).encode()  # no csv can hold half a character
                marks[Moment(video, start, end)][label] = each["mark"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{self.path}: damaged ({type(error).__name__}: {error}); move it away") from error
        return dict(marks)

    def set(self, moment: Moment, label: str, mark: str | None) -> None:
        """Mark a moment as right or wrong for a label, or take the mark away."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Read again: another server may have added to it.
            with self._lock, locked(self.path.with_name(f".{self.path.name}.lock"), patience=10.0):
                marks = self._read()
                of_moment = {name: each for name, each in marks.get(moment, {}).items() if name != label}
                marks[moment] = of_moment | ({label: mark} if mark else {})
                self._marks = {each: labels for each, labels in marks.items() if labels}
                rows = [
                    {"video": each.video, "start": each.start, "end": each.end, "label": name, "mark": value}
                    for each, labels in self._marks.items()
                    for name, value in labels.items()
                ]
                write_json(self.path, {"format": _MARKS_FORMAT, "marks": rows})
        except OSError as error:
            raise UserError(f"{self.path}: the mark is not saved: {error.strerror or error}") from error

    def of(self, moment: Moment) -> dict[str, str]:
        """Marks of a moment by label."""
        return self._marks.get(moment, {})

    def counts(self) -> dict[str, int]:
        """How many marks are right and wrong."""
        values = [mark for labels in self._marks.values() for mark in labels.values()]
        return {RIGHT: values.count(RIGHT), WRONG: values.count(WRONG)}

    def to_csv(self, kind: str, length_of: Callable[[str], float]) -> str:
        """What training and evaluation read of the labels that are right.

        ``narrations``: video_id, start_second, end_second, text (formats hod and custom), and in ``wrong`` the labels
        that are false of the same moment, which data.train.NAME.replacement_column takes. ``labels``: video, start,
        end, label. ``length_of`` measures a whole video; one that is gone is left out.
        """
        rows = list[list[Any]]()
        for moment, labels in sorted(self._marks.items(), key=lambda item: (item[0].video, item[0].start)):
            right, wrong = ([name for name, mark in labels.items() if mark == each] for each in (RIGHT, WRONG))
            if not right:
                continue
            try:
                end = length_of(moment.video) if moment.end is None else moment.end
            except VideoError as error:
                log.warning("left out: %s", error)
                continue
            more = [json.dumps(wrong, ensure_ascii=False) if wrong else ""] if kind == "narrations" else []
            rows += [[moment.video, moment.start, end, name, *more] for name in right]
        head = ["video", "start", "end", "label"]
        if kind == "narrations":
            head = ["video_id", "start_second", "end_second", "text", "wrong"]
        text = io.StringIO()
        # The usual end of its lines, or a lone \r within a name would not be quoted.
        csv.writer(text, lineterminator="\r\n").writerows([head, *rows])
        return text.getvalue()


# --------------------------------------------------------------------------------------------------
# Tracks of the HOD pipeline
# --------------------------------------------------------------------------------------------------


class Tracks:
    """Hands, objects and narrations of a run of ``tools/generate_hod.py``, by the time of a video.

    ``output`` is the csv that it writes. Raises :class:`UserError` if there is no such run.
    """

    def __init__(self, output: Path) -> None:
        # Here, because it needs the extra [hod], which search and a server without tracks do not.
        from egohod.hod import config as hod_config
        from egohod.hod.pipeline import build
        from egohod.hod.store import Store

        settings = Store(output).folder / "config.yml"
        if not settings.exists():
            raise UserError(f"{settings}: no such file; --hod is the --output of tools/generate_hod.py")
        self._pipeline = build(hod_config.load(settings, [f"output={output}"]))

    @cached_property
    def _clips(self) -> dict[str, list[int]]:
        clips = defaultdict[str, list[int]](list)
        for index in range(len(self._pipeline.table)):
            clips[self._pipeline.table.row(index).video_id].append(index)
        return dict(clips)

    def between(self, video: str, start: float, end: float) -> list[dict[str, Any]]:
        """Clips that touch a stretch of a video: times, narration, paths of hands and object, and boxes.

        Times are seconds of the video; positions are shares of the picture, null where unknown.
        """
        from egohod.hod.pipeline import CHECK, DETECT, TRACK

        shown = list[dict[str, Any]]()
        # Opened for each request: SQLite's connections stay in the thread that made them.
        with self._pipeline.store.results() as results:
            for index in self._clips.get(video, []):
                row = self._pipeline.table.row(index)
                if row.start >= end or row.end <= start:
                    continue
                outcomes = self._pipeline.stored(index, results)
                values = {name: each.parsed() for name, each in outcomes.items() if each.fault is None}
                facts, boxes = values.get(TRACK), values.get(DETECT, {}).get("boxes", {"second": []})
                things = dict(facts["hands"]) if facts else {}
                if facts and facts["object"]:
                    things["object"] = facts["object"]
                rows = [dict(zip(boxes, each, strict=True)) for each in zip(*boxes.values(), strict=True)]
                shown.append(
                    {
                        "start": row.start,
                        "end": row.end,
                        "text": values[CHECK]["text"] if CHECK in values else "",
                        "times": [row.start + each for each in facts["times"]] if facts else [],
                        "paths": {name: thing["motion"]["path"] for name, thing in things.items()},
                        "boxes": [
                            {
                                "second": box["second"],
                                "role": box["kind"] if box["kind"] != "hand" else _SIDES[box["side"] == LEFT],
                                "edges": [box[edge] for edge in EDGES],
                                "touches": box["kind"] == "hand" and (box["state"] or 0) > NO_CONTACT,
                            }
                            for box in rows
                        ],
                    }
                )
        return shown


_SIDES = {True: "left", False: "right"}
