"""Exchange clips, search hits and boxes of hands and objects with other programs.

    python tools/exchange.py fiftyone runs/demo/details/ek100.json --videos videos --output look
    python tools/exchange.py rerun boxes.parquet --videos videos --output tracks --narrations hod.csv
    python tools/exchange.py cvat boxes.parquet --videos videos --output task              boxes -> CVAT
    python tools/exchange.py cvat annotations.xml --videos videos --output right.parquet   and back
    python tools/exchange.py labelstudio boxes.parquet --videos videos --output task       boxes -> Label Studio
    python tools/exchange.py labelstudio export.json --videos videos --output right.parquet
    python tools/exchange.py hamer results --fps 30 --focal 0.8 --output hands.parquet     3-D hands, for tracks.hands3d
    python tools/exchange.py wilor results --fps 30 --focal 0.8 --output hands.parquet     of WiLoR-mini

boxes.parquet is a table of detections (tools/generate_hod.py --export_detections). Corrected boxes are one again, for
data.train.NAME.detections or detector.options.path. --videos has whole videos or chunks, each of which is a file of its
own for the other programs. Only Rerun's files need another package, rerun-sdk.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import itertools
import json
import logging
import math
import os
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from _common import run_tool, tool_parser

from egohod import cli
from egohod.data import detections
from egohod.data.decoders import VIDEO_ENDINGS, choose_decoder
from egohod.data.detections import (
    CONTACT,
    EDGES,
    LEFT,
    NEAREST_SECONDS,
    NO_CONTACT,
    RIGHT,
    ROLE_COLOURS,
    SCHEMA,
    UNKNOWN_STATE,
)
from egohod.data.formats.base import read_csv
from egohod.data.formats.custom import rows_of_csv
from egohod.data.videos import list_videos
from egohod.errors import UserError, nearest
from egohod.hod.config import TracksConfig
from egohod.hod.hands3d import from_hamer, from_wilor
from egohod.runtime import atomic_write, write_text

log = logging.getLogger("exchange")

# What the other programs call a box: kind and side of the detections' schema.
THINGS = {"left hand": ("hand", LEFT), "right hand": ("hand", RIGHT), "object": ("object", -1)}
# Label Studio's keyframes carry no attributes, so its labels hold the state of contact, too.
_LABELS = {
    **{name: (*thing, UNKNOWN_STATE) for name, thing in THINGS.items()},
    **{
        f"{name}, {word}": (*THINGS[name], state)
        for name in ("left hand", "right hand")
        for state, word in CONTACT.items()
        if state != UNKNOWN_STATE
    },
}
# A box may be this much outside the picture, by rounding to hundredths of pixels and percent; it is cut there.
_ROUNDING = 1e-3
_CHUNK = re.compile(r"(.+)/(\d{4,})")
# Mutable ones may change from key frame to key frame.
_CVAT_ATTRIBUTES: list[dict[str, Any]] = [
    {
        "name": "contact",
        "mutable": True,
        "input_type": "select",
        "default_value": "unknown",
        "values": [*CONTACT.values()],
    },
    *(
        {"name": name, "mutable": name != "name", "input_type": "text", "default_value": "", "values": [""]}
        for name in ("score", "target", "name")
    ),
]


class _Moment(NamedTuple):
    video: str
    start: float
    end: float  # infinite: to the end of the video
    label: str
    confidence: float | None
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class _Video:
    """A video file: a whole video, or a chunk of it that begins at its frame ``first``."""

    id: str  # the path below the root, without its ending
    path: Path
    video: str  # the id in tables
    first: int
    fps: float
    frames: int
    width: int
    height: int


@dataclass(frozen=True)
class _Key:
    """A box of a track at a frame; ``is_visible`` there, and ``continues``: it is visible up to the next one."""

    frame: int
    edges: tuple[float, ...]  # shares of the picture
    is_visible: bool = True
    continues: bool = True
    state: int = UNKNOWN_STATE
    score: float = 1.0
    target: tuple[float, ...] | None = None  # the point that a hand's offset leads to


class _Videos:
    """The video files below a folder: whole videos, and chunks of equal length (tools/chunk_videos.py)."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.files, faults = list_videos(root)
        self.used: dict[str, _Video] = {}  # by id, of :meth:`find`
        self._open = functools.cache(self._read)
        self._chunks = defaultdict[str, list[str]](list)
        for each in self.files:
            # A video of this name beside a first chunk is a chunk, too.
            if (match := _CHUNK.fullmatch(each)) and f"{match[1]}/0000" in self.files:
                self._chunks[match[1]].append(each)
        for fault in faults:
            log.warning("%s", fault)

    def parts(self, video: str, where: str) -> list[_Video]:
        """The files of a video, in order. Raises :class:`UserError` as :meth:`find` does."""
        if video in self.files or video not in self._chunks:
            return [self.find(video, where)]
        return [self._open(each) for each in sorted(self._chunks[video])]

    def find(self, name: str, where: str) -> _Video:
        """The file that another program calls ``name``: an id, a path, an address, or an upload's name."""
        path = unquote(name.rpartition("?d=")[2])
        if PurePosixPath(path).suffix.lower() in VIDEO_ENDINGS:
            path = str(PurePosixPath(path).with_suffix(""))
        # Label Studio puts eight digits in front of the names of uploads.
        last = {PurePosixPath(path).name, re.sub(r"^[0-9a-f]{8}-", "", PurePosixPath(path).name)}
        matches = next(([each] for each in (name, path) if each in self.files), None)
        matches = matches or [each for each in self.files if PurePosixPath(each).name in last]
        if not matches:
            raise UserError(f"{where}: is about '{name}', which is not in {self.root}{nearest(path, list(self.files))}")
        if len(matches) > 1:
            raise UserError(f"{where}: '{name}' may be any of {', '.join(matches[:3])} in {self.root}; give --video")
        self.used[matches[0]] = self._open(matches[0])
        return self.used[matches[0]]

    def _read(self, name: str) -> _Video:
        path, match = self.files[name], _CHUNK.fullmatch(name)
        decoder = choose_decoder("auto")[1](path, str(path))
        try:
            height, width = decoder.read_at(np.zeros(1)).shape[1:3]
            fps, frames, video, first = decoder.fps, max(1, round(decoder.duration * decoder.fps)), name, 0
        finally:
            decoder.close()
        if match and name in self._chunks[match[1]]:
            video = match[1]
            if int(match[2]):
                zero = self._open(f"{video}/0000")
                # Chunks have whole seconds, and perhaps the frame in which the last one ends.
                first = round(int(match[2]) * round(zero.frames / zero.fps) * fps)
        return _Video(name, path, video, first, fps, frames, width, height)


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    programs = parser.add_subparsers(dest="program", required=True, metavar="PROGRAM")
    helps = {
        "fiftyone": (_fiftyone, "clips with predictions, as a dataset of temporal detections for FiftyOne"),
        "rerun": (_rerun, "boxes, contact and narrations over the video, as .rrd files for Rerun's viewer"),
        "cvat": (_cvat, "boxes to CVAT for video 1.1, and back from CVAT for video or images 1.1"),
        "labelstudio": (_label_studio, "boxes to Label Studio's tasks, and back from its JSON"),
        "hamer": (_hands3d, "arrays of HaMeR's or WiLoR's demo.py to a table of 3-D hands for tracks.hands3d"),
        "wilor": (_hands3d, "results of WiLoR-mini to a table of 3-D hands for tracks.hands3d"),
    }
    for name, (_, text) in helps.items():
        add = programs.add_parser(name, help=text, description=text).add_argument
        if name in ("hamer", "wilor"):
            add("folder", type=Path, metavar="FOLDER", help="a folder of results for each video, named as its video_id")
            add("--fps", type=float, required=True, help="frame rate of the videos")
            focal = "focal length of the camera, in longer sides of its picture: 0.5 / tan(half of its angle of view)"
            add("--focal", type=float, required=True, help=focal)
            add("--output", required=True, type=Path, help="a .parquet file")
            continue
        nargs: dict[str, Any] = {} if name in ("fiftyone", "rerun") else {"nargs": "+"}
        kinds = "search hits (.json), details/*.json of results, a csv" if name == "fiftyone" else "boxes"
        add("files", type=Path, metavar="FILE", help=f"{kinds}; or what was corrected" if nargs else kinds, **nargs)
        add("--videos", required=True, metavar="FOLDER", help="folder of the videos, whole or in chunks")
        add("--output", required=True, type=Path, help="a folder; with what was corrected, a .parquet file")
        if name == "rerun":
            add("--narrations", type=Path, metavar="CSV", help="video_id,start_second,end_second,text")
            add("--no_video", action="store_true", help="boxes alone: .rrd files contain the whole video otherwise")
        else:
            add("--video", metavar="ID", help="the one video that the file is about, if its name differs")
        if name == "fiftyone":
            add("--label", default="hit", help="label of search hits without text, such as the sentence")
        if nargs:
            add("--key_frames", action="store_true", help="only key frames, without the boxes between them")
            add("--base", type=Path, metavar="PARQUET", help="boxes of all videos, of which these replace some")
    args = parser.parse_args(arguments)
    try:
        helps[args.program][0](args)
    except OSError as error:
        raise UserError(f"{error.filename or args.output}: {error.strerror or error}") from error
    return cli.DONE


