"""Find hands, and what they touch, in the pictures and videos of a folder.

    python tools/detect_hands.py photos --draw                                        # MediaPipe
    python tools/detect_hands.py videos --detector doh100 --option weights=faster_rcnn_1_8_132028.pth --draw
    python tools/detect_hands.py videos --detector doh100 --option weights=random --dry_run

The folder is searched with all folders in it, except links, hidden ones and outputs of this program. OUTPUT (by default
the folder's name with .detections, in the working directory) then holds

    boxes.parquet     a row for each box, in the table that docs/data.md describes; video_id is the path of a video
                      without its ending, of a picture with it
    drawn/            with --draw: pictures and films with boxes, contact in words, and lines from hands to objects
    failures.csv      files that could not be read, each with the reason
    results.sqlite    what is done already: rerun the command to resume. Files are recognised by their content: those
                      that changed, and other options, are computed anew, and drawings that are no longer true removed

--epic writes EPIC-KITCHENS' protobuf files as well, one a video or picture. The last line is the speed. Exit code: 0
done, also where some files cannot be read; 2 an error in the input, or no file can be read.

Detectors, with their main options; docs/hod.md has the others, licences and speeds:

    mediapipe      both hands with their sides, on any CPU; nothing else
    doh100         hands, contact and objects: weights=FILE of 100DOH, or weights=random to try it without; seconds a
                   picture on a CPU, device=cuda for a GPU
    torchvision    what your own Faster R-CNN finds: weights=FILE and "labels={1: hand, 2: object}"
    detections     boxes from files, path=FILE, to draw them or to write them for EPIC-KITCHENS' readers
    oracle         the same with noise, for tests
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from _common import run_tool, tool_parser
from PIL import Image, ImageOps

from egohod import cli
from egohod.data import detections
from egohod.data.decoders import VIDEO_ENDINGS, choose_decoder
from egohod.data.detections import SCHEMA
from egohod.data.videos import VideoError, frame_times
from egohod.errors import UserError
from egohod.hod.config import DETECTORS
from egohod.hod.detectors import Detector, check_boxes, detector_class, make_detector, typed_options
from egohod.hod.draw import draw_boxes, write_film
from egohod.hod.store import Outcome, Results, to_plain
from egohod.runtime import STOP_SIGNALS, UNFINISHED_PREFIX, Progress, atomic_write, content_hash, file_hash, locked

log = logging.getLogger("detect_hands")

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Part of the keys of results and drawings: to be raised when the code makes others of the same files.
VERSION = "1"
# Frames of a video, or pictures of one size, that are in memory and given to the detector at once; pictures up to this
# many pixels in all, or one.
FRAMES, PIXELS = 16, 16_000_000
ROWS = 100_000  # of a row group of boxes.parquet
RESULTS = "results.sqlite"


@dataclass
class Source:
    """A picture or a video."""

    path: Path
    name: str  # the path within the folder
    video_id: str
    key: str  # of its results: its content and all that the boxes depend on
    drawing: str  # path of the drawing within OUTPUT/drawn
    numbers: np.ndarray  # int [T] of the frames that are looked at; of a picture the number 0
    seconds: np.ndarray  # [T]
    rate: float = 0.0  # frames a second that are looked at; 0 for pictures

    def chunks(self) -> list[slice]:
        """Parts of the frames that are one result each, so that a long video resumes within."""
        return [slice(first, first + FRAMES) for first in range(0, len(self.numbers), FRAMES)]


def main(arguments: Sequence[str]) -> int:
    for each in STOP_SIGNALS:
        signal.signal(each, signal.default_int_handler)
    # Pillow refuses pictures of more than 179 million pixels, and warns from half of that on.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    args = _parse(arguments)
    options = typed_options(args.detector, _options(args.option))
    folder = args.folder.resolve()
    if not folder.is_dir():
        raise UserError(f"{args.folder}: no such folder of pictures and videos")
    output = (args.output or Path(f"{folder.name or 'root'}.detections")).resolve()
    if output == folder:
        raise UserError(f"--output is {args.output}, the folder of the pictures itself; name another one")
    failures: dict[str, str] = {}
    sources = _find(folder, output, args, _detector_key(args.detector, options), failures)
    if args.dry_run:
        with contextlib.closing(Results(output / RESULTS)) as results:
            _report_dry_run(sources, results, failures)
        return cli.DONE
    with contextlib.ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output / ".lock"))
        except BlockingIOError as error:
            raise UserError(f"{output}: another run is writing here; wait for it") from error
        except OSError as error:
            raise UserError(f"{output}: cannot be written: {error.strerror or error}") from error
        results = stack.enter_context(contextlib.closing(Results(output / RESULTS)))
        run = _Run(args, options, output, results, failures)
        stack.callback(run.close)
        run.process(sources)
        boxes = run.write_tables(sources, args.epic)
        _write_failures(output / "failures.csv", failures)
    done = len(sources) - len(failures.keys() & {source.name for source in sources})
    for name, reason in itertools.islice(failures.items(), 20):
        log.warning("cannot be read: %s: %s", name, reason)
    if failures:
        log.warning("%d of %d files cannot be read: %s", len(failures), done + len(failures), output / "failures.csv")
    if not done:
        name, reason = next(iter(failures.items()))
        raise UserError(f"{args.folder}: not one of its {len(failures)} files can be read, such as {name}: {reason}")
    log.info("%s: %s boxes of %s files", output / "boxes.parquet", f"{boxes:,}", f"{done:,}")
    log.info("%s", run.speed())
    return cli.DONE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="pictures and videos, also in folders below")
    add("--detector", default="mediapipe", choices=tuple(DETECTORS), help="default: mediapipe; see docs/hod.md")
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the detector, such as weights=FILE; may be repeated",
    )
    add("--output", type=Path, metavar="FOLDER", help="default: FOLDER.detections in the working directory")
    add("--draw", action="store_true", help="draw the boxes into pictures and films")
    add("--epic", type=Path, metavar="FOLDER", help="also write EPIC-KITCHENS' protobuf files, VIDEO.pkl, there")
    add("--fps", type=float, default=5.0, metavar="N", help="frames of a second of video; 0 for all (default: 5)")
    add("--decoder", default="auto", choices=("auto", "torchcodec", "pyav", "decord"), help="of videos (default: auto)")
    add("--dry_run", action="store_true", help="print what is left to do, and write nothing")
    args = parser.parse_args(arguments)
    if not 0 <= args.fps < np.inf:
        raise UserError(f"--fps must be 0 or above, not {args.fps:g}")
    return args


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """``name=value`` as configurations hold them: values that look like YAML's containers or null are parsed."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for text in texts:
        if "=" not in text:
            raise UserError(f"--option is '{text}', but must be NAME=VALUE")
    try:
        options = OmegaConf.to_container(OmegaConf.from_dotlist([*texts]))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"--option {' '.join(texts)}: {' '.join(str(error).split())}") from error
    assert isinstance(options, dict)
    return {str(name): value for name, value in options.items()}


def _detector_key(name: str, options: dict[str, Any]) -> str:
    """A hash of the detector with its options; files count by their content, not by their name."""
    parts = [VERSION, name]
    for option, value in sorted(options.items()):
        path = Path(value) if isinstance(value, str) else None
        with contextlib.suppress(OSError):
            if path is not None and path.is_file():
                value = file_hash(path)
            elif path is not None and path.is_dir() and detector_class(name).reads_files:
                files = sorted(each for each in path.rglob("*") if each.is_file())
                value = [(str(each.relative_to(path)), each.stat().st_size, each.stat().st_mtime_ns) for each in files]
        parts.append(json.dumps([option, value], default=str))
    return content_hash(*parts)


def _find(
    folder: Path, output: Path, args: argparse.Namespace, detector: str, failures: dict[str, str]
) -> list[Source]:
    """The pictures and videos of a folder; those that cannot be opened go to ``failures``."""
    endings = (*PICTURE_ENDINGS, *VIDEO_ENDINGS)

    def unreadable(error: OSError) -> None:
        name = os.fsencode(os.path.relpath(error.filename, folder)).decode(errors="replace")
        failures[name] = error.strerror or str(error)

    paths = []
    for place, folders, files in os.walk(folder, onerror=unreadable):
        # Drawings of a run are no pictures of the user, and hidden files are of the system (._name of macOS).
        if Path(place) == output or RESULTS in files:
            folders.clear()
            continue
        folders[:] = [each for each in folders if not each.startswith(".")]
        mine = (Path(place) / each for each in files if not each.startswith("."))
        paths += [path for path in mine if path.suffix.lower() in endings and path.is_file()]
    if not paths:
        raise UserError(f"{args.folder}: no picture or video is in it or below ({', '.join(endings)})")
    _, opener = choose_decoder(args.decoder)
    sources, ids, drawings = list[Source](), set[str](), set[str]()
    progress = Progress("open", len(paths), unit="files")  # reads them: of many videos that takes a while
    for number, path in enumerate(sorted(paths)):
        if number:
            progress.update(number)
        name = path.relative_to(folder).as_posix()
        is_video = path.suffix.lower() in VIDEO_ENDINGS
        video_id = name[: -len(path.suffix)] if is_video else name
        video_id = name if video_id in ids else video_id  # a.mp4 beside a.mov
        ids.add(video_id)
        numbers, seconds, rate = np.zeros(1, np.int64), np.zeros(1), 0.0
        try:
            name.encode()
            if is_video:
                with contextlib.closing(opener(path, str(path))) as decoder:
                    rate = min(args.fps or decoder.fps, decoder.fps)
                    count = max(1, round(decoder.duration * decoder.fps))
                    numbers = np.arange(0, count, decoder.fps / rate).astype(np.int64)
                    seconds = frame_times(numbers, decoder.fps)
            # Two different files of one content have the same boxes.
            key = content_hash(detector, file_hash(path), f"{args.fps:g} {args.decoder}" if is_video else "")
        except UnicodeEncodeError:
            failures[repr(os.fsencode(name))] = "its name is not UTF-8; rename it"
            continue
        except (VideoError, OSError) as error:
            failures[name] = _reason(error, path)
            continue
        usual, ending = ((".mp4",), ".mp4") if is_video else ((".jpg", ".jpeg"), ".jpg")
        drawing = name if path.suffix.lower() in usual else name + ending
        while drawing in drawings:  # a.png beside a.png.jpg
            drawing += ending
        drawings.add(drawing)
        sources.append(Source(path, name, video_id, key, drawing, numbers, seconds, rate))
    return sources