# --- 3-D hands ---


def _hands3d(args: argparse.Namespace) -> None:
    """Write a table of 3-D hands of all videos of a folder."""
    convert = {"hamer": from_hamer, "wilor": from_wilor}[args.program]
    if args.output.suffix != ".parquet":
        raise UserError(f"--output is '{args.output}', but must end in .parquet")
    if not (folders := sorted(each for each in args.folder.iterdir() if each.is_dir())):
        raise UserError(f"{args.folder}: holds no folder; each video's results are in one, named as its video_id")
    hands = pa.concat_tables([convert(each, each.name, args.fps, args.focal) for each in folders])
    with atomic_write(args.output) as temporary:
        pa.parquet.write_table(hands, temporary)
    log.info("wrote %d hands of %d videos to %s", len(hands), len(folders), args.output)


# --- FiftyOne ---


def _fiftyone(args: argparse.Namespace) -> None:
    """Write a FiftyOneTemporalDetectionDataset: data/, links to the videos, and labels.json."""
    videos, moments = _Videos(args.videos), list(_moments(args))
    if not moments:
        raise UserError(f"{args.files}: holds no clip with a label")
    classes = sorted({each.label for each in moments})
    number = {name: i for i, name in enumerate(classes)}
    labels, files = defaultdict[str, list[Any]](list), dict[str, _Video]()
    for each in moments:
        video = videos.parts(args.video or each.video, str(args.files))[0]
        for part in videos.parts(args.video or each.video, str(args.files)):
            if part.first <= each.start * part.fps + 0.5:
                video = part  # a moment belongs to the chunk in which it starts
        if not 0 <= each.start < each.end or (start := round(each.start * video.fps) - video.first) >= video.frames:
            span = f"from {each.start:g} to {each.end:g} s"
            raise UserError(f"{args.files}: a clip of {video.video} {span}, which the video does not have")
        # Frames count from 1 there, and the last one is included.
        last = max(start + 1, min(video.frames, round(min(each.end, 1e9) * video.fps) - video.first))
        confidence = {} if each.confidence is None else {"confidence": each.confidence}
        entry = {"label": number[each.label], "support": [start + 1, last], **confidence}
        labels[video.id].append({**entry, "attributes": dict(each.attributes)})
        files[video.id] = video
    for video in files.values():
        link = args.output / "data" / f"{video.id}{video.path.suffix}"
        if link.is_symlink():
            link.unlink()
        if link.exists():
            raise UserError(f"{link}: is there already, and no link; choose another --output")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.abspath(video.path))
    write_text(args.output / "labels.json", json.dumps({"classes": classes, "labels": labels}, indent=1) + "\n")
    log.info("wrote %d moments of %d videos to %s", len(moments), len(labels), args.output)


def _moments(args: argparse.Namespace) -> Iterator[_Moment]:
    path = args.files
    if path.suffix.lower() == ".csv":
        yield from _moments_of_csv(path, args.video)
        return
    content = _json(path)
    try:
        if isinstance(content, list):
            for rank, hit in enumerate(content, start=1):
                end = math.inf if hit["end"] is None else float(hit["end"])
                label, score = str(hit.get("text") or args.label), float(hit["similarity"])
                yield _Moment(str(hit["video"]), float(hit["start"]), end, label, score, {"rank": rank})
            return
        from egohod.evaluation.report import cards_of  # it needs a second to start

        clips = content["clips"]
        for table in content["tables"]:
            for card in cards_of(table, clips):
                for caption, row in card.pictures:
                    # The pictures of a question are its choices, whose label is what was asked.
                    label = f"{caption}: {card.truth}" if caption else card.answers[0].text
                    end = math.inf if clips["end"][row] is None else float(clips["end"][row])
                    more = {"truth": card.truth, "correct": bool(card.right), "task": table["kind"]}
                    start, score = float(clips["start"][row]), card.answers[0].similarity
                    yield _Moment(str(clips["video"][row]), start, end, str(label), score, more)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = "neither the --json of tools/search.py nor the details of an evaluation"
        raise UserError(f"{path}: {what} ({type(error).__name__}: {error})") from error


def _moments_of_csv(path: Path, video: str | None) -> Iterator[_Moment]:
    if video is not None:
        table = read_csv(path, ("start", "end", "rank", "label", "score"))
        for row, (*numbers, rank, label) in enumerate(
            zip(*(table[name].tolist() for name in ("start", "end", "score", "rank", "label")), strict=True), start=1
        ):
            start, end, score = (_number(each, f"{path}: row {row}") for each in numbers)
            yield _Moment(video, start, end, str(label), score, {"rank": rank})
        return
    clips = rows_of_csv(path)
    for clip in (clips.row(index) for index in range(len(clips))):
        yield _Moment(clip.video_id, clip.start, clip.end, " / ".join(clip.texts) or "clip", None, {})


# --- Rerun ---