def _report_dry_run(sources: Sequence[Source], results: Results, failures: dict[str, str]) -> None:
    todo = done = 0
    for source in sources:
        for number, part in enumerate(source.chunks()):
            count = len(source.numbers[part])
            if results.get(source.key, f"boxes {number}") is None:
                todo += count
            else:
                done += count
    videos = sum(source.rate > 0 for source in sources)
    counts = len(sources) - videos, videos, todo, done
    log.info("%d pictures and %d videos: %d pictures are to do, %d are done", *counts)
    for name, reason in failures.items():
        log.warning("cannot be read: %s: %s", name, reason)


class _Run:
    def __init__(
        self,
        args: argparse.Namespace,
        options: dict[str, Any],
        output: Path,
        results: Results,
        failures: dict[str, str],
    ) -> None:
        self._name, self._options, self._output, self._draw = args.detector, options, output, args.draw
        self._opener = choose_decoder(args.decoder)[1]
        self._results, self._failures = results, failures
        self._detector: Detector | None = None
        self._seconds, self._detected, self._done = 0.0, 0, 0
        self._began = time.monotonic()

    def process(self, sources: Sequence[Source]) -> None:
        """Detect and draw what is not done yet."""
        self._remove_stale_drawings(sources)
        todo = [source for source in sources if not self._is_done(source)]
        if len(todo) < len(sources):
            log.info("%d of %d files are done already", len(sources) - len(todo), len(sources))
        if any(self._stored(source, number) is None for source in todo for number in range(len(source.chunks()))):
            self._detector = make_detector(self._name, self._options)  # before the first picture: options may be wrong
        with Progress("detect", sum(len(source.numbers) for source in todo), unit="pictures") as progress:
            self._progress = progress
            self._process_pictures([source for source in todo if not source.rate])
            for source in todo:
                if source.rate:
                    self._process_video(source)

    def _process_pictures(self, sources: Sequence[Source]) -> None:
        # Networks take several pictures of one size at once; MediaPipe would follow a hand from one into the next.
        most = FRAMES if detector_class(self._name).is_batched else 1
        group: list[tuple[Source, np.ndarray]] = []

        def finish() -> None:
            if not group:
                return
            pictures = np.stack([picture for _, picture in group])
            tables = self._detect_pictures([source for source, _ in group], pictures)
            for (source, picture), boxes in zip(group, tables, strict=True):
                self._draw_picture(source, picture, boxes)
            group.clear()

        for source in sources:
            try:
                with Image.open(source.path) as image:
                    # Phones store pictures lying, with a note how to turn them.
                    picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            except Exception as error:  # a damaged file can raise anything in its reader
                self._failures[source.name] = _reason(error, source.path)
                self._advance(1)
                continue
            boxes = self._stored(source, 0)
            if boxes is not None:
                self._draw_picture(source, picture, boxes)
                continue
            if group and (picture.shape != group[0][1].shape or (len(group) + 1) * picture.size > 3 * PIXELS):
                finish()
            group.append((source, picture))
            if len(group) >= most:
                finish()
        finish()

    def _detect_pictures(self, sources: Sequence[Source], pictures: np.ndarray) -> list[pd.DataFrame | None]:
        # Numbered, so that each finds its boxes again: one by one they all have the number 0.
        numbers = np.arange(len(sources))
        try:
            boxes = self._detect(sources[0].video_id, numbers, np.zeros(len(sources)), pictures)
        except VideoError as error:
            self._failures |= {source.name: str(error) for source in sources}
            self._advance(len(sources))
            return [None] * len(sources)
        tables: list[pd.DataFrame | None] = []
        for number, source in enumerate(sources):
            mine = boxes.filter(pa.compute.equal(boxes["frame_number"], number))
            mine = mine.set_column(mine.column_names.index("frame_number"), "frame_number", pa.array([0] * len(mine)))
            tables.append(self._store(source, 0, mine))
        return tables

    def _draw_picture(self, source: Source, picture: np.ndarray, boxes: pd.DataFrame | None) -> None:
        if boxes is None:
            return
        if self._draw:
            with self._drawing(source) as temporary:
                draw_boxes(picture, boxes).save(temporary, quality=90)
        self._advance(1)

    def _process_video(self, source: Source) -> None:
        def drawn(decoder: Any) -> Iterator[np.ndarray]:
            for number, part in enumerate(source.chunks()):
                boxes, seconds = self._stored(source, number), source.seconds[part]
                pictures = decoder.read_at(seconds) if boxes is None or self._draw else None
                if boxes is None:
                    detected = self._detect(source.video_id, source.numbers[part], seconds, pictures)
                    boxes = self._store(source, number, detected)
                if self._draw and pictures is not None:
                    for second, picture in zip(seconds, pictures, strict=True):
                        # Files made elsewhere have moments between the frames.
                        nearest = np.abs(boxes["second"].to_numpy()[:, None] - seconds).argmin(axis=1)
                        yield np.asarray(draw_boxes(picture, boxes[seconds[nearest] == second]))
                self._advance(len(seconds))

        try:
            with contextlib.closing(self._opener(source.path, str(source.path))) as decoder:
                if self._draw:
                    with self._drawing(source) as temporary:
                        write_film(drawn(decoder), source.rate, temporary)
                else:
                    for _ in drawn(decoder):
                        pass
        except VideoError as error:
            self._failures[source.name] = str(error)

    # --- Results ---

    def _detect(self, video_id: str, numbers: np.ndarray, seconds: np.ndarray, pictures: np.ndarray | None) -> pa.Table:
        assert self._detector is not None
        began = time.monotonic()
        boxes = self._detector.detect(video_id, numbers, seconds, pictures)
        self._seconds += time.monotonic() - began
        self._detected += len(numbers)
        return check_boxes(boxes, f"detector {self._name}, boxes of {video_id}")

    def _store(self, source: Source, number: int, boxes: pa.Table) -> pd.DataFrame:
        columns = {name: boxes[name].to_pylist() for name in SCHEMA.names if name != "video_id"}
        self._results.put(source.key, f"boxes {number}", Outcome(to_plain(columns)))
        stored = self._stored(source, number)
        assert stored is not None
        return stored

    def _stored(self, source: Source, number: int) -> pd.DataFrame | None:
        """The boxes of a chunk; read again where they were just stored, since numbers in the store are rounded."""
        table = _stored_table(self._results, source, number)
        return None if table is None else table.to_pandas()

    def _is_done(self, source: Source) -> bool:
        is_drawn = not self._draw or self._is_drawn(source)
        return is_drawn and all(
            self._results.get(source.key, f"boxes {number}") is not None for number in range(len(source.chunks()))
        )

    def _is_drawn(self, source: Source) -> bool:
        outcome = self._results.get(source.drawing, "drawn")
        return outcome is not None and outcome.parsed() == source.key and self._path(source).is_file()

    def _path(self, source: Source) -> Path:
        return self._output / "drawn" / source.drawing

    @contextlib.contextmanager
    def _drawing(self, source: Source) -> Iterator[Path]:
        """Yield where to write the drawing of a source, and note what it shows."""
        path = self._path(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            yield temporary
        self._results.put(source.drawing, "drawn", Outcome(source.key))

    def _remove_stale_drawings(self, sources: Sequence[Source]) -> None:
        """Remove drawings of other options, of files that changed, and of files that are gone; none of anybody else.

        And what a run that was killed left unfinished.
        """
        folder, current = self._output / "drawn", {source.drawing: source.key for source in sources}
        removed = 0
        for path in (*self._output.glob(f"{UNFINISHED_PREFIX}*"), *folder.rglob(f"{UNFINISHED_PREFIX}*")):
            path.unlink()
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            name = path.relative_to(folder).as_posix()
            outcome = self._results.get(name, "drawn")
            if path.is_file() and outcome is not None and outcome.parsed() != current.get(name):
                path.unlink()
                removed += 1
        if removed:
            log.info("removed %d drawings of other settings or files", removed)

    def write_tables(self, sources: Sequence[Source], epic: Path | None) -> int:
        """Write all boxes to boxes.parquet, and with ``epic`` as EPIC-KITCHENS' files there; returns their number."""
        count, path, waiting = 0, self._output / "boxes.parquet", list[pa.Table]()
        with atomic_write(path) as temporary, pa.parquet.ParquetWriter(temporary, SCHEMA) as writer:
            for source in sources:
                if source.name in self._failures:
                    continue
                tables = [_stored_table(self._results, source, number) for number in range(len(source.chunks()))]
                table = pa.concat_tables([each for each in tables if each is not None])
                count += len(table)
                if epic is not None:
                    detections.write_epic(table, epic, {source.video_id: source.numbers})
                # In parts of many rows, not one for each picture: readers take time for each.
                waiting.append(table)
                if sum(map(len, waiting)) >= ROWS:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting.clear()
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
        return count

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress.update(self._done, note=f"{len(self._failures)} unreadable" if self._failures else "")

    def speed(self) -> str:
        """How fast it was, in words."""
        seconds = time.monotonic() - self._began
        text = f"{self._done} pictures in {seconds:.1f} s"
        if self._detected:
            text += f"; detector {self._name}: {self._detected / self._seconds:.2f} pictures a second"
        return text

    def close(self) -> None:
        """End what the detector started."""
        if self._detector is not None:
            self._detector.close()


def _stored_table(results: Results, source: Source, number: int) -> pa.Table | None:
    outcome = results.get(source.key, f"boxes {number}")
    if outcome is None:
        return None
    columns = outcome.parsed()
    return (
        pa.table({"video_id": [source.video_id] * len(columns["second"]), **columns}).select(SCHEMA.names).cast(SCHEMA)
    )


def _write_failures(path: Path, failures: dict[str, str]) -> None:
    if not failures:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "reason"), *failures.items()])


def _reason(error: Exception, path: Path) -> str:
    """An error in one line without the file's name, which is beside it."""
    text = " ".join(str(error).replace(repr(str(path)), "").replace(str(path), "").split()).strip(": ")
    return text or type(error).__name__


if __name__ == "__main__":
    run_tool(main)