def _rerun(args: argparse.Namespace) -> None:
    """Write an .rrd file for each video with boxes."""
    try:
        import rerun as rr
    except ImportError as error:
        raise UserError(f"rerun needs another package ({error}); pip install rerun-sdk") from error
    narrations = rows_of_csv(args.narrations) if args.narrations else None
    for video, rows in _boxes(args.files, _Videos(args.videos)):
        path = args.output / f"{video.id}.rrd"
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name as id: the same boxes give the same recording, which replaces the former in an open viewer.
        recording = rr.RecordingStream("egohod", recording_id=video.id)
        recording.save(path)
        if not args.no_video:
            try:
                asset = rr.AssetVideo(path=video.path)
                shown = np.asarray(asset.read_frame_timestamps_nanos())
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{video.path}: Rerun cannot play it ({error}); --no_video leaves it out") from error
            recording.log("video", asset, static=True)
            times = rr.TimeColumn("time", duration=1e-9 * (shown - shown[:1]))
            recording.send_columns("video", indexes=[times], columns=rr.VideoFrameReference.columns_nanos(shown))
        _log_boxes(rr, recording, video, rows)
        if narrations is not None:
            rows_of_video = narrations.rows_of_videos().get(video.video, range(0))
            clips = [
                (narrations.row(i).start - video.first / video.fps, narrations.row(i).texts) for i in rows_of_video
            ]
            clips = [(start, texts) for start, texts in clips if 0 <= start < video.frames / video.fps]
            if clips:
                times = rr.TimeColumn("time", duration=[start for start, _ in clips])
                texts = rr.TextLog.columns(text=[" / ".join(texts) for _, texts in clips])
                recording.send_columns("narration", indexes=[times], columns=texts)
        recording.disconnect()
        log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)


def _log_boxes(rr: Any, recording: Any, video: _Video, rows: Sequence[Mapping[str, Any]]) -> None:
    """Boxes in pixels, and the state of contact of each hand as a curve: -1 unknown, 0 none, else what it touches."""
    frames = sorted({row["frame"] for row in rows})
    # The viewer shows what was logged last: where nothing is detected for long, an empty set of boxes ends it.
    hold = 1 + int(NEAREST_SECONDS * video.fps)
    ends = {frame + hold for frame, after in zip(frames, [*frames[1:], math.inf], strict=True) if after > frame + hold}
    moments = sorted({*frames, *ends})
    # The start of a frame's display, as the video's own time stamps.
    times = [rr.TimeColumn("time", duration=np.array(moments) / video.fps), rr.TimeColumn("frame", sequence=moments)]
    for (name, thing), colour in zip(THINGS.items(), ROLE_COLOURS, strict=True):
        by_frame = defaultdict[int, list[Mapping[str, Any]]](list)
        for row in rows:
            if (row["kind"], row["side"] if row["kind"] == "hand" else -1) == thing:
                by_frame[row["frame"]].append(row)
        chosen = [row for frame in moments for row in by_frame[frame]]
        if not chosen:
            continue
        edges = np.array([[row[edge] for edge in EDGES] for row in chosen]) * ([video.width, video.height] * 2)
        is_hand = thing[0] == "hand"
        words = [f"{name}: {CONTACT[row['state']]}" if is_hand else row["name"] or name for row in chosen]
        boxes = rr.Boxes2D.columns(
            centers=(edges[:, :2] + edges[:, 2:]) / 2,
            half_sizes=(edges[:, 2:] - edges[:, :2]) / 2,
            labels=words,
            colors=[colour] * len(chosen),
        )
        lengths = [len(by_frame[frame]) for frame in moments]
        # A space in an entity's path is a warning.
        entity = name.replace(" ", "_")
        recording.send_columns(f"video/{entity}", indexes=times, columns=boxes.partition(lengths))
        if is_hand:
            own = [frame for frame in moments if by_frame[frame]]
            when = [rr.TimeColumn("time", duration=np.array(own) / video.fps), rr.TimeColumn("frame", sequence=own)]
            states = [by_frame[frame][0]["state"] for frame in own]
            recording.send_columns(f"contact/{entity}", indexes=when, columns=rr.Scalars.columns(scalars=states))


# --- CVAT ---


class _NoDoctype(ET.TreeBuilder):
    """Refuses a document type before it is read: entities of a few bytes can expand to gigabytes or name files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise UserError("has a DOCTYPE, which CVAT does not write and which is not read")


def _cvat(args: argparse.Namespace) -> None:
    if args.output.suffix == ".parquet":
        _import(args, _read_cvat)
        return
    for video, rows in _boxes(_single(args), _Videos(args.videos)):
        path = args.output / f"{video.id}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _cvat_xml(video, rows))
        log.info("wrote %s", path)
    # For the "Raw" tab of CVAT's label constructor: a task must have these labels before boxes are uploaded.
    labels = [{"name": name, "type": "rectangle", "attributes": _CVAT_ATTRIBUTES} for name in THINGS]
    write_text(args.output / "labels.json", json.dumps(labels, indent=1) + "\n")


def _cvat_xml(video: _Video, rows: Sequence[dict[str, Any]]) -> str:
    """The text of annotations.xml, CVAT for video 1.1; the format is documented at docs.cvat.ai, "XML annotation"."""
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    task = ET.SubElement(ET.SubElement(root, "meta"), "task")
    facts = {"name": video.id, "size": video.frames, "mode": "interpolation", "start_frame": 0}
    for name, value in {**facts, "stop_frame": video.frames - 1, "source": f"{video.id}{video.path.suffix}"}.items():
        ET.SubElement(task, name).text = str(value)
    size = ET.SubElement(task, "original_size")
    ET.SubElement(size, "width").text, ET.SubElement(size, "height").text = str(video.width), str(video.height)
    labels = ET.SubElement(task, "labels")
    for name in THINGS:
        label = ET.SubElement(labels, "label")
        ET.SubElement(label, "name").text = name
        attributes = ET.SubElement(label, "attributes")
        for each in _CVAT_ATTRIBUTES:
            attribute = ET.SubElement(attributes, "attribute")
            for key, value in {**each, "values": "\n".join(each["values"])}.items():
                ET.SubElement(attribute, key).text = str(value)
    for number, track in enumerate(_tracks(rows, video.fps)):
        element = ET.SubElement(root, "track", id=str(number), label=_thing(track[0]), source="auto")
        boxes = [(row["frame"], row, "0") for row in track]
        if (end := boxes[-1][0] + 1) < video.frames:
            boxes.append((end, track[-1], "1"))  # without it the box would stay to the end of the video
        for frame, row, outside in boxes:
            left, top, right, bottom = (
                repr(row[edge] * side) for edge, side in zip(EDGES, [video.width, video.height] * 2, strict=True)
            )
            at = {"frame": str(frame), "keyframe": "1", "outside": outside, "occluded": "0"}
            at |= {"xtl": left, "ytl": top, "xbr": right, "ybr": bottom, "z_order": "0"}
            box, target = ET.SubElement(element, "box", at), _target(row)
            values = (
                CONTACT[row["state"]],
                repr(row["score"]),
                "" if target is None else " ".join(map(repr, target)),
                row["name"] or "",
            )
            for each, value in zip(_CVAT_ATTRIBUTES, values, strict=True):
                ET.SubElement(box, "attribute", name=each["name"]).text = value
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _read_cvat(path: Path, videos: _Videos, video_id: str | None, only_keys: bool) -> Iterator[dict[str, Any]]:
    """Rows of detections from CVAT for video 1.1, or for images 1.1 of frames that are named by their number."""
    try:
        root = ET.parse(path, ET.XMLParser(target=_NoDoctype())).getroot()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ET.ParseError, ValueError, LookupError) as error:  # the last two for encodings
        raise UserError(f"{path}: not readable as XML: {error}; CVAT's archives contain annotations.xml") from error
    if root.tag != "annotations":
        raise UserError(f"{path}: begins with <{root.tag[:50]}>, not with the <annotations> of CVAT 1.1")
    name = video_id or root.findtext("meta//source") or root.findtext("meta/task/name")
    if not name:
        raise UserError(f"{path}: does not name its video; give --video")
    video = videos.find(name, str(path))
    stop = root.findtext("meta//stop_frame")
    end = video.frames if stop is None else min(video.frames, 1 + int(_number(stop, f"{path}: stop_frame")))
    size = [root.findtext(f"meta//original_size/{side}") for side in ("width", "height")]
    for element in root:
        if element.tag not in ("track", "image"):
            continue
        where, is_track = f"{path}: {element.tag} {element.get('id')}", element.tag == "track"
        sides = size if is_track else [element.get("width"), element.get("height")]
        scale = [_number(side, f"{where}: size of the picture") for side in sides]
        tracks = defaultdict[Any, list[_Key]](list)
        for place, box in enumerate(element):
            number = box.get("frame") if is_track else _last_number(element.get("name"))
            at = f"{where}, frame {number}"
            if box.tag != "box":
                raise UserError(f"{at}: a {box.tag[:50]}, but only boxes can be read")
            label = (element if is_track else box).get("label") or ""
            if label not in THINGS:
                raise UserError(f"{at}: label '{label}'{nearest(label, list(THINGS))}")
            key, thing = _cvat_key(box, int(_number(number, at)), scale, at)
            if not only_keys or box.get("keyframe") != "0":
                # Boxes of an image are tracks of their own.
                tracks[label, thing, -1 if is_track else place].append(key)
        for (label, thing, place), keys in tracks.items():
            yield from _rows(video, THINGS[label], thing, keys, end, only_keys or place >= 0, where)


def _cvat_key(box: ET.Element, frame: int, scale: Sequence[float], at: str) -> tuple[_Key, str]:
    """A box, and the name of its object."""
    if box.get("rotation") and _number(box.get("rotation"), at) % 360:
        raise UserError(f"{at}: the box is rotated; detections are upright")
    more = {each.get("name"): (each.text or "").strip() for each in box.iter("attribute")}
    pixels = [_number(box.get(edge), f"{at}: {edge}") for edge in ("xtl", "ytl", "xbr", "ybr")]
    edges = _shares([value / max(side, 1e-9) for value, side in zip(pixels, [*scale, *scale], strict=True)], at)
    target = tuple(_number(each, f"{at}: target") for each in (more.get("target") or "").split())
    word, words = more.get("contact") or CONTACT[UNKNOWN_STATE], {name: state for state, name in CONTACT.items()}
    if word not in words:
        raise UserError(f"{at}: contact '{word}'{nearest(word, list(words))}")
    score, shown = _number(more.get("score") or "1", f"{at}: score"), box.get("outside") != "1"
    key = _Key(frame, edges, shown, shown, words[word], score, target if len(target) == 2 else None)
    return key, more.get("name", "")


def _last_number(name: str | None) -> str | None:
    """The number of a frame in the name of its file, such as frame_000012.png."""
    numbers = re.findall(r"\d+", PurePosixPath(name or "").stem)
    return numbers[-1] if numbers else None


# --- Label Studio ---


def _label_studio(args: argparse.Namespace) -> None:
    if args.output.suffix == ".parquet":
        _import(args, _read_label_studio)
        return
    videos, tasks = _Videos(args.videos), []
    for video, rows in _boxes(_single(args), videos):
        # How Label Studio's local storage calls a file below its root.
        address = "/data/local-files/?d=" + quote(video.path.relative_to(videos.root).as_posix())
        data = {"video": address, "video_id": video.id, "fps": video.fps}
        result = [
            region for number, track in enumerate(_tracks(rows, video.fps)) for region in _regions(video, track, number)
        ]
        tasks.append({"data": data, "predictions": [{"model_version": "egohod", "result": result}]})
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "tasks.json", json.dumps(tasks, indent=1) + "\n")
    # The frame rate: without it Label Studio counts 24 frames a second, whatever the video has.
    view = ET.Element("View")
    ET.SubElement(view, "Video", name="video", value="$video", frameRate="$fps")
    ET.SubElement(view, "VideoRectangle", name="box", toName="video")
    labels = ET.SubElement(view, "Labels", name="label", toName="video")
    for name in _LABELS:
        ET.SubElement(labels, "Label", value=name)
    ET.indent(view)
    write_text(args.output / "labels.xml", ET.tostring(view, encoding="unicode") + "\n")
    log.info("wrote %d videos to %s", len(tasks), args.output)


def _regions(video: _Video, track: Sequence[dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
    """A track as regions, a new one where the state of contact changes, since a region has one label."""
    for part, (state, group) in enumerate(itertools.groupby(track, key=lambda row: row["state"])):
        rows, label = list(group), _thing(track[0])
        if label != "object" and state != UNKNOWN_STATE:
            label += f", {CONTACT[state]}"
        sequence = []
        for row in rows:
            left, top, right, bottom = (row[edge] for edge in EDGES)
            place = {"x": 100 * left, "y": 100 * top, "width": 100 * (right - left), "height": 100 * (bottom - top)}
            # Frames count from 1 there. A box that is not enabled is the last of its stretch.
            at = {
                "frame": row["frame"] + 1,
                "time": row["frame"] / video.fps,
                "enabled": row is not rows[-1],
            }
            target = _target(row)
            sequence.append({**at, **place, "rotation": 0, "score": row["score"], "target": target and list(target)})
        length = {"framesCount": video.frames, "duration": video.frames / video.fps}
        names = {"meta": {"text": [rows[0]["name"]]}} if rows[0]["name"] else {}
        to = {"id": f"{number}-{part}", "type": "videorectangle", "from_name": "box", "to_name": "video"}
        yield {**to, "value": {**length, "sequence": sequence, "labels": [label]}, **names}


def _read_label_studio(path: Path, videos: _Videos, video_id: str | None, only_keys: bool) -> Iterator[dict[str, Any]]:
    """Rows of detections from an export as JSON: of each task the last annotation, or else the last prediction."""
    content, where = _json(path), str(path)
    try:
        for number, task in enumerate(content if isinstance(content, list) else [content], start=1):
            where = f"{path}: task {task.get('id', number)}"
            data = task["data"]
            video = videos.find(video_id or data.get("video_id") or data["video"], where)
            results = [each for each in task.get("annotations") or () if not each.get("was_cancelled")]
            if len(results) > 1:
                log.warning("%s: has %d annotations, of which the last is used", where, len(results))
            results = results or task.get("predictions") or []
            for region in results[-1]["result"] if results else ():
                where = f"{path}: task {task.get('id', number)}, region {region.get('id')}"
                yield from _read_region(region, video, only_keys, where)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: not as Label Studio exports JSON ({type(error).__name__}: {error})") from error


def _read_region(region: Any, video: _Video, only_keys: bool, where: str) -> Iterator[dict[str, Any]]:
    if region["type"] != "videorectangle":
        raise UserError(f"{where}: a {str(region['type'])[:50]}, but only boxes of videos can be read")
    value = region["value"]
    label = (value.get("labels") or [""])[0]
    if label not in _LABELS:
        raise UserError(f"{where}: label '{label}'{nearest(str(label), list(_LABELS))}")
    kind, side, state = _LABELS[label]
    # Frames of a project without frameRate are 1/24 s; those of the video are needed.
    rate, length = video.fps, (value.get("framesCount"), value.get("duration"))
    if all(length):
        count, seconds = (_number(each, where) for each in length)
        rate = count / max(seconds, 1e-9)
    keys = []
    for item in value["sequence"]:
        at = f"{where}, frame {item['frame']}"
        if _number(item.get("rotation") or 0, at) % 360:
            raise UserError(f"{at}: the box is rotated; detections are upright")
        if only_keys and item.get("auto"):
            continue
        frame = int(_number(item["frame"], at)) - 1
        if abs(rate / video.fps - 1) > 0.01:
            frame = math.floor((frame + 0.5) / max(rate, 1e-9) * video.fps)
        x, y, width, height = (_number(item[side], f"{at}: {side}") / 100 for side in ("x", "y", "width", "height"))
        edges, target = _shares((x, y, x + width, y + height), at), item.get("target") or ()
        point = tuple(_number(each, f"{at}: target") for each in target)
        score, enabled = _number(item.get("score", 1), f"{at}: score"), bool(item.get("enabled", True))
        keys.append(_Key(frame, edges, True, enabled, state, score, point if len(point) == 2 else None))
    name = ((region.get("meta") or {}).get("text") or [""])[0]
    yield from _rows(video, (kind, side), str(name), keys, video.frames, only_keys, where)


# --- Both ---


def _single(args: argparse.Namespace) -> Path:
    if len(args.files) > 1:
        raise UserError(f"{args.output}: boxes come from one table or a folder of tables; to import end it in .parquet")
    return args.files[0]  # type: ignore[no-any-return]


def _boxes(path: Path, videos: _Videos) -> Iterator[tuple[_Video, list[dict[str, Any]]]]:
    """The rows of a table of detections, file by file in the order of the frames; ``frame`` counts in the file."""
    table = detections.read(path).sort_by([("video_id", "ascending"), ("frame_number", "ascending")])
    if not len(table) or table["video_id"].null_count or table["frame_number"].null_count:
        raise UserError(f"{path}: holds no box, or one without video_id or frame_number")
    every = (row for batch in table.to_batches() for row in batch.to_pylist())
    for name, group in itertools.groupby(every, key=lambda row: row["video_id"]):
        parts = videos.parts(name, str(path))
        firsts, rows_of = [part.first for part in parts], defaultdict[int, list[dict[str, Any]]](list)
        for row in group:
            number = max(0, bisect.bisect_right(firsts, row["frame_number"]) - 1)
            part = parts[number]
            row["frame"] = row["frame_number"] - part.first
            row["state"] = row["state"] if row["state"] in CONTACT else UNKNOWN_STATE
            # Neither XML nor JSON has NaN.
            row["score"] = row["score"] if row["score"] is not None and math.isfinite(row["score"]) else 0.0
            # Another file of that name, or one that was cut, would show other moments.
            if not 0 <= row["frame"] < part.frames or abs(row["second"] * part.fps - row["frame_number"] - 0.5) > 1:
                raise UserError(
                    f"{path}: frame {row['frame_number']} of {name} is at {row['second']:.2f} s, but {part.path} has "
                    f"{part.frames} frames at {part.fps:.2f} per second: the boxes are of another file"
                )
            if row["name"] and not row["name"].isprintable():
                raise UserError(f"{path}: {name} has an object called {row['name']!r}, which no XML can hold")
            rows_of[number].append(row)
        for number in sorted(rows_of):
            yield parts[number], rows_of[number]


def _tracks(rows: Iterable[dict[str, Any]], fps: float) -> list[list[dict[str, Any]]]:
    """Boxes of one video linked over time: the nearest box of the same hand or class within ``max_gap`` seconds."""
    params, things = TracksConfig(), defaultdict[tuple[Any, ...], list[dict[str, Any]]](list)
    for row in rows:
        things[row["kind"], row["side"], row["name"] or ""].append(row)
    tracks: list[list[dict[str, Any]]] = []
    for boxes in things.values():
        going: list[list[dict[str, Any]]] = []
        for frame, group in itertools.groupby(boxes, key=lambda row: row["frame"]):
            going = [track for track in going if frame - track[-1]["frame"] <= max(1, params.max_gap * fps)]
            free = list(group)
            pairs = [
                (math.dist(_centre(track[-1]), _centre(box)), i, j)
                for i, track in enumerate(going)
                for j, box in enumerate(free)
            ]
            # Greedy, nearest first, as the tracks of the HOD pipeline.
            taken_tracks, taken = set[int](), set[int]()
            for distance, i, j in sorted(pairs):
                if distance <= params.max_jump and i not in taken_tracks and j not in taken:
                    going[i].append(free[j])
                    taken_tracks.add(i)
                    taken.add(j)
            new = [[box] for j, box in enumerate(free) if j not in taken]
            tracks += new
            going += new
    return tracks


def _thing(row: Mapping[str, Any]) -> str:
    return next(name for name, (kind, side) in THINGS.items() if kind == row["kind"] and side in (row["side"], -1))


def _centre(row: Mapping[str, Any]) -> tuple[float, float]:
    return (row["left"] + row["right"]) / 2, (row["top"] + row["bottom"]) / 2


def _target(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Where a hand points. A point and not the offset, which would be wrong as soon as the hand's box is moved."""
    offset = row["offset_x"], row["offset_y"]
    if any(each is None or math.isnan(each) for each in offset):
        return None
    x, y = _centre(row)
    return x + offset[0], y + offset[1]


def _import(args: argparse.Namespace, reader: Any) -> None:
    """Write the boxes of annotated files as a table of detections."""
    videos = _Videos(args.videos)
    rows = [row for path in args.files for row in reader(path, videos, args.video, args.key_frames)]
    if not rows:
        raise UserError(f"{', '.join(map(str, args.files))}: no box")
    rows.sort(key=lambda row: (row["video_id"], row["frame_number"], row["kind"], row["side"]))
    table = pa.Table.from_pylist(rows, SCHEMA)
    if args.base:
        before = detections.read(args.base)
        names, frames = (before.column(name).to_numpy() for name in ("video_id", "frame_number"))
        stays = np.ones(len(before), dtype=bool)
        for part in videos.used.values():
            stays &= (names != part.video) | (frames < part.first) | (frames >= part.first + part.frames)
        table = pa.concat_tables([before.filter(pa.array(stays)), table])
    detections.check(table, str(args.output))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    detections.write(table, args.output)
    log.info("wrote %d boxes of %d videos to %s", len(rows), len({row["video_id"] for row in rows}), args.output)


def _rows(
    video: _Video, thing: tuple[str, int], name: str, keys: Iterable[_Key], end: int, only_keys: bool, where: str
) -> Iterator[dict[str, Any]]:
    """Rows of one track: its key frames and, unless ``only_keys``, the boxes between them, linear in time.

    Without a later key frame a box stays where it is up to frame ``end``. Both programs show a track like that.
    """
    ordered = sorted({key.frame: key for key in keys}.values(), key=lambda key: key.frame)
    for key, after in zip(ordered, [*ordered[1:], None], strict=True):
        if not 0 <= key.frame < video.frames:
            raise UserError(f"{where}: frame {key.frame}, but {video.path} has {video.frames}; is it another video?")
        last = (end if after is None else min(after.frame, end)) if key.continues and not only_keys else key.frame + 1
        for frame in range(key.frame if key.is_visible else last, max(last, key.frame + 1)):
            share = 0.0 if after is None else (frame - key.frame) / (after.frame - key.frame)
            edges = [a + share * (b - a) for a, b in zip(key.edges, (after or key).edges, strict=True)]
            place = frame + video.first
            row = {"video_id": video.video, "frame_number": place, "second": (place + 0.5) / video.fps}
            row |= {"kind": thing[0], "side": thing[1], "name": name or None, "score": key.score}
            row |= {"state": key.state if thing[0] == "hand" else UNKNOWN_STATE, **dict(zip(EDGES, edges, strict=True))}
            if key.target is not None and key.state != NO_CONTACT:
                x, y = _centre(row)
                row |= {"offset_x": key.target[0] - x, "offset_y": key.target[1] - y}
            yield row


def _shares(edges: Sequence[float], where: str) -> tuple[float, ...]:
    """Edges in shares of the picture, cut at its border. Raises :class:`UserError` where a box is outside it."""
    left, top, right, bottom = edges
    if min(edges) < -_ROUNDING or max(edges) > 1 + _ROUNDING or left > right or top > bottom:
        shown = ", ".join(f"{100 * each:.1f}" for each in edges)
        raise UserError(f"{where}: a box from {shown} percent of the picture (left, top, right, bottom) is not in it")
    return tuple(min(max(each, 0.0), 1.0) for each in edges)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: '{value}' is no number")
    return number


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


if __name__ == "__main__":
    run_tool(main)
